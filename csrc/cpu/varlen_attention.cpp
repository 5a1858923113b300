// Causal attention of packed sequences, forward and backward, also of groups that share their first sequence. See
// kernels/varlen_attention.py and kernels/prefix_attention.py for the contracts.
//
// A task is one group (or one sequence, where there are none) and one key head with its query heads; tasks are
// independent and each runs in one fixed order, so results do not depend on the number of threads, and the gradient of
// a group's shared keys is summed in the order of its sequences. The queries of all heads that share a key head are the
// rows of one matrix, position by position: keys come to the registers once for all of them, and few rows are padding.
// Every product is product.h's tile, its right operand in panels that are packed once a sequence. (Read where they lie
// in a fused projection, 2 KiB apart, keys and values fell on one another in the cache; with tiles of four rows of one
// head forward and backward took 1.2 and 1.4 times as long for 8 sequences of 127 behind 33, 2.0 and 1.7 times for one
// of 1024.)
// Scores exist for kQueries rows and at most kKeys keys; the forward pass keeps a running maximum over blocks of keys
// (Milakov & Gimelshein 2018; Dao et al. 2022, algorithm 1) and saves it with the inverse of the sum of exponentials,
// from which the backward pass makes the probabilities again (ibid., algorithm 4; its log-sum-exp would cost a
// logarithm a row, a fifth of the forward pass of short sequences).
#include <math.h>

#include "ops.h"
#include "product.h"
#include "scratch.h"

namespace r1 {
namespace R1_ISA {
namespace {

constexpr int64_t kQueries = 48;   // rows of a block of queries; a multiple of kTileRows
constexpr int64_t kKeys = 192;      // keys of a block of scores; a multiple of kTileRows and of kTileColumns
constexpr int64_t kLargest = 256;  // head size
// Row strides of blocks; not powers of two, whose rows would fall on one another in the cache.
constexpr int64_t kScores = kKeys + kLine, kWide = kLargest + kLine;
constexpr int64_t kSerial = 1 << 22;  // multiply-adds under which threads cost more than they give
constexpr int64_t kAhead = 16;        // rows that are asked for before they are packed
static_assert(kQueries % kTileRows == 0 && kKeys % kTileRows == 0 && kKeys % kTileColumns == 0, "blocks: whole tiles");

struct Shape {
  int64_t heads, kv_heads, share, dim, wide;  // share: query heads of a key head; wide: dim rounded up to whole panels
  float scale;
};

// Walks over the rows of such a matrix: row i is position i / share and head i % share. (Divisions at every look at a
// row took a tenth of the time of short sequences.)
struct Row {
  int64_t share, position, head;
  Row(int64_t share, int64_t i) : share(share), position(i / share), head(i % share) {}
  void next() {
    if (++head == share) head = 0, ++position;
  }
  int64_t in(const Strided& x) const { return position * x.row + head * x.head; }
};

// Asks for `count` numbers: a row of a head lies far from the next one, where the machine does not look ahead itself.
R1_INLINE void ask(const float* from, int64_t count) {
  for (int64_t d = 0; d < count; d += kLine) __builtin_prefetch(from + d, 0, 2);
}

// Rows first to first + count, times `scale`, kWide apart; then zeros up to whole tiles. Asks for the next block.
void copy_rows(const Strided& x, const Shape& shape, int64_t first, int64_t count, float scale, float* to) {
  Row row(shape.share, first), later(shape.share, first + kQueries);
  for (int64_t r = 0; r < count; ++r, row.next(), later.next()) {
    const float* from = x.data + row.in(x);
    ask(x.data + later.in(x), shape.dim);
    int64_t d = 0;
    for (; d + kLanes <= shape.dim; d += kLanes) store(to + r * kWide + d, load(from + d) * scale);
    for (; d < shape.wide; d += kLanes)
      store(to + r * kWide + d, d < shape.dim ? load(from + d, shape.dim - d) * scale : Vec{});
  }
  for (int64_t r = count; r < round_up(count, kTileRows); ++r)
    for (int64_t d = 0; d < shape.wide; d += kLanes) store(to + r * kWide + d, Vec{});
}

// Panels of kTileColumns rows, each transposed: out[panel][d][row in panel], zero past the last row. Through registers:
// row strides are often powers of two, and reading down a column then took a third of the forward pass in cache misses.
void pack_transposed(const Strided& x, int64_t count, int64_t dim, float* out) {
  for (int64_t start = 0; start < count; start += kTileColumns, out += dim * kTileColumns) {
    for (int64_t j = 0; j < kTileColumns; ++j) ask(x.data + (start + kAhead + j) * x.row, dim);
    for (int64_t j = start; j < start + kTileColumns; j += kLanes)
      for (int64_t d = 0; d < dim; d += kLanes) {
        Vec square[kLanes];
        for (int64_t i = 0; i < kLanes; ++i)
          square[i] = j + i < count ? load(x.data + (j + i) * x.row + d, dim - d) : Vec{};
        transpose_square(square);
        for (int64_t i = 0; i < kLanes && d + i < dim; ++i) store(out + (d + i) * kTileColumns + j - start, square[i]);
      }
  }
}

// Panels of kTileColumns columns: out[panel][row][column in panel], zero past the last column.
void pack_rows(const Strided& x, int64_t count, int64_t dim, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    ask(x.data + (i + kAhead) * x.row, dim);
    for (int64_t d = 0; d < dim; d += kTileColumns)
      pack_right(x.data + i * x.row + d, dim - d, out + d * count + i * kTileColumns);
  }
}

// What a block of query rows sees of a block of keys: all of a shared prefix, or of their own sequence those up to
// themselves.
struct Seen {
  int64_t start, length;                  // the first key, and the keys of the whole span
  int64_t rows, live[kQueries];           // of each query row: how many of the keys from `start` on
  int64_t in_tile[kQueries / kTileRows];  // the same of the last row of each tile

