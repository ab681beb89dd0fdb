// See simd_loops.h.
#include "multi_positive_contrastive/simd_loops.h"

#include <cmath>
#include <limits>

#include "common/bits.h"
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

// Four anchors and four rows at a time: sixteen sums for eight loads.
template <typename T>
HPK_HOST_DEVICE void dots4_of(const T* anchors, int64_t step, const T* z, const int32_t* columns, int64_t count,
                              int64_t dim, T scale, T* out) {
  const T* a0 = anchors;
  const T* a1 = a0 + step * dim;
  const T* a2 = a1 + step * dim;
  const T* a3 = a2 + step * dim;
  const int64_t last = count - 1;
  for (int64_t c = 0; c < count; c += 4) {
    const int64_t c1 = c + 1 < count ? c + 1 : last, c2 = c + 2 < count ? c + 2 : last, c3 = c + 3 < count ? c + 3 : last;
    const T* z0 = z + columns[c] * dim;
    const T* z1 = z + columns[c1] * dim;
    const T* z2 = z + columns[c2] * dim;
    const T* z3 = z + columns[c3] * dim;
    T s00 = 0, s01 = 0, s02 = 0, s03 = 0, s10 = 0, s11 = 0, s12 = 0, s13 = 0;
    T s20 = 0, s21 = 0, s22 = 0, s23 = 0, s30 = 0, s31 = 0, s32 = 0, s33 = 0;
    HPK_SIMD_SUM(s00, s01, s02, s03, s10, s11, s12, s13, s20, s21, s22, s23, s30, s31, s32, s33)
    for (int64_t d = 0; d < dim; ++d) {
      s00 += a0[d] * z0[d];
      s01 += a0[d] * z1[d];
      s02 += a0[d] * z2[d];
      s03 += a0[d] * z3[d];
      s10 += a1[d] * z0[d];
      s11 += a1[d] * z1[d];
      s12 += a1[d] * z2[d];
      s13 += a1[d] * z3[d];
      s20 += a2[d] * z0[d];
      s21 += a2[d] * z1[d];
      s22 += a2[d] * z2[d];
      s23 += a2[d] * z3[d];
      s30 += a3[d] * z0[d];
      s31 += a3[d] * z1[d];
      s32 += a3[d] * z2[d];
      s33 += a3[d] * z3[d];
    }
    const T sums[4][4] = {{s00, s01, s02, s03}, {s10, s11, s12, s13}, {s20, s21, s22, s23}, {s30, s31, s32, s33}};
    const int64_t places[4] = {c, c1, c2, c3};
    for (int64_t a = 0; a < 4; ++a) {
      for (int64_t b = 0; b < 4; ++b) out[a * count + places[b]] = scale * sums[a][b];
    }
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

// A stretch of the four sums at a time, which stays in registers while all rows are added to it.
template <typename T>
HPK_HOST_DEVICE void add_rows4_of(const T* weights, const T* z, const int32_t* columns, int64_t count, int64_t dim,
                                  T* sums, int64_t step) {
  constexpr int64_t kStretch = 256 / sizeof(T);
  for (int64_t first = 0; first < dim; first += kStretch) {
    const int64_t length = dim - first < kStretch ? dim - first : kStretch;
    T added[4][kStretch] = {};
    if (length == kStretch) {
      for (int64_t c = 0; c < count; ++c) {
        const T* row = z + columns[c] * dim + first;
        for (int64_t a = 0; a < 4; ++a) {
          const T weight = weights[a * count + c];
          HPK_SIMD
          for (int64_t d = 0; d < kStretch; ++d) added[a][d] += weight * row[d];
        }
      }
    } else {
      for (int64_t c = 0; c < count; ++c) {
        const T* row = z + columns[c] * dim + first;
        for (int64_t a = 0; a < 4; ++a) {
          const T weight = weights[a * count + c];
          for (int64_t d = 0; d < length; ++d) added[a][d] += weight * row[d];
        }
      }
    }
    for (int64_t a = 0; a < 4; ++a) {
      T* sum = sums + a * step * dim + first;
      for (int64_t d = 0; d < length; ++d) sum[d] += added[a][d];
    }
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
  HPK_MULTIVERSION void dots4(const T* anchors, int64_t step, const T* z, const int32_t* columns, int64_t count,      \
                              int64_t dim, T scale, T* out) {                                                         \
    dots4_of(anchors, step, z, columns, count, dim, scale, out);                                                      \
  }                                                                                                                   \
  HPK_MULTIVERSION void add_rows4(const T* weights, const T* z, const int32_t* columns, int64_t count, int64_t dim,   \
                                  T* sums, int64_t step) {                                                            \
    add_rows4_of(weights, z, columns, count, dim, sums, step);                                                        \
  }                                                                                                                   \
  HPK_MULTIVERSION void softmax_terms(const T* logits, int64_t count, T log_denominator, T factor, T* out) {          \
    HPK_SIMD                                                                                                          \
    for (int64_t c = 0; c < count; ++c) {                                                                             \
      const T exponent = logits[c] - log_denominator;                                                                 \
      out[c] = factor * exp_nonpositive(exponent < 0 ? exponent : T{0});                                              \
    }                                                                                                                 \
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

HPK_MULTIVERSION int64_t count_bits(const uint32_t* bits, int64_t words) {
  int64_t count = 0;
  for (int64_t word = 0; word < words; ++word) count += __builtin_popcount(bits[word]);
  return count;
}

HPK_MULTIVERSION int64_t count_bits_between(const uint32_t* bits, int64_t first, int64_t last) {
  int64_t count = 0;
  for (int64_t word = first >> 5; word <= (last - 1) >> 5; ++word) {
    const int64_t begin = first - 32 * word, end = last - 32 * word;
    uint32_t counted = bits[word];
    if (begin > 0) counted &= ~0u << begin;
    if (end < 32) counted &= (1u << end) - 1u;
    count += __builtin_popcount(counted);
  }
  return count;
}

HPK_MULTIVERSION void add_bits(const uint32_t* others, int64_t words, uint32_t* bits) {
  HPK_SIMD
  for (int64_t word = 0; word < words; ++word) bits[word] |= others[word];
}

}  // namespace hpk
