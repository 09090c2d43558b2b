"""Figures, one function each, drawn from recorded data only.

A figure's title states what it shows, in numbers taken from the record; its small print names the
GPU, the record and the git revision. `svg` gives the same bytes on any machine: every text stands
on a fixed baseline and is written as text, nothing is laid out by measuring fonts, coordinates
are rounded, and matplotlib's names for clip paths and markers are replaced. pyplot is not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator
from matplotlib.transforms import Affine2D, ScaledTranslation

from asymconv import accuracy, strips
from asymconv import asymmetry as experiments
from asymconv import record as records
from asymconv.accuracy import Accuracy, Errors
from asymconv.asymmetry import Measured, Series
from asymconv.measure import Timing
from asymconv.record import Record, short_name

# --- one colour and one marker a method ----------------------------------------------------------

COLOURS: Mapping[str, str] = {
    # the seed: reds
    "k01": "#661100",
    "k02": "#E06000",
    # plain CUDA: yellow to blue
    "k03": "#DDAA33",
    "k04": "#99DDFF",
    "k05": "#1965B0",
    # tensor cores
    "k06": "#009E73",
    "k07": "#E377C2",
    "k08": "#4B0082",
    # what a rung is compared with
    "nn.Conv2d": "#000000",
    "nn.Conv2d, strict fp32": "#555555",
    "cudnn.benchmark": "#4D03FE",
    "channels_last": "#4C68F8",
    "channels_last, converting": "#A7D987",
    "autocast fp16": "#512E63",
    "torch.compile": "#DABCBD",
    "torch.compile, max-autotune": "#B04021",
    # what nothing beats
    "memory floor": "#B00020",
    "copy": "#8C564B",
    "L2 read": "#B8A07E",
    "matmul fp16": "#7F7F7F",
    "matmul tf32": "#969696",
    "matmul fp32": "#ADADAD",
}
"""Colour of each method, a rung by its number, in every figure.

Rungs and peers stay apart under red-green blindness (tests/test_plots.py simulates it).
"""

MARKERS: Mapping[str, str | tuple[int, int, int]] = {
    "k01": "v",
    "k02": "^",
    "k03": "s",
    "k04": "D",
    "k05": "o",
    "k06": "P",
    "k07": "*",
    "k08": "X",
    "nn.Conv2d": "p",
    "nn.Conv2d, strict fp32": "h",
    "cudnn.benchmark": "<",
    "channels_last": ">",
    "channels_last, converting": "d",
    "autocast fp16": "8",
    "torch.compile": "H",
    "torch.compile, max-autotune": (4, 1, 0),
}
"""Marker of each rung and peer: tells them apart without colour."""


def colour(name: str) -> str:
    """The colour of a method. Raises KeyError, saying where to add one."""
    if (key := short_name(name)) not in COLOURS:
        raise KeyError(f"{name!r} has no colour: give it one in asymconv.plots.COLOURS")
    return COLOURS[key]


def marker(name: str) -> str | tuple[int, int, int]:
    """The marker of a rung or peer. Raises KeyError, saying where to add one."""
    if (key := short_name(name)) not in MARKERS:
        raise KeyError(f"{name!r} has no marker: give it one in asymconv.plots.MARKERS")
    return MARKERS[key]


# --- numbers as text -----------------------------------------------------------------------------


def significant(value: float) -> str:
    """A positive number with three significant digits, or all digits before the point."""
    if value <= 0:
        return f"{value:g}"
    rounded = float(f"{value:.2e}")  # 9.999 is 10.0, not 10.00
    return f"{value:.{max(0, 2 - math.floor(math.log10(rounded)))}f}"


def milliseconds(value: float) -> str:
    """A time in ms as figures and tables print it: ``2112 ms``, ``4.18 ms``."""
    return f"{significant(value)} ms"


def byte_count(value: int) -> str:
    """A number of bytes with a decimal unit: ``128 B``, ``134 MB``."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if value >= size:
            return f"{significant(value / size)} {unit}"
    return f"{value} B"


# --- the page: fixed places, baselines, small print ----------------------------------------------

WIDTH = 648.0  # points; 9 inches, 900 pixels at 100 dpi
MARGIN = 14.0
INK, SOFT, FAINT = "#1A1A1A", "#5A5A5A", "#DCDCDC"
TITLE_SIZE, TEXT_SIZE, SMALL_SIZE = 13.0, 10.0, 9.0
TITLE_CHARS, TEXT_CHARS, SMALL_CHARS = (
    76,
    106,
    116,
)  # what fits in a line, by the widths of DejaVu Sans

