"""What does it matter that the width is twice the height? Series of shapes, measured side by side.

`SERIES` is the one list of experiments, as data. `measure` runs them on a GPU: it builds once,
checks every method on every shape, times them in turns, and saves after each shape. The record is
figures/data/asymmetry.json; each series in it is of one run.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from asymconv import record as records
from asymconv.check import Method, kept_images
from asymconv.kernels import RUNGS, Rung
from asymconv.measure import (
    ALL_PEERS,
    COMPILED,
    PEERS,
    Peer,
    Timing,
    build_rungs,
    check_methods,
    label,
    repeats_for,
    time_what_fits,
)
from asymconv.problem import CONTRACT, ConvShape
from asymconv.record import Record, short_name

RECORD = records.DATA_FOLDER / "asymmetry.json"
FORMAT = 1

SLOW = ("k01", "k02")
SLOW_FILTERS = 4
"""k01 and k02 take two seconds a call: they get so many output channels, each of which reads the
same inputs. Their batch stays: a thread is an image, so it is what they are about."""

ROUNDS, BUDGET_MS, WARM_MS = 3, 120.0, 15.0  # of a method on a shape


@dataclass(frozen=True)
class Series:
    """One experiment.

    Attributes:
        name: short, for commands and the record.
        question: it answers.
        equal: what is the same for all its shapes.
        shapes: in the order drawn.
        named: a shape's name within the series.
        base: the shape that others are compared with.
        peers: methods beside the rungs.
        slow: whether the slow rungs take part, with few filters.
        rungs: whether rungs take part at all.
        variants: tile constants for a rung; then only those of its builds run.
    """

    name: str
    question: str
    equal: str
    shapes: tuple[ConvShape, ...]
    named: Callable[[ConvShape], str]
    base: ConvShape = CONTRACT
    peers: tuple[Peer, ...] = PEERS
    slow: bool = True
    rungs: bool = True
    variants: Callable[[Rung], Sequence[Mapping[str, int]]] | None = None

    def jobs(self, rungs: Sequence[Rung] = RUNGS) -> list[tuple[Rung, Mapping[str, int]]]:
        """Rungs with the constants to build them with."""
        if not self.rungs:
            return []
        if self.variants is not None:
            return [(rung, _others(rung, v)) for rung in rungs for v in self.variants(rung)]
        return [(rung, {}) for rung in rungs if self.slow or rung.number not in SLOW]

    def index(self, shape: ConvShape) -> int:
        """Which of the series' shapes this is, whatever its filters. Raises ValueError."""
        return self.shapes.index(shape.with_(out_channels=self.base.out_channels))


def _others(rung: Rung, defines: Mapping[str, int]) -> dict[str, int]:
    """Those constants that are not the rung's own: the same build has the same ones."""
    return {name: value for name, value in defines.items() if rung.defines.get(name) != value}


def _key(rung: Rung, defines: Mapping[str, int]) -> tuple[object, ...]:
    return (rung.name, *sorted(_others(rung, defines).items()))


def _size(shape: ConvShape) -> str:
    return f"{shape.height}×{shape.width}"


def _columns(shape: ConvShape) -> str:
    pads = f" + {2 * shape.padding[1]}" if shape.padding[1] else ""
    return f"{shape.out_width} of {shape.width}{pads}"


def _for_columns(width: int) -> ConvShape:
    """As many output pixels as the contract's, as near as whole rows come, on this width."""
    shape = CONTRACT.with_(width=width)
    pixels = CONTRACT.out_height * CONTRACT.out_width
    return shape.with_(height=round(pixels / shape.out_width) + 2)


def oriented(rung: Rung) -> Sequence[Mapping[str, int]]:
    """Constants that turn a rung's tile, or the way it walks: wide, square, high.

    k05, k07 and k08 have none: their lanes and products lie along the row by construction.
    """
    if rung.number == "k03":
        return ({"ALONG_HEIGHT": 0}, {"ALONG_HEIGHT": 1})
    if rung.number == "k04":
        tiles = ((32, 8), (16, 16), (8, 32), (2, 128), (1, 256))
        return tuple({"TILE_H": height, "TILE_W": width} for height, width in tiles)
    return tuple(v for v in rung.variants if {"TILE_W", "STRIP"} & set(v))


