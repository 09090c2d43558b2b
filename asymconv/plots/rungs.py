"""The ladder: every rung and peer by time, and on the roofline."""

from __future__ import annotations

import math
from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from asymconv import record as records
from asymconv.measure import Timing
from asymconv.plots.page import (
    FAINT,
    MARGIN,
    SOFT,
    TEXT_SIZE,
    WIDTH,
    axes_at,
    colour,
    decades,
    draw_leader,
    draw_point,
    draw_ticks,
    milliseconds,
    page,
    readable,
    record_print,
    spread_apart,
    style,
    time_labels,
    write_note,
)
from asymconv.record import Record, short_name, significant


def fastest_rung(record: Record) -> Timing:
    """The fastest rung. Raises ValueError if the record has none."""
    if not (rungs := record.of_kind("rung")):
        raise ValueError(f"the record {record.title!r} has no rung to draw")
    return min(rungs, key=lambda t: t.median)


# --- the ladder ----------------------------------------------------------------------------------


def _ladder_finding(record: Record) -> tuple[str, str]:
    """Title and subtitle of the ladder."""
    best, peer, floor = fastest_rung(record), record["nn.Conv2d"], record["memory floor"]
    ratio = best.median / peer.median
    if ratio > 1:
        comparison = f"a factor of {significant(ratio)}"
    else:
        comparison = f"{significant(1 / ratio)} times faster"
    times = f"{milliseconds(best.median)}, nn.Conv2d {milliseconds(peer.median)}"
    title = f"{short_name(best.name)} needs {times}: {comparison}"
    first = record.of_kind("rung")[0]
    subtitle = (
        f"Moving the bytes alone takes {milliseconds(floor.median)}; "
        f"{short_name(best.name)} takes {significant(best.median / floor.median)} times that"
    )
    if first is not best:
        gain = significant(first.median / best.median)
        subtitle += f" and is {gain} times faster than {short_name(first.name)}"
    return title, subtitle + "."


def ladder(record: Record, source: str = records.LADDER.name) -> Figure:
    """Every rung and peer in order, on a logarithmic time axis, against the memory floor.

    Args:
        record: rungs, peers (nn.Conv2d among them) and the ceiling "memory floor".
        source: the record's file name, for the small print.

    Raises:
        KeyError: nn.Conv2d or the floor is not in the record, or a method has no colour.
        ValueError: there is no rung.
    """
    rungs, peers = record.of_kind("rung"), record.of_kind("peer")
    floor = record["memory floor"].median
    title, subtitle = _ladder_finding(record)
    step, gap = 25.0, 0.5  # points a row; rows between rungs and peers
    rows = [(t, float(i)) for i, t in enumerate(rungs)]
    rows += [(t, len(rungs) + gap + i) for i, t in enumerate(peers)]
    last = rows[-1][1]
    with style():
        body = step * (last + 1)
        figure, bottom, _top = page(body + 22 + 42, title, subtitle, record_print(record, source))
        left = 190.0
        axes = axes_at(figure, left, bottom + 42, WIDTH - left - MARGIN - 4, body)
        times = [t.median for t, _ in rows] + [floor]
        low, high = 0.8 * min(times), max(times)
        axes.set_xscale("log")
        axes.set_xlim(low, high * (high / low) ** 0.17)  # room for the slowest one's label
        axes.set_ylim(last + 0.5, -0.5)
        ticks = decades(*axes.get_xlim())
        draw_ticks(axes, "x", ticks, time_labels(ticks))
        axes.yaxis.set_major_locator(NullLocator())
        axes.spines["left"].set_visible(False)
        for tick in ticks:
            axes.axvline(tick, color=FAINT, linewidth=0.7, zorder=0)
        middle = math.sqrt(axes.get_xlim()[0] * axes.get_xlim()[1])
        axis_text = "time of one forward pass, milliseconds, logarithmic; less is better"
        write_note(axes, middle, last + 0.5, axis_text, dy=-29, ha="center", color=SOFT)

        floor_style = {"color": colour("memory floor"), "linewidth": 1.6, "zorder": 2}
        axes.axvline(floor, **floor_style)
        floor_text = f"memory floor {milliseconds(floor)}"
        write_note(axes, floor, -0.5, floor_text, dx=-2, dy=5, color=colour("memory floor"))
        for timing, row in rows:
            x, ink = timing.median, colour(timing.name)
            if timing in peers[:2]:  # its time, led up past the rungs
                axes.plot([x, x], [row, -0.5], color=ink, linewidth=0.9, linestyle=(0, (1, 2.5)))
            axes.plot([floor, x], [row, row], color=ink, linewidth=3, zorder=3, alpha=0.9)
            draw_point(axes, x, row, timing.name)
            weight = "bold" if timing.kind == "rung" else "normal"
            value = milliseconds(x)
            write_note(
                axes, x, row, value, dx=9, dy=-3.5, backed=True, fontsize=10, fontweight=weight
            )
            name_style = {"ha": "right", "fontsize": TEXT_SIZE}
            write_note(
                axes, axes.get_xlim()[0], row, readable(timing.name), dx=-8, dy=-3.5, **name_style
            )
    return figure


# --- the roofline --------------------------------------------------------------------------------

ROOFS = ("matmul fp16", "matmul tf32", "matmul fp32")


