// R1_HD marks a function that is compiled for the host and, under nvcc, for the device too: the math is written once.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define R1_HD __host__ __device__ inline
#else
#define R1_HD inline
#endif

// Each file of csrc/cpu is compiled once per instruction set, in a namespace of that name (setup.py sets R1_ISA), and the
// bindings choose at import. The shared math takes the same namespace: were two builds of one inline function to carry
// the same name, the linker would keep either, and an old CPU could be given the AVX-512 one.
#ifndef R1_ISA
#define R1_ISA generic
#endif
