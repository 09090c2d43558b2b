"""k05: a tile of outputs in the registers of each thread, fed by copies that overlap arithmetic.

What the last rung was limited by: five shared-memory requests for every sixteen products.

What it changes:

- A thread computes THREAD_K channels of THREAD_H x 4 pixels, by default 8 * 5 * 4 = 160 outputs,
  all in registers. For each input channel it reads (5 + 2) rows of 4 + 2 values as float4, once,
  and the taps' weights as float4, the same for all lanes: the 3x3 taps slide over registers.
- A block stays on its SM and takes tile after tile of one block of filters. Its weights, for 64
  channels 9 * 64 * 64 floats or 147,456 bytes, stay in shared memory; where they do not fit, they
  come with the input, CHUNK_C channels at a time.
- cp.async fills one stage of CHUNK_C channels while another is used, and runs ahead into the next
  tile. One barrier a stage: what the barrier of stage i frees is filled with stage i + STAGES - 1.
- A warp copies rows of one channel, so that lanes differ by the column alone; zeros outside the
  image come from a predicate (ignore-src), so no address is selected and no size computed.

What it predicts, on the contract's shape:

- For each channel a thread does 9 * 160 = 1440 products on 14 + 18 reads: 2.2 % as many loads as
  products; k04 had 31 %. A warp's 14 input reads take up to 4 wavefronts each (512 bytes), its 18
  weight reads 2: 92 for 1440 FMAs, and the four schedulers of an SM share a wavefront a cycle: 368
  cycles of shared memory in 1440 of arithmetic. No limit any more.
- float4 reads of neighbouring lanes are neighbouring: no bank conflicts.
- Registers: 160 sums, 7 * 6 inputs, 8 weights, and addresses: nearly all of the 255 there are. A
  block of 256 threads has the SM for itself: 8 warps, two a scheduler. That is enough, since 1440
  FMAs in a row hide the few loads between them.
- Bytes: a tile of 5 rows reads 7, for each of two halves of the filters: 2.8 * 1.07 GB from L2.
- Time: 9.6 billion warp-FMAs, one a cycle on each of 4 * 132 schedulers at 1980 MHz, are 9.2 ms;
  2.2 % of loads and about as much for copies and loop make 9.6. cuBLAS' fp32 matrix product
  reaches 51 of the 67 TFLOP/s; at its rate 12 ms. We expect 11 to 12.5 ms.

Measured: notebook 04, from figures/data. The step from 64 outputs a thread, weights that came anew
with every tile, and two barriers a stage (the first version of this rung) to this was 13.5 to 11.5
ms in one run.

What limits it now: the fp32 units themselves. Far faster means other arithmetic: tensor cores.
"""

from collections.abc import Mapping

from asymconv.kernels.ptx import CP_ASYNC
from asymconv.kernels.rung import Rung, launch_limits
from asymconv.problem import ConvShape

DEFINES = {
    "BLOCK_K": 64,
    "THREAD_K": 8,
    "THREAD_H": 5,
    "WARPS_H": 1,
    "CHUNK_C": 8,
    "STAGES": 2,
    "MIN_BLOCKS": 1,
}

_NAMES = ("BLOCK_K", "THREAD_K", "THREAD_H", "WARPS_H", "CHUNK_C", "STAGES", "MIN_BLOCKS")
VARIANTS = tuple(
    dict(zip(_NAMES, values, strict=True))
    for values in (
        # one block an SM, its weights resident
        *((64, 8, 2, 2, 8, 2, 1), (64, 8, 2, 2, 4, 2, 1), (64, 8, 2, 2, 4, 3, 1)),
        *((64, 8, 2, 2, 8, 3, 1), (64, 8, 4, 1, 8, 2, 1), (64, 8, 5, 1, 8, 2, 1)),
        *((64, 8, 4, 1, 4, 3, 1), (64, 16, 2, 2, 8, 2, 1), (64, 8, 3, 1, 8, 2, 1)),
        # two: while one meets at a barrier or stores, the other multiplies
        *((32, 8, 2, 2, 4, 2, 2), (32, 8, 2, 2, 4, 3, 2), (32, 8, 4, 1, 4, 2, 2)),
        *((64, 8, 2, 1, 4, 2, 2), (32, 8, 2, 2, 8, 2, 2)),
    )
)

