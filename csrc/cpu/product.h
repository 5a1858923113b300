// Matrix products by the tile of registers, for ops that work on a product's result while it is in the cache. One loop
// serves every orientation: the left factor is read number by number, the right one by the vector, from packed panels.
// (Plain float32 torch.mm takes MKL's slow path on AMD; oneDNN's packed weights would be a second copy of the head.)
#pragma once

#include "simd.h"

namespace r1 {
namespace R1_ISA {

// 24 sums of 32 registers, or 12 of 16.
constexpr int kTileRows = kLanes == 16 ? 12 : 6, kTileColumns = 2 * kLanes;
constexpr int kBlock = 48;  // rows of the left factor that meet a panel in one go
static_assert(kBlock % kTileRows == 0, "a block is whole tiles");

// out[m][n] (+)= sum over k < depth of left[m * LEFT_ROW + k * step] * right[k * RIGHT_ROW + n], for a whole tile.
template <int LEFT_ROW, int RIGHT_ROW = kTileColumns>
inline __attribute__((noinline)) void tile(const float* left, int64_t step, const float* right, int64_t depth,
                                           float* out, int64_t out_row, bool add) {
  Vec sum[kTileRows][2];
#pragma GCC unroll 16
  for (int m = 0; m < kTileRows; ++m) {
    sum[m][0] = sum[m][1] = Vec{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    const Vec first = load(right), second = load(right + kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kTileRows; ++m) {
      const Vec a = all(left[m * LEFT_ROW]);
      sum[m][0] = fma(a, first, sum[m][0]);
      sum[m][1] = fma(a, second, sum[m][1]);
    }
    left += step;
    right += RIGHT_ROW;
  }
#pragma GCC unroll 16
  for (int m = 0; m < kTileRows; ++m) {
    float* to = out + m * out_row;  // sums of sums: the errors of a chain's terms, not of all
    store(to, add ? load(to) + sum[m][0] : sum[m][0]);
    store(to + kLanes, add ? load(to + kLanes) + sum[m][1] : sum[m][1]);
  }
}

// out (+)= a whole tile's sums, of which only `rows` x `columns` are in memory.
inline void add_part(const float* whole, int64_t rows, int64_t columns, float* out, int64_t out_row, bool add) {
  for (int64_t m = 0; m < rows && m < kTileRows; ++m)
    for (int64_t n = 0; n < columns && n < kTileColumns; ++n) {
      float* to = out + m * out_row + n;
      *to = add ? *to + whole[m * kTileColumns + n] : whole[m * kTileColumns + n];
    }
}

// A block of memory that will be needed next, asked for a few rows at a time between the tiles of this one. (Without it
// the first touch of each block waits: a tenth of the time of a whole head, whose weight no cache holds.)
struct Ahead {
  const float* from;
  int64_t row, rows, width;  // row: distance; rows <= 0: nothing is needed
  int64_t done = 0;
  R1_INLINE void fetch(int64_t count) {
    for (; count > 0 && done < rows; --count, ++done)
      for (int64_t i = 0; i < width; i += 16) __builtin_prefetch(from + done * row + i, 0, 2);
  }
};

// The tile of ops whose left factor is read as it lies, `row` numbers from one row to the next:
//     out[m][v] (+)= sum over k < depth of left[m * row + k] * right[k][v],    m < ROWS, v < VECTORS vectors.
// right: a panel, kTileColumns to a k, of which a narrow tile reads the first vector. A sum is one chain of fused
// multiply-adds in the order of k, the same for every shape of tile. (Copying the left factor first costs 15% at 16 and
// 64 columns; unrolling over k, 7%.)
// ahead: the left factor of the next tile, its rows `row` apart too, which is fetched to L1 meanwhile; or null.
template <int ROWS, int VECTORS>
inline __attribute__((noinline)) void tile_along(const float* left, int64_t row, const float* right, int64_t depth,
                                                 float* out, int64_t out_row, bool add, const float* ahead = nullptr) {
  Vec sum[ROWS][VECTORS];
  const float* from[ROWS];
  const int64_t next = ahead ? ahead - left : 0;
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m) {
    from[m] = left + m * row;
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) sum[m][v] = Vec{};
  }
  for (int64_t k = 0; k < depth;) {
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m) __builtin_prefetch(from[m] + next + k);
    for (const int64_t end = k + kLine < depth ? k + kLine : depth; k < end; ++k) {
      Vec b[VECTORS];
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) b[v] = load(right + v * kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < ROWS; ++m) {
        const Vec a = all(from[m][k]);
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) sum[m][v] = fma(a, b[v], sum[m][v]);
      }
      right += kTileColumns;
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      float* to = out + m * out_row + v * kLanes;
      store(to, add ? load(to) + sum[m][v] : sum[m][v]);
    }
  }
}

// `columns` <= kTileColumns numbers of a row, into a row of a panel; the others are zero.
R1_INLINE void pack_right(const float* from, int64_t columns, float* to) {
  if (columns >= kTileColumns) {
    store(to, load(from));
    store(to + kLanes, load(from + kLanes));
    return;
  }
  for (int64_t n = 0; n < kTileColumns; ++n) to[n] = n < columns ? from[n] : 0.0f;
}

constexpr int64_t kSoon = 4;  // rows that are fetched before they are copied

// `count` numbers that will be read soon.
R1_INLINE void fetch(const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(from + i);
}

// `depth` rows of `columns` columns, into panels `apart` numbers from each other.
inline void pack_panels(const float* from, int64_t row, int64_t depth, int64_t columns, int64_t apart, float* to) {
  for (int64_t i = 0; i < depth; ++i, from += row) {
    fetch(from + kSoon * row, columns);
    for (int64_t c = 0; c < columns; c += kTileColumns)
      pack_right(from + c, columns - c, to + c / kTileColumns * apart + i * kTileColumns);
  }
}

// Rows that lie across memory, `depth` lines of `rows` numbers, as tiles [k][kTileRows], zeros below the last.
inline void pack_rows_across(const float* from, int64_t row, int64_t rows, int64_t depth, float* to) {
  for (int64_t i = 0; i < depth; ++i, from += row) {
    fetch(from + kSoon * row, rows);
    float* at = to + i * kTileRows;
    int64_t first = 0;
    for (; first + kTileRows <= rows; first += kTileRows, at += depth * kTileRows)
      std::memcpy(at, from + first, kTileRows * sizeof(float));
    for (int64_t j = 0; first < rows && j < kTileRows; ++j) at[j] = first + j < rows ? from[first + j] : 0.0f;
  }
}

}  // namespace R1_ISA
}  // namespace r1
