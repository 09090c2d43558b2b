"""What k07 and k08 share: everything but the products and how values become halves.

A block keeps the weights of its filters in registers and walks down a strip of TILE_W columns.
Rows of input are copied to shared memory, converted to fp16 and multiplied; rows of output leave in
whole sectors. The rung's own text stands between the pieces here: the constants it has, its shared
memory, and how rows come, change and leave.
"""

import math
from collections.abc import Mapping

from asymconv.problem import ConvShape

INCLUDES = r"""
#include <cuda_fp16.h>

#include <climits>
#include <type_traits>

"""

_BAD_ROWS = r"""
// Which rows of an item need fp32: of the input, counted from the item's first.
struct BadRows {
  int first, last;
};
struct BadRun {
  int row, pixel;  // of the item's window, the first of 4
};
constexpr int MOST_BAD_RUNS = MOST;   // of an item: more, and whole rows are computed again
constexpr int REDO_W = 4 + S - 1;   // columns that see a run: a warp computes so many at once
constexpr int REDOS_W = (PRODUCT_W + REDO_W - 1) / REDO_W;
constexpr int ITEMS_UNDER_WAY = 4;  // producers are RING rows ahead at most, items have 3 or more
"""

_PLAN = r"""
// The same value, of which the compiler knows nothing: it cannot compute addresses once and for
// all and keep them, where registers are scarcer than multiplications.
__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// threadIdx.x, read again and not kept in a register meanwhile.
__device__ __forceinline__ int thread_again() {
#ifdef __CUDACC__
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(thread));
  return thread;
#else
  return threadIdx.x;
#endif
}

// An item is a strip of one image, from one output row on: a block takes items in turn. Strips are
// the fastest index: neighbours run side by side and share their halo's sectors in L2.
struct Plan {
  int strips, parts, rows, items;  // rows: of a part
  long long values;                // of x
  int load_w;                      // columns of a row that are fetched
  // Rows of x are whole strips and follow each other: what stands right of the last strip is the
  // next row's begin. So the last strip computes the next row's first outputs as well, and
  // completes the sector in which a row ends and the next begins.
  bool completes;
MORE};
struct Item {
  int n, oh0, rows, ow0;
};
__device__ __forceinline__ Item item_at(int index, const Plan& plan, const Conv& c) {
  index = opaque(index);
  const int strips = opaque(plan.strips), parts = opaque(plan.parts), column = index / strips;
  const int oh0 = column % parts * plan.rows;
  return {column / parts, oh0, min(plan.rows, c.OH - oh0), index % strips * TILE_W};
}

// Strips are cut into parts so that the blocks that run at once finish together: a part costs its
// rows, and some to start with.
static Plan plan_for(const Conv& c, int blocks) {
  constexpr int START = 6;  // rows' worth
  constexpr int MOST_ROWS = ROWS_OF_A_PART;
  Plan best = {};
  long long least = LLONG_MAX;
  const int strips = (c.OW + TILE_W - 1) / TILE_W;
  const int fewest = (c.OH + MOST_ROWS - 1) / MOST_ROWS;
  for (int parts = fewest; parts <= max(fewest, min(c.OH, 64)); ++parts) {
    const int rows = (c.OH + parts - 1) / parts, real = (c.OH + rows - 1) / rows;
    const long long items = (long long)c.N * strips * real;
    const long long cost = (items + blocks - 1) / blocks * (rows + START);
    if (cost < least) {
      least = cost;
      best = {strips, real, rows, (int)items, (long long)c.N * c.C * c.H * c.W};
    }
  }
  best.load_w = RING_W;
  if (c.W % 4 == 0 && c.OW % 2 == 0 && c.pad_w % 4 == 0 && ALIGN == 8) {
    best.load_w = TILE_W + 6 + S - 1;  // an even row begins 6 columns before a sector, at most
    best.completes = COMPLETES && ALIGN == 8 && c.W % TILE_W == 0 && c.pad_w == 0 && c.pad_h == 0;
  }
  return best;
}

// Which of the items under way a block's item is.
__device__ __forceinline__ int under_way(int item, int blocks_k) {
  const int by = opaque(blocks_k);
  return (item - (int)blockIdx.x / by) / ((int)gridDim.x / by) % ITEMS_UNDER_WAY;
}

// Columns that an output row leaves to the strip on its left: up to its first aligned one.
__device__ __forceinline__ int columns_to_aligned(const float* row) {
  return (int)((ALIGN - (((unsigned long long)row >> 2) & (ALIGN - 1))) & (ALIGN - 1));
}

"""

