// The inner product that decides: comparisons between similarities and thresholds are comparisons of these numbers,
// whatever was computed before to save them.
#pragma once

#include "common/portable.h"

namespace hpk {

// <x, y> of float rows, summed in double and rounded once: the same number in whatever order it is summed, but for sums
// within 2^-50 of the middle between two floats.
HPK_HOST_DEVICE float inner_product(const float* x, const float* y, int64_t dim) {
  double sum = 0;
  HPK_SIMD_SUM(sum)
  for (int64_t d = 0; d < dim; ++d) sum += static_cast<double>(x[d]) * static_cast<double>(y[d]);
  return static_cast<float>(sum);
}

HPK_HOST_DEVICE double inner_product(const double* x, const double* y, int64_t dim) {
  double sum = 0;
  HPK_SIMD_SUM(sum)
  for (int64_t d = 0; d < dim; ++d) sum += x[d] * y[d];
  return sum;
}

}  // namespace hpk
