"""k07: Hopper. Weights in registers, a ring of rows, whole rows in and out by the copy engine.

What the last rung was limited by: warps that convert, multiply and store in turns, and mma.sync,
which reaches some 60 % of Hopper's tensor cores.

What it changes:

- wgmma: four warps, a warpgroup, start a product of 64 filters x 136 pixels x 16 channels together,
  which reads its pixels from shared memory by itself. A block has a strip of 128 columns and walks
  down over a ring of 4 input rows: three are multiplied while one is filled. A tap one column
  further right is the same data, started one pixel later. No input row is read twice.
- The weights of 128 filters stay in registers: a warpgroup has 64 filters, a thread 144 registers
  of them, as fragments that wgmma takes from there. That leaves shared memory for rows.
- Rows of input land there as they are, by bulk copies (cp.async.bulk, one a channel), two rows
  ahead. Four warps convert them to fp16 and put them into the ring. No register holds a value that
  is under way, so 24 registers are enough for them (setmaxnreg) and 240 are left for the others.
- A whole row of outputs, 128 filters by 512 bytes, is staged in shared memory, each filter's from
  its first whole sector on, and leaves by one bulk copy a filter, while the next row is multiplied.
- Where rows follow each other without padding, the last strip reads on into the next row, computes
  its first outputs as well, and so completes the sector in which a row ends and the next begins.
- Nothing in a warp waits for memory but the copy it will use next.
- Rows are fetched by the clock (%globaltimer): the same row by all blocks at the same time, and no
  faster than device memory bears. Blocks that go as fast as they can get fewer rows done, all of
  them together; by the clock they are in step, and nobody tells anybody anything.
- The two warpgroups multiply in turns, a row each: one stages its sums while the other multiplies.
  In step, both would wait for tensor cores and then leave them idle; at full clock that is fast
  enough, and at the clock that the card's power leaves it is not.
- What is not memory's is done while it works: weights take a way through shared memory that leaves
  room for the first three rows, and not all blocks read the same weights at once.
- fp32's range does not suffer: see half_range.py.

What was tried before: weights resident in shared memory, rows fetched through registers, sums
passed round a group of lanes until each has a whole sector. It took 1.76 ms: stores of 32 bytes,
eight filters at a time, and products and stores in turns (notebook 06, k07_two_versions.json).

What it predicts, on the contract's shape: 36 wgmma of 64 x 136 x 16 a row and warpgroup, 68 cycles
each: 4,900 cycles a row for both, 0.71 ms in all at 1.755 GHz. Then each has 68 values a thread to
finish and stage, 1,500 to 2,000 cycles: if the warpgroups stay in step, 1.0 ms without memory.
Memory: 1.29 ms. Shared memory: 2,450 cycles a row for wgmma's pixels, 1,500 for the rest, of 8,600.
So it should be memory's own time, 1.28 to 1.33 ms. That was without the clock, which asks for 1.24.
In turns a row needs little more than its products' 4,900 cycles, which leaves the clock room where
power slows the card: 1.25 ms in ladders, 1.26 after seconds of calls. (That was said of turns that
end when products are issued. Those change nothing: both warpgroups' products then mix, we think.)

Measured (notebook 06, ablations.json): 1.25 ms from rest and in the ladder; the memory floor is
1.13. After two seconds of calls, at the card's limit of power, 1.25. Without turns 1.25 and 1.39,
without the clock 1.33 and 1.33.
"""

from asymconv.kernels.half_range import HALF_RANGE
from asymconv.kernels.hopper_rows import (
    IN_ROW,
    INCLUDES,
    OUT_ROW,
    WARP_ARRIVES,
    bad_rows,
    hopper_kernel,
    plan,
    redo,
    refusal,
)
from asymconv.kernels.ptx import BULK, BULK_EVICT_FIRST, CLOCK, HOPPER, MMA, wgmma_f16_ra
from asymconv.kernels.rung import Rung

DEFINES = {
    "ALIGN": 8,
    "PACE": 78,
    "TURNS": 1,
    "RING": 4,
    "LANDINGS": 2,
    "EVICT_LOADS": 0,
    "EVICT_STORES": 0,
}

