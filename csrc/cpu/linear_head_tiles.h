// The three products of linear_head.cpp on matrix tiles (matrix_tiles.h): logits^T, d_weight and d_hidden of a chunk of
// rows, in the blocks in which linear_head.cpp measures and differentiates them. Each function is run by all threads of a
// team, or for a part of the words by one.
// With three pieces the head stays with AVX-512: it took 0.82 to 0.97 of that time (loss and log-probabilities of three
// sizes, in turns), because what is between the products is the same; two pieces gain 1.1 to 1.5 times.
#pragma once

#include "matrix_tiles.h"

namespace r1 {
namespace R1_ISA {

constexpr int kHeadPieces = 2;  // at most

inline bool head_on_tiles() { return tile_pieces > 0 && tile_pieces <= kHeadPieces; }

constexpr int64_t kWordBlock = 2 * kTileSide;  // words of the vocabulary that go together
constexpr int64_t kHeadSteps = 8;              // of 32 terms of a left factor that are taken to pieces at a time
constexpr int64_t kWordSteps = 16;             // of 32 words of the weight, in the product for d_hidden

// Floats of memory for the pieces of a chunk's hidden states: as right factor of the logits, and of d_weight; and of the
// weight's pieces in the product for d_hidden.
inline int64_t across_floats(int64_t rows, int64_t width) {
  return ceil_div(rows, kTileSide) * ceil_div(width, kTileTerms) * kHeadPieces * kTileFloats;
}
inline int64_t along_floats(int64_t rows, int64_t width) {
  return ceil_div(width, kTileSide) * ceil_div(rows, kTileTerms) * kHeadPieces * kTileFloats;
}
// Of the rows that a thread has of a chunk's d_logits, as left factor.
inline int64_t rows_of_thread(int64_t rows, int64_t threads) {
  return round_up(ceil_div(ceil_div(rows, kTileSide), threads), 2) * kTileSide;
}
inline int64_t pulled_floats(int64_t rows, int64_t threads) {
  return rows_of_thread(rows, threads) / kTileSide * kWordSteps * kHeadPieces * kTileFloats;
}
inline int64_t weight_floats(int64_t width) {
  return ceil_div(width, kTileSide) * kWordSteps * kHeadPieces * kTileFloats;
}

#ifdef R1_TILES

template <int PIECES>
struct Pieces {
  static constexpr int kCount = PIECES;
};

// Calls `run` with Pieces<tile_pieces>.
template <typename Run>
R1_INLINE void by_pieces(const Run& run) {
  if (tile_pieces == 1)
    run(Pieces<1>{});
  else
    run(Pieces<kHeadPieces>{});
}

// Both forms of the hidden states: [panel of rows][step of the width][piece], times the scale, and
// [panel of the width][step of rows][piece].
template <int PIECES>
void pack_hidden_tiles(const float* hidden, const int64_t* order, int64_t rows, int64_t width, float scale, float* across,
                       float* along) {
  const int64_t steps = ceil_div(width, kTileTerms), row_steps = ceil_div(rows, kTileTerms);
  alignas(64) float block[kTileSide * kTileTerms];
#pragma omp for schedule(static) nowait
  for (int64_t t = 0; t < ceil_div(rows, 2 * kTileSide) * 2 * steps; ++t) {
    const int64_t first = t / steps * kTileSide, k = t % steps * kTileTerms;
    for (int64_t i = 0; i < kTileSide; ++i)
      for (int64_t j = 0; j < kTileTerms; j += kLanes) {
        const int64_t left = first + i < rows ? width - k - j : 0;
        store(block + i * kTileTerms + j, left > 0 ? load(hidden + order[first + i] * width + k + j, left) * scale : Vec{});
      }
    split_along<PIECES>(block, kTileTerms, kTileSide, kTileTerms, across + t * PIECES * kTileFloats);
    turn<PIECES>(across + t * PIECES * kTileFloats);
  }
#pragma omp for schedule(static)
  for (int64_t t = 0; t < (along ? ceil_div(width, kTileSide) * row_steps : 0); ++t) {
    const int64_t n = t / row_steps * kTileSide, first = t % row_steps * kTileTerms;
    for (int64_t i = 0; i < kTileTerms; ++i)
      store(block + i * kTileSide, first + i < rows ? load(hidden + order[first + i] * width + n, width - n) : Vec{});
    split_across<PIECES>(block, kTileSide, kTileTerms, kTileSide, along + t * PIECES * kTileFloats);
  }
}

// Transposed logits of `count` <= 32 words for all rows; writes whole tiles.
template <int PIECES>
void logits_of(const float* weight, int64_t count, int64_t width, const float* across, int64_t rows, float* logits,
               int64_t stride) {
  alignas(64) float left[2 * kHeadSteps * PIECES * kTileFloats];
  const int64_t lefts = count > kTileSide ? 2 : 1, all_steps = ceil_div(width, kTileTerms);
  const int64_t panels = ceil_div(rows, kTileSide), next = all_steps * PIECES * kTileFloats;
  for (int64_t step = 0; step < all_steps; step += kHeadSteps) {
    const int64_t steps = least(all_steps - step, kHeadSteps);
    split_rows<PIECES>(weight + step * kTileTerms, width, count, width - step * kTileTerms, steps, left);
    for (int64_t panel = 0; panel < panels; panel += 2)
      tiles_of<PIECES, true>(lefts, panels - panel > 1 ? 2 : 1, left, steps * PIECES * kTileFloats,
                             across + panel * next + step * PIECES * kTileFloats, next, steps, logits + panel * kTileSide,
                             stride, step > 0);
  }
}

// d_weight of `count` <= 32 words, from their transposed d_logits of all rows.
template <int PIECES>
void d_weight_of(const float* d_logits, int64_t stride, int64_t count, int64_t rows, const float* along, int64_t width,
                 float* d_weight, bool add) {
  alignas(64) float left[2 * kHeadSteps * PIECES * kTileFloats];
  const int64_t all_steps = ceil_div(rows, kTileTerms);
  const int64_t next = all_steps * PIECES * kTileFloats;
  for (int64_t step = 0; step < all_steps; step += kHeadSteps) {
    const int64_t steps = least(all_steps - step, kHeadSteps);
    split_rows<PIECES>(d_logits + step * kTileTerms, stride, count, rows - step * kTileTerms, steps, left);
    for (int64_t n = 0; n < width; n += 2 * kTileSide)
      tiles_into<PIECES, false>(count, least(width - n, 2 * kTileSide), left, steps * PIECES * kTileFloats,
                                along + n / kTileSide * next + step * PIECES * kTileFloats, next, steps, d_weight + n,
                                width, add || step > 0);
  }
}

// d_hidden [rows, row] of a chunk: `weight_pieces` is shared by the team, `left` each thread's own, for all rows.
template <int PIECES>
void d_hidden_of(const float* d_logits, int64_t stride, const float* weight, int64_t vocabulary, int64_t rows,
                 int64_t width, float* weight_pieces, float* left, int64_t threads, float* d_hidden, int64_t row) {
  const int64_t panels = ceil_div(width, kTileSide), group = rows_of_thread(rows, threads);
  const int64_t slab = kWordSteps * kTileTerms;
  for (int64_t v = 0; v < vocabulary; v += slab) {
    const int64_t words = least(vocabulary - v, slab), steps = ceil_div(words, kTileTerms);
    const int64_t next = steps * PIECES * kTileFloats;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < panels * steps; ++t) {
      const int64_t n = t / steps * kTileSide, k = t % steps * kTileTerms;
      split_across<PIECES>(weight + (v + k) * width + n, width, words - k, width - n,
                           weight_pieces + t * PIECES * kTileFloats);
    }
#pragma omp for schedule(static)
    for (int64_t first = 0; first < rows; first += group) {
      const int64_t end = least(first + group, rows);
      for (int64_t t = 0; t < ceil_div(end - first, kTileSide) * steps; ++t) {
        const int64_t m = first + t / steps * kTileSide, k = t % steps * kTileTerms;
        float* tile = left + t * PIECES * kTileFloats;
        split_across<PIECES>(d_logits + (v + k) * stride + m, stride, words - k, end - m, tile);
        turn<PIECES>(tile);
      }
      for (int64_t n = 0; n < width; n += 2 * kTileSide)
        for (int64_t m = first; m < end; m += 2 * kTileSide)
          tiles_into<PIECES, false>(least(end - m, 2 * kTileSide), least(width - n, 2 * kTileSide),
                                    left + (m - first) / kTileSide * next, next, weight_pieces + n / kTileSide * next, next,
                                    steps, d_hidden + m * row + n, row, v > 0);
    }
  }
}

#endif

}  // namespace R1_ISA
}  // namespace r1
