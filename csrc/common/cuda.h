// What launch signatures of CUDA kernels need, without CUDA's headers.
#pragma once

#include <cstddef>
#include <cstdint>

// The type of that name in CUDA's own headers.
typedef struct CUstream_st* cudaStream_t;

namespace hpk {

// Rows of `dim` elements, `stride` elements apart. Each starts at a multiple of 16 bytes and is one long.
template <typename T>
struct Rows {
  const T* data;
  int64_t count, stride;
  int dim;
};

// The longest rows that the kernels for sm_90a take: a strip of them stays in shared memory.
constexpr int kMostSm90Bytes = 1024;

// What a block may have of shared memory on every GPU from sm_80 on: sm_86, sm_89 and sm_120 have no more.
constexpr size_t kSharedBytesAnywhere = 99 * 1024;

// What a block may have of shared memory on the current device.
size_t most_shared_bytes();

// Whether the current device is an sm_90 and this library has kernels of its own for that. HPKERNELS_SM90=0 says no.
bool has_sm90();

template <typename T>
bool runs_on_sm90(const Rows<T>& rows) {
  return rows.dim * static_cast<int>(sizeof(T)) <= kMostSm90Bytes && has_sm90();
}

}  // namespace hpk
