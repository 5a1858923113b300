// The formula of RMSNorm, for the op of that name and for those that it is fused into: the same bits in all of them.
#pragma once

#include <math.h>

#include "simd.h"

namespace r1 {
namespace R1_ISA {

// 1 / sqrt(mean of the squares + eps), from the lanes' sums of a row's squares.
R1_INLINE float inverse_rms(Vec squares, int64_t width, float eps) {
  return 1.0f / sqrtf(fma(sum_of(squares), 1.0f / static_cast<float>(width), eps));
}

// The gradient of a norm's weight, from the sums of `parts` parts of the rows, `stride` apart: double, in their order.
// Some columns at a time: of one alone, each addition waits for the one before.
inline void add_parts(const float* sums, int64_t parts, int64_t stride, int64_t width, float* d_weight) {
  constexpr int64_t kColumns = 32;
  for (int64_t first = 0; first < width; first += kColumns) {
    const int64_t count = width - first < kColumns ? width - first : kColumns;
    double found[kColumns] = {};
    for (int64_t p = 0; p < parts; ++p)
      for (int64_t i = 0; i < count; ++i) found[i] += sums[p * stride + first + i];
    for (int64_t i = 0; i < count; ++i) d_weight[first + i] = static_cast<float>(found[i]);
  }
}

R1_INLINE Vec normalised(Vec x, float scale, Vec weight) { return x * scale * weight; }

}  // namespace R1_ISA
}  // namespace r1
