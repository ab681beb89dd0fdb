#include "multi_positive_contrastive/multi_positive_contrastive.h"

#include <atomic>
#include <cstddef>
#include <vector>

#include "common/bits.h"
#include "common/philox.h"
#include "multi_positive_contrastive/rows.h"

namespace hpk {
namespace {

using Bits = std::vector<uint32_t>;

HPK_MULTIVERSION void draw_row(uint64_t seed, uint32_t row, int64_t columns, uint64_t threshold, uint32_t* bits) {
  const int64_t words = words_per_row(columns);
  for (int64_t word = 0; word < words; ++word) {
    bits[word] = bernoulli_word(seed, row, static_cast<uint32_t>(word), threshold) & valid_bits(word, columns);
  }
}

// The rows of the relations that concern one anchor i, (words,) each; null where there is no such relation.
struct AnchorBits {
  const uint32_t* agnostic;     // A_i
  const uint32_t* agnostic_t;   // the j with A_ji
  const uint32_t* specific;     // S_i
  const uint32_t* specific_t;   // the j with S_ji
  const uint32_t* negatives;    // R[i % G]
};

AnchorBits bits_of(const Relations& relations, int64_t anchor) {
  const int64_t words = words_per_row(relations.anchors), row = anchor * words;
  const auto at = [row](const uint32_t* bits) { return bits == nullptr ? nullptr : bits + row; };
  return {at(relations.agnostic), at(relations.agnostic_t), at(relations.specific), at(relations.specific_t),
          relations.negatives + anchor % relations.per_image * words};
}

void clear_bit(Bits& bits, int64_t column) { bits[column / 32] &= ~(1u << (column % 32)); }

// Den_i as bits.
void denominator_of(const Relations& relations, int64_t anchor, Bits& bits) {
  const AnchorBits own = bits_of(relations, anchor);
  const int64_t words = words_per_row(relations.anchors);
  bits.resize(words);
  for (int64_t word = 0; word < words; ++word) bits[word] = own.agnostic[word] | own.negatives[word];
  clear_bit(bits, anchor);
}

// The anchors whose denominator holds this one, as bits.
void in_denominators_of(const Relations& relations, int64_t anchor, Bits& bits) {
  const AnchorBits own = bits_of(relations, anchor);
  const int64_t words = words_per_row(relations.anchors);
  bits.resize(words);
  repeat_bits(relations.negatives_t + anchor * words_per_row(relations.per_image), relations.per_image,
              relations.anchors, bits.data());
  for (int64_t word = 0; word < words; ++word) bits[word] |= own.agnostic_t[word];
  clear_bit(bits, anchor);
}

void clear_own_image(const Relations& relations, int64_t anchor, Bits& bits) {
  clear_bits(bits.data(), anchor / relations.per_image * relations.per_image, relations.per_image);
}

int64_t count_bits(const uint32_t* bits, int64_t words) {
  int64_t count = 0;
  for (int64_t word = 0; word < words; ++word) count += __builtin_popcount(bits[word]);
  return count;
}

// The set columns of `bits`, ascending.
void list_columns(const uint32_t* bits, int64_t words, std::vector<int32_t>& columns) {
  columns.clear();
  for (int64_t word = 0; word < words; ++word) {
    for (uint32_t left = bits[word]; left != 0; left &= left - 1) {
      columns.push_back(static_cast<int32_t>(32 * word + __builtin_ctz(left)));
    }
  }
}

// Which of the listed columns are set in `relation`, as bits by position in the list; all clear for a null relation.
void restrict_to(const std::vector<int32_t>& columns, const uint32_t* relation, Bits& bits) {
  bits.assign(words_per_row(static_cast<int64_t>(columns.size())), 0u);
  if (relation == nullptr) return;
  for (std::size_t c = 0; c < columns.size(); ++c) {
    bits[c / 32] |= static_cast<uint32_t>(test_bit(relation, columns[c])) << (c % 32);
  }
}

// What one thread works with.
template <typename T>
struct Scratch {
  Bits denominator, in_denominators, either, listed, window;
  std::vector<int32_t> columns;
  std::vector<T> logits, other, coefficients, log_denominators, push, pull, pull_specific;
};

// The bits of `row` from column `first` on, `count` of them.
const uint32_t* window_of(const uint32_t* row, int64_t first, int64_t count, Bits& window) {
  window.resize(words_per_row(count));
  extract_bits(row, first, count, window.data());
  return window.data();
}

template <typename T>
void rows_forward_of(const T* z, int64_t dim, T scale, const Relations& relations, bool across_images, int64_t anchor,
                     const AnchorSums<T>& sums, Scratch<T>& scratch) {
  const AnchorBits own = bits_of(relations, anchor);
  const int64_t words = words_per_row(relations.anchors);
  denominator_of(relations, anchor, scratch.denominator);
  scratch.either = scratch.denominator;
  for (int64_t word = 0; own.specific != nullptr && word < words; ++word) scratch.either[word] |= own.specific[word];
  if (across_images) clear_own_image(relations, anchor, scratch.either);
  list_columns(scratch.either.data(), words, scratch.columns);
  const auto count = static_cast<int64_t>(scratch.columns.size());
  scratch.logits.resize(count);
  scratch.other.resize(count + 1);
  dots(z + anchor * dim, z, scratch.columns.data(), count, dim, scale, scratch.logits.data());

  restrict_to(scratch.columns, scratch.denominator.data(), scratch.listed);
  mask_logits(scratch.logits.data(), scratch.listed.data(), count, scratch.other.data());
  scratch.other[count] = sums.log_denominator[anchor];  // that of the block stands for all its logits
  sums.log_denominator[anchor] = log_sum_exp(scratch.other.data(), count + 1);
  restrict_to(scratch.columns, own.agnostic, scratch.listed);
  sums.agnostic_logits[anchor] += masked_sum(scratch.logits.data(), scratch.listed.data(), count);
  sums.agnostic_count[anchor] += count_bits(scratch.listed.data(), words_per_row(count));
  restrict_to(scratch.columns, own.specific, scratch.listed);
  sums.specific_logits[anchor] += masked_sum(scratch.logits.data(), scratch.listed.data(), count);
  sums.specific_count[anchor] += count_bits(scratch.listed.data(), words_per_row(count));
}

template <typename T>
void gather(const T* values, const std::vector<int32_t>& columns, std::vector<T>& gathered) {
  gathered.resize(columns.size());
  for (std::size_t c = 0; c < columns.size(); ++c) gathered[c] = values[columns[c]];
}

template <typename T>
void rows_backward_of(const T* z, int64_t dim, T scale, const Relations& relations, bool across_images, int64_t anchor,
                      const AnchorCoefficients<T>& anchors, T* grad, Scratch<T>& scratch) {
  const AnchorBits own = bits_of(relations, anchor);
  const int64_t words = words_per_row(relations.anchors);
  denominator_of(relations, anchor, scratch.denominator);
  in_denominators_of(relations, anchor, scratch.in_denominators);
  scratch.either.resize(words);
  for (int64_t word = 0; word < words; ++word) {
    uint32_t bits = scratch.denominator[word] | scratch.in_denominators[word];
    if (own.specific != nullptr) bits |= own.specific[word] | own.specific_t[word];
    scratch.either[word] = bits;
  }
  if (across_images) clear_own_image(relations, anchor, scratch.either);
  list_columns(scratch.either.data(), words, scratch.columns);
  const auto count = static_cast<int64_t>(scratch.columns.size());
  scratch.logits.resize(count);
  scratch.coefficients.assign(count, T{0});
  const T* logits = scratch.logits.data();
  T* coefficients = scratch.coefficients.data();
  dots(z + anchor * dim, z, scratch.columns.data(), count, dim, scale, scratch.logits.data());

  restrict_to(scratch.columns, scratch.denominator.data(), scratch.listed);
  add_softmax(logits, scratch.listed.data(), count, anchors.log_denominator[anchor], anchors.push[anchor],
              coefficients);
  restrict_to(scratch.columns, scratch.in_denominators.data(), scratch.listed);
  gather(anchors.log_denominator, scratch.columns, scratch.log_denominators);
  gather(anchors.push, scratch.columns, scratch.push);
  add_softmax_of(logits, scratch.listed.data(), count, scratch.log_denominators.data(), scratch.push.data(),
                 coefficients);
  restrict_to(scratch.columns, own.agnostic, scratch.listed);
  subtract(scratch.listed.data(), count, anchors.pull[anchor], coefficients);
  restrict_to(scratch.columns, own.agnostic_t, scratch.listed);
  gather(anchors.pull, scratch.columns, scratch.pull);
  subtract_of(scratch.listed.data(), count, scratch.pull.data(), coefficients);
  if (own.specific != nullptr) {
    restrict_to(scratch.columns, own.specific, scratch.listed);
    subtract(scratch.listed.data(), count, anchors.pull_specific[anchor], coefficients);
    restrict_to(scratch.columns, own.specific_t, scratch.listed);
    gather(anchors.pull_specific, scratch.columns, scratch.pull_specific);
    subtract_of(scratch.listed.data(), count, scratch.pull_specific.data(), coefficients);
  }
  for (int64_t c = 0; c < count; ++c) coefficients[c] *= scale;
  add_rows(coefficients, z, scratch.columns.data(), count, dim, grad);
}

template <typename T>
void block_forward_of(T* logits, const Block<T>& block, T scale, const Relations& relations, int64_t anchor,
                      const AnchorSums<T>& sums, Scratch<T>& scratch) {
  const AnchorBits own = bits_of(relations, anchor);
  const int64_t first = block.column, count = block.columns, words = words_per_row(count);
  multiply(logits, count, scale);
  denominator_of(relations, anchor, scratch.denominator);
  scratch.other.resize(count);
  mask_logits(logits, window_of(scratch.denominator.data(), first, count, scratch.window), count, scratch.other.data());
  sums.log_denominator[anchor] = log_sum_exp(scratch.other.data(), count);
  const uint32_t* agnostic = window_of(own.agnostic, first, count, scratch.window);
  sums.agnostic_logits[anchor] = masked_sum(logits, agnostic, count);
  sums.agnostic_count[anchor] = count_bits(agnostic, words);
  sums.specific_logits[anchor] = 0;
  sums.specific_count[anchor] = 0;
  if (own.specific == nullptr) return;
  const uint32_t* specific = window_of(own.specific, first, count, scratch.window);
  sums.specific_logits[anchor] = masked_sum(logits, specific, count);
  sums.specific_count[anchor] = count_bits(specific, words);
}

template <typename T>
void block_backward_of(T* logits, const Block<T>& block, T scale, const Relations& relations, int64_t anchor,
                       const AnchorCoefficients<T>& anchors, Scratch<T>& scratch) {
  const AnchorBits own = bits_of(relations, anchor);
  const int64_t first = block.column, count = block.columns;
  const auto window = [&](const uint32_t* row) { return window_of(row, first, count, scratch.window); };
  multiply(logits, count, scale);
  denominator_of(relations, anchor, scratch.denominator);
  in_denominators_of(relations, anchor, scratch.in_denominators);
  scratch.coefficients.assign(count, T{0});
  T* coefficients = scratch.coefficients.data();
  add_softmax(logits, window(scratch.denominator.data()), count, anchors.log_denominator[anchor], anchors.push[anchor],
              coefficients);
  add_softmax_of(logits, window(scratch.in_denominators.data()), count, anchors.log_denominator + first,
                 anchors.push + first, coefficients);
  subtract(window(own.agnostic), count, anchors.pull[anchor], coefficients);
  subtract_of(window(own.agnostic_t), count, anchors.pull + first, coefficients);
  if (own.specific != nullptr) {
    subtract(window(own.specific), count, anchors.pull_specific[anchor], coefficients);
    subtract_of(window(own.specific_t), count, anchors.pull_specific + first, coefficients);
  }
  for (int64_t c = 0; c < count; ++c) logits[c] = scale * coefficients[c];
}

}  // namespace

void draw_negatives_cpu(ParallelFor run, uint64_t seed, int64_t rows, int64_t columns, double rate, uint32_t* bits) {
  const auto threshold = static_cast<uint64_t>(rate * 4294967296.0);
  const int64_t words = words_per_row(columns);
  parallel_for(run, rows, 1, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      draw_row(seed, static_cast<uint32_t>(row), columns, threshold, bits + row * words);
    }
  });
}

