"""Records of round numbers, in place of measured ones."""

from __future__ import annotations

import math

from asymconv import asymmetry, comparison, record
from asymconv.asymmetry import SLOW, SLOW_FILTERS, Measured, Row, Series
from asymconv.kernels import RUNGS
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


def theirs_on_the_contract() -> list[float]:
    """Medians of nn.Conv2d's default, forward, on the contract's shape: of each record, in ms."""
    name = comparison.THEIRS
    found = [record.load(record.LADDER)[name].median]
    rows = [row for measured in asymmetry.load().values() for row in measured.rows]
    found += [t.median for r in rows if r.shape == CONTRACT for t in r.timings if t.name == name]
    for row in comparison.load_layers().rows:
        if row.shape == CONTRACT and row.tf32 and not row.training:
            found.append(row.median(name))
    return found


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
