// Launch signatures of the CUDA kernels of multi_positive_contrastive, whose formulas are in multi_positive_contrastive.h.
// All tensors are contiguous unless a pitch or stride says otherwise; relations are bit-packed.
//
// Lists: the columns of the set bits of row i, ascending, are columns[ranges[i][0]] to columns[ranges[i][1] - 1]. What
// they have in common, and `state`, is described in hpkernels/ops/multi_positive_contrastive/routes.py.
//
// A and S have the rows of the anchors [first, first + rows), all or those of some whole images. Lists are of all anchors.
#pragma once

#include "common/cuda.h"

namespace hpk {

// R as bits (rows, words_per_row(columns)): bit j of row i is set if its random word is below `threshold`.
void draw_negatives_cuda(const int64_t* seed, uint64_t threshold, int64_t rows, int64_t columns, uint32_t* bits,
                         cudaStream_t stream);

// A and S, or null for no S, (rows, words), and R (group, words), or null for every other anchor.
struct PairBits {
  const uint32_t *positives, *specific, *negatives;
  int64_t anchors, group, first, rows;
};

// Lists of rows, which take their places of `columns` in whatever order they come. Where one does not fit,
// *does_not_fit becomes 1.
struct ListedRows {
  int64_t* ranges;   // (rows, 2)
  int32_t* columns;  // (capacity,)
  int64_t capacity;
  int64_t *taken, *does_not_fit;
};

// counts (rows, 3): how many pairs of each anchor are in A, S and Den. If there are ranges, those of A or S in other
// images are listed.
void count_and_list_cuda(const PairBits& bits, int32_t* counts, const ListedRows& rows, cudaStream_t stream);

// Where the gradients of sampled columns are staged: those of column j, of stage j / stage_columns, at places ranges[j][0]
// to ranges[j][1] - 1, and that of an entry of the lists at slots[entry]. stage_columns is a multiple of 32.
struct Slots {
  int64_t* ranges;  // (anchors, 2)
  int32_t* slots;   // (capacity of the lists,)
  int64_t stage_columns, capacity;
  int64_t* taken;  // (stages,)
};

// Lists the rows of R (positions, words), with their slots; `transposed` is what R's transpose takes.
void list_sampled_cuda(const uint32_t* negatives, int64_t positions, int64_t anchors, uint32_t* transposed,
                       const Slots& slots, const ListedRows& rows, cudaStream_t stream);

// weights (anchors, 4) and images[0] and [1], 0 before: as Kernels.weigh of routes.py has them, from counts (anchors, 3).
struct Weighting {
  bool joint, reweight, keep_specific_only;
};
void weigh_cuda(const int32_t* counts, int64_t anchors, int64_t group, const float* specific_weight,
                const Weighting& weighting, float* weights, int64_t* images, cudaStream_t stream);

// *greatest, 0 before: the greatest sum of squares of a row, the greatest finite number if it is above that; NaN if a
// number of any row is not finite.
template <typename T>
void greatest_square_cuda(const Rows<T>& z, float* greatest, cudaStream_t stream);

// Row statistics as backward takes them: see Kernels.scale_rows of routes.py. rows and numbers (branches, anchors, 4);
// lowest, highest (log-denominators), grad_losses, shifts and factors (branches,).
struct ScaledRows {
  const float *rows, *greatest, *lowest, *highest, *grad_losses;
  int64_t branches, anchors;
  float temperature, greatest_g, most_apart;
  float *numbers, *shifts, *factors;
};
void scale_rows_cuda(const ScaledRows& rows, cudaStream_t stream);

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

// Which pairs of anchors are in A, in S (null for none) and in R (null for all), bit-packed. `aligned` says that four words
// can be read at once from multiples of four. A and S have the rows of anchors [first, last), and start where the row of
// anchor 0 would be.
struct ContrastiveMasks {
  const uint32_t *positives, *specific, *negatives;
  int anchors, group;
  bool aligned;
  int first, last;
};

// A and S of all anchors by the columns that are [first, last), `words` a row: those before `end`, as if all were there.
// If that is all anchors, these are A and S themselves.
struct MasksByColumns {
  const uint32_t *positives, *specific;
  int words, end;
};

// The pairs of the rows with all anchors in tiles, or those within each image. Where there are lists, those within images are taken if
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
int64_t contrastive_blocks_parts(int64_t anchors, int64_t group, bool within, int64_t first, int64_t rows);

// parts (contrastive_blocks_parts, 3, rows): over a part of the columns, of each anchor log sum over Den of exp of the logits,
// and the sums of those in A and in S. No logit is above scale * *square.
template <typename T>
void contrastive_blocks_forward_cuda(const BlockPairs<T>& pairs, const float* square, float* parts, cudaStream_t stream);
template <typename T>
void contrastive_blocks_forward_sm90(const BlockPairs<T>& pairs, const float* square, float* parts, cudaStream_t stream);

// What backward knows of the anchors, `numbers` (N, 4): shift, factor of exp(logit - shift), pull and specific pull. If
// *shift is not NaN, it is that of all. `symmetric` says that A and S are; else they are read by columns as well. `sums`
// (rows, dim) is contiguous.
struct BlockSums {
  const float *numbers, *shift, *factor;
  void* sums;
  int dim;
  bool symmetric;
  MasksByColumns by_columns;
};

// sums_i = sum over the pairs of (g_ij + g_ji) z_j: within images float32; of all pairs times *factor, in the type of z.
template <typename T>
void contrastive_blocks_backward_cuda(const BlockPairs<T>& pairs, const BlockSums& sums, cudaStream_t stream);
template <typename T>
void contrastive_blocks_backward_sm90(const BlockPairs<T>& pairs, const BlockSums& sums, cudaStream_t stream);

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
