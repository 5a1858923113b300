// Group-relative advantages on the GPU, one launch. See kernels/group_advantage.py for the contract.
#include "../common/group.h"
#include "device.h"
#include "ops.h"

using namespace r1::cuda;

namespace {

constexpr int kWarps = 8;

// One warp a group.
__global__ void equal_groups(const float* __restrict__ rewards, float* __restrict__ out, int64_t groups,
                             int64_t group_size, bool normalize, double eps) {
  const int lane = threadIdx.x % 32;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (group >= groups) return;
  const float* r = rewards + group * group_size;
  double sum = 0, squares = 0;
  bool differs = false;
  for (int64_t i = lane; i < group_size; i += 32) {
    sum += r[i];
    differs |= r[i] != r[0];
  }
  const double mean = warp_sum(sum) / static_cast<double>(group_size);
  const bool varies = __any_sync(kAll, differs);
  for (int64_t i = lane; i < group_size; i += 32) squares += (r[i] - mean) * (r[i] - mean);
  const double std = sample_std(warp_sum(squares), group_size);
  for (int64_t i = lane; i < group_size; i += 32)
    out[group * group_size + i] = advantage(r[i], mean, std, eps, varies, normalize);
}

// One warp a row: it looks at every row and keeps those of its own group. Quadratic, but one launch, no sort, no
// atomics; the batch of a step has at most some thousands of rows.
__global__ void groups_by_id(const float* __restrict__ rewards, const int64_t* __restrict__ ids,
                             float* __restrict__ out, int64_t count, bool normalize, double eps) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= count) return;
  const int64_t id = ids[row];
  const float own = rewards[row];
  double sum = 0, members = 0, squares = 0;
  bool differs = false;
  for (int64_t i = lane; i < count; i += 32) {
    if (ids[i] != id) continue;
    sum += rewards[i];
    members += 1;
    differs |= rewards[i] != own;
  }
  members = warp_sum(members);
  const double mean = warp_sum(sum) / members;
  const bool varies = __any_sync(kAll, differs);
  for (int64_t i = lane; i < count; i += 32)
    if (ids[i] == id) squares += (rewards[i] - mean) * (rewards[i] - mean);
  const double std = sample_std(warp_sum(squares), static_cast<int64_t>(members));
  if (lane == 0) out[row] = advantage(own, mean, std, eps, varies, normalize);
}

dim3 blocks(int64_t warps) { return dim3(static_cast<unsigned>(ceil_div(warps, kWarps))); }

}  // namespace

extern "C" {

const char* r1_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int r1_cuda_group_advantage(const float* rewards, float* out, int64_t groups, int64_t group_size, bool normalize,
                            double eps, void* stream) {
  return launch(equal_groups, blocks(groups), 32 * kWarps, stream, rewards, out, groups, group_size, normalize, eps);
}

int r1_cuda_group_advantage_ids(const float* rewards, const int64_t* ids, float* out, int64_t count, bool normalize,
                                double eps, void* stream) {
  return launch(groups_by_id, blocks(count), 32 * kWarps, stream, rewards, ids, out, count, normalize, eps);
}

}
