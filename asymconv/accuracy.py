"""How exact convolutions are: models of rounding, and methods beside them, against float64.

A model rounds operands as a format does and adds products up as a machine does. Methods are rungs
and, where there is a GPU, PyTorch's own convolutions. Errors, unlike times, are the same on any
machine that computes alike, so a record may hold what a CPU computed; it says where each was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

from asymconv import build, record
from asymconv.check import Method, random_data, reference
from asymconv.kernels import RUNGS, Rung
from asymconv.measure import ALL_PEERS
from asymconv.problem import ConvShape

# --- formats -------------------------------------------------------------------------------------


def _keep_bits(x: torch.Tensor, dropped: int, half: int) -> torch.Tensor:
    bits = x.contiguous().view(torch.int32)
    kept = (bits + half) & ~((1 << dropped) - 1)
    return torch.where(x.isfinite(), kept.view(torch.float32), x)


def to_tf32(x: torch.Tensor) -> torch.Tensor:
    """float32 of any shape rounded to TF32's 11 significant bits, to nearest, ties away from zero.

    As cvt.rna.tf32.f32 does (PTX ISA 9.7.9.22), and cuDNN: found by comparing (notebook 07).
    """
    return _keep_bits(x, 13, 1 << 12)


def cut_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """float32 of any shape, the 13 bits that TF32 has not cut off: mma's way with plain float32."""
    return _keep_bits(x, 13, 0)


def to_fp16(x: torch.Tensor) -> torch.Tensor:
    """float32 of any shape rounded to fp16, as float32.

    11 bits, from 2^-14 to 65504 (IEEE 754 binary16).
    """
    return x.half().float()


def to_bf16(x: torch.Tensor) -> torch.Tensor:
    """float32 of any shape rounded to bfloat16, as float32: 8 bits, float32's range."""
    return x.bfloat16().float()


LO_SCALE = 2.0**11


def halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 of any shape as hi + lo / 2^11, both fp16's values as float32.

    Ootomo & Yokota 2022, arXiv 2203.03341.
    """
    hi = to_fp16(x)
    return hi, to_fp16((x - hi) * LO_SCALE)


def scaled(x: torch.Tensor, top: int) -> tuple[torch.Tensor, float]:
    """A tensor times the power of two that brings its largest magnitude to 2^top, and that power.

    Any shape; infinities and NaN are not looked at, zeros alone get a power of 1.

    What `asymconv.kernels.half_range` does, with all values looked at in place of a sample.
    """
    largest = x[x.isfinite()].abs().max().item() if x.isfinite().any() else 0.0
    scale = 2.0 ** (top - math.floor(math.log2(largest))) if largest else 1.0
    return x * scale, scale


# --- sums ----------------------------------------------------------------------------------------

Sums = Literal["exact", "fp32", "tensor cores"]

AT_ONCE = 16
"""Products that a tensor core adds at once: the K of mma.m16n8k16 and of wgmma with fp16."""


def cut_to_fp32(x: torch.Tensor) -> torch.Tensor:
    """float64 of any shape to float32 toward zero: how tensor cores round a sum.

    Fasi, Higham, Mikaitis & Pranesh 2021, Numerical behavior of NVIDIA tensor cores, PeerJ
    Computer Science 7:e330, found it on V100, T4 and A100. For the H100 it is an assumption.
    """
    near = x.float()
    beyond = near.double().abs() > x.abs()
    return torch.where(beyond, torch.nextafter(near, torch.zeros_like(near)), near)


def _windows(x: torch.Tensor, shape: ConvShape) -> torch.Tensor:
    """The pixels that each output meets: float64 (N, terms, OH * OW), a tap's channels together."""
    arguments = {k: v for k, v in shape.conv_args().items() if k != "groups"}
    columns = torch.nn.functional.unfold(x.double(), shape.kernel, **arguments)
    n, terms, pixels = columns.shape
    return columns.view(n, shape.in_channels, -1, pixels).transpose(1, 2).reshape(n, terms, pixels)


def _filters(weight: torch.Tensor) -> torch.Tensor:
    return weight.double().flatten(2).transpose(1, 2).flatten(1)


