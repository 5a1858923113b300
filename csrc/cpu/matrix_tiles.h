// Float32 products on a processor's bfloat16 matrix tiles (Intel AMX: Sapphire Rapids and later), which add up sixteen
// times as many terms in a cycle as AVX-512 does.
//
// A float32 is the sum of three bfloat16 numbers: 24 bits of significand are three times 8, so that cutting, not rounding,
// leaves nothing over. A product of two is nine products of such pieces; the three smallest are below 2^-23 of it and left
// out, and the other six are exact and added up in float32. Hence the name that torch gives the choice,
// `torch.set_float32_matmul_precision`: "highest" is three pieces, six products; "high" two pieces (rounded: 16 bits and a
// sign), three products; "medium" one piece (cf. Henry, Tang, Heinecke 2019, "Leveraging the bfloat16 Artificial
// Intelligence Datatype For Higher-Precision Computations").
// What differs from float32 products: an infinite factor gives NaN where it meets a number that has no lower pieces, and
// terms below 2^-126 are zero.
//
// A tile is 16 rows of 64 bytes; an instruction adds 16 x 32 of the left factor times 32 x 16 of the right one to 16 x 16
// float32 sums. It takes the terms in pairs, one a half of a 32-bit word; which two is free, as long as both factors agree:
// here k and k + 16, so that a word is a shift and an `or` of two vectors that lie in memory as they are.
#pragma once

#include "ops.h"
#include "product.h"
#include "scratch.h"
#include "simd.h"

namespace r1 {
namespace R1_ISA {

constexpr int64_t kTileSide = 16;            // rows of a tile, and columns of its sums
constexpr int64_t kTileTerms = 32;           // terms that one instruction adds up
constexpr int64_t kTileFloats = 256;         // of memory: 16 rows of 64 bytes

#if defined(__AVX512F__) || defined(R1_EMULATED_TILES)
#define R1_TILES
#endif

// Pieces of a float32 in products, 0 where there are no tiles or they are not wanted.
extern int tile_pieces;

#ifdef R1_TILES

#ifndef R1_EMULATED_TILES
// Within its life the calling thread's tile registers can be used, where they are wanted.
class TileRegisters {
 public:
  explicit TileRegisters(bool wanted = true) : wanted_(wanted) {
    if (!wanted) return;
    alignas(64) unsigned char settings[64] = {1};  // all eight: 16 rows of 64 bytes
    for (int i = 0; i < 8; ++i) settings[16 + 2 * i] = 64, settings[48 + i] = kTileSide;
    asm volatile("ldtilecfg %0" ::"m"(settings));
  }
  ~TileRegisters() {
    if (wanted_) asm volatile("tilerelease");
  }
  TileRegisters(const TileRegisters&) = delete;

 private:
  const bool wanted_;
};

// Registers 0 to 3 hold sums, 4 and 5 tiles of the left factor, 6 and 7 of the right one.
template <int REGISTER>
R1_INLINE void tile_load(const float* from, int64_t row = kTileSide) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(4 * row), "i"(REGISTER) : "memory");
}
template <int REGISTER>
R1_INLINE void tile_store(float* to, int64_t row) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(4 * row), "i"(REGISTER) : "memory");
}
template <int REGISTER>
R1_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(REGISTER));
}
template <int SUMS, int LEFT, int RIGHT>
R1_INLINE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(LEFT), "i"(RIGHT));
}

#else  // for tests on machines without: what the instructions do, as the manual says it

