// The product of two large matrices, for training and scoring: see gemm.cpp.
#pragma once

#include <cstdint>

namespace r1 {
namespace R1_ISA {

// A factor as it lies in memory: number (i, j) is from[i * row + j], or from[j * row + i] where it is `across`.
struct Factor {
  const float* from;
  int64_t row;
  bool across;
};

// out[m][n] = sum over k of left(m, k) right(k, n), + bias[n].
struct Product {
  int64_t rows, depth, columns;
  Factor left, right;
  float* out;
  int64_t out_row;    // from one row of out to the next
  const float* bias;  // [columns], or null
  int64_t chain;      // terms that are added up in registers, at most kLongest: each number is one chain after another
};

constexpr int64_t kLongest = 288;

// False when memory ran out. The order of a number's terms is that of k, whatever the sizes and the number of threads.
bool gemm(const Product& product);

}  // namespace R1_ISA
}  // namespace r1
