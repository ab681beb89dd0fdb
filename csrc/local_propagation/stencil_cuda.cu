// The stencil of local_propagation and its transpose, see stencil.h.
#include <algorithm>
#include <limits>

#include "common/device.h"
#include "common/schedule.h"
#include "local_propagation/local_propagation.h"
#include "local_propagation/stencil.h"

namespace hpk {
namespace {

// Types

constexpr int kTaskThreads = 256;

// Such that blocks of half as many threads, as for 28 x 28 patches, have registers for four on a multiprocessor.
constexpr int kMostRuns = 448, kLeastBlocks = 2;

// Shared memory

constexpr int kPlaneStages = 3, kChunkBytes = 16;
constexpr int kZeros = 4 * kRunPatches;  // at the start of shared memory, for the rows that are outside the image

// Planes that are copied at a time: with 16 / sizeof(T) of them, a stage is as many chunks of 16 bytes as patches.
template <typename T>
constexpr int kStagePlanes = kChunkBytes / static_cast<int>(sizeof(T));

// Scheduler

// Each thread goes through some of the tasks.
template <bool transposed, typename T>
__device__ __forceinline__ void run_tasks(const T* input, const float* weights, const StencilShape& shape, T* output) {
  const int64_t step = int64_t{gridDim.x} * kTaskThreads, tasks = stencil_tasks(shape);
  for (int64_t task = int64_t{blockIdx.x} * kTaskThreads + threadIdx.x; task < tasks; task += step) {
    stencil_task<transposed>(input, weights, shape, task, output);
  }
}

// A thread has one run and its weights, for all planes of the block. The planes come through shared memory, kStagePlanes
// at a time, two stages ahead of the sums.
template <bool transposed, typename T>
__device__ __forceinline__ void run_planes(const T* input, const float* weights, const StencilShape& shape, int parts,
                                           T* output) {
  const int height = static_cast<int>(shape.height), width = static_cast<int>(shape.width), patches = height * width;
  const int dim = static_cast<int>(shape.dim), thread = threadIdx.x, threads = blockDim.x;
  const int64_t image = blockIdx.x / parts;
  const TileRange stages = part_of({0, divide_up(dim, kStagePlanes<T>)}, blockIdx.x % parts, parts);
  const int first = static_cast<int>(stages.first), last = static_cast<int>(stages.last);
  input += image * dim * patches;
  output += image * dim * patches;

  // Producer

  const auto planes_of = [&](int stage) {
    const int left = dim - stage * kStagePlanes<T>;
    return left < kStagePlanes<T> ? left : kStagePlanes<T>;
  };
  const auto place_of = [&](int stage) {
    const int before = (stage - first) % kPlaneStages * patches * kChunkBytes;
    return shared_memory() + kZeros * static_cast<int>(sizeof(T)) + before;
  };
  const auto load = [&](int stage) {
    if (stage < last) {
      const auto* const from = reinterpret_cast<const char*>(input + int64_t{stage} * kStagePlanes<T> * patches);
      const int bytes = planes_of(stage) * patches * static_cast<int>(sizeof(T));
      for (int at = thread * kChunkBytes; at < bytes; at += threads * kChunkBytes) {
        cp_async(place_of(stage) + at, from + at, bytes - at < kChunkBytes ? bytes - at : kChunkBytes);
      }
    }
    cp_async_commit();  // an empty group as well: groups are counted
  };

  // Consumer

  for (int stage = first; stage < first + kPlaneStages - 1; ++stage) load(stage);
  auto* const zeros = reinterpret_cast<T*>(shared_memory());
  if (thread < kZeros) zeros[thread] = static_cast<T>(0.0f);
  const bool has_run = thread < patches / kRunPatches;
  const StencilRun<transposed> run(weights + image * 9 * patches, height, width, has_run ? thread : 0);
  for (int stage = first; stage < last; ++stage) {
    cp_async_wait<kPlaneStages - 2>();
    __syncthreads();  // this stage is there for all, and all are done with the one before
    load(stage + kPlaneStages - 1);
    if (!has_run) continue;
    auto rows = run.rows(reinterpret_cast<const T*>(place_of(stage)), zeros + kRunPatches);
    T* to = output + int64_t{stage} * kStagePlanes<T> * patches;
    const int planes = planes_of(stage);
#pragma unroll 2  // two at a time overlap
    for (int plane = 0; plane < planes; ++plane) {
      float sums[kRunPatches];
      run.sum(rows, sums);
      run.store(sums, to);
      rows.next_plane();
      to += patches;
    }
  }
}

// Kernel

// mixed[b, d, p] = sum over cells of weights[b, cell, p] * code[b, d, p + offset(cell)], cells inside the image only
//
// Grid (blocks of tasks). Bytes: code and mixed once each, batch * dim * patches elements; weights, batch * window^2 *
// patches * 4, once for every kStencilPlanes planes. The neighbours of a patch come from cache.
template <typename T>
HPK_KERNEL(kTaskThreads)
local_propagation_apply_fwd_kernel(const T* __restrict__ code, const float* __restrict__ weights, StencilShape shape,
                                   T* __restrict__ mixed) {
  run_tasks<false>(code, weights, shape, mixed);
}

// grad_code[b, d, p] = sum over cells of (weights[b, cell, .] * grad_mixed[b, d, .])[p - offset(cell)], a gather too, so
// that no two threads write to one place and the order of the sum is fixed. Grid and bytes as above.
template <typename T>
HPK_KERNEL(kTaskThreads)
local_propagation_apply_bwd_kernel(const T* __restrict__ grad_mixed, const float* __restrict__ weights,
                                   StencilShape shape, T* __restrict__ grad_code) {
  run_tasks<true>(grad_mixed, weights, shape, grad_code);
}

// mixed[b, d, p] = as above, for a window of 3 x 3 and images of kMostRuns runs at most, whose rows are whole runs.
//
// Grid (images x parts of their planes), as many threads as an image has runs. Bytes: code and mixed once each, in
// pieces of 16 and 4 sizeof(T); weights, batch * 9 * patches * 4, once for every part. For each run and plane, 36
// additions of products and 9 loads from shared memory.
template <typename T>
HPK_KERNEL(kMostRuns, kLeastBlocks)
local_propagation_planes_fwd_kernel(const T* __restrict__ code, const float* __restrict__ weights, StencilShape shape,
                                    int parts, T* __restrict__ mixed) {
  run_planes<false>(code, weights, shape, parts, mixed);
}

// grad_code[b, d, p] = as above, for the same images. Grid and bytes as above.
template <typename T>
HPK_KERNEL(kMostRuns, kLeastBlocks)
local_propagation_planes_bwd_kernel(const T* __restrict__ grad_mixed, const float* __restrict__ weights,
                                    StencilShape shape, int parts, T* __restrict__ grad_code) {
  run_planes<true>(grad_mixed, weights, shape, parts, grad_code);
}

// Launch

template <bool transposed, typename T>
void apply(const T* input, const float* weights, const StencilShape& shape, T* output, cudaStream_t stream) {
  const int64_t patches = shape.height * shape.width;
  const int64_t runs = patches / kRunPatches;
  // Every image, and with it every stage of its planes, must start at a multiple of 16 bytes.
  const auto starts_chunk = [](uint64_t byte) { return byte % kChunkBytes == 0; };
  const bool aligned = starts_chunk(reinterpret_cast<uintptr_t>(input)) &&
                       starts_chunk(reinterpret_cast<uintptr_t>(output)) &&
                       (shape.batch == 1 || starts_chunk(shape.dim * patches * sizeof(T)));
  if (shape.window == 3 && shape.width % kRunPatches == 0 && runs <= kMostRuns && aligned) {
    const int64_t stages = divide_up(shape.dim, kStagePlanes<T>);
    const auto parts = static_cast<int>(parts_for(shape.batch, stages, kWantedBlocks, 4));
    const auto blocks = static_cast<unsigned>(shape.batch * parts);
    const auto kernel = transposed ? local_propagation_planes_bwd_kernel<T> : local_propagation_planes_fwd_kernel<T>;
    const size_t shared_bytes = kZeros * sizeof(T) + kPlaneStages * static_cast<size_t>(patches) * kChunkBytes;
    return launch(kernel, blocks, static_cast<int>(divide_up(runs, 32) * 32), shared_bytes, stream, input, weights,
                  shape, parts, output);
  }
  const int64_t wanted = divide_up(stencil_tasks(shape), kTaskThreads);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(wanted, std::numeric_limits<int32_t>::max()));
  const auto kernel = transposed ? local_propagation_apply_bwd_kernel<T> : local_propagation_apply_fwd_kernel<T>;
  launch(kernel, blocks, kTaskThreads, 0, stream, input, weights, shape, output);
}

}  // namespace

