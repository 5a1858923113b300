// Which lane of a warp holds which element of a matrix that the tensor cores take: the layouts of mma.sync.m16n8k16 of
// 16-bit elements and of ldmatrix, as the PTX ISA gives them ("Matrix Fragments for mma.m16n8k16", "ldmatrix"). Written
// here once: kernels ask where their elements lie, and tests/emulated_cuda computes products from the same places.
#pragma once

#include "../common/host_device.h"

namespace r1 {
namespace cuda {

struct Place {
  int row, column;
};

// A [16, 16]: 8 elements a lane, two a word.
R1_HD constexpr Place place_in_a(int lane, int i) { return {lane / 4 + i / 2 % 2 * 8, lane % 4 * 2 + i % 2 + i / 4 * 8}; }

// B [16, 8]: 4 elements a lane, two a word, one row below the other.
R1_HD constexpr Place place_in_b(int lane, int i) { return {lane % 4 * 2 + i % 2 + i / 2 * 8, lane / 4}; }

// C and D [16, 8]: 4 floats a lane. Two of them side by side lie in A, and words 0 and 1 of A are those of one C.
R1_HD constexpr Place place_in_c(int lane, int i) { return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2}; }

// One of ldmatrix's [8, 8], whose row r begins where lane r of its eight lanes points: 2 elements a lane, one word.
R1_HD constexpr Place place_in_matrix(int lane, int i, bool transposed) {
  return transposed ? Place{lane % 4 * 2 + i, lane / 4} : Place{lane / 4, lane % 4 * 2 + i};
}

}  // namespace cuda
}  // namespace r1
