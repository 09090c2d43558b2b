"""Pictures that explain, drawn from shapes alone; figures of measurements are in `plots`."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Rectangle

from asymconv.plots import INK, SMALL_SIZE, SOFT, TEXT_SIZE, WIDTH, axes_at, page, style
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
        figure, bottom, top = page(
            200,
            f"Each of {shape.outputs:,} outputs is a sum of {shape.terms} products",
            f"One of {n} pictures, its planes to scale: {w / h:.3g} times as wide as high.",
            [f"{shape}; the {r}×{s} window is drawn larger than it is"],
        )
        axes = axes_at(figure, 0, bottom, WIDTH, top - bottom)
        axes.set_axis_off()
        axes.set_xlim(0, WIDTH)
        axes.set_ylim(0, top - bottom)

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
