// Registers the CUDA kernels with PyTorch through its stable ABI. Shapes, dtypes, devices and contiguity are the callers'
// part (hpkernels/ops/<op>/cuda.py): nothing here is public.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>

#include "local_propagation/local_propagation.h"

// `python -m hpkernels` finds this text in the file, so that it can tell what was built where the library cannot load.
extern "C" __attribute__((used)) const char hpkernels_architectures[] = "hpkernels architectures: " HPK_ARCHITECTURES;

namespace {

using torch::stable::Tensor;

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Calls body(T{}) with T the floating-point type of `tensor`.
template <typename Body>
void with_type_of(const Tensor& tensor, Body body) {
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return body(float{});
    case torch::headeronly::ScalarType::Double:
      return body(double{});
    case torch::headeronly::ScalarType::Half:
      return body(__half{});
    case torch::headeronly::ScalarType::BFloat16:
      return body(__nv_bfloat16{});
    default:
      throw std::runtime_error("hpkernels: the CUDA kernels take float16, bfloat16, float32 and float64");
  }
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

template <bool backward>
void local_propagation_stencil(const Tensor& input, const Tensor& weights, const Tensor& output) {
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  with_type_of(input, [&](auto zero) {
    using T = decltype(zero);
    int64_t window = 1;
    while (window * window < weights.size(1)) ++window;
    const auto stencil =
        backward ? hpk::local_propagation_apply_backward_cuda<T> : hpk::local_propagation_apply_cuda<T>;
    stencil(data<T>(input), data<typename hpk::Accumulation<T>::type>(weights), input.size(0), input.size(1),
            input.size(2), input.size(3), window, data<T>(output), current_stream(input));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void local_propagation_apply(Tensor code, Tensor weights, Tensor mixed) {
  local_propagation_stencil<false>(code, weights, mixed);
}

void local_propagation_apply_backward(Tensor grad_mixed, Tensor weights, Tensor grad_code) {
  local_propagation_stencil<true>(grad_mixed, weights, grad_code);
}

}  // namespace

STABLE_TORCH_LIBRARY(hpkernels_cuda, m) {
  m.def("local_propagation_apply(Tensor code, Tensor weights, Tensor(a!) mixed) -> ()");
  m.def("local_propagation_apply_backward(Tensor grad_mixed, Tensor weights, Tensor(a!) grad_code) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(hpkernels_cuda, CUDA, m) {
  m.impl("local_propagation_apply", TORCH_BOX(&local_propagation_apply));
  m.impl("local_propagation_apply_backward", TORCH_BOX(&local_propagation_apply_backward));
}
