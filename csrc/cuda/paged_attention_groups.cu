// Decoding of rows that read the same blocks, on tensor cores. See kernels/paged_attention.py and paged_groups.py.
// A block takes one piece of 256 positions and one key head for the first row of a group and as many of the next ones as
// it has rows: each of their query heads is a row of one product, and the piece's keys and values come from memory once
// for all of them (128 rows are 16 samples of 8 heads; heads wider than 128 leave registers for 64). Blocks of rows that
// another one has taken end at once, so the grid, the places of the sums and their merge are those of rows alone, and no
// host knows the groups.
//
// Rows go by 16, a product's, to the four warps in turns, so that few rows keep many warps busy. A warp with a second
// 16 takes both through the same keys: what feeds the products is then half of what it reads of shared memory.
//
// Bits. A warp goes through the positions in the same steps whatever its rows are, and a row of a product depends on its
// own factors alone (no sum or rounding is left to the compiler's choice); so a row has the same bits in a group of any
// size, and in one of its own.
//
// Barriers. Keys and values arrive in kStages buffers, tile t in t % kStages. One __syncthreads a tile: behind it this
// tile has come for all threads (each has waited for its own copies), and all have left tile t - 1, whose buffer is then
// given to tile t + kStages - 1. Queries are written before the first of these barriers and read behind it. The emulation
// poisons a buffer when a copy into it begins and fills it when the copy is waited for.
#include "mma.h"
#include "ops.h"
#include "paged_attention.h"

