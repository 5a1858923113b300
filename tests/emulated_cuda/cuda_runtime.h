// Enough of CUDA to compile csrc/cuda with a plain C++ compiler and run its kernels on a CPU, thread by thread.
//
// Each thread of a block is a fiber. A fiber runs until it meets a barrier or a warp operation; a warp goes on when all of
// its 32 lanes are there, the block when all of its threads are. So a kernel's indexing, its barriers and its arithmetic
// are the shipped ones; what is not tested is what the real machine adds: speed, and memory order between threads without
// a barrier. For that one R1_THREAD_ORDER=reverse runs threads, and blocks, last to first: a missing barrier then changes
// results, and so do two blocks that write one place. Shared memory starts full of NaN. Lanes that disagree about the
// operation they are at end the process, and so does an address that is not aligned to what is read or written there.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define R1_EMULATED_CUDA 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
using cudaStream_t = void*;
using cudaError_t = int;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaGetLastError() { return 0; }
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 8;
// 99 KiB is what a block of sm_86 and sm_89 can have, the least of all cards from sm_80 on.
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, int, int value) {
  return value <= 99 * 1024 ? 0 : 1;
}

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

enum class At { running, warp, block, done };

struct Copy {  // into shared memory, on its way
  void* to;
  const void* from;  // null for zeros
  int group;
};

struct Fiber {
  ucontext_t start;
  jmp_buf here;
  bool begun = false;
  At at = At::running;
  int parity = 0;
  std::vector<Copy> copies;
  int groups = 0;  // of copies that have been ended
  std::unique_ptr<char[]> stack;
};

struct alignas(8) Slot {
  char bytes[24];
};

constexpr size_t kStack = 1 << 17;

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Slot> slots;  // [parity][thread]: a lane is never more than one operation ahead of another
  std::vector<char> shared = std::vector<char>(1 << 18);
  std::function<void()> body;
  jmp_buf scheduler;
  int current = 0;
  size_t dynamic = 0;  // bytes of shared memory that the launch asked for
  bool all = true, all_before = true;  // of __syncthreads_and
};

inline Block& block() {
  static Block instance;
  return instance;
}

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "emulated CUDA: %s\n", why);
  std::abort();
}

inline Fiber& self() { return block().fibers[block().current]; }

inline void entry() {
  Block& b = block();
  b.body();
  b.fibers[b.current].at = At::done;
  _longjmp(b.scheduler, 1);
}

inline void wait(At at) {
  Block& b = block();
  Fiber& self = b.fibers[b.current];
  self.at = at;
  if (_setjmp(self.here) == 0) _longjmp(b.scheduler, 1);
}

inline void resume(int thread) {
  Block& b = block();
  Fiber& fiber = b.fibers[thread];
  b.current = thread;
  threadIdx = dim3(thread, 0, 0);
  if (_setjmp(b.scheduler) != 0) return;
  if (fiber.begun) _longjmp(fiber.here, 1);
  fiber.begun = true;
  getcontext(&fiber.start);
  if (!fiber.stack) fiber.stack.reset(new char[kStack]);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, entry, 0);
  setcontext(&fiber.start);
}

// Runs one warp until all its lanes are done or at the block's barrier.
inline void run_warp(int first, bool reverse) {
  std::vector<Fiber>& fibers = block().fibers;
  while (true) {
    for (int i = 0; i < 32; ++i) {
      const int thread = first + (reverse ? 31 - i : i);
      if (fibers[thread].at == At::running) resume(thread);
    }
    int counts[4] = {};
    for (int i = first; i < first + 32; ++i) ++counts[static_cast<int>(fibers[i].at)];
    const int waiting = counts[static_cast<int>(At::warp)];
    if (waiting == 0) return;
    if (waiting != 32) fail("a warp operation that not all 32 lanes reach");
    for (int i = first; i < first + 32; ++i) fibers[i].at = At::running;
  }
}

