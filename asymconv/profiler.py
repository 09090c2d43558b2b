"""Hardware counters through Nsight Compute: what a kernel did to each level of memory.

`profile` runs ncu on a process of its own that launches one rung once (`python -m
asymconv.profiler k03 ...`); only that launch is profiled. The card's clocks are left alone. ncu
repeats the launch once per group of counters with cold caches, so its time is only a hint: times
come from `asymconv.measure`. `Profile` is the record, as JSON under figures/data/.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from asymconv import build, cpu, record
from asymconv.check import random_data
from asymconv.kernels import RUNGS, Rung, get_rung
from asymconv.problem import CONTRACT, ConvShape

PROOF = ConvShape(8, 8, 20, 132, 16)
"""A small shape on which the CPU backend's counts are held against a GPU's."""

METRICS: Mapping[str, str] = {
    "global_load_requests": "l1tex__t_requests_pipe_lsu_mem_global_op_ld.sum",
    "global_load_sectors": "l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum",
    "global_store_requests": "l1tex__t_requests_pipe_lsu_mem_global_op_st.sum",
    "global_store_sectors": "l1tex__t_sectors_pipe_lsu_mem_global_op_st.sum",
    "shared_load_requests": "smsp__inst_executed_op_shared_ld.sum",
    "shared_load_wavefronts": "l1tex__data_pipe_lsu_wavefronts_mem_shared_op_ld.sum",
    "shared_load_conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_ld.sum",
    "shared_store_requests": "smsp__inst_executed_op_shared_st.sum",
    "shared_store_wavefronts": "l1tex__data_pipe_lsu_wavefronts_mem_shared_op_st.sum",
    "shared_store_conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_st.sum",
    "async_copy_requests": "smsp__inst_executed_op_ldgsts.sum",
    "async_copy_sectors": "l1tex__t_sectors_pipe_lsu_mem_global_op_ldgsts_cache_access.sum",
    "l1_hit_percent": "l1tex__t_sector_hit_rate.pct",
    "l2_sectors": "lts__t_sectors_srcunit_tex.sum",
    "l2_hit_percent": "lts__t_sector_hit_rate.pct",
    "dram_read_bytes": "dram__bytes_read.sum",
    "dram_write_bytes": "dram__bytes_write.sum",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "fma_percent": "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active",
    "tensor_percent": "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    "lsu_percent": "sm__inst_executed_pipe_lsu.avg.pct_of_peak_sustained_active",
    "l1_wavefront_percent": "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed",
    "l2_percent": "lts__t_sectors.avg.pct_of_peak_sustained_elapsed",
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "registers": "launch__registers_per_thread",
    "milliseconds": "gpu__time_duration.sum",
}
"""The counters taken: our names and Nsight Compute's."""


class ProfilerError(RuntimeError):
    """ncu is not there, or failed; the message says what to do, or shows its lines."""


@dataclass(frozen=True)
class Counters:
    """One rung's counters on one shape; all its kernels of a call together.

    Attributes:
        name: the rung.
        source_hash: its text's.
        shape: the convolution.
        values: by the names of `METRICS`: counts, bytes, ms, or percent of the hardware's peak.
        defines: tile constants that are not the rung's own.
        made: where and with what, if not as the record says.
    """

    name: str
    source_hash: str
    shape: ConvShape
    values: Mapping[str, float]
    defines: Mapping[str, int] = field(default_factory=dict)
    made: Mapping[str, str | int] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        """A counter by our name for it. Raises KeyError."""
        return self.values[name]


@dataclass(frozen=True)
class Added:
    """What nvcc does to a rung's memory accesses beyond what its source says, on `PROOF`.

    Attributes:
        rung, counter: number of the rung, name of the counter (`METRICS`).
        count: how many more than in the source.
        reason: what it does.
        sass: file under figures/data/ with the machine code.
        line: of it, that shows it.
    """

    rung: str
    counter: str
    count: int
    reason: str
    sass: str
    line: str


