// Coarse products: products of rounded rows, which are fast, and how far each can be from the product of the rows
// themselves. Whoever compares products with a threshold decides by them where they are far enough from it, and
// computes `inner_product` of the few pairs where they are not: the result is exact.
//
//   x = scale q + r  and  y likewise, with q of few bits:
//   |<x, y> - scale_x scale_y <q_x, q_y>| <= |r_x| |y| + |scale_x q_x| |r_y|
#pragma once

#include <limits>

#include "common/parallel_for.h"
#include "common/portable.h"

namespace hpk {

// Rows (., dim), and what is known of each of them. `norm` is at least |x| and |scale q|; `error` is at least |r| and the
// share that rounding has in the difference above, `norm` times half of `coarse_rounding`.
template <typename T>
struct CoarseRows {
  const T* rows;
  int64_t dim;
  const T* scale;
  const T* norm;
  const T* error;
};

template <typename T>
CoarseRows<T> rows_from(const CoarseRows<T>& all, int64_t first) {
  return {all.rows + first * all.dim, all.dim, all.scale + first, all.norm + first, all.error + first};
}

// Twice as many units in the last place as summing `dim` products in T in any order can be wrong by, and some for
// scaling, for the comparison itself and for what underflows.
template <typename T>
T coarse_rounding(int64_t dim) {
  return static_cast<T>(2 * dim + 16) * std::numeric_limits<T>::epsilon();
}
template <typename T>
constexpr T kCoarseUnderflow = 4 * std::numeric_limits<T>::min();

// How far scale_i scale_j <q_i, q_j> can be from inner_product(x_i, x_j), from the norm and the error of both.
template <typename T>
HPK_HOST_DEVICE T coarse_bound(T norm_i, T error_i, T norm_j, T error_j) {
  return error_i * norm_j + norm_i * error_j + kCoarseUnderflow<T>;
}

// Rounds rows (count, dim) to int8: q = round(x / scale) with scale = max |x| / 127. Rows that are not finite, or so long
// that products may overflow, get an error that is not finite either, so that no coarse product with them decides anything.
void coarse_int8_cpu(ParallelFor run, const float* rows, int64_t count, int64_t dim, int8_t* codes, float* scale,
                     float* norm, float* error);

// The same for products of the rows as they are: scale 1, and no error but rounding.
template <typename T>
void coarse_unrounded_cpu(ParallelFor run, const T* rows, int64_t count, int64_t dim, T* scale, T* norm, T* error);

}  // namespace hpk
