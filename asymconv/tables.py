"""The ladder as a table, on a terminal and in the README, from a record."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.table import Table

from asymconv.asymmetry import Measured, Series, estimate
from asymconv.comparison import OURS, THEIRS, LayerRow, Layers, Network
from asymconv.kernels import RUNGS
from asymconv.measure import ALL_PEERS
from asymconv.predictions import floor_ms
from asymconv.problem import ConvShape
from asymconv.record import Record, short_name, significant, write_atomically

BEGIN, END = "<!-- ladder:begin -->", "<!-- ladder:end -->"

HEADERS = ("kernel", "idea", "ms", "× nn.Conv2d", "of the floor", "error", "GB")


def ladder_rows(record: Record) -> Iterator[tuple[str, ...]]:
    """A row for each rung and peer: see `HEADERS`.

    "× nn.Conv2d" is how many times faster than PyTorch's default in the same run; "of the floor"
    the memory floor's time over the method's; the error is ‖y - ref‖ / ‖ref‖ against float64; GB
    are what it takes of device memory at its peak, beyond input and weights, output included.

    Raises:
        KeyError: the record has no nn.Conv2d or no memory floor.
    """
    ideas = {rung.name: rung.idea for rung in RUNGS}
    ideas |= {peer.name: peer.idea for peer in ALL_PEERS}
    default, floor = record["nn.Conv2d"].median, record["memory floor"].median
    for timing in record.of_kind("rung") + record.of_kind("peer"):
        yield (
            timing.name,
            ideas.get(timing.name, ""),
            significant(timing.median),
            significant(default / timing.median),
            f"{100 * floor / timing.median:.2g} %",
            f"{timing.error:.1e}",
            f"{timing.peak_bytes / 1e9:.2f}",
        )


def caption(record: Record) -> str:
    """What the table shows, and where it was measured. Raises KeyError without a memory floor."""
    floor = record["memory floor"].median
    return (
        f"{record.shape}, forward, medians on {record.gpu}, torch {record.made['torch']}; "
        f"moving the bytes alone takes {significant(floor)} ms. "
        "GB: peak memory beyond input and weights."
    )


def ladder_markdown(record: Record) -> str:
    """The table in Markdown, with its caption."""
    lines = ["| " + " | ".join(HEADERS) + " |", "| :-- | :-- |" + " --: |" * len(HEADERS[2:])]
    lines += ["| " + " | ".join(row) + " |" for row in ladder_rows(record)]
    return "\n".join([*lines, "", caption(record)])


def ladder_rich(record: Record) -> Table:
    """The table for a terminal."""
    table = Table(*HEADERS[:1], title=record.title, caption=caption(record))
    for header in HEADERS[2:]:  # the ideas would not fit
        table.add_column(header, justify="right")
    for name, _, *numbers in ladder_rows(record):
        table.add_row(name, *numbers)
    return table


FLOOR_HEADERS = ("at the measured rate of", "needs ms")


def floor_rows(record: Record, shape: ConvShape | None = None) -> Iterator[tuple[str, str]]:
    """The least time a convolution takes at each ceiling: see `FLOOR_HEADERS`.

    Args:
        record: whose GPU's ceilings.
        shape: another convolution than the record's, by the same rates.

    Raises:
        KeyError: the record lacks a ceiling.
    """
    shape = shape or record.shape
    moved = floor_ms(shape.least_bytes, record["memory floor"])
    rows = [("all bytes once (memory floor)", moved)]
    for name in ("fp16", "tf32", "fp32"):
        least = floor_ms(shape.flops, record[f"matmul {name}"])
        rows.append((f"all operations in {name}", least))
    for what, least in rows:
        yield what, significant(least)


def floors_rich(record: Record, shape: ConvShape | None = None) -> Table:
    """The floors for a terminal."""
    table = Table(FLOOR_HEADERS[0], caption=f"ceilings of {record.gpu}, {record.made['date']}")
    table.add_column(FLOOR_HEADERS[1], justify="right")
    for row in floor_rows(record, shape):
        table.add_row(*row)
    return table


def with_table(readme: str, record: Record) -> str:
    """A README's text with the published record's table between its markers.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.find(END) < readme.find(BEGIN):
        raise ValueError(f"the README must have {BEGIN} and {END}, once each and in this order")
    head, rest = readme.split(BEGIN)
    published = f"{ladder_markdown(record)} Record: figures/data/ladder.json."
    return f"{head}{BEGIN}\n{published}\n{END}{rest.split(END)[1]}"


