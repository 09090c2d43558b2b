"""The command line, as a person types it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from asymconv import (
    ablations,
    accuracy,
    asymmetry,
    comparison,
    machine,
    profiler,
    record,
    retake,
    strips,
    study,
)
from asymconv.cli import app
from asymconv.kernels import RUNGS
from asymconv.measure import ALL_PEERS, COMPILED, PEERS
from asymconv.problem import ConvShape

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


def test_commands_that_mend_are_shown_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """rich takes what stands in brackets for a style, and drops it."""
    part = machine.Part("nvcc", False, "missing", "pip install 'asymconv[cuda]'")
    monkeypatch.setattr(machine, "survey", lambda: [part])
    monkeypatch.setattr(machine, "summary", lambda: "")
    assert "'asymconv[cuda]'" in runner.invoke(app, ["info"], env={"COLUMNS": "200"}).output

    def fail(*args: object, **more: object) -> None:
        raise study.StudyError("pip install 'asymconv[study]'")

    monkeypatch.setattr(study, "run", fail)
    assert "'asymconv[study]'" in runner.invoke(app, ["study"]).output


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@no_gpu
def test_bench_without_a_gpu_says_so() -> None:
    result = runner.invoke(app, ["bench"])
    assert result.exit_code == 0
    assert "asymconv info" in result.output
    result = runner.invoke(app, ["bench", "--record"])
    assert result.exit_code == 1
    assert "asymconv info" in result.output


LAYER = ["--shape", "64,32,128,256", "--out-channels", "48", "--stride", "2,1", "--bias"]


@no_gpu
def test_without_a_gpu_bench_says_what_is_known_of_a_layer() -> None:
    result = runner.invoke(app, ["bench", *LAYER], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    shape = ConvShape(64, 32, 128, 256, 48, stride=(2, 1), bias=True)
    assert str(shape) in result.output
    assert f"{shape.flops / 1e9:.4g} GFLOP" in result.output
    published = record.load(record.LADDER)
    ms = shape.flops / published["matmul fp32"].tflops / 1e9
    assert f"all operations in fp32        │ {record.significant(ms):>8} │" in result.output
    flowing = " ".join(result.output.replace("│", " ").split())  # however wide the terminal is
    for rung in RUNGS:
        assert f"{rung.name} {rung.refuses(shape) or 'yes'}" in flowing
    assert "ModelNew on an H100, TF32 allowed: PyTorch's own convolution" in result.output
    assert "Not timed: no GPU" in result.output
    result = runner.invoke(app, ["bench"], env={"COLUMNS": "200"})
    assert "ModelNew on an H100, TF32 allowed: k07" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "1,2,3"], "not four whole numbers"),
        (["--shape", "1,2,x,4"], "not four whole numbers"),
        (["--shape", "0,2,3,4"], "below 1"),
        (["--shape", "1,2,3,4"], "--out-channels"),
        (["--shape", "1,2,3,4", "--out-channels", "-4"], "positive"),
        (["--shape", "1,2,3,4", "--out-channels", "4", "--kernel", "5"], "larger than the padded"),
        (["--shape", "1,2,9,9", "--out-channels", "3", "--groups", "2"], "divisible by groups"),
        (["--shape", "1,2,9,9", "--out-channels", "3", "--kernel", "1,2,3"], "or two"),
        (["--shape", "1,2,9,9", "--out-channels", "3", "--stride", "0"], "positive"),
        (["--shape", "1,2,9,9", "--out-channels", "3", "--record"], "--output"),
        (["--stride", "2"], "--shape"),
    ],
    ids=" ".join,
)
def test_bad_layers_are_refused(arguments: list[str], message: str) -> None:
    result = runner.invoke(app, ["bench", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert message in result.output


def test_figures_writes_them(tmp_path: Path) -> None:
    result = runner.invoke(app, ["figures", "--folder", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in tmp_path.glob("*.svg"))


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The published record's timings in place of a GPU's; notes rungs and further peers."""
    published = record.load(record.LADDER)
    asked: list[str] = []

    def measured(shape, rungs, peers):
        asked.extend(r.number for r in rungs)
        asked.extend(p.name for p in peers if p not in PEERS)
        names = {r.name for r in rungs}
        kept = [t for t in published.timings if t.kind == "peer" or t.name in names]
        sizes = {"flops": shape.flops, "bytes": shape.least_bytes}
        return [dataclasses.replace(t, **sizes) for t in kept], {"k99_none": "a reason"}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
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
    assert pretended_gpu == ["k01", "k03", *(p.name for p in ALL_PEERS if p not in PEERS)]
    assert "k03_coalesced" in result.output
    assert "k02" not in result.output
    assert "k99_none is not in the table: a reason" in result.output
    assert [t.name for t in record.load(path).of_kind("rung")] == [
        "k01_block_per_output",
        "k03_coalesced",
    ]


