"""The problem: one 2-D convolution on a picture twice as wide as it is high.

`Model`, `get_inputs` and `get_init_inputs` are the contract (KernelBench level 1, problem 55):
what `asymconv.ModelNew` replaces, to the letter. `ConvShape` counts what any implementation
must do: its floating-point operations and the fewest bytes it can move.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import nn

Pair: TypeAlias = tuple[int, int]

BYTES_PER_FLOAT = 4


class Model(nn.Module):
    """The reference: `nn.Conv2d` and nothing else.

    Shapes: input (N, in_channels, H, W), output (N, out_channels, OH, OW) with
    ``OH = (H + 2 * padding - dilation * (kernel_size - 1) - 1) // stride + 1`` and OW likewise.
    Raises what `nn.Conv2d` raises.
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
        self.conv2d = nn.Conv2d(
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


def get_inputs() -> list[torch.Tensor]:
    """The contract's input: one float32 tensor (8, 64, 512, 1024), uniform on [0, 1); 1.07 GB."""
    return [torch.rand(8, 64, 512, 1024)]


def get_init_inputs() -> list[int]:
    """The contract's constructor arguments: in_channels, out_channels, kernel_size."""
    return [64, 128, 3]


def pair(value: int | tuple[int, int] | list[int]) -> Pair:
    """(height, width) from one number or from two. Raises ValueError for any other count."""
    if isinstance(value, int):
        return (value, value)
    height, width = value
    return (int(height), int(width))


@dataclass(frozen=True)
class ConvShape:
    """The sizes of one convolution, and what they cost. Every pair is (height, width).

    Raises:
        ValueError: a size below one, channels that the groups do not divide, or a kernel larger
            than the padded input. `nn.Conv2d` raises RuntimeError for the last on a call;
            `asymconv.op` raises the same there, before a ConvShape is made.
    """

    batch: int
    in_channels: int
    height: int
    width: int
    out_channels: int
    kernel: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    bias: bool = False

    def __post_init__(self) -> None:
        for name in ("kernel", "stride", "padding", "dilation"):
            object.__setattr__(self, name, pair(getattr(self, name)))
        if self.batch < 0 or min(self.in_channels, self.out_channels, self.groups) < 1:
            raise ValueError(f"channels and groups must be positive, batch at least 0: {self}")
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(f"in_channels and out_channels must be divisible by groups: {self}")
        if min(*self.kernel, *self.stride, *self.dilation) < 1 or min(self.padding) < 0:
            raise ValueError(
                f"kernel, stride and dilation must be positive, padding at least 0: {self}"
            )
        if self.out_height < 1 or self.out_width < 1:
            raise ValueError(f"the kernel is larger than the padded input: {self}")

    @property
    def out_height(self) -> int:
        """Rows of the output."""
        return self._out(0, self.height)

    @property
    def out_width(self) -> int:
        """Columns of the output."""
        return self._out(1, self.width)

    def _out(self, axis: int, size: int) -> int:
        reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        return (size + 2 * self.padding[axis] - reach) // self.stride[axis] + 1

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)."""
        return (self.batch, self.in_channels, self.height, self.width)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """(K, C / groups, R, S)."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """(N, K, OH, OW)."""
        return (self.batch, self.out_channels, self.out_height, self.out_width)

    @property
    def outputs(self) -> int:
        """Number of output elements."""
        n, k, oh, ow = self.output_shape
        return n * k * oh * ow

    @property
    def terms(self) -> int:
        """Products summed into one output: C / groups * R * S."""
        _, c, r, s = self.weight_shape
        return c * r * s

    @property
    def flops(self) -> int:
        """Floating-point operations, a multiplication and an addition a term.

        Taps that fall into the padding are counted too, as cuDNN and the literature do.
        """
        return 2 * self.outputs * self.terms

    @property
    def least_bytes(self) -> int:
        """Bytes of device memory that any fp32 implementation moves: all read once, written once.

        A lower bound where stride or dilation skip input elements.
        """
        n, c, h, w = self.input_shape
        weights = self.out_channels * self.terms + (self.out_channels if self.bias else 0)
        return BYTES_PER_FLOAT * (n * c * h * w + weights + self.outputs)

    @property
    def intensity(self) -> float:
        """FLOP per byte when every byte is moved once: the x of the roofline."""
        return self.flops / self.least_bytes

    def with_(self, **changes: object) -> ConvShape:
        """The same convolution with some sizes changed."""
        return replace(self, **changes)

    def conv_args(self) -> dict[str, object]:
        """Keyword arguments of PyTorch's functional conv2d: stride, padding, dilation, groups."""
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }

    def __str__(self) -> str:
        n, c, h, w = self.input_shape
        text = f"{n}×{c}×{h}×{w} → {self.out_channels}, {self.kernel[0]}×{self.kernel[1]}"
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)):
            value = getattr(self, name)
            if value != (default, default):
                text += f", {name} {value[0] if value[0] == value[1] else value}"
        text += f", groups {self.groups}" if self.groups > 1 else ""
        return text + (", bias" if self.bias else "")


CONTRACT = ConvShape(batch=8, in_channels=64, height=512, width=1024, out_channels=128)
"""The contract's convolution: 614.86 GFLOP on at least 3.209 GB."""
