// Kernels of one instruction each, for tests/test_tensor_cores.py: a warp's lanes give and get their words as they are.
#include "../../csrc/cuda/mma.h"

using namespace r1::cuda;

namespace {

template <typename T>
void multiply_once(const uint32_t* a, const uint32_t* b, float* c) {
  const int lane = threadIdx.x;
  uint32_t left[4];
  float sums[4];
  for (int i = 0; i < 4; ++i) left[i] = a[lane * 4 + i];
  for (int i = 0; i < 4; ++i) sums[i] = c[lane * 4 + i];
  multiply<T>(sums, left, b[lane * 2], b[lane * 2 + 1]);
  for (int i = 0; i < 4; ++i) c[lane * 4 + i] = sums[i];
}

struct Rows {
  uint16_t row[32][8];
};

// Rows go through shared memory; every second one is not there. WAIT: the copies are waited for.
template <bool TRANSPOSED, bool WAIT>
void load_once(const uint16_t* rows, uint32_t* words) {
  Rows& shared = shared_memory<Rows>();
  const int lane = threadIdx.x, swapped = 31 - lane;
  copy_async(shared.row[swapped], rows + swapped * 8, swapped % 2 == 0);
  end_copies();
  end_copies();  // an empty group
  WAIT ? wait_for_copies<1>() : wait_for_copies<2>();
  __syncwarp();
  uint32_t found[4];
  load_matrices<TRANSPOSED>(found, shared.row[lane]);
  for (int i = 0; i < 4; ++i) words[lane * 4 + i] = found[i];
}

}  // namespace

extern "C" {

void probe_multiply(bool bf16, const uint32_t* a, const uint32_t* b, float* c) {
  launch(bf16 ? multiply_once<Bf16> : multiply_once<Half>, 1, 32, nullptr, a, b, c);
}

void probe_matrices(bool transposed, bool wait, const uint16_t* rows, uint32_t* words) {
  auto chosen = transposed ? wait ? load_once<true, true> : load_once<true, false>
                           : wait ? load_once<false, true> : load_once<false, false>;
  launch(chosen, 1, 32, nullptr, rows, words);
}

uint32_t probe_pack(bool bf16, float low, float high) {
  return bf16 ? pack_pair<Bf16>(low, high) : pack_pair<Half>(low, high);
}

}
