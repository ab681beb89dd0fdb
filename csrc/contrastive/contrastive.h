// The epilogue of contrastive on the CPU: what becomes of a tile of products between anchors and keys. Formulas,
// statistics and numbers are those of hpkernels/ops/contrastive/reference.py. All tensors are contiguous.
#pragma once

#include "common/parallel_for.h"

namespace hpk {

// Some anchors and all keys from `column` on, both from multiples of 32. `logits` (rows, columns) are products first.
template <typename T>
struct LogitTile {
  T* logits;
  int64_t row, rows, column, columns;
};

// Pairs, as Relation of hpkernels/ops/contrastive/relations.py has them; null for a form that they do not have.
struct PairForms {
  const int64_t* anchor_ids;  // (anchors, labels)
  const int64_t* key_ids;     // (labels, keys)
  int64_t labels;
  const uint32_t* bits;    // (anchors, words_per_row(keys))
  const int64_t* offsets;  // (anchors + 1,)
  const int64_t* indices;  // (listed,)
  int64_t listed;
};

// Anchor i is key i + own, and that pair takes no part; -1: the anchors are no keys. `triangle`: nor do the keys before.
struct PairRules {
  int64_t keys, own;
  bool triangle, decoupled, exclude_positives;
};

// What is known of the pairs of a tile, before any logit: W and Den as bits (rows, words_per_row(columns)), and, if positives
// have weights, those (rows, columns), else null.
template <typename T>
struct TilePairs {
  uint32_t *positives, *denominator;
  T* weights;
};

// What logits are made of products with, and what pairs are found in.
template <typename T>
struct PairRelations {
  PairForms positives;
  const T* listed_weights;  // of the listed positives, or null
  PairForms excluded;
  PairRules rules;
  T scale;
  const T* bias;  // (keys,), or null
};

// Turns the products of a tile into logits, scale * products + bias, and finds its pairs.
template <typename T>
void contrastive_pairs_cpu(ParallelFor run, const LogitTile<T>& tile, const PairRelations<T>& relations,
                           const TilePairs<T>& pairs);

// Adds to the statistics of the tile's rows (rows, 4), and of its columns (columns, 4) or null.
template <typename T>
void contrastive_statistics_cpu(ParallelFor run, const LogitTile<T>& tile, const TilePairs<T>& pairs, bool inside,
                                T* rows, T* columns);

// Replaces logits by g, from the numbers of the tile's rows (rows, 4), and of its columns (4, columns) or null.
template <typename T>
void contrastive_gradient_cpu(ParallelFor run, const LogitTile<T>& tile, const TilePairs<T>& pairs, bool inside,
                              const T* rows, const T* columns);

// All of these in turn for each row, which stays in a cache meanwhile: the statistics of rows (rows, 4), that are those of no
// pairs before, and g in the place of the products, for anchors whose losses count `coefficients` (rows,) each.
template <typename T>
void contrastive_whole_rows_cpu(ParallelFor run, const LogitTile<T>& tile, const PairRelations<T>& relations, bool inside,
                                const T* coefficients, T* rows);

}  // namespace hpk
