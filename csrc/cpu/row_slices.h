// Rows of a decoding step, shared out between threads: each takes rows of its own through all layers, and waits for
// nobody. (A step of 64 sequences had some 30 parallel regions, each as long as its slower thread, and what lies between
// them on one thread.)
#pragma once

#include "matrix_tiles.h"
#include "ops.h"
#include "scratch.h"
#include "threads.h"

namespace r1 {
namespace R1_ISA {

// Where the rows of each slice begin; slice i ends where i + 1 begins.
struct Slices {
  static constexpr int64_t kMost = 256, kLeastRows = 16;  // with fewer a slice, the weights are read too often
  int64_t count = 1, first[kMost + 1] = {};
};

// Whether no row reads a block that a row of another slice writes within `steps` tokens: `owner` has a number a block.
inline bool apart(const DecoderCall& c, int64_t steps, const Slices& slices, int32_t* owner) {
  std::memset(owner, 0, c.blocks * sizeof(int32_t));
  for (int pass = 0; pass < 2; ++pass)
    for (int64_t s = 0; s < slices.count; ++s)
      for (int64_t row = slices.first[s]; row < slices.first[s + 1]; ++row) {
        const int32_t* table = c.tables + row * c.table_row;
        const int64_t last = (c.contexts[row] + steps - 2) / c.block;  // of the column that the last token writes to
        for (int64_t b = pass ? 0 : (c.contexts[row] - 1) / c.block; b <= last && b < c.columns; ++b) {
          const int32_t block = table[b];
          if (block < 0 || block >= c.blocks) return false;  // whoever reads it says so
          if (owner[block] && owner[block] != s + 1) return false;
          if (!pass) owner[block] = static_cast<int32_t>(s + 1);
        }
      }
  return true;
}

// Slices of about the same work for `steps` steps from here on, one for each thread; a single one where the rows depend
// on each other, or are too few: then all threads share each product (fewer slices would leave cores idle). On matrix
// tiles, too: each slice would take all weights to pieces anew.
inline Slices slices_of(const DecoderCall& c, int64_t steps) {
  Slices found;
  found.first[1] = c.rows;
  const int64_t count = most_threads();
  if (tile_pieces || count < 2 || count > Slices::kMost || c.rows < count * Slices::kLeastRows || c.starts) return found;
  for (int64_t row = 0; row < c.rows; ++row)  // it writes where its context ends, as the check of `apart` assumes
    if (c.contexts[row] < 1 || c.contexts[row] > c.columns * c.block ||
        c.slots[row] != c.tables[row * c.table_row + (c.contexts[row] - 1) / c.block] * c.block +
                            (c.contexts[row] - 1) % c.block)
      return found;
  // Multiply-adds of a row: its products, and its attention
  const int64_t queries = c.heads * c.head_dim, keys = c.kv_heads * c.head_dim;
  const int64_t products = c.hidden * (2 * queries + 2 * keys + 3 * c.inner);
  int64_t whole = 0, done = 0;
  for (int64_t row = 0; row < c.rows; ++row) whole += products + 2 * c.contexts[row] * queries;
  Slices cut;
  cut.count = 0;
  for (int64_t row = 0; row < c.rows; ++row) {
    if (row % kLanes == 0 && cut.count < count && done * count >= cut.count * whole) cut.first[cut.count++] = row;
    done += products + 2 * c.contexts[row] * queries;
  }
  cut.first[cut.count] = c.rows;
  Scratch owner;
  if (!owner.reserve(c.blocks)) return found;
  return apart(c, steps, cut, reinterpret_cast<int32_t*>(owner.data())) ? cut : found;
}

// The rows of one slice, for a thread that has them to itself.
inline DecoderCall slice_of(const DecoderCall& c, const Slices& slices, int64_t number) {
  DecoderCall part = c;
  const int64_t first = slices.first[number];
  part.rows = part.sequences = slices.first[number + 1] - first;
  if (slices.count > 1) {
    part.tokens += first, part.positions += first, part.slots += first, part.contexts += first;
    part.tables += first * c.table_row;
    part.out += first * c.hidden;
  }
  if (slices.count == 1) part.sequences = c.sequences;
  return part;
}

}  // namespace R1_ISA
}  // namespace r1
