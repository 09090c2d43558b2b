"""The ideas of the seed, each with an answer computed from the records.

The seed is the document that the study began with: hints, and a model's way through them to the
kernels that are k01 and k02 here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from asymconv.asymmetry import Asymmetry, Measured, Series, get_series, worst_over_best
from asymconv.problem import CONTRACT
from asymconv.profiler import Profile
from asymconv.record import Record, short_name, significant

NOTICED = 1.05
"""From a gain of so many times on an idea is worth its lines."""

NOT_YET = "not measured yet"


@dataclass(frozen=True)
class Answer:
    """What became of an idea.

    Attributes:
        idea: the seed's.
        verdict: of an idea "worth it", "not worth it" or "wrong" (slower); of a claim "right" or
            "wrong"; `NOT_YET`.
        number: what it was judged by.
        record: where that is from: a record, and its entries.
    """

    idea: str
    verdict: str
    number: str
    record: str


def verdict(gain: float) -> str:
    """Of an idea that makes a kernel so many times faster.

    Raises:
        ValueError: the gain is not a positive number.
    """
    if not 0 < gain < math.inf:
        raise ValueError(f"a gain is a positive number, not {gain}")
    if gain >= NOTICED:
        return "worth it"
    return "wrong" if gain <= 1 / NOTICED else "not worth it"


def _claim(true: bool) -> str:
    return "right" if true else "wrong"


def _times(gain: float) -> str:
    if gain >= 1:
        return f"{significant(gain)} times faster"
    return f"{significant(1 / gain)} times slower"


def _rung(idea: str, ladder: Record, without: str, with_: str, what: str) -> Answer:
    gain = ladder[without].median / ladder[with_].median
    return Answer(idea, verdict(gain), f"{what}: {_times(gain)}", f"ladder: {with_}, {without}")


def _tile(variants: Record, height: int, width: int) -> float:
    """Median of k04 with this tile. Raises KeyError."""
    for timing in variants.timings:
        if timing.name.startswith("k04_") and timing.defines == {"TILE_H": height, "TILE_W": width}:
            return timing.median
    raise KeyError(f"no k04 with a tile of {height} × {width} in {variants.title!r}")


def _k03(variants: Record, constant: str) -> dict[int, float]:
    """Medians of k03 by the value of one constant, those that were measured."""
    return {
        timing.defines[constant]: timing.median
        for timing in variants.timings
        if timing.name.startswith("k03_") and set(timing.defines) == {constant}
    }


def _measured(
    asymmetry: Asymmetry | None, name: str, *methods: str
) -> tuple[Series, Measured] | None:
    """A series and its record, if these methods were measured on all its shapes."""
    series = get_series(name)
    if asymmetry is None or name not in asymmetry:
        return None
    relative = asymmetry[name].relative(series)
    if any(None in relative.get(method, [None]) for method in methods):
        return None
    return series, asymmetry[name]


def _not_yet(idea: str, series: str) -> Answer:
    return Answer(idea, NOT_YET, "", f"asymmetry: {series}")


def _of_channels(variants: Record) -> Answer:
    """Whether a turn of k03's loop over the input channels should take more than one."""
    idea, source = "Unroll the loop over the input channels", "variants: k03"
    times = _k03(variants, "UNROLL_CHANNELS")
    if 1 not in times or len(times) < 2:
        return Answer(idea, NOT_YET, "", source)
    many = min((count for count in times if count > 1), key=times.__getitem__)
    gain = times[1] / times[many]
    number = f"k03, {many} channels in a turn of its loop, not one: {_times(gain)}"
    return Answer(idea, verdict(gain), number, source)


