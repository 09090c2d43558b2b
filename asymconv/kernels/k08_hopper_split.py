"""k08: the same rows at fp32-class accuracy: values as two halves, Winograd's filtering down them.

What k07 is limited by: memory; and its operands have 11 bits.

What it changes:

- A value is hi + lo / 2^11, both fp16: 22 bits and hi's sign (Ootomo & Yokota 2022, 2203.03341).
  Three products stand for one: hi by lo, lo by hi, and hi by hi. lo by lo, 2^-22 of the whole, is
  left out.
- Three products are a lot, so there are fewer of them: two output rows are computed from four sums
  of products in place of six, F(2, 3) down the rows (Winograd 1980; Lavin & Gray 2016, 1509.09308).
  With input rows d0 to d3 and the taps g0 to g2 of a column:

      m0 = (d0 - d2) g0                    y0 = m0 + (m1 + m2)
      m1 = (d1 + d2) (g0 + g1 + g2) / 2    y1 = m3 + (m1 - m2)
      m2 = (d2 - d1) (g0 - g1 + g2) / 2
      m3 = (d3 - d1) g2

  Rows are added in fp32 while they are converted, weights once at the start; both are split after
  that, so nothing is lost to it but fp32's own rounding.
- Two warpgroups share the four: one computes m1 and then m0, the other m2 and then m3. Each hands
  its first to the other through shared memory, then finishes and stores one of the two rows; one
  multiplies while the other moves sums. Warps pair up: one warp waits for sums, not four.
- Tensor cores cut off what does not fit a sum's 24 bits. So the small products are summed first,
  2^11 times too large; then the sum is scaled, and 12 large ones are added to it.
- Weights of 64 filters, two transformed rows of taps, hi and lo, would take 192 registers a thread.
  A strip is 64 columns wide, so sums take 32, and 160 hold weights; the rest, a sixth, is in shared
  memory, and so is where a warp is in its strip: a register that the compiler moves to local memory
  costs hundreds of cycles here, where shared memory leaves L1 next to nothing.
- Two blocks, 128 filters, share a strip and are a cluster: each fetches and converts one side of
  its rows, and the copy engine takes that to the other's shared memory too. Stores to there, of 4
  bytes, and fences for the cluster took half as long again as to convert all of it twice. A block
  of 64 filters alone converts both sides.
- A warp that converts waits for its own loads, mostly. So two warpgroups fetch and convert, two
  warps on each scheduler; each has channels and columns of its own and waits for no other. Copies
  land by lines of 128 bytes, all banks at once.
- Outputs leave in whole sectors, straight from registers: four lanes that hold 8 columns move them
  round until each has its own part of a sector.
- What is needed next is under way before: sums that are handed over, while products are made;
  shuffles, all together. Who waits naps between tries, as power is what a series of calls lacks.

What it predicted, on the contract's shape, when a strip still had products of 72 columns (64 and 8
more, to store from a whole sector on): 144 wgmma of 36 cycles for two rows of 64 columns and 64
filters: 5,184 cycles, 65,280 times on 132 SMs: 2.56 million cycles, 1.5 ms at 1.7 GHz if tensor
cores never wait. Shared memory moves 776 KB meanwhile, 6,060 cycles: 1.8 ms. With both in each
other's way 2.1 to 2.4 ms. Error: a third more than direct sums (4.7e-7 by a model that cuts off),
but chains of 12 large products in place of 18: 4e-7 to 6e-7. Today's 64 columns are 32 cycles.

Measured (notebook 07): 2.3 ms for a few calls, 2.6 to 2.7 in a series, where the card's power
limits it. Error 2.6e-7: less than fp32's own, as chains are short.

What was tried before: direct sums, the channels of each product split between two warpgroups. A
call took 3.0 ms, in a series 3.35; three fp16 products at cuBLAS' own rate take 2.8 there. So
products had to be saved. A seventh fewer instructions, most of them addresses, gained nothing.
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
from asymconv.kernels.ptx import BULK, CLUSTER, CP_ASYNC, HOPPER, MMA, NAP, wgmma_f16, wgmma_f16_ra
from asymconv.kernels.rung import Rung

LAYOUT = r"""
// A block: 64 filters. A strip is 64 columns wide, wherever they begin in a 32-byte sector.
constexpr int BLOCK_K = 64, CHANNELS = 64, R = 3, S = 3, TAPS = R * S, PARTS = CHANNELS / 16;
constexpr int TILE_W = 64, PRODUCT_W = TILE_W, ALIGN = 1;

// Two warpgroups multiply and store, m1 and m0 the first, m2 and m3 the second; two fetch and
// convert.
constexpr int GROUP = 128, CONSUMERS = 2 * GROUP, PRODUCERS = 2 * GROUP;
constexpr int THREADS = CONSUMERS + PRODUCERS;
constexpr int LAUNCH_REGISTERS = 128, CONSUMER_REGISTERS = 224, PRODUCER_REGISTERS = 32;
static_assert(LAUNCH_REGISTERS * THREADS <= 65536, "a block has an SM's registers");
static_assert(CONSUMERS * CONSUMER_REGISTERS + PRODUCERS * PRODUCER_REGISTERS <=
                  THREADS * LAUNCH_REGISTERS,
              "warps share out what the launch was given; to wait for more is to hang");

// Shared memory, in bytes. Landing: rows of fp32 as they come from memory, 72 pixels a channel. A
// warp of the producers has 16 channels of one side, 32 pixels, of five rows for itself: four that
// two output rows see, and the next. What is right of both sides, the tail, is the left one's. In a
// cluster a block has one side, and a warp half of its pixels.
constexpr int RING_W = 72, SIDE_W = 32, TAIL_W = RING_W - 2 * SIDE_W, LANDINGS = 5;
constexpr int WARP_CHANNELS = CHANNELS / (PRODUCERS / 2 / 32);
constexpr int LINE = SIDE_W * 4, SIDE = WARP_CHANNELS * LINE, TAIL_AT = 2 * SIDE;
constexpr int LANDING = TAIL_AT + WARP_CHANNELS * TAIL_W * 4;
constexpr int TAIL_UNIT_W = 4;  // so many of its pixels are converted at once, one a lane
static_assert(LINE == 128, "a warp's copies fill all banks; what lies beside a line costs another");

