"""k07's bytes without its products: every way to write writes the right values, and is described.

Here the CUDA text runs on the CPU; the GPU tests build and verify every variant there.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from conftest import gpu
from typer.testing import CliRunner

from asymconv import build, measure, plots, record, strips
from asymconv.cli import app
from asymconv.problem import CONTRACT, ConvShape

SHAPES = [
    ConvShape(1, 64, 6, 264, 128),  # rows begin anywhere within a line, the last strip is narrow
    ConvShape(2, 64, 5, 136, 128, padding=1),
    ConvShape(1, 64, 4, 12, 128),
]
# one of each way, and the widest shift; the others differ by a hint or by another multiple
HERE = [
    {"STORE": strips.NOTHING},
    {"LOAD": 0},
    {"STORE": strips.REGISTERS, "ALIGN": 2},
    {"STORE": strips.ROWS, "ALIGN": 32, "EVICT_STORES": 1},
    {"ALIGN": 8, "EVICT_LOADS": 1},
    {"ALIGN": 8, "COMPLETE": 1},
    {"ALIGN": 32, "COMPLETE": 1},
    {"COMPLETE": 1, "WIDTH": 2},
    {"WIDTH": 8},
    {"COMPLETE": 1, "PACE": 4600},
]


def name(defines: Mapping[str, int]) -> str:
    return "-".join(f"{k}{v}" for k, v in defines.items())


@pytest.mark.parametrize("defines", HERE, ids=name)
def test_moves_what_it_says(defines: Mapping[str, int]) -> None:
    kernel = build.load(strips.STRIPS, "cpu", defines=defines)
    taken = [s for s in SHAPES if strips.STRIPS.refuses(s, defines) is None]
    assert len(taken) >= 2
    for shape in taken:
        strips.verify(kernel, shape)


def test_races_would_be_found() -> None:
    """Traced runs look for races on shared memory and for missing fences."""
    kernel = build.load(strips.STRIPS, "cpu-traced")
    shape = SHAPES[0]
    x = torch.rand(shape.input_shape)
    lines = kernel.trace(x, torch.rand(shape.weight_shape), None, shape)
    assert {line.space for line in lines} == {"global", "shared"}


def test_sums_as_they_lie_straddle_sectors() -> None:
    """Three rows in four begin within a sector: their pieces touch two."""
    pytest.importorskip("IPython", reason="no Jupyter on this machine")
    from asymconv import show

    lines = show.writes(ConvShape(1, 64, 4, 264, 128)).data.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    touched = {way: float(count) for way, _, count in cells}
    assert touched["requests of 8 filters by 32 bytes"] == pytest.approx(1.75, abs=0.02)
    for way in ("requests of 256 bytes, from sectors", "bulk copies of 512 bytes, from sectors"):
        assert touched[way] <= 1.03


def test_a_wrong_value_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, shape = build.load(strips.STRIPS, "cpu"), SHAPES[2]
    right = strips.expected

    def off_by_one(*arguments: object) -> torch.Tensor:
        wanted = right(*arguments).clone()
        wanted[0, -1, -1, -1] += 1
        return wanted

    monkeypatch.setattr(strips, "expected", off_by_one)
    with pytest.raises(AssertionError, match="1 outputs of image 0"):
        strips.verify(kernel, shape)


def test_what_it_does_not_move() -> None:
    refuses = strips.STRIPS.refuses
    assert refuses(CONTRACT) is None
    assert "64 channels" in refuses(CONTRACT.with_(in_channels=32))
    assert "16 bytes" in refuses(CONTRACT.with_(width=1022))
    assert "more outputs" in refuses(CONTRACT.with_(padding=2))


def test_variants_differ_and_are_told_apart() -> None:
    texts = [strips.describe(variant) for variant in strips.STRIPS.variants]
    assert len(set(texts)) == len(texts)
    assert all(strips.STRIPS.refuses(CONTRACT, v) is None for v in strips.STRIPS.variants)


@gpu
def test_every_variant_on_the_gpu() -> None:
    for kernel in build.load_all([(strips.STRIPS, v) for v in strips.STRIPS.variants]):
        for shape in SHAPES:
            strips.verify(kernel, shape, "cuda")


@pytest.fixture
def sample() -> record.Record:
    """Variants of 1, 2, 3 ... ms, and a floor of half a ms."""
    made = {"gpu": "a GPU", "date": "today", "revision": "none"}
    made |= dict.fromkeys(("torch", "cuda", "cudnn"), "0")
    timings = []
    for of in strips.SHAPES:
        timings += [
            measure.Timing(of, "ceiling", "", (float(i + 1),), defines=variant)
            for i, variant in enumerate(strips.STRIPS.variants)
        ]
        timings.append(measure.Timing(f"memory floor, {of}", "ceiling", "", (0.5,)))
    return record.Record("a test", CONTRACT, made, tuple(timings), {})


def test_the_figure_says_what_was_found(sample: record.Record) -> None:
    text = plots.svg(plots.writing(sample))
    count = len(strips.STRIPS.variants)
    assert f"takes {count}.0 ms or 3.00 ms" in text  # the first two only read, only write
    assert "memory floor 0.500 ms" in text
    assert "Best: requests of 8 filters by 32 bytes;" in text
    for variant in strips.STRIPS.variants:
        assert strips.describe(variant) in text


def test_the_figure_of_another_record_is_refused() -> None:
    with pytest.raises(ValueError, match="no variant"):
        plots.writing(record.load(record.LADDER))


def test_without_a_gpu_the_command_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = CliRunner().invoke(app, ["strips", "--record"])
    assert result.exit_code == 1
    assert "strips needs a GPU" in result.output
