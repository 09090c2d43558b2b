"""What each part of k07 costs, and what was tried in it: its text with a few places changed.

Each is built like a rung and timed beside k07 in one run, from rest and on a warm card: from rest
the clocks are high, and after some fifty calls the card is near the power that it may draw.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from asymconv import build, measure, record
from asymconv.check import check, random_data
from asymconv.kernels import Rung, get_rung
from asymconv.problem import CONTRACT

Group = Literal["left out", "by the clock", "tried"]


@dataclass(frozen=True)
class Ablation:
    """k07 with something changed.

    Attributes:
        name: what, in words for a table or figure.
        group: "left out": a part is, and outputs are wrong; "by the clock": when rows are fetched;
            "tried": everything else.
        edits: pieces of the text, and what stands there instead, wherever they are.
        defines: tile constants that differ.
        on_cpu: whether the CPU backend has all that the edits use.
    """

    name: str
    group: Group
    edits: tuple[tuple[str, str], ...] = ()
    defines: Mapping[str, int] = field(default_factory=dict)
    on_cpu: bool = True

    @property
    def is_right(self) -> bool:
        """Whether outputs are what they should be."""
        return self.group != "left out"

    def rung(self) -> Rung:
        """k07 with the edits made.

        Raises:
            ValueError: a piece is not in its text.
        """
        k07 = get_rung("k07")
        source = k07.source
        for old, new in self.edits:
            if old not in source:
                raise ValueError(f"{self.name}: k07's text has no {old!r}")
            source = source.replace(old, new)
        return replace(k07, source=source, variants=())


_NO_PRODUCTS = (
    "      Sums sum;\n      multiply(",
    "      Sums sum = {};\n      if (plan.items < 0) multiply(",
)
_NO_CONVERSION = ("    if (!convert<WIDE>(", "    if (plan.items < 0 && !convert<WIDE>(")
_NO_LOADS = ("int bytes = count == 0 ? 0 :", "int bytes = count >= 0 ? 0 :")
_NO_STORES = ("    if (count >= 4) {\n", "    if (count >= 4 && out.plane < 0) {\n")
_BEFORE_PRODUCE = "template <bool WIDE>\n__device__ __forceinline__ void produce("
_TIME = "state->began + plan.lead + (unsigned long long)q * plan.pace"


def _most_rows(rows: int) -> tuple[str, str]:
    return "constexpr int MOST_ROWS = 256;", f"constexpr int MOST_ROWS = {rows};"


_ROWS_AHEAD = (
    (
        _BEFORE_PRODUCE,
        r"""// PTX ISA 9.7.9.25.4.3, cp.async.bulk.prefetch: global memory to L2.
__device__ __forceinline__ void bulk_prefetch(const void* global, int bytes) {
#ifdef __CUDACC__
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;\n" ::"l"(global), "r"(bytes)
               : "memory");
#endif
}