IN_ROW = r"""
// Bytes from a ring row's start to a chunk of a pixel. Rows start groups of 8 swizzled pixels.
__device__ __forceinline__ int in_row(int pixel, int chunk) {
  return pixel * PIXEL + ((chunk ^ pixel % 8) << 4);
}

"""

WARP_ARRIVES = r"""
// For a whole warp, once all its lanes are here.
__device__ __forceinline__ void warp_arrives(unsigned long long* barrier) {
  __syncwarp();
  if (thread_again() % 32 == 0) mbarrier_arrive(shared_address(barrier));
}

"""

OUT_ROW = r"""
// Sums of 64 filters by PRODUCT_W columns over a warpgroup's threads, as wgmma has them.
using Sums = float[PRODUCT_W / 2];

struct Out {
  float* first;   // (n, k0, oh, ow0)
  int plane;      // floats from a filter to the next; an image has less than 2^31
  int filters;    // of the block's that there are
  int columns;    // of the strip's and its right neighbours' that there are
  bool leftmost;  // no strip on the left writes the columns up to the first aligned one
  bool completes;  // the next row's, which follow this one's
};

// Where a row of an item is to go. Worked out anew each time: registers are needed for weights and
// sums.
__device__ __forceinline__ Out out_row(int item, int row, float* y, const Conv& c,
                                       const Plan& plan, int blocks_k) {
  const Item at = item_at(item, plan, c);
  const int k0 = opaque(blockIdx.x) % blocks_k * BLOCK_K;
  const int oh = at.oh0 + row;
  const bool completes = COMPLETES && plan.completes;
  return {y + (((long long)at.n * c.K + k0) * c.OH + oh) * c.OW + at.ow0,
          c.OH * c.OW,
          c.K - k0,
          c.OW - at.ow0,
          at.ow0 == 0 && !(completes && oh > 0),
          completes && at.ow0 + TILE_W >= c.OW && oh + 1 < c.OH};
}

"""

