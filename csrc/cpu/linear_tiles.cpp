// A linear layer of few rows on matrix tiles (matrix_tiles.h). The weight, which no cache holds when a few rows are decoded,
// is read once as it lies and taken to pieces a block at a time; the result is made transposed, [outputs, rows]. What a
// number is the sum of, and in which order, is what gemm_tiles.cpp does with many rows: the same bits.
#include "linear_tiles.h"

#include "matrix_tiles.h"
#include "threads.h"

namespace r1 {
namespace R1_ISA {

#ifdef R1_TILES

namespace {

constexpr int64_t kSteps = 8;         // of 32 terms that are taken to pieces at a time: two tiles of outputs in L1
constexpr int64_t kSerial = 1 << 18;  // multiply-adds under which threads cost more than they give

struct Sizes {
  int64_t rows, width, outputs, panels, steps;
};

// The sums of `count` <= 32 outputs become columns of y, with the bias.
void store_columns(const float* sums, const float* bias, const Sizes& s, int64_t count, float* y) {
  for (int64_t first = 0; first < count; first += kTileSide) {
    const int64_t wide = least(count - first, kTileSide);
    const Vec shift = bias ? load(bias + first, wide) : Vec{};
    for (int64_t row = 0; row < s.rows; row += kTileSide) {
      Vec square[kTileSide];
#pragma GCC unroll 16
      for (int i = 0; i < kTileSide; ++i) square[i] = load(sums + (first + i) * kMany + row);
      transpose_square(square);
      for (int64_t i = 0; i < kTileSide && row + i < s.rows; ++i)
        store(y + (row + i) * s.outputs + first, square[i] + shift, wide);
    }
  }
}

// `count` <= 32 outputs for all rows, whose tiles lie [panel][step][piece]. more: outputs behind them that this thread
// goes on with.
template <int PIECES>
void outputs_of(const float* panels, const float* weight, const float* bias, int64_t count, int64_t more, const Sizes& s,
                float* y) {
  alignas(64) float left[2 * kSteps * PIECES * kTileFloats];
  alignas(64) float sums[2 * kTileSide * kMany];
  const int64_t lefts = count > kTileSide ? 2 : 1, next = s.steps * PIECES * kTileFloats;
  for (int64_t step = 0; step < s.steps; step += kSteps) {
    const int64_t steps = least(s.steps - step, kSteps);
    split_rows<PIECES>(weight + step * kTileTerms, s.width, count, s.width - step * kTileTerms, steps, left);
    const int64_t deeper = (step + steps) * kTileTerms, left_over = s.width - deeper;
    Ahead soon = left_over > 0 ? Ahead{weight + deeper, s.width, count, least(left_over, kSteps * kTileTerms)}
                               : Ahead{weight + count * s.width, s.width, least(more, 2 * kTileSide),
                                       least(s.width, kSteps * kTileTerms)};
    const int64_t share = ceil_div(2 * kTileSide, ceil_div(s.panels, 2) * steps);
    for (int64_t panel = 0; panel < s.panels; panel += 2)
      tiles_of<PIECES, true>(lefts, s.panels - panel > 1 ? 2 : 1, left, steps * PIECES * kTileFloats,
                             panels + panel * next + step * PIECES * kTileFloats, next, steps, sums + panel * kTileSide,
                             kMany, step > 0, &soon, share);
  }
  store_columns(sums, bias, s, count, y);
}

template <int PIECES>
bool linear(const float* x, int64_t x_row, const float* weight, const float* bias, const Sizes& s, float* y) {
  Scratch panels;
  if (!panels.reserve(s.panels * s.steps * PIECES * kTileFloats)) return false;
  const bool threads = s.rows * s.width * s.outputs > kSerial;
  const int64_t part = round_up(ceil_div(s.outputs, threads ? most_threads() : 1), 2 * kTileSide);  // of a thread
#pragma omp parallel if (threads)
  {
    const TileRegisters registers;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < s.panels * s.steps; ++i) {
      const int64_t row = i / s.steps * kTileSide, k = i % s.steps * kTileTerms;
      float* tile = panels.data() + i * PIECES * kTileFloats;
      split_along<PIECES>(x + row * x_row + k, x_row, s.rows - row, s.width - k, tile);
      turn<PIECES>(tile);
    }
#pragma omp for schedule(static)
    for (int64_t first = 0; first < s.outputs; first += part)
      for (int64_t n = first, end = least(first + part, s.outputs); n < end; n += 2 * kTileSide)
        outputs_of<PIECES>(panels.data(), weight + n * s.width, bias ? bias + n : nullptr, least(end - n, 2 * kTileSide),
                           end - n - 2 * kTileSide, s, y + n);
  }
  return true;
}

}  // namespace

bool linear_tiles(const float* x, int64_t x_row, const float* weight, const float* bias, int64_t rows, int64_t width,
                  int64_t outputs, float* y) {
  const Sizes s{rows, width, outputs, ceil_div(rows, kTileSide), ceil_div(width, kTileTerms)};
  const auto run = tile_pieces == 1 ? linear<1> : tile_pieces == 2 ? linear<2> : linear<3>;
  return run(x, x_row, weight, bias, s, y);
}

#else

bool linear_tiles(const float*, int64_t, const float*, const float*, int64_t, int64_t, int64_t, float*) { return false; }

#endif

}  // namespace R1_ISA
}  // namespace r1
