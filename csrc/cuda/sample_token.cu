// One token a row from its logits on the GPU, one block a row. See kernels/sample_token.py for the contract.
// The logits are read once: each warp keeps the maximum and the sum of exponentials of chunks of 1024, the block brings
// the sums to one maximum, and the chunk that halving leads to is read again. A truncated row is read some twenty times
// more: its cut is found by search over the bits of the smallest kept weight, without a sort.
#include "../common/philox.h"
#include "device.h"
#include "ops.h"

using namespace r1::cuda;

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kOwn = 32;            // logits of a chunk that one lane holds
constexpr int kChunk = 32 * kOwn;   // logits
constexpr int kMostChunks = 2048;
constexpr int kCuts = 7;            // thresholds tried in one pass over a row
constexpr int kOne = 0x3F800000;    // the bits of 1.0, the weight of the likeliest token

struct Settings {
  const int64_t *seed, *sequence, *position;
  const float* temperature;
  const int32_t* top_k;
  const float* top_p;
};
struct Drawn {
  int64_t* token;
  float *logprob, *logprob_full;
};

struct Shared {
  float maximum[kMostChunks], sum[kMostChunks];
  double above_sum[kWarps][kCuts];
  int above_count[kWarps][kCuts];
  double sums[kCuts];
  int counts[kCuts];
  int found;
};

template <typename T>
struct Row {
  const T* logits;
  int size, chunks;
  bool vectors;  // the row begins at a multiple of 16 bytes
  float maximum, inverse;

  __device__ __forceinline__ float logit(int i) const { return to_float(logits[i]); }

  // e^((logit - maximum) / temperature), 0 past the end and where it would be subnormal.
  __device__ __forceinline__ float weight_of(float x) const {
    const float exponent = (x - maximum) * inverse;
    return exponent < -87.0f ? 0.0f : expf(exponent);
  }
  __device__ __forceinline__ float weight(int i) const { return weight_of(logit(i)); }

  // Index of this lane's element `i` of a chunk: packs of 16 bytes, lane beside lane.
  static __device__ __forceinline__ int place(int chunk, int i) {
    return chunk * kChunk + (i / kPack<T> * 32 + static_cast<int>(threadIdx.x) % 32) * kPack<T> + i % kPack<T>;
  }

  // This lane's part of a chunk, -infinity past the end.
  __device__ __forceinline__ void load(int chunk, float (&x)[kOwn]) const {
    const bool whole = vectors && (chunk + 1) * kChunk <= size;
#pragma unroll
    for (int i = 0; i < kOwn; i += kPack<T>) {
      const int first = place(chunk, i);
      if (whole) {
        load_pack(logits + first, x + i);
      } else {
#pragma unroll
        for (int j = 0; j < kPack<T>; ++j) x[i + j] = first + j < size ? logit(first + j) : -INFINITY;
      }
    }
  }
};

// Each lane holds a value >= 0: their sum, added from the first lane to the last.
__device__ __forceinline__ double ordered_sum(double own) {
  double sum = 0;
  for (int lane = 0; lane < 32; ++lane) sum += __shfl_sync(kAll, own, lane);
  return sum;
}

// Sum of n weights by one warp: each lane adds a run of neighbours.
template <typename Weight>
__device__ __forceinline__ double run_sum(int n, Weight weight) {
  const int run = (n + 31) / 32, first = static_cast<int>(threadIdx.x) % 32 * run;
  double own = 0;
  for (int i = first; i < first + run && i < n; ++i) own += weight(i);
  return own;
}

