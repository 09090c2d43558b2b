"""`ModelNew` of an exported file: `asymconv.export` copies the texts of this module as they stand.

What runs a call is decided beforehand, from sizes and flags: a kernel, or PyTorch's own
convolution. Nothing is caught: a kernel that fails says so, and no other result stands in for its
own. `KERNELS` is empty here; the exported file fills it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from asymconv.build import CUDA_FLAGS, EMPTY_MODULE
from asymconv.dispatch import tf32_allowed
from asymconv.kernels.rung import ENTRY, ConvStruct
from asymconv.op import _differentiates_otherwise, _only_pytorch
from asymconv.problem import ConvShape


class Kernel(NamedTuple):
    """A CUDA text with its launcher, and what it takes.

    Attributes:
        name: number and idea.
        precision: "fp32", or "tf32": operands are rounded to 10 mantissa bits.
        capability: the oldest compute capability that runs it.
        arch: the architecture that it must be built for, or None.
        refuses: a shape to the reason why it cannot take it, or None.
        text: the CUDA text.
    """

    name: str
    precision: str
    capability: tuple[int, int]
    arch: str | None
    refuses: Callable[[ConvShape], str | None]
    text: str

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether a GPU of this compute capability can run it."""
        if self.arch == "90a":  # architecture-specific: no other GPU, not even a newer one
            return capability == (9, 0)
        return capability >= self.capability


KERNELS: tuple[Kernel, ...] = ()
"""Best first."""


@functools.lru_cache(maxsize=1024)
def choose(
    capability: tuple[int, int],
    tf32: bool,
    x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    bias: bool,
) -> tuple[Kernel, ConvShape] | None:
    """The first kernel that takes a call of these sizes, and its shape; None: PyTorch's own.

    PyTorch's own is also what is wrong, so that the exception is PyTorch's.

    Args:
        capability: of the GPU.
        tf32: whether PyTorch's flags let a float32 convolution round its operands to TF32.
        x_shape: (N, C, H, W).
        weight_shape: (K, C / groups, R, S).
        stride, padding, dilation: (height, width), in pixels.
        groups: of channels.
        bias: whether there is one.
    """
    kernel = weight_shape[2:]
    if len(x_shape) != 4 or min(x_shape) < 1 or x_shape[1] != weight_shape[1] * groups:
        return None
    if min(*kernel, *stride, *dilation) < 1 or min(padding) < 0:
        return None
    for size, zeros, step, taps in zip(x_shape[2:], padding, dilation, kernel, strict=True):
        if size + 2 * zeros < step * (taps - 1) + 1:
            return None
    shape = ConvShape(*x_shape, weight_shape[0], kernel, stride, padding, dilation, groups, bias)
    for candidate in KERNELS:
        allowed = tf32 or candidate.precision == "fp32"
        if allowed and candidate.runs_on(capability) and candidate.refuses(shape) is None:
            return candidate, shape
    return None


def choose_for(x: torch.Tensor, layer: nn.Conv2d) -> tuple[Kernel, ConvShape] | None:
    """The kernel that runs a layer on x, and the shape; None: PyTorch's own convolution.

    Kernels read float32, NCHW, contiguous, all on one NVIDIA GPU; nothing is copied for them.
    """
    if torch.compiler.is_compiling() or torch.version.hip or isinstance(layer.padding, str):
        return None
    if layer.padding_mode != "zeros" or _differentiates_otherwise():
        return None
    tensors = [x, layer.weight] if layer.bias is None else [x, layer.weight, layer.bias]
    for tensor in tensors:
        if (
            type(tensor) not in (torch.Tensor, nn.Parameter)
            or not tensor.is_cuda
            or tensor.device != x.device
            or tensor.dtype != torch.float32
            or not tensor.is_contiguous()
        ):
            return None
    arguments = (layer.stride, layer.padding, layer.dilation, layer.groups)
    if torch.jit.is_tracing() or _only_pytorch(x.device.type, *arguments):
        return None
    return choose(
        torch.cuda.get_device_capability(x.device),
        tf32_allowed(),
        tuple(x.shape),
        tuple(layer.weight.shape),
        *arguments,
        layer.bias is not None,
    )