// Slots: transformed rows of fp16: t1, t2, t0, t3, for m1, m2, m0, m3. A pixel is a row of 64
// channels, 128 bytes in 8 chunks of 16, chunk i of pixel p at place i ^ (p % 8) (the 128-byte
// swizzle). The lo halves follow all of the hi.
constexpr int PIXEL = CHANNELS * 2, SLOT = RING_W * PIXEL, SLOTS = 4, LO_AT = SLOTS * SLOT;
static_assert(SLOT % 1024 == 0, "a slot starts a group of 8 swizzled pixels");
static_assert(RING_W >= 3 + PRODUCT_W + S - 1, "a tap's window lies in the slot");
constexpr bool COMPLETES = false;  // see Plan

// Places: m1 and m2 on their way to the other warpgroup. A thread's sums are read by the thread
// that has the same of them there: 16 bytes a thread, side by side.
constexpr int PLACE = GROUP * (PRODUCT_W / 2) * 4;
static_assert(PRODUCT_W / 2 % 4 == 0, "sums go by four");

// A warpgroup's weights: two transformed taps by 3 columns by 64 channels, hi and lo, as wgmma's
// a, 64 filters by 16 channels each. The lo halves of the last two taps have no registers: each
// has a tile of 64 filters by 64 channels, swizzled like pixels.
constexpr int TAPS_HELD = 2 * S, FRAGMENTS = TAPS_HELD * PARTS, TAPS_IN_TILES = 2;
constexpr int LO_FRAGMENTS = FRAGMENTS - TAPS_IN_TILES * PARTS;
constexpr int TILE = BLOCK_K * PIXEL, TILES = 2 * TAPS_IN_TILES;

// All others go through slots and places on their way into registers: a warp turns its 16 filters,
// (filter, tap, channel), first hi and then lo. 4 words from filter to filter in their banks: no
// conflicts for ldmatrix.
constexpr int TURN_FILTER = TAPS_HELD * PIXEL + 16, TURN = 16 * TURN_FILTER;

constexpr int SLOTS_AT = CHANNELS / WARP_CHANNELS * LANDINGS * LANDING;
constexpr int PLACES_AT = SLOTS_AT + 2 * SLOTS * SLOT;
constexpr int TILES_AT = PLACES_AT + 2 * PLACE;
constexpr int STATE_AT = TILES_AT + TILES * TILE;
static_assert(SLOTS_AT % 1024 == 0 && PLACES_AT % 16 == 0 && TILES_AT % 1024 == 0, "swizzle");
static_assert(SLOTS_AT + CONSUMERS / 32 * TURN <= TILES_AT, "the weights' way");
"""

STATE = r"""
// Where a warp is: an item's first output, (n, k0, oh0, ow0) of y; outputs from there on; rows done
// and pairs of rows of all items so far. In shared memory: registers are for weights and sums.
struct Strip {
  long long first;
  int item, filters, rows, columns, row, pairs;
};

struct RingState {
  // Stages: t1 and t2, t0, t3. In a cluster: half of the block's side is converted, and so may be
  // copied. Of a pair of warps, one in each warpgroup: m1 and m2 are handed over, and their places
  // free again.
  unsigned long long full[3], empty[3], converted[3][2], handed[2][4], free[2][4];
  BadRows bad[ITEMS_UNDER_WAY];
  int scale, weights_bad, bad_runs;  // scale: the exponent that x is scaled by
  BadRun bad_run[MOST_BAD_RUNS];
  Strip strip[CONSUMERS / 32];
  float bias[BLOCK_K];
  signed char exponent[BLOCK_K];  // of the power of two that makes sums outputs

  // By one thread, before the block's first barrier.
  __device__ __forceinline__ void initialize() {
    const int readers = cluster_blocks();  // all must have read before any is written again
    for (int i = 0; i < 3; ++i) {
      mbarrier_init(shared_address(&full[i]), PRODUCERS / 32);
      mbarrier_init(shared_address(&empty[i]), readers * (i == 0 ? CONSUMERS : GROUP) / 32);
      for (unsigned long long& half : converted[i]) {
        mbarrier_init(shared_address(&half), PRODUCERS / 32 / 2);
      }
    }
    for (int i = 0; i < 8; ++i) {
      mbarrier_init(shared_address(&handed[0][0] + i), 1);
      mbarrier_init(shared_address(&free[0][0] + i), 1);
    }
    for (int i = 0; i < ITEMS_UNDER_WAY; ++i) bad[i] = {INT_MAX, -1};
    for (Strip& one : strip) one.pairs = 0;
    weights_bad = 0;
  }
};
using State = RingState;
"""

PRODUCE = r"""
// ---- producers: global fp32, (channel, row, column) -> slots, fp16, (row, column, channel)

// The same value, known to be the same in all lanes: in a uniform register, if that helps.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }
__device__ __forceinline__ Item uniform(const Item& at) {
  return {uniform(at.n), uniform(at.oh0), uniform(at.rows), uniform(at.ow0)};
}

// Pairs of output rows of an item; an odd last row is computed with a row that is not stored.
__device__ __forceinline__ int rows_in_pairs(int rows) { return rows + 1 & ~1; }

// Goes through the rows of this block's items. The same for a whole warp: uniform registers.
struct Cursor {
  int item, row, rows;  // rows: of the input, from the item's first
  int ih, iw;           // where the first pixel of the first row's window is in the image
  const float* first;   // that pixel, of channel 0; it need not be there
  __device__ __forceinline__ void enter(int at, const float* x, const Plan& plan, const Conv& c) {
    item = at;
    row = 0;
    if (item >= plan.items) return;
    const Item of = uniform(item_at(item, plan, c));
    rows = rows_in_pairs(of.rows) + R - 1;
    ih = of.oh0 - c.pad_h;
    iw = (of.ow0 - c.pad_w) & ~3;
    first = x + ((long long)of.n * c.C * c.H + ih) * c.W + iw;
  }
};