PairCounts count_pairs_cpu(ParallelFor run, const Relations& relations) {
  std::atomic<int64_t> all{0}, within{0};  // integers: the order of the additions does not matter
  parallel_for(run, relations.anchors, 64, [&](int64_t begin, int64_t end) {
    Bits window;
    PairCounts counts{0, 0};
    for (int64_t anchor = begin; anchor < end; ++anchor) {
      const AnchorBits own = bits_of(relations, anchor);
      const int64_t first = anchor / relations.per_image * relations.per_image;
      for (const uint32_t* row : {own.agnostic, own.specific, own.negatives}) {
        if (row == nullptr) continue;
        counts.all += count_bits(row, words_per_row(relations.anchors));
        counts.within_images += count_bits(window_of(row, first, relations.per_image, window),
                                           words_per_row(relations.per_image));
      }
    }
    all += counts.all;
    within += counts.within_images;
  });
  return {all, within};
}

template <typename T>
void contrastive_block_forward_cpu(ParallelFor run, const Block<T>& block, T inverse_temperature,
                                   const Relations& relations, const AnchorSums<T>& sums) {
  parallel_for(run, block.rows, 4, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch;
    for (int64_t row = begin; row < end; ++row) {
      block_forward_of(block.products + row * block.columns, block, inverse_temperature, relations, block.row + row, sums,
                       scratch);
    }
  });
}

