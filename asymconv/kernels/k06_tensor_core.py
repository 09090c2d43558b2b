"""k06: tensor cores, fed by an implicit GEMM that lies in shared memory once.

What the last rung was limited by: the fp32 units.

What it changes: products are made by mma.sync, 16 filters x 8 pixels x 16 channels in one warp
instruction, of operands rounded to nearest to fp16, whose 11 bits are those of TF32; sums stay
fp32. Filters are the rows, pixels the columns, so that neighbouring sums are neighbouring pixels.

- A tile of 4 x 64 pixels and its halo are in shared memory as fp16, each pixel a row of 16
  channels. No im2col: a tap is the same tile, read from another pixel on. Pieces of rows are
  swizzled by the pixel's column, so ldmatrix meets no bank twice, wherever a tap starts.
- A warp computes WARP_K filters x WARP_H rows x TILE_W columns, by default 32 x 2 x 64. With more
  than one row, pixels that it has read for one row of the kernel serve the others from registers.
- A block keeps the weights of its 128 filters, 147,456 bytes as fp16 for 64 channels, and walks
  over tiles. The next 16 channels wait as fp32 in registers while these are multiplied, and are
  converted into the other of two buffers. One barrier for 16 channels; the stores of a tile stand
  after it, so that a warp may store while another multiplies.
- Rows of the output are 1022 * 4 bytes apart and begin anywhere in a sector of 32 bytes; partial
  sectors are slow. So sums go through shared memory, tiles follow each other to the right, and each
  keeps back what is in its last, incomplete sector: the next tile's row starts with it. A warp
  instruction writes 256 bytes, eight whole sectors.
- fp32's range does not suffer: see half_range.py. A tile with a run of pixels or weights that fp16
  does not hold is computed in plain fp32, some 50 times slower.

What it predicts, on the contract's shape, for the first choice of 64 x 1 x 64 a warp:

- 150 million mma of 2 * 2048 operations. At the 989 TFLOP/s of the data sheet 0.62 ms; mma.sync is
  reported to reach some 60 % of that on Hopper, whose full rate is wgmma's alone: 1.0 ms.
- Shared memory: for 16 channels and a tap a warp reads 4 fragments of filters and 4 of pixels, 8
  ldmatrix of 4 wavefronts for 32 mma: 1.0 wavefront an mma. (32 filters x 2 rows, with rows kept in
  registers: 0.92; 32 filters x 4 rows x 32 columns: 0.75.) At 0.6 mma a cycle, shared memory is
  60 % busy.
- Other instructions, counted in the SASS, per tile and scheduler: conversion 3,200, loads 800,
  stores 4,600, beside 14,900 cycles of mma at that rate, which itself issues 2,900. If none of it
  overlaps with mma, 1.6 ms; if all does, 1.0.
- Bytes: a tile of 4 rows reads 6, 66 columns for 64: 1.7 GB from L2; from memory 3.2 GB, 1.15 ms.
- Time: between 1.5 and 1.9 ms.

Measured: notebook 05, from figures/data: 2.5 ms, 1.6 times as fast as PyTorch's default and far
from the prediction. The tile with the fewest wavefronts was not the fastest; nothing overlaps as
well as the second estimate hoped.

What limits it now: a block alone on its SM, whose warps do the same things at nearly the same time:
they convert, multiply and store together. wgmma is faster and reads its operands from shared
memory by itself: k07.
"""

from collections.abc import Mapping

from asymconv.kernels.half_range import HALF_RANGE
from asymconv.kernels.ptx import MMA
from asymconv.kernels.rung import Rung
from asymconv.problem import ConvShape

DEFINES = {
    "WARP_K": 32,
    "WARPS_K": 4,
    "WARP_H": 2,
    "WARPS_H": 2,
    "TILE_W": 64,
    "STRIP": 16,
}

VARIANTS = tuple(
    dict(zip(DEFINES, values, strict=True))
    for values in (
        *((64, 2, 1, 4, 64, 16), (32, 4, 2, 2, 64, 16), (32, 4, 2, 2, 64, 4)),
        *((32, 4, 2, 2, 64, 1), (32, 4, 4, 2, 32, 32), (64, 2, 2, 4, 32, 32)),
        # 12 and 16 warps in place of 8: more of them to wait, more wavefronts an mma
        *((32, 4, 1, 3, 64, 16), (64, 2, 1, 6, 32, 32), (32, 4, 2, 3, 32, 32)),
        (32, 4, 1, 4, 64, 16),
    )
)
"""Warp tiles, blocks and strips that are compared."""

