"""What k07 and k08 share: everything but the products.

A block keeps the weights of its filters in registers and walks down a strip of 128 columns. Rows of
input come by bulk copies, are converted to fp16 and stand in a ring; rows of output leave by bulk
copies. The rung says before this text how many filters a block has (BLOCK_K), how many halves stand
for a value (HALVES: 1, or hi and lo) and how many rows may be under way (RING, LANDINGS).
"""

import math
from collections.abc import Mapping

from asymconv.problem import ConvShape

HOPPER_ROWS = r"""
#include <cuda_fp16.h>

#include <climits>
#include <type_traits>

// A strip is 128 columns wide; its products are 136, so that each output row can start at the first
// whole 32-byte sector in the strip, wherever that is.
constexpr int CHANNELS = 64, R = 3, S = 3, TAPS = R * S, PARTS = CHANNELS / 16;
constexpr int TILE_W = 128, PRODUCT_W = TILE_W + 8;
static_assert(ALIGN == 4 || ALIGN == 8, "bulk copies need 16 bytes, whole sectors 32");

// Two warpgroups multiply and store; one fetches and converts.
constexpr int CONSUMERS = 2 * 128, PRODUCERS = 128, THREADS = CONSUMERS + PRODUCERS;
constexpr int LAUNCH_REGISTERS = 168, CONSUMER_REGISTERS = 240, PRODUCER_REGISTERS = 24;
static_assert(LAUNCH_REGISTERS * THREADS <= 65536, "a block has an SM's registers");
static_assert(CONSUMERS * CONSUMER_REGISTERS + PRODUCERS * PRODUCER_REGISTERS <=
                  THREADS * LAUNCH_REGISTERS,
              "warps share out what the launch was given; to wait for more is to hang");

// Shared memory, in bytes. Landing: rows of fp32 as they come from memory, a channel of the window
// 144 pixels and, where rows begin anywhere within 16 bytes, up to 3 before it; two channels are 16
// words apart in their banks. A warp of the producers has 16 channels and LANDINGS rows for itself.
constexpr int RING_W = 144, WARP_CHANNELS = CHANNELS / (PRODUCERS / 32);
constexpr int LANDING_PITCH = (RING_W + 8) * 4, LANDING = WARP_CHANNELS * LANDING_PITCH;

// Ring: rows of fp16. A pixel is a row of 64 channels, 128 bytes in 8 chunks of 16, chunk i of
// pixel p at place i ^ (p % 8) (the 128-byte swizzle). The lo halves follow all of the hi.
constexpr int PIXEL = CHANNELS * 2, RING_ROW = RING_W * PIXEL, RING_HALF = RING * RING_ROW;
static_assert(RING_ROW % 1024 == 0, "a ring row starts a group of 8 swizzled rows");
static_assert(RING_W >= 3 + PRODUCT_W + S - 1, "a tap's window lies in the ring row");
static_assert(RING >= R + 1, "a row is filled while three are read");
constexpr bool COMPLETES = HALVES == 1;  // see Plan; two halves have no registers for it
constexpr int ROUND = 2 * RING;  // rows after which slots and parities of barriers repeat

// Staging: a row of outputs of each filter, from a whole sector on. 8 words further in their banks
// from filter to filter: lanes that write 8 bytes for 4 filters meet no bank twice.
constexpr int STAGING_PITCH = PRODUCT_W * 4;

// Weights go through ring and staging on their way into registers: a warp turns 8 filters at a
// time, (filter, tap, channel). 36 words from tap to tap, 20 from filter to filter in their banks:
// no conflicts for ldmatrix, few for the stores.
constexpr int TURN_TAP = PIXEL + 16, TURN_FILTER = TAPS * TURN_TAP, TURN = 8 * TURN_FILTER;

constexpr int RING_AT = PRODUCERS / 32 * LANDINGS * LANDING;
constexpr int STAGING_AT = RING_AT + HALVES * RING_HALF;
constexpr int STATE_AT = STAGING_AT + BLOCK_K * STAGING_PITCH;
static_assert(RING_AT % 1024 == 0 && STAGING_AT % 16 == 0, "swizzle, bulk copies");
static_assert(RING_AT + CONSUMERS / 32 * TURN <= STATE_AT, "the weights' way");

// Which rows of an item need fp32: of the input, counted from the item's first.
struct BadRows {
  int first, last;
};
struct BadRun {
  int row, pixel;  // of the item's window, the first of 4
};
constexpr int MOST_BAD_RUNS = 32;   // of an item: more, and whole rows are computed again
constexpr int REDO_W = 4 + S - 1;   // columns that see a run: a warp computes so many at once
constexpr int REDOS_W = (PRODUCT_W + REDO_W - 1) / REDO_W;
constexpr int ITEMS_UNDER_WAY = 4;  // producers are RING rows ahead at most, items have 3 or more
struct RingState {
  unsigned long long full[RING], empty[RING], landed[PRODUCERS / 32][LANDINGS];
  BadRows bad[ITEMS_UNDER_WAY];
  int scale, weights_bad, bad_runs;  // scale: the exponent that x is scaled by
  BadRun bad_run[MOST_BAD_RUNS];
  float bias[BLOCK_K];
  signed char exponent[BLOCK_K];  // of the power of two that makes sums outputs

  // By one thread, before the block's first barrier.
  __device__ __forceinline__ void initialize() {
    for (int i = 0; i < RING; ++i) {
      mbarrier_init(shared_address(&full[i]), PRODUCERS / 32);
      mbarrier_init(shared_address(&empty[i]), CONSUMERS / 32);
    }
    for (int i = 0; i < PRODUCERS / 32 * LANDINGS; ++i) {
      mbarrier_init(shared_address(&landed[0][0] + i), WARP_CHANNELS);
    }
    for (int i = 0; i < ITEMS_UNDER_WAY; ++i) bad[i] = {INT_MAX, -1};
    weights_bad = 0;
  }
};

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
};
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
  constexpr int MOST_ROWS = 128;  // of a part: longer ones took 2.5 % more time
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

// ---- producers: global fp32, (channel, row, column) -> ring, fp16, (row, column, channel)

// Goes through the rows of this block's items. Where an item lies is worked out again for each row:
// registers are scarcer here than divisions.
struct Cursor {
  int item, row;  // row: of the input, from the item's first
  __device__ __forceinline__ void next(const Plan& plan, const Conv& c, int item_step) {
    if (++row < item_at(item, plan, c).rows + R - 1) return;
    row = 0;
    item += item_step;
  }
};

// A row of the window: RING_W columns, of which the image has `count` from its pixel `before` on.
struct Window {
  const float* first;  // the first of them, of channel 0; on 16 bytes, if rows of x are
  int before, count;
  __device__ __forceinline__ Window(const float* x, const Conv& c, const Plan& plan,
                                    const Cursor& cursor) {
    const Item at = item_at(cursor.item, plan, c);
    const int ih = at.oh0 - c.pad_h + cursor.row, iw = (at.ow0 - c.pad_w) & ~3;
    before = max(-iw, 0);
    const int end = COMPLETES && plan.completes && ih + 1 < c.H ? INT_MAX : c.W;
    const int width = COMPLETES ? plan.load_w : RING_W;
    count = (unsigned)ih < (unsigned)c.H ? max(0, min(iw + width, end) - (iw + before)) : 0;
    first = x + ((long long)at.n * c.C * c.H + ih) * c.W + iw + before;  // not read if count is 0
  }
};

// Floats from the last 16-byte boundary on.
__device__ __forceinline__ int past_16_bytes(const float* p) {
  return (int)((unsigned long long)p >> 2 & 3);
}

// Starts the copies of a warp's channels of a row, one a lane. WIDE: every piece starts and ends on
// 16 bytes. Otherwise the 16-byte pieces that hold it are copied; two of them may reach beyond the
// tensor, at its very begin and end: those rows are copied by hand.
template <bool WIDE>
__device__ __forceinline__ void fetch(unsigned char* landing, unsigned landed, int channel0,
                                      const Window& at, const float* __restrict__ x,
                                      long long values, const Conv& c) {
  const int lane = thread_again() & 31;
  if (lane >= WARP_CHANNELS) return;
  const int channel = opaque(channel0 + lane);
  const int count = channel < c.C ? at.count : 0;
  const float* const from = at.first + (long long)channel * c.H * c.W;
  const int lead = WIDE ? 0 : past_16_bytes(from);
  int bytes = count == 0 ? 0 : WIDE ? count * 4 : (lead + count + 3) / 4 * 16;
  float* const to = reinterpret_cast<float*>(landing + lane * LANDING_PITCH) + at.before;
  if (!WIDE && bytes > 0) {
    if (from - lead < x || from - lead + bytes / 4 > x + values) {
      for (int i = 0; i < count; ++i) to[lead + i] = __ldg(from + i);
      bytes = 0;
    }
  }
  mbarrier_arrive_expect(landed, bytes);
  if (bytes > 0) {
    if (EVICT_LOADS) {
      bulk_load_evict_first(shared_address(to), from - lead, bytes, landed);
    } else {
      bulk_load(shared_address(to), from - lead, bytes, landed);
    }
  }
}

// Bytes from a ring row's start to a chunk of a pixel. Rows start groups of 8 swizzled pixels.
__device__ __forceinline__ int in_row(int pixel, int chunk) {
  return pixel * PIXEL + ((chunk ^ pixel % 8) << 4);
}

// A value as halves: hi, and 2^11 times what hi leaves, 11 bits more.
constexpr float LO_SCALE = 2048.0f;
__device__ __forceinline__ __half2 hi_of(float a, float b) { return __floats2half2_rn(a, b); }
__device__ __forceinline__ __half2 lo_of(float a, float b, __half2 hi) {
  return __floats2half2_rn(LO_SCALE * (a - __low2float(hi)), LO_SCALE * (b - __high2float(hi)));
}

// Converts two runs, the same 4 pixels of two channels: a load of 16 bytes brings a run, whose
// largest magnitude no other lane has to know, and two channels of a pixel are one store. `to`:
// bytes from the ring row's start to the first pixel's place. WHOLE: the runs are in the image.
// Otherwise `there` of their pixels are, or more; and unless WIDE, the first channel's row begins
// `phase` floats from 16 bytes of memory, of which only the last bits count.
template <bool WIDE, bool WHOLE>
__device__ __forceinline__ void convert_runs(const float* from, unsigned char* ring, int to,
                                             int channels, int there, int phase, const Conv& c,
                                             float factor, HalfRuns& seen) {
  const float* const runs[2] = {from, from + LANDING_PITCH / 4};
  const int count[2] = {WHOLE || channels > 0 ? there : 0, WHOLE || channels > 1 ? there : 0};
  float v[2][4], largest[2];
  if (WIDE) {
    #pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 four = *reinterpret_cast<const float4*>(runs[i]);
      v[i][0] = count[i] > 0 ? four.x : 0.0f;
      v[i][1] = count[i] > 0 ? four.y : 0.0f;
      v[i][2] = count[i] > 0 ? four.z : 0.0f;
      v[i][3] = count[i] > 0 ? four.w : 0.0f;
    }
  }
  #pragma unroll
  for (int j = 0; j < 4; ++j) {
    #pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!WIDE) v[i][j] = j < count[i] ? runs[i][(phase + i * c.H * c.W & 3) + j] : 0.0f;
      largest[i] = j == 0 ? fabsf(v[i][j]) : larger_magnitude(largest[i], v[i][j]);
    }
    const float v0 = factor * v[0][j], v1 = factor * v[1][j];
    const __half2 hi = hi_of(v0, v1);
    // p % 8 is 0 or 4 for the first pixel, so the swizzle only has to take j in
    __half2* const place = reinterpret_cast<__half2*>(ring + (to ^ j << 4) + j * PIXEL);
    *place = hi;
    if (HALVES == 2) place[RING_HALF / 4] = lo_of(v0, v1, hi);
  }
  seen.look_at(largest[0]);
  seen.look_at(largest[1]);
}

// Converts a warp's channels of a row, from channel0 on, and says whether fp16 holds them.
template <bool WIDE>
__device__ __forceinline__ bool convert(const unsigned char* landing, unsigned char* ring,
                                        int channel0, const Window& at, const Conv& c,
                                        int scale) {
  // a unit: 16 pixels of all channels, two runs a lane
  constexpr int UNIT_W = 16, UNITS = RING_W / UNIT_W, WHOLE_UNITS = TILE_W / UNIT_W;
  static_assert(UNIT_W / 4 * WARP_CHANNELS / 2 == 32, "every lane has runs");
  const float factor = power_of_two(opaque(scale));
  HalfRuns seen;
  const int lane = thread_again() & 31, run = (lane & 3) * 4, depth = (lane >> 2) * 2;
  int unit = 0;
  if (WIDE && at.before == 0 && at.count >= TILE_W && channel0 + WARP_CHANNELS <= c.C) {
    const float* const from = reinterpret_cast<const float*>(landing + depth * LANDING_PITCH) + run;
    const int to = in_row(run, (channel0 + depth) / 8) + (depth & 7) * 2;
    #pragma unroll
    for (; unit < WHOLE_UNITS; ++unit) {
      convert_runs<WIDE, true>(from + unit * UNIT_W, ring + unit * UNIT_W * PIXEL, to, 2, 4, 0,
                               c, factor, seen);
    }
  }
  #pragma unroll 1
  for (; unit < UNITS; ++unit) {
    const int pixel = unit * UNIT_W + run, channel = channel0 + depth;
    const int there = pixel >= at.before ? at.count - (pixel - at.before) : 0;
    convert_runs<WIDE, false>(
        reinterpret_cast<const float*>(landing + depth * LANDING_PITCH) + pixel, ring,
        in_row(pixel, channel / 8) + (depth & 7) * 2, c.C - channel, there,
        past_16_bytes(at.first) + channel * c.H * c.W, c, factor, seen);
  }
  return HalfRange(opaque(scale)).holds(seen);
}

template <bool WIDE>
__device__ __forceinline__ void produce(const float* __restrict__ x, const Conv& c,
                                        const Plan& plan, int blocks_k, unsigned char* shared,
                                        RingState* state, int scale) {
  // shuffled: so the compiler knows that it is the same for a whole warp
  const int warp = __shfl_sync(0xffffffffu, (int)(threadIdx.x - CONSUMERS) / 32, 0);
  unsigned char* const landings = shared + warp * LANDINGS * LANDING;
  const int channel0 = warp * WARP_CHANNELS, item_step = gridDim.x / blocks_k;
  const auto fetch_row = [&](const Cursor& row, int place) {
    if (row.item >= plan.items) return;
    fetch<WIDE>(landings + place * LANDING, shared_address(&state->landed[warp][place]), channel0,
                Window(x, c, plan, row), x, plan.values, c);
  };
  Cursor now = {(int)blockIdx.x / blocks_k, 0};
  {
    Cursor ahead = now;
    #pragma unroll 1
    for (int place = 0; place < LANDINGS; ++place) {
      fetch_row(ahead, place);
      ahead.next(plan, c, item_step);
    }
  }
  #pragma unroll 1
  for (int q = 0; now.item < plan.items; ++q) {  // rows so far
    const int place = q % LANDINGS, slot = q % RING;
    mbarrier_wait(shared_address(&state->empty[slot]), q / RING & 1);
    mbarrier_wait(shared_address(&state->landed[warp][place]), q / LANDINGS & 1);
    if (!convert<WIDE>(landings + place * LANDING, shared + RING_AT + slot * RING_ROW, channel0,
                       Window(x, c, plan, now), c, scale)) {
      BadRows& bad = state->bad[under_way(now.item, blocks_k)];
      atomicMin(&bad.first, now.row);
      atomicMax(&bad.last, now.row);
    }
    fence_async_proxy();
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(shared_address(&state->full[slot]));
    now.next(plan, c, item_step);
    Cursor ahead = now;  // LANDINGS rows from the one that was converted
    #pragma unroll 1
    for (int i = 1; i < LANDINGS; ++i) ahead.next(plan, c, item_step);
    fetch_row(ahead, place);
  }
}

// ---- consumers

// A warp's 16 filters from k0 + warp_k on as fp16, in registers for good: fragments of wgmma's a.
// As one half, all 64 channels; as two, hi and then lo of the 32 channels from channel0 on. Each
// filter has its own power of two. `turn`: the warp's shared memory. Says whether fp16 holds them.
using Weights = unsigned[TAPS * PARTS][4];
__device__ __forceinline__ bool load_weights(Weights& a, const float* __restrict__ w,
                                             const float* __restrict__ bias, const Conv& c, int k0,
                                             int warp_k, int channel0, unsigned char* turn,
                                             RingState* state, int input_scale) {
  // filters under way; values that a lane has of each: of its own channels, and of all
  constexpr int AT_ONCE = 2, OWN = CHANNELS / HALVES * TAPS / 32, LOADS = CHANNELS * TAPS / 32;
  bool good = true;
  #pragma unroll
  for (int eight = 0; eight < 2; ++eight) {
    const int lane = thread_again() % 32;
    __syncwarp();
    #pragma unroll 1
    for (int first = 0; first < 8; first += AT_ONCE) {
      const int k = warp_k + eight * 8 + first;
      float value[AT_ONCE][LOADS];
      #pragma unroll
      for (int f = 0; f < AT_ONCE; ++f) {
        const float* const filter = w + (long long)(k0 + k + f) * c.C * TAPS;
        #pragma unroll
        for (int i = 0; i < LOADS; ++i) {
          const int at = i < OWN ? channel0 * TAPS + lane + 32 * i
                                 : (CHANNELS / 2 - channel0) * TAPS + lane + 32 * (i - OWN);
          value[f][i] = k0 + k + f < c.K && at < c.C * TAPS ? __ldg(filter + at) : 0.0f;
        }
      }
      #pragma unroll
      for (int f = 0; f < AT_ONCE; ++f) {
        unsigned largest = 0;
        #pragma unroll
        for (int i = 0; i < LOADS; ++i) largest = max(largest, magnitude(value[f][i]));
        for (int lanes = 1; lanes < 32; lanes *= 2) {
          largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
        }
        const int scale = scale_for(largest, WEIGHT_TOP), exponent = -(input_scale + scale);
        const HalfRange range(scale);
        const float factor = power_of_two(scale);
        good = good && exponent >= -126 && exponent <= 126;
        if (lane == 0 && channel0 == 0) {
          state->exponent[k + f] = (signed char)min(126, max(-126, exponent));
          state->bias[k + f] = bias && k0 + k + f < c.K ? __ldg(bias + k0 + k + f) : 0.0f;
        }
        bool all = true;
        #pragma unroll
        for (int i = 0; i < LOADS; ++i) {
          all = all && range.holds(magnitude(value[f][i]));
          if (i >= OWN) continue;
          const int at = lane + 32 * i, channel = at / TAPS, tap = at % TAPS;
          __half* const to = reinterpret_cast<__half*>(turn + (first + f) * TURN_FILTER +
                                                       tap * TURN_TAP + channel * 2);
          const __half2 hi = hi_of(factor * value[f][i], 0.0f);
          *to = __low2half(hi);
          if (HALVES == 2) {
            to[CHANNELS / 2] = __low2half(lo_of(factor * value[f][i], 0.0f, hi));
          }
        }
        if (__all_sync(0xffffffffu, all)) continue;
        // runs: the taps of a channel
        for (int channel = lane; channel < c.C; channel += 32) {
          unsigned run = 0;
          for (int tap = 0; tap < TAPS && k0 + k + f < c.K; ++tap) {
            run = max(run, magnitude(__ldg(w + ((k0 + k + f) * (long long)c.C + channel) * TAPS +
                                           tap)));
          }
          good = good && range.holds(run);
        }
      }
    }
    __syncwarp();
    const unsigned char* const row = turn + lane % 8 * TURN_FILTER + lane / 8 * 16;
    #pragma unroll
    for (int tap = 0; tap < TAPS; ++tap) {
      #pragma unroll
      for (int part = 0; part < PARTS; part += 2) {
        unsigned quarter[4];  // channels 0 to 7 and 8 to 15 of this part and of the next
        ldmatrix_x4(quarter, row + tap * TURN_TAP + part * 32);
        a[tap * PARTS + part][eight] = quarter[0];
        a[tap * PARTS + part][eight + 2] = quarter[1];
        a[tap * PARTS + part + 1][eight] = quarter[2];
        a[tap * PARTS + part + 1][eight + 2] = quarter[3];
      }
    }
  }
  __syncwarp();
  return good;
}

// For a whole warp, once all its lanes are here.
__device__ __forceinline__ void warp_arrives(unsigned long long* barrier) {
  __syncwarp();
  if (thread_again() % 32 == 0) mbarrier_arrive(shared_address(barrier));
}

// Row q of the ring, counted from the kernel's first: until it is there; and that it may be filled.
__device__ __forceinline__ void wait_for_row(RingState* state, int q) {
  mbarrier_wait(shared_address(&state->full[q % RING]), q / RING & 1);
}
__device__ __forceinline__ void release_row(RingState* state, int q) {
  warp_arrives(&state->empty[q % RING]);
}

// Sums of 64 filters by 136 columns over a warpgroup's threads, as wgmma_m64n136k16_f16_ra does.
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

// Finishes a warp's 8 filters from k on of one output row and puts them into shared memory, each
// from its first aligned column on. `eight`: which of a thread's sums. EVEN: rows start on 8 bytes.
template <bool EVEN>
__device__ __forceinline__ void stage(const Sums& sum, int eight, int k, int lane, const Out& out,
                                      const RingState* state, unsigned char* staging) {
  const int column = lane % 4 * 2;
  k += lane / 4;
  const float factor = power_of_two(state->exponent[k]), bias = state->bias[k];
  float* const row = out.first + (long long)k * out.plane;
  const int skip = columns_to_aligned(row);
  float* const to = reinterpret_cast<float*>(staging + k * STAGING_PITCH) + column - skip;
  #pragma unroll
  for (int j = 0; j < PRODUCT_W / 8; ++j) {
    const float v0 = fmaf(sum[4 * j + eight * 2], factor, bias);
    const float v1 = fmaf(sum[4 * j + eight * 2 + 1], factor, bias);
    if (EVEN) {
      // a strip that completes the next row has its begin S - 1 columns further right
      const bool completes = COMPLETES && out.completes;
      if (j == TILE_W / 8 - 1 && completes && column == 6) continue;
      float* const two = j == TILE_W / 8 && completes ? to - (S - 1) : to;
      if (j > 0 || column >= skip) *reinterpret_cast<float2*>(two + 8 * j) = make_float2(v0, v1);
    } else {
      if (j > 0 || column >= skip) to[8 * j] = v0;
      if (j > 0 || column + 1 >= skip) to[8 * j + 1] = v1;
    }
    if (j == 0 && out.leftmost && k < out.filters) {  // nobody else writes what comes before
      const int before = min(skip, out.columns) - column;
      if (before > 0) row[column] = v0;
      if (before > 1) row[column + 1] = v1;
    }
  }
}

// Starts the copies of what was staged, 16 filters from k on: a lane a filter, 512 bytes.
__device__ __forceinline__ void send(int k, int lane, const Out& out,
                                     const unsigned char* staging) {
  fence_async_proxy();
  __syncwarp();
  k += lane;
  if (lane < 16 && k < out.filters) {
    float* const row = out.first + (long long)k * out.plane;
    const int skip = columns_to_aligned(row);
    const int count = out.completes
                          ? out.columns - skip + columns_to_aligned(row + out.columns)
                          : min(out.columns - skip, TILE_W);
    const float* const from = reinterpret_cast<const float*>(staging + k * STAGING_PITCH);
    if (count >= 4) {
      if (EVICT_STORES) {
        bulk_store_evict_first(row + skip, shared_address(from), count / 4 * 16);
      } else {
        bulk_store(row + skip, shared_address(from), count / 4 * 16);
      }
    }
    for (int i = max(count, 0) & ~3; i < count; ++i) row[skip + i] = from[i];
  }
  bulk_commit();
}

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
    for (int i = threadIdx.x; i < c.C * QUADS; i += CONSUMERS) {
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
  bulk_wait();
  named_barrier<CONSUMERS>(1);
  const Item at = item_at(item, plan, c);
  BadRows* const of_item = &state->bad[under_way(item, blocks_k)];
  const BadRows bad = *of_item;
  const bool whole = state->weights_bad;
  if (!whole && bad.last < 0) return;
  named_barrier<CONSUMERS>(1);  // all have read it
  if (threadIdx.x == 0) {
    *of_item = {INT_MAX, -1};
    state->bad_runs = 0;
  }
  named_barrier<CONSUMERS>(1);
  if (!whole) find_bad_runs(x, c, plan, at, bad, state);
  named_barrier<CONSUMERS>(1);
  const int warp = thread_again() / 32, runs = state->bad_runs;
  const auto redo = [&](int row, int column0) {
    const Out out = out_row(item, row, y, c, plan, blocks_k);
    #pragma unroll 1
    for (int k = warp; k < min(BLOCK_K, out.filters); k += CONSUMERS / 32) {
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

HOPPER_KERNEL = r"""
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
  if (threadIdx.x < CONSUMERS) {
    registers_up_to<CONSUMER_REGISTERS>();
    consume<EVEN>(x, w, bias, y, c, plan, blocks_k, shared, state, scale);
  } else {
    registers_down_to<PRODUCER_REGISTERS>();
    produce<WIDE>(x, c, plan, blocks_k, shared, state, scale);
  }
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
  const Plan plan = plan_for(*c, at_once);
  const int blocks = blocks_k * min(plan.items, at_once);
  kernel<<<blocks, THREADS, SHARED_BYTES, (cudaStream_t)stream>>>(x, w, bias, y, *c, plan,
                                                                 blocks_k);
  return (int)cudaGetLastError();
}
"""


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
