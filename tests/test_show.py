"""What cells show: pictures that JupyterLab shows untrusted, statements and names to be read."""

from __future__ import annotations

import dataclasses
import io
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("IPython", reason="the study extra is not installed")

from PIL import Image
from samples import measured_sample

from asymconv import asymmetry, drawings, plots, profiler, record, show
from asymconv.kernels import get_rung
from asymconv.measure import Timing
from asymconv.problem import CONTRACT


def test_a_pictures_png_keeps_each_methods_colour() -> None:
    """Where SVG is not shown (GitHub, JupyterLab before it trusts a notebook) readers see these."""
    ladder = record.load()
    png = Image.open(io.BytesIO(show.figure(plots.ladder(ladder)).png)).convert("RGB")
    seen = [colour for _, colour in png.getcolors()]
    for timing in ladder.timings:
        if timing.kind == "ceiling":
            continue
        code = plots.page.colour(timing.name).removeprefix("#")
        own = tuple(bytes.fromhex(code))
        off = min(max(abs(a - b) for a, b in zip(own, one, strict=True)) for one in seen)
        assert off <= 8, timing.name


def test_a_picture_is_svg_and_png_of_the_same() -> None:
    picture = show.figure(drawings.layer(CONTRACT))
    data, metadata = picture._repr_mimebundle_()
    assert data["image/svg+xml"].startswith("<svg")
    width, height = re.search(r'viewBox="0 0 (\d+) (\d+)"', data["image/svg+xml"]).groups()
    png = Image.open(io.BytesIO(data["image/png"]))
    assert png.width / png.height == pytest.approx(int(width) / int(height), rel=0.01)
    assert png.width == 1.5 * metadata["image/png"]["width"]
    assert len(data["image/png"]) < 100_000
    assert len(png.convert("RGB").getcolors()) > 10
    assert data["text/plain"] == "Each of 533,729,280 outputs is a sum of 576 products"


def test_a_statement_is_shown_whole() -> None:
    lines = ["int a;", "*first =  // why", "    second +", "    third;", "int b;"]
    assert show._statement(lines, 2) == "*first = second + third;"
    assert show._statement(lines, 5) == "int b;"


def test_a_kernel_is_shown_without_what_rungs_share() -> None:
    text = show.kernel(get_rung("k05")).data
    assert "asm volatile" not in text
    assert "// CP_ASYNC of asymconv/kernels/ptx.py stands here" in text
    assert "asymconv_launch" in text
    assert show.kernel(get_rung("k03")).data == f"```cpp\n{get_rung('k03').source.strip()}\n```"


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt on this machine")
def test_a_function_has_its_name_of_the_source() -> None:
    assert show._demangled("_Z6kernelILb0ELi3EEvPKf") == "kernel<false, 3>"


def test_counters_are_named_in_words() -> None:
    of = profiler.load()
    names = [name for name in profiler.METRICS if name in of["k03"].values and name != "registers"]
    text = show.counters(of, names, ["k03"]).data
    assert "fp32 units busy" in text
    assert "_" not in text
    assert set(show._LABELS) <= set(profiler.METRICS)


def test_a_loop_is_shown_whole_and_must_be_the_only_one() -> None:
    text = show.loop(get_rung("k05"), "for (int tile = first_tile;").data
    body = text.removeprefix("```cpp\n").removesuffix("\n```").splitlines()
    assert body[0] == "for (int tile = first_tile; tile < tiles; tile += tile_step) {"
    assert body[-1] == "}"
    assert all(line.startswith(" ") for line in body[1:-1] if line)
    assert sum(line.count("{") - line.count("}") for line in body) == 0
    with pytest.raises(KeyError, match="has 0 loops"):
        show.loop(get_rung("k05"), "for (int nothing")
    with pytest.raises(KeyError, match=r"k05_register_tile has [2-9] loops"):
        show.loop(get_rung("k05"), "for (int h = 0;")