_ONE_READ_TOO_MANY = (
    "each turn of the channel loop reads one weight again, of four that it has read just before: "
    "120 blocks · 8 warps · 8 channels"
)

ADDED_BY_NVCC = (
    Added(
        "k04",
        "global_load_sectors",
        256,
        "the loop that copies the tile is unrolled by four, and what is left over, the number of "
        "turns modulo 4, comes first. In each block's third warp half the lanes have six turns and "
        "half have five: the one's third turn loads together with the other's second",
        "k04_copy_loop.sass",
        "LOP3.LUT P0, RZ, R22, 0x3, RZ, 0xc0, !PT",
    ),
    *(
        Added(
            *("k04", counter, 7680, _ONE_READ_TOO_MANY),
            *("k04_channel_loop.sass", "LDS R17, [UR11+0x148]"),
        )
        for counter in ("shared_load_requests", "shared_load_wavefronts")
    ),
    Added(
        "k05",
        "shared_load_requests",
        3 * 1536,
        "three reads of nothing before each group of copies: 64 blocks · 8 warps · 2 turns of "
        "weights, and 64 stages · 8 warps",
        "k05_copies.sass",
        "@!PT LDS RZ, [RZ]",
    ),
    Added(
        "k05",
        "shared_load_wavefronts",
        3,
        "3 of 376,835, and 9 in the run before: not explained. The only reads that the source has "
        "not are those of nothing",
        "k05_copies.sass",
        "@!PT LDS RZ, [RZ]",
    ),
)
"""Why the CPU backend's counts and a GPU's differ on `PROOF`, where they do."""


def added(rung: Rung, counter: str) -> Added | None:
    """What nvcc adds to a counter of a rung on `PROOF`, if it is known to add anything."""
    return next((a for a in ADDED_BY_NVCC if (a.rung, a.counter) == (rung.number, counter)), None)


def beside(lines: Sequence[cpu.LineCount], hardware: Counters) -> Iterator[tuple[str, int, int]]:
    """The CPU backend's counts and ncu's: (name in `METRICS`, counted, measured).

    A copy from global to shared memory (cp.async) is a load and a store on the CPU. ncu counts the
    stores of copies by themselves, their requests only: those are added, and no wavefronts given.
    """
    copies = int(hardware["async_copy_requests"])
    for space, second in (("global", "sectors"), ("shared", "wavefronts")):
        for op in ("load", "store"):
            chosen = [line for line in lines if (line.space, line.op) == (space, op)]
            for what in ("requests", second):
                name = f"{space}_{op}_{what}"
                measured = int(hardware[name])
                if copies and name == "shared_store_wavefronts":
                    continue
                if copies and name == "shared_store_requests":
                    measured += copies
                yield name, sum(getattr(line, what) for line in chosen), measured


@dataclass(frozen=True)
class Profile:
    """A record of counters: several rungs, one GPU. Counts, not times: runs may be joined.

    Attributes:
        made: where and with what (`record.environment`).
        counters: a rung each.
    """

    made: Mapping[str, str | int]
    counters: tuple[Counters, ...]

    def of(self, name: str, shape: ConvShape = CONTRACT, **defines: int) -> Counters:
        """The counters of a rung, by name or number, on a shape. Raises KeyError."""
        for counters in self.counters:
            named = name in (counters.name, record.short_name(counters.name))
            if named and counters.shape == shape and counters.defines == defines:
                return counters
        known = [c.name for c in self.counters]
        raise KeyError(f"no counters of {name!r} with {defines} on {shape}: {known}")

    def __getitem__(self, name: str) -> Counters:
        """The counters of a rung on the contract's shape. Raises KeyError."""
        return self.of(name)

    def joined(self, later: Profile) -> Profile:
        """This record with a later one's counters; those of rungs that changed since are dropped.

        Counters that stay keep their own `made`. Of another GPU none stays.
        """
        if later.made["gpu"] != self.made["gpu"]:
            return later
        hashes = {rung.name: rung.source_hash for rung in RUNGS}

        def key(c: Counters) -> tuple[object, ...]:
            return (c.name, c.shape, tuple(sorted(c.defines.items())))

        taken = {key(c) for c in later.counters}
        kept = [
            replace(c, made=c.made or self.made)
            for c in self.counters
            if key(c) not in taken and hashes.get(c.name) == c.source_hash
        ]
        return Profile(later.made, (*kept, *later.counters))

    def save(self, path: Path) -> None:
        """Write the record; the file is whole or not there."""
        data = {"made": dict(self.made), "counters": [asdict(c) for c in self.counters]}
        record.write_json(path, data)