// Where a pixel of a warp's side, or of the tail, lands, of the warp's `depth`th channel. A channel
// has a line of its own, its groups of 8 pixels in an order of its own; the tail's lines have 4.
__device__ __forceinline__ int in_side(int depth, int pixel) {
  return depth * LINE + ((pixel / 8 ^ depth / 2 & 3) << 5) + pixel % 8 * 4;
}
__device__ __forceinline__ int in_tail(int depth, int pixel) {
  return TAIL_AT + (depth / 8 * 2 + depth % 2) * LINE + (depth / 2 & 3) * 32 + pixel * 4;
}
// From a place in_side to the same pixel's, so many channels deeper: a multiple of 4, or any from
// channel 0 on.
__device__ __forceinline__ int deeper(int place, int depth) {
  return (place ^ (depth / 2 & 3) << 5) + depth * LINE;
}

// Starts the copies of PIXELS of a side, or of the tail, of a row of a warp's channels, COPY_W
// pixels a lane; zeros where the image ends. Of no bytes the address may be anywhere.
template <int COPY_W, int PIXELS>
__device__ __forceinline__ void fetch_part(unsigned char* landing, int lane, int channel0,
                                           int column0, int pixel0, const Cursor& at,
                                           const Conv& c) {
  constexpr bool IN_TAIL = PIXELS == TAIL_W, HALF = PIXELS == SIDE_W / 2;
  constexpr int LANES = PIXELS / COPY_W, STEP = 32 / LANES;  // of a channel; channels at once
  static_assert(IN_TAIL || HALF || PIXELS == SIDE_W, "what rows are copied by");
  const int of = lane / LANES, pixel = pixel0 + lane % LANES * COPY_W, plane = c.H * c.W;
  // Two channels' halves of a line, 4 channels apart, lie in different banks.
  const int depth0 = HALF ? of % 2 * 4 + of / 2 : of;
  const int iw = at.iw + column0 + pixel;
  const bool inside = (unsigned)(at.ih + at.row) < (unsigned)c.H && iw >= 0 && iw < c.W;
  const int channels = inside ? c.C - channel0 - depth0 : 0;  // that there are, from the lane's on
  const float* from = at.first + at.row * c.W + (column0 + pixel) +
                      (long long)(channel0 + depth0) * plane;
  const int side_place = in_side(depth0, pixel);
  // lanes of two channels that lie 4 apart go through 4, then from 8 on through the next
  const auto depth_of = [](int i) { return HALF && STEP == 2 ? i % 4 + i / 4 * 8 : i * STEP; };
  #pragma unroll
  for (int i = 0; i < WARP_CHANNELS / STEP; ++i) {
    const int depth = depth_of(i);
    const int bytes = depth < channels ? COPY_W * 4 : 0;
    const int place = IN_TAIL ? in_tail(depth0 + depth, pixel) : deeper(side_place, depth);
    float* const to = reinterpret_cast<float*>(landing + place);
    if (COPY_W == 4) {
      cp_async_16(to, from, bytes);
    } else {
      cp_async_4(to, from, bytes);
    }
    from += (long long)(depth_of(i + 1) - depth) * plane;
  }
}

// What a warp of the producers has of each row: 16 channels of a side, and perhaps of the tail. Two
// blocks of a cluster need the same rows, and have a side each, of which a warp has a half.
struct Share {
  int channel0, side, pixel0, tails;
  int others;  // pixels that the other block brings
  __device__ __forceinline__ Share(int warp, const Conv& c) {
    const bool clustered = cluster_blocks() > 1;
    channel0 = warp / 2 * WARP_CHANNELS;
    side = clustered ? cluster_rank() : warp % 2;
    pixel0 = clustered ? warp % 2 * (SIDE_W / 2) : 0;
    const int pixels = (-c.pad_w & 3) + PRODUCT_W + S - 1 - 2 * SIDE_W;  // that products see
    const int units = (pixels + TAIL_UNIT_W - 1) / TAIL_UNIT_W;
    tails = side == 0 && pixel0 == 0 ? units : 0;
    others = SIDE_W + (side == 0 ? 0 : units * TAIL_UNIT_W);
  }
};

// A row: a group of copies. WIDE: rows of x start on 16 bytes.
template <bool WIDE, int PIXELS>
__device__ __forceinline__ void fetch(unsigned char* landing, int lane, const Share& of,
                                      const Cursor& at, const Conv& c) {
  constexpr int COPY_W = WIDE ? 4 : 1;
  fetch_part<COPY_W, PIXELS>(landing, lane, of.channel0, of.side * SIDE_W, of.pixel0, at, c);
  if (of.tails) fetch_part<COPY_W, TAIL_W>(landing, lane, of.channel0, 2 * SIDE_W, 0, at, c);
  cp_async_commit();
}
"""

CONVERT = r"""
// A value as halves: hi, and 2^11 times what hi leaves, 11 bits more.
constexpr float LO_SCALE = 2048.0f;
__device__ __forceinline__ __half2 hi_of(float a, float b) { return __floats2half2_rn(a, b); }
__device__ __forceinline__ __half2 lo_of(float a, float b, __half2 hi) {
  // exact but for the last rounding; so written, half of it need not wait for hi
  return __floats2half2_rn(fmaf(-LO_SCALE, __low2float(hi), LO_SCALE * a),
                           fmaf(-LO_SCALE, __high2float(hi), LO_SCALE * b));
}

// What a lane has of a row: of 8 pixels two, of two channels. Loads of a warp meet no bank twice.
constexpr int UNIT_W = 8;
static_assert(UNIT_W / 2 * WARP_CHANNELS / 2 == 32, "a lane's pixels");
struct Few {
  float2 channel[2];
  __device__ __forceinline__ explicit Few(const unsigned char* at) {
    channel[0] = *reinterpret_cast<const float2*>(at);
    channel[1] = *reinterpret_cast<const float2*>(at + LINE);
  }
};

