"""How exact methods are, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from asymconv import accuracy
from asymconv import record as records
from asymconv.accuracy import Accuracy, Errors
from asymconv.measure import Timing
from asymconv.plots.page import (
    FAINT,
    INK,
    MARGIN,
    SOFT,
    TEXT_SIZE,
    WIDTH,
    axes_at,
    colour,
    decades,
    draw_box,
    draw_leader,
    draw_point,
    draw_ticks,
    milliseconds,
    page,
    place_labels,
    power_labels,
    readable,
    record_print,
    spread_apart,
    style,
    time_labels,
    write_note,
)
from asymconv.record import Record, short_name, significant


def _exact(of: Accuracy) -> list[str]:
    """The small print of a record of errors."""
    made = of.made
    where = {e.where for e in of.errors if e.kind != "model"}
    return [
        f"{of.shape} · errors against float64 · models computed on a CPU, "
        f"kernels on {' and '.join(sorted(where))}",
        f"record {accuracy.RECORD.name} of {made['date']} · git {made['revision']} · "
        f"torch {made['torch']}",
    ]


def _models(of: Accuracy) -> list[str]:
    """The small print of what models alone gave."""
    return [
        f"{accuracy.GROWTH_SHAPE}, and other numbers of input channels · errors against float64",
        _exact(of)[-1],
    ]


SPREAD = (
    *("bf16", "TF32, cut off", "TF32", "fp16", "k06", "k07", "fp32", "k05"),
    *("hi + lo, F(2, 3)", "k08"),
)
"""Whose errors figures/errors.svg shows, where the record has them: a GPU may lack rungs."""

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def histograms(of: Accuracy, names: Sequence[str] | None = None) -> Figure:
    """How the errors of methods are spread over powers of two, a row each.

    Args:
        of: a record of errors.
        names: of its methods, from top to bottom; rungs by number or name; those of `SPREAD` that
            it has unless told. The title compares the last with the coarsest rung.

    Raises:
        KeyError: a method is not in the record.
    """
    chosen = [of[name] for name in names or [name for name in SPREAD if name in of]]
    exponents = [int(e) for m in chosen for e in m.counts if e != accuracy.EXACT]
    low, high = max(min(exponents), -32), max(exponents) + 1
    rungs = [m for m in chosen if m.kind == "rung"] or chosen
    coarse, fine = max(rungs, key=lambda m: m.error), chosen[-1]
    title = (
        f"{short_name(fine.name)}'s errors are {significant(coarse.error / fine.error)} times "
        f"smaller than {short_name(coarse.name)}'s"
    )
    subtitle = (
        "Outputs by their error over the outputs' root mean square, from one power of two to the "
        "next; the number is ‖y − ref‖ / ‖ref‖."
    )
    step, left = 40.0, 150.0
    with style():
        body = step * len(chosen)
        figure, bottom, _top = page(body + 12 + 42, title, subtitle, _exact(of))
        axes = axes_at(figure, left, bottom + 42, WIDTH - left - MARGIN - 74, body)
        axes.set_xlim(low, high)
        axes.set_ylim(0, len(chosen))
        ticks = [e for e in range(low, high + 1) if e % 4 == 0]
        draw_ticks(axes, "x", ticks, ["2" + str(e).translate(_SUPERSCRIPTS) for e in ticks])
        axes.yaxis.set_major_locator(NullLocator())
        axes.spines["left"].set_visible(False)
        for tick in ticks:
            axes.axvline(tick, color=FAINT, linewidth=0.7, zorder=0)
        for row, method in enumerate(reversed(chosen)):
            total = sum(method.counts.values())
            most = max(method.counts.values()) / total
            ink = colour(method.name) if method.kind != "model" else "#8FA3B8"
            for exponent, count in method.counts.items():
                if exponent != accuracy.EXACT and int(exponent) >= low:
                    height = 0.82 * count / total / most
                    draw_box(axes, int(exponent), row, 1, height, facecolor=ink, edgecolor="white")
            write_note(
                axes, low, row, readable(method.name), dx=-8, dy=8, ha="right", fontsize=TEXT_SIZE
            )
            write_note(
                axes, low, row, _kind(method), dx=-8, dy=-2, ha="right", color=SOFT, fontsize=8
            )
            write_note(axes, high, row, f"{method.error:.1e}", dx=8, dy=5, fontweight="bold")
        text = "error of an output over the outputs' root mean square"
        write_note(axes, (low + high) / 2, 0, text, dy=-29, ha="center", color=SOFT)
    return figure


def _kind(method: Errors) -> str:
    return "model" if method.kind == "model" else method.where


def _change(ratio: float) -> str:
    """What became of a number: its last value over its first one, in words."""
    if abs(ratio - 1) < 0.1:
        return "stays where it was"
    return f"grows {significant(ratio)} times" if ratio > 1 else f"falls to {ratio:.0%}"


def growth(of: Accuracy) -> Figure:
    """Errors of models by the number of input channels, and k08's, on logarithmic axes."""
    channels = sorted(next(iter(of.growth.values())))
    first, last = channels[0], channels[-1]
    grown = {name: errors[last] / errors[first] for name, errors in of.growth.items()}
    worst_, least = max(grown, key=grown.__getitem__), min(grown, key=grown.__getitem__)
    title = (
        f"From {first} to {last} channels the error of “{worst_}” {_change(grown[worst_])}, "
        f"that of “{least}” {_change(grown[least])}"
    )
    subtitle = "Lines are models of rounding on a CPU; dashed: growth with the root of the terms."
    small_print = _models(of)
    if "k08" in of:
        small_print.insert(1, f"k08: measured on {of['k08'].where}, {of.shape}")
    height, left = 300.0, 74.0
    with style():
        figure, bottom, _top = page(height + 60, title, subtitle, small_print)
        axes = axes_at(figure, left, bottom + 42, WIDTH - left - MARGIN - 150, height)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        values = [e for errors in of.growth.values() for e in errors.values()]
        axes.set_xlim(first / 1.1, last * 1.1)
        axes.set_ylim(min(values) / 1.5, max(values) * 1.5)
        draw_ticks(axes, "x", channels, [str(c) for c in channels])
        ticks = decades(*axes.get_ylim())
        draw_ticks(axes, "y", ticks, power_labels(ticks))
        for tick in ticks:
            axes.axhline(tick, color=FAINT, linewidth=0.7, zorder=0)
        ends = {name: math.log10(errors[last]) for name, errors in of.growth.items()}
        span = math.log10(axes.get_ylim()[1] / axes.get_ylim()[0])
        places = spread_apart(sorted(ends.values()), 13 / height * span)
        order = sorted(ends, key=ends.__getitem__)
        for name, place in zip(order, places, strict=True):
            errors = of.growth[name]
            ink = LINES[list(of.growth).index(name) % len(LINES)]
            axes.plot(channels, [errors[c] for c in channels], color=ink, linewidth=1.8, zorder=3)
            label_x, at = last * 1.3, 10**place
            draw_leader(axes, (last, errors[last]), (label_x, at))
            write_note(axes, label_x, at, name, dx=3, dy=-3, color=ink, fontweight="bold")
        if "fp32" in of.growth:
            start = of.growth["fp32"][first]
            root = [start * math.sqrt(c / first) for c in channels]
            axes.plot(channels, root, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=2)
        if "k08" in of:
            at = of.shape.in_channels, of["k08"].error
            draw_point(axes, *at, "k08")
            write_note(axes, *at, "k08", dx=8, dy=-9, fontweight="bold")
        middle = math.sqrt(first * last)
        note = {"ha": "center", "color": SOFT}
        write_note(axes, middle, axes.get_ylim()[0], "input channels", dy=-29, **note)
        write_note(
            axes, first / 1.1, axes.get_ylim()[1], "‖y − ref‖ / ‖ref‖", dx=-60, dy=6, color=SOFT
        )
    return figure


