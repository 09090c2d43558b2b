"""What device memory allows in the strips that k07 works in: its bytes without its products.

A kernel that walks down strips of 128 columns like k07, reads each row of 64 channels, and writes
rows of 128 filters: filter k is channel k % 64 as it stands. How it writes is a constant, so that
ways to write can be compared with nothing else beside them. Not a convolution and not a rung.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from asymconv import build, measure, record
from asymconv.check import check, random_data
from asymconv.kernels import Rung
from asymconv.kernels.ptx import BULK, BULK_EVICT_FIRST, CLOCK, HOPPER
from asymconv.problem import BYTES_PER_FLOAT, CONTRACT, ConvShape

NOTHING, REGISTERS, ROWS, BULK_COPIES = range(4)
"""The ways to write, values of STORE: not at all; 8 bytes a lane for 8 filters, as sums lie in
registers after wgmma; 256 bytes of one filter a request; 512 bytes of one filter a bulk copy."""

CHANNELS, FILTERS, TILE_W = 64, 128, 128

SOURCE = (
    HOPPER
    + BULK
    + BULK_EVICT_FIRST
    + CLOCK
    + r"""
constexpr int NOTHING = 0, REGISTERS = 1, ROWS = 2, BULK_COPIES = 3;  // STORE
constexpr int CHANNELS = 64, FILTERS = 128, HALO = 2;
// Strips WIDTH times as wide are shared by WIDTH blocks: longer pieces of fewer channels, as many
// bytes a row.
constexpr int TILE_W = 128 * WIDTH, BLOCK_C = CHANNELS / WIDTH, BLOCK_K = FILTERS / WIDTH;
constexpr int WRITERS = 256, THREADS = WRITERS + 32;  // a warp reads
constexpr int WARP_K = BLOCK_K / (WRITERS / 32);
static_assert(BLOCK_K % (WRITERS / 32) == 0 && CHANNELS % WIDTH == 0, "a warp has whole filters");
static_assert(ALIGN == 2 || ALIGN % 4 == 0 && ALIGN <= 32, "floats; rows start on 8 bytes anyway");
static_assert(STORE != BULK_COPIES || ALIGN >= 4, "bulk copies need 16 bytes");
static_assert(!COMPLETE || STORE == BULK_COPIES && LOAD, "what k07 does");

// A strip's rows begin at the first multiple of ALIGN floats of memory: so many columns more.
constexpr int WINDOW_W = TILE_W + (ALIGN < 8 ? 8 : ALIGN) + 4;  // with the halo
constexpr int LANDING_PITCH = TILE_W + 32 + 4;                  // floats
constexpr int LANDING = BLOCK_C * LANDING_PITCH, LANDINGS = 3;
constexpr int STAGING_PITCH = TILE_W + 8;  // 16 bytes, and other banks from filter to filter
struct Shared {
  float landing[LANDINGS][LANDING];
  float staging[BLOCK_K * STAGING_PITCH];
  unsigned long long full[LANDINGS], empty[LANDINGS];
};
static_assert(sizeof(Shared) <= 227 * 1024, "more shared memory than a block can have");

// What a block has: of a strip's channels every WIDTH-th, and the filters that are copies of those.
__device__ __forceinline__ int channel_at(int place) { return blockIdx.x % WIDTH + place * WIDTH; }
__device__ __forceinline__ int filter_at(int place) {
  return channel_at(place % BLOCK_C) + place / BLOCK_C * CHANNELS;
}

