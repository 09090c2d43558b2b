"""Models of rounding do what formats do, and the theory agrees with what is measured."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import gpu
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from asymconv import accuracy, plots
from asymconv.check import random_data, reference, tolerance
from asymconv.cli import app
from asymconv.kernels import get_rung
from asymconv.plots.errors import LINES
from asymconv.problem import ConvShape

SHAPE = ConvShape(1, 32, 6, 20, 8)
MODELS = {model.name: model for model in accuracy.MODELS}

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(value=floats)
def test_tf32_is_the_nearest_of_eleven_bits(value: float) -> None:
    """Of the two neighbours with 10 bits of fraction the nearer one; of equals the larger."""
    x = torch.tensor([value], dtype=torch.float32)
    y, low = accuracy.to_tf32(x), accuracy.cut_to_tf32(x)
    for rounded in (y, low):
        assert rounded.view(torch.int32).item() & 0x1FFF == 0
    assert abs(low.item()) <= abs(value)
    if not math.isfinite(y.item()):  # the largest floats round up to infinity
        assert abs(value) >= float(np.float32(2.0**128 - 2.0**117 / 2))
        return
    step = 2.0 ** (max(math.frexp(value)[1] - 1, -126) - 10)
    assert abs(y.item() - value) <= step / 2
    assert abs(low.item() - value) < step
    if abs(y.item() - value) == step / 2:
        assert abs(y.item()) > abs(value)


@given(value=floats)
def test_halves_hold_22_bits(value: float) -> None:
    x = torch.tensor([value % 1000.0], dtype=torch.float32)
    hi, lo = (half.double().item() for half in accuracy.halves(x))
    # below fp16's normal range both halves thin out: 2^-25 over the scale of lo
    bound = max(abs(x.item()) * 2.0**-22, 2.0**-25 / accuracy.LO_SCALE)
    assert abs(hi + lo / accuracy.LO_SCALE - x.double().item()) <= bound


@given(value=st.floats(allow_nan=False, allow_infinity=False, min_value=-1e38, max_value=1e38))
def test_sums_are_cut_off_toward_zero(value: float) -> None:
    cut = accuracy.cut_to_fp32(torch.tensor([value], dtype=torch.float64)).item()
    assert abs(cut) <= abs(value)
    beyond = np.nextafter(np.float32(cut), np.float32(math.copysign(math.inf, value)))
    assert abs(float(beyond)) > abs(value)


def test_infinities_and_nan_stay() -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan])
    for rounded in (accuracy.to_tf32(x), accuracy.cut_to_tf32(x)):
        assert torch.equal(rounded[:2], x[:2])
        assert rounded[2].isnan()


def test_scaling_rounds_nothing() -> None:
    x = torch.rand(100) * 1e-30
    y, scale = accuracy.scaled(x, 10)
    assert 2.0**10 <= y.abs().max() < 2.0**11
    assert math.frexp(scale)[0] == 0.5
    assert torch.equal(y / scale, x)
    assert accuracy.scaled(torch.zeros(3), 10)[1] == 1.0


@pytest.mark.parametrize("model", accuracy.MODELS, ids=lambda m: m.name)
def test_models_are_convolutions(model: accuracy.Model) -> None:
    """On whole numbers exact; on random ones within what the rounding of operands allows."""
    shape = SHAPE.with_(stride=(1, 2), padding=(2, 1), dilation=(1, 2), batch=2)
    x, weight = torch.randint(-4, 5, shape.input_shape), torch.randint(-4, 5, shape.weight_shape)
    x, weight = x.float(), weight.float()
    assert torch.equal(model(x, weight, shape), reference(x, weight, None, shape))
    x, weight, _ = random_data(shape, seed=1)
    bits = {"bf16": 8, "TF32, cut off": 10}.get(model.name, 11)
    sums = (shape.terms + 1) * 2.0**-23
    assert accuracy.worst(model(x, weight, shape), x, weight, shape) <= 2.02 * 2.0**-bits + sums
    if model.name in ("fp32", "hi + lo, chains of 32", "hi + lo, F(2, 3)"):
        assert accuracy.worst(model(x, weight, shape), x, weight, shape) <= sums


def test_rows_are_mixed_whatever_their_number() -> None:
    """F(2, 3) has rows in twos: the last one may be half of a pair."""
    model = MODELS["hi + lo, F(2, 3)"]
    for height in (3, 4, 7):
        shape = SHAPE.with_(height=height)
        x, weight = (
            torch.randint(-4, 5, shape.input_shape),
            torch.randint(-4, 5, shape.weight_shape),
        )
        x, weight = x.float(), weight.float()
        assert torch.equal(model(x, weight, shape), reference(x, weight, None, shape))
    for other in (SHAPE.with_(stride=(2, 1)), SHAPE.with_(kernel=(1, 3))):
        with pytest.raises(ValueError, match="3 rows of taps"):
            model(*random_data(other, seed=0)[:2], other)


def test_the_model_of_k08_errs_like_it() -> None:
    """On a small shape of the contract's 64 channels, whose number decides."""
    shape = ConvShape(1, 64, 6, 34, 16)
    x, weight, _ = random_data(shape, seed=accuracy.SEED)
    ref = reference(x, weight, None, shape)
    error = ((MODELS["hi + lo, F(2, 3)"](x, weight, shape) - ref).norm() / ref.norm()).item()
    assert 1 / 1.5 <= error / accuracy.load()["k08"].error <= 1.5