LINES = (
    *("#661100", "#E06000", "#B8860B", "#1965B0", "#009E73", "#555555", "#CC3377", "#4B0082"),
    "#4499CC",
)
"""For models, which are nowhere else: told apart by their labels."""


PRECISIONS = {"tf32": "TF32"}
"""Classes of rounding as texts write them, where that is not as records do."""


def error_and_time(record: Record, source: str = records.LADDER.name) -> Figure:
    """Every rung and peer by its time and its error, on logarithmic axes.

    Raises:
        KeyError: the record has no memory floor, or a method has no colour.
    """
    methods = [t for t in record.timings if t.error is not None]
    floor = record["memory floor"].median
    fastest: dict[str, Timing] = {}
    for timing in sorted(methods, key=lambda t: t.median):
        fastest.setdefault(timing.precision, timing)
    parts = [
        f"with {PRECISIONS.get(precision, precision)}'s error: {short_name(t.name)}, "
        f"{milliseconds(t.median)}"
        for precision, t in fastest.items()
        if precision in {t.precision for t in record.of_kind("rung")}
    ]
    title = "Fastest " + "; ".join(parts)
    subtitle = "Error against float64 over the time of one forward pass; less of both is better."
    height, left = 300.0, 74.0
    width = WIDTH - left - MARGIN - 60
    with style():
        figure, bottom, _top = page(height + 66, title, subtitle, record_print(record, source))
        axes = axes_at(figure, left, bottom + 42, width, height)
        axes.set_xscale("log")
        axes.set_yscale("log")
        times, errors = [t.median for t in methods], [t.error for t in methods]
        axes.set_xlim(0.8 * floor, 1.6 * max(times))
        axes.set_ylim(min(errors) / 4, max(errors) * 8)
        ticks = decades(*axes.get_xlim())
        draw_ticks(axes, "x", ticks, time_labels(ticks))
        ticks = decades(*axes.get_ylim())
        draw_ticks(axes, "y", ticks, power_labels(ticks))
        for tick in ticks:
            axes.axhline(tick, color=FAINT, linewidth=0.7, zorder=0)
        axes.axvline(floor, color=colour("memory floor"), linewidth=1.6, zorder=2)
        text = f"memory floor {milliseconds(floor)}"
        centre = math.sqrt(min(errors) * max(errors))
        write_note(axes, floor, centre, text, dx=5, color=colour("memory floor"))
        for timing in methods:
            draw_point(axes, timing.median, timing.error, timing.name)
        _label_points(axes, methods, (floor, centre, text), (width, height))
        low, high = axes.get_xlim()
        middle, foot = math.sqrt(low * high), axes.get_ylim()[0]
        text = "time of one forward pass, logarithmic"
        write_note(axes, middle, foot, text, dy=-29, ha="center", color=SOFT)
        write_note(axes, low, axes.get_ylim()[1], "‖y − ref‖ / ‖ref‖", dx=-60, dy=6, color=SOFT)
    return figure