SOURCE = (
    CP_ASYNC
    + r"""
// A warp: THREAD_K channels, THREAD_H rows, 32 * 4 columns. A block: BLOCK_K / THREAD_K by WARPS_H
// warps.
constexpr int R = 3, S = 3, THREAD_W = 4;
constexpr int TILE_W = 32 * THREAD_W, TILE_H = THREAD_H * WARPS_H;
constexpr int WARPS_K = BLOCK_K / THREAD_K, WARPS = WARPS_K * WARPS_H, THREADS = 32 * WARPS;
static_assert(BLOCK_K % THREAD_K == 0 && THREAD_K % 4 == 0, "weights are read as float4");
static_assert(THREADS <= 1024, "a block has at most 1024 threads");
static_assert(STAGES >= 2, "one stage is filled while another is used");

// Shared memory, in floats: STAGES of input, rows starting on 16 bytes, then the weights.
constexpr int ROWS = TILE_H + R - 1, PITCH = TILE_W + 8;
constexpr int INPUT = CHUNK_C * ROWS * PITCH;
static_assert(ROWS * (S - 1) <= 32, "a warp copies the columns right of a tile at once");

// Filters of a tap. Weights that come again and again get a pitch that is off by 4 words, so that
// writing them tap by tap meets 8 banks and not one.
template <bool RESIDENT>
constexpr int PITCH_K = RESIDENT ? BLOCK_K : BLOCK_K + 4;

constexpr int SHARED_LIMIT = 227 * 1024;  // bytes of a block; an SM has 228 KB and keeps 1 a block
constexpr int SHARED_SHARE = (228 / MIN_BLOCKS - 1) * 1024;
constexpr int STREAMING_BYTES = STAGES * (INPUT + CHUNK_C * R * S * PITCH_K<false>) * 4;
static_assert(STREAMING_BYTES <= SHARED_LIMIT, "more shared memory than a block can have");

// Where a tile lies. Outputs of the tile start at (oh0, ow0) of image n.
struct Tile {
  int n, oh0, ow0;
};
__device__ __forceinline__ Tile tile_at(int index, const Conv& c) {
  const int tiles_w = (c.OW + TILE_W - 1) / TILE_W, tiles_h = (c.OH + TILE_H - 1) / TILE_H;
  const int row = index / tiles_w;
  return {row / tiles_h, row % tiles_h * TILE_H, index % tiles_w * TILE_W};
}

// Starts the copies of CHUNK_C planes of one image, under one tile. What lies outside the image or
// beyond the planes that are there becomes zero. A warp copies rows of one plane, so that lanes
// differ by the column alone: index arithmetic costs issue slots that products need.
template <bool WIDE>  // rows of the input start on 16 bytes: copy four columns at a time
__device__ __forceinline__ void copy_input(float* stage, const float* planes, int planes_there,
                                           const Conv& c, const Tile& at) {
  constexpr int STEP = WIDE ? 4 : 1, HALO = WIDE ? 1 : S - 1;  // HALO: pieces right of the tile
  constexpr int PARTS = WARPS > CHUNK_C ? WARPS / CHUNK_C : 1;  // warps that share a plane
  const int lane = threadIdx.x % 32, part = threadIdx.x / 32 % PARTS;
  const int ih0 = at.oh0 - c.pad_h, iw0 = at.ow0 - c.pad_w;
  const auto copy = [&](int ci, int row, int column) {
    const int ih = ih0 + row, iw = iw0 + column;
    const bool inside = ci < planes_there && (unsigned)ih < (unsigned)c.H &&
                        (unsigned)iw < (unsigned)c.W;
    // unsigned: outside the plane this may overflow, and is not read
    const float* from = planes + (long long)ci * c.H * c.W + (int)((unsigned)ih * c.W + iw);
    float* to = stage + (ci * ROWS + row) * PITCH + column;
    WIDE ? cp_async_16_if(inside, to, from) : cp_async_4_if(inside, to, from);
  };
  for (int ci = threadIdx.x / 32 / PARTS; ci < CHUNK_C; ci += WARPS / PARTS) {
    #pragma unroll
    for (int r = 0; r < ROWS; r += PARTS) {
      if (ROWS % PARTS && r + part >= ROWS) break;
      #pragma unroll
      for (int piece = 0; piece < TILE_W; piece += 32 * STEP) {
        copy(ci, r + part, piece + lane * STEP);
      }
    }
    if (part == PARTS - 1 && lane < ROWS * HALO) {
      copy(ci, lane / HALO, TILE_W + lane % HALO * STEP);
    }
  }
}

// Starts the copies of the weights of `count` channels, BLOCK_K filters. w is (filter, channel,
// tap), tap fastest; shared memory wants the filter fastest. Zero beyond channels and filters.
template <int PITCH>
__device__ __forceinline__ void copy_weights(float* weights, const float* w, int channels, int c0,
                                             int count, int filters_there) {
  for (int i = threadIdx.x; i < BLOCK_K * count; i += THREADS) {
    const int ci = i % count, k = i / count;
    const bool inside = c0 + ci < channels && k < filters_there;
    const float* const from = w + ((long long)k * channels + c0 + ci) * (R * S);
    float* const to = weights + ci * (R * S) * PITCH + k;
    #pragma unroll
    for (int tap = 0; tap < R * S; ++tap) cp_async_4_if(inside, to + tap * PITCH, from + tap);
  }
}

template <bool WIDE, bool RESIDENT>  // RESIDENT: all channels' weights stay in shared memory
__global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    conv2d_register_tile(const float* __restrict__ x, const float* __restrict__ w,
                         const float* __restrict__ bias, float* __restrict__ y, const Conv c,
                         const int tiles) {
  extern __shared__ __align__(16) float shared[];
  constexpr int PITCH_W = PITCH_K<RESIDENT>, WEIGHTS = CHUNK_C * R * S * PITCH_W;  // of a chunk
  float* const all_weights = shared + STAGES * INPUT;

  // A block keeps its filters. The index of the filters is the fastest: blocks that share a tile
  // of the input run together.
  const int channels = c.C / c.groups, filters = c.K / c.groups;
  const int blocks_k = (filters + BLOCK_K - 1) / BLOCK_K, all_k = blocks_k * c.groups;
  const int group = blockIdx.x % all_k / blocks_k, k0 = blockIdx.x % all_k % blocks_k * BLOCK_K;
  const int first_tile = blockIdx.x / all_k, tile_step = gridDim.x / all_k;
  const float* const my_w = w + ((long long)group * filters + k0) * channels * (R * S);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int my_k = warp % WARPS_K * THREAD_K, my_row = warp / WARPS_K * THREAD_H;

  // What is copied next: it runs STAGES - 1 chunks ahead of what is used, into the next tile too.
  int next_tile = first_tile, next_c0 = 0, next_stage = 0;
  Tile next = tile_at(next_tile, c);
  const auto copy_next = [&] {
    if (next_tile < tiles) {
      const long long plane = (long long)next.n * c.C + (long long)group * channels + next_c0;
      copy_input<WIDE>(shared + next_stage * INPUT, x + plane * c.H * c.W, channels - next_c0, c,
                       next);
      if (!RESIDENT) {
        copy_weights<PITCH_W>(all_weights + next_stage * WEIGHTS, my_w, channels, next_c0, CHUNK_C,
                              filters - k0);
      }
      next_stage = next_stage + 1 == STAGES ? 0 : next_stage + 1;
      next_c0 += CHUNK_C;
      if (next_c0 >= channels) {
        next_c0 = 0;
        next_tile += tile_step;
        next = tile_at(next_tile, c);
      }
    }
    cp_async_commit();  // also when there is nothing left: waiting counts groups
  };
  if (RESIDENT) {
    const int padded = (channels + CHUNK_C - 1) / CHUNK_C * CHUNK_C;
    copy_weights<PITCH_W>(all_weights, my_w, channels, 0, padded, filters - k0);
  }
  #pragma unroll 1
  for (int i = 0; i < STAGES - 1; ++i) copy_next();

  int stage = 0;
  #pragma unroll 1
  for (int tile = first_tile; tile < tiles; tile += tile_step) {
    float sum[THREAD_K][THREAD_H][THREAD_W] = {};
    #pragma unroll 1
    for (int c0 = 0; c0 < channels; c0 += CHUNK_C) {
      cp_async_wait<STAGES - 2>();  // this stage is here, for this thread
      __syncthreads();              // and for all; and all are done with the stage before it,
      copy_next();                  // which is filled anew

      const float* input = shared + stage * INPUT + my_row * PITCH + lane * THREAD_W;
      const float* weights = all_weights + my_k + (RESIDENT ? c0 / CHUNK_C : stage) * WEIGHTS;
      stage = stage + 1 == STAGES ? 0 : stage + 1;
      #pragma unroll 1
      for (int ci = 0; ci < CHUNK_C; ++ci, input += ROWS * PITCH, weights += R * S * PITCH_W) {
        float value[THREAD_H + R - 1][2 * THREAD_W];  // 4 + 2 are used
        #pragma unroll
        for (int h = 0; h < THREAD_H + R - 1; ++h) {
          const float4* const from = reinterpret_cast<const float4*>(input + h * PITCH);
          *reinterpret_cast<float4*>(&value[h][0]) = from[0];
          *reinterpret_cast<float4*>(&value[h][4]) = from[1];
        }
        #pragma unroll
        for (int tap = 0; tap < R * S; ++tap) {
          float weight[THREAD_K];
          #pragma unroll
          for (int k = 0; k < THREAD_K; k += 4) {
            *reinterpret_cast<float4*>(&weight[k]) =
                *reinterpret_cast<const float4*>(weights + tap * PITCH_W + k);
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
    }

    const Tile at = tile_at(tile, c);
    const int ow = at.ow0 + lane * THREAD_W;
    // rows of even length start on 8 bytes if y does
    const bool pairs = c.OW % 2 == 0 && ow + THREAD_W <= c.OW && (unsigned long long)y % 8 == 0;
    #pragma unroll
    for (int k = 0; k < THREAD_K; ++k) {
      if (k0 + my_k + k >= filters) break;
      const long long channel = (long long)group * filters + k0 + my_k + k;
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
}

template <bool WIDE, bool RESIDENT>
static int launch(const float* x, const float* w, const float* bias, float* y, const Conv& c,
                  int shared_bytes, cudaStream_t stream) {
  int device, multiprocessors;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(conv2d_register_tile<WIDE, RESIDENT>,
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  }
  if (error != cudaSuccess) return (int)error;
  const int tiles_h = (c.OH + TILE_H - 1) / TILE_H, tiles_w = (c.OW + TILE_W - 1) / TILE_W;
  const int tiles = c.N * tiles_h * tiles_w;
  const int all_k = (c.K / c.groups + BLOCK_K - 1) / BLOCK_K * c.groups;
  // as many blocks as fit at once; four times that, and thus not all at once, where a whole number
  // of them for each block of filters would leave many multiprocessors idle
  const int room = multiprocessors * MIN_BLOCKS;
  const int wanted = all_k * 8 <= room ? room / all_k : (4 * room + all_k - 1) / all_k;
  const int blocks = all_k * min(tiles, wanted);
  conv2d_register_tile<WIDE, RESIDENT>
      <<<blocks, THREADS, shared_bytes, stream>>>(x, w, bias, y, c, tiles);
  return (int)cudaGetLastError();
}

extern "C" int asymconv_launch(const float* x, const float* w, const float* bias, float* y,
                               const Conv* c, void* stream) {
  const long long padded = (c->C / c->groups + CHUNK_C - 1) / CHUNK_C * CHUNK_C;
  const long long resident_bytes = 4 * (STAGES * INPUT + padded * (R * S * PITCH_K<true>));
  int device, limit;  // bytes of a block; less on GPUs older than Hopper
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess) return (int)error;
  const bool resident = resident_bytes <= min(SHARED_SHARE, limit);
  const int bytes = resident ? (int)resident_bytes : STREAMING_BYTES;
  const bool wide = c->W % 4 == 0 && c->pad_w % 4 == 0 && (unsigned long long)x % 16 == 0;
  const auto run = wide ? (resident ? launch<true, true> : launch<true, false>)
                        : (resident ? launch<false, true> : launch<false, false>);
  return run(x, w, bias, y, *c, bytes, (cudaStream_t)stream);
}
"""
)


def refusal(shape: ConvShape, defines: Mapping[str, int]) -> str | None:
    """3x3 kernels of stride and dilation 1; any padding, groups, sizes and bias."""
    if shape.kernel != (3, 3) or shape.stride != (1, 1) or shape.dilation != (1, 1):
        return f"its register tile is made for 3×3, stride 1, dilation 1 ({shape})"
    if shape.height * shape.width >= 2**31:
        return f"offsets within a plane need more than 31 bits ({shape})"
    blocks_k = shape.out_channels  # at most, whatever BLOCK_K
    tiles = shape.batch * shape.out_height * -(-shape.out_width // 128)  # likewise
    if tiles >= 2**30:
        return f"{tiles} tiles, their index has 31 bits ({shape})"
    return launch_limits(
        shape, block=1024, grid=(5 * blocks_k + 4096, 1, 1), what="blocks that stay"
    )


RUNG = Rung(
    name="k05_register_tile",
    idea="160 outputs in a thread's registers, copies that overlap arithmetic",
    notebook="04_registers",
    source=SOURCE,
    refusal=refusal,
    capability=(8, 0),
    defines=DEFINES,
    variants=VARIANTS,
)
