// A linear layer, x W^T + b, and the two products of its backward. See kernels/linear.py for the contract.
//
// With many rows each of the three is a product of two large matrices (gemm.cpp). Up to kMany, the forward makes its
// result transposed, [outputs, rows], by tiles of registers: then the weight, which no cache holds when a few rows are
// decoded, is read once as it lies, and the rows of x are what is packed. With fewer rows than a vector holds, squares of
// the weight are transposed in registers.
// Every number of the forward is chains of kDeep fused multiply-adds, one after another, in an order that neither the
// number of rows nor that of threads changes. So a row's result has the same bits whatever the batch it sits in.

#include "gemm.h"
#include "linear_tiles.h"
#include "matrix_tiles.h"
#include "ops.h"
#include "product.h"
#include "scratch.h"
#include "threads.h"

namespace r1 {
namespace R1_ISA {

namespace {

constexpr int64_t kDeep = 256;    // terms of a chain: its panel fills half of L1
constexpr int64_t kFew = 4;       // rows for which the weight is transposed in registers: a tile would be mostly empty
constexpr int kNarrowRows = 12;   // of a tile one vector wide, for panels that have no more rows of x
constexpr int64_t kAhead = 64;    // numbers of a row of the weight that are fetched before they are needed
constexpr int64_t kSerial = 1 << 18;  // multiply-adds under which threads cost more than they give
static_assert(kBlock % kNarrowRows == 0 && kBlock % kTileRows == 0 && kBlock % kLine == 0, "blocks are whole tiles");


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
            for (int r = 0; r < ROWS; ++r) sum[c][r] = fma(all(x[r * x_row + k + i]), square[i], sum[c][r]);
        }
      for (; k < end; ++k)
        for (int c = 0; c < kChains; ++c) {
          Vec column;
          for (int i = 0; i < kLanes; ++i) column[i] = from[c][i][k];
          for (int r = 0; r < ROWS; ++r) sum[c][r] = fma(all(x[r * x_row + k]), column, sum[c][r]);
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
  if (!rows) return true;
  if (tile_pieces && rows <= kMany) return linear_tiles(x, x_row, weight, bias, rows, width, outputs, y);
  if (rows <= kFew) {
    const auto few = rows == 1 ? few_of<1> : rows == 2 ? few_of<2> : rows == 3 ? few_of<3> : few_of<4>;
#pragma omp parallel for schedule(static) if (s.worth_threads())
    for (int64_t n = 0; n < outputs; n += kBlock)
      few(x, x_row, weight + n * width, bias ? bias + n : nullptr, least(outputs - n, kBlock), s, y + n);
    return true;
  }
  if (rows > kMany) {
    return gemm({rows, width, outputs, {x, x_row, false}, {weight, width, true}, y, outputs, bias, kDeep});
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

bool linear_backward_input(const float* d_y, int64_t d_row, const float* weight, int64_t rows, int64_t width,
                           int64_t outputs, float* d_x) {
  return gemm({rows, outputs, width, {d_y, d_row, false}, {weight, width, false}, d_x, width, nullptr, kDeep});
}

bool linear_backward_weight(const float* d_y, int64_t d_row, const float* x, int64_t x_row, int64_t rows, int64_t width,
                            int64_t outputs, float* d_weight, float* d_bias) {
  const Sizes s{rows, width, outputs};
#pragma omp parallel for schedule(static) if (s.worth_threads())
  for (int64_t n = 0; n < (d_bias ? outputs : 0); n += 64)
    bias_of(d_y + n, d_row, rows, least(outputs - n, 64), d_bias + n);
  if (!rows) return true;
  const int64_t chain = ceil_div(rows, ceil_div(rows, kLongest));  // all alike: each is a passage over d_weight
  return gemm({outputs, rows, width, {d_y, d_row, true}, {x, x_row, false}, d_weight, width, nullptr, chain});
}

}  // namespace R1_ISA
}  // namespace r1