// The first of n weights, in their order, whose running sum exceeds `point`, and the sum before it; the last positive one
// where rounding leaves the point beyond them all, -1 where none is positive. By one warp. Lanes' runs are added in
// order: the running sum never falls, so the lane found holds a positive weight.
template <typename Weight>
__device__ __forceinline__ int find(int n, double point, double* before, Weight weight) {
  const int lane = static_cast<int>(threadIdx.x) % 32, run = (n + 31) / 32, first = lane * run;
  const double own = run_sum(n, weight);
  double sum = 0, base = 0;
  int holder = -1;
  bool beyond = false;
  for (int other = 0; other < 32; ++other) {
    const double value = __shfl_sync(kAll, own, other);
    if (value > 0 && !beyond) {
      holder = other;
      base = sum;
    }
    sum += value;
    beyond = beyond || sum > point;
  }
  if (holder < 0) return -1;
  int found = -1;
  double sum_before = base;
  if (lane == holder) {
    double running = base;
    for (int i = first; i < first + run && i < n; ++i) {
      const double value = weight(i);
      if (value > 0) {
        found = i;
        sum_before = running;
      }
      running += value;
      if (running > point) break;
    }
  }
  *before = __shfl_sync(kAll, sum_before, holder);
  return __shfl_sync(kAll, found, holder);
}

// Which weights take part in a sum, and as what: those whose bits lie above `least`, and the ones equal to it up to index
// `last_tie`. Weights are not negative, so their bits are ordered as they are.
struct Part {
  int least = -1, last_tie = 0;
  bool only_ties = false;  // only those equal to `least`, each counted as 1

  __device__ __forceinline__ float operator()(float w, int i) const {
    const int bits = static_cast<int>(bits_of(w));
    const bool tie = bits == least && i <= last_tie;
    if (only_ties) return tie ? 1.0f : 0.0f;
    return tie || bits > least ? w : 0.0f;
  }
};

// The first token whose running sum of the part exceeds `point`; `shared.sum` holds the part's sums by chunk. One warp.
template <typename T>
__device__ __forceinline__ int find_token(const Row<T>& row, const Shared& shared, double point, const Part& part) {
  int start = 0, count = row.chunks;
  for (int level = 0; level < 2; ++level) {  // among the chunks, then inside one
    double before = 0;
    const int found = find(count, point, &before, [&](int i) {
      return level == 0 ? shared.sum[i] : part(row.weight(start + i), start + i);
    });
    if (found < 0) return start;
    if (level == 1) return start + found;
    start = found * kChunk;
    count = row.size - start < kChunk ? row.size - start : kChunk;
    point -= before;
  }
  return start;
}

// shared.sum = the part's sums by chunk. The block; ends in a barrier.
template <typename T>
__device__ __forceinline__ void sum_chunks(const Row<T>& row, Shared& shared, const Part& part) {
  __syncthreads();
  for (int chunk = threadIdx.x / 32; chunk < row.chunks; chunk += kWarps) {
    float sum = 0;
    for (int i = chunk * kChunk + threadIdx.x % 32; i < (chunk + 1) * kChunk && i < row.size; i += 32)
      sum += part(row.weight(i), i);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) shared.sum[chunk] = sum;
  }
  __syncthreads();
}

// Number and sum of the weights whose bits lie above each of kCuts thresholds, into shared.counts and shared.sums. The
// block; ends in a barrier. The order of addition is fixed, so that a lower threshold never has the smaller sum.
template <typename T>
__device__ __forceinline__ void sum_above(const Row<T>& row, Shared& shared, const int (&threshold)[kCuts]) {
  float sum[kCuts] = {};
  int count[kCuts] = {};
  for (int i = threadIdx.x; i < row.size; i += kThreads) {
    const float w = row.weight(i);
    const int bits = static_cast<int>(bits_of(w));
#pragma unroll
    for (int c = 0; c < kCuts; ++c) {
      sum[c] += bits > threshold[c] ? w : 0.0f;
      count[c] += bits > threshold[c];
    }
  }
  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int c = 0; c < kCuts; ++c) {
    const double sum_of_warp = warp_sum(static_cast<double>(sum[c]));
    const int count_of_warp = warp_sum(count[c]);
    if (threadIdx.x % 32 == 0) {
      shared.above_sum[warp][c] = sum_of_warp;
      shared.above_count[warp][c] = count_of_warp;
    }
  }
  __syncthreads();
  if (threadIdx.x < kCuts) {
    double total = 0;
    int number = 0;
    for (int w = 0; w < kWarps; ++w) {
      total += shared.above_sum[w][threadIdx.x];
      number += shared.above_count[w][threadIdx.x];
    }
    shared.sums[threadIdx.x] = total;
    shared.counts[threadIdx.x] = number;
  }
  __syncthreads();
}

