// Causal attention of packed sequences, forward and backward, also of groups that share their first sequence. See
// kernels/varlen_attention.py and kernels/prefix_attention.py for the contracts.
//
// A task is one group (or one sequence, where there are none) and one key head with its query heads; tasks are
// independent and each runs in one fixed order, so results do not depend on the number of threads, and the gradient of
// a group's shared keys is summed in the order of its sequences. Every product is `product`: a tile of kRows rows, up
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

// Keys that query rows see: all of a shared prefix, or of their own sequence those up to themselves.
struct Span {
  const float* keys;  // transposed blocks, `stride` keys each
  int64_t stride;
  Vectors values;
  int64_t length;
  bool whole;  // all rows see all of it
};

// One query head of one sequence of `length` rows. out, softmax: this head's first row.
void forward_head(const Shape& shape, Strided q, const Span* spans, int span_count, int64_t length, float* out,
                  Softmax* softmax, float* scratch) {
  float *queries = scratch, *scores = queries + kRows * kWide, *sums = scores + kRows * kScores;
  for (int64_t first = 0; first < length; first += kRows) {
    const int64_t rows = first + kRows < length ? kRows : length - first;
    float most[kRows], mass[kRows] = {};
    for (int r = 0; r < kRows; ++r) most[r] = -INFINITY;
    copy_rows(q.data, q.row, first, length, shape.dim, shape.scale, queries);
    bool again = false;
    for (const Span* span = spans; span < spans + span_count; ++span) {
      const int64_t end = span->whole ? span->length : first + rows;
      for (int64_t start = 0; start < end; start += span->stride) {
        const int64_t count = end - start < span->stride ? end - start : span->stride;
        const int64_t seen = span->whole ? count : first + 1 - start;
        product<kWide, 1>(queries, span->keys + start * shape.dim, span->stride, shape.dim, scores, kScores,
                          round_up(count, kLanes), false);
        online_softmax(scores, rows, seen, count, again, shape.wide, most, mass, sums);
        product<kScores, 1>(scores, span->values.data + start * span->values.row, span->values.row, count, sums,
                            shape.wide, shape.wide, again);
        again = true;
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
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
  int64_t length;  // query rows
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
  bool whole;        // all query rows see all of these
};

struct Tile {  // a tile of query rows and what is made for it
  float *queries, *grads, *p, *ds, *d_q;
  float delta[kQueries];  // sum of out * d_out of each row
};

// Query rows first + r0 to + kRows and a block of keys from `start`: fills p and ds; sets d_q, or adds to it.
inline void backward_scores(const Shape& shape, const HeadGradient& head, const Keys& k, Tile& tile, int64_t first,
                            int64_t r0, int64_t start, bool add) {
  const int64_t left = k.length - start;
  int64_t count = k.whole ? left : first + r0 + kRows - start;  // keys that some row of these sees
  count = count < k.stride ? count : k.stride;
  const int64_t width = round_up(count, kLanes), here = left < count ? left : count;
  float *p = tile.p + r0 * kScores, *ds = tile.ds + r0 * kScores;
  product<kWide, 1>(tile.queries + r0 * kWide, k.keys + start * shape.dim, k.stride, shape.dim, p, kScores, width,
                    false);
  product<kWide, 1>(tile.grads + r0 * kWide, k.values + start * shape.dim, k.stride, shape.dim, ds, kScores, width,
                    false);
  const int64_t after = head.length - first - r0, rows = after < kRows ? after : kRows;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = first + r0 + r, seen = k.whole ? here : row + 1 - start, live = seen < here ? seen : here;
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
                      shape.wide, add);
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

// One query head of one sequence: writes d_q, adds to d_k (without the factor `scale`) and d_v of every span.
void backward_head(const Shape& shape, const HeadGradient& head, const Keys* spans, int span_count, Tile& tile) {
  for (int64_t first = 0; first < head.length; first += kQueries) {
    const int64_t rows = head.length - first < kQueries ? head.length - first : kQueries;
    start_tile(shape, head, first, rows, tile);
    bool again = false;
    for (const Keys* k = spans; k < spans + span_count; ++k) {
      const int64_t end = k->whole ? k->length : first + rows;
      for (int64_t start = 0; start < end; start += k->stride) {
        for (int64_t r0 = 0; r0 < rows; r0 += kRows) backward_scores(shape, head, *k, tile, first, r0, start, again);
        again = true;
        const int64_t count = end - start < k->stride ? end - start : k->stride;
        for (int64_t j = 0; j < count; j += kRows) {
          // of their own sequence, earlier queries see none of these keys
          const int64_t skip = !k->whole && start + j > first ? start + j - first : 0;
          const int64_t at = skip * kScores + j, to = (start + j) * shape.wide, row = first + skip;
          product<1, kScores>(tile.ds + at, head.q_rows.data + row * head.q_rows.row, head.q_rows.row, rows - skip,
                              k->d_k + to, shape.wide, shape.wide, true);
          product<1, kScores>(tile.p + at, head.d_out_rows.data + row * head.d_out_rows.row, head.d_out_rows.row,
                              rows - skip, k->d_v + to, shape.wide, shape.wide, true);
        }
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

// Which sequences a task sees: those from `first` to `last`, each behind the first one where there are several.
struct Group {
  int64_t first, last;
};

struct Pack {
  const int32_t *cu_seqlens, *cu_groups;  // cu_groups null: every sequence is alone
  int64_t groups;

  Group group(int64_t index) const {
    return cu_groups ? Group{cu_groups[index], cu_groups[index + 1]} : Group{index, index + 1};
  }
  int64_t begin(int64_t sequence) const { return cu_seqlens[sequence]; }
  int64_t length(int64_t sequence) const { return cu_seqlens[sequence + 1] - cu_seqlens[sequence]; }
  int64_t longest_after(const Group& group) const {
    int64_t most = 0;
    for (int64_t s = group.first + 1; s < group.last; ++s) most = length(s) > most ? length(s) : most;
    return most;
  }
  int64_t multiply_adds(const Shape& shape) const {
    int64_t pairs = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const Group sequences = group(g);
      for (int64_t s = sequences.first; s < sequences.last; ++s)
        pairs += length(s) * (length(s) + (s > sequences.first ? length(sequences.first) : 0));
    }
    return pairs * shape.heads * shape.dim;
  }
};

// Keys and values of `length` rows as forward_head reads them.
int64_t span_size(int64_t length, const Shape& shape) {
  return (length ? round_up(length, block_stride(length)) * shape.dim : 0) + round_up(length * shape.wide, kLanes);
}

Span span_of(Strided k, Strided v, int64_t length, const Shape& shape, bool whole, float* memory) {
  const int64_t stride = block_stride(length);
  if (length == 0) return {memory, kLanes, {memory, shape.wide}, 0, whole};
  transpose(k.data, k.row, length, shape.dim, stride, memory);
  float* copy = memory + round_up(length, stride) * shape.dim;
  return {memory, stride, vectors_of(v.data, v.row, length, shape, copy), length, whole};
}

// The same for backward_head, with room for the gradients, which are set to zero.
int64_t matrix_size(int64_t length, const Shape& shape) { return round_up(length, kQueries) * shape.wide; }

int64_t keys_size(int64_t length, const Shape& shape) {
  return (length ? 2 * round_up(length, block_stride(length)) * shape.dim : 0) + 3 * matrix_size(length, shape);
}

Keys keys_of(Strided k, Strided v, int64_t length, const Shape& shape, float* memory) {
  const int64_t stride = block_stride(length), matrix = matrix_size(length, shape);
  if (length == 0) return {memory, memory, kLanes, 0, {memory, shape.wide}, memory, memory, false};
  const int64_t padded = round_up(length, stride) * shape.dim;
  float *keys = memory, *values = keys + padded, *d_k = values + padded, *d_v = d_k + matrix;
  transpose(k.data, k.row, length, shape.dim, stride, keys);
  transpose(v.data, v.row, length, shape.dim, stride, values);
  std::memset(d_k, 0, 2 * matrix * sizeof(float));
  return {keys, values, stride, length, vectors_of(k.data, k.row, length, shape, d_v + matrix), d_k, d_v, false};
}

void write_gradients(const Keys& keys, const Shape& shape, int64_t begin, int64_t kv, float* d_k, float* d_v) {
  for (int64_t i = 0; i < keys.length; ++i)
    for (int64_t d = 0; d < shape.dim; d += kLanes) {
      const int64_t to = ((begin + i) * shape.kv_heads + kv) * shape.dim + d;
      store(d_k + to, load(keys.d_k + i * shape.wide + d) * shape.scale, shape.dim - d);
      store(d_v + to, load(keys.d_v + i * shape.wide + d), shape.dim - d);
    }
}

}  // namespace

bool attention_forward(Strided q, Strided k, Strided v, const int32_t* cu_seqlens, const int32_t* cu_groups,
                       int64_t groups, int64_t heads, int64_t kv_heads, int64_t dim, float scale, float* out,
                       Softmax* softmax) {
  const Shape shape{heads, kv_heads, dim, round_up(dim, kLanes), scale};
  const Pack pack{cu_seqlens, cu_groups, groups};
  const int64_t share = heads / kv_heads;
  bool enough = true;
#pragma omp parallel if (pack.multiply_adds(shape) > kSerial)
  {
    Scratch scratch;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < groups * kv_heads; ++task) {
      const Group group = pack.group(task / kv_heads);
      const int64_t kv = task % kv_heads, size = span_size(pack.length(group.first), shape);
      const int64_t largest = span_size(pack.longest_after(group), shape);
      if (!scratch.reserve(size + largest + kRows * (kWide + kScores + shape.wide))) {
#pragma omp atomic write
        enough = false;
        continue;
      }
      float *own = scratch.data() + size, *work = own + largest;
      Span spans[2];
      for (int64_t s = group.first; s < group.last; ++s) {
        const int64_t begin = pack.begin(s), length = pack.length(s);
        const bool behind = s > group.first;  // the first sequence is the others' prefix
        spans[behind] = span_of(head_of(k, begin, kv), head_of(v, begin, kv), length, shape, false,
                                behind ? own : scratch.data());
        for (int64_t h = kv * share; h < (kv + 1) * share; ++h)
          forward_head(shape, head_of(q, begin, h), spans, 1 + behind, length, out + (begin * heads + h) * dim,
                       softmax + begin * heads + h, work);
        spans[0].whole = true;
      }
    }
  }
  return enough;
}

bool attention_backward(Strided q, Strided k, Strided v, Strided d_out, const float* out, const Softmax* softmax,
                        const int32_t* cu_seqlens, const int32_t* cu_groups, int64_t groups, int64_t heads,
                        int64_t kv_heads, int64_t dim, float scale, float* d_q, float* d_k, float* d_v) {
  const Shape shape{heads, kv_heads, dim, round_up(dim, kLanes), scale};
  const Pack pack{cu_seqlens, cu_groups, groups};
  const int64_t share = heads / kv_heads;
  const Strided saved{out, heads * dim, dim};
  bool enough = true;
#pragma omp parallel if (pack.multiply_adds(shape) > kSerial)
  {
    Scratch scratch;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < groups * kv_heads; ++task) {
      const Group group = pack.group(task / kv_heads);
      const int64_t kv = task % kv_heads, size = keys_size(pack.length(group.first), shape);
      const int64_t after = pack.longest_after(group), largest = keys_size(after, shape);
      const int64_t longest = pack.length(group.first) > after ? pack.length(group.first) : after;
      const int64_t matrix = matrix_size(longest, shape);
      if (!scratch.reserve(size + largest + 2 * matrix + kQueries * (2 * kWide + 2 * kScores + shape.wide))) {
#pragma omp atomic write
        enough = false;
        continue;
      }
      float *own = scratch.data() + size, *copies = own + largest;
      Tile tile;
      tile.queries = copies + 2 * matrix;
      tile.grads = tile.queries + kQueries * kWide;
      tile.p = tile.grads + kQueries * kWide;
      tile.ds = tile.p + kQueries * kScores;
      tile.d_q = tile.ds + kQueries * kScores;
      Keys spans[2];
      for (int64_t s = group.first; s < group.last; ++s) {
        const int64_t begin = pack.begin(s), length = pack.length(s);
        const bool behind = s > group.first;
        spans[behind] =
            keys_of(head_of(k, begin, kv), head_of(v, begin, kv), length, shape, behind ? own : scratch.data());
        for (int64_t h = kv * share; h < (kv + 1) * share; ++h) {
          const Strided q_head = head_of(q, begin, h), d_head = head_of(d_out, begin, h);
          const HeadGradient head{length,
                                  q_head,
                                  head_of(saved, begin, h),
                                  d_head,
                                  vectors_of(q_head.data, q.row, length, shape, copies),
                                  vectors_of(d_head.data, d_out.row, length, shape, copies + matrix),
                                  softmax + begin * heads + h,
                                  d_q + (begin * heads + h) * dim};
          backward_head(shape, head, spans, 1 + behind, tile);
        }
        if (behind) write_gradients(spans[1], shape, begin, kv, d_k, d_v);
        spans[0].whole = true;
      }
      write_gradients(spans[0], shape, pack.begin(group.first), kv, d_k, d_v);
    }
  }
  return enough;
}

}  // namespace R1_ISA
}  // namespace r1
