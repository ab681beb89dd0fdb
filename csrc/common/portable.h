// What differs between compilers and between host and device, in one place.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define HPK_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define HPK_HOST_DEVICE __forceinline
#else
#define HPK_HOST_DEVICE inline __attribute__((always_inline))
#endif

// A function marked HPK_MULTIVERSION is compiled for several instruction sets, and the loader picks one for the
// processor at hand. What it calls must be inlined into it (HPK_HOST_DEVICE) to be compiled for the same set.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(HPK_BASELINE_ONLY)
#define HPK_MULTIVERSION __attribute__((target_clones("avx512f", "arch=haswell", "default")))
#define HPK_HAS_AVX512_VERSIONS 1
#else
#define HPK_MULTIVERSION
#define HPK_HAS_AVX512_VERSIONS 0
#endif

#define HPK_PRAGMA(text) _Pragma(#text)
// Lets the compiler reorder the sum of a loop into vector lanes; the order is fixed at compile time.
#define HPK_SIMD_SUM(...) HPK_PRAGMA(omp simd reduction(+ : __VA_ARGS__))
#define HPK_SIMD HPK_PRAGMA(omp simd)