// Where a lane's are in a landing, in a side's first 8 pixels. In its `unit`th 8 they are at
// few_at() ^ in_unit(unit): a line's groups of 8 are shuffled by XOR.
__device__ __forceinline__ int few_at() {
  const int lane = thread_again() & 31;
  return in_side(lane / 4 * 2, lane % 4 * 2);
}
__device__ __forceinline__ int in_unit(int unit) { return unit * UNIT_W * 4; }

// A pixel of two rows, two channels, as halves to where the transformed rows have it: second -
// first to `place`, and if BOTH second + first into the slot before it.
template <bool BOTH>
__device__ __forceinline__ void convert_pixel(const float (&first)[2], const float (&second)[2],
                                              unsigned char* place, float factor) {
  float sum[2], difference[2];
  #pragma unroll
  for (int k = 0; k < 2; ++k) {
    // a power of two: the products are exact, and each sum is rounded once
    const float a = factor * first[k];
    sum[k] = fmaf(factor, second[k], a);
    difference[k] = fmaf(factor, second[k], -a);
  }
  __half2* const to = reinterpret_cast<__half2*>(place);
  const __half2 hi = hi_of(difference[0], difference[1]);
  to[0] = hi;
  to[LO_AT / 4] = lo_of(difference[0], difference[1], hi);
  if (BOTH) {
    const __half2 hi = hi_of(sum[0], sum[1]);
    to[-SLOT / 4] = hi;
    to[(LO_AT - SLOT) / 4] = lo_of(sum[0], sum[1], hi);
  }
}

// A warp's part of two rows of the input into a transformed row, second - first, and if BOTH
// second + first into the slot before it. If LOOK, looks at what the second row brings. Two
// channels of a pixel are one store; a side's stores meet no bank twice either.
template <bool BOTH, bool LOOK, int PIXELS>
__device__ __forceinline__ void convert(const unsigned char* first, const unsigned char* second,
                                        unsigned char* slot, const Share& of, int scale,
                                        HalfRuns& seen) {
  constexpr int UNITS = PIXELS / UNIT_W;
  const float factor = power_of_two(scale - 1);  // a sum of two rows has their range
  const int lane = thread_again() & 31, channel = of.channel0 + lane / 4 * 2;
  // to the first pixel, an even one: so the swizzle only has to take the other one in
  const int to = in_row(of.side * SIDE_W + of.pixel0 + lane % 4 * 2, channel / 8) +
                 (channel & 7) * 2;
  unsigned char* const places[2] = {slot + to, slot + (to ^ PIXEL + 16)};
  const int from = few_at() ^ in_unit(of.pixel0 / UNIT_W);
  #pragma unroll (BOTH ? UNITS / 2 : UNITS)  // registers
  for (int unit = 0; unit < UNITS; ++unit) {
    const int here = from ^ in_unit(unit);
    const Few one(first + here), two(second + here);
    #pragma unroll
    for (int k = 0; LOOK && k < 2; ++k) {
      seen.look_at(larger_magnitude(two.channel[k].x, two.channel[k].y));
    }
    const float a[2][2] = {{one.channel[0].x, one.channel[1].x},
                           {one.channel[0].y, one.channel[1].y}};
    const float b[2][2] = {{two.channel[0].x, two.channel[1].x},
                           {two.channel[0].y, two.channel[1].y}};
    #pragma unroll
    for (int j = 0; j < 2; ++j) {
      convert_pixel<BOTH>(a[j], b[j], places[j] + unit * UNIT_W * PIXEL, factor);
    }
  }
  #pragma unroll 1
  for (int unit = 0; unit < of.tails; ++unit) {
    const int pixel = unit * TAIL_UNIT_W + (thread_again() & 3);
    const int here = in_tail(lane / 4 * 2, pixel);
    const float a[2] = {*reinterpret_cast<const float*>(first + here),
                        *reinterpret_cast<const float*>(first + here + LINE)};
    const float b[2] = {*reinterpret_cast<const float*>(second + here),
                        *reinterpret_cast<const float*>(second + here + LINE)};
    #pragma unroll
    for (int k = 0; LOOK && k < 2; ++k) {
      seen.look_at(larger_magnitude(b[k], __shfl_xor_sync(0xffffffffu, b[k], 1)));
    }
    const int place = in_row(2 * SIDE_W + pixel, channel / 8) + (channel & 7) * 2;
    convert_pixel<BOTH>(a, b, slot + place, factor);
  }
}

// Looks at a warp's part of a row that no pair before has brought.
template <int PIXELS>
__device__ __forceinline__ void look_at(const unsigned char* row, const Share& of,
                                        HalfRuns& seen) {
  #pragma unroll 1
  for (int unit = 0; unit < PIXELS / UNIT_W; ++unit) {
    const Few few(row + (few_at() ^ in_unit(of.pixel0 / UNIT_W + unit)));
    #pragma unroll
    for (const float2& two : few.channel) seen.look_at(larger_magnitude(two.x, two.y));
  }
  #pragma unroll 1
  for (int unit = 0; unit < of.tails; ++unit) {
    const int lane = thread_again() & 31;
    const int here = in_tail(lane / 4 * 2, unit * TAIL_UNIT_W + lane % 4);
    #pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float one = *reinterpret_cast<const float*>(row + here + k * LINE);
      seen.look_at(larger_magnitude(one, __shfl_xor_sync(0xffffffffu, one, 1)));
    }
  }
}

// What a warp's half of the block's side is in a stage, to the same place in the cluster's other
// block, whose barrier counts the bytes. A lane copies a slot's hi or lo half; the tail likewise.
template <int STAGE>
__device__ __forceinline__ void copy_to_other(unsigned char* shared, unsigned there,
                                              RingState* state, const Share& of) {
  constexpr int FIRST = STAGE == 0 ? 0 : STAGE + 1, OF_STAGE = STAGE == 0 ? 2 : 1;  // slots
  constexpr int COPIES = 2 * OF_STAGE;
  const int lane = thread_again() & 31;
  const bool tail = lane >= COPIES;
  if (lane >= (of.tails ? 2 : 1) * COPIES) return;
  const int slot = FIRST + lane % OF_STAGE, lo = lane / OF_STAGE % 2;
  const int pixel = tail ? 2 * SIDE_W : of.side * SIDE_W + of.pixel0;
  const int pixels = tail ? of.tails * TAIL_UNIT_W : SIDE_W / 2;
  const int at = SLOTS_AT + slot * SLOT + lo * LO_AT + pixel * PIXEL;
  const unsigned here = shared_address(shared);
  cluster_copy(there + at, here + at, pixels * PIXEL,
               there + (shared_address(&state->full[STAGE]) - here));
}