def add_up(
    x: torch.Tensor, weight: torch.Tensor, shape: ConvShape, sums: Sums, start: torch.Tensor
) -> torch.Tensor:
    """Products of operands as they are, exact each, added to `start` one after the other.

    Args:
        x: (N, C, H, W); weight: (K, C, R, S); one group.
        shape: the convolution.
        sums: "fp32": each product by a fused multiply-add, rounded to nearest; "tensor cores": 16
            at once exactly, their sum added and cut off. All channels of a tap, then the next tap.
        start: (N, K, OH, OW) float64, whose values are float32's.
    """
    columns, filters = _windows(x, shape), _filters(weight)
    total = start.flatten(2)
    step = AT_ONCE if sums == "tensor cores" else 1
    for first in range(0, columns.shape[1], step):
        part = slice(first, first + step)
        total = total + filters[:, part] @ columns[:, part]
        total = (cut_to_fp32(total) if sums == "tensor cores" else total.float()).double()
    return total.view(start.shape)


# --- models --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A way to compute a convolution, as arithmetic alone.

    Attributes:
        name: in records and figures.
        operands: float32 to what is multiplied, as float32.
        sums: how products are added up.
        split: operands are hi + lo halves, three products for one, the small ones first.
        channels_at_once: of one chain of sums; the chains' sums are added in fp32. 0: all.
        mixes_rows: rows, and a column's taps, are added in fp32 before they become operands:
            Winograd's F(2, 3) down the rows, as k08 has it.
    """

    name: str
    operands: Callable[[torch.Tensor], torch.Tensor]
    sums: Sums
    split: bool = False
    channels_at_once: int = 0
    mixes_rows: bool = False

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, shape: ConvShape) -> torch.Tensor:
        """(N, K, OH, OW) float64. x (N, C, H, W), weight (K, C, R, S), one group, no bias.

        Raises:
            ValueError: several groups, or for `mixes_rows` other than three rows of taps that
                follow each other.
        """
        if shape.groups > 1:
            raise ValueError(f"models have one group ({shape})")
        if self.mixes_rows:
            return self._down_rows(x, weight, shape)
        return self._direct(x, weight, shape)

    def _down_rows(self, x: torch.Tensor, weight: torch.Tensor, shape: ConvShape) -> torch.Tensor:
        """Two output rows of four sums of products, of which each is a row of taps."""
        if (shape.kernel[0], shape.stride[0], shape.dilation[0]) != (3, 1, 1):
            raise ValueError(f"F(2, 3) is for 3 rows of taps, stride and dilation 1 ({shape})")
        pairs, above = -(-shape.out_height // 2), shape.padding[0]
        below = 2 * pairs + 2 - above - shape.height
        x = torch.nn.functional.pad(x, (0, 0, above, below))
        d0, d1, d2, d3 = (x[:, :, i : i + 2 * pairs - 1 : 2] for i in range(4))
        g0, g1, g2 = weight.split(1, dim=2)
        outer, inner = 0.5 * (g0 + g2), 0.5 * g1
        one_row = shape.with_(
            height=pairs,
            kernel=(1, shape.kernel[1]),
            padding=(0, shape.padding[1]),
        )
        sums = ((d0 - d2, g0), (d1 + d2, outer + inner), (d2 - d1, outer - inner), (d3 - d1, g2))
        m0, m1, m2, m3 = (self._direct(rows, taps, one_row).float() for rows, taps in sums)
        both = torch.stack((m0 + (m1 + m2), m3 + (m1 - m2)), dim=3).flatten(2, 3)
        return both[:, :, : shape.out_height].double()

    def _direct(self, x: torch.Tensor, weight: torch.Tensor, shape: ConvShape) -> torch.Tensor:
        if self.sums == "exact":
            return reference(self.operands(x), self.operands(weight), None, shape)
        step = self.channels_at_once or shape.in_channels
        total = torch.zeros(shape.output_shape, dtype=torch.float64)
        for c0 in range(0, shape.in_channels, step):
            some = slice(c0, c0 + step)
            count = min(step, shape.in_channels - c0)
            chain = self._chain(x[:, some], weight[:, some], shape.with_(in_channels=count))
            total = (total + chain).float().double()
        return total

    def _chain(self, x: torch.Tensor, weight: torch.Tensor, shape: ConvShape) -> torch.Tensor:
        total = torch.zeros(shape.output_shape, dtype=torch.float64)
        if not self.split:
            return add_up(self.operands(x), self.operands(weight), shape, self.sums, total)
        (x_hi, x_lo), (w_hi, w_lo) = halves(x), halves(weight)
        total = add_up(x_lo, w_hi, shape, self.sums, total)
        total = add_up(x_hi, w_lo, shape, self.sums, total) / LO_SCALE
        return add_up(x_hi, w_hi, shape, self.sums, total)


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


MODELS: tuple[Model, ...] = (
    Model("bf16", to_bf16, "exact"),
    Model("TF32, cut off", cut_to_tf32, "exact"),
    Model("TF32", to_tf32, "exact"),
    Model("fp16", to_fp16, "exact"),
    Model("fp16, tensor cores", to_fp16, "tensor cores"),
    Model("fp32", _as_it_is, "fp32"),
    Model("hi + lo, one chain", _as_it_is, "tensor cores", split=True),
    Model("hi + lo, chains of 32", _as_it_is, "tensor cores", split=True, channels_at_once=32),
    Model("hi + lo, F(2, 3)", _as_it_is, "tensor cores", split=True, mixes_rows=True),
)
"""From coarse to fine. "exact": the operands alone are rounded. Sums are direct but for the last,
which is k08's way; those in chains of 32 channels are what k08 had first, a warpgroup for 32."""


