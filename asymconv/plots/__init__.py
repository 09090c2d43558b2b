"""Figures, one function each, drawn from recorded data only.

A figure's title states what it shows, in numbers taken from the record; its small print names the
GPU, the record and the git revision. `svg` gives the same bytes on any machine: every text stands
on a fixed baseline and is written as text, nothing is laid out by measuring fonts, coordinates
are rounded, and matplotlib's names for clip paths and markers are replaced. pyplot is not used.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from asymconv import ablations, accuracy, strips
from asymconv import asymmetry as experiments
from asymconv import record as records
from asymconv.plots.addresses import Request, sectors
from asymconv.plots.changes import changes
from asymconv.plots.errors import error_and_time, growth, histograms
from asymconv.plots.page import (
    COLOURS,
    MARKERS,
    TEXT_SIZE,
    WIDTH,
    canvas,
    colour,
    marker,
    style,
    svg,
)
from asymconv.plots.rungs import ladder, roofline
from asymconv.plots.sweeps import LINED, series, tiles, writing
from asymconv.record import significant

FIGURES: dict[str, Callable[[], Figure]] = {
    "ladder": lambda: ladder(records.load()),
    "roofline": lambda: roofline(records.load()),
    "tiles": lambda: tiles(records.load(records.VARIANTS)),
    "errors": lambda: histograms(accuracy.load()),
    "growth": lambda: growth(accuracy.load()),
    "error_and_time": lambda: error_and_time(records.load()),
}
"""Every figure of figures/, by the stem of its file, from the records it shows."""


def figures_measured() -> dict[str, Callable[[], Figure]]:
    """Those of experiments whose records may not be there yet: what was measured so far."""
    figures: dict[str, Callable[[], Figure]] = {}
    if strips.RECORD.exists():
        figures["writing"] = lambda: writing(records.load(strips.RECORD))
    if ablations.RECORD.exists():
        figures["changes"] = lambda: changes(records.load(ablations.RECORD))
    if experiments.RECORD.exists():
        record = experiments.load()

        def drawing(name: str) -> Callable[[], Figure]:
            return lambda: series(record[name], experiments.get_series(name))

        figures |= {f"asymmetry_{name}": drawing(name) for name in LINED if name in record}
    return figures


def draw_all(folder: Path) -> list[Path]:
    """Write every figure as SVG into a folder, each file whole or not at all.

    Those of `FIGURES`, whose records are in the repository, and those of `figures_measured`.

    Returns:
        The paths written.

    Raises:
        FileNotFoundError: a record is not there.
    """
    paths = []
    for stem, draw in (FIGURES | figures_measured()).items():
        path = folder / f"{stem}.svg"
        records.write_atomically(path, svg(draw()))
        paths.append(path)
    return paths


__all__ = [
    "COLOURS",
    "FIGURES",
    "LINED",
    "MARKERS",
    "TEXT_SIZE",
    "WIDTH",
    "Request",
    "canvas",
    "changes",
    "colour",
    "draw_all",
    "error_and_time",
    "figures_measured",
    "growth",
    "histograms",
    "ladder",
    "marker",
    "roofline",
    "sectors",
    "series",
    "significant",
    "style",
    "svg",
    "tiles",
    "writing",
]
