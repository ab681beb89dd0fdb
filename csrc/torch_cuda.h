// What the bindings of the CUDA kernels need of PyTorch's stable ABI.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#ifndef HPK_EMULATED
#include <cuda_runtime_api.h>
#endif
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>

#include "common/cuda.h"

namespace hpk {
namespace {

using torch::stable::Tensor;

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <typename T>
T* data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? data<T>(*tensor) : nullptr;
}

// The rows of a matrix, as the kernels of products take them; hpkernels/ops/_cuda.py makes them so.
template <typename T>
Rows<T> rows(const Tensor& matrix) {
  const Rows<T> rows{data<T>(matrix), matrix.size(0), matrix.stride(0), static_cast<int>(matrix.size(1))};
  if (rows.count > std::numeric_limits<int32_t>::max()) {
    throw std::runtime_error("hpkernels: the CUDA kernels take less than 2^31 rows");
  }
  const auto fills_chunks = [](int64_t count) { return count * static_cast<int64_t>(sizeof(T)) % 16 == 0; };
  if (matrix.stride(1) != 1 || !fills_chunks(rows.stride) || !fills_chunks(rows.dim) ||
      reinterpret_cast<uintptr_t>(rows.data) % 16 != 0) {
    throw std::runtime_error("hpkernels: rows must start at multiples of 16 bytes and be as long");
  }
  return rows;
}

#ifdef HPK_EMULATED
// Tensors on the CPU, of which there is one, without streams.
struct OnDeviceOf {
  explicit OnDeviceOf(const Tensor&) {}
  cudaStream_t stream = nullptr;
};
#define HPK_DISPATCH_KEY CPU
#else
// Makes the device of a tensor the current one as long as it lives; `stream` is PyTorch's current one there. The guard
// tells PyTorch's runtime. This library has a runtime of its own, which makes the device's context the current one: a
// thread that has not used CUDA before has none, and TMA descriptors need it.
struct OnDeviceOf {
  explicit OnDeviceOf(const Tensor& tensor) : guard(tensor.get_device_index()) {
    const cudaError_t error = cudaSetDevice(tensor.get_device_index());
    if (error != cudaSuccess) throw std::runtime_error(std::string("hpkernels: ") + cudaGetErrorString(error));
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream = nullptr;
};
#define HPK_DISPATCH_KEY CUDA
#endif

// Calls body(T{}) with T the type of `tensor`, one that tensor cores multiply.
template <typename Body>
void with_type_of(const Tensor& tensor, Body body) {
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return body(float{});
    case torch::headeronly::ScalarType::Half:
      return body(__half{});
    case torch::headeronly::ScalarType::BFloat16:
      return body(__nv_bfloat16{});
    default:
      throw std::runtime_error("hpkernels: the CUDA kernels take float16, bfloat16 and float32");
  }
}

}  // namespace
}  // namespace hpk
