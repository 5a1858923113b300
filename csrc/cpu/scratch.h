// Working memory of one thread for one op call, 64-byte aligned. Never shared, never kept: a held buffer would outlive
// the longest sequence ever seen.
#pragma once

#include <cstdlib>

#include "simd.h"

namespace r1 {
namespace R1_ISA {

class Scratch {
 public:
  // False when memory runs out. What was there before is lost.
  bool reserve(int64_t floats) {
    if (floats <= size_) return true;
    std::free(memory_);
    memory_ = std::malloc(floats * sizeof(float) + 64);
    size_ = memory_ ? floats : 0;
    next_ = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_) + 63) & ~uintptr_t{63});
    return memory_ != nullptr;
  }
  float* data() { return next_; }
  ~Scratch() { std::free(memory_); }

 private:
  void* memory_ = nullptr;
  float* next_ = nullptr;
  int64_t size_ = 0;
};

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t n, int64_t step) { return (n + step - 1) / step; }
inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

}  // namespace R1_ISA
}  // namespace r1
