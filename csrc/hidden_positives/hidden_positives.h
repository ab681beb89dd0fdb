// Launch signatures of hidden_positives. All tensors are contiguous.
#pragma once

#include "common/threads.h"

namespace hpk {

// Threshold and pack a block of inner products:
//   bit (i, j) = i != j and <f_i, f_j> > min(threshold_i, threshold_j)
// for rows i in [first, first + rows) and columns j > i, and the same bit of (j, i). `products` holds
// <f_i, f_j> for j in [first, anchors), row after row; `first` is a multiple of 32, and so is `rows` unless it is the
// last block. Every word of `bits` (anchors, words_per_row) that a block is about is written, none is read.
template <typename T>
void hidden_positives_pack_cpu(ParallelFor run, const T* products, const T* threshold, int64_t first, int64_t rows,
                               int64_t anchors, uint32_t* bits);

// The transpose of a packed relation (rows, columns) as (columns, words_per_row(rows)).
void transpose_bits_cpu(ParallelFor run, const uint32_t* bits, int64_t rows, int64_t columns, uint32_t* transposed);

}  // namespace hpk
