// The generator alone, so that a test can compare it with the reference and with the published vectors.
#include "../common/philox.h"

#include "ops.h"

namespace r1 {
namespace R1_ISA {

void philox_words(const uint32_t* counters, const uint32_t* keys, uint32_t* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t* c = counters + 4 * i;
    const Philox words = philox(c[0], c[1], c[2], c[3], keys[2 * i], keys[2 * i + 1]);
    for (int j = 0; j < 4; ++j) out[4 * i + j] = words.word[j];
  }
}

}  // namespace R1_ISA
}  // namespace r1
