"""k07: Hopper's own tensor cores, over a ring of rows that slides down the image.

What the last rung was limited by: one block an SM whose warps convert, multiply and store in step;
and mma.sync, which on Hopper reaches some 60 % of what wgmma does.

What it changes:

- wgmma reads both operands from shared memory by itself. Filters are its rows, pixels its columns.
  All weights of 128 filters, 147,456 bytes as fp16, stay in shared memory.
- A pixel is a row of 64 channels, 128 bytes, swizzled. A tap of the kernel is the same data started
  some pixels further: wgmma's descriptor takes any start, so nothing is laid out twice.
- A block walks down a strip of 128 columns. Four rows of input are a ring: three are multiplied,
  the fourth is filled. Two warpgroups fetch and convert; two multiply, 64 filters each, and store.
  mbarriers hand rows to and fro; nobody waits for a whole block.
- The next row is on its way in registers while this one, converted, waits for its place.
- Rows of the output are 1022 * 4 bytes apart, so most begin in the middle of a 32-byte sector. Each
  product is 8 columns wider than the strip; four lanes, which hold 8 neighbouring columns, hand
  them round until a whole sector comes together, and write that.
- fp32's range is kept by half_range.py. What fp16 cannot hold is computed again, in fp32, row by
  row, by the block that met it: about 80 microseconds a row of 128 columns. The look at every value
  costs nothing that could be measured.

What it predicts, on the contract's shape: the bytes alone take 1.15 to 1.2 ms. Products: 36 wgmma
of 64 x 136 x 16 a warpgroup and row, 2.9 microseconds for both, 0.75 ms in all. They cannot start
before the last row is there, and stores follow them: if each took a microsecond more, 1.25 ms.

Measured: notebook 06, from figures/data: 1.7 ms, 2.4 times as fast as PyTorch's default, and 1.4
times the memory's own time. Parts left out (not recorded, one run): products alone 1.1 ms, loads
alone 0.57, stores alone 1.1, loads and stores without products 1.65.

What limits it now: stores of 32 bytes, eight filters at a time, and loads beside them. A kernel
that only moves the same bytes in the same strips took 1.29 ms with bulk copies of 512 bytes, 1.37
with streaming stores of 128, 1.55 with ordinary ones. Bulk copies cost this kernel more to issue
than they saved; long stores through shared memory made the time between products too long. Storing
one row while the next is multiplied is what remains: it takes two sets of sums.
"""

from asymconv.kernels.half_range import HALF_RANGE
from asymconv.kernels.hopper_rows import refusal
from asymconv.kernels.ptx import HOPPER, wgmma_f16
from asymconv.kernels.rung import Rung

DEFINES = {"SHIFT": 1, "RING": 4}

VARIANTS = (
    {"SHIFT": 1},
    {"SHIFT": 0},
)
"""Whole sectors, and what it costs to write where rows begin."""

