// A linear layer, x W^T + b, and the two products of its backward. See kernels/linear.py for the contract.
//
// Each of the three is tiles of registers over packed panels of one factor, the other read as it lies where its rows run
// along the sum. Up to kMany rows, the forward makes its result transposed, [outputs, rows]: then the weight, which no
// cache holds when a few rows are decoded, is read once and never copied, and the rows of x are what is packed. With more
// rows it is the weight that is packed; with fewer than a vector holds, squares of it are transposed in registers.
// Every number is one chain of fused multiply-adds over kDeep terms, chain by chain, in an order that neither the number
// of rows nor that of threads changes. So a row's result has the same bits whatever the batch it sits in.
#include "ops.h"
#include "product.h"
#include "row_slices.h"
#include "scratch.h"

namespace r1 {
namespace R1_ISA {

namespace {

constexpr int64_t kDeep = 256;    // terms of a chain: its panel fills half of L1
constexpr int64_t kFew = 4;       // rows for which the weight is transposed in registers: a tile would be mostly empty
constexpr int64_t kMany = 128;    // rows above which the weight is packed
constexpr int kNarrowRows = 12;   // of a tile one vector wide, for panels that have no more rows of x
constexpr int64_t kGroup = 8;     // panels that share one reading of the left factor, in the backward
constexpr int64_t kRowBlock = 240;   // rows of d_y, in d_x: with kDeep columns, half of L2
constexpr int64_t kOutBlock = 192;   // outputs, in d_weight
constexpr int64_t kAhead = 64;    // numbers of a row of the weight that are fetched before they are needed
constexpr int64_t kSerial = 1 << 18;  // multiply-adds under which threads cost more than they give
static_assert(kBlock % kNarrowRows == 0 && kBlock % kTileRows == 0 && kBlock % kLine == 0, "blocks are whole tiles");
static_assert(kRowBlock % kTileRows == 0 && kOutBlock % kTileRows == 0, "blocks are whole tiles");

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t ceil_div(int64_t n, int64_t step) { return (n + step - 1) / step; }

struct Sizes {
  int64_t rows, width, outputs;
  bool worth_threads() const { return rows * width * outputs > kSerial; }
};

// Rows of x, transposed: a panel [width][kTileColumns], of which `rows` columns are x and the others zero.
void pack_across(const float* x, int64_t row, int64_t rows, int64_t width, float* to) {
  for (int64_t first = 0; first < rows; first += kLanes)
    for (int64_t k = 0; k < width; k += kLanes) {
      Vec square[kLanes];
      for (int64_t i = 0; i < kLanes; ++i)
        square[i] = first + i < rows ? load(x + (first + i) * row + k, width - k) : Vec{};
      transpose_square(square);
      for (int64_t i = 0; i < kLanes && k + i < width; ++i) store(to + (k + i) * kTileColumns + first, square[i]);
    }
}

// `count` rows of the left factor against one panel; those past the last whole tile come from `edge`, padded. ahead: the
// left factor of the next call, or null.
template <int ROWS, int VECTORS>
void tiles_along(const float* left, int64_t row, const float* edge, int64_t count, const float* right, int64_t depth,
                 float* out, int64_t out_row, bool add, const float* ahead) {
  int64_t m = 0;
  for (; m + ROWS <= count; m += ROWS) {
    const float* next = m + 2 * ROWS <= count ? left + (m + ROWS) * row : ahead;
    tile_along<ROWS, VECTORS>(left + m * row, row, right, depth, out + m * out_row, out_row, add, next);
  }
  if (m < count) tile_along<ROWS, VECTORS>(edge, kDeep, right, depth, out + m * out_row, out_row, add);
}

// Copies the rows past the last whole tile of `tile` rows, zeros below them, so that tiles read nothing outside.
void pack_edge(const float* left, int64_t row, int64_t count, int64_t tile, int64_t depth, float* edge) {
  const int64_t whole = count / tile * tile;
  for (int64_t m = whole; m < count; ++m) std::memcpy(edge + (m - whole) * kDeep, left + m * row, depth * sizeof(float));
  for (int64_t m = count - whole; count > whole && m < tile; ++m) std::memset(edge + m * kDeep, 0, depth * sizeof(float));
}

// [panel][kBlock][kTileColumns] sums of `count` outputs become rows of y, with the bias.
void store_across(const float* sums, const float* bias, int64_t rows, int64_t count, float* y, int64_t y_row) {
  for (int64_t first = 0; first < rows; first += kLanes) {
    const float* from = sums + first / kTileColumns * kBlock * kTileColumns + first % kTileColumns;
    for (int64_t n = 0; n < count; n += kLanes) {
      Vec square[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) square[i] = load(from + (n + i) * kTileColumns);
      transpose_square(square);
      const Vec shift = bias ? load(bias + n, count - n) : Vec{};
      for (int64_t i = 0; i < kLanes && first + i < rows; ++i)
        store(y + (first + i) * y_row + n, square[i] + shift, count - n);
    }
  }
}

// `count` outputs, from one reading of their weights, for all rows of the packed panels. more: whether this thread goes
// on with the outputs behind them.
void outputs_of(const float* panels, int64_t rows, const float* weight, const float* bias, int64_t count, bool more,
                const Sizes& s, float* y) {
  alignas(64) float sums[kMany * kBlock];
  alignas(64) float edge[kNarrowRows * kDeep], narrow_edge[kNarrowRows * kDeep];
  for (int64_t k = 0; k < s.width; k += kDeep) {
    const int64_t depth = least(s.width - k, kDeep);
    const float* left = weight + k;
    pack_edge(left, s.width, count, kTileRows, depth, edge);
    pack_edge(left, s.width, count, kNarrowRows, depth, narrow_edge);
    for (int64_t first = 0; first < rows; first += kTileColumns) {
      const float* right = panels + first * s.width + k * kTileColumns;
      const bool again = first + kTileColumns < rows, deeper = k + kDeep < s.width;
      const float* ahead = again ? left : deeper ? left + kDeep : more ? weight + count * s.width : nullptr;
      float* to = sums + first * kBlock;
      if (rows - first > kLanes)
        tiles_along<kTileRows, 2>(left, s.width, edge, count, right, depth, to, kTileColumns, k > 0, ahead);
      else
        tiles_along<kNarrowRows, 1>(left, s.width, narrow_edge, count, right, depth, to, kTileColumns, k > 0, ahead);
    }
  }
  store_across(sums, bias, rows, count, y, s.outputs);
}

// A vector of outputs for ROWS rows. `chains`: squares of the weight side by side, so that their sums need not wait.
template <int ROWS>
inline __attribute__((noinline)) void few_of(const float* x, int64_t x_row, const float* weight, const float* bias,
                                             int64_t count, const Sizes& s, float* y) {
  constexpr int kChains = ROWS > 2 ? 1 : 2;
  for (int64_t n = 0; n < count; n += kChains * kLanes) {
    Vec total[kChains][ROWS];
    const float* from[kChains][kLanes];
    for (int c = 0; c < kChains; ++c)  // past the last output it is read again, and not stored
      for (int64_t i = 0; i < kLanes; ++i) from[c][i] = weight + least(n + c * kLanes + i, count - 1) * s.width;
    for (int64_t first = 0; first < s.width; first += kDeep) {
      Vec sum[kChains][ROWS] = {};
      const int64_t end = least(first + kDeep, s.width);
      int64_t k = first;
      for (; k + kLanes <= end; k += kLanes)
#pragma GCC unroll 2
        for (int c = 0; c < kChains; ++c) {
          Vec square[kLanes];
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) {
            square[i] = load(from[c][i] + k);
            __builtin_prefetch(from[c][i] + k + kAhead, 0, 2);
          }
          transpose_square(square);
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i)
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) sum[c][r] += all(x[r * x_row + k + i]) * square[i];
        }
      for (; k < end; ++k)
        for (int c = 0; c < kChains; ++c) {
          Vec column;
          for (int i = 0; i < kLanes; ++i) column[i] = from[c][i][k];
          for (int r = 0; r < ROWS; ++r) sum[c][r] += all(x[r * x_row + k]) * column;
        }
      for (int c = 0; c < kChains; ++c)
        for (int r = 0; r < ROWS; ++r) total[c][r] = first ? total[c][r] + sum[c][r] : sum[c][r];
    }
    for (int64_t c = 0; c < kChains && n + c * kLanes < count; ++c) {
      const int64_t at = n + c * kLanes;
      const Vec shift = bias ? load(bias + at, count - at) : Vec{};
      for (int r = 0; r < ROWS; ++r) store(y + r * s.outputs + at, total[c][r] + shift, count - at);
    }
  }
}

