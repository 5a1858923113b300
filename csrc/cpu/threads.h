// OpenMP's threads, and one where there is no OpenMP.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace r1 {
namespace R1_ISA {

// Threads that a parallel region begun here would have.
inline int64_t most_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// Of the parallel region that runs.
inline int64_t this_thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}
inline int64_t team_size() {
#ifdef _OPENMP
  return omp_get_num_threads();
#else
  return 1;
#endif
}

// What this thread begins from here on, until the region that it is in ends, is not shared out again.
inline void alone() {
#ifdef _OPENMP
  omp_set_num_threads(1);
#endif
}

}  // namespace R1_ISA
}  // namespace r1