def update_readme(path: Path, record: Record) -> None:
    """Write the table into a README. Raises ValueError (`with_table`)."""
    write_atomically(path, with_table(path.read_text(), record))


PYTORCHS = "PyTorch's"
"""Stands where a rung's number would, if PyTorch's own convolution runs."""

LAYER_HEADERS = ("layer", "batch", "kernel", "forward, ms", "×", "with backward, ms", "×")


def layer_rows(layers: Layers) -> Iterator[tuple[str, ...]]:
    """A row for each layer and batch, both directions: see `LAYER_HEADERS`.

    Milliseconds are medians of nn.Conv2d and of asymconv.Conv2d; × is the first over the second.
    """
    together: dict[tuple, dict[bool, LayerRow]] = {}
    for row in layers.rows:
        key = (row.data, row.network, row.shape, row.tf32)
        together.setdefault(key, {})[row.training] = row
    for (data, network, shape, tf32), directions in together.items():
        name = f"{data}: {network}, {str(shape.with_(batch=1)).removeprefix('1×')}"
        runs = directions[False].runs
        cells = []
        for training in (False, True):
            if row := directions.get(training):
                times = f"{significant(row.median(THEIRS))} → {significant(row.median(OURS))}"
                cells += [times, f"{row.ratio:.2f}"]
            else:
                cells += ["", ""]
        flags = "" if tf32 else ", TF32 forbidden"
        kernel = short_name(runs) if runs else PYTORCHS
        yield name + flags, str(shape.batch), kernel, *cells


def layers_rich(layers: Layers) -> Table:
    """The table of layers for a terminal."""
    caption = f"medians on {layers.made['gpu']}, torch {layers.made['torch']}"
    table = Table(LAYER_HEADERS[0], title=f"{THEIRS} → {OURS}", caption=caption)
    for header in LAYER_HEADERS[1:]:
        table.add_column(header, justify="right")
    for row in layer_rows(layers):
        table.add_row(*row)
    return table


NETWORK_HEADERS = ("", THEIRS, OURS)


def network_rows(network: Network) -> Iterator[tuple[str, str, str]]:
    """What is compared, before and after `convert`; times and memory where there was a GPU."""

    def both(what: str, values: dict[str, str]) -> tuple[str, str, str]:
        return what, values[THEIRS], values[OURS]

    yield both("logits, error", {n: f"{e:.1e}" for n, e in network.errors.items()})
    for step in range(len(network.losses[THEIRS])):
        losses = {n: f"{values[step]:.6f}" for n, values in network.losses.items()}
        yield both(f"loss, step {step + 1}", losses)
    for what, times in (("forward, ms", network.forward), ("training step, ms", network.training)):
        if times:
            yield both(what, {n: f"{statistics.median(t):.1f}" for n, t in times.items()})
    if network.peak_bytes:
        memory = {n: f"{b / 1e9:.2f}" for n, b in network.peak_bytes.items()}
        yield both("peak memory in training, GB", memory)


def series_rich(chosen: Sequence[Series]) -> Table:
    """Experiments on shapes, for a terminal: what they ask, and a guess at their time."""
    table = Table("series", "question", "shapes", title="What does the shape matter?")
    table.add_column("s, a guess", justify="right")
    for series in chosen:
        shapes = ", ".join(series.named(shape) for shape in series.shapes)
        table.add_row(series.name, series.question, shapes, f"{estimate(series):.0f}")
    return table


def asymmetry_rows(series: Series, measured: Measured) -> Iterator[tuple[str, ...]]:
    """A row for each method: its name, then its cells for each shape of the series.

    A cell is the time in ms and, where the series' base was measured, time per output over that on
    the base.
    """
    relative = measured.relative(series)
    for name, timings in measured.timings(series).items():
        ratios = relative.get(name, [None] * len(timings))
        cells = []
        for timing, ratio in zip(timings, ratios, strict=True):
            text = "" if timing is None else significant(timing.median)
            cells.append(text if ratio is None else f"{text} ({ratio:.2f})")
        yield name, *cells


def asymmetry_headers(series: Series) -> tuple[str, ...]:
    """Of `asymmetry_rows`."""
    return ("ms (× per output)", *(series.named(shape) for shape in series.shapes))


def asymmetry_rich(series: Series, measured: Measured) -> Table:
    """A series for a terminal."""
    first, *others = asymmetry_headers(series)
    table = Table(first, title=series.question)
    for header in others:
        table.add_column(header, justify="right")
    for row in asymmetry_rows(series, measured):
        table.add_row(*row)
    return table