"""
        + _BEFORE_PRODUCE,
    ),
    (
        "  #pragma unroll 1\n  for (int q = 0; now.item < plan.items; ++q) {  // rows so far\n",
        r"""  if (WIDE) {
    const int lane = threadIdx.x % 32;
    #pragma unroll 1
    for (int row = LANDINGS + lane / 16; row < LANDINGS + 4; row += 2) {
      const Window at(x, c, plan, Cursor{now.item, row});
      const int channel = channel0 + lane % 16;
      if (at.count > 0 && channel < c.C) {
        bulk_prefetch(at.first + (long long)channel * c.H * c.W, at.count * 4);
      }
    }
  }
  #pragma unroll 1
  for (int q = 0; now.item < plan.items; ++q) {  // rows so far
""",
    ),
)

_SLIPS = (
    (
        "__device__ __forceinline__ void wait_for_time(const RingState* state, const Plan& plan, "
        "int q) {",
        "__device__ __forceinline__ void wait_for_time(const RingState* state, const Plan& plan, "
        "unsigned& due) {",
    ),
    (
        f"  const unsigned long long time = {_TIME};\n  while (nanoseconds() < time) {{\n  }}\n",
        """  if (due == 0) due = (unsigned)state->began + plan.lead;
  unsigned now;
  while ((int)((now = (unsigned)nanoseconds()) - due) < 0) {
  }
  due = now + plan.pace;
""",
    ),
    (
        "  #pragma unroll 1\n  for (int q = 0; now.item < plan.items; ++q) {  // rows so far\n",
        "  unsigned due = 0;\n  #pragma unroll 1\n"
        "  for (int q = 0; now.item < plan.items; ++q) {  // rows so far\n",
    ),
    ("    wait_for_time(state, plan, q);", "    wait_for_time(state, plan, due);"),
)

_SHORTER_TURNS = (
    (
        "      wgmma_wait<0>();\n      give_turn<EVEN>(state);\n",
        "      give_turn<EVEN>(state);\n      wgmma_wait<0>();\n",
    ),
)

_NO_WAIT_AT_THE_END = (
    (
        """  bulk_wait();
  named_barrier<CONSUMERS>(1);
  const Item at = item_at(item, plan, c);
  BadRows* const of_item = &state->bad[under_way(item, blocks_k)];
  const BadRows bad = *of_item;
  const bool whole = state->weights_bad;
  if (!whole && bad.last < 0) return;
""",
        """  BadRows* const of_item = &state->bad[under_way(item, blocks_k)];
  const BadRows bad = *of_item;
  const bool whole = state->weights_bad;
  if (!whole && bad.last < 0) return;
  bulk_wait();
  const Item at = item_at(item, plan, c);
""",
    ),
    (
        "    redo_bad_rows(x, w, y, c, plan, blocks_k, item, state);\n  }\n",
        "    redo_bad_rows(x, w, y, c, plan, blocks_k, item, state);\n  }\n  bulk_wait();\n",
    ),
)

_OTHER_NEIGHBOURS = (
    ("blockIdx.x", "block_number()"),
    (
        "// The same value, of which the compiler knows nothing",
        """// The blocks that start on one part of the GPU, every eighth, have strips side by side.
__device__ __forceinline__ int block_number() {
  const int blocks = gridDim.x, block = BLOCK;
  return blocks % 8 == 0 ? block % 8 * (blocks / 8) + block / 8 : block;
}

// The same value, of which the compiler knows nothing""",
    ),
    ("BLOCK;", "blockIdx.x;"),
)

_CLUSTERS = (
    (
        "__global__ void __maxnreg__(LAUNCH_REGISTERS)",
        "__global__ void __cluster_dims__(2, 1, 1) __maxnreg__(LAUNCH_REGISTERS)",
    ),
)
_IN_STEP = (
    *_CLUSTERS,
    (
        "struct RingState {\n",
        r"""// PTX ISA 9.7.13.15.13: arrives at the barrier that a block of the cluster has here.
__device__ __forceinline__ void arrive_at(unsigned barrier, int block) {
  asm volatile("{ .reg .b32 there;\n"
               "  mapa.shared::cluster.u32 there, %0, %1;\n"
               "  mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [there]; }\n"
               ::"r"(barrier), "r"(block)
               : "memory");
}
// PTX ISA 9.7.13.4, barrier.cluster.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;\n" ::: "memory");
}

struct RingState {
  unsigned long long sent[CONSUMERS / 32];
""",
    ),
    (
        "    weights_bad = 0;\n",
        """    for (int i = 0; i < CONSUMERS / 32; ++i) mbarrier_init(shared_address(&sent[i]), 2);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    weights_bad = 0;
""",
    ),
    (
        "const unsigned char* staging) {\n  fence_async_proxy();\n  __syncwarp();\n",
        """const unsigned char* staging, unsigned sent, int parity) {
  fence_async_proxy();
  __syncwarp();
  if (lane < 2) arrive_at(sent, lane);
  mbarrier_wait(sent, parity);
  __syncwarp();
""",
    ),
    (
        "send(k, lane, out, shared + STAGING_AT);",
        "send(k, lane, out, shared + STAGING_AT, shared_address(&state->sent[k / 16]), q & 1);",
    ),
    (
        "  if (threadIdx.x < CONSUMERS) {\n    registers_up_to",
        "  cluster_barrier();\n  if (threadIdx.x < CONSUMERS) {\n    registers_up_to",
    ),
    (
        "    produce<WIDE>(x, c, plan, blocks_k, shared, state, scale);\n  }\n",
        """    produce<WIDE>(x, c, plan, blocks_k, shared, state, scale);
  }
  __syncwarp();
  cluster_barrier();
""",
    ),
)

