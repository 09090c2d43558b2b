"""What a shape costs before its kernel is measured: sums that a reader can do by hand.

Each function is one idea: of notebooks 01 to 07 how long the work takes at least, of 08 what a
shape makes of it. Sizes are in pixels and floats; a sector is the 32 bytes that memory transfers
at least. The CPU backend and the hardware counters are held against them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from asymconv.kernels import get_rung
from asymconv.measure import Timing
from asymconv.problem import BYTES_PER_FLOAT, ConvShape, Pair

SECTOR = 8
"""Floats of a sector."""

WARP = 32

REGISTERS = 65536
"""Registers of a multiprocessor, 32 bits each."""


def warp_terms(shape: ConvShape, lanes: int = WARP) -> int:
    """Steps of all warps together, each one term (a product) of as many outputs as lanes work."""
    return math.ceil(shape.outputs / lanes) * shape.terms


def bound_ms(count: float, made: Mapping[str, str | int], per_cycle: int = 1) -> float:
    """Least time in ms for so many wavefronts or instructions: every SM busy in every cycle.

    Args:
        count: of all multiprocessors (SMs) together.
        made: a record's, for its GPU's number of SMs and highest clock.
        per_cycle: how many an SM starts in a cycle: 1 wavefront, 4 instructions of warps.

    Raises:
        KeyError: it does not say them.
        ValueError: the clock was not known where it was made.
    """
    if not (megahertz := int(made["max_clock_mhz"])):
        raise ValueError(f"the highest clock of {made['gpu']} was not known")
    return count / per_cycle / int(made["multiprocessors"]) / megahertz / 1e3


def floor_ms(work: float, ceiling: Timing) -> float:
    """Least time in ms for so much work at a rate that was measured.

    Args:
        work: bytes where the ceiling moves bytes ("memory floor", "L2 read"), else
            floating-point operations ("matmul fp16").
        ceiling: a record's timing of it.

    Raises:
        ValueError: it counts neither bytes nor operations.
    """
    if not (done := ceiling.bytes or ceiling.flops):
        raise ValueError(f"{ceiling.name} has no rate")
    return ceiling.median * work / done


def blocks_that_fit(registers: int, threads: int) -> int:
    """Blocks that fit a multiprocessor by their registers, handed out in eights to a thread.

    Args:
        registers: of a thread.
        threads: of a block, whole warps.
    """
    return REGISTERS // (math.ceil(registers / 8) * 8 * threads)


def halo(tile: Pair, kernel: Pair = (3, 3)) -> float:
    """Input values fetched for each output of a tile (height, width): the tile and its halo."""
    (height, width), (r, s) = tile, kernel
    return (height + r - 1) * (width + s - 1) / (height * width)


def covered(shape: ConvShape, tile: Pair) -> float:
    """Pixels of whole tiles (height, width) for each pixel of the output: 1 where they fit."""
    rows, columns = (
        math.ceil(size / side) * side
        for size, side in zip((shape.out_height, shape.out_width), tile, strict=True)
    )
    return rows * columns / (shape.out_height * shape.out_width)


def aligned_rows(pitch: int) -> float:
    """Share of the rows of a plane, `pitch` floats apart, that begin on a sector."""
    return math.gcd(pitch, SECTOR) / SECTOR


def _row_sectors(start: int, width: int) -> int:
    """Sectors under a row that begins so many floats into one, 32 floats a request."""
    total = 0
    for first in range(0, width, WARP):
        begin, end = start + first, start + min(first + WARP, width)
        total += (end - 1) // SECTOR - begin // SECTOR + 1
    return total


def store_requests(shape: ConvShape) -> int:
    """Requests to store the output, 32 floats of a row each: k03's."""
    rows = shape.batch * shape.out_channels * shape.out_height
    return rows * math.ceil(shape.out_width / WARP)


def store_sectors(shape: ConvShape) -> int:
    """Sectors of those requests. Rows follow each other without a gap: all is in their pitch."""
    rows = shape.batch * shape.out_channels * shape.out_height
    total = 0
    for row in range(min(SECTOR, rows)):  # where rows begin repeats after 8 of them
        like_it = (rows - row - 1) // SECTOR + 1
        total += like_it * _row_sectors(row * shape.out_width % SECTOR, shape.out_width)
    return total


