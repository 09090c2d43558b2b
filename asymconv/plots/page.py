"""What all figures share: a colour and a marker a method, numbers as text, the page, SVG."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator
from matplotlib.transforms import Affine2D, ScaledTranslation

from asymconv.measure import Timing
from asymconv.record import Record, short_name, significant

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
        raise KeyError(f"{name!r} has no colour: give it one in asymconv.plots.page.COLOURS")
    return COLOURS[key]


def marker(name: str) -> str | tuple[int, int, int]:
    """The marker of a rung or peer. Raises KeyError, saying where to add one."""
    if (key := short_name(name)) not in MARKERS:
        raise KeyError(f"{name!r} has no marker: give it one in asymconv.plots.page.MARKERS")
    return MARKERS[key]


# --- numbers as text -----------------------------------------------------------------------------


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


def write_note(
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


def draw_ticks(axes: Axes, which: str, values: Sequence[float], labels: Sequence[str]) -> None:
    """Ticks of one axis at these values, their labels on fixed baselines."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(list(values)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(NullFormatter())
    axes.tick_params(axis=which, length=3, color=SOFT)
    left, bottom = axes.get_xlim()[0], axes.get_ylim()[0]
    for value, label in zip(values, labels, strict=True):
        if which == "x":
            write_note(axes, value, bottom, label, dy=-14, ha="center", color=SOFT)
        else:
            write_note(axes, left, value, label, dx=-7, dy=-3.2, ha="right", color=SOFT)


def decades(low: float, high: float) -> list[float]:
    """The powers of ten from low to high."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    return [10.0**n for n in range(first, last + 1)]


def time_labels(ticks: Sequence[float]) -> list[str]:
    """Ticks in ms as an axis has them: ``1 ms``, ``1 s``."""
    return [f"{tick / 1e3:g} s" if tick >= 1e3 else f"{tick:g} ms" for tick in ticks]


def power_labels(ticks: Sequence[float]) -> list[str]:
    """Powers of ten as an axis has them: ``1e−7``."""
    return [f"1e{round(math.log10(tick))}".replace("-", "−") for tick in ticks]


def draw_leader(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """A thin line from a point to its label, in data coordinates, behind all else."""
    xs, ys = zip(start, end, strict=True)
    axes.plot(xs, ys, color=SOFT, linewidth=0.6, zorder=1, clip_on=False)


def draw_point(axes: Axes, x: float, y: float, name: str, hollow: bool = False) -> None:
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


def record_print(record: Record, source: str) -> list[str]:
    """Which GPU, convolution, record and revision a figure shows."""
    what = f"{record.gpu} · {record.shape} · medians of {repeats_of(record.timings)} repeats"
    return [what, provenance(record.made, source)]


def repeats_of(timings: Sequence[Timing]) -> str:
    """How often they were repeated: ``3 to 60``."""
    counts = [len(t.milliseconds) for t in timings]
    return f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{counts[0]}"


def provenance(made: Mapping[str, str | int], source: str) -> str:
    """Which record of which revision and versions."""
    return (
        f"record {source} of {made['date']} · git {made['revision']} · torch {made['torch']}, "
        f"CUDA {made['cuda']}, cuDNN {made['cudnn']}"
    )


def readable(name: str) -> str:
    """A method's name for reading: ``k02 block per pixel``; a peer's as it is."""
    return name if short_name(name) == name else name.replace("_", " ")


def spread_apart(
    wanted: Sequence[float], least: float, within: tuple[float, float] = (-math.inf, math.inf)
) -> list[float]:
    """Places as near to the wanted ones as keeps them `least` apart, in the same order.

    Overlapping neighbours join into a block that is centred on the mean of what they wanted. No
    block leaves `within` unless it is longer; then it begins at the lower end.
    """
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i], i))
    blocks: list[list[int]] = []

    def start(block: list[int]) -> float:
        centre = sum(wanted[i] for i in block) / len(block)
        length = least * (len(block) - 1)
        return max(within[0], min(within[1] - length, centre - length / 2))

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


Box = tuple[float, float, float, float]
"""Left, bottom, right and top, in points."""


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def place_labels(
    points: Sequence[tuple[float, float]], names: Sequence[str], taken: Sequence[Box], room: Box
) -> list[tuple[float, float]]:
    """Where to write names beside their points, so that neither texts nor leaders meet a text.

    A name that has the width to itself is centred over its point, or under it. Those of a cluster
    stand like flags, from the last point to the first: each begins at its point, on the first line
    above or below that is free, so that no leader, a vertical line, crosses a flag to its right.

    Args:
        points: x and y of each.
        names: a text of `SMALL_SIZE` each.
        taken: boxes that no text may cover; points are kept free anyway.
        room: that texts stay in.

    Returns:
        For each name the left end of its baseline. Where there is no place left, they overlap.
    """
    line = 1.45 * SMALL_SIZE
    markers = [(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    texts: list[Box] = list(taken)
    leaders: list[Box] = []
    found: dict[int, tuple[float, float]] = {}
    for index in sorted(range(len(points)), key=points.__getitem__, reverse=True):
        (x, y), width = points[index], 0.6 * SMALL_SIZE * len(names[index])
        others = [other for i, other in enumerate(points) if i != index]
        cluster = [other[0] for other in others if abs(other[1] - y) < 4 * line]
        alone = all(abs(other - x) > width / 2 + 6 for other in cluster)
        starts = [x - width / 2] if alone else []
        starts += [x + 2, x - 2 - width]
        candidates = []
        for level, start, up in itertools.product(range(12), starts, (True, False)):
            near = y + 6 + line * level if up else y - 6 - line * level
            text = (start, near, start + width, near + line)
            if not up:
                text = (start, near - line, start + width, near)
            leader = (x - 0.5, min(y, near), x + 0.5, max(y, near)) if level else (x, y, x, y)
            covers = sum(_meet(text, other) for other in (*texts, *markers))
            crosses = sum(_meet(text, other) for other in leaders)
            crosses += sum(_meet(leader, other) for other in texts)
            inside = room[0] <= text[0] and text[2] <= room[2]
            inside = inside and room[1] <= text[1] and text[3] <= room[3]
            backwards = start == starts[-1]
            cost = (covers + (not inside), crosses, backwards, level)
            candidates.append((cost, text, leader))
        _, text, leader = min(candidates, key=lambda candidate: candidate[0])
        texts.append(text)
        leaders.append(leader)
        found[index] = text[0], text[1] + 0.3 * line
    return [found[index] for index in range(len(points))]


def draw_box(axes: Axes, x: float, y: float, width: float, height: float, **style: object) -> None:
    """A rectangle of this lower left corner and size, in data coordinates."""
    axes.add_patch(Rectangle((x, y), width, height, clip_on=False, **style))


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
