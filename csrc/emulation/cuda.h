// CUDA on the CPU, as far as the kernels use it (common/device.h): every thread of a block is a fiber, blocks run one
// after another. For tests: it is slow, and it finds mistakes.
//
//   - Threads run in another order in each round, and some warps are slower than others, so that a missing barrier gives
//     wrong numbers. HPKERNELS_EMULATION_SEED=NUMBER chooses another order.
//   - Shared memory starts as NaN, and so does the target of an asynchronous copy that has not been waited for.
//   - Lanes that do not all come to the same warp instruction, barriers that nobody can leave, and more shared memory than
//     a block may have are errors. HPKERNELS_SM90=1 gives it what Hopper has, otherwise it is as on the smallest GPUs.
//   - What is particular to sm_90a is in hopper.h.
#pragma once

#include <cuda_runtime.h>  // which CUTLASS includes, before the macros below

#include <cmath>
#include <cstddef>
#include <cstring>
#include <functional>
#include <limits>

// The headers of CUDA define these for compilers other than nvcc as attributes that those do not know.
#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __restrict__ __restrict
#define HPK_KERNEL(...) void

namespace hpk {
namespace emulation {

constexpr int kWarp = 32;
constexpr uint32_t kAll = 0xFFFFFFFFu;

struct Index {
  unsigned x, y, z;
};

// Of the thread that is running.
const Index& thread_index();
const Index& block_index();
const Index& grid_size();
const Index& block_size();
char* shared();

// Runs `body` as every thread of every block.
void run(dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& body);

// Of `threads` threads, or of all that have not ended for 0.
void barrier(int id, int threads);
void barrier_of_warps(int id, int threads);

// An instruction of a whole warp: the last lane to come calls execute(operands of the lanes, results of the lanes).
using Execute = void (*)(const void* const* operands, void* const* results);
void warp_instruction(uint32_t mask, Execute execute, const void* operand, void* result);

template <class Result, class Operand>
Result warp_instruction(uint32_t mask, Execute execute, const Operand& operand) {
  Result result{};
  warp_instruction(mask, execute, &operand, &result);
  return result;
}

inline void sync_warp(uint32_t mask) {
  const auto nothing = [](const void* const*, void* const*) {};
  warp_instruction<int>(mask, nothing, 0);
}

template <class T>
struct Shuffle {
  T value;
  int from;
};

template <class T>
T shuffle(uint32_t mask, T value, int from) {
  const int own = static_cast<int>(thread_index().x % kWarp);
  return warp_instruction<T>(
      mask,
      [](const void* const* operands, void* const* results) {
        for (int lane = 0; lane < kWarp; ++lane) {
          const int source = static_cast<const Shuffle<T>*>(operands[lane])->from;
          *static_cast<T*>(results[lane]) = static_cast<const Shuffle<T>*>(operands[source])->value;
        }
      },
      Shuffle<T>{value, from >= 0 && from < kWarp ? from : own});
}

void copy_async(void* to, const void* from, int valid);
void commit_copies();
void wait_for_copies(int left);
void multiply(const void* const* operands, void* const* results, int kind);

}  // namespace emulation

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t,
            const Arguments&... arguments) {
  emulation::run(grid, threads, shared_bytes, [&] { kernel(static_cast<Parameters>(arguments)...); });
}

inline char* shared_memory() { return emulation::shared(); }
inline void barrier_sync(int id, int threads) { emulation::barrier_of_warps(id, threads); }
inline void cp_async(void* to, const void* from, int valid) { emulation::copy_async(to, from, valid); }
inline void cp_async_commit() { emulation::commit_copies(); }
template <int left>
void cp_async_wait() {
  emulation::wait_for_copies(left);
}

struct Matrices {
  uint32_t parts[4];
};

template <bool transposed>
void load_matrices_of(uint32_t (&parts)[4], const void* row) {
  const auto execute = [](const void* const* operands, void* const* results) {
    for (int lane = 0; lane < emulation::kWarp; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t halves[2];
        for (int half = 0; half < 2; ++half) {
          const int major = lane / 4, minor = 2 * (lane % 4) + half;
          const int from = transposed ? minor : major, place = transposed ? major : minor;
          const auto* address = *static_cast<const char* const*>(operands[8 * matrix + from]);
          std::memcpy(&halves[half], address + 2 * place, 2);
        }
        std::memcpy(&static_cast<Matrices*>(results[lane])->parts[matrix], halves, 4);
      }
    }
  };
  const auto loaded = emulation::warp_instruction<Matrices>(emulation::kAll, execute, static_cast<const char*>(row));
  std::memcpy(parts, loaded.parts, sizeof parts);
}

inline void load_matrices(uint32_t (&parts)[4], const void* row) { load_matrices_of<false>(parts, row); }
inline void load_matrices_transposed(uint32_t (&parts)[4], const void* row) { load_matrices_of<true>(parts, row); }

inline float number(__half value) { return __half2float(value); }
inline float number(__nv_bfloat16 value) { return __bfloat162float(value); }
// Tensor cores pass over the last 13 bits of a float.
inline float number(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits &= 0xFFFFE000u;
  std::memcpy(&value, &bits, 4);
  return value;
}

struct MmaOperands {
  uint32_t a[4], b[2];
  float sums[4];
};

struct MmaResult {
  float sums[4];
};