  Seen(int64_t share, int64_t first, int64_t rows, int64_t start, int64_t length, bool whole)
      : start(start), length(length), rows(rows) {
    Row row(share, first);
    for (int64_t r = 0; r < rows; ++r, row.next()) {
      const int64_t count = (whole ? length : row.position + 1) - start;
      live[r] = count < 0 ? 0 : count < kKeys ? count : kKeys;
      in_tile[r / kTileRows] = live[r];
    }
  }
  int64_t most() const { return live[rows - 1]; }
};

// scores[r][j] = rows[r] . keys[start + j] for what is seen.
void score(const Seen& seen, const Shape& shape, const float* rows, const float* keys, float* scores) {
  const float* panel = keys + seen.start * shape.dim;
  for (int64_t j = 0; j < seen.most(); j += kTileColumns, panel += shape.dim * kTileColumns)
    for (int64_t r = 0; r < seen.rows; r += kTileRows)
      if (seen.in_tile[r / kTileRows] > j)
        tile<kWide>(rows + r * kWide, 1, panel, shape.dim, scores + r * kScores + j, kScores, false);
}

// sums[r] (+)= sum over the keys that are seen of weights[r][j] * values[start + j].
void weigh(const Seen& seen, const Shape& shape, const float* weights, const float* values, bool add, float* sums) {
  for (int64_t d = 0; d < shape.wide; d += kTileColumns) {
    const float* panel = values + d * seen.length + seen.start * kTileColumns;
    for (int64_t r = 0; r < seen.rows; r += kTileRows)
      if (const int64_t depth = seen.in_tile[r / kTileRows])
        tile<kScores>(weights + r * kScores, 1, panel, depth, sums + r * shape.wide + d, shape.wide, add);
  }
}

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

// A tile's scores of a block of keys become probabilities; `most` and `mass` are each row's so far, and where there was
// a block before, its sums shrink to the new maximum. In three passes over the rows: each is a chain of waits, and the
// rows' chains then run side by side.
inline void online_softmax(const Seen& seen, int64_t first, bool again, int64_t wide, float* scores, float* most,
                           float* mass, float* sums) {
  const int64_t rows = seen.rows - first < kTileRows ? seen.rows - first : kTileRows;
  const int64_t *live = seen.live + first, width = seen.in_tile[first / kTileRows];
  float before[kTileRows];
  Vec part[kTileRows];
  for (int64_t r = 0; r < rows; ++r) {
    const float here = largest_score(scores + r * kScores, live[r]);
    before[r] = most[r];
    most[r] = here > most[r] ? here : most[r];
  }
  for (int64_t r = 0; r < rows; ++r) part[r] = probabilities(scores + r * kScores, live[r], width, most[r]);
  for (int64_t r = 0; r < rows; ++r) {
    if (again) {
      const float shrink = exp_nonpositive(before[r] - most[r]);
      mass[r] *= shrink;
      for (int64_t d = 0; d < wide; d += kLanes) store(sums + r * wide + d, load(sums + r * wide + d) * shrink);
    }
    mass[r] += sum_of(part[r]);
  }
}

struct Span {
  const float *keys, *values;  // transposed panels of keys; panels of the values' columns
  int64_t length;
  bool whole;
};

// All query heads of a key head in one sequence of `length` positions. out: of its first row and head.
void forward_rows(const Shape& shape, const Strided& q, const Span* spans, int span_count, int64_t length, float* out,
                  Softmax* softmax, float* scratch) {
  float *queries = scratch, *scores = queries + kQueries * kWide, *sums = scores + kQueries * kScores;
  for (int64_t first = 0; first < length * shape.share; first += kQueries) {
    const int64_t left = length * shape.share - first, rows = left < kQueries ? left : kQueries;
    float most[kQueries], mass[kQueries] = {};
    for (int64_t r = 0; r < rows; ++r) most[r] = -INFINITY;
    copy_rows(q, shape, first, rows, shape.scale, queries);
    bool again = false;
    for (const Span* span = spans; span < spans + span_count; ++span) {
      const int64_t end = span->whole ? span->length : (first + rows - 1) / shape.share + 1;
      for (int64_t start = 0; start < end; start += kKeys, again = true) {
        const Seen seen(shape.share, first, rows, start, span->length, span->whole);
        score(seen, shape, queries, span->keys, scores);
        for (int64_t r = 0; r < rows; r += kTileRows)
          if (seen.in_tile[r / kTileRows])
            online_softmax(seen, r, again, shape.wide, scores + r * kScores, most + r, mass + r, sums + r * shape.wide);
        weigh(seen, shape, scores, span->values, again, sums);
      }
    }
    Row row(shape.share, first);
    for (int64_t r = 0; r < rows; ++r, row.next()) {
      const int64_t to = row.position * shape.heads + row.head;
      const float inverse = 1.0f / mass[r];
      for (int64_t d = 0; d < shape.dim; d += kLanes)
        store(out + to * shape.dim + d, load(sums + r * shape.wide + d) * inverse, shape.dim - d);
      softmax[to] = {most[r], inverse};
    }
  }
}

// What a task of the backward pass reads and writes for the query heads of a key head in one sequence.
struct Queries {
  int64_t length;
  Strided q, out, d_out;
  const Softmax* softmax;  // of the first row and head, as forward wrote it
  float* d_q;              // [length, heads, dim], of the first head
};

struct Keys {
  const float *keys, *values, *columns;  // transposed panels of keys and of values; panels of the keys' columns
  int64_t length;
  float *d_k, *d_v;  // sums, [length rounded up to kTileRows, wide]
  bool whole;
};

struct Block {  // of query rows, and what is made for it
  float *queries, *grads, *p, *ds, *d_q;
  float delta[kQueries];  // sum of out * d_out of each row
  Softmax softmax[kQueries];
};

// p, the scores, and ds, the gradient of the probabilities, of a row become the probabilities and the scores' gradient.
inline void differentiate_row(float* p, float* ds, int64_t live, int64_t width, Softmax softmax, float delta) {
  int64_t j = 0;
  for (; j < live; j += kLanes) {
    Vec probability = exp_nonpositive(load(p + j) - softmax.most) * softmax.inverse;
    if (j + kLanes > live) probability = lane_numbers() < static_cast<int32_t>(live - j) ? probability : all(0.0f);
    store(p + j, probability);
    store(ds + j, probability * (load(ds + j) - delta));
  }
  for (; j < width; j += kLanes) {
    store(p + j, Vec{});
    store(ds + j, Vec{});
  }
}

void start_block(const Shape& shape, const Queries& task, int64_t first, int64_t rows, Block& block) {
  copy_rows(task.q, shape, first, rows, shape.scale, block.queries);
  copy_rows(task.d_out, shape, first, rows, 1.0f, block.grads);
  Row row(shape.share, first), later(shape.share, first + kQueries);
  for (int64_t r = 0; r < rows; ++r, row.next(), later.next()) {
    const float* out = task.out.data + row.in(task.out);
    ask(task.out.data + later.in(task.out), shape.dim);
    Vec total{};
    for (int64_t d = 0; d < shape.dim; d += kLanes)
      total += load(out + d, shape.dim - d) * load(block.grads + r * kWide + d);
    block.delta[r] = sum_of(total);
    block.softmax[r] = task.softmax[row.position * shape.heads + row.head];
  }
}

// A block of queries, whose first row is `first`, and one of keys: adds to the gradients of both.
void backward_block(const Seen& seen, const Shape& shape, const Keys& span, int64_t first, bool again, Block& block) {
  score(seen, shape, block.queries, span.keys, block.p);
  score(seen, shape, block.grads, span.values, block.ds);
  for (int64_t r = 0; r < seen.rows; ++r)
    differentiate_row(block.p + r * kScores, block.ds + r * kScores, seen.live[r],
                      round_up(seen.in_tile[r / kTileRows], kTileRows), block.softmax[r], block.delta[r]);
  weigh(seen, shape, block.ds, span.columns, again, block.d_q);
  for (int64_t j = 0; j < seen.most(); j += kTileRows) {
    // of their own sequence, earlier queries see none of these keys
    const int64_t before = (seen.start + j) * shape.share - first, skip = span.whole || before < 0 ? 0 : before;
    const int64_t at = skip * kScores + j, to = (seen.start + j) * shape.wide;
    for (int64_t d = 0; d < shape.wide; d += kTileColumns) {
      tile<1, kWide>(block.ds + at, kScores, block.queries + skip * kWide + d, seen.rows - skip, span.d_k + to + d,
                     shape.wide, true);
      tile<1, kWide>(block.p + at, kScores, block.grads + skip * kWide + d, seen.rows - skip, span.d_v + to + d,
                     shape.wide, true);
    }
  }
}

// All query heads of a key head in one sequence: writes d_q, adds to d_k and d_v of every span.
void backward_rows(const Shape& shape, const Queries& task, const Keys* spans, int span_count, Block& block) {
  for (int64_t first = 0; first < task.length * shape.share; first += kQueries) {
    const int64_t left = task.length * shape.share - first, rows = left < kQueries ? left : kQueries;
    start_block(shape, task, first, rows, block);
    bool again = false;
    for (const Keys* span = spans; span < spans + span_count; ++span) {
      const int64_t end = span->whole ? span->length : (first + rows - 1) / shape.share + 1;
      for (int64_t start = 0; start < end; start += kKeys, again = true) {
        const Seen seen(shape.share, first, rows, start, span->length, span->whole);
        backward_block(seen, shape, *span, first, again, block);
      }
    }
    Row row(shape.share, first);
    for (int64_t r = 0; r < rows; ++r, row.next()) {
      float* to = task.d_q + (row.position * shape.heads + row.head) * shape.dim;
      for (int64_t d = 0; d < shape.dim; d += kLanes)
        store(to + d, load(block.d_q + r * shape.wide + d) * shape.scale, shape.dim - d);
    }
  }
}

Strided from(const Strided& x, int64_t row, int64_t head) {
  return {x.data + row * x.row + head * x.head, x.row, x.head};
}

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

int64_t transposed_size(int64_t length, const Shape& shape) { return round_up(length, kTileColumns) * shape.dim; }

// Keys and values of `length` rows as forward_rows reads them.
int64_t span_size(int64_t length, const Shape& shape) { return transposed_size(length, shape) + length * shape.wide; }

Span span_of(const Strided& k, const Strided& v, int64_t length, const Shape& shape, float* memory) {
  float* values = memory + transposed_size(length, shape);
  pack_transposed(k, length, shape.dim, memory);
  pack_rows(v, length, shape.dim, values);
  return {memory, values, length, false};
}

// The same for backward_rows, with room for the gradients, which are set to zero.
int64_t keys_size(int64_t length, const Shape& shape) {
  return 2 * transposed_size(length, shape) + (length + 2 * round_up(length, kTileRows)) * shape.wide;
}

Keys keys_of(const Strided& k, const Strided& v, int64_t length, const Shape& shape, float* memory) {
  const int64_t transposed = transposed_size(length, shape), matrix = round_up(length, kTileRows) * shape.wide;
  float *values = memory + transposed, *columns = values + transposed, *d_k = columns + length * shape.wide;
  pack_transposed(k, length, shape.dim, memory);
  pack_transposed(v, length, shape.dim, values);
  pack_rows(k, length, shape.dim, columns);
  std::memset(d_k, 0, 2 * matrix * sizeof(float));
  return {memory, values, columns, length, d_k, d_k + matrix, false};
}

void write_gradients(const Keys& keys, const Shape& shape, int64_t begin, int64_t kv, float* d_k, float* d_v) {
  for (int64_t i = 0; i < keys.length; ++i)
    for (int64_t d = 0; d < shape.dim; d += kLanes) {
      const int64_t to = ((begin + i) * shape.kv_heads + kv) * shape.dim + d;
      store(d_k + to, load(keys.d_k + i * shape.wide + d), shape.dim - d);
      store(d_v + to, load(keys.d_v + i * shape.wide + d), shape.dim - d);
    }
}

}  // namespace

bool attention_forward(Strided q, Strided k, Strided v, const int32_t* cu_seqlens, const int32_t* cu_groups,
                       int64_t groups, int64_t heads, int64_t kv_heads, int64_t dim, float scale, float* out,
                       Softmax* softmax) {
  const Shape shape{heads, kv_heads, heads / kv_heads, dim, round_up(dim, kTileColumns), scale};
  const Pack pack{cu_seqlens, cu_groups, groups};
  bool enough = true;
#pragma omp parallel if (pack.multiply_adds(shape) > kSerial)
  {
    Scratch scratch;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < groups * kv_heads; ++task) {
      const Group group = pack.group(task / kv_heads);
      const int64_t kv = task % kv_heads, size = span_size(pack.length(group.first), shape);
      const int64_t largest = span_size(pack.longest_after(group), shape);
      if (!scratch.reserve(size + largest + kQueries * (kWide + kScores + shape.wide))) {
#pragma omp atomic write
        enough = false;
        continue;
      }
      float *own = scratch.data() + size, *work = own + largest;
      Span spans[2];
      for (int64_t s = group.first; s < group.last; ++s) {
        const int64_t begin = pack.begin(s), length = pack.length(s), at = begin * heads + kv * shape.share;
        const bool behind = s > group.first;  // the first sequence is the others' prefix
        spans[behind] = span_of(from(k, begin, kv), from(v, begin, kv), length, shape, behind ? own : scratch.data());
        forward_rows(shape, from(q, begin, kv * shape.share), spans, 1 + behind, length, out + at * dim, softmax + at,
                     work);
        spans[0].whole = true;
      }
    }
  }
  return enough;
}