def test_a_piece_goes_from_one_line_to_another() -> None:
    k04 = get_rung("k04")
    text = show.piece(k04, "for (int c0 = 0;", "__syncthreads();  // the tile").data
    lines = text.removeprefix("```cpp\n").removesuffix("\n```").splitlines()
    assert lines[0] == "for (int c0 = 0; c0 < channels; c0 += CHUNK_C) {"
    assert lines[-1] == "  __syncthreads();  // the tile is whole"
    assert len(lines) <= 20
    with pytest.raises(KeyError, match="has 0 lines"):
        show.piece(k04, "nothing", "__syncthreads")
    with pytest.raises(KeyError, match="has no line"):
        show.piece(k04, "for (int c0 = 0;", "nothing")


def test_a_difference_does_not_show_what_only_moved_into_a_loop() -> None:
    text = show.difference(get_rung("k01"), get_rung("k02")).data
    lines = text.removeprefix("```diff\n").removesuffix("\n```").splitlines()
    assert lines[:2] == ["--- k01_block_per_output", "+++ k02_block_per_pixel"]
    assert "+  for (int k = 0; k < c.K; ++k) {" in lines
    assert "     float sum = 0.0f;" in lines
    out, new = ([ln[1:].strip() for ln in lines[2:] if ln.startswith(mark)] for mark in "-+")
    assert not set(out) & set(new)
    inner = show.difference(get_rung("k02"), get_rung("k03"), loop="for (int ci = 0;").data
    assert inner.count("@@") == 1 and inner.endswith("\n }\n```"), "a loop is shown whole"


def test_timings_have_the_digits_that_they_are_worth() -> None:
    slow = Timing("k01_slow", "rung", "fp32", (1890.0, 1909.084, 1912.0), 4.3e-7, flops=614 * 10**9)
    fast = Timing("k02_fast", "rung", "fp32", (4.0, 4.262, 5.011), flops=614 * 10**9)
    of = record.Record("two", CONTRACT, {}, (slow, fast), {})
    rows = show.timings(of, ["k01", "k02"]).data.splitlines()
    assert "| (max - min) / median |" in rows[0]
    assert rows[2] == "| k01_slow | 1909 | 1.2 % | 0.322 | 4.3e-07 |"
    assert rows[3] == "| k02_fast | 4.26 | 23.7 % | 144 |  |"


def test_a_bound_stands_beside_the_measured_time() -> None:
    rows = show.l1_bounds("k03", [("wide", 98.3, 103.2), ("high", 1213.0, 1217.0)]).data
    assert rows.splitlines()[0] == "| k03 | bound of L1, ms | measured, ms | bound / measured |"
    assert rows.splitlines()[2:] == [
        "| wide | 98 | 103 | 95 % |",
        "| high | 1,213 | 1,217 | 100 % |",
    ]
    with_ncu = show.l1_bounds("k", [("k01", 1.0, 2.0, 69.9)]).data.splitlines()
    assert with_ncu[0].endswith("| L1 busy, says ncu |") and with_ncu[2].endswith("| 70 % |")


def test_series_are_shown_once_they_are_measured(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for series in asymmetry.SERIES:
        assert "Not measured yet" in show.series(series.name, path).data
    assert show.answers(path).data.count("not measured yet") == 5

    measured = {series.name: measured_sample(series) for series in asymmetry.SERIES}
    first = measured["aspect"].rows[0]
    first = dataclasses.replace(first, left_out={"autocast fp16": "not enough device memory"})
    measured["aspect"] = dataclasses.replace(
        measured["aspect"], rows=(first, *measured["aspect"].rows[1:])
    )
    asymmetry.save(measured, path)
    for series in asymmetry.SERIES:
        text = show.series(series.name, path).data
        assert series.question in text
        assert "a GPU of this test" in text
        assert "Not measured yet" not in text
        for shape in series.shapes:
            assert f" {series.named(shape)} |" in text
    assert f"- not measured: autocast fp16, {first.shape}: not enough" in (
        show.series("aspect", path).data
    )
    for name in plots.LINED:
        assert "worst shape over best" in repr(show.series_figure(name, path))
    assert "not measured yet" not in show.answers(path).data
