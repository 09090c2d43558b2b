"""The PyTorch operator `torch.ops.asymconv.conv2d`, and `conv2d`, which calls it where it pays.

`conv2d` is `torch.nn.functional.conv2d`. Where `asymconv.dispatch` knows that PyTorch's own
convolution runs a call, it is called at once: it costs nothing more, and gradients of any order,
vmap, autocast and forward mode are PyTorch's own. Else a rung runs; its gradients go through
aten::convolution_backward, which can itself be differentiated.

A call from Python goes to the launch at once: a round through PyTorch's dispatcher into Python
costs the host more than all the rest. The operator is for those who must see it: compilers, modes,
profilers.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from asymconv import build
from asymconv.dispatch import (
    Decision,
    Facts,
    decide,
    facts_of,
    forced,
    hopeless,
    may_win,
    pairs_of,
)
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


def _warn_while_tracing(reason: str) -> None:
    _warn_once(reason)


_warn_while_tracing._dynamo_marked_constant = True  # the compiler calls it and does not trace it


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
                except OSError as error:  # no cache folder, a broken compiler or library
                    found = f"{rung.name} could not be built or loaded: {error}"
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


@functools.lru_cache(maxsize=4096)
def _plan(facts: Facts, rungs: tuple[str, ...] | None) -> tuple[Decision, build.Prepared | None]:
    """What `decide` says, and what the launch needs if a rung runs it."""
    decision = decide(facts, rungs)
    return decision, None if decision.shape is None else build.Prepared.of(decision.shape)


def _run(x, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    facts = facts_of(x, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)
    decision, prepared = _plan(facts, forced())
    kernel = _built(decision, x.device)
    if isinstance(kernel, build.Kernel):
        return kernel.run(prepared, x, weight, bias)
    return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)


_library.impl("conv2d", _run, "CompositeExplicitAutograd")


# --- what PyTorch must know of it -----------------------------------------------------------------


@torch.library.register_fake(NAME, lib=_library)
def _fake(x, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, arguments, run):
        ctx.arguments = arguments
        ctx.save_for_backward(x, weight)
        return run(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.arguments
        wanted = list(ctx.needs_input_grad[:3])
        bias_size = [weight.shape[0]] if wanted[2] else None
        grads = torch.ops.aten.convolution_backward(
            grad, x, weight, bias_size, stride, padding, dilation, False, [0, 0], groups, wanted
        )
        return *grads, None, None


# _Conv2d.apply without what it does first for torch.func, in Python and longer than all the rest
_apply_to_plain = super(torch.autograd.Function, _Conv2d).apply


def _wants_gradients(x, weight, bias) -> bool:
    return torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )


def _operator(x, weight, bias, arguments):
    """The operator, recorded for backward if one may be asked for."""

    def run(x, weight, bias):
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.asymconv.conv2d.default(x, weight, bias, *arguments)

    if _wants_gradients(x, weight, bias):
        return _Conv2d.apply(x, weight, bias, arguments, run)
    return run(x, weight, bias)


def _autograd(x, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    # of one image, or of complex numbers, convolution_backward knows nothing
    if _differentiates_otherwise() or x.dim() != 4 or x.is_complex():
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return _operator(x, weight, bias, (stride, padding, dilation, groups))


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


def _only_pytorch(device: str, stride, padding, dilation, groups) -> str | None:
    """What is going on that only PyTorch's own convolution knows of, or None."""
    if torch.is_autocast_enabled(device):
        return "autocast computes in another dtype"
    (a, b), (c, d), (e, f) = stride, padding, dilation
    if not type(a) is type(b) is type(c) is type(d) is type(e) is type(f) is type(groups) is int:
        return "arguments that are not of type int"  # equal to ints, refused or not
    return None