_REDO = r"""
// REDO_W outputs of one filter and row, from column0 on, again in fp32 from global memory, by one
// warp, whose lanes share the terms: for values that fp16 cannot hold. Right for any input.
__device__ __forceinline__ void compute_in_fp32(const float* __restrict__ x,
                                                const float* __restrict__ w, const Conv& c,
                                                const Out& out, float bias, int k, int n, int oh,
                                                int ow0, int column0) {
  const int lane = thread_again() & 31, terms = c.C * TAPS;
  const float* const filter = w + (long long)(c.K - out.filters + k) * terms;
  float sum[REDO_W] = {};
  #pragma unroll 1
  for (int i = lane; i < terms; i += 32) {
    const int channel = i / TAPS, tap = i % TAPS;
    const float weight = __ldg(filter + i);
    const float* const plane = x + ((long long)n * c.C + channel) * c.H * c.W;
    #pragma unroll
    for (int j = 0; j < REDO_W; ++j) {
      const int next = out.completes && column0 + j >= out.columns + S - 1;  // the next row
      const int ih = oh - c.pad_h + tap / S + next;
      const int iw = (next ? -out.columns - (S - 1) : ow0 - c.pad_w) + tap % S + column0 + j;
      const bool inside = (unsigned)ih < (unsigned)c.H && (unsigned)iw < (unsigned)c.W;
      sum[j] = fmaf(inside ? __ldg(plane + (long long)ih * c.W + iw) : 0.0f, weight, sum[j]);
    }
  }
  float mine = 0.0f;  // lane j has column0 + j
  #pragma unroll
  for (int j = 0; j < REDO_W; ++j) {
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], lanes);
    }
    if (lane == j) mine = sum[j] + bias;
  }
  const int column = column0 + lane, first = column - (out.columns + S - 1);  // of the next row
  if (lane >= REDO_W || column < 0) return;
  float* const row = out.first + (long long)k * out.plane;
  const int skip = columns_to_aligned(row);
  const int begin = out.leftmost ? 0 : skip, end = min(skip + TILE_W, out.columns);
  if (column >= begin && column < end) row[column] = mine;
  if (out.completes && first >= 0 && first < columns_to_aligned(row + out.columns)) {
    row[out.columns + first] = mine;
  }
}

// Looks for the runs of some rows of an item's input that fp16 does not hold.
__device__ __forceinline__ void find_bad_runs(const float* __restrict__ x, const Conv& c,
                                              const Plan& plan, const Item& at, const BadRows& bad,
                                              RingState* state) {
  constexpr int QUADS = RING_W / 4;
  const HalfRange range(state->scale);
  #pragma unroll 1
  for (int row = bad.first; row <= bad.last; ++row) {
    #pragma unroll 1
    for (int i = threadIdx.x; i < c.C * QUADS; i += REDOERS) {
      const int channel = i / QUADS, quad = i % QUADS;
      float largest = 0.0f;
      #pragma unroll
      for (int j = 0; j < 4; ++j) {
        int ih = at.oh0 - c.pad_h + row, iw = ((at.ow0 - c.pad_w) & ~3) + quad * 4 + j;
        if (COMPLETES && plan.completes && iw >= c.W) ++ih, iw -= c.W;
        const bool inside = (unsigned)ih < (unsigned)c.H && (unsigned)iw < (unsigned)c.W;
        const long long plane = (long long)at.n * c.C + channel;
        if (inside) largest = larger_magnitude(largest, __ldg(x + (plane * c.H + ih) * c.W + iw));
      }
      if (range.holds(__float_as_uint(largest))) continue;
      const int place = atomicAdd(&state->bad_runs, 1);
      if (place < MOST_BAD_RUNS) state->bad_run[place] = {row, quad * 4};
    }
  }
}

// Outputs of an item that fp16 cannot give, if any; once all of its rows were seen and all sums
// sent. Of a few runs those that see them: ReLU leaves a run of zeros with one value near zero now
// and then.
__device__ __forceinline__ void redo_bad_rows(const float* __restrict__ x,
                                              const float* __restrict__ w, float* __restrict__ y,
                                              const Conv& conv, const Plan& plan, int blocks_k,
                                              int item, RingState* state) {
  // nothing of this is to be computed once and for all: its registers would be missed above
  Conv c = conv;
  c.C = opaque(c.C), c.H = opaque(c.H), c.W = opaque(c.W), c.K = opaque(c.K);
  c.OH = opaque(c.OH), c.OW = opaque(c.OW), c.pad_h = opaque(c.pad_h), c.pad_w = opaque(c.pad_w);
SETTLED
  const Item at = item_at(item, plan, c);
  BadRows* const of_item = &state->bad[under_way(item, blocks_k)];
  const BadRows bad = *of_item;
  const bool whole = state->weights_bad;
  if (!whole && bad.last < 0) return;
  named_barrier<REDOERS>(1);  // all have read it
  if (threadIdx.x == 0) {
    *of_item = {INT_MAX, -1};
    state->bad_runs = 0;
  }
  named_barrier<REDOERS>(1);
  if (!whole) find_bad_runs(x, c, plan, at, bad, state);
  named_barrier<REDOERS>(1);
  const int warp = thread_again() / 32, runs = state->bad_runs;
  const auto redo = [&](int row, int column0) {
    const Out out = out_row(item, row, y, c, plan, blocks_k);
    #pragma unroll 1
    for (int k = warp; k < min(BLOCK_K, out.filters); k += REDOERS / 32) {
      compute_in_fp32(x, w, c, out, state->bias[k], k, at.n, at.oh0 + row, at.ow0, column0);
    }
  };
  const int first = whole ? 0 : max(0, bad.first - (R - 1));
  const int last = whole ? at.rows - 1 : min(bad.last, at.rows - 1);
  if (whole || runs > MOST_BAD_RUNS) {
    #pragma unroll 1
    for (int i = 0; i < (last - first + 1) * REDOS_W; ++i) {
      redo(first + i / REDOS_W, i % REDOS_W * REDO_W);
    }
  } else {
    const int lead = -c.pad_w & 3;  // pixels of the window before the first product's
    #pragma unroll 1
    for (int i = 0; i < runs * R; ++i) {
      const BadRun run = state->bad_run[i / R];
      const int row = run.row - i % R;
      if (row >= 0 && row < at.rows) redo(row, run.pixel - lead - (S - 1));
    }
  }
}
"""

