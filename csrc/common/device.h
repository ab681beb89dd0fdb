// All that kernels use of CUDA. Compiled by nvcc it is CUDA; with HPK_EMULATED it is csrc/emulation, which runs the same
// kernels on the CPU, so that tests see them without a GPU.
//
// Kernels keep to it: no inline assembly of their own, shared memory through shared_memory() alone, launches through
// launch().
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/cuda.h"
#include "common/portable.h"

#ifdef HPK_EMULATED
#include "emulation/cuda.h"
#else

#define HPK_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)

namespace hpk {

// Lets the blocks of a kernel have more shared memory than every kernel may. That is one number a kernel and device for
// all threads of the process. It depends on no launch, so none takes back what another is about to use.
inline cudaError_t allow_shared_bytes(const void* kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  const size_t most = bytes <= kSharedBytesAnywhere ? kSharedBytesAnywhere : most_shared_bytes();
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most));
}

// Runs kernel(arguments...) on `stream`; an empty grid is nothing to do.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
            const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  cudaError_t error = allow_shared_bytes(reinterpret_cast<const void*>(kernel), shared_bytes);
  if (error == cudaSuccess) kernel<<<grid, threads, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  const cudaError_t last = cudaGetLastError();  // and no later launch is told of it
  if (error == cudaSuccess) error = last;
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("hpkernels: a CUDA kernel did not start: ") + cudaGetErrorString(error));
  }
}

// The block's dynamic shared memory, aligned for TMA and for vectors.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(1024) char hpk_shared_memory[];
  return hpk_shared_memory;
}

// A barrier of `threads` threads, whole warps; `id` from 1 to 15, 0 is that of __syncthreads().
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  __syncwarp();
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes from global to shared memory, of which those after the first `valid` are 0, by cp_async_wait.
__device__ __forceinline__ void cp_async(void* to, const void* from, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most `left` of the thread's latest groups are under way.
template <int left>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers, or 8 x 4 of 32-bit ones: lane 8 q + r gives the address of row r of matrix q, a
// lane gets the 32 bits at row lane / 4, place lane % 4 of each.
__device__ __forceinline__ void load_matrices(uint32_t (&parts)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(parts[0]), "=r"(parts[1]), "=r"(parts[2]), "=r"(parts[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, transposed: of 16-bit numbers a lane gets those of column lane / 4 in rows 2 (lane % 4) and the next.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&parts)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(parts[0]), "=r"(parts[1]), "=r"(parts[2]), "=r"(parts[3])
               : "r"(shared_address(row))
               : "memory");
}

// sums (16 x 8) += a (16 x 32 bytes) times b (32 bytes x 8), whose numbers are of type T; float stands for TF32.
template <class T>
__device__ __forceinline__ void mma(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#define HPK_MMA(T, shape, type)                                                                                     \
  template <>                                                                                                       \
  __device__ __forceinline__ void mma<T>(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {      \
    asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type                                            \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                             \
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                   \
  }
HPK_MMA(__half, "m16n8k16", "f16")
HPK_MMA(__nv_bfloat16, "m16n8k16", "bf16")
HPK_MMA(float, "m16n8k8", "tf32")
#undef HPK_MMA

// The greater of two numbers, NaN if either is.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// 2^x; 0 where that is below the least normal number.
__device__ __forceinline__ float exp2_of(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// The smaller of two numbers, NaN if either is.
__device__ __forceinline__ float min_or_nan(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// `value` rounded to TF32, as the bits of a float.
__device__ __forceinline__ uint32_t to_tf32(float value) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
  return rounded;
}

// Adds `count` to a counter in global memory that other blocks add to as well; what it was before.
__device__ __forceinline__ int64_t take(int64_t* counter, int64_t count) {
  auto* const at = reinterpret_cast<unsigned long long*>(counter);
  return static_cast<int64_t>(atomicAdd(at, static_cast<unsigned long long>(count)));
}

// Makes a number in global memory `value` if that is greater. Neither is negative, and a NaN is 0x7FFFFFFF.
__device__ __forceinline__ void raise_to(float* number, float value) {
  atomicMax(reinterpret_cast<int*>(number), __float_as_int(value));
}

}  // namespace hpk
#endif

namespace hpk {

// What a struct takes at the start of shared memory, so that what follows is aligned.
template <class Shared>
constexpr size_t kAlignedBytes = (sizeof(Shared) + 1023) / 1024 * 1024;

}  // namespace hpk