_PACES = (70, 74, 76, 77, 79, 80, 83)

ABLATIONS: tuple[Ablation, ...] = (
    Ablation("no products", "left out", (_NO_PRODUCTS,)),
    *(
        Ablation(f"{name}, no clock", "left out", edits, {"PACE": 0})
        for name, edits in (
            ("no products", (_NO_PRODUCTS,)),
            ("no conversion", (_NO_CONVERSION,)),
            ("neither products nor conversion", (_NO_PRODUCTS, _NO_CONVERSION)),
            ("no loads", (_NO_LOADS,)),
            ("no stores", (_NO_STORES,)),
            ("neither loads nor stores", (_NO_LOADS, _NO_STORES)),
        )
    ),
    Ablation(
        "neither loads nor stores, no clock, no turns",
        "left out",
        (_NO_LOADS, _NO_STORES),
        {"PACE": 0, "TURNS": 0},
    ),
    Ablation("no clock", "by the clock", defines={"PACE": 0}),
    Ablation("no clock, parts of 128 rows", "by the clock", (_most_rows(128),), {"PACE": 0}),
    Ablation("parts of 128 rows", "by the clock", (_most_rows(128),)),
    Ablation("parts of 64 rows", "by the clock", (_most_rows(64),)),
    *(
        Ablation(f"{pace} % of memory's peak", "by the clock", defines={"PACE": pace})
        for pace in _PACES
    ),
    Ablation(
        "rows due from a block's begin on",
        "by the clock",
        (("state->began + plan.lead +", "state->began +"),),
    ),
    Ablation("a late row makes the next ones late", "by the clock", _SLIPS),
    Ablation("strips 0.15 µs apart", "by the clock", ((_TIME, f"{_TIME} + blockIdx.x % 8 * 150"),)),
    Ablation(
        "rows of strips 0.15 µs apart",
        "by the clock",
        ((_TIME, f"{_TIME} + blockIdx.x / 8 * 150"),),
    ),
    Ablation("no turns", "tried", defines={"TURNS": 0}),
    Ablation("a turn until products are issued", "tried", _SHORTER_TURNS),
    Ablation("one row ahead", "tried", defines={"LANDINGS": 1}),
    Ablation("loads evicted first", "tried", defines={"EVICT_LOADS": 1}),
    Ablation("stores evicted first", "tried", defines={"EVICT_STORES": 1}),
    Ablation(
        "weights in one order everywhere",
        "tried",
        (("(int)blockIdx.x / blocks_k % 4 * 2;", "0;"),),
    ),
    Ablation("first rows into L2 meanwhile", "tried", _ROWS_AHEAD),
    Ablation("an item's end without waiting", "tried", _NO_WAIT_AT_THE_END),
    Ablation("other strips side by side", "tried", _OTHER_NEIGHBOURS),
    Ablation("clusters of two", "tried", _CLUSTERS, on_cpu=False),
    Ablation("clusters of two that send in step", "tried", _IN_STEP, on_cpu=False),
)
"""What notebook 06 tells of, in its order."""

RECORD = record.DATA_FOLDER / "ablations.json"
ITSELF, WARM, LONG = "k07", ", warm", ", after 2 s"
LONG_ONES = (
    *(ITSELF, "no clock", "no turns", "a turn until products are issued"),
    *("no products", "neither loads nor stores, no clock"),
    *("neither loads nor stores, no clock, no turns", "k08", "memory floor", "nn.Conv2d"),
)
"""What is called for two seconds, too, until its power decides."""

_REST_S, _FIRST, _HEATING, _LAST = 0.2, 10, 40, 20
_LONG_S, _MEANWHILE = 2.0, 300


