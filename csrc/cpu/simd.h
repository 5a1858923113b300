// Sixteen floats at a time, in the compiler's vector extension: one source that becomes AVX-512, two AVX2 or four SSE
// operations. (GCC 12 ends a loop under `omp simd reduction` with sixteen additions in a row, and leaves some of our
// loops scalar for fear of aliasing: written out, decode attention takes 0.21 ms where it took 0.56.)
#pragma once

#include <cstring>

#include "../common/host_device.h"

#define R1_INLINE inline __attribute__((always_inline))

namespace r1 {
namespace R1_ISA {

constexpr int kLanes = 16;
typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IntVec __attribute__((vector_size(64)));  // also what a comparison gives: -1 where it holds
typedef uint32_t BitVec __attribute__((vector_size(64)));
typedef float Half __attribute__((vector_size(32)));
typedef float Quarter __attribute__((vector_size(16)));

R1_INLINE Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
R1_INLINE void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }
// The first `count` < 16 lanes from memory, the others `fill`.
R1_INLINE Vec load_part(const float* from, int64_t count, float fill) {
  Vec v = fill - Vec{};
  std::memcpy(&v, from, count * sizeof(float));
  return v;
}
R1_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// Lanes folded in half four times. (memcpy, because GCC 11 has no __builtin_shufflevector.)
template <typename Fold>
R1_INLINE float fold(Vec v, Fold f) {
  Half halves[2];
  std::memcpy(halves, &v, sizeof v);
  const Half h = f(halves[0], halves[1]);
  Quarter quarters[2];
  std::memcpy(quarters, &h, sizeof h);
  const Quarter q = f(quarters[0], quarters[1]);
  return f(f(q[0], q[2]), f(q[1], q[3]));
}
R1_INLINE float sum_of(Vec v) {
  return fold(v, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}
R1_INLINE float max_of(Vec v) {
  return fold(v, [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; });
}

// e^x for x <= 0: within 2 ulp of exact down to -87, 0 below (the result would be subnormal), NaN for NaN.
// x = n ln2 + r with |r| <= ln2 / 2; e^r by the degree-6 minimax polynomial of Cephes' expf; 2^n by its exponent bits.
template <typename Float, typename Bits>
R1_INLINE Float exp_by_bits(Float x) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Float shifted = x * 1.44269504f + shift;
  const Float n = shifted - shift;
  const Float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Float p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Bits bits = (__builtin_bit_cast(Bits, shifted) << 23) + 0x3F800000u;
  const Float value = p * __builtin_bit_cast(Float, bits);
  return x < -87.0f ? Float{} : value;
}
R1_INLINE float exp_nonpositive(float x) { return exp_by_bits<float, uint32_t>(x); }
R1_INLINE Vec exp_nonpositive(Vec x) { return exp_by_bits<Vec, BitVec>(x); }

}  // namespace R1_ISA
}  // namespace r1
