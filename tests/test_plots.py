"""Figures and tables: true to their record, the same bytes everywhere, colours that stay apart."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from samples import MADE, ceilings, measured_sample, timing, whole_ladder

from asymconv import asymmetry, drawings, plots, record, tables
from asymconv.kernels import RUNGS
from asymconv.measure import ALL_PEERS, Timing
from asymconv.plots.page import spread_apart
from asymconv.problem import CONTRACT
from asymconv.study import ROOT


@pytest.fixture
def sample() -> record.Record:
    """Round numbers: the default peer 4 ms, the floor 1 ms, one rung at 400, another at 2."""
    return record.Record(
        "a test",
        CONTRACT,
        MADE,
        (
            timing("k01_block_per_output", "rung", 400.0),
            timing("k07_hopper_ring", "rung", 2.0),
            timing("nn.Conv2d", "peer", 4.0),
            timing("nn.Conv2d, strict fp32", "peer", 14.0),
            *ceilings(),
        ),
        {},
    )


def test_committed_figures_are_what_the_records_give(tmp_path: Path) -> None:
    drawn = plots.draw_all(tmp_path)
    assert {p.name for p in drawn} == {p.name for p in (ROOT / "figures").glob("*.svg")}
    for path in drawn:
        committed = (ROOT / "figures" / path.name).read_text()
        assert path.read_text() == committed, f"{path.name}: run `asymconv figures`"


def test_the_readmes_table_is_what_the_record_gives() -> None:
    readme = (ROOT / "README.md").read_text()
    assert tables.with_table(readme, record.load(record.LADDER)) == readme, "run `asymconv figures`"


def test_the_same_bytes_in_another_process() -> None:
    code = (
        "from asymconv import plots, record; print(plots.svg(plots.ladder(record.load())), end='')"
    )
    texts = []
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        texts.append(done.stdout)
    assert texts[0] == texts[1] == (ROOT / "figures" / "ladder.svg").read_text()


@pytest.mark.parametrize("draw", [plots.ladder, plots.roofline])
def test_figures_say_what_they_show(draw, sample: record.Record) -> None:
    text = plots.svg(draw(sample))
    assert "a GPU of this test" in text
    assert "ladder.json" in text
    assert "git none" in text
    assert "k07" in text


def test_the_ladders_title_states_the_finding(sample: record.Record) -> None:
    text = plots.svg(plots.ladder(sample))
    assert "k07 needs 2.00 ms, nn.Conv2d 4.00 ms" in text
    assert "200 times faster than k01" in text


def test_the_ladders_title_is_true_of_a_slow_ladder(sample: record.Record) -> None:
    timings = tuple(t for t in sample.timings if t.name != "k07_hopper_ring")
    text = plots.svg(plots.ladder(dataclasses.replace(sample, timings=timings)))
    assert "k01 needs 400 ms, nn.Conv2d 4.00 ms: a factor of 100" in text
    assert "k01 takes 400 times that." in text


def test_the_roofline_stands_at_counted_bytes(sample: record.Record) -> None:
    allowed = CONTRACT.flops / 1e9  # TFLOP/s if the least bytes take the copy's 1 ms
    assert f"A copy's rate allows {allowed:.0f} TFLOP/s here: k07 reaches 307" in plots.svg(
        plots.roofline(sample)
    )
    [axes] = plots.roofline(sample, {"k01": 10 * CONTRACT.least_bytes}).axes
    at = {(m.get_marker(), m.get_xdata()[0]) for m in axes.lines if len(m.get_xdata()) == 1}
    assert (plots.MARKERS["k01"], CONTRACT.intensity / 10) in at
    assert (plots.MARKERS["k07"], CONTRACT.intensity) in at


def test_the_roofline_of_a_layer_that_arithmetic_limits(sample: record.Record) -> None:
    shape = CONTRACT.with_(in_channels=2048, out_channels=2048)
    timings = tuple(dataclasses.replace(t, flops=shape.flops) for t in sample.of_kind("rung"))
    timings += tuple(t for t in sample.timings if t.kind != "rung")
    text = plots.svg(plots.roofline(dataclasses.replace(sample, shape=shape, timings=timings)))
    fp16 = plots.significant(sample["matmul fp16"].tflops)
    assert f"Arithmetic allows {fp16} TFLOP/s here" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2112.4, "2112"),
        (999.6, "1000"),
        (14.32, "14.3"),
        (9.999, "10.0"),
        (0.9996, "1.00"),
        (0, "0"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert plots.significant(value) == text


def test_the_tables_numbers(sample: record.Record) -> None:
    rows = {row[0]: row for row in tables.ladder_rows(sample)}
    assert rows["k07_hopper_ring"][2:] == ("2.00", "2.00", "50 %", "1.0e-07", "0.00")
    assert rows["k01_block_per_output"][2:] == ("400", "0.0100", "0.25 %", "1.0e-07", "0.00")


def test_a_readme_without_markers_is_refused(sample: record.Record) -> None:
    for text in ("", tables.BEGIN, tables.END + tables.BEGIN, (tables.BEGIN + tables.END) * 2):
        with pytest.raises(ValueError, match="once each"):
            tables.with_table(text, sample)
    done = tables.with_table(f"a{tables.BEGIN}old{tables.END}z", sample)
    assert done.startswith("a" + tables.BEGIN)
    assert done.endswith(tables.END + "z")
    assert "old" not in done
    assert tables.with_table(done, sample) == done


def test_a_request_counts_its_sectors_and_bytes() -> None:
    for offsets, size, sectors, used in [
        ([4 * lane for lane in range(32)], 4, 4, 128),
        ([4 * lane + 4 for lane in range(32)], 4, 5, 128),
        ([128 * lane for lane in range(32)], 4, 32, 128),
        ([16 * lane for lane in range(32)], 16, 16, 512),
        ([0] * 32, 4, 1, 4),
        ([0, None, 64] + [None] * 29, 4, 2, 8),
    ]:
        request = plots.Request("load x", offsets, size)
        assert len(request.sectors()) == sectors
        assert request.used_bytes() == used
    assert "5 sectors" in plots.svg(
        plots.sectors([plots.Request("load x", [4 * n + 4 for n in range(32)])], "k03", "a test")
    )
    with pytest.raises(ValueError, match="no request"):
        plots.sectors([], "k03", "a test")


def _linear(colour: str) -> list[float]:
    values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]


# Machado, Oliveira and Fernandes 2009, severity 1 (10.1109/TVCG.2009.113), on linear RGB
SIGHT = {
    "normal": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}


def _seen(colour: str, sight: list[list[float]]) -> tuple[float, ...]:
    """A colour in CIE L*a*b* (D65) as eyes of this kind see it."""
    rgb = _linear(colour)
    r, g, b = (max(0.0, sum(m * c for m, c in zip(row, rgb, strict=True))) for row in sight)
    x = (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505
    y = 0.2126 * r + 0.7152 * g + 0.0722 * b
    z = (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089
    x, y, z = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("sight", SIGHT)
def test_colours_stay_apart(sight: str) -> None:
    """A difference of 10 in L*a*b* is plain to see; 2.3 can just be seen."""
    names = list(plots.MARKERS)
    for i, one in enumerate(names):
        for other in names[:i]:
            a, b = (_seen(plots.COLOURS[n], SIGHT[sight]) for n in (one, other))
            distance = sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) ** 0.5
            assert distance >= 10, (one, other, distance)
    assert len(set(plots.MARKERS.values())) == len(names)
    assert len(set(plots.COLOURS.values())) == len(plots.COLOURS)


def test_every_method_of_the_record_has_a_colour() -> None:
    for measured in record.load(record.LADDER).timings:
        assert plots.colour(measured.name)
    for name in (*(rung.number for rung in RUNGS), *(peer.name for peer in ALL_PEERS)):
        assert plots.marker(name)
        assert plots.colour(name)


def _texts_that_meet(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts that cover each other, and texts that leave the page, as Agg draws them."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    with plots.style():
        figure.draw_without_rendering()
        texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
        boxes = [(t.get_text(), Text.get_window_extent(t, renderer).padded(-1.0)) for t in texts]
    page = figure.bbox
    met = [
        (a, b) for (a, one), (b, other) in itertools.combinations(boxes, 2) if one.overlaps(other)
    ]
    off = [
        (text, "the edge")
        for text, box in boxes
        if box.x0 < page.x0 or box.x1 > page.x1 or box.y0 < page.y0 or box.y1 > page.y1
    ]
    return met + off


@pytest.mark.parametrize("name", [*plots.FIGURES, *plots.figures_measured()])
def test_no_text_covers_another(name: str) -> None:
    assert not _texts_that_meet((plots.FIGURES | plots.figures_measured())[name]())


@pytest.mark.parametrize("name", plots.LINED)
def test_no_text_covers_another_in_other_series(name: str) -> None:
    series = asymmetry.get_series(name)
    assert not _texts_that_meet(plots.series(measured_sample(series), series))


@pytest.mark.parametrize("seed", range(8))
def test_labels_find_a_place_wherever_points_are(seed: int) -> None:
    """Times and errors moved by up to a half."""
    at = random.Random(seed)
    sample = whole_ladder()

    def moved(one: Timing) -> Timing:
        if one.kind == "ceiling":
            return dataclasses.replace(one, error=None)
        ms = one.median * at.uniform(0.7, 1.5)
        error = (3e-4 if one.median < 5 else 4e-7) * at.uniform(0.7, 1.5)
        return dataclasses.replace(one, milliseconds=(ms, ms, ms), error=error)

    sample = dataclasses.replace(sample, timings=tuple(map(moved, sample.timings)))
    for draw in (plots.error_and_time, plots.roofline, plots.ladder):
        assert not _texts_that_meet(draw(sample))


def test_places_stay_within_their_room() -> None:
    assert spread_apart([1.0, 9.9, 10.0], 2.0, (0.0, 10.0)) == [1.0, 8.0, 10.0]
    assert spread_apart([0.0, 0.1], 2.0, (0.0, 10.0)) == [0.0, 2.0]
    assert spread_apart([5.0, 5.0], 2.0) == [4.0, 6.0]


def test_the_layers_picture_shows_its_sizes() -> None:
    text = plots.svg(drawings.layer(CONTRACT))
    for word in ("1024 columns", "1022 columns", "input: 64 channels", "533,729,280 outputs"):
        assert word in text


def test_the_ring_keeps_a_row_in_its_place() -> None:
    text = plots.svg(drawings.ring(slots=4, taps=3, steps=4))
    for row, times in ((0, 1), (2, 3), (3, 4), (6, 1)):  # filled once, read three times
        assert text.count(f">row {row}<") == times
    assert text.count(">filled<") == 4
    with pytest.raises(ValueError, match="cannot be filled"):
        drawings.ring(slots=3, taps=3)


def test_the_window_shows_the_swizzle() -> None:
    text = plots.svg(drawings.shifted_window(pixels=9))
    assert text.count(">from pixel 2<") == 1
    assert text.count(">7<") == 9  # each pixel has each chunk once


def test_rows_start_where_the_shape_says() -> None:
    text = plots.svg(drawings.row_starts(CONTRACT))
    assert "3 in 4 rows of 4088 bytes begin in the middle of a sector" in text
    assert "No rows of 4096 bytes" in plots.svg(drawings.row_starts(CONTRACT.with_(width=1026)))
    odd = plots.svg(drawings.row_starts(CONTRACT.with_(width=1025)))
    assert "7 in 8 rows of 4092 bytes" in odd


def test_each_block_of_a_cluster_gets_both_sides() -> None:
    text = plots.svg(drawings.cluster(side=32, tail=8))
    for side in ("left", "right"):  # once from global memory, and in both blocks' slots
        assert text.count(f">{side}<") == 3
    assert text.count(">fetched and converted<") == 2
    assert "72 pixels of 64 channels" in text


def test_the_drawings_say_what_they_show_in_a_line() -> None:
    for drawn in (
        *(drawings.ring(), drawings.cluster(), drawings.shifted_window()),
        drawings.row_starts(CONTRACT),
    ):
        subtitles = [t for t in drawn.texts if t.get_fontsize() == plots.TEXT_SIZE]
        assert len(subtitles) == 1


def test_the_ladder_has_room_for_every_peer() -> None:
    sample = whole_ladder()
    drawn = plots.ladder(sample)
    text = plots.svg(drawn)
    [axes] = drawn.axes
    rows = {t.get_text(): t.xy[1] for t in axes.texts if t.xy[0] == axes.get_xlim()[0]}
    for peer in ALL_PEERS:
        assert f">{peer.name}<" in text
        assert peer.name in rows
    places = sorted(set(rows.values()))
    assert min(b - a for a, b in itertools.pairwise(places)) >= 1, "names stand in rows"
    table = {row[0]: row for row in tables.ladder_rows(sample)}
    for peer in ALL_PEERS:
        assert table[peer.name][1] == peer.idea


@pytest.mark.parametrize("name", plots.LINED)
def test_a_series_is_drawn_with_every_method(name: str) -> None:
    series = asymmetry.get_series(name)
    measured = measured_sample(series)
    drawn = plots.series(measured, series)
    text = plots.svg(drawn)
    [axes] = drawn.axes
    relative = measured.relative(series)
    labels = [t.get_text() for t in axes.texts]
    for method, ratios in relative.items():
        if method != "memory floor":
            assert f"{method}  {plots.significant(ratios[-1])}" in labels
            line = next(ln for ln in axes.lines if list(ln.get_ydata()) == ratios)
            assert line.get_color() == plots.colour(method)
    assert "memory floor" not in text
    assert "asymmetry.json" in text
    assert ("4 output channels" in text) == series.slow
    at = series.shapes.index(series.base)
    costs = {n: c[at] for n, c in measured.costs(series).items() if n.startswith("k")}
    for method in (min(costs, key=costs.__getitem__), "nn.Conv2d"):
        found = plots.significant(max(relative[method]) / min(relative[method]))
        assert f"{method} {found} times" in " ".join(t.get_text() for t in drawn.texts)


def test_a_series_without_its_base_is_refused() -> None:
    series = asymmetry.get_series("aspect")
    with pytest.raises(ValueError, match="has nothing on"):
        plots.series(asymmetry.Measured(MADE, measured_sample(series).rows[:2]), series)


def test_series_become_figures_once_they_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asymmetry, "RECORD", tmp_path / "none.json")
    others = list(plots.figures_measured())
    assert not any(name.startswith("asymmetry") for name in others)
    path = tmp_path / "a.json"
    chosen = [asymmetry.get_series(name) for name in ("aspect", "orientation")]
    asymmetry.save({series.name: measured_sample(series) for series in chosen}, path)
    monkeypatch.setattr(asymmetry, "RECORD", path)
    load = asymmetry.load
    monkeypatch.setattr(asymmetry, "load", lambda: load(path))
    assert sorted(plots.figures_measured()) == sorted(["asymmetry_aspect", *others])
    names = {p.name for p in plots.draw_all(tmp_path / "drawn")}
    assert "asymmetry_aspect.svg" in names


def test_formats_have_as_many_boxes_as_bits() -> None:
    [axes] = drawings.formats().axes
    legend = len(drawings.FIELDS)
    dropped = 32 - sum(drawings.FORMATS[1][1])  # TF32 takes a word of memory
    bits = sum(sum(bits) for _, bits, _ in drawings.FORMATS)
    assert len(axes.patches) == bits + dropped + legend
