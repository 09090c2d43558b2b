// emu_half.h: the basics of cuda_fp16.h. A __half is 16 bits of storage; arithmetic goes through
// float and rounds once, to nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

namespace emu {

// The three formats' fields: float 1 + 8 + 23 bits, bias 127; half 1 + 5 + 10 bits, bias 15.
EMU_INLINE std::uint16_t float_to_half_bits(float value) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = bits >> 16 & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;

  if (magnitude > 0x7f800000u) return 0x7fff;  // NaN: CUDA's canonical one
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // >= 65520: inf
  if (magnitude >= 0x38800000u) {  // a normal half: 2^-14 and up
    // Rebias the exponent, then add just under half a unit of the last place that stays, or exactly
    // half where that place is odd: a carry runs into the exponent, as it should.
    const std::uint32_t rebiased = magnitude - ((127u - 15u) << 23);
    const std::uint32_t odd = rebiased >> 13 & 1u;
    return static_cast<std::uint16_t>(sign | (rebiased + 0xfffu + odd) >> 13);
  }
  // Subnormal: a multiple of 2^-24. Adding 0.5, whose last place in float is 2^-24, rounds to one.
  const float rounded = bit_cast<float>(magnitude) + 0.5f;
  return static_cast<std::uint16_t>(sign | (bit_cast<std::uint32_t>(rounded) - 0x3f000000u));
}

EMU_INLINE float half_bits_to_float(std::uint16_t half) {
  const std::uint32_t sign = (half & 0x8000u) << 16;
  const std::uint32_t exponent = half >> 10 & 31u;
  const std::uint32_t mantissa = half & 0x3ffu;

  if (exponent == 31) return bit_cast<float>(sign | 0x7f800000u | mantissa << 13);  // inf, NaN
  if (exponent != 0) {
    return bit_cast<float>(sign | (exponent + (127u - 15u)) << 23 | mantissa << 13);
  }
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // exact
  return bit_cast<float>(sign | bit_cast<std::uint32_t>(magnitude));
}

}  // namespace emu

struct alignas(2) __half {
  unsigned short bits;

  __half() = default;  // trivial: __half may stand in shared memory
  EMU_INLINE __half(float f) : bits(emu::float_to_half_bits(f)) {}
  EMU_INLINE operator float() const { return emu::half_bits_to_float(bits); }
};

struct alignas(4) __half2 {
  __half x, y;
};

using half = __half;
using half2 = __half2;

EMU_INLINE __half __float2half(float f) {
  return __half(f);
}
EMU_INLINE __half __float2half_rn(float f) {
  return __half(f);
}
EMU_INLINE float __half2float(__half h) {
  return static_cast<float>(h);
}
EMU_INLINE __half __ushort_as_half(unsigned short bits) {
  return emu::bit_cast<__half>(bits);
}
EMU_INLINE unsigned short __half_as_ushort(__half h) {
  return h.bits;
}
EMU_INLINE __half2 __halves2half2(__half low, __half high) {
  return {low, high};
}
EMU_INLINE __half2 make_half2(__half low, __half high) {
  return {low, high};
}
EMU_INLINE __half2 __floats2half2_rn(float low, float high) {
  return {__half(low), __half(high)};
}
EMU_INLINE __half2 __float22half2_rn(float2 f) {
  return {__half(f.x), __half(f.y)};
}
EMU_INLINE __half2 __float2half2_rn(float f) {
  return {__half(f), __half(f)};
}
EMU_INLINE float2 __half22float2(__half2 h) {
  return {static_cast<float>(h.x), static_cast<float>(h.y)};
}
EMU_INLINE __half __low2half(__half2 h) {
  return h.x;
}
EMU_INLINE __half __high2half(__half2 h) {
  return h.y;
}
EMU_INLINE float __low2float(__half2 h) {
  return static_cast<float>(h.x);
}
EMU_INLINE float __high2float(__half2 h) {
  return static_cast<float>(h.y);
}
EMU_INLINE __half __hadd(__half a, __half b) {
  return __half(static_cast<float>(a) + static_cast<float>(b));
}
EMU_INLINE __half __hsub(__half a, __half b) {
  return __half(static_cast<float>(a) - static_cast<float>(b));
}
EMU_INLINE __half __hmul(__half a, __half b) {
  return __half(static_cast<float>(a) * static_cast<float>(b));
}
