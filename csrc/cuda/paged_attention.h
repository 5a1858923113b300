// What the two ways of decoding over a paged cache share: paged_attention.cu takes each row by itself, and
// paged_attention_groups.cu the rows that have the same blocks together. Both leave the same sums for one merge.
#pragma once

#include "device.h"

namespace r1 {
namespace cuda {

constexpr int kSplit = 256;  // positions of a piece of a context; PIECE of kernels/paged_groups.py

// e^x = 2^(x log2(e)), and 2^x is what the card computes: scores, and the maxima among them, are in units of ln 2.
constexpr float kLog2E = 1.4426950408889634f;

struct Cache {
  const void *keys, *values;
  const int32_t *tables, *contexts;
  int64_t table_stride;
  int blocks, block, longest;  // in the cache; positions of one; positions that a table's row can name
  int kv_heads, width;
};

// The query heads of a key head are taken in parts, each by a block of its own. scale: with kLog2E in it.
struct Queries {
  const void* q;
  int64_t stride;
  int heads, group, parts;
  float scale;
};

// Of each split: sums [sequence, split, head, width], then maximum and total [sequence, split, head].
struct Partial {
  float *sums, *maxima, *totals;
};

// The rows first[split][s] to s have the same blocks in a split.
struct Groups {
  const int32_t* first;
  int64_t stride;
};

// `type` is kBf16 or kHalf. Where there is one split the results are in `out`, else in `partial`.
int attend_groups(const Queries& queries, const Cache& cache, const Groups& groups, const Partial& partial, void* out,
                  int type, int64_t sequences, int splits, void* stream);

}  // namespace cuda
}  // namespace r1