def time_from_rest(
    calls: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, tuple[float, ...]]:
    """Milliseconds of each call from rest, and under its name and `WARM` on a warm card.

    Args:
        calls: by name; each is one launch or more on the current stream.
        rounds: turns that each has, in both orders alternately.
    """
    times: dict[str, list[float]] = {name + when: [] for name in calls for when in ("", WARM)}
    for turn in range(rounds):
        for name, run in list(calls.items())[:: -1 if turn % 2 else 1]:
            torch.cuda.synchronize()
            time.sleep(_REST_S)
            run()
            times[name] += measure.time_repeats(run, _FIRST)
            for _ in range(_HEATING):
                run()
            times[name + WARM] += measure.time_repeats(run, _LAST)
    return {name: tuple(round(t, 5) for t in series) for name, series in times.items()}


def time_for_long(
    calls: Mapping[str, Callable[[], object]],
) -> tuple[dict[str, tuple[float, ...]], dict[str, str]]:
    """Milliseconds of each call after two seconds of it; what the GPU draws then, and its clock."""
    times, draws = {}, {}
    for name, run in calls.items():
        began = time.monotonic()
        while time.monotonic() - began < _LONG_S:
            for _ in range(_HEATING):
                run()
            torch.cuda.synchronize()
        for _ in range(_MEANWHILE):
            run()
        draws[name] = record.smi("power.draw,clocks.sm")
        times[name + LONG] = tuple(round(t, 5) for t in measure.time_repeats(run, _LAST))
    return times, draws


def measure_ablations(ablations: Sequence[Ablation] = ABLATIONS, rounds: int = 4) -> record.Record:
    """Check and time k07 and its ablations on this machine's GPU, on the contract's shape.

    Raises:
        AssertionError: one whose outputs should be right gives wrong ones.
        BuildError: one does not compile.
    """
    itself = Ablation(ITSELF, "tried")
    methods = (itself, *ablations)
    builds = [(method.rung(), method.defines) for method in methods]
    *kernels, k08 = build.load_all([*builds, (get_rung("k08"), {})])
    few = CONTRACT.with_(batch=1)
    for method, kernel in zip(methods, kernels, strict=True):
        if method.is_right:
            check(kernel, few, "cuda")
    check(k08, few, "cuda")
    torch.cuda.empty_cache()
    shape = CONTRACT
    x, weight, _ = random_data(shape, "cuda")
    out = torch.empty(shape.output_shape, device="cuda")
    floor = build.load(measure.FLOOR, "cuda")
    built = dict(zip((method.name for method in methods), kernels, strict=True))
    built[k08.rung.number] = k08
    calls: dict[str, Callable[[], object]] = {
        name: functools.partial(kernel, x, weight, None, shape, out)
        for name, kernel in built.items()
    }
    calls["memory floor"] = functools.partial(floor, x, weight, None, shape, out)
    calls["nn.Conv2d"] = functools.partial(torch.nn.functional.conv2d, x, weight)
    with measure.convolution_flags("tf32"):
        times = time_from_rest(calls, rounds)
        long, draws = time_for_long({name: calls[name] for name in LONG_ONES if name in calls})
    timings = []
    for name, series in (times | long).items():
        if (kernel := built.get(name.removesuffix(WARM).removesuffix(LONG))) is None:
            timings.append(measure.Timing(name, "peer", "", series))
        else:
            its = {"source_hash": kernel.rung.source_hash, "defines": kernel.defines}
            timings.append(measure.Timing(name, "rung", "", series, **its))
    made = record.make("k07 with something changed", shape, timings, {})
    drawn = {f"W and MHz of {name}{LONG}": text for name, text in draws.items()}
    return replace(made, made={**made.made, **drawn})


def is_current(measured: record.Record) -> bool:
    """Whether a record is of today's texts."""
    today = {method.name: method.rung().source_hash for method in ABLATIONS}
    today[ITSELF] = get_rung(ITSELF).source_hash
    return all(measured[name].source_hash == its for name, its in today.items())
