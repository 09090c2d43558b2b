"""The PyTorch operator: which kernel takes which call, and what happens to gradients.

`conv2d` is `torch.nn.functional.conv2d` with the ladder below it. What no rung serves goes to
PyTorch's own convolution, and so does what is wrong: the exception is PyTorch's own.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from asymconv import build
from asymconv.kernels import RUNGS, Rung
from asymconv.problem import ConvShape


def tf32_allowed() -> bool:
    """Whether PyTorch's flags let a float32 convolution round its operands to TF32.

    Reads the new setting: reading ``cudnn.allow_tf32`` can raise once the new one was used.
    """
    return torch.backends.cudnn.conv.fp32_precision == "tf32"


def choose(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, shape: ConvShape
) -> Rung | None:
    """The highest rung that takes this call under PyTorch's flags; None: PyTorch's own.

    A rung takes float32 NCHW tensors on one CUDA device that it need not copy or convert, and no
    rung rounds more coarsely than the flags allow.
    """
    for tensor in (x, weight, bias):
        if tensor is not None and (
            not tensor.is_cuda
            or tensor.device != x.device
            or tensor.dtype != torch.float32
            or not tensor.is_contiguous()
        ):
            return None
    capability = torch.cuda.get_device_capability(x.device)
    for rung in reversed(RUNGS):
        allowed = rung.precision == "fp32" or tf32_allowed()
        if rung.runs_on(capability) and allowed and rung.applies(shape):
            return rung
    return None


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"asymconv falls back to PyTorch's convolution: {reason}", stacklevel=3)


def _shape_of(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> ConvShape | None:
    """The convolution's sizes, or None if PyTorch would refuse it or it has no batch."""
    if x.dim() != 4 or weight.dim() != 4 or any(len(v) != 2 for v in (stride, padding, dilation)):
        return None
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        return None
    if groups < 1 or x.shape[1] != weight.shape[1] * groups:
        return None
    try:
        return ConvShape(
            *x.shape,
            weight.shape[0],
            tuple(weight.shape[2:]),
            tuple(stride),
            tuple(padding),
            tuple(dilation),
            groups,
            bias is not None,
        )
    except ValueError:
        return None


@torch.library.custom_op("asymconv::conv2d", mutates_args=())
def _conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    shape = _shape_of(x, weight, bias, stride, padding, dilation, groups)
    rung = choose(x, weight, bias, shape) if shape is not None else None
    if rung is not None:
        try:
            kernel = build.load(rung, "cuda", device=x.device)
        except build.BuildError as error:
            _warn_once(str(error))
        else:
            return kernel(x, weight, bias, shape)
    return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)


@_conv2d.register_fake
def _(x, weight, bias, stride, padding, dilation, groups):
    return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, *ctx.arguments = inputs
    ctx.bias_size = None if bias is None else [bias.shape[0]]
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    stride, padding, dilation, groups = ctx.arguments
    wanted = list(ctx.needs_input_grad[:3])
    grads = torch.ops.aten.convolution_backward(
        grad, x, weight, ctx.bias_size, stride, padding, dilation, False, [0, 0], groups, wanted
    )
    return *grads, None, None, None, None


_conv2d.register_autograd(_backward, setup_context=_setup_context)


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> torch.Tensor:
    """`torch.nn.functional.conv2d`; on CUDA in float32 NCHW by the best rung there is.

    Shapes: x (N, C, H, W), weight (K, C / groups, R, S), bias (K,); returns (N, K, OH, OW).
    Pairs are (height, width), in pixels. Differentiable in x, weight and bias. Under autocast,
    without a batch, on a CPU, in other dtypes and layouts it is PyTorch's own.

    Raises:
        What torch.nn.functional.conv2d raises for the same arguments.
    """
    if x.is_cuda and x.dim() == 4 and not torch.is_autocast_enabled("cuda"):
        return torch.ops.asymconv.conv2d(
            x, weight, bias, list(stride), list(padding), list(dilation), groups
        )
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