SOURCE = (
    HALF_RANGE
    + HOPPER
    + wgmma_f16(136)
    + r"""
#include <cuda_fp16.h>

// A block: 128 filters, strips of 128 columns. Its products are 136 columns wide, so that each
// output row can start at the first whole 32-byte sector in the strip, wherever that is.
constexpr int BLOCK_K = 128, CHANNELS = 64, R = 3, S = 3, TAPS = R * S;
constexpr int TILE_W = 128, PRODUCT_W = TILE_W + 8;

// Warpgroups: two multiply and store, 64 filters each; two fetch, half of the channels each.
constexpr int WARPGROUP = 128, CONSUMERS = 2 * WARPGROUP, PRODUCERS = 2 * WARPGROUP;
constexpr int THREADS = CONSUMERS + PRODUCERS;

// Shared memory, in bytes. A pixel is a row of 64 channels, 128 bytes in 8 chunks of 16, chunk i
// of pixel p at place i ^ (p % 8) (the 128-byte swizzle). A row of the ring has pixels for any
// start of a strip within 16 bytes.
constexpr int PIXEL = CHANNELS * 2, RING_W = 144, RING_ROW = RING_W * PIXEL;
constexpr int WEIGHT_TAP = BLOCK_K * PIXEL, WEIGHTS = TAPS * WEIGHT_TAP;
constexpr int RING_AT = WEIGHTS, STATE_AT = RING_AT + RING * RING_ROW;
static_assert(RING_ROW % 1024 == 0, "a ring row starts a group of 8 swizzled rows");
static_assert(RING_W >= 3 + PRODUCT_W + S - 1, "a tap's window lies in the ring row");
static_assert(RING >= R + 1, "a row is filled while three are read");

// Which rows of an item need fp32: of the input, counted from the item's first.
struct BadRows {
  int first, last;
};
constexpr int ITEMS_UNDER_WAY = 4;  // producers are RING rows ahead at most, items have 3 or more
struct State {
  unsigned long long full[RING], empty[RING];
  BadRows bad[ITEMS_UNDER_WAY];
  int weights_bad;
  float turn[CONSUMERS / 32][CHANNELS / 2 * TAPS];
  float bias[BLOCK_K];
  signed char exponent[BLOCK_K];  // of the power of two that makes sums outputs
};
constexpr int SHARED_BYTES = STATE_AT + sizeof(State);
static_assert(SHARED_BYTES <= 227 * 1024, "more shared memory than a block can have");

// An item is a strip of one image, from one output row on: a block takes items in turn. Strips are
// the fastest index: neighbours run side by side and share their halo's sectors in L2.
struct Plan {
  int strips, parts, rows, items;  // rows: of a part
};
struct Item {
  int n, oh0, rows, ow0;
};
__device__ __forceinline__ Item item_at(int index, const Plan& plan, const Conv& c) {
  const int strip = index % plan.strips, part = index / plan.strips % plan.parts;
  const int oh0 = part * plan.rows;
  return {index / plan.strips / plan.parts, oh0, min(plan.rows, c.OH - oh0), strip * TILE_W};
}

// Columns that an output row leaves to the strip on its left: up to its first whole sector.
__device__ __forceinline__ int columns_to_sector(const float* row) {
  return (int)((8 - (((unsigned long long)row >> 2) & 7)) & 7);
}

// The same value, of which the compiler knows nothing: it cannot compute addresses once and for
// all and keep them, where registers are scarcer than multiplications.
__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// ---- producers: global fp32, (channel, row, column) -> ring, fp16, (row, column, channel)

// Four neighbouring values of a row of an image; zero outside. WIDE: `row` and `column` are on 16
// bytes, so they are inside or outside together.
template <bool WIDE>
__device__ __forceinline__ float4 load_four(const float* image, int row, int column, bool inside,
                                            int width) {
  if (WIDE) {
    return load_four_if(inside && (unsigned)column < (unsigned)width, image + row + column);
  }
  const auto at = [&](int i) {
    const bool there = inside && (unsigned)(column + i) < (unsigned)width;
    return there ? __ldg(image + row + column + i) : 0.0f;
  };
  return make_float4(at(0), at(1), at(2), at(3));
}

__device__ __forceinline__ unsigned largest_of(float4 v) {
  return __float_as_uint(larger_magnitude(larger_magnitude(v.x, v.y), larger_magnitude(v.z, v.w)));
}

// Goes through the rows of this block's items. Where an item lies is worked out again for each row:
// registers are scarcer here than divisions.
struct Cursor {
  int item, row;  // row: of the input, from the item's first
  __device__ __forceinline__ void next(const Plan& plan, const Conv& c, int item_step) {
    if (++row < item_at(opaque(item), plan, c).rows + R - 1) return;
    row = 0;
    item += item_step;
  }
};

// Bytes from a ring row's start to a chunk of a pixel. Rows start groups of 8 swizzled pixels.
__device__ __forceinline__ int in_row(int pixel, int chunk) {
  return pixel * PIXEL + ((chunk ^ pixel % 8) << 4);
}

// What of a row a thread fetches. A warp: 32 pixels of 32 channels, a thread 4
// of 8: in global memory 4 rows of 128 bytes an instruction, in shared memory 8 different chunks
// for any 8 neighbouring lanes. Of the 16 pixels right of that, the halo, a thread has 4 of one
// channel.
struct Place {
  int pixel, chunk, halo_pixel, halo_channel;
  __device__ __forceinline__ Place() {
    const int thread = opaque(threadIdx.x) - CONSUMERS, lane = thread % 32, warp = thread / 32;
    pixel = warp % 4 * 32 + ((lane & 1) | (lane >> 3) << 1) * 4;
    chunk = warp / 4 * 4 + lane / 2 % 4;
    halo_pixel = TILE_W + lane % 4 * 4;
    halo_channel = thread / 4;
  }
};

// The same, converted: 8 channels of each pixel; a channel of 4.
struct Halves {
  __half2 value[4][4], halo[2];

  __device__ __forceinline__ void put(unsigned char* ring) const {
    const Place to;
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
      *reinterpret_cast<uint4*>(ring + in_row(to.pixel + i, to.chunk)) =
          *reinterpret_cast<const uint4*>(value[i]);
    }
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = in_row(to.halo_pixel + i, to.halo_channel / 8) + to.halo_channel % 8 * 2;
      *reinterpret_cast<__half*>(ring + at) =
          i % 2 ? __high2half(halo[i / 2]) : __low2half(halo[i / 2]);
    }
  }
};

struct Fetch {
  float4 value[8], halo;
  unsigned largest[9];  // of this thread's values of each channel, and of the halo

  // Converts what was fetched and fetches the next row: each register anew as soon as it is free.
  template <bool WIDE>
  __device__ __forceinline__ Halves convert_and_load(float factor, const float* __restrict__ x,
                                                     const Conv& c, const Plan& plan,
                                                     const Cursor& next, bool more) {
    const Place to;
    const int plane = c.H * c.W;  // an image has less than 2^31 values
    const Item at = item_at(opaque(next.item), plan, c);
    const float* const image = x + at.n * ((long long)c.C * plane);
    const int ih = at.oh0 - c.pad_h + next.row, iw = (at.ow0 - c.pad_w) & ~3;
    const bool inside = more && (unsigned)ih < (unsigned)c.H;
    Halves h;
    #pragma unroll
    for (int j = 0; j < 4; ++j) {  // pairs of channels
      #pragma unroll
      for (int i = 0; i < 4; ++i) {
        h.value[i][j] = __floats2half2_rn(factor * (&value[2 * j].x)[i],
                                          factor * (&value[2 * j + 1].x)[i]);
      }
      #pragma unroll
      for (int i = 2 * j; i < 2 * j + 2; ++i) {
        largest[i] = largest_of(value[i]);
        const int channel = to.chunk * 8 + i;
        value[i] = load_four<WIDE>(image, channel * plane + ih * c.W, iw + to.pixel,
                                   inside && channel < c.C, c.W);
      }
    }
    h.halo[0] = __floats2half2_rn(factor * halo.x, factor * halo.y);
    h.halo[1] = __floats2half2_rn(factor * halo.z, factor * halo.w);
    largest[8] = largest_of(halo);
    halo = load_four<WIDE>(image, to.halo_channel * plane + ih * c.W, iw + to.halo_pixel,
                           inside && to.halo_channel < c.C, c.W);
    return h;
  }

  // Whether fp16 holds what was converted. Runs: 32 pixels of a channel, of 8 lanes; 16 of the
  // halo, of 4. If each lane's own part is good, so is the run.
  __device__ __forceinline__ bool good(const HalfRange& range) const {
    bool all = true;
    #pragma unroll
    for (int i = 0; i < 9; ++i) all = all && range.holds(largest[i]);
    if (__all_sync(0xffffffffu, all)) return true;
    all = true;
    #pragma unroll
    for (int i = 0; i < 9; ++i) {
      unsigned run = max(largest[i], __shfl_xor_sync(0xffffffffu, largest[i], 1));
      run = max(run, __shfl_xor_sync(0xffffffffu, run, i < 8 ? 8 : 2));
      if (i < 8) run = max(run, __shfl_xor_sync(0xffffffffu, run, 16));
      all = all && range.holds(run);
    }
    return all;
  }
};

template <bool WIDE>
__device__ __forceinline__ void produce(const float* __restrict__ x, const Conv& c,
                                        const Plan& plan, int first_item, int item_step,
                                        unsigned char* shared, State* state, int scale) {
  const float factor = power_of_two(scale);
  const HalfRange range(scale);
  if (first_item >= plan.items) return;
  Cursor cursor = {first_item, 0};
  Fetch fetch = {};
  fetch.convert_and_load<WIDE>(factor, x, c, plan, cursor, true);
  int slot = 0, parity = 1, under_way = 0;  // the ring's first round waits for nothing
  bool more = true;
  #pragma unroll 1
  while (more) {
    // A row waits for its place converted, in half the registers, while the next one is fetched.
    const int row = cursor.row;
    cursor.next(plan, c, item_step);
    more = cursor.item < plan.items;
    const Halves halves = fetch.convert_and_load<WIDE>(factor, x, c, plan, cursor, more);
    const bool good = fetch.good(range);
    mbarrier_wait(shared_address(&state->empty[slot]), parity);
    halves.put(shared + RING_AT + slot * RING_ROW);
    if (!good) {
      atomicMin(&state->bad[under_way].first, row);
      atomicMax(&state->bad[under_way].last, row);
    }
    fence_async_proxy();
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(shared_address(&state->full[slot]));
    if (++slot == RING) slot = 0, parity ^= 1;
    if (cursor.row == 0) under_way = (under_way + 1) % ITEMS_UNDER_WAY;
  }
}

// ---- consumers

// The block's weights, fp16, as 9 matrices of 128 filters by 64 channels, swizzled like pixels.
// Each filter has its own power of two. A warp takes filter after filter: reads it in the order of
// memory, (channel, tap), and turns half of it at a time in shared memory.
__device__ __forceinline__ void convert_weights(const float* __restrict__ w,
                                                const float* __restrict__ bias, const Conv& c,
                                                int k0, unsigned char* shared, State* state,
                                                int input_scale) {
  constexpr int HALF = CHANNELS / 2 * TAPS, LOADS = 2 * HALF / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* const turn = state->turn[warp];
  float value[LOADS];
  const auto load = [&](int k) {
    const float* const filter = w + (long long)(k0 + k) * c.C * TAPS;
    #pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      const int at = lane + 32 * i;
      value[i] = k < BLOCK_K && k0 + k < c.K && at < c.C * TAPS ? __ldg(filter + at) : 0.0f;
    }
  };
  load(warp);
  #pragma unroll 1
  for (int k = warp; k < BLOCK_K; k += CONSUMERS / 32) {
    unsigned largest = 0;
    #pragma unroll
    for (int i = 0; i < LOADS; ++i) largest = max(largest, magnitude(value[i]));
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
    }
    const int scale = scale_for(largest, WEIGHT_TOP), exponent = -(input_scale + scale);
    const HalfRange range(scale);
    const float factor = power_of_two(scale);
    bool good = exponent >= -126 && exponent <= 126;
    if (lane == 0) {
      state->exponent[k] = (signed char)min(126, max(-126, exponent));
      state->bias[k] = bias && k0 + k < c.K ? __ldg(bias + k0 + k) : 0.0f;
    }
    float held[LOADS];
    #pragma unroll
    for (int i = 0; i < LOADS; ++i) held[i] = value[i];
    load(k + CONSUMERS / 32);
    #pragma unroll
    for (int half = 0; half < 2; ++half) {
      __syncwarp();
      #pragma unroll
      for (int i = 0; i < LOADS / 2; ++i) turn[lane + 32 * i] = held[half * LOADS / 2 + i];
      __syncwarp();
      const int channel = half * 32 + lane;
      unsigned run = 0;
      #pragma unroll
      for (int tap = 0; tap < TAPS; ++tap) {
        const float v = turn[lane * TAPS + tap];
        run = max(run, magnitude(v));
        unsigned char* const to = shared + tap * WEIGHT_TAP + in_row(k, channel / 8);
        *reinterpret_cast<__half*>(to + channel % 8 * 2) = __float2half_rn(factor * v);
      }
      good = good && range.holds(run);
    }
    if (!good) state->weights_bad = 1;
  }
}

// Sums of 64 filters by 136 columns, over a warpgroup's threads as wgmma_m64n136k16_f16 has them.
using Sums = float[PRODUCT_W / 2];

// One output row, all taps. `pixels`: where the first tap's window starts within a ring row; a tap
// further right starts a pixel later.
__device__ __forceinline__ void multiply(Sums& sum, unsigned weights, unsigned ring, int q,
                                         int pixels) {
  wgmma_fence();
  #pragma unroll
  for (int r = 0; r < R; ++r) {
    const unsigned row = ring + (q + r) % RING * RING_ROW + pixels * PIXEL;
    #pragma unroll
    for (int s = 0; s < S; ++s) {
      #pragma unroll
      for (int part = 0; part < CHANNELS / 16; ++part) {  // 16 channels are 32 bytes
        wgmma_m64n136k16_f16(sum, swizzled_rows(weights + (r * S + s) * WEIGHT_TAP + part * 32),
                             swizzled_rows(row + s * PIXEL + part * 32), r + s + part);
      }
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
}

struct Out {
  float* first;   // (n, k0, oh, ow0)
  int plane;      // floats from a filter to the next; an image has less than 2^31
  int filters;    // of the block's 128 that there are
  int columns;    // of the strip's that there are
  bool leftmost;  // no strip on the left
};

// Writes one output row of a warp's 16 filters. Four lanes hold 8 neighbouring columns of a
// filter, 32 bytes; but a whole sector starts `skip` columns further right. So the four hand their
// sums round: a sector comes from two neighbouring eights. EVEN: rows start on 8 bytes, so pairs of
// columns stay together.
template <bool EVEN>
__device__ __forceinline__ void store(const Sums& sum, const Out& out, const State* state) {
  const int lane = threadIdx.x % 32, column = lane % 4 * 2;
  #pragma unroll
  for (int eight = 0; eight < 2; ++eight) {
    const int k = threadIdx.x / 32 * 16 + eight * 8 + lane / 4;
    const float factor = power_of_two(state->exponent[k]), bias = state->bias[k];
    const auto finished = [&](int j, int i) {
      return fmaf(sum[4 * j + eight * 2 + i], factor, bias);
    };
    float* const row = out.first + k * out.plane + column;
    const int skip = SHIFT ? columns_to_sector(row - column) : 0;
    const int columns = k < out.filters ? out.columns - column : 0;  // from this thread's on
    // of the columns `column + skip` and one right of it: which lane has them, of which eight
    const int from0 = (lane & ~3) | (column + skip) / 2 % 4;
    const int from1 = EVEN ? from0 : (lane & ~3) | (column + skip + 1) / 2 % 4;
    const int odd = EVEN ? 0 : skip % 2;
    const bool here0 = column + odd >= skip, here1 = EVEN ? here0 : column + 1 - odd >= skip;
    float next0 = finished(0, 0), next1 = finished(0, 1);
    if (SHIFT) {  // leftmost: nobody else writes what comes before the sectors
      const int before = out.leftmost ? min(skip - column, columns) : 0;
      if (before > 0) row[0] = next0;
      if (before > 1) row[1] = next1;
    }
    #pragma unroll
    for (int j = 0; j < TILE_W / 8; ++j) {
      float v0 = next0, v1 = next1;
      const float this0 = odd ? next1 : next0, this1 = odd ? next0 : next1;
      next0 = finished(j + 1, 0), next1 = finished(j + 1, 1);
      if (SHIFT) {
        v0 = __shfl_sync(0xffffffffu, here0 ? this0 : odd ? next1 : next0, from0);
        v1 = __shfl_sync(0xffffffffu, here1 ? this1 : odd ? next0 : next1, from1);
      }
      float* const to = row + skip + 8 * j;
      if (EVEN) {
        if (skip + 8 * j < columns) *reinterpret_cast<float2*>(to) = make_float2(v0, v1);
      } else {
        if (skip + 8 * j < columns) to[0] = v0;
        if (skip + 8 * j + 1 < columns) to[1] = v1;
      }
    }
  }
}

// Filters k0 to k0 + 7 of one output row again, in fp32 from global memory, by one warp: for values
// that fp16 cannot hold. Right for any input, and slow.
__device__ __forceinline__ void compute_in_fp32(const float* __restrict__ x,
                                                const float* __restrict__ w, const Conv& c,
                                                const Out& out, const float* biases, int first_k,
                                                int k0, int n, int oh, int ow0) {
  constexpr int FILTERS = 8, GROUPS = (PRODUCT_W + 31) / 32;
  const int lane = threadIdx.x % 32;
  float sum[FILTERS][GROUPS] = {};
  #pragma unroll 1
  for (int channel = 0; channel < c.C; ++channel) {
    #pragma unroll 1
    for (int tap = 0; tap < TAPS; ++tap) {
      const int ih = oh - c.pad_h + tap / S, iw = ow0 - c.pad_w + tap % S + lane;
      const float* const row = x + (((long long)n * c.C + channel) * c.H + ih) * c.W;
      float value[GROUPS];
      #pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
        const bool inside = (unsigned)ih < (unsigned)c.H && (unsigned)(iw + 32 * g) < (unsigned)c.W;
        value[g] = inside ? __ldg(row + iw + 32 * g) : 0.0f;
      }
      #pragma unroll
      for (int k = 0; k < FILTERS; ++k) {
        const int filter = min(first_k + k0 + k, c.K - 1);
        const float weight = __ldg(w + ((long long)filter * c.C + channel) * TAPS + tap);
        #pragma unroll
        for (int g = 0; g < GROUPS; ++g) sum[k][g] = fmaf(value[g], weight, sum[k][g]);
      }
    }
  }
  #pragma unroll
  for (int k = 0; k < FILTERS; ++k) {
    if (k0 + k >= out.filters) break;
    float* const row = out.first + (k0 + k) * out.plane;
    const int skip = SHIFT ? columns_to_sector(row) : 0;
    const int begin = out.leftmost ? 0 : skip, end = min(skip + TILE_W, out.columns);
    #pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      const int at = lane + 32 * g;
      if (at >= begin && at < end) row[at] = sum[k][g] + biases[k0 + k];
    }
  }
}

template <bool EVEN>
__device__ __forceinline__ void consume(const float* __restrict__ x, const float* __restrict__ w,
                                        const float* __restrict__ bias, float* __restrict__ y,
                                        const Conv& c, const Plan& plan, int k0, int first_item,
                                        int item_step, unsigned char* shared, State* state,
                                        int scale) {
  convert_weights(w, bias, c, k0, shared, state, scale);
  fence_async_proxy();
  named_barrier<CONSUMERS>(1);

  const unsigned weights = shared_address(shared) + threadIdx.x / WARPGROUP * 64 * PIXEL;
  const unsigned ring = shared_address(shared) + RING_AT;
  const auto wait_for_row = [&](int q) {
    mbarrier_wait(shared_address(&state->full[q % RING]), q / RING & 1);
  };
  const auto release_row = [&](int q) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(shared_address(&state->empty[q % RING]));
  };
  int q = 0, under_way = 0;  // q: rows of the ring that are done with
  for (int item = first_item; item < plan.items; item += item_step) {
    const auto row_of = [&](int i) {
      const Item at = item_at(opaque(item), plan, c);
      return Out{y + (((long long)at.n * c.K + k0) * c.OH + at.oh0 + i) * c.OW + at.ow0,
                 c.OH * c.OW, c.K - k0, c.OW - at.ow0, at.ow0 == 0};
    };
    const int rows = item_at(item, plan, c).rows;
    const int pixels = (unsigned)-c.pad_w & 3;  // strips start on 16 bytes
    wait_for_row(q);
    wait_for_row(q + 1);
    #pragma unroll 1
    for (int i = 0; i < rows; ++i, ++q) {
      wait_for_row(q + 2);
      Sums sum;
      multiply(sum, opaque(weights), ring, q, pixels);
      release_row(q);
      store<EVEN>(sum, row_of(i), state);
    }
    release_row(q++);
    release_row(q++);

    // rows that fp16 cannot hold, if any
    const Item at = item_at(opaque(item), plan, c);
    named_barrier<CONSUMERS>(1);  // all rows were seen, all sums stored
    BadRows bad = state->bad[under_way];
    if (state->weights_bad) bad = {0, at.rows + R - 2};
    named_barrier<CONSUMERS>(1);  // all have read it
    if (threadIdx.x == 0) state->bad[under_way] = {INT_MAX, -1};
    under_way = (under_way + 1) % ITEMS_UNDER_WAY;
    for (int row = max(0, bad.first - (R - 1)); row <= min(bad.last, at.rows - 1); ++row) {
      const Out out = row_of(row);
      #pragma unroll 1
      for (int k = threadIdx.x / 32 * 8; k < BLOCK_K; k += CONSUMERS / 32 * 8) {
        compute_in_fp32(x, w, c, out, state->bias, k0, k, at.n, at.oh0 + row, at.ow0);
      }
    }
  }
}

template <bool WIDE, bool EVEN>
__global__ void __launch_bounds__(THREADS, 1)
    conv2d_hopper_ring(const float* __restrict__ x, const float* __restrict__ w,
                       const float* __restrict__ bias, float* __restrict__ y, const Conv c,
                       const Plan plan, const int blocks_k) {
  extern __shared__ __align__(1024) unsigned char shared[];
  State* const state = reinterpret_cast<State*>(shared + STATE_AT);
  if (threadIdx.x == 0) {
    if (shared_address(shared) % 1024) __trap();
    for (int i = 0; i < RING; ++i) {
      mbarrier_init(shared_address(&state->full[i]), PRODUCERS / 32);
      mbarrier_init(shared_address(&state->empty[i]), CONSUMERS / 32);
    }
    for (int i = 0; i < ITEMS_UNDER_WAY; ++i) state->bad[i] = {INT_MAX, -1};
    state->weights_bad = 0;
  }
  const long long count = (long long)c.N * c.C * c.H * c.W;
  const int scale =
      sampled_scale<THREADS / 32>(x, count, reinterpret_cast<unsigned*>(shared));
  __syncthreads();
  const int k0 = blockIdx.x % blocks_k * BLOCK_K;
  const int first_item = blockIdx.x / blocks_k, item_step = gridDim.x / blocks_k;
  if (threadIdx.x < CONSUMERS) {
    consume<EVEN>(x, w, bias, y, c, plan, k0, first_item, item_step, shared, state, scale);
  } else {
    produce<WIDE>(x, c, plan, first_item, item_step, shared, state, scale);
  }
}

// Strips are cut into parts so that the blocks that run at once finish together: a part costs its
// rows, and some to start with.
static Plan plan_for(const Conv& c, int blocks) {
  constexpr int START = 6;  // rows' worth
  Plan best = {};
  long long least = LLONG_MAX;
  const int strips = (c.OW + TILE_W - 1) / TILE_W;
  for (int parts = 1; parts <= min(c.OH, 64); ++parts) {
    const int rows = (c.OH + parts - 1) / parts, real = (c.OH + rows - 1) / rows;
    const long long items = (long long)c.N * strips * real;
    const long long cost = (items + blocks - 1) / blocks * (rows + START);
    if (cost < least) {
      least = cost;
      best = {strips, real, rows, (int)items};
    }
  }
  return best;
}

template <bool WIDE, bool EVEN>
static int launch(const float* x, const float* w, const float* bias, float* y, const Conv& c,
                  cudaStream_t stream) {
  int device, multiprocessors;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(conv2d_hopper_ring<WIDE, EVEN>,
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
  }
  if (error != cudaSuccess) return (int)error;
  const int blocks_k = (c.K + BLOCK_K - 1) / BLOCK_K;
  const int at_once = max(1, multiprocessors / blocks_k);  // a block has the SM for itself
  const Plan plan = plan_for(c, at_once);
  const int blocks = blocks_k * min(plan.items, at_once);
  conv2d_hopper_ring<WIDE, EVEN>
      <<<blocks, THREADS, SHARED_BYTES, stream>>>(x, w, bias, y, c, plan, blocks_k);
  return (int)cudaGetLastError();
}

extern "C" int asymconv_launch(const float* x, const float* w, const float* bias, float* y,
                               const Conv* c, void* stream) {
  const bool wide = c->W % 4 == 0 && (unsigned long long)x % 16 == 0;
  const auto run = c->OW % 2 == 0 ? (wide ? launch<true, true> : launch<false, true>)
                                  : (wide ? launch<true, false> : launch<false, false>);
  return run(x, w, bias, y, *c, (cudaStream_t)stream);
}
"""
)


RUNG = Rung(
    name="k07_hopper_ring",
    idea="wgmma, resident weights, a ring of rows, whole-sector stores",
    notebook="06_hopper",
    source=SOURCE,
    refusal=refusal,
    precision="tf32",
    capability=(9, 0),
    arch="90a",
    defines=DEFINES,
    variants=VARIANTS,
)
