// The launchers of csrc/cuda: compiled by nvcc without pybind11 (2 s a file instead of 24) and bound by g++.
// Pointers are device memory, `stream` is a cudaStream_t; each returns a cudaError_t as int, 0 for success.
#pragma once

#include <cstdint>

extern "C" {
const char* r1_cuda_error(int error);
// rewards, out: [groups * group_size]
int r1_cuda_group_advantage(const float* rewards, float* out, int64_t groups, int64_t group_size, bool normalize,
                            double eps, void* stream);
// rewards, ids, out: [count]; compares every row with every other
int r1_cuda_group_advantage_ids(const float* rewards, const int64_t* ids, float* out, int64_t count, bool normalize,
                                double eps, void* stream);
}
