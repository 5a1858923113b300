// From the fused projection of q, k and v to what attention takes, forward and backward. See kernels/qkv_rope.py for
// the contract.
//
// A row's heads are read, normalised, rotated and written while they are in L1: half the time of two norms, a rotation
// and, backward, autograd's concatenation. What the norm needs backward is made again from its input.
// The gradients of the norms' weights are summed in two stages whose parts depend on the number of rows alone, as in
// rms_norm.cpp: any number of threads gives the same bits.
#include "ops.h"
#include "rope.h"
#include "scratch.h"

namespace r1 {
namespace R1_ISA {
namespace {

constexpr int64_t kSerial = 1 << 16;  // elements under which threads cost more than they give
constexpr int64_t kPartRows = 32;     // at least; and at most kParts parts
constexpr int64_t kParts = 256;

template <int64_t HALF>
void forward_rows(const QkvRope& call, float* q_out, float* k_out) {
  const int64_t heads = call.heads, kv_heads = call.kv_heads, half = HALF ? HALF : call.half, width = 2 * half;
#pragma omp parallel for schedule(static) if (call.rows * (heads + kv_heads) * width > kSerial)
  for (int64_t i = 0; i < call.rows; ++i) {
    const float *cos = call.cos + call.positions[i] * half, *sin = call.sin + call.positions[i] * half;
    const float* x = call.qkv + i * call.row;
    for (int64_t h = 0; h < heads; ++h, x += width)
      norm_and_rotate<HALF>(x, call.q_norm, call.eps, cos, sin, half, q_out + (i * heads + h) * width);
    for (int64_t h = 0; h < kv_heads; ++h, x += width)
      norm_and_rotate<HALF>(x, call.k_norm, call.eps, cos, sin, half, k_out + (i * kv_heads + h) * width);
  }
}

// The gradient of a head: rotated back, then through the norm. With c = 1 / rms(x) and g = d_y * weight:
// d_x = c * (g - x * c^2 * mean(g * x)), and the head's share of d_weight, d_y * x * c, is added to `part`.
template <int64_t HALF>
R1_INLINE void head_backward(const float* x, const float* weight, float eps, const float* cos, const float* sin,
                             int64_t half, const float* d_out, float* d_x, float* part) {
  const int64_t width = HALF ? 2 * HALF : 2 * half;
  float d_y[HALF ? 2 * HALF : kLargestHead];
  if (!weight) {
    rotate<HALF>(d_out, cos, sin, -1.0f, half, d_x);
    return;
  }
  rotate<HALF>(d_out, cos, sin, -1.0f, half, d_y);
  Vec squares{}, dots{};
  for (int64_t d = 0; d < width; d += kLanes) {
    const Vec v = load(x + d, width - d);
    squares = fma(v, v, squares);
    dots = fma(load(d_y + d, width - d) * load(weight + d, width - d), v, dots);
  }
  const float c = inverse_rms(squares, width, eps), shift = c * c * c * sum_of(dots) / static_cast<float>(width);
  for (int64_t d = 0; d < width; d += kLanes) {
    const Vec v = load(x + d, width - d), scaled = load(d_y + d, width - d) * c;
    store(d_x + d, fma(scaled, load(weight + d, width - d), -(v * shift)), width - d);
    store(part + d, fma(scaled, v, load(part + d, width - d)), width - d);
  }
}

// Rows first to last; part: [2, width], sums of the gradients of both norms.
template <int64_t HALF>
void backward_rows(const QkvRope& call, const QkvGradient& g, int64_t first, int64_t last, float* part) {
  const int64_t heads = call.heads, kv_heads = call.kv_heads, half = HALF ? HALF : call.half, width = 2 * half;
  for (int64_t i = first; i < last; ++i) {
    const float *cos = call.cos + call.positions[i] * half, *sin = call.sin + call.positions[i] * half;
    const float* x = call.qkv + i * call.row;
    float* to = g.d_qkv + i * (heads + 2 * kv_heads) * width;
    for (int64_t h = 0; h < heads; ++h, x += width, to += width)
      head_backward<HALF>(x, call.q_norm, call.eps, cos, sin, half, g.d_q.data + i * g.d_q.row + h * g.d_q.head, to,
                          part);
    for (int64_t h = 0; h < kv_heads; ++h, x += width, to += width)
      head_backward<HALF>(x, call.k_norm, call.eps, cos, sin, half, g.d_k.data + i * g.d_k.row + h * g.d_k.head, to,
                          part + width);
    for (int64_t h = 0; h < kv_heads; ++h, to += width)
      std::memcpy(to, g.d_v.data + i * g.d_v.row + h * g.d_v.head, width * sizeof(float));
  }
}

}  // namespace

void qkv_rope_forward(const QkvRope& call, float* q_out, float* k_out) {
  R1_BY_HALF(forward_rows, call.half)(call, q_out, k_out);
}

bool qkv_rope_backward(const QkvRope& call, const QkvGradient& gradient) {
  int64_t part_rows = (call.rows + kParts - 1) / kParts;
  if (part_rows < kPartRows) part_rows = kPartRows;
  const int64_t parts = (call.rows + part_rows - 1) / part_rows, width = 2 * call.half;
  Scratch scratch;
  if (!scratch.reserve(parts * 2 * width)) return false;
  float* sums = scratch.data();
  std::memset(sums, 0, parts * 2 * width * sizeof(float));
  const auto run = R1_BY_HALF(backward_rows, call.half);
#pragma omp parallel for schedule(static) if (call.rows * (call.heads + 2 * call.kv_heads) * width > kSerial)
  for (int64_t p = 0; p < parts; ++p) {
    const int64_t end = (p + 1) * part_rows;
    run(call, gradient, p * part_rows, end < call.rows ? end : call.rows, sums + p * 2 * width);
  }
  if (call.q_norm) {
    add_parts(sums, parts, 2 * width, width, gradient.d_q_norm);
    add_parts(sums + width, parts, 2 * width, width, gradient.d_k_norm);
  }
  return true;
}

}  // namespace R1_ISA
}  // namespace r1