def roofline(
    record: Record,
    counters: Mapping[str, float] | None = None,
    source: str = records.LADDER.name,
) -> Figure:
    """Rungs and peers under the roofs that were measured: FLOP/byte against TFLOP/s.

    Args:
        record: with the ceilings "copy" and `ROOFS`.
        counters: DRAM bytes of one call by method, a rung by name or number. A method that is in
            it stands at its measured intensity, any other one, hollow, at the intensity of the
            least bytes.
        source: the record's file name, for the small print.

    Raises:
        KeyError: a ceiling or nn.Conv2d is not in the record, or a method has no colour.
        ValueError: there is no rung.
    """
    shape = record.shape
    bandwidth = record["copy"].gbytes / 1e3  # TB/s: TFLOP/s = TB/s * FLOP/byte
    allowed = bandwidth * shape.intensity
    best, peer = fastest_rung(record), record["nn.Conv2d"]
    roofs = {name: record[name].tflops for name in ROOFS}
    limit = "A copy's rate" if allowed <= max(roofs.values()) else "Arithmetic"
    allowed = min(allowed, max(roofs.values()))
    title = (
        f"{limit} allows {significant(allowed)} TFLOP/s here: {short_name(best.name)} reaches "
        f"{significant(best.tflops)}, nn.Conv2d {significant(peer.tflops)}"
    )
    subtitle = (
        f"{significant(shape.flops / 1e9)} GFLOP on at least {significant(shape.least_bytes / 1e9)}"
        f" GB: {significant(shape.intensity)} FLOP/byte. Roofs as measured in the same run."
    )
    if counters:
        subtitle += " Filled: by counted DRAM bytes; hollow: by the least bytes."
    methods = record.of_kind("rung") + record.of_kind("peer")
    points = []
    for timing in methods:
        counted = (counters or {}).get(timing.name) or (counters or {}).get(short_name(timing.name))
        points.append((timing, shape.flops / (counted or shape.least_bytes), counted is not None))
    with style():
        body = 330.0
        figure, bottom, _top = page(body + 22 + 42, title, subtitle, record_print(record, source))
        left, right = 62.0, 196.0  # names stand on the right
        axes = axes_at(figure, left, bottom + 42, WIDTH - left - right, body)
        rates = [t.tflops for t in methods]
        # room for texts on the left of the roofs' ends and of the points
        low_x = min(2.0, 0.2 * shape.intensity, *(0.7 * x for _, x, _ in points))
        high_x = 4 * max(shape.intensity, max(roofs.values()) / bandwidth)
        low_y = 0.5 * min(rates)
        high_y = 1.6 * max(*roofs.values(), *rates)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(low_x, high_x)
        axes.set_ylim(low_y, high_y)
        for which, ticks in (("x", decades(low_x, high_x)), ("y", decades(low_y, high_y))):
            draw_ticks(axes, which, ticks, [f"{tick:g}" for tick in ticks])
            for tick in ticks:
                line = axes.axvline if which == "x" else axes.axhline
                line(tick, color=FAINT, linewidth=0.7, zorder=0)
        middle = math.sqrt(low_x * high_x)
        axis_text = "arithmetic intensity, FLOP per byte of device memory"
        write_note(axes, middle, low_y, axis_text, dy=-29, ha="center", color=SOFT)
        write_note(axes, low_x, high_y, "TFLOP/s", dx=-7, dy=9, ha="right", color=SOFT)

        _draw_roofs(axes, bandwidth, roofs)
        contract = shape.intensity
        guide_style = {"color": SOFT, "linewidth": 0.9, "linestyle": (0, (4, 3)), "zorder": 1}
        axes.plot([contract, contract], [low_y, allowed], **guide_style)
        left_of = math.log(contract / low_x) > 0.3 * math.log(high_x / low_x)
        at = {"dx": -5, "ha": "right"} if left_of else {"dx": 5}
        write_note(
            axes, contract, low_y, "every byte moved once", dy=6, color=SOFT, backed=True, **at
        )

        per_point = math.log(high_y / low_y) / body
        wanted = [math.log(t.tflops / low_y) / per_point for t, _, _ in points]
        places = spread_apart(wanted, 13.0, (0, body))
        label_x = high_x * (high_x / low_x) ** 0.02
        for (timing, x, counted), place in zip(points, places, strict=True):
            rate, at = timing.tflops, low_y * math.exp(place * per_point)
            draw_point(axes, x, rate, timing.name, hollow=bool(counters) and not counted)
            draw_leader(axes, (x, rate), (label_x, at))
            text = f"{readable(timing.name)}  {significant(rate)}"
            weight = "bold" if timing.kind == "rung" else "normal"
            write_note(axes, label_x, at, text, dx=3, dy=-3, fontweight=weight)
    return figure


def _draw_roofs(axes: Axes, bandwidth: float, roofs: Mapping[str, float]) -> None:
    """The slope of memory (TB/s) up to the highest roof, and each roof (TFLOP/s) from it on."""
    (low_x, high_x), top = axes.get_xlim(), max(roofs.values())
    slope = {"color": colour("copy"), "linewidth": 2, "zorder": 3, "solid_capstyle": "butt"}
    axes.plot([low_x, top / bandwidth], [bandwidth * low_x, top], **slope)
    x = math.sqrt(low_x * min(roofs.values()) / bandwidth)  # below all roofs' names
    text = f"device copy, {significant(bandwidth * 1e3)} GB/s"
    write_note(axes, x, bandwidth * x, text, dx=8, dy=-8, color=colour("copy"))
    for name, rate in roofs.items():
        ridge, text = rate / bandwidth, f"{name}, {significant(rate)}"
        axes.plot([ridge, high_x], [rate, rate], color=colour(name), linewidth=2)
        at = {"dx": -8, "dy": -1, "ha": "right"}
        write_note(axes, ridge, rate, text, color=SOFT, backed=True, **at)
