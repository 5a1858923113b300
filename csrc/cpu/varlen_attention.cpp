// Causal attention of packed sequences, forward and backward. See kernels/varlen_attention.py for the contract.
//
// A task is one sequence and one key head with its group of query heads; tasks are independent and each runs in one
// fixed order, so results do not depend on the number of threads. Every product is `product`: a tile of kRows rows, up
// to three vectors wide, in registers; its right operand is read by vectors (so keys and values are transposed once a
// task), its left one by single elements at strides known to the compiler (so rows of q are copied first, scaled on the
// way, and a transposed left operand is free).
// Scores exist for one tile of query rows and at most kKeys keys; the forward pass keeps a running maximum over blocks
// of keys (Milakov & Gimelshein 2018; Dao et al. 2022, algorithm 1) and saves it with the inverse of the sum of
// exponentials, from which the backward pass makes the probabilities again (ibid., algorithm 4; its log-sum-exp would
// cost a logarithm a row, a fifth of the forward pass of short sequences).
#include <math.h>

#include "ops.h"
#include "scratch.h"

namespace r1 {
namespace R1_ISA {
namespace {

constexpr int kRows = kLanes == 16 ? 8 : 4;  // times three vectors: 24 of AVX-512's 32 registers, 12 of 16 elsewhere
constexpr int64_t kKeys = 128;               // keys of a block of scores; a multiple of kQueries
constexpr int64_t kQueries = 32;             // query rows of a backward tile; a multiple of kRows
constexpr int64_t kLargest = 256;            // head size
// Row strides of tiles; not powers of two, whose rows would fall on one another in the cache.
constexpr int64_t kScores = kKeys + kLanes, kWide = kLargest + kLanes;
constexpr int64_t kSerial = 1 << 22;  // multiply-adds under which threads cost more than they give

// c[r, 0 : NV * kLanes] (+)= sum over i < count of a[r * ROW + i * STEP] * b[i * b_row, 0 : NV * kLanes], r < kRows
template <int64_t ROW, int64_t STEP, int NV>
inline void tile(const float* a, const float* b, int64_t b_row, int64_t count, float* c, int64_t c_row, bool add) {
  Vec sums[kRows][NV];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < NV; ++v) sums[r][v] = add ? load(c + r * c_row + v * kLanes) : Vec{};
  for (int64_t i = 0; i < count; ++i, b += b_row, a += STEP) {
    Vec right[NV];
    for (int v = 0; v < NV; ++v) right[v] = load(b + v * kLanes);
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < NV; ++v) sums[r][v] += a[r * ROW] * right[v];
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < NV; ++v) store(c + r * c_row + v * kLanes, sums[r][v]);
}

// The same for `width` columns, a multiple of kLanes.
template <int64_t ROW, int64_t STEP>
inline void product(const float* a, const float* b, int64_t b_row, int64_t count, float* c, int64_t c_row,
                    int64_t width, bool add) {
  for (int64_t at = 0, left = width / kLanes; left > 0;) {
    const int64_t now = left == 3 || left > 4 ? 3 : left > 1 ? 2 : 1;
    if (now == 3)
      tile<ROW, STEP, 3>(a, b + at, b_row, count, c + at, c_row, add);
    else if (now == 2)
      tile<ROW, STEP, 2>(a, b + at, b_row, count, c + at, c_row, add);
    else
      tile<ROW, STEP, 1>(a, b + at, b_row, count, c + at, c_row, add);
    at += now * kLanes;
    left -= now;
  }
}

struct Shape {
  int64_t heads, kv_heads, dim, wide;  // wide: dim rounded up to whole vectors
  float scale;
};

// Rows first to first + kRows of a matrix of `count` rows, times `scale`, kWide apart; zeros past its end.
void copy_rows(const float* data, int64_t row, int64_t first, int64_t count, int64_t dim, float scale, float* to) {
  for (int64_t r = 0; r < kRows; ++r, to += kWide)
    for (int64_t d = 0; d < dim; d += kLanes)
      store(to + d, first + r < count ? load(data + (first + r) * row + d, dim - d) * scale : Vec{});
}

// Rows that can be read by whole vectors: where they lie, or a copy padded with zeros.
struct Vectors {
  const float* data;
  int64_t row;
};

Vectors vectors_of(const float* data, int64_t row, int64_t count, const Shape& shape, float* copy) {
  if (shape.dim == shape.wide) return {data, row};
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d = 0; d < shape.wide; ++d) copy[i * shape.wide + d] = d < shape.dim ? data[i * row + d] : 0.0f;
  return {copy, shape.wide};
}

