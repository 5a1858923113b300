// Group-relative advantages on the CPU: equal groups by position, unequal ones by id. See kernels/group_advantage.py.
#include <cstdlib>
#include <cstring>

#include "../common/group.h"
#include "ops.h"
#include "simd.h"

namespace r1 {
namespace R1_ISA {

namespace {

// Doubles as many as half a vector of floats has, which is what they are made of.
constexpr int64_t kDoubles = kLanes / 2;
typedef float Half __attribute__((vector_size(4 * kDoubles)));
typedef double Doubles __attribute__((vector_size(8 * kDoubles)));
typedef int64_t Numbers __attribute__((vector_size(8 * kDoubles)));

constexpr int64_t kTogether = 32;             // groups
constexpr int64_t kSerial = 1 << 16;          // rewards under which threads cost more than they give
constexpr int64_t kFetched = 64;              // rewards of a group up to which the next ones are fetched meanwhile
constexpr int64_t kExact = int64_t{1} << 29;  // times a float, and fewer times, is a double without rounding

// GCC 12 would convert two halves and put them together again.
R1_INLINE Doubles widened(const float* from) {
  Half v;
  std::memcpy(&v, from, sizeof v);
#if defined(__clang__) || !defined(__AVX2__)
  return __builtin_convertvector(v, Doubles);
#elif defined(__AVX512F__)
  return __builtin_ia32_cvtps2pd512_mask(v, Doubles{}, -1, 4);
#else
  return __builtin_ia32_cvtps2pd256(v);
#endif
}

R1_INLINE void write(float* to, Doubles v) {
  const Half rounded = __builtin_convertvector(v, Half);
  std::memcpy(to, &rounded, sizeof rounded);
}

R1_INLINE Numbers double_lanes() {
  Numbers lane;
  for (int i = 0; i < kDoubles; ++i) lane[i] = i;
  return lane;
}

// Lane i becomes a's or b's sum of the lanes i and i ^ STEP: of b where bit STEP of i is set.
template <int STEP>
R1_INLINE Doubles fold(Doubles a, Doubles b) {
#if defined(__clang__)
  Doubles v;
  for (int i = 0; i < kDoubles; ++i) v[i] = i & STEP ? b[i ^ STEP] + b[i] : a[i] + a[i ^ STEP];
  return v;
#else
  const Numbers from = double_lanes() + (double_lanes() & STEP) / STEP * (kDoubles - STEP);
  return __builtin_shuffle(a, b, from) + __builtin_shuffle(a, b, from + STEP);
#endif
}

// Lane i of the result is the sum of v[i]'s lanes.
R1_INLINE Doubles sums_of(Doubles* v) {
#pragma GCC unroll 8
  for (int64_t i = 0; i < kDoubles; i += 2) v[i / 2] = fold<1>(v[i], v[i + 1]);
  if (kDoubles > 2)
#pragma GCC unroll 8
    for (int64_t i = 0; i < kDoubles / 2; i += 2) v[i / 2] = fold<2 % kDoubles>(v[i], v[i + 1]);
  if (kDoubles > 4) v[0] = fold<4 % kDoubles>(v[0], v[1]);
  return v[0];
}

R1_INLINE double sum_of(Doubles v) {
  if (kDoubles > 4) v = fold<4 % kDoubles>(v, v);
  if (kDoubles > 2) v = fold<2 % kDoubles>(v, v);
  return fold<1>(v, v)[0];
}

// Of a group: its mean, and the squares of the deviations, to be summed over the lanes.
struct Spread {
  double mean;
  Doubles squares;
};

template <int64_t COUNT>
R1_INLINE Doubles total(Doubles* v) {
#pragma GCC unroll 8
  for (int64_t half = COUNT / 2; half; half /= 2)
#pragma GCC unroll 32
    for (int64_t i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}

// A group of VECTORS vectors, a power of two, is read and converted once: `deviations` are kept for its advantages.
template <int64_t VECTORS>
R1_INLINE Spread known_spread(const float* r, Doubles* deviations) {
  Doubles v[VECTORS], sums[VECTORS];
#pragma GCC unroll 32
  for (int64_t i = 0; i < VECTORS; ++i) v[i] = sums[i] = widened(r + i * kDoubles);
  const double mean = sum_of(total<VECTORS>(sums)) / (VECTORS * kDoubles);
#pragma GCC unroll 32
  for (int64_t i = 0; i < VECTORS; ++i) {
    deviations[i] = v[i] = v[i] - mean;
    sums[i] = v[i] * v[i];
  }
  return {mean, total<VECTORS>(sums)};
}

// The last vector of a group of any size ends where the group ends and may begin in the one before: its own lanes.
R1_INLINE Numbers own_lanes(int64_t size) { return double_lanes() >= (kDoubles - size % kDoubles) % kDoubles; }

Spread any_spread(const float* r, int64_t size) {
  const int64_t last = size - kDoubles;
  if (last < 0) {
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < size; ++i) sum += r[i];
    const double mean = sum / static_cast<double>(size);
    for (int64_t i = 0; i < size; ++i) squares += (r[i] - mean) * (r[i] - mean);
    return {mean, Doubles{squares}};
  }
  const Numbers own = own_lanes(size);
  Doubles sums{}, squares{};
  for (int64_t i = 0; i < last; i += kDoubles) sums += widened(r + i);
  sums += own ? widened(r + last) : Doubles{};
  const double mean = sum_of(sums) / static_cast<double>(size);
  for (int64_t i = 0; i < last; i += kDoubles) {
    const Doubles deviation = widened(r + i) - mean;
    squares += deviation * deviation;
  }
  const Doubles deviation = own ? widened(r + last) - mean : Doubles{};
  return {mean, squares + deviation * deviation};
}

void write_any(const float* r, int64_t size, double mean, double scale, float* out) {
  const int64_t last = size - kDoubles;
  for (int64_t i = 0; i < last; i += kDoubles) write(out + i, (widened(r + i) - mean) * scale);
  if (last >= 0)
    write(out + last, (widened(r + last) - mean) * scale);
  else
    for (int64_t i = 0; i < size; ++i) out[i] = static_cast<float>((r[i] - mean) * scale);
}

bool varies(const float* r, int64_t size) {
  for (int64_t i = 1; i < size; ++i)
    if (r[i] != r[0]) return true;
  return false;
}

// SIZE: of a group, or 0 where the compiler does not know it. Roots and quotients are taken for a vector of groups.
//
// Whether a group varies is read off its squares. Up to kExact equal rewards have an exact sum, so their mean is the
// reward and each deviation is zero; of unequal ones, one is 2^-150 at least from the mean, whose square is not zero in
// double. Infinite rewards have no mean: they, and groups beyond kExact, are compared.
template <int64_t SIZE>
void some_groups(const float* rewards, int64_t groups, int64_t size, bool normalize, double eps, float* out) {
  constexpr int64_t kVectors = SIZE / kDoubles;
  if (SIZE) size = SIZE;
  Doubles deviations[kTogether][SIZE ? kVectors : 1], squares[kTogether];
  double means[kTogether], scales[kTogether];
  for (int64_t g = 0; g < groups; ++g) {
    const float* r = rewards + g * size;
    for (int64_t i = 0; i < size && size <= kFetched; i += kLine) {
      __builtin_prefetch(out + g * size + i, 1);
      __builtin_prefetch(r + kTogether * size + i);
    }
    Spread found;
    if constexpr (SIZE > 0)
      found = known_spread<kVectors>(r, deviations[g]);
    else
      found = any_spread(r, size);
    means[g] = found.mean;
    squares[g] = found.squares;
  }
  for (int64_t g = groups; g % kDoubles; ++g) squares[g] = Doubles{};
  Numbers unclear = double_lanes() < (size > kExact ? kDoubles : 0);
  for (int64_t g = 0; g < groups; g += kDoubles) {
    const Doubles sums = sums_of(squares + g);
    Doubles std;
    for (int64_t i = 0; i < kDoubles; ++i) std[i] = sample_std(sums[i], size);
    const Doubles scale = sums == 0.0 ? Doubles{} : advantage_scale(std, eps, normalize);
    std::memcpy(scales + g, &scale, sizeof scale);
    unclear |= sums != sums;
  }
  for (int64_t g = 0; g < groups; ++g) {
    if (SIZE)
      for (int64_t i = 0; i < kVectors; ++i) write(out + g * size + i * kDoubles, deviations[g][i] * scales[g]);
    else
      write_any(rewards + g * size, size, means[g], scales[g], out + g * size);
  }
  bool compare = false;
  for (int64_t i = 0; i < kDoubles; ++i) compare |= unclear[i] != 0;
  for (int64_t g = 0; compare && g < groups; ++g)
    if (!varies(rewards + g * size, size)) std::memset(out + g * size, 0, size * sizeof(float));
}

auto groups_of(int64_t size) {
  switch (size) {
    case 4:
      return some_groups<4 % kDoubles ? 0 : 4>;  // less than a vector of AVX-512
    case 8:
      return some_groups<8>;
    case 16:
      return some_groups<16>;
    case 32:
      return some_groups<32>;
    case 64:
      return some_groups<64>;
    default:
      return some_groups<0>;
  }
}

}  // namespace

// Some groups together, stage by stage: one after another, each would wait for its own root and quotient. Meanwhile the
// rewards of the next ones are fetched, and the lines that advantages go to: the stages read and write in turns, and
// memory would rest in between.
void group_advantage(const float* rewards, float* out, int64_t groups, int64_t group_size, bool normalize, double eps) {
  const auto run = groups_of(group_size);
#pragma omp parallel for schedule(static) if (groups * group_size > kSerial)
  for (int64_t first = 0; first < groups; first += kTogether) {
    const int64_t at = first * group_size, count = groups - first < kTogether ? groups - first : kTogether;
    run(rewards + at, count, group_size, normalize, eps, out + at);
  }
}

namespace {

struct Group {
  int64_t id, count;
  double sum, squares;
  float first;
  bool varies;
};

// One open-addressing table from id to group, at most half full; `slot_of` remembers each row's slot.
Group* find(Group* table, int64_t mask, int64_t id) {
  uint64_t slot = static_cast<uint64_t>(id) * 0x9E3779B97F4A7C15ull;
  slot ^= slot >> 32;
  while (true) {
    Group* group = table + (slot & mask);
    if (group->count == 0 || group->id == id) return group;
    ++slot;
  }
}

}  // namespace

bool group_advantage_ids(const float* rewards, const int64_t* ids, float* out, int64_t count, bool normalize,
                         double eps) {
  int64_t slots = 2;
  while (slots < 2 * count) slots *= 2;
  Group* table = static_cast<Group*>(std::calloc(slots, sizeof(Group)));
  int64_t* slot_of = static_cast<int64_t*>(std::malloc(count * sizeof(int64_t) + 1));
  const bool enough = table && slot_of;
  if (enough) {
    for (int64_t i = 0; i < count; ++i) {
      Group* group = find(table, slots - 1, ids[i]);
      if (group->count++ == 0) {
        group->id = ids[i];
        group->first = rewards[i];
      }
      group->sum += rewards[i];
      group->varies |= rewards[i] != group->first;
      slot_of[i] = group - table;
    }
    for (int64_t i = 0; i < count; ++i) {
      Group& group = table[slot_of[i]];
      const double centred = rewards[i] - group.sum / static_cast<double>(group.count);
      group.squares += centred * centred;
    }
    for (int64_t i = 0; i < count; ++i) {
      const Group& group = table[slot_of[i]];
      out[i] = advantage(rewards[i], group.sum / static_cast<double>(group.count),
                         sample_std(group.squares, group.count), eps, group.varies, normalize);
    }
  }
  std::free(table);
  std::free(slot_of);
  return enough;
}

}  // namespace R1_ISA
}  // namespace r1
