"""k01: the seed's first design. A block is one output (oh, ow, k), its threads are the batch.

Why one would write it: the output has four indices, CUDA offers three for blocks and three for
threads, and the batch is the small one, so it goes to the threads. Nothing is shared, nothing is
reused, every thread computes one sum of C * R * S products from device memory.

What it predicts, on the contract's shape:

- 8 threads fill a quarter of a warp of 32, so three lanes in four do nothing.
- The 8 threads of a block read 8 images at the same place: addresses C * H * W * 4 bytes
  = 134 MB apart, so a load request touches 8 sectors of 32 bytes to use 4 bytes of each.
  Stores likewise: 8 sectors written in part.
- 66.7 million blocks of 8 threads. An SM holds 32 blocks at once, so 256 of its 2048 threads.
  The seed itself gave the design up for the number of blocks (its count, 65 million, is right,
  its reason is not: CUDA allows 2^31 - 1 of them in x and 65535 in y and z; it launches).
- L1 looks up one 128-byte line a cycle, so a term costs a warp 8 + 1 cycles of it: 38.4 billion
  terms on 132 SMs at 1980 MHz are 1.3 s at least.

Measured: notebook 01, from figures/data. Requests and sectors as predicted, to the digit; L1 is
busy 70 % of the time, L2 a fifth, arithmetic less than that.

What limits it now: L1, nine cycles for eight products. k02 keeps the mapping and moves the loop
over k inside.
"""

from collections.abc import Mapping

from asymconv.kernels.rung import Rung, launch_limits
from asymconv.problem import ConvShape

SOURCE = r"""
__global__ void conv2d_block_per_output(const float* __restrict__ x, const float* __restrict__ w,
                                        const float* __restrict__ bias, float* __restrict__ y,
                                        const Conv c) {
  const int n = threadIdx.x;  // the seed's mapping: a thread is an image of the batch
  const int oh = blockIdx.x;
  const int ow = blockIdx.y;
  const int k = blockIdx.z;

  const int channels = c.C / c.groups;         // input channels that this output sees
  const int first = k / (c.K / c.groups) * channels;

  float sum = 0.0f;
  for (int ci = 0; ci < channels; ++ci) {
    for (int r = 0; r < c.R; ++r) {
      for (int s = 0; s < c.S; ++s) {
        const int ih = oh * c.stride_h + r * c.dil_h - c.pad_h;
        const int iw = ow * c.stride_w + s * c.dil_w - c.pad_w;
        if (ih >= 0 && ih < c.H && iw >= 0 && iw < c.W) {
          // 64-bit offsets: 32 bits overflow from 2^31 elements on, batch 64 of the contract
          const float xv = x[(((long long)n * c.C + first + ci) * c.H + ih) * c.W + iw];
          const float wv = w[(((long long)k * channels + ci) * c.R + r) * c.S + s];
          sum += xv * wv;
        }
      }
    }
  }
  if (bias) sum += bias[k];
  y[(((long long)n * c.K + k) * c.OH + oh) * c.OW + ow] = sum;
}

extern "C" int asymconv_launch(const float* x, const float* w, const float* bias, float* y,
                               const Conv* c, void* stream) {
  const dim3 grid(c->OH, c->OW, c->K), block(c->N);
  conv2d_block_per_output<<<grid, block, 0, (cudaStream_t)stream>>>(x, w, bias, y, *c);
  return (int)cudaGetLastError();
}
"""


def refusal(shape: ConvShape, defines: Mapping[str, int]) -> str | None:
    """Any convolution, as long as its launch is within CUDA's limits."""
    grid = (shape.out_height, shape.out_width, shape.out_channels)
    return launch_limits(shape, block=shape.batch, grid=grid, what="block = batch")


RUNG = Rung(
    name="k01_block_per_output",
    idea="block = one output (oh, ow, k), thread = image of the batch",
    notebook="01_seed",
    source=SOURCE,
    refusal=refusal,
)