// Blocks of `stride` rows, each transposed: out[block][d][row in block], zero past the last row. Through registers: row
// strides are often powers of two, and reading down a column then took a third of the forward pass in cache misses.
void transpose(const float* data, int64_t row, int64_t count, int64_t dim, int64_t stride, float* out) {
  for (int64_t start = 0; start < count; start += stride, out += dim * stride)
    for (int64_t j = start; j < start + stride; j += kLanes)
      for (int64_t d = 0; d < dim; d += kLanes) {
        Vec square[kLanes];
        for (int64_t i = 0; i < kLanes; ++i)
          square[i] = j + i < count ? load(data + (j + i) * row + d, dim - d) : Vec{};
        transpose_square(square);
        for (int64_t i = 0; i < kLanes && d + i < dim; ++i) store(out + (d + i) * stride + j - start, square[i]);
      }
}

int64_t block_stride(int64_t length) { return length < kKeys ? round_up(length, kLanes) : kKeys; }

// In a row of scores the first `live` become exp(s - shift), the others up to `width` zero. Returns their sum.
inline Vec probabilities(float* scores, int64_t live, int64_t width, float shift) {
  Vec total{};
  int64_t j = 0;
  for (; j + kLanes <= live; j += kLanes) {
    const Vec p = exp_nonpositive(load(scores + j) - shift);
    total += p;
    store(scores + j, p);
  }
  if (j < live) {
    const IntVec inside = lane_numbers() < static_cast<int32_t>(live - j);
    const Vec p = inside ? exp_nonpositive(load(scores + j) - shift) : all(0.0f);
    total += p;
    store(scores + j, p);
    j += kLanes;
  }
  for (; j < width; j += kLanes) store(scores + j, Vec{});
  return total;
}

inline float largest_score(const float* scores, int64_t live) {
  Vec most = all(-INFINITY);
  int64_t j = 0;
  for (; j + kLanes <= live; j += kLanes) most = larger(most, load(scores + j));
  if (j < live)
    most = larger(most, lane_numbers() < static_cast<int32_t>(live - j) ? load(scores + j) : all(-INFINITY));
  return max_of(most);
}

// Scores of `rows` query rows with a block of keys become probabilities; `most` and `mass` are each row's so far, and
// where there was a block before, its sums shrink to the new maximum. Row r sees the first seen + r keys of the block.
// In three passes over the rows: each is a chain of waits, and the rows' chains then run side by side.
inline void online_softmax(float* scores, int64_t rows, int64_t seen, int64_t count, bool again, int64_t wide,
                           float* most, float* mass, float* sums) {
  const int64_t width = round_up(count, kLanes);
  float before[kRows];
  Vec part[kRows];
  for (int64_t r = 0; r < rows; ++r) {
    const float here = largest_score(scores + r * kScores, seen + r < count ? seen + r : count);
    before[r] = most[r];
    most[r] = here > most[r] ? here : most[r];
  }
  for (int64_t r = 0; r < rows; ++r)
    part[r] = probabilities(scores + r * kScores, seen + r < count ? seen + r : count, width, most[r]);
  for (int64_t r = 0; r < rows; ++r) {
    if (again) {
      const float shrink = exp_nonpositive(before[r] - most[r]);
      mass[r] *= shrink;
      for (int64_t d = 0; d < wide; d += kLanes) store(sums + r * wide + d, load(sums + r * wide + d) * shrink);
    }
    mass[r] += sum_of(part[r]);
  }
}

