// Attention over the paged cache, and the write into it, in float32. See kernels/paged_attention.py.
//
// A row is one query of a sequence: the only one in decoding, one of several in a prefill. Positions are taken in tiles
// of kTile from 0 on: scores, softmax against a running maximum (Milakov & Gimelshein 2018), weighted sum; so nothing is
// gathered or stored per context, and a row's bits depend on its own context alone.
// Rows that follow one another and whose tables begin alike (the samples of a prompt, the queries of a prefill) go
// through the tiles they share together: keys and values then come from L1 for all but the first of them, where one by
// one they would come from memory again for each (cf. Hydragen, Juravsky et al. 2024; FlashInfer's cascade).
#include <cmath>
#include <cstring>

#include "ops.h"
#include "scratch.h"

namespace r1 {
namespace R1_ISA {

namespace {

constexpr int kTile = 32;            // positions whose scores are held at once: 8 KiB of keys where a head has 64 numbers
constexpr int64_t kQueries = 8192;   // floats of the queries that go together, and of their sums
constexpr int64_t kTogether = 16;    // rows at most: more would leave threads without work
constexpr int64_t kManyRuns = 8;     // with fewer, each key head is a thread's work of its own
constexpr int64_t kVectors = 4;      // of a row of values that are summed in registers at once, for two queries

struct Tile {
  int64_t first, last, head;  // rows that see it, and the key head
  int count;
  const float *keys[kTile], *values[kTile];
};

// Rows first to last (excluded) of one key head's queries, whose first `shared` positions are the same blocks.
struct Run {
  int64_t first, last, shared;
};

// Lane i becomes a's or b's sum of the lanes i and i ^ STEP: of b where bit STEP of i is set.
template <int STEP>
R1_INLINE Vec fold(Vec a, Vec b) {
  return by_bit<STEP>(a, b) + swapped<STEP>(by_bit<STEP>(b, a));
}

// Lane i of the result is the sum of v[i]'s lanes, added up in the same order for every i.
R1_INLINE Vec sums_of(Vec* v) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i += 2) v[i / 2] = fold<1>(v[i], v[i + 1]);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes / 2; i += 2) v[i / 2] = fold<2>(v[i], v[i + 1]);
  if (kLanes > 4)
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 4; i += 2) v[i / 2] = fold<4 % kLanes>(v[i], v[i + 1]);
  if (kLanes > 8) v[0] = fold<8 % kLanes>(v[0], v[1]);
  return v[0];
}

// scores[r][p] = queries[r] . keys[p], for kLanes / ROWS positions from p on; those past the end repeat the last.
template <int ROWS, int WIDTH>
R1_INLINE void score_part(const float* queries, const Tile& tile, int p, int64_t width, float* scores) {
  constexpr int kPositions = kLanes / ROWS;
  const int64_t size = WIDTH ? WIDTH : width;
  const float* keys[kPositions];
#pragma GCC unroll 16
  for (int i = 0; i < kPositions; ++i) keys[i] = tile.keys[p + i < tile.count ? p + i : tile.count - 1];
  Vec sum[kLanes] = {};
#pragma GCC unroll 1
  for (int64_t d = 0; d < size; d += kLanes) {
    Vec q[ROWS];
#pragma GCC unroll 2
    for (int r = 0; r < ROWS; ++r) q[r] = load(queries + r * size + d, size - d);
#pragma GCC unroll 16
    for (int i = 0; i < kPositions; ++i) {
      const Vec k = load(keys[i] + d, size - d);
#pragma GCC unroll 2
      for (int r = 0; r < ROWS; ++r) sum[r * kPositions + i] = fma(q[r], k, sum[r * kPositions + i]);
    }
  }
  float found[kLanes];
  store(found, sums_of(sum));
  for (int r = 0; r < ROWS; ++r) std::memcpy(scores + r * kTile + p, found + r * kPositions, kPositions * sizeof(float));
}

