"""One warp's addresses, as sectors of memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from asymconv.plots.page import (
    INK,
    MARGIN,
    SOFT,
    TEXT_SIZE,
    WIDTH,
    byte_count,
    canvas,
    colour,
    draw_box,
    style,
    write_note,
)
from asymconv.record import short_name

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
            "A bar is a 128-byte line, its quarters are sectors of 32 bytes; filled: lanes' bytes.",
            [source],
        )
        y = height - 4
        for request, its_height in zip(requests, heights, strict=True):
            _draw_request(axes, request, y, colour(method), across, head_height, row_height)
            y -= its_height
        _draw_key(axes, colour(method))
    return figure


_FETCHED = "#E9E9E9"


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
    write_note(axes, MARGIN, top - 12, request.label, fontsize=TEXT_SIZE, fontweight="bold")
    facts = (
        f"{_plural(active, 'lane')} of {len(request.offsets)}, {_plural(len(fetched), 'sector')}: "
        f"{used} of {SECTOR * len(fetched)} bytes used, {100 * share:.3g} %"
    )
    write_note(axes, WIDTH - MARGIN, top - 12, facts, ha="right", color=SOFT, fontsize=TEXT_SIZE)
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
        write_note(axes, x, y + height + 4, where, color=SOFT)
        for sector in range(start // SECTOR, (start + LINE) // SECTOR):
            face = _FETCHED if sector in fetched else "white"
            at = x + (sector * SECTOR - start) * a_byte
            draw_box(
                axes, at, y, SECTOR * a_byte, height, facecolor=face, edgecolor=SOFT, linewidth=0.6
            )
        here = []
        for lane, offset in request.lanes():
            first, last = max(offset, start), min(offset + request.bytes_per_lane, start + LINE)
            if first < last:
                here.append(lane)
                at = x + (first - start) * a_byte
                size = (last - first) * a_byte
                draw_box(axes, at, y, size, height, facecolor=ink, edgecolor=INK, linewidth=0.35)
        lanes = _ranges(here)
        if len(lanes) > 10:
            lanes = f"{len(here)} lanes"
        else:
            lanes = f"lane {lanes}" if len(here) == 1 else f"lanes {lanes}"
        write_note(axes, x, y - 11, lanes, color=INK)


def _draw_key(axes: Axes, ink: str) -> None:
    """What the fillings mean, at the foot."""
    x, y = MARGIN, 12.0
    for face, text in (
        (ink, "bytes used"),
        (_FETCHED, "touched, not used"),
        ("white", "not touched"),
    ):
        draw_box(axes, x, y, 14, 10, facecolor=face, edgecolor=SOFT, linewidth=0.6)
        write_note(axes, x + 19, y + 1.5, text, color=SOFT)
        x += 40 + 5.6 * len(text)
