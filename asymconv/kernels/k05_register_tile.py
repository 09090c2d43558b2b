"""k05: a tile of outputs in the registers of each thread, copies that overlap arithmetic.

What the last rung was limited by: five shared-memory requests for every sixteen products.

What it changes: a thread computes THREAD_K channels of THREAD_H x 4 pixels, by default 8 * 2 * 4 =
64 outputs, all in registers. For each input channel it reads (2 + 2) rows of 4 + 2 values as
float4, once, and the taps' weights as float4, the same for all lanes: the 3x3 taps slide over
registers. Two stages of shared memory: cp.async fills the next CHUNK_C channels while this one is
being used, so that no thread waits for L2.

What it predicts, on the contract's shape:

- For each channel a thread does 9 * 64 = 576 products on 8 + 18 reads: 4.5 % as many loads as
  products; k04 had 31 %. A warp's 8 input reads take up to 4 wavefronts each (512 bytes), its 18
  weight reads 1 or 2: 50 to 68 for 576 FMAs, and the four schedulers of an SM share a wavefront a
  cycle: 200 to 272 cycles of shared memory in 576 of arithmetic. No limit any more.
- float4 reads of neighbouring lanes are neighbouring: no bank conflicts.
- Registers: 64 sums, 4 * 8 inputs, 8 weights, and addresses: about 120. A block of 512 threads has
  the SM for itself: 16 warps, an occupancy of 1/4, which is enough, since 576 FMAs in a row hide
  the few loads between them.
- Bytes: a tile of 4 rows reads 6, for each of two halves of the channels: 3 * 1.07 GB from L2, a
  millisecond beside 12.
- Time: 9.6 billion warp-FMAs, one a cycle on each of 4 * 132 schedulers at 1980 MHz, are 9.2 ms;
  with 8 % of other instructions 10. cuBLAS' fp32 matrix product reaches 51 of the 67 TFLOP/s; at
  its rate 12 ms.

Measured: notebook 04, from figures/data: faster than cuDNN in strict fp32, slower than predicted.
Copying with an index for each element had cost 7 % more than copying by rows: at this rung, index
arithmetic is what is left to save.

What limits it now: the fp32 units, 71 % busy, and what stands around the loop that feeds them: the
copies of a stage and its two barriers. Far faster means other arithmetic: tensor cores.
"""

from asymconv.kernels.ptx import CP_ASYNC
from asymconv.kernels.rung import Rung, launch_limits
from asymconv.problem import ConvShape

DEFINES = {
    "BLOCK_K": 64,
    "THREAD_K": 8,
    "THREAD_H": 2,
    "WARPS_H": 2,
    "CHUNK_C": 8,
    "MIN_BLOCKS": 1,
}

_NAMES = ("BLOCK_K", "THREAD_K", "THREAD_H", "WARPS_H", "CHUNK_C", "MIN_BLOCKS")
VARIANTS = tuple(
    dict(zip(_NAMES, values, strict=True))
    for values in (
        *((64, 8, 2, 2, 8, 1), (64, 8, 2, 2, 4, 1), (64, 8, 2, 2, 16, 1), (64, 8, 2, 1, 8, 2)),
        *((64, 8, 3, 1, 8, 1), (64, 8, 4, 1, 8, 1), (64, 8, 4, 1, 16, 1), (64, 8, 5, 1, 8, 1)),
        *((64, 8, 1, 2, 8, 2), (64, 4, 2, 1, 8, 1), (128, 8, 2, 1, 8, 1), (64, 16, 2, 2, 8, 1)),
    )
)
"""Register tiles, blocks and chunks that are compared."""

