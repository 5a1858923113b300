// RMSNorm with an optional residual sum, forward and backward. See kernels/rms_norm.py for the contract.
//
// Rows go four at a time: a row's sum across lanes is a chain of waits, and QK-norm has many rows of one vector; four
// also share each load of the weight and of its gradient's sum. Backward, wide rows go one by one, 1.3 to 1.5 times as
// fast: a row is read twice, and four do not stay in L1.
// The weight's gradient is summed in two stages whose parts depend on the number of rows alone: fp32 within a part,
// double over the parts in order. So any number of threads gives the same bits.
#include "norm.h"
#include "ops.h"
#include "scratch.h"

namespace r1 {
namespace R1_ISA {
namespace {

constexpr int64_t kTogether = 4;
constexpr int64_t kWide = 128;        // columns
constexpr int64_t kSerial = 1 << 16;  // elements under which threads cost more than they give
constexpr int64_t kPartRows = 64;     // at least; and at most kParts parts
constexpr int64_t kParts = 256;

// x[i]: row i of x, counted over outer and inner
inline const float* row_at(Strided x, int64_t inner, int64_t i) {
  return inner == 1 ? x.data + i * x.row : x.data + i / inner * x.row + i % inner * x.head;
}

template <int64_t R>
void forward_rows(Strided x, int64_t inner, const float* residual, const float* weight, float eps, int64_t first,
                  int64_t width, float* total, float* y, float* scale) {
  const float* from[R];
  Vec squares[R] = {};
  for (int64_t r = 0; r < R; ++r) from[r] = row_at(x, inner, first + r);
  for (int64_t d = 0; d < width; d += kLanes)
    for (int64_t r = 0; r < R; ++r) {
      Vec s = load(from[r] + d, width - d);
      if (residual) {
        s += load(residual + (first + r) * width + d, width - d);
        store(total + (first + r) * width + d, s, width - d);
      }
      squares[r] = fma(s, s, squares[r]);
    }
  for (int64_t r = 0; r < R; ++r) {
    scale[first + r] = inverse_rms(squares[r], width, eps);
    if (residual) from[r] = total + (first + r) * width;
  }
  for (int64_t d = 0; d < width; d += kLanes) {
    const Vec w = load(weight + d, width - d);
    for (int64_t r = 0; r < R; ++r)
      store(y + (first + r) * width + d, normalised(load(from[r] + d, width - d), scale[first + r], w), width - d);
  }
}

// With s the normalised rows, c = 1 / rms(s) and g = d_y * weight:  d_s = c * (g - s * c^2 * mean(g * s)) + d_total,
// and the rows' share of d_weight = sum of d_y * s * c is added to `part`.
R1_INLINE float shift_of(Vec dots, float c, int64_t width) {
  return c * c * c * sum_of(dots) / static_cast<float>(width);
}
R1_INLINE Vec gradient_of(Vec value, Vec scaled, Vec weight, float shift) {
  return fma(scaled, weight, -(value * shift));
}

template <int64_t R>
void backward_rows(Strided s, int64_t inner, const float* weight, const float* scale, const float* d_y,
                   const float* d_total, int64_t first, int64_t width, float* d_x, float* part) {
  const float* from[R];
  Vec dots[R] = {};
  float shift[R];
  for (int64_t r = 0; r < R; ++r) from[r] = row_at(s, inner, first + r);
  for (int64_t d = 0; d < width; d += kLanes) {
    const Vec w = load(weight + d, width - d);
    for (int64_t r = 0; r < R; ++r)
      dots[r] = fma(load(d_y + (first + r) * width + d, width - d) * w, load(from[r] + d, width - d), dots[r]);
  }
  for (int64_t r = 0; r < R; ++r) shift[r] = shift_of(dots[r], scale[first + r], width);
  for (int64_t d = 0; d < width; d += kLanes) {
    const Vec w = load(weight + d, width - d);
    Vec share{};
    for (int64_t r = 0; r < R; ++r) {
      const int64_t at = (first + r) * width + d;
      const Vec value = load(from[r] + d, width - d), scaled = load(d_y + at, width - d) * scale[first + r];
      Vec gradient = gradient_of(value, scaled, w, shift[r]);
      if (d_total) gradient += load(d_total + at, width - d);
      store(d_x + at, gradient, width - d);
      share = fma(scaled, value, share);
    }
    store(part + d, load(part + d, width - d) + share, width - d);
  }
}

// One row of kWide columns or more. The first pass reads and the second writes; so that memory does neither alone, the
// first fetches the lines that will be written, and the second what the next row reads, where there is one (`after`).
void backward_row(Strided s, int64_t inner, const float* weight, const float* scale, const float* d_y,
                  const float* d_total, int64_t i, bool after, int64_t width, float* d_x, float* part) {
  const float *from = row_at(s, inner, i), *next = row_at(s, inner, i + after), c = scale[i];
  const int64_t step = after ? width : 0;
  constexpr int64_t kVectors = kLine / kLanes;
  d_y += i * width, d_x += i * width;
  if (d_total) d_total += i * width;
  Vec dots[kVectors] = {};
  for (int64_t line = 0; line < width; line += kLine) {
    __builtin_prefetch(d_x + line, 1);
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVectors; ++v) {
      const int64_t d = line + v * kLanes;
      if (d < width)
        dots[v] = fma(load(d_y + d, width - d) * load(weight + d, width - d), load(from + d, width - d), dots[v]);
    }
  }
  for (int64_t v = 1; v < kVectors; ++v) dots[0] += dots[v];
  const float shift = shift_of(dots[0], c, width);
  for (int64_t line = 0; line < width; line += kLine) {
    __builtin_prefetch(next + line);
    __builtin_prefetch(d_y + step + line);
    if (d_total) __builtin_prefetch(d_total + step + line);
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVectors; ++v) {
      const int64_t d = line + v * kLanes;
      if (d >= width) break;
      const Vec value = load(from + d, width - d), scaled = load(d_y + d, width - d) * c;
      Vec gradient = gradient_of(value, scaled, load(weight + d, width - d), shift);
      if (d_total) gradient += load(d_total + d, width - d);
      store(d_x + d, gradient, width - d);
      store(part + d, fma(scaled, value, load(part + d, width - d)), width - d);
    }
  }
}

}  // namespace

