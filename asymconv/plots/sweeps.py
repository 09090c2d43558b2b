"""A kernel with other constants, or on other shapes."""

from __future__ import annotations

import math
import re

import matplotlib
from matplotlib.figure import Figure

from asymconv import asymmetry as experiments
from asymconv import record as records
from asymconv import strips
from asymconv.asymmetry import Measured, Series
from asymconv.plots.bars import Bar, bars
from asymconv.plots.page import (
    FAINT,
    INK,
    MARGIN,
    SMALL_SIZE,
    SOFT,
    TEXT_SIZE,
    WIDTH,
    axes_at,
    canvas,
    colour,
    draw_box,
    draw_leader,
    draw_point,
    draw_ticks,
    milliseconds,
    page,
    provenance,
    record_print,
    repeats_of,
    spread_apart,
    style,
    write_note,
)
from asymconv.record import Record, short_name, significant

# --- the shapes of a tile ------------------------------------------------------------------------


def tiles(record: Record, source: str = records.VARIANTS.name) -> Figure:
    """Heat map of the time of k04 over the height and width of its tile.

    Raises:
        ValueError: the record has no variants of k04.
    """
    times = {
        (t.defines["TILE_H"], t.defines["TILE_W"]): t.median
        for t in record.timings
        if short_name(t.name) == "k04"
    }
    if not times:
        raise ValueError(f"no variants of k04 in {record.title!r}")
    heights, widths = (sorted({tile[axis] for tile in times}) for axis in (0, 1))
    best, worst = min(times, key=times.__getitem__), max(times, key=times.__getitem__)
    cell_w, cell_h, left = 74.0, 34.0, 74.0
    with style():
        figure, axes = canvas(
            cell_h * len(heights) + 52,
            f"k04: a tile of {best[0]} × {best[1]} takes {milliseconds(times[best])}, "
            f"one of {worst[0]} × {worst[1]} takes {milliseconds(times[worst])}",
            "Time by the tile's height and width in pixels, a thread each; darker is slower.",
            record_print(record, source),
        )
        shades = matplotlib.colormaps["YlGnBu"]
        for row, height in enumerate(heights):
            y = 36 + row * cell_h
            axes.text(left - 10, y + 12, f"{height}", ha="right", va="baseline", fontsize=TEXT_SIZE)
            for column, width in enumerate(widths):
                x = left + column * cell_w
                time = times.get((height, width))
                if time is None:
                    continue
                share = (time - times[best]) / (times[worst] - times[best] or 1.0)
                draw_box(axes, x, y, cell_w - 2, cell_h - 2, facecolor=shades(0.1 + 0.8 * share))
                ink = "white" if share > 0.55 else INK
                middle = x + cell_w / 2 - 1
                label = milliseconds(time)
                style_ = {"ha": "center", "va": "baseline", "fontsize": TEXT_SIZE, "color": ink}
                axes.text(middle, y + 11, label, **style_)
        for column, width in enumerate(widths):
            middle = left + column * cell_w + cell_w / 2
            axes.text(middle, 22, f"{width}", ha="center", va="baseline", fontsize=TEXT_SIZE)
        centre = left + len(widths) * cell_w / 2
        small = {"va": "baseline", "fontsize": SMALL_SIZE, "color": SOFT}
        axes.text(centre, 6, "tile width, output columns", ha="center", **small)
        axes.text(left - 10, 44 + len(heights) * cell_h, "tile height, rows", ha="center", **small)
    return figure


# --- ways to write -------------------------------------------------------------------------------


def writing(record: Record, source: str = strips.RECORD.name) -> Figure:
    """The time of k07's bytes in k07's strips by the way they are written, without products.

    Args:
        record: of `strips.measure_strips`.
        source: the record's file name, for the small print.

    Raises:
        KeyError: it is another record.
        ValueError: it has no variant that reads and writes.
    """
    fallen, whole = strips.SHAPES
    times = {name: {} for name in strips.SHAPES}
    for timing in record.timings:
        if timing.name in times:
            times[timing.name][strips.describe(timing.defines)] = timing.median
    both = {t: ms for t, ms in times[fallen].items() if "nothing" not in t}
    if not both:
        raise ValueError(f"no variant in {record.title!r} reads and writes")
    best, worst = min(both, key=both.__getitem__), max(both, key=both.__getitem__)
    floor = record[f"memory floor, {fallen}"].median
    title = (
        f"Moving the same bytes takes {milliseconds(both[worst])} or {milliseconds(both[best])}, "
        "by the way they are written"
    )
    subtitle = f"Best: {best}; worst: {worst}. No products, 128 strips at once."
    drawn = [
        Bar(
            text,
            ms,
            significant(ms),
            colour("k07") if text in both else SOFT,
            times[whole].get(text),
        )
        for text, ms in times[fallen].items()
    ]
    axis_text = "milliseconds; hollow: rows of output 4096 bytes apart in place of 4088"
    small_print = record_print(record, source)
    return bars([drawn], floor, (title, subtitle), small_print, axis_text, 0.5, (330.0, 40.0))


# --- series of shapes ----------------------------------------------------------------------------

LINED = ("aspect", "pitch", "batch", "growth", "strips")
"""Series of `asymmetry` whose shapes have an order, drawn as lines."""