template <typename T>
void contrastive_block_backward_cpu(ParallelFor run, const Block<T>& block, T inverse_temperature,
                                    const Relations& relations, const AnchorCoefficients<T>& anchors) {
  parallel_for(run, block.rows, 4, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch;
    for (int64_t row = begin; row < end; ++row) {
      block_backward_of(block.products + row * block.columns, block, inverse_temperature, relations, block.row + row,
                        anchors, scratch);
    }
  });
}

namespace {

// body(anchor) for all anchors, those at the same patch position after one another: they share their negatives, whose
// rows then stay in cache.
template <typename T, typename Body>
void for_anchors_by_position(ParallelFor run, const Relations& relations, const Body& body) {
  const int64_t images = relations.anchors / relations.per_image;
  parallel_for(run, relations.anchors, 16, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch;
    for (int64_t task = begin; task < end; ++task) {
      body(task / images + task % images * relations.per_image, scratch);
    }
  });
}

}  // namespace

template <typename T>
void contrastive_rows_forward_cpu(ParallelFor run, const T* z, int64_t dim, T inverse_temperature,
                                  const Relations& relations, bool across_images, const AnchorSums<T>& sums) {
  for_anchors_by_position<T>(run, relations, [&](int64_t anchor, Scratch<T>& scratch) {
    rows_forward_of(z, dim, inverse_temperature, relations, across_images, anchor, sums, scratch);
  });
}

