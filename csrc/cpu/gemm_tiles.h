// gemm on matrix tiles, where the processor has them: see gemm_tiles.cpp.
#pragma once

#include "gemm.h"

namespace r1 {
namespace R1_ISA {

// Only where `tile_pieces` is not 0. False when memory ran out.
bool gemm_tiles(const Product& product);

}  // namespace R1_ISA
}  // namespace r1