namespace r1 {
namespace cuda {

namespace {

// Two buffers of 16 KiB and the queries are 66 KiB at a width of 128: two blocks fit a multiprocessor of sm_80.
constexpr int kStages = 2;
constexpr int kWarps = 4, kThreads = kWarps * 32;

// WIDTH: that of a head, or more with zeros. PARTS: 16 rows each, of a warp.
template <int WIDTH>
constexpr int kParts = WIDTH <= 128 ? 2 : 1;
template <int WIDTH>
constexpr int kRows = kWarps * kParts<WIDTH> * 16;
template <int WIDTH>
constexpr int kTile = 4096 / WIDTH;  // positions of a tile: 8 KiB of keys and as many of values
// Positions whose scores a warp holds at once; each 8 are a product that does not wait for the others.
template <int WIDTH>
constexpr int kStep = WIDTH <= 128 ? 32 : 16;

template <typename T, int WIDTH>
struct Tile {
  T keys[kTile<WIDTH>][WIDTH], values[kTile<WIDTH>][WIDTH];
};

template <typename T, int WIDTH>
struct Shared {
  Tile<T, WIDTH> tiles[kStages];
  T queries[kRows<WIDTH>][WIDTH];
  int64_t row[kSplit];  // of each position in the cache, as [blocks * block * kv_heads, width]; -1 outside of it
  int seen[kWarps], lost[kWarps];
};

// 8 numbers of a row. Those of eight rows at one place lie in different banks.
template <typename T, int WIDTH>
__device__ __forceinline__ T* eight(T (*rows)[WIDTH], int row, int place) {
  return &rows[row][(place ^ row % 8) * 8];
}

// The same for the lanes of load_matrices, of which lane l points at a row that is l % 8 past a multiple of 8, and at
// `place`, which is even, or where `next` at the one behind it: four addresses a lane, the rest of them a constant apart.
template <typename T, int WIDTH>
__device__ __forceinline__ T* eight_of_lane(T (*rows)[WIDTH], int row, int place, int next) {
  const int turn = static_cast<int>(threadIdx.x) % 8 ^ next;
  return &rows[row][(place / 8 * 8 + (place % 8 ^ turn)) * 8];
}

// One row of the product: a sequence and one of its query heads. Lane l knows row l % 16 of its warp's part l / 16.
struct Pair {
  int64_t sequence;
  int head;
  bool live, fits;  // whether it is there; whether its table holds its context
  int visible;      // positions of the piece that it sees
};

template <int WIDTH>
__device__ __forceinline__ int row_of_lane(int lane) {
  return (lane / 16 % kParts<WIDTH> * kWarps + static_cast<int>(threadIdx.x) / 32) * 16 + lane % 16;
}

template <int WIDTH>
__device__ __forceinline__ Pair pair_of(const Queries& queries, const Cache& cache, const int32_t* first_of, int first,
                                        int start) {
  const int kv_head = blockIdx.y / queries.parts, part = blockIdx.y % queries.parts;
  const int i = row_of_lane<WIDTH>(threadIdx.x % 32);
  const int heads = queries.group < kRows<WIDTH> ? queries.group : kRows<WIDTH>, together = kRows<WIDTH> / heads;
  const int within = part * kRows<WIDTH> + i % heads;  // among the heads of the key head
  Pair pair{static_cast<int64_t>(blockIdx.x) + i / heads, kv_head * queries.group + within, false, false, 0};
  pair.live = i / heads < together && within < queries.group && pair.sequence < gridDim.x &&
              first_of[pair.sequence] == first;
  if (!pair.live) return pair;
  const int context = cache.contexts[pair.sequence];
  pair.fits = context >= 1 && context <= cache.longest;
  const int left = pair.fits ? context - start : 0;
  pair.visible = left < 0 ? 0 : left < kSplit ? left : kSplit;
  return pair;
}

__device__ __forceinline__ int largest(const int (&of)[kWarps]) {
  int found = of[0];
  for (int i = 1; i < kWarps; ++i) found = of[i] > found ? of[i] : found;
  return found;
}

// Where the piece's positions lie, by the first row's table, and kSplit less the first that is outside of the cache.
template <typename T, int WIDTH>
__device__ __forceinline__ void locate(const Cache& cache, int kv_head, int start, Shared<T, WIDTH>& shared) {
  const int32_t* table = cache.tables + blockIdx.x * cache.table_stride;
  int lost = 0;
  for (int t = threadIdx.x; t < kSplit; t += kThreads) {
    int64_t row = -1;
    if (start + t < cache.longest) {
      const int number = table[(start + t) / cache.block], offset = (start + t) % cache.block;
      if (number >= 0 && number < cache.blocks)
        row = (static_cast<int64_t>(number) * cache.block + offset) * cache.kv_heads + kv_head;
    }
    shared.row[t] = row;
    if (row < 0 && lost == 0) lost = kSplit - t;
  }
  lost = warp_max(lost);
  if (threadIdx.x % 32 == 0) shared.lost[threadIdx.x / 32] = lost;
}

// Copies of a tile begin; it is zero from `end` on, outside of the cache and past the heads' width.
template <typename T, int WIDTH>
__device__ __forceinline__ void begin_tile(const Cache& cache, int tile, int end, Shared<T, WIDTH>& shared) {
  constexpr int kPlaces = WIDTH / 8;
  const T *keys = static_cast<const T*>(cache.keys), *values = static_cast<const T*>(cache.values);
  Tile<T, WIDTH>& to = shared.tiles[tile % kStages];
  if (tile * kTile<WIDTH> < end) {
#pragma unroll
    for (int i = 0; i < kTile<WIDTH> * kPlaces; i += kThreads) {
      const int row = (i + static_cast<int>(threadIdx.x)) / kPlaces, place = threadIdx.x % kPlaces;
      const int position = tile * kTile<WIDTH> + row;
      const int64_t from = position < end && place * 8 < cache.width ? shared.row[position] : -1;
      const int64_t at = from < 0 ? 0 : from * cache.width + place * 8;
      copy_async(eight(to.keys, row, place), keys + at, from >= 0);
      copy_async(eight(to.values, row, place), values + at, from >= 0);
    }
  }
  end_copies();
}

// 8 numbers from anywhere.
template <typename T>
__device__ __forceinline__ uint4 load_eight(const T* from, bool whole) {
  if (whole) return *reinterpret_cast<const uint4*>(from);
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = from[2 * i].bits | static_cast<uint32_t>(from[2 * i + 1].bits) << 16;
  return uint4{words[0], words[1], words[2], words[3]};
}

// The warp's queries into its rows of shared memory, zeros where there is none.
template <typename T, int WIDTH>
__device__ __forceinline__ void load_queries(const Queries& queries, const Pair& pair, int width,
                                             Shared<T, WIDTH>& shared) {
  constexpr int kPlaces = WIDTH / 8, kAtOnce = 32 / kPlaces;  // rows
  const int lane = threadIdx.x % 32, place = lane % kPlaces;
  const T* q = static_cast<const T*>(queries.q);
  const bool whole = reinterpret_cast<uintptr_t>(q) % 16 == 0 && queries.stride % 8 == 0;
  const int64_t own = pair.live ? pair.sequence * queries.stride + static_cast<int64_t>(pair.head) * width : -1;
  for (int i = 0; i < kParts<WIDTH> * 16; i += kAtOnce) {
    const int of = i + lane / kPlaces;
    const int64_t from = __shfl_sync(kAll, own, of);
    const bool there = from >= 0 && place * 8 < width;
    *reinterpret_cast<uint4*>(eight(shared.queries, row_of_lane<WIDTH>(of), place)) =
        there ? load_eight(q + from + place * 8, whole) : uint4{};
  }
}

// What a lane knows of two rows of a product, lane / 4 and 8 below, and its share of their sums.
template <int WIDTH>
struct Sums {
  float of[WIDTH / 8][4] = {};
  float maximum[2] = {-INFINITY, -INFINITY}, total[2] = {};
  int visible[2];
};

// scores[part][n] = the queries' products with the keys of `at` and the next kStep, eight a product.
template <typename T, int WIDTH, int PARTS>
__device__ __forceinline__ void multiply_keys(Shared<T, WIDTH>& shared, Tile<T, WIDTH>& tile, int at,
                                              float (&scores)[PARTS][kStep<WIDTH> / 8][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < WIDTH / 16; ++k) {
    uint32_t queries[PARTS][4];
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      const int row = row_of_lane<WIDTH>(part * 16 + lane % 16);
      load_matrices<false>(queries[part], eight_of_lane(shared.queries, row, 2 * k, lane / 16));
    }
#pragma unroll
    for (int n = 0; n < kStep<WIDTH> / 8; n += 2) {
      uint32_t keys[4];
      const int row = at + n * 8 + lane % 8 + lane / 16 * 8;
      load_matrices<false>(keys, eight_of_lane(tile.keys, row, 2 * k, lane / 8 % 2));
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        multiply<T>(scores[part][n], queries[part], keys[0], keys[1]);
        multiply<T>(scores[part][n + 1], queries[part], keys[2], keys[3]);
      }
    }
  }
}

// scores become 2^(score - maximum); the sums so far are brought to the new maximum.
template <int WIDTH>
__device__ __forceinline__ void exponentials(float scale, int first, float (&scores)[kStep<WIDTH> / 8][4],
                                             Sums<WIDTH>& sums) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = sums.maximum[half];
#pragma unroll
    for (int n = 0; n < kStep<WIDTH> / 8; ++n) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        const int position = first + n * 8 + place_in_c(lane, i).column;
        scores[n][i] = position < sums.visible[half] ? scores[n][i] * scale : -INFINITY;
        top = fmaxf(top, scores[n][i]);
      }
    }
    top = fmaxf(top, __shfl_xor_sync(kAll, top, 1));
    top = fmaxf(top, __shfl_xor_sync(kAll, top, 2));
    const float keep = exp2f(sums.maximum[half] - top);  // NaN for a row that sees nothing, which nobody reads
    sums.maximum[half] = top;
    float sum = 0;