VARIANTS = (
    {"ALIGN": 8},
    {"ALIGN": 4},
    {"PACE": 0},
    {"PACE": 72},
    {"PACE": 75},
    {"PACE": 82},
    {"PACE": 86},
    {"TURNS": 0},
    {"LANDINGS": 1},
    {"EVICT_LOADS": 1},
    {"EVICT_STORES": 1},
    {"EVICT_LOADS": 1, "EVICT_STORES": 1},
)
"""Whole sectors; writing where bulk copies may begin; no pace, slower and faster ones; fetching one
row ahead in place of two; lines that L2 lets go of first."""

LAYOUT = r"""
// A strip is 128 columns wide; its products are 136, so that each output row can start at the first
// whole 32-byte sector in the strip, wherever that is.
constexpr int BLOCK_K = 128, CHANNELS = 64, R = 3, S = 3, TAPS = R * S, PARTS = CHANNELS / 16;
constexpr int TILE_W = 128, PRODUCT_W = TILE_W + 8;
static_assert(ALIGN == 4 || ALIGN == 8, "bulk copies need 16 bytes, whole sectors 32");

// Two warpgroups multiply and store; one fetches and converts.
constexpr int GROUP = 128, CONSUMERS = 2 * GROUP, PRODUCERS = 128, THREADS = CONSUMERS + PRODUCERS;
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
// pixel p at place i ^ (p % 8) (the 128-byte swizzle).
constexpr int PIXEL = CHANNELS * 2, RING_ROW = RING_W * PIXEL;
static_assert(RING_ROW % 1024 == 0, "a ring row starts a group of 8 swizzled rows");
static_assert(RING_W >= 3 + PRODUCT_W + S - 1, "a tap's window lies in the ring row");
static_assert(RING >= R + 1, "a row is filled while three are read");
constexpr bool COMPLETES = true;  // see Plan
constexpr int ROUND = 2 * RING;  // rows after which slots and parities of barriers repeat

// Staging: a row of outputs of each filter, from a whole sector on. 8 words further in their banks
// from filter to filter: lanes that write 8 bytes for 4 filters meet no bank twice.
constexpr int STAGING_PITCH = PRODUCT_W * 4;

// Weights go through staging and the ring's last row on their way into registers: a warp turns 8
// filters at a time, (filter, tap, channel). 36 words from tap to tap, 20 from filter to filter in
// their banks: no conflicts for ldmatrix, few for the stores.
constexpr int TURN_TAP = PIXEL + 16, TURN_FILTER = TAPS * TURN_TAP, TURN = 8 * TURN_FILTER;

constexpr int RING_AT = PRODUCERS / 32 * LANDINGS * LANDING;
constexpr int STAGING_AT = RING_AT + RING * RING_ROW;
constexpr int STATE_AT = STAGING_AT + BLOCK_K * STAGING_PITCH;
static_assert(RING_AT % 1024 == 0 && STAGING_AT % 16 == 0, "swizzle, bulk copies");
constexpr int TURNS_AT = STATE_AT - CONSUMERS / 32 * TURN;
static_assert(TURNS_AT % 16 == 0 && TURNS_AT >= RING_AT + R * RING_ROW,
              "the first product's rows are filled meanwhile");

"""

STATE = r"""
struct RingState {
  unsigned long long began;  // ns
  unsigned long long full[RING], empty[RING], landed[PRODUCERS / 32][LANDINGS];
  unsigned long long turn[2];  // a warpgroup may multiply a row
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
    for (int i = 0; i < 2; ++i) mbarrier_init(shared_address(&turn[i]), GROUP / 32);
    for (int i = 0; i < PRODUCERS / 32 * LANDINGS; ++i) {
      mbarrier_init(shared_address(&landed[0][0] + i), WARP_CHANNELS);
    }
    for (int i = 0; i < ITEMS_UNDER_WAY; ++i) bad[i] = {INT_MAX, -1};
    weights_bad = 0;
    began = nanoseconds();
  }
};

"""