SOURCE = (
    CP_ASYNC
    + r"""
// A warp: THREAD_K channels, THREAD_H rows, 32 * 4 columns. A block: BLOCK_K / THREAD_K by WARPS_H
// warps.
constexpr int R = 3, S = 3, THREAD_W = 4;
constexpr int TILE_W = 32 * THREAD_W, TILE_H = THREAD_H * WARPS_H;
constexpr int WARPS_K = BLOCK_K / THREAD_K, THREADS = 32 * WARPS_K * WARPS_H;
static_assert(BLOCK_K % THREAD_K == 0 && THREAD_K % 4 == 0, "weights are read as float4");
static_assert(THREADS <= 1024, "a block has at most 1024 threads");

// Shared memory, in floats. Rows start on 16 bytes; the weights' pitch is off by 4 words, so that
// writing them tap by tap meets 8 banks and not one.
constexpr int ROWS = TILE_H + R - 1, PITCH = TILE_W + 8;
constexpr int PITCH_K = BLOCK_K + 4;
constexpr int INPUT = CHUNK_C * ROWS * PITCH, WEIGHTS = CHUNK_C * R * S * PITCH_K;
constexpr int STAGE = INPUT + WEIGHTS;
constexpr int SHARED_BYTES = 2 * STAGE * sizeof(float);
static_assert(SHARED_BYTES <= 227 * 1024, "more shared memory than a block can have");

// What a block computes: channels k0.. of a group, the tile at (oh0, ow0) of image n.
struct Place {
  int group, k0, oh0, ow0, n;
};

// Starts the copies of CHUNK_C channels from c0 on into one stage. What lies outside the image,
// the group's channels or filters becomes zero. A warp copies a row, so that all but the column is
// the same for its lanes: index arithmetic here would cost as much as the products it feeds.
template <bool WIDE>  // rows of the input start on 16 bytes: copy four columns at a time
__device__ __forceinline__ void copy_stage(float* stage, const float* __restrict__ x,
                                           const float* __restrict__ w, const Conv& c,
                                           const Place& at, int c0) {
  const int channels = c.C / c.groups, filters = c.K / c.groups;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr int STEP = WIDE ? 4 : 1;
  for (int i = warp; i < CHUNK_C * ROWS; i += THREADS / 32) {
    const int ci = c0 + i / ROWS, ih = at.oh0 - c.pad_h + i % ROWS;
    const long long plane = (long long)at.n * c.C + at.group * channels + ci;
    const bool row_inside = ci < channels && ih >= 0 && ih < c.H;
    const float* const row = x + (plane * c.H + ih) * c.W;
    for (int column = lane * STEP; column < TILE_W + S - 1; column += 32 * STEP) {
      const int iw = at.ow0 - c.pad_w + column;
      const bool inside = row_inside && iw >= 0 && iw < c.W;
      const float* const from = inside ? row + iw : x;
      if (WIDE) {
        cp_async_16(stage + i * PITCH + column, from, inside ? 4 * min(4, c.W - iw) : 0);
      } else {
        cp_async_4(stage + i * PITCH + column, from, inside ? 4 : 0);
      }
    }
  }
  // w is (filter, channel, tap), tap fastest; shared memory wants the filter fastest
  for (int i = threadIdx.x; i < BLOCK_K * CHUNK_C; i += THREADS) {
    const int ci = i % CHUNK_C, k = i / CHUNK_C;
    const bool inside = c0 + ci < channels && at.k0 + k < filters;
    const long long filter = (long long)at.group * filters + at.k0 + k;
    const float* const from = inside ? w + (filter * channels + c0 + ci) * R * S : w;
    float* const to = stage + INPUT + ci * R * S * PITCH_K + k;
    #pragma unroll
    for (int tap = 0; tap < R * S; ++tap) {
      cp_async_4(to + tap * PITCH_K, from + (inside ? tap : 0), inside ? 4 : 0);
    }
  }
}

template <bool WIDE>
__global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    conv2d_register_tile(const float* __restrict__ x, const float* __restrict__ w,
                         const float* __restrict__ bias, float* __restrict__ y, const Conv c) {
  extern __shared__ __align__(16) float shared[];
  const int channels = c.C / c.groups, filters = c.K / c.groups;
  const int blocks_k = (filters + BLOCK_K - 1) / BLOCK_K;
  const int tiles_w = (c.OW + TILE_W - 1) / TILE_W;
  // the channel block is the fastest index: the blocks that share a tile of the input run together
  const int tile = blockIdx.x / (blocks_k * c.groups), of_k = blockIdx.x % (blocks_k * c.groups);
  const Place at = {of_k / blocks_k, of_k % blocks_k * BLOCK_K, tile / tiles_w * TILE_H,
                    tile % tiles_w * TILE_W, (int)blockIdx.y};
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int my_k = warp % WARPS_K * THREAD_K, my_row = warp / WARPS_K * THREAD_H;

  float sum[THREAD_K][THREAD_H][THREAD_W] = {};
  copy_stage<WIDE>(shared, x, w, c, at, 0);
  cp_async_commit();
  for (int c0 = 0, turn = 0; c0 < channels; c0 += CHUNK_C, turn ^= 1) {
    if (c0 + CHUNK_C < channels) {
      copy_stage<WIDE>(shared + (turn ^ 1) * STAGE, x, w, c, at, c0 + CHUNK_C);
    }
    cp_async_commit();
    cp_async_wait<1>();  // this turn's stage is here, for this thread
    __syncthreads();     // and for all

    const float* const input = shared + turn * STAGE + my_row * PITCH + lane * THREAD_W;
    const float* const weights = shared + turn * STAGE + INPUT + my_k;
    #pragma unroll 1
    for (int ci = 0; ci < CHUNK_C; ++ci) {
      float value[THREAD_H + R - 1][2 * THREAD_W];  // 4 + 2 are used
      #pragma unroll
      for (int h = 0; h < THREAD_H + R - 1; ++h) {
        const float4* const from =
            reinterpret_cast<const float4*>(input + (ci * ROWS + h) * PITCH);
        *reinterpret_cast<float4*>(&value[h][0]) = from[0];
        *reinterpret_cast<float4*>(&value[h][4]) = from[1];
      }
      #pragma unroll
      for (int tap = 0; tap < R * S; ++tap) {
        float weight[THREAD_K];
        #pragma unroll
        for (int k = 0; k < THREAD_K; k += 4) {
          *reinterpret_cast<float4*>(&weight[k]) =
              *reinterpret_cast<const float4*>(weights + (ci * R * S + tap) * PITCH_K + k);
        }
        #pragma unroll
        for (int k = 0; k < THREAD_K; ++k) {
          #pragma unroll
          for (int h = 0; h < THREAD_H; ++h) {
            #pragma unroll
            for (int p = 0; p < THREAD_W; ++p) {
              sum[k][h][p] = fmaf(value[h + tap / S][p + tap % S], weight[k], sum[k][h][p]);
            }
          }
        }
      }
    }
    __syncthreads();  // all have read the stage: the turn after next may fill it
  }

  const int ow = at.ow0 + lane * THREAD_W;
  const bool pairs = c.OW % 2 == 0 && ow + THREAD_W <= c.OW;  // rows start on 8 bytes
  #pragma unroll
  for (int k = 0; k < THREAD_K; ++k) {
    if (at.k0 + my_k + k >= filters) break;
    const long long channel = (long long)at.group * filters + at.k0 + my_k + k;
    const float offset = bias ? bias[channel] : 0.0f;
    #pragma unroll
    for (int h = 0; h < THREAD_H; ++h) {
      const int oh = at.oh0 + my_row + h;
      if (oh >= c.OH) break;
      float* const out = y + (((long long)at.n * c.K + channel) * c.OH + oh) * c.OW + ow;
      if (pairs) {
        const float* const v = sum[k][h];
        reinterpret_cast<float2*>(out)[0] = make_float2(v[0] + offset, v[1] + offset);
        reinterpret_cast<float2*>(out)[1] = make_float2(v[2] + offset, v[3] + offset);
      } else {
        #pragma unroll
        for (int p = 0; p < THREAD_W; ++p) {
          if (ow + p < c.OW) out[p] = sum[k][h][p] + offset;
        }
      }
    }
  }
}

template <bool WIDE>
static int launch(const float* x, const float* w, const float* bias, float* y, const Conv& c,
                  cudaStream_t stream) {
  const int tiles_h = (c.OH + TILE_H - 1) / TILE_H, tiles_w = (c.OW + TILE_W - 1) / TILE_W;
  const int blocks_k = (c.K / c.groups + BLOCK_K - 1) / BLOCK_K * c.groups;
  const dim3 grid(tiles_h * tiles_w * blocks_k, c.N);
  const cudaError_t error = cudaFuncSetAttribute(
      conv2d_register_tile<WIDE>, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
  if (error != cudaSuccess) return (int)error;
  conv2d_register_tile<WIDE><<<grid, THREADS, SHARED_BYTES, stream>>>(x, w, bias, y, c);
  return (int)cudaGetLastError();
}

extern "C" int asymconv_launch(const float* x, const float* w, const float* bias, float* y,
                               const Conv* c, void* stream) {
  const bool wide = c->W % 4 == 0 && c->pad_w % 4 == 0 && (unsigned long long)x % 16 == 0;
  return wide ? launch<true>(x, w, bias, y, *c, (cudaStream_t)stream)
              : launch<false>(x, w, bias, y, *c, (cudaStream_t)stream);
}
"""
)


def refuses(shape: ConvShape) -> str | None:
    """3x3 kernels of stride and dilation 1; any padding, groups, sizes and bias."""
    if shape.kernel != (3, 3) or shape.stride != (1, 1) or shape.dilation != (1, 1):
        return f"its register tile is made for 3×3, stride 1, dilation 1 ({shape})"
    tile_h = DEFINES["THREAD_H"] * DEFINES["WARPS_H"]
    tiles = -(-shape.out_height // tile_h) * -(-shape.out_width // 128)
    blocks_k = -(-shape.out_channels // shape.groups // DEFINES["BLOCK_K"]) * shape.groups
    return launch_limits(
        shape, block=512, grid=(tiles * blocks_k, shape.batch, 1), what="a block a tile"
    )


RUNG = Rung(
    name="k05_register_tile",
    idea="64 outputs in a thread's registers, copies that overlap arithmetic",
    notebook="04_registers",
    source=SOURCE,
    refuses=refuses,
    capability=(8, 0),
    defines=DEFINES,
    variants=VARIANTS,
)
