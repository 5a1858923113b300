// One token a row from its logits, see kernels/sample_token.py: no softmax is stored unless the row truncates, and then
// one row of it a thread. Two passes over the logits (maximum, sum of exponentials by chunk) and one chunk again.
#include <cmath>
#include <cstdlib>

#include "../common/philox.h"
#include "ops.h"
#include "simd.h"

namespace r1 {
namespace R1_ISA {

namespace {

constexpr int64_t kChunk = 256;

struct Row {
  const float* logits;
  int64_t size;
  float maximum, inverse;  // the largest logit, and 1 / temperature
  // e^((logit - maximum) / temperature): the difference first, so that its rounding is that of small numbers
  float weight(int64_t i) const { return exp_nonpositive((logits[i] - maximum) * inverse); }
};

float maximum_of(const float* x, int64_t size) {
  float found = x[0];
#pragma omp simd reduction(max : found)
  for (int64_t i = 0; i < size; ++i) found = x[i] > found ? x[i] : found;
  return found;
}

// Sum of the weights of one chunk.
float chunk_sum(const Row& row, int64_t start) {
  const int64_t end = start + kChunk < row.size ? start + kChunk : row.size;
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = start; i < end; ++i) sum += row.weight(i);
  return sum;
}

// The same 24 bits as the reference: the top of the first word of Philox with counter (position, sequence) and key seed.
float uniform(int64_t seed, int64_t sequence, int64_t position) {
  const uint64_t s = seed, q = sequence, p = position;
  const uint32_t c[6] = {static_cast<uint32_t>(p), static_cast<uint32_t>(p >> 32), static_cast<uint32_t>(q),
                         static_cast<uint32_t>(q >> 32), static_cast<uint32_t>(s), static_cast<uint32_t>(s >> 32)};
  return static_cast<float>(philox(c[0], c[1], c[2], c[3], c[4], c[5]).word[0] >> 8) * 0x1p-24f;
}

// First index whose running sum exceeds u times the sum of all chunks; `sums` holds the chunks' sums.
int64_t draw(const Row& row, const float* sums, double total, float u) {
  const double point = static_cast<double>(u) * total;
  const int64_t chunks = (row.size + kChunk - 1) / kChunk;
  double before = 0;
  int64_t chunk = 0;
  while (chunk < chunks - 1 && before + sums[chunk] <= point) before += sums[chunk++];
  const int64_t end = (chunk + 1) * kChunk < row.size ? (chunk + 1) * kChunk : row.size;
  int64_t last = chunk * kChunk;
  for (int64_t i = chunk * kChunk; i < end; ++i) {
    const float w = row.weight(i);
    if (w > 0) last = i;
    before += w;
    if (before > point) return i;
  }
  return last;  // rounding left the point a hair beyond the end of this chunk
}

// The kept tokens of a truncated row: weights above `least`, and the first `ties` of those equal to it.
struct Cut {
  float least;
  int64_t ties;
  double sum;  // of the kept weights
};

// Longest prefix of the weights in descending order that has at most `count` members and whose sum without its last
// member is less than `share`. Quickselect with three-way partition; reorders `w`.
Cut select(float* w, int64_t size, int64_t count, double share) {
  double sum = 0;  // of the weights known to be kept, `taken` of them
  int64_t taken = 0, low = 0, high = size;
  while (true) {
    const float a = w[low], b = w[low + (high - low) / 2], c = w[high - 1];
    const float pivot = a < b ? (b < c ? b : (a < c ? c : a)) : (a < c ? a : (b < c ? c : b));
    int64_t above = low, below = high;  // [low, above) > pivot, [above, below) == pivot, [below, high) < pivot
    double above_sum = 0;
    for (int64_t i = low; i < below;) {
      const float value = w[i];
      if (value > pivot) {
        above_sum += value;
        w[i++] = w[above];
        w[above++] = value;
      } else if (value < pivot) {
        w[i] = w[--below];
        w[below] = value;
      } else {
        ++i;
      }
    }
    const int64_t greater = above - low, equal = below - above;
    if (greater && (taken + greater >= count || sum + above_sum >= share)) {
      high = above;
      continue;
    }
    int64_t ties = 0;  // how many of the equal ones: each as long as the sum before it is short of the share
    const double base = sum + above_sum;
    while (ties < equal && taken + greater + ties < count && base + ties * static_cast<double>(pivot) < share) ++ties;
    if (taken + greater == 0 && ties == 0) ties = 1;
    sum = base + ties * static_cast<double>(pivot);
    if (ties < equal || below == high) return Cut{pivot, ties, sum};
    taken += greater + equal;
    low = below;
    if (taken >= count || sum >= share) return Cut{pivot, ties, sum};
  }
}

// Token of a truncated row. `weights` and `copy` hold one row each.
int64_t draw_truncated(const Row& row, float* weights, float* copy, int64_t top_k, float top_p, float u, double* kept) {
#pragma omp simd
  for (int64_t i = 0; i < row.size; ++i) weights[i] = copy[i] = row.weight(i);
  const int64_t count = top_k > 0 && top_k < row.size ? top_k : row.size;
  double total = 0;
  if (count < row.size) {
    total = select(copy, row.size, count, HUGE_VAL).sum;
    for (int64_t i = 0; i < row.size; ++i) copy[i] = weights[i];
  } else {
    for (int64_t i = 0; i < row.size; ++i) total += weights[i];
  }
  const Cut cut = select(copy, row.size, count, top_p < 1 ? static_cast<double>(top_p) * total : HUGE_VAL);
  *kept = cut.sum;
  const double point = static_cast<double>(u) * cut.sum;
  double before = 0;
  int64_t ties = cut.ties, last = 0;
  for (int64_t i = 0; i < row.size; ++i) {
    if (weights[i] < cut.least || (weights[i] == cut.least && ties-- <= 0)) continue;
    before += weights[i];
    last = i;
    if (before > point) break;
  }
  return last;
}

}  // namespace

int sample_token(const float* logits, const int64_t* seed, const int64_t* sequence, const int64_t* position,
                 const float* temperature, const int32_t* top_k, const float* top_p, int64_t* token, float* logprob,
                 float* logprob_full, int64_t rows, int64_t vocabulary) {
  for (int64_t i = 0; i < rows; ++i) {
    if (!(temperature[i] >= 0)) return 1;
    if (top_k[i] < 0) return 2;
    if (!(top_p[i] > 0)) return 3;
  }
  const int64_t chunks = (vocabulary + kChunk - 1) / kChunk;
  bool enough = true;
#pragma omp parallel if (rows * vocabulary > 32768)
  {
    // chunk sums, then room for the two rows of a truncated draw
    float* room = static_cast<float*>(std::malloc((chunks + 2 * vocabulary) * sizeof(float)));
    if (!room) {
#pragma omp atomic write
      enough = false;
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; ++i) {
      if (!room) continue;
      const bool greedy = temperature[i] == 0;
      const float* x = logits + i * vocabulary;
      const Row row{x, vocabulary, maximum_of(x, vocabulary), greedy ? 1.0f : 1.0f / temperature[i]};
      double total = 0;
      for (int64_t c = 0; c < chunks; ++c) total += room[c] = chunk_sum(row, c * kChunk);
      const bool truncated = !greedy && ((top_k[i] > 0 && top_k[i] < vocabulary) || top_p[i] < 1);
      int64_t drawn = 0;
      double kept = total;
      if (!(total < HUGE_VAL)) {
        // NaN among the logits, or an infinite one: the log-probabilities below are NaN and say so
      } else if (greedy) {
        while (x[drawn] != row.maximum) ++drawn;
      } else if (truncated) {
        float* weights = room + chunks;
        const float u = uniform(seed[i], sequence[i], position[i]);
        drawn = draw_truncated(row, weights, weights + vocabulary, top_k[i], top_p[i], u, &kept);
      } else {
        drawn = draw(row, room, total, uniform(seed[i], sequence[i], position[i]));
      }
      const double value = static_cast<double>((x[drawn] - row.maximum) * row.inverse);
      token[i] = drawn;
      logprob_full[i] = static_cast<float>(value - std::log(total));
      logprob[i] = static_cast<float>(value - std::log(kept));
    }
    std::free(room);
  }
  return enough ? 0 : 4;
}

}  // namespace R1_ISA
}  // namespace r1