// Softmax weights of one tile against a running maximum: scores become e^(score - maximum); returns their sum.
R1_INLINE float exponentials(float* scores, int count, float* maximum) {
  for (int p = count; p % kLanes; ++p) scores[p] = -HUGE_VALF;
  Vec highest = all(*maximum);
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

// sums[r] = sums[r] * keep[r] + weights[r] @ values, for VECTORS vectors of the rows from `at` on. Meanwhile the keys of
// the next tile come closer.
template <int ROWS, int VECTORS>
R1_INLINE void add_part(const float* weights, const float* keep, const Tile& tile, const Tile* ahead, int64_t at,
                        int64_t width, float* sums) {
  Vec total[ROWS][VECTORS] = {};
  const int next = ahead ? ahead->count : 0;
#pragma GCC unroll 1
  for (int p = 0; p < tile.count; ++p) {
    const float* value = tile.values[p] + at;
    if (p < next)
      for (int d = 0; d < VECTORS * kLanes; d += kLine) __builtin_prefetch(ahead->keys[p] + at + d);
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      const Vec x = load(value + v * kLanes, width - at - v * kLanes);
#pragma GCC unroll 2
      for (int r = 0; r < ROWS; ++r) total[r][v] = fma(weights[r * kTile + p], x, total[r][v]);
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      float* to = sums + r * width + at + v * kLanes;
      const int64_t left = width - at - v * kLanes;
      store(to, fma(keep[r], load(to, left), total[r][v]), left);
    }
}

// One tile for ROWS queries: their sums, maxima and totals so far go on. fresh: nobody has read it yet, so its values are
// fetched while its keys are multiplied; ahead: the next tile, whose keys are fetched while its values are, or null.
template <int ROWS, int WIDTH>
void visit(const float* queries, const Tile& tile, bool fresh, const Tile* ahead, int64_t width, float* sums,
           float* maxima, float* totals) {
  const int64_t size = WIDTH ? WIDTH : width;
  float scores[ROWS * kTile], keep[ROWS];
  for (int p = 0; p < tile.count; p += kLanes / ROWS) {
    for (int i = p; fresh && i < p + kLanes / ROWS && i < tile.count; ++i)
      for (int64_t d = 0; d < size; d += kLine) __builtin_prefetch(tile.values[i] + d);
    score_part<ROWS, WIDTH>(queries, tile, p, size, scores);
  }
  for (int r = 0; r < ROWS; ++r) {
    const float before = maxima[r];
    const float total = exponentials(scores + r * kTile, tile.count, maxima + r);
    keep[r] = exp_nonpositive(before - maxima[r]);
    totals[r] = fma(totals[r], keep[r], total);
  }
  int64_t at = 0;
  for (; at + kVectors * kLanes <= size; at += kVectors * kLanes)
    add_part<ROWS, kVectors>(scores, keep, tile, ahead, at, size, sums);
  for (; at < size; at += kLanes) add_part<ROWS, 1>(scores, keep, tile, ahead, at, size, sums);
}

struct Work {
  const PagedAttention& call;
  int64_t group;
  const int64_t *sequence, *context;  // of each row

  void find(int64_t row, int64_t head, int64_t start, Tile& tile) const {
    const int32_t* table = call.tables + sequence[row] * call.table_row;
    const int64_t left = context[row] - start;
    tile.count = static_cast<int>(left < 0 ? 0 : left < kTile ? left : kTile);
    for (int p = 0; p < tile.count;) {
      int64_t offset = (start + p) % call.block;
      const int64_t first = (table[(start + p) / call.block] * call.block + offset) * call.kv_heads + head;
      for (int64_t at = first * call.width; offset < call.block && p < tile.count; ++offset, ++p) {
        tile.keys[p] = call.keys + at;
        tile.values[p] = call.values + at;
        at += call.kv_heads * call.width;
      }
    }
  }
};

// The tiles of a run in the order in which they are read: those that its rows share, then each row's own; of each
// stretch of positions the heads one after another, as they lie.
class Walk {
 public:
  Walk(const Work& work, const Run& run, int64_t head, int64_t heads)
      : work_(work), run_(run), first_head_(head), heads_(heads), row_(run.first - 1), end_(run.shared) {}

  // False after the last.
  bool next(Tile& tile) {
    if (head_ == heads_) head_ = 0, start_ += kTile;
    for (; start_ >= end_; start_ = run_.shared, end_ = work_.context[row_])
      if (++row_ == run_.last) return false;
    const bool shared = row_ < run_.first;
    tile.first = shared ? run_.first : row_;
    tile.last = shared ? run_.last : row_ + 1;
    tile.head = head_;
    work_.find(tile.first, first_head_ + head_++, start_, tile);
    return true;
  }

 private:
  const Work& work_;
  const Run& run_;
  const int64_t first_head_, heads_;
  int64_t head_ = 0, row_, start_ = 0, end_;
};

// The queries of a run for `heads` key heads from `head` on.
template <int WIDTH>
void attend(const Work& work, const Run& run, int64_t head, int64_t heads) {
  const PagedAttention& call = work.call;
  const int64_t width = WIDTH ? WIDTH : call.width, group = work.group, each = (run.last - run.first) * group;
  alignas(64) float queries[kQueries], sums[kQueries];  // key head, row, query head
  float maxima[kQueries], totals[kQueries];
  for (int64_t i = 0; i < heads * each; ++i) {
    const int64_t place = (head + i / each) * group + i % group;
    const float* q = call.q + (run.first + i % each / group) * call.q_row + place * width;
    for (int64_t d = 0; d < width; ++d) queries[i * width + d] = q[d] * call.scale, sums[i * width + d] = 0;
    maxima[i] = -HUGE_VALF, totals[i] = 0;
  }
  Walk walk(work, run, head, heads);
  Tile tiles[2];
  for (bool which = false, more = walk.next(tiles[0]); more; which = !which) {
    const Tile& tile = tiles[which];
    more = walk.next(tiles[!which]);
    const Tile* ahead = more ? &tiles[!which] : nullptr;
    int64_t i = tile.head * each + (tile.first - run.first) * group;
    const int64_t last = tile.head * each + (tile.last - run.first) * group;
    bool fresh = true;
    for (; i + 2 <= last; i += 2, ahead = nullptr, fresh = false)
      visit<2, WIDTH>(queries + i * width, tile, fresh, ahead, width, sums + i * width, maxima + i, totals + i);
    if (i < last)
      visit<1, WIDTH>(queries + i * width, tile, fresh, ahead, width, sums + i * width, maxima + i, totals + i);
  }
  for (int64_t i = 0; i < heads * each; ++i) {
    const int64_t place = (head + i / each) * group + i % group;
    float* out = call.out + ((run.first + i % each / group) * call.heads + place) * width;
    for (int64_t d = 0; d < width; ++d) out[d] = sums[i * width + d] / totals[i];
  }
}

// How many positions from 0 on two rows have in the same blocks, in whole tiles that both see.
int64_t alike(const Work& work, int64_t a, int64_t b) {
  const PagedAttention& call = work.call;
  const int64_t least = work.context[a] < work.context[b] ? work.context[a] : work.context[b];
  int64_t same = least;
  if (work.sequence[a] != work.sequence[b]) {
    const int32_t *x = call.tables + work.sequence[a] * call.table_row, *y = call.tables + work.sequence[b] * call.table_row;
    for (same = 0; same < least && x[same / call.block] == y[same / call.block];) same += call.block;
    same = same < least ? same : least;
  }
  return same / kTile * kTile;
}

// Cuts the rows into runs. A row joins while its share of the first row's tiles is not much less than theirs.
int64_t find_runs(const Work& work, int64_t rows, Run* runs) {
  const int64_t fit = kQueries / (work.group * work.call.width);
  const int64_t together = fit < kTogether ? fit : kTogether;
  int64_t count = 0;
  for (int64_t row = 0; row < rows;) {
    Run run{row, row + 1, work.context[row] / kTile * kTile};
    for (; run.last < rows && run.last - run.first < together; ++run.last) {
      const int64_t same = alike(work, run.first, run.last);
      if (same == 0 || (run.last - run.first > 1 && 2 * same < run.shared)) break;
      run.shared = same < run.shared ? same : run.shared;
    }
    if (run.last == row + 1) run.shared = 0;
    runs[count++] = run;
    row = run.last;
  }
  return count;
}

// Sequence and context of each row; 2, 3 or 5 where the data are wrong, see ops.h.
int place_rows(const PagedAttention& call, int64_t* sequence, int64_t* context) {
  for (int64_t s = 0; s < call.sequences; ++s) {
    const int64_t length = call.contexts[s];
    if (length < 1 || length > call.columns * call.block) return 2;
    for (int64_t b = 0; b * call.block < length; ++b) {
      const int32_t block = call.tables[s * call.table_row + b];
      if (block < 0 || block >= call.blocks) return 3;
    }
    const int64_t first = call.starts ? call.starts[s] : s, last = call.starts ? call.starts[s + 1] : s + 1;
    if (last - first > length) return 5;
    for (int64_t row = first; row < last; ++row) {
      sequence[row] = s;
      context[row] = length - (last - 1 - row);
    }
  }
  return 0;
}

}  // namespace

