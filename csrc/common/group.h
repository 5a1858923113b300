// The group-relative advantage of DeepSeekMath (arXiv 2402.03300, section 4.1.2): A = (r - mean) / (std + eps).
// Sums are double: a group is small, and rewards of one million and a bit must not lose the bit.
#pragma once

#include <cmath>

#include "host_device.h"

namespace r1 {
namespace R1_ISA {

// Sample standard deviation (ddof = 1) from the sum of squared deviations of `count` >= 2 rewards.
R1_HD double sample_std(double squares, int64_t count) { return sqrt(squares / static_cast<double>(count - 1)); }

// What a reward less its group's mean is multiplied by; Real: double, or a vector of doubles, one for each group.
template <typename Real>
R1_HD Real advantage_scale(Real std, double eps, bool normalize) {
  const Real one = Real{} + 1.0;
  return normalize ? one / (std + eps) : one;
}

// `varies`: not all rewards of the group are equal. A group that does not vary teaches nothing and gets exact zeros;
// rounding in mean and std would else divide two errors and give it advantages of 1e-3.
R1_HD float advantage(double reward, double mean, double std, double eps, bool varies, bool normalize) {
  return varies ? static_cast<float>((reward - mean) * advantage_scale(std, eps, normalize)) : 0.0f;
}

}  // namespace R1_ISA
}  // namespace r1