// `count` <= kTileColumns outputs for `rows` rows, their weights packed for all.
void rows_of(const float* x, int64_t x_row, int64_t rows, const float* weight, const float* bias, int64_t count,
             const Sizes& s, float* y) {
  alignas(64) float right[kDeep * kTileColumns];
  alignas(64) float edge[kTileRows * kDeep], last[kTileRows * kTileColumns];
  const int64_t whole = rows / kTileRows * kTileRows;
  for (int64_t k = 0; k < s.width; k += kDeep) {
    const int64_t depth = least(s.width - k, kDeep);
    pack_across(weight + k, s.width, count, depth, right);
    pack_edge(x + k, x_row, rows, kTileRows, depth, edge);
    for (int64_t m = 0; m < rows; m += kTileRows) {
      const float* left = m < whole ? x + m * x_row + k : edge;
      const int64_t row = m < whole ? x_row : kDeep;
      float* to = y + m * s.outputs;
      if (m < whole && count == kTileColumns) {
        tile_along<kTileRows, 2>(left, row, right, depth, to, s.outputs, k > 0);
        continue;
      }
      tile_along<kTileRows, 2>(left, row, right, depth, last, kTileColumns, false);
      add_part(last, rows - m, count, to, s.outputs, k > 0);
    }
  }
  for (int64_t m = 0; m < (bias ? rows : 0); ++m)
    for (int64_t n = 0; n < count; ++n) y[m * s.outputs + n] += bias[n];
}

