// What the CPU's and the GPU's C++ share is compiled by both compilers, each time in a namespace of its own
// (FASTVAE_ISA: an instruction set, or cuda), and always inlined.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTVAE_SHARED __host__ __device__ __forceinline__
#define FASTVAE_UNROLL _Pragma("unroll")
#define FASTVAE_NO_UNROLL _Pragma("unroll 1")
#else
#define FASTVAE_SHARED inline __attribute__((always_inline))
#define FASTVAE_UNROLL _Pragma("GCC unroll 16")
#define FASTVAE_NO_UNROLL
#endif
