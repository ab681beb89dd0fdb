// Which pairs of a tile are positives, and which are in the denominator.
#include "contrastive/contrastive.h"

#include <algorithm>

#include "common/bits.h"
#include "contrastive/tile_rows.h"

namespace hpk {
namespace {

// bits |= (ids[c] == id), for `count` ids.
HPK_MULTIVERSION void add_equal(const int64_t* ids, int64_t count, int64_t id, uint32_t* bits) {
  int64_t first = 0;
  for (; first + 32 <= count; first += 32) {
    uint32_t word = 0;
    HPK_PRAGMA(omp simd reduction(| : word))
    for (int64_t c = 0; c < 32; ++c) word |= (ids[first + c] == id ? 1u : 0u) << c;
    bits[first / 32] |= word;
  }
  for (int64_t c = first; c < count; ++c) bits[c / 32] |= (ids[c] == id ? 1u : 0u) << (c % 32);
}

// bits |= the pairs of an anchor with the keys of a tile, but for those that are listed.
template <typename T>
void add_unlisted(const PairForms& forms, const LogitTile<T>& tile, int64_t keys, int64_t anchor, uint32_t* bits) {
  for (int64_t label = 0; label < forms.labels; ++label) {
    const int64_t id = forms.anchor_ids[anchor * forms.labels + label];
    if (id >= 0) add_equal(forms.key_ids + label * keys + tile.column, tile.columns, id, bits);
  }
  if (forms.bits == nullptr) return;
  const uint32_t* of_anchor = forms.bits + anchor * words_per_row(keys) + tile.column / 32;
  for (int64_t word = 0; word < words_per_row(tile.columns); ++word) bits[word] |= of_anchor[word];
}

// Calls body(column of the tile, place in the lists) for the listed pairs of an anchor. Nothing has checked the lists where
// values cannot be read: what is out of range is no pair.
template <typename T, typename Body>
void for_each_listed(const PairForms& forms, const LogitTile<T>& tile, int64_t anchor, Body body) {
  if (forms.offsets == nullptr) return;
  const int64_t first = std::max(forms.offsets[anchor], int64_t{0});
  const int64_t last = std::min(forms.offsets[anchor + 1], forms.listed);
  for (int64_t place = first; place < last; ++place) {
    const int64_t column = forms.indices[place] - tile.column;
    if (column >= 0 && column < tile.columns) body(column, place);
  }
}

// The columns that an anchor may form a pair with as a key: not itself, and in a triangle none before.
HPK_HOST_DEVICE uint32_t possible_pairs(int64_t word, int64_t columns, int64_t own, bool triangle) {
  const uint32_t valid = valid_bits(word, columns);
  if (triangle) return valid & ~low_bits(own + 1 - 32 * word);
  return own >= 32 * word && own < 32 * word + 32 ? valid & ~(1u << (own - 32 * word)) : valid;
}

}  // namespace

template <typename T>
void pairs_of_row(const LogitTile<T>& tile, int64_t row, const PairRelations<T>& relations, const RowPairs<T>& pairs) {
  const PairForms &positives = relations.positives, &excluded = relations.excluded;
  const PairRules& rules = relations.rules;
  uint32_t *of_positives = pairs.positives, *denominator = pairs.denominator;
  T* weights = pairs.weights;
  const int64_t anchor = tile.row + row, words = words_per_row(tile.columns);
  std::fill_n(of_positives, words, 0u);
  std::fill_n(denominator, words, 0u);
  add_unlisted(positives, tile, rules.keys, anchor, of_positives);
  add_unlisted(excluded, tile, rules.keys, anchor, denominator);
  for_each_listed(excluded, tile, anchor, [&](int64_t column, int64_t) {
    denominator[column / 32] |= 1u << column % 32;
  });
  if (weights != nullptr) {
    std::fill_n(weights, tile.columns, T{0});
    for (int64_t word = 0; word < words; ++word) {
      for_each_bit(of_positives[word], word, [&](int64_t column) { weights[column] = 1; });
    }
  }
  for_each_listed(positives, tile, anchor, [&](int64_t column, int64_t place) {
    const T weight = relations.listed_weights == nullptr ? T{1} : relations.listed_weights[place];
    if (weights != nullptr) weights[column] = std::max(weights[column], weight);
    if (weight > 0) of_positives[column / 32] |= 1u << column % 32;
  });
  const int64_t own = rules.own < 0 ? -1 : anchor + rules.own - tile.column;
  for (int64_t word = 0; word < words; ++word) {
    uint32_t taking_part = ~denominator[word];
    if (!rules.exclude_positives) taking_part |= of_positives[word];
    taking_part &= possible_pairs(word, tile.columns, own, rules.triangle && rules.own >= 0);
    of_positives[word] &= taking_part;
    denominator[word] = rules.decoupled ? taking_part & ~of_positives[word] : taking_part;
  }
}

template <typename T>
void contrastive_pairs_cpu(ParallelFor run, const LogitTile<T>& tile, const PairRelations<T>& relations,
                           const TilePairs<T>& pairs) {
  for_each_row(run, tile, [&](int64_t row) {
    pairs_of_row(tile, row, relations, row_of(pairs, tile, row));
    scale_row(tile.logits + row * tile.columns, tile.columns, relations.scale, bias_of(relations, tile));
  });
}

#define HPK_INSTANTIATE(T)                                                                                            \
  template void pairs_of_row<T>(const LogitTile<T>&, int64_t, const PairRelations<T>&, const RowPairs<T>&);               \
  template void contrastive_pairs_cpu<T>(ParallelFor, const LogitTile<T>&, const PairRelations<T>&, const TilePairs<T>&);
HPK_INSTANTIATE(float)
HPK_INSTANTIATE(double)
#undef HPK_INSTANTIATE

}  // namespace hpk