template <int i>
using Stage = std::integral_constant<int, i>;

// A warp's share of all rows: PIXELS of a side.
template <bool WIDE, int PIXELS>
__device__ __forceinline__ void produce_share(const float* __restrict__ x, const Conv& c,
                                              const Plan& plan, int blocks_k,
                                              unsigned char* shared, RingState* state, int scale) {
  constexpr bool CLUSTERED = PIXELS < SIDE_W;
  const int warp = uniform((threadIdx.x - CONSUMERS) / 32), item_step = gridDim.x / blocks_k;
  const Share of(warp, c);
  unsigned char* const landings = shared + warp / 2 * LANDINGS * LANDING + of.side * SIDE;
  const unsigned there = CLUSTERED ? map_shared(shared_address(shared), 1 - cluster_rank()) : 0;
  Cursor now, ahead;
  now.enter(blockIdx.x / blocks_k, x, plan, c);
  ahead = now;
  int fetched = 0, landed = 0, pairs = 0;  // so far; `landed`: up to the pair's first row
  const auto fetch_rows = [&](int count) {
    const int lane = thread_again() & 31;
    #pragma unroll 1
    for (; count > 0; --count, ++fetched) {
      if (ahead.item >= plan.items) {
        cp_async_commit();  // of nothing, so that groups are rows
        continue;
      }
      fetch<WIDE, PIXELS>(landings + fetched % LANDINGS * LANDING, lane, of, ahead, c);
      if (++ahead.row == ahead.rows) ahead.enter(ahead.item + item_step, x, plan, c);
    }
  };
  const auto row = [&](int i) { return landings + (landed + i) % LANDINGS * LANDING; };
  unsigned char* const slots = shared + SLOTS_AT;
  const auto until_empty = [&](int stage) {
    mbarrier_wait_napping(shared_address(&state->empty[stage]), pairs & 1);
  };
  // a stage is full; and whether fp16 holds what was seen of the pair's rows
  const auto pass_on = [&](auto stage, const HalfRuns& seen) {
    constexpr int STAGE = decltype(stage)::value;
    if (!HalfRange(scale).holds(seen)) {
      BadRows* const bad = &state->bad[under_way(now.item, blocks_k)];
      atomicMin(&bad->first, now.row);
      atomicMax(&bad->last, now.row + 3);
      if (CLUSTERED) {
        const unsigned first = there + (shared_address(bad) - shared_address(shared));
        cluster_min(first, now.row);
        cluster_max(first + 4, now.row + 3);
        __threadfence();  // the other block reads them once the stage's copies are there
      }
    }
    const unsigned full = shared_address(&state->full[STAGE]);
    const unsigned converted = shared_address(&state->converted[STAGE][warp % 2]);
    fence_async_proxy();
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      if (CLUSTERED && warp == 0) {
        constexpr int ROWS = STAGE == 0 ? 4 : 2;  // of fp16
        mbarrier_arrive_expect(full, ROWS * of.others * PIXEL);
      } else {
        mbarrier_arrive(full);
      }
      if (CLUSTERED) mbarrier_arrive(converted);
    }
    if (CLUSTERED && of.channel0 == 0) {
      mbarrier_wait_napping(converted, pairs & 1);
      copy_to_other<STAGE>(shared, there, state, of);
      __syncwarp();
    }
  };
  fetch_rows(LANDINGS);
  #pragma unroll 1
  for (; now.item < plan.items; ++pairs) {
    const bool last = now.row + 4 == now.rows;
    HalfRuns seen;
    const auto convert_into = [&](auto both, auto look, int slot, int first, int second) {
      convert<both, look, PIXELS>(row(first), row(second), slots + slot * SLOT, of, scale, seen);
    };
    using Yes = std::true_type;
    using No = std::false_type;
    cp_async_wait<LANDINGS - 3>();  // until the pair's third row is there
    __syncwarp();
    if (now.row == 0) {
      look_at<PIXELS>(row(0), of, seen);
      look_at<PIXELS>(row(1), of, seen);
    }
    until_empty(0);
    convert_into(Yes(), Yes(), 1, 1, 2);
    pass_on(Stage<0>(), seen);
    until_empty(1);
    convert_into(No(), No(), 2, 2, 0);
    pass_on(Stage<1>(), HalfRuns());
    cp_async_wait<LANDINGS - 4>();  // and the fourth
    __syncwarp();
    until_empty(2);
    seen = HalfRuns();
    convert_into(No(), Yes(), 3, 1, 3);
    pass_on(Stage<2>(), seen);
    fetch_rows(last ? 4 : 2);  // over rows that no pair needs any more
    landed += last ? 4 : 2;
    now.row += 2;
    if (last) now.enter(now.item + item_step, x, plan, c);
  }
  cp_async_wait<0>();
}

template <bool WIDE>
__device__ __forceinline__ void produce(const float* __restrict__ x, const Conv& c,
                                        const Plan& plan, int blocks_k, unsigned char* shared,
                                        RingState* state, int scale) {
  if (cluster_blocks() > 1) {
    produce_share<WIDE, SIDE_W / 2>(x, c, plan, blocks_k, shared, state, scale);
  } else {
    produce_share<WIDE, SIDE_W>(x, c, plan, blocks_k, shared, state, scale);
  }
}
"""

WEIGHTS = r"""
// ---- consumers