template <typename T>
void local_propagation_apply_cuda(const T* code, const float* weights, int64_t batch, int64_t dim, int64_t height,
                                  int64_t width, int64_t window, T* mixed, cudaStream_t stream) {
  apply<false>(code, weights, {batch, dim, height, width, window}, mixed, stream);
}

template <typename T>
void local_propagation_apply_backward_cuda(const T* grad_mixed, const float* weights, int64_t batch, int64_t dim,
                                           int64_t height, int64_t width, int64_t window, T* grad_code,
                                           cudaStream_t stream) {
  apply<true>(grad_mixed, weights, {batch, dim, height, width, window}, grad_code, stream);
}

#define HPK_INSTANTIATE(T)                                                                                            \
  template void local_propagation_apply_cuda<T>(const T*, const float*, int64_t, int64_t, int64_t, int64_t, int64_t,  \
                                                T*, cudaStream_t);                                                    \
  template void local_propagation_apply_backward_cuda<T>(const T*, const float*, int64_t, int64_t, int64_t, int64_t,  \
                                                         int64_t, T*, cudaStream_t);
HPK_INSTANTIATE(float)
HPK_INSTANTIATE(__half)
HPK_INSTANTIATE(__nv_bfloat16)
#undef HPK_INSTANTIATE

}  // namespace hpk
