// The vector exp alone, so that a test can measure its error.
#include "ops.h"
#include "simd.h"

namespace r1 {
namespace R1_ISA {

void vector_exp(const float* x, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store(out + i, exp_any(load(x + i, count - i)), count - i);
}

}  // namespace R1_ISA
}  // namespace r1