// One query head of one sequence. keys: transposed blocks; out, softmax: this head's first row.
void forward_head(const Shape& shape, Strided q, const float* keys, int64_t stride, Vectors v, int64_t length,
                  float* out, Softmax* softmax, float* scratch) {
  float *queries = scratch, *scores = queries + kRows * kWide, *sums = scores + kRows * kScores;
  for (int64_t first = 0; first < length; first += kRows) {
    const int64_t end = first + kRows < length ? first + kRows : length;
    float most[kRows], mass[kRows] = {};
    for (int r = 0; r < kRows; ++r) most[r] = -INFINITY;
    copy_rows(q.data, q.row, first, length, shape.dim, shape.scale, queries);
    for (int64_t start = 0; start < end; start += stride) {
      const int64_t count = end - start < stride ? end - start : stride;
      product<kWide, 1>(queries, keys + start * shape.dim, stride, shape.dim, scores, kScores, round_up(count, kLanes),
                        false);
      online_softmax(scores, end - first, first + 1 - start, count, start > 0, shape.wide, most, mass, sums);
      product<kScores, 1>(scores, v.data + start * v.row, v.row, count, sums, shape.wide, shape.wide, start > 0);
    }
    for (int64_t r = 0; r < end - first; ++r) {
      float* to = out + (first + r) * shape.heads * shape.dim;
      const float inverse = 1.0f / mass[r];
      for (int64_t d = 0; d < shape.dim; d += kLanes)
        store(to + d, load(sums + r * shape.wide + d) * inverse, shape.dim - d);
      softmax[(first + r) * shape.heads] = {most[r], inverse};
    }
  }
}

// What a task of the backward pass reads and writes for one query head.
struct HeadGradient {
  Strided q, out, d_out;
  Vectors q_rows, d_out_rows;
  const Softmax* softmax;  // of this head's first row, as forward wrote it
  float* d_q;              // of this head's first row, [length, heads, dim]
};

struct Keys {
  const float *keys, *values;  // transposed blocks, `stride` keys each
  int64_t stride, length;
  Vectors rows;    // keys as they are
  float *d_k, *d_v;  // sums, [length rounded up to kRows, wide]
};

struct Tile {  // a tile of query rows and what is made for it
  float *queries, *grads, *p, *ds, *d_q;
  float delta[kQueries];  // sum of out * d_out of each row
};

// Query rows first + r0 to + kRows and a block of keys from `start`: fills p and ds, adds to d_q.
inline void backward_scores(const Shape& shape, const HeadGradient& head, const Keys& k, Tile& tile, int64_t first,
                            int64_t r0, int64_t start) {
  int64_t count = first + r0 + kRows - start;  // keys that some row of these sees
  count = count < k.stride ? count : k.stride;
  const int64_t width = round_up(count, kLanes), left = k.length - start, here = left < count ? left : count;
  float *p = tile.p + r0 * kScores, *ds = tile.ds + r0 * kScores;
  product<kWide, 1>(tile.queries + r0 * kWide, k.keys + start * shape.dim, k.stride, shape.dim, p, kScores, width,
                    false);
  product<kWide, 1>(tile.grads + r0 * kWide, k.values + start * shape.dim, k.stride, shape.dim, ds, kScores, width,
                    false);
  const int64_t after = k.length - first - r0, rows = after < kRows ? after : kRows;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = first + r0 + r, seen = row + 1 - start, live = seen < here ? seen : here;
    const Softmax softmax = head.softmax[row * shape.heads];
    probabilities(p + r * kScores, live, width, softmax.most);
    const float delta = tile.delta[r0 + r];
    for (int64_t j = 0; j < width; j += kLanes) {
      const Vec probability = load(p + r * kScores + j) * softmax.inverse;
      store(p + r * kScores + j, probability);
      store(ds + r * kScores + j, probability * (load(ds + r * kScores + j) - delta));
    }
  }
  product<kScores, 1>(ds, k.rows.data + start * k.rows.row, k.rows.row, here, tile.d_q + r0 * shape.wide, shape.wide,
                      shape.wide, start > 0);
}