// A warp's 16 filters from k0 + warp_k on, transformed, in registers for good; what has none goes
// to `tiles`. The first warpgroup has (g0 + g1 + g2) / 2 and g0, the second (g0 - g1 + g2) / 2 and
// g2. Each filter has its own power of two. `turn`: the warp's shared memory. Says whether fp16
// holds the weights.
struct Weights {
  unsigned hi[FRAGMENTS][4], lo[LO_FRAGMENTS][4];
};
__device__ __forceinline__ bool load_weights(Weights& a, const float* __restrict__ w,
                                             const float* __restrict__ bias, const Conv& c, int k0,
                                             int warp_k, int group, unsigned char* turn,
                                             unsigned char* tiles, RingState* state,
                                             int input_scale) {
  bool good = true;
  #pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int lane = thread_again() % 32;
    __syncwarp();
    #pragma unroll 1
    for (int f = 0; f < 16; ++f) {
      const int k = warp_k + f;
      float g[2][TAPS];  // of channels lane and lane + 32
      unsigned run[2] = {0, 0};
      #pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int channel = lane + 32 * i;
        const float* const taps = w + ((long long)(k0 + k) * c.C + channel) * TAPS;
        #pragma unroll
        for (int tap = 0; tap < TAPS; ++tap) {
          g[i][tap] = k0 + k < c.K && channel < c.C ? __ldg(taps + tap) : 0.0f;
          run[i] = max(run[i], magnitude(g[i][tap]));
        }
      }
      unsigned largest = max(run[0], run[1]);
      for (int lanes = 1; lanes < 32; lanes *= 2) {
        largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
      }
      const int scale = scale_for(largest, WEIGHT_TOP), exponent = -(input_scale - 1 + scale);
      const HalfRange range(scale);
      const float factor = power_of_two(scale);
      good = good && exponent >= -126 && exponent <= 126;
      good = good && range.holds(run[0]) && range.holds(run[1]);
      if (lane == 0 && group == 0) {
        state->exponent[k] = (signed char)min(126, max(-126, exponent));
        state->bias[k] = bias && k0 + k < c.K ? __ldg(bias + k0 + k) : 0.0f;
      }
      #pragma unroll
      for (int i = 0; i < 2; ++i) {
        #pragma unroll
        for (int s = 0; s < S; ++s) {
          const float g0 = factor * g[i][s], g1 = factor * g[i][S + s];
          const float g2 = factor * g[i][2 * S + s], outer = 0.5f * (g0 + g2), inner = 0.5f * g1;
          const float taps[2] = {group ? outer - inner : outer + inner, group ? g2 : g0};
          #pragma unroll
          for (int t = 0; t < 2; ++t) {
            const int channel = lane + 32 * i, tap = t * S + s;
            const __half2 hi = hi_of(taps[t], 0.0f), one = half ? lo_of(taps[t], 0.0f, hi) : hi;
            unsigned char* to = turn + f * TURN_FILTER + tap * PIXEL + channel * 2;
            if (half == 1 && tap >= TAPS_HELD - TAPS_IN_TILES) {
              const int tile = (tap - (TAPS_HELD - TAPS_IN_TILES)) * 2 + group;
              to = tiles + tile * TILE + in_row(k, channel / 8) + channel % 8 * 2;
            }
            *reinterpret_cast<__half*>(to) = __low2half(one);
          }
        }
      }
    }
    __syncwarp();
    #pragma unroll
    for (int eight = 0; eight < 2; ++eight) {
      const unsigned char* const row = turn + (lane % 8 + 8 * eight) * TURN_FILTER + lane / 8 * 16;
      #pragma unroll
      for (int i = 0; i < (half ? LO_FRAGMENTS : FRAGMENTS); i += 2) {
        unsigned quarter[4];  // channels 0 to 7 and 8 to 15 of this fragment and of the next
        ldmatrix_x4(quarter, row + i / PARTS * PIXEL + i % PARTS * 32);
        unsigned (*const to)[4] = half ? &a.lo[i] : &a.hi[i];
        to[0][eight] = quarter[0];
        to[0][eight + 2] = quarter[1];
        to[1][eight] = quarter[2];
        to[1][eight + 2] = quarter[3];
      }
    }
  }
  __syncwarp();
  return good;
}
"""

CONSUME = r"""
// Which of a warpgroup's warps, and the first of the two filters of which a thread has sums; the
// other is 8 further. Worked out anew each time, see thread_again.
__device__ __forceinline__ unsigned lane_again() { return thread_again() & 31; }
__device__ __forceinline__ unsigned warp_again() { return thread_again() >> 5 & 3; }
__device__ __forceinline__ int filter_again() {
  return warp_again() * 16 + lane_again() / 4;
}

// For a whole warp: it has read a stage, which all blocks of a cluster wait for. To arrive there is
// no release for the cluster: that would wait for all of the warp's outputs to be stored, and what
// it orders are products' reads, which are done.
__device__ __forceinline__ void stage_is_read(unsigned long long* barrier) {
  __syncwarp();
  if (lane_again() == 0) {
    if (cluster_blocks() > 1) {
      cluster_mbarrier_arrive(map_shared(shared_address(barrier), 1 - cluster_rank()));
    }
    mbarrier_arrive(shared_address(barrier));
  }
}

// Starts 64 filters by 64 columns of one m: a transformed row, its slot, by the `t`th of the
// warpgroup's two taps. First what has a lo half in it, 2^11 times too large: those sums are small,
// and what tensor cores cut off when they add is small against the end result.
template <int group, int t>
__device__ __forceinline__ void multiply(Sums& sum, const Weights& a, unsigned char* shared,
                                         const Conv& c) {
  const auto pixel_rows = [&] {
    const int slot = 2 * t + group, pixel0 = (unsigned)-c.pad_w & 3;
    return swizzled_rows(uniform(shared_address(shared) + SLOTS_AT + slot * SLOT + pixel0 * PIXEL));
  };
  wgmma_fence();
  {
    const unsigned long long hi = pixel_rows();
    const unsigned long long tiles =
        swizzled_rows(uniform(shared_address(shared) + TILES_AT + group * TILE));
    #pragma unroll
    for (int s = 0; s < S; ++s) {
      #pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        const unsigned long long at = moved(hi, s * PIXEL + part * 32);
        const int i = (t * S + s) * PARTS + part, missing = i - LO_FRAGMENTS;
        wgmma_m64n64k16_f16_ra(sum, a.hi[i], moved(at, LO_AT), s + part);
        if (missing < 0) {
          wgmma_m64n64k16_f16_ra(sum, a.lo[i < LO_FRAGMENTS ? i : 0], at, 1);
        } else {
          const int tile = missing / PARTS * 2 * TILE;
          wgmma_m64n64k16_f16(sum, moved(tiles, tile + missing % PARTS * 32), at, 1);
        }
      }
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  #pragma unroll
  for (float& one : sum) one *= 1.0f / LO_SCALE;
  wgmma_fence();
  const unsigned long long hi = pixel_rows();
  #pragma unroll
  for (int s = 0; s < S; ++s) {
    #pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      wgmma_m64n64k16_f16_ra(sum, a.hi[(t * S + s) * PARTS + part],
                             moved(hi, s * PIXEL + part * 32), 1);
    }
  }
  wgmma_commit();
}

