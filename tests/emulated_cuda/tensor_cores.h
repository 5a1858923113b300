// csrc/cuda/mma.h for the emulation: the same functions, computed from the places of csrc/cuda/fragments.h.
//
// A copy into shared memory leaves NaN at once and its bytes only when the thread waits for them, so both a reader that
// comes too early and a copy into what is still being read change results. Rows of a matrix that meet in the banks of
// shared memory, which would only cost time, end the process.
#pragma once

#include <vector>

#include "../../csrc/common/half.h"
#include "../../csrc/cuda/fragments.h"

namespace emulated {
inline int64_t copied = 0;
}
extern "C" __attribute__((weak, used)) int64_t emulated_bytes_copied() { return emulated::copied; }

namespace r1 {
namespace cuda {

using namespace r1::generic;

inline void copy_async(void* to, const void* from, bool there) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || (there && reinterpret_cast<uintptr_t>(from) % 16))
    emulated::fail("an asynchronous copy that is not aligned to 16 bytes");
  if (there) emulated::copied += 16;
  std::memset(to, 0xFF, 16);
  emulated::self().copies.push_back({to, there ? from : nullptr, emulated::self().groups});
}

inline void end_copies() { ++emulated::self().groups; }

template <int LATER>
void wait_for_copies() {
  emulated::Fiber& self = emulated::self();
  std::vector<emulated::Copy> left;
  for (const emulated::Copy& copy : self.copies) {
    if (copy.group >= self.groups - LATER) {
      left.push_back(copy);
    } else if (copy.from) {
      std::memcpy(copy.to, copy.from, 16);
    } else {
      std::memset(copy.to, 0, 16);
    }
  }
  self.copies = left;
}

template <bool TRANSPOSED>
void load_matrices(uint32_t (&to)[4], const void* row) {
  const emulated::Gathered<const char*> rows(static_cast<const char*>(row));
  for (int matrix = 0; matrix < 4; ++matrix) {
    for (int r = 0; r < 8; ++r) {
      const uintptr_t here = reinterpret_cast<uintptr_t>(rows[matrix * 8 + r]);
      if (here % 16) emulated::fail("a row of a matrix that is not aligned to 16 bytes");
      for (int other = 0; other < r; ++other) {
        const uintptr_t there = reinterpret_cast<uintptr_t>(rows[matrix * 8 + other]);
        if (here != there && here / 16 % 8 == there / 16 % 8) emulated::fail("rows of a matrix in the same banks");
      }
    }
    uint16_t found[2];
    for (int i = 0; i < 2; ++i) {
      const Place place = place_in_matrix(emulated::lane(), i, TRANSPOSED);
      std::memcpy(&found[i], rows[matrix * 8 + place.row] + 2 * place.column, 2);
    }
    to[matrix] = found[0] | static_cast<uint32_t>(found[1]) << 16;
  }
}

template <typename T>
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Factors {
    uint32_t a[4], b[2];
  };
  const emulated::Gathered<Factors> given(Factors{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const auto element = [](const uint32_t* words, int i) {
    return to_float(T{static_cast<uint16_t>(words[i / 2] >> i % 2 * 16)});
  };
  struct Matrices {
    int a[16][16], b[16][8];  // lane * 8 + element
  };
  static const Matrices holders = [] {
    Matrices found{};
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 8; ++i) found.a[place_in_a(lane, i).row][place_in_a(lane, i).column] = lane * 8 + i;
      for (int i = 0; i < 4; ++i) found.b[place_in_b(lane, i).row][place_in_b(lane, i).column] = lane * 8 + i;
    }
    return found;
  }();
  for (int i = 0; i < 4; ++i) {
    const Place place = place_in_c(emulated::lane(), i);
    double sum = 0;
    for (int k = 0; k < 16; ++k) {
      const int left = holders.a[place.row][k], right = holders.b[k][place.column];
      sum += static_cast<double>(element(given[left / 8].a, left % 8)) * element(given[right / 8].b, right % 8);
    }
    c[i] += static_cast<float>(sum);
  }
}

template <typename T>
uint32_t pack_pair(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

}  // namespace cuda
}  // namespace r1
