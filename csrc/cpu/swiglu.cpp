// SwiGLU, forward and backward. See kernels/swiglu.py for the contract.
#include "ops.h"
#include "simd.h"

namespace r1 {
namespace R1_ISA {
namespace {

constexpr int64_t kSerial = 1 << 15;  // outputs under which threads cost more than they give
constexpr int64_t kAhead = 256;       // floats: the chain of an exponential leaves too few loads under way to fill memory

}  // namespace

void swiglu_forward(const float* gate_up, int64_t row, int64_t rows, int64_t width, float* out) {
#pragma omp parallel for schedule(static) if (rows * width > kSerial)
  for (int64_t i = 0; i < rows; ++i) {
    const float *gate = gate_up + i * row, *up = gate + width;
    for (int64_t d = 0; d < width; d += kLanes) {
      if (d % kLine == 0) {  // past the end of a row too, where the next one is
        __builtin_prefetch(gate + d + kAhead);
        __builtin_prefetch(up + d + kAhead);
        __builtin_prefetch(out + i * width + d + kAhead, 1);
      }
      const Vec g = load(gate + d, width - d);
      store(out + i * width + d, g * sigmoid(g) * load(up + d, width - d), width - d);
    }
  }
}

// d silu(g) / dg = sigmoid(g) * (1 + g * (1 - sigmoid(g)))
void swiglu_backward(const float* gate_up, int64_t row, const float* d_out, int64_t rows, int64_t width,
                     float* d_gate_up) {
#pragma omp parallel for schedule(static) if (rows * width > kSerial)
  for (int64_t i = 0; i < rows; ++i) {
    const float *gate = gate_up + i * row, *up = gate + width;
    float *d_gate = d_gate_up + i * 2 * width, *d_up = d_gate + width;
    for (int64_t d = 0; d < width; d += kLanes) {
      const Vec g = load(gate + d, width - d), s = sigmoid(g), dy = load(d_out + i * width + d, width - d);
      store(d_gate + d, dy * load(up + d, width - d) * s * (1.0f + g * (1.0f - s)), width - d);
      store(d_up + d, dy * g * s, width - d);
    }
  }
}

}  // namespace R1_ISA
}  // namespace r1