def _label_points(
    axes: Axes,
    methods: Sequence[Timing],
    floor: tuple[float, float, str],
    size: tuple[float, float],
) -> None:
    """Names of methods beside their points.

    Args:
        axes: of time and error, logarithmic.
        methods: whose points are drawn.
        floor: the memory floor's time, and the height and text of the note beside its line.
        size: width and height of the axes, in points.
    """
    lows, highs = zip(axes.get_xlim(), axes.get_ylim(), strict=True)

    def place(*at: float) -> tuple[float, ...]:
        """Points from the lower left corner."""
        return tuple(
            points * math.log(value / low) / math.log(high / low)
            for value, low, high, points in zip(at, lows, highs, size, strict=True)
        )

    x, y = place(*floor[:2])
    taken = [(x - 2, 0, x + 2, size[1]), (x, y - 3, x + 7 + 5.4 * len(floor[2]), y + 10)]
    points = [place(timing.median, timing.error) for timing in methods]
    names = [short_name(timing.name) for timing in methods]
    places = place_labels(points, names, taken, (0, 0, size[0] + 60, size[1]))
    for timing, name, point, label in zip(methods, names, points, places, strict=True):
        dx, dy = label[0] - point[0], label[1] - point[1]
        at = (timing.median, timing.error)
        if abs(dy) > 16:  # not beside its point
            line = {"arrowstyle": "-", "color": SOFT, "linewidth": 0.6}
            axes.annotate("", at, (0, dy), textcoords="offset points", arrowprops=line, zorder=1)
        write_note(axes, *at, name, dx=dx, dy=dy, backed=True)
