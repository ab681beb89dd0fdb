// The gradients of masked_topk, and its launches on the engine that the device and the rows have.
#include <cstring>

#include "engines/strip_sm80.cuh"
#include "masked_topk/masked_topk.cuh"

namespace hpk {
namespace {

// Types

constexpr int kWarps = 8, kThreads = 32 * kWarps;

// Consumer

// Sums, times factors, of the 16 bytes that a lane has of each row.
template <class T>
struct WeightedSum {
  static constexpr int kNumbers = 16 / sizeof(T);
  float sums[kNumbers] = {};

  __device__ __forceinline__ void add(float factor, const T* from) {
    const uint4 bytes = __ldg(reinterpret_cast<const uint4*>(from));
    T numbers[kNumbers];
    std::memcpy(static_cast<void*>(numbers), &bytes, sizeof bytes);
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) sums[i] += factor * static_cast<float>(numbers[i]);
  }

  __device__ __forceinline__ void store(T* to) const {
    T numbers[kNumbers];
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) numbers[i] = T(sums[i]);
    uint4 bytes;
    std::memcpy(&bytes, static_cast<const void*>(numbers), sizeof bytes);
    *reinterpret_cast<uint4*>(to) = bytes;
  }
};

// Kernel

// grad_query_i = sum over t of grad_values[i, t] pool[indices[i, t]], of indices that are not -1.
//
// Grid (queries / kWarps): a warp has a query. Bytes: k rows of the pool and 12 k a query; a row written.
template <class T>
HPK_KERNEL(kThreads)
masked_topk_query_bwd_kernel(const __grid_constant__ Rows<T> pool, const int64_t* __restrict__ indices,
                             const float* __restrict__ grad_values, int64_t queries, int k,
                             T* __restrict__ grad_query) {
  using Sum = WeightedSum<T>;
  const int64_t query = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (query >= queries) return;
  const int lane = threadIdx.x % 32;
  for (int feature = lane * Sum::kNumbers; feature < pool.dim; feature += 32 * Sum::kNumbers) {
    Sum sum;
    for (int64_t t = query * k; t < (query + 1) * k; ++t) {
      if (indices[t] >= 0) sum.add(grad_values[t], pool.data + indices[t] * pool.stride + feature);
    }
    sum.store(grad_query + query * pool.dim + feature);
  }
}

// sums[s, m] = sum over {(i, t) in part s of those with indices[i, t] = m} of grad_values[i, t] query_i; the places
// i k + t of reference m are order[first[m]] to order[first[m + 1] - 1].
//
// Grid (references, parts): each warp takes every kWarps-th place. Bytes: 12 and a row of queries a place; rows of
// float32 written.
template <class T>
HPK_KERNEL(kThreads)
masked_topk_pool_bwd_kernel(const __grid_constant__ Rows<T> query, const int64_t* __restrict__ order,
                            const int64_t* __restrict__ first, const float* __restrict__ grad_values, int k,
                            float* __restrict__ sums) {
  using Sum = WeightedSum<T>;
  constexpr int kSegment = 32 * Sum::kNumbers;
  auto* const of_warps = reinterpret_cast<float(*)[kSegment]>(shared_memory());
  const int64_t reference = blockIdx.x;
  const TileRange places = part_of({first[reference], first[reference + 1]}, blockIdx.y, gridDim.y);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  for (int segment = 0; segment < query.dim; segment += kSegment) {
    const int feature = segment + lane * Sum::kNumbers;
    Sum sum;
    if (feature < query.dim) {
      for (int64_t place = places.first + warp; place < places.last; place += kWarps) {
        const int64_t entry = order[place];
        sum.add(grad_values[entry], query.data + entry / k * query.stride + feature);
      }
    }
#pragma unroll
    for (int i = 0; i < Sum::kNumbers; ++i) of_warps[warp][i * 32 + lane] = sum.sums[i];
    __syncthreads();
    for (int i = thread; i < kSegment && segment + i < query.dim; i += kThreads) {
      float total = 0;
      for (int other = 0; other < kWarps; ++other) total += of_warps[other][i % Sum::kNumbers * 32 + i / Sum::kNumbers];
      sums[(int64_t{blockIdx.y} * gridDim.x + reference) * query.dim + segment + i] = total;
    }
    __syncthreads();
  }
}

}  // namespace

