// exp for loops that the compiler turns into SIMD; libm's is a call per element.
#pragma once

#include <cstring>

#include "../common/host_device.h"

namespace r1 {
namespace R1_ISA {

// e^x for x <= 0: within 2 ulp of exact down to -87, 0 below (the result would be subnormal), NaN for NaN.
// x = n ln2 + r with |r| <= ln2 / 2; e^r by the degree-6 minimax polynomial of Cephes' expf; 2^n by its exponent bits.
inline float exp_nonpositive(float x) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const float shifted = x * 1.44269504f + shift;
  const float n = shifted - shift;
  float r = x - n * 0.693359375f;
  r -= n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const int32_t bits = (__builtin_bit_cast(int32_t, shifted) << 23) + 0x3F800000;
  const float value = p * __builtin_bit_cast(float, bits);
  return x < -87.0f ? 0.0f : value;
}

}  // namespace R1_ISA
}  // namespace r1