STYLE = {
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": TEXT_SIZE,
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "figure.dpi": 100.0,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "none",
    "svg.hashsalt": "asymconv",
    "path.simplify": False,
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Matplotlib's own defaults and `STYLE`, whatever the user's matplotlibrc says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def page(
    height: float, title: str, subtitle: str, small_print: Sequence[str]
) -> tuple[Figure, float, float]:
    """An empty figure with title and small print.

    Args:
        height: of what the caller draws, in points.
        title: the finding; wrapped if it is long.
        subtitle: one line, wrapped too.
        small_print: lines at the foot.

    Returns:
        The figure, and bottom and top of the caller's part in points from the figure's foot.
    """
    heads = textwrap.wrap(title, TITLE_CHARS)
    subs = textwrap.wrap(subtitle, TEXT_CHARS)
    feet = [line for text in small_print for line in textwrap.wrap(text, SMALL_CHARS)]
    head_height = MARGIN + 17 * len(heads) + 14 * len(subs) + 4
    foot_height = MARGIN + 12 * len(feet)
    total = head_height + height + foot_height
    figure = Figure(figsize=(WIDTH / 72, total / 72), dpi=100)

    def write(y: float, text: str, **style: object) -> None:
        figure.text(MARGIN / WIDTH, y / total, text, va="baseline", ha="left", **style)

    y = total - MARGIN + 4
    for line in heads:
        y -= 17
        write(y, line, fontsize=TITLE_SIZE, fontweight="bold")
    for line in subs:
        y -= 15
        write(y, line, fontsize=TEXT_SIZE, color=SOFT)
    y = foot_height
    for line in feet:
        y -= 12
        write(y, line, fontsize=SMALL_SIZE, color=SOFT)
    return figure, foot_height, total - head_height


def axes_at(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place given in points."""
    total = figure.get_figheight() * 72
    return figure.add_axes((left / WIDTH, bottom / total, width / WIDTH, height / total))


def canvas(
    height: float, title: str, subtitle: str, small_print: Sequence[str]
) -> tuple[Figure, Axes]:
    """A `page` to draw on in points: axes of `WIDTH` by height, (0, 0) at their lower left."""
    figure, bottom, top = page(height, title, subtitle, small_print)
    axes = axes_at(figure, 0, bottom, WIDTH, top - bottom)
    axes.set_axis_off()
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(0, top - bottom)
    return figure, axes


def _note(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    dx: float = 0.0,
    dy: float = 0.0,
    backed: bool = False,
    **style: object,
) -> None:
    """Text at data (x, y), its baseline moved by (dx, dy) points; `backed` hides lines behind."""
    size = float(style.setdefault("fontsize", SMALL_SIZE))  # type: ignore[arg-type]
    ha = style.setdefault("ha", "left")
    if backed:
        wide = 0.66 if style.get("fontweight") == "bold" else 0.58
        width = wide * size * len(text) + 2
        start = {"left": 0.0, "right": -width, "center": -width / 2}[str(ha)]
        at = ScaledTranslation(x, y, axes.transData)
        inches = Affine2D().scale(1 / 72) + axes.figure.dpi_scale_trans
        axes.add_patch(
            Rectangle(
                (dx + start - 1, dy - 0.3 * size),
                width,
                1.2 * size,
                transform=inches + at,
                facecolor="white",
                linewidth=0,
                zorder=2.5,
                clip_on=False,
            )
        )
    axes.annotate(
        text,
        (x, y),
        xytext=(dx, dy),
        textcoords="offset points",
        va="baseline",
        annotation_clip=False,
        zorder=6,
        **style,
    )


def _ticks(axes: Axes, which: str, values: Sequence[float], labels: Sequence[str]) -> None:
    """Ticks of one axis at these values, their labels on fixed baselines."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(list(values)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(NullFormatter())
    axes.tick_params(axis=which, length=3, color=SOFT)
    left, bottom = axes.get_xlim()[0], axes.get_ylim()[0]
    for value, label in zip(values, labels, strict=True):
        if which == "x":
            _note(axes, value, bottom, label, dy=-14, ha="center", color=SOFT)
        else:
            _note(axes, left, value, label, dx=-7, dy=-3.2, ha="right", color=SOFT)


def _decades(low: float, high: float) -> list[float]:
    """The powers of ten from low to high."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    return [10.0**n for n in range(first, last + 1)]


def _point(axes: Axes, x: float, y: float, name: str, hollow: bool = False) -> None:
    """A method's marker in its colour."""
    axes.plot(
        [x],
        [y],
        linestyle="none",
        marker=marker(name),
        markersize=11 if marker(name) == "*" else 8.5,
        markerfacecolor="white" if hollow else colour(name),
        markeredgecolor=colour(name) if hollow else INK,
        markeredgewidth=1.2 if hollow else 0.7,
        zorder=5,
        clip_on=False,
    )


def _small_print(record: Record, source: str) -> list[str]:
    """Which GPU, convolution, record and revision a figure shows."""
    what = f"{record.gpu} · {record.shape} · medians of {_repeats(record.timings)} repeats"
    return [what, _provenance(record.made, source)]


def _repeats(timings: Sequence[Timing]) -> str:
    """How often they were repeated: ``3 to 60``."""
    counts = [len(t.milliseconds) for t in timings]
    return f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{counts[0]}"


def _provenance(made: Mapping[str, str | int], source: str) -> str:
    """Which record of which revision and versions."""
    return (
        f"record {source} of {made['date']} · git {made['revision']} · torch {made['torch']}, "
        f"CUDA {made['cuda']}, cuDNN {made['cudnn']}"
    )


def _label(name: str) -> str:
    """A method's name for reading: ``k02 block per pixel``; a peer's as it is."""
    return name if short_name(name) == name else name.replace("_", " ")


def _best(record: Record) -> Timing:
    """The fastest rung. Raises ValueError if the record has none."""
    if not (rungs := record.of_kind("rung")):
        raise ValueError(f"the record {record.title!r} has no rung to draw")
    return min(rungs, key=lambda t: t.median)


# --- the ladder ----------------------------------------------------------------------------------


def _ladder_finding(record: Record) -> tuple[str, str]:
    """Title and subtitle of the ladder."""
    best, peer, floor = _best(record), record["nn.Conv2d"], record["memory floor"]
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
        figure, bottom, _top = page(body + 22 + 42, title, subtitle, _small_print(record, source))
        left = 190.0
        axes = axes_at(figure, left, bottom + 42, WIDTH - left - MARGIN - 4, body)
        times = [t.median for t, _ in rows] + [floor]
        low, high = 0.8 * min(times), max(times)
        axes.set_xscale("log")
        axes.set_xlim(low, high * (high / low) ** 0.17)  # room for the slowest one's label
        axes.set_ylim(last + 0.5, -0.5)
        ticks = _decades(*axes.get_xlim())
        _ticks(axes, "x", ticks, [f"{t / 1e3:g} s" if t >= 1e3 else f"{t:g} ms" for t in ticks])
        axes.yaxis.set_major_locator(NullLocator())
        axes.spines["left"].set_visible(False)
        for tick in ticks:
            axes.axvline(tick, color=FAINT, linewidth=0.7, zorder=0)
        middle = math.sqrt(axes.get_xlim()[0] * axes.get_xlim()[1])
        axis_text = "time of one forward pass, milliseconds, logarithmic; less is better"
        _note(axes, middle, last + 0.5, axis_text, dy=-29, ha="center", color=SOFT)

        floor_style = {"color": colour("memory floor"), "linewidth": 1.6, "zorder": 2}
        axes.axvline(floor, **floor_style)
        floor_text = f"memory floor {milliseconds(floor)}"
        _note(axes, floor, -0.5, floor_text, dx=-2, dy=5, color=colour("memory floor"))
        for timing, row in rows:
            x, ink = timing.median, colour(timing.name)
            if timing in peers[:2]:  # its time, led up past the rungs
                axes.plot([x, x], [row, -0.5], color=ink, linewidth=0.9, linestyle=(0, (1, 2.5)))
            axes.plot([floor, x], [row, row], color=ink, linewidth=3, zorder=3, alpha=0.9)
            _point(axes, x, row, timing.name)
            weight = "bold" if timing.kind == "rung" else "normal"
            value = milliseconds(x)
            _note(axes, x, row, value, dx=9, dy=-3.5, backed=True, fontsize=10, fontweight=weight)
            name_style = {"ha": "right", "fontsize": TEXT_SIZE}
            _note(axes, axes.get_xlim()[0], row, _label(timing.name), dx=-8, dy=-3.5, **name_style)
    return figure


# --- the roofline --------------------------------------------------------------------------------

ROOFS = ("matmul fp16", "matmul tf32", "matmul fp32")


def _spread(wanted: Sequence[float], least: float) -> list[float]:
    """Places as near to the wanted ones as keeps them `least` apart, in the same order.

    Overlapping neighbours join into a block that is centred on the mean of what they wanted.
    """
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i], i))
    blocks: list[list[int]] = []

    def start(block: list[int]) -> float:
        centre = sum(wanted[i] for i in block) / len(block)
        return centre - least * (len(block) - 1) / 2

    for index in order:
        blocks.append([index])
        while len(blocks) > 1:
            before, block = blocks[-2:]
            if start(before) + least * len(before) <= start(block):
                break
            blocks[-2:] = [before + block]
    places = [0.0] * len(wanted)
    for block in blocks:
        for position, index in enumerate(block):
            places[index] = start(block) + least * position
    return places


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
    best, peer = _best(record), record["nn.Conv2d"]
    roofs = {name: record[name].tflops for name in ROOFS}
    limit = "Memory" if allowed <= max(roofs.values()) else "Arithmetic"
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
        figure, bottom, _top = page(body + 22 + 42, title, subtitle, _small_print(record, source))
        left, width = 62.0, WIDTH - 62.0 - 2 * MARGIN
        axes = axes_at(figure, left, bottom + 42, width, body)
        low_x = 10.0 ** math.floor(math.log10(min(5.0, *(x for _, x, _ in points)) * 0.999))
        low_x = max(low_x, min(5.0, *(0.7 * x for _, x, _ in points)))
        high_x = max(1e4, 40 * max(x for _, x, _ in points))
        rates = [t.tflops for t in methods]
        # texts stand where there is room: beside points far to the left or right, on the other side
        contract = shape.intensity
        place = math.log(contract / low_x) / math.log(high_x / low_x)
        names = 1 if place < 0.6 else -1
        guided = -1 if place > 0.3 else 1
        low_y = 10.0 ** math.floor(math.log10((0.8 if guided < 0 else 0.4) * min(rates)))
        high_y = 2.2 * max(*roofs.values(), *rates)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(low_x, high_x)
        axes.set_ylim(low_y, high_y)
        for which, ticks in (("x", _decades(low_x, high_x)), ("y", _decades(low_y, high_y))):
            _ticks(axes, which, ticks, [f"{tick:g}" for tick in ticks])
            for tick in ticks:
                line = axes.axvline if which == "x" else axes.axhline
                line(tick, color=FAINT, linewidth=0.7, zorder=0)
        middle = math.sqrt(low_x * high_x)
        axis_text = "arithmetic intensity, FLOP per byte of device memory"
        _note(axes, middle, low_y, axis_text, dy=-29, ha="center", color=SOFT)
        _note(axes, low_x, high_y, "TFLOP/s", dx=-7, dy=4, ha="right", color=SOFT)

        _draw_roofs(axes, bandwidth, roofs)
        guide_style = {"color": SOFT, "linewidth": 0.9, "linestyle": (0, (4, 3)), "zorder": 1}
        axes.plot([contract, contract], [low_y, allowed], **guide_style)
        at = {"dx": 5 * guided, "dy": 6, "ha": "left" if guided > 0 else "right"}
        _note(axes, contract, low_y, "every byte moved once", color=SOFT, backed=True, **at)

        per_point = math.log10(high_y / low_y) / body
        wanted = [math.log10(t.tflops) / per_point for t, _, _ in points]
        for (timing, x, counted), place in zip(points, _spread(wanted, 13.0), strict=True):
            rate, at = timing.tflops, 10 ** (place * per_point)
            _point(axes, x, rate, timing.name, hollow=bool(counters) and not counted)
            label_x = contract * 1.55**names
            leader = {"color": SOFT, "linewidth": 0.6, "zorder": 4}
            axes.plot([x, label_x], [rate, at], **leader)
            text = f"{_label(timing.name)}  {significant(rate)}"
            weight = "bold" if timing.kind == "rung" else "normal"
            more = {"ha": "left" if names > 0 else "right", "fontweight": weight}
            _note(axes, label_x, at, text, dx=3 * names, dy=-3, backed=True, **more)
    return figure


