"""k03: neighbouring threads along the width, where neighbours are neighbours in memory.

What the last rung was limited by: L1, nine cycles for the eight products of a request, because
every lane's address lay in a line of its own; and three lanes in four were empty.

What it changes: threadIdx runs along the output's width. The 32 lanes of a warp compute 32
neighbouring outputs of one row and one channel; the 3x3 taps are unrolled. Nothing else: each
thread still computes one output and reads every input and weight from global memory.

What it predicts, on the contract's shape:

- 32 lanes read 32 neighbouring floats: 4 sectors where the row starts on a sector (tap s = 0),
  5 for s = 1 and 2, 4.67 on average for 32 floats: an eighth of what k01 fetched for each float.
  Shifted by one or two, they lie in two lines: 1.67 wavefronts on average. The weight is 1 more.
- 9.6 billion terms a warp (32 products each) of 2.67 wavefronts: 98 ms on 132 SMs at 1980 MHz,
  if every access hits L1. Blocks of all 128 channels of a piece of a row follow each other, so
  the piece comes from device memory about once.
- ALONG_HEIGHT=1 turns the lanes the other way, one row apart each: 32 lines, 32 wavefronts, for
  the same work: 33 in place of 2.67, 1.2 s. Nothing but the choice of an index.
- UNROLL_CHANNELS says how many input channels a turn of the loop takes: one, as nvcc has it when
  not told. More change no request, and L1 is the limit: nothing to gain. And they need more than
  the 64 registers that 4 blocks of 256 threads leave a thread: nvcc moves some to local memory.

What limits it now: L1 still, two requests for each product of a warp. k04 keeps a tile of the
input in shared memory and uses each value it reads for several outputs.
"""

from collections.abc import Mapping

from asymconv.kernels.rung import Rung, launch_limits
from asymconv.problem import ConvShape

SOURCE = r"""
constexpr int THREADS = 256;
static_assert(THREADS % 32 == 0, "whole warps");

// R = S = 0: any kernel size, known at run time; else loops that the compiler unrolls.
template <int R, int S>
__global__ void __launch_bounds__(THREADS, 4)
    conv2d_coalesced(const float* __restrict__ x, const float* __restrict__ w,
                     const float* __restrict__ bias, float* __restrict__ y, const Conv c) {
  const int kernel_h = R ? R : c.R, kernel_w = S ? S : c.S;

  // block: (channel, piece of a row, row, image), the channel fastest: all read the same piece
  const int along = ALONG_HEIGHT ? c.OH : c.OW, across = ALONG_HEIGHT ? c.OW : c.OH;
  const int pieces = (along + THREADS - 1) / THREADS;
  long long block = blockIdx.x;
  const int k = block % c.K;
  block /= c.K;
  const int lane_index = block % pieces * THREADS + threadIdx.x;
  block /= pieces;
  const int other_index = block % across;
  const int n = block / across;
  if (lane_index >= along) return;
  const int oh = ALONG_HEIGHT ? lane_index : other_index;
  const int ow = ALONG_HEIGHT ? other_index : lane_index;

  const int channels = c.C / c.groups;
  const int first = k / (c.K / c.groups) * channels;
  const float* image = x + ((long long)n * c.C + first) * c.H * c.W;
  const float* filter = w + (long long)k * channels * kernel_h * kernel_w;

  float sum = 0.0f;
  constexpr int TURN = UNROLL_CHANNELS;  // the pragma takes no macro
  #pragma unroll TURN
  for (int ci = 0; ci < channels; ++ci) {
    #pragma unroll
    for (int r = 0; r < kernel_h; ++r) {
      #pragma unroll
      for (int s = 0; s < kernel_w; ++s) {
        const int ih = oh * c.stride_h + r * c.dil_h - c.pad_h;
        const int iw = ow * c.stride_w + s * c.dil_w - c.pad_w;
        if (ih >= 0 && ih < c.H && iw >= 0 && iw < c.W) {
          sum += image[(long long)ih * c.W + iw] * filter[r * kernel_w + s];
        }
      }
    }
    image += (long long)c.H * c.W;
    filter += kernel_h * kernel_w;
  }
  if (bias) sum += bias[k];
  y[(((long long)n * c.K + k) * c.OH + oh) * c.OW + ow] = sum;
}

extern "C" int asymconv_launch(const float* x, const float* w, const float* bias, float* y,
                               const Conv* c, void* stream) {
  const int along = ALONG_HEIGHT ? c->OH : c->OW, across = ALONG_HEIGHT ? c->OW : c->OH;
  const int pieces = (along + THREADS - 1) / THREADS;
  const unsigned blocks = (unsigned)((long long)c->N * across * pieces * c->K);
  if (c->R == 3 && c->S == 3) {
    conv2d_coalesced<3, 3><<<blocks, THREADS, 0, (cudaStream_t)stream>>>(x, w, bias, y, *c);
  } else {
    conv2d_coalesced<0, 0><<<blocks, THREADS, 0, (cudaStream_t)stream>>>(x, w, bias, y, *c);
  }
  return (int)cudaGetLastError();
}
"""


def refusal(shape: ConvShape, defines: Mapping[str, int]) -> str | None:
    """Any convolution, as long as its launch is within CUDA's limits."""
    pieces = max(
        -(-shape.out_width // 256) * shape.out_height, -(-shape.out_height // 256) * shape.out_width
    )
    blocks = shape.batch * shape.out_channels * pieces
    return launch_limits(shape, block=256, grid=(blocks, 1, 1), what="a block for 256 outputs")


RUNG = Rung(
    name="k03_coalesced",
    idea="neighbouring threads along the width, taps unrolled",
    notebook="02_coalescing",
    source=SOURCE,
    refusal=refusal,
    defines={"ALONG_HEIGHT": 0, "UNROLL_CHANNELS": 1},
    variants=(
        *({"ALONG_HEIGHT": along} for along in (0, 1)),
        *({"UNROLL_CHANNELS": channels} for channels in (1, 2, 4)),
    ),
)