// Rows first to first + rows of d_y against the weight's columns of `panels` panels.
void inputs_of(const float* d_y, int64_t d_row, int64_t rows, const float* weight, int64_t columns, const Sizes& s,
               float* d_x) {
  alignas(64) float right[kDeep * kTileColumns];
  alignas(64) float edge[kTileRows * kDeep], last[kTileRows * kTileColumns];
  const int64_t whole = rows / kTileRows * kTileRows;
  for (int64_t n = 0; n < s.outputs; n += kDeep) {
    const int64_t depth = least(s.outputs - n, kDeep);
    pack_edge(d_y + n, d_row, rows, kTileRows, depth, edge);
    for (int64_t k = 0; k < columns; k += kTileColumns) {
      for (int64_t i = 0; i < depth; ++i) pack_right(weight + (n + i) * s.width + k, columns - k, right + i * kTileColumns);
      const bool turn = k + kTileColumns >= columns;  // then the next panel is the first, further down
      Ahead next{weight + (turn ? n + kDeep : n) * s.width + (turn ? 0 : k + kTileColumns), s.width,
                 turn ? least(s.outputs - n - kDeep, kDeep) : depth, kTileColumns};
      for (int64_t m = 0; m < rows; m += kTileRows, next.fetch(kDeep * kTileRows / kRowBlock + 1)) {
        const float* left = m < whole ? d_y + m * d_row + n : edge;
        const int64_t row = m < whole ? d_row : kDeep;
        if (m < whole && columns - k >= kTileColumns) {
          tile_along<kTileRows, 2>(left, row, right, depth, d_x + m * s.width + k, s.width, n > 0);
          continue;
        }
        tile_along<kTileRows, 2>(left, row, right, depth, last, kTileColumns, false);
        add_part(last, rows - m, columns - k, d_x + m * s.width + k, s.width, n > 0);
      }
    }
  }
}

// d_y's rows first to first + depth as tiles [k][kTileRows] of `count` outputs, zeros past the last.
void pack_tiles(const float* d_y, int64_t d_row, int64_t depth, int64_t count, float* to) {
  for (int64_t n = 0; n < count; n += kTileRows)
    for (int64_t k = 0; k < depth; ++k, to += kTileRows) {
      const float* from = d_y + k * d_row + n;
      if (n + kTileRows <= count)
        std::memcpy(to, from, kTileRows * sizeof(float));
      else
        for (int64_t i = 0; i < kTileRows; ++i) to[i] = n + i < count ? from[i] : 0.0f;
    }
}

// d_weight of `count` <= kOutBlock outputs and `columns` inputs, over all rows.
void weights_of(const float* d_y, int64_t d_row, int64_t count, const float* x, int64_t x_row, int64_t columns,
                const Sizes& s, float* left, float* d_weight) {
  alignas(64) float right[kDeep * kTileColumns];
  const int64_t tiles = ceil_div(count, kTileRows);
  for (int64_t m = 0; m < s.rows; m += kDeep) {
    const int64_t depth = least(s.rows - m, kDeep);
    pack_tiles(d_y + m * d_row, d_row, depth, count, left);
    for (int64_t k = 0; k < columns; k += kTileColumns) {
      for (int64_t i = 0; i < depth; ++i) pack_right(x + (m + i) * x_row + k, columns - k, right + i * kTileColumns);
      const bool turn = k + kTileColumns >= columns;
      Ahead next{x + (turn ? m + kDeep : m) * x_row + (turn ? 0 : k + kTileColumns), x_row,
                 turn ? least(s.rows - m - kDeep, kDeep) : depth, kTileColumns};
      for (int64_t t = 0; t < tiles; ++t, next.fetch(kDeep * kTileRows / kOutBlock + 1))
        tile_part<1>(left + t * depth * kTileRows, kTileRows, right, depth, d_weight + t * kTileRows * s.width + k,
                     s.width, m > 0, count - t * kTileRows, columns - k);
    }
  }
}