void start_tile(const Shape& shape, const HeadGradient& head, int64_t first, int64_t rows, Tile& tile) {
  for (int64_t r = 0; r < rows; r += kRows) {
    copy_rows(head.q.data, head.q.row, first + r, first + rows, shape.dim, shape.scale, tile.queries + r * kWide);
    copy_rows(head.d_out.data, head.d_out.row, first + r, first + rows, shape.dim, 1.0f, tile.grads + r * kWide);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float* out = head.out.data + (first + r) * head.out.row;
    Vec total{};
    for (int64_t d = 0; d < shape.dim; d += kLanes)
      total += load(out + d, shape.dim - d) * load(tile.grads + r * kWide + d);
    tile.delta[r] = sum_of(total);
  }
}

// One query head of one sequence: writes d_q, adds to d_k (without the factor `scale`) and d_v.
void backward_head(const Shape& shape, const HeadGradient& head, const Keys& k, Tile& tile) {
  for (int64_t first = 0; first < k.length; first += kQueries) {
    const int64_t rows = k.length - first < kQueries ? k.length - first : kQueries;
    start_tile(shape, head, first, rows, tile);
    for (int64_t start = 0; start < first + rows; start += k.stride) {
      for (int64_t r0 = 0; r0 < rows; r0 += kRows) backward_scores(shape, head, k, tile, first, r0, start);
      const int64_t count = first + rows - start < k.stride ? first + rows - start : k.stride;
      for (int64_t j = 0; j < count; j += kRows) {
        const int64_t skip = start + j > first ? start + j - first : 0;  // earlier queries see none of these keys
        const int64_t at = skip * kScores + j, to = (start + j) * shape.wide, row = first + skip;
        product<1, kScores>(tile.ds + at, head.q_rows.data + row * head.q_rows.row, head.q_rows.row, rows - skip,
                            k.d_k + to, shape.wide, shape.wide, true);
        product<1, kScores>(tile.p + at, head.d_out_rows.data + row * head.d_out_rows.row, head.d_out_rows.row,
                            rows - skip, k.d_v + to, shape.wide, shape.wide, true);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      float* to = head.d_q + (first + r) * shape.heads * shape.dim;
      for (int64_t d = 0; d < shape.dim; d += kLanes)
        store(to + d, load(tile.d_q + r * shape.wide + d) * shape.scale, shape.dim - d);
    }
  }
}

Strided head_of(Strided x, int64_t row, int64_t head) { return {x.data + row * x.row + head * x.head, x.row, x.head}; }

int64_t multiply_adds(const int32_t* cu_seqlens, int64_t sequences, const Shape& shape) {
  int64_t pairs = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t length = cu_seqlens[s + 1] - cu_seqlens[s];
    pairs += length * length;
  }
  return pairs * shape.heads * shape.dim;
}

}  // namespace

bool attention_forward(Strided q, Strided k, Strided v, const int32_t* cu_seqlens, int64_t sequences, int64_t heads,
                       int64_t kv_heads, int64_t dim, float scale, float* out, Softmax* softmax) {
  const Shape shape{heads, kv_heads, dim, round_up(dim, kLanes), scale};
  const int64_t group = heads / kv_heads;
  bool enough = true;
#pragma omp parallel if (multiply_adds(cu_seqlens, sequences, shape) > kSerial)
  {
    Scratch scratch;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < sequences * kv_heads; ++task) {
      const int64_t begin = cu_seqlens[task / kv_heads], length = cu_seqlens[task / kv_heads + 1] - begin;
      const int64_t kv = task % kv_heads, stride = block_stride(length), padded = round_up(length, stride ? stride : 1);
      if (length == 0) continue;
      if (!scratch.reserve(padded * dim + length * shape.wide + kRows * (kWide + kScores + shape.wide))) {
#pragma omp atomic write
        enough = false;
        continue;
      }
      float *keys = scratch.data(), *copy = keys + padded * dim, *work = copy + round_up(length * shape.wide, kLanes);
      const Strided k_head = head_of(k, begin, kv), v_head = head_of(v, begin, kv);
      transpose(k_head.data, k.row, length, dim, stride, keys);
      const Vectors values = vectors_of(v_head.data, v.row, length, shape, copy);
      for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
        forward_head(shape, head_of(q, begin, h), keys, stride, values, length, out + (begin * heads + h) * dim,
                     softmax + begin * heads + h, work);
    }
  }
  return enough;
}

