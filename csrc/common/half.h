// 16-bit floats as they lie in memory, and their conversion: the only arithmetic on them is this.
#pragma once

#include <cstring>

#include "host_device.h"

namespace r1 {
namespace R1_ISA {

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

R1_HD uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
R1_HD float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

R1_HD float to_float(float x) { return x; }
R1_HD float to_float(Bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
R1_HD float to_float(Half x) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  // Exponent and mantissa moved into place, then scaled by 2^112: subnormal halves come out right, infinities by hand.
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7FFFu;
  const float value = float_of(rest << 13) * 0x1p112f;
  return float_of(sign | (rest >= 0x7C00u ? 0x7F800000u | (rest & 0x3FFu) << 13 : bits_of(value)));
#endif
}

// To nearest, ties to even.
template <typename T>
R1_HD T from_float(float x);
template <>
R1_HD float from_float<float>(float x) {
  return x;
}
template <>
R1_HD Bf16 from_float<Bf16>(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return Bf16{static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return Bf16{static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16)};
}
template <>
R1_HD Half from_float<Half>(float x) {
#ifdef __CUDA_ARCH__
  Half value;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(value.bits) : "f"(x));
  return value;
#else
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, size = bits & 0x7FFFFFFFu;
  uint32_t found;
  if (size > 0x7F800000u) {
    found = 0x7E00u;  // NaN
  } else if (size >= 0x477FF000u) {
    found = 0x7C00u;  // 65520 and more round to infinity
  } else if (size < 0x38800000u) {
    found = bits_of(float_of(size) + 0.5f) - 0x3F000000u;  // below 2^-14: the sum rounds to a multiple of 2^-24
  } else {
    found = (size - 0x38000000u + 0xFFFu + (size >> 13 & 1u)) >> 13;
  }
  return Half{static_cast<uint16_t>(sign | found)};
#endif
}

}  // namespace R1_ISA
}  // namespace r1
