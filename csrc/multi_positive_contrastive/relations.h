// Rows of the packed relations of anchors, and lists of the columns in them.
#pragma once

#include <cstddef>
#include <vector>

#include "common/bits.h"
#include "multi_positive_contrastive/multi_positive_contrastive.h"

namespace hpk {

using Bits = std::vector<uint32_t>;

// The rows of the relations that concern one anchor i of those that have some, (words,) each; null where there is no such relation.
struct AnchorBits {
  const uint32_t* agnostic;    // A_i
  const uint32_t* agnostic_t;  // the j with A_ji
  const uint32_t* specific;    // S_i
  const uint32_t* specific_t;  // the j with S_ji
  const uint32_t* negatives;   // R[i % G]
};

inline AnchorBits bits_of(const Relations& relations, int64_t anchor) {
  const int64_t words = words_per_row(relations.anchors), row = (anchor - relations.first) * words;
  const auto at = [row](const uint32_t* bits) { return bits == nullptr ? nullptr : bits + row; };
  return {at(relations.agnostic), at(relations.agnostic_t), at(relations.specific), at(relations.specific_t),
          relations.negatives + anchor % relations.per_image * words};
}

inline int64_t image_start(const Relations& relations, int64_t anchor) {
  return anchor - anchor % relations.per_image;
}

inline void clear_bit(Bits& bits, int64_t column) { bits[column / 32] &= ~(1u << (column % 32)); }

// The set columns of `bits`, ascending.
inline void list_columns(const uint32_t* bits, int64_t words, std::vector<int32_t>& columns) {
  columns.clear();
  for (int64_t word = 0; word < words; ++word) {
    for (uint32_t left = bits[word]; left != 0; left &= left - 1) {
      columns.push_back(static_cast<int32_t>(32 * word + __builtin_ctz(left)));
    }
  }
}

// Which of the listed columns are set in `relation`, as bits by position in the list; all clear for a null relation.
inline void restrict_to(const std::vector<int32_t>& columns, const uint32_t* relation, Bits& bits) {
  bits.assign(words_per_row(static_cast<int64_t>(columns.size())), 0u);
  if (relation == nullptr) return;
  for (std::size_t c = 0; c < columns.size(); ++c) {
    bits[c / 32] |= static_cast<uint32_t>(test_bit(relation, columns[c])) << (c % 32);
  }
}

}  // namespace hpk