// What truncation keeps: weights whose bits lie above `least`, and the first `ties` of those equal to it.
struct Cut {
  int least, ties, equal;
  double sum;  // of the kept weights
};

// Longest prefix of the weights in descending order that has at most `count` members and whose sum without its last
// member is less than `share`. Every pass divides the range of the smallest kept weight's bits by eight. The block.
template <typename T>
__device__ __forceinline__ Cut cut(const Row<T>& row, Shared& shared, int count, double share) {
  int low = -1, high = kOne, threshold[kCuts];  // what lies above `high` may all be kept, what lies above `low` not
  while (true) {
    const bool narrowed = high - low == 1;
    const int step = (high - low + kCuts) / (kCuts + 1), bottom = low;
#pragma unroll
    for (int c = 0; c < kCuts; ++c) {
      threshold[c] = bottom + (c + 1) * step < high ? bottom + (c + 1) * step : high;
      if (narrowed) threshold[c] = c == 0 ? low : high;
    }
    sum_above(row, shared, threshold);
    if (narrowed) break;
#pragma unroll
    for (int c = kCuts - 1; c >= 0; --c)
      if (shared.counts[c] < count && shared.sums[c] < share) high = threshold[c];
#pragma unroll
    for (int c = 0; c < kCuts; ++c)
      if (threshold[c] < high) low = threshold[c];
    __syncthreads();
  }
  const int larger = shared.counts[1], equal = shared.counts[0] - larger;
  const double sum = shared.sums[1], weight = float_of(high);
  __syncthreads();
  int ties = count - larger < equal ? count - larger : equal;
  if (weight > 0 && share < INFINITY) {
    const double enough = ceil((share - sum) / weight);  // so many of them bring the sum to the share
    ties = enough < ties ? static_cast<int>(enough) : ties;
  }
  ties = ties < 1 ? 1 : ties;
  return Cut{high, ties, equal, sum + ties * weight};
}

// Top-k, then top-p of what it leaves. The block.
template <typename T>
__device__ __forceinline__ Cut truncate(const Row<T>& row, Shared& shared, int top_k, float top_p, double total) {
  const bool by_count = top_k > 0 && top_k < row.size, by_share = top_p < 1;
  const int count = by_count ? top_k : row.size;
  double share = by_share && !by_count ? top_p * total : INFINITY;
  Cut found{};
  for (int round = by_count && by_share ? 0 : 1; round < 2; ++round) {
    found = cut(row, shared, count, share);
    share = top_p * found.sum;
  }
  return found;
}

// The row's numbers in [0, 1), a fresh one for every halving: 24 bits each of the words of Philox with counter
// (position + 2^32 block, sequence) and key seed.
struct Uniform {
  uint64_t seed, sequence, position;
  unsigned used = 0;
  Philox words{};

  __device__ __forceinline__ double next() {
    const unsigned word = used % 4;
    if (word == 0)
      words = philox(static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32) + used / 4,
                     static_cast<uint32_t>(sequence), static_cast<uint32_t>(sequence >> 32),
                     static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    ++used;
    const uint32_t early = word == 0 ? words.word[0] : words.word[1], late = word == 2 ? words.word[2] : words.word[3];
    return ((word < 2 ? early : late) >> 8) * 0x1p-24;
  }
};

