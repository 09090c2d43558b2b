"""k08: the same rows at fp32-class accuracy, each value as two halves.

What k07 is limited by: memory; and its operands have 11 bits.

What it changes (Ootomo & Yokota 2022, 2203.03341):

- A value is hi + lo / 2^11, both fp16: 22 bits and hi's sign. Three products stand for one: hi by
  lo, lo by hi, and hi by hi. lo by lo, 2^-22 of the whole, is left out.
- Tensor cores cut off what does not fit a sum's 24 bits. So the small products are summed first,
  2^11 times too large; then the sum is scaled, and the large ones are added to it. And each
  warpgroup sums half of the channels only: 18 large products of 16 channels, not 36.
- Both halves of the weights of 64 filters fit the registers of two warpgroups, as each has 32
  channels: 144 registers, as in k07. The ring has both halves of the pixels.
- So two blocks share a strip, side by side, and read the same rows: the second from L2.
- Warpgroup 0 hands its sums over through shared memory and goes on with the next row; warpgroup 1
  adds its own, and stores. Warps pair up: no barrier of more than 64 threads. The place is free
  for the next sums when the stores have read it, which warpgroup 1 asks only after its next row's
  products: to ask before them cost 12 % (a run that was not kept).

What it predicts, on the contract's shape: 54 wgmma of 68 cycles a row and warpgroup, 7,300 cycles
for both; 65,280 rows of 64 filters on 132 SMs: 3.6 million cycles, 2.1 ms at 1.755 GHz if tensor
cores never wait, 2.3 to 2.5 as they do. Error: a model with every 16 terms summed exactly and cut
off gives 4.7e-7, and 9.1e-7 for all channels in one chain (asymconv's CPU backend does the same);
fp32 in plain CUDA has 4.3e-7.

Measured (notebook 07): 3.35 ms, error 3.9e-7. At the rate of cuBLAS' fp16 product three times the
operations take 2.8 ms.
"""

from asymconv.kernels.half_range import HALF_RANGE
from asymconv.kernels.hopper_rows import HOPPER_KERNEL, HOPPER_ROWS, refusal
from asymconv.kernels.ptx import BULK, BULK_EVICT_FIRST, HOPPER, MMA, wgmma_f16_ra
from asymconv.kernels.rung import Rung

DEFINES = {
    "ALIGN": 8,
    "RING": 4,
    "LANDINGS": 1,
    "EVICT_LOADS": 0,
    "EVICT_STORES": 0,
}

