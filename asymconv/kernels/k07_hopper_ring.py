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
- fp32's range does not suffer: see half_range.py.

What was tried before: weights resident in shared memory, rows fetched through registers, sums
passed round a group of lanes until each has a whole sector. It took 1.76 ms: stores of 32 bytes,
eight filters at a time, and products and stores in turns (notebook 06, k07_two_versions.json).

What it predicts, on the contract's shape: 36 wgmma of 64 x 136 x 16 a row and warpgroup, 68 cycles
each: 4,900 cycles a row for both, 0.71 ms in all at 1.755 GHz. Then each has 68 values a thread to
finish and stage, 1,500 to 2,000 cycles: if the warpgroups stay in step, 1.0 ms without memory.
Memory: 1.29 ms. Shared memory: 2,450 cycles a row for wgmma's pixels, 1,500 for the rest, of 8,600.
So it should be memory's own time, 1.28 to 1.33 ms.

Measured (notebook 06): 1.32 ms, as long as the same bytes take in the same strips without products.
"""

from asymconv.kernels.half_range import HALF_RANGE
from asymconv.kernels.hopper_rows import HOPPER_KERNEL, HOPPER_ROWS, refusal
from asymconv.kernels.ptx import BULK, BULK_EVICT_FIRST, HOPPER, MMA, wgmma_f16_ra
from asymconv.kernels.rung import Rung

DEFINES = {
    "ALIGN": 8,
    "RING": 4,
    "LANDINGS": 2,
    "EVICT_LOADS": 0,
    "EVICT_STORES": 0,
}

VARIANTS = (
    {"ALIGN": 8},
    {"ALIGN": 4},
    {"LANDINGS": 1},
    {"EVICT_LOADS": 1},
    {"EVICT_STORES": 1},
    {"EVICT_LOADS": 1, "EVICT_STORES": 1},
)
"""Whole sectors; writing where bulk copies may begin; fetching one row ahead in place of two; lines
that L2 lets go of first."""

SOURCE = (
    HALF_RANGE
    + MMA
    + HOPPER
    + BULK
    + BULK_EVICT_FIRST
    + wgmma_f16_ra(136)
    + """
// A block: 128 filters, each a half.
constexpr int BLOCK_K = 128, HALVES = 1;
"""
    + HOPPER_ROWS
    + r"""
using State = RingState;

// One output row, all taps. `pixels`: where the first tap's window starts within a ring row; a tap
// further right starts a pixel later.
__device__ __forceinline__ void multiply(Sums& sum, const Weights& a, unsigned ring, int q,
                                         int pixels) {
  wgmma_fence();
  #pragma unroll
  for (int r = 0; r < R; ++r) {
    const unsigned long long row =
        swizzled_rows(ring + (q + r) % RING * RING_ROW + pixels * PIXEL);
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
  unsigned char* const turn = shared + RING_AT + threadIdx.x / 32 * TURN;
  const int k0 = blockIdx.x % blocks_k * BLOCK_K;
  const int warp_k = threadIdx.x / 32 * 16;
  if (!load_weights(a, w, bias, c, k0, warp_k, 0, turn, state, scale)) state->weights_bad = 1;
  for (int i = 0; i < RING; ++i) release_row(state, i);  // of weights

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
      Sums sum;
      multiply(sum, a, ring, q, (unsigned)-c.pad_w & 3);  // strips start on 16 bytes
      wgmma_wait<0>();
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
    + HOPPER_KERNEL
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