# --- inputs beyond fp16's range ------------------------------------------------------------------


def _powers(tensor: torch.Tensor, axis: int, decades: int) -> torch.Tensor:
    """Powers of ten along an axis, from 10^-decades to 10^decades, in no order."""
    count = tensor.shape[axis]
    exponents = torch.arange(count, dtype=torch.float64) * 7 % count / max(1, count - 1) * 2 - 1
    shape = [count if i == axis else 1 for i in range(tensor.dim())]
    return (10.0 ** (decades * exponents)).float().reshape(shape).to(tensor.device)


def _with(x: torch.Tensor, value: float) -> torch.Tensor:
    """x with one value in its middle replaced."""
    x = x.clone()
    x[tuple(size // 2 for size in x.shape)] = value
    return x


Data = tuple[torch.Tensor, torch.Tensor]

HARD: Mapping[str, Callable[[torch.Tensor, torch.Tensor], Data]] = {
    "1e-30": lambda x, w: (x * 1e-30, w),
    "1e-6": lambda x, w: (x * 1e-6, w),
    "1e6": lambda x, w: (x * 1e6, w),
    "1e30": lambda x, w: (x * 1e30, w * 1e-3),
    "weights 1e-25": lambda x, w: (x, w * 1e-25),
    "mixed per channel": lambda x, w: (x * _powers(x, 1, 12), w),
    "mixed, and weights inversely": lambda x, w: (
        x * _powers(x, 1, 12),
        w / _powers(x, 1, 12)[:, : w.shape[1]],
    ),
    "mixed per filter": lambda x, w: (x, w * _powers(w, 0, 25)),
    "one huge value": lambda x, w: (_with(x, 1e15), w),
    "zeros": lambda x, w: (torch.zeros_like(x), w),
    "inf": lambda x, w: (_with(x, math.inf), w),
    "NaN": lambda x, w: (_with(x, math.nan), w),
}
"""From x and weight to others, beyond fp16's range and within float32's."""


def worst(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, shape: ConvShape) -> float:
    """Largest error of an output over the sum of the magnitudes of its terms; no bias.

    Shapes: x (N, C, H, W), weight (K, C / groups, R, S), y, the result to judge, (N, K, OH, OW).
    Infinite where y is infinite or NaN and the reference is not, or the other way round.
    """
    y, ref = y.double(), reference(x, weight, None, shape)
    finite = ref.isfinite()
    same = torch.equal(y.isnan(), ref.isnan()) and torch.equal(
        y[~finite & ~ref.isnan()], ref[~finite & ~ref.isnan()]
    )
    if not same or not bool(y[finite].isfinite().all()):
        return math.inf
    size = reference(x.abs(), weight.abs(), None, shape)
    # float32 has nothing below 2^-149: a sum of subnormals may be off by one of those a term
    off = ((y - ref).abs() - 1e-44 * shape.terms).clamp_min_(0.0)
    return (off / (size + 1e-300))[finite].max().item()


# --- what is recorded ----------------------------------------------------------------------------

RECORD = record.DATA_FOLDER / "accuracy.json"
SHAPE = ConvShape(1, 64, 18, 138, 128)
GROWTH_SHAPE = ConvShape(1, 8, 10, 18, 16)
RANGE_SHAPE = ConvShape(1, 64, 5, 138, 20)
CHANNELS = tuple(2**i for i in range(3, 12))
SEED = 55


EXACT = "exact"


@dataclass(frozen=True)
class Errors:
    """How exact a method is on `SHAPE`.

    Attributes:
        name: of the model, rung or peer.
        kind: which of these it is.
        where: "CPU", "CPU backend" for a rung's CUDA text there, or the GPU.
        error: ‖y - ref‖ / ‖ref‖.
        counts: outputs whose error over the outputs' root mean square lies from 2^key to twice
            that; key `EXACT` counts those without.
        source_hash: a rung's.
    """

    name: str
    kind: Literal["model", "rung", "peer"]
    where: str
    error: float
    counts: Mapping[str, int]
    source_hash: str = ""


@dataclass(frozen=True)
class Accuracy:
    """A record of errors.

    Attributes:
        made: with what, and on which GPU if on any.
        shape: that `errors` are of.
        errors: of every method, coarse ones first.
        growth: by model and number of input channels, ‖y - ref‖ / ‖ref‖ on `GROWTH_SHAPE`.
        ranges: by the name of hard data (`HARD`) and method, `worst` on `RANGE_SHAPE`; None where
            what is not finite is wrong.
    """

    made: Mapping[str, str]
    shape: ConvShape
    errors: tuple[Errors, ...]
    growth: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    ranges: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Errors:
        """The errors of a method, a rung also by its number. Raises KeyError."""
        for errors in self.errors:
            if name in (errors.name, record.short_name(errors.name)):
                return errors
        raise KeyError(f"no {name!r} here; there are {[e.name for e in self.errors]}")

    def __contains__(self, name: str) -> bool:
        return any(name in (e.name, record.short_name(e.name)) for e in self.errors)

    def save(self, path: Path) -> None:
        """Write the record; the file is whole or not there."""
        record.write_json(path, asdict(self))


def load(path: Path = RECORD) -> Accuracy:
    """Read a record of errors.

    Raises:
        FileNotFoundError: there is none; says how to make it.
    """
    data = record.read_json(path, "asymconv accuracy --record")
    growth = {m: {int(c): e for c, e in of.items()} for m, of in data["growth"].items()}
    errors = tuple(Errors(**e) for e in data["errors"])
    return Accuracy(data["made"], ConvShape(**data["shape"]), errors, growth, data["ranges"])


def histogram(difference: torch.Tensor, ref: torch.Tensor) -> dict[str, int]:
    """How many errors lie from one power of two of the outputs' root mean square to the next.

    Args:
        difference: of a result and the reference, any shape.
        ref: the reference, of the same shape.

    Returns:
        By exponent e, as text, the errors from 2^e to 2^(e + 1); `EXACT` counts those that are 0.
    """
    relative = (difference.abs() / ref.square().mean().sqrt()).flatten()
    exponents = torch.frexp(relative).exponent - 1
    found, counts = torch.unique(exponents[relative > 0], return_counts=True)
    result = {str(e): n for e, n in zip(found.tolist(), counts.tolist(), strict=True)}
    exact = int((relative == 0).sum())
    return ({EXACT: exact} if exact else {}) | result


def _errors(
    name: str,
    kind: Literal["model", "rung", "peer"],
    where: str,
    y: torch.Tensor,
    ref: torch.Tensor,
    source_hash: str = "",
) -> Errors:
    difference = y.double().cpu() - ref
    error = (difference.norm() / ref.norm()).item()
    return Errors(name, kind, where, error, histogram(difference, ref), source_hash)


def rungs_to_measure() -> tuple[Rung, ...]:
    """The last rung on plain fp32 units and those on tensor cores."""
    return tuple(rung for rung in RUNGS if rung.capability >= (8, 0))


PEERS = ("nn.Conv2d", "nn.Conv2d, strict fp32", "autocast fp16")
"""Ways to have PyTorch compute it that round differently."""


def _methods(device: str) -> Iterator[tuple[str, Literal["rung", "peer"], str, Method]]:
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU backend"
    for rung in rungs_to_measure():
        yield rung.name, "rung", where, build.load(rung, device)
    if device == "cuda":
        for peer in ALL_PEERS:
            if peer.name in PEERS:
                yield peer.name, "peer", where, peer


def measure(device: str = "cpu", say: Callable[[str], object] = lambda line: None) -> Accuracy:
    """Errors of all models, and of the methods that a device has, on data of a fixed seed.

    Args:
        device: "cpu": rungs run their CUDA text on the CPU backend; "cuda": rungs and PyTorch's own
            convolutions run there. Models are computed on the CPU either way.
        say: receives a line before each part.
    """
    made = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "revision": record.revision(),
        "date": record.now(),
    }
    x, weight, _ = random_data(SHAPE, seed=SEED)
    ref = reference(x, weight, None, SHAPE)
    methods = list(_methods(device))
    errors = []
    for model in MODELS:
        say(f"model {model.name}")
        errors.append(_errors(model.name, "model", "CPU", model(x, weight, SHAPE), ref))
    for name, kind, where, method in methods:
        say(name)
        y = method(x.to(device), weight.to(device), None, SHAPE)
        of_rung = method.rung.source_hash if kind == "rung" else ""
        errors.append(_errors(name, kind, where, y, ref, of_rung))
    say("errors as channels grow")
    growth = {model.name: grow(model) for model in MODELS}
    say("hard inputs")
    ranges = {case: dict(_of_range(case, methods, device)) for case in HARD}
    return Accuracy(made, SHAPE, tuple(errors), growth, ranges)


def grow(model: Model, channels: Sequence[int] = CHANNELS) -> dict[int, float]:
    """‖y - ref‖ / ‖ref‖ of a model by the number of input channels, on `GROWTH_SHAPE`."""
    result = {}
    for count in channels:
        shape = GROWTH_SHAPE.with_(in_channels=count)
        x, weight, _ = random_data(shape, seed=SEED)
        ref = reference(x, weight, None, shape)
        result[count] = ((model(x, weight, shape) - ref).norm() / ref.norm()).item()
    return result


def _of_range(
    case: str, methods: Sequence[tuple[str, str, str, Method]], device: str
) -> Iterator[tuple[str, float | None]]:
    x, weight = HARD[case](*random_data(RANGE_SHAPE, seed=SEED)[:2])
    runs: dict[str, Callable[[], torch.Tensor]] = {
        model.name: lambda model=model: model(x, weight, RANGE_SHAPE)
        for model in MODELS
        if model.sums == "exact"
    }
    for name, _, _, method in methods:
        runs[name] = lambda method=method: method(
            x.to(device), weight.to(device), None, RANGE_SHAPE
        ).cpu()
    for name, run in runs.items():
        off = worst(run(), x, weight, RANGE_SHAPE)
        yield name, off if math.isfinite(off) else None


def rounding_error(x: torch.Tensor, to: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """‖to(x) - x‖ / ‖x‖, x of any shape: what rounding alone does to operands."""
    return ((to(x).double() - x.double()).norm() / x.double().norm()).item()


def outside(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> float:
    """The part of elements for which torch.allclose(a, b, tolerance, tolerance) would be false.

    a and b have the same shape, any.
    """
    near = (a.double() - b.double()).abs() <= tolerance + tolerance * b.double().abs()
    return 1.0 - near.double().mean().item()
