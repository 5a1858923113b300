// The head, a softmax and what hangs on it, a chunk of rows at a time: logits are made, measured, turned into their own
// gradient and used up by two products while they are in the cache. See kernels/linear_head_cpu.py for the contract.
//
// A chunk's logits lie transposed, [vocabulary, rows]: vectors then run over rows, so that a softmax has no sums across
// lanes; of the weight, nothing but a block is ever copied; and each of the three products finds one factor as it lies.
//     logits^T = weight . hidden^T          d_weight += d_logits^T . hidden          d_hidden = (d_logits^T)^T . weight
// Every number is summed by one thread in an order that no number of threads changes: the same bits for any.
#include <cmath>

#include "ops.h"
#include "product.h"
#include "scratch.h"

namespace r1 {
namespace R1_ISA {

namespace {

constexpr int64_t kRowStep = 96;     // chunks are multiples of it: whole tiles, either way round, on every machine
constexpr int64_t kLeastRows = 192;  // fewer make d_weight's passage through memory dear
constexpr int kParts = 64;           // of the vocabulary, each measured in one go: what threads share out
constexpr int64_t kWeightRows = 128, kPanels = 8;  // of the weight, in the product for d_hidden


// Of a row: the largest logit m, the sum of e^(z - m), the sum of e^(z - m) (z - m).
enum Moment : int { kMost = 0, kSum = 1, kTilt = 2, kMoments = 3 };

struct Work {
  int64_t chunk, stride;         // rows of a chunk, and of logits: a bit more, so that columns share no cache sets
  int64_t parts, part;           // of the vocabulary
  int64_t panels;                // of the hidden width
  float* logits;                 // [vocabulary rounded up, stride]
  float* across;                 // panels of rows: [panel][width][kTileColumns], times the scale
  float* along;                  // panels of width: [panel][chunk][kTileColumns]
  float* d_hidden;               // [chunk, panels * kTileColumns]
  float* moments;                // [parts][kMoments][chunk]
  float *lse, *pull;             // [chunk]; pull: slope * scale
  float *logp, *old_logp, *ref_logp, *advantages, *weights, *loss, *slope;  // [chunk]: what grpo_loss reads and writes
  int64_t* order;                // [rows]: those with a gradient first
  int64_t live;
};

int64_t chunk_rows(const HeadCall& c) {
  const int64_t fit = (int64_t{1} << 18) / c.vocabulary / kRowStep * kRowStep;  // 1 MiB of logits
  const int64_t rows = fit < kLeastRows ? kLeastRows : (fit > 4 * kLeastRows ? 4 * kLeastRows : fit);
  const int64_t all_rows = round_up(c.rows, kRowStep);
  return least(rows, all_rows);
}

bool reserve(const HeadCall& c, Scratch& memory, Work& w) {
  w.chunk = chunk_rows(c);
  w.stride = w.chunk + 16;
  w.part = round_up(ceil_div(c.vocabulary, kParts), kBlock);
  w.parts = ceil_div(c.vocabulary, w.part);
  w.panels = ceil_div(c.width, kTileColumns);
  const int64_t width = w.panels * kTileColumns;
  const int64_t sizes[] = {round_up(c.vocabulary, kBlock) * w.stride,
                           w.chunk * c.width,
                           c.gradient() ? w.chunk * width : 0,
                           c.d_hidden ? w.chunk * width : 0,
                           w.parts * kMoments * w.chunk};
  int64_t total = 9 * w.chunk + 2 * c.rows;
  for (const int64_t size : sizes) total += round_up(size, 16);
  if (!memory.reserve(total)) return false;
  float* next = memory.data();
  float** arrays[] = {&w.logits, &w.across, &w.along, &w.d_hidden, &w.moments};
  for (int i = 0; i < 5; ++i) {
    *arrays[i] = next;
    next += round_up(sizes[i], 16);
  }
  float** streams[] = {&w.lse,        &w.pull,    &w.logp, &w.old_logp, &w.ref_logp,
                       &w.advantages, &w.weights, &w.loss, &w.slope};
  for (float** stream : streams) {
    *stream = next;
    next += w.chunk;
  }
  w.order = reinterpret_cast<int64_t*>(next);
  return true;
}

// Whether a row can have a gradient; clipping is only known later, and such rows stay in.
bool has_gradient(const HeadCall& c, int64_t row) {
  if (c.loss == HeadCall::kGivenSlope) return c.slopes[row] != 0;
  return c.weights[row] != 0 && ((c.kl_kind != 0 && c.kl_coef != 0) || c.advantages[row] != 0);
}

void put_in_order(const HeadCall& c, Work& w) {
  w.live = 0;
  for (int64_t row = 0; row < c.rows && c.gradient(); ++row)
    if (has_gradient(c, row)) w.order[w.live++] = row;
  int64_t next = w.live;
  for (int64_t row = 0; row < c.rows; ++row)
    if (!c.gradient() || !has_gradient(c, row)) w.order[next++] = row;
}

// Both forms of a chunk's hidden states.
void pack_hidden(const HeadCall& c, const Work& w, const int64_t* order, int64_t rows, bool gradient) {
#pragma omp for schedule(static) nowait
  for (int64_t panel = 0; panel < ceil_div(rows, kTileColumns); ++panel) {
    float* to = w.across + panel * c.width * kTileColumns;
    for (int64_t n = 0; n < kTileColumns; ++n) {
      const int64_t i = panel * kTileColumns + n;
      const float* from = i < rows ? c.hidden + order[i] * c.width : nullptr;
      for (int64_t k = 0; k < c.width; ++k) to[k * kTileColumns + n] = from ? from[k] * c.scale : 0.0f;
    }
  }
#pragma omp for schedule(static)
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t panel = 0; gradient && panel < w.panels; ++panel)
      pack_right(c.hidden + order[i] * c.width + panel * kTileColumns, c.width - panel * kTileColumns,
                 w.along + (panel * w.chunk + i) * kTileColumns);
}

// Adds `rows` rows of transposed logits to the moments of their columns, a vector of columns at a time.
void measure_block(const float* logits, int64_t stride, int64_t rows, int64_t columns, float* moments, int64_t chunk) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    const float* z = logits + c;
    Vec most = load(z);
    for (int64_t v = 1; v < rows; ++v) most = larger(load(z + v * stride), most);
    const Vec before = load(moments + kMost * chunk + c);
    most = larger(most, before);
    const Vec shift = before - most, keep = exp_nonpositive(shift);
    const Vec held = load(moments + kSum * chunk + c);
    Vec sum{}, tilt{};
    for (int64_t v = 0; v < rows; ++v) {
      Vec d = load(z + v * stride) - most;
      const Vec e = exp_nonpositive(d);
      d = d < -1e30f ? all(-1e30f) : d;  // 0 times -infinity is not 0
      sum += e;
      tilt += e * d;
    }
    store(moments + kMost * chunk + c, most);
    store(moments + kSum * chunk + c, keep * held + sum);
    store(moments + kTilt * chunk + c, keep * (load(moments + kTilt * chunk + c) + held * shift) + tilt);
  }
}