struct TileRegisters {
  explicit TileRegisters(bool = true) {}
};
inline thread_local float tile_registers[8][kTileFloats];
template <int REGISTER>
inline void tile_load(const float* from, int64_t row = kTileSide) {
  for (int64_t i = 0; i < kTileSide; ++i) std::memcpy(tile_registers[REGISTER] + i * kTileSide, from + i * row, 64);
}
template <int REGISTER>
inline void tile_store(float* to, int64_t row) {
  for (int64_t i = 0; i < kTileSide; ++i) std::memcpy(to + i * row, tile_registers[REGISTER] + i * kTileSide, 64);
}
template <int REGISTER>
inline void tile_zero() {
  std::memset(tile_registers[REGISTER], 0, sizeof tile_registers[REGISTER]);
}
// Word i of row m and word n of row i, by halves: two sums of sixteen fused multiply-adds, added to the third.
template <int SUMS, int LEFT, int RIGHT>
inline void tile_multiply() {
  const auto half = [](float word, bool upper) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, word);
    return __builtin_bit_cast(float, upper ? bits & 0xFFFF0000u : bits << 16);
  };
  for (int64_t m = 0; m < kTileSide; ++m)
    for (int64_t n = 0; n < kTileSide; ++n) {
      float lower = 0, upper = 0;
      for (int64_t i = 0; i < kTileSide; ++i) {
        const float a = tile_registers[LEFT][m * kTileSide + i], b = tile_registers[RIGHT][i * kTileSide + n];
        lower = __builtin_fmaf(half(a, false), half(b, false), lower);
        upper = __builtin_fmaf(half(a, true), half(b, true), upper);
      }
      tile_registers[SUMS][m * kTileSide + n] += lower + upper;
    }
}

#endif

// The pieces of two vectors, a in the lower and b in the upper half of each word.
template <int PIECES>
R1_INLINE void split(Vec a, Vec b, Vec* out) {
  const BitVec upper = BitVec{} + 0xFFFF0000u;
#pragma GCC unroll 3
  for (int p = 0; p < PIECES; ++p) {
    BitVec x = __builtin_bit_cast(BitVec, a), y = __builtin_bit_cast(BitVec, b);
    if (PIECES < kMostPieces) {  // to the nearest, ties to even; what is not finite stays so
      const Vec nothing{};
      x += (a - a == nothing ? IntVec{} + 0x7FFF : IntVec{}) + __builtin_bit_cast(IntVec, (x >> 16) & 1);
      y += (b - b == nothing ? IntVec{} + 0x7FFF : IntVec{}) + __builtin_bit_cast(IntVec, (y >> 16) & 1);
    }
    x &= upper, y &= upper;
    out[p] = __builtin_bit_cast(Vec, (x >> 16) | y);
    if (p + 1 < PIECES) {
      a -= __builtin_bit_cast(Vec, x), b -= __builtin_bit_cast(Vec, y);
      a = a == a ? a : Vec{};  // of an infinite number nothing is left; NaN stays in the first piece
      b = b == b ? b : Vec{};
    }
  }
}

// A tile of a factor whose terms lie along memory: `rows` rows, `row` apart, of `terms` numbers; zeros beyond. Written
// piece by piece. ahead: how far behind lies what is taken next, which is fetched meanwhile.
template <int PIECES>
inline void split_along(const float* from, int64_t row, int64_t rows, int64_t terms, float* to, int64_t ahead = 0) {
  for (int64_t i = 0; i < kTileSide; ++i) {
    Vec found[PIECES] = {};
    if (ahead) {
      __builtin_prefetch(from + i * row + ahead);
      __builtin_prefetch(from + i * row + ahead + kLanes);
    }
    if (i < rows) {
      const float* at = from + i * row;
      if (terms >= kTileTerms)
        split<PIECES>(load(at), load(at + kLanes), found);
      else
        split<PIECES>(load(at, terms), terms > kLanes ? load(at + kLanes, terms - kLanes) : Vec{}, found);
    }
#pragma GCC unroll 3
    for (int p = 0; p < PIECES; ++p) store(to + p * kTileFloats + i * kTileSide, found[p]);
  }
}

