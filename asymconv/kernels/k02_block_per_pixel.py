"""k02: the seed's final design. A block is one pixel (oh, ow); each thread, an image of the batch,
loops over every output channel.

What the last rung was limited by, as the seed saw it: "the excessive number of blocks".

What it changes: the loop over k moves from the grid into the thread. 128 times fewer blocks, each
128 times longer. The same thread reads the same C * R * S inputs again for every k.

What it predicts, on the contract's shape:

- The requests stay what they were: 8 lanes of 32, 8 sectors a load of x, 1 of w. So L1 bounds it
  as it bounds k01: 1.3 s.
- The input window of a block, 8 images * 64 channels * 3 rows of a sector, 48 KB, is wanted again
  for each of 128 output channels. 4224 blocks in flight want 207 MB, L2 has 50: part of it comes
  from device memory every time, where k01 reads each row a few times a sweep.

Measured: notebook 01, from figures/data. Slower than k01 by a sixth; 1.6 times its bytes
from device memory.

What limits it now: L1 as before, and waiting for what the caches could not keep. k03 turns the
lanes along the width, where the addresses are neighbours.
"""

from collections.abc import Mapping

from asymconv.kernels.rung import Rung, launch_limits
from asymconv.problem import ConvShape

SOURCE = r"""
__global__ void conv2d_block_per_pixel(const float* __restrict__ x, const float* __restrict__ w,
                                       const float* __restrict__ bias, float* __restrict__ y,
                                       const Conv c) {
  const int n = threadIdx.x;  // the seed's mapping: a thread is an image of the batch
  const int oh = blockIdx.x;
  const int ow = blockIdx.y;

  const int channels = c.C / c.groups;         // input channels that an output sees
  const int filters = c.K / c.groups;          // output channels of a group

  for (int k = 0; k < c.K; ++k) {
    const int first = k / filters * channels;
    float sum = 0.0f;
    for (int ci = 0; ci < channels; ++ci) {
      for (int r = 0; r < c.R; ++r) {
        for (int s = 0; s < c.S; ++s) {
          const int ih = oh * c.stride_h + r * c.dil_h - c.pad_h;
          const int iw = ow * c.stride_w + s * c.dil_w - c.pad_w;
          if (ih >= 0 && ih < c.H && iw >= 0 && iw < c.W) {
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
}

extern "C" int asymconv_launch(const float* x, const float* w, const float* bias, float* y,
                               const Conv* c, void* stream) {
  const dim3 grid(c->OH, c->OW), block(c->N);
  conv2d_block_per_pixel<<<grid, block, 0, (cudaStream_t)stream>>>(x, w, bias, y, *c);
  return (int)cudaGetLastError();
}
"""


def refusal(shape: ConvShape, defines: Mapping[str, int]) -> str | None:
    """Any convolution, as long as its launch is within CUDA's limits."""
    grid = (shape.out_height, shape.out_width, 1)
    return launch_limits(shape, block=shape.batch, grid=grid, what="block = batch")


RUNG = Rung(
    name="k02_block_per_pixel",
    idea="block = one pixel (oh, ow), thread = image, loop over the output channels",
    notebook="01_seed",
    source=SOURCE,
    refusal=refusal,
)