def decide_call(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
) -> tuple[Decision, tuple, Callable[..., torch.Tensor] | None]:
    """What `conv2d` does with a call; builds the kernel if there is one to build.

    Warns once where the machine is why no rung runs.

    Args:
        x: (N, C, H, W), or what PyTorch will refuse.
        weight: (K, C / groups, R, S).
        bias: (K,), or None.
        stride, padding, dilation: one number or (height, width), in pixels; padding also "valid"
            or "same".
        groups: of channels.

    Returns:
        The decision; and where a rung runs the call: the arguments behind the bias, with pairs,
        and a function of x, weight and bias that launches it and returns (N, K, OH, OW), without
        gradients. Else () and None.

    Raises:
        KeyError: `dispatch.always` was given a rung that there is not.
    """
    if not (
        type(x) in _PLAIN and type(weight) in _PLAIN and (bias is None or type(bias) in _PLAIN)
    ):
        return Decision(None, "a subclass of torch.Tensor, or no tensor"), (), None
    if reason := _differentiates_otherwise():  # a tensor within vmap does not say how it lies
        return Decision(None, reason), (), None
    pairs = pairs_of(weight.shape, stride, padding, dilation)
    if pairs is None:
        return Decision(None, f"padding {padding!r} that needs a copy, or is refused"), (), None
    stride, padding, dilation = pairs
    facts = facts_of(x, weight, bias, stride, padding, dilation, groups)
    decision, prepared = _plan(facts, forced())
    if decision.rung is None and decision.machine is None:
        return decision, (), None
    if reason := _only_pytorch(facts.device, stride, padding, dilation, groups):
        return Decision(None, reason), (), None
    kernel = _built(decision, x.device)
    if isinstance(kernel, str):
        return Decision(None, kernel), (), None
    return decision, (stride, padding, dilation, groups), functools.partial(kernel.run, prepared)


@functools.cache
def _plain_keys(device: str) -> frozenset[int]:
    """Which dispatcher's keys, as numbers, tensors have that are memory and nothing else."""
    found = set()
    for inference in (False, True):
        with torch.inference_mode(inference):
            found.add(torch._C._dispatch_keys(torch.empty(0, device=device)).raw_repr())
    return frozenset(found)


def _through_dispatcher(*tensors: torch.Tensor | None) -> bool:
    """Whether PyTorch's dispatcher must see the call: a tool looks on, or has wrapped a tensor.

    A mode may do anything with it, a profiler wants its name, and a tensor of another kind
    (negative, zero, left over from torch.func, functional) must be made plain first.
    """
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._is_torch_function_mode_enabled()
        or torch.autograd.profiler._is_profiler_enabled
    ):
        return True
    plain = _plain_keys("cuda" if tensors[0].is_cuda else "cpu")
    for tensor in tensors:
        if tensor is not None and torch._C._dispatch_keys(tensor).raw_repr() not in plain:
            return True
    return False


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
        # a standard file holds standard operators
        if pairs is not None and not torch.onnx.is_in_onnx_export():
            wins, machine = may_win(x, weight, *pairs, groups)
            # asked second: of a device that autocast does not know it would be an error
            if (wins or machine is not None) and not torch.is_autocast_enabled(x.device.type):
                if wins:
                    return torch.ops.asymconv.conv2d(x, weight, bias, *pairs, groups)
                _warn_while_tracing(machine)
    elif (
        type(x) in _PLAIN
        and type(weight) in _PLAIN
        and (x.is_cuda or forced())
        and not torch.jit.is_tracing()  # sizes are tensors then
        and (forced() or not hopeless(x.shape, weight.shape, stride, padding, dilation, groups))
    ):
        _, arguments, run = decide_call(x, weight, bias, stride, padding, dilation, groups)
        if run is not None:
            if _through_dispatcher(x, weight, bias):
                return _operator(x, weight, bias, arguments)
            if _wants_gradients(x, weight, bias):
                return _apply_to_plain(x, weight, bias, arguments, run)
            return run(x, weight, bias)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
