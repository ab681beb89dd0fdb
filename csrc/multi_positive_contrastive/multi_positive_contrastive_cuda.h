// Launch signatures of the CUDA kernels of multi_positive_contrastive, whose formulas are in multi_positive_contrastive.h.
// All tensors are contiguous unless a pitch or stride says otherwise; relations are bit-packed.
//
// Lists: the columns of the set bits of row i, ascending, are columns[offsets[i]] to columns[offsets[i + 1] - 1]. Kernels
// that read or write lists do nothing unless *enabled, which says that all columns fit.
#pragma once

#include "common/cuda.h"

namespace hpk {

// R as bits (rows, words_per_row(columns)): bit j of row i is set if its random word is below `threshold`; and how many
// are set in each row.
void draw_negatives_cuda(const int64_t* seed, uint64_t threshold, int64_t rows, int64_t columns, uint32_t* bits,
                         int32_t* counts, cudaStream_t stream);

// The transpose of a packed relation (rows, columns) as (columns, words_per_row(rows)).
void transpose_bits_cuda(const uint32_t* bits, int64_t rows, int64_t columns, uint32_t* transposed,
                         cudaStream_t stream);

// The bits of `rows` rows of `words` words, `pitch` words apart: those of one mask, or of two together. With a group,
// row i is without the columns of its own, which are `group` from i / group * group on; 0 is for no groups.
struct BitRows {
  const uint32_t *first, *second;  // second is null for one mask
  int64_t rows, words, pitch, group;
};

// How many bits of each row are set.
void count_bits_cuda(const BitRows& bits, int32_t* counts, cudaStream_t stream);

// offsets (count + 1): the sums of the counts before each row, and of all. If there is `enabled`, it becomes 0 where
// the last is above `capacity`.
void list_offsets_cuda(const int32_t* counts, int64_t count, int64_t capacity, int64_t* offsets, int32_t* enabled,
                       cudaStream_t stream);

// The lists of the set bits; what is beyond `capacity` is left out.
void list_bits_cuda(const BitRows& bits, const int64_t* offsets, const int32_t* enabled, int64_t capacity,
                    int32_t* columns, cudaStream_t stream);

// Listed pairs of anchors: each is in A, in S or in both. Row i of the lists is columns[ranges[2 i]] and so on, before
// ranges[2 i + 1], ascending. They count where state[0] is 0; without lists `ranges` is null.
template <typename T>
struct ListedPairs {
  Rows<T> z;
  const uint32_t *positives, *specific, *negatives;  // A, S or null, R (group, words)
  int64_t group;
  const int64_t* state;
  const int64_t* ranges;
  const int32_t* columns;
  float scale;  // of logits
};

// What the other kernels of forward have found, and what is made of it. Parts (count, 3, N): log sum over Den of exp of
// the logits, and their sums over A and over S: of the blocks of all pairs, or, where the lists count, of those within
// the images; then log_sums (N) are of the sampled negatives.
struct RowParts {
  const float* weights;  // (N, 4): numbers of A_i and S_i, what a pair in A and one in S counts in the loss of an image
  float loss_scale;      // over max(state[1], 1) images for A, state[2] for S, of all losses of images
  const float* square;   // NaN if z is not finite
  const float* blocks;
  int64_t blocks_count;
  const float* within;
  int64_t within_count;
  const float* log_sums;
  float* rows;           // (N, 4) statistics
  float* losses;         // (contrastive_rows_parts) parts of the loss, of which one is NaN if square is
};

int64_t contrastive_rows_parts(int64_t anchors);

template <typename T>
void contrastive_rows_forward_cuda(const ListedPairs<T>& pairs, const RowParts& parts, cudaStream_t stream);

// The columns [first, last), and what is staged for them: of column j the places slot_ranges[2 j] and so on, before
// slot_ranges[2 j + 1], of_place rows each, which have the length of those of z. Null rows: nothing is.
template <typename T>
struct StagedColumns {
  const int64_t* slot_ranges;
  int64_t first, last, of_place;
  T* rows;
};

// sums_i (N, dim of z) += the staged rows of i, for the columns of a stage. If `factor` is not null also += the sum over
// the listed pairs of (g_ij + g_ji) z_j, of Den only what is in A but not in R, and out_i = factor sums_i, of which
// there are out_dim numbers. A and S are symmetric. `numbers` (N, 4) are r, f, pull and specific pull, with
// f_i exp(l - r_i) = push_i exp(l - logDen_i).
template <typename T>
void contrastive_rows_backward_cuda(const ListedPairs<T>& pairs, const StagedColumns<T>& staged, const float* numbers,
                                    float* sums, const float* factor, T* out, int out_dim, cudaStream_t stream);

// Which pairs of anchors are in A, in S (null for none) and in R (null for all), bit-packed.
struct ContrastiveMasks {
  const uint32_t *positives, *specific, *negatives;
  int anchors, group;
};

// The pairs of all anchors in tiles, or those within each image. Does nothing unless *enabled == within.
template <typename T>
struct BlockPairs {
  Rows<T> z;
  ContrastiveMasks masks;
  bool within;
  const int32_t* enabled;
  float scale;  // of logits
};

// In how many parts the columns are cut: the more the fewer rows there are.
int64_t contrastive_blocks_parts(int64_t anchors, int64_t group, bool within);

// parts (contrastive_blocks_parts, 5, N): over a part of the columns, of each anchor log sum over Den of exp of the
// logits, the numbers of pairs in A and in S, and the sums of their logits.
template <typename T>
void contrastive_blocks_forward_cuda(const BlockPairs<T>& pairs, float* parts, cudaStream_t stream);
template <typename T>
void contrastive_blocks_forward_sm90(const BlockPairs<T>& pairs, float* parts, cudaStream_t stream);

// grad_i (dim numbers, contiguous) = sum over the pairs of (g_ij + g_ji) z_j, with `numbers` (4, N) as above. `symmetric`
// says that A and S are.
template <typename T>
void contrastive_blocks_backward_cuda(const BlockPairs<T>& pairs, bool symmetric, const float* numbers, float* grad,
                                      int dim, cudaStream_t stream);
template <typename T>
void contrastive_blocks_backward_sm90(const BlockPairs<T>& pairs, bool symmetric, const float* numbers, float* grad,
                                      int dim, cudaStream_t stream);

// The negatives of each patch position, which the anchors there share; those of their own images do not count. Lists as
// above, a row a position.
template <typename T>
struct SampledPairs {
  Rows<T> z;
  int64_t group;
  const int64_t* state;
  const int64_t* ranges;
  const int32_t* columns;
  float scale;  // of logits
};

// log_sums (N): log sum exp of the logits of an anchor's sampled negatives.
template <typename T>
void contrastive_sampled_forward_cuda(const SampledPairs<T>& pairs, float* log_sums, cudaStream_t stream);
template <typename T>
void contrastive_sampled_forward_sm90(const SampledPairs<T>& pairs, float* log_sums, cudaStream_t stream);

// The sampled negatives j in [staged.first, staged.last): sums_i (N, dim of z) += sum of g_ij z_j, g_ij = f_i exp(l_ij -
// r_i), with `numbers` as above. Entry e of the lists has the place slots[e] of `staged`, which gets the sums over the
// anchors i at that position of g_ij z_i: in of_place = contrastive_staged_rows_cuda() rows, each of some of the images.
template <typename T>
void contrastive_sampled_backward_cuda(const SampledPairs<T>& pairs, const float* numbers, const int32_t* slots,
                                       float* sums, const StagedColumns<T>& staged, cudaStream_t stream);

template <typename T>
void contrastive_sampled_backward_sm90(const SampledPairs<T>& pairs, const float* numbers, const int32_t* slots,
                                       float* sums, const StagedColumns<T>& staged, cudaStream_t stream);

// One, or with the kernel for sm_90a one for each kImagesOfBlock images.
template <typename T>
int64_t contrastive_staged_rows_cuda(const Rows<T>& z, int64_t group);
constexpr int kImagesOfBlock = 64;

}  // namespace hpk
