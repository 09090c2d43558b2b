"""k07 with something changed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import gpu, nvcc
from typer.testing import CliRunner

from asymconv import ablations, build, measure, plots, record
from asymconv.ablations import ABLATIONS, Ablation
from asymconv.check import check
from asymconv.cli import app
from asymconv.kernels import get_rung, k07_hopper_ring, k08_hopper_split
from asymconv.problem import CONTRACT

SMALL = CONTRACT.with_(batch=1, height=9, width=256)
EDITED = [a for a in ABLATIONS if a.edits]


def name_of(ablation: Ablation) -> str:
    return ablation.name


def test_every_edit_changes_what_nvcc_sees() -> None:
    texts = [(a.rung().source_hash, tuple(sorted(a.defines.items()))) for a in ABLATIONS]
    texts.append((get_rung("k07").source_hash, ()))
    assert len(set(texts)) == len(texts)
    assert len({a.name for a in ABLATIONS}) == len(ABLATIONS)


def test_an_edit_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="no 'a text that is not there'"):
        Ablation("x", "tried", (("a text that is not there", ""),)).rung()


@pytest.mark.parametrize("ablation", [a for a in EDITED if a.is_right and a.on_cpu], ids=name_of)
def test_outputs_are_right(ablation: Ablation) -> None:
    check(build.load(ablation.rung(), "cpu"), SMALL, "cpu")


@pytest.mark.parametrize("name", [a.name for a in ABLATIONS if not a.is_right])
def test_what_is_left_out_is_missed(name: str) -> None:
    (ablation,) = (a for a in ABLATIONS if a.name == name)
    with pytest.raises(AssertionError):
        check(build.load(ablation.rung(), "cpu", defines=ablation.defines), SMALL, "cpu")


@nvcc
@pytest.mark.parametrize("ablation", [a for a in EDITED if not a.on_cpu], ids=name_of)
def test_what_the_cpu_has_not_compiles(ablation: Ablation) -> None:
    assert build.compile_report(ablation.rung()).kernels


@gpu
def test_measuring_on_the_gpu() -> None:
    few = [a for a in ABLATIONS if a.name in ("no stores, no clock", "no clock", "clusters of two")]
    result = ablations.measure_ablations(few, rounds=1)
    assert result["no stores, no clock"].median < result["k07"].median
    assert result["nn.Conv2d, warm"].median > result["k07, warm"].median
    assert result["k08, after 2 s"].source_hash == get_rung("k08").source_hash
    assert result["no clock"].defines == {"PACE": 0}
    assert len(result.made["W and MHz of k07, after 2 s"].split(",")) == 2


def test_times_are_from_rest_and_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    rests, asked = [], []
    monkeypatch.setattr(ablations.time, "sleep", rests.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(
        measure, "time_repeats", lambda run, count: asked.append((run(), count)) or [1.0] * count
    )
    times = ablations.time_from_rest({"a": lambda: "a", "b": lambda: "b"}, rounds=2)
    assert [who for who, _ in asked] == ["a", "a", "b", "b", "b", "b", "a", "a"]
    assert rests == [ablations._REST_S] * 4
    assert {name: len(t) for name, t in times.items()} == {
        "a": 2 * ablations._FIRST,
        "a, warm": 2 * ablations._LAST,
        "b": 2 * ablations._FIRST,
        "b, warm": 2 * ablations._LAST,
    }


def test_the_gpus_power_is_read_while_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(ablations.time, "monotonic", iter(range(100)).__next__)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(record, "smi", lambda fields: f"{fields} after {len(ran)}")
    monkeypatch.setattr(measure, "time_repeats", lambda run, count: [1.0] * count)
    times, draws = ablations.time_for_long({"a": lambda: ran.append(0)})
    assert times == {"a, after 2 s": (1.0,) * ablations._LAST}
    assert draws == {"a": f"power.draw,clocks.sm after {ablations._HEATING + ablations._MEANWHILE}"}


@pytest.fixture
def sample() -> record.Record:
    """k07 in 1 ms, its ablations in 1.1, 1.2 ... ms, a floor of half a ms; warm, a tenth more."""
    made = {"gpu": "a GPU", "date": "today", "revision": "none"}
    made |= dict.fromkeys(("torch", "cuda", "cudnn"), "0")
    timings = [measure.Timing("memory floor", "peer", "", (0.5,))]
    for i, ablation in enumerate((Ablation("k07", "tried"), *ABLATIONS)):
        its = ablation.rung().source_hash
        for when, more in (("", 1.0), (ablations.WARM, 1.1)):
            ms = ((1 + 0.1 * i) * more,)
            timings.append(measure.Timing(ablation.name + when, "rung", "", ms, source_hash=its))
    return record.Record("a test", CONTRACT, made, tuple(timings), {})


def test_the_figure_says_what_was_found(sample: record.Record) -> None:
    text = plots.svg(plots.changes(sample))
    number = 1 + [a.name for a in ABLATIONS].index("no clock")
    assert f"By the clock k07 takes 1.00 ms, without it {1 + 0.1 * number:.2f} ms" in text
    assert "memory floor 0.500 ms" in text
    for ablation in ABLATIONS:
        assert ablation.name.replace("'", "&#x27;") in text or ablation.name in text


def test_the_figure_of_another_record_is_refused(sample: record.Record) -> None:
    with pytest.raises(KeyError, match="no products"):
        plots.changes(replace(sample, timings=sample.timings[:4]))


def test_a_record_of_other_texts_is_told(sample: record.Record) -> None:
    assert ablations.is_current(sample)
    other = replace(sample.timings[-1], source_hash="0")
    other_first = replace(sample.timings[-2], source_hash="0")
    assert not ablations.is_current(
        replace(sample, timings=(*sample.timings[:-2], other_first, other))
    )


def test_k07s_docstring_gives_the_records_numbers() -> None:
    found, ladder = record.load(ablations.RECORD), record.load()

    def ms(name: str, when: str = "") -> str:
        return f"{found[name + when].median:.2f}"

    assert f"{ladder['k07'].median:.2f}" == ms("k07")
    text = " ".join(k07_hopper_ring.__doc__.split())
    late = ablations.LONG
    for words in (
        f"{ms('k07')} ms from rest and in the ladder; the memory floor is {ms('memory floor')}",
        f"at the card's limit of power, {ms('k07', late)}. Without turns {ms('no turns')} and "
        f"{ms('no turns', late)}, without the clock {ms('no clock')} and {ms('no clock', late)}.",
    ):
        assert words in text, words


def test_k08s_docstring_gives_the_records_numbers() -> None:
    found, ladder = record.load(ablations.RECORD), record.load()
    text = " ".join(k08_hopper_split.__doc__.split())
    again = record.load(record.DATA_FOLDER / "ladder_again.json")
    series = [found[f"k08{ablations.LONG}"], ladder["k08"], again["k08"]]
    long = [f"{of.median:.1f}" for of in series]
    words = f"for a few calls, {min(long)} to {max(long)} in a series"
    assert f"{found['k08'].median:.1f} ms {words}" in text
    assert f"Error {ladder['k08'].error:.1e}: less than fp32's own".replace("e-0", "e-") in text
    assert ladder["k08"].error < ladder["nn.Conv2d, strict fp32"].error


@pytest.mark.skipif(not ablations.RECORD.exists(), reason="not measured yet: asymconv ablations")
def test_the_record_is_of_todays_texts() -> None:
    measured = record.load(ablations.RECORD)
    assert ablations.is_current(measured)
    assert set(plots.changes(measured).axes) != set()


def test_without_a_gpu_the_command_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = CliRunner().invoke(app, ["ablations", "--record"])
    assert result.exit_code == 1
    assert "ablations needs a GPU" in result.output