def test_models_have_one_group() -> None:
    shape = SHAPE.with_(groups=2)
    with pytest.raises(ValueError, match="one group"):
        MODELS["fp32"](*random_data(shape, seed=0)[:2], shape)


def test_theory_and_measurement_agree() -> None:
    """Operands on [0, 1) rounded to 11 bits: 2^-10 sqrt(3 / 84) (notebook 07)."""
    x = torch.rand(1_000_000, generator=torch.Generator().manual_seed(3))
    for rounded in (accuracy.to_tf32, accuracy.to_fp16):
        error = accuracy.rounding_error(x, rounded)
        assert error == pytest.approx(2.0**-10 * math.sqrt(3 / 84), rel=0.01)
    assert accuracy.rounding_error(x, accuracy.cut_to_tf32) == pytest.approx(2 * error, rel=0.01)


def test_errors_of_sums_grow_as_they_are_rounded() -> None:
    """To nearest with the root of the number of terms, cut off with the number itself."""
    grown = {}
    for name in ("fp32", "hi + lo, one chain", "TF32"):
        few, many = accuracy.grow(MODELS[name], (16, 256)).values()
        grown[name] = many / few
    assert 2.5 <= grown["fp32"] <= 7.0
    assert grown["hi + lo, one chain"] >= 10.0
    assert 0.5 <= grown["TF32"] <= 2.0


def test_worst_finds_what_is_wrong() -> None:
    x, weight, _ = random_data(SHAPE, seed=2)
    ref = reference(x, weight, None, SHAPE)
    assert accuracy.worst(ref, x, weight, SHAPE) == 0.0
    for value in (math.inf, math.nan):
        y = ref.clone()
        y[0, 0, 0, 0] = value
        assert accuracy.worst(y, x, weight, SHAPE) == math.inf
    y = ref.clone()
    y[0, 0, 0, 0] += 1.0
    assert 0.0 < accuracy.worst(y, x, weight, SHAPE) < math.inf


def test_histograms_count_every_output() -> None:
    ref = torch.ones(6, dtype=torch.float64)
    off = torch.tensor([0.0, 0.25, 0.3, -0.5, 1.0, 2.0], dtype=torch.float64)
    counts = accuracy.histogram(off, ref)
    assert sum(counts.values()) == 6
    assert (counts["-2"], counts["-1"], counts["1"]) == (2, 1, 1)