COUNTERS = record.DATA_FOLDER / "counters.json"
"""The published record of counters."""


def load(path: Path = COUNTERS) -> Profile:
    """Read a record of counters.

    Raises:
        FileNotFoundError: there is none; says how to make it.
    """
    data = record.read_json(path, "asymconv profile --record")
    counters = tuple(Counters(**(c | {"shape": ConvShape(**c["shape"])})) for c in data["counters"])
    return Profile(data["made"], counters)


def _read(lines: str) -> dict[str, float]:
    """The metrics in ncu's CSV: sums over kernels for counts, the longest kernel's for percents."""
    start = lines.find('"ID"')
    rows = list(csv.reader(io.StringIO(lines[start:]))) if start >= 0 else []
    if len(rows) < 3:
        raise ProfilerError(f"ncu reported no kernel:\n{lines[-2000:]}")
    header, units, *kernels = rows
    ours = {metric: name for name, metric in METRICS.items()}
    scale = {"Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "ns": 1e-6, "us": 1e-3, "s": 1e3}
    values: dict[str, float] = {}
    for column, metric in enumerate(header):
        if metric not in ours:
            continue
        found = [
            float(kernel[column].replace(",", "")) * scale.get(units[column], 1.0)
            for kernel in kernels
            if kernel[column]
        ]
        whole = metric.endswith(".sum")
        values[ours[metric]] = sum(found) if whole else max(found, default=0.0)
    return values


def profile(
    rung: Rung,
    shape: ConvShape,
    defines: Mapping[str, int] | None = None,
    timeout: float = 300,
) -> Counters:
    """Take one rung's counters on the current GPU, with tile constants not its own if given.

    Raises:
        ProfilerError: no ncu on PATH, no permission for counters, or it failed.
        ValueError: the rung refuses the shape.
    """
    if shutil.which("ncu") is None:
        raise ProfilerError("no ncu: it comes with the CUDA toolkit (package cuda-nsight-compute)")
    if reason := rung.refuses(shape, defines):
        raise ValueError(f"{rung.name} does not take this shape: {reason}")
    build.load(rung, "cuda", defines=defines)  # so that ncu does not watch a compiler
    command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv"]
    command += ["--page", "raw", "--metrics", ",".join(METRICS.values())]
    command += [sys.executable, "-m", "asymconv.profiler", rung.name, json.dumps(asdict(shape))]
    command += [json.dumps(dict(defines or {}))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise ProfilerError(
            f"ncu failed ({done.returncode}):\n{(done.stdout + done.stderr)[-3000:]}"
        )
    values = _read(done.stdout)
    return Counters(rung.name, rung.source_hash, shape, values, dict(defines or {}))


def _launch_once(arguments: Sequence[str]) -> None:
    """What ncu watches: one call of one rung, between the profiler's start and stop."""
    rung = get_rung(arguments[0])
    shape = ConvShape(**json.loads(arguments[1]))
    kernel = build.load(rung, "cuda", defines=json.loads(arguments[2]))
    data = random_data(shape, "cuda")
    out = torch.empty(shape.output_shape, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    kernel(*data, shape, out)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    _launch_once(sys.argv[1:])
