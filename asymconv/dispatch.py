"""Which kernel runs a convolution, and why: the one place that decides.

`decide` looks at facts alone (`Facts`: device, dtype, layout, flags, sizes), never at tensors, so
that every decision can be tried out on any machine. A rung is chosen where it was measured to be
faster than PyTorch's own convolution (`WINS`); all else is PyTorch's. So is what is wrong: the
exception is then PyTorch's too.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from asymconv.kernels import RUNGS, Rung, get_rung
from asymconv.problem import ConvShape, Pair


class Facts(NamedTuple):
    """What a decision is made from.

    Attributes:
        device: "cuda", "hip" for AMD's (which PyTorch calls cuda too), "cpu", ..., or "several"
            where the tensors are not all on one.
        capability: the GPU's compute capability; None elsewhere.
        dtype: of input, weight and bias; None where they differ.
        layout: "NCHW" if all are contiguous, "channels_last", "strided", or PyTorch's name.
        tf32: whether PyTorch's flags let a float32 convolution round its operands to TF32.
        input_shape: (N, C, H, W) if it is a batch of images.
        weight_shape: (K, C / groups, R, S).
        bias_shape: (K,), or None without a bias.
        stride, padding, dilation: (height, width), in pixels.
        groups: of channels.
    """

    device: str
    capability: tuple[int, int] | None
    dtype: torch.dtype | None
    layout: str
    tf32: bool
    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    bias_shape: tuple[int, ...] | None = None
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1


class Decision(NamedTuple):
    """What runs a call.

    Attributes:
        rung: the kernel; None is PyTorch's own convolution.
        reason: why, in a line.
        shape: the convolution's sizes where a rung runs it.
        machine: what this machine lacks, where another would have a rung for this call.
    """

    rung: Rung | None
    reason: str
    shape: ConvShape | None = None
    machine: str | None = None


@dataclass(frozen=True)
class Win:
    """Where a rung is faster than nn.Conv2d. Beyond it, PyTorch's own convolution runs.

    3×3 kernels of stride and dilation 1 in one group, NCHW, float32: nothing else is won so far.

    Attributes:
        rung: its number.
        tf32: under flags that allow TF32, or under those that forbid it.
        capability: the GPUs it was measured on.
        in_channels: fewest and most.
        out_channels: fewest.
        pixels: fewest output pixels, all images together: below, what a block has to do before
            its first product is not worth it.
        strip: columns that a block computes at once.
        filled: least part of the columns so computed that must be there.
    """

    rung: str
    tf32: bool
    capability: tuple[int, int]
    in_channels: tuple[int, int]
    out_channels: int
    pixels: int
    strip: int
    filled: float

    def misses(self, shape: ConvShape) -> str | None:
        """Why this shape is not within it, or None."""
        low, high = self.in_channels
        if reason := self.misses_layer(shape.weight_shape, shape.stride, shape.dilation):
            return reason
        if shape.groups > 1:
            return f"{shape.groups} groups"
        if not low <= shape.in_channels <= high:
            return f"{shape.in_channels} input channels, it wins from {low} to {high}"
        pixels = shape.batch * shape.out_height * shape.out_width
        if pixels < self.pixels:
            return f"{pixels:,} output pixels, it wins from {self.pixels:,}"
        computed = -(-shape.out_width // self.strip) * self.strip
        if shape.out_width < self.filled * computed:
            return f"{shape.out_width} columns fill its strips of {self.strip} badly"
        return None

    def lacks(self, capability: tuple[int, int] | None) -> str | None:
        """What a GPU of this capability lacks, or None: on another than the measured one, a guess
        would stand for a measurement.
        """
        if self.capability == capability:
            return None
        measured, own = (f"sm_{a}{b}" for a, b in (self.capability, capability))
        return f"{self.rung} was measured on {measured}, this GPU is {own}"

    def misses_layer(self, weight_shape: Sequence[int], stride: Pair, dilation: Pair) -> str | None:
        """Why no input makes a layer of this weight win, or None."""
        filters, _, height, width = weight_shape
        if (height, width, *stride, *dilation) != (3, 3, 1, 1, 1, 1):
            return "it wins on 3×3, stride 1, dilation 1"
        if filters < self.out_channels:
            return f"{filters} output channels, it wins from {self.out_channels}"
        return None


def _pixels_out(input_shape: Sequence[int], padding: Pair) -> int:
    """Output pixels of all images, for a 3×3 kernel of stride and dilation 1."""
    batch, _, height, width = input_shape
    return batch * (height + 2 * padding[0] - 2) * (width + 2 * padding[1] - 2)


WINS: tuple[Win, ...] = (
    # measured (figures/data/layers.json): 2.4 to 3.3 times as fast forward from 521,220 pixels on,
    # 1.17 and more with backward. Below, 1.7 and more forward down to 110,000, where the host's
    # time for a call decides; with backward not measured. Guessed: fewer than 64 channels.
    # 62 columns of 128: 2.0 times as fast forward (figures/data/asymmetry.json); backward, which is
    # PyTorch's own, was not measured there.
    Win("k07", True, (9, 0), (48, 64), out_channels=64, pixels=500_000, strip=128, filled=0.48),
    # measured on two layers: 4.8 to 6.0 times as fast forward, 1.08 to 1.3 with backward;
    # 130 columns of 192: 4.4 times as fast forward
    Win("k08", False, (9, 0), (48, 64), out_channels=64, pixels=500_000, strip=64, filled=0.67),
)
"""Best first. k06 is not here: where both run, k07 is faster; where k07 refuses (more than 64
channels, stride, dilation), k06 has 0.2 to 0.6 of nn.Conv2d's speed on the GPU measured."""


