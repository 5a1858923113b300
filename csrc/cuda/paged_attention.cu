// Decode attention over the paged cache on the GPU, and the write into it. See kernels/paged_attention.py.
// A block takes one split of 256 positions of one sequence and key head, for up to 8 of its query heads: each key and
// value is read once for all of them. Splits begin at fixed positions and are merged in order by a second kernel, so a
// sequence's result does not depend on what else is in the batch (fixed split size, never a fixed number of splits).
//
// Rows that share blocks are taken together by paged_attention_groups.cu, where the caller says which they are.
#include "device.h"
#include "ops.h"
#include "paged_attention.h"

using namespace r1::cuda;

namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kWidth = 8;      // numbers of a head that one lane holds
constexpr int kUnroll = 4;     // positions whose keys are on the way at once, in each lane
constexpr int kMostHeads = 8;  // query heads of a block

template <int LANES, int HEADS>
struct Shared {
  int64_t row[kSplit];  // of each position in the cache, as [blocks * block * kv_heads, width]
  alignas(16) float scores[kSplit][HEADS];
  float maximum[HEADS], total[HEADS];
  float sums[kWarps][HEADS][LANES * kWidth];
};

template <typename T>
__device__ __forceinline__ void load_lane(const T* from, float (&to)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; i += kPack<T>) load_pack(from + i, to + i);
}

// Sums over LANES neighbouring lanes of HEADS values, halving the values with the lanes: afterwards the lane's upper bits
// say which sum it holds, found[0]. HEADS - 1 + log2(LANES / HEADS) shuffles instead of HEADS * log2(LANES).
template <int LANES, int HEADS>
__device__ __forceinline__ void scatter_sums(float (&found)[HEADS]) {
  const int lane = static_cast<int>(threadIdx.x) % LANES;
  int step = LANES / 2;
#pragma unroll
  for (int half = HEADS / 2; half > 0; half /= 2, step /= 2) {
    const bool upper = lane & step;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float mine = upper ? found[i + half] : found[i], other = upper ? found[i] : found[i + half];
      found[i] = mine + __shfl_xor_sync(kAll, other, step);
    }
  }
#pragma unroll
  for (; step > 0; step /= 2) found[0] += __shfl_xor_sync(kAll, found[0], step);
}

// Where the split's positions lie, -1 for a block outside the cache. Ends in a barrier; true when all lie inside.
__device__ __forceinline__ bool locate(const Cache& cache, int64_t sequence, int kv_head, int start, int count,
                                       int64_t* row) {
  const int32_t* table = cache.tables + sequence * cache.table_stride;
  bool inside = true;
  for (int t = threadIdx.x; t < count; t += kThreads) {
    const int number = table[(start + t) / cache.block], offset = (start + t) % cache.block;
    const bool valid = number >= 0 && number < cache.blocks;
    row[t] = ((valid ? static_cast<int64_t>(number) : 0) * cache.block + offset) * cache.kv_heads + kv_head;
    inside = inside && valid;
  }
  return __syncthreads_and(inside);
}

// scores[t][h] = q[h] . key[t] for the split's positions.
template <typename T, int LANES, int HEADS>
__device__ __forceinline__ void score(const Queries& queries, const Cache& cache, const T* q, int heads, int count,
                                      Shared<LANES, HEADS>& shared) {
  const int lane = threadIdx.x % LANES, first = threadIdx.x / LANES;
  const bool active = lane * kWidth < cache.width;
  float query[HEADS][kWidth];
#pragma unroll
  for (int h = 0; h < HEADS; ++h) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      query[h][i] = active && h < heads ? to_float(q[h * cache.width + lane * kWidth + i]) * queries.scale : 0.0f;
  }
  const T* keys = static_cast<const T*>(cache.keys) + lane * kWidth;
  constexpr int kStep = kThreads / LANES;
  for (int base = 0; base < count; base += kStep * kUnroll) {  // the same for all lanes: every lane meets the shuffles
    float key[kUnroll][kWidth];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int t = base + u * kStep + first;
      if (active && t < count) {
        load_lane(keys + shared.row[t] * cache.width, key[u]);
      } else {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) key[u][i] = 0;
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int t = base + u * kStep + first;
      float found[HEADS];
#pragma unroll
      for (int h = 0; h < HEADS; ++h) {
        found[h] = 0;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) found[h] += query[h][i] * key[u][i];
      }
      scatter_sums<LANES, HEADS>(found);
      if (t < count && lane % (LANES / HEADS) == 0) shared.scores[t][lane / (LANES / HEADS)] = found[0];
    }
  }
}

