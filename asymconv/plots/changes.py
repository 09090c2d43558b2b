"""k07 with something changed: what its parts cost, and what was tried."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from asymconv import ablations
from asymconv.plots.page import (
    INK,
    MARGIN,
    SOFT,
    WIDTH,
    axes_at,
    colour,
    draw_ticks,
    milliseconds,
    page,
    record_print,
    style,
    write_note,
)
from asymconv.record import Record, significant


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
        f"Left out one by one, its parts save {100 * _saved(groups, times):.1f} % at most: the "
        "clock decides. Wrong outputs are grey."
    )
    step, left = 19.0, 262.0
    places, y = {}, 0.0
    for of in groups.values():
        for name in of:
            places[name] = y
            y += 1.0
        y += 0.6
    with style():
        body = step * y
        figure, bottom, _top = page(body + 22 + 42, title, subtitle, record_print(record, source))
        axes = axes_at(figure, left, bottom + 42, WIDTH - left - MARGIN - 130, body)
        axes.set_xlim(0, 1.04 * max(max(times.values()), max(warm.values())))
        axes.set_ylim(y - 0.5, -0.8)
        ticks = [0.25 * i for i in range(int(axes.get_xlim()[1] / 0.25) + 1)]
        draw_ticks(axes, "x", ticks, [f"{tick:g}" for tick in ticks])
        axes.yaxis.set_major_locator(NullLocator())
        axes.axvline(floor, color=colour("memory floor"), linewidth=1.6, zorder=2)
        text = f"memory floor {milliseconds(floor)}"
        write_note(axes, floor, -0.8, text, dx=-2, dy=5, ha="right", color=colour("memory floor"))
        axis_text = "milliseconds from rest; hollow: on a warm card"
        write_note(
            axes, axes.get_xlim()[1] / 2, y - 0.5, axis_text, dy=-29, ha="center", color=SOFT
        )
        for group, of in groups.items():
            for name in of:
                row, ms = places[name], times[name]
                ink = SOFT if group == "left out" else colour("k07")
                axes.plot([0, ms], [row, row], color=ink, linewidth=6, alpha=0.8, zorder=1)
                at = {"marker": "o", "markersize": 5, "markerfacecolor": "white"}
                axes.plot([warm[name]], [row], color=INK, linestyle="none", zorder=4, **at)
                label = f"{significant(ms)}, warm {significant(warm[name])}"
                end = max(ms, warm[name])
                write_note(axes, end, row, label, dx=8, dy=-3.2, backed=True, fontweight="bold")
                write_note(axes, 0, row, name, dx=-8, dy=-3.2, ha="right")
    return figure


def _saved(groups: dict[str, list[str]], times: dict[str, float]) -> float:
    """The most that leaving out saves, as a share of k07's time."""
    return 1 - min(times[name] for name in groups["left out"]) / times[ablations.ITSELF]
