"""Records: whole or not there, true to what was measured, and made from the kernels as they are."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import gpu

from asymconv import build, measure, profiler, record
from asymconv.check import Checked, check, random_data
from asymconv.kernels import RUNGS, Rung, get_rung
from asymconv.measure import ALL_PEERS, PEERS, Timing
from asymconv.problem import CONTRACT, ConvShape

SHAPE = ConvShape(1, 2, 4, 8, 3)


def sample() -> record.Record:
    timings = (
        Timing("k01_block_per_output", "rung", "fp32", (3.0, 1.0, 2.0), 1e-7, "abc", 5, 600, 60),
        Timing("copy", "ceiling", "", (1.0,), bytes=2_000_000),
    )
    return record.Record("a test", SHAPE, {"gpu": "none", "date": "today"}, timings, {"k9": "why"})


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "data" / "r.json"
    sample().save(path)
    assert record.load(path) == sample()
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]


def test_look_ups_and_derived_numbers() -> None:
    r = sample()
    assert r["k01"] is r["k01_block_per_output"] is r.timings[0]
    assert "k01" in r
    assert "k02" not in r
    assert r["k01"].median == 2.0
    assert r["k01"].spread == 1.0
    assert r["k01"].tflops == pytest.approx(600 / 2e-3 / 1e12)
    assert r["copy"].gbytes == pytest.approx(2.0)
    assert [t.name for t in r.of_kind("ceiling")] == ["copy"]
    with pytest.raises(KeyError, match="no 'k02'"):
        r["k02"]


def test_a_failed_write_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    sample().save(path)
    before = path.read_text()

    def full(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        record.write_atomically(path, "half")
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_missing_and_foreign_records_say_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="asymconv bench --record"):
        record.load(tmp_path / "none.json")
    (tmp_path / "old.json").write_text(json.dumps({"format": 0}))
    with pytest.raises(ValueError, match="format 0"):
        record.load(tmp_path / "old.json")


def test_another_ladder_can_be_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample().save(tmp_path / "mine.json")
    monkeypatch.setenv(record.LADDER_VARIABLE, str(tmp_path / "mine.json"))
    assert record.load().title == "a test"


def test_no_timing_without_a_check_of_that_build_and_shape() -> None:
    other = Checked(PEERS[0].key, SHAPE.with_(height=9), 0.0, 0.0, 1)
    another = Checked("another build", SHAPE, 0.0, 0.0, 1)
    for checks in ([], [other], [another]):
        with pytest.raises(ValueError, match="without a passed check"):
            measure.time_methods(PEERS[:1], checks, SHAPE)


def test_peers_are_right() -> None:
    """On the CPU nn.Conv2d has no TF32; both peers must pass as what they say they are."""
    for peer in PEERS:
        assert check(peer, ConvShape(2, 8, 12, 24, 16)).error <= 1e-6


class TestPublished:
    """The record in the repository."""

    ladder = record.load(record.LADDER)

    def test_is_whole(self) -> None:
        assert self.ladder.shape == CONTRACT
        assert "H100" in self.ladder.gpu
        for key in ("driver", "torch", "cuda", "cudnn", "nvcc", "python", "revision", "date"):
            assert self.ladder.made[key], key
        assert self.ladder.made["revision"] != "unknown"
        names = [t.name for t in self.ladder.timings]
        assert len(names) == len(set(names))
        for peer in PEERS:
            assert peer.name in self.ladder
        others = [p.name for p in ALL_PEERS if p not in PEERS and p.name in self.ladder]
        if others:  # a record of before these peers has none of them
            for peer in ALL_PEERS:
                assert peer.name in self.ladder or peer.name in self.ladder.left_out
        for timing in self.ladder.timings:
            assert len(timing.milliseconds) >= 3
            assert min(timing.milliseconds) > 0

    def test_has_every_rung_as_it_is_now(self) -> None:
        """A kernel that changed since (comments apart) must be measured again."""
        for rung in RUNGS:
            assert self.ladder[rung.name].source_hash == rung.source_hash, (
                f"{rung.name} changed since it was recorded: `asymconv bench --record` on a GPU"
            )

    def test_errors_are_of_their_class(self) -> None:
        for timing in self.ladder.of_kind("rung") + self.ladder.of_kind("peer"):
            assert 0 < timing.error <= {"fp32": 1e-6, "tf32": 4e-4, "fp16": 5e-4}[timing.precision]

    def test_nothing_is_faster_than_its_bytes(self) -> None:
        """A time below the least bytes over twice the copy's rate would be a wrong time."""
        limit = 2 * self.ladder["copy"].gbytes
        for timing in self.ladder.of_kind("rung") + self.ladder.of_kind("peer"):
            assert timing.gbytes <= limit


