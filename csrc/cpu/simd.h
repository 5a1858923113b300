// Floats by the vector, in the compiler's vector extension: one source, as wide as the instruction set it is compiled
// for. (GCC 12 ends a loop under `omp simd reduction` with sixteen additions in a row, and leaves some of our loops
// scalar for fear of aliasing: written out, decode attention takes 0.21 ms where it took 0.56. A vector wider than the
// machine's is no way out: its comparisons and selections become one scalar comparison a lane.)
#pragma once

#include <cstring>

#ifdef __aarch64__
#include <arm_neon.h>
#endif

#include "../common/host_device.h"

#define R1_INLINE inline __attribute__((always_inline))

namespace r1 {
namespace R1_ISA {

#if defined(__AVX512F__) || defined(R1_EMULATED_TILES)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int64_t kLine = 16;  // floats of a line of the cache
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));  // also what a comparison gives: -1 where it holds
typedef uint32_t BitVec __attribute__((vector_size(4 * kLanes)));

R1_INLINE Vec all(float x) { return x - Vec{}; }

R1_INLINE Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
R1_INLINE void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }
// The first `count` < kLanes lanes from memory, the others `fill`.
R1_INLINE Vec load_part(const float* from, int64_t count, float fill) {
  Vec v = all(fill);
  std::memcpy(&v, from, count * sizeof(float));
  return v;
}
// A vector, or the first `count` lanes where fewer are left; the others are zero, and their memory is not touched.
R1_INLINE Vec load(const float* from, int64_t count) { return count < kLanes ? load_part(from, count, 0) : load(from); }
R1_INLINE void store(float* to, Vec v, int64_t count) {
  if (count < kLanes)
    std::memcpy(to, &v, count * sizeof(float));
  else
    store(to, v);  // a size known to the compiler: one instruction
}
R1_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// a b + c: rounded once where the machine can, twice elsewhere. Written out wherever two paths promise the same bits:
// what `a * b + c` becomes the compiler decides place by place, and so could decide otherwise in one path than in
// another: bits of one row and of several differed in a build with sanitizers.
R1_INLINE float fma(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
R1_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#elif !defined(__FMA__) || defined(R1_EMULATED_TILES)
  return a * b + c;
#elif defined(__clang__)
  return __builtin_elementwise_fma(a, b, c);
#elif defined(__AVX512F__)  // what <immintrin.h> calls; reading that header would be a tenth of the build's time
  return __builtin_ia32_vfmaddps512_mask(a, b, c, -1, 4);
#else
  return __builtin_ia32_vfmaddps256(a, b, c);
#endif
}
R1_INLINE Vec fma(float a, Vec b, Vec c) { return fma(all(a), b, c); }

// 0, 1, 2, ...
R1_INLINE IntVec lane_numbers() {
  IntVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane;
}

// Lane i takes lane i ^ STEP.
template <int STEP>
R1_INLINE Vec swapped(Vec v) {
#if defined(__clang__)
  Vec w;
  for (int i = 0; i < kLanes; ++i) w[i] = v[i ^ STEP];
  return w;
#else
  return __builtin_shuffle(v, lane_numbers() ^ STEP);  // GCC 11 has no __builtin_shufflevector
#endif
}

// Lane i of a where bit STEP of i is not set, else of b: a blend whose mask the compiler knows.
template <int STEP>
R1_INLINE Vec by_bit(Vec a, Vec b) {
#if defined(__clang__)
  Vec w;
  for (int i = 0; i < kLanes; ++i) w[i] = i & STEP ? b[i] : a[i];
  return w;
#else
  const IntVec lane = lane_numbers();
  return __builtin_shuffle(a, b, lane + ((lane & STEP) / STEP) * kLanes);
#endif
}

R1_INLINE float sum_of(Vec v) {
  if (kLanes > 8) v += swapped<8 % kLanes>(v);
  if (kLanes > 4) v += swapped<4 % kLanes>(v);
  v += swapped<2>(v);
  v += swapped<1>(v);
  return v[0];
}
R1_INLINE float max_of(Vec v) {
  if (kLanes > 8) v = larger(v, swapped<8 % kLanes>(v));
  if (kLanes > 4) v = larger(v, swapped<4 % kLanes>(v));
  v = larger(v, swapped<2>(v));
  v = larger(v, swapped<1>(v));
  return v[0];
}