class TestPublished:
    """The record in the repository."""

    of = accuracy.load()

    def test_has_models_and_rungs_as_they_are_now(self) -> None:
        models = [e.name for e in self.of.errors if e.kind == "model"]
        now = [m.name for m in accuracy.MODELS]
        assert models == [name for name in now if name in self.of]
        for rung in accuracy.rungs_to_measure():
            recorded = next(e for e in self.of.errors if e.name == rung.name)
            assert recorded.source_hash == rung.source_hash, "run `asymconv accuracy --record`"
            assert recorded.error <= tolerance(rung.precision, self.of.shape.terms).norm

    def test_has_every_model(self) -> None:
        assert all(model.name in self.of for model in accuracy.MODELS)
        assert set(self.of.growth) == {m.name for m in accuracy.MODELS}

    def test_counts_every_output(self) -> None:
        for errors in self.of.errors:
            assert sum(errors.counts.values()) == self.of.shape.outputs

    def test_rungs_are_right_on_hard_inputs(self) -> None:
        for case, errors in self.of.ranges.items():
            for rung in accuracy.rungs_to_measure():
                allowed = tolerance(rung.precision, accuracy.RANGE_SHAPE.terms).element
                assert errors[rung.name] is not None, (case, rung.name)
                assert errors[rung.name] <= allowed, (case, rung.name)

    def test_is_read_as_written(self, tmp_path: Path) -> None:
        self.of.save(tmp_path / "a.json")
        assert accuracy.load(tmp_path / "a.json") == self.of
        with pytest.raises(FileNotFoundError, match="asymconv accuracy --record"):
            accuracy.load(tmp_path / "none.json")
        assert self.of["k08"].name == "k08_hopper_split"
        with pytest.raises(KeyError, match="k09"):
            self.of["k09"]

    def test_is_what_this_machine_computes(self) -> None:
        """Of one model and one rung; other machines may add up in another order."""
        x, weight, _ = random_data(self.of.shape, seed=accuracy.SEED)
        ref = reference(x, weight, None, self.of.shape)
        y = MODELS["TF32"](x, weight, self.of.shape)
        error = ((y - ref).norm() / ref.norm()).item()
        assert error == pytest.approx(self.of["TF32"].error, rel=1e-6)


def test_the_figures_say_what_the_record_has() -> None:
    of = accuracy.load()
    text = plots.svg(plots.histograms(of))
    ratio = max(of[n].error for n in ("k06", "k07")) / of["k08"].error
    assert f"errors are {plots.significant(ratio)} times smaller" in text
    assert of["k08"].where in text
    grown = {name: errors[2048] / errors[8] for name, errors in of.growth.items()}
    text = plots.svg(plots.growth(of))
    assert "Lines are models of rounding on a CPU" in text
    assert f"k08: measured on {of['k08'].where}" in text
    most = max(grown, key=grown.__getitem__)
    assert f"the error of “{most}” grows {plots.significant(grown[most])} times" in text


@pytest.mark.parametrize(
    ("last", "words"),
    [(4e-7, "grows 4.00 times"), (1.02e-7, "stays where it was"), (8e-8, "falls to 80%")],
)
def test_the_title_says_what_became_of_an_error(last: float, words: str) -> None:
    of = replace(accuracy.load(), growth={"a": {8: 1e-7, 16: last}, "b": {8: 1e-7, 16: 1.9 * last}})
    title = plots.growth(of).texts[0].get_text() + " " + plots.growth(of).texts[1].get_text()
    assert f"that of “a” {words}" in title


def test_a_younger_model_joins_the_figures() -> None:
    """Once the record has it: beside k08, and with a line of its own colour."""
    of, name = accuracy.load(), "hi + lo, F(2, 3)"
    others = tuple(e for e in of.errors if e.name != name)
    like = replace(of["hi + lo, chains of 32"], name=name)
    growth = {m.name: of.growth.get(m.name, of.growth["fp32"]) for m in accuracy.MODELS}
    younger = replace(of, errors=(*others, like), growth=growth)
    assert f">{name}<" in plots.svg(plots.histograms(younger))
    assert f">{name}<" not in plots.svg(plots.histograms(replace(of, errors=others)))
    assert f">{name}<" in plots.svg(plots.growth(younger))
    assert len(set(LINES)) == len(LINES) >= len(accuracy.MODELS)


def test_the_command_needs_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "SHAPE", SHAPE)
    monkeypatch.setattr(accuracy, "RANGE_SHAPE", SHAPE)
    monkeypatch.setattr(accuracy, "CHANNELS", (8,))
    monkeypatch.setattr(accuracy, "rungs_to_measure", lambda: (get_rung("k05"),))
    path = tmp_path / "a.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["accuracy", "--record", "--output", str(path)])
    assert result.exit_code == 0, result.output
    of = accuracy.load(path)
    assert of["k05"].where == "CPU backend"
    replace(of, made={**of.made, "device": "a GPU"}).save(path)
    result = CliRunner().invoke(app, ["accuracy", "--record", "--output", str(path)])
    assert result.exit_code == 1
    assert "would be lost" in result.output


@gpu
def test_on_a_gpu_pytorchs_own_are_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "CHANNELS", (8,))
    of = accuracy.measure("cuda")
    assert of["nn.Conv2d"].error == pytest.approx(of["TF32"].error, rel=0.02)
    assert of["nn.Conv2d, strict fp32"].error <= 1e-6
    assert of["k05"].where == of["nn.Conv2d"].where == torch.cuda.get_device_name()
