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

// The row's numbers in [0, 1), a fresh one for every halving: 24 bits each of the words of Philox with counter
// (position + 2^32 block, sequence) and key seed.
class Uniform {
 public:
  Uniform(int64_t seed, int64_t sequence, int64_t position) : seed_(seed), sequence_(sequence), position_(position) {}

  double next() {
    if (used_ % 4 == 0) {
      const uint32_t block = static_cast<uint32_t>(position_ >> 32) + used_ / 4;
      words_ = philox(static_cast<uint32_t>(position_), block, static_cast<uint32_t>(sequence_),
                      static_cast<uint32_t>(sequence_ >> 32), static_cast<uint32_t>(seed_),
                      static_cast<uint32_t>(seed_ >> 32));
    }
    return (words_.word[used_++ % 4] >> 8) * 0x1p-24;
  }

 private:
  uint64_t seed_, sequence_, position_;
  uint32_t used_ = 0;
  Philox words_{};
};

// One halving: the upper half where the number times the whole reaches the lower one.
R1_INLINE bool takes_upper(double lower, double upper, Uniform& numbers) {
  return numbers.next() * (lower + upper) >= lower && upper > 0;
}

double sum_between(const float* x, int64_t from, int64_t to) {
  double sum = 0;
  for (int64_t i = from; i < to; ++i) sum += x[i];
  return sum;
}

// Which of `size` chunks the numbers choose by their sums, by halving `width`, a power of two that holds them all.
int64_t draw_chunk(const float* sums, int64_t size, int64_t width, Uniform& numbers) {
  int64_t start = 0;
  for (int64_t half = width / 2; half > 0; half /= 2) {
    const int64_t middle = start + half < size ? start + half : size;
    const int64_t end = middle + half < size ? middle + half : size;
    if (takes_upper(sum_between(sums, start, middle), sum_between(sums, middle, end), numbers)) start += half;
  }
  return start;
}

// The token that weights in chunks choose; `sums` holds the chunks' sums, `store_chunk(chunk, out)` stores its weights.
template <typename StoreChunk>
int64_t draw(int64_t size, const float* sums, Uniform& numbers, const StoreChunk& store_chunk) {
  int64_t width = 1;
  while (width < size) width *= 2;
  int64_t chunk = 0;
  if (width > kChunk) {
    chunk = draw_chunk(sums, (size + kChunk - 1) / kChunk, width / kChunk, numbers);
    width = kChunk;
  }
  float tree[2 * kChunk] = {};  // of sums: node i has the children 2 i and 2 i + 1, the weights are the leaves
  store_chunk(chunk, tree + kChunk);
  const int64_t top = kChunk / width;  // the first node that has leaves of more than one half
  for (int64_t i = kChunk - 1; i > 0; --i) tree[i] = tree[2 * i] + tree[2 * i + 1];
  int64_t node = top;
  while (node < kChunk) node = 2 * node + takes_upper(tree[2 * node], tree[2 * node + 1], numbers);
  return chunk * kChunk + node - kChunk;
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
  bool all_ties;  // are kept
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
  return Cut{least, ties, ties >= equal, larger.sum + ties * static_cast<double>(least)};
}

// Token of a truncated row. `weights` holds one row, padded; `sums` one number a chunk.
int64_t draw_truncated(const Row& row, float* weights, float* sums, int64_t padded, int64_t top_k, float top_p,
                       Uniform& numbers, double* kept) {
  for (int64_t i = 0; i < padded; i += kLanes) store(weights + i, row.weights(i));
  const int64_t count = top_k > 0 && top_k < row.size ? top_k : row.size;
  double share = HUGE_VAL;
  if (top_p < 1) {
    const bool all = count == row.size;
    share = static_cast<double>(top_p) * (all ? above(weights, padded, 0).sum : cut(weights, padded, count, share).sum);
  }
  const Cut prefix = cut(weights, padded, count, share);
  *kept = prefix.sum;
  if (!prefix.all_ties) {
    int64_t ties = prefix.ties;
    for (int64_t i = 0; i < row.size; ++i)
      if (weights[i] == prefix.least && ties-- <= 0) weights[i] = 0;
  }
  for (int64_t start = 0; start < padded; start += kChunk) {
    Vec sum{};
    for (int64_t i = start; i < start + kChunk && i < padded; i += kLanes) {
      const Vec w = load(weights + i), held = w >= prefix.least ? w : Vec{};
      store(weights + i, held);
      sum += held;
    }
    sums[start / kChunk] = sum_of(sum);
  }
  return draw(row.size, sums, numbers, [&](int64_t chunk, float* out) {
    for (int64_t i = 0; i < kChunk && chunk * kChunk + i < padded; i += kLanes)
      store(out + i, load(weights + chunk * kChunk + i));
  });
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
      Uniform numbers(seed[i], sequence[i], position[i]);
      int64_t drawn = 0;
      double kept = total;
      if (!(total < HUGE_VAL)) {
        // NaN among the logits, or an infinite one: the log-probabilities below are NaN and say so
      } else if (greedy) {
        while (x[drawn] != row.maximum) ++drawn;
      } else if (truncated) {
        drawn = draw_truncated(row, room + chunks, room, padded, top_k[i], top_p[i], numbers, &kept);
      } else {
        drawn = draw(vocabulary, room, numbers, [&](int64_t chunk, float* out) {
          for (int64_t k = 0; k < kChunk && chunk * kChunk + k < vocabulary; k += kLanes)
            store(out + k, row.weights(chunk * kChunk + k));
        });
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
