// r1fast_kernels._cpu: the only pybind11 file of the CPU module. Arguments are addresses (tensor.data_ptr()) and sizes;
// the Python side has checked shapes, dtypes and contiguity. The instruction set is chosen once, at import.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>

#include "cpu/ops.h"

namespace py = pybind11;
using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// A table of the functions of one instruction set, filled from its namespace.
struct Ops {
  const char* name;
#define R1_FIELD(op) decltype(&r1::generic::op) op;
  R1_FIELD(group_advantage)
  R1_FIELD(group_advantage_ids)
  R1_FIELD(philox_words)
};

#define R1_TABLE(isa) {#isa, r1::isa::group_advantage, r1::isa::group_advantage_ids, r1::isa::philox_words}

#if defined(R1_X86)
const Ops v4 = R1_TABLE(x86_64_v4), v3 = R1_TABLE(x86_64_v3);
#endif
const Ops generic = R1_TABLE(generic);

// Best instruction set of this CPU, or the one named by R1FAST_CPU_ISA if the CPU has it (to test the others).
const Ops& choose() {
  const char* variable = std::getenv("R1FAST_CPU_ISA");
  const std::string asked = variable ? variable : "";
#if defined(R1_X86)
  __builtin_cpu_init();
  const bool has_v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                      __builtin_cpu_supports("popcnt");
  const bool has_v4 = has_v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (has_v4 && (asked.empty() || asked == v4.name)) return v4;
  if (has_v3 && (asked.empty() || asked == v3.name)) return v3;
#endif
  if (asked.empty() || asked == generic.name) return generic;
  throw std::runtime_error("R1FAST_CPU_ISA=" + asked + ": this CPU or build has no such instruction set");
}

PYBIND11_MODULE(_cpu, m) {
  const Ops& ops = choose();
  m.attr("isa") = ops.name;
  using Release = py::call_guard<py::gil_scoped_release>;

  m.def(
      "group_advantage",
      [&ops](Address rewards, Address out, int64_t groups, int64_t group_size, bool normalize, double eps) {
        ops.group_advantage(at<const float>(rewards), at<float>(out), groups, group_size, normalize, eps);
      },
      Release());
  m.def(
      "group_advantage_ids",
      [&ops](Address rewards, Address ids, Address out, int64_t count, bool normalize, double eps) {
        if (!ops.group_advantage_ids(at<const float>(rewards), at<const int64_t>(ids), at<float>(out), count, normalize,
                                     eps))
          throw std::bad_alloc();
      },
      Release());
  m.def("philox_words", [&ops](Address counters, Address keys, Address out, int64_t count) {
    ops.philox_words(at<const uint32_t>(counters), at<const uint32_t>(keys), at<uint32_t>(out), count);
  });
}