def test_bench_of_a_layer_prints_floors_and_draws_the_roofline(
    pretended_gpu: list[str], tmp_path: Path
) -> None:
    drawn = tmp_path / "drawn" / "mine.svg"
    arguments = ["--shape", "8,64,256,512", "--out-channels", "64", "--roofline", str(drawn)]
    result = runner.invoke(app, ["bench", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    peers = [p.name for p in ALL_PEERS if p not in (*PEERS, *COMPILED)]
    assert pretended_gpu == [*(rung.number for rung in RUNGS), *peers]
    shape = ConvShape(8, 64, 256, 512, 64)
    assert str(shape) in result.output
    assert "another layer" in result.output
    assert "ladder.json" not in result.output
    ms = shape.flops / record.load(record.LADDER)["matmul tf32"].tflops / 1e9
    assert f"all operations in tf32        │ {record.significant(ms):>8} │" in result.output
    assert "TF32 allowed: k07_hopper_ring" in result.output
    assert str(shape) in drawn.read_text()


def test_bench_says_that_there_is_nothing_to_compare_with(
    pretended_gpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: object) -> None:
        raise RuntimeError("nn.Conv2d does not run: not enough device memory")

    monkeypatch.setattr(record, "check_and_time", failing)
    result = runner.invoke(app, ["bench", "--shape", "1,2,9,9", "--out-channels", "3"])
    assert result.exit_code == 1
    assert "not enough device memory" in result.output


def test_bench_says_what_a_wrong_kernel_did(
    pretended_gpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: object) -> None:
        raise AssertionError("k03: 7 elements are not exact")

    monkeypatch.setattr(record, "check_and_time", wrong)
    result = runner.invoke(app, ["bench", "--shape", "1,2,9,9", "--out-channels", "3"])
    assert result.exit_code == 1
    assert "7 elements are not exact" in result.output


def test_an_unknown_rung_is_refused(pretended_gpu: list[str]) -> None:
    result = runner.invoke(app, ["bench", "--rungs", "k77"])
    assert result.exit_code == 1
    assert "no rung 'k77'" in result.output


@pytest.mark.parametrize(
    "command", [["bench", "--rungs", "k07"], ["sweep", "--rungs", "k03"], ["layers", "--only", "U"]]
)
def test_a_part_does_not_take_the_place_of_a_whole_record(
    pretended_gpu: list[str], command: list[str]
) -> None:
    before = {p: p.read_bytes() for p in record.DATA_FOLDER.glob("*.json")}
    result = runner.invoke(app, [*command, "--record"])
    assert result.exit_code == 2
    assert "--output" in result.output
    assert before == {p: p.read_bytes() for p in record.DATA_FOLDER.glob("*.json")}


@pytest.mark.parametrize("text", ["k04", "k04:", "k04:TILE_H", "k04:TILE_H=x"])
def test_a_variant_without_its_constants_is_refused(pretended_gpu: list[str], text: str) -> None:
    result = runner.invoke(app, ["profile", "--also", text])
    assert result.exit_code == 2
    assert "k04:TILE_H=4,TILE_W=64" in result.output


def test_python_runs_the_package_as_the_command() -> None:
    command = [sys.executable, "-m", "asymconv", "--help"]
    assert "bench" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_study_shows_what_it_measured(
    pretended_gpu: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(record.LADDER_VARIABLE, str(record.LADDER))  # put back afterwards
    study.measure_live(tmp_path, Console())
    assert record.ladder_path() == (tmp_path / "data" / "ladder.json").resolve()
    assert record.load()["k03"].median == record.load(record.LADDER)["k03"].median


def test_every_command_that_records_is_taken_anew() -> None:
    click = typer.main.get_command(app)
    with_record = {
        name: command
        for name, command in click.commands.items()
        if any("--record" in option.opts for option in command.params)
    }
    assert set(with_record) == set(retake.FILES)
    paths = (record.LADDER, record.VARIANTS, strips.RECORD, profiler.COUNTERS)
    paths += (comparison.LAYERS_RECORD, comparison.NETWORK_RECORD, accuracy.RECORD)
    paths += (asymmetry.RECORD, ablations.RECORD)
    assert {path.name for path in paths} == set(retake.FILES.values())


def test_one_record_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran, lines = [], []

    def run(command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
        ran.append(command[3:])
        if "sweep" in command:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, int("layers" in command))

    monkeypatch.setattr(retake.subprocess, "run", run)
    failed = retake.retake(tmp_path, ["bench", "sweep", "layers"], limit=5, say=lines.append)
    assert failed == ["sweep", "layers"]
    assert ran[0] == ["bench", "--record", "--output", str(tmp_path / "ladder.json")]
    assert len(ran) == 3
    assert any("more than 5 s" in line for line in lines)
    with pytest.raises(KeyError, match="'figures' writes no record"):
        retake.retake(tmp_path, ["figures"])


@no_gpu
def test_records_need_a_gpu() -> None:
    result = runner.invoke(app, ["record"])
    assert result.exit_code == 1
    assert "record needs a GPU" in result.output
