"""Experiments on shapes: the data, the runner on a pretended GPU, the record, and predictions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import samples
import torch
from conftest import gpu
from samples import MADE, measured_sample
from typer.testing import CliRunner

from asymconv import asymmetry, build, check, hints, measure, predictions, profiler, record, tables
from asymconv.asymmetry import SERIES, SLOW, SLOW_FILTERS, Series, get_series
from asymconv.cli import app
from asymconv.kernels import RUNGS, Rung, get_rung
from asymconv.measure import ALL_PEERS, PEERS, Peer, Timing
from asymconv.problem import CONTRACT, ConvShape

BASE = ConvShape(2, 4, 6, 12, 8)
SMALL = Series(
    "small",
    "A question?",
    "pixels",
    (BASE.with_(height=12, width=6), BASE),
    lambda shape: f"{shape.height}×{shape.width}",
    base=BASE,
    peers=ALL_PEERS[:4],
)
FEW = [get_rung(number) for number in ("k01", "k03", "k04")]


# --- the experiments as data ---------------------------------------------------------------------


@pytest.mark.parametrize("series", SERIES, ids=lambda s: s.name)
def test_series_are_what_they_say(series: Series) -> None:
    assert series.base in series.shapes
    assert len(set(series.shapes)) == len(series.shapes)
    names = [series.named(shape) for shape in series.shapes]
    assert len(set(names)) == len(names)
    assert [series.index(shape.with_(out_channels=4)) for shape in series.shapes] == list(
        range(len(names))
    )
    for rung, defines in series.jobs():
        assert set(defines) <= set(rung.constants(defines))  # KeyError if it has no such one
        for shape in series.shapes:
            assert rung.refuses(shape, defines) is None
    assert 0 < asymmetry.estimate(series) < (400 if series.name == "compiled" else 120)


def test_the_names_are_different_and_an_unknown_one_is_refused() -> None:
    assert len({s.name for s in SERIES}) == len(SERIES)
    with pytest.raises(KeyError, match="no series 'x'"):
        get_series("x")


def test_aspects_are_at_equal_work() -> None:
    series = get_series("aspect")
    for shape in series.shapes:
        assert shape.height * shape.width == pytest.approx(512 * 1024, rel=3e-4)
        assert shape.flops == pytest.approx(CONTRACT.flops, rel=0.027)
        assert predictions.aligned_rows(shape.out_width) == 0.25
    assert {p.name for p in series.peers} | {p.name for p in measure.COMPILED} == {
        p.name for p in ALL_PEERS
    }
    assert len(series.jobs()) == len(RUNGS)


def test_other_series_vary_one_thing() -> None:
    for shape in get_series("strips").shapes:
        assert shape.flops == pytest.approx(CONTRACT.flops, rel=4e-3)
    pitches = [shape.out_width for shape in get_series("pitch").shapes]
    assert pitches == [1024, 1024, 1023, 1022, 1021]
    batches = get_series("batch").shapes
    assert [s.batch for s in batches] == [1, 2, 4, 8, 16, 32, 64]
    assert batches[-1].outputs > 2**31, "offsets beyond 32 bits are among them"
    unrolled, loops = get_series("unrolling").shapes
    assert loops.flops == pytest.approx(unrolled.flops, rel=5e-3)
    tiles = [d for r, d in get_series("orientation").jobs() if r.number == "k04"]
    own = get_rung("k04").defines
    assert {(own | d)["TILE_H"] * (own | d)["TILE_W"] for d in tiles} == {256}


# --- the runner, on a GPU that is not there ------------------------------------------------------


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU whose clock says 1 ms, 2 ms, ... for the methods of a row; notes what ran."""
    ran: list[str] = []

    def on_cpu(jobs: list) -> tuple[list[build.Kernel], dict[str, str]]:
        return [build.load(rung, "cpu", defines=defines) for rung, defines in jobs], {}

    def turns(runners: list, flush: object, rounds: int, budget: float, warm: float) -> None:
        for number, runner in enumerate(runners, 1):
            assert runner.run().isfinite().all()
            runner.times = [float(number)] * rounds
            ran.append(runner.name)

    def floor(shape: ConvShape, x: torch.Tensor, weight: torch.Tensor) -> measure._Runner:
        return measure._Runner("memory floor", "ceiling", lambda: x, bytes=shape.least_bytes)

    checked = measure.check_methods
    monkeypatch.setattr(asymmetry, "build_rungs", on_cpu)
    monkeypatch.setattr(asymmetry, "check_methods", lambda m, s: checked(m, s, "cpu"))
    monkeypatch.setattr(measure, "random_data", lambda shape, device: check.random_data(shape))
    monkeypatch.setattr(measure, "_take_turns", turns)
    monkeypatch.setattr(measure, "_flush_buffer", lambda shape: None)
    monkeypatch.setattr(measure, "_floor_runner", floor)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**9, 10**9))
    monkeypatch.setattr(record, "environment", lambda: dict(MADE))
    return ran


