"""What a rung of the ladder is: a CUDA text and the facts that callers need about it."""

from __future__ import annotations

import ctypes
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from asymconv.problem import ConvShape

Precision = Literal["fp32", "tf32", "fp16"]
"""Class of rounding: "fp32" sums and products to 24 bits, "tf32" operands to 11 bits as well,
"fp16" the result too. A rung is one of the first two; the last is what autocast does."""

PRELUDE = r"""
#include <cuda_runtime.h>

// One convolution, NCHW. The same fields, in the same order, as asymconv/kernels/rung.py.
struct Conv {
  int N, C, H, W;          // input  (N, C, H, W)
  int K, R, S;             // weight (K, C / groups, R, S)
  int OH, OW;              // output (N, K, OH, OW)
  int stride_h, stride_w;  // in input pixels
  int pad_h, pad_w;        // zeros on each side
  int dil_h, dil_w;        // input pixels between taps
  int groups;
};
"""

ENTRY = "asymconv_launch"
"""The one symbol of a built rung:

``extern "C" int asymconv_launch(const float* x, const float* w, const float* bias, float* y,
const Conv* conv, void* stream)``: queues the kernel, returns a cudaError_t. Null bias: none.
"""


class ConvStruct(ctypes.Structure):
    """`struct Conv` of the CUDA prelude."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in (
            *("N", "C", "H", "W", "K", "R", "S", "OH", "OW"),
            *("stride_h", "stride_w", "pad_h", "pad_w", "dil_h", "dil_w", "groups"),
        )
    ]

    @classmethod
    def of(cls, shape: ConvShape) -> ConvStruct:
        """The struct for a shape; every field in elements or pixels."""
        return cls(
            *shape.input_shape,
            shape.out_channels,
            *shape.kernel,
            shape.out_height,
            shape.out_width,
            *shape.stride,
            *shape.padding,
            *shape.dilation,
            shape.groups,
        )


_CONDITION = re.compile(r"\s*#\s*(ifdef|ifndef|if|elif|else|endif)\b\s*(\w*)")


def _as_nvcc_sees(text: str) -> str:
    """C++ text without comments, without what stands there for g++ alone (`#ifdef __CUDACC__`), and
    with runs of white space as one blank. String literals are not told apart.
    """
    text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)
    kept = []
    seen: list[bool | None] = []  # of each open condition: its branch; None: not about nvcc
    for line in text.splitlines():
        directive = _CONDITION.match(line)
        if directive is None:
            ours = False
        elif (kind := directive[1]).startswith("if"):
            ours = kind != "if" and directive[2] == "__CUDACC__"
            seen.append(kind == "ifdef" if ours else None)
        else:
            ours = seen[-1] is not None
            if ours and kind == "elif":
                raise ValueError("`#elif` of `#ifdef __CUDACC__`: write `#else` and another `#if`")
            if kind == "endif":
                seen.pop()
            elif ours:
                seen[-1] = not seen[-1]
        if not ours and False not in seen:
            kept.append(line)
    return re.sub(r"\s+", " ", "\n".join(kept)).strip()


@dataclass(frozen=True)
class Rung:
    """One kernel of the ladder.

    Attributes:
        name: number and idea, as the file is called: ``k01_block_per_output``.
        idea: the one thing it changes, in a line.
        notebook: stem of the notebook that tells it.
        source: its CUDA text, kernel and launcher, without the prelude.
        refusal: a shape, and the values of all defines, to the reason why the rung cannot take it,
            or None if it can; see `refuses`.
        precision: class of its rounding: "fp32", or "tf32" (operands to 10 mantissa bits).
        capability: the oldest compute capability that runs it.
        arch: the nvcc architecture it must be built for where one alone will do ("90a").
        defines: tile constants, macros with their values; a build may override them.
        variants: other values of the defines, to be compared by `asymconv sweep`.
        mixes_rows: whether rows, and a column's taps, are added before they are multiplied
            (Winograd). Then what a row brings to an output with a tap of 0 cancels but for its
            rounding: see `asymconv.check.Tolerance`.
    """

    name: str
    idea: str
    notebook: str
    source: str
    refusal: Callable[[ConvShape, Mapping[str, int]], str | None]
    precision: Precision = "fp32"
    capability: tuple[int, int] = (7, 0)
    arch: str | None = None
    defines: Mapping[str, int] = field(default_factory=dict)
    variants: tuple[Mapping[str, int], ...] = ()
    mixes_rows: bool = False

    @property
    def number(self) -> str:
        """The rung's short name: ``k01``."""
        return self.name.split("_", 1)[0]

    def constants(self, defines: Mapping[str, int] | None = None) -> dict[str, int]:
        """The values of all tile constants, with those given in place of the rung's own.

        Raises:
            KeyError: a define that the rung does not have.
        """
        values = dict(self.defines)
        for name, value in (defines or {}).items():
            if name not in values:
                raise KeyError(f"{self.name} has no constant {name}; it has {sorted(values)}")
            values[name] = int(value)
        return values

    def refuses(self, shape: ConvShape, defines: Mapping[str, int] | None = None) -> str | None:
        """Why the rung, built with these defines, cannot take a shape, or None if it can.

        Raises:
            KeyError: a define that the rung does not have.
        """
        return self.refusal(shape, self.constants(defines))

    def applies(self, shape: ConvShape) -> bool:
        """Whether the rung gives the right answer for this shape."""
        return self.refuses(shape) is None

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether a GPU of this compute capability can run it."""
        if self.arch == "90a":  # architecture-specific: no other GPU, not even a newer one
            return capability == (9, 0)
        return capability >= self.capability

    def text(self, defines: Mapping[str, int] | None = None) -> str:
        """The whole translation unit: tile constants, prelude, kernel and launcher.

        Raises:
            KeyError: a define that the rung does not have.
        """
        values = self.constants(defines).items()
        lines = "".join(f"#define {name} {value}\n" for name, value in values)
        return lines + PRELUDE + self.source

    @property
    def source_hash(self) -> str:
        """16 hex digits over the text as nvcc sees it: records carry it, tests compare it."""
        return hashlib.sha256(_as_nvcc_sees(self.text()).encode()).hexdigest()[:16]


def launch_limits(
    shape: ConvShape, *, block: int, grid: tuple[int, int, int], what: str
) -> str | None:
    """Why a launch is beyond CUDA's limits, or None (CUDA C++ Programming Guide, table 27).

    Args:
        shape: named in the reason.
        block: threads of a block.
        grid: blocks in x, y and z.
        what: what the block and grid are made of, for the reason.
    """
    if block > 1024:
        return f"{what}: {block} threads in a block, CUDA allows 1024 ({shape})"
    for axis, (count, limit) in enumerate(zip(grid, (2**31 - 1, 65535, 65535), strict=True)):
        if count > limit:
            return f"{what}: {count} blocks in {'xyz'[axis]}, CUDA allows {limit} ({shape})"
    return None