// One or two tiles of rows, of `count` <= 32 rows and `steps` times 32 terms, of which `terms` are there: [tile][step].
template <int PIECES>
inline void split_rows(const float* from, int64_t row, int64_t count, int64_t terms, int64_t steps, float* to) {
  for (int64_t first = 0; first < count; first += kTileSide)
    for (int64_t step = 0; step < steps; ++step, to += PIECES * kTileFloats)
      split_along<PIECES>(from + first * row + step * kTileTerms, row, least(count - first, kTileSide),
                          terms - step * kTileTerms, to);
}

// A tile of a factor whose terms lie across memory: `terms` lines, `row` apart, of `columns` numbers; zeros beyond.
template <int PIECES>
inline void split_across(const float* from, int64_t row, int64_t terms, int64_t columns, float* to, int64_t ahead = 0) {
  for (int64_t i = 0; i < kTileSide; ++i) {
    const float *first = from + i * row, *second = from + (i + kTileSide) * row;
    if (ahead) {
      __builtin_prefetch(first + ahead);
      __builtin_prefetch(second + ahead);
    }
    const Vec a = i < terms ? load(first, columns) : Vec{}, b = i + kTileSide < terms ? load(second, columns) : Vec{};
    Vec found[PIECES];
    split<PIECES>(a, b, found);
#pragma GCC unroll 3
    for (int p = 0; p < PIECES; ++p) store(to + p * kTileFloats + i * kTileSide, found[p]);
  }
}

// Rows of words become columns: a left factor's tile from lines, or a right factor's from rows.
template <int PIECES>
inline void turn(float* tile) {
  for (int p = 0; p < PIECES; ++p, tile += kTileFloats) {
    Vec square[kTileSide];
#pragma GCC unroll 16
    for (int i = 0; i < kTileSide; ++i) square[i] = load(tile + i * kTileSide);
    transpose_square(square);
#pragma GCC unroll 16
    for (int i = 0; i < kTileSide; ++i) store(tile + i * kTileSide, square[i]);
  }
}

template <int LEFTS, int RIGHTS>
R1_INLINE void multiply_all() {
  tile_multiply<0, 4, 6>();
  if (RIGHTS > 1) tile_multiply<1, 4, 7>();
  if (LEFTS > 1) tile_multiply<2, 5, 6>();
  if (LEFTS > 1 && RIGHTS > 1) tile_multiply<3, 5, 7>();
}
// Adds `steps` times 32 terms to the sums of LEFTS x RIGHTS tiles. Each factor's tiles lie [step][piece], the second one's
// `next` floats behind the first. The order of the pieces' products is that of a walk in which each step changes one side;
// MIRRORED: the same order where left and right have changed places, and so the same bits.
// meanwhile: what is fetched for later, `share` rows of it a step.
template <int PIECES, int LEFTS, int RIGHTS, bool MIRRORED>
inline void add_terms(const float* left, int64_t next_left, const float* right, int64_t next_right, int64_t steps,
                      Ahead* meanwhile, int64_t share) {
  // Of left and right; the smallest first, but for the walk.
  constexpr int kWalk3[6][2] = {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 2}, {0, 0}}, kWalk2[3][2] = {{1, 0}, {0, 0}, {0, 1}};
  constexpr int kProducts = PIECES * (PIECES + 1) / 2;
  for (int64_t s = 0; s < steps; ++s, left += PIECES * kTileFloats, right += PIECES * kTileFloats) {
    int l = -1, r = -1;
    if (meanwhile) meanwhile->fetch(share);
#pragma GCC unroll 6
    for (int i = 0; i < kProducts; ++i) {
      const int x = PIECES == 3 ? kWalk3[i][0] : PIECES == 2 ? kWalk2[i % 3][0] : 0;
      const int y = PIECES == 3 ? kWalk3[i][1] : PIECES == 2 ? kWalk2[i % 3][1] : 0;
      const int to_left = MIRRORED ? y : x, to_right = MIRRORED ? x : y;
      if (to_left != l) {
        tile_load<4>(left + to_left * kTileFloats);
        if (LEFTS > 1) tile_load<5>(left + next_left + to_left * kTileFloats);
      }
      if (to_right != r) {
        tile_load<6>(right + to_right * kTileFloats);
        if (RIGHTS > 1) tile_load<7>(right + next_right + to_right * kTileFloats);
      }
      l = to_left, r = to_right;
      multiply_all<LEFTS, RIGHTS>();
    }
  }
}

