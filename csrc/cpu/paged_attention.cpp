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

constexpr int kTile = 64;        // positions whose scores are held at once
constexpr int kQueries = 4096;   // floats of one key head's queries, and of their sums, on the stack

struct Cache {
  const float *keys, *values;
  int64_t block, kv_heads;
};

// WIDTH 0 takes the width at run time; the usual head widths are constants, which unrolls the loops.
template <int WIDTH>
float dot(const float* a, const float* b, int64_t width) {
  const int64_t size = WIDTH ? WIDTH : width;
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += a[i] * b[i];
  return sum;
}

// sum = sum * keep + weights @ values, over `count` positions.
template <int WIDTH>
void add_values(float* sum, float keep, const float* weights, const float* const* values, int count, int64_t width) {
  const int64_t size = WIDTH ? WIDTH : width;
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) sum[i] *= keep;
  int p = 0;
  for (; p + 4 <= count; p += 4) {
    const float *v0 = values[p], *v1 = values[p + 1], *v2 = values[p + 2], *v3 = values[p + 3];
    const float w0 = weights[p], w1 = weights[p + 1], w2 = weights[p + 2], w3 = weights[p + 3];
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) sum[i] += (w0 * v0[i] + w1 * v1[i]) + (w2 * v2[i] + w3 * v3[i]);
  }
  for (; p < count; ++p) {
    const float w = weights[p];
    const float* v = values[p];
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) sum[i] += w * v[i];
  }
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
    for (int p = 0; p < count; ++p) {
      const int64_t slot = table[(start + p) / cache.block] * cache.block + (start + p) % cache.block;
      keys[p] = cache.keys + (slot * cache.kv_heads + head) * width;
      values[p] = cache.values + (slot * cache.kv_heads + head) * width;
    }
    for (int64_t h = 0; h < group; ++h) {
      float scores[kTile];
      for (int p = 0; p < count; ++p) scores[p] = dot<WIDTH>(queries + h * width, keys[p], width);
      float maximum = maxima[h];
#pragma omp simd reduction(max : maximum)
      for (int p = 0; p < count; ++p) maximum = scores[p] > maximum ? scores[p] : maximum;
      float total = 0;
#pragma omp simd reduction(+ : total)
      for (int p = 0; p < count; ++p) total += scores[p] = exp_nonpositive(scores[p] - maximum);
      const float keep = exp_nonpositive(maxima[h] - maximum);
      totals[h] = totals[h] * keep + total;
      maxima[h] = maximum;
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

bool paged_append(const float* k, int64_t k_stride, const float* v, int64_t v_stride, float* keys, float* values,
                  const int64_t* slots, int64_t tokens, int64_t row, int64_t all_slots) {
  for (int64_t t = 0; t < tokens; ++t)
    if (slots[t] < 0 || slots[t] >= all_slots) return false;
  for (int64_t t = 0; t < tokens; ++t) {
    std::memcpy(keys + slots[t] * row, k + t * k_stride, row * sizeof(float));
    std::memcpy(values + slots[t] * row, v + t * v_stride, row * sizeof(float));
  }
  return true;
}

}  // namespace R1_ISA
}  // namespace r1