def shape_of(facts: Facts) -> ConvShape | None:
    """The convolution's sizes, or None if PyTorch would refuse it or it has no batch."""
    x, w = facts.input_shape, facts.weight_shape
    if len(x) != 4 or len(w) != 4 or facts.groups < 1 or x[1] != w[1] * facts.groups:
        return None
    if any(len(v) != 2 for v in (facts.stride, facts.padding, facts.dilation)):
        return None
    if facts.bias_shape is not None and tuple(facts.bias_shape) != (w[0],):
        return None
    try:
        return ConvShape(
            *x,
            w[0],
            tuple(w[2:]),
            facts.stride,
            facts.padding,
            facts.dilation,
            facts.groups,
            facts.bias_shape is not None,
        )
    except ValueError:
        return None


def _not_for_rungs(facts: Facts, shape: ConvShape | None) -> str | None:
    """Why no rung whatever takes this call: rungs neither copy nor convert. None if one may."""
    if facts.dtype != torch.float32:
        return f"rungs compute float32, this is {facts.dtype or 'of several dtypes'}"
    if facts.layout != "NCHW":
        return f"{facts.layout}: rungs read contiguous NCHW, and nothing is copied for them"
    if shape is None:
        return "no batch of images that a convolution takes"
    if shape.outputs == 0:
        return "an empty batch"
    return None


