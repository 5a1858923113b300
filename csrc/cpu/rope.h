// The rotation of a head, for the op of that name and for those that it is fused into with the norm before it: the same
// bits in all of them.
#pragma once

#include "norm.h"

namespace r1 {
namespace R1_ISA {

constexpr int64_t kLargestHead = 1024;  // that is normalised on the stack

// A pass over rows for the usual half heads, known at compile time, and for any other.
#define R1_BY_HALF(function, half)   \
  ((half) == 8    ? function<8>      \
   : (half) == 16 ? function<16>     \
   : (half) == 32 ? function<32>     \
   : (half) == 64 ? function<64>     \
                  : function<0>)

// HALF: known at compile time for the usual head sizes, so that a half of 8 takes one short vector; 0: `half` says.
template <int64_t HALF>
R1_INLINE void rotate(const float* x, const float* cos, const float* sin, float turn, int64_t half, float* out) {
  const int64_t count = HALF ? HALF : half;
  const float* second = x + count;
#pragma omp simd
  for (int64_t d = 0; d < count; ++d) {
    const float s = turn * sin[d];
    out[d] = fma(x[d], cos[d], -(second[d] * s));
    out[count + d] = fma(second[d], cos[d], x[d] * s);
  }
}

// A head, normalised first where a weight is given, as rms_norm and then rope would do it.
template <int64_t HALF>
R1_INLINE void norm_and_rotate(const float* x, const float* weight, float eps, const float* cos, const float* sin,
                               int64_t half, float* out) {
  const int64_t width = HALF ? 2 * HALF : 2 * half;
  float unit[HALF ? 2 * HALF : kLargestHead];
  if (weight) {
    Vec squares{};
    for (int64_t d = 0; d < width; d += kLanes) {
      const Vec v = load(x + d, width - d);
      squares = fma(v, v, squares);
    }
    const float scale = inverse_rms(squares, width, eps);
    for (int64_t d = 0; d < width; d += kLanes)
      store(unit + d, normalised(load(x + d, width - d), scale, load(weight + d, width - d)), width - d);
    x = unit;
  }
  rotate<HALF>(x, cos, sin, 1.0f, half, out);
}

}  // namespace R1_ISA
}  // namespace r1