PACE = r"""
// Bytes a nanosecond that a device's memory moves at its peak. Kept: drivers may ask the card.
static float memory_peak(int device) {
  constexpr int MOST_DEVICES = 64;
  static std::atomic<float> peaks[MOST_DEVICES];  // 0: not asked yet
  const bool kept = device < MOST_DEVICES;
  if (kept && peaks[device] > 0.0f) return peaks[device];
  int khz = 0, bits = 0;
  cudaDeviceGetAttribute(&khz, cudaDevAttrMemoryClockRate, device);
  cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, device);
  const float peak = 2e-6f * (float)khz * (float)(bits / 8);  // two transfers a cycle
  if (kept) peaks[device] = peak;
  return peak;
}

// Blocks that go as fast as they can crowd device memory, and all of them get slower. So rows are
// fetched by the clock: the same row by all blocks at the same time, and as many as memory bears,
// PACE percent of its peak. Who is late does not wait. Not for what L2 may hold.
static Plan paced(Plan plan, const Conv& c, int blocks, int device) {
  int l2 = 0;
  cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, device);
  const double rows_in = c.OH + (R - 1.0) * plan.parts;  // parts read their halo again
  const double bytes = 4.0 * c.N * (c.C * rows_in * c.W + (double)c.K * c.OH * c.OW);
  const double rate = PACE / 100.0 * memory_peak(device);
  if (bytes <= 4.0 * l2 || rate <= 0.0) return plan;
  const int rounds = (plan.items + blocks - 1) / blocks;
  plan.pace = (unsigned)min(1e6, bytes / rate / rounds / (plan.rows + R - 1));
  // until a block has its weights, which come at some 21 bytes a ns
  plan.lead = 1000 + 4 * TAPS * c.C * min(c.K, BLOCK_K) / 21;
  return plan;
}

// Until row q of a block may be asked for.
__device__ __forceinline__ void wait_for_time(const RingState* state, const Plan& plan, int q) {
  if (plan.pace == 0) return;
  const unsigned long long time = state->began + plan.lead + (unsigned long long)q * plan.pace;
  while (nanoseconds() < time) {
  }
  __syncwarp();
}

"""

CURSOR = r"""
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

"""

WINDOW = r"""
// A row of the window: RING_W columns, of which the image has `count` from its pixel `before` on.
struct Window {
  const float* first;  // the first of them, of channel 0; on 16 bytes, if rows of x are
  int before, count;
  __device__ __forceinline__ Window(const float* x, const Conv& c, const Plan& plan,
                                    const Cursor& cursor) {
    const Item at = item_at(cursor.item, plan, c);
    const int ih = at.oh0 - c.pad_h + cursor.row, iw = (at.ow0 - c.pad_w) & ~3;
    before = max(-iw, 0);
    const int end = plan.completes && ih + 1 < c.H ? INT_MAX : c.W;
    count = (unsigned)ih < (unsigned)c.H ? max(0, min(iw + plan.load_w, end) - (iw + before)) : 0;
    first = x + ((long long)at.n * c.C * c.H + ih) * c.W + iw + before;  // not read if count is 0
  }
};

"""

FETCH = r"""
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
      #pragma unroll 1
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

"""

