"""`ModelNew`: what a user imports in place of `Model`."""

from __future__ import annotations

import torch
from torch import nn

from asymconv.layers import Conv2d


class ModelNew(nn.Module):
    """Drop-in for `asymconv.Model`: same constructor, same weights for a seed, same state_dict.

    It holds an `asymconv.Conv2d`, which computes what nn.Conv2d computes: by a rung where that is
    faster, built with `torch.utils.cpp_extension.load_inline` at the first call (seconds; later
    processes find it in a cache). Rounding follows PyTorch's flags for convolutions.

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
