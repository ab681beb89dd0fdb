// The gradient of the logits of a tile.
#include "contrastive/contrastive.h"

#include <algorithm>
#include <cmath>

#include "common/bits.h"
#include "common/exponential.h"
#include "contrastive/tile_rows.h"

namespace hpk {
namespace {

// grad[c] = push exp(min(logits[c] - shift, 0)) where bit c is set, else 0; with columns also pushes[c] exp(min(logits[c]
// - shifts[c], 0)), for the columns of one word.
template <typename T, bool kColumns>
HPK_HOST_DEVICE void softmax_of_word(T* logits, uint32_t bits, int64_t count, T shift, T push, const T* shifts,
                                     const T* pushes) {
  HPK_SIMD
  for (int64_t c = 0; c < count; ++c) {
    const T exponent = logits[c] - shift;
    T term = push * exp_nonpositive(exponent < 0 ? exponent : T{0});
    if (kColumns) {
      const T mirrored = logits[c] - shifts[c];
      term += pushes[c] * exp_nonpositive(mirrored < 0 ? mirrored : T{0});
    }
    logits[c] = bits >> c & 1u ? term : T{0};
  }
}

template <typename T, bool kColumns>
HPK_HOST_DEVICE void gradient_along(T* logits, int64_t count, const RowPairs<T>& pairs, bool inside, const T* numbers,
                                    const T* columns) {
  const T shift = numbers[0], push = numbers[1], pull_shift = numbers[2], pull = numbers[3];
  const T* shifts = columns;
  const T* pushes = columns + count;
  const T* pull_shifts = columns + 2 * count;
  const T* pulls = columns + 3 * count;
  for (int64_t first = 0; first < count; first += 32) {
    const int64_t end = count - first < 32 ? count - first : 32;
    const uint32_t of_positives = pairs.positives[first / 32];
    T kept[32];  // logits of positives, which are overwritten
    if (inside && of_positives != 0) {
      for (int64_t c = 0; c < end; ++c) kept[c] = logits[first + c];
    }
    if (end == 32) {
      softmax_of_word<T, kColumns>(logits + first, pairs.denominator[first / 32], 32, shift, push, shifts + first, pushes + first);
    } else {
      softmax_of_word<T, kColumns>(logits + first, pairs.denominator[first / 32], end, shift, push, shifts + first, pushes + first);
    }
    for (uint32_t left = of_positives; left != 0; left &= left - 1) {
      const int64_t c = __builtin_ctz(left), column = first + c;
      const T weight = pairs.weights == nullptr ? T{1} : pairs.weights[column];
      if (inside) {
        const T term = kept[c] + std::log(weight);
        logits[column] -= pull * std::exp(std::min(term - pull_shift, T{0}));
        if (kColumns) logits[column] -= pulls[column] * std::exp(std::min(term - pull_shifts[column], T{0}));
      } else {
        logits[column] -= weight * (kColumns ? pull + pulls[column] : pull);
      }
    }
  }
}

}  // namespace

#define HPK_DEFINE_ROWS(T)                                                                                            \
  HPK_MULTIVERSION void scale_row(T* products, int64_t count, T scale, const T* bias) {                               \
    if (bias == nullptr) {                                                                                            \
      HPK_SIMD                                                                                                        \
      for (int64_t c = 0; c < count; ++c) products[c] *= scale;                                                       \
    } else {                                                                                                          \
      HPK_SIMD                                                                                                        \
      for (int64_t c = 0; c < count; ++c) products[c] = products[c] * scale + bias[c];                                \
    }                                                                                                                 \
  }                                                                                                                   \
  HPK_MULTIVERSION void gradient_of_row(T* logits, int64_t count, const RowPairs<T>& pairs, bool inside,              \
                                        const T* numbers, const T* columns) {                                         \
    if (columns == nullptr) {                                                                                         \
      gradient_along<T, false>(logits, count, pairs, inside, numbers, logits);                                        \
    } else {                                                                                                          \
      gradient_along<T, true>(logits, count, pairs, inside, numbers, columns);                                        \
    }                                                                                                                 \
  }
HPK_DEFINE_ROWS(float)
HPK_DEFINE_ROWS(double)
#undef HPK_DEFINE_ROWS

template <typename T>
void contrastive_gradient_cpu(ParallelFor run, const LogitTile<T>& tile, const TilePairs<T>& pairs, bool inside,
                              const T* rows, const T* columns) {
  for_each_row(run, tile, [&](int64_t row) {
    gradient_of_row(tile.logits + row * tile.columns, tile.columns, row_of(pairs, tile, row), inside, rows + 4 * row,
                    columns);
  });
}

template void contrastive_gradient_cpu<float>(ParallelFor, const LogitTile<float>&, const TilePairs<float>&, bool,
                                              const float*, const float*);
template void contrastive_gradient_cpu<double>(ParallelFor, const LogitTile<double>&, const TilePairs<double>&, bool,
                                               const double*, const double*);

}  // namespace hpk
