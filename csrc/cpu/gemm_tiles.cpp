// Large products on matrix tiles (matrix_tiles.h), the same blocks as gemm.cpp: the right factor is packed once, by all
// threads, and each task's rows of the left one by the thread that has them; here, packing is taking numbers to pieces.
#include "gemm_tiles.h"

#include "gemm.h"
#include "matrix_tiles.h"
#include "ops.h"
#include "scratch.h"
#include "threads.h"

#if defined(R1_TILES) && !defined(R1_EMULATED_TILES)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace r1 {
namespace R1_ISA {

int tile_pieces = 0;

#ifdef R1_TILES

namespace {

constexpr int64_t kDeepest = 512;   // terms that are packed at a time
constexpr int64_t kBlockTiles = 16; // rows of a task, in tiles: with all their pieces 768 KiB, of 2 MiB of L2
constexpr int64_t kSlab = 1 << 20;  // numbers of the right factor that are packed at a time, about: 6 MiB in pieces
constexpr int64_t kSerial = 1 << 18;

// Tile of `rows` rows from m on and terms from k on.
template <int PIECES>
void pack_left_tile(const Factor& f, int64_t m, int64_t rows, int64_t k, int64_t terms, float* to) {
  if (f.across) {
    split_across<PIECES>(f.from + k * f.row + m, f.row, terms, rows, to, rows > kTileSide ? kTileSide : 0);
    turn<PIECES>(to);
  } else {
    split_along<PIECES>(f.from + m * f.row + k, f.row, rows, terms, to, rows > kTileSide ? kTileSide * f.row : 0);
  }
}
template <int PIECES>
void pack_right_tile(const Factor& f, int64_t n, int64_t columns, int64_t k, int64_t terms, float* to) {
  if (f.across) {
    split_along<PIECES>(f.from + n * f.row + k, f.row, columns, terms, to, columns > kTileSide ? kTileSide * f.row : 0);
    turn<PIECES>(to);
  } else {
    split_across<PIECES>(f.from + k * f.row + n, f.row, terms, columns, to, columns > kTileSide ? kTileSide : 0);
  }
}

struct Cut {
  int64_t block, blocks;  // tiles of rows of a task, and how many such
  int64_t group, groups;  // tiles of columns of a task, and how many such
};

// Tasks that are alike, at least one for each thread where there is so much to do; of an even number of tiles.
Cut cut(int64_t rows, int64_t columns, int64_t threads) {
  const int64_t wanted = ceil_div(ceil_div(rows, kBlockTiles), threads) * threads;
  const int64_t block = round_up(ceil_div(rows, least(wanted, ceil_div(rows, 2))), 2), blocks = ceil_div(rows, block);
  const int64_t group = round_up(ceil_div(columns, least(ceil_div(threads, blocks), ceil_div(columns, 2))), 2);
  return {block, blocks, group, ceil_div(columns, group)};
}

// Tiles of packed rows against tiles of packed columns, two of each at a time.
template <int PIECES>
void block_of(const Product& p, int64_t m, int64_t rows, int64_t n, int64_t columns, const float* left,
              const float* right, int64_t steps, bool add, bool bias) {
  const int64_t next = steps * PIECES * kTileFloats;
  for (int64_t c = 0; c < columns; c += 2 * kTileSide)
    for (int64_t r = 0; r < rows; r += 2 * kTileSide) {
      const float *a = left + r / kTileSide * next, *b = right + c / kTileSide * next;
      const int64_t high = least(rows - r, 2 * kTileSide), wide = least(columns - c, 2 * kTileSide);
      float* out = p.out + (m + r) * p.out_row + n + c;
      tiles_into<PIECES, false>(high, wide, a, next, b, next, steps, out, p.out_row, add);
      for (int64_t i = 0; bias && i < high; ++i)
        for (int64_t j = 0; j < wide; j += kLanes) {
          float* to = out + i * p.out_row + j;
          store(to, load(to, wide - j) + load(p.bias + n + c + j, wide - j), wide - j);
        }
    }
}

template <int PIECES>
bool product(const Product& p) {
  const int64_t all_columns = ceil_div(p.columns, kTileSide), row_tiles = ceil_div(p.rows, kTileSide);
  const int64_t deepest = least(kDeepest, round_up(p.depth, kTileTerms)), steps_most = deepest / kTileTerms;
  const int64_t wide = least(all_columns, round_up(ceil_div(kSlab, deepest * kTileSide), 2));
  Scratch packed;
  if (!packed.reserve(wide * steps_most * PIECES * kTileFloats)) return false;
  bool enough = true;
#pragma omp parallel if (p.rows * p.depth * p.columns > kSerial)
  {
    Scratch left;
    if (!left.reserve(least(kBlockTiles, round_up(row_tiles, 2)) * steps_most * PIECES * kTileFloats)) {
#pragma omp atomic write
      enough = false;
    }
    const TileRegisters registers;
    for (int64_t column = 0; column < all_columns; column += wide)
      for (int64_t k = 0; k < p.depth; k += deepest) {
        const int64_t depth = least(p.depth - k, deepest), steps = ceil_div(depth, kTileTerms);
        const int64_t columns = least(all_columns - column, wide), next = steps * PIECES * kTileFloats;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < columns * steps; ++i) {
          const int64_t n = (column + i / steps) * kTileSide, from = i % steps * kTileTerms;
          pack_right_tile<PIECES>(p.right, n, p.columns - n, k + from, depth - from,
                                  packed.data() + i * PIECES * kTileFloats);
        }
        const Cut c = cut(row_tiles, columns, team_size());
#pragma omp for schedule(static)
        for (int64_t t = 0; t < c.blocks * c.groups; ++t) {
          if (!left.data()) continue;
          const int64_t m = t / c.groups * c.block * kTileSide, rows = least(p.rows - m, c.block * kTileSide);
          for (int64_t i = 0; i < ceil_div(rows, kTileSide) * steps; ++i) {
            const int64_t at = i / steps * kTileSide, from = i % steps * kTileTerms;
            pack_left_tile<PIECES>(p.left, m + at, rows - at, k + from, depth - from,
                                   left.data() + i * PIECES * kTileFloats);
          }
          const int64_t first = t % c.groups * c.group, n = (column + first) * kTileSide;
          block_of<PIECES>(p, m, rows, n, least(p.columns - n, least(columns - first, c.group) * kTileSide), left.data(),
                           packed.data() + first * next, steps, k > 0, p.bias && k + depth == p.depth);
        }
      }
  }
  return enough;
}

bool has_tiles() {
#ifdef R1_EMULATED_TILES
  return true;
#else
  unsigned a, b, c, d;
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24, kState = 18;  // CPUID 7: AMX-BF16, AMX-TILE; tile data
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kBf16) || !(d & kTiles)) return false;
#ifdef __linux__
  return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, kState) == 0;
#else
  return false;
#endif
#endif
}

}  // namespace

bool gemm_tiles(const Product& p) {
  return tile_pieces == 1 ? product<1>(p) : tile_pieces == 2 ? product<2>(p) : product<3>(p);
}

bool matrix_tiles(int pieces) {
  static const bool has = has_tiles();
  if (pieces < 0 || pieces > kMostPieces || (pieces && !has)) return false;
  tile_pieces = pieces;
  return true;
}

#else

bool gemm_tiles(const Product&) { return false; }
bool matrix_tiles(int pieces) { return pieces == 0; }

#endif

}  // namespace R1_ISA
}  // namespace r1