// A warp: a lane copies its channels of each row of its block's part of a strip.
__device__ __forceinline__ void read_rows(const float* __restrict__ x, const Conv& c, int n,
                                          int first, int rows, int ow0, Shared* shared) {
  const int lane = threadIdx.x % 32;
  const unsigned long long began = PACE ? nanoseconds() : 0;
  for (int row = 0; row < rows; ++row) {
    const int place = row % LANDINGS;
    while (PACE && nanoseconds() < began + (unsigned long long)row * PACE) {
    }
    __syncwarp();
    // COMPLETE: on into the next row, which follows
    const int columns = COMPLETE && first + row + 1 < c.H ? 2 * c.W : c.W;
    const int count = min(WINDOW_W, columns - ow0);
    const unsigned full = shared_address(&shared->full[place]);
    mbarrier_wait(shared_address(&shared->empty[place]), row / LANDINGS & 1 ^ 1);
    mbarrier_arrive_expect(full, (BLOCK_C - lane + 31) / 32 * 4 * count);
    for (int i = lane; i < BLOCK_C; i += 32) {
      const long long plane = (long long)n * CHANNELS + channel_at(i);
      const float* const from = x + (plane * c.H + first + row) * c.W;
      const unsigned to = shared_address(&shared->landing[place][i * LANDING_PITCH]);
      if (EVICT_LOADS) {
        bulk_load_evict_first(to, from + ow0, 4 * count, full);
      } else {
        bulk_load(to, from + ow0, 4 * count, full);
      }
    }
  }
}

// Two neighbouring outputs of a filter.
__device__ __forceinline__ void write_two(float* to, float2 v) {
  if (EVICT_STORES) {
    __stcs(reinterpret_cast<float2*>(to), v);
  } else {
    *reinterpret_cast<float2*>(to) = v;
  }
}

// WARP_K filters of one row, by a warp.
__device__ __forceinline__ void write_row(float* __restrict__ y, const Conv& c, int n, int oh,
                                          int ow0, const float* landing, float* staging) {
  const int lane = threadIdx.x % 32, k0 = threadIdx.x / 32 * WARP_K;
  const auto value = [&](int k, int column) {  // and its neighbour
    const float* const from = landing + k % BLOCK_C * LANDING_PITCH + column;
    return LOAD ? make_float2(from[0], from[1])
                : make_float2((float)(ow0 + column), (float)(ow0 + column + 1));
  };
  struct Row {
    float* first;    // of the filter's row, at the strip
    int skip, count;  // columns that the left strip writes; that this one does
  };
  const auto to_aligned = [](const float* p) {
    return (int)(-((unsigned long long)p >> 2) & (ALIGN - 1));
  };
  const auto row_of = [&](int k) {
    const long long plane = (long long)n * FILTERS + filter_at(k);
    float* const first = y + (plane * c.OH + oh) * c.OW + ow0;
    const int skip = to_aligned(first), left = c.OW - ow0 - skip;
    const bool completes = COMPLETE && left > 0 && left <= TILE_W && oh + 1 < c.OH;
    const int more = completes ? to_aligned(first + skip + left) : 0;
    return Row{first, skip, max(0, min(TILE_W, left)) + more};
  };
  if (STORE == REGISTERS) {
    for (int k = k0 + lane / 4; k < k0 + WARP_K; k += 8) {
      const Row row = row_of(k);
      for (int column = lane % 4 * 2; column < row.count; column += 8) {
        write_two(row.first + row.skip + column, value(k, row.skip + column));
      }
    }
  }
  if (STORE == ROWS) {
    for (int k = k0; k < k0 + WARP_K; ++k) {
      const Row row = row_of(k);
      for (int column = lane * 2; column < row.count; column += 64) {
        write_two(row.first + row.skip + column, value(k, row.skip + column));
      }
    }
  }
  if (STORE == BULK_COPIES) {
    bulk_wait_read();  // the row before has left
    __syncwarp();
    for (int k = k0; k < k0 + WARP_K; ++k) {
      const Row row = row_of(k);
      for (int column = lane * 2; column < row.count; column += 64) {
        const int next = row.skip + column >= c.OW - ow0 ? c.W - c.OW : 0;  // the row after
        *reinterpret_cast<float2*>(staging + k * STAGING_PITCH + column) =
            value(k, row.skip + column + next);
      }
    }
    fence_async_proxy();
    __syncwarp();
    const int k = k0 + lane;
    if (lane < WARP_K) {
      const Row row = row_of(k);
      const unsigned from = shared_address(staging + k * STAGING_PITCH);
      const int bytes = row.count / 4 * 16;
      if (bytes > 0 && EVICT_STORES) bulk_store_evict_first(row.first + row.skip, from, bytes);
      if (bytes > 0 && !EVICT_STORES) bulk_store(row.first + row.skip, from, bytes);
      if (row.count % 4) {
        write_two(row.first + row.skip + row.count / 4 * 4,
                  value(k, row.skip + row.count / 4 * 4));
      }
    }
    bulk_commit();
  }
  if (STORE != NOTHING && ow0 == 0 && !(COMPLETE && oh > 0)) {  // nobody else writes them
    for (int k = k0; k < k0 + WARP_K; ++k) {
      const Row row = row_of(k);
      if (2 * lane < min(row.skip, c.OW)) write_two(row.first + 2 * lane, value(k, 2 * lane));
    }
  }
}

