// Group-relative advantages on the CPU: equal groups by position, unequal ones by id. See kernels/group_advantage.py.
#include <cstdlib>
#include <cstring>

#include "../common/group.h"
#include "ops.h"

namespace r1 {
namespace R1_ISA {

void group_advantage(const float* rewards, float* out, int64_t groups, int64_t group_size, bool normalize, double eps) {
#pragma omp parallel for schedule(static) if (groups * group_size > 65536)
  for (int64_t group = 0; group < groups; ++group) {
    const float* r = rewards + group * group_size;
    double sum = 0, squares = 0;
    bool varies = false;
    for (int64_t i = 0; i < group_size; ++i) {
      sum += r[i];
      varies |= r[i] != r[0];
    }
    const double mean = sum / static_cast<double>(group_size);
    for (int64_t i = 0; i < group_size; ++i) squares += (r[i] - mean) * (r[i] - mean);
    const double std = sample_std(squares, group_size);
    for (int64_t i = 0; i < group_size; ++i)
      out[group * group_size + i] = advantage(r[i], mean, std, eps, varies, normalize);
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
