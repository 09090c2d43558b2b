"""Pictures that explain, drawn from shapes alone; figures of measurements are in `plots`."""

from __future__ import annotations

from fractions import Fraction

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Rectangle

from asymconv.plots.page import INK, SMALL_SIZE, SOFT, TEXT_SIZE, canvas, style
from asymconv.problem import ConvShape

INPUT, OUTPUT, WINDOW = "#BFD7EA", "#F6D8AE", "#D1495B"


def _stack(axes: Axes, x: float, y: float, width: float, height: float, face: str) -> None:
    """Three sheets one behind the other: channels. (x, y) is the front sheet's lower left."""
    for depth in (2, 1, 0):
        at = (x + 7 * depth, y + 7 * depth)
        axes.add_patch(Rectangle(at, width, height, facecolor=face, edgecolor=SOFT, linewidth=0.8))


def layer(shape: ConvShape) -> Figure:
    """One convolution to scale: a window through all input channels makes one output.

    Height and width of the planes are to scale with each other; the window is drawn larger.
    """
    n, c, h, w = shape.input_shape
    _, k, oh, ow = shape.output_shape
    r, s = shape.kernel
    scale = 215 / max(w, ow)
    with style():
        figure, axes = canvas(
            200,
            f"Each of {shape.outputs:,} outputs is a sum of {shape.terms} products",
            f"One of {n} pictures, its planes to scale: {w / h:.3g} times as wide as high.",
            [f"{shape}; the {r}×{s} window is drawn larger than it is"],
        )

        x_in, x_out, base = 62.0, 385.0, 44.0
        _stack(axes, x_in, base, scale * w, scale * h, INPUT)
        _stack(axes, x_out, base, scale * ow, scale * oh, OUTPUT)

        window = 24.0
        corner = (x_in + 0.45 * scale * w, base + 0.4 * scale * h)
        for depth in (2, 1, 0):
            at = (corner[0] + 7 * depth, corner[1] + 7 * depth)
            axes.add_patch(
                Rectangle(at, window, window, facecolor="none", edgecolor=WINDOW, linewidth=1.4)
            )
        pixel = (x_out + 0.45 * scale * ow, base + 0.45 * scale * oh)
        axes.add_patch(Rectangle(pixel, 7, 7, facecolor=WINDOW, edgecolor=INK, linewidth=0.7))
        axes.add_patch(
            ConnectionPatch(
                (corner[0] + window + 14, corner[1] + window / 2 + 7),
                (pixel[0] - 2, pixel[1] + 3.5),
                "data",
                arrowstyle="->",
                color=WINDOW,
                linewidth=1.4,
            )
        )

        def write(x: float, y: float, text: str, size: float = TEXT_SIZE, **more: object) -> None:
            axes.text(x, y, text, fontsize=size, va="baseline", **more)

        for x, rows, columns, channels, what, side in (
            (x_in, h, w, c, "input", -1),
            (x_out, oh, ow, k, "output", 1),
        ):
            middle = x + scale * columns / 2
            write(middle, base - 16, f"{columns} columns", ha="center")
            write(middle, base - 32, f"{what}: {channels} channels", ha="center", color=SOFT)
            at, align = (x - 6, "right") if side < 0 else (x + scale * columns + 20, "left")
            write(at, base + scale * rows / 2, f"{rows}\nrows", ha=align, size=SMALL_SIZE)
        write(
            (x_in + scale * w + x_out) / 2,
            base + scale * h + 26,
            f"{c // shape.groups} · {r} · {s} = {shape.terms} weights an output channel",
            size=SMALL_SIZE,
            color=WINDOW,
            ha="center",
        )
    return figure


def _box(axes: Axes, x: float, y: float, width: float, height: float, face: str) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=face, edgecolor=SOFT, linewidth=0.8))


def _write(axes: Axes, x: float, y: float, text: str, **more: object) -> None:
    more.setdefault("fontsize", SMALL_SIZE)
    axes.text(x, y, text, va="baseline", **more)


def ring(slots: int = 4, taps: int = 3, steps: int = 4) -> Figure:
    """The ring of input rows in shared memory, at some output rows in succession.

    Args:
        slots: rows of the ring, more than taps.
        taps: rows of the kernel.
        steps: output rows shown.

    Raises:
        ValueError: the ring has no place for a row beside those that are read.
    """
    if slots <= taps:
        raise ValueError(f"a ring of {slots} rows cannot be filled while {taps} are read")
    with style():
        figure, axes = canvas(
            46 + 30 * slots,
            f"A ring of {slots} rows: {taps} are multiplied, one is filled, none is fetched twice",
            f"Shared memory while a strip's output rows 0 to {steps - 1} are made. "
            "A row stays until its last product.",
            ["kernel row: wgmma reads it for all taps of that row; filled: by warps that convert"],
        )
        left, wide, gap, high = 62.0, 118.0, 24.0, 26.0
        top = 16 + 30 * slots
        for slot in range(slots):
            _write(axes, 14, top - 30 * (slot + 1) + 12, f"place {slot}", color=SOFT)
        for step in range(steps):
            x = left + step * (wide + gap)
            _write(axes, x + wide / 2, top + 12, f"output row {step}", ha="center", fontsize=10)
            for slot in range(slots):
                y = top - 30 * (slot + 1) + 2
                # the row of input that stands here, or comes here, while `step` is made
                row = step + (slot - step) % slots
                filled = row - step >= taps
                _box(axes, x, y, wide, high, OUTPUT if filled else INPUT)
                what = "filled" if filled else f"kernel row {row - step}"
                _write(axes, x + 6, y + 9, f"row {row}", fontweight="bold")
                _write(axes, x + wide - 5, y + 9, what, ha="right", color=SOFT)
    return figure