bool attention_backward(Strided q, Strided k, Strided v, Strided d_out, const float* out, const Softmax* softmax,
                        const int32_t* cu_seqlens, const int32_t* cu_groups, int64_t groups, int64_t heads,
                        int64_t kv_heads, int64_t dim, float scale, float* d_q, float* d_k, float* d_v) {
  const Shape shape{heads, kv_heads, heads / kv_heads, dim, round_up(dim, kTileColumns), scale};
  const Pack pack{cu_seqlens, cu_groups, groups};
  const Strided saved{out, heads * dim, dim};
  bool enough = true;
#pragma omp parallel if (pack.multiply_adds(shape) > kSerial)
  {
    Scratch scratch;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < groups * kv_heads; ++task) {
      const Group group = pack.group(task / kv_heads);
      const int64_t kv = task % kv_heads, size = keys_size(pack.length(group.first), shape);
      const int64_t largest = keys_size(pack.longest_after(group), shape);
      if (!scratch.reserve(size + largest + kQueries * (2 * kWide + 2 * kScores + shape.wide))) {
#pragma omp atomic write
        enough = false;
        continue;
      }
      float* own = scratch.data() + size;
      Block block;
      block.queries = own + largest;
      block.grads = block.queries + kQueries * kWide;
      block.p = block.grads + kQueries * kWide;
      block.ds = block.p + kQueries * kScores;
      block.d_q = block.ds + kQueries * kScores;
      Keys spans[2];
      for (int64_t s = group.first; s < group.last; ++s) {
        const int64_t begin = pack.begin(s), length = pack.length(s), head = kv * shape.share;
        const bool behind = s > group.first;
        spans[behind] = keys_of(from(k, begin, kv), from(v, begin, kv), length, shape, behind ? own : scratch.data());
        const int64_t at = begin * heads + head;
        const Queries queries{length, from(q, begin, head), from(saved, begin, head), from(d_out, begin, head),
                              softmax + at, d_q + at * dim};
        backward_rows(shape, queries, spans, 1 + behind, block);
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
