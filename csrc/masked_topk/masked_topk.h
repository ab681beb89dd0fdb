// Launch signatures of masked_topk. All tensors are contiguous but where a stride says otherwise.
#pragma once

#include "common/coarse_products.h"
#include "common/cuda.h"

namespace hpk {

// Which pairs of a block of queries (rows) and the pool may not be chosen: where mask (rows, pool) is false, and where
// both groups are the same number >= 0. Mask and groups may be null.
struct Exclusions {
  const bool* mask;
  const int64_t* query_group;
  const int64_t* pool_group;
};

// The k greatest inner products of each query of a block with the pool, descending, ties to the lowest index; -inf and -1
// where fewer are allowed. `products` (rows, pool) are the coarse ones. A NaN in a row makes its values NaN. Returns how
// many inner products had to be computed.
template <typename Coarse, typename T>
int64_t masked_topk_select_cpu(ParallelFor run, const Coarse* products, const CoarseRows<T>& queries, int64_t rows,
                               const CoarseRows<T>& references, int64_t pool, const Exclusions& exclusions, int64_t k,
                               T* values, int64_t* indices);

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

// keys (queries, parts, k), k <= kMostTopk: the greatest keys (rank_keys.h) of each query and part of the pool, descending.
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