__global__ void __launch_bounds__(THREADS, 1)
    move_strips(const float* __restrict__ x, float* __restrict__ y, const Conv c) {
  extern __shared__ __align__(16) unsigned char bytes[];
  Shared* const shared = reinterpret_cast<Shared*>(bytes);
  if (threadIdx.x == 0) {
    for (int i = 0; i < LANDINGS; ++i) {
      mbarrier_init(shared_address(&shared->full[i]), 32);
      mbarrier_init(shared_address(&shared->empty[i]), WRITERS / 32);
    }
    fence_async_proxy();  // the copy engine sees the barriers
  }
  __syncthreads();
  // Strips are the fastest index: neighbours run side by side.
  const int strips = (c.OW + TILE_W - 1) / TILE_W, strip = blockIdx.x / WIDTH;
  const int part = strip / strips % PARTS, n = strip / strips / PARTS;
  const int ow0 = strip % strips * TILE_W;
  const int first = (int)((long long)c.OH * part / PARTS);
  const int rows = (int)((long long)c.OH * (part + 1) / PARTS) - first;
  const int read = min(rows + HALO, c.H - first);  // as a 3x3 convolution reads
  if (threadIdx.x >= WRITERS) {
    if (LOAD) read_rows(x, c, n, first, read, ow0, shared);
    return;
  }
  for (int row = 0; row < (LOAD ? read : rows); ++row) {
    const int place = row % LANDINGS;
    if (LOAD) mbarrier_wait(shared_address(&shared->full[place]), row / LANDINGS & 1);
    if (row < rows) {
      write_row(y, c, n, first + row, ow0, shared->landing[place], shared->staging);
    }
    __syncwarp();
    if (LOAD && threadIdx.x % 32 == 0) mbarrier_arrive(shared_address(&shared->empty[place]));
  }
  if (STORE == BULK_COPIES) bulk_wait();
}