// Where the row's numbers lead from [0, 2 half) among n masses, by halving, one warp: the upper half where the number
// times the whole reaches the lower one. mass(i) is asked of lane i % 32 alone.
template <typename Mass>
__device__ __forceinline__ int halve(int n, int half, Uniform& numbers, Mass mass) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int start = 0;
  for (; half > 0; half /= 2) {
    double lower = 0, upper = 0;
    for (int i = lane; i < n; i += 32) {
      const double value = mass(i);
      lower += i >= start && i < start + half ? value : 0.0;
      upper += i >= start + half && i < start + 2 * half ? value : 0.0;
    }
    lower = warp_sum(lower);
    upper = warp_sum(upper);
    if (numbers.next() * (lower + upper) >= lower && upper > 0) start += half;
  }
  return start;
}

// The token that the row's numbers choose from a part of its weights, whose sums by chunk are in `shared.sum`, by
// halving a power of two that holds the row: down to a chunk, to a lane's run of it, to a token. One warp.
template <typename T>
__device__ __forceinline__ int draw(const Row<T>& row, const Shared& shared, const Part& part, Uniform& numbers) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int half = 1;
  while (half < row.size) half *= 2;
  half /= 2;
  const int first = halve(row.chunks, half / kChunk, numbers, [&](int c) { return shared.sum[c]; }) * kChunk;
  half = half < kChunk ? half : kChunk / 2;
  const auto weight = [&](int i) { return i < row.size ? part(row.weight(i), i) : 0.0f; };
  double own = 0;
  for (int i = 0; i < kOwn; ++i) own += weight(first + lane * kOwn + i);
  const int run = first + halve(32, half / kOwn, numbers, [&](int) { return own; }) * kOwn;
  half = half < kOwn ? half : kOwn / 2;
  own = weight(run + lane);
  return run + halve(32, half, numbers, [&](int) { return own; });
}

// Maximum of every chunk, and the sum of e^((x - that maximum) / temperature); then the row's maximum. The block.
template <typename T>
__device__ __forceinline__ void read_row(Row<T>& row, Shared& shared) {
  const int lane = threadIdx.x % 32;
  for (int chunk = threadIdx.x / 32; chunk < row.chunks; chunk += kWarps) {
    float x[kOwn];
    row.load(chunk, x);
    float largest = -INFINITY;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) largest = x[i] > largest ? x[i] : largest;
    largest = warp_max(largest);
    const float base = largest == -INFINITY ? 0.0f : largest;  // a chunk of nothing but -infinity sums to 0
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) sum += expf((x[i] - base) * row.inverse);
    sum = warp_sum(sum);
    if (lane == 0) {
      shared.maximum[chunk] = largest;
      shared.sum[chunk] = sum;
    }
  }
  __syncthreads();
  float largest = -INFINITY;
  for (int c = lane; c < row.chunks; c += 32) largest = shared.maximum[c] > largest ? shared.maximum[c] : largest;
  row.maximum = warp_max(largest);
  // A sum that is positive afterwards belongs to a chunk with a positive weight: both cut off at the same exponent. NaN
  // stays, as 0 times it would not.
  for (int c = threadIdx.x; c < row.chunks; c += kThreads) {
    const float scale = row.weight_of(shared.maximum[c]), sum = shared.sum[c];
    shared.sum[c] = scale == 0 && sum == sum ? 0.0f : scale * sum;
  }
  __syncthreads();
}

