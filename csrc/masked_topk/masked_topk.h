// Launch signatures of masked_topk. All tensors are contiguous.
#pragma once

#include "common/coarse_products.h"

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

}  // namespace hpk
