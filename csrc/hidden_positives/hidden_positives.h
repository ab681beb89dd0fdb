// Launch signatures of hidden_positives. All tensors are contiguous.
#pragma once

#include "common/coarse_products.h"
#include "common/cuda.h"

namespace hpk {

// A tile of coarse products (rows, columns): of anchors from `row` on with anchors or keys from `column` on.
template <typename Coarse>
struct ProductTile {
  const Coarse* products;
  int64_t row, rows, column, columns;
};

// Threshold and pack a tile:
//   bit (i, j) = i != j and <f_i, f_j> > min(threshold_i, threshold_j), or > threshold_i if not symmetric
// for its rows i and its columns j > i, and by the same products bits (j, i). Row and column are multiples of 32, and so
// are rows and columns unless they reach the last anchor; row <= column. Every word of `bits` (anchors, words_per_row) that
// a tile is about is written, none is read. Returns how many pairs were too close to call by their coarse product.
template <typename Coarse, typename T>
int64_t hidden_positives_pack_cpu(ParallelFor run, const ProductTile<Coarse>& tile, const CoarseRows<T>& features,
                                  const T* threshold, bool symmetric, int64_t anchors, uint32_t* bits);

// The keys that anchors meet, and what products must exceed: the thresholds of both or, if `either`, one of them. Key
// `first` + i is anchor i, which is not its own positive; `first` is less than minus the last anchor where there is none.
template <typename T>
struct Keys {
  CoarseRows<T> features;
  int64_t count;
  const T* threshold;
  bool either;
  int64_t first;
};

// Threshold and pack a tile of anchors and keys:
//   bit (i, j) = first + i != j and <f_i, k_j> > max(threshold_i, key_threshold_j), or > min(...) if either
// Every word of `bits` (anchors, words_per_row of the keys) that the tile is about is written, none is read. Column is a
// multiple of 32, and so are columns unless they reach the last key. Returns how many pairs were too close to call.
template <typename Coarse, typename T>
int64_t hidden_positives_pack_between_cpu(ParallelFor run, const ProductTile<Coarse>& tile, const CoarseRows<T>& features,
                                          const T* threshold, const Keys<T>& keys, uint32_t* bits);

// The relation of all anchors, (anchors, words_per_row), from their features. For float, products are those of 3 TF32. The
// thresholds start at a multiple of 16 bytes, and NaN follows the last up to a multiple of kThresholdsTogether.
constexpr int kThresholdsTogether = 256;
template <typename T>
void hidden_positives_cuda(const Rows<T>& features, const float* threshold, bool symmetric, uint32_t* bits,
                           cudaStream_t stream);
// The same for sm_90a, rows of up to kMostSm90Bytes; for __half and __nv_bfloat16.
template <typename T>
void hidden_positives_sm90(const Rows<T>& features, const float* threshold, bool symmetric, uint32_t* bits,
                           cudaStream_t stream);

// What decides a relation of anchors and keys, (anchors, words_per_row of the keys): as `Keys` says, with thresholds that
// are both padded like those above.
struct BetweenArguments {
  const float* threshold;
  const float* key_threshold;
  int64_t anchors, keys;
  int first;
  uint32_t* bits;
};
template <typename T>
void hidden_positives_between_cuda(const Rows<T>& features, const Rows<T>& keys, const BetweenArguments& arguments,
                                   bool either, cudaStream_t stream);
template <typename T>
void hidden_positives_between_sm90(const Rows<T>& features, const Rows<T>& keys, const BetweenArguments& arguments,
                                   bool either, cudaStream_t stream);

// The transpose of a packed relation (rows, columns) as (columns, words_per_row(rows)).
void transpose_bits_cpu(ParallelFor run, const uint32_t* bits, int64_t rows, int64_t columns, uint32_t* transposed);

}  // namespace hpk
