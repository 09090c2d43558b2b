"""The command line, as a person types it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from asymconv import machine
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