def pairs_of(
    weight_shape: Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
    """Stride, padding, dilation as tuples; None for what only PyTorch understands, or refuses."""
    if type(stride) is type(padding) is type(dilation) is tuple:  # as layers have them: at once
        return stride, padding, dilation
    if isinstance(stride, int):
        stride = (stride, stride)
    if isinstance(dilation, int):
        dilation = (dilation, dilation)
    if isinstance(padding, int):
        padding = (padding, padding)
    elif padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        if len(weight_shape) != 4 or len(dilation) != 2 or any(s != 1 for s in stride):
            return None
        height = dilation[0] * (weight_shape[2] - 1)
        width = dilation[1] * (weight_shape[3] - 1)
        if height % 2 or width % 2:  # more on one side: PyTorch pads a copy
            return None
        padding = (height // 2, width // 2)
    elif isinstance(padding, str):
        return None
    return tuple(stride), tuple(padding), tuple(dilation)


@functools.lru_cache(maxsize=4096)
def decide(facts: Facts, forced: tuple[str, ...] | None = None) -> Decision:
    """What runs this call.

    Args:
        facts: all that the decision depends on.
        forced: rungs by number, best first; the first that can run it does, faster or not.

    Raises:
        KeyError: `forced` names no rung.
    """
    if facts.device != "cuda" and forced is None:
        return Decision(None, f"rungs run on CUDA, this is on {facts.device}")
    shape = shape_of(facts)
    if reason := _not_for_rungs(facts, shape):
        return Decision(None, reason)
    if forced is not None:
        return _first_that_can(facts, shape, forced)
    reasons, machine = [], None
    for win in WINS:
        if win.tf32 != facts.tf32:
            continue
        rung = get_rung(win.rung)
        if reason := win.misses(shape) or rung.refuses(shape):
            reasons.append(f"{win.rung}: {reason}")
        elif lacking := win.lacks(facts.capability):
            machine = lacking
            reasons.append(lacking)
        else:
            allowed = "allowed" if facts.tf32 else "forbidden"
            return Decision(rung, f"{rung.idea}; faster here with TF32 {allowed}", shape)
    return Decision(None, "; ".join(reasons), machine=machine)


@functools.lru_cache(maxsize=4096)
def hopeless(
    input_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    stride: int | Pair,
    padding: int | Pair | str,
    dilation: int | Pair,
    groups: int,
) -> bool:
    """Whether a call of these sizes wins under no flags, in no layout, on no GPU.

    It is what `decide` would say, asked first: most layers of a network get their answer by this
    one look-up, which costs a microsecond.
    """
    pairs = pairs_of(weight_shape, stride, padding, dilation)
    if pairs is None or len(input_shape) != 4 or len(weight_shape) != 4 or len(pairs[1]) != 2:
        return True
    # most answers need no more, and a network whose sizes change asks often
    if all(win.misses_layer(weight_shape, pairs[0], pairs[2]) for win in WINS):
        return True
    pixels = _pixels_out(input_shape, pairs[1])
    if pixels < min(win.pixels for win in WINS):
        return True
    sizes = (input_shape, weight_shape, None, *pairs, groups)
    return not any(
        decide(Facts("cuda", win.capability, torch.float32, "NCHW", win.tf32, *sizes)).rung
        for win in WINS
    )


def _first_that_can(facts: Facts, shape: ConvShape, numbers: Sequence[str]) -> Decision:
    reasons = []
    for rung in map(get_rung, numbers):
        reason = rung.refuses(shape)
        if rung.precision == "tf32" and not facts.tf32:
            reason = "TF32 is forbidden"
        elif facts.device == "cuda" and not rung.runs_on(facts.capability):
            reason = f"not for sm_{facts.capability[0]}{facts.capability[1]}"
        elif facts.device not in ("cuda", "cpu"):
            reason = f"does not run on {facts.device}"
        if reason is None:
            return Decision(rung, f"{rung.idea}; forced", shape)
        reasons.append(f"{rung.number}: {reason}")
    return Decision(None, "; ".join(reasons))


_forced: tuple[str, ...] | None = None


def forced() -> tuple[str, ...] | None:
    """The rungs that `always` asks for, None outside of it."""
    return _forced


@contextlib.contextmanager
def always(*numbers: str) -> Iterator[None]:
    """Within: calls that a rung can run are run by it, whether faster or not. For trying out.

    On a CPU the rung's CUDA text runs there (`asymconv.cpu`): slow, small shapes only.

    Args:
        numbers: rungs, best first; unless told all, the highest first, those that need TF32 to be
            allowed before those that do not.
    """
    global _forced
    before = _forced
    best_first = sorted(reversed(RUNGS), key=lambda rung: rung.precision != "tf32")
    _forced = numbers or tuple(rung.number for rung in best_first)
    try:
        yield
    finally:
        _forced = before


# --- facts from tensors --------------------------------------------------------------------------


def tf32_allowed() -> bool:
    """Whether PyTorch's flags let a float32 convolution round its operands to TF32.

    Reads the new setting: reading ``cudnn.allow_tf32`` can raise once the new one was used. They
    are cuDNN's: where that is switched off, PyTorch's other convolutions compute in fp32.
    """
    # torch.backends.cudnn.enabled and .conv.fp32_precision, read where these read it: through
    # Python's attributes it takes a microsecond, every call
    enabled = torch._C._get_cudnn_enabled()
    return enabled and torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32"


_capability = functools.cache(torch.cuda.get_device_capability)


def capability_of(index: int) -> tuple[int, int]:
    """Compute capability of the CUDA device of this index."""
    return _capability(index)


# torch.compiler.assume_constant_result does this alone, but imports the compiler: a second
capability_of._dynamo_marked_constant = True


def _layout(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str:
    if x.layout is not torch.strided:
        return str(x.layout)
    if x.is_contiguous() and weight.is_contiguous() and (bias is None or bias.is_contiguous()):
        return "NCHW"
    of = x if not x.is_contiguous() else weight
    last = of.dim() == 4 and of.is_contiguous(memory_format=torch.channels_last)
    return "channels_last" if last else "strided"


def facts_of(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Facts:
    """The facts of a call under PyTorch's present flags. Reads no tensor's values.

    Args:
        x: (N, C, H, W), or what PyTorch will refuse.
        weight: (K, C / groups, R, S).
        bias: (K,), or None.
        stride, padding, dilation: (height, width), in pixels (`pairs_of`).
        groups: of channels.
    """
    device, dtype = x.device, x.dtype
    kind = "hip" if device.type == "cuda" and torch.version.hip else device.type
    one_device = weight.device == device and (bias is None or bias.device == device)
    one_dtype = weight.dtype is dtype and (bias is None or bias.dtype is dtype)
    return Facts(
        kind if one_device else "several",
        capability_of(device.index) if kind == "cuda" else None,
        dtype if one_dtype else None,
        _layout(x, weight, bias),
        tf32_allowed(),
        x.shape,
        weight.shape,
        None if bias is None else bias.shape,
        stride,
        padding,
        dilation,
        groups,
    )


def may_win(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[bool, str | None]:
    """For torch.compile and torch.export: whether some flags could give this call to a rung.

    Flags may change after the compilation and sizes may be symbols, so the operator decides when
    it runs. Where no flags and no size could matter, PyTorch's convolution goes into the graph,
    where the compiler knows it: on a GPU that was not measured, too. Sizes are asked without
    guards: none of them specializes.

    Args:
        x: (N, C, H, W), sizes perhaps symbols.
        weight: (K, C / groups, R, S).
        stride, padding, dilation: (height, width), in pixels (`pairs_of`).
        groups: of channels.

    Returns:
        Whether; and if not, what this machine lacks where another would have a rung for the call.
    """
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import

    if x.dim() != 4 or weight.dim() != 4 or x.dtype != torch.float32 or not x.is_contiguous():
        return False, None
    if _forced is not None:
        return x.is_cuda or x.device.type == "cpu", None
    if not x.is_cuda or torch.version.hip or groups != 1:
        return False, None
    capability = capability_of(x.device.index)
    channels, pixels = x.shape[1], _pixels_out(x.shape, padding)
    machine = None
    for win in WINS:
        low, high = win.in_channels
        if (
            win.misses_layer(weight.shape, tuple(stride), tuple(dilation)) is None
            and low <= channels <= high
            and not statically_known_true(pixels < win.pixels)
        ):
            lacking = win.lacks(capability)
            if lacking is None:
                return True, None
            machine = machine or lacking  # the first, as `decide` says it by default
    return False, machine