// What makes sums outputs, of a thread's two filters.
struct Finish {
  float factor[2], bias[2];
  __device__ __forceinline__ explicit Finish(const State* state) {
    const int k = filter_again();
    #pragma unroll
    for (int eight = 0; eight < 2; ++eight) {
      factor[eight] = power_of_two(state->exponent[k + 8 * eight]);
      bias[eight] = state->bias[k + 8 * eight];
    }
  }
};

// m1 or m2, as a part of outputs, into the warpgroup's place. m1 brings the bias.
template <int group>
__device__ __forceinline__ void hand_over(const Sums& sum, const Finish& of, float4* place) {
  const float bias[2] = {group ? 0.0f : of.bias[0], group ? 0.0f : of.bias[1]};
  #pragma unroll
  for (int i = 0; i < PRODUCT_W / 2; i += 4) {
    place[i / 4 * GROUP] = make_float4(
        fmaf(sum[i], of.factor[0], bias[0]), fmaf(sum[i + 1], of.factor[0], bias[0]),
        fmaf(sum[i + 2], of.factor[1], bias[1]), fmaf(sum[i + 3], of.factor[1], bias[1]));
  }
}

// m0 + (m1 + m2), or m3 + (m1 - m2): outputs. m1 and m2 are fetched AHEAD steps before they are
// needed, the first while products are made, for the end of which done() waits.
template <int group, class Done>
__device__ __forceinline__ void take_over(Sums& sum, const State* state, const float4* m1,
                                          const float4* m2, Done done) {
  constexpr int AHEAD = 2, STEPS = PRODUCT_W / 2 / 4;
  float4 of_m1[AHEAD], of_m2[AHEAD];
  #pragma unroll
  for (int i = 0; i < AHEAD; ++i) of_m1[i] = m1[i * GROUP], of_m2[i] = m2[i * GROUP];
  done();
  const Finish of(state);
  const float sign = group ? -1.0f : 1.0f;
  #pragma unroll
  for (int i = 0; i < STEPS; ++i) {
    const float4 a = of_m1[i % AHEAD], b = of_m2[i % AHEAD];
    if (i + AHEAD < STEPS) {
      of_m1[i % AHEAD] = m1[(i + AHEAD) * GROUP], of_m2[i % AHEAD] = m2[(i + AHEAD) * GROUP];
    }
    float* const four = &sum[4 * i];
    four[0] = fmaf(four[0], of.factor[0], fmaf(sign, b.x, a.x));
    four[1] = fmaf(four[1], of.factor[0], fmaf(sign, b.y, a.y));
    four[2] = fmaf(four[2], of.factor[1], fmaf(sign, b.z, a.z));
    four[3] = fmaf(four[3], of.factor[1], fmaf(sign, b.w, a.w));
  }
}

// Stores a warp's 16 filters of one output row. Four lanes have 8 columns of a filter, two each,
// wherever they begin in a sector: they move them round until each has what is its own in one, so
// that a store of the warp is 8 whole sectors. What is left at both ends of the strip is one
// sector's worth, parts of two that the neighbours complete. EVEN: rows start on 8 bytes and end
// there, so two columns stay together. Else two lanes' columns may have to meet, and stores of
// pairs still are of 8 bytes: by 4 they took 11 to 47 % longer (notebook 07).
template <bool EVEN>
__device__ __forceinline__ void store(Sums& sum, const Out& out) {
  const int mine = filter_again();
  float* row = out.first + (long long)mine * out.plane;
  const int skip = -(int)((unsigned long long)row >> 2) & 7;  // to a sector; the same 8 filters on
  #pragma unroll
  for (int eight = 0; eight < 2; ++eight) {
    const int quad = thread_again() & 3, end = mine + 8 * eight < out.filters ? out.columns : 0;
    const int column = skip + 2 * quad, room = end - column;
    const bool odd = !EVEN && (skip & 1);
    // the lanes that have a lane's columns are so many further on, and may wrap
    const int from = quad + skip / 2;
    const bool next = quad < skip / 2, next_but_one = quad < (skip + 1) / 2;
    // in place, one kind of step after the other: many shuffles are under way together
    float* const own = &sum[eight * 2];  // two of every four
    const float begin[2] = {own[0], own[1]};
    #pragma unroll
    for (int i = 0; i < PRODUCT_W / 2; i += 4) {
      const float* const there = i + 4 < PRODUCT_W / 2 ? &own[i + 4] : begin;
      const float a = next ? there[0] : own[i], b = next ? there[1] : own[i + 1];
      const float c = next_but_one ? there[0] : own[i];
      own[i] = odd ? b : a;
      own[i + 1] = odd ? c : b;
    }
    #pragma unroll
    for (int i = 0; i < PRODUCT_W / 2; i += 4) {
      own[i] = __shfl_sync(0xffffffffu, own[i], from & 3, 4);
      own[i + 1] = __shfl_sync(0xffffffffu, own[i + 1], from + odd & 3, 4);
    }
    float* const first = row + column;
    #pragma unroll
    for (int j = 0; j < TILE_W; j += 8) {
      // columns from `first` on; what wraps is the strip's begin
      const float one = own[j / 2], two = own[j / 2 + 1];
      const bool last = j + 8 == TILE_W;
      const int at = last && column >= 8 ? j - TILE_W : j;
      const int next_at = EVEN ? at + 1 : (last && column >= 7 ? j - TILE_W : j) + 1;
      if (next_at < room && (EVEN || next_at > at)) {
        *reinterpret_cast<float2*>(first + at) = make_float2(one, two);
      } else if (!EVEN) {
        if (at < room) first[at] = one;
        if (next_at < room) first[next_at] = two;
      }
    }
    row += 8ll * out.plane;
  }
}

