"""The command line, as a person types it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from asymconv import machine, record, study
from asymconv.cli import app

runner = CliRunner()


def test_help_names_the_commands() -> None:
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("study", "bench", "info", "figures"):
        assert command in result.output


def test_info_says_what_is_missing_and_what_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    result = runner.invoke(app, ["info"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for part in ("torch", "g++", "nvcc", "ninja", "GPU"):
        assert part in result.output
    monkeypatch.setenv("CXX", "no-such-compiler")
    missing = {p.what: p for p in machine.survey()}["g++"]
    assert not missing.there
    assert "apt-get install g++" in missing.mend


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_bench_without_a_gpu_says_so() -> None:
    result = runner.invoke(app, ["bench"])
    assert result.exit_code == 1
    assert "asymconv info" in result.output


def test_figures_writes_them(tmp_path: Path) -> None:
    result = runner.invoke(app, ["figures", "--folder", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in tmp_path.glob("*.svg"))


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The published record's timings in place of a GPU's; the rungs asked for are noted."""
    published = record.load(record.LADDER)
    asked: list[str] = []

    def measured(shape, rungs):
        asked.extend(r.number for r in rungs)
        names = {r.name for r in rungs}
        kept = [t for t in published.timings if t.kind == "peer" or t.name in names]
        return kept, {"k99_none": "a reason"}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(record, "check_and_time", measured)
    monkeypatch.setattr(record, "time_ceilings", lambda shape: published.of_kind("ceiling"))
    monkeypatch.setattr(record, "environment", lambda: dict(published.made))
    return asked


def test_bench_prints_the_ladder_and_writes_the_record(
    pretended_gpu: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "mine.json"
    result = runner.invoke(app, ["bench", "--rungs", "k01, k03", "--record", "--output", str(path)])
    assert result.exit_code == 0, result.output
    assert pretended_gpu == ["k01", "k03"]
    assert "k03_coalesced" in result.output
    assert "k02" not in result.output
    assert "k99_none is not in the table: a reason" in result.output
    assert [t.name for t in record.load(path).of_kind("rung")] == [
        "k01_block_per_output",
        "k03_coalesced",
    ]


def test_an_unknown_rung_is_refused(pretended_gpu: list[str]) -> None:
    result = runner.invoke(app, ["bench", "--rungs", "k77"])
    assert result.exit_code == 1
    assert "no rung 'k77'" in result.output


def test_the_study_shows_what_it_measured(
    pretended_gpu: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(record.LADDER_VARIABLE, str(record.LADDER))  # put back afterwards
    study.measure_live(tmp_path, Console())
    assert record.ladder_path() == (tmp_path / "data" / "ladder.json").resolve()
    assert record.load()["k03"].median == record.load(record.LADDER)["k03"].median
