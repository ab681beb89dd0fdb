// The pairs in A or S on the CPU, a row of the relations at a time, with what only they put into a denominator.
#include <initializer_list>

#include "common/exponential.h"
#include "multi_positive_contrastive/relations.h"
#include "multi_positive_contrastive/simd_loops.h"

namespace hpk {
namespace {

// What one thread works with.
template <typename T>
struct Scratch {
  Bits either, listed, denominator, in_denominators;
  std::vector<int32_t> columns;
  std::vector<T> logits, masked, coefficients, log_denominators, push, pull, pull_specific;
};

// Lists the columns of one or more relations of an anchor; null ones are passed over.
template <typename T>
void list_pairs(const Relations& relations, bool across_images, int64_t anchor,
                std::initializer_list<const uint32_t*> rows, Scratch<T>& scratch) {
  const int64_t words = words_per_row(relations.anchors);
  scratch.either.assign(words, 0u);
  for (const uint32_t* row : rows) {
    if (row != nullptr) add_bits(row, words, scratch.either.data());
  }
  clear_bit(scratch.either, anchor);
  if (across_images) clear_bits(scratch.either.data(), image_start(relations, anchor), relations.per_image);
  list_columns(scratch.either.data(), words, scratch.columns);
}

// Which of the listed columns are in A_i, and which of these only that puts into the anchor's denominator.
template <typename T>
void list_agnostic(const AnchorBits& own, Scratch<T>& scratch) {
  restrict_to(scratch.columns, own.agnostic, scratch.listed);
  restrict_to(scratch.columns, own.negatives, scratch.denominator);
  for (std::size_t word = 0; word < scratch.listed.size(); ++word) {
    scratch.denominator[word] = scratch.listed[word] & ~scratch.denominator[word];
  }
}

template <typename T>
void forward_row(const T* z, int64_t dim, T scale, const Relations& relations, bool across_images, int64_t anchor,
                 const AnchorSums<T>& sums, Scratch<T>& scratch) {
  const AnchorBits own = bits_of(relations, anchor);
  const int64_t row = anchor - relations.first;
  list_pairs(relations, across_images, anchor, {own.agnostic, own.specific}, scratch);
  const auto count = static_cast<int64_t>(scratch.columns.size());
  if (count == 0) return;
  scratch.logits.resize(count);
  dots(z + anchor * dim, z, scratch.columns.data(), count, dim, scale, scratch.logits.data());

  list_agnostic(own, scratch);
  sums.agnostic_logits[row] += masked_sum(scratch.logits.data(), scratch.listed.data(), count);
  sums.agnostic_count[row] += count_bits(scratch.listed.data(), words_per_row(count));
  scratch.masked.resize(count);
  mask_logits(scratch.logits.data(), scratch.denominator.data(), count, scratch.masked.data());
  T& log_denominator = sums.log_denominator[row];
  log_denominator = log_add_exp(log_denominator, log_sum_exp(scratch.masked.data(), count));
  if (own.specific == nullptr) return;
  restrict_to(scratch.columns, own.specific, scratch.listed);
  sums.specific_logits[row] += masked_sum(scratch.logits.data(), scratch.listed.data(), count);
  sums.specific_count[row] += count_bits(scratch.listed.data(), words_per_row(count));
}

template <typename T>
void gather(const T* values, const std::vector<int32_t>& columns, std::vector<T>& gathered) {
  gathered.resize(columns.size());
  for (std::size_t c = 0; c < columns.size(); ++c) gathered[c] = values[columns[c]];
}

// Which of the listed columns have the anchor in their denominator as a positive that they have not sampled.
template <typename T>
void list_in_denominators(const Relations& relations, const AnchorBits& own, int64_t anchor, Scratch<T>& scratch) {
  restrict_to(scratch.columns, own.agnostic_t, scratch.in_denominators);
  const int64_t words = words_per_row(relations.anchors);
  for (std::size_t c = 0; c < scratch.columns.size(); ++c) {
    const int64_t position = scratch.columns[c] % relations.per_image;
    if (test_bit(relations.negatives + position * words, anchor)) {
      clear_bit(scratch.in_denominators, static_cast<int64_t>(c));
    }
  }
}

template <typename T>
void backward_row(const T* z, int64_t dim, T scale, const Relations& relations, bool across_images, int64_t anchor,
                  const AnchorCoefficients<T>& anchors, T* grad, Scratch<T>& scratch) {
  const AnchorBits own = bits_of(relations, anchor);
  const bool symmetric = own.agnostic_t == own.agnostic && own.specific_t == own.specific;
  list_pairs(relations, across_images, anchor,
             {own.agnostic, own.specific, symmetric ? nullptr : own.agnostic_t, symmetric ? nullptr : own.specific_t},
             scratch);
  const auto count = static_cast<int64_t>(scratch.columns.size());
  if (count == 0) return;
  scratch.logits.resize(count);
  scratch.coefficients.assign(count, T{0});
  const T* logits = scratch.logits.data();
  T* coefficients = scratch.coefficients.data();
  dots(z + anchor * dim, z, scratch.columns.data(), count, dim, scale, scratch.logits.data());

  list_agnostic(own, scratch);
  subtract(scratch.listed.data(), count, anchors.pull[anchor], coefficients);
  add_softmax(logits, scratch.denominator.data(), count, anchors.log_denominator[anchor], anchors.push[anchor],
              coefficients);
  list_in_denominators(relations, own, anchor, scratch);
  gather(anchors.log_denominator, scratch.columns, scratch.log_denominators);
  gather(anchors.push, scratch.columns, scratch.push);
  add_softmax_of(logits, scratch.in_denominators.data(), count, scratch.log_denominators.data(), scratch.push.data(),
                 coefficients);
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

}  // namespace

template <typename T>
void contrastive_rows_forward_cpu(ParallelFor run, const T* z, int64_t dim, T inverse_temperature,
                                       const Relations& relations, bool across_images, const AnchorSums<T>& sums) {
  parallel_for(run, relations.rows, 16, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch;
    for (int64_t row = begin; row < end; ++row) {
      forward_row(z, dim, inverse_temperature, relations, across_images, relations.first + row, sums, scratch);
    }
  });
}

template <typename T>
void contrastive_rows_backward_cpu(ParallelFor run, const T* z, int64_t dim, T inverse_temperature,
                                        const Relations& relations, bool across_images,
                                        const AnchorCoefficients<T>& anchors, T* grad_z) {
  parallel_for(run, relations.rows, 16, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch;
    for (int64_t row = begin; row < end; ++row) {
      backward_row(z, dim, inverse_temperature, relations, across_images, relations.first + row, anchors,
                   grad_z + row * dim, scratch);
    }
  });
}

#define HPK_INSTANTIATE(T)                                                                                            \
  template void contrastive_rows_forward_cpu<T>(ParallelFor, const T*, int64_t, T, const Relations&, bool,       \
                                                     const AnchorSums<T>&);                                           \
  template void contrastive_rows_backward_cpu<T>(ParallelFor, const T*, int64_t, T, const Relations&, bool,      \
                                                      const AnchorCoefficients<T>&, T*);
HPK_INSTANTIATE(float)
HPK_INSTANTIATE(double)
#undef HPK_INSTANTIATE

}  // namespace hpk
