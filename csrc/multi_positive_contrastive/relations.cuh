// What the kernels of multi_positive_contrastive know of the pairs of a tile of anchors: which are in A, S and R.
#pragma once

#include "common/warp.cuh"
#include "multi_positive_contrastive/multi_positive_contrastive_cuda.h"
#include "multi_positive_contrastive/strips.h"

namespace hpk {

// The words of a row that tell of kWords x 32 columns, as they lie in memory: of A, S and R.
template <int kWords>
struct MaskWords {
  uint32_t agnostic[kWords], specific[kWords], drawn[kWords];
};

// Which of the thread's columns among 32 are in A, in S and in Den.
struct PairWords {
  uint32_t agnostic, specific, denominator;
};

// Those from `first` on, and 0 beyond the end of the row; in one load where rows are aligned.
template <int kWords>
__device__ __forceinline__ void read_words(const ContrastiveMasks& masks, const uint32_t* bits, int row, int first,
                                           uint32_t (&found)[kWords]) {
  const int words = (masks.anchors + 31) >> 5;
  const uint32_t* const from = bits + int64_t{row} * words + first;
  if (kWords > 1 && masks.aligned && (first & (kWords - 1)) == 0) {
    struct alignas(4 * kWords) All {
      uint32_t words[kWords];
    };
    const All all = first < words ? *reinterpret_cast<const All*>(from) : All{};
#pragma unroll
    for (int w = 0; w < kWords; ++w) found[w] = all.words[w];
    return;
  }
#pragma unroll
  for (int w = 0; w < kWords; ++w) found[w] = first + w < words ? from[w] : 0;
}

// The words of an anchor in A and S, and in R; of one that has no row those of another, which nobody uses.
template <int kWords>
__device__ __forceinline__ void read_positives(const ContrastiveMasks& masks, int row, int first,
                                               MaskWords<kWords>& found) {
  const int held = row < masks.first ? masks.first : row < masks.last ? row : masks.last - 1;
  read_words(masks, masks.positives, held, first, found.agnostic);
  if (masks.specific != nullptr) {
    read_words(masks, masks.specific, held, first, found.specific);
  } else {
#pragma unroll
    for (uint32_t& word : found.specific) word = 0;
  }
}

template <int kWords>
__device__ __forceinline__ void read_negatives(const ContrastiveMasks& masks, int row, int first,
                                               MaskWords<kWords>& found) {
  const int held = row < masks.anchors ? row : masks.anchors - 1;
  read_words(masks, masks.negatives, held % masks.group, first, found.drawn);
}

// The word of a column that tells of the 32 rows of `row`, if it is before `end`: of row `from` of a relation with `words`
// a row, or of none.
__device__ __forceinline__ uint32_t word_of(const ContrastiveMasks& masks, const uint32_t* bits, int words, int end,
                                            int column, int from, int row) {
  const int word = row >> 5;
  return bits != nullptr && column < masks.anchors && word < end ? bits[int64_t{from} * words + word] : 0;
}

// For lanes that have the words of 32 columns, those of two rows among theirs.
__device__ __forceinline__ void transpose_words(uint32_t columns, const int (&rows)[2], uint32_t (&found)[2]) {
  const uint32_t transposed = transpose_over_lanes(columns);
#pragma unroll
  for (int h = 0; h < 2; ++h) found[h] = __shfl_sync(kAllLanes, transposed, rows[h] & 31);
}

// The bits of the columns from 32 word on that a scope holds.
__device__ __forceinline__ uint32_t inside_bits(const Scope& scope, int word) {
  const auto below = [&](int column) {
    const int count = column - 32 * word;
    return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1;
  };
  return below(scope.last) & ~below(scope.first);
}

// The relations of a row, or those to it, with 32 columns of which only `inside` count. kAll: every other anchor is a
// negative, so that R need not be read. Bit 8 n + c is of column 8 n + c + `first`: the thread has those of n = 0 to 3
// and c = 0 and 1.
template <bool kAll>
__device__ __forceinline__ PairWords pair_words(uint32_t agnostic, uint32_t specific, uint32_t drawn, uint32_t inside,
                                                int row, int word, int first) {
  const auto own = [&](uint32_t bits) { return bits >> first & 0x03030303u; };
  const uint32_t others = row >> 5 == word ? inside & ~(1u << (row & 31)) : inside;
  return {own(agnostic & inside), own(specific & inside), own(kAll ? others : (agnostic | drawn) & others)};
}

}  // namespace hpk
