// What the kernels of multi_positive_contrastive know of the pairs of a tile of anchors: which are in A, S and R.
#pragma once

#include "common/bits.h"
#include "common/device.h"
#include "multi_positive_contrastive/multi_positive_contrastive_cuda.h"
#include "multi_positive_contrastive/scope.h"

namespace hpk {

// The bits of 32 columns from 32 word on, for one row: other anchors, and which of them are in A, in S, and in Den.
struct PairWords {
  uint32_t others, agnostic, specific, denominator;
};

// kAll: every other anchor is a negative, so that R need not be read.
template <bool kAll>
__device__ __forceinline__ PairWords pair_words(const ContrastiveMasks& masks, const Scope& scope, int row,
                                                int word) {
  const int64_t words = words_per_row(masks.anchors);
  const uint32_t inside = ~bits_outside(word, scope.first, scope.last);
  if (!scope.holds(row) || inside == 0) return {};
  const uint32_t others = row / 32 == word ? inside & ~(1u << (row % 32)) : inside;
  const uint32_t agnostic = masks.positives[row * words + word] & inside;
  const uint32_t specific = masks.specific == nullptr ? 0 : masks.specific[row * words + word] & inside;
  if constexpr (kAll) return {others, agnostic, specific, others};
  const uint32_t drawn = masks.negatives[row % masks.group * words + word];
  return {others, agnostic, specific, (agnostic | drawn) & others};
}

// The bits of 32 rows from 32 word on in one column: the column's own relations, that is.
struct MirroredWords {
  uint32_t agnostic, specific, drawn;
};

// A symmetric relation need not be read again: `agnostic` and `specific` are those of the rows then, and 0 here. The
// column's patch position is `position`, or it and a multiple of the group.
template <bool kAll>
__device__ __forceinline__ MirroredWords mirrored_words(const ContrastiveMasks& masks, const Scope& scope,
                                                        bool symmetric, int column, int position, int word) {
  const int64_t words = words_per_row(masks.anchors);
  MirroredWords found{};
  if (!scope.holds(column) || word >= words) return found;
  if (!symmetric) {
    found.agnostic = masks.positives[column * words + word];
    found.specific = masks.specific == nullptr ? 0 : masks.specific[column * words + word];
  }
  if constexpr (!kAll) {
    if (position >= masks.group) position -= masks.group;
    if (position >= masks.group) position %= masks.group;
    found.drawn = masks.negatives[position * words + word];
  }
  return found;
}

}  // namespace hpk