def cluster(side: int = 32, tail: int = 8) -> Figure:
    """How two blocks of a cluster share the conversion of a row: a side each, and copies.

    Args:
        side: pixels of a side of the strip.
        tail: pixels right of both sides, which come with the left one.
    """
    unit = 3.0
    with style():
        figure, axes = canvas(
            196,
            "Each block converts a side of the row; the copy engine brings the other one",
            f"A row of a strip's input, {2 * side + tail} pixels of 64 channels, on its way to "
            "the products of 128 filters.",
            [
                "global: fp32; slots: transformed rows as halves, in shared memory",
                "what is right of both sides goes with the left one",
            ],
        )
        left, high = 62.0, 24.0
        blocks = [(left, INPUT, "block 0: filters 0 to 63"), (368.0, OUTPUT, "block 1: 64 to 127")]
        widths = {"left": side * unit, "right": side * unit, "tail": tail * unit}
        row, slot = 142.0, 30.0
        for index, (x, _, name) in enumerate(blocks):
            _write(axes, x, row + high + 10, name, fontsize=10)
            at = x
            for part, width in widths.items():
                owner = int(part == "right")
                mine = owner == index
                face = blocks[owner][1]
                _box(axes, at, slot, width, high, face)
                what = {"left": "left", "right": "right", "tail": ""}[part]
                _write(axes, at + width / 2, slot + 8, what, ha="center")
                if mine:
                    _box(axes, at, row, width, high, face)
                    _write(axes, at + width / 2, row + 8, what, ha="center")
                    down = {"arrowstyle": "->", "color": SOFT, "linewidth": 1.2}
                    points = (at + width / 2, row - 2), (at + width / 2, slot + high + 2)
                    axes.add_patch(ConnectionPatch(*points, "data", **down))
                at += width
            middle = x + widths["left"] + (-20 if index else side * unit / 2)
            _write(axes, middle, 104, "fetched and converted", color=SOFT, ha="center")
        _write(axes, 14, row + 8, "global", color=SOFT)
        _write(axes, 14, slot + 8, "slots", color=SOFT)
        copied = {"arrowstyle": "->", "color": WINDOW, "linewidth": 1.4}
        ends = (
            ((left + widths["left"], slot + high + 1), (blocks[1][0] + 20, slot + high + 1), -0.22),
            ((blocks[1][0] + widths["left"] + 20, slot - 1),
             (left + widths["left"] + 60, slot - 1), -0.12),
        )  # fmt: skip
        for begin, end, bend in ends:
            curve = f"arc3,rad={bend}"
            axes.add_patch(ConnectionPatch(begin, end, "data", connectionstyle=curve, **copied))
        _write(axes, 318, slot + high + 31, "copied", color=WINDOW, ha="center")
    return figure


def shifted_window(pixels: int = 12, columns: int = 8, taps: int = 3) -> Figure:
    """One row of the ring, and the windows that the taps of a kernel row multiply.

    Args:
        pixels: shown, each a row of 128 bytes in 8 chunks.
        columns: of the product, shown.
        taps: of a kernel row.
    """
    with style():
        figure, axes = canvas(
            34 + 15 * pixels,
            "A tap one column further right is the same data, started one pixel later",
            "Each pixel is 64 channels of fp16, 128 bytes in 8 chunks; "
            "chunk i is at place i ^ (pixel mod 8).",
            ["The swizzle goes by the bits of the address: wgmma's descriptor may start anywhere"],
        )
        left, cell, high = 84.0, 30.0, 15.0
        top = 10 + 15 * pixels
        shades = ["#08306B", "#2166AC", "#4393C3", "#92C5DE"]
        shades += ["#D1E5F0", "#FDDBC7", "#F4A582", "#D6604D"]
        for pixel in range(pixels):
            y = top - high * (pixel + 1)
            _write(axes, left - 8, y + 4, f"pixel {pixel}", ha="right", color=SOFT)
            for place in range(8):
                chunk = place ^ pixel % 8
                _box(axes, left + cell * place, y, cell, high, shades[chunk])
                ink = "white" if chunk < 3 or chunk == 7 else INK
                at = left + cell * (place + 0.5)
                _write(axes, at, y + 4, str(chunk), ha="center", color=ink)
        _write(axes, left, top + 6, "which 8 channels stand where", color=SOFT)
        for tap in range(taps):
            x = left + 8 * cell + 26 + 92 * tap
            upper, lower = top - high * tap, top - high * (tap + columns)
            bracket = [(x + 8, upper - 1), (x, upper - 1), (x, lower + 1), (x + 8, lower + 1)]
            axes.plot(*zip(*bracket, strict=True), color=WINDOW, linewidth=1.6)
            middle = (upper + lower) / 2
            _write(axes, x + 8, middle + 3, f"tap {tap}:", color=WINDOW, fontweight="bold")
            _write(axes, x + 8, middle - 9, f"from pixel {tap}", color=WINDOW)
    return figure