// Column sums of d_y, chains of kDeep rows.
void bias_of(const float* d_y, int64_t d_row, int64_t rows, int64_t columns, float* d_bias) {
  for (int64_t n = 0; n < columns; n += kLanes) {
    Vec total{};
    for (int64_t first = 0; first < rows; first += kDeep) {
      Vec sum{};
      for (int64_t m = first; m < rows && m < first + kDeep; ++m) sum += load(d_y + m * d_row + n, columns - n);
      total += sum;
    }
    store(d_bias + n, total, columns - n);
  }
}

}  // namespace

bool linear_forward(const float* x, int64_t x_row, const float* weight, const float* bias, int64_t rows, int64_t width,
                    int64_t outputs, float* y) {
  const Sizes s{rows, width, outputs};
  if (rows <= kFew) {
    const auto few = rows == 1 ? few_of<1> : rows == 2 ? few_of<2> : rows == 3 ? few_of<3> : few_of<4>;
#pragma omp parallel for schedule(static) if (s.worth_threads())
    for (int64_t n = 0; n < (rows ? outputs : 0); n += kBlock)
      few(x, x_row, weight + n * width, bias ? bias + n : nullptr, least(outputs - n, kBlock), s, y + n);
    return true;
  }
  if (rows > kMany) {
    const int64_t blocks = ceil_div(rows, kRowBlock), panels = ceil_div(outputs, kTileColumns);
#pragma omp parallel for schedule(static) if (s.worth_threads())
    for (int64_t task = 0; task < blocks * panels; ++task) {
      const int64_t m = task / panels * kRowBlock, n = task % panels * kTileColumns;
      rows_of(x + m * x_row, x_row, least(rows - m, kRowBlock), weight + n * width, bias ? bias + n : nullptr,
              least(outputs - n, kTileColumns), s, y + m * outputs + n);
    }
    return true;
  }
  // A thread's outputs lie together, in blocks that end where a line of y ends: two threads, or a block and the next,
  // would each have to read that line to write their part.
  const int64_t part = round_up(ceil_div(outputs, s.worth_threads() ? most_threads() : 1), kLine);
  Scratch panels;
  if (!panels.reserve(round_up(rows, kTileColumns) * width)) return false;
#pragma omp parallel if (s.worth_threads())
  {
#pragma omp for schedule(static)
    for (int64_t at = 0; at < rows; at += kTileColumns)
      pack_across(x + at * x_row, x_row, least(rows - at, kTileColumns), width, panels.data() + at * width);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < outputs; first += part)
      for (int64_t n = first, end = least(first + part, outputs); n < end; n += kBlock)
        outputs_of(panels.data(), rows, weight + n * width, bias ? bias + n : nullptr, least(end - n, kBlock),
                   n + kBlock < end, s, y + n);
  }
  return true;
}

void linear_backward_input(const float* d_y, int64_t d_row, const float* weight, int64_t rows, int64_t width,
                           int64_t outputs, float* d_x) {
  const Sizes s{rows, width, outputs};
  const int64_t columns = kGroup * kTileColumns, groups = ceil_div(width, columns);
  const int64_t block = rows * groups >= 16 * kRowBlock ? kRowBlock : rows * groups >= 4 * kRowBlock ? kRowBlock / 4 : 12;
#pragma omp parallel for schedule(static) if (s.worth_threads())
  for (int64_t task = 0; task < ceil_div(rows, block) * groups; ++task) {
    const int64_t m = task / groups * block, k = task % groups * columns;
    inputs_of(d_y + m * d_row, d_row, least(rows - m, block), weight + k, least(width - k, columns), s,
              d_x + m * width + k);
  }
}

bool linear_backward_weight(const float* d_y, int64_t d_row, const float* x, int64_t x_row, int64_t rows, int64_t width,
                            int64_t outputs, float* d_weight, float* d_bias) {
  const Sizes s{rows, width, outputs};
  const int64_t columns = kGroup * kTileColumns, groups = ceil_div(width, columns);
  const int64_t block = outputs * groups >= 8 * kOutBlock ? kOutBlock : kOutBlock / 4;
  bool enough = true;
#pragma omp parallel if (s.worth_threads())
  {
    Scratch left;
    if (!left.reserve(kOutBlock * kDeep)) {
#pragma omp atomic write
      enough = false;
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < ceil_div(outputs, block) * groups; ++task) {
      if (!left.data()) continue;
      const int64_t n = task / groups * block, k = task % groups * columns;
      weights_of(d_y + n, d_row, least(outputs - n, block), x + k, x_row, least(width - k, columns), s, left.data(),
                 d_weight + n * width + k);
    }
#pragma omp for schedule(static)
    for (int64_t n = 0; n < (d_bias ? outputs : 0); n += 64)
      bias_of(d_y + n, d_row, rows, least(outputs - n, 64), d_bias + n);
  }
  return enough;
}

}  // namespace R1_ISA
}  // namespace r1