// A warpgroup's part of all pairs of rows of all items.
template <int group, bool EVEN>
__device__ __forceinline__ void work(const Weights& a, const float* __restrict__ x,
                                     const float* __restrict__ w, float* __restrict__ y,
                                     const Conv& c, const Plan& plan, int blocks_k,
                                     unsigned char* shared, State* first_state) {
  const auto strip_again = [&]() -> Strip& { return first_state->strip[thread_again() >> 5]; };
  #pragma unroll 1
  for (int item = blockIdx.x / blocks_k; item < plan.items;
       item = strip_again().item + gridDim.x / blocks_k) {
    __syncwarp();  // all have read the item before
    if (lane_again() == 0) {
      const Item at = item_at(item, plan, c);
      const int k0 = opaque(blockIdx.x) % blocks_k * BLOCK_K;
      Strip& strip = strip_again();
      const long long plane = (long long)at.n * opaque(c.K) + k0;
      strip = {(plane * opaque(c.OH) + at.oh0) * opaque(c.OW) + at.ow0,
               item, c.K - k0, at.rows, c.OW - at.ow0, 0, strip.pairs};
    }
    #pragma unroll 1
    while (true) {
      // not to be computed once and for all
      unsigned char* const here = shared + opaque(0);
      State* const state = reinterpret_cast<State*>(here + STATE_AT);
      Strip& strip = state->strip[thread_again() >> 5];
      const auto place = [&](int of) {
        float4* const first = reinterpret_cast<float4*>(here + PLACES_AT + of * PLACE);
        return first + (thread_again() & GROUP - 1);
      };
      const auto wait = [&](unsigned long long* barrier, int parity) {
        mbarrier_wait_napping(shared_address(barrier), parity);
      };
      __syncwarp();
      if (strip.row >= strip.rows) break;
      Sums sum;
      wait(&state->full[0], strip.pairs & 1);
      multiply<group, 0>(sum, a, here, c);
      const Finish of(state);
      wgmma_wait<0>();
      stage_is_read(&state->empty[0]);
      const int parity = strip.pairs & 1;  // read before what is handed over is written
      wait(&state->free[group][warp_again()], parity);
      hand_over<group>(sum, of, place(group));
      warp_arrives(&state->handed[group][warp_again()]);

      wait(&state->full[1 + group], parity);
      multiply<group, 1>(sum, a, here, c);
      wait(&state->handed[1 - group][warp_again()], strip.pairs & 1);
      take_over<group>(sum, state, place(0), place(1), [&] {
        wgmma_wait<0>();
        stage_is_read(&state->empty[1 + group]);
      });
      warp_arrives(&state->free[1 - group][warp_again()]);
      const int row = strip.row + group;
      if (row < strip.rows) {
        const int width = opaque(c.OW);
        store<EVEN>(sum, {y + strip.first + (long long)row * width, opaque(c.OH) * width,
                          strip.filters, strip.columns, strip.columns == width, false});
      }
      __syncwarp();
      if (lane_again() == 0) {
        strip.row += 2;
        ++strip.pairs;
      }
    }
    redo_bad_rows(x, w, y, c, plan, blocks_k, strip_again().item, first_state);
  }
}

template <bool EVEN>
__device__ __forceinline__ void consume(const float* __restrict__ x, const float* __restrict__ w,
                                        const float* __restrict__ bias, float* __restrict__ y,
                                        const Conv& c, const Plan& plan, int blocks_k,
                                        unsigned char* shared, State* state, int scale) {
  const int group = uniform(threadIdx.x / GROUP), warp = threadIdx.x / 32 % 4;
  const int k0 = blockIdx.x % blocks_k * BLOCK_K;
  unsigned char* const turn = shared + SLOTS_AT + threadIdx.x / 32 * TURN;
  Weights a;
  if (!load_weights(a, w, bias, c, k0, warp * 16, group, turn, shared + TILES_AT, state, scale)) {
    state->weights_bad = 1;
  }
  fence_async_proxy();  // wgmma sees the tiles
  named_barrier<CONSUMERS>(2);
  stage_is_read(&state->empty[0]);  // of weights
  stage_is_read(&state->empty[1 + group]);
  warp_arrives(&state->free[1 - group][warp]);
  if (group == 0) {
    work<0, EVEN>(a, x, w, y, c, plan, blocks_k, shared, state);
  } else {
    work<1, EVEN>(a, x, w, y, c, plan, blocks_k, shared, state);
  }
}
"""

SOURCE = (
    HALF_RANGE
    + MMA
    + HOPPER
    + NAP
    + CLUSTER
    + BULK
    + CP_ASYNC
    + wgmma_f16(64)
    + wgmma_f16_ra(64)
    + INCLUDES
    + LAYOUT
    + bad_rows(most_runs=22)  # shared memory is full
    + STATE
    + plan(most_rows=128)
    + PRODUCE
    + IN_ROW
    + CONVERT
    + WARP_ARRIVES
    + WEIGHTS
    + OUT_ROW
    + redo("CONSUMERS", settled="  named_barrier<CONSUMERS>(1);  // all rows are stored\n")
    + CONSUME
    + hopper_kernel(clustered=True)
)


RUNG = Rung(
    name="k08_hopper_split",
    idea="fp32-class accuracy: values as hi + lo halves, a third of the products saved",
    notebook="07_precision",
    source=SOURCE,
    refusal=refusal,
    precision="fp32",
    capability=(9, 0),
    arch="90a",
    mixes_rows=True,
)