void rms_norm_forward(Strided x, int64_t rows, int64_t inner, int64_t width, const float* residual, const float* weight,
                      float eps, float* total, float* y, float* scale) {
#pragma omp parallel for schedule(static) if (rows * width > kSerial)
  for (int64_t block = 0; block < (rows + kTogether - 1) / kTogether; ++block) {
    int64_t i = block * kTogether;
    if (i + kTogether <= rows)
      forward_rows<kTogether>(x, inner, residual, weight, eps, i, width, total, y, scale);
    else
      for (; i < rows; ++i) forward_rows<1>(x, inner, residual, weight, eps, i, width, total, y, scale);
  }
}

bool rms_norm_backward(Strided s, int64_t rows, int64_t inner, int64_t width, const float* weight, const float* scale,
                       const float* d_y, const float* d_total, float* d_x, float* d_weight) {
  int64_t part_rows = round_up((rows + kParts - 1) / kParts, kTogether);
  if (part_rows < kPartRows) part_rows = kPartRows;
  const int64_t parts = (rows + part_rows - 1) / part_rows;
  Scratch scratch;
  if (!scratch.reserve(parts * width)) return false;
  float* sums = scratch.data();
  std::memset(sums, 0, parts * width * sizeof(float));
#pragma omp parallel for schedule(static) if (rows * width > kSerial)
  for (int64_t p = 0; p < parts; ++p) {
    const int64_t end = (p + 1) * part_rows < rows ? (p + 1) * part_rows : rows;
    int64_t i = p * part_rows;
    for (; width >= kWide && i < end; ++i)
      backward_row(s, inner, weight, scale, d_y, d_total, i, i + 1 < rows, width, d_x, sums + p * width);
    for (; i + kTogether <= end; i += kTogether)
      backward_rows<kTogether>(s, inner, weight, scale, d_y, d_total, i, width, d_x, sums + p * width);
    for (; i < end; ++i) backward_rows<1>(s, inner, weight, scale, d_y, d_total, i, width, d_x, sums + p * width);
  }
  add_parts(sums, parts, width, width, d_weight);
  return true;
}

}  // namespace R1_ISA
}  // namespace r1