template <class T>
void mma(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  constexpr int kPerWord = 4 / sizeof(T), kDepth = 32 / sizeof(T);
  const auto execute = [](const void* const* operands, void* const* results) {
    float left[16][kDepth], right[kDepth][8];
    for (int lane = 0; lane < emulation::kWarp; ++lane) {
      const auto& own = *static_cast<const MmaOperands*>(operands[lane]);
      T values[kPerWord];
      for (int part = 0; part < 4; ++part) {
        std::memcpy(static_cast<void*>(values), &own.a[part], 4);
        for (int i = 0; i < kPerWord; ++i) {
          left[lane / 4 + part % 2 * 8][part / 2 * (kDepth / 2) + lane % 4 * kPerWord + i] = number(values[i]);
        }
      }
      for (int part = 0; part < 2; ++part) {
        std::memcpy(static_cast<void*>(values), &own.b[part], 4);
        for (int i = 0; i < kPerWord; ++i) {
          right[part * (kDepth / 2) + lane % 4 * kPerWord + i][lane / 4] = number(values[i]);
        }
      }
    }
    for (int lane = 0; lane < emulation::kWarp; ++lane) {
      const auto& own = *static_cast<const MmaOperands*>(operands[lane]);
      for (int part = 0; part < 4; ++part) {
        double sum = own.sums[part];
        for (int k = 0; k < kDepth; ++k) {
          sum += double{left[lane / 4 + part / 2 * 8][k]} * right[k][lane % 4 * 2 + part % 2];
        }
        static_cast<MmaResult*>(results[lane])->sums[part] = static_cast<float>(sum);
      }
    }
  };
  MmaOperands operands{{a[0], a[1], a[2], a[3]}, {b0, b1}, {sums[0], sums[1], sums[2], sums[3]}};
  const auto result = emulation::warp_instruction<MmaResult>(emulation::kAll, execute, operands);
  std::memcpy(sums, result.sums, sizeof sums);
}

inline float max_or_nan(float a, float b) { return a != a || a > b ? a : b; }
inline float min_or_nan(float a, float b) { return a != a || a < b ? a : b; }

inline int64_t take(int64_t* counter, int64_t count) {
  const int64_t before = *counter;
  *counter += count;
  return before;
}

inline void raise_to(float* number, float value) { *number = max_or_nan(*number, value); }

inline float exp2_of(float x) {
  const float result = std::exp2(x);
  return result < std::numeric_limits<float>::min() ? 0 : result;
}

inline uint32_t to_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isfinite(value)) bits += 0x1000u;  // half of the last place that stays
  return bits & 0xFFFFE000u;
}

}  // namespace hpk

#define threadIdx (hpk::emulation::thread_index())
#define blockIdx (hpk::emulation::block_index())
#define gridDim (hpk::emulation::grid_size())
#define blockDim (hpk::emulation::block_size())

inline void __syncthreads() { hpk::emulation::barrier(0, 0); }

inline void __syncwarp(uint32_t mask = hpk::emulation::kAll) { hpk::emulation::sync_warp(mask); }

template <class T>
T __shfl_sync(uint32_t mask, T value, int from) {
  return hpk::emulation::shuffle(mask, value, from & 31);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int other) {
  return hpk::emulation::shuffle(mask, value, static_cast<int>(threadIdx.x % 32) ^ other);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, int by) {
  return hpk::emulation::shuffle(mask, value, static_cast<int>(threadIdx.x % 32) - by);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, int by) {
  return hpk::emulation::shuffle(mask, value, static_cast<int>(threadIdx.x % 32) + by);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
  const auto execute = [](const void* const* operands, void* const* results) {
    uint32_t votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= uint32_t{*static_cast<const int*>(operands[lane]) != 0} << lane;
    for (int lane = 0; lane < 32; ++lane) *static_cast<uint32_t*>(results[lane]) = votes;
  };
  return hpk::emulation::warp_instruction<uint32_t>(mask, execute, predicate);
}
inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

#define HPK_REDUCE(name, combined)                                                                       \
  inline int name(uint32_t mask, int value) {                                                            \
    const auto execute = [](const void* const* operands, void* const* results) {                         \
      int a = *static_cast<const int*>(operands[0]);                                                     \
      for (int lane = 1; lane < 32; ++lane) {                                                            \
        const int b = *static_cast<const int*>(operands[lane]);                                          \
        a = combined;                                                                                    \
      }                                                                                                  \
      for (int lane = 0; lane < 32; ++lane) *static_cast<int*>(results[lane]) = a;                       \
    };                                                                                                   \
    return hpk::emulation::warp_instruction<int>(mask, execute, value);                                  \
  }
HPK_REDUCE(__reduce_add_sync, a + b)
HPK_REDUCE(__reduce_min_sync, a < b ? a : b)
HPK_REDUCE(__reduce_max_sync, a > b ? a : b)
#undef HPK_REDUCE

template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}
template <class T>
T __ldcs(const T* pointer) {
  return *pointer;
}
template <class T>
void __stcs(T* pointer, T value) {
  *pointer = value;
}
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __ffs(uint32_t bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline int __clz(uint32_t bits) { return bits == 0 ? 32 : __builtin_clz(bits); }
inline uint32_t __brev(uint32_t bits) {
  uint32_t reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (bits >> i & 1u) << (31 - i);
  return reversed;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline int __float_as_int(float value) { return static_cast<int>(__float_as_uint(value)); }
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<uint32_t>(bits)); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __expf(float value) { return std::exp(value); }
inline float __logf(float value) { return std::log(value); }