// Lane i takes a[i], or b[i ^ STEP] where bit STEP of i is set; and lane i of the other one b[i], or a[i ^ STEP] where not.
// One instruction where the machine has it: for pairs and quads of lanes.
template <int STEP>
R1_INLINE Vec upper_of_swapped(Vec a, Vec b) {
#if defined(__clang__)
  Vec w;
  for (int i = 0; i < kLanes; ++i) w[i] = i & STEP ? b[i ^ STEP] : a[i];
  return w;
#else
  const IntVec lane = lane_numbers(), odd = (lane & STEP) / STEP;
  return __builtin_shuffle(a, b, lane + odd * (kLanes - STEP));
#endif
}
template <int STEP>
R1_INLINE Vec lower_of_swapped(Vec a, Vec b) {
#if defined(__clang__)
  Vec w;
  for (int i = 0; i < kLanes; ++i) w[i] = i & STEP ? b[i] : a[i ^ STEP];
  return w;
#else
  const IntVec lane = lane_numbers(), odd = (lane & STEP) / STEP;
  return __builtin_shuffle(a, b, lane + STEP + odd * (kLanes - STEP));
#endif
}

// One step of a transposition: in each pair of rows STEP apart, the off-diagonal blocks of STEP lanes change places.
template <int STEP>
R1_INLINE void exchange(Vec* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & STEP)) {
      const Vec a = rows[i], b = rows[i | STEP];
      rows[i] = upper_of_swapped<STEP>(a, b);
      rows[i | STEP] = lower_of_swapped<STEP>(a, b);
    }
}

// Of a square of kLanes rows.
R1_INLINE void transpose_square(Vec* rows) {
  exchange<1>(rows);
  exchange<2>(rows);
  if (kLanes > 4) exchange<4 % kLanes>(rows);
  if (kLanes > 8) exchange<8 % kLanes>(rows);
}

// e^x = power (1 + fraction) for -87 <= x <= 88.3.
// x = n ln2 + r with |r| <= ln2 / 2; e^r by the degree-6 minimax polynomial of Cephes' expf; 2^n by its exponent bits.
template <typename Float>
struct Exponential {
  Float power, fraction;
};
template <typename Float, typename Bits>
R1_INLINE Exponential<Float> exponential(Float x) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Float zero{};               // number - zero: that number in every lane
  const Float shifted = fma(1.44269504f - zero, x, shift - zero);
  const Float n = shifted - shift;
  const Float r = fma(2.12194440e-4f - zero, n, fma(-0.693359375f - zero, n, x));
  Float p = fma(1.9875691500e-4f - zero, r, 1.3981999507e-3f - zero);
  p = fma(p, r, 8.3334519073e-3f - zero);
  p = fma(p, r, 4.1665795894e-2f - zero);
  p = fma(p, r, 1.6666665459e-1f - zero);
  p = fma(p, r, 5.0000001201e-1f - zero);
  const Bits bits = (__builtin_bit_cast(Bits, shifted) << 23) + 0x3F800000u;
  return {__builtin_bit_cast(Float, bits), fma(p, r * r, r)};
}
// e^x for x <= 88.3: within 2 ulp of exact down to -87, 0 below (the result would be subnormal), NaN for NaN.
template <typename Float, typename Bits>
R1_INLINE Float exp_by_bits(Float x) {
  const Exponential<Float> e = exponential<Float, Bits>(x);
  const Float value = (e.fraction + 1.0f) * e.power;
  return x < -87.0f ? Float{} : value;
}
R1_INLINE float exp_nonpositive(float x) { return exp_by_bits<float, uint32_t>(x); }
R1_INLINE Vec exp_nonpositive(Vec x) { return exp_by_bits<Vec, BitVec>(x); }
// For any x; above 88.3 it is e^88.3.
R1_INLINE Vec exp_any(Vec x) { return exp_by_bits<Vec, BitVec>(x > 88.3f ? all(88.3f) : x); }
// e^x - 1 for any x, with no digits lost near 0; above 88.3 it is that of 88.3.
R1_INLINE Vec expm1_any(Vec x) {
  const Exponential<Vec> e = exponential<Vec, BitVec>(x > 88.3f ? all(88.3f) : x);
  const Vec value = fma(e.power, e.fraction, e.power - 1.0f);
  return x < -87.0f ? all(-1.0f) : value;
}

// 1 / (1 + e^-x)
R1_INLINE Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp_any(-x)); }

}  // namespace R1_ISA
}  // namespace r1