def _series_finding(measured: Measured, series: Series) -> str:
    """How much the fastest rung's and nn.Conv2d's time per output changes over a series."""
    relative = measured.relative(series)
    costs = measured.costs(series)
    at = series.shapes.index(series.base)
    rungs = [name for name in relative if name.startswith("k")]
    names = [min(rungs, key=lambda name: costs[name][at])] if rungs else []
    names += [name for name in ("nn.Conv2d",) if name in relative]
    ranges = {name: experiments.worst_over_best(relative[name]) for name in names}
    found = [f"{name} {significant(times)} times" for name, times in ranges.items()]
    return "Time per output, worst shape over best: " + ", ".join(found)


def series(measured: Measured, series: Series, source: str = experiments.RECORD.name) -> Figure:
    """Time per output of every method on every shape, over its own on the series' base.

    Args:
        measured: of that series.
        series: whose shapes are drawn, side by side in their order.
        source: the record's file name, for the small print.

    Raises:
        ValueError: no method was measured on the series' base.
        KeyError: a method has no colour.
    """
    relative = {n: r for n, r in measured.relative(series).items() if n != "memory floor"}
    if not relative:
        raise ValueError(f"the record of {series.name!r} has nothing on {series.base}")
    timings = [timing for row in measured.rows for timing in row.timings]
    small_print = [
        f"{measured.made['gpu']} · {series.base}, other sizes as drawn · medians of "
        f"{repeats_of(timings)} repeats",
        provenance(measured.made, source),
    ]
    if set(relative) & set(experiments.SLOW):
        slow = " and ".join(sorted(set(relative) & set(experiments.SLOW)))
        small_print.insert(1, f"{slow} with {experiments.SLOW_FILTERS} output channels")
    base = f"{series.named(series.base)} {_UNITS.get(series.name, '')}".strip()
    subtitle = f"{series.question} Less is better."
    values = [v for ratios in relative.values() for v in ratios if v is not None]
    with style():
        body = max(240.0, 13.0 * len(relative) + 30)
        title = _series_finding(measured, series)
        left, right = 46.0, 176.0
        names = [series.named(shape) for shape in series.shapes]
        room = (WIDTH - left - right) / len(names)
        two = max(map(len, names)) * 5.8 > room  # lines a name
        foot = 54 if two else 42
        figure, bottom, _top = page(body + 24 + foot, title, subtitle, small_print)
        axes = axes_at(figure, left, bottom + foot, WIDTH - left - right, body)
        low, high = 0.9 * min(values), 1.1 * max(values)
        axes.set_yscale("log")
        axes.set_xlim(-0.35, len(series.shapes) - 0.65)
        axes.set_ylim(low, high)
        ticks = [t for t in _RATIOS if low <= t <= high]
        if len(ticks) > 8:
            ticks = [t for t in ticks if t in (0.7, 1.4) or math.log2(t).is_integer()]
        draw_ticks(axes, "y", ticks, [f"{tick:g}" for tick in ticks])
        for tick in ticks:
            axes.axhline(tick, color=SOFT if tick == 1 else FAINT, linewidth=0.7, zorder=0)
        places = range(len(names))
        halves = [re.match(r"(\S+?(?:×| )|)(.*)", name).groups() for name in names]
        draw_ticks(axes, "x", places, [first for first, _ in halves] if two else names)
        if two:
            for place, (_, second) in enumerate(halves):
                write_note(axes, place, low, second, dy=-26, ha="center", color=SOFT)
        text = f"each method's time per output, over its own on {base}"
        write_note(axes, axes.get_xlim()[0], high, text, dx=MARGIN - left, dy=8, color=SOFT)
        axis_text = _AXES.get(series.name, series.name)
        write_note(
            axes, (len(places) - 1) / 2, low, axis_text, dy=13 - foot, ha="center", color=SOFT
        )
        ends = {}
        for name, ratios in relative.items():
            there = [(x, v) for x, v in enumerate(ratios) if v is not None]
            ends[name] = there[-1]
            ink = colour(name)
            axes.plot(*zip(*there, strict=True), color=ink, linewidth=1.3, zorder=3, alpha=0.8)
            for x, v in there:
                draw_point(axes, x, v, name)
        per_point = math.log(high / low) / body
        wanted = [math.log(v / low) / per_point for _, v in ends.values()]
        label_places = spread_apart(wanted, 12.5, (0, body))
        label_x = axes.get_xlim()[1] + 0.01 * len(places)  # beyond the lines of ticks
        for (name, (x, v)), place in zip(ends.items(), label_places, strict=True):
            at = low * math.exp(place * per_point)
            draw_leader(axes, (x, v), (label_x, at))
            weight = "bold" if name.startswith("k") else "normal"
            text = f"{name}  {significant(v)}"
            write_note(axes, label_x, at, text, dx=3, dy=-3, fontweight=weight, color=INK)
    return figure


_RATIOS = (
    *(0.125, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 2.0, 2.5, 3.0, 4.0),
    *(8.0, 16.0, 32.0, 64.0, 128.0, 256.0),
)
_UNITS = {"batch": "images", "pitch": "columns", "strips": "columns"}
_AXES = {
    "aspect": "height × width of the input",
    "pitch": "floats from one output row to the next, of input columns (+ padding)",
    "batch": "images",
    "growth": "images × height × width of the input",
    "strips": "columns of the output",
}