CONVERT = r"""
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
    // p % 8 is 0 or 4 for the first pixel, so the swizzle only has to take j in
    *reinterpret_cast<__half2*>(ring + (to ^ j << 4) + j * PIXEL) = __floats2half2_rn(v0, v1);
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
    wait_for_time(state, plan, q);
    fetch_row(ahead, place);
  }
}

// ---- consumers

// A warp's 16 filters from k0 + warp_k on as fp16, in registers for good: fragments of wgmma's a.
// Each filter has its own power of two. `turn`: the warp's shared memory. Says whether fp16 holds
// them.
using Weights = unsigned[TAPS * PARTS][4];
__device__ __forceinline__ bool load_weights(Weights& a, const float* __restrict__ w,
                                             const float* __restrict__ bias, const Conv& c, int k0,
                                             int warp_k, int turn_first, unsigned char* turn,
                                             RingState* state, int input_scale) {
  constexpr int AT_ONCE = 2, LOADS = CHANNELS * TAPS / 32;  // filters under way; values of a lane
  bool good = true;
  #pragma unroll
  for (int eight = 0; eight < 2; ++eight) {
    const int lane = thread_again() % 32;
    // Where a lane's first values go in a turned filter: TAPS more are 32 channels further.
    int place[TAPS];
    #pragma unroll
    for (int i = 0; i < TAPS; ++i) {
      const int at = lane + 32 * i;
      place[i] = at % TAPS * TURN_TAP + at / TAPS * 2;
    }
    __syncwarp();
    #pragma unroll 1
    for (int i = 0; i < 8; i += AT_ONCE) {
      const int first = (i + turn_first) % 8;
      const int k = warp_k + eight * 8 + first;
      float value[AT_ONCE][LOADS];
      #pragma unroll
      for (int f = 0; f < AT_ONCE; ++f) {
        const float* const filter = w + (long long)(k0 + k + f) * c.C * TAPS + lane;
        const int there = k0 + k + f < c.K ? c.C * TAPS : 0;
        if (there == CHANNELS * TAPS) {
          #pragma unroll
          for (int i = 0; i < LOADS; ++i) value[f][i] = __ldg(filter + 32 * i);
        } else {
          #pragma unroll
          for (int i = 0; i < LOADS; ++i) {
            value[f][i] = lane + 32 * i < there ? __ldg(filter + 32 * i) : 0.0f;
          }
        }
      }
      #pragma unroll
      for (int f = 0; f < AT_ONCE; ++f) {
        HalfRuns seen;
        #pragma unroll
        for (int i = 0; i < LOADS; ++i) seen.look_at(fabsf(value[f][i]));
        unsigned largest = magnitude(seen.most);
        for (int lanes = 1; lanes < 32; lanes *= 2) {
          largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
        }
        const int scale = scale_for(largest, WEIGHT_TOP), exponent = -(input_scale + scale);
        const HalfRange range(scale);
        const float factor = power_of_two(scale);
        good = good && exponent >= -126 && exponent <= 126;
        if (lane == 0) {
          state->exponent[k + f] = (signed char)min(126, max(-126, exponent));
          state->bias[k + f] = bias && k0 + k + f < c.K ? __ldg(bias + k0 + k + f) : 0.0f;
        }
        unsigned char* const to = turn + (first + f) * TURN_FILTER;
        #pragma unroll
        for (int i = 0; i < LOADS; ++i) {
          __half* const half = reinterpret_cast<__half*>(to + place[i % TAPS] + i / TAPS * 64);
          *half = __float2half_rn(factor * value[f][i]);
        }
        if (__all_sync(0xffffffffu, range.holds(seen))) continue;
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

"""

WAITS = r"""
// Row q of the ring, counted from the kernel's first: until it is there; and that it may be filled.
__device__ __forceinline__ void wait_for_row(RingState* state, int q) {
  mbarrier_wait(shared_address(&state->full[q % RING]), q / RING & 1);
}
__device__ __forceinline__ void release_row(RingState* state, int q) {
  warp_arrives(&state->empty[q % RING]);
}

// The warpgroups multiply in turns, a row each: one stages its sums while the other multiplies. In
// step, both would wait for tensor cores, and then both leave them idle. q as above: one a row,
// over items, too, whose rows are R - 1, an even number, more. Rows of odd length leave no register
// for it.
template <bool EVEN>
__device__ __forceinline__ void wait_for_turn(RingState* state, int q) {
  static_assert((R - 1) % 2 == 0 && ROUND % 2 == 0, "turns alternate from item to item");
  if (TURNS && EVEN) mbarrier_wait(shared_address(&state->turn[thread_again() / GROUP]), q & 1);
}
template <bool EVEN>
__device__ __forceinline__ void give_turn(RingState* state) {
  if (TURNS && EVEN) warp_arrives(&state->turn[thread_again() / GROUP ^ 1]);
}

"""

STAGE = r"""
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
      if (j == TILE_W / 8 - 1 && out.completes && column == 6) continue;
      float* const two = j == TILE_W / 8 && out.completes ? to - (S - 1) : to;
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

"""

SEND = r"""
// Starts the copies of what was staged, 16 filters from k on: a lane a filter.
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

"""