def _draw_roofs(axes: Axes, bandwidth: float, roofs: Mapping[str, float]) -> None:
    """The slope of memory (TB/s) up to the highest roof, and each roof (TFLOP/s) from it on."""
    (low_x, high_x), top = axes.get_xlim(), max(roofs.values())
    slope = {"color": colour("copy"), "linewidth": 2, "zorder": 3, "solid_capstyle": "butt"}
    axes.plot([low_x, top / bandwidth], [bandwidth * low_x, top], **slope)
    x = math.sqrt(low_x * top / bandwidth)
    text = f"device copy, {significant(bandwidth * 1e3)} GB/s"
    ink = {"color": colour("copy")}
    if math.log(x / low_x) > 0.2 * math.log(high_x / low_x):  # room on the left of it
        _note(axes, x, bandwidth * x, text, dx=-8, dy=4, ha="right", **ink)
    else:
        _note(axes, x, bandwidth * x, text, dx=8, dy=-8, **ink)
    for name, rate in roofs.items():
        axes.plot([rate / bandwidth, high_x], [rate, rate], color=colour(name), linewidth=2)
        text = f"{name}, {significant(rate)}"
        _note(axes, high_x, rate, text, dy=4, ha="right", color=SOFT, backed=True)


# --- one warp's addresses ------------------------------------------------------------------------

