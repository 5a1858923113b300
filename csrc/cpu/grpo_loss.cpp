// GRPO's loss, its slope and its statistics in one pass. See kernels/grpo_loss.py for the contract.
#include "../common/policy.h"
#include "ops.h"
#include "simd.h"

namespace r1 {
namespace R1_ISA {

namespace {

// Rows are added up in this many parts whatever the number of threads, so that the sums do not depend on it.
constexpr int kParts = 64;

struct Math {
  static R1_INLINE Vec exp(Vec x) { return exp_any(x); }
  static R1_INLINE Vec expm1(Vec x) { return expm1_any(x); }
};

struct Sums {
  Vec kl, clipped, ratio, count, largest;
};

}  // namespace

void grpo_loss(const float* logp, const float* old_logp, const float* ref_logp, const float* advantages,
               const float* weights, int64_t rows, float low, float high, float kl_coef, int kl_kind, float* loss,
               float* slope, float* stats) {
  const PolicySettings settings{low, high, kl_coef, kl_kind};
  const int64_t vectors = (rows + kLanes - 1) / kLanes, part = (vectors + kParts - 1) / kParts;
  float sums[kParts][5];
#pragma omp parallel for schedule(static) if (rows > 32768)
  for (int p = 0; p < kParts; ++p) {
    const int64_t end = (p + 1) * part < vectors ? (p + 1) * part : vectors;
    Sums own{};
    for (int64_t v = p * part; v < end; ++v) {
      const int64_t i = v * kLanes, left = rows - i;  // lanes past the end have weight 0
      const PolicyRow<Vec> row =
          policy_row<Math>(load(logp + i, left), load(old_logp + i, left), load(ref_logp + i, left),
                           load(advantages + i, left), load(weights + i, left), settings);
      store(loss + i, row.loss, left);
      store(slope + i, row.slope, left);
      own.kl += row.kl;
      own.clipped += row.clipped;
      own.ratio += row.ratio;
      own.count += row.live;
      own.largest = larger(row.ratio, own.largest);
    }
    const float found[5] = {sum_of(own.kl), sum_of(own.clipped), sum_of(own.ratio), sum_of(own.count),
                            max_of(own.largest)};
    for (int i = 0; i < 5; ++i) sums[p][i] = found[i];
  }
  for (int i = 0; i < 5; ++i) {
    double sum = 0;
    float largest = 0;
    for (int p = 0; p < kParts; ++p) {
      sum += sums[p][i];
      largest = sums[p][i] > largest ? sums[p][i] : largest;
    }
    stats[i] = i < 4 ? static_cast<float>(sum) : largest;
  }
}

}  // namespace R1_ISA
}  // namespace r1