void make_logits(const HeadCall& c, const Work& w, int64_t rows) {
  const int64_t columns = round_up(rows, kTileColumns);
#pragma omp for schedule(static)
  for (int64_t p = 0; p < w.parts; ++p) {
    alignas(64) float left[kBlock * kLeftRow];
    float* moments = w.moments + p * kMoments * w.chunk;
    for (int64_t i = 0; i < w.chunk; ++i) {
      moments[kMost * w.chunk + i] = -1e30f;
      moments[kSum * w.chunk + i] = moments[kTilt * w.chunk + i] = 0;
    }
    const int64_t end = least((p + 1) * w.part, c.vocabulary);
    for (int64_t v = p * w.part; v < end; v += kBlock) {
      const int64_t count = least(end - v, kBlock);
      for (int64_t k = 0; k < c.width; k += kDepth) {
        const int64_t depth = least(c.width - k, kDepth);
        pack_left(c.weight + v * c.width + k, c.width, count, depth, left);
        Ahead next = k + depth < c.width
                         ? Ahead{c.weight + v * c.width + k + depth, c.width, count, least(c.width - k - depth, kDepth)}
                         : Ahead{c.weight + (v + kBlock) * c.width, c.width, least(end - v - kBlock, kBlock),
                                 least(c.width, kDepth)};
        for (int64_t n = 0; n < columns; n += kTileColumns)
          for (int64_t m = 0; m < count; m += kTileRows, next.fetch(2))
            tile<kLeftRow>(left + m * kLeftRow, 1, w.across + n * c.width + k * kTileColumns, depth,
                           w.logits + (v + m) * w.stride + n, w.stride, k > 0);
      }
      measure_block(w.logits + v * w.stride, w.stride, count, columns, moments, w.chunk);
    }
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

// From the parts' moments: logp and entropy of the chunk's rows, then their loss and slope.
void measure_rows(const HeadCall& c, const Work& w, const int64_t* order, int64_t rows, Sums& sums) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    Vec most = all(-1e30f), sum{}, tilt{};
    for (int64_t p = 0; p < w.parts; ++p) most = larger(load(w.moments + p * kMoments * w.chunk + i), most);
    for (int64_t p = 0; p < w.parts; ++p) {
      const float* part = w.moments + p * kMoments * w.chunk + i;
      const Vec shift = load(part) - most, keep = exp_nonpositive(shift), held = load(part + kSum * w.chunk);
      sum += keep * held;
      tilt += keep * (load(part + kTilt * w.chunk) + held * shift);
    }
    for (int lane = 0; lane < kLanes && i + lane < rows; ++lane) {
      const int64_t row = order[i + lane];
      const float log_sum = std::log(sum[lane]);
      w.lse[i + lane] = most[lane] + log_sum;
      w.logp[i + lane] = c.logp[row] = w.logits[c.targets[row] * w.stride + i + lane] - most[lane] - log_sum;
      if (c.entropy) c.entropy[row] = log_sum - tilt[lane] / sum[lane];
    }
  }
  if (c.loss == HeadCall::kGRPO) policy(c, w, order, rows, sums);
  for (int64_t i = 0; i < w.chunk; ++i) {
    const float slope = i >= rows || c.loss == HeadCall::kNoLoss ? 0.0f
                        : c.loss == HeadCall::kGRPO              ? w.slope[i]
                                                                 : c.slopes[order[i]];
    w.pull[i] = slope * c.scale;
    if (i >= rows) w.lse[i] = 0;
  }
}

