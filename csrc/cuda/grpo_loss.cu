// GRPO's loss on the GPU: loss, slope and statistics in one pass. See kernels/grpo_loss.py for the contract.
#include "../common/policy.h"
#include "device.h"
#include "ops.h"

using namespace r1::cuda;

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kRows = 4;  // a thread: one load of 16 bytes from each stream
constexpr int kStats = 5;

struct DeviceMath {
  static __device__ __forceinline__ float exp(float x) { return expf(x); }
  static __device__ __forceinline__ float expm1(float x) { return expm1f(x); }
};

struct Streams {
  const float *logp, *old_logp, *ref_logp, *advantages, *weights;
  float *loss, *slope;
};

// kl_sum, clipped, ratio_sum, count are sums, ratio_max is a maximum: the order of `partial` and of the wrapper.
struct Stats {
  float kl, clipped, ratio, count, largest;
};

__device__ __forceinline__ void load_rows(const float* from, int64_t first, int64_t rows, bool whole, float* to) {
  if (whole) {
    load_pack(from + first, to);
  } else {
    for (int i = 0; i < kRows; ++i) to[i] = first + i < rows ? from[first + i] : 0.0f;
  }
}

__global__ void __launch_bounds__(kThreads) loss_rows(Streams at, int64_t rows, PolicySettings settings, bool vectors,
                                                      float* partial) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kRows;
  const bool whole = vectors && first + kRows <= rows;
  float logp[kRows], old_logp[kRows], ref_logp[kRows], advantage[kRows], weight[kRows], loss[kRows], slope[kRows];
  load_rows(at.weights, first, rows, whole, weight);
  load_rows(at.logp, first, rows, whole, logp);
  load_rows(at.old_logp, first, rows, whole, old_logp);
  load_rows(at.ref_logp, first, rows, whole, ref_logp);
  load_rows(at.advantages, first, rows, whole, advantage);
  Stats own{};
#pragma unroll
  for (int i = 0; i < kRows; ++i) {  // rows past the end have weight 0
    const PolicyRow<float> row =
        policy_row<DeviceMath>(logp[i], old_logp[i], ref_logp[i], advantage[i], weight[i], settings);
    loss[i] = row.loss;
    slope[i] = row.slope;
    own.kl += row.kl;
    own.clipped += row.clipped;
    own.ratio += row.ratio;
    own.count += row.live;
    own.largest = row.ratio > own.largest ? row.ratio : own.largest;
  }
  if (whole) {
    *reinterpret_cast<float4*>(at.loss + first) = float4{loss[0], loss[1], loss[2], loss[3]};
    *reinterpret_cast<float4*>(at.slope + first) = float4{slope[0], slope[1], slope[2], slope[3]};
  } else {
    for (int i = 0; i < kRows && first + i < rows; ++i) {
      at.loss[first + i] = loss[i];
      at.slope[first + i] = slope[i];
    }
  }

  struct Shared {
    float of_warp[kStats][kWarps];
  };
  Shared& shared = shared_memory<Shared>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float found[kStats] = {warp_sum(own.kl), warp_sum(own.clipped), warp_sum(own.ratio), warp_sum(own.count),
                               warp_max(own.largest)};
  if (lane == 0)
    for (int i = 0; i < kStats; ++i) shared.of_warp[i][warp] = found[i];
  __syncthreads();
  if (threadIdx.x < kStats) {
    const float* values = shared.of_warp[threadIdx.x];
    float total = values[0];
    for (int i = 1; i < kWarps; ++i)
      total = threadIdx.x < kStats - 1 ? total + values[i] : (values[i] > total ? values[i] : total);
    partial[static_cast<int64_t>(blockIdx.x) * kStats + threadIdx.x] = total;
  }
}

// One warp a statistic: the blocks' partial sums in a fixed order, in double.
__global__ void __launch_bounds__(32 * kStats) merge_stats(const float* partial, int64_t blocks, float* stats) {
  const int lane = threadIdx.x % 32, which = threadIdx.x / 32;
  double sum = 0;
  float largest = 0;
  for (int64_t i = lane; i < blocks; i += 32) {
    const float value = partial[i * kStats + which];
    sum += value;
    largest = value > largest ? value : largest;
  }
  sum = warp_sum(sum);
  largest = warp_max(largest);
  if (lane == 0) stats[which] = which < kStats - 1 ? static_cast<float>(sum) : largest;
}

}  // namespace

extern "C" {

int64_t r1_cuda_grpo_loss_blocks(int64_t rows) { return ceil_div(rows, kThreads * kRows); }

int r1_cuda_grpo_loss(const float* logp, const float* old_logp, const float* ref_logp, const float* advantages,
                      const float* weights, int64_t rows, float low, float high, float kl_coef, int kl_kind,
                      float* loss, float* slope, float* partial, float* stats, void* stream) {
  const Streams at{logp, old_logp, ref_logp, advantages, weights, loss, slope};
  const bool vectors = aligned(logp) && aligned(old_logp) && aligned(ref_logp) && aligned(advantages) &&
                       aligned(weights) && aligned(loss) && aligned(slope);
  const int64_t blocks = r1_cuda_grpo_loss_blocks(rows);
  if (rows > 0) {
    const dim3 grid(static_cast<unsigned>(blocks));
    const PolicySettings settings{low, high, kl_coef, kl_kind};
    const int status = launch(loss_rows, grid, kThreads, stream, at, rows, settings, vectors, partial);
    if (status != 0) return status;
  }
  return launch(merge_stats, dim3(1), 32 * kStats, stream, partial, blocks, stats);
}

}
