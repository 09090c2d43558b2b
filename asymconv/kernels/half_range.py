"""How fp32 values become fp16 operands of tensor cores without losing fp32's range.

fp16 has TF32's 11 significant bits (hidden one included), but 5 bits of exponent in place of 8:
it holds 2^-14 to 65504 at full precision. Operands are therefore scaled by powers of two, which
rounds nothing:

- the input by one power for the whole tensor, taken from a sample of it that every block reads:
  a typical large value becomes about 2^INPUT_TOP;
- each filter by its own, from its largest weight, which becomes at least 2^WEIGHT_TOP.

A sample is not a proof, so every value is looked at while it is converted. Values that stand
together (a *run*: neighbouring pixels of one channel; the taps of one channel of one filter) must
have a largest magnitude, scaled, of 0 or between 2^RUN_BOTTOM and 65280. Then each of them is
rounded with an error of at most 2^-11 of itself, or of at most 2^-25, which is no more than
2^(-25 - RUN_BOTTOM) of the run's largest. Where a run fails that test (the tensor's dynamic range
is too wide, or there is an inf or a NaN), the outputs that it enters are computed again in fp32 by
the block that found it.

So whatever the input, every operand is rounded with an error of at most 2^-11 of the largest
magnitude of its run: TF32's 11 bits, shared by a few neighbours. It costs a look at each value, and
nothing else until a run fails; then k06 computes a tile again, k07 and k08 the outputs that see the
run (whole rows of a strip, if it has more than 22 to 32 such runs or a filter's weights fail). ReLU
leaves about one such run in 10^8 (notebook 09), random inputs none, where runs are of 4 pixels. A
row's last run may be one pixel: a few draws in a thousand of 8×64×188×621 have one that is too
small (by hand: 96,256 such runs, 2^-25 each). `layers.json` of git revision 1829fd6 had met one, we
think: k07 took 0.72 ms there and not 0.38.
"""

from asymconv.kernels.ptx import MAX_NAN

INPUT_TOP, WEIGHT_TOP, RUN_BOTTOM = 10, 14, -14

HALF_RANGE = (
    MAX_NAN
    + r"""
// ---- fp32 as fp16: see asymconv/kernels/half_range.py
constexpr int INPUT_TOP = 10, WEIGHT_TOP = 14, RUN_BOTTOM = -14;  // exponents after scaling

__device__ __forceinline__ float power_of_two(int exponent) {  // -126 to 127
  return __int_as_float((exponent + 127) << 23);
}

// Bits of a magnitude: they order like the magnitudes, inf and NaN above all.
__device__ __forceinline__ unsigned magnitude(float v) { return __float_as_uint(v) & 0x7fffffffu; }

// The power of two that brings a magnitude to 2^top or a little above; 0 for 0, inf and NaN.
__device__ __forceinline__ int scale_for(unsigned bits, int top) {
  if (bits == 0 || bits >= 0x7f800000u) return 0;
  return min(126, max(-126, top - ((int)(bits >> 23) - 127)));
}

// The runs seen so far: the largest magnitude of all, NaN if there was one, and the least of the
// runs that are not 0, as bits less 1, so that 0 comes last.
struct HalfRuns {
  float most = 0.0f;
  unsigned least = ~0u;
  __device__ __forceinline__ void look_at(float largest) {  // of a run; not negative, or NaN
    most = larger_magnitude(most, largest);
    least = min(__float_as_uint(largest) - 1, least);
  }
};

// Which largest magnitudes of a run fp16 holds well once they are scaled by 2^scale.
struct HalfRange {
  unsigned low, high;
  __device__ __forceinline__ explicit HalfRange(int scale) {
    // both thresholds unscaled: as floats they may be subnormal, or too large for a float
    const int bottom = RUN_BOTTOM - scale, top = 15 - scale;
    low = bottom >= -126 ? (unsigned)(bottom + 127) << 23 : 1u << max(0, bottom + 149);
    high = top <= 127 ? ((unsigned)(top + 127) << 23) + 0x7f0000u : 0x7f7fffffu;  // 1.992 * 2^15
  }
  __device__ __forceinline__ bool holds(unsigned largest) const {
    return largest == 0 || largest - low <= high - low;
  }
  __device__ __forceinline__ bool holds(const HalfRuns& runs) const {
    return __float_as_uint(runs.most) <= high && runs.least >= low - 1;
  }
};

// The exponent to scale x by: from the median of the warps' largest samples, so that neither a few
// huge values nor a few empty places decide. The same in every block. All WARPS * 32 threads call
// it; scratch: WARPS words of shared memory.
template <int WARPS>
__device__ __forceinline__ int sampled_scale(const float* x, long long count, unsigned* scratch) {
  static_assert(WARPS <= 32, "a lane looks at each warp's sample");
  constexpr int SAMPLES = 4;
  unsigned largest = 0;
  for (int i = 0; i < SAMPLES; ++i) {
    const long long sample = (long long)(i * WARPS * 32 + threadIdx.x);
    const unsigned bits = magnitude(x[count * sample / (SAMPLES * WARPS * 32)]);
    if (bits < 0x7f800000u) largest = max(largest, bits);
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
  }
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = largest;
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const unsigned mine = lane < WARPS ? scratch[lane] : 0;
  int rank = 0, there = 0;
  for (int i = 0; i < WARPS; ++i) {
    const unsigned other = scratch[i];
    there += other != 0;
    rank += other > mine || (other == mine && i < lane);
  }
  const unsigned median = __ballot_sync(0xffffffffu, mine != 0 && rank == there / 2);
  // no more than leaves room for the weights' power: together they are one float's exponent
  return there ? min(104, scale_for(scratch[__ffs(median) - 1], INPUT_TOP)) : 0;
}
"""
)
