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

// The gradient of a norm's weight, from the sums of `parts` parts of the rows, `stride` apart: in double, in their order.
inline void add_parts(const float* sums, int64_t parts, int64_t stride, int64_t width, float* d_weight) {
  for (int64_t d = 0; d < width; ++d) {
    double sum = 0;
    for (int64_t p = 0; p < parts; ++p) sum += sums[p * stride + d];
    d_weight[d] = static_cast<float>(sum);
  }
}

R1_INLINE Vec normalised(Vec x, float scale, Vec weight) { return x * scale * weight; }

}  // namespace R1_ISA
}  // namespace r1
