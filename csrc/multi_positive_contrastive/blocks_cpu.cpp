// Blocks of pairs on the CPU, from products that the caller makes: their sums, and their part of the gradient.
#include "common/exponential.h"
#include "multi_positive_contrastive/relations.h"
#include "multi_positive_contrastive/simd_loops.h"

namespace hpk {
namespace {

// The bits of the relations for one row of a block, (words_per_row(columns),) each, and what one thread works with.
template <typename T>
struct Scratch {
  Bits denominator, in_denominators, agnostic, agnostic_t, specific, specific_t;
  std::vector<T> masked, coefficients;
};

// The bits of a row from `first` on, `count` of them.
void window_of(const uint32_t* row, int64_t first, int64_t count, Bits& window) {
  window.resize(words_per_row(count));
  extract_bits(row, first, count, window.data());
}

template <typename T>
void windows_of(const Block<T>& block, const Relations& relations, int64_t anchor, Scratch<T>& scratch) {
  const AnchorBits own = bits_of(relations, anchor);
  const int64_t first = block.column, count = block.columns;
  window_of(own.agnostic, first, count, scratch.agnostic);
  window_of(own.negatives, first, count, scratch.denominator);
  for (std::size_t word = 0; word < scratch.denominator.size(); ++word) {
    scratch.denominator[word] |= scratch.agnostic[word];
  }
  if (anchor >= first && anchor < first + count) clear_bit(scratch.denominator, anchor - first);
  if (own.specific != nullptr) window_of(own.specific, first, count, scratch.specific);
}

// Those of the transposed relations.
template <typename T>
void transposed_windows_of(const Block<T>& block, const Relations& relations, int64_t anchor, Scratch<T>& scratch) {
  const AnchorBits own = bits_of(relations, anchor);
  const int64_t first = block.column, count = block.columns;
  window_of(own.agnostic_t, first, count, scratch.agnostic_t);
  const uint32_t* sampled_by = relations.negatives_t + anchor * words_per_row(relations.per_image);
  if (count < relations.per_image) {
    window_of(sampled_by, first % relations.per_image, count, scratch.in_denominators);
  } else {
    scratch.in_denominators.resize(words_per_row(count));
    repeat_bits(sampled_by, relations.per_image, count, scratch.in_denominators.data());
  }
  for (std::size_t word = 0; word < scratch.in_denominators.size(); ++word) {
    scratch.in_denominators[word] |= scratch.agnostic_t[word];
  }
  if (anchor >= first && anchor < first + count) clear_bit(scratch.in_denominators, anchor - first);
  if (own.specific_t != nullptr) window_of(own.specific_t, first, count, scratch.specific_t);
}

template <typename T>
void forward_row(T* logits, const Block<T>& block, T scale, const Relations& relations, int64_t anchor,
                 const AnchorSums<T>& sums, Scratch<T>& scratch) {
  const int64_t count = block.columns, words = words_per_row(count), row = anchor - relations.first;
  windows_of(block, relations, anchor, scratch);
  multiply(logits, count, scale);
  scratch.masked.resize(count);
  mask_logits(logits, scratch.denominator.data(), count, scratch.masked.data());
  T& log_denominator = sums.log_denominator[row];
  log_denominator = log_add_exp(log_denominator, log_sum_exp(scratch.masked.data(), count));
  sums.agnostic_logits[row] += masked_sum(logits, scratch.agnostic.data(), count);
  sums.agnostic_count[row] += count_bits(scratch.agnostic.data(), words);
  if (relations.specific == nullptr) return;
  sums.specific_logits[row] += masked_sum(logits, scratch.specific.data(), count);
  sums.specific_count[row] += count_bits(scratch.specific.data(), words);
}

template <typename T>
void backward_row(T* logits, const Block<T>& block, T scale, const Relations& relations, int64_t anchor,
                  const AnchorCoefficients<T>& anchors, Scratch<T>& scratch) {
  const int64_t first = block.column, count = block.columns;
  windows_of(block, relations, anchor, scratch);
  transposed_windows_of(block, relations, anchor, scratch);
  multiply(logits, count, scale);
  scratch.coefficients.assign(count, T{0});
  T* coefficients = scratch.coefficients.data();
  add_softmax(logits, scratch.denominator.data(), count, anchors.log_denominator[anchor], anchors.push[anchor],
              coefficients);
  add_softmax_of(logits, scratch.in_denominators.data(), count, anchors.log_denominator + first, anchors.push + first,
                 coefficients);
  subtract(scratch.agnostic.data(), count, anchors.pull[anchor], coefficients);
  subtract_of(scratch.agnostic_t.data(), count, anchors.pull + first, coefficients);
  if (relations.specific != nullptr) {
    subtract(scratch.specific.data(), count, anchors.pull_specific[anchor], coefficients);
    subtract_of(scratch.specific_t.data(), count, anchors.pull_specific + first, coefficients);
  }
  for (int64_t c = 0; c < count; ++c) logits[c] = scale * coefficients[c];
}

}  // namespace

template <typename T>
void contrastive_block_forward_cpu(ParallelFor run, const Block<T>& block, T inverse_temperature,
                                   const Relations& relations, const AnchorSums<T>& sums) {
  parallel_for(run, block.rows, 4, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch;
    for (int64_t row = begin; row < end; ++row) {
      forward_row(block.products + row * block.columns, block, inverse_temperature, relations, block.row + row, sums,
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
      backward_row(block.products + row * block.columns, block, inverse_temperature, relations, block.row + row,
                   anchors, scratch);
    }
  });
}

#define HPK_INSTANTIATE(T)                                                                                            \
  template void contrastive_block_forward_cpu<T>(ParallelFor, const Block<T>&, T, const Relations&,                   \
                                                 const AnchorSums<T>&);                                               \
  template void contrastive_block_backward_cpu<T>(ParallelFor, const Block<T>&, T, const Relations&,                  \
                                                  const AnchorCoefficients<T>&);
HPK_INSTANTIATE(float)
HPK_INSTANTIATE(double)
#undef HPK_INSTANTIATE

}  // namespace hpk