template <typename T>
void contrastive_rows_backward_cpu(ParallelFor run, const T* z, int64_t dim, T inverse_temperature,
                                   const Relations& relations, bool across_images,
                                   const AnchorCoefficients<T>& anchors, T* grad_z) {
  for_anchors_by_position<T>(run, relations, [&](int64_t anchor, Scratch<T>& scratch) {
    rows_backward_of(z, dim, inverse_temperature, relations, across_images, anchor, anchors, grad_z + anchor * dim,
                     scratch);
  });
}

#define HPK_INSTANTIATE(T)                                                                                            \
  template void contrastive_block_forward_cpu<T>(ParallelFor, const Block<T>&, T, const Relations&,                   \
                                                 const AnchorSums<T>&);                                               \
  template void contrastive_block_backward_cpu<T>(ParallelFor, const Block<T>&, T, const Relations&,                  \
                                                  const AnchorCoefficients<T>&);                                      \
  template void contrastive_rows_forward_cpu<T>(ParallelFor, const T*, int64_t, T, const Relations&, bool,            \
                                                const AnchorSums<T>&);                                                \
  template void contrastive_rows_backward_cpu<T>(ParallelFor, const T*, int64_t, T, const Relations&, bool,           \
                                                 const AnchorCoefficients<T>&, T*);
HPK_INSTANTIATE(float)
HPK_INSTANTIATE(double)
#undef HPK_INSTANTIATE

}  // namespace hpk