// scores become 2^(score - maximum); maximum and total are kept. One warp a head.
template <int LANES, int HEADS>
__device__ __forceinline__ void exponentials(int count, Shared<LANES, HEADS>& shared) {
  const int lane = threadIdx.x % 32;
  for (int h = threadIdx.x / 32; h < HEADS; h += kWarps) {
    float largest = -INFINITY, total = 0;
    for (int t = lane; t < count; t += 32) largest = fmaxf(largest, shared.scores[t][h]);
    largest = warp_max(largest);
    for (int t = lane; t < count; t += 32) {
      const float weight = exp2f(shared.scores[t][h] - largest);
      shared.scores[t][h] = weight;
      total += weight;
    }
    total = warp_sum(total);
    if (lane == 0) {
      shared.maximum[h] = largest;
      shared.total[h] = total;
    }
  }
}

// shared.sums[warp][h] = sum over the warp's positions of weight[t][h] value[t].
template <typename T, int LANES, int HEADS>
__device__ __forceinline__ void add_values(const Cache& cache, int count, Shared<LANES, HEADS>& shared) {
  const int lane = threadIdx.x % LANES, first = threadIdx.x / LANES;
  const bool active = lane * kWidth < cache.width;
  const T* values = static_cast<const T*>(cache.values) + lane * kWidth;
  constexpr int kStep = kThreads / LANES;
  float sum[HEADS][kWidth] = {};
  for (int base = first; active && base < count; base += kStep * kUnroll) {
    float value[kUnroll][kWidth];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int t = base + u * kStep;
      load_lane(values + shared.row[t < count ? t : base] * cache.width, value[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int t = base + u * kStep;
      if (t >= count) break;
#pragma unroll
      for (int h = 0; h < HEADS; ++h) {
        const float weight = shared.scores[t][h];
#pragma unroll
        for (int i = 0; i < kWidth; ++i) sum[h][i] += weight * value[u][i];
      }
    }
  }
#pragma unroll
  for (int h = 0; h < HEADS; ++h) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
#pragma unroll
      for (int step = LANES; step < 32; step *= 2) sum[h][i] += __shfl_xor_sync(kAll, sum[h][i], step);
      if (threadIdx.x % 32 < LANES) shared.sums[threadIdx.x / 32][h][lane * kWidth + i] = sum[h][i];
    }
  }
}

// Blocks a multiprocessor should hold at once: what caps the registers, and keeps the compiler from spilling for more.
template <int HEADS>
constexpr int kResident = HEADS <= 2 ? 8 : HEADS <= 4 ? 6 : 4;

