// Memory for activations, apart from malloc's; kernels/memory.py says why.
//
// One stretch of addresses is reserved, as long as the machine's memory; pages are taken as they are first written and
// kept. A block goes to the lowest hole that holds it. Only large blocks come here, freed in about the reverse order of
// their making, so holes merge, and the most that is ever touched stays near the most that is ever in use.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace r1 {
namespace {  // of the one file that includes it

class Memory {
 public:
  // Null where there is no such stretch (the system refuses it, or is not Linux), or no hole is large enough. `touched`:
  // nor one whose pages all came to earlier blocks.
  void* take(size_t bytes, bool touched = false) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!reserve()) return nullptr;
    bytes = (bytes + kStep - 1) / kStep * kStep;
    for (auto hole = holes_.begin(); hole != holes_.end(); ++hole) {
      if (hole->second < bytes) continue;
      const size_t place = hole->first, left = hole->second - bytes;
      if (touched && place + bytes > touched_) break;
      holes_.erase(hole);
      if (left) holes_[place + bytes] = left;
      taken_[place] = bytes;
      in_use_ += bytes;
      touched_ = std::max(touched_, place + bytes);
      return base_ + place;
    }
    return nullptr;
  }

  void give_back(void* block) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = taken_.find(static_cast<char*>(block) - base_);
    size_t place = found->first, bytes = found->second;
    taken_.erase(found);
    in_use_ -= bytes;
    const auto after = holes_.lower_bound(place);
    if (after != holes_.end() && after->first == place + bytes) {
      bytes += after->second;
      holes_.erase(after);
    }
    auto before = holes_.lower_bound(place);
    if (before != holes_.begin() && (--before)->first + before->second == place)
      before->second += bytes;
    else
      holes_[place] = bytes;
  }

  size_t in_use() {
    std::lock_guard<std::mutex> lock(mutex_);
    return in_use_;
  }

 private:
  static constexpr size_t kStep = 256;

  bool reserve() {
#if defined(__linux__)
    if (!base_ && !refused_) {
      const size_t bytes = size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGESIZE));
      void* found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      refused_ = found == MAP_FAILED;
      if (!refused_) {
        base_ = static_cast<char*>(found);
        madvise(found, bytes, MADV_HUGEPAGE);  // 512 times fewer page faults; where it is refused, nothing is lost
        holes_[0] = bytes;
      }
    }
    return base_ != nullptr;
#else
    return false;
#endif
  }

  std::mutex mutex_;
  char* base_ = nullptr;
  bool refused_ = false;
  size_t in_use_ = 0, touched_ = 0;  // touched_: the end of the highest block there ever was
  std::map<size_t, size_t> holes_, taken_;  // place -> bytes
};

}  // namespace
}  // namespace r1
