// Launch signatures of multi_positive_contrastive. All tensors are contiguous; relations are bit-packed.
//
//   l_ij = <z_i, z_j> / temperature,  Den_ij = i != j and (A_ij or R[i % G, j])
//   forward:  logDen_i = log sum_{j in Den_i} exp l_ij, and sums of l_ij over A_i and over S_i
//   backward: dz_i = sum_j (g_ij + g_ji) z_j / temperature,
//             g_ij = push_i Den_ij exp(l_ij - logDen_i) - pull_i A_ij - pull_specific_i S_ij
//
// Pairs are covered in one of three ways, and every pair in one of them only:
//   blocks   all pairs of some anchors with some others; their products are made by the caller;
//   sampled  the pairs in R: anchors at one patch position share their negatives, so these are gathered products;
//   rows     the pairs in A or S, row by row, and in the denominator those that R has not.
// One block of everything is the dense route; sampled and rows alone are the sparse one; between them lies a block
// for each image, which holds most positives, and the other two for the pairs of two images (`across_images`).
//
// What is computed is of the anchors [first, first + rows), some whole images, against all: forward their sums, backward
// their gradients, which takes the coefficients of all anchors.
#pragma once

#include "common/parallel_for.h"

namespace hpk {

// The relations of some anchors to all N. The transposes of symmetric relations are the relations themselves.
struct Relations {
  int64_t anchors;             // N
  int64_t per_image;           // G
  int64_t first, rows;         // whose rows A, S and their transposes have
  const uint32_t* agnostic;    // A (rows, words_per_row(N))
  const uint32_t* agnostic_t;  // its transpose; backward only
  const uint32_t* specific;    // S, or null
  const uint32_t* specific_t;
  const uint32_t* negatives;    // R (G, words_per_row(N))
  const uint32_t* negatives_t;  // its transpose (N, words_per_row(G)); blocks in backward only
};

// What forward finds out about each anchor, (rows,) each, and adds to what it finds there.
template <typename T>
struct AnchorSums {
  T* log_denominator;    // log of a sum of exponentials; -inf for none
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

// How many pairs of the anchors are in A, in S and in R: in all, and within the images.
struct PairCounts {
  int64_t all, within_images;
};
PairCounts count_pairs_cpu(ParallelFor run, const Relations& relations);

// A block: the products <z_i, z_j> (rows, columns) of anchors i from `row` and j from `column` on; overwritten. The columns
// are whole images, or a part of one; the rows are among [first, first + rows).
template <typename T>
struct Block {
  T* products;
  int64_t row, rows, column, columns;
};

template <typename T>
void contrastive_block_forward_cpu(ParallelFor run, const Block<T>& block, T inverse_temperature,
                                   const Relations& relations, const AnchorSums<T>& sums);

// Replaces the products by (g_ij + g_ji) / temperature, to be multiplied with z.
template <typename T>
void contrastive_block_backward_cpu(ParallelFor run, const Block<T>& block, T inverse_temperature,
                                    const Relations& relations, const AnchorCoefficients<T>& anchors);

template <typename T>
void contrastive_sampled_forward_cpu(ParallelFor run, const T* z, int64_t dim, T inverse_temperature,
                                     const Relations& relations, bool across_images, const AnchorSums<T>& sums);

// Adds to grad_z (rows, dim).
template <typename T>
void contrastive_sampled_backward_cpu(ParallelFor run, const T* z, int64_t dim, T inverse_temperature,
                                      const Relations& relations, bool across_images,
                                      const AnchorCoefficients<T>& anchors, T* grad_z);

template <typename T>
void contrastive_rows_forward_cpu(ParallelFor run, const T* z, int64_t dim, T inverse_temperature,
                                       const Relations& relations, bool across_images, const AnchorSums<T>& sums);

// Adds to grad_z (rows, dim).
template <typename T>
void contrastive_rows_backward_cpu(ParallelFor run, const T* z, int64_t dim, T inverse_temperature,
                                        const Relations& relations, bool across_images,
                                        const AnchorCoefficients<T>& anchors, T* grad_z);

}  // namespace hpk
