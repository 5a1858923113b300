// What csrc/cpu gives: declared once per instruction set, see host_device.h. Pointers are to contiguous memory.
// The files of csrc/cpu use no standard containers or algorithms: their templates would be shared between the
// instruction sets by the linker. Loops over rows run on OpenMP threads where there is enough to do.
#pragma once

#include "../common/host_device.h"

#define R1_CPU_OPS                                                                                                   \
  /* rewards, out: [groups * group_size] */                                                                          \
  void group_advantage(const float* rewards, float* out, int64_t groups, int64_t group_size, bool normalize,         \
                       double eps);                                                                                  \
  /* rewards, ids, out: [count]; false when memory runs out */                                                       \
  bool group_advantage_ids(const float* rewards, const int64_t* ids, float* out, int64_t count, bool normalize,      \
                           double eps);                                                                              \
  /* counters: [count, 4], keys: [count, 2], out: [count, 4] */                                                      \
  void philox_words(const uint32_t* counters, const uint32_t* keys, uint32_t* out, int64_t count);

namespace r1 {
namespace generic {
R1_CPU_OPS
}
namespace x86_64_v3 {
R1_CPU_OPS
}
namespace x86_64_v4 {
R1_CPU_OPS
}
}  // namespace r1
