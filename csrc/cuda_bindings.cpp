// r1fast_kernels._cuda: the only pybind11 file of the CUDA module. Imports without a driver (the runtime is linked in);
// a launch that fails raises RuntimeError with CUDA's own words.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cuda/ops.h"

namespace py = pybind11;
using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void raise_on(int error, const char* op) {
  if (error != 0) throw std::runtime_error(std::string(op) + ": " + r1_cuda_error(error));
}

PYBIND11_MODULE(_cuda, m) {
  m.def("group_advantage", [](Address rewards, Address out, int64_t groups, int64_t group_size, bool normalize,
                              double eps, Address stream) {
    raise_on(r1_cuda_group_advantage(at<const float>(rewards), at<float>(out), groups, group_size, normalize, eps,
                                     at<void>(stream)),
             "group_advantage");
  });
  m.def("group_advantage_ids", [](Address rewards, Address ids, Address out, int64_t count, bool normalize, double eps,
                                  Address stream) {
    raise_on(r1_cuda_group_advantage_ids(at<const float>(rewards), at<const int64_t>(ids), at<float>(out), count,
                                         normalize, eps, at<void>(stream)),
             "group_advantage");
  });
}