def from_the_ladder(ladder: Record, variants: Record, counters: Profile) -> Iterator[Answer]:
    """Answers that the ladder, its variants and its counters give.

    Raises:
        KeyError: a record lacks what an answer needs.
    """
    k01, k02, k03 = (ladder[name].median for name in ("k01", "k02", "k03"))
    lanes, line = (
        counters[name]["global_load_sectors"] / counters[name]["global_load_requests"]
        for name in ("k02", "k03")
    )
    batch = CONTRACT.batch
    yield Answer(
        "A block is the batch: a thread an image",
        verdict(k03 / k02),
        f"{_times(k03 / k02)} than lanes along the width: {batch} of 32 lanes, {lanes:.1f} sectors "
        f"a load for {batch} images; k03 {line:.1f} for 32 pixels",
        "ladder: k02, k03; counters",
    )
    lanes = 32
    stores = counters["k03"]["global_store_sectors"] / counters["k03"]["global_store_requests"]
    yield Answer(
        "128 threads a block, each an output channel",
        verdict(stores / lanes),
        f"by count, not timed: neighbours are a plane apart, {lanes} sectors a store and a load of "
        f"w; k03, along the width, {stores:.1f} a store and one a load of w",
        "counters: k03",
    )
    idea = "Loop over the output channels in the kernel, for fewer blocks"
    yield _rung(idea, ladder, "k01", "k02", "k02 beside k01")
    blocks = math.prod((CONTRACT.out_height, CONTRACT.out_width, CONTRACT.out_channels))
    yield Answer(
        "Millions of blocks are too many to launch",
        _claim(k01 > k02 * NOTICED),
        f"k01 launches {blocks / 1e6:.1f} million and is {_times(k02 / k01)} than k02's "
        f"{blocks / CONTRACT.out_channels / 1e6:.2f} million",
        "ladder: k01, k02",
    )
    along = _k03(variants, "ALONG_HEIGHT")
    gain = along[1] / along[0]
    yield Answer(
        "Give x, the width, the threads",
        verdict(gain),
        f"k03's lanes along the width, not the height: {_times(gain)}",
        "variants: k03",
    )
    gain = _tile(variants, 1, 256) / _tile(variants, 16, 16)
    yield Answer(
        "A 2-D block of 16 × 16 threads",
        verdict(gain),
        f"k04, 256 threads as 16 × 16, not 1 × 256: {_times(gain)}",
        "variants: k04",
    )
    gain = _tile(variants, 32, 8) / _tile(variants, 8, 32)
    yield Answer(
        "Tiles wider than high",
        verdict(gain),
        f"k04, tiles of 8 × 32, not 32 × 8: {_times(gain)}",
        "variants: k04",
    )
    yield _rung("Tile the input in shared memory", ladder, "k03", "k04", "k04 beside k03")
    idea = "Several outputs a thread"
    yield _rung(idea, ladder, "k04", "k05", "k05, 160 in registers, beside k04")
    best = min(ladder.of_kind("rung"), key=lambda timing: timing.median)
    gain = ladder["nn.Conv2d"].median / best.median
    yield Answer(
        "A kernel made for this shape beats nn.Conv2d",
        _claim(gain >= NOTICED),
        f"{short_name(best.name)}: {_times(gain)}; the seed's own, k02, "
        f"{_times(ladder['nn.Conv2d'].median / k02)}",
        f"ladder: {short_name(best.name)}, nn.Conv2d",
    )
    yield _of_channels(variants)


_WIDTH = "Exploit that the width is twice the height"


def from_the_series(ladder: Record, asymmetry: Asymmetry | None) -> Iterator[Answer]:
    """Answers that `asymconv asymmetry --record` gives; without its record they say so."""
    best = short_name(min(ladder.of_kind("rung"), key=lambda timing: timing.median).name)

    idea = "Unroll the loops over the taps"
    if found := _measured(asymmetry, "unrolling", "k03", "k04"):
        series, measured = found
        loops = series.shapes.index(series.shapes[-1])
        ratio = {name: values[loops] for name, values in measured.relative(series).items()}
        gain = ratio["k04"] / ratio["k03"]
        number = (
            f"k04 with loops takes {ratio['k04']:.2f} times its time; k03, unrolled in both, "
            f"{ratio['k03']:.2f}"
        )
        yield Answer(idea, verdict(gain), number, "asymmetry: unrolling")
    else:
        yield _not_yet(idea, "unrolling")

    idea = "Vectorized loads and stores"
    if found := _measured(asymmetry, "pitch", "k05", "k06"):
        series, measured = found
        at = [series.named(shape) for shape in series.shapes].index("1021 of 1023")
        gains = {name: measured.relative(series)[name][at] for name in ("k06", "k05")}
        number = (
            "rows of 1021 columns, which allow 4 bytes at once in place of 8 or 16: "
            + ", ".join(f"{name} {_times(1 / gain)}" for name, gain in gains.items())
        )
        yield Answer(idea, verdict(gains["k06"]), number, "asymmetry: pitch")
    else:
        yield _not_yet(idea, "pitch")

    idea = "nn.Conv2d is not optimized for wide pictures"
    if found := _measured(asymmetry, "aspect", "nn.Conv2d", best):
        series, measured = found
        at = [series.named(shape) for shape in series.shapes].index("1024×512")
        relative = measured.relative(series)
        for name in ("nn.Conv2d", best):
            number = (
                f"{name} turned to 1024×512: {relative[name][at]:.2f} times its time an output; "
                f"over all shapes {worst_over_best(relative[name]):.2f} between best and worst"
            )
            if name == best:
                idea, answer = _WIDTH, verdict(relative[name][at])
            else:
                answer = _claim(relative[name][at] <= 1 / NOTICED)
            yield Answer(idea, answer, number, "asymmetry: aspect")
    else:
        yield _not_yet(idea, "aspect")
        yield _not_yet(_WIDTH, "aspect")

    idea = "Take the images of a batch one after the other"
    if found := _measured(asymmetry, "batch", "nn.Conv2d", best):
        series, measured = found
        at = [shape.batch for shape in series.shapes].index(1)
        gains = {n: 1 / measured.relative(series)[n][at] for n in (best, "nn.Conv2d")}
        number = ", ".join(f"{name} {_times(gain)} an image" for name, gain in gains.items())
        yield Answer(idea, verdict(gains[best]), number, "asymmetry: batch")
    else:
        yield _not_yet(idea, "batch")


def answers(
    ladder: Record, variants: Record, counters: Profile, asymmetry: Asymmetry | None = None
) -> list[Answer]:
    """Every idea of the seed and its answer. Raises what `from_the_ladder` raises."""
    return [
        *from_the_ladder(ladder, variants, counters),
        *from_the_series(ladder, asymmetry),
    ]
