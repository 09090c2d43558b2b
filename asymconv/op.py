"""The PyTorch operator `torch.ops.asymconv.conv2d`, and `conv2d`, which calls it where it pays.

`conv2d` is `torch.nn.functional.conv2d`. Where `asymconv.dispatch` knows that PyTorch's own
convolution runs a call, it is called at once: it costs nothing more, and gradients of any order,
vmap, autocast and forward mode are PyTorch's own. Else the operator runs a rung; its gradients go
through aten::convolution_backward, which can itself be differentiated.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from asymconv import build
from asymconv.dispatch import Decision, decide, facts_of, forced, hopeless, may_win, pairs_of
from asymconv.kernels import Rung

SCHEMA = (
    "conv2d(Tensor input, Tensor weight, Tensor? bias=None, SymInt[2] stride=1, "
    "SymInt[2] padding=0, SymInt[2] dilation=1, SymInt groups=1) -> Tensor"
)
"""aten::conv2d's own."""

_library = torch.library.Library("asymconv", "FRAGMENT")
# exact strides: a rung wants its input as the graph was traced, and gives what was traced
_library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))

NAME = "asymconv::conv2d"


# --- what runs ----------------------------------------------------------------------------------

_kernels: dict[tuple[str, torch.device], build.Kernel | str] = {}
_first_use = threading.Lock()
_warned: set[str] = set()


def _warn_once(reason: str) -> None:
    with _first_use:
        if reason in _warned:
            return
        _warned.add(reason)
    message = f"asymconv falls back to PyTorch's convolution: {reason}"
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def _kernel(rung: Rung, device: torch.device) -> build.Kernel | str:
    """The rung built for a device, or why it cannot be: tried once in a process."""
    key = (rung.name, device)
    found = _kernels.get(key)
    if found is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "its first call is within a CUDA graph's capture; call it once before"
        with _first_use:
            if (found := _kernels.get(key)) is None:
                try:
                    found = build.load(rung, device.type, device=device)
                except build.BuildError as error:
                    found = str(error)
                _kernels[key] = found
    return found


def _built(decision: Decision, device: torch.device) -> build.Kernel | str:
    """A decision's kernel, or why PyTorch's own runs; warns where the machine is the reason."""
    if decision.rung is None:
        if decision.machine is not None:
            _warn_once(decision.machine)
        return decision.reason
    found = _kernel(decision.rung, device)
    if isinstance(found, str):
        _warn_once(found)
    return found


def _run(x, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    decision = decide(facts_of(x, weight, bias, stride, padding, dilation, groups), forced())
    kernel = _built(decision, x.device)
    if isinstance(kernel, build.Kernel):
        return kernel(x, weight, bias, decision.shape)
    return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)


_library.impl("conv2d", _run, "CompositeExplicitAutograd")


# --- what PyTorch must know of it -----------------------------------------------------------------


@torch.library.register_fake(NAME, lib=_library)
def _fake(x, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, *arguments):
        ctx.arguments = arguments
        ctx.bias_size = None if bias is None else [bias.shape[0]]
        ctx.save_for_backward(x, weight)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.asymconv.conv2d.default(x, weight, bias, *arguments)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.arguments
        wanted = list(ctx.needs_input_grad[:3])
        grads = torch.ops.aten.convolution_backward(
            grad, x, weight, ctx.bias_size, stride, padding, dilation, False, [0, 0], groups, wanted
        )
        return *grads, None, None, None, None