ASPECTS = tuple(
    CONTRACT.with_(height=height, width=width)
    for height, width in (
        *((64, 8192), (256, 2048), (512, 1024), (724, 724)),
        *((1024, 512), (2048, 256), (8192, 64)),
    )
)
_TWO = CONTRACT.with_(batch=2)

SERIES: tuple[Series, ...] = (
    Series(
        "aspect",
        "Does it matter how wide a picture of so many pixels is?",
        "Input pixels (724×724: 0.02 % fewer), so input bytes. The output loses two rows and two "
        "columns: 2.6 % fewer pixels at the ends, hence time per output. Output rows all begin "
        "on a sector one time in four (widths ±2 from a multiple of 8).",
        ASPECTS,
        _size,
        peers=tuple(p for p in ALL_PEERS if p not in COMPILED),
    ),
    Series(
        "pitch",
        "What does it cost that rows of 1022 floats do not begin on sectors?",
        "Rows, and columns to 0.3 %.",
        (
            CONTRACT.with_(width=1024, padding=(0, 1)),
            *(CONTRACT.with_(width=width) for width in (1026, 1025, 1024, 1023)),
        ),
        _columns,
    ),
    Series(
        "batch",
        "Is a batch worth anything, and is the batch a good index for threads?",
        "The image.",
        tuple(CONTRACT.with_(batch=batch) for batch in (1, 2, 4, 8, 16, 32, 64)),
        lambda shape: str(shape.batch),
    ),
    Series(
        "growth",
        "Does a pixel cost the same, from a thumbnail to a batch of 144?",
        "Nothing but channels and kernel: time is per output.",
        (
            *(
                CONTRACT.with_(batch=1, height=height, width=2 * height)
                for height in (128, 256, 512, 1024, 2048)
            ),
            CONTRACT,
            CONTRACT.with_(batch=144),
        ),
        lambda shape: f"{shape.batch}×{_size(shape)}",
        slow=False,
    ),
    Series(
        "strips",
        "What do columns cost that a strip of 128 has in vain?",
        "Output pixels, to 0.4 %, and where output rows begin on sectors.",
        tuple(_for_columns(width) for width in (128, 132, 512, 516, 1024, 1028)),
        lambda shape: f"{shape.out_width}",
        base=_for_columns(1024),
        slow=False,
    ),
    Series(
        "orientation",
        "Which way should a tile lie, and how should it walk?",
        "As for aspect, two images.",
        tuple(s.with_(batch=2) for s in (ASPECTS[0], CONTRACT, ASPECTS[-1])),
        _size,
        base=_TWO,
        peers=PEERS[:1],
        variants=oriented,
    ),
    Series(
        "unrolling",
        "What are loops worth that the compiler unrolls?",
        "The work, but for two rows. k04 unrolls its taps for dilation 1 and runs the same text "
        "with loops for any other, here with a tile of 12 × 34 in place of 10 × 34; k03 unrolls "
        "both: it shows what the dilation costs by itself.",
        (_TWO, _TWO.with_(dilation=(2, 1))),
        lambda shape: "loops" if shape.dilation[0] > 1 else "unrolled",
        base=_TWO,
        peers=PEERS[:1],
        variants=lambda rung: ({},) if rung.number in ("k03", "k04") else (),
    ),
    Series(
        "compiled",
        "Does torch.compile make it faster, at any aspect ratio?",
        "As for aspect.",
        # A shape costs some 50 s: by inductor's log, 40 of them on twelve Triton kernels that lose.
        # Sizes are constants of their texts, so no shape finds them built; without them the search
        # would be for cuDNN alone, which is nn.Conv2d again.
        ASPECTS,
        _size,
        peers=(PEERS[0], *COMPILED),
        rungs=False,
    ),
)
"""The experiments, those that matter most first: a budget may end before the last."""


def get_series(name: str) -> Series:
    """The series of this name. Raises KeyError, listing those there are."""
    for series in SERIES:
        if series.name == name:
            return series
    raise KeyError(f"no series {name!r}; there are {', '.join(s.name for s in SERIES)}")