#pragma unroll
    for (int n = 0; n < kStep<WIDTH> / 8; ++n) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        scores[n][i] = exp2f(scores[n][i] - top);
        sum += scores[n][i];
      }
    }
    sums.total[half] = fmaf(sums.total[half], keep, sum);
#pragma unroll
    for (int n = 0; n < WIDTH / 8; ++n) {
      sums.of[n][2 * half] *= keep;
      sums.of[n][2 * half + 1] *= keep;
    }
  }
}

// sums[part] += the weights' products with the values of `at` and the next kStep.
template <typename T, int WIDTH, int PARTS>
__device__ __forceinline__ void multiply_values(const float (&weights)[PARTS][kStep<WIDTH> / 8][4],
                                                Tile<T, WIDTH>& tile, int at, Sums<WIDTH> (&sums)[kParts<WIDTH>]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kStep<WIDTH> / 16; ++k) {
    uint32_t left[PARTS][4];
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&from)[4] = weights[part][2 * k + i / 2];
        left[part][i] = pack_pair<T>(from[i % 2 * 2], from[i % 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int n = 0; n < WIDTH / 8; n += 2) {
      uint32_t values[4];
      load_matrices<true>(values, eight_of_lane(tile.values, at + k * 16 + lane % 16, n, lane / 16));
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        multiply<T>(sums[part].of[n], left[part], values[0], values[1]);
        multiply<T>(sums[part].of[n + 1], left[part], values[2], values[3]);
      }
    }
  }
}