// The same from sums in memory, or from zero, and back: rows of `row` floats.
template <int PIECES, int LEFTS, int RIGHTS, bool MIRRORED>
inline void tiles(const float* left, int64_t next_left, const float* right, int64_t next_right, int64_t steps, float* out,
                  int64_t row, bool add, Ahead* meanwhile, int64_t share) {
  float* below = out + kTileSide * row;
  if (add) {
    tile_load<0>(out, row);
    if (RIGHTS > 1) tile_load<1>(out + kTileSide, row);
    if (LEFTS > 1) tile_load<2>(below, row);
    if (LEFTS > 1 && RIGHTS > 1) tile_load<3>(below + kTileSide, row);
  } else {
    tile_zero<0>();
    if (RIGHTS > 1) tile_zero<1>();
    if (LEFTS > 1) tile_zero<2>();
    if (LEFTS > 1 && RIGHTS > 1) tile_zero<3>();
    for (int64_t i = 0; i < LEFTS * kTileSide; ++i)
      for (int j = 0; j < RIGHTS; ++j) __builtin_prefetch(out + i * row + j * kTileSide, 1);
  }
  add_terms<PIECES, LEFTS, RIGHTS, MIRRORED>(left, next_left, right, next_right, steps, meanwhile, share);
  tile_store<0>(out, row);
  if (RIGHTS > 1) tile_store<1>(out + kTileSide, row);
  if (LEFTS > 1) tile_store<2>(below, row);
  if (LEFTS > 1 && RIGHTS > 1) tile_store<3>(below + kTileSide, row);
}

// For 1 or 2 tiles of each side.
template <int PIECES, bool MIRRORED>
R1_INLINE void tiles_of(int64_t lefts, int64_t rights, const float* left, int64_t next_left, const float* right,
                        int64_t next_right, int64_t steps, float* out, int64_t row, bool add,
                        Ahead* meanwhile = nullptr, int64_t share = 0) {
  const auto run = lefts > 1 ? rights > 1 ? tiles<PIECES, 2, 2, MIRRORED> : tiles<PIECES, 2, 1, MIRRORED>
                   : rights > 1 ? tiles<PIECES, 1, 2, MIRRORED>
                                : tiles<PIECES, 1, 1, MIRRORED>;
  run(left, next_left, right, next_right, steps, out, row, add, meanwhile, share);
}

// Sums of which only `high` x `wide` <= 32 x 32 are in memory.
template <int PIECES, bool MIRRORED>
inline void tiles_into(int64_t high, int64_t wide, const float* left, int64_t next_left, const float* right,
                       int64_t next_right, int64_t steps, float* out, int64_t row, bool add) {
  const int64_t lefts = high > kTileSide ? 2 : 1, rights = wide > kTileSide ? 2 : 1;
  if (high == lefts * kTileSide && wide == rights * kTileSide) {
    tiles_of<PIECES, MIRRORED>(lefts, rights, left, next_left, right, next_right, steps, out, row, add);
    return;
  }
  constexpr int64_t kRow = 2 * kTileSide;
  alignas(64) float whole[kRow * kRow];
  for (int64_t i = 0; add && i < high; ++i) std::memcpy(whole + i * kRow, out + i * row, wide * sizeof(float));
  tiles_of<PIECES, MIRRORED>(lefts, rights, left, next_left, right, next_right, steps, whole, kRow, add);
  for (int64_t i = 0; i < high; ++i) std::memcpy(out + i * row, whole + i * kRow, wide * sizeof(float));
}

#endif

}  // namespace R1_ISA
}  // namespace r1