SOURCE = (
    HALF_RANGE
    + MMA
    + HOPPER
    + BULK
    + BULK_EVICT_FIRST
    + CLOCK
    + wgmma_f16_ra(136)
    + INCLUDES
    + "#include <atomic>\n"
    + LAYOUT
    + bad_rows(most_runs=32)
    + STATE
    + plan(most_rows=256, more="  unsigned lead, pace;  // ns: see paced\n")
    + PACE
    + CURSOR
    + WINDOW
    + FETCH
    + IN_ROW
    + CONVERT
    + WARP_ARRIVES
    + WAITS
    + OUT_ROW
    + STAGE
    + SEND
    + redo("CONSUMERS", settled="  bulk_wait();\n  named_barrier<CONSUMERS>(1);\n")
    + r"""
using State = RingState;

// One output row, all taps. `pixels`: where the first tap's window starts within a ring row; a tap
// further right starts a pixel later.
__device__ __forceinline__ void multiply(Sums& sum, const Weights& a, unsigned ring, int q,
                                         int pixels) {
  wgmma_fence();
  #pragma unroll
  for (int r = 0; r < R; ++r) {
    // shuffled: so the compiler knows that it is the same for a whole warp
    const unsigned long long row = swizzled_rows(__shfl_sync(
        0xffffffffu, ring + (q + r) % RING * RING_ROW + pixels * PIXEL, 0));
    #pragma unroll
    for (int s = 0; s < S; ++s) {
      #pragma unroll
      for (int part = 0; part < PARTS; ++part) {  // 16 channels are 32 bytes
        wgmma_m64n136k16_f16_ra(sum, a[(r * S + s) * PARTS + part],
                                moved(row, s * PIXEL + part * 32), r + s + part);
      }
    }
  }
  wgmma_commit();
}

template <bool EVEN>
__device__ __forceinline__ void consume(const float* __restrict__ x, const float* __restrict__ w,
                                        const float* __restrict__ bias, float* __restrict__ y,
                                        const Conv& c, const Plan& plan, int blocks_k,
                                        unsigned char* shared, State* state, int scale) {
  Weights a;
  unsigned char* const turn = shared + TURNS_AT + threadIdx.x / 32 * TURN;
  const int k0 = blockIdx.x % blocks_k * BLOCK_K;
  const int warp_k = threadIdx.x / 32 * 16;
  for (int i = 0; i < R; ++i) release_row(state, i);
  const int turn_first = (int)blockIdx.x / blocks_k % 4 * 2;  // not all blocks the same at once
  if (!load_weights(a, w, bias, c, k0, warp_k, turn_first, turn, state, scale)) {
    state->weights_bad = 1;
  }
  for (int i = R; i < RING; ++i) release_row(state, i);  // weights have been there
  named_barrier<CONSUMERS>(1);                           // and where others stage
  if (threadIdx.x / GROUP == 1) give_turn<EVEN>(state);  // to the first warpgroup's first row

  const unsigned ring = shared_address(shared) + RING_AT;
  // Both in one register: the row of the item, and where the ring stood at its first.
  int at = 0;
  #pragma unroll 1
  for (int item = blockIdx.x / blocks_k; item < plan.items; item += gridDim.x / blocks_k) {
    wait_for_row(state, at);
    wait_for_row(state, at + 1);
    #pragma unroll 1
    for (; at / ROUND < item_at(item, plan, c).rows; at += ROUND) {
      const int q = at % ROUND + at / ROUND;
      wait_for_row(state, q + 2);
      wait_for_turn<EVEN>(state, q);
      Sums sum;
      multiply(sum, a, ring, q, (unsigned)-c.pad_w & 3);  // strips start on 16 bytes
      wgmma_wait<0>();
      give_turn<EVEN>(state);
      release_row(state, q);
      const Out out = out_row(item, at / ROUND, y, c, plan, blocks_k);
      const int thread = thread_again(), lane = thread % 32, k = thread / 32 * 16;
      bulk_wait_read();  // the row before has left
      __syncwarp();
      stage<EVEN>(sum, 0, k, lane, out, state, shared + STAGING_AT);
      stage<EVEN>(sum, 1, k + 8, lane, out, state, shared + STAGING_AT);
      send(k, lane, out, shared + STAGING_AT);
    }
    at = (at % ROUND + at / ROUND) % ROUND;
    release_row(state, at);
    release_row(state, at + 1);
    at = (at + 2) % ROUND;
    redo_bad_rows(x, w, y, c, plan, blocks_k, item, state);
  }
}
"""
    + hopper_kernel("paced(plan_for(*c, at_once), *c, at_once, device)")
)


RUNG = Rung(
    name="k07_hopper_ring",
    idea="wgmma over a ring of rows, weights in registers, rows in and out by bulk copies",
    notebook="06_hopper",
    source=SOURCE,
    refusal=refusal,
    precision="tf32",
    capability=(9, 0),
    arch="90a",
    defines=DEFINES,
    variants=VARIANTS,
)
