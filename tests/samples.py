"""Records of round numbers, in place of measured ones."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable

from asymconv import asymmetry, comparison, record
from asymconv.asymmetry import SLOW, SLOW_FILTERS, Measured, Row, Series
from asymconv.kernels import RUNGS, get_rung
from asymconv.measure import ALL_PEERS, Timing
from asymconv.problem import CONTRACT, ConvShape
from asymconv.record import Record

MADE = {
    "gpu": "a GPU of this test",
    "date": "today",
    "revision": "none",
    "torch": "0",
    "cuda": "0",
    "cudnn": "0",
}


def timing(name: str, kind: str, ms: float, **more: object) -> Timing:
    """Three equal repeats."""
    more = {"error": 1e-7, "flops": CONTRACT.flops, "bytes": CONTRACT.least_bytes} | more
    return Timing(name, kind, "fp32", (ms, ms, ms), **more)


def ceilings() -> list[Timing]:
    """The floor at 1 ms, products of 8192 at 1.5, 3 and 21."""
    found = [timing("memory floor", "ceiling", 1.0), timing("copy", "ceiling", 1.0)]
    return found + [
        timing(f"matmul {p}", "ceiling", ms, flops=2 * 8192**3, bytes=0)
        for p, ms in (("fp16", 1.5), ("tf32", 3.0), ("fp32", 21.0))
    ]


PEER_MS = (4.2, 14.3, 4.1, 1.8, 19.6, 4.7, 4.6, 5.0)
RUNG_MS = (1900.0, 2200.0, 104.0, 28.0, 11.5, 2.6, 1.7, 3.0)


def whole_ladder() -> Record:
    """Every rung and every peer, at times as a GPU might have them."""
    rungs = [timing(r.name, "rung", ms) for r, ms in zip(RUNGS, RUNG_MS, strict=False)]
    peers = [timing(p.name, "peer", ms) for p, ms in zip(ALL_PEERS, PEER_MS, strict=True)]
    return Record("a test", CONTRACT, MADE, (*rungs, *peers, *ceilings()), {})


def runs_on_the_contract() -> list[dict[str, float]]:
    """Of each run in figures/data/ that has nn.Conv2d's default, forward, on the contract's shape:
    medians in ms, rungs of other texts than today's apart."""
    timed: list[Iterable[Timing]] = []
    for path in sorted(record.DATA_FOLDER.glob("*.json")):
        with contextlib.suppress(ValueError, KeyError):  # of another form
            one = record.load(path)
            timed += [one.timings] * (one.shape == CONTRACT)
    rows = [row for measured in asymmetry.load().values() for row in measured.rows]
    timed += [row.timings for row in rows if row.shape == CONTRACT]
    hashes = {"", *(rung.source_hash for rung in RUNGS)}
    runs = [
        {t.name: t.median for t in timings if not t.defines and t.source_hash in hashes}
        for timings in timed
    ]
    for row in comparison.load_layers().rows:
        if row.shape == CONTRACT and row.tf32 and not row.training:
            runs.append({comparison.THEIRS: row.median(comparison.THEIRS)})
    return [run for run in runs if comparison.THEIRS in run]


def claims_of_runs() -> list[str]:
    """What README and notebook 08 say of how runs differ, on the contract's shape."""
    runs, theirs = runs_on_the_contract(), comparison.THEIRS

    def faster(name: str, digits: int) -> str:
        found = [run[theirs] / run[name] for run in runs if name in run]
        return f"{min(found):.{digits}f} to {max(found):.{digits}f} times"

    def span(name: str) -> str:
        ms = [run[name] for run in runs if name in run]
        return f"{min(ms):.2f} to {max(ms):.2f}"

    k07, k08 = (get_rung(number).name for number in ("k07", "k08"))
    return [
        f"nn.Conv2d takes {span(theirs)} ms on the contract's shape, k08 {span(k08)}",
        f"k07 is {faster(k07, 1)} as fast there",
        f"`cudnn.benchmark` {faster('cudnn.benchmark', 2)}",
    ]


def measured_sample(series: Series) -> Measured:
    """A series in which each method has its own slope from the first shape to the last."""
    rows = []
    for place, shape in enumerate(series.shapes):

        def ms(number: int, shape: ConvShape = shape, place: int = place) -> float:
            slope = 1 + 0.3 * math.sin(place + 1.7 * number)
            return RUNG_MS[number % len(RUNG_MS)] * slope * shape.outputs / CONTRACT.outputs

        jobs = series.jobs()
        timings = [
            timing(rung.name, "rung", ms(number), defines=defines)
            for number, (rung, defines) in enumerate(jobs)
            if rung.number not in SLOW
        ]
        timings += [timing(p.name, "peer", ms(n + 20)) for n, p in enumerate(series.peers)]
        rows.append(Row(shape, (*timings, timing("memory floor", "ceiling", ms(6)))))
        few = shape.with_(out_channels=SLOW_FILTERS)
        slow = [
            timing(rung.name, "rung", ms(number, few))
            for number, (rung, _) in enumerate(jobs)
            if rung.number in SLOW
        ]
        if slow:
            rows.append(Row(few, tuple(slow)))
    return Measured(MADE, tuple(rows))
