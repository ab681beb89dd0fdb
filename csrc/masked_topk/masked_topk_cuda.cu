#include "common/strip_sm80.cuh"
#include "masked_topk/masked_topk.cuh"

namespace hpk {
namespace {

constexpr int kThreads = 128;

// grad_query_i = sum over t of grad_values[i, t] pool[indices[i, t]], of indices that are not -1.
//
// Grid (queries). Bytes: k rows of the pool and 12 k a query; a row written.
template <class T>
HPK_KERNEL(kThreads)
masked_topk_query_bwd_kernel(const __grid_constant__ Rows<T> pool, const int64_t* __restrict__ indices,
                             const float* __restrict__ grad_values, int k, T* __restrict__ grad_query, int dim) {
  const int64_t query = blockIdx.x;
  for (int feature = threadIdx.x; feature < dim; feature += kThreads) {
    float sum = 0;
    for (int64_t t = query * k; t < (query + 1) * k; ++t) {
      if (indices[t] < 0) continue;
      sum += grad_values[t] * static_cast<float>(pool.data[indices[t] * pool.stride + feature]);
    }
    grad_query[query * dim + feature] = T(sum);
  }
}

// sums[s, m] = sum over {(i, t) in part s of those with indices[i, t] = m} of grad_values[i, t] query_i; the places i k + t
// of reference m are order[first[m]] to order[first[m + 1] - 1].
//
// Grid (references, parts). Bytes: 12 and a row of queries a place; rows of float32 written.
template <class T>
HPK_KERNEL(kThreads)
masked_topk_pool_bwd_kernel(const __grid_constant__ Rows<T> query, const int64_t* __restrict__ order,
                            const int64_t* __restrict__ first, const float* __restrict__ grad_values, int k,
                            float* __restrict__ sums, int dim) {
  const int64_t reference = blockIdx.x;
  const TileRange places = part_of({first[reference], first[reference + 1]}, blockIdx.y, gridDim.y);
  for (int feature = threadIdx.x; feature < dim; feature += kThreads) {
    float sum = 0;
    for (int64_t place = places.first; place < places.last; ++place) {
      const int64_t entry = order[place];
      sum += grad_values[entry] * static_cast<float>(query.data[entry / k * query.stride + feature]);
    }
    sums[(int64_t{blockIdx.y} * gridDim.x + reference) * dim + feature] = sum;
  }
}

}  // namespace

int64_t masked_topk_parts(int64_t queries, int64_t references) {
  return parts_for(divide_up(queries, Geometry80::kRows), divide_up(references, Geometry80::kColumns), kWantedBlocks, 2);
}

template <typename T>
void masked_topk_top1_cuda(const Rows<T>& query, const Rows<T>& pool, const TopkArguments& arguments, int parts,
                           float* values, int64_t* indices, cudaStream_t stream) {
#ifdef HPK_WITH_SM90
  if constexpr (sizeof(T) == 2) {
    if (runs_on_sm90(query)) return masked_topk_top1_sm90(query, pool, arguments, parts, values, indices, stream);
  }
#endif
  launch_top1<StripSm80<T>>({query, pool}, arguments, parts, values, indices, stream);
}

template <typename T>
void masked_topk_cuda(const Rows<T>& query, const Rows<T>& pool, const TopkArguments& arguments, int parts,
                      int64_t* keys, cudaStream_t stream) {
#ifdef HPK_WITH_SM90
  if constexpr (sizeof(T) == 2) {
    if (runs_on_sm90(query)) return masked_topk_sm90(query, pool, arguments, parts, keys, stream);
  }
#endif
  // Half of the rows, so that products of 32 columns fit into shared memory as well.
  launch_topk<StripSm80<T, WarpGeometry80<2>>>({query, pool}, arguments, parts, keys, stream);
}

template <typename T>
void masked_topk_query_backward_cuda(const Rows<T>& pool, const int64_t* indices, const float* grad_values,
                                     int64_t queries, int k, T* grad_query, int dim, cudaStream_t stream) {
  launch(masked_topk_query_bwd_kernel<T>, dim3(static_cast<unsigned>(queries)), kThreads, 0, stream, pool, indices,
         grad_values, k, grad_query, dim);
}

template <typename T>
void masked_topk_pool_backward_cuda(const Rows<T>& query, const int64_t* order, const int64_t* first,
                                    const float* grad_values, int64_t references, int k, int parts, float* sums, int dim,
                                    cudaStream_t stream) {
  launch(masked_topk_pool_bwd_kernel<T>, dim3(static_cast<unsigned>(references), static_cast<unsigned>(parts)), kThreads,
         0, stream, query, order, first, grad_values, k, sums, dim);
}

#define HPK_INSTANTIATE(T)                                                                                             \
  template void masked_topk_top1_cuda<T>(const Rows<T>&, const Rows<T>&, const TopkArguments&, int, float*, int64_t*,  \
                                         cudaStream_t);                                                                \
  template void masked_topk_cuda<T>(const Rows<T>&, const Rows<T>&, const TopkArguments&, int, int64_t*, cudaStream_t); \
  template void masked_topk_query_backward_cuda<T>(const Rows<T>&, const int64_t*, const float*, int64_t, int, T*, int, \
                                                   cudaStream_t);                                                      \
  template void masked_topk_pool_backward_cuda<T>(const Rows<T>&, const int64_t*, const int64_t*, const float*, int64_t, \
                                                  int, int, float*, int, cudaStream_t);
HPK_INSTANTIATE(float)
HPK_INSTANTIATE(__half)
HPK_INSTANTIATE(__nv_bfloat16)
#undef HPK_INSTANTIATE

}  // namespace hpk