_HOPPER_KERNEL = r"""
constexpr int SHARED_BYTES = STATE_AT + sizeof(State);
static_assert(SHARED_BYTES <= 227 * 1024, "more shared memory than a block can have");

// WIDE: rows of x start on 16 bytes. EVEN: rows of y start on 8. __maxnreg__ says what a thread is
// launched with, and so what setmaxnreg has to share out.
template <bool WIDE, bool EVEN>
__global__ void __maxnreg__(LAUNCH_REGISTERS)
    conv2d_hopper(const float* __restrict__ x, const float* __restrict__ w,
                  const float* __restrict__ bias, float* __restrict__ y, const Conv c,
                  const Plan plan, const int blocks_k) {
  extern __shared__ __align__(1024) unsigned char shared[];
  State* const state = reinterpret_cast<State*>(shared + STATE_AT);
  if (threadIdx.x == 0) {
    if (shared_address(shared) % 1024) __trap();
    state->initialize();
    fence_async_proxy();  // the copy engine sees the barriers
  }
  const int scale =
      sampled_scale<THREADS / 32>(x, plan.values, reinterpret_cast<unsigned*>(shared));
  if (threadIdx.x == 0) state->scale = scale;
  fence_async_proxy();  // the samples' place is written by copies next
  __syncthreads();
TOGETHER
  if (threadIdx.x < CONSUMERS) {
    registers_up_to<CONSUMER_REGISTERS>();
    consume<EVEN>(x, w, bias, y, c, plan, blocks_k, shared, state, scale);
  } else {
    registers_down_to<PRODUCER_REGISTERS>();
    produce<WIDE>(x, c, plan, blocks_k, shared, state, scale);
  }
TOGETHER
}

// On a device's own number of multiprocessors: a block has one for itself.
extern "C" int asymconv_launch(const float* x, const float* w, const float* bias, float* y,
                               const Conv* c, void* stream) {
  const bool wide = c->W % 4 == 0 && (unsigned long long)x % 16 == 0;
  const auto even = wide ? conv2d_hopper<true, true> : conv2d_hopper<false, true>;
  const auto odd = wide ? conv2d_hopper<true, false> : conv2d_hopper<false, false>;
  const auto kernel = c->OW % 2 == 0 ? even : odd;
  int device, multiprocessors;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
  }
  if (error != cudaSuccess) return (int)error;
  const int blocks_k = (c->K + BLOCK_K - 1) / BLOCK_K;
  const int at_once = max(1, multiprocessors / blocks_k);
  const Plan plan = PLANNED;
  const int blocks = blocks_k * min(plan.items, at_once);
LAUNCHED
  return (int)cudaGetLastError();
}
"""


def plan(most_rows: int, more: str = "") -> str:
    """How the work is shared out.

    Args:
        most_rows: of output that a part of a strip has.
        more: members of Plan, 0 unless the launch says otherwise.
    """
    return _PLAN.replace("MORE", more).replace("ROWS_OF_A_PART", str(most_rows))


_LAUNCH = """\
  kernel<<<blocks, THREADS, SHARED_BYTES, (cudaStream_t)stream>>>(x, w, bias, y, *c, plan,
                                                                 blocks_k);
"""
_LAUNCH_CLUSTERS = """\
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = blocks_k % 2 ? 1 : 2;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = THREADS;
  config.dynamicSmemBytes = SHARED_BYTES;
  config.stream = (cudaStream_t)stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  error = cudaLaunchKernelEx(&config, kernel, x, w, bias, y, *c, plan, blocks_k);
  if (error != cudaSuccess) return (int)error;
"""


def hopper_kernel(planned: str = "plan_for(*c, at_once)", *, clustered: bool = False) -> str:
    """The kernel and its launch.

    Args:
        planned: the Plan of a launch, a C++ expression.
        clustered: blocks of the same strip are clusters of two, if their number is even.
    """
    together = "  if (cluster_blocks() > 1) cluster_barrier();\n" if clustered else ""
    launch = _LAUNCH_CLUSTERS if clustered else _LAUNCH
    text = _HOPPER_KERNEL.replace("PLANNED", planned).replace("TOGETHER\n", together)
    return text.replace("LAUNCHED\n", launch)


def bad_rows(most_runs: int) -> str:
    """What notes where fp16 does not do.

    Args:
        most_runs: of an item that are noted; with more, whole rows are computed again.
    """
    return _BAD_ROWS.replace("MOST;", f"{most_runs};")


def redo(redoers: str, *, settled: str = "") -> str:
    """What computes outputs again where fp16 does not do.

    Args:
        redoers: the threads that do it, from the block's first on, a C++ expression.
        settled: what makes the item's outputs and the news of bad rows final, statements.
    """
    return _REDO.replace("SETTLED\n", settled).replace("REDOERS", redoers)


def refusal(shape: ConvShape, defines: Mapping[str, int]) -> str | None:
    """3×3, stride 1, dilation 1, one group, up to 64 input channels; any size, padding and bias."""
    if shape.kernel != (3, 3) or shape.stride != (1, 1) or shape.dilation != (1, 1):
        return f"its window slides over 3×3 pixels, stride 1, dilation 1 ({shape})"
    if shape.groups > 1 or shape.in_channels > 64:
        return f"its ring holds 64 channels of one group ({shape})"
    if max(math.prod(shape.input_shape[1:]), math.prod(shape.output_shape[1:])) >= 2**31:
        return f"offsets within an image need more than 31 bits ({shape})"
    strips = -(-shape.out_width // 128)
    if shape.batch * strips * min(shape.out_height, 64) >= 2**31:
        return f"its items are counted with 31 bits ({shape})"
    return None
