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

// Listed pairs of anchors: each is in A, in S or in both.
template <typename T>
struct ListedPairs {
  Rows<T> z;
  const uint32_t *positives, *specific, *negatives;  // A, S or null, R (group, words)
  int64_t group;
  const int32_t* columns;
  const int64_t* offsets;
  const int32_t* enabled;
  float scale;  // of logits
};

// part (5, N): of each anchor log sum exp of the logits in A but not in R, the numbers of pairs in A and in S, and the
// sums of their logits.
template <typename T>
void contrastive_pairs_forward_cuda(const ListedPairs<T>& pairs, float* part, cudaStream_t stream);

// grad_i += sum of (g_ij + g_ji) z_j over the listed pairs, of Den only what is in A but not in R. A and S are symmetric.
// `numbers` (4, N) are log-denominator, push, pull and specific pull; rows of grad have `dim` numbers, `stride` apart.
template <typename T>
void contrastive_pairs_backward_cuda(const ListedPairs<T>& pairs, const float* numbers, float* grad, int64_t dim,
                                     int64_t stride, cudaStream_t stream);

// Which pairs of anchors are in A, in S (null for none) and in R (null for all), bit-packed. `aligned` says that four words
// can be read at once from multiples of four.
struct ContrastiveMasks {
  const uint32_t *positives, *specific, *negatives;
  int anchors, group;
  bool aligned;
};

// The pairs of all anchors in tiles, or those within each image. Where there are lists, those within images are taken if
// state[0] is 0, and all others if not.
template <typename T>
struct BlockPairs {
  Rows<T> z;
  ContrastiveMasks masks;
  bool within, has_lists;
  const int64_t* state;
  float scale;  // of logits
};

// In how many parts the columns are cut: the more the fewer rows there are.
int64_t contrastive_blocks_parts(int64_t anchors, int64_t group, bool within);

// parts (contrastive_blocks_parts, 3, N): over a part of the columns, of each anchor log sum over Den of exp of the logits,
// and the sums of those in A and in S. No logit is above scale * *square.
template <typename T>
void contrastive_blocks_forward_cuda(const BlockPairs<T>& pairs, const float* square, float* parts, cudaStream_t stream);
template <typename T>
void contrastive_blocks_forward_sm90(const BlockPairs<T>& pairs, const float* square, float* parts, cudaStream_t stream);

// What backward knows of the anchors, `numbers` (N, 4): shift, factor of exp(logit - shift), pull and specific pull. If
// *shift is not NaN, it is that of all. `symmetric` says that A and S are. `sums` has `dim` numbers a row, contiguous.
struct BlockSums {
  const float *numbers, *shift, *factor;
  void* sums;
  int dim;
  bool symmetric;
};

// sums_i = sum over the pairs of (g_ij + g_ji) z_j: within images float32; of all pairs times *factor, in the type of z.
template <typename T>
void contrastive_blocks_backward_cuda(const BlockPairs<T>& pairs, const BlockSums& sums, cudaStream_t stream);
template <typename T>
void contrastive_blocks_backward_sm90(const BlockPairs<T>& pairs, const BlockSums& sums, cudaStream_t stream);

// The negatives of each patch position in other images, which the anchors there share: columns[offsets[p]] and so on.
template <typename T>
struct SampledPairs {
  Rows<T> z;
  int64_t group;
  const int32_t* columns;
  const int64_t* offsets;
  const int32_t* enabled;
  float scale;  // of logits
};

// log_sums (N): log sum exp of the logits of an anchor's sampled negatives.
template <typename T>
void contrastive_sampled_forward_cuda(const SampledPairs<T>& pairs, float* log_sums, cudaStream_t stream);

// grad_i += sum over the sampled negatives j of push_i exp(l_ij - logDen_i) z_j.
template <typename T>
void contrastive_sampled_rows_backward_cuda(const SampledPairs<T>& pairs, const float* numbers, float* grad, int dim,
                                            cudaStream_t stream);

// The same sums for the other factor: staged[slot of (j, p)] = sum over the anchors i at position p, in other images than
// j, of push_i exp(l_ij - logDen_i) z_i, for the positions [32 first_word, 32 first_word + count). The slots of column j
// follow one another from slots[j] on in the order of positions, which are the set bits of positions[j] (N, words).
struct StagedGradients {
  const uint32_t* positions;
  const int64_t* slots;
  int64_t words, first_word, count, capacity;
  float* rows;  // (capacity, dim)
  int dim;
};
template <typename T>
void contrastive_sampled_columns_backward_cuda(const SampledPairs<T>& pairs, const float* numbers,
                                               const StagedGradients& staged, cudaStream_t stream);

// grad_j += sum of the staged rows of column j.
void contrastive_sampled_gather_cuda(const StagedGradients& staged, const int32_t* enabled, int64_t anchors, float* grad,
                                     cudaStream_t stream);

}  // namespace hpk
