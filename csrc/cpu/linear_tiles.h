// The forward of a linear layer with at most 128 rows on matrix tiles, where the processor has them: see linear_tiles.cpp.
#pragma once

#include <cstdint>

namespace r1 {
namespace R1_ISA {

constexpr int64_t kMany = 128;  // rows above which the forward is a product of two large matrices

// As linear_forward (ops.h); only where `tile_pieces` is not 0. False when memory ran out.
bool linear_tiles(const float* x, int64_t x_row, const float* weight, const float* bias, int64_t rows, int64_t width,
                  int64_t outputs, float* y);

}  // namespace R1_ISA
}  // namespace r1
