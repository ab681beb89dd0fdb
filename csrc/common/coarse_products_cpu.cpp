// Rounds rows, and bounds what that changes.
#include "common/coarse_products.h"

#include <cmath>

namespace hpk {
namespace {

constexpr double kUp = 1 + 1e-6;  // more than the rounding of a norm, and of its conversion to float

template <typename T>
HPK_HOST_DEVICE double squares_of(const T* row, int64_t dim) {
  double sum = 0;
  HPK_SIMD_SUM(sum)
  for (int64_t d = 0; d < dim; ++d) sum += static_cast<double>(row[d]) * static_cast<double>(row[d]);
  return sum;
}

HPK_MULTIVERSION double squares(const float* row, int64_t dim) { return squares_of(row, dim); }
HPK_MULTIVERSION double squares(const double* row, int64_t dim) { return squares_of(row, dim); }

// Returns the scale; `left` becomes the sum of the squares of what rounding leaves of the row.
HPK_MULTIVERSION float round_row(const float* row, int64_t dim, int8_t* codes, double* left) {
  float greatest = 0;
  HPK_PRAGMA(omp simd reduction(max : greatest))
  for (int64_t d = 0; d < dim; ++d) {
    const float size = row[d] < 0 ? -row[d] : row[d];
    greatest = size > greatest ? size : greatest;  // false for NaN, which shows in `left`
  }
  const float scale = greatest / 127.0f, inverse = scale > 0 ? 1 / scale : 0.0f;
  double sum = 0;
  HPK_SIMD_SUM(sum)
  for (int64_t d = 0; d < dim; ++d) {
    // To the nearest; what is not within int8's range (NaN, infinities, and rows whose scale underflows) becomes 0.
    const float scaled = row[d] * inverse, nearest = scaled + (scaled < 0 ? -0.5f : 0.5f);
    const int32_t code = nearest > -128.0f && nearest < 128.0f ? static_cast<int32_t>(nearest) : 0;
    codes[d] = static_cast<int8_t>(code);
    const double rest = static_cast<double>(row[d]) - static_cast<double>(scale) * code;
    sum += rest * rest;
  }
  *left = sum;
  return scale;
}

// The error of a row of this norm: infinite where products with it may overflow, which then decide nothing.
template <typename T>
T error_of(double rest, double norm, double half_rounding) {
  const bool may_overflow = !(norm < std::sqrt(static_cast<double>(std::numeric_limits<T>::max())));
  return may_overflow ? std::numeric_limits<T>::infinity() : static_cast<T>(rest * kUp + half_rounding * norm);
}

}  // namespace

void coarse_int8_cpu(ParallelFor run, const float* rows, int64_t count, int64_t dim, int8_t* codes, float* scale,
                     float* norm, float* error) {
  const double half_rounding = coarse_rounding<float>(0) / 2;  // sums of int8 products are exact
  parallel_for(run, count, 64, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double left;
      scale[i] = round_row(rows + i * dim, dim, codes + i * dim, &left);
      const double rest = std::sqrt(left), size = (std::sqrt(squares(rows + i * dim, dim)) + rest) * kUp;
      norm[i] = static_cast<float>(size);
      error[i] = error_of<float>(rest, size, half_rounding);
    }
  });
}

template <typename T>
void coarse_unrounded_cpu(ParallelFor run, const T* rows, int64_t count, int64_t dim, T* scale, T* norm, T* error) {
  const T half_rounding = coarse_rounding<T>(dim) / 2;
  parallel_for(run, count, 64, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      scale[i] = 1;
      const double size = std::sqrt(squares(rows + i * dim, dim)) * kUp;
      norm[i] = static_cast<T>(size);
      error[i] = error_of<T>(0, size, half_rounding);
    }
  });
}

template void coarse_unrounded_cpu<float>(ParallelFor, const float*, int64_t, int64_t, float*, float*, float*);
template void coarse_unrounded_cpu<double>(ParallelFor, const double*, int64_t, int64_t, double*, double*, double*);

}  // namespace hpk
