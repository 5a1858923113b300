// The head, a softmax and what hangs on it, a chunk of rows at a time: logits are made, measured, turned into their own
// gradient and used up by two products while they are in the cache. See kernels/linear_head_cpu.py for the contract.
//
// A chunk's logits lie transposed, [vocabulary, rows]: vectors then run over rows, so that a softmax has no sums across
// lanes; of the weight, nothing but a block is ever copied; and each of the three products finds one factor as it lies.
//     logits^T = weight . hidden^T          d_weight += d_logits^T . hidden          d_hidden = (d_logits^T)^T . weight
// Every number is summed by one thread in an order that no number of threads changes: the same bits for any.
#include <cmath>

#include "linear_head_tiles.h"
#include "ops.h"
#include "product.h"
#include "scratch.h"
#include "threads.h"

namespace r1 {
namespace R1_ISA {

namespace {

constexpr int64_t kLeastRows = 192;   // of a chunk with gradients: fewer make d_weight's passage through memory dear;
                                      // 256 take more than a tenth of plain torch's memory at 8192 words
constexpr int64_t kScoredRows = 384;  // of one without: a block's logits lie in half of L2
constexpr int64_t kWords = 96;        // of the vocabulary, at most, that are made and measured in one go
// Terms of a chain over width or vocabulary: a panel in half of L1, or a third of 48 KiB, where 256 terms of 16 lanes
// left no room for a tile of the left factor and the next.
constexpr int64_t kDeep = kLanes == 16 ? 128 : 256;
constexpr int64_t kLongChain = kLanes == 16 ? 192 : 288;  // and over rows: each is a passage over d_weight
constexpr int64_t kWordRow = kDeep + 16;  // of a packed block; not a power of two: its rows share no cache sets
constexpr int64_t kRowBlock = 240;    // rows of a task of d_hidden: with kDeep words, half of L2
constexpr int64_t kTogether = 8;      // panels of the weight that are packed in one go
static_assert(kWords % kTileRows == 0 && kRowBlock % kTileRows == 0, "blocks are whole tiles");
static_assert(kLeastRows % kTileColumns == 0 && kScoredRows % kTileColumns == 0, "chunks are whole panels");


// Of a row and a block: the largest logit m, the sum of e^(z - m), the sum of e^(z - m) (z - m).
enum Moment : int { kMost = 0, kSum = 1, kTilt = 2, kMoments = 3 };

struct Work {
  int64_t live_chunk, rest_chunk;  // rows of a chunk with gradients, and of one without
  int64_t chunk, stride;           // the larger; and of logits a bit more, so that columns share no cache sets
  int64_t blocks;                  // of the vocabulary
  int64_t panels;                  // of the hidden width
  float* logits;                   // [vocabulary rounded up, stride]: of chunks with gradients; from measuring on,
                                   // e^(z - m), then their gradient
  float* across;                   // panels of rows: [panel][width][kTileColumns], times the scale
  float* along;                    // panels of width: [panel][chunk][kTileColumns]
  float* d_hidden;                 // [chunk, panels * kTileColumns]
  float* moments;                  // [blocks][kMoments][chunk]
  float* own;                      // [threads][own_size]: what a thread packs and, without gradients, a block's logits
  int64_t own_size;
  float* weight;                   // pieces of some words, for matrix tiles in the product for d_hidden
  float *lse, *pull, *chosen;      // [chunk]; pull: slope * scale; chosen: the target's logit
  float *logp, *old_logp, *ref_logp, *advantages, *weights, *loss, *slope;  // [chunk]: what grpo_loss reads and writes
  int64_t* order;                  // [rows]: those with a gradient first
  int64_t live;
};

// Whether a row can have a gradient; clipping is only known later, and such rows stay in.
bool has_gradient(const HeadCall& c, int64_t row) {
  if (!c.gradient()) return false;
  if (c.loss == HeadCall::kGivenSlope) return c.slopes[row] != 0;
  return c.weights[row] != 0 && ((c.kl_kind != 0 && c.kl_coef != 0) || c.advantages[row] != 0);
}

// Rows of a chunk where all are alike and none has more than `most`.
int64_t chunk_rows(int64_t rows, int64_t most) {
  return rows ? round_up(ceil_div(rows, ceil_div(rows, most)), kTileColumns) : 0;
}

// Words that a tile has, or two matrix tiles.
int64_t words_together() { return head_on_tiles() ? kWordBlock : kTileRows; }

// Of up to kWords words; a small vocabulary has smaller ones, that threads have something to share out.
int64_t count_blocks(int64_t vocabulary) {
  const bool small = vocabulary <= 16 * kWords;
  const int64_t wanted =
      small ? round_up(ceil_div(2 * vocabulary, kWords), 4) : round_up(ceil_div(vocabulary, kWords), 16);
  return least(wanted, ceil_div(vocabulary, words_together()));
}

// The first word of a block: whole tiles, shared out evenly.
int64_t first_word(const HeadCall& c, const Work& w, int64_t block) {
  return least(ceil_div(c.vocabulary, words_together()) * block / w.blocks * words_together(), c.vocabulary);
}

bool reserve(const HeadCall& c, Scratch& memory, Work& w) {
  w.live = 0;
  for (int64_t row = 0; row < c.rows; ++row) w.live += has_gradient(c, row);
  const int64_t fit = (int64_t{1} << 18) / c.vocabulary / kTileColumns * kTileColumns;  // 1 MiB of logits
  w.live_chunk = chunk_rows(w.live, fit < kLeastRows ? kLeastRows : least(fit, 4 * kLeastRows));
  w.rest_chunk = chunk_rows(c.rows - w.live, kScoredRows);
  w.chunk = w.live_chunk > w.rest_chunk ? w.live_chunk : w.rest_chunk;
  w.stride = w.live_chunk + 16;
  w.blocks = count_blocks(c.vocabulary);
  w.panels = ceil_div(c.width, kTileColumns);
  const int64_t width = w.panels * kTileColumns;
  const int64_t making = kWords * (kWordRow + (w.rest_chunk ? w.rest_chunk + 16 : 0));
  const int64_t tiles = head_on_tiles() ? pulled_floats(w.live_chunk, most_threads()) : 0;
  const int64_t pulling = head_on_tiles() ? tiles : (round_up(least(w.live_chunk, kRowBlock), kTileRows) + kTogether * kTileColumns) * kDeep;
  w.own_size = round_up(w.live_chunk && c.d_hidden && pulling > making ? pulling : making, 16);
  const int64_t sizes[] = {w.live ? round_up(c.vocabulary, words_together()) * w.stride : 0,
                           head_on_tiles() ? across_floats(w.chunk, c.width) : w.chunk * c.width,
                           head_on_tiles() ? along_floats(w.live_chunk, c.width) : w.live_chunk * width,
                           c.d_hidden ? w.live_chunk * width : 0,
                           w.blocks * kMoments * w.chunk,
                           most_threads() * w.own_size,
                           head_on_tiles() && c.d_hidden && w.live ? weight_floats(c.width) : 0};
  int64_t total = 10 * w.chunk + 2 * c.rows;
  for (const int64_t size : sizes) total += round_up(size, 16);
  if (!memory.reserve(total)) return false;
  float* next = memory.data();
  float** arrays[] = {&w.logits, &w.across, &w.along, &w.d_hidden, &w.moments, &w.own, &w.weight};
  for (int i = 0; i < 7; ++i) {
    *arrays[i] = next;
    next += round_up(sizes[i], 16);
  }
  float** streams[] = {&w.lse,        &w.pull,    &w.chosen, &w.logp, &w.old_logp, &w.ref_logp,
                       &w.advantages, &w.weights, &w.loss,   &w.slope};
  for (float** stream : streams) {
    *stream = next;
    next += w.chunk;
  }
  w.order = reinterpret_cast<int64_t*>(next);
  return true;
}

void put_in_order(const HeadCall& c, Work& w) {
  int64_t live = 0, rest = w.live;
  for (int64_t row = 0; row < c.rows; ++row) w.order[has_gradient(c, row) ? live++ : rest++] = row;
}

// `count` <= kTileColumns rows of hidden states, transposed and scaled: a panel [width][kTileColumns].
void pack_across(const HeadCall& c, const int64_t* order, int64_t count, float* to) {
  for (int64_t first = 0; first < kTileColumns; first += kLanes)
    for (int64_t k = 0; k < c.width; k += kLanes) {
      Vec square[kLanes];
      for (int64_t i = 0; i < kLanes; ++i)
        square[i] =
            first + i < count ? load(c.hidden + order[first + i] * c.width + k, c.width - k) * c.scale : Vec{};
      transpose_square(square);
      for (int64_t i = 0; i < kLanes && k + i < c.width; ++i) store(to + (k + i) * kTileColumns + first, square[i]);
    }
}

// Both forms of a chunk's hidden states.
void pack_hidden(const HeadCall& c, const Work& w, const int64_t* order, int64_t rows, bool gradient) {
#ifdef R1_TILES
  if (head_on_tiles()) {
    by_pieces([&](auto p) {
      pack_hidden_tiles<p.kCount>(c.hidden, order, rows, c.width, c.scale, w.across, gradient ? w.along : nullptr);
    });
    return;
  }
#endif
#pragma omp for schedule(static) nowait
  for (int64_t n = 0; n < rows; n += kTileColumns)
    pack_across(c, order + n, least(rows - n, kTileColumns), w.across + n * c.width);
#pragma omp for schedule(static)
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t panel = 0; gradient && panel < w.panels; ++panel)
      pack_right(c.hidden + order[i] * c.width + panel * kTileColumns, c.width - panel * kTileColumns,
                 w.along + (panel * w.live_chunk + i) * kTileColumns);
}

// The moments of `columns` columns of a block of transposed logits; e^(z - m) in place of z where it is kept. Two
// vectors at a time: a line of the cache (or two), and sums that need not wait for each other.
template <bool KEEP>
void measure_block(float* logits, int64_t stride, int64_t count, int64_t columns, float* moments, int64_t chunk) {
  for (int64_t c = 0; c < columns; c += kTileColumns) {
    float* z = logits + c;
    Vec most[2] = {all(-1e30f), all(-1e30f)}, sum[2] = {}, tilt[2] = {};
    for (int64_t v = 0; v < count; ++v)
      for (int i = 0; i < 2; ++i) most[i] = larger(load(z + v * stride + i * kLanes), most[i]);
    for (int64_t v = 0; v < count; ++v)
      for (int i = 0; i < 2; ++i) {
        float* at = z + v * stride + i * kLanes;
        Vec d = load(at) - most[i];
        const Vec e = exp_nonpositive(d);
        d = d < -1e30f ? all(-1e30f) : d;  // 0 times -infinity is not 0
        sum[i] += e;
        tilt[i] += e * d;
        if (KEEP) store(at, e);
      }
    for (int i = 0; i < 2; ++i) {
      store(moments + kMost * chunk + c + i * kLanes, most[i]);
      store(moments + kSum * chunk + c + i * kLanes, sum[i]);
      store(moments + kTilt * chunk + c + i * kLanes, tilt[i]);
    }
  }
}

// Where the next tile's sums will be added or stored: a store, too, waits for its line.
R1_INLINE void fetch_tile(const float* out, int64_t row) {
  for (int64_t m = 0; m < kTileRows; ++m) fetch(out + m * row, kTileColumns);
}

// Words of the weight as a tile reads them, kWordRow numbers apart; the rest of the last tile is zero.
void pack_words(const float* from, int64_t row, int64_t count, int64_t depth, float* to) {
  int64_t m = 0;
  for (; m < count; ++m)  // by the vector: GCC makes a copy of unknown length a `rep movs`, which takes twice as long
    for (int64_t k = 0; k < depth; k += kLanes)
      store(to + m * kWordRow + k, load(from + m * row + k, depth - k), depth - k);
  for (; m % kTileRows; ++m) std::memset(to + m * kWordRow, 0, depth * sizeof(float));
}

// `count` rows of the weight from word v on, times the chunk's hidden states.
void make_block(const HeadCall& c, const Work& w, int64_t v, int64_t count, int64_t next_count, int64_t columns,
                float* left, float* logits, int64_t stride) {
#ifdef R1_TILES
  if (head_on_tiles()) {
    by_pieces([&](auto p) {
      for (int64_t u = 0; u < count; u += kWordBlock)
        logits_of<p.kCount>(c.weight + (v + u) * c.width, least(count - u, kWordBlock), c.width, w.across, columns,
                            logits + u * stride, stride);
    });
    return;
  }
#endif
  for (int64_t k = 0; k < c.width; k += kDeep) {
    const int64_t depth = least(c.width - k, kDeep);
    pack_words(c.weight + v * c.width + k, c.width, count, depth, left);
    Ahead words = k + depth < c.width
                      ? Ahead{c.weight + v * c.width + k + depth, c.width, count, least(c.width - k - depth, kDeep)}
                      : Ahead{c.weight + (v + count) * c.width, c.width, next_count, least(c.width, kDeep)};
    for (int64_t n = 0; n < columns; n += kTileColumns) {
      const float* right = w.across + n * c.width + k * kTileColumns;
      Ahead panel{right + kTileColumns * c.width, kTileColumns, n + kTileColumns < columns ? depth : 0, kTileColumns};
      const int64_t share = ceil_div(depth * kTileRows, count);
      for (int64_t m = 0; m < count; m += kTileRows, words.fetch(2), panel.fetch(share)) {
        const bool last = m + kTileRows >= count;  // then the next tile is the next panel's first
        fetch_tile(logits + (last ? 0 : m + kTileRows) * stride + n + (last ? kTileColumns : 0), stride);
        tile<kWordRow>(left + m * kWordRow, 1, right, depth, logits + m * stride + n, stride, k > 0);
      }
    }
  }
}

void make_logits(const HeadCall& c, const Work& w, const int64_t* order, int64_t rows, bool gradient) {
  const int64_t columns = round_up(rows, kTileColumns);
#pragma omp for schedule(static)
  for (int64_t b = 0; b < w.blocks; ++b) {
    float* left = w.own + this_thread() * w.own_size;
    const int64_t v = first_word(c, w, b), end = first_word(c, w, b + 1);
    const int64_t after = b + 1 < w.blocks ? first_word(c, w, b + 2) - end : 0;
    float* logits = gradient ? w.logits + v * w.stride : left + kWords * kWordRow;
    const int64_t stride = gradient ? w.stride : w.rest_chunk + 16;
    make_block(c, w, v, end - v, after, columns, left, logits, stride);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t word = c.targets[order[i]] - v;
      if (word >= 0 && word < end - v) w.chosen[i] = logits[word * stride + i];
    }
    const auto measure = gradient ? measure_block<true> : measure_block<false>;
    measure(logits, stride, end - v, columns, w.moments + b * kMoments * w.chunk, w.chunk);
  }
}

struct Sums {
  double loss = 0, kl = 0, clipped = 0, ratio = 0, count = 0;
  float largest = 0;
};

// GRPO's loss and slope of a chunk's rows, by grpo_loss itself.
void policy(const HeadCall& c, const Work& w, const int64_t* order, int64_t rows, Sums& sums) {
  for (int64_t i = 0; i < rows; ++i) {
    w.old_logp[i] = c.old_logp ? c.old_logp[order[i]] : w.logp[i];
    w.ref_logp[i] = c.ref_logp ? c.ref_logp[order[i]] : w.logp[i];
    w.advantages[i] = c.advantages[order[i]];
    w.weights[i] = c.weights[order[i]];
  }
  float stats[5];
  grpo_loss(w.logp, w.old_logp, w.ref_logp, w.advantages, w.weights, rows, c.low, c.high, c.kl_coef, c.kl_kind, w.loss,
            w.slope, stats);
  for (int64_t i = 0; i < rows; ++i) sums.loss += w.loss[i];
  sums.kl += stats[0];
  sums.clipped += stats[1];
  sums.ratio += stats[2];
  sums.count += stats[3];
  sums.largest = stats[4] > sums.largest ? stats[4] : sums.largest;
}

// From the blocks' moments: logp and entropy of the chunk's rows.
void measure_rows(const HeadCall& c, const Work& w, const int64_t* order, int64_t rows) {
#pragma omp for schedule(static)
  for (int64_t i = 0; i < rows; i += kLanes) {
    Vec most = all(-1e30f), sum{}, tilt{};
    for (int64_t b = 0; b < w.blocks; ++b) most = larger(load(w.moments + b * kMoments * w.chunk + i), most);
    for (int64_t b = 0; b < w.blocks; ++b) {
      const float* block = w.moments + b * kMoments * w.chunk + i;
      const Vec shift = load(block) - most, keep = exp_nonpositive(shift), held = load(block + kSum * w.chunk);
      sum += keep * held;
      tilt += keep * (load(block + kTilt * w.chunk) + held * shift);
    }
    for (int lane = 0; lane < kLanes && i + lane < rows; ++lane) {
      const int64_t row = order[i + lane];
      const float log_sum = std::log(sum[lane]);
      w.lse[i + lane] = most[lane] + log_sum;
      w.logp[i + lane] = c.logp[row] = w.chosen[i + lane] - most[lane] - log_sum;
      if (c.entropy) c.entropy[row] = log_sum - tilt[lane] / sum[lane];
    }
  }
}

// Their loss and slope.
void slope_of_rows(const HeadCall& c, const Work& w, const int64_t* order, int64_t rows, Sums& sums) {
  if (c.loss == HeadCall::kGRPO) policy(c, w, order, rows, sums);
  for (int64_t i = 0; i < w.chunk; ++i) {
    const float slope = i >= rows || c.loss == HeadCall::kNoLoss ? 0.0f
                        : c.loss == HeadCall::kGRPO              ? w.slope[i]
                                                                 : c.slopes[order[i]];
    w.pull[i] = slope * c.scale;
    if (i >= rows) w.lse[i] = 0;
  }
}

// A block of e^(z - m) becomes the gradient of sum(slope * logp).
void differentiate_block(const HeadCall& c, const Work& w, const int64_t* order, int64_t rows, int64_t first,
                         int64_t count, const float* most) {
  float* block = w.logits + first * w.stride;
  for (int64_t i = 0; i < rows; i += kTileColumns) {
    Vec push[2];
    for (int j = 0; j < 2; ++j) {
      const int64_t at = i + j * kLanes;
      push[j] = -load(w.pull + at) * exp_nonpositive(load(most + at) - load(w.lse + at));
    }
    for (int64_t v = 0; v < count; ++v)
      for (int j = 0; j < 2; ++j) {
        float* z = block + v * w.stride + i + j * kLanes;
        store(z, push[j] * load(z));
      }
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t word = c.targets[order[i]] - first;
    if (word >= 0 && word < count) block[word * w.stride + i] += w.pull[i];
  }
}

// A chunk's part of a block's d_weight, of `words` words from v on.
void add_d_weight(const HeadCall& c, const Work& w, int64_t rows, int64_t v, int64_t words, bool add) {
#ifdef R1_TILES
  if (head_on_tiles()) {
    by_pieces([&](auto p) {
      for (int64_t u = 0; u < words; u += kWordBlock)
        d_weight_of<p.kCount>(w.logits + (v + u) * w.stride, w.stride, least(words - u, kWordBlock), rows, w.along, c.width,
                              c.d_weight + (v + u) * c.width, add);
    });
    return;
  }
#endif
  const int64_t chain = ceil_div(rows, ceil_div(rows, kLongChain));  // all alike
  for (int64_t k = 0; k < rows; k += chain) {
    const int64_t depth = least(rows - k, chain), share = ceil_div(depth * kTileRows, words);
    const float* left = w.logits + v * w.stride + k;
    for (int64_t panel = 0; panel < w.panels; ++panel) {
      const int64_t n = panel * kTileColumns;
      const float* right = w.along + (panel * w.live_chunk + k) * kTileColumns;
      Ahead soon{right + w.live_chunk * kTileColumns, kTileColumns, panel + 1 < w.panels ? depth : 0, kTileColumns};
      for (int64_t m = 0; m < words; m += kTileRows, soon.fetch(share)) {
        const bool last = m + kTileRows >= words;  // then the next tile is the next panel's first
        const float* next = c.d_weight + (last ? v : v + m + kTileRows) * c.width + n + (last ? kTileColumns : 0);
        fetch_tile(next, c.width);
        float* out = c.d_weight + (v + m) * c.width + n;
        const float *from = left + m * w.stride, *ahead = last ? left : from + kTileRows * w.stride;
        if (words - m >= kTileRows && c.width - n >= kTileColumns) {
          tile_along<kTileRows, 2>(from, w.stride, right, depth, out, c.width, add || k > 0, ahead);
          continue;
        }
        alignas(64) float whole[kTileRows * kTileColumns];
        tile_along<kTileRows, 2>(from, w.stride, right, depth, whole, kTileColumns, false);
        add_part(whole, words - m, c.width - n, out, c.width, add || k > 0);
      }
    }
  }
}

// The logits' gradient in place of what was kept of them, and a chunk's part of d_weight.
void differentiate(const HeadCall& c, const Work& w, const int64_t* order, int64_t rows, bool add) {
#pragma omp for schedule(static)
  for (int64_t b = 0; b < w.blocks; ++b) {
    const int64_t v = first_word(c, w, b), words = first_word(c, w, b + 1) - v;
    differentiate_block(c, w, order, rows, v, words, w.moments + (b * kMoments + kMost) * w.chunk);
    if (c.d_weight) add_d_weight(c, w, rows, v, words, add);
  }
}

// Rows [first, last) of a chunk's d_hidden and panels [panel, panels) of the width, summed over the whole vocabulary.
// What is packed next, of the weight and of the logits, is fetched meanwhile.
void pull_block(const HeadCall& c, const Work& w, int64_t first, int64_t last, int64_t panel, int64_t panels) {
  const int64_t width = w.panels * kTileColumns, rows = last - first, tiles = ceil_div(rows, kTileRows);
  float* left = w.own + this_thread() * w.own_size;
  float* packed = left + tiles * kTileRows * kDeep;
  for (int64_t v = 0; v < c.vocabulary; v += kDeep) {
    const int64_t depth = least(c.vocabulary - v, kDeep), deeper = least(c.vocabulary - v - depth, kDeep);
    pack_rows_across(w.logits + v * w.stride + first, w.stride, rows, depth, left);
    Ahead logits{w.logits + (v + depth) * w.stride + first, w.stride, deeper, rows};
    const int64_t logits_share = ceil_div(deeper, tiles * (panels - panel));
    for (int64_t p = panel, end; p < panels; p = end) {
      end = least(p + kTogether, panels);
      const int64_t column = p * kTileColumns;
      pack_panels(c.weight + v * c.width + column, c.width, depth, least(c.width - column, (end - p) * kTileColumns),
                  depth * kTileColumns, packed);
      Ahead weight = end < panels ? Ahead{c.weight + v * c.width + end * kTileColumns, c.width, depth,
                                          least(panels - end, kTogether) * kTileColumns}
                                  : Ahead{c.weight + (v + depth) * c.width + panel * kTileColumns, c.width, deeper,
                                          least(panels - panel, kTogether) * kTileColumns};
      const int64_t weight_share = ceil_div(weight.rows, tiles * (end - p));
      for (int64_t n = p; n < end; ++n) {
        const float* right = packed + (n - p) * depth * kTileColumns;
        float* out = w.d_hidden + first * width + n * kTileColumns;
        for (int64_t m = 0; m < rows; m += kTileRows, out += kTileRows * width) {
          if (m + 2 * kTileRows <= rows) fetch_tile(out + kTileRows * width, width);
          if (rows - m >= kTileRows) {
            tile<1>(left + m * depth, kTileRows, right, depth, out, width, v > 0);
          } else {
            alignas(64) float whole[kTileRows * kTileColumns];
            tile<1>(left + m * depth, kTileRows, right, depth, whole, kTileColumns, false);
            add_part(whole, rows - m, kTileColumns, out, width, v > 0);
          }
          weight.fetch(weight_share);
          logits.fetch(logits_share);
        }
      }
    }
  }
}

// A chunk's d_hidden. Every thread has panels of its own, so that the weight is read once; rows are shared out where
// they are many, or the panels too few.
void pull_back(const HeadCall& c, const Work& w, const int64_t* order, int64_t rows) {
  const int64_t threads = team_size(), width = w.panels * kTileColumns;
#ifdef R1_TILES
  if (head_on_tiles()) {
    by_pieces([&](auto p) {
      d_hidden_of<p.kCount>(w.logits, w.stride, c.weight, c.vocabulary, rows, c.width, w.weight,
                            w.own + this_thread() * w.own_size, threads, w.d_hidden, width);
    });
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; ++i)
      std::memcpy(c.d_hidden + order[i] * c.width, w.d_hidden + i * width, c.width * sizeof(float));
    return;
  }
#endif
  const int64_t groups = least(threads, ceil_div(w.panels, kTogether)), group = ceil_div(w.panels, groups);
  const int64_t few = ceil_div(rows, kRowBlock), share = ceil_div(threads, groups);
  const int64_t tiles = ceil_div(rows, kTileRows), wanted = least(few > share ? few : share, tiles);
  const int64_t block = ceil_div(tiles, wanted) * kTileRows, blocks = ceil_div(rows, block);
#pragma omp for schedule(static)
  for (int64_t t = 0; t < blocks * groups; ++t) {
    const int64_t first = t / groups * block, last = least(first + block, rows);
    const int64_t panel = t % groups * group, panels = least(panel + group, w.panels);
    pull_block(c, w, first, last, panel, panels);
    const int64_t column = panel * kTileColumns, end = least(panels * kTileColumns, c.width);
    for (int64_t i = first; i < last && column < end; ++i)
      std::memcpy(c.d_hidden + order[i] * c.width + column, w.d_hidden + i * width + column,
                  (end - column) * sizeof(float));
  }
}

