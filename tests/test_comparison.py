"""`asymconv layers` and `asymconv network`: compared first, then timed, and saved as they go.

Here on the CPU through emulated rungs; the times are replaced, since none of a CPU is a result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import gpu
from torch import nn
from typer.testing import CliRunner

from asymconv import comparison, dispatch, record, tables
from asymconv.cli import app
from asymconv.comparison import OURS, THEIRS, LayerRow, Layers, Network, Overhead
from asymconv.kernels import get_rung
from asymconv.problem import ConvShape
from asymconv.real_layers import RealLayer

MADE = {"gpu": "none", "torch": "2", "date": "today"}
SMALL = RealLayer("a test", "small", ConvShape(1, 8, 6, 12, 8, padding=1), tf32=False)
IMAGE = RealLayer("a test", "first", ConvShape(1, 3, 6, 12, 4))


def rows() -> tuple[LayerRow, ...]:
    times = {THEIRS: (2.0, 4.0, 3.0), OURS: (1.5, 1.0), "k06": (9.0,)}
    row = LayerRow(
        "a test", "small", SMALL.shape, False, True, "k07_hopper_ring", "fast", 1e-4, times
    )
    slower = {THEIRS: (1.0,), OURS: (1.25,)}
    return row, LayerRow("a test", "small", SMALL.shape, True, True, "", "why", 0.0, slower)


def layers_record() -> Layers:
    overheads = (Overhead("1×1", 20.0, 21.5),)
    return Layers(MADE, {"k07": "abc"}, {"k07": (12.0, 0.01)}, overheads, rows())


def network_record() -> Network:
    return Network(
        MADE,
        (8, 3, 512, 1024),
        {"first": "k07_hopper_ring: fast"},
        {THEIRS: 1e-3, OURS: 9e-4},
        5e-4,
        {THEIRS: (3.0, 2.5), OURS: (3.0, 2.5001)},
        {THEIRS: (20.0, 21.0), OURS: (15.0,)},
        {THEIRS: (60.0,), OURS: (50.0,)},
        {THEIRS: 10**10, OURS: 9 * 10**9},
    )


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Calls are made once in place of being timed; which were, turn by turn."""
    timed: list[list[str]] = []

    def once(calls: dict[str, Callable[[], object]], shape: ConvShape, **_: object) -> dict:
        timed.append(list(calls))
        for call in calls.values():
            call()
        return {name: (1.0 if name == THEIRS else 0.5,) for name in calls}

    monkeypatch.setattr(comparison, "time_calls", once)
    monkeypatch.setattr(record, "environment", lambda: dict(MADE))
    return timed


def test_records_round_trip(tmp_path: Path) -> None:
    layers_record().save(tmp_path / "layers.json")
    assert comparison.load_layers(tmp_path / "layers.json") == layers_record()
    network_record().save(tmp_path / "network.json")
    assert comparison.load_network(tmp_path / "network.json") == network_record()
    with pytest.raises(FileNotFoundError, match="asymconv layers --record"):
        comparison.load_layers(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match="asymconv network --record"):
        comparison.load_network(tmp_path / "none.json")


def test_tables_have_what_the_records_have(tmp_path: Path) -> None:
    assert [r.ratio for r in rows()] == [pytest.approx(3.0 / 1.25), pytest.approx(0.8)]
    ((layer, batch, kernel, forward, ratio, training, other),) = tables.layer_rows(layers_record())
    assert layer == "a test: small, 8×6×12 → 8, 3×3, padding 1"
    assert (batch, kernel, forward, ratio) == ("1", "k07", "3.00 → 1.25", "2.40")
    assert (training, other) == ("1.00 → 1.25", "0.80")


def test_notebook_09_shows_the_records_or_says_there_are_none(tmp_path: Path) -> None:
    show = pytest.importorskip("asymconv.show", reason="needs Jupyter", exc_type=ImportError)
    layers_record().save(tmp_path / "layers.json")
    network_record().save(tmp_path / "network.json")
    assert "| 3.00 → 1.25 | 2.40 |" in show.layers(tmp_path / "layers.json").data
    assert "<details>" not in show.layers(tmp_path / "layers.json").data, "a rung runs in each row"
    ours, theirs = show.layers().data.split("<details>")
    rows = list(tables.layer_rows(comparison.load_layers()))
    folded = [row for row in rows if row[2] == tables.PYTORCHS]
    assert all(f"| {' | '.join(row)} |" in (theirs if row in folded else ours) for row in rows)
    assert f"<summary>{len(folded)} rows" in theirs
    assert "| 1×1 | 20.0 | 21.5 |" in show.calls(tmp_path / "layers.json").data
    shown = show.network(tmp_path / "network.json").data
    for part in ("8×3×512×1024", "| loss, step 2 | 2.500000 | 2.500100 |", "| 10.00 | 9.00 |"):
        assert part in shown
    for shown in (show.layers, show.calls, show.network):
        assert "Not measured yet" in shown(tmp_path / "none.json").data


