// What launch signatures of CUDA kernels need, without CUDA's headers.
#pragma once

// The type of that name in CUDA's own headers.
typedef struct CUstream_st* cudaStream_t;

namespace hpk {

// The type that sums of products of T are kept in.
template <typename T>
struct Accumulation {
  using type = float;
};

template <>
struct Accumulation<double> {
  using type = double;
};

}  // namespace hpk
