// Launch signatures of masked_topk. All tensors are contiguous.
#pragma once

#include "common/threads.h"

namespace hpk {

// The k greatest of each row of `products` (rows, pool), descending, ties to the lowest index; -inf and -1 where fewer
// are allowed. A reference is left out where mask (rows, pool) is false or where both groups are the same number >= 0;
// mask and groups may be null. `products` is overwritten. A NaN in a row makes its values NaN.
template <typename T>
void masked_topk_select_cpu(ParallelFor run, T* products, const bool* mask, const int64_t* query_group,
                            const int64_t* pool_group, int64_t rows, int64_t pool, int64_t k, T* values,
                            int64_t* indices);

}  // namespace hpk