// Launch

int64_t masked_topk_parts(int64_t queries, int64_t references) {
  // Few: of k keys each part finds many that are not among the greatest in the end.
  const int64_t strips = divide_up(queries, Geometry80::kRows), tiles = divide_up(references, Geometry80::kColumns);
  return parts_for(strips, tiles, kWantedBlocks / 2, 2);
}

template <typename T>
void masked_topk_top1_cuda(const Rows<T>& query, const Rows<T>& pool, const TopkArguments& arguments, int parts,
                           float* values, int64_t* indices, cudaStream_t stream) {
#ifdef HPK_WITH_SM90
  if constexpr (sizeof(T) == 2) {
    if (runs_on_sm90(query)) return masked_topk_top1_sm90(query, pool, arguments, parts, values, indices, stream);
  }
#endif
  launch_top1<StripSm80<T, Geometry80, true>>({query, pool}, arguments, parts, values, indices, stream);
}

template <typename T>
void masked_topk_cuda(const Rows<T>& query, const Rows<T>& pool, const TopkArguments& arguments, int parts,
                      const int64_t* below, int64_t* keys, cudaStream_t stream) {
#ifdef HPK_WITH_SM90
  if constexpr (sizeof(T) == 2) {
    if (runs_on_sm90(query)) return masked_topk_sm90(query, pool, arguments, parts, below, keys, stream);
  }
#endif
  // Half of the rows, so that products of 32 columns fit into shared memory as well.
  launch_topk<StripSm80<T, WarpGeometry80<2>, true>>({query, pool}, arguments, parts, below, keys, stream);
}

template <typename T>
void masked_topk_query_backward_cuda(const Rows<T>& pool, const int64_t* indices, const float* grad_values,
                                     int64_t queries, int k, T* grad_query, cudaStream_t stream) {
  launch(masked_topk_query_bwd_kernel<T>, dim3(static_cast<unsigned>(divide_up(queries, kWarps))), kThreads, 0, stream,
         pool, indices, grad_values, queries, k, grad_query);
}

template <typename T>
void masked_topk_pool_backward_cuda(const Rows<T>& query, const int64_t* order, const int64_t* first,
                                    const float* grad_values, int64_t references, int k, int parts, float* sums,
                                    cudaStream_t stream) {
  constexpr size_t shared_bytes = kWarps * 32 * sizeof(WeightedSum<T>);
  const dim3 grid(static_cast<unsigned>(references), static_cast<unsigned>(parts));
  launch(masked_topk_pool_bwd_kernel<T>, grid, kThreads, shared_bytes, stream, query, order, first, grad_values, k,
         sums);
}

#define HPK_INSTANTIATE(T)                                                                                            \
  template void masked_topk_top1_cuda<T>(const Rows<T>&, const Rows<T>&, const TopkArguments&, int, float*, int64_t*, \
                                         cudaStream_t);                                                               \
  template void masked_topk_cuda<T>(const Rows<T>&, const Rows<T>&, const TopkArguments&, int, const int64_t*,        \
                                    int64_t*, cudaStream_t);                                                          \
  template void masked_topk_query_backward_cuda<T>(const Rows<T>&, const int64_t*, const float*, int64_t, int, T*,    \
                                                   cudaStream_t);                                                     \
  template void masked_topk_pool_backward_cuda<T>(const Rows<T>&, const int64_t*, const int64_t*, const float*,       \
                                                  int64_t, int, int, float*, cudaStream_t);
HPK_INSTANTIATE(float)
HPK_INSTANTIATE(__half)
HPK_INSTANTIATE(__nv_bfloat16)
#undef HPK_INSTANTIATE

}  // namespace hpk