void zero_rows(const HeadCall& c, const Work& w) {
  for (int64_t i = w.live; c.d_hidden && i < c.rows; ++i)
    std::memset(c.d_hidden + w.order[i] * c.width, 0, c.width * sizeof(float));
  if (c.d_weight && !w.live) std::memset(c.d_weight, 0, c.vocabulary * c.width * sizeof(float));
}

// All chunks, by every thread of a team.
void run(const HeadCall& c, const Work& w, Sums& sums) {
  for (int64_t start = 0; start < c.rows;) {
    const bool gradient = start < w.live;
    const int64_t rows = gradient ? least(w.live - start, w.live_chunk) : least(c.rows - start, w.rest_chunk);
    const int64_t* order = w.order + start;
    pack_hidden(c, w, order, rows, gradient);
    make_logits(c, w, order, rows, gradient);
    measure_rows(c, w, order, rows);
#pragma omp single
    slope_of_rows(c, w, order, rows, sums);
    if (gradient) {
      differentiate(c, w, order, rows, start > 0);
      if (c.d_hidden) pull_back(c, w, order, rows);
    }
    start += rows;
  }
}

}  // namespace

bool linear_head(const HeadCall& c) {
  Scratch memory;
  Work w;
  Sums sums;
  if (!reserve(c, memory, w)) return false;
  put_in_order(c, w);
  zero_rows(c, w);
#pragma omp parallel if (c.rows * c.vocabulary * c.width > 1 << 19)
  {
#ifdef R1_TILES
    const TileRegisters registers(head_on_tiles());
#endif
    run(c, w, sums);
  }

  const double found[] = {sums.loss, sums.kl, sums.clipped, sums.ratio, sums.largest, sums.count};
  for (int i = 0; c.stats && i < 6; ++i) c.stats[i] = static_cast<float>(found[i]);
  return true;
}

}  // namespace R1_ISA
}  // namespace r1