inline void run_block(int threads, bool reverse) {
  Block& b = block();
  std::memset(b.shared.data(), 0xFF, b.shared.size());
  for (int t = 0; t < threads; ++t) {
    b.fibers[t].begun = false;
    b.fibers[t].at = At::running;
    b.fibers[t].copies.clear();
    b.fibers[t].groups = 0;
  }
  while (true) {
    int done = 0, waiting = 0;
    for (int w = 0; w < threads / 32; ++w) run_warp(32 * (reverse ? threads / 32 - 1 - w : w), reverse);
    for (int t = 0; t < threads; ++t) {
      done += b.fibers[t].at == At::done;
      waiting += b.fibers[t].at == At::block;
    }
    if (done == threads) return;
    if (waiting != threads) fail("a barrier that not all threads reach");
    b.all_before = b.all;
    b.all = true;
    for (int t = 0; t < threads; ++t) b.fibers[t].at = At::running;
  }
}

// Every lane gives a value; then it has those of all 32, until it meets the warp after the next time.
template <typename T>
class Gathered {
 public:
  explicit Gathered(const T& value) {
    static_assert(sizeof(T) <= sizeof(Slot));
    Block& b = block();
    Slot* const mine = b.slots.data() + self().parity * b.fibers.size();
    self().parity ^= 1;
    std::memcpy(mine[b.current].bytes, &value, sizeof value);
    first_ = mine + b.current / 32 * 32;
    wait(At::warp);
  }
  T operator[](int from) const {
    T found;
    std::memcpy(&found, first_[from].bytes, sizeof found);
    return found;
  }

 private:
  const Slot* first_;
};

// Every lane gives a value; returns what lane `from` gave.
template <typename T>
T exchange(unsigned mask, T value, int from) {
  if (mask != 0xffffffffu) fail("a mask of less than the whole warp");
  return Gathered<T>(value)[from];
}

inline int lane() { return block().current % 32; }

}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::At::block); }
inline void __syncwarp() { emulated::wait(emulated::At::warp); }
inline int __syncthreads_and(int value) {
  emulated::block().all &= value != 0;
  __syncthreads();
  return emulated::block().all_before;
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int step) {
  return emulated::exchange(mask, value, emulated::lane() ^ step);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int from) {
  return emulated::exchange(mask, value, from);
}
inline int __any_sync(unsigned mask, int value) {
  int any = 0;
  for (int step = 16; step > 0; step /= 2) any = value = (value != 0) | (__shfl_xor_sync(mask, value, step) != 0);
  return any;
}

namespace r1 {
namespace cuda {
template <typename Shared>
Shared& shared_memory() {
  static_assert(sizeof(Shared) <= 48 * 1024, "more shared memory than a block has without asking");
  static_assert(alignof(Shared) <= 16);
  return *reinterpret_cast<Shared*>(emulated::block().shared.data());
}
template <typename Shared>
Shared& dynamic_shared_memory() {
  static_assert(alignof(Shared) <= 16);
  if (sizeof(Shared) > emulated::block().dynamic) emulated::fail("more dynamic shared memory than the launch asked for");
  return *reinterpret_cast<Shared*>(emulated::block().shared.data());
}
}  // namespace cuda
}  // namespace r1

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  using namespace emulated;
  const int threads = static_cast<int>(config->blockDim.x);
  if (threads % 32 || threads > 1024) fail("a block that is not a number of warps, up to 32");
  const char* order = std::getenv("R1_THREAD_ORDER");
  const bool reverse = order && std::strcmp(order, "reverse") == 0;
  blockDim = config->blockDim;
  gridDim = config->gridDim;
  Block& b = block();
  if (static_cast<int>(b.fibers.size()) < threads) b.fibers.resize(threads);
  b.slots.resize(2 * b.fibers.size());
  b.dynamic = config->dynamicSmemBytes;
  b.body = [&] { kernel(arguments...); };
  const auto nth = [reverse](unsigned i, unsigned count) { return reverse ? count - 1 - i : i; };
  for (unsigned z = 0; z < gridDim.z; ++z) {
    for (unsigned y = 0; y < gridDim.y; ++y) {
      for (unsigned x = 0; x < gridDim.x; ++x) {
        blockIdx = dim3(nth(x, gridDim.x), nth(y, gridDim.y), nth(z, gridDim.z));
        run_block(threads, reverse);
      }
    }
  }
  return 0;
}

#include "tensor_cores.h"
