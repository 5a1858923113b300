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

R1_INLINE Vec normalised(Vec x, float scale, Vec weight) { return x * scale * weight; }

}  // namespace R1_ISA
}  // namespace r1