@functools.cache
def launcher(kernel: Kernel, arch: str) -> Callable[..., int]:
    """A kernel's launcher, built at its first call; `load_inline` keeps the build for later ones.

    PyTorch's headers, which alone take half a minute, are left out: the launcher has C's calling
    convention and takes addresses.

    Raises:
        RuntimeError: nvcc's own lines.
        OSError: there is no nvcc: install the CUDA toolkit, or set CUDA_HOME to its folder.
    """
    from torch.utils.cpp_extension import load_inline  # slow to import, and no CPU needs it

    digest = hashlib.sha256(kernel.text.encode()).hexdigest()[:12]
    module = load_inline(
        name=f"{kernel.name}_sm_{arch}_{digest}",
        cpp_sources=EMPTY_MODULE,
        cuda_sources=kernel.text,
        extra_cuda_cflags=[*CUDA_FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}"],
        extra_ldflags=["-Wl,-Bsymbolic"],  # kernels of the same name: each library calls its own
        no_implicit_headers=True,
    )
    entry = getattr(ctypes.CDLL(module.__file__), ENTRY)
    entry.argtypes, entry.restype = [ctypes.c_void_p] * 6, ctypes.c_int
    return entry


def queue(
    kernel: Kernel, device: torch.device, pointers: list[int | None], conv: ConvStruct
) -> int:
    """Queue a kernel on the device's current stream; the cudaError_t of the launch.

    Args:
        kernel: which.
        device: a CUDA device.
        pointers: device addresses of x, weight, bias (None without one) and output.
        conv: the sizes.
    """
    major, minor = torch.cuda.get_device_capability(device)
    run = launcher(kernel, kernel.arch or f"{major}{minor}")
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        return run(*pointers, ctypes.addressof(conv), stream)


class Convolution(torch.autograd.Function):
    """A convolution by one of `KERNELS`, with PyTorch's own gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        kernel: Kernel,
        shape: ConvShape,
    ) -> torch.Tensor:
        """Convolve x (N, C, H, W) with weight (K, C / groups, R, S): (N, K, OH, OW).

        Raises RuntimeError where CUDA refuses the launch.
        """
        ctx.save_for_backward(x, weight)
        ctx.shape = shape
        out = torch.empty(shape.output_shape, dtype=torch.float32, device=x.device)
        pointers = [None if t is None else t.data_ptr() for t in (x, weight, bias, out)]
        if code := queue(kernel, x.device, pointers, ConvStruct.of(shape)):
            raise RuntimeError(f"{kernel.name}: launch failed with cudaError {code} for {shape}")
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, weight and bias, each of its shape, from that of the output."""
        x, weight = ctx.saved_tensors
        shape = ctx.shape
        bias_size = [shape.out_channels] if shape.bias else None
        pairs = (shape.stride, shape.padding, shape.dilation)
        wanted = list(ctx.needs_input_grad[:3])
        grads = torch.ops.aten.convolution_backward(
            grad, x, weight, bias_size, *pairs, False, [0, 0], shape.groups, wanted
        )
        return *grads, None, None


class Conv2d(nn.Conv2d):
    """nn.Conv2d, run by the first of `KERNELS` that takes the call, else by PyTorch."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Convolve input (N, C, H, W)."""
        if torch.jit.is_scripting():  # TorchScript compiles PyTorch's own
            return self._conv_forward(input, self.weight, self.bias)
        else:
            return _forward(self, input)


def _forward(layer: Conv2d, x: torch.Tensor) -> torch.Tensor:
    chosen = choose_for(x, layer)
    if chosen is None:
        return nn.Conv2d.forward(layer, x)
    return Convolution.apply(x, layer.weight, layer.bias, *chosen)


class ModelNew(nn.Module):
    """Drop-in for a model that is one nn.Conv2d, held as `conv2d`.

    Same constructor, same weights for a seed, same state_dict, same rounding class: a kernel that
    rounds like TF32 runs only where PyTorch's flags allow TF32 for convolutions.

    Shapes: input (N, in_channels, H, W), output (N, out_channels, OH, OW), float32.
    Raises what nn.Conv2d raises, for the same arguments.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.conv2d = Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve x (N, C, H, W)."""
        return self.conv2d(x)