SOURCE = (
    "#include <cuda_fp16.h>\n"
    + HALF_RANGE
    + MMA
    + r"""
// A warp: WARP_K filters x WARP_H rows x TILE_W columns. A block: WARPS_K x WARPS_H warps.
constexpr int BLOCK_K = WARP_K * WARPS_K, TILE_H = WARP_H * WARPS_H;
constexpr int WARPS = WARPS_K * WARPS_H, THREADS = 32 * WARPS;
constexpr int MMAS_K = WARP_K / 16, PAIRS_W = TILE_W / 16;  // 16 filters; 16 pixels: two mma wide
static_assert(WARP_K % 16 == 0 && WARP_K * WARPS_K % 32 == 0, "an mma has 16 filters");
static_assert(TILE_W == 32 || TILE_W == 64, "a warp stores rows of 128 or 256 bytes");
static_assert(THREADS <= 1024, "a block has at most 1024 threads");

// Shared memory. Pixels, and filters of one tap, are rows of CHUNK_C channels: 32 bytes, two pieces
// of 16, which change places in every second group of four rows. So eight neighbouring rows, from
// whichever on, are in all banks: ldmatrix has no conflicts, wherever a tap shifts it to.
constexpr int CHUNK_C = 16, ROW_BYTES = 2 * CHUNK_C;
__device__ __forceinline__ int piece(int row, int half) { return (half ^ (row >> 2 & 1)) * 16; }

// A thread converts units of 4 pixels x 8 channels. A row of the tile starts on 16 bytes of its row
// of x, up to 3 pixels early.
constexpr int ROWS = TILE_H + 2, UNITS_W = (TILE_W + 2 + 3 + 3) / 4, PITCH = 4 * UNITS_W;  // 3x3
constexpr int UNITS = 2 * ROWS * UNITS_W, UNITS_EACH = (UNITS + THREADS - 1) / THREADS;
constexpr int INPUT_BYTES = ROWS * PITCH * ROW_BYTES;
constexpr int TAP_BYTES = BLOCK_K * ROW_BYTES, WEIGHT_BYTES = 9 * TAP_BYTES;  // of a chunk, 3x3

// A warp's scratch: 8 rows of outputs, each after 8 of the last tile, 8 words apart in their banks;
// or fp32 weights to transpose.
constexpr int OUT_PITCH = TILE_W + 8, MOST_TAPS = 36;  // taps of 16 channels that fit scratch
constexpr int SCRATCH = 8 * OUT_PITCH > 576 ? 8 * OUT_PITCH : 576;  // floats
static_assert(SCRATCH >= CHUNK_C * MOST_TAPS, "a filter's taps of a chunk fit");

// The filters of a block.
struct Filters {
  int group, k0, count;  // count: of the group
  int channels;          // of the group
  long long first;       // k0's number in w, bias and y
};

// The order in shared memory: what all kernels have, then weights and pixels.
struct Header {
  unsigned samples[WARPS];  // sampled_scale's
  int failed[3];            // tile, counted from 1, in which a run failed, by parity; any weights'
  int exponent[BLOCK_K];    // of each filter
  Filters filters;          // here, since registers are scarce
  // outputs of the last tile that end within a sector: the next tile to the right completes it
  alignas(16) float carry[TILE_H][BLOCK_K][8];
  alignas(16) float scratch[WARPS][SCRATCH];
};
constexpr int HEADER_BYTES = (sizeof(Header) + 127) / 128 * 128;

// How the work is cut. A block keeps its filters and walks over strips: up to `strip` tiles in a
// row, left to right.
struct Plan {
  int strip, strips_w, tiles_w, tiles_h, blocks_k, walkers;
  int strips;  // of all images
  // of the general kernel: pixels under a tile; or only those of one tap; taps it has weights of
  int rows, units_w, one_tap, taps_at_once;
};

struct Place {
  int number;  // of the tile in this block, from 1
  int strip, column, n, oh0, chunk;
};

__device__ __forceinline__ void enter_strip(Place& at, const Plan& p) {
  const int row = at.strip / p.strips_w;
  at.column = at.strip % p.strips_w * p.strip;
  at.n = row / p.tiles_h;
  at.oh0 = row % p.tiles_h * TILE_H;
}
__device__ __forceinline__ bool starts_strip(const Place& at, const Plan& p) {
  return at.column % p.strip == 0;
}
__device__ __forceinline__ bool ends_strip(const Place& at, const Plan& p) {
  return (at.column + 1) % p.strip == 0 || at.column + 1 == p.tiles_w;
}
__device__ __forceinline__ void next_tile(Place& at, const Plan& p) {
  ++at.number;
  if (ends_strip(at, p)) {
    at.strip += p.walkers;
    enter_strip(at, p);
  } else {
    ++at.column;
  }
}

// What all kernels begin with.
__device__ __forceinline__ void fill_header(Header& h, const Conv& c, const Plan& p) {
  if (threadIdx.x == 0) {
    const int of_k = blockIdx.x % (p.blocks_k * c.groups);
    Filters& f = h.filters;
    f.group = of_k / p.blocks_k;
    f.k0 = of_k % p.blocks_k * BLOCK_K;
    f.count = c.K / c.groups;
    f.channels = c.C / c.groups;
    f.first = (long long)f.group * f.count + f.k0;
    for (int i = 0; i < 3; ++i) h.failed[i] = 0;
  }
  __syncthreads();
}

// The thread's number, which the compiler must not know to be the same each time: what follows from
// it is to be computed again, not kept in registers that the sums need.
__device__ __forceinline__ int thread_again() {
  int thread = threadIdx.x;
  asm volatile("" : "+r"(thread));
  return thread;
}

__device__ __forceinline__ unsigned two_halves(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return (unsigned)__half_as_ushort(pair.x) | (unsigned)__half_as_ushort(pair.y) << 16;
}

// ---- input

// Reads a unit: 8 channels from c0 on, 4 pixels, `step` apart, of row ih. Zeros outside.
template <bool WIDE>
__device__ __forceinline__ void load_unit(float (&v)[8][4], const float* __restrict__ x,
                                          const Conv& c, const Filters& f, int n, int c0, int ih,
                                          int iw, int step, bool there) {
  const long long plane = (long long)c.H * c.W;
  const bool row_inside = there && ih >= 0 && ih < c.H;
  const float* const from =
      x + ((long long)n * c.C + (long long)f.group * f.channels + c0) * plane +
      (long long)ih * c.W + iw;
  #pragma unroll
  for (int i = 0; i < 8; ++i) {
    const bool inside = row_inside && c0 + i < f.channels;
    if (WIDE) {
      float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (inside && iw >= 0 && iw < c.W) {
        four = __ldg(reinterpret_cast<const float4*>(from + i * plane));
      }
      v[i][0] = four.x, v[i][1] = four.y, v[i][2] = four.z, v[i][3] = four.w;
    } else {
      #pragma unroll
      for (int p = 0; p < 4; ++p) {
        const long long column = (long long)iw + (long long)p * step;
        v[i][p] = inside && column >= 0 && column < c.W
                      ? __ldg(from + i * plane + (long long)p * step) : 0.0f;
      }
    }
  }
}

// Converts a unit and writes it to the pixel row at `to`, whose unit column is u. Returns whether
// fp16 holds its runs, the 4 pixels of a channel.
__device__ __forceinline__ bool convert_unit(char* to, const float (&v)[8][4], int u, int half,
                                             bool there, float scale,
                                             const HalfRange& range) {
  HalfRuns seen;
  #pragma unroll
  for (int i = 0; i < 8; ++i) {
    seen.look_at(larger_magnitude(larger_magnitude(v[i][0], v[i][1]),
                                  larger_magnitude(v[i][2], v[i][3])));
  }
  unsigned pixel[4][4];
  #pragma unroll
  for (int p = 0; p < 4; ++p) {
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
      pixel[p][i] = two_halves(v[2 * i][p] * scale, v[2 * i + 1][p] * scale);
    }
  }
  // Lanes write pixels 4 apart, which share banks: so each starts with another of its four. The
  // rotation is made of selections, for registers have no index.
  const int turn = u >> 1;
  #pragma unroll
  for (int by = 1; by <= 2; by *= 2) {
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
      unsigned old[4] = {pixel[0][i], pixel[1][i], pixel[2][i], pixel[3][i]};
      #pragma unroll
      for (int p = 0; p < 4; ++p) pixel[p][i] = turn & by ? old[(p + by) % 4] : old[p];
    }
  }
  char* const row = to + piece(4 * u, half);
  if (there) {
    #pragma unroll
    for (int p = 0; p < 4; ++p) {
      *reinterpret_cast<uint4*>(row + (4 * u + ((p + turn) & 3)) * ROW_BYTES) =
          make_uint4(pixel[p][0], pixel[p][1], pixel[p][2], pixel[p][3]);
    }
  }
  return range.holds(seen);
}

// ---- weights

// Each filter's exponent, from its largest weight. All threads call it.
__device__ __forceinline__ void filter_exponents(int* exponent, const float* __restrict__ w,
                                                 const Conv& c, const Filters& f) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const long long terms = (long long)f.channels * c.R * c.S;
  for (int k = warp; k < BLOCK_K; k += WARPS) {
    unsigned largest = 0;
    if (f.k0 + k < f.count) {
      const float* const from = w + (f.first + k) * terms;
      #pragma unroll 8
      for (long long i = lane; i < terms; i += 32) largest = max(largest, magnitude(from[i]));
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
    }
    if (lane == 0) exponent[k] = scale_for(largest, WEIGHT_TOP);
  }
}

// Converts the weights of 16 channels from c0 on, taps tap0.. (count of them, at most MOST_TAPS),
// to [tap][filter][channel]. Each warp brings a few filters as they lie, taps fastest, and turns
// them in its scratch. Returns whether the runs this lane looked at hold.
__device__ __forceinline__ bool convert_weights(char* to, float* scratch, const int* exponent,
                                                const float* __restrict__ w, const Conv& c,
                                                const Filters& filters, int c0, int tap0,
                                                int count) {
  const Filters f = filters;  // registers: nothing is written to it
  const int thread = thread_again(), lane = thread % 32, warp = thread / 32;
  const int taps = c.R * c.S, per_filter = CHUNK_C * count;
  const int at_once = max(1, min(4, SCRATCH / per_filter));
  bool holds = true;
  for (int k0 = warp * at_once; k0 < BLOCK_K; k0 += WARPS * at_once) {
    __syncwarp();  // the scratch has been read
    #pragma unroll 18
    for (int i = lane; i < at_once * per_filter; i += 32) {
      const int k = k0 + i / per_filter, rest = i % per_filter;
      const int ci = c0 + rest / count;
      const bool inside = k < BLOCK_K && f.k0 + k < f.count && ci < f.channels;
      scratch[i] =
          inside ? __ldg(w + ((f.first + k) * f.channels + ci) * taps + tap0 + rest % count) : 0.0f;
    }
    __syncwarp();
    for (int i = lane; i < at_once * CHUNK_C; i += 32) {  // runs
      const int k = k0 + i / CHUNK_C;
      if (k >= BLOCK_K) break;
      unsigned largest = 0;
      for (int tap = 0; tap < count; ++tap) {
        largest = max(largest, magnitude(scratch[i * count + tap]));
      }
      holds = holds && HalfRange(exponent[k]).holds(largest);
    }
    for (int i = lane; i < at_once * 2 * count; i += 32) {  // 8 channels of a tap
      // the halves of a few filters lie side by side: no bank twice
      const int half = i % 2, of_k = i / 2 % at_once, tap = i / 2 / at_once, k = k0 + of_k;
      if (k >= BLOCK_K) continue;
      const float scale = power_of_two(exponent[k]);
      const float* const from = scratch + (of_k * CHUNK_C + half * 8) * count + tap;
      unsigned pair[4];
      #pragma unroll
      for (int e = 0; e < 4; ++e) {
        pair[e] = two_halves(from[2 * e * count] * scale, from[(2 * e + 1) * count] * scale);
      }
      *reinterpret_cast<uint4*>(to + tap * TAP_BYTES + k * ROW_BYTES + piece(k, half)) =
          make_uint4(pair[0], pair[1], pair[2], pair[3]);
    }
  }
  return holds;
}

// ---- sums

typedef float Sums[MMAS_K][WARP_H][2 * PAIRS_W][4];

__device__ __forceinline__ void clear(Sums& sum) {
  #pragma unroll
  for (int i = 0; i < MMAS_K * WARP_H * 2 * PAIRS_W * 4; ++i) (&sum[0][0][0][0])[i] = 0.0f;
}

// Writes the warp's sums. Rows of y start anywhere, memory takes whole sectors of 32 bytes: a tile
// keeps what is in its last, incomplete sector for the next tile, whose row then starts in it.
__device__ __forceinline__ void store(Sums& sum, Header& h, float* __restrict__ y,
                                      const float* __restrict__ bias, const Conv& c,
                                      const Filters& f, const Place& at, bool starts, bool ends,
                                      int input_exponent) {
  const int thread = thread_again(), lane = thread % 32, warp = thread / 32;
  const int my_k = warp % WARPS_K * WARP_K, my_row = warp / WARPS_K * WARP_H;
  const int ow0 = at.column * TILE_W;
  const long long plane = (long long)c.OH * c.OW;
  float* const rows = h.scratch[warp] + 8;
  const int width = c.OW - ow0, first = starts ? 0 : -8;  // columns that may be written
  const bool pairs = c.OW % 2 == 0 && (size_t)y % 8 == 0;  // rows start on 8 bytes
  #pragma unroll
  for (int eight = 0; eight < 2 * MMAS_K; ++eight) {  // 8 filters
    const int k = my_k + eight * 8, mine = k + lane / 4;
    const int exponent = -(input_exponent + h.exponent[mine]);
    const float scale = power_of_two(exponent / 2);  // by halves: the whole may be no float
    const float scale2 = power_of_two(exponent - exponent / 2);
    const float offset = bias && f.k0 + mine < f.count ? bias[f.first + mine] : 0.0f;
    #pragma unroll
    for (int row = 0; row < WARP_H; ++row) {
      const int oh = at.oh0 + my_row + row;
      float2 last;
      #pragma unroll
      for (int j = 0; j < 2 * PAIRS_W; ++j) {
        const float* const v = &sum[eight / 2][row][j][eight % 2 * 2];
        last = make_float2(fmaf(v[0] * scale, scale2, offset), fmaf(v[1] * scale, scale2, offset));
        *reinterpret_cast<float2*>(rows + lane / 4 * OUT_PITCH + 8 * j + lane % 4 * 2) = last;
      }
      // each lane moves its two of what the last tile left to before the row
      float2* const left = reinterpret_cast<float2*>(
          &h.carry[my_row + row][k + lane / 4][lane % 4 * 2]);
      *reinterpret_cast<float2*>(rows + lane / 4 * OUT_PITCH + lane % 4 * 2 - 8) = *left;
      *left = last;
      __syncwarp();
      const int count = f.count - f.k0 - k;
      float* const out =
          y + ((long long)at.n * c.K + f.first + k) * plane + (long long)oh * c.OW + ow0;
      if (oh < c.OH && pairs && count >= 8) {
        constexpr int LANES = TILE_W / 2, AT_ONCE = 32 / LANES;  // of a row; rows
        const int column = lane % LANES * 2, r0 = lane / LANES;
        const float* from = rows + r0 * OUT_PITCH + column;
        float* to = out + r0 * plane + column;
        unsigned word = (unsigned)((size_t)out / 4) + r0 * (unsigned)plane;
        #pragma unroll
        for (int i = 0; i < 8; i += AT_ONCE) {
          const int shift = word % 8;
          const float2 v = *reinterpret_cast<const float2*>(from + i * OUT_PITCH - shift);
          if ((unsigned)(column - shift - first) < (unsigned)(width - first)) {
            *reinterpret_cast<float2*>(to - shift) = v;
          }
          to += AT_ONCE * plane, word += AT_ONCE * (unsigned)plane;
        }
        if (ends) {  // up to 6 are left in each row: 8 rows x 4 lanes
          const int r = lane / 4;
          const unsigned shift = ((unsigned)((size_t)out / 4) + r * (unsigned)plane) % 8;
          const int j = TILE_W - (int)shift + lane % 4 * 2;
          if (j < min(TILE_W, width)) {
            *reinterpret_cast<float2*>(out + r * plane + j) =
                *reinterpret_cast<const float2*>(rows + r * OUT_PITCH + j);
          }
        }
      } else if (oh < c.OH && count >= 8) {  // the same; pairs of memory are none of shared memory
        constexpr int LANES = TILE_W / 2, AT_ONCE = 32 / LANES;
        const int r0 = lane / LANES;
        #pragma unroll 1
        for (int i = r0; i < 8; i += AT_ONCE) {
          float* const to = out + i * plane;
          const int shift = (int)((size_t)to / 4 % 8);
          const float* const from = rows + i * OUT_PITCH;
          const int end = min(width, ends ? TILE_W : TILE_W - shift);
          #pragma unroll 1
          for (int j = lane % LANES * 2 - shift; j < end; j += TILE_W) {
            const bool one = j >= first, two = j + 1 >= first && j + 1 < end;
            if (one && two) {
              *reinterpret_cast<float2*>(to + j) = make_float2(from[j], from[j + 1]);
            } else if (one) {
              to[j] = from[j];
            } else if (two) {
              to[j + 1] = from[j + 1];
            }
          }
        }
      } else if (oh < c.OH) {
        #pragma unroll 1
        for (int r = 0; r < min(8, count); ++r) {
          float* const to = out + r * plane;
          const int shift = (int)((size_t)to / 4 % 8);
          #pragma unroll 1
          for (int j = lane - shift; j < min(width, ends ? TILE_W : TILE_W - shift); j += 32) {
            if (j >= first) to[j] = rows[r * OUT_PITCH + j];
          }
        }
      }
      __syncwarp();  // the rows have been read
    }
  }
}

// The warp's part of a tile in plain fp32, from global memory to y. Its registers are those of the
// sums, which nobody needs then.
__device__ __forceinline__ void tile_in_fp32(Header& h, const float* __restrict__ x,
                                             const float* __restrict__ w,
                                             const float* __restrict__ bias, float* __restrict__ y,
                                             const Conv& c, const Filters& f, const Place& at,
                                             bool starts) {
  constexpr int AT_ONCE = 16;  // filters
  const int thread = thread_again(), lane = thread % 32, warp = thread / 32;
  const int taps = c.R * c.S;
  const long long plane = (long long)c.OH * c.OW;
  #pragma unroll 1
  for (int i = 0; i < WARP_H * (WARP_K / AT_ONCE) * (TILE_W / 32); ++i) {
    const int column = i % (TILE_W / 32) * 32 + lane, ow = at.column * TILE_W + column;
    const int k = warp % WARPS_K * WARP_K + i / (TILE_W / 32) % (WARP_K / AT_ONCE) * AT_ONCE;
    const int row = warp / WARPS_K * WARP_H + i / (TILE_W / 32 * (WARP_K / AT_ONCE));
    const int oh = at.oh0 + row, filters = min(AT_ONCE, f.count - f.k0 - k);
    if (oh >= c.OH || filters <= 0) continue;  // for the whole warp
    float* const out =
        y + ((long long)at.n * c.K + f.first + k) * plane + (long long)oh * c.OW + ow;
    if (!starts && column < 32) {  // what the last tile left
      for (int j = lane; j < filters * 8; j += 32) {
        float* const to = out - lane + j / 8 * plane;
        if (j % 8 >= 8 - (int)((size_t)to / 4 % 8)) to[j % 8 - 8] = h.carry[row][k + j / 8][j % 8];
      }
      __syncwarp();  // the carry has been read
    }
    float sum[AT_ONCE] = {};
    #pragma unroll 1
    for (int ci = 0; ci < f.channels; ++ci) {
      const long long channel = (long long)at.n * c.C + (long long)f.group * f.channels + ci;
      #pragma unroll 1
      for (int tap = 0; tap < taps; ++tap) {
        const int ih = oh * c.stride_h - c.pad_h + tap / c.S * c.dil_h;
        const int iw = ow * c.stride_w - c.pad_w + tap % c.S * c.dil_w;
        const bool inside = ih >= 0 && ih < c.H && iw >= 0 && iw < c.W;
        // padding is a zero that counts: times inf it is NaN
        const float value = inside ? x[(channel * c.H + ih) * c.W + iw] : 0.0f;
        const float* weight = w + ((f.first + k) * f.channels + ci) * taps + tap;
        #pragma unroll
        for (int e = 0; e < AT_ONCE; ++e, weight += f.channels * taps) {
          if (e < filters) sum[e] = fmaf(value, *weight, sum[e]);
        }
      }
    }
    #pragma unroll
    for (int e = 0; e < AT_ONCE; ++e) {
      if (e < filters && ow < c.OW) {
        sum[e] += bias ? bias[f.first + k + e] : 0.0f;
        out[e * plane] = sum[e];
        // the next tile writes some of these once more
        if (column >= TILE_W - 8) h.carry[row][k + e][column - (TILE_W - 8)] = sum[e];
      }
    }
    __syncwarp();
  }
}

// ---- kernels

// What lane l points ldmatrix at, in 16 rows: for filters its four matrices are two groups of rows,
// then the other half of the channels; for pixels, both halves of a group, then the other group.
__device__ __forceinline__ int filter_row(int lane) { return lane % 16; }
__device__ __forceinline__ int filter_half(int lane) { return lane / 16; }
__device__ __forceinline__ int pixel_row(int lane) { return lane / 16 * 8 + lane % 8; }
__device__ __forceinline__ int pixel_half(int lane) { return lane / 8 % 2; }

// 3x3, stride 1, dilation 1. RESIDENT: a block keeps all its weights; else it converts those of a
// chunk with the chunk.
template <bool WIDE, bool RESIDENT>
__global__ void __launch_bounds__(THREADS, 1)
    conv2d_tensor_core_3x3(const float* __restrict__ x, const float* __restrict__ w,
                           const float* __restrict__ bias, float* __restrict__ y, Conv c,
                           const Plan p) {
  c.R = c.S = 3, c.stride_h = c.stride_w = c.dil_h = c.dil_w = 1;  // known to the compiler
  extern __shared__ __align__(128) char shared[];
  Header& h = *reinterpret_cast<Header*>(shared);
  fill_header(h, c, p);
  const Filters& f = h.filters;
  const int chunks = (f.channels + CHUNK_C - 1) / CHUNK_C;
  char* const weights = shared + HEADER_BYTES;
  char* const input = weights + (RESIDENT ? chunks : 2) * WEIGHT_BYTES;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int my_k = warp % WARPS_K * WARP_K, my_row = warp / WARPS_K * WARP_H;

  const int input_exponent =
      sampled_scale<WARPS>(x, (long long)c.N * c.C * c.H * c.W, h.samples);
  const float scale = power_of_two(input_exponent);
  const HalfRange range(input_exponent);
  filter_exponents(h.exponent, w, c, f);
  __syncthreads();
  if (RESIDENT) {
    bool holds = true;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      holds &= convert_weights(weights + chunk * WEIGHT_BYTES, h.scratch[warp], h.exponent, w, c,
                               f, chunk * CHUNK_C, 0, 9);
    }
    if (!holds) atomicMax(&h.failed[2], 1);
  }

  const int lead = (4 - c.pad_w % 4) % 4;  // pixels that a row starts early
  float unit[UNITS_EACH][8][4];
  auto load = [&](const Place& at) {
    #pragma unroll
    for (int e = 0; e < UNITS_EACH; ++e) {
      const int u = e * THREADS + thread_again(), line = u / UNITS_W, column = 4 * (u % UNITS_W);
      load_unit<WIDE>(unit[e], x, c, f, at.n, at.chunk * CHUNK_C + line / ROWS * 8,
                      at.oh0 - c.pad_h + line % ROWS,
                      at.column * TILE_W - c.pad_w - lead + column, 1,
                      u < UNITS && column < lead + TILE_W + 2);
    }
  };
  auto convert = [&](const Place& at, int turn) {
    bool holds = true;
    #pragma unroll
    for (int e = 0; e < UNITS_EACH; ++e) {
      const int u = e * THREADS + thread_again(), line = u / UNITS_W;
      holds &= convert_unit(input + turn * INPUT_BYTES + line % ROWS * PITCH * ROW_BYTES, unit[e],
                            u % UNITS_W, line / ROWS, u < UNITS, scale, range);
    }
    if (!RESIDENT) {
      holds &= convert_weights(weights + turn * WEIGHT_BYTES, h.scratch[warp], h.exponent, w, c, f,
                               at.chunk * CHUNK_C, 0, 9);
    }
    if (!holds) atomicMax(&h.failed[at.number & 1], at.number);
  };
  auto advance = [&](Place& at) {
    if (++at.chunk == chunks) {
      at.chunk = 0;
      next_tile(at, p);
    }
  };

  // Where this lane's ldmatrix rows start; the rest of their addresses is known to the compiler.
  const int filter_at =
      (my_k + filter_row(lane)) * ROW_BYTES + piece(filter_row(lane), filter_half(lane));
  int pixel_at[3];
  #pragma unroll
  for (int s = 0; s < 3; ++s) {
    const int column = lead + s + pixel_row(lane);
    pixel_at[s] = (my_row * PITCH + column) * ROW_BYTES + piece(column, pixel_half(lane));
  }

  Sums sum;
  clear(sum);
  Place now, next;
  next.number = 1, next.chunk = 0, next.strip = blockIdx.x / (p.blocks_k * c.groups);
  enter_strip(next, p);
  now = next;
  load(next);
  convert(next, 0);
  __syncthreads();
  advance(next);
  if (next.strip < p.strips) load(next);
  for (int turn = 0;; turn ^= 1) {
    const char* const filters =
        weights + (RESIDENT ? now.chunk : turn) * WEIGHT_BYTES + filter_at;
    const char* const pixels = input + turn * INPUT_BYTES;
    #pragma unroll
    for (int s = 0; s < 3; ++s) {
      unsigned b[WARP_H][PAIRS_W][4];  // rows of pixels: each serves up to three rows of sums
      #pragma unroll
      for (int row = 0; row < WARP_H + 2; ++row) {
        #pragma unroll
        for (int g = 0; g < PAIRS_W; ++g) {
          ldmatrix_x4(b[row % WARP_H][g],
                      pixels + pixel_at[s] + (row * PITCH + g * 16) * ROW_BYTES);
        }
        const int r = row - (WARP_H - 1);  // the tap's row for which all rows of b are now there
        if (r < 0) continue;
        #pragma unroll
        for (int m = 0; m < MMAS_K; ++m) {
          unsigned a[4];
          ldmatrix_x4(a, filters + (r * 3 + s) * TAP_BYTES + m * 16 * ROW_BYTES);
          #pragma unroll
          for (int i = 0; i < WARP_H; ++i) {
            #pragma unroll
            for (int g = 0; g < PAIRS_W; ++g) {
              const unsigned(&four)[4] = b[(r + i) % WARP_H][g];
              mma_m16n8k16(sum[m][i][2 * g], a, four[0], four[1]);
              mma_m16n8k16(sum[m][i][2 * g + 1], a, four[2], four[3]);
            }
          }
        }
      }
    }
    const bool more = next.strip < p.strips, whole = now.chunk + 1 == chunks;
    if (more) convert(next, turn ^ 1);
    // read before the barrier: after it, the tile after next may fail
    const bool redo = whole && (h.failed[now.number & 1] == now.number || h.failed[2]);
    __syncthreads();  // the next chunk is there, this one has been read
    const Place done = now;
    now = next;
    if (more) {
      advance(next);
      if (next.strip < p.strips) load(next);
    }
    if (whole) {
      if (redo) {
        tile_in_fp32(h, x, w, bias, y, c, f, done, starts_strip(done, p));
      } else {
        store(sum, h, y, bias, c, f, done, starts_strip(done, p), ends_strip(done, p),
              input_exponent);
      }
      clear(sum);
    }
    if (!more) break;
  }
}

// Any convolution. The pixels under a tile and some of the taps' weights are in shared memory at a
// time; or, where those pixels do not fit, the pixels that one tap meets.
template <bool WIDE>
__global__ void __launch_bounds__(THREADS, 1)
    conv2d_tensor_core_any(const float* __restrict__ x, const float* __restrict__ w,
                           const float* __restrict__ bias, float* __restrict__ y, const Conv c,
                           const Plan p) {
  extern __shared__ __align__(128) char shared[];
  Header& h = *reinterpret_cast<Header*>(shared);
  fill_header(h, c, p);
  const Filters& f = h.filters;
  char* const weights = shared + HEADER_BYTES;
  char* const input = weights + p.taps_at_once * TAP_BYTES;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int my_k = warp % WARPS_K * WARP_K, my_row = warp / WARPS_K * WARP_H;
  const int taps = c.R * c.S, units = 2 * p.rows * p.units_w, pitch = 4 * p.units_w;

  const int input_exponent =
      sampled_scale<WARPS>(x, (long long)c.N * c.C * c.H * c.W, h.samples);
  const float scale = power_of_two(input_exponent);
  const HalfRange range(input_exponent);
  filter_exponents(h.exponent, w, c, f);

  const int lead = WIDE ? (4 - c.pad_w % 4) % 4 : 0;
  const int filter_at =
      (my_k + filter_row(lane)) * ROW_BYTES + piece(filter_row(lane), filter_half(lane));
  const int stride_h = p.one_tap ? 1 : c.stride_h, stride_w = p.one_tap ? 1 : c.stride_w;
  const int step_h = p.one_tap ? c.stride_h : 1, step_w = p.one_tap ? c.stride_w : 1;

  Place at;
  at.number = 1, at.chunk = 0, at.strip = blockIdx.x / (p.blocks_k * c.groups);
  enter_strip(at, p);
  for (; at.strip < p.strips; next_tile(at, p)) {
    Sums sum;
    clear(sum);
    for (int c0 = 0; c0 < f.channels; c0 += CHUNK_C) {
      for (int tap0 = 0; tap0 < taps; tap0 += p.taps_at_once) {
        const int count = min(p.taps_at_once, taps - tap0);
        __syncthreads();  // what is there has been read
        bool holds = true;
        if (tap0 == 0 || p.one_tap) {
          int ih0 = at.oh0 * c.stride_h - c.pad_h;
          int iw0 = at.column * TILE_W * c.stride_w - c.pad_w - lead;
          if (p.one_tap) ih0 += tap0 / c.S * c.dil_h, iw0 += tap0 % c.S * c.dil_w;
          for (int first = 0; first < units; first += THREADS) {
            const int u = first + threadIdx.x, line = u / p.units_w, column = u % p.units_w;
            const int row = line % p.rows, half = line / p.rows;
            float unit[8][4];
            load_unit<WIDE>(unit, x, c, f, at.n, c0 + half * 8, ih0 + row * step_h,
                            iw0 + 4 * column * step_w, step_w, u < units);
            holds &= convert_unit(input + row * pitch * ROW_BYTES, unit, column, half, u < units,
                                  scale, range);
          }
        }
        holds &= convert_weights(weights, h.scratch[warp], h.exponent, w, c, f, c0, tap0, count);
        if (!holds) atomicMax(&h.failed[at.number & 1], at.number);
        __syncthreads();  // pixels and weights are there
        for (int tap = 0; tap < count; ++tap) {
          const int row0 = p.one_tap ? 0 : (tap0 + tap) / c.S * c.dil_h;
          const int column0 = p.one_tap ? 0 : (tap0 + tap) % c.S * c.dil_w + lead;
          unsigned a[MMAS_K][4];
          #pragma unroll
          for (int m = 0; m < MMAS_K; ++m) {
            ldmatrix_x4(a[m], weights + tap * TAP_BYTES + m * 16 * ROW_BYTES + filter_at);
          }
          #pragma unroll
          for (int i = 0; i < WARP_H; ++i) {
            const int row = (my_row + i) * stride_h + row0;
            #pragma unroll
            for (int g = 0; g < PAIRS_W; ++g) {
              const int column = (g * 16 + pixel_row(lane)) * stride_w + column0;
              unsigned b[4];
              ldmatrix_x4(b, input + (row * pitch + column) * ROW_BYTES +
                                 piece(column, pixel_half(lane)));
              #pragma unroll
              for (int m = 0; m < MMAS_K; ++m) {
                mma_m16n8k16(sum[m][i][2 * g], a[m], b[0], b[1]);
                mma_m16n8k16(sum[m][i][2 * g + 1], a[m], b[2], b[3]);
              }
            }
          }
        }
      }
    }
    if (h.failed[at.number & 1] == at.number) {
      tile_in_fp32(h, x, w, bias, y, c, f, at, starts_strip(at, p));
    } else {
      store(sum, h, y, bias, c, f, at, starts_strip(at, p), ends_strip(at, p), input_exponent);
    }
  }
}

typedef void (*Kernel)(const float*, const float*, const float*, float*, Conv, Plan);

static int launch(Kernel kernel, int blocks, long long bytes, const float* x, const float* w,
                  const float* bias, float* y, const Conv& c, const Plan& p, cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
  if (error != cudaSuccess) return (int)error;
  kernel<<<blocks, THREADS, bytes, stream>>>(x, w, bias, y, c, p);
  return (int)cudaGetLastError();
}

extern "C" int asymconv_launch(const float* x, const float* w, const float* bias, float* y,
                               const Conv* conv, void* stream) {
  const Conv& c = *conv;
  int device = 0, processors = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return (int)error;
  error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return (int)error;
  error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return (int)error;

  Plan p = {};
  p.tiles_h = (c.OH + TILE_H - 1) / TILE_H;
  p.tiles_w = (c.OW + TILE_W - 1) / TILE_W;
  p.blocks_k = (c.K / c.groups + BLOCK_K - 1) / BLOCK_K;
  const int of_k = p.blocks_k * c.groups;
  const int most = of_k < processors ? processors / of_k : 1;  // blocks that share a strip's tiles
  // The longest strip that costs at most 5 % more turns than the best.
  auto turns = [&](int strip) {
    const long long strips = (long long)c.N * p.tiles_h * ((p.tiles_w + strip - 1) / strip);
    return (strips + most - 1) / most * strip;
  };
  const int longest = STRIP < p.tiles_w ? STRIP : p.tiles_w;
  long long best = turns(1);
  for (int strip = 2; strip <= longest; ++strip) best = turns(strip) < best ? turns(strip) : best;
  p.strip = longest;
  while (p.strip > 1 && turns(p.strip) * 20 > best * 21) --p.strip;
  p.strips_w = (p.tiles_w + p.strip - 1) / p.strip;
  p.strips = c.N * p.tiles_h * p.strips_w;
  p.walkers = p.strips < most ? p.strips : most;
  const int blocks = p.walkers * of_k;

  bool wide = c.W % 4 == 0 && (size_t)x % 16 == 0;
  const cudaStream_t queue = (cudaStream_t)stream;
  const int chunks = (c.C / c.groups + CHUNK_C - 1) / CHUNK_C;
  if (c.R == 3 && c.S == 3 && c.stride_h == 1 && c.stride_w == 1 && c.dil_h == 1 && c.dil_w == 1) {
    const long long bytes = HEADER_BYTES + 2 * INPUT_BYTES;
    if (bytes + (long long)chunks * WEIGHT_BYTES <= limit) {
      return launch(wide ? conv2d_tensor_core_3x3<true, true> : conv2d_tensor_core_3x3<false, true>,
                    blocks, bytes + (long long)chunks * WEIGHT_BYTES, x, w, bias, y, c, p, queue);
    }
    if (bytes + 2 * WEIGHT_BYTES <= limit) {
      return launch(
          wide ? conv2d_tensor_core_3x3<true, false> : conv2d_tensor_core_3x3<false, false>, blocks,
          bytes + 2 * WEIGHT_BYTES, x, w, bias, y, c, p, queue);
    }
  }
  const int taps = c.R * c.S;
  const long long rows = (TILE_H - 1LL) * c.stride_h + (c.R - 1LL) * c.dil_h + 1;
  const long long columns = (TILE_W - 1LL) * c.stride_w + (c.S - 1LL) * c.dil_w + 1 + 3;
  const long long room = (limit - HEADER_BYTES - TAP_BYTES) / (4 * ROW_BYTES);  // units of a half
  const long long units_w = (columns + 3) / 4;
  p.one_tap = rows > room || units_w > room || rows * units_w > room ||
              (taps == 1 && (c.stride_h > 1 || c.stride_w > 1));
  p.rows = p.one_tap ? TILE_H : (int)rows;
  p.units_w = p.one_tap ? TILE_W / 4 : (int)units_w;
  const int bytes = HEADER_BYTES + p.rows * p.units_w * 4 * ROW_BYTES;
  p.taps_at_once = (limit - bytes) / TAP_BYTES;
  if (p.taps_at_once > MOST_TAPS) p.taps_at_once = MOST_TAPS;
  if (p.taps_at_once > taps) p.taps_at_once = taps;
  if (p.one_tap) p.taps_at_once = 1;
  wide = wide && !p.one_tap;
  return launch(wide ? conv2d_tensor_core_any<true> : conv2d_tensor_core_any<false>, blocks,
                bytes + p.taps_at_once * TAP_BYTES, x, w, bias, y, c, p, queue);
}
"""
)


def refusal(shape: ConvShape, defines: Mapping[str, int]) -> str | None:
    """Only more tiles than an int counts."""
    tile_h = defines["WARP_H"] * defines["WARPS_H"]
    tiles = -(-shape.out_height // tile_h) * -(-shape.out_width // defines["TILE_W"])
    if shape.batch * tiles >= 2**30:
        return f"{shape.batch * tiles} tiles, it counts them in 30 bits ({shape})"
    return None


RUNG = Rung(
    name="k06_tensor_core",
    idea="implicit GEMM on tensor cores, the halo reused in shared memory",
    notebook="05_tensor_cores",
    source=SOURCE,
    refusal=refusal,
    precision="tf32",
    capability=(8, 0),
    defines=DEFINES,
    variants=VARIANTS,
)
