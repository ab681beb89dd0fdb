// Loops over rows of z, rows of logits and rows of bits, compiled for several instruction sets.
//
// Logits are rounded once, when they are stored, and never computed inside an exponent, where a fused multiply-add would
// round them differently: softmax terms of large logits then add up to 1.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace hpk {

#define HPK_DECLARE_ROWS(T)                                                                                           \
  /* out[c] = scale * <anchor, z[columns[c]]> for `count` rows of z. */                                               \
  void dots(const T* anchor, const T* z, const int32_t* columns, int64_t count, int64_t dim, T scale, T* out);        \
  /* The same for four anchors, `step` rows apart, and out + count for the next of them; rounded like one by one. */  \
  void dots4(const T* anchors, int64_t step, const T* z, const int32_t* columns, int64_t count, int64_t dim, T scale, \
             T* out);                                                                                                 \
  /* values *= factor. */                                                                                             \
  void multiply(T* values, int64_t count, T factor);                                                                  \
  /* sum += weights[c] * z[columns[c]], in ascending c. */                                                            \
  void add_rows(const T* weights, const T* z, const int32_t* columns, int64_t count, int64_t dim, T* sum);            \
  /* The same for four sums, `step` rows apart, and weights + count for the next of them. */                          \
  void add_rows4(const T* weights, const T* z, const int32_t* columns, int64_t count, int64_t dim, T* sums,           \
                 int64_t step);                                                                                       \
  /* out[c] = factor * exp(min(logits[c] - log_denominator, 0)). */                                                   \
  void softmax_terms(const T* logits, int64_t count, T log_denominator, T factor, T* out);                            \
  /* log of the sum of exp(logits[c]); -inf for none. */                                                              \
  T log_sum_exp(const T* logits, int64_t count);                                                                      \
  /* out[c] = logits[c] where bit c is set, else -inf. */                                                             \
  void mask_logits(const T* logits, const uint32_t* bits, int64_t count, T* out);                                     \
  /* The sum of the logits whose bit is set. */                                                                       \
  T masked_sum(const T* logits, const uint32_t* bits, int64_t count);                                                 \
  /* out[c] += factor * exp(min(logits[c] - log_denominator, 0)) where bit c is set. */                               \
  void add_softmax(const T* logits, const uint32_t* bits, int64_t count, T log_denominator, T factor, T* out);        \
  /* out[c] += factors[c] * exp(min(logits[c] - log_denominators[c], 0)) where bit c is set. */                       \
  void add_softmax_of(const T* logits, const uint32_t* bits, int64_t count, const T* log_denominators,                \
                      const T* factors, T* out);                                                                      \
  /* out[c] -= factor where bit c is set. */                                                                          \
  void subtract(const uint32_t* bits, int64_t count, T factor, T* out);                                               \
  /* out[c] -= factors[c] where bit c is set. */                                                                      \
  void subtract_of(const uint32_t* bits, int64_t count, const T* factors, T* out);

HPK_DECLARE_ROWS(float)
HPK_DECLARE_ROWS(double)
#undef HPK_DECLARE_ROWS

// How many bits are set: of whole words, and of the columns [first, last) of a row.
int64_t count_bits(const uint32_t* bits, int64_t words);
int64_t count_bits_between(const uint32_t* bits, int64_t first, int64_t last);

// bits |= others.
void add_bits(const uint32_t* others, int64_t words, uint32_t* bits);

}  // namespace hpk
