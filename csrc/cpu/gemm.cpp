// Large products: the right factor is packed once, in panels a tile wide, for all rows; threads share out the rows.
//
// A task is a block of rows against a group of panels. For each chain of terms its rows are copied to where they lie as
// the tile reads them (half of L2), and every panel (half of L1) meets all of them. So a number of the left factor is
// copied once for all columns, one of the right factor once for all rows; both then come from the cache, and what comes
// next is fetched meanwhile. (Panels packed anew for each block of 240 rows cost a fifth of the time: docs/log.md.)
#include "gemm.h"
#include "gemm_tiles.h"
#include "matrix_tiles.h"
#include "product.h"
#include "scratch.h"
#include "threads.h"

namespace r1 {
namespace R1_ISA {

namespace {

constexpr int64_t kRowBlock = 240;      // rows of a task: with a chain of numbers each, half of L2
constexpr int64_t kPacked = 1 << 20;    // numbers of the right factor that are packed at a time, about: 4 MiB
constexpr int64_t kTogether = 8;        // panels whose rows are read in one go
constexpr int64_t kStretch = 64;        // of their rows, by one thread
constexpr int64_t kSerial = 1 << 18;    // multiply-adds under which threads cost more than they give
static_assert(kRowBlock % kTileRows == 0, "a block is whole tiles");


// A panel whose columns lie along memory, `row` numbers from one to the next.
void pack_panel_across(const float* from, int64_t row, int64_t depth, int64_t columns, float* to) {
  for (int64_t first = 0; first < kTileColumns; first += kLanes)
    for (int64_t i = 0; i < depth; i += kLanes) {
      Vec square[kLanes];
#pragma GCC unroll 16
      for (int64_t j = 0; j < kLanes; ++j)
        square[j] = first + j < columns ? load(from + (first + j) * row + i, depth - i) : Vec{};
      transpose_square(square);
      for (int64_t j = 0; j < kLanes && i + j < depth; ++j) store(to + (i + j) * kTileColumns + first, square[j]);
    }
}

// `rows` rows as tiles [k][kTileRows], zeros below the last.
void pack_rows(const float* from, int64_t row, int64_t rows, int64_t depth, float* to) {
  for (int64_t first = 0; first < rows; first += kTileRows, from += kTileRows * row, to += depth * kTileRows) {
    const int64_t count = least(rows - first, kTileRows);
    int64_t i = 0;
    if (kTileRows <= kLanes && count == kTileRows)
      for (; i + kLanes < depth; i += kLanes) {  // without the last: a store reaches into the terms behind it
        Vec square[kLanes] = {};
#pragma GCC unroll 16
        for (int64_t j = 0; j < kTileRows && j < kLanes; ++j) {
          square[j] = load(from + j * row + i);
          __builtin_prefetch(from + (kTileRows + j) * row + i);
        }
        transpose_square(square);
#pragma GCC unroll 16
        for (int64_t j = 0; j < kLanes; ++j) store(to + (i + j) * kTileRows, square[j]);
      }
    for (; i < depth; ++i)
#pragma GCC unroll 16
      for (int64_t j = 0; j < kTileRows; ++j) to[i * kTileRows + j] = j < count ? from[j * row + i] : 0.0f;
  }
}

// Terms k to k + depth of the panels that begin at column n, by all threads of the team: [panel][depth][kTileColumns].
void pack_slab(const Product& p, int64_t n, int64_t panels, int64_t k, int64_t depth, float* packed) {
  const Factor& right = p.right;
  if (right.across) {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < panels; ++i)
      pack_panel_across(right.from + (n + i * kTileColumns) * right.row + k, right.row, depth,
                        least(p.columns - n - i * kTileColumns, kTileColumns), packed + i * depth * kTileColumns);
    return;
  }
  const int64_t groups = ceil_div(panels, kTogether);
#pragma omp for schedule(static)
  for (int64_t i = 0; i < groups * ceil_div(depth, kStretch); ++i) {
    const int64_t first = i % groups * kTogether, from = i / groups * kStretch, column = n + first * kTileColumns;
    pack_panels(right.from + (k + from) * right.row + column, right.row, least(depth - from, kStretch),
                least(p.columns - column, least(panels - first, kTogether) * kTileColumns), depth * kTileColumns,
                packed + (first * depth + from) * kTileColumns);
  }
}

// Packed rows from m on against one panel, of which `terms` numbers a column are to be read.
void rows_of_panel(const Product& p, int64_t m, int64_t rows, int64_t column, const float* left, const float* right,
                   int64_t terms, int64_t next, bool add, bool bias) {
  alignas(64) float whole[kTileRows * kTileColumns];
  const int64_t columns = least(p.columns - column, kTileColumns);
  float* out = p.out + m * p.out_row + column;
  for (int64_t i = 0, fetched = 0; i < rows; i += kTileRows, out += kTileRows * p.out_row) {
    for (int64_t j = 0; j < kTogether && fetched < terms; ++j, ++fetched)
      __builtin_prefetch(right + next + fetched * kTileColumns, 0, 2);
    if (rows - i >= kTileRows && columns == kTileColumns) {
      for (int64_t j = 0; rows - i >= 2 * kTileRows && j < kTileRows; ++j)
        __builtin_prefetch(out + (kTileRows + j) * p.out_row, 1);
      tile<1>(left + i * terms, kTileRows, right, terms, out, p.out_row, add);
    } else {
      tile<1>(left + i * terms, kTileRows, right, terms, whole, kTileColumns, false);
      add_part(whole, rows - i, columns, out, p.out_row, add);
    }
    for (int64_t j = 0; bias && j < least(rows - i, kTileRows); ++j)
      for (int64_t c = 0; c < columns; ++c) out[j * p.out_row + c] += p.bias[column + c];
  }
}

struct Cut {
  int64_t block, blocks;  // rows of a task, and how many such
  int64_t group, groups;  // panels of a task, and how many such
};

// Tasks that are alike, at least one for each thread where there is so much to do.
Cut cut(const Product& p, int64_t panels, int64_t threads) {
  const int64_t tiles = ceil_div(p.rows, kTileRows), most = kRowBlock / kTileRows;
  const int64_t wanted = ceil_div(ceil_div(tiles, most), threads) * threads;
  const int64_t block = ceil_div(tiles, least(wanted, ceil_div(tiles, 4))), blocks = ceil_div(tiles, block);
  const int64_t group = ceil_div(panels, least(ceil_div(threads, blocks), panels));
  return {block * kTileRows, blocks, group, ceil_div(panels, group)};
}

// `rows` rows from m on against panels [first, last) of a slab.
void block_of(const Product& p, int64_t m, int64_t rows, int64_t n, int64_t k, int64_t depth, const float* packed,
              int64_t first, int64_t last, float* left) {
  for (int64_t from = k; from < k + depth; from += p.chain) {
    const int64_t terms = least(k + depth - from, p.chain);
    if (p.left.across)
      pack_rows_across(p.left.from + from * p.left.row + m, p.left.row, rows, terms, left);
    else
      pack_rows(p.left.from + m * p.left.row + from, p.left.row, rows, terms, left);
    for (int64_t panel = first; panel < last; ++panel)
      rows_of_panel(p, m, rows, n + panel * kTileColumns, left, packed + (panel * depth + from - k) * kTileColumns, terms,
                    depth * kTileColumns, from > 0, p.bias && from + terms == p.depth);
  }
}

}  // namespace

bool gemm(const Product& p) {
  if (!p.rows || !p.columns) return true;
  if (tile_pieces) return gemm_tiles(p);
  // A slab is what is packed at a time: some columns with all their terms, or with the first so many.
  const int64_t deep = p.depth <= 16 * p.chain ? p.depth : 8 * p.chain;
  const int64_t all_panels = ceil_div(p.columns, kTileColumns);
  const int64_t wide = least(all_panels, ceil_div(kPacked, deep * kTileColumns));
  Scratch packed;
  if (!packed.reserve(wide * kTileColumns * deep)) return false;
  bool enough = true;
#pragma omp parallel if (p.rows * p.depth * p.columns > kSerial)
  {
    Scratch left;
    if (!left.reserve(kRowBlock * kLongest)) {
#pragma omp atomic write
      enough = false;
    }
    for (int64_t panel = 0; panel < all_panels; panel += wide)
      for (int64_t k = 0; k < p.depth; k += deep) {
        const int64_t depth = least(p.depth - k, deep), panels = least(all_panels - panel, wide);
        pack_slab(p, panel * kTileColumns, panels, k, depth, packed.data());
        const Cut c = cut(p, panels, team_size());
#pragma omp for schedule(static)
        for (int64_t t = 0; t < c.blocks * c.groups; ++t) {
          const int64_t m = t / c.groups * c.block, first = t % c.groups * c.group;
          if (left.data())
            block_of(p, m, least(p.rows - m, c.block), panel * kTileColumns, k, depth, packed.data(), first,
                     least(first + c.group, panels), left.data());
        }
      }
  }
  return enough;
}

}  // namespace R1_ISA
}  // namespace r1