SOURCE = (
    HALF_RANGE
    + MMA
    + HOPPER
    + BULK
    + BULK_EVICT_FIRST
    + wgmma_f16_ra(136)
    + """
// A block: 64 filters, as hi and lo halves, half of the channels for each warpgroup.
constexpr int BLOCK_K = 64, HALVES = 2;
"""
    + HOPPER_ROWS
    + r"""
struct State : RingState {
  unsigned long long free[4], handed[4];  // where a warp's sums go from warpgroup 0 to 1

  __device__ __forceinline__ void initialize() {
    RingState::initialize();
    for (int i = 0; i < 4; ++i) {
      mbarrier_init(shared_address(&free[i]), 1);
      mbarrier_init(shared_address(&handed[i]), 1);
    }
  }
};

// One output row, all taps, a warpgroup's 32 channels. First what has a lo half in it, 2^11 times
// too large: those sums are small, and what tensor cores cut off when they add is small against the
// end result.
__device__ __forceinline__ void multiply(Sums& sum, const Weights& a, unsigned ring, int q,
                                         int pixels) {
  constexpr int HALF_PARTS = PARTS / 2;  // of hi, and of lo
  const auto row = [&](int r) {
    return swizzled_rows(opaque(ring) + (q + r) % RING * RING_ROW + pixels * PIXEL);
  };
  wgmma_fence();
  #pragma unroll
  for (int r = 0; r < R; ++r) {
    const unsigned long long hi = row(r);
    #pragma unroll
    for (int s = 0; s < S; ++s) {
      #pragma unroll
      for (int part = 0; part < HALF_PARTS; ++part) {
        const unsigned long long at = moved(hi, s * PIXEL + part * 32);
        const int tap = (r * S + s) * PARTS;
        wgmma_m64n136k16_f16_ra(sum, a[tap + part], moved(at, RING_HALF), r + s + part);
        wgmma_m64n136k16_f16_ra(sum, a[tap + HALF_PARTS + part], at, 1);
      }
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  #pragma unroll
  for (float& one : sum) one *= 1.0f / LO_SCALE;
  wgmma_fence();
  #pragma unroll
  for (int r = 0; r < R; ++r) {
    const unsigned long long hi = row(r);
    #pragma unroll
    for (int s = 0; s < S; ++s) {
      #pragma unroll
      for (int part = 0; part < HALF_PARTS; ++part) {
        wgmma_m64n136k16_f16_ra(sum, a[(r * S + s) * PARTS + part],
                                moved(hi, s * PIXEL + part * 32), 1);
      }
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
}

// Where a thread's sums of filter k stand in shared memory while they are handed over.
__device__ __forceinline__ float2* handed_sums(unsigned char* staging, int k, int lane) {
  return reinterpret_cast<float2*>(staging + (k + lane / 4) * STAGING_PITCH) + lane % 4;
}

template <bool EVEN>
__device__ __forceinline__ void consume(const float* __restrict__ x, const float* __restrict__ w,
                                        const float* __restrict__ bias, float* __restrict__ y,
                                        const Conv& c, const Plan& plan, int blocks_k,
                                        unsigned char* shared, State* state, int scale) {
  const int k = threadIdx.x / 32 % 4 * 16;  // a warp's filters, the same in both warpgroups
  const int channel0 = threadIdx.x < 128 ? 0 : CHANNELS / 2;
  Weights a;
  unsigned char* const turn = shared + RING_AT + threadIdx.x / 32 * TURN;
  const int k0 = blockIdx.x % blocks_k * BLOCK_K;
  if (!load_weights(a, w, bias, c, k0, k, channel0, turn, state, scale)) state->weights_bad = 1;
  for (int i = 0; i < RING; ++i) release_row(state, i);  // of weights

  unsigned char* const staging = shared + STAGING_AT;
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
      multiply(sum, a, ring + thread_again() / 128 * CHANNELS, q, (unsigned)-c.pad_w & 3);
      release_row(state, q);
      const int pair = thread_again() / 32 % 4;
      if (thread_again() < 128) {
        mbarrier_wait(shared_address(&state->free[pair]), q & 1);
        const int lane = thread_again() % 32;
        #pragma unroll
        for (int eight = 0; eight < 2; ++eight) {
          float2* const to = handed_sums(staging, pair * 16 + eight * 8, lane);
          #pragma unroll
          for (int j = 0; j < PRODUCT_W / 8; ++j) {
            to[4 * j] = make_float2(sum[4 * j + eight * 2], sum[4 * j + eight * 2 + 1]);
          }
        }
        warp_arrives(&state->handed[pair]);
      } else {
        bulk_wait_read();  // the row before has left, while this one was multiplied
        warp_arrives(&state->free[pair]);
        mbarrier_wait(shared_address(&state->handed[pair]), q & 1);
        const int lane = thread_again() % 32;
        #pragma unroll
        for (int eight = 0; eight < 2; ++eight) {
          const float2* const from = handed_sums(staging, pair * 16 + eight * 8, lane);
          #pragma unroll
          for (int j = 0; j < PRODUCT_W / 8; ++j) {
            sum[4 * j + eight * 2] += from[4 * j].x;
            sum[4 * j + eight * 2 + 1] += from[4 * j].y;
          }
        }
        __syncwarp();  // all have read: now the same place takes the outputs
        const Out out = out_row(item, at / ROUND, y, c, plan, blocks_k);
        stage<EVEN>(sum, 0, pair * 16, lane, out, state, staging);
        stage<EVEN>(sum, 1, pair * 16 + 8, lane, out, state, staging);
        send(pair * 16, lane, out, staging);
      }
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
    name="k08_hopper_split",
    idea="the same at fp32-class accuracy: values as hi + lo halves",
    notebook="07_precision",
    source=SOURCE,
    refusal=refusal,
    precision="fp32",
    capability=(9, 0),
    arch="90a",
    defines=DEFINES,
)