extern "C" int asymconv_launch(const float* x, const float* w, const float* bias, float* y,
                               const Conv* c, void* stream) {
  const cudaError_t error = cudaFuncSetAttribute(
      move_strips, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (error != cudaSuccess) return (int)error;
  const int blocks = WIDTH * c->N * PARTS * ((c->OW + TILE_W - 1) / TILE_W);
  move_strips<<<blocks, THREADS, sizeof(Shared), (cudaStream_t)stream>>>(x, y, *c);
  return (int)cudaGetLastError();
}
"""
)


def _refusal(shape: ConvShape, defines: Mapping[str, int]) -> str | None:
    if (shape.in_channels, shape.out_channels) != (CHANNELS, FILTERS):
        return f"it moves {CHANNELS} channels to {FILTERS} filters ({shape})"
    if shape.width % 4 or shape.out_width % 2:
        return f"its rows of input start on 16 bytes, of output on 8 ({shape})"
    if defines["COMPLETE"] and not 0 <= shape.width - shape.out_width <= 2:
        return f"it completes rows that are at most 2 columns shorter than the input's ({shape})"
    if defines["COMPLETE"] and shape.out_width < defines["ALIGN"]:
        return f"a row ends where the next but one begins ({shape})"
    if shape.out_height > shape.height or shape.out_width > shape.width:
        return f"an output is an input in its place, and there are more outputs ({shape})"
    if max(math.prod(shape.input_shape[1:]), math.prod(shape.output_shape[1:])) >= 2**31:
        return f"offsets within an image need more than 31 bits ({shape})"
    return None


def _way(store: int, align: int, **more: int) -> dict[str, int]:
    return {"STORE": store, "ALIGN": align, **more}


STRIPS = Rung(
    name="strips",
    idea="k07's bytes in k07's strips, and no products",
    notebook="06_hopper",
    source=SOURCE,
    refusal=_refusal,
    capability=(9, 0),
    arch="90a",
    defines={
        "STORE": BULK_COPIES,
        "ALIGN": 8,
        "LOAD": 1,
        "EVICT_LOADS": 0,
        "EVICT_STORES": 0,
        "COMPLETE": 0,
        "PARTS": 2,
        "WIDTH": 1,
        "PACE": 0,
    },
    variants=(
        _way(NOTHING, 8),
        _way(BULK_COPIES, 8, LOAD=0),
        _way(REGISTERS, 2),
        _way(REGISTERS, 8),
        _way(ROWS, 2),
        _way(ROWS, 8),
        _way(ROWS, 8, EVICT_STORES=1),
        _way(ROWS, 32, EVICT_STORES=1),
        _way(BULK_COPIES, 4),
        _way(BULK_COPIES, 8),
        _way(BULK_COPIES, 16),
        _way(BULK_COPIES, 32),
        _way(BULK_COPIES, 8, EVICT_STORES=1),
        _way(BULK_COPIES, 8, EVICT_LOADS=1),
        _way(BULK_COPIES, 8, EVICT_STORES=1, EVICT_LOADS=1),
        _way(BULK_COPIES, 8, COMPLETE=1),
        _way(BULK_COPIES, 32, COMPLETE=1),
        *(_way(BULK_COPIES, 8, COMPLETE=1, WIDTH=times) for times in (2, 4, 8)),
        *(_way(NOTHING, 8, WIDTH=times) for times in (2, 8)),
        *(_way(BULK_COPIES, 8, COMPLETE=1, PARTS=parts) for parts in (4, 8)),
        *(_way(BULK_COPIES, 8, COMPLETE=1, PACE=ns) for ns in (4300, 4450, 4600, 4750)),
    ),
)
"""Built like a rung. STORE: a way to write. ALIGN: floats of memory at whose multiples a strip's
rows begin; 2 is where they happen to (8 is a sector, 32 a line). LOAD: whether it reads. EVICT_*:
whether L2 lets go of these lines first. COMPLETE: whether a row's last strip also writes the first
columns of the next row, up to a multiple of ALIGN. PARTS: of a strip, a block each. WIDTH: of a
strip, in 128 columns, shared by as many blocks. PACE: ns from a row that a block reads to the next,
at least."""


def expected(x: torch.Tensor, shape: ConvShape, defines: Mapping[str, int]) -> torch.Tensor:
    """What a variant leaves in an output of NaN, (N, K, OH, OW) float32."""
    constants = STRIPS.constants(defines)
    if constants["STORE"] == NOTHING:
        return torch.full(shape.output_shape, math.nan, device=x.device)
    if not constants["LOAD"]:
        columns = torch.arange(shape.out_width, dtype=torch.float32, device=x.device)
        return columns.expand(shape.output_shape)
    there = x[:, :, : shape.out_height, : shape.out_width]
    return torch.cat([there] * (FILTERS // CHANNELS), dim=1)


def verify(kernel: build.Kernel, shape: ConvShape, device: torch.device | str = "cpu") -> None:
    """Run a built variant on fresh random data, into an output of NaN; bit for bit.

    Raises:
        AssertionError: an output is not what `expected` says.
    """
    x, weight, _ = random_data(shape, device)
    out = torch.full(shape.output_shape, math.nan, device=device)
    y = kernel(x, weight, None, shape.with_(bias=False), out=out)
    for n in range(shape.batch):
        wanted = expected(x[n : n + 1], shape.with_(batch=1), kernel.defines)
        right = (y[n : n + 1] == wanted) | (y[n : n + 1].isnan() & wanted.isnan())
        wrong = int((~right).sum())
        assert wrong == 0, f"{kernel.key} on {shape}: {wrong} outputs of image {n} are wrong"


def _bytes(shape: ConvShape, constants: Mapping[str, int]) -> int:
    read = math.prod(shape.input_shape) if constants["LOAD"] else 0
    written = shape.outputs if constants["STORE"] != NOTHING else 0
    return BYTES_PER_FLOAT * (read + written)


def describe(defines: Mapping[str, int]) -> str:
    """What a variant does, in words for a table or figure."""
    constants = STRIPS.constants(defines)
    piece = f"{512 * constants['WIDTH']} bytes"
    if constants["STORE"] == NOTHING:
        return f"reads {piece} at a time, writes nothing"
    ways = {
        REGISTERS: "requests of 8 filters by 32 bytes",
        ROWS: "requests of 256 bytes",
        BULK_COPIES: f"bulk copies of {piece}",
    }
    starts = {2: "", 4: "from 16 bytes", 8: "from sectors", 16: "from 64 bytes"}
    start = starts.get(constants["ALIGN"], "from lines")
    if constants["COMPLETE"]:
        start = start.replace("from", "completing")
    text = ways[constants["STORE"]] + (f", {start}" if start else "")
    evicted = [name for name in ("loads", "stores") if constants[f"EVICT_{name.upper()}"]]
    if evicted:
        text += f", {' and '.join(evicted)} evicted first"
    if constants["PARTS"] != STRIPS.defines["PARTS"]:
        text += f", {constants['PARTS']} parts"
    if constants["PACE"]:
        text += f", a row every {constants['PACE'] / 1000:g} µs"
    return text if constants["LOAD"] else text + ", reads nothing"


RECORD = record.DATA_FOLDER / "strips.json"

SHAPES = {"strips": CONTRACT, "strips, whole lines": CONTRACT.with_(padding=1)}
"""The contract's, whose rows of output are 4088 bytes apart; and padded, 4096: whole lines."""


def _timing(
    name: str,
    kind: measure.Kind,
    kernel: build.Kernel,
    times: Mapping[str, tuple[float, ...]],
    moved: int,
) -> measure.Timing:
    source = kernel.rung.source_hash
    more = {"source_hash": source, "bytes": moved, "defines": kernel.defines}
    return measure.Timing(name, kind, "", times[kernel.key], **more)


def measure_strips(rungs: Sequence[Rung] = ()) -> record.Record:
    """Verify and time all variants on this machine's GPU, on both of `SHAPES`, in one run.

    Args:
        rungs: convolutions to be checked and timed beside them, on the contract's shape.

    Raises:
        AssertionError: a variant or a rung gives a wrong result.
        BuildError: one does not compile.
    """
    moves = build.load_all([(STRIPS, variant) for variant in STRIPS.variants])
    convolutions = build.load_all([(rung, {}) for rung in rungs])
    timings: list[measure.Timing] = []
    for name, shape in SHAPES.items():
        methods = moves + convolutions if shape == CONTRACT else moves
        errors = {k.key: check(k, shape, "cuda").error for k in methods[len(moves) :]}
        for kernel in moves:
            verify(kernel, shape, "cuda")
        torch.cuda.empty_cache()
        x, weight, _ = random_data(shape, "cuda")
        out = torch.empty(shape.output_shape, device="cuda")
        floor = build.load(measure.FLOOR, "cuda")
        calls = {
            kernel.key: functools.partial(kernel, x, weight, None, shape, out)
            for kernel in (*methods, floor)
        }
        times = measure.time_calls(calls, shape, rounds=3, budget_ms=100.0, warm_ms=20.0)
        for kernel in moves:
            moved = _bytes(shape, STRIPS.constants(kernel.defines))
            timings.append(_timing(name, "ceiling", kernel, times, moved))
        timings.append(_timing(f"memory floor, {name}", "ceiling", floor, times, shape.least_bytes))
        for kernel in methods[len(moves) :]:
            timing = _timing(kernel.rung.name, "rung", kernel, times, shape.least_bytes)
            rung = {"precision": kernel.precision, "error": errors[kernel.key]}
            timings.append(replace(timing, flops=shape.flops, **rung))
    return record.make("k07's bytes in its strips, without its products", CONTRACT, timings, {})