bool attention_backward(Strided q, Strided k, Strided v, Strided d_out, const float* out, const Softmax* softmax,
                        const int32_t* cu_seqlens, int64_t sequences, int64_t heads, int64_t kv_heads, int64_t dim,
                        float scale, float* d_q, float* d_k, float* d_v) {
  const Shape shape{heads, kv_heads, dim, round_up(dim, kLanes), scale};
  const int64_t group = heads / kv_heads;
  const Strided saved{out, heads * dim, dim};
  bool enough = true;
#pragma omp parallel if (multiply_adds(cu_seqlens, sequences, shape) > kSerial)
  {
    Scratch scratch;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < sequences * kv_heads; ++task) {
      const int64_t begin = cu_seqlens[task / kv_heads], length = cu_seqlens[task / kv_heads + 1] - begin;
      const int64_t kv = task % kv_heads, stride = block_stride(length), padded = round_up(length, stride ? stride : 1);
      if (length == 0) continue;
      const int64_t matrix = round_up(length, kQueries) * shape.wide;
      if (!scratch.reserve(2 * padded * dim + 5 * matrix + kQueries * (2 * kWide + 2 * kScores + shape.wide))) {
#pragma omp atomic write
        enough = false;
        continue;
      }
      float *keys = scratch.data(), *values = keys + padded * dim, *d_keys = values + padded * dim;
      float *d_values = d_keys + matrix, *copies = d_values + matrix;
      Tile tile;
      tile.queries = copies + 3 * matrix;
      tile.grads = tile.queries + kQueries * kWide;
      tile.p = tile.grads + kQueries * kWide;
      tile.ds = tile.p + kQueries * kScores;
      tile.d_q = tile.ds + kQueries * kScores;
      const Strided k_head = head_of(k, begin, kv), v_head = head_of(v, begin, kv);
      transpose(k_head.data, k.row, length, dim, stride, keys);
      transpose(v_head.data, v.row, length, dim, stride, values);
      std::memset(d_keys, 0, 2 * matrix * sizeof(float));
      const Keys all_keys{keys,   values,  stride, length, vectors_of(k_head.data, k.row, length, shape, copies),
                          d_keys, d_values};
      for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
        const Strided q_head = head_of(q, begin, h), d_head = head_of(d_out, begin, h);
        const HeadGradient head{q_head,
                                head_of(saved, begin, h),
                                d_head,
                                vectors_of(q_head.data, q.row, length, shape, copies + matrix),
                                vectors_of(d_head.data, d_out.row, length, shape, copies + 2 * matrix),
                                softmax + begin * heads + h,
                                d_q + (begin * heads + h) * dim};
        backward_head(shape, head, all_keys, tile);
      }
      for (int64_t i = 0; i < length; ++i)
        for (int64_t d = 0; d < dim; d += kLanes) {
          const int64_t to = ((begin + i) * kv_heads + kv) * dim + d;
          store(d_k + to, load(d_keys + i * shape.wide + d) * scale, dim - d);
          store(d_v + to, load(d_values + i * shape.wide + d), dim - d);
        }
    }
  }
  return enough;
}

}  // namespace R1_ISA
}  // namespace r1
