// What the kernels share: sums in a fixed order, loads of 16 bytes, shared memory, and the launch. Kernels are launched by
// cudaLaunchKernelEx instead of <<<>>>, so that tests/emulated_cuda can compile these files with a plain C++ compiler.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/half.h"

namespace r1 {
namespace cuda {

using namespace r1::generic;

constexpr unsigned kAll = 0xffffffffu;

template <typename T>
constexpr bool kIsBf16 = false;
template <>
constexpr bool kIsBf16<Bf16> = true;

// Butterflies: every lane ends with the same value, added in the same order on every run.
template <typename Number>
__device__ __forceinline__ Number warp_sum(Number value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAll, value, step);
  return value;
}

template <typename Number>
__device__ __forceinline__ Number warp_max(Number value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const Number other = __shfl_xor_sync(kAll, value, step);
    value = other > value ? other : value;
  }
  return value;
}

// 16 bytes of memory as floats: 4 floats or 8 of the narrow types. `from` must be aligned to 16 bytes.
template <typename T>
constexpr int kPack = 16 / sizeof(T);

template <typename T>
__device__ __forceinline__ void load_pack(const T* from, float* to) {
  const uint4 raw = *reinterpret_cast<const uint4*>(from);
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      to[i] = float_of(words[i]);
    } else {
      to[2 * i] = to_float(T{static_cast<uint16_t>(words[i])});
      to[2 * i + 1] = to_float(T{static_cast<uint16_t>(words[i] >> 16)});
    }
  }
}

template <typename T>
__device__ __forceinline__ void store_pack(T* to, const float* from) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      words[i] = bits_of(from[i]);
    } else {
      words[i] = from_float<T>(from[2 * i]).bits | static_cast<uint32_t>(from_float<T>(from[2 * i + 1]).bits) << 16;
    }
  }
  *reinterpret_cast<uint4*>(to) = uint4{words[0], words[1], words[2], words[3]};
}

#ifndef R1_EMULATED_CUDA
// The block's one struct of shared memory.
template <typename Shared>
__device__ __forceinline__ Shared& shared_memory() {
  __shared__ Shared memory;
  return memory;
}

// The same of more than 48 KiB, which a launch must ask for.
template <typename Shared>
__device__ __forceinline__ Shared& dynamic_shared_memory() {
  static_assert(alignof(Shared) <= 16);
  extern __shared__ uint4 dynamic_memory[];
  return *reinterpret_cast<Shared*>(dynamic_memory);
}
#endif

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The launch of a kernel that takes `bytes` of dynamic shared memory.
template <typename... Parameters, typename... Arguments>
int launch_with(void (*kernel)(Parameters...), dim3 grid, int threads, size_t bytes, void* stream,
                Arguments... arguments) {
  if (bytes > 0) {
    const auto status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (status != 0) return static_cast<int>(status);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  return static_cast<int>(cudaGetLastError());
}

// 0, or the cudaError_t of a launch that could not be made.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, void* stream, Arguments... arguments) {
  return launch_with(kernel, grid, threads, 0, stream, arguments...);
}

}  // namespace cuda
}  // namespace r1
