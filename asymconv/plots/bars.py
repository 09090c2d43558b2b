"""Bars of milliseconds beside the memory floor, one under the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

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
    style,
    write_note,
)

_STEP, _GAP = 20.0, 0.6  # points from bar to bar; steps more between groups


@dataclass(frozen=True)
class Bar:
    """A time.

    Attributes:
        name: left of the bar.
        ms: its length, milliseconds.
        label: right of it.
        ink: its colour.
        mark: milliseconds of a hollow point on it, or None.
    """

    name: str
    ms: float
    label: str
    ink: str
    mark: float | None = None


def bars(
    groups: Sequence[Sequence[Bar]],
    floor: float,
    heads: tuple[str, str],
    small_print: Sequence[str],
    axis_text: str,
    tick: float,
    sides: tuple[float, float],
) -> Figure:
    """Groups of bars, a gap between them, and a line at the memory floor.

    Args:
        groups: of bars, from the top.
        floor: milliseconds.
        heads: title and subtitle.
        small_print: lines at the foot.
        axis_text: what the lengths are, and the marks.
        tick: milliseconds from one tick to the next.
        sides: points left of the bars, for names, and right of the axis, for labels.
    """
    high = sum(map(len, groups)) + _GAP * (len(groups) - 1)
    ends = [max(bar.ms, bar.mark or 0.0) for group in groups for bar in group]
    left, right = sides
    with style():
        body = _STEP * high
        figure, bottom, _top = page(body + 22 + 42, *heads, small_print)
        axes = axes_at(figure, left, bottom + 42, WIDTH - left - MARGIN - right, body)
        axes.set_xlim(0, 1.02 * max(ends))
        axes.set_ylim(high - 0.5, -0.5)
        ticks = [tick * i for i in range(int(axes.get_xlim()[1] / tick) + 1)]
        draw_ticks(axes, "x", ticks, [f"{ms:g}" for ms in ticks])
        axes.yaxis.set_major_locator(NullLocator())
        ink = colour("memory floor")
        axes.axvline(floor, color=ink, linewidth=1.6, zorder=2)
        text = f"memory floor {milliseconds(floor)}"
        write_note(axes, floor, -0.5, text, dx=-2, dy=5, ha="right", color=ink)
        middle = axes.get_xlim()[1] / 2
        write_note(axes, middle, high - 0.5, axis_text, dy=-29, ha="center", color=SOFT)
        row = 0.0
        for group in groups:
            for bar in group:
                axes.plot([0, bar.ms], [row, row], color=bar.ink, linewidth=6, alpha=0.8, zorder=1)
                if bar.mark is not None:
                    at = {"marker": "o", "markersize": 5, "markerfacecolor": "white"}
                    axes.plot([bar.mark], [row], color=INK, linestyle="none", zorder=4, **at)
                label = {"dx": 8, "dy": -3.2, "backed": True, "fontweight": "bold"}
                write_note(axes, max(bar.ms, bar.mark or 0.0), row, bar.label, **label)
                write_note(axes, 0, row, bar.name, dx=-8, dy=-3.2, ha="right")
                row += 1.0
            row += _GAP
    return figure