// The first PARTS of the warp's parts through kStep positions of a tile, the piece's `first` and the next.
template <typename T, int WIDTH, int PARTS>
__device__ __forceinline__ void go_on(float scale, int first, int at, Shared<T, WIDTH>& shared, Tile<T, WIDTH>& tile,
                                      Sums<WIDTH> (&sums)[kParts<WIDTH>]) {
  float scores[PARTS][kStep<WIDTH> / 8][4] = {};
  multiply_keys<T, WIDTH, PARTS>(shared, tile, at, scores);
#pragma unroll
  for (int part = 0; part < PARTS; ++part) exponentials(scale, first, scores[part], sums[part]);
  multiply_values<T, WIDTH, PARTS>(scores, tile, at, sums);
}

// The lane's share of a part, as results where there is one piece and as sums to be merged where there are more.
template <typename T, int WIDTH>
__device__ __forceinline__ void store(const Queries& queries, const Cache& cache, const Partial& partial, T* out,
                                      const Pair& pair, int part, int lost, const Sums<WIDTH>& sums) {
  const int lane = threadIdx.x % 32, split = blockIdx.z, splits = gridDim.z;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int from = part * 16 + lane / 4 + 8 * half;
    const int64_t sequence = __shfl_sync(kAll, pair.sequence, from);
    const int head = __shfl_sync(kAll, pair.head, from);
    const bool live = __shfl_sync(kAll, static_cast<int>(pair.live), from);
    const bool fits = __shfl_sync(kAll, static_cast<int>(pair.fits), from);
    float total = sums.total[half];
    total += __shfl_xor_sync(kAll, total, 1);
    total += __shfl_xor_sync(kAll, total, 2);
    if (!live || (fits ? sums.visible[half] == 0 : split > 0)) continue;
    const bool valid = fits && kSplit - lost >= sums.visible[half];
    const int64_t place = (sequence * splits + split) * queries.heads + head;
#pragma unroll
    for (int n = 0; n < WIDTH / 8; ++n) {
      if (n * 8 >= cache.width) break;
      const int d = n * 8 + place_in_c(lane, 0).column;
      const float a = valid ? sums.of[n][2 * half] : NAN, b = valid ? sums.of[n][2 * half + 1] : NAN;
      if (splits == 1) {
        *reinterpret_cast<uint32_t*>(out + (sequence * queries.heads + head) * cache.width + d) =
            pack_pair<T>(a / total, b / total);
      } else {
        partial.sums[place * cache.width + d] = a;
        partial.sums[place * cache.width + d + 1] = b;
      }
    }
    if (splits > 1 && lane % 4 == 0) {
      partial.maxima[place] = valid ? sums.maximum[half] : 0.0f;
      partial.totals[place] = valid ? total : 1.0f;
    }
  }
}