// The token of a row that is greedy or has finite weights; *kept: the sum of the weights it was drawn from. Right in the
// first warp. The block.
template <typename T>
__device__ __forceinline__ int choose(const Row<T>& row, Shared& shared, bool greedy, int top_k, float top_p,
                                      Uniform numbers, double* kept) {
  const bool truncated = !greedy && ((top_k > 0 && top_k < row.size) || top_p < 1);
  Part part{};
  int ties = 0;  // where not 0: first find the index of the last tie that is kept
  if (greedy) {
    part = Part{kOne, row.size, true};
  } else if (truncated) {
    const Cut prefix = truncate(row, shared, top_k, top_p, *kept);
    part.least = prefix.least;
    part.last_tie = row.size;
    part.only_ties = prefix.ties < prefix.equal;
    ties = part.only_ties ? prefix.ties : 0;
  }
  int token = 0;
  for (bool done = false; !done;) {
    done = ties == 0;
    if (greedy || truncated) sum_chunks(row, shared, part);
    if (threadIdx.x < 32) {
      const double sum = ordered_sum(run_sum(row.chunks, [&](int c) { return shared.sum[c]; }));
      if (done && truncated) *kept = sum;
      const bool random = done && !greedy;
      token = random ? draw(row, shared, part, numbers) : find_token(row, shared, done ? 0.5 : ties - 0.5, part);
      if (threadIdx.x == 0) shared.found = token;
    }
    if (done) break;
    __syncthreads();
    part.last_tie = shared.found;
    part.only_ties = false;
    ties = 0;
  }
  return token;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 3) sample_rows(const T* logits, int vocabulary, Settings settings,
                                                            Drawn out) {
  Shared& shared = shared_memory<Shared>();
  const int64_t b = blockIdx.x;
  const T* own = logits + b * vocabulary;
  const float temperature = settings.temperature[b], top_p = settings.top_p[b];
  const int top_k = settings.top_k[b];
  const bool greedy = temperature == 0, valid = temperature >= 0 && top_k >= 0 && top_p > 0;
  Row<T> row{own, vocabulary, (vocabulary + kChunk - 1) / kChunk, reinterpret_cast<uintptr_t>(own) % 16 == 0,
             0.0f, greedy ? 1.0f : 1.0f / temperature};
  read_row(row, shared);
  const double total = ordered_sum(run_sum(row.chunks, [&](int c) { return shared.sum[c]; }));
  double kept = total;
  int token = 0;
  if (!valid || !(total > 0 && total < INFINITY)) {
    kept = NAN;  // a setting out of its range, NaN or +infinity among the logits, or nothing but -infinity
  } else {
    const Uniform numbers{static_cast<uint64_t>(settings.seed[b]), static_cast<uint64_t>(settings.sequence[b]),
                          static_cast<uint64_t>(settings.position[b])};
    token = choose(row, shared, greedy, top_k, top_p, numbers, &kept);
  }
  if (threadIdx.x == 0) {
    const double value = (row.logit(token) - row.maximum) * row.inverse;
    out.token[b] = token;
    out.logprob[b] = static_cast<float>(value - log(kept));
    out.logprob_full[b] = static_cast<float>(kept == kept ? value - log(total) : kept);
  }
}

template <typename T>
int sample(const void* logits, int64_t rows, int64_t vocabulary, const Settings& settings, const Drawn& out,
           void* stream) {
  if (rows == 0) return 0;
  return launch(sample_rows<T>, dim3(static_cast<unsigned>(rows)), kThreads, stream, static_cast<const T*>(logits),
                static_cast<int>(vocabulary), settings, out);
}

}  // namespace

extern "C" {

int64_t r1_cuda_sample_token_limit() { return static_cast<int64_t>(kMostChunks) * kChunk; }

int r1_cuda_sample_token(const void* logits, int type, const int64_t* seed, const int64_t* sequence,
                         const int64_t* position, const float* temperature, const int32_t* top_k, const float* top_p,
                         int64_t* token, float* logprob, float* logprob_full, int64_t rows, int64_t vocabulary,
                         void* stream) {
  const Settings settings{seed, sequence, position, temperature, top_k, top_p};
  const Drawn out{token, logprob, logprob_full};
  if (type == kFloat) return sample<float>(logits, rows, vocabulary, settings, out, stream);
  if (type == kBf16) return sample<Bf16>(logits, rows, vocabulary, settings, out, stream);
  return sample<Half>(logits, rows, vocabulary, settings, out, stream);
}

}
