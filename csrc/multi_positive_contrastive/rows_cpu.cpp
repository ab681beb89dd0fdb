#include "multi_positive_contrastive/rows.h"

#include <cmath>
#include <limits>

#include "common/exponential.h"

namespace hpk {
namespace {

// Four rows at a time, so that each load of the anchor serves four logits. The last ones are repeated to make up four:
// a product is then rounded alike wherever it stands in the list, so that forward and backward see the same logits.
template <typename T>
HPK_HOST_DEVICE void dots_of(const T* anchor, const T* z, const int32_t* columns, int64_t count, int64_t dim, T scale,
                             T* out) {
  const int64_t last = count - 1;
  for (int64_t c = 0; c < count; c += 4) {
    const int64_t c1 = c + 1 < count ? c + 1 : last, c2 = c + 2 < count ? c + 2 : last, c3 = c + 3 < count ? c + 3 : last;
    const T* z0 = z + columns[c] * dim;
    const T* z1 = z + columns[c1] * dim;
    const T* z2 = z + columns[c2] * dim;
    const T* z3 = z + columns[c3] * dim;
    T s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    HPK_SIMD_SUM(s0, s1, s2, s3)
    for (int64_t d = 0; d < dim; ++d) {
      s0 += anchor[d] * z0[d];
      s1 += anchor[d] * z1[d];
      s2 += anchor[d] * z2[d];
      s3 += anchor[d] * z3[d];
    }
    out[c] = scale * s0;
    out[c1] = scale * s1;
    out[c2] = scale * s2;
    out[c3] = scale * s3;
  }
}

template <typename T>
HPK_HOST_DEVICE void add_rows_of(const T* weights, const T* z, const int32_t* columns, int64_t count, int64_t dim,
                                 T* sum) {
  int64_t c = 0;
  for (; c + 4 <= count; c += 4) {
    const T* z0 = z + columns[c] * dim;
    const T* z1 = z + columns[c + 1] * dim;
    const T* z2 = z + columns[c + 2] * dim;
    const T* z3 = z + columns[c + 3] * dim;
    const T w0 = weights[c], w1 = weights[c + 1], w2 = weights[c + 2], w3 = weights[c + 3];
    HPK_SIMD
    for (int64_t d = 0; d < dim; ++d) sum[d] += w0 * z0[d] + w1 * z1[d] + w2 * z2[d] + w3 * z3[d];
  }
  for (; c < count; ++c) {
    const T* row = z + columns[c] * dim;
    const T weight = weights[c];
    HPK_SIMD
    for (int64_t d = 0; d < dim; ++d) sum[d] += weight * row[d];
  }
}

template <typename T>
HPK_HOST_DEVICE T log_sum_exp_of(const T* logits, int64_t count) {
  T greatest = -std::numeric_limits<T>::infinity();
  HPK_PRAGMA(omp simd reduction(max : greatest))
  for (int64_t c = 0; c < count; ++c) greatest = logits[c] > greatest ? logits[c] : greatest;
  if (greatest == -std::numeric_limits<T>::infinity()) return greatest;
  T sum = 0;
  HPK_SIMD_SUM(sum)
  for (int64_t c = 0; c < count; ++c) sum += exp_nonpositive(logits[c] - greatest);
  return greatest + std::log(sum);
}

template <typename T>
HPK_HOST_DEVICE void mask_logits_of(const T* logits, const uint32_t* bits, int64_t count, T* out) {
  for (int64_t first = 0; first < count; first += 32) {
    const uint32_t word = bits[first / 32];
    const int64_t end = count - first < 32 ? count - first : 32;
    HPK_SIMD
    for (int64_t c = 0; c < end; ++c) {
      out[first + c] = word >> c & 1u ? logits[first + c] : -std::numeric_limits<T>::infinity();
    }
  }
}

template <typename T>
HPK_HOST_DEVICE T masked_sum_of(const T* logits, const uint32_t* bits, int64_t count) {
  T sum = 0;
  for (int64_t first = 0; first < count; first += 32) {
    const uint32_t word = bits[first / 32];
    if (word == 0) continue;
    const int64_t end = count - first < 32 ? count - first : 32;
    HPK_SIMD_SUM(sum)
    for (int64_t c = 0; c < end; ++c) sum += word >> c & 1u ? logits[first + c] : T{0};
  }
  return sum;
}

template <typename T, typename Shift, typename Factor>
HPK_HOST_DEVICE void add_softmax_any(const T* logits, const uint32_t* bits, int64_t count, Shift shift, Factor factor,
                                     T* out) {
  for (int64_t first = 0; first < count; first += 32) {
    const uint32_t word = bits[first / 32];
    if (word == 0) continue;
    const int64_t end = count - first < 32 ? count - first : 32;
    HPK_SIMD
    for (int64_t c = 0; c < end; ++c) {
      const T exponent = logits[first + c] - shift(first + c);
      const T term = factor(first + c) * exp_nonpositive(exponent < 0 ? exponent : T{0});
      out[first + c] += word >> c & 1u ? term : T{0};
    }
  }
}

template <typename T, typename Factor>
HPK_HOST_DEVICE void subtract_any(const uint32_t* bits, int64_t count, Factor factor, T* out) {
  for (int64_t first = 0; first < count; first += 32) {
    const uint32_t word = bits[first / 32];
    if (word == 0) continue;
    const int64_t end = count - first < 32 ? count - first : 32;
    HPK_SIMD
    for (int64_t c = 0; c < end; ++c) out[first + c] -= word >> c & 1u ? factor(first + c) : T{0};
  }
}

}  // namespace

#define HPK_DEFINE_ROWS(T)                                                                                            \
  HPK_MULTIVERSION void dots(const T* anchor, const T* z, const int32_t* columns, int64_t count, int64_t dim,         \
                             T scale, T* out) {                                                                       \
    dots_of(anchor, z, columns, count, dim, scale, out);                                                              \
  }                                                                                                                   \
  HPK_MULTIVERSION void multiply(T* values, int64_t count, T factor) {                                                \
    HPK_SIMD                                                                                                          \
    for (int64_t c = 0; c < count; ++c) values[c] *= factor;                                                          \
  }                                                                                                                   \
  HPK_MULTIVERSION void add_rows(const T* weights, const T* z, const int32_t* columns, int64_t count, int64_t dim,    \
                                 T* sum) {                                                                            \
    add_rows_of(weights, z, columns, count, dim, sum);                                                                \
  }                                                                                                                   \
  HPK_MULTIVERSION T log_sum_exp(const T* logits, int64_t count) { return log_sum_exp_of(logits, count); }            \
  HPK_MULTIVERSION void mask_logits(const T* logits, const uint32_t* bits, int64_t count, T* out) {                   \
    mask_logits_of(logits, bits, count, out);                                                                         \
  }                                                                                                                   \
  HPK_MULTIVERSION T masked_sum(const T* logits, const uint32_t* bits, int64_t count) {                               \
    return masked_sum_of(logits, bits, count);                                                                        \
  }                                                                                                                   \
  HPK_MULTIVERSION void add_softmax(const T* logits, const uint32_t* bits, int64_t count, T log_denominator,          \
                                    T factor, T* out) {                                                               \
    add_softmax_any(logits, bits, count, [=](int64_t) { return log_denominator; },                                    \
                    [=](int64_t) { return factor; }, out);                                                            \
  }                                                                                                                   \
  HPK_MULTIVERSION void add_softmax_of(const T* logits, const uint32_t* bits, int64_t count,                          \
                                       const T* log_denominators, const T* factors, T* out) {                         \
    add_softmax_any(logits, bits, count, [=](int64_t c) { return log_denominators[c]; },                              \
                    [=](int64_t c) { return factors[c]; }, out);                                                      \
  }                                                                                                                   \
  HPK_MULTIVERSION void subtract(const uint32_t* bits, int64_t count, T factor, T* out) {                             \
    subtract_any(bits, count, [=](int64_t) { return factor; }, out);                                                  \
  }                                                                                                                   \
  HPK_MULTIVERSION void subtract_of(const uint32_t* bits, int64_t count, const T* factors, T* out) {                  \
    subtract_any(bits, count, [=](int64_t c) { return factors[c]; }, out);                                            \
  }

HPK_DEFINE_ROWS(float)
HPK_DEFINE_ROWS(double)
#undef HPK_DEFINE_ROWS

}  // namespace hpk
