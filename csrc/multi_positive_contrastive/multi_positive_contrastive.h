// Launch signatures of multi_positive_contrastive. All tensors are contiguous; relations are bit-packed.
//
//   l_ij = <z_i, z_j> / temperature,  Den_ij = i != j and (A_ij or R[i % G, j])
//   forward:  logDen_i = log sum_{j in Den_i} exp l_ik, and sums of l_ij over A_i and over S_i
//   backward: dz_i = sum_j (g_ij + g_ji) z_j / temperature,
//             g_ij = push_i Den_ij exp(l_ij - logDen_i) - pull_i A_ij - pull_specific_i S_ij
//
// Two routes give the same result. "sparse" computes the logits of the pairs in A, S and R alone. "dense" is handed
// blocks of all logits.
#pragma once

#include "common/threads.h"

namespace hpk {

// The relations of N anchors. Transposed ones are equal to the others for symmetric relations.
struct Relations {
  int64_t anchors;             // N
  int64_t per_image;           // G
  const uint32_t* agnostic;    // A (N, words_per_row(N))
  const uint32_t* agnostic_t;  // its transpose; backward only
  const uint32_t* specific;    // S, or null
  const uint32_t* specific_t;
  const uint32_t* negatives;    // R (G, words_per_row(N))
  const uint32_t* negatives_t;  // its transpose (N, words_per_row(G)); backward only
};

// What forward finds out about each anchor, (N,) each.
template <typename T>
struct AnchorSums {
  T* log_denominator;    // -inf for an empty denominator
  T* agnostic_logits;    // sum of l_ij over A_i
  T* specific_logits;    // sum of l_ij over S_i
  int64_t* agnostic_count;  // |A_i|
  int64_t* specific_count;  // |S_i|
};

// What backward needs to know of each anchor, (N,) each.
template <typename T>
struct AnchorCoefficients {
  const T* log_denominator;
  const T* push;
  const T* pull;
  const T* pull_specific;
};

// R as bits: word `word` of row `row`, for all words of all rows.
void draw_negatives_cpu(ParallelFor run, uint64_t seed, int64_t rows, int64_t columns, double rate, uint32_t* bits);

template <typename T>
void contrastive_sparse_forward_cpu(ParallelFor run, const T* z, int64_t dim, T inverse_temperature,
                                    const Relations& relations, const AnchorSums<T>& sums);

template <typename T>
void contrastive_sparse_backward_cpu(ParallelFor run, const T* z, int64_t dim, T inverse_temperature,
                                     const Relations& relations, const AnchorCoefficients<T>& anchors, T* grad_z);

// Blocks of the dense route: `products` (rows, N) are <z_i, z_j> of the rows i in [first, first + rows); overwritten.
template <typename T>
void contrastive_dense_forward_cpu(ParallelFor run, T* products, int64_t first, int64_t rows,
                                   T inverse_temperature, const Relations& relations, const AnchorSums<T>& sums);

// Replaces the products by (g_ij + g_ji) / temperature, to be multiplied with z.
template <typename T>
void contrastive_dense_backward_cpu(ParallelFor run, T* products, int64_t first, int64_t rows, T inverse_temperature,
                                    const Relations& relations, const AnchorCoefficients<T>& anchors);

}  // namespace hpk