def test_a_layer_is_compared_in_both_directions(no_clock: list[list[str]], used: list[str]) -> None:
    with dispatch.always("k05"):
        forward, training = comparison.compare_layer(SMALL, 2, "cpu")
    assert no_clock == [[THEIRS, OURS]] * 2
    assert used == ["k05"] * 6, "against float64, on integers, and compared and timed, each way"
    for row, direction in ((forward, False), (training, True)):
        assert row.training is direction
        assert row.shape == SMALL.shape.with_(batch=2)
        assert (row.runs, row.tf32) == ("k05_register_tile", False)
        assert row.error <= 2e-6
        assert row.ratio == 2
    (first, _) = comparison.compare_layer(IMAGE, 1, "cpu")
    assert (first.runs, first.error) == ("", 0.0)
    assert first.reason == "rungs run on CUDA, this is on cpu"


def test_slow_rungs_are_timed_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def timed(calls: dict[str, object], shape: ConvShape, **_: object) -> dict:
        asked.append(list(calls))
        return {name: (float(call),) for name, call in calls.items()}

    monkeypatch.setattr(comparison, "time_calls", timed)
    times = comparison._time({THEIRS: 1, OURS: 1, "k06": 2, "k05": 4}, SMALL.shape)
    assert asked == [[THEIRS, OURS, "k06", "k05"], ["k06"], [THEIRS, OURS]]
    assert times == {THEIRS: (1.0,), OURS: (1.0,), "k06": (2.0,), "k05": (4.0,)}