int paged_attention(const PagedAttention& call) {
  const int64_t group = call.heads / call.kv_heads, width = call.width;
  if (group * width > kQueries / 2) return 1;
  Scratch memory;
  if (!memory.reserve(call.rows * (2 * sizeof(int64_t) + sizeof(Run)) / sizeof(float))) return 4;
  int64_t *sequence = reinterpret_cast<int64_t*>(memory.data()), *context = sequence + call.rows;
  Run* runs = reinterpret_cast<Run*>(context + call.rows);
  const int status = place_rows(call, sequence, context);
  if (status) return status;
  const Work work{call, group, sequence, context};
  const int64_t count = find_runs(work, call.rows, runs);
  int64_t positions = 0;
  for (int64_t row = 0; row < call.rows; ++row) positions += context[row];
  const auto run = width == 16    ? attend<16>
                   : width == 32  ? attend<32>
                   : width == 64  ? attend<64>
                   : width == 128 ? attend<128>
                                  : attend<0>;
  // The heads of a position lie side by side: together they are read at 1.4 times the rate of one after the other. Runs
  // differ in length, so the items are dealt out one after another.
  const int64_t fit = kQueries / (kTogether * group * width);
  const int64_t heads = count < kManyRuns || fit < 1 ? 1 : fit < call.kv_heads ? fit : call.kv_heads;
  const int64_t parts = (call.kv_heads + heads - 1) / heads;
#pragma omp parallel for schedule(dynamic, 1) if (positions * call.heads * width > 65536)
  for (int64_t item = 0; item < count * parts; ++item) {
    const int64_t head = item % parts * heads;
    run(work, runs[item / parts], head, head + heads < call.kv_heads ? heads : call.kv_heads - head);
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