template <typename T, int WIDTH>
__global__ void __launch_bounds__(kThreads, 2)
    attend_group(Queries queries, Cache cache, Groups groups, Partial partial, T* out) {
  Shared<T, WIDTH>& shared = dynamic_shared_memory<Shared<T, WIDTH>>();
  const int start = blockIdx.z * kSplit;
  const int32_t* first_of = groups.first + blockIdx.z * groups.stride;
  const int first = first_of[blockIdx.x];
  const int together = queries.group < kRows<WIDTH> ? kRows<WIDTH> / queries.group : 1;
  if ((static_cast<int>(blockIdx.x) - first) % together != 0) return;

  const int lane = threadIdx.x % 32;
  const Pair pair = pair_of<WIDTH>(queries, cache, first_of, first, start);
  const int seen = warp_max(pair.visible);
  if (lane == 0) shared.seen[threadIdx.x / 32] = seen;
  locate(cache, blockIdx.y / queries.parts, start, shared);
  __syncthreads();
  const int end = largest(shared.seen), lost = largest(shared.lost);

#pragma unroll
  for (int tile = 0; tile < kStages - 1; ++tile) begin_tile(cache, tile, end, shared);
  load_queries(queries, pair, cache.width, shared);
  Sums<WIDTH> sums[kParts<WIDTH>];
#pragma unroll
  for (int part = 0; part < kParts<WIDTH>; ++part) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      sums[part].visible[half] = __shfl_sync(kAll, pair.visible, part * 16 + lane / 4 + 8 * half);
  }
  const bool all = warp_max(lane < 16 ? 0 : pair.visible) > 0;  // whether there is more than the first part

  for (int tile = 0; tile * kTile<WIDTH> < end; ++tile) {
    wait_for_copies<kStages - 2>();
    __syncthreads();
    begin_tile(cache, tile + kStages - 1, end, shared);
    Tile<T, WIDTH>& now = shared.tiles[tile % kStages];
    for (int at = 0; at < kTile<WIDTH>; at += kStep<WIDTH>) {
      const int position = tile * kTile<WIDTH> + at;
      if (position >= seen) break;  // for the whole warp; for each of its rows it would have changed nothing
      if (kParts<WIDTH> > 1 && all) {
        go_on<T, WIDTH, kParts<WIDTH>>(queries.scale, position, at, shared, now, sums);
      } else {
        go_on<T, WIDTH, 1>(queries.scale, position, at, shared, now, sums);
      }
    }
  }
#pragma unroll
  for (int part = 0; part < kParts<WIDTH>; ++part) store(queries, cache, partial, out, pair, part, lost, sums[part]);
}

template <typename T, int WIDTH>
int run(const Queries& given, const Cache& cache, const Groups& groups, const Partial& partial, void* out,
        int64_t sequences, int splits, void* stream) {
  Queries queries = given;
  queries.parts = static_cast<int>(ceil_div(queries.group, kRows<WIDTH>));
  const dim3 grid(static_cast<unsigned>(sequences), cache.kv_heads * queries.parts, splits);
  return launch_with(attend_group<T, WIDTH>, grid, kThreads, sizeof(Shared<T, WIDTH>), stream, queries, cache, groups,
                     partial, static_cast<T*>(out));
}

template <typename T>
int by_width(const Queries& queries, const Cache& cache, const Groups& groups, const Partial& partial, void* out,
             int64_t sequences, int splits, void* stream) {
  auto chosen = cache.width <= 64 ? run<T, 64> : cache.width <= 128 ? run<T, 128> : run<T, 256>;
  return chosen(queries, cache, groups, partial, out, sequences, splits, stream);
}

}  // namespace

int attend_groups(const Queries& queries, const Cache& cache, const Groups& groups, const Partial& partial, void* out,
                  int type, int64_t sequences, int splits, void* stream) {
  auto chosen = type == kBf16 ? by_width<Bf16> : by_width<Half>;
  return chosen(queries, cache, groups, partial, out, sequences, splits, stream);
}

}  // namespace cuda
}  // namespace r1