SECTOR, LINE = 32, 128  # bytes: what memory transfers, and the piece of it that a cache tag names
_FEW, _MANY = 4, 8  # lines drawn side by side


class Request(NamedTuple):
    """One instruction of one warp.

    Attributes:
        label: which access it is: ``load x``.
        offsets: byte offset of each lane from the buffer's start, None for a lane that is off.
        bytes_per_lane: 4 for a float, 16 for a float4.
    """

    label: str
    offsets: Sequence[int | None]
    bytes_per_lane: int = 4

    def lanes(self) -> list[tuple[int, int]]:
        """(lane, byte offset) of the lanes that take part."""
        return [(lane, at) for lane, at in enumerate(self.offsets) if at is not None]

    def used_bytes(self) -> int:
        """Different bytes that the lanes ask for."""
        return len({at + byte for _, at in self.lanes() for byte in range(self.bytes_per_lane)})

    def sectors(self) -> list[int]:
        """Numbers of the 32-byte sectors touched, in order."""
        size = self.bytes_per_lane
        touched = set()
        for _, at in self.lanes():
            touched.update(range(at // SECTOR, (at + size - 1) // SECTOR + 1))
        return sorted(touched)


def _ranges(numbers: Sequence[int]) -> str:
    """``0–7, 9`` for 0 to 7 and 9."""
    parts = []
    for _, group in itertools.groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        parts.append(f"{run[0]}" if len(run) == 1 else f"{run[0]}–{run[-1]}")
    return ", ".join(parts)


def _plural(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def sectors(
    requests: Sequence[Request], method: str, source: str, title: str | None = None
) -> Figure:
    """Where the lanes of one warp touch memory: the bytes used of each 32-byte sector fetched.

    Every 128-byte line that a request touches is a box of four sectors, with the distance of its
    start from the first line's above it and the lanes that use it below.

    Args:
        requests: accesses to draw, one below the other; offsets of 32 lanes each.
        method: whose colour to use, and the title's subject.
        source: where the addresses are from, for the small print.
        title: the finding; sectors and bytes of each request unless given.

    Raises:
        ValueError: no request, or one in which no lane takes part.
        KeyError: the method has no colour.
    """
    if not requests:
        raise ValueError("no request to draw")
    for request in requests:
        if not request.lanes():
            raise ValueError(f"no lane takes part in {request.label!r}")
    if title is None:
        first, *others = ((r.label, len(r.sectors())) for r in requests)
        found = [f"{first[0]} touches {_plural(first[1], 'sector')}"]
        found += [f"{label} {count}" for label, count in others]
        title = f"{short_name(method)}, one request of a warp: " + ", ".join(found)
    row_height, head_height = 58.0, 24.0
    counts = [len({s * SECTOR // LINE for s in r.sectors()}) for r in requests]
    across = _FEW if max(counts) <= _FEW else _MANY
    heights = [head_height + row_height * math.ceil(count / across) for count in counts]
    with style():
        height = sum(heights) + 34
        figure, axes = canvas(
            height,
            title,
            "Boxes are the 32-byte sectors of each 128-byte line that the 32 lanes touch.",
            [source],
        )
        y = height - 4
        for request, its_height in zip(requests, heights, strict=True):
            _draw_request(axes, request, y, colour(method), across, head_height, row_height)
            y -= its_height
        _draw_key(axes, colour(method))
    return figure


_FETCHED = "#E9E9E9"


def _box(axes: Axes, x: float, y: float, width: float, height: float, **style: object) -> None:
    axes.add_patch(Rectangle((x, y), width, height, clip_on=False, **style))


def _draw_request(
    axes: Axes,
    request: Request,
    top: float,
    ink: str,
    across: int,
    head_height: float,
    row_height: float,
) -> None:
    """One request's lines, in rows of `across`; `top` and heights in points."""
    fetched = request.sectors()
    used, active = request.used_bytes(), len(request.lanes())
    share = used / (SECTOR * len(fetched))
    _note(axes, MARGIN, top - 12, request.label, fontsize=TEXT_SIZE, fontweight="bold")
    facts = (
        f"{_plural(active, 'lane')} of {len(request.offsets)}, {_plural(len(fetched), 'sector')}: "
        f"{used} of {SECTOR * len(fetched)} bytes used, {100 * share:.3g} %"
    )
    _note(axes, WIDTH - MARGIN, top - 12, facts, ha="right", color=SOFT, fontsize=TEXT_SIZE)
    lines = sorted({sector * SECTOR // LINE for sector in fetched})
    pitch = (WIDTH - 2 * MARGIN + 10) / across
    width, height = pitch - 10, 18.0
    a_byte = width / LINE
    for index, line in enumerate(lines):
        row, column = divmod(index, across)
        x = MARGIN + column * pitch
        y = top - head_height - row * row_height - 14 - height
        start = line * LINE
        distance = (line - lines[0]) * LINE
        where = f"+{byte_count(distance)}" if distance else "first line"
        _note(axes, x, y + height + 4, where, color=SOFT)
        for sector in range(start // SECTOR, (start + LINE) // SECTOR):
            face = _FETCHED if sector in fetched else "white"
            at = x + (sector * SECTOR - start) * a_byte
            _box(
                axes, at, y, SECTOR * a_byte, height, facecolor=face, edgecolor=SOFT, linewidth=0.6
            )
        here = []
        for lane, offset in request.lanes():
            first, last = max(offset, start), min(offset + request.bytes_per_lane, start + LINE)
            if first < last:
                here.append(lane)
                at = x + (first - start) * a_byte
                size = (last - first) * a_byte
                _box(axes, at, y, size, height, facecolor=ink, edgecolor=INK, linewidth=0.35)
        lanes = _ranges(here)
        if len(lanes) > 10:
            lanes = f"{len(here)} lanes"
        else:
            lanes = f"lane {lanes}" if len(here) == 1 else f"lanes {lanes}"
        _note(axes, x, y - 11, lanes, color=INK)


def _draw_key(axes: Axes, ink: str) -> None:
    """What the fillings mean, at the foot."""
    x, y = MARGIN, 12.0
    for face, text in (
        (ink, "bytes used"),
        (_FETCHED, "fetched, not used"),
        ("white", "not fetched"),
    ):
        _box(axes, x, y, 14, 10, facecolor=face, edgecolor=SOFT, linewidth=0.6)
        _note(axes, x + 19, y + 1.5, text, color=SOFT)
        x += 40 + 5.6 * len(text)


# --- the shapes of a tile -------------------------------------------------------------------------


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
            f"of {worst[0]} × {worst[1]} {milliseconds(times[worst])}",
            "Time by the tile's height and width in pixels, a thread each; darker is slower.",
            _small_print(record, source),
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
                _box(axes, x, y, cell_w - 2, cell_h - 2, facecolor=shades(0.1 + 0.8 * share))
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


# --- ways to write --------------------------------------------------------------------------------


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
    step, left = 21.0, 330.0
    with style():
        body = step * len(times[fallen])
        figure, bottom, _top = page(body + 22 + 42, title, subtitle, _small_print(record, source))
        axes = axes_at(figure, left, bottom + 42, WIDTH - left - MARGIN - 40, body)
        axes.set_xlim(0, 1.02 * max(times[fallen].values()))
        axes.set_ylim(len(times[fallen]) - 0.5, -0.5)
        ticks = [0.5 * i for i in range(int(axes.get_xlim()[1] / 0.5) + 1)]
        _ticks(axes, "x", ticks, [f"{tick:g}" for tick in ticks])
        axes.yaxis.set_major_locator(NullLocator())
        axes.axvline(floor, color=colour("memory floor"), linewidth=1.6, zorder=2)
        text = f"memory floor {milliseconds(floor)}"
        _note(axes, floor, -0.5, text, dx=-2, dy=5, ha="right", color=colour("memory floor"))
        centre, foot = axes.get_xlim()[1] / 2, len(times[fallen]) - 0.5
        axis_text = "milliseconds; hollow: rows of output 4096 bytes apart in place of 4088"
        _note(axes, centre, foot, axis_text, dy=-29, ha="center", color=SOFT)
        for row, (text, ms) in enumerate(times[fallen].items()):
            ink = colour("k07") if text in both else SOFT
            axes.plot([0, ms], [row, row], color=ink, linewidth=6, alpha=0.8, zorder=1)
            if text in times[whole]:
                at = {"marker": "o", "markersize": 5, "markerfacecolor": "white"}
                axes.plot([times[whole][text]], [row], color=INK, linestyle="none", zorder=4, **at)
            _note(axes, ms, row, significant(ms), dx=8, dy=-3.2, backed=True, fontweight="bold")
            _note(axes, 0, row, text, dx=-8, dy=-3.2, ha="right")
    return figure


# --- errors --------------------------------------------------------------------------------------


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


SPREAD = ("bf16", "TF32, cut off", "TF32", "fp16", "k06", "k07", "fp32", "k05", "k08")
"""Whose errors figures/errors.svg shows."""

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def histograms(of: Accuracy, names: Sequence[str] = SPREAD) -> Figure:
    """How the errors of methods are spread over powers of two, a row each.

    Args:
        of: a record of errors.
        names: of its methods, from top to bottom; rungs by number or name. The title compares the
            last with the coarsest rung.

    Raises:
        KeyError: a method is not in the record.
    """
    chosen = [of[name] for name in names]
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
        _ticks(axes, "x", ticks, ["2" + str(e).translate(_SUPERSCRIPTS) for e in ticks])
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
                    _box(axes, int(exponent), row, 1, height, facecolor=ink, edgecolor="white")
            _note(axes, low, row, _label(method.name), dx=-8, dy=8, ha="right", fontsize=TEXT_SIZE)
            _note(axes, low, row, _kind(method), dx=-8, dy=-2, ha="right", color=SOFT, fontsize=8)
            _note(axes, high, row, f"{method.error:.1e}", dx=8, dy=5, fontweight="bold")
        text = "error of an output over the outputs' root mean square"
        _note(axes, (low + high) / 2, 0, text, dy=-29, ha="center", color=SOFT)
    return figure


def _kind(method: Errors) -> str:
    return "model" if method.kind == "model" else method.where


def growth(of: Accuracy) -> Figure:
    """Errors of models by the number of input channels, on logarithmic axes."""
    channels = sorted(next(iter(of.growth.values())))
    first, last = channels[0], channels[-1]
    grown = {name: errors[last] / errors[first] for name, errors in of.growth.items()}
    worst_, least = max(grown, key=grown.__getitem__), min(grown, key=grown.__getitem__)
    title = (
        f"From {first} to {last} channels the error of {worst_} grows "
        f"{significant(grown[worst_])} times, of {least} {significant(grown[least])} times"
    )
    subtitle = "Models of 3×3 convolutions; dashed: growth with the root of the number of terms."
    height, left = 300.0, 74.0
    with style():
        figure, bottom, _top = page(height + 60, title, subtitle, _exact(of)[1:])
        axes = axes_at(figure, left, bottom + 42, WIDTH - left - MARGIN - 150, height)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        values = [e for errors in of.growth.values() for e in errors.values()]
        axes.set_xlim(first / 1.1, last * 1.1)
        axes.set_ylim(min(values) / 1.5, max(values) * 1.5)
        _ticks(axes, "x", channels, [str(c) for c in channels])
        ticks = _decades(*axes.get_ylim())
        labels = [f"1e{round(math.log10(tick))}".replace("-", "−") for tick in ticks]
        _ticks(axes, "y", ticks, labels)
        for tick in ticks:
            axes.axhline(tick, color=FAINT, linewidth=0.7, zorder=0)
        ends = {name: math.log10(errors[last]) for name, errors in of.growth.items()}
        span = math.log10(axes.get_ylim()[1] / axes.get_ylim()[0])
        places = _spread(sorted(ends.values()), 13 / height * span)
        order = sorted(ends, key=ends.__getitem__)
        for name, place in zip(order, places, strict=True):
            errors = of.growth[name]
            ink = LINES[list(of.growth).index(name) % len(LINES)]
            axes.plot(channels, [errors[c] for c in channels], color=ink, linewidth=1.8, zorder=3)
            _note(axes, last * 1.1, 10**place, name, dx=6, dy=-3, color=ink, fontweight="bold")
        if "fp32" in of.growth:
            start = of.growth["fp32"][first]
            root = [start * math.sqrt(c / first) for c in channels]
            axes.plot(channels, root, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=2)
        middle = math.sqrt(first * last)
        note = {"ha": "center", "color": SOFT}
        _note(axes, middle, axes.get_ylim()[0], "input channels", dy=-29, **note)
        _note(axes, first / 1.1, axes.get_ylim()[1], "‖y − ref‖ / ‖ref‖", dx=-60, dy=6, color=SOFT)
    return figure


LINES = ("#661100", "#E06000", "#B8860B", "#1965B0", "#009E73", "#555555", "#CC3377", "#4B0082")
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
    ]
    title = "Fastest " + "; ".join(parts)
    subtitle = "Error against float64 over the time of one forward pass; less of both is better."
    height, left = 300.0, 74.0
    with style():
        figure, bottom, _top = page(height + 66, title, subtitle, _small_print(record, source))
        axes = axes_at(figure, left, bottom + 42, WIDTH - left - MARGIN - 60, height)
        axes.set_xscale("log")
        axes.set_yscale("log")
        times, errors = [t.median for t in methods], [t.error for t in methods]
        axes.set_xlim(0.8 * floor, 1.6 * max(times))
        axes.set_ylim(min(errors) / 2.5, max(errors) * 2.5)
        ticks = _decades(*axes.get_xlim())
        _ticks(axes, "x", ticks, [f"{t / 1e3:g} s" if t >= 1e3 else f"{t:g} ms" for t in ticks])
        ticks = _decades(*axes.get_ylim())
        labels = [f"1e{round(math.log10(tick))}".replace("-", "−") for tick in ticks]
        _ticks(axes, "y", ticks, labels)
        for tick in ticks:
            axes.axhline(tick, color=FAINT, linewidth=0.7, zorder=0)
        axes.axvline(floor, color=colour("memory floor"), linewidth=1.6, zorder=2)
        text = f"memory floor {milliseconds(floor)}"
        centre = math.sqrt(min(errors) * max(errors))
        _note(axes, floor, centre, text, dx=5, color=colour("memory floor"))
        for timing in methods:
            _point(axes, timing.median, timing.error, timing.name)
        _label_points(axes, methods, height)
        low, high = axes.get_xlim()
        middle, foot = math.sqrt(low * high), axes.get_ylim()[0]
        text = "time, milliseconds, logarithmic"
        _note(axes, middle, foot, text, dy=-29, ha="center", color=SOFT)
        _note(axes, low, axes.get_ylim()[1], "‖y − ref‖ / ‖ref‖", dx=-60, dy=6, color=SOFT)
    return figure


def _label_points(axes: Axes, methods: Sequence[Timing], height: float) -> None:
    """Names of methods above or below their points, turns taken so that neighbours stay apart."""
    middle = math.sqrt(axes.get_ylim()[0] * axes.get_ylim()[1])
    for upper in (True, False):
        row = sorted((t for t in methods if (t.error > middle) == upper), key=lambda t: t.median)
        for place, timing in enumerate(row):
            up = place % 2 == 0
            dy = (12 + 13 * (place % 4 // 2)) * (1 if up else -1) - (0 if up else 6)
            name = short_name(timing.name)
            _note(axes, timing.median, timing.error, name, dy=dy, ha="center", backed=True)


# --- series of shapes -----------------------------------------------------------------------------

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
    found = [f"{name} by {significant(experiments.spread(relative[name]))}" for name in names]
    return "Between best and worst shape the time per output changes: " + ", ".join(found)


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
    base = series.named(series.base)
    small_print = [
        f"{measured.made['gpu']} · {series.base}, other sizes as drawn · medians of "
        f"{_repeats(timings)} repeats",
        _provenance(measured.made, source),
    ]
    if set(relative) & set(experiments.SLOW):
        slow = " and ".join(sorted(set(relative) & set(experiments.SLOW)))
        small_print.insert(1, f"{slow} with {experiments.SLOW_FILTERS} output channels")
    subtitle = f"{series.question} Each method's time per output over its own on {base}."
    values = [v for ratios in relative.values() for v in ratios if v is not None]
    with style():
        body = max(240.0, 13.0 * len(relative) + 30)
        title = _series_finding(measured, series)
        left, right = 46.0, 176.0
        names = [series.named(shape) for shape in series.shapes]
        room = (WIDTH - left - right) / len(names)
        two = max(map(len, names)) * 5.8 > room  # lines a name
        foot = 54 if two else 42
        figure, bottom, _top = page(body + 12 + foot, title, subtitle, small_print)
        axes = axes_at(figure, left, bottom + foot, WIDTH - left - right, body)
        low, high = 0.9 * min(values), 1.1 * max(values)
        axes.set_yscale("log")
        axes.set_xlim(-0.35, len(series.shapes) - 0.65)
        axes.set_ylim(low, high)
        ticks = [t for t in _RATIOS if low <= t <= high]
        if len(ticks) > 8:
            ticks = [t for t in ticks if t in (0.7, 1.4) or math.log2(t).is_integer()]
        _ticks(axes, "y", ticks, [f"{tick:g}" for tick in ticks])
        for tick in ticks:
            axes.axhline(tick, color=SOFT if tick == 1 else FAINT, linewidth=0.7, zorder=0)
        places = range(len(names))
        halves = [re.match(r"(\S+?(?:×| )|)(.*)", name).groups() for name in names]
        _ticks(axes, "x", places, [first for first, _ in halves] if two else names)
        if two:
            for place, (_, second) in enumerate(halves):
                _note(axes, place, low, second, dy=-26, ha="center", color=SOFT)
        axis_text = _AXES.get(series.name, series.name)
        _note(axes, (len(places) - 1) / 2, low, axis_text, dy=13 - foot, ha="center", color=SOFT)
        last = len(places) - 1
        ends = {}
        for name, ratios in relative.items():
            there = [(x, v) for x, v in enumerate(ratios) if v is not None]
            ends[name] = there[-1]
            ink = colour(name)
            axes.plot(*zip(*there, strict=True), color=ink, linewidth=1.3, zorder=3, alpha=0.8)
            for x, v in there:
                _point(axes, x, v, name)
        per_point = math.log(high / low) / body
        wanted = [math.log(v) / per_point for _, v in ends.values()]
        for (name, (_, v)), place in zip(ends.items(), _spread(wanted, 12.5), strict=True):
            at = math.exp(place * per_point)
            label_x = last + 0.06 * len(places)
            axes.plot([last, label_x], [v, at], color=SOFT, linewidth=0.6, zorder=1, clip_on=False)
            weight = "bold" if name.startswith("k") else "normal"
            text = f"{name}  {significant(v)}"
            _note(axes, label_x, at, text, dx=3, dy=-3, fontweight=weight, color=INK)
    return figure


_RATIOS = (
    *(0.125, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 2.0, 2.5, 3.0, 4.0),
    *(8.0, 16.0, 32.0, 64.0, 128.0, 256.0),
)
_AXES = {
    "aspect": "height × width of the input",
    "pitch": "floats from one output row to the next, of input columns (+ padding)",
    "batch": "images",
    "growth": "images × height × width of the input",
    "strips": "columns of the output",
}


# --- files ---------------------------------------------------------------------------------------

_NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
_DRAWN = re.compile(
    r'(?<= )(?:d|x|y|x1|x2|y1|y2|width|height|transform|viewBox|points|style)="[^"]*"'
)
_NAMED = re.compile(r'\bid="([a-z])([0-9a-f]{10})"')


def _rounded(match: re.Match[str]) -> str:
    value = f"{float(match[0]):.2f}".rstrip("0").rstrip(".")
    return "0" if value == "-0" else value


def svg(figure: Figure) -> str:
    """A figure as SVG text: the same for the same figure on any machine with this matplotlib."""
    buffer = io.StringIO()
    metadata = {"Date": None, "Creator": "asymconv", "Format": None, "Type": None}
    with style():
        figure.savefig(buffer, format="svg", metadata=metadata)
    text = _DRAWN.sub(lambda attribute: _NUMBER.sub(_rounded, attribute[0]), buffer.getvalue())
    # matplotlib names clip paths and markers after floats with all their digits
    names = dict.fromkeys(_NAMED.findall(text))
    for number, (kind, digits) in enumerate(names):
        text = text.replace(f"{kind}{digits}", f"{kind}-{number}-asymconv")
    mark = hashlib.sha256(text.encode()).hexdigest()[:8]  # so that pages can hold several figures
    text = re.sub(r"\b([a-z]-\d+)-asymconv\b", rf"\1-{mark}", text)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


FIGURES: dict[str, Callable[[], Figure]] = {
    "ladder": lambda: ladder(records.load()),
    "roofline": lambda: roofline(records.load()),
    "tiles": lambda: tiles(records.load(records.VARIANTS)),
    "errors": lambda: histograms(accuracy.load()),
    "growth": lambda: growth(accuracy.load()),
    "error_and_time": lambda: error_and_time(records.load()),
}
"""Every figure of figures/, by the stem of its file, from the records it shows."""


def figures_of_series() -> dict[str, Callable[[], Figure]]:
    """Those of `asymconv.asymmetry`, likewise, of the series that were measured so far."""
    if not experiments.RECORD.exists():
        return {}
    record = experiments.load()

    def drawing(name: str) -> Callable[[], Figure]:
        return lambda: series(record[name], experiments.get_series(name))

    return {f"asymmetry_{name}": drawing(name) for name in LINED if name in record}


def draw_all(folder: Path) -> list[Path]:
    """Write every figure as SVG into a folder, each file whole or not at all.

    Those of `FIGURES`, whose records are in the repository, and those of `figures_of_series`.

    Returns:
        The paths written.

    Raises:
        FileNotFoundError: a record is not there.
    """
    paths = []
    for stem, draw in (FIGURES | figures_of_series()).items():
        path = folder / f"{stem}.svg"
        records.write_atomically(path, svg(draw()))
        paths.append(path)
    return paths