def row_starts(shape: ConvShape, rows: int = 5, sectors: int = 5, sector: int = 8) -> Figure:
    """Where the output rows of one filter begin within sectors of 32 bytes.

    Args:
        shape: the convolution; the first filter of the first image is shown.
        rows: output rows.
        sectors: shown of each row.
        sector: floats of a sector.
    """
    with style():
        pitch = 4 * shape.out_width
        split = Fraction(sum(row * shape.out_width % sector != 0 for row in range(sector)), sector)
        how_many = f"{split.numerator} in {split.denominator} rows" if split else "No rows"
        figure, axes = canvas(
            30 + 26 * rows,
            f"{how_many} of {pitch} bytes begin in the middle of a sector",
            f"The first {sectors} sectors of a row. Hatched: the row before. "
            "A strip starts at the first whole sector.",
            [f"{shape}: {shape.out_width} columns out; a sector is {4 * sector} bytes"],
        )
        left, cell = 78.0, 12.4
        for row in range(rows):
            y = 10 + 26 * (rows - 1 - row)
            start = row * shape.out_width % sector
            skip = -start % sector
            _write(axes, left - 8, y + 6, f"row {row}", ha="right", color=SOFT)
            for column in range(sectors * sector):
                before = column < start
                face = "white" if before else INPUT if column < start + skip else OUTPUT
                x = left + cell * column
                axes.add_patch(
                    Rectangle(
                        (x, y),
                        cell,
                        18,
                        facecolor=face,
                        edgecolor=SOFT,
                        linewidth=0.4,
                        hatch="////" if before else None,
                    )
                )
                if not before:
                    text = str(column - start)
                    _write(axes, x + cell / 2, y + 6, text, ha="center", fontsize=7)
            for edge in range(sectors + 1):
                x = left + cell * sector * edge
                axes.plot([x, x], [y - 2, y + 20], color=INK, linewidth=1.4)
        _write(axes, left, 26 * rows + 12, "column of the output row", color=SOFT)
        x = left + cell * sector
        _write(axes, x + 150, 26 * rows + 12, "left to the row above", color="#3A6EA5")
        _write(axes, x + 290, 26 * rows + 12, "this strip's, whole sectors", color="#9A6A10")
    return figure


FIELDS = {"sign": "#F6D8AE", "exponent": INPUT, "behind the point": "#CFE3C2", "not there": "white"}

FORMATS: tuple[tuple[str, tuple[int, int, int], str], ...] = (
    ("fp32", (1, 8, 23), "24 significant bits"),
    ("TF32", (1, 8, 10), "11, in 32 bits of memory"),
    ("fp16", (1, 5, 10), "11, from 2⁻¹⁴ to 65504"),
    ("bf16", (1, 8, 7), "8"),
    ("fp16 hi", (1, 5, 10), "hi + lo / 2¹¹: 22"),
    ("fp16 lo", (1, 5, 10), ""),
)
"""Name; bits of sign, of exponent, behind the binary point; what it comes to."""


def formats() -> Figure:
    """Bits of the formats that operands are rounded to, one box a bit."""
    box, step, left = 11.6, 27.0, 78.0
    with style():
        figure, axes = canvas(
            step * len(FORMATS) + 34,
            "TF32 has fp16's bits behind the point, and fp32's range",
            "One box is one bit; the leading 1 of a number is not stored.",
            ["IEEE 754 for fp32 and fp16; bf16 and TF32 as PTX ISA 9.7.9 has them"],
        )
        for index, (name, bits, comes_to) in enumerate(FORMATS):
            y = step * (len(FORMATS) - index) + 4
            at = {"va": "baseline", "fontsize": TEXT_SIZE}
            axes.text(left - 10, y + 3, name, ha="right", fontweight="bold", **at)
            x = left
            dropped = 32 - sum(bits) if name == "TF32" else 0
            for field, count in zip(FIELDS, (*bits, dropped), strict=True):
                for _ in range(count):
                    edge = {"facecolor": FIELDS[field], "edgecolor": SOFT, "linewidth": 0.6}
                    axes.add_patch(Rectangle((x, y), box - 1, 13, **edge))
                    x += box
            axes.text(left + 32 * box + 10, y + 3, comes_to, color=SOFT, **at)
        x = left
        for field, face in FIELDS.items():
            axes.add_patch(Rectangle((x, 4), 11, 11, facecolor=face, edgecolor=SOFT, linewidth=0.6))
            axes.text(x + 16, 6, field, va="baseline", fontsize=SMALL_SIZE, color=SOFT)
            x += 42 + 5.4 * len(field)
    return figure
