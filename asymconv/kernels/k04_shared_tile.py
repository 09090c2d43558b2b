"""k04: a tile of the input, wider than high, with its halo, in shared memory.

What the last rung was limited by: L1, two requests (x and w) for each product of a warp.

What it changes: a block of TILE_H x TILE_W threads, one output pixel each, first copies the piece
of the input under it, TILE_H + 2 by TILE_W + 2 for a 3x3 kernel, and the weights of BLOCK_K output
channels into shared memory, CHUNK_C channels at a time. Then each thread walks over the taps,
reads its input value once, and uses it for all BLOCK_K channels.

What it predicts, on the contract's shape, for the tile 8 x 32 and BLOCK_K = 16:

- Halo: (8 + 2) * (32 + 2) / (8 * 32) = 1.33 values copied for each pixel. 8 x 8 copies 1.56,
  16 x 16 1.27, 1 x 256 3.02. By values alone the square is best; but what is fetched is sectors,
  and a short row wastes more of its first and last: notebook 03 counts them for every shape.
- The tile is copied once for 16 channels, so 8 times for all 128: 8 * 1.07 GB * 1.6 = 14 GB from
  L2, 2 ms at its rate. No longer a limit.
- For 16 products a thread reads one input value and four times 16 bytes of weights, the same for
  all lanes: 5 shared-memory requests in place of 32 to L1. 9.6 billion warp-terms / 16 * 5 = 3.0
  billion requests, 12 ms at a wavefront each on 132 SMs at 1980 MHz, twice that at two. Issuing
  9.6 billion FMAs and 3 billion loads takes 12 ms, too. Expect 20 to 30 ms.
- Lanes along the width read neighbouring words: no bank conflicts while a warp stays in one row.
  With TILE_W = 8 a warp covers four rows, whose pitch of 10 words makes them overlap.

Measured: notebook 03, from figures/data.

What limits it now: the ratio of loads to products, 5 to 16. k05 gives a thread pixels as well.
"""

from collections.abc import Mapping

from asymconv.kernels.rung import Rung, launch_limits
from asymconv.problem import ConvShape

DEFINES = {"TILE_H": 8, "TILE_W": 32, "BLOCK_K": 16, "CHUNK_C": 4}

TILES = (
    *((8, 8), (16, 8), (32, 8), (8, 16), (16, 16), (32, 16), (4, 32), (8, 32), (16, 32)),
    *((4, 64), (8, 64), (2, 128), (4, 128), (1, 256), (2, 256)),
)
"""Heights and widths that are compared."""

SHARED_LIMIT = 48 * 1024  # bytes that a block gets without asking

