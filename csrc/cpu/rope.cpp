// Rotary embedding of queries and keys in one pass. See kernels/rope.py for the contract.
// The gradient of a rotation is the rotation back, so `turn` = -1 is the backward pass.
#include "ops.h"
#include "simd.h"

namespace r1 {
namespace R1_ISA {
namespace {

constexpr int64_t kSerial = 1 << 16;  // elements under which threads cost more than they give

// HALF: known at compile time for the usual head sizes, so that a half of 8 takes one short vector; 0: `half` says.
template <int64_t HALF>
inline void rotate(const float* x, const float* cos, const float* sin, float turn, int64_t half, float* out) {
  const int64_t count = HALF ? HALF : half;
  const float* second = x + count;
#pragma omp simd
  for (int64_t d = 0; d < count; ++d) {
    const float s = turn * sin[d];
    out[d] = x[d] * cos[d] - second[d] * s;
    out[count + d] = second[d] * cos[d] + x[d] * s;
  }
}

template <int64_t HALF>
void rotate_rows(Strided q, Strided k, const float* cos, const float* sin, const int64_t* positions, int64_t rows,
                 int64_t heads, int64_t kv_heads, int64_t half, float turn, float* q_out, float* k_out) {
#pragma omp parallel for schedule(static) if (rows * (heads + kv_heads) * half > kSerial / 2)
  for (int64_t i = 0; i < rows; ++i) {
    const float *c = cos + positions[i] * half, *s = sin + positions[i] * half;
    for (int64_t h = 0; h < heads; ++h)
      rotate<HALF>(q.data + i * q.row + h * q.head, c, s, turn, half, q_out + (i * heads + h) * 2 * half);
    for (int64_t h = 0; h < kv_heads; ++h)
      rotate<HALF>(k.data + i * k.row + h * k.head, c, s, turn, half, k_out + (i * kv_heads + h) * 2 * half);
  }
}

}  // namespace

void rope(Strided q, Strided k, const float* cos, const float* sin, const int64_t* positions, int64_t rows,
          int64_t heads, int64_t kv_heads, int64_t half, float turn, float* q_out, float* k_out) {
  const auto run = half == 8    ? rotate_rows<8>
                   : half == 16 ? rotate_rows<16>
                   : half == 32 ? rotate_rows<32>
                   : half == 64 ? rotate_rows<64>
                                : rotate_rows<0>;
  run(q, k, cos, sin, positions, rows, heads, kv_heads, half, turn, q_out, k_out);
}

}  // namespace R1_ISA
}  // namespace r1
