// What new tokens' q, k and v need before attention over the paged cache, in one launch: RMSNorm of each head where weights
// are given, rotation, and the write of k and v. See kernels/rope_append.py.
// LANES neighbouring threads take one head, by packs of both halves; a token's heads are q's, then k's, then v's.
#include "device.h"
#include "ops.h"

using namespace r1::cuda;

namespace {

constexpr int kThreads = 256;

template <typename T>
struct Call {
  const T *q, *k, *v;
  int64_t q_row, q_head, k_row, k_head, v_row, v_head;  // strides in elements
  const float *cos, *sin;
  const int64_t *positions, *slots;
  const T *q_norm, *k_norm;
  T *q_out, *keys, *values;
  int64_t rows, table_rows, all_slots;
  int heads, kv_heads, half;
  float eps;
};

template <int PACK, typename T>
__device__ __forceinline__ void load(const T* from, float (&to)[PACK]) {
  if constexpr (PACK == kPack<T>) {
    load_pack(from, to);
  } else {
    to[0] = to_float(*from);
  }
}

template <int PACK, typename T>
__device__ __forceinline__ void store(T* to, const float (&from)[PACK]) {
  if constexpr (PACK == kPack<T>) {
    store_pack(to, from);
  } else {
    *to = from_float<T>(*from);
  }
}

// Angles are floats whatever T is: one, or PACK of them, which begin at a multiple of 16 bytes.
template <int PACK>
__device__ __forceinline__ void load_angles(const float* from, float (&to)[PACK]) {
  if constexpr (PACK == 1) {
    to[0] = *from;
  } else {
#pragma unroll
    for (int i = 0; i < PACK; i += 4) load_pack(from + i, to + i);
  }
}

// The norm's result is rounded to T before the rotation, as by the op rms_norm: training takes that way.
template <typename T, int PACK>
__device__ __forceinline__ void normalise(float (&x)[PACK], float scale, const T* weight) {
  float w[PACK];
  load<PACK>(weight, w);
#pragma unroll
  for (int i = 0; i < PACK; ++i) x[i] = to_float(from_float<T>(x[i] * scale * w[i]));
}

template <typename T, int PACK, int LANES>
__global__ void __launch_bounds__(kThreads) place_heads(Call<T> call) {
  const int64_t item = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / LANES;
  const int all = call.heads + 2 * call.kv_heads, head = item % all, half = call.half, width = 2 * half;
  const int start = threadIdx.x % LANES * PACK;
  const int64_t token = item / all;
  const bool live = token < call.rows, is_q = head < call.heads, is_v = head >= call.heads + call.kv_heads;
  const int own = is_q ? head : (head - call.heads) % call.kv_heads;
  const T* x = is_q ? call.q + token * call.q_row + own * call.q_head
               : is_v ? call.v + token * call.v_row + own * call.v_head
                      : call.k + token * call.k_row + own * call.k_head;
  float scale = 1;
  if (call.q_norm) {  // the same for all lanes: every lane meets the shuffles
    float squares = 0;
    for (int at = start; live && !is_v && at < half; at += LANES * PACK) {
      float first[PACK], second[PACK];
      load<PACK>(x + at, first);
      load<PACK>(x + half + at, second);
#pragma unroll
      for (int i = 0; i < PACK; ++i) squares += first[i] * first[i] + second[i] * second[i];
    }
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) squares += __shfl_xor_sync(kAll, squares, step);
    scale = 1.0f / sqrtf(squares / static_cast<float>(width) + call.eps);
  }
  if (!live) return;
  const int64_t position = call.positions[token], slot = call.slots[token];
  const bool known = position >= 0 && position < call.table_rows;
  if (!is_q && (!known || slot < 0 || slot >= call.all_slots)) return;
  T* to = is_q ? call.q_out + (token * call.heads + own) * width
               : (is_v ? call.values : call.keys) + (slot * call.kv_heads + own) * width;
  const T* weight = is_q ? call.q_norm : call.k_norm;
  for (int at = start; at < half; at += LANES * PACK) {
    float first[PACK], second[PACK];
    load<PACK>(x + at, first);
    load<PACK>(x + half + at, second);
    if (!is_v) {
      if (weight) {
        normalise<T>(first, scale, weight + at);
        normalise<T>(second, scale, weight + half + at);
      }
      float c[PACK], s[PACK];
      const int64_t angle = (known ? position : 0) * half + at;
      load_angles<PACK>(call.cos + angle, c);
      load_angles<PACK>(call.sin + angle, s);
#pragma unroll
      for (int i = 0; i < PACK; ++i) {
        const float a = first[i], b = second[i];
        first[i] = known ? a * c[i] - b * s[i] : NAN;
        second[i] = known ? b * c[i] + a * s[i] : NAN;
      }
    }
    store<PACK>(to + at, first);
    store<PACK>(to + half + at, second);
  }
}

template <typename T, int PACK, int LANES>
int run(const Call<T>& call, void* stream) {
  const int64_t items = call.rows * (call.heads + 2 * call.kv_heads);
  const dim3 grid(static_cast<unsigned>(ceil_div(items * LANES, kThreads)));
  return launch(place_heads<T, PACK, LANES>, grid, kThreads, stream, call);
}

template <typename T>
int by_layout(const Call<T>& c, void* stream) {
  constexpr int kWide = kPack<T>;
  const int64_t strides[] = {c.q_row, c.q_head, c.k_row, c.k_head, c.v_row, c.v_head, c.half};
  const void* pointers[] = {c.q, c.k, c.v, c.cos, c.sin, c.q_norm, c.k_norm, c.q_out, c.keys, c.values};
  bool whole = true;
  for (int64_t stride : strides) whole = whole && stride % kWide == 0;
  for (const void* pointer : pointers) whole = whole && aligned(pointer);
  if (!whole) return run<T, 1, 32>(c, stream);
  return c.half <= 8 * kWide    ? run<T, kWide, 8>(c, stream)
         : c.half <= 16 * kWide ? run<T, kWide, 16>(c, stream)
                                : run<T, kWide, 32>(c, stream);
}

}  // namespace

extern "C" int r1_cuda_rope_append(int type, const void* q, int64_t q_row, int64_t q_head, const void* k, int64_t k_row,
                                   int64_t k_head, const void* v, int64_t v_row, int64_t v_head, const float* cos,
                                   const float* sin, int64_t table_rows, const int64_t* positions, const int64_t* slots,
                                   int64_t all_slots, const void* q_norm, const void* k_norm, float eps, int64_t rows,
                                   int64_t heads, int64_t kv_heads, int64_t half, void* q_out, void* keys, void* values,
                                   void* stream) {
  if (rows == 0 || half == 0) return 0;
  auto typed = [&](auto zero) {
    using T = decltype(zero);
    auto in = [](const void* p) { return static_cast<const T*>(p); };
    auto out = [](void* p) { return static_cast<T*>(p); };
    return by_layout<T>({in(q), in(k), in(v), q_row, q_head, k_row, k_head, v_row, v_head, cos, sin, positions, slots,
                         in(q_norm), in(k_norm), out(q_out), out(keys), out(values), rows, table_rows, all_slots,
                         static_cast<int>(heads), static_cast<int>(kv_heads), static_cast<int>(half), eps},
                        stream);
  };
  return type == kFloat ? typed(float{}) : type == kBf16 ? typed(Bf16{}) : typed(Half{});
}