// Sequences lie along x, so that the samples of a prompt meet its blocks at about the same time, in the L2 cache.
template <typename T, int LANES, int HEADS>
__global__ void __launch_bounds__(kThreads, kResident<HEADS>) attend(Queries queries, Cache cache, Partial partial, T* out) {
  Shared<LANES, HEADS>& shared = shared_memory<Shared<LANES, HEADS>>();
  const int64_t sequence = blockIdx.x;
  const int split = blockIdx.z, splits = gridDim.z, kv_head = blockIdx.y / queries.parts, part = blockIdx.y % queries.parts;
  const int context = cache.contexts[sequence], start = split * kSplit;
  const bool fits = context >= 1 && context <= cache.longest;
  if (fits ? start >= context : split > 0) return;
  const int count = !fits ? 0 : context - start < kSplit ? context - start : kSplit;
  const int first_head = kv_head * queries.group + part * HEADS;
  const int left = queries.group - part * HEADS, heads = left < HEADS ? left : HEADS;

  const bool valid = locate(cache, sequence, kv_head, start, count, shared.row) && fits;
  const T* q = static_cast<const T*>(queries.q) + sequence * queries.stride + first_head * cache.width;
  score<T, LANES, HEADS>(queries, cache, q, heads, count, shared);
  __syncthreads();
  exponentials<LANES, HEADS>(count, shared);
  __syncthreads();
  add_values<T, LANES, HEADS>(cache, count, shared);
  __syncthreads();

  const int64_t place = (sequence * splits + split) * queries.heads + first_head;
  for (int i = threadIdx.x; i < heads * cache.width; i += kThreads) {
    const int h = i / cache.width, d = i % cache.width;
    float sum = shared.sums[0][h][d];
    for (int w = 1; w < kWarps; ++w) sum += shared.sums[w][h][d];
    if (!valid) sum = NAN;  // a context that its table cannot hold, or a block outside the cache
    if (splits == 1) {
      out[(sequence * queries.heads + first_head + h) * cache.width + d] = from_float<T>(sum / shared.total[h]);
    } else {
      partial.sums[(place + h) * cache.width + d] = sum;
      if (d == 0) {
        partial.maxima[place + h] = valid ? shared.maximum[h] : 0.0f;
        partial.totals[place + h] = valid ? shared.total[h] : 1.0f;
      }
    }
  }
}

// One block a sequence and head: the splits in order. With a single split the division is the one above, bit for bit.
template <typename T>
__global__ void __launch_bounds__(kThreads) merge(Partial partial, const int32_t* contexts, T* out, int splits,
                                                  int longest, int heads, int width) {
  const int64_t sequence = blockIdx.x, head = blockIdx.y;
  const int context = contexts[sequence];
  const int used = context >= 1 && context <= longest ? (context + kSplit - 1) / kSplit : 1;
  const int64_t first = sequence * splits * heads + head;
  float largest = -INFINITY;
  for (int s = 0; s < used; ++s) largest = fmaxf(largest, partial.maxima[first + static_cast<int64_t>(s) * heads]);
  for (int d = threadIdx.x; d < width; d += kThreads) {
    float sum = 0, total = 0;
    for (int s = 0; s < used; ++s) {
      const int64_t place = first + static_cast<int64_t>(s) * heads;
      const float keep = exp2f(partial.maxima[place] - largest);
      sum += keep * partial.sums[place * width + d];
      total += keep * partial.totals[place];
    }
    out[(sequence * heads + head) * width + d] = from_float<T>(sum / total);
  }
}

// Copies in units of `Unit`: one thread a unit of a key row and of the value row beside it.
template <typename Unit>
__global__ void __launch_bounds__(256) append(const Unit* k, int64_t k_stride, const Unit* v, int64_t v_stride,
                                              Unit* keys, Unit* values, const int64_t* slots, int64_t tokens,
                                              int64_t row, int64_t all_slots) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, token = i / row, at = i % row;
  if (token >= tokens) return;
  const int64_t slot = slots[token];
  if (slot < 0 || slot >= all_slots) return;
  keys[slot * row + at] = k[token * k_stride + at];
  values[slot * row + at] = v[token * v_stride + at];
}

template <typename T, int LANES, int HEADS>
int run(const Queries& given, const Cache& cache, const Partial& partial, T* out, int64_t sequences, int splits,
        void* stream) {
  Queries queries = given;
  queries.parts = static_cast<int>(ceil_div(queries.group, HEADS));
  const dim3 grid(static_cast<unsigned>(sequences), cache.kv_heads * queries.parts, splits);
  return launch(attend<T, LANES, HEADS>, grid, kThreads, stream, queries, cache, partial, out);
}

template <typename T, int LANES>
int by_heads(const Queries& queries, const Cache& cache, const Partial& partial, T* out, int64_t sequences, int splits,
             void* stream) {
  auto chosen = queries.group == 1   ? run<T, LANES, 1>
                : queries.group == 2 ? run<T, LANES, 2>
                : queries.group <= 4 ? run<T, LANES, 4>
                                     : run<T, LANES, kMostHeads>;
  return chosen(queries, cache, partial, out, sequences, splits, stream);
}