def test_every_method_is_checked_and_timed_on_every_shape(
    pretended: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    rows = [row for _, row in asymmetry.measure([SMALL], FEW, path)]
    assert [row.shape.out_channels for row in rows] == [8, SLOW_FILTERS] * 2
    peers = [peer.name for peer in SMALL.peers]
    many = ["k03_coalesced", "k04_shared_tile", *peers, "memory floor"]
    assert pretended == [*many, "k01_block_per_output", "memory floor"] * 2
    for row in rows:
        assert not row.left_out
        assert all(t.error < 1e-6 for t in row.timings if t.kind != "ceiling")

    loaded = asymmetry.load(path)
    assert loaded["small"].rows == tuple(rows)
    costs = loaded["small"].costs(SMALL)
    assert costs["k03"] == pytest.approx([1e6 / (2 * 10 * 4 * 8), 1e6 / (2 * 4 * 10 * 8)])
    assert costs["k01"] == pytest.approx([1e6 / (2 * 40 * 4)] * 2), "per output, of its filters"
    assert costs["memory floor"][0] == pytest.approx(7 * 1e6 / (80 * 8))
    assert loaded["small"].relative(SMALL)["k04"] == [1.0, 1.0]


def test_a_cut_off_run_loses_nothing_and_other_series_stay(
    pretended: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    other = dataclasses.replace(SMALL, name="other", slow=False)
    for _ in asymmetry.measure([other], FEW, path):
        pass
    run = asymmetry.measure([SMALL], FEW, path)
    next(run)
    run.close()
    loaded = asymmetry.load(path)
    assert len(loaded["other"].rows) == 2
    assert len(loaded["small"].rows) == 1
    ratios = loaded["small"].relative(SMALL)
    assert ratios == {}, "its base was not reached"


def test_a_budget_begins_nothing_that_would_end_later(pretended: list[str], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert list(asymmetry.measure([SMALL], FEW, path, budget=0.0)) == []
    assert not path.exists()


def test_what_does_not_fit_is_left_out_with_the_reason(
    pretended: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10, 10))
    _, row = next(asymmetry.measure([SMALL], FEW))
    assert row.timings == ()
    assert "GB of device memory" in row.left_out["k03_coalesced"]
    assert pretended == []


def test_peers_give_way_where_memory_is_short(
    pretended: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed, room = measure.time_methods, 0

    def crowded(methods: list, *args: object, **more: object) -> list[Timing]:
        if sum(isinstance(method, Peer) for method in methods) > room:
            raise torch.OutOfMemoryError("no")
        return timed(methods, *args, **more)

    monkeypatch.setattr(measure, "time_methods", crowded)
    series = dataclasses.replace(SMALL, peers=PEERS[:2])
    rungs = ["k03_coalesced", "k04_shared_tile"]
    _, row = next(asymmetry.measure([series], FEW))
    assert [t.name for t in row.timings] == [*rungs, "memory floor"]
    assert set(row.left_out) == {peer.name for peer in PEERS[:2]}
    room = 1
    _, row = next(asymmetry.measure([series], FEW))
    assert [t.name for t in row.timings] == [*rungs, PEERS[0].name, "memory floor"]
    assert set(row.left_out) == {PEERS[1].name}
    room = -1
    with pytest.raises(torch.OutOfMemoryError):
        next(asymmetry.measure([series], FEW))


def test_variants_keep_their_constants(pretended: list[str]) -> None:
    tiles = ({"TILE_H": 8, "TILE_W": 32}, {"TILE_H": 32, "TILE_W": 8})
    series = dataclasses.replace(
        SMALL, peers=PEERS[:1], variants=lambda rung: tiles if rung.number == "k04" else ()
    )
    rows = tuple(row for _, row in asymmetry.measure([series], FEW))
    measured = asymmetry.Measured(MADE, rows)
    names = {"k04", "k04 TILE_H=32 TILE_W=8", "nn.Conv2d", "memory floor"}  # 8 × 32 is its own
    assert set(measured.costs(series)) == names


def test_the_command_measures_and_records(
    pretended: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asymmetry, "SERIES", (SMALL,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(asymmetry.measure, "__defaults__", ((SMALL,), FEW, None, math.inf))
    path = tmp_path / "a.json"
    arguments = ["asymmetry", "--only", "small", "--record", "--output", str(path)]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "A question?" in result.output
    assert "k04" in result.output
    assert len(asymmetry.load(path)["small"].rows) == 4
    result = CliRunner().invoke(app, ["asymmetry", "--only", "nothing"])
    assert result.exit_code == 1
    assert "no series 'nothing'" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_command_says_what_it_would_do() -> None:
    result = CliRunner().invoke(app, ["asymmetry"], env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert "64×8192" in result.output
    assert "needs a GPU" in result.output


@gpu
def test_a_row_on_this_gpu() -> None:
    rungs = [rung for rung in FEW if rung.runs_on(torch.cuda.get_device_capability())]
    kernels, left_out = measure.build_rungs([(rung, {}) for rung in rungs])
    assert not left_out
    row = asymmetry.measure_row(BASE, [*kernels, *ALL_PEERS])
    assert row.timings[-1].name == "memory floor"
    assert {t.name for t in row.timings} | set(row.left_out) == {
        "memory floor",
        *(rung.name for rung in rungs),
        *(peer.name for peer in ALL_PEERS),
    }


# --- the record ----------------------------------------------------------------------------------


def test_missing_and_foreign_records_say_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="asymconv asymmetry --record"):
        asymmetry.load(tmp_path / "none.json")
    (tmp_path / "old.json").write_text('{"format": 0}')
    with pytest.raises(ValueError, match="format 0"):
        asymmetry.load(tmp_path / "old.json")


def test_a_table_says_ms_and_ratio() -> None:
    series = get_series("aspect")
    rows = {row[0]: row[1:] for row in tables.asymmetry_rows(series, measured_sample(series))}
    assert rows["k03"][2].endswith("(1.00)")
    assert len(rows["nn.Conv2d"]) == len(tables.asymmetry_headers(series)) - 1


@pytest.mark.skipif(not asymmetry.RECORD.exists(), reason="no GPU has measured it yet")
def test_the_published_record_is_of_the_rungs_as_they_are_now() -> None:
    hashes = {rung.name: rung.source_hash for rung in RUNGS}
    for name, measured in asymmetry.load().items():
        series = get_series(name)
        for row in measured.rows:
            series.index(row.shape)
            for timing in row.timings:
                if timing.kind == "rung":
                    assert timing.source_hash == hashes[timing.name], f"{timing.name}, {name}"


# --- predictions ---------------------------------------------------------------------------------


def test_a_tiles_halo_by_hand() -> None:
    assert predictions.halo((8, 32)) == 10 * 34 / 256
    assert predictions.halo((1, 256)) == pytest.approx(3.02, abs=0.005)
    assert predictions.covered(CONTRACT, (1, 128)) == 1024 / 1022
    assert predictions.covered(CONTRACT.with_(width=66), (8, 128)) == 2 * 512 / 510


def test_sectors_by_hand_are_those_the_gpu_counted() -> None:
    """k03's, on the contract's shape: to the digit."""
    counted = profiler.load()["k03"]
    assert predictions.store_requests(CONTRACT) == counted["global_store_requests"]
    assert predictions.store_sectors(CONTRACT) == counted["global_store_sectors"]
    weights = predictions.store_requests(CONTRACT) * CONTRACT.terms  # a sector each
    assert predictions.load_sectors(CONTRACT) + weights == counted["global_load_sectors"]


@pytest.mark.parametrize("width", [10, 34, 63, 66, 67, 72, 73])
def test_sectors_by_hand_are_those_the_cpu_counts(width: int) -> None:
    shape = ConvShape(1, 2, 5, width, 3)
    rung: Rung = get_rung("k03")
    lines = build.load(rung, "cpu-traced").trace(*check.random_data(shape, seed=0), shape)
    stores = [line for line in lines if (line.space, line.op) == ("global", "store")]
    loads = [line for line in lines if (line.space, line.op) == ("global", "load")]
    assert sum(line.requests for line in stores) == predictions.store_requests(shape)
    assert sum(line.sectors for line in stores) == predictions.store_sectors(shape)
    weights = predictions.store_requests(shape) * shape.terms
    assert sum(line.sectors for line in loads) - weights == predictions.load_sectors(shape)


def test_sectors_are_not_predicted_for_other_convolutions() -> None:
    with pytest.raises(ValueError, match="without padding"):
        predictions.load_sectors(CONTRACT.with_(padding=(1, 1)))


def test_k07s_plan_is_the_kernels() -> None:
    plan = predictions.strips(CONTRACT)
    assert (plan.strips, plan.parts, plan.rows, plan.items, plan.turns) == (8, 2, 255, 128, 1)
    assert plan.cost == pytest.approx(261 * 132 * 128 / (8 * 510 * 1022))
    for line in (  # of `plan_for`, which the function above repeats
        f"constexpr int START = {predictions.START_ROWS};",
        f"constexpr int MOST_ROWS = {predictions.MOST_ROWS};",
        "parts <= max(fewest, min(c.OH, 64)); ++parts",
        "(items + blocks - 1) / blocks * (rows + START);",
        "const int at_once = max(1, multiprocessors / blocks_k);",
    ):
        assert line in get_rung("k07").source


def test_k07s_clock_is_the_kernels() -> None:
    rows = 8 * (64 * 514 * 1024 + 128 * 510 * 1022)
    lead = 1000 + 36 * 64 * 128 / 21
    assert predictions.clocked_ms(CONTRACT) == pytest.approx(
        (4 * rows / (0.78 * predictions.H100_PEAK) + lead) / 1e6
    )
    assert pytest.approx(2e-6 * 2619000 * (5120 / 8)) == predictions.H100_PEAK
    for line in (  # of `paced` and `memory_peak`, which the function above repeats
        "const double rows_in = c.OH + (R - 1.0) * plan.parts;",
        "4.0 * c.N * (c.C * rows_in * c.W + (double)c.K * c.OH * c.OW);",
        "const double rate = PACE / 100.0 * memory_peak(device);",
        "bytes / rate / rounds / (plan.rows + R - 1)",
        "plan.lead = 1000 + 4 * TAPS * c.C * min(c.K, BLOCK_K) / 21;",
        "2e-6f * (float)khz * (float)(bits / 8);",
    ):
        assert line in get_rung("k07").source, line


def test_a_batch_as_block_fills_its_warp() -> None:
    assert predictions.batch_wavefronts(1) == 2
    assert predictions.batch_wavefronts(8) == 9 / 8
    assert predictions.batch_wavefronts(64) == predictions.batch_wavefronts(32) == 33 / 32


def test_the_least_time_of_a_warps_work() -> None:
    odd = ConvShape(1, 2, 3, 37, 1)  # 35 outputs of 18 terms
    assert predictions.warp_terms(odd) == 2 * 18
    assert predictions.warp_terms(CONTRACT, lanes=8) == 4 * predictions.warp_terms(CONTRACT)
    made = {"gpu": "one", "multiprocessors": 100, "max_clock_mhz": 2000}
    assert predictions.bound_ms(2e11, made) == pytest.approx(1000)
    assert predictions.bound_ms(2e11, made, per_cycle=4) == pytest.approx(250)
    with pytest.raises(ValueError, match="clock of one was not known"):
        predictions.bound_ms(1, made | {"max_clock_mhz": 0})


def test_the_least_time_at_a_ceiling_goes_by_its_rate() -> None:
    moved = Timing("copy", "ceiling", "", (2.0,), bytes=100)
    assert predictions.floor_ms(50, moved) == 1
    done = Timing("matmul", "ceiling", "", (2.0,), flops=100)
    assert predictions.floor_ms(300, done) == 6
    with pytest.raises(ValueError, match="no rate"):
        predictions.floor_ms(1, Timing("nothing", "ceiling", "", (2.0,)))


def test_registers_are_given_in_eights() -> None:
    assert predictions.blocks_that_fit(80, 256) == 3
    assert predictions.blocks_that_fit(81, 256) == predictions.blocks_that_fit(88, 256) == 2
    assert predictions.blocks_that_fit(64, 256) == 4


# --- checks side by side, and peers --------------------------------------------------------------


def test_references_are_shared_and_images_repeat_oddly(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    reference = check.reference

    def counted(*args: object) -> torch.Tensor:
        made.append(1)
        return reference(*args)

    monkeypatch.setattr(check, "reference", counted)
    shape = BASE.with_(batch=8)
    fits = 4 * 20 * BASE.with_(batch=1).outputs  # but three is odd
    monkeypatch.setattr(check, "KEPT_BYTES", fits)
    monkeypatch.setattr(check.kept_images, "__defaults__", (fits,))
    expected = check.Expected(shape, seed=1)
    x = expected.random()[0]
    assert torch.equal(x[:3], x[3:6])
    assert torch.equal(x[:2], x[6:])
    assert not torch.equal(x[0], x[4])
    for method in (build.load(get_rung("k03"), "cpu"), PEERS[0]):
        check.check(method, shape, expected=expected)
    assert len(made) == 3 * 3
    with pytest.raises(ValueError, match="expected is of"):
        check.check(PEERS[0], BASE, expected=expected)


def test_references_are_kept_where_they_fit() -> None:
    image = 20 * BASE.with_(batch=1).outputs
    for batch, fit, kept in ((2, 2, 2), (8, 8, 8), (8, 7, 7), (8, 6, 5), (8, 2, 0), (1, 0, 0)):
        assert check.kept_images(BASE.with_(batch=batch), fit * image) == kept
    assert check.kept_images(CONTRACT) == 8
    assert check.kept_images(CONTRACT.with_(batch=64)) == 11
    assert check.kept_images(CONTRACT.with_(batch=1, height=2048, width=4096)) == 0
    assert check.check(PEERS[0], BASE.with_(batch=0)).elements == 0


def test_a_repeated_image_does_not_hide_a_wrong_one() -> None:
    class Wrong:
        key, precision = "wrong", "fp32"

        def __call__(self, x, weight, bias, shape, out=None):
            y = PEERS[0](x, weight, bias, shape)
            y[4] = y[0]  # as an offset that wraps would
            return y

    shape = BASE.with_(batch=8)
    expected = check.Expected(shape, seed=1)
    expected.images = 3
    with pytest.raises(AssertionError, match="off by"):
        check.check(Wrong(), shape, expected=expected)


@pytest.mark.parametrize(
    "peer", [p for p in ALL_PEERS if p not in measure.COMPILED], ids=lambda p: p.name
)
def test_peers_are_of_their_class(peer: Peer) -> None:
    result = check.check(peer, ConvShape(2, 64, 9, 20, 32, bias=True))
    if peer.precision == "fp16":  # which the CPU has, too
        assert 3e-4 < result.error < 5e-4
        assert peer.prepare(*check.random_data(BASE), BASE)().dtype == torch.float32
    else:
        assert result.error < 1e-6


def test_what_a_peer_prepares_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    converted: list[object] = []
    contiguous = torch.Tensor.contiguous

    def spy(self: torch.Tensor, **more: object) -> torch.Tensor:
        converted.append(more)
        return contiguous(self, **more)

    data = check.random_data(BASE, seed=0)
    want = PEERS[0](*data, BASE)
    monkeypatch.setattr(torch.Tensor, "contiguous", spy)
    before: Callable[[], torch.Tensor] = ALL_PEERS[3].prepare(*data, BASE)
    assert len(converted) == 2, "input and weights, once"
    y = before()
    assert len(converted) == 2
    assert y.is_contiguous(memory_format=torch.channels_last)
    within = ALL_PEERS[4].prepare(*data, BASE)
    assert len(converted) == 2
    z = within()
    assert len(converted) == 5
    assert z.is_contiguous()
    assert torch.allclose(y, want, atol=1e-5)
    assert torch.allclose(z, want, atol=1e-5)


def test_compiled_peers_are_compiled_before_they_are_timed() -> None:
    data = check.random_data(BASE, seed=0)
    peer = Peer("eager", "", "fp32", prepared=measure._compiled("default"))
    call = peer.prepare(*data, BASE)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.allclose(call(), PEERS[0](*data, BASE), atol=1e-5)


def test_a_failing_peer_does_not_cost_the_run() -> None:
    def no_compiler(*args: object) -> Callable[[], torch.Tensor]:
        raise RuntimeError("no triton here\nand more")

    def no_memory(*args: object) -> Callable[[], torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def wrong(x: torch.Tensor, *args: object) -> Callable[[], torch.Tensor]:
        return lambda: torch.zeros(BASE.output_shape)

    failing = {"compiled": no_compiler, "large": no_memory, "wrong": wrong}
    peers = [Peer(name, "", "fp32", prepared=made) for name, made in failing.items()]
    k03 = build.load(get_rung("k03"), "cpu")
    passed, checks, left_out = measure.check_methods([k03, *peers, PEERS[0]], BASE, "cpu")
    assert passed == [k03, PEERS[0]]
    assert [c.key for c in checks] == [k03.key, "nn.Conv2d"]
    assert left_out["compiled"] == "RuntimeError: no triton here"
    assert left_out["large"] == "not enough device memory"
    assert "off by" in left_out["wrong"]


def test_the_ladder_says_what_it_left_out(
    pretended: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_cpu(jobs: list) -> tuple[list[build.Kernel], dict[str, str]]:
        built = [build.load(rung, "cpu") for rung, _ in jobs if rung.number != "k04"]
        return built, {"k04_shared_tile": "no compiler"}

    checked = measure.check_methods
    monkeypatch.setattr(measure, "build_rungs", on_cpu)
    monkeypatch.setattr(measure, "check_methods", lambda m, s: checked(m, s, "cpu"))
    strided = BASE.with_(stride=(2, 2))
    rungs = [*FEW, get_rung("k05")]
    broken = Peer("broken", "", "fp32", prepared=lambda *args: None)
    timings, left_out = measure.check_and_time(strided, rungs, [*PEERS, broken])
    names = ["k01_block_per_output", "k03_coalesced", *(p.name for p in PEERS)]
    assert [t.name for t in timings] == names
    assert "stride" in left_out["k05_register_tile"]
    assert left_out["k04_shared_tile"] == "no compiler"
    assert left_out["broken"].startswith("TypeError")
    monkeypatch.setattr(measure, "PEERS", (broken,))
    with pytest.raises(RuntimeError, match="broken does not run: TypeError"):
        measure.check_and_time(strided, FEW, [broken])


def test_kernels_are_built_together_and_failures_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    together: list[str] = []

    def load_all(jobs: list) -> None:
        together.extend(rung.number for rung, _ in jobs)
        raise build.BuildError("one of them")

    def load(rung: Rung, backend: str, *, defines: dict[str, int]) -> object:
        if rung.number == "k03":
            raise build.BuildError("no nvcc")
        return rung.number, defines

    monkeypatch.setattr(build, "load_all", load_all)
    monkeypatch.setattr(build, "load", load)
    built, left_out = measure.build_rungs([(rung, {}) for rung in FEW])
    assert together == ["k01", "k03", "k04"]
    assert built == [("k01", {}), ("k04", {})]
    assert left_out == {"k03_coalesced": "no nvcc"}


def test_a_wrong_rung_does(monkeypatch: pytest.MonkeyPatch) -> None:
    k03 = build.load(get_rung("k03"), "cpu")
    monkeypatch.setattr(build.Kernel, "__call__", lambda self, *a, out=None: out)
    with pytest.raises(AssertionError, match="NaN"):
        measure.check_methods([k03], BASE, "cpu")


def test_slow_rungs_are_rungs() -> None:
    assert set(SLOW) <= {rung.number for rung in RUNGS}


# --- the seed's ideas ----------------------------------------------------------------------------


def test_a_verdict_goes_by_the_gain() -> None:
    for gain, verdict in ((21.0, "worth it"), (1.05, "worth it"), (1.04, "not worth it")):
        assert hints.verdict(gain) == verdict
        assert hints.verdict(1 / gain) == ("wrong" if verdict == "worth it" else verdict)
    for gain in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="positive"):
            hints.verdict(gain)


def test_answers_are_what_the_records_say() -> None:
    ladder, variants = record.load(record.LADDER), record.load(record.VARIANTS)
    found = {a.idea: a for a in hints.answers(ladder, variants, profiler.load())}
    k01, k02, k03 = (ladder[name].median for name in ("k01", "k02", "k03"))
    answer = found["A block is the batch: a thread an image"]
    assert answer.verdict == hints.verdict(k03 / k02)
    assert f"{k02 / k03:.3g} times slower" in answer.number
    answer = found["Loop over the output channels in the kernel, for fewer blocks"]
    assert answer.verdict == hints.verdict(k01 / k02)
    answer = found["Give x, the width, the threads"]
    times = [t.median for t in variants.timings if t.name.startswith("k03")]
    assert f"{times[1] / times[0]:.3g} times faster" in answer.number
    unknown = [a for a in found.values() if a.verdict == hints.NOT_YET]
    assert not any(a.number for a in unknown)
    assert sum(a.record.startswith("asymmetry: ") for a in unknown) == 5


def test_unrolling_the_channels_is_judged_once_it_is_measured() -> None:
    ladder, variants = record.load(record.LADDER), record.load(record.VARIANTS)
    idea = "Unroll the loop over the input channels"
    others = [t for t in variants.timings if "UNROLL_CHANNELS" not in t.defines]

    def answer(**milliseconds: float) -> hints.Answer:
        timings = [
            samples.timing("k03_coalesced", "rung", ms, defines={"UNROLL_CHANNELS": int(count[1:])})
            for count, ms in milliseconds.items()
        ]
        of = dataclasses.replace(variants, timings=(*others, *timings))
        return next(a for a in hints.answers(ladder, of, profiler.load()) if a.idea == idea)

    assert answer().verdict == answer(x1=2.0).verdict == answer(x4=2.0).verdict == hints.NOT_YET
    found = answer(x1=26.0, x2=25.9, x4=20.0)
    assert found.verdict == "worth it"
    assert "4 channels in a turn of its loop, not one: 1.30 times faster" in found.number
    assert answer(x1=26.0, x2=26.1, x4=27.0).verdict == "not worth it"


def test_the_series_answer_once_they_are_measured() -> None:
    ladder = record.load(record.LADDER)
    measured = {series.name: measured_sample(series) for series in SERIES}
    found = list(hints.from_the_series(ladder, measured))
    assert all(a.verdict != hints.NOT_YET for a in found)
    series = get_series("aspect")
    relative = measured["aspect"].relative(series)
    k07, theirs = (relative[name][4] for name in ("k07", "nn.Conv2d"))
    claim, idea = (a for a in found if a.record == "asymmetry: aspect")
    assert f"nn.Conv2d turned to 1024×512: {theirs:.2f} times" in claim.number
    assert claim.verdict == ("right" if theirs <= 1 / hints.NOTICED else "wrong")
    assert f"k07 turned to 1024×512: {k07:.2f} times" in idea.number
    assert idea.verdict == hints.verdict(k07)

    half = dataclasses.replace(measured["aspect"], rows=measured["aspect"].rows[:4])
    found = list(hints.from_the_series(ladder, measured | {"aspect": half}))
    assert [a.verdict for a in found if a.record == "asymmetry: aspect"] == [hints.NOT_YET] * 2
