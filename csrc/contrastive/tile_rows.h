// What the parts of the epilogue share: the rows of a tile, one by one.
#pragma once

#include "common/bits.h"
#include "contrastive/contrastive.h"

namespace hpk {

// Calls body(row) for the rows of a tile.
template <typename T, typename Body>
void for_each_row(ParallelFor run, const LogitTile<T>& tile, Body body) {
  parallel_for(run, tile.rows, 4, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

// Calls body(column) for the columns of a word that are set, ascending.
template <typename Body>
HPK_HOST_DEVICE void for_each_bit(uint32_t bits, int64_t word, Body body) {
  for (; bits != 0; bits &= bits - 1) body(32 * word + __builtin_ctz(bits));
}

// The pairs of one row of a tile, as TilePairs has them.
template <typename T>
struct RowPairs {
  uint32_t *positives, *denominator;
  T* weights;
};

template <typename T>
RowPairs<T> row_of(const TilePairs<T>& pairs, const LogitTile<T>& tile, int64_t row) {
  const int64_t words = words_per_row(tile.columns);
  T* weights = pairs.weights == nullptr ? nullptr : pairs.weights + row * tile.columns;
  return {pairs.positives + row * words, pairs.denominator + row * words, weights};
}

template <typename T>
const T* bias_of(const PairRelations<T>& relations, const LogitTile<T>& tile) {
  return relations.bias == nullptr ? nullptr : relations.bias + tile.column;
}

// Finds the pairs of a row.
template <typename T>
void pairs_of_row(const LogitTile<T>& tile, int64_t row, const PairRelations<T>& relations, const RowPairs<T>& pairs);

// products * scale + bias, of the keys of the tile, or null.
void scale_row(float* products, int64_t count, float scale, const float* bias);
void scale_row(double* products, int64_t count, double scale, const double* bias);

// Adds to the statistics of a row.
template <typename T>
void statistics_of_row(const T* logits, int64_t count, const RowPairs<T>& pairs, bool inside, T* statistics);

// Replaces the logits of a row by g.
void gradient_of_row(float* logits, int64_t count, const RowPairs<float>& pairs, bool inside, const float* numbers,
                     const float* columns);
void gradient_of_row(double* logits, int64_t count, const RowPairs<double>& pairs, bool inside, const double* numbers,
                     const double* columns);

}  // namespace hpk