// `rows` rows of transposed logits, which begin at word `first`, become the gradient of sum(slope * logp).
void differentiate_block(const HeadCall& c, const Work& w, const int64_t* order, int64_t rows, int64_t first,
                         int64_t count) {
  float* block = w.logits + first * w.stride;
  for (int64_t i = 0; i < round_up(rows, kRowStep); i += kLanes) {
    const Vec lse = load(w.lse + i), push = -load(w.pull + i);
    for (int64_t v = 0; v < count; ++v) {
      float* z = block + v * w.stride + i;
      store(z, push * exp_nonpositive(load(z) - lse));
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t word = c.targets[order[i]] - first;
    if (word >= 0 && word < count) block[word * w.stride + i] += w.pull[i];
  }
}

// The logits' gradient in place of the logits, and a chunk's part of d_weight.
void differentiate(const HeadCall& c, const Work& w, const int64_t* order, int64_t rows, bool add) {
#pragma omp for schedule(static)
  for (int64_t p = 0; p < w.parts; ++p) {
    alignas(64) float left[kBlock * kLeftRow];
    const int64_t end = least((p + 1) * w.part, c.vocabulary);
    for (int64_t v = p * w.part; v < end; v += kBlock) {
      const int64_t count = least(end - v, kBlock);
      differentiate_block(c, w, order, rows, v, count);
      for (int64_t k = 0; c.d_weight && k < rows; k += kDepth) {
        const int64_t depth = least(rows - k, kDepth);
        pack_left(w.logits + v * w.stride + k, w.stride, count, depth, left);
        for (int64_t panel = 0; panel < w.panels; ++panel) {
          const int64_t n = panel * kTileColumns;
          for (int64_t m = 0; m < count; m += kTileRows) {
            const bool last = m + kTileRows >= count;  // then the next tile is the next panel's first
            float* next = c.d_weight + (last ? v : v + m + kTileRows) * c.width + n + (last ? kTileColumns : 0);
            Ahead{next, c.width, add ? kTileRows : 0, kTileColumns}.fetch(kTileRows);
            tile_part<kLeftRow>(left + m * kLeftRow, 1, w.along + (panel * w.chunk + k) * kTileColumns, depth,
                                c.d_weight + (v + m) * c.width + n, c.width, add || k > 0, count - m, c.width - n);
          }
        }
      }
    }
  }
}

// A chunk's d_hidden: groups of kRowStep rows and kPanels panels of the width, each summed over the whole vocabulary.
void pull_back(const HeadCall& c, const Work& w, const int64_t* order, int64_t rows) {
  const int64_t width = w.panels * kTileColumns, across = ceil_div(w.panels, kPanels);
#pragma omp for schedule(static)
  for (int64_t group = 0; group < across * ceil_div(rows, kRowStep); ++group) {
    alignas(64) float right[kWeightRows * kTileColumns];
    const int64_t first = group / across * kRowStep, last = least(first + kRowStep, rows);
    const int64_t panel = group % across * kPanels, panels = least(panel + kPanels, w.panels);
    const int64_t column = panel * kTileColumns;
    for (int64_t v = 0; v < c.vocabulary; v += kWeightRows) {
      const int64_t depth = least(c.vocabulary - v, kWeightRows);
      for (int64_t n = column; n < panels * kTileColumns; n += kTileColumns) {
        for (int64_t k = 0; k < depth; ++k)
          pack_right(c.weight + (v + k) * c.width + n, c.width - n, right + k * kTileColumns);
        const bool turn = n + kTileColumns == panels * kTileColumns;  // the next panel is the first, further down
        Ahead weight{c.weight + (turn ? v + kWeightRows : v) * c.width + (turn ? column : n + kTileColumns), c.width,
                     turn ? c.vocabulary - v - kWeightRows : depth, kTileColumns};
        const int64_t share = (n - column) / kTileColumns * (kWeightRows / kPanels);
        Ahead logits{w.logits + (v + kWeightRows + share) * w.stride + first, w.stride,
                     least(c.vocabulary - v - kWeightRows - share, kWeightRows / kPanels), kRowStep};
        for (int64_t m = first; m < last; m += kTileRows, weight.fetch(16), logits.fetch(4))
          tile<1>(w.logits + v * w.stride + m, w.stride, right, depth, w.d_hidden + m * width + n, width, v > 0);
      }
    }
    const int64_t end = least(panels * kTileColumns, c.width);
    for (int64_t i = first; i < last; ++i)
      std::memcpy(c.d_hidden + order[i] * c.width + column, w.d_hidden + i * width + column,
                  (end - column) * sizeof(float));
  }
}

void zero_rows(const HeadCall& c, const Work& w) {
  for (int64_t i = w.live; c.d_hidden && i < c.rows; ++i)
    std::memset(c.d_hidden + w.order[i] * c.width, 0, c.width * sizeof(float));
  if (c.d_weight && !w.live) std::memset(c.d_weight, 0, c.vocabulary * c.width * sizeof(float));
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
  for (int64_t start = 0; start < c.rows;) {
    const bool gradient = start < w.live;
    const int64_t end = gradient ? w.live : c.rows, rows = least(end - start, w.chunk);
    const int64_t* order = w.order + start;
    pack_hidden(c, w, order, rows, gradient);
    make_logits(c, w, rows);
#pragma omp single
    measure_rows(c, w, order, rows, sums);
    if (gradient) {
      differentiate(c, w, order, rows, start > 0);
      if (c.d_hidden) pull_back(c, w, order, rows);
    }
    start += rows;
  }
  const double found[] = {sums.loss, sums.kl, sums.clipped, sums.ratio, sums.largest, sums.count};
  for (int i = 0; c.stats && i < 6; ++i) c.stats[i] = static_cast<float>(found[i]);
  return true;
}

}  // namespace R1_ISA
}  // namespace r1
