// Decode attention over the paged cache, and the write into it, in float32. See kernels/paged_attention.py.
// Scores, softmax and the weighted sum go tile by tile with a running maximum (Milakov & Gimelshein 2018), so nothing is
// gathered or stored per context.
#include <cmath>
#include <cstring>

#include "ops.h"
#include "simd.h"

namespace r1 {
namespace R1_ISA {

namespace {

constexpr int kTile = 64;       // positions whose scores are held at once
constexpr int kQueries = 4096;  // floats of one key head's queries, and of their sums, on the stack

struct Cache {
  const float *keys, *values;
  int64_t block, kv_heads;
};

// WIDTH 0 takes the width at run time; the usual head widths are constants, which keeps whole heads in registers.
template <int WIDTH>
R1_INLINE float dot(const float* a, const float* b, int64_t width) {
  const int64_t size = WIDTH ? WIDTH : width, whole = size / kLanes * kLanes;
  Vec sum{};
  for (int64_t i = 0; i < whole; i += kLanes) sum += load(a + i) * load(b + i);
  float found = sum_of(sum);
  for (int64_t i = whole; i < size; ++i) found += a[i] * b[i];
  return found;
}

// sum = sum * keep + weights @ values over `count` positions, for the VECTORS * kLanes floats from `at` on.
template <int VECTORS>
R1_INLINE void add_part(float* sum, float keep, const float* weights, const float* const* values, int count,
                        int64_t at) {
  constexpr int kChains = VECTORS < 4 ? 4 / VECTORS : 1;  // independent sums, to cover the latency of an addition
  Vec total[kChains][VECTORS] = {};
  int p = 0;
  for (; p + kChains <= count; p += kChains)
    for (int c = 0; c < kChains; ++c)
      for (int v = 0; v < VECTORS; ++v) total[c][v] += weights[p + c] * load(values[p + c] + at + v * kLanes);
  for (; p < count; ++p)
    for (int v = 0; v < VECTORS; ++v) total[0][v] += weights[p] * load(values[p] + at + v * kLanes);
  for (int v = 0; v < VECTORS; ++v) {
    Vec found = total[0][v];
    for (int c = 1; c < kChains; ++c) found += total[c][v];
    store(sum + at + v * kLanes, load(sum + at + v * kLanes) * keep + found);
  }
}

template <int WIDTH>
R1_INLINE void add_values(float* sum, float keep, const float* weights, const float* const* values, int count,
                          int64_t width) {
  if constexpr (WIDTH > 0) {
    add_part<WIDTH / kLanes>(sum, keep, weights, values, count, 0);
  } else {
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) add_part<1>(sum, keep, weights, values, count, i);
    for (; i < width; ++i) {
      sum[i] *= keep;
      for (int p = 0; p < count; ++p) sum[i] += weights[p] * values[p][i];
    }
  }
}

// Softmax weights of one tile against a running maximum: scores become e^(score - maximum); returns their sum.
R1_INLINE float exponentials(float* scores, int count, float* maximum) {
  for (int p = count; p % kLanes; ++p) scores[p] = -HUGE_VALF;
  Vec highest = *maximum - Vec{};
  for (int p = 0; p < count; p += kLanes) highest = larger(load(scores + p), highest);
  *maximum = max_of(highest);
  Vec total{};
  for (int p = 0; p < count; p += kLanes) {
    const Vec e = exp_nonpositive(load(scores + p) - *maximum);
    store(scores + p, e);
    total += e;
  }
  return sum_of(total);
}

// All query heads of one key head of one sequence.
template <int WIDTH>
void attend(const float* q, float* out, const Cache& cache, const int32_t* table, int64_t context, int64_t head,
            int64_t group, int64_t width, float scale) {
  float queries[kQueries], sums[kQueries], maxima[kQueries], totals[kQueries];
  for (int64_t i = 0; i < group * width; ++i) queries[i] = q[i] * scale, sums[i] = 0;
  for (int64_t h = 0; h < group; ++h) maxima[h] = -HUGE_VALF, totals[h] = 0;
  for (int64_t start = 0; start < context; start += kTile) {
    const int count = static_cast<int>(context - start < kTile ? context - start : kTile);
    const float *keys[kTile], *values[kTile];
    for (int p = 0; p < count;) {
      const int64_t index = (start + p) / cache.block;
      int64_t offset = (start + p) % cache.block;
      for (; offset < cache.block && p < count; ++offset, ++p) {
        const int64_t row = ((table[index] * cache.block + offset) * cache.kv_heads + head) * width;
        keys[p] = cache.keys + row;
        values[p] = cache.values + row;
      }
    }
    for (int64_t h = 0; h < group; ++h) {
      float scores[kTile];
      for (int p = 0; p < count; ++p) scores[p] = dot<WIDTH>(queries + h * width, keys[p], width);
      const float before = maxima[h];
      const float total = exponentials(scores, count, &maxima[h]);
      const float keep = exp_nonpositive(before - maxima[h]);
      totals[h] = totals[h] * keep + total;
      add_values<WIDTH>(sums + h * width, keep, scores, values, count, width);
    }
  }
  for (int64_t h = 0; h < group; ++h)
    for (int64_t i = 0; i < width; ++i) out[h * width + i] = sums[h * width + i] / totals[h];
}

}  // namespace

int paged_attention(const float* q, int64_t q_stride, const float* keys, const float* values, const int32_t* tables,
                    int64_t table_stride, const int32_t* contexts, float* out, int64_t sequences, int64_t heads,
                    int64_t kv_heads, int64_t width, int64_t blocks, int64_t block, int64_t columns, float scale) {
  const int64_t group = heads / kv_heads;
  if (group * width > kQueries) return 1;
  int64_t positions = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    if (contexts[s] < 1 || contexts[s] > columns * block) return 2;
    for (int64_t b = 0; b * block < contexts[s]; ++b)
      if (tables[s * table_stride + b] < 0 || tables[s * table_stride + b] >= blocks) return 3;
    positions += contexts[s];
  }
  const Cache cache{keys, values, block, kv_heads};
  // Contexts differ in length, so the items are dealt out one after another.
#pragma omp parallel for schedule(dynamic, 4) if (positions * heads * width > 65536)
  for (int64_t item = 0; item < sequences * kv_heads; ++item) {
    const int64_t s = item / kv_heads, head = item % kv_heads;
    const float* queries = q + s * q_stride + head * group * width;
    float* target = out + (s * heads + head * group) * width;
    const int32_t* table = tables + s * table_stride;
    auto run = width == 16    ? attend<16>
               : width == 32  ? attend<32>
               : width == 64  ? attend<64>
               : width == 128 ? attend<128>
                              : attend<0>;
    run(queries, target, cache, table, contexts[s], head, group, width, scale);
  }
  return 0;
}

void paged_append(const float* k, int64_t k_stride, const float* v, int64_t v_stride, float* keys, float* values,
                  const int64_t* slots, int64_t tokens, int64_t row) {
  for (int64_t t = 0; t < tokens; ++t) {
    std::memcpy(keys + slots[t] * row, k + t * k_stride, row * sizeof(float));
    std::memcpy(values + slots[t] * row, v + t * v_stride, row * sizeof(float));
  }
}

}  // namespace R1_ISA
}  // namespace r1
