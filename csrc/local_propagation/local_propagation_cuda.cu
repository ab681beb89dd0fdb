#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <limits>

#include "local_propagation/local_propagation.h"
#include "local_propagation/stencil.h"

namespace hpk {
namespace {

constexpr int kThreads = 256;

// mixed[b, d, p] = sum over cells of weights[b, cell, p] * code[b, d, p + offset(cell)], cells inside the image only.
// Bytes: code and mixed once each, batch * dim * patches elements of T; weights, batch * window^2 * patches elements of
// A, once for every kStencilPlanes planes. The neighbours of a patch come from cache.
template <typename T, typename A>
__global__ void __launch_bounds__(kThreads)
    local_propagation_apply_fwd_kernel(const T* __restrict__ code, const A* __restrict__ weights, StencilShape shape,
                                       T* __restrict__ mixed) {
  const int64_t step = int64_t{gridDim.x} * kThreads, tasks = stencil_tasks(shape);
  for (int64_t task = int64_t{blockIdx.x} * kThreads + threadIdx.x; task < tasks; task += step) {
    stencil_task<false>(code, weights, shape, task, mixed);
  }
}

// grad_code[b, d, p] = sum over cells of (weights[b, cell, .] * grad_mixed[b, d, .])[p - offset(cell)], that is over the
// patches whose window holds p: a gather, so no two threads write to one place and the order of the sum is fixed.
// Bytes: grad_mixed and grad_code once each; weights once for every kStencilPlanes planes.
template <typename T, typename A>
__global__ void __launch_bounds__(kThreads)
    local_propagation_apply_bwd_kernel(const T* __restrict__ grad_mixed, const A* __restrict__ weights,
                                       StencilShape shape, T* __restrict__ grad_code) {
  const int64_t step = int64_t{gridDim.x} * kThreads, tasks = stencil_tasks(shape);
  for (int64_t task = int64_t{blockIdx.x} * kThreads + threadIdx.x; task < tasks; task += step) {
    stencil_task<true>(grad_mixed, weights, shape, task, grad_code);
  }
}

unsigned blocks_for(const StencilShape& shape) {
  const int64_t wanted = (stencil_tasks(shape) + kThreads - 1) / kThreads;
  return static_cast<unsigned>(std::min<int64_t>(wanted, std::numeric_limits<int32_t>::max()));
}

}  // namespace

template <typename T>
void local_propagation_apply_cuda(const T* code, const typename Accumulation<T>::type* weights, int64_t batch,
                                  int64_t dim, int64_t height, int64_t width, int64_t window, T* mixed,
                                  cudaStream_t stream) {
  const StencilShape shape{batch, dim, height, width, window};
  local_propagation_apply_fwd_kernel<<<blocks_for(shape), kThreads, 0, stream>>>(code, weights, shape, mixed);
}

template <typename T>
void local_propagation_apply_backward_cuda(const T* grad_mixed, const typename Accumulation<T>::type* weights,
                                           int64_t batch, int64_t dim, int64_t height, int64_t width, int64_t window,
                                           T* grad_code, cudaStream_t stream) {
  const StencilShape shape{batch, dim, height, width, window};
  local_propagation_apply_bwd_kernel<<<blocks_for(shape), kThreads, 0, stream>>>(grad_mixed, weights, shape, grad_code);
}

#define HPK_INSTANTIATE(T)                                                                                            \
  template void local_propagation_apply_cuda<T>(const T*, const Accumulation<T>::type*, int64_t, int64_t, int64_t,    \
                                                int64_t, int64_t, T*, cudaStream_t);                                  \
  template void local_propagation_apply_backward_cuda<T>(const T*, const Accumulation<T>::type*, int64_t, int64_t,    \
                                                         int64_t, int64_t, int64_t, T*, cudaStream_t);
HPK_INSTANTIATE(float)
HPK_INSTANTIATE(double)
HPK_INSTANTIATE(__half)
HPK_INSTANTIATE(__nv_bfloat16)
#undef HPK_INSTANTIATE

}  // namespace hpk
