// Launch signatures of the CUDA kernels of masked_topk.
#pragma once

#include "common/cuda.h"

namespace hpk {

constexpr int kMostTopk = 16;  // keys of a query in the registers of a thread

// Which references a query may choose: those whose mask is true, and of another group. Null is for no restriction.
struct TopkRestrictions {
  const bool* mask;  // (queries, references), elements mask_stride and mask_step apart
  int64_t mask_stride, mask_step;
  const int64_t *query_group, *pool_group;  // an equal one of at least 0 excludes the pair
};

struct TopkArguments {
  TopkRestrictions restrictions;
  int queries, references, k;
};

// In how many parts the pool is cut: the more the fewer queries there are.
int64_t masked_topk_parts(int64_t queries, int64_t references);

// values, indices (queries, parts): the greatest product of each query and part of the pool, -inf and -1 for none, without
// restrictions.
template <typename T>
void masked_topk_top1_cuda(const Rows<T>& query, const Rows<T>& pool, const TopkArguments& arguments, int parts,
                           float* values, int64_t* indices, cudaStream_t stream);
template <typename T>
void masked_topk_top1_sm90(const Rows<T>& query, const Rows<T>& pool, const TopkArguments& arguments, int parts,
                           float* values, int64_t* indices, cudaStream_t stream);

// keys (queries, parts, k), k <= kMostTopk: the greatest keys (keys.h) of each query and part of the pool, descending.
// below (queries): only keys less than this count; null for all.
template <typename T>
void masked_topk_cuda(const Rows<T>& query, const Rows<T>& pool, const TopkArguments& arguments, int parts,
                      const int64_t* below, int64_t* keys, cudaStream_t stream);
template <typename T>
void masked_topk_sm90(const Rows<T>& query, const Rows<T>& pool, const TopkArguments& arguments, int parts,
                      const int64_t* below, int64_t* keys, cudaStream_t stream);

// The gradients of the queries, rows of pool.dim, and of the pool, (parts, references, query.dim), still to be summed.
template <typename T>
void masked_topk_query_backward_cuda(const Rows<T>& pool, const int64_t* indices, const float* grad_values,
                                     int64_t queries, int k, T* grad_query, cudaStream_t stream);
template <typename T>
void masked_topk_pool_backward_cuda(const Rows<T>& query, const int64_t* order, const int64_t* first,
                                    const float* grad_values, int64_t references, int k, int parts, float* sums,
                                    cudaStream_t stream);

}  // namespace hpk