# --- the record ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One shape of a series.

    Attributes:
        shape: the convolution; with `SLOW_FILTERS` output channels it is the slow rungs'.
        timings: rungs, peers and the memory floor.
        left_out: methods that are not among them, and why.
    """

    shape: ConvShape
    timings: tuple[Timing, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """One series, measured in one run.

    Attributes:
        made: where and with what (`record.environment`).
        rows: the shapes so far, slow rungs apart.
    """

    made: Mapping[str, str | int]
    rows: tuple[Row, ...]

    def timings(self, series: Series) -> dict[str, list[Timing | None]]:
        """For each method, its timing on each shape, None where there is none.

        Rungs are called by their numbers, behind which stand constants that are not their own.
        """
        found: dict[str, list[Timing | None]] = {}
        for row in self.rows:
            at = series.index(row.shape)
            for timing in row.timings:
                number = short_name(timing.name)
                slow = number in SLOW
                if slow != (row.shape.out_channels == SLOW_FILTERS):
                    continue  # the floor of the slow rungs' shape
                constants = [f"{k}={v}" for k, v in timing.defines.items()]
                name = " ".join([number, *constants])
                found.setdefault(name, [None] * len(series.shapes))[at] = timing
        return found

    def costs(self, series: Series) -> dict[str, list[float | None]]:
        """For each method, its ns per output on each shape."""
        outputs = [shape.outputs / shape.out_channels for shape in series.shapes]
        result = {}
        for name, timings in self.timings(series).items():
            filters = SLOW_FILTERS if name in SLOW else series.base.out_channels
            result[name] = [
                None if t is None else 1e6 * t.median / (filters * n)
                for t, n in zip(timings, outputs, strict=True)
            ]
        return result

    def relative(self, series: Series) -> dict[str, list[float | None]]:
        """For each method, time per output over that on the series' base.

        A method that was not measured on the base is left out.
        """
        at = series.shapes.index(series.base)
        result = {}
        for name, costs in self.costs(series).items():
            if (base := costs[at]) is not None:
                result[name] = [None if c is None else c / base for c in costs]
        return result


Asymmetry = Mapping[str, Measured]
"""The record: what was measured, by the name of its series."""


def save(record: Asymmetry, path: Path = RECORD) -> None:
    """Write the record; the file is whole or not there."""
    data = {
        "format": FORMAT,
        "series": {
            name: {"made": dict(measured.made), "rows": [asdict(row) for row in measured.rows]}
            for name, measured in record.items()
        },
    }
    records.write_json(path, data)


def load(path: Path = RECORD) -> dict[str, Measured]:
    """Read the record.

    Raises:
        FileNotFoundError: there is none; says how to make it.
        ValueError: it is of another format.
    """
    data = records.read_json(path, "asymconv asymmetry --record", FORMAT)
    record = {}
    for name, measured in data["series"].items():
        rows = []
        for row in measured["rows"]:
            timings = tuple(records.read_timing(timing) for timing in row["timings"])
            rows.append(Row(ConvShape(**row["shape"]), timings, row["left_out"]))
        record[name] = Measured(measured["made"], tuple(rows))
    return record


# --- measuring -----------------------------------------------------------------------------------

# Guesses for `estimate`, of an H100: float64 convolutions and comparisons of one of the contract's
# images, a compilation by torch.compile, all rungs by nvcc on 16 cores.
REFERENCE_MS, COMPARE_MS, COMPILE_S, BUILD_S = 100.0, 30.0, 20.0, 45.0


def _call_ms(name: str, shape: ConvShape, ladder: Record) -> float:
    """A guess at a method's ms on a shape: the ladder's, in proportion to the outputs."""
    known = ladder[name] if name in ladder else ladder["nn.Conv2d"]
    return known.median * shape.outputs / ladder.shape.outputs


def _steps(
    series: Series, rungs: Sequence[Rung]
) -> Iterator[tuple[ConvShape, list[tuple[Rung, Mapping[str, int]]], tuple[Peer, ...]]]:
    """What is measured together: a shape, the builds and the peers."""
    jobs = series.jobs(rungs)
    slow = [job for job in jobs if job[0].number in SLOW]
    for shape in series.shapes:
        yield shape, [job for job in jobs if job not in slow], series.peers
        if slow:
            yield shape.with_(out_channels=SLOW_FILTERS), slow, ()


def _seconds(
    shape: ConvShape, names: Sequence[str], peers: Sequence[Peer], ladder: Record
) -> float:
    """A guess at how long a step takes."""
    total = sum(COMPILE_S for peer in peers if peer in COMPILED)
    image = shape.outputs / (CONTRACT.outputs / CONTRACT.batch)
    total += 3 * REFERENCE_MS * min(image, 12) / 1e3
    for name in (*names, *(peer.name for peer in peers)):
        ms = _call_ms(name, shape, ladder)
        calls = 4 + max(ROUNDS, repeats_for(ms, BUDGET_MS))  # two to check, two to warm up
        total += (calls * ms + ROUNDS * WARM_MS + COMPARE_MS * image) / 1e3
    return total


def estimate(series: Series, rungs: Sequence[Rung] = RUNGS, ladder: Record | None = None) -> float:
    """Seconds that a series may take on an H100, builds apart: a guess from the ladder's record."""
    ladder = ladder or records.load(records.LADDER)
    return sum(
        _seconds(shape, [rung.name for rung, _ in jobs], peers, ladder)
        for shape, jobs, peers in _steps(series, rungs)
    )


