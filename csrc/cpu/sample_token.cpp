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

constexpr int64_t kChunk = 4 * kLanes;

struct Row {
  const float* logits;
  int64_t size;
  float maximum, inverse;  // the largest logit, and 1 / temperature

  // e^((logit - maximum) / temperature) of the kLanes tokens from i on, zero past the end. The difference comes first, so
  // that its rounding is that of small numbers.
  R1_INLINE Vec weights(int64_t i) const {
    const bool whole = i + kLanes <= size;
    const Vec x = whole ? load(logits + i) : load_part(logits + i, size - i, -HUGE_VALF);
    return exp_nonpositive((x - maximum) * inverse);
  }
};

float maximum_of(const float* x, int64_t size) {
  Vec found = x[0] - Vec{};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) found = larger(load(x + i), found);
  if (i < size) found = larger(load_part(x + i, size - i, x[0]), found);
  return max_of(found);
}

// Sum of the weights of one chunk.
float chunk_sum(const Row& row, int64_t start) {
  Vec sum{};
  for (int64_t i = start; i < start + kChunk && i < row.size; i += kLanes) sum += row.weights(i);
  return sum_of(sum);
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
  float weights[kChunk] = {};
  const int64_t start = chunk * kChunk, count = row.size - start < kChunk ? row.size - start : kChunk;
  for (int64_t i = 0; i < count; i += kLanes) store(weights + i, row.weights(start + i));
  int64_t last = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (weights[i] > 0) last = i;
    before += weights[i];
    if (before > point) break;
  }
  return start + last;  // without the break, rounding left the point a hair beyond the end of this chunk
}

struct Above {
  double sum;
  int64_t count;
};

// Sum and number of the weights above `least`; `padded` is a multiple of kLanes. Never smaller for a smaller `least`, also
// in floating point: rounding is monotonic, and the order of addition is fixed.
Above above(const float* weights, int64_t padded, float least) {
  Above found{0, 0};
  for (int64_t start = 0; start < padded; start += 64 * kLanes) {
    const int64_t end = start + 64 * kLanes < padded ? start + 64 * kLanes : padded;
    Vec sum{};
    IntVec count{};
    for (int64_t i = start; i < end; i += kLanes) {
      const Vec w = load(weights + i);
      const IntVec larger = w > least;
      sum += larger ? w : Vec{};
      count -= larger;
    }
    found.sum += sum_of(sum);
    for (int lane = 0; lane < kLanes; ++lane) found.count += count[lane];
  }
  return found;
}

// The kept tokens of a truncated row: weights above `least`, and the first `ties` of those equal to it.
struct Cut {
  float least;
  int64_t ties;
  double sum;  // of the kept weights
};

// Longest prefix of the weights in descending order that has at most `count` members and whose sum without its last
// member is less than `share`. Nothing is sorted: bisection over the bits of the smallest kept weight, 31 vector passes
// at most (256 rows of 250 words: 0.28 ms in all, where a quickselect with its mispredicted branches took 0.91).
Cut cut(const float* weights, int64_t padded, int64_t count, double share) {
  const auto keeps = [&](uint32_t bits) {
    const Above larger = above(weights, padded, __builtin_bit_cast(float, bits));
    return larger.count < count && larger.sum < share;
  };
  uint32_t low = 0, high = 0x3F800000u;  // 1.0, the weight of the likeliest token, is always kept
  if (keeps(low)) {
    high = low;
  } else {
    while (high - low > 1) {
      const uint32_t middle = low + (high - low) / 2;
      (keeps(middle) ? high : low) = middle;
    }
  }
  const float least = __builtin_bit_cast(float, high);
  const Above larger = above(weights, padded, least);
  int64_t equal = 0, ties = 1;
  for (int64_t i = 0; i < padded; ++i) equal += weights[i] == least;
  while (ties < equal && larger.count + ties < count && larger.sum + ties * static_cast<double>(least) < share) ++ties;
  return Cut{least, ties, larger.sum + ties * static_cast<double>(least)};
}

// Token of a truncated row. `weights` holds one row, padded.
int64_t draw_truncated(const Row& row, float* weights, int64_t padded, int64_t top_k, float top_p, float u,
                       double* kept) {
  for (int64_t i = 0; i < padded; i += kLanes) store(weights + i, row.weights(i));
  const int64_t count = top_k > 0 && top_k < row.size ? top_k : row.size;
  double share = HUGE_VAL;
  if (top_p < 1) {
    const bool all = count == row.size;
    share = static_cast<double>(top_p) * (all ? above(weights, padded, 0).sum : cut(weights, padded, count, share).sum);
  }
  const Cut prefix = cut(weights, padded, count, share);
  *kept = prefix.sum;
  const double point = static_cast<double>(u) * prefix.sum;
  double before = 0;
  int64_t ties = prefix.ties, last = 0;
  for (int64_t i = 0; i < row.size; ++i) {
    if (weights[i] < prefix.least || (weights[i] == prefix.least && ties-- <= 0)) continue;
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
    // chunk sums, then room for the weights of a truncated draw
    const int64_t padded = (vocabulary + kLanes - 1) / kLanes * kLanes;
    float* room = static_cast<float*>(std::malloc((chunks + padded) * sizeof(float)));
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
        const float u = uniform(seed[i], sequence[i], position[i]);
        drawn = draw_truncated(row, room + chunks, padded, top_k[i], top_p[i], u, &kept);
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
