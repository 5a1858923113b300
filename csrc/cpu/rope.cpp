// Rotary embedding of queries and keys in one pass, alone (kernels/rope.py) and with what else a new token's q, k and v
// need before attention over the cache: RMSNorm of each head, and the write of k and v (kernels/rope_append.py).
// The gradient of a rotation is the rotation back, so `turn` = -1 is the backward pass.
#include "ops.h"
#include "rope.h"

namespace r1 {
namespace R1_ISA {
namespace {

constexpr int64_t kSerial = 1 << 16;  // elements under which threads cost more than they give

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

template <int64_t HALF>
void append_rows(const RopeAppend& call) {
  const int64_t heads = call.heads, kv_heads = call.kv_heads, half = call.half, width = 2 * half;
#pragma omp parallel for schedule(static) if (call.rows * (heads + 2 * kv_heads) * width > kSerial)
  for (int64_t i = 0; i < call.rows; ++i) {
    const float *cos = call.cos + call.positions[i] * half, *sin = call.sin + call.positions[i] * half;
    for (int64_t h = 0; h < heads; ++h)
      norm_and_rotate<HALF>(call.q.data + i * call.q.row + h * call.q.head, call.q_norm, call.eps, cos, sin, half,
                            call.q_out + (i * heads + h) * width);
    const int64_t place = call.slots[i] * kv_heads * width;
    for (int64_t h = 0; h < kv_heads; ++h) {
      norm_and_rotate<HALF>(call.k.data + i * call.k.row + h * call.k.head, call.k_norm, call.eps, cos, sin, half,
                            call.keys + place + h * width);
      std::memcpy(call.values + place + h * width, call.v.data + i * call.v.row + h * call.v.head,
                  width * sizeof(float));
    }
  }
}

}  // namespace

void rope_append(const RopeAppend& call) {
  R1_BY_HALF(append_rows, call.half)(call);
}

void rope(Strided q, Strided k, const float* cos, const float* sin, const int64_t* positions, int64_t rows,
          int64_t heads, int64_t kv_heads, int64_t half, float turn, float* q_out, float* k_out) {
  R1_BY_HALF(rotate_rows, half)(q, k, cos, sin, positions, rows, heads, kv_heads, half, turn, q_out, k_out);
}

}  // namespace R1_ISA
}  // namespace r1