// `groups.first` is null for rows by themselves.
template <typename T, R1Type TYPE>
int decode(const Queries& queries, const Cache& cache, const Groups& groups, const Partial& partial, void* to,
           int64_t sequences, int splits, void* stream) {
  T* const out = static_cast<T*>(to);
  int status;
  if (TYPE != kFloat && groups.first != nullptr) {
    status = attend_groups(queries, cache, groups, partial, out, TYPE, sequences, splits, stream);
  } else {
    auto chosen = cache.width <= 64 ? by_heads<T, 8> : cache.width <= 128 ? by_heads<T, 16> : by_heads<T, 32>;
    status = chosen(queries, cache, partial, out, sequences, splits, stream);
  }
  if (status != 0 || splits == 1) return status;
  return launch(merge<T>, dim3(static_cast<unsigned>(sequences), queries.heads), kThreads, stream, partial,
                cache.contexts, out, splits, cache.longest, queries.heads, cache.width);
}

template <typename Unit>
int copy(const void* k, int64_t k_stride, const void* v, int64_t v_stride, void* keys, void* values,
         const int64_t* slots, int64_t tokens, int64_t row, int64_t all_slots, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(tokens * row, 256)));
  return launch(append<Unit>, grid, 256, stream, static_cast<const Unit*>(k), k_stride, static_cast<const Unit*>(v),
                v_stride, static_cast<Unit*>(keys), static_cast<Unit*>(values), slots, tokens, row, all_slots);
}

}  // namespace

extern "C" {

int64_t r1_cuda_paged_attention_splits(int64_t columns, int64_t block) { return ceil_div(columns * block, kSplit); }

int r1_cuda_paged_attention(const void* q, int64_t q_stride, const void* keys, const void* values, int type,
                            const int32_t* tables, int64_t table_stride, const int32_t* contexts,
                            const int32_t* groups, int64_t groups_stride, void* out, float* partial, int64_t sequences,
                            int64_t heads, int64_t kv_heads, int64_t width, int64_t blocks, int64_t block,
                            int64_t columns, float scale, void* stream) {
  if (sequences == 0 || heads == 0) return 0;
  const int group = static_cast<int>(heads / kv_heads);
  const int splits = static_cast<int>(r1_cuda_paged_attention_splits(columns, block));
  const Queries queries{q, q_stride, static_cast<int>(heads), group, 1, scale * kLog2E};
  const int longest = columns * block < INT32_MAX ? static_cast<int>(columns * block) : INT32_MAX;
  const Cache cache{keys, values, tables, contexts, table_stride, static_cast<int>(blocks), static_cast<int>(block),
                    longest, static_cast<int>(kv_heads), static_cast<int>(width)};
  const int64_t each = sequences * splits * heads;
  const Partial parts{partial, partial + each * width, partial + each * (width + 1)};
  auto chosen = type == kFloat ? decode<float, kFloat> : type == kBf16 ? decode<Bf16, kBf16> : decode<Half, kHalf>;
  return chosen(queries, cache, Groups{groups, groups_stride}, parts, out, sequences, splits, stream);
}

int r1_cuda_paged_append(const void* k, int64_t k_stride, const void* v, int64_t v_stride, void* keys, void* values,
                         const int64_t* slots, int64_t tokens, int64_t row, int64_t all_slots, int64_t size,
                         void* stream) {
  if (tokens == 0 || row == 0) return 0;
  const bool whole = aligned(k) && aligned(v) && aligned(keys) && aligned(values) && row * size % 16 == 0 &&
                     k_stride * size % 16 == 0 && v_stride * size % 16 == 0;
  const int64_t pack = whole ? 16 / size : 1;
  auto chosen = whole ? copy<uint4> : size == 2 ? copy<uint16_t> : copy<uint32_t>;
  return chosen(k, k_stride / pack, v, v_stride / pack, keys, values, slots, tokens, row / pack, all_slots, stream);
}

}
