// One row of GRPO's loss: DeepSeekMath (arXiv 2402.03300) eq. 3 and 4 with the sign turned, and Schulman's estimators
// k1, k2, k3 of the KL divergence. The contract is in kernels/grpo_loss.py.
//     r = exp(logp - old),   loss = w (-min(r A, clip(r, low, high) A) + c kl),   slope = d loss / d logp
#pragma once

#include "host_device.h"

namespace r1 {
namespace R1_ISA {

enum KLKind : int { kNoKL = 0, kK1 = 1, kK2 = 2, kK3 = 3 };

struct PolicySettings {
  float low, high;  // bounds of the ratio: 1 - clip_low and 1 + clip_high
  float kl_coef;
  int kl_kind;
};

template <typename Float>
struct PolicyRow {
  Float loss, slope;               // both times the weight
  Float ratio, kl, clipped, live;  // for the statistics; clipped and live are 0 or 1; all 0 where the weight is
};

// Float is float, or a SIMD vector of them; Math has exp and expm1 for it. Comparisons stand so that a NaN stays NaN, and
// values of rows of weight 0 are never used: they may be NaN.
template <typename Math, typename Float>
R1_HD PolicyRow<Float> policy_row(Float logp, Float old_logp, Float ref_logp, Float advantage, Float weight,
                                  const PolicySettings& s) {
  const Float zero{}, one = zero + 1.0f, low = zero + s.low, high = zero + s.high;
  const auto live = weight != zero;
  const Float ratio = Math::exp(logp - old_logp);
  const Float surrogate = ratio * advantage;
  const Float held = (ratio < low ? low : (ratio > high ? high : ratio)) * advantage;
  const auto clipped = held < surrogate;  // the bound is the smaller: it is the loss, and it does not move with logp
  Float loss = clipped ? -held : -surrogate;
  Float slope = clipped ? zero : -surrogate;
  Float kl = zero;
  if (s.kl_kind != kNoKL) {
    const Float difference = ref_logp - logp;
    Float kl_slope = one;
    if (s.kl_kind == kK1) {
      kl = -difference;
    } else if (s.kl_kind == kK2) {
      kl = 0.5f * difference * difference;
      kl_slope = -difference;
    } else {
      const Float grown = Math::expm1(difference);
      kl = grown - difference;
      kl_slope = -grown;
    }
    if (s.kl_coef != 0) {
      loss += s.kl_coef * kl;
      slope += s.kl_coef * kl_slope;
    }
  }
  return {live ? weight * loss : zero, live ? weight * slope : zero,    live ? ratio : zero,
          live ? kl : zero,            (live & clipped) ? one : zero, live ? one : zero};
}

}  // namespace R1_ISA
}  // namespace r1
