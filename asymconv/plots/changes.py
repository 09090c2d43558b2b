"""k07 with something changed: what its parts cost, and what was tried."""

from __future__ import annotations

from matplotlib.figure import Figure

from asymconv import ablations
from asymconv.plots.bars import Bar, bars
from asymconv.plots.page import SOFT, colour, milliseconds, record_print
from asymconv.record import Record, significant

_ALL_BUT_MEMORY = "neither loads nor stores, no clock"


def changes(record: Record, source: str = ablations.RECORD.name) -> Figure:
    """The time of k07 and of each of its ablations, from rest and on a warm card.

    Args:
        record: of `ablations.measure_ablations`.
        source: the record's file name, for the small print.

    Raises:
        KeyError: it is another record, or of other ablations.
    """
    groups: dict[str, list[str]] = {ablations.ITSELF: [ablations.ITSELF]}
    for ablation in ablations.ABLATIONS:
        groups.setdefault(ablation.group, []).append(ablation.name)
    names = [name for of in groups.values() for name in of]
    times = {name: record[name].median for name in names}
    warm = {name: record[name + ablations.WARM].median for name in names}
    itself = times[ablations.ITSELF]
    free = min(times[name] for name in names if name.startswith("no clock"))
    floor = record["memory floor"].median
    title = f"By the clock k07 takes {milliseconds(itself)}, without it {milliseconds(free)}"
    subtitle = (
        f"Without loads, stores and clock it takes {milliseconds(times[_ALL_BUT_MEMORY])}. "
        "Wrong outputs are grey."
    )
    drawn = [
        [
            Bar(
                name,
                times[name],
                f"{significant(times[name])}, warm {significant(warm[name])}",
                SOFT if group == "left out" else colour("k07"),
                warm[name],
            )
            for name in of
        ]
        for group, of in groups.items()
    ]
    axis_text = "milliseconds from rest; hollow: on a warm card"
    small_print = record_print(record, source)
    return bars(drawn, floor, (title, subtitle), small_print, axis_text, 0.25, (262.0, 130.0))