SOURCE = r"""
constexpr int THREADS = TILE_H * TILE_W;  // one output pixel each
static_assert(THREADS <= 1024, "a block has at most 1024 threads");
static_assert(BLOCK_K % 4 == 0, "weights are read as float4");

// Rows and columns of the input under a tile: the tile and its halo.
__host__ __device__ inline int halo_height(const Conv& c) {
  return (TILE_H - 1) * c.stride_h + (c.R - 1) * c.dil_h + 1;
}
__host__ __device__ inline int halo_width(const Conv& c) {
  return (TILE_W - 1) * c.stride_w + (c.S - 1) * c.dil_w + 1;
}

// USUAL: 3x3, stride 1, dilation 1, known to the compiler; else everything at run time.
template <bool USUAL>
__global__ void __launch_bounds__(THREADS)
    conv2d_shared_tile(const float* __restrict__ x, const float* __restrict__ w,
                       const float* __restrict__ bias, float* __restrict__ y, Conv c) {
  if (USUAL) c.R = c.S = 3, c.stride_h = c.stride_w = c.dil_h = c.dil_w = 1;
  const int tile_rows = halo_height(c), tile_columns = halo_width(c), taps = c.R * c.S;
  extern __shared__ __align__(16) float shared[];
  float* const weights = shared;                             // [CHUNK_C][taps][BLOCK_K]
  float* const tile = shared + CHUNK_C * taps * BLOCK_K;     // [CHUNK_C][tile_rows][tile_columns]

  const int channels = c.C / c.groups, filters = c.K / c.groups;  // of a group
  const int blocks_k = (filters + BLOCK_K - 1) / BLOCK_K;
  const int tiles_w = (c.OW + TILE_W - 1) / TILE_W;
  const int oh0 = blockIdx.x / tiles_w * TILE_H, ow0 = blockIdx.x % tiles_w * TILE_W;
  const int group = blockIdx.y / blocks_k, k0 = blockIdx.y % blocks_k * BLOCK_K;  // k in the group
  const int n = blockIdx.z;
  const int tid = threadIdx.x, row = tid / TILE_W, column = tid % TILE_W;

  const int ih0 = oh0 * c.stride_h - c.pad_h, iw0 = ow0 * c.stride_w - c.pad_w;
  const float* image = x + ((long long)n * c.C + (long long)group * channels) * c.H * c.W;
  const float* filter = w + ((long long)group * filters + k0) * channels * taps;

  float sum[BLOCK_K] = {};
  // offsets within a chunk fit 32 bits (refuses), so that only the two pointers take 64
  for (int c0 = 0; c0 < channels; c0 += CHUNK_C) {
    for (int i = tid; i < CHUNK_C * tile_rows * tile_columns; i += THREADS) {
      const int ci = i / (tile_rows * tile_columns), rest = i % (tile_rows * tile_columns);
      const int ih = ih0 + rest / tile_columns, iw = iw0 + rest % tile_columns;
      const bool inside = c0 + ci < channels && ih >= 0 && ih < c.H && iw >= 0 && iw < c.W;
      tile[i] = inside ? image[(ci * c.H + ih) * c.W + iw] : 0.0f;
    }
    for (int i = tid; i < CHUNK_C * taps * BLOCK_K; i += THREADS) {
      const int k = i % BLOCK_K, tap = i / BLOCK_K % taps, ci = i / (BLOCK_K * taps);
      const bool inside = c0 + ci < channels && k0 + k < filters;
      weights[i] = inside ? filter[(k * channels + ci) * taps + tap] : 0.0f;
    }
    image += (long long)CHUNK_C * c.H * c.W;
    filter += CHUNK_C * taps;
    __syncthreads();  // the tile is whole
    #pragma unroll 1
    for (int ci = 0; ci < CHUNK_C; ++ci) {
      #pragma unroll
      for (int r = 0; r < c.R; ++r) {
        #pragma unroll
        for (int s = 0; s < c.S; ++s) {
          const int at = (ci * tile_rows + row * c.stride_h + r * c.dil_h) * tile_columns;
          const float value = tile[at + column * c.stride_w + s * c.dil_w];
          const float4* const taps_of_k =
              reinterpret_cast<const float4*>(weights + (ci * taps + r * c.S + s) * BLOCK_K);
          #pragma unroll
          for (int k = 0; k < BLOCK_K; k += 4) {
            const float4 four = taps_of_k[k / 4];  // the same for all lanes: a broadcast
            sum[k] += value * four.x;
            sum[k + 1] += value * four.y;
            sum[k + 2] += value * four.z;
            sum[k + 3] += value * four.w;
          }
        }
      }
    }
    __syncthreads();  // all have read it: the next chunk may come
  }

  const int oh = oh0 + row, ow = ow0 + column;
  if (oh >= c.OH || ow >= c.OW) return;
  #pragma unroll
  for (int k = 0; k < BLOCK_K; ++k) {
    if (k0 + k < filters) {
      const long long channel = (long long)group * filters + k0 + k;
      y[(((long long)n * c.K + channel) * c.OH + oh) * c.OW + ow] =
          bias ? sum[k] + bias[channel] : sum[k];
    }
  }
}

extern "C" int asymconv_launch(const float* x, const float* w, const float* bias, float* y,
                               const Conv* c, void* stream) {
  const int tiles_h = (c->OH + TILE_H - 1) / TILE_H, tiles_w = (c->OW + TILE_W - 1) / TILE_W;
  const int blocks_k = (c->K / c->groups + BLOCK_K - 1) / BLOCK_K;
  const dim3 grid(tiles_h * tiles_w, blocks_k * c->groups, c->N);
  const int floats = CHUNK_C * (c->R * c->S * BLOCK_K + halo_height(*c) * halo_width(*c));
  const size_t bytes = floats * sizeof(float);
  const bool usual = c->R == 3 && c->S == 3 && c->stride_h == 1 && c->stride_w == 1 &&
                     c->dil_h == 1 && c->dil_w == 1;
  if (usual) {
    conv2d_shared_tile<true><<<grid, THREADS, bytes, (cudaStream_t)stream>>>(x, w, bias, y, *c);
  } else {
    conv2d_shared_tile<false><<<grid, THREADS, bytes, (cudaStream_t)stream>>>(x, w, bias, y, *c);
  }
  return (int)cudaGetLastError();
}
"""


def refusal(shape: ConvShape, defines: Mapping[str, int]) -> str | None:
    """Convolutions whose tile, with its halo, does not fit shared memory; launches too large."""
    tile_h, tile_w, block_k, chunk_c = (defines[name] for name in DEFINES)
    rows = (tile_h - 1) * shape.stride[0] + (shape.kernel[0] - 1) * shape.dilation[0] + 1
    columns = (tile_w - 1) * shape.stride[1] + (shape.kernel[1] - 1) * shape.dilation[1] + 1
    taps = shape.kernel[0] * shape.kernel[1]
    size = 4 * chunk_c * (taps * block_k + rows * columns)
    if size > SHARED_LIMIT:
        return f"the tile and its halo take {size} bytes of shared memory, {SHARED_LIMIT} are there"
    if max(chunk_c * shape.height * shape.width, block_k * shape.terms) >= 2**31:
        return f"offsets within {chunk_c} channels need more than 31 bits ({shape})"
    blocks_k = -(-shape.out_channels // shape.groups // block_k) * shape.groups
    tiles = -(-shape.out_height // tile_h) * -(-shape.out_width // tile_w)
    return launch_limits(
        shape, block=tile_h * tile_w, grid=(tiles, blocks_k, shape.batch), what="a block a tile"
    )


RUNG = Rung(
    name="k04_shared_tile",
    idea="a tile wider than high, with its halo, in shared memory",
    notebook="03_shared_memory",
    source=SOURCE,
    refusal=refusal,
    defines=DEFINES,
    variants=tuple({"TILE_H": height, "TILE_W": width} for height, width in TILES),
)
