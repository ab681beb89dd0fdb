// The inner product that decides: comparisons between similarities and thresholds are comparisons of these numbers,
// whatever was computed before to save them.
#pragma once

#include "common/portable.h"

namespace hpk {

// The sum of x[d] * y[d] in double, as many sums that do not wait for one another.
template <typename X, typename Y>
HPK_HOST_DEVICE double sum_of_products(const X* x, const Y* y, int64_t dim) {
  constexpr int64_t kSums = 32;
  double sums[kSums] = {};
  int64_t d = 0;
  for (; d + kSums <= dim; d += kSums) {
    HPK_SIMD
    for (int64_t s = 0; s < kSums; ++s) sums[s] += static_cast<double>(x[d + s]) * static_cast<double>(y[d + s]);
  }
  for (; d < dim; ++d) sums[d % kSums] += static_cast<double>(x[d]) * static_cast<double>(y[d]);
  for (int64_t half = kSums / 2; half > 0; half /= 2) {
    HPK_SIMD
    for (int64_t s = 0; s < half; ++s) sums[s] += sums[s + half];
  }
  return sums[0];
}

// <x, y>, for float rows rounded once, after it has been summed in double: the same number in whatever order it is
// summed, but for sums within about 2^-50 of the middle between two floats.
HPK_HOST_DEVICE float inner_product(const float* x, const float* y, int64_t dim) {
  return static_cast<float>(sum_of_products(x, y, dim));
}

// The same with a row that has been converted, to be used more than once.
HPK_HOST_DEVICE float inner_product(const double* x, const float* y, int64_t dim) {
  return static_cast<float>(sum_of_products(x, y, dim));
}

HPK_HOST_DEVICE double inner_product(const double* x, const double* y, int64_t dim) {
  return sum_of_products(x, y, dim);
}

}  // namespace hpk