@pytest.mark.parametrize("fault", ["output", "gradient"])
def test_a_wrong_result_is_not_timed(
    fault: str, no_clock: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = comparison._step if fault == "gradient" else comparison._forward

    def wrong(layer: nn.Module, *data: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *others, last = right(layer, *data)
        return *others, last + 1e-2 * isinstance(layer, comparison.Conv2d)

    monkeypatch.setattr(comparison, right.__name__, wrong)
    with pytest.raises(AssertionError, match="small, 1×8×6×12 → 8, 3×3, padding 1: off by"):
        comparison.compare_layer(SMALL, 1, "cpu")
    assert len(no_clock) == (1 if fault == "gradient" else 0)


def test_a_nan_is_wrong() -> None:
    nan = torch.full((2, 2), torch.nan)
    with pytest.raises(AssertionError, match="nan"):
        comparison._agree([nan], [torch.ones(2, 2)], 1.0, "here")


def test_first_use_is_timed_in_an_empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYMCONV_CACHE", "as it was")
    built, loaded = comparison.measure_first_use([get_rung("k01")], "cpu")["k01"]
    assert built > loaded > 0
    assert comparison.os.environ["ASYMCONV_CACHE"] == "as it was"
    monkeypatch.delenv("ASYMCONV_CACHE")
    comparison.measure_first_use([], "cpu")
    assert "ASYMCONV_CACHE" not in comparison.os.environ


def test_calls_cost_little_more_than_nn_conv2ds() -> None:
    """On a CPU, whose neighbours may be loud; what the GPU's path adds is the look-up below."""
    tiny = {what: case for what, case in comparison.OVERHEADS.items() if what.startswith("1×1")}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        turns = [comparison.measure_overheads("cpu", tiny) for _ in range(5)]
    finally:
        torch.set_num_threads(threads)
    assert [len(overheads) for overheads in turns] == [2] * 5
    assert min(max(o.ours - o.theirs for o in overheads) for overheads in turns) <= 15
    shape = (1, 64, 4, 4), (64, 64, 3, 3)
    calls = 2000
    start = comparison.time.perf_counter()
    for _ in range(calls):
        dispatch.hopeless(*shape, (1, 1), (1, 1), (1, 1), 1)
    assert (comparison.time.perf_counter() - start) / calls <= 15e-6


def test_forced_calls_are_measured_too() -> None:
    tiny = {"3×3, a rung forced": (ConvShape(1, 1, 4, 4, 1, 3), True)}
    entered = []

    @contextlib.contextmanager
    def within() -> Iterator[None]:
        entered.append(dispatch.forced() is not None)
        yield

    overheads = comparison.measure_overheads("cpu", tiny, calls=1, turns=1, within=within)
    assert entered == [True] * 8  # two layers, two turns, two directions
    assert [o.what.split(", ")[-1] for o in overheads] == ["without gradients", "with gradients"]


# --- a network -----------------------------------------------------------------------------------


class Net(nn.Module):
    """Two convolutions, one of which a rung takes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(x)))


def test_a_network_before_and_after(used: list[str]) -> None:
    result = comparison.compare_network(Net, (2, 3, 8, 16))
    assert result.difference == 0
    assert result.losses[OURS] == result.losses[THEIRS]
    assert len(set(result.losses[OURS])) == 5, "it learns"
    assert not result.forward and not result.made
    torch.backends.cudnn.allow_tf32 = False
    with dispatch.always("k05"):
        result = comparison.compare_network(Net, (2, 3, 8, 16), steps=2)
    assert result.explained["first"].startswith("k05_register_tile: ")
    assert result.explained["last"].startswith("PyTorch's own: k05: ")
    assert result.difference <= 1e-6
    assert used == ["k05"] * 4, "logits, explained, two steps; nn.Conv2d's not at all"
    assert len(result.losses[OURS]) == 2


def test_a_network_that_came_out_different_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(model: Net) -> Net:
        with torch.no_grad():
            model.first.weight.mul_(1.01)
        return model

    monkeypatch.setattr(comparison, "convert", spoiled)
    with pytest.raises(AssertionError, match="logits are off"):
        comparison.compare_network(Net, (1, 3, 8, 16))

    def slower_to_learn(model: Net) -> Net:
        model.first.weight.register_hook(lambda grad: 30 * grad)
        return model

    monkeypatch.setattr(comparison, "convert", slower_to_learn)
    with pytest.raises(AssertionError, match="losses"):
        comparison.compare_network(Net, (1, 3, 8, 16))


# --- the commands --------------------------------------------------------------------------------


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "250"})
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def pretended_gpu(no_clock: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are compared on the CPU, the rest is made up."""
    on_gpu = comparison.compare_layer
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(comparison, "compare_layer", lambda *a: on_gpu(*a, "cpu"))
    monkeypatch.setattr(comparison, "measure_first_use", lambda rungs: {"k07": (12.0, 0.5)})
    monkeypatch.setattr(
        comparison, "measure_overheads", lambda **how: [Overhead("1×1", 20.0, 21.5)] * (not how)
    )


def test_layers_prints_the_table_and_saves_as_it_goes(
    pretended_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asymconv.real_layers.LAYERS", (SMALL, IMAGE))
    path = tmp_path / "mine.json"
    output = run("layers", "--record", "--output", str(path))
    assert "k07: built in 12.0 s, loaded from the cache in 0.500 s" in output
    assert "1×1: 20.0 µs, ours 21.5 µs a call" in output
    assert "2.00" in output
    saved = comparison.load_layers(path)
    assert [(r.network, r.shape.batch, r.training) for r in saved.rows] == [
        (network, batch, training)
        for network in ("small", "first")
        for batch in (1, 8)
        for training in (False, True)
    ]
    assert saved.rungs == {n: get_rung(n).source_hash for n in comparison.CANDIDATES}

    path.unlink()
    assert "first" not in run("layers", "--only", "SMALL")
    assert not path.exists(), "without --record nothing is written"
    refused = CliRunner().invoke(app, ["layers", "--only", "nowhere"])
    assert refused.exit_code == 1 and "no layer has 'nowhere'" in refused.output

    def fails(layer: RealLayer, batch: int) -> list[LayerRow]:
        if layer is IMAGE:
            raise AssertionError("wrong")
        return list(rows())

    monkeypatch.setattr(comparison, "compare_layer", fails)
    cut = CliRunner().invoke(app, ["layers", "--record", "--output", str(path)])
    assert isinstance(cut.exception, AssertionError)
    assert len(comparison.load_layers(path).rows) == 4, "what was measured until then is kept"


def test_network_prints_and_saves(
    pretended_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def compared(make: type, shape: tuple[int, ...], device: str) -> Network:
        asked.append((make.__name__, shape, device))
        return network_record()

    monkeypatch.setattr(comparison, "compare_network", compared)
    monkeypatch.setattr(comparison, "notebook_network", lambda: Net)
    path = tmp_path / "network.json"
    output = run("network", "--batch", "4", "--record", "--output", str(path))
    assert asked == [("Net", (4, 3, 512, 1024), "cuda")]
    assert "first: k07_hopper_ring: fast" in output
    assert comparison.load_network(path) == network_record()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("command", ["layers", "network"])
def test_without_a_gpu_they_say_so(command: str) -> None:
    result = CliRunner().invoke(app, [command])
    assert result.exit_code == 1
    assert "asymconv info" in result.output


@gpu
def test_a_layer_on_this_gpu() -> None:
    wide = RealLayer("a test", "wide", ConvShape(1, 64, 256, 512, 64, padding=1))
    for row in comparison.compare_layer(wide, 4):
        assert row.median(THEIRS) > 0 and row.median(OURS) > 0
        assert row.error <= 8e-4


@gpu
def test_a_call_costs_its_host_15_microseconds_more_at_most() -> None:
    """Left to PyTorch or run by a rung, without and with gradients; of a few turns the quietest."""
    turns = [comparison.measure_overheads() for _ in range(3)]
    for calls in zip(*turns, strict=True):
        best = min(calls, key=lambda call: call.ours - call.theirs)
        assert best.ours - best.theirs <= 15, best


@gpu
def test_a_network_on_this_gpu() -> None:
    result = comparison.compare_network(Net, (2, 3, 256, 512), "cuda")
    assert set(result.forward) == set(result.training) == set(result.peak_bytes) == {THEIRS, OURS}
    assert min(result.peak_bytes.values()) > 0