def load_sectors(shape: ConvShape) -> int:
    """Sectors to read the input for every tap and filter, 32 neighbouring outputs a request: k03's.

    For stride and dilation 1 without padding.

    Raises:
        ValueError: another convolution.
    """
    if (shape.stride, shape.dilation, shape.padding) != ((1, 1), (1, 1), (0, 0)):
        raise ValueError(f"stride and dilation 1 without padding, not {shape}")
    r, s = shape.kernel
    starts: Counter[int] = Counter()
    for plane in range(shape.batch * shape.in_channels // shape.groups):
        for row in range(shape.out_height):
            for down in range(r):
                first = (plane * shape.height + row + down) * shape.width
                for right in range(s):
                    starts[(first + right) % SECTOR] += 1
    total = sum(n * _row_sectors(start, shape.out_width) for start, n in starts.items())
    return shape.out_channels * total


def batch_wavefronts(batch: int) -> float:
    """Lines that L1 looks up for an image and a term where a block is the batch: k01, k02.

    A warp of up to 32 images reads as many lines of x and one of w.
    """
    warps = math.ceil(batch / WARP)
    return (batch + warps) / batch


START_ROWS = 6
"""What an item costs k07 before its first row and after its last, in rows (`plan_for`)."""

MOST_ROWS = 256
"""The most rows of a part (`plan_for`)."""

H100_PEAK = 3352.32
"""Bytes a ns of an H100 SXM's memory: 5120 bits, 2619 MHz, two transfers a cycle."""


@dataclass(frozen=True)
class Strips:
    """How k07 deals out an image: strips of columns, cut into parts of rows.

    Attributes:
        strips: of an image.
        parts: of a strip.
        rows: of a part.
        items: parts of all images; a block takes one after the other.
        turns: items that the busiest block has.
        cost: rows that it walks, those of `START_ROWS` too, over what they would be if all
            multiprocessors shared the output evenly, without strips and starts.
    """

    strips: int
    parts: int
    rows: int
    items: int
    turns: int
    cost: float


def clocked_ms(shape: ConvShape, multiprocessors: int = 132, peak: float = H100_PEAK) -> float:
    """Least milliseconds that k07's clock lets a shape take: what `paced` of its text computes.

    Args:
        shape: of more bytes than four times what L2 holds.
        multiprocessors: of the GPU.
        peak: of its memory, bytes a ns.
    """
    plan = strips(shape, multiprocessors)
    rows_in = shape.out_height + (3 - 1) * plan.parts
    read = shape.in_channels * rows_in * shape.width
    written = shape.out_channels * shape.out_height * shape.out_width
    rate = get_rung("k07").defines["PACE"] / 100 * peak
    filters = min(shape.out_channels, 128)
    lead = 1000 + 4 * 9 * shape.in_channels * filters / 21
    return (BYTES_PER_FLOAT * shape.batch * (read + written) / rate + lead) / 1e6


def strips(shape: ConvShape, multiprocessors: int = 132, tile_w: int = 128) -> Strips:
    """k07's plan for a shape: what `plan_for` of its CUDA text computes.

    Args:
        shape: up to 128 filters are one block's.
        multiprocessors: of the GPU, 132 on an H100 SXM.
        tile_w: columns of a strip.
    """
    filters = math.ceil(shape.out_channels / 128)
    blocks = max(1, multiprocessors // filters)
    across = math.ceil(shape.out_width / tile_w)
    best, least = None, math.inf
    fewest = math.ceil(shape.out_height / MOST_ROWS)
    for parts in range(fewest, max(fewest, min(shape.out_height, 64)) + 1):
        rows = math.ceil(shape.out_height / parts)
        real = math.ceil(shape.out_height / rows)
        items = shape.batch * across * real
        turns = math.ceil(items / blocks)
        walked = turns * (rows + START_ROWS)
        if walked < least:
            pixels = shape.batch * shape.out_height * shape.out_width
            ideal = pixels / tile_w / (multiprocessors / filters)
            best, least = Strips(across, real, rows, items, turns, walked / ideal), walked
    assert best is not None
    return best