def needed_bytes(shape: ConvShape) -> int:
    """Device memory to check and time a rung: tensors, references, and float64 of one image."""
    image = shape.with_(batch=1)
    references = 20 * image.outputs * max(1, kept_images(shape))
    pixels = math.prod(image.input_shape)
    return shape.least_bytes + references + 8 * (2 * pixels + 3 * image.outputs)


def measure_row(shape: ConvShape, methods: Sequence[Method]) -> Row:
    """Check and time methods on one shape, with its memory floor, on the current GPU.

    What does not fit the memory is left out, with the reason.

    Raises:
        AssertionError: a rung's result is wrong.
    """
    gc.collect()
    torch.cuda.empty_cache()
    free, needed = torch.cuda.mem_get_info()[0], needed_bytes(shape)
    if needed > free:
        reason = f"needs {needed / 1e9:.1f} GB of device memory, {free / 1e9:.1f} are free"
        return Row(shape, (), {label(method): reason for method in methods})
    refused: dict[str, str] = {}
    taken: list[Method] = []
    for method in methods:
        rung: Rung | None = getattr(method, "rung", None)
        reason = rung.refuses(shape, getattr(method, "defines", {})) if rung else None
        if reason:
            refused[label(method)] = reason
        else:
            taken.append(method)
    passed, checks, failed = check_methods(taken, shape)
    settings = {"floor": True, "rounds": ROUNDS, "budget_ms": BUDGET_MS, "warm_ms": WARM_MS}
    timings, crowded = time_what_fits(passed, checks, shape, **settings)
    return Row(shape, tuple(timings), refused | failed | crowded)


def measure(
    chosen: Sequence[Series] = SERIES,
    rungs: Sequence[Rung] = RUNGS,
    path: Path | None = None,
    budget: float = math.inf,
) -> Iterator[tuple[Series, Row]]:
    """Measure series on the current GPU; yields each row after saving the record.

    Args:
        chosen: series; each takes the place of its older self in the record.
        rungs: that take part.
        path: of the record, None writes none.
        budget: seconds; a step that would end later, by `estimate`, is not begun, and its series is
            kept as far as it came.

    Raises:
        AssertionError: a rung's result is wrong.
    """
    start = time.monotonic()
    ladder = records.load(records.LADDER)
    record: dict[str, Measured] = load(path) if path is not None and path.exists() else {}
    jobs = [job for series in chosen for job in series.jobs(rungs)]
    different = {_key(*job): job for job in jobs}
    kernels, not_built = build_rungs(list(different.values()))
    built = {_key(kernel.rung, kernel.defines): kernel for kernel in kernels}
    for series in chosen:
        measured = Measured(records.environment(), ())
        for shape, its, peers in _steps(series, rungs):
            spent = time.monotonic() - start
            if spent + _seconds(shape, [rung.name for rung, _ in its], peers, ladder) > budget:
                continue  # a later one may be short
            missing = {rung.name: not_built[rung.name] for rung, _ in its if rung.name in not_built}
            methods = [built[_key(*job)] for job in its if _key(*job) in built]
            row = measure_row(shape, [*methods, *peers])
            row = replace(row, left_out=missing | row.left_out)
            measured = replace(measured, rows=(*measured.rows, row))
            record[series.name] = measured
            if path is not None:
                save(record, path)
            yield series, row


# --- what it says --------------------------------------------------------------------------------


def worst_over_best(values: Sequence[float | None]) -> float:
    """Largest over smallest of what was measured. Raises ValueError if nothing was."""
    there = [value for value in values if value is not None]
    return max(there) / min(there)