def _with_gradients(x, weight, bias, *arguments):
    """The operator, recorded for backward if one may be asked for."""
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _Conv2d.apply(x, weight, bias, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.asymconv.conv2d.default(x, weight, bias, *arguments)


def _autograd(x, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    if _differentiates_otherwise():
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return _with_gradients(x, weight, bias, stride, padding, dilation, groups)


# torch.library.register_autograd would do, but costs 20 microseconds a call more
_library.impl("conv2d", _autograd, "Autograd")


def _differentiates_otherwise() -> str | None:
    """Whether derivatives are wanted other than backward's: PyTorch's own has them all."""
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func"
    return None


def _pytorch(*args, **kwargs):
    return torch.conv2d(*args, **kwargs)


# autocast casts as PyTorch's does, vmap has PyTorch's rule
for _key in ("AutocastCPU", "AutocastCUDA", "FuncTorchBatched"):
    _library.impl("conv2d", _pytorch, _key)


@register_flop_formula(torch.ops.asymconv.conv2d)
def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return conv_flop_count(x_shape, weight_shape, out_shape)


# --- what users call -----------------------------------------------------------------------------

_PLAIN = (torch.Tensor, nn.Parameter)


def _only_pytorch(x: torch.Tensor, arguments: Sequence[object]) -> str | None:
    """What is going on that only PyTorch's own convolution knows of, or None."""
    if torch.is_autocast_enabled(x.device.type):
        return "autocast computes in another dtype"
    if reason := _differentiates_otherwise():
        return reason
    if torch.jit.is_tracing():
        return "torch.jit traces"
    if not all(type(value) is int for value in arguments):  # equal to ints, refused or not
        return "arguments that are not of type int"
    return None


def decide_call(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
) -> tuple[Decision, tuple | None]:
    """What `conv2d` does with a call, and its pairs; builds the kernel if there is one to build.

    Warns once where the machine is why no rung runs.

    Args:
        x: (N, C, H, W), or what PyTorch will refuse.
        weight: (K, C / groups, R, S).
        bias: (K,), or None.
        stride, padding, dilation: one number or (height, width), in pixels; padding also "valid"
            or "same".
        groups: of channels.

    Returns:
        The decision, and stride, padding and dilation as pairs; None in place of these where only
        PyTorch knows what to do with them.

    Raises:
        KeyError: `dispatch.always` was given a rung that there is not.
    """
    if not (
        type(x) in _PLAIN and type(weight) in _PLAIN and (bias is None or type(bias) in _PLAIN)
    ):
        return Decision(None, "a subclass of torch.Tensor, or no tensor"), None
    pairs = pairs_of(weight.shape, stride, padding, dilation)
    if pairs is None:
        return Decision(None, f"padding {padding!r} that needs a copy, or is refused"), None
    decision = decide(facts_of(x, weight, bias, *pairs, groups), forced())
    if decision.rung is not None or decision.machine is not None:
        if reason := _only_pytorch(x, [*pairs[0], *pairs[1], *pairs[2], groups]):
            return Decision(None, reason), pairs
        kernel = _built(decision, x.device)
        if isinstance(kernel, str):
            return Decision(None, kernel), pairs
    return decision, pairs


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> torch.Tensor:
    """`torch.nn.functional.conv2d`, run by a rung where that is faster (`asymconv.dispatch`).

    Shapes: x (N, C, H, W), weight (K, C / groups, R, S), bias (K,); returns (N, K, OH, OW).
    Pairs are (height, width), in pixels.

    Raises:
        What torch.nn.functional.conv2d raises for the same arguments.
    """
    if list in (type(stride), type(padding), type(dilation)):  # look-ups want tuples
        stride, padding, dilation = (
            tuple(v) if type(v) is list else v for v in (stride, padding, dilation)
        )
    if torch.compiler.is_compiling():
        pairs = pairs_of(weight.shape, stride, padding, dilation)
        if (
            pairs is not None
            and not torch.onnx.is_in_onnx_export()  # a standard file holds standard operators
            and not torch.is_autocast_enabled(x.device.type)
            and may_win(x, weight, *pairs, groups)
        ):
            return torch.ops.asymconv.conv2d(x, weight, bias, *pairs, groups)
    elif (
        type(x) in _PLAIN
        and type(weight) in _PLAIN
        and (x.is_cuda or forced())
        and (forced() or not hopeless(x.shape, weight.shape, stride, padding, dilation, groups))
    ):
        decision, pairs = decide_call(x, weight, bias, stride, padding, dilation, groups)
        if decision.rung is not None:  # what the dispatcher would call first, called at once
            return _with_gradients(x, weight, bias, *pairs, groups)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