@gpu
def test_timing_on_this_gpu(tmp_path: Path) -> None:
    timings, left_out = measure.check_and_time(SHAPE)
    assert [t.name for t in timings if t.kind == "rung"] + sorted(left_out) != []
    assert {t.name for t in timings if t.kind == "peer"} == {p.name for p in PEERS}
    made = record.make("a test", SHAPE, timings, left_out)
    made.save(tmp_path / "r.json")
    assert record.load(tmp_path / "r.json") == made


def test_no_call_is_waited_for_before_the_last_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the GPU would wait for its host between an event and what it times."""
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("event")

        def elapsed_time(self, end: Event) -> float:
            assert done[-1] == "wait"
            return 1.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    assert measure.time_repeats(lambda: done.append("call"), 2) == [1.5, 1.5]
    assert done == ["event", "call", "event"] * 2 + ["wait"]
    done.clear()
    flush = measure._flush(SimpleNamespace(zero_=lambda: done.append("clear")), 0.1)
    done.clear()
    measure.time_repeats(lambda: done.append("call"), 1, flush)
    assert done == ["clear"] * 2 + ["event", "call", "event", "wait"]


def test_a_flush_lasts_longer_than_the_host_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "time_repeats", lambda run, count: [0.5] * count)
    cleared: list[str] = []
    buffer = SimpleNamespace(zero_=lambda: cleared.append("once"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    host_ms = measure._host_ms(lambda: time.sleep(0.002))
    assert host_ms >= 2
    measure._flush(buffer, host_ms)()
    assert 0.5 * len(cleared) >= measure.HOST_MARGIN * host_ms
    cleared.clear()
    measure._flush(buffer, 0.0)()
    assert 0.5 * len(cleared) >= measure.HOST_LEAST_MS


@pytest.mark.parametrize("host_ms", [0.5, 7.0])
def test_calls_that_wait_for_their_host_are_timed_behind_a_flush(
    monkeypatch: pytest.MonkeyPatch, host_ms: float
) -> None:
    """Data too large for L2: no flush, unless launches take longer than what they launch."""
    flushed: list[bool] = []

    def time_repeats(run, count, flush=None) -> list[float]:
        flushed.append(flush is not None)
        return [10.0] * count

    monkeypatch.setattr(measure, "time_repeats", time_repeats)
    monkeypatch.setattr(measure, "_peak_bytes", lambda run: 0)
    monkeypatch.setattr(measure, "_host_ms", lambda run: host_ms)
    monkeypatch.setattr(measure, "_l2_twice", lambda: SimpleNamespace(zero_=lambda: None))
    runner = measure._Runner("", "", lambda: None)
    measure._take_turns([runner], None, rounds=1, budget_ms=30.0, warm_ms=0.0)
    assert flushed[-1] == (host_ms > 5)
    assert runner.times == [10.0] * 3


class TestPublishedCounters:
    """The counters, and what the CPU backend counts for the same text and shape."""

    profile = profiler.load()

    def test_are_of_the_rungs_as_they_are_now(self) -> None:
        hashes = {(c.name, c.shape): c.source_hash for c in self.profile.counters}
        for rung in RUNGS:
            for shape in (CONTRACT, profiler.PROOF):
                assert hashes[rung.name, shape] == rung.source_hash

    def test_variants_are_of_the_rungs_as_they_are_now(self) -> None:
        sweep = record.load(record.VARIANTS)
        hashes = {rung.name: rung.source_hash for rung in RUNGS}
        for timing in sweep.of_kind("rung"):
            assert timing.source_hash == hashes[timing.name]
        for rung in RUNGS:
            taken = [t.defines for t in sweep.of_kind("rung") if t.name == rung.name]
            assert taken == [dict(v) for v in rung.variants]

    @pytest.mark.parametrize(
        "rung",
        # those of Hopper copy in bulk, by as many blocks as there are multiprocessors
        [r for r in RUNGS if r.precision == "fp32" and r.capability < (9, 0)],
        ids=lambda r: r.name,
    )
    def test_the_cpu_counts_what_the_gpu_counted(self, rung: Rung) -> None:
        """To the digit, but for what nvcc is known to add."""
        data = random_data(profiler.PROOF, seed=0)
        kernel = build.load(rung, "cpu-traced")
        lines = kernel.trace(*data, profiler.PROOF, int(self.profile.made["multiprocessors"]))
        hardware = self.profile.of(rung.name, profiler.PROOF)
        for counter, count, measured in profiler.beside(lines, hardware):
            why = profiler.added(rung, counter)
            assert count + (why.count if why else 0) == measured, counter


@pytest.mark.parametrize("why", profiler.ADDED_BY_NVCC, ids=lambda w: f"{w.rung} {w.counter}")
def test_what_nvcc_adds_is_shown_by_its_machine_code(why: profiler.Added) -> None:
    assert why.line in (record.DATA_FOLDER / why.sass).read_text()


def sectors(addresses: Iterable[int], size: int = 4) -> int:
    """Sectors of 32 bytes under accesses of `size` bytes, at addresses in units of 4 bytes."""
    return len({(4 * a + b) // 32 for a in addresses for b in range(0, size, 4)})


def test_the_account_of_k04s_loads() -> None:
    """Its copy loops, turn by turn as nvcc arranges them, give what the H100 counted."""
    shape, tile_h, tile_w, chunk, filters, threads = profiler.PROOF, 8, 32, 4, 16, 256
    rows, columns = tile_h + 2, tile_w + 2

    def turns(thread: int) -> int:
        return len(range(thread, chunk * rows * columns, threads))

    def as_written(thread: int, turn: int) -> tuple[str, int]:
        return "loop", turn

    def rest_first(thread: int, turn: int) -> tuple[str, int]:
        rest = turns(thread) % 4
        return ("rest", turn) if turn < rest else ("by four", turn - rest)

    def tile_loads(place: Callable[[int, int], tuple[str, int]]) -> tuple[int, int]:
        requests: dict[tuple, list[int]] = {}
        for oh in range(0, shape.out_height, tile_h):
            for ow in range(0, shape.out_width, tile_w):
                for thread in range(threads):
                    for turn in range(turns(thread)):
                        plane, rest = divmod(thread + turn * threads, rows * columns)
                        ih, iw = oh + rest // columns, ow + rest % columns
                        if ih < shape.height and iw < shape.width:
                            request = (oh, ow, thread // 32, place(thread, turn))
                            address = (plane * shape.height + ih) * shape.width + iw
                            requests.setdefault(request, []).append(address)
        chunks = shape.batch * shape.in_channels // chunk  # planes start on sectors
        return chunks * len(requests), chunks * sum(sectors(a) for a in requests.values())

    tiles = -(-shape.out_height // tile_h) * -(-shape.out_width // tile_w)
    chunks = shape.batch * shape.in_channels // chunk
    weights = tiles * chunks * chunk * 9 * filters // 32
    # a request: a pair of taps, of one sector, of 16 filters
    assert tile_loads(as_written) == (8464, 36944)
    assert tile_loads(rest_first) == (8464, 37200)
    measured = profiler.load().of("k04", shape)
    assert 8464 + weights == measured["global_load_requests"]
    assert 37200 + weights * 16 == measured["global_load_sectors"]


def test_the_account_of_k04s_channel_loop() -> None:
    loop = (record.DATA_FOLDER / "k04_channel_loop.sass").read_text()
    assert loop.count("LDS") == 9 * (1 + 16 // 4) + 1
    assert loop.count("FFMA") == 9 * 16
    assert "LDS.128 R20, [UR11+0x140]" in loop


@pytest.mark.parametrize("shape", [profiler.PROOF, CONTRACT], ids=str)
def test_copies_of_16_bytes_go_by_quarter_warps(shape: ConvShape) -> None:
    """The first version of k05 copied rows of 128 + 4 columns, 16 bytes a lane.

    What the H100 counted for them is the sectors of each 8 lanes; neither those of a whole, half or
    eighth of a warp, nor with the addresses of lanes that copy nothing (all that of x).
    """

    def copied(lanes_at_once: int, idle_too: bool = False) -> int:
        total = 0
        for oh in range(0, shape.out_height, 4):
            for ih in range(oh, min(oh + 6, shape.height)):
                for ow in range(0, shape.out_width, 128):
                    for turn in (range(0, 128, 4), range(128, 130, 4)):
                        if ow + turn[0] >= shape.width:
                            continue
                        for first in range(0, len(turn), lanes_at_once):
                            columns = [ow + c for c in turn[first : first + lanes_at_once]]
                            busy = [c for c in columns if c < shape.width]
                            total += sectors((ih * shape.width + c for c in busy), 16)
                            total += idle_too and len(busy) < len(columns)
        blocks = -(-shape.out_channels // 64)
        return total * shape.batch * shape.in_channels * blocks  # planes start on sectors

    first = profiler.load(record.DATA_FOLDER / "counters_k05_first.json").of("k05", shape)
    measured = first["global_load_sectors"] - first["async_copy_sectors"]  # those: 4 bytes a lane
    assert copied(8) == measured
    if shape == profiler.PROOF:  # where rows start in the middle of sectors, and end early
        others = [copied(n) for n in (32, 16, 4)] + [copied(n, True) for n in (32, 16, 8)]
        assert measured not in others

        # nvcc puts `@!PT LDS RZ, [RZ]`, which reads nothing, three times before a copy of 16 bytes
        # and before the nine copies of a filter's taps: requests without wavefronts
        warps = 5 * 2 * shape.batch * 16
        reads = 8 * (8 + 18) * warps
        copies = 8 * 6 * 5 * 2 * 2 * shape.batch
        assert first["shared_load_requests"] == reads + 3 * (copies + warps)
        assert first["async_copy_requests"] == copies + 9 * warps
        assert first["shared_load_wavefronts"] == 8 * (8 * 4 + 18 * 2) * warps


def test_profiles_round_trip_and_ncus_csv_is_read(tmp_path: Path) -> None:
    lines = (
        '==PROF== x\n"ID","Kernel Name","dram__bytes_read.sum","launch__registers_per_thread"\n'
        '"","","Mbyte",""\n"0","a","1,000.5","32"\n"1","b","0.5","40"\n'
    )
    values = profiler._read(lines)
    assert values == {"dram_read_bytes": 1001e6, "registers": 40}
    made = profiler.Profile(
        {"gpu": "none"}, (profiler.Counters("k01_x", "abc", SHAPE, values, {"A": 1}),)
    )
    made.save(tmp_path / "c.json")
    assert profiler.load(tmp_path / "c.json") == made
    assert made.of("k01", SHAPE, A=1)["registers"] == 40
    with pytest.raises(KeyError, match="k02"):
        made["k02"]
    with pytest.raises(profiler.ProfilerError, match="no kernel"):
        profiler._read("==ERROR== no permission")


def test_counters_of_a_later_run_join_a_record() -> None:
    def taken(name: str, value: float, source_hash: str | None = None) -> profiler.Counters:
        now = source_hash or get_rung(name).source_hash
        return profiler.Counters(get_rung(name).name, now, CONTRACT, {"registers": value})

    first = profiler.Profile(
        {"gpu": "one", "date": "before"},
        (taken("k01", 1), taken("k02", 2, "of another text"), taken("k03", 3)),
    )
    both = first.joined(profiler.Profile({"gpu": "one", "date": "now"}, (taken("k03", 30),)))
    assert [c.name[:3] for c in both.counters] == ["k01", "k03"], "k02 changed since"
    assert both["k03"]["registers"] == 30
    assert both.made["date"] == "now"
    assert both["k01"].made["date"] == "before"
    assert both["k03"].made == {}
    assert both.joined(both)["k01"].made == both["k01"].made
    alone = first.joined(profiler.Profile({"gpu": "another"}, (taken("k03", 30),)))
    assert len(alone.counters) == 1


def test_joined_counters_are_read_as_written(tmp_path: Path) -> None:
    before = profiler.load()
    later = profiler.Profile({**before.made, "date": "later"}, before.counters[:1])
    joined = before.joined(later)
    joined.save(tmp_path / "c.json")
    assert profiler.load(tmp_path / "c.json") == joined
    assert len(joined.counters) == len(before.counters)
