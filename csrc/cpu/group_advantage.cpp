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
typedef int32_t HalfBits __attribute__((vector_size(4 * kDoubles)));
typedef double Doubles __attribute__((vector_size(8 * kDoubles)));

R1_INLINE Half half(const float* from) {
  Half v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

R1_INLINE double sum_of(Doubles v) {
  double sum = 0;
  for (int64_t i = 0; i < kDoubles; ++i) sum += v[i];
  return sum;
}

// Of a group: half a vector at a time, then what is left one by one.
struct Spread {
  double mean, squares;  // squares: of the deviations, summed
  bool varies;
};

Spread spread_of(const float* r, int64_t size) {
  const int64_t whole = size / kDoubles * kDoubles;
  Doubles sums{}, square_sums{};
  HalfBits differ{};
  for (int64_t i = 0; i < whole; i += kDoubles) {
    const Half v = half(r + i);
    sums += __builtin_convertvector(v, Doubles);
    differ |= v != r[0];
  }
  Spread found{sum_of(sums), 0, false};
  for (int64_t i = 0; i < kDoubles; ++i) found.varies |= differ[i] != 0;
  for (int64_t i = whole; i < size; ++i) {
    found.mean += r[i];
    found.varies |= r[i] != r[0];
  }
  found.mean /= static_cast<double>(size);
  for (int64_t i = 0; i < whole; i += kDoubles) {
    const Doubles centred = __builtin_convertvector(half(r + i), Doubles) - found.mean;
    square_sums += centred * centred;
  }
  found.squares = sum_of(square_sums);
  for (int64_t i = whole; i < size; ++i) found.squares += (r[i] - found.mean) * (r[i] - found.mean);
  return found;
}

void write_advantages(const float* r, int64_t size, const Spread& of, double scale, float* out) {
  if (!of.varies) {
    std::memset(out, 0, size * sizeof(float));
    return;
  }
  int64_t i = 0;
  for (; i + kDoubles <= size; i += kDoubles) {
    const Half found = __builtin_convertvector((__builtin_convertvector(half(r + i), Doubles) - of.mean) * scale, Half);
    std::memcpy(out + i, &found, sizeof found);
  }
  for (; i < size; ++i) out[i] = static_cast<float>((r[i] - of.mean) * scale);
}

}  // namespace

// Some groups together, stage by stage: one after another, each would wait for its own root and quotient. (One by one
// and without vectors: a fifth of the rate of a copy.)
void group_advantage(const float* rewards, float* out, int64_t groups, int64_t group_size, bool normalize, double eps) {
  constexpr int64_t kTogether = 64;
#pragma omp parallel for schedule(static) if (groups * group_size > 65536)
  for (int64_t first = 0; first < groups; first += kTogether) {
    const int64_t count = groups - first < kTogether ? groups - first : kTogether;
    Spread spreads[kTogether];
    double scales[kTogether];
    for (int64_t i = 0; i < count; ++i) spreads[i] = spread_of(rewards + (first + i) * group_size, group_size);
    for (int64_t i = 0; i < count; ++i)
      scales[i] = advantage_scale(sample_std(spreads[i].squares, group_size), eps, normalize);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = (first + i) * group_size;
      write_advantages(rewards + at, group_size, spreads[i], scales[i], out + at);
    }
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
