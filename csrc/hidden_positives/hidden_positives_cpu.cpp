#include "hidden_positives/hidden_positives.h"

#include <algorithm>
#include <atomic>

#include "common/bits.h"
#include "common/inner_product.h"

namespace hpk {
namespace {

// The smaller of two thresholds, or NaN if either is: a pair that cannot be judged is no positive.
template <typename T>
HPK_HOST_DEVICE T smaller(T a, T b) {
  return a < b || a != a ? a : b;
}

// The thresholds of the two bits of a pair, (i, j) and (j, i).
template <typename T>
struct Limits {
  T own, mirrored;
};

template <bool kSymmetric, typename T>
HPK_HOST_DEVICE Limits<T> limits_of(T row, T column) {
  if constexpr (kSymmetric) {
    const T both = smaller(row, column);
    return {both, both};
  }
  return {row, column};
}

// Of up to 32 pairs of a row: which exceed their limits for sure, and for which either is open.
struct Verdicts {
  uint32_t above, mirrored, open;
};

template <bool kSymmetric, typename Coarse, typename T>
HPK_HOST_DEVICE Verdicts judge(const Coarse* products, const CoarseRows<T>& features, const T* thresholds, int64_t row,
                               int64_t column, int64_t count) {
  const T scale = features.scale[row], norm = features.norm[row], error = features.error[row];
  const T row_threshold = thresholds[row];
  const T* scales = features.scale + column;
  const T* norms = features.norm + column;
  const T* errors = features.error + column;
  const T* of_columns = thresholds + column;
  uint32_t above = 0, mirrored = 0, open = 0;
  HPK_PRAGMA(omp simd reduction(| : above, mirrored, open))
  for (int64_t j = 0; j < count; ++j) {
    const T product = scale * static_cast<T>(products[j]) * scales[j];
    const T bound = coarse_bound(norm, error, norms[j], errors[j]);
    const Limits<T> limits = limits_of<kSymmetric>(row_threshold, of_columns[j]);
    // Written so that NaN anywhere leaves the pair open.
    const bool is_above = product - bound > limits.own, is_below = product + bound < limits.own;
    above |= (is_above ? 1u : 0u) << j;
    if constexpr (kSymmetric) {
      open |= (is_above || is_below ? 0u : 1u) << j;
    } else {
      const bool mirror_above = product - bound > limits.mirrored, mirror_below = product + bound < limits.mirrored;
      mirrored |= (mirror_above ? 1u : 0u) << j;
      open |= ((is_above || is_below) && (mirror_above || mirror_below) ? 0u : 1u) << j;
    }
  }
  return {above, kSymmetric ? above : mirrored, open};
}

// A band of up to 32 rows from `row` on and its words, and their transposes. Returns the number of open pairs.
template <bool kSymmetric, typename Coarse, typename T>
HPK_HOST_DEVICE int64_t pack_band_of(const ProductTile<Coarse>& tile, const CoarseRows<T>& features, const T* thresholds,
                                     int64_t row, int64_t anchors, uint32_t* bits) {
  const int64_t words = words_per_row(anchors), column_end = tile.column + tile.columns;
  const int64_t rows = tile.row + tile.rows - row < 32 ? tile.row + tile.rows - row : 32;
  int64_t open_pairs = 0;
  for (int64_t column = tile.column > row ? tile.column : row; column < column_end; column += 32) {
    const int64_t columns = column_end - column < 32 ? column_end - column : 32;
    uint32_t block[32], transposed[32];
    for (int64_t i = 0; i < 32; ++i) {
      block[i] = transposed[i] = 0;
      if (i < rows) {
        const Coarse* of_row = tile.products + (row + i - tile.row) * tile.columns + (column - tile.column);
        Verdicts verdicts = columns == 32
                                ? judge<kSymmetric>(of_row, features, thresholds, row + i, column, 32)
                                : judge<kSymmetric>(of_row, features, thresholds, row + i, column, columns);
        // On the diagonal only the columns after the row count.
        const uint32_t counted = column != row ? ~0u : i == 31 ? 0u : ~0u << (i + 1);
        verdicts.above &= counted, verdicts.mirrored &= counted;
        for (uint32_t left = verdicts.open & counted; left != 0; left &= left - 1) {
          const int64_t j = column + __builtin_ctz(left);
          const T product =
              inner_product(features.rows + (row + i) * features.dim, features.rows + j * features.dim, features.dim);
          const Limits<T> limits = limits_of<kSymmetric>(thresholds[row + i], thresholds[j]);
          if (product > limits.own) verdicts.above |= left & -left;
          if (product > limits.mirrored) verdicts.mirrored |= left & -left;
          ++open_pairs;
        }
        block[i] = verdicts.above, transposed[i] = verdicts.mirrored;
      }
    }
    transpose_block(transposed);
    for (int64_t i = 0; i < 32; ++i) {
      if (column == row) block[i] |= transposed[i];
      if (i < rows) bits[(row + i) * words + column / 32] = block[i];
      if (column != row && i < columns) bits[(column + i) * words + row / 32] = transposed[i];
    }
  }
  return open_pairs;
}

#define HPK_DEFINE_BAND(Coarse, T)                                                                                    \
  HPK_MULTIVERSION int64_t pack_band(const ProductTile<Coarse>& tile, const CoarseRows<T>& features,                  \
                                     const T* thresholds, bool symmetric, int64_t row, int64_t anchors,               \
                                     uint32_t* bits) {                                                                \
    return symmetric ? pack_band_of<true>(tile, features, thresholds, row, anchors, bits)                             \
                     : pack_band_of<false>(tile, features, thresholds, row, anchors, bits);                           \
  }
HPK_DEFINE_BAND(int32_t, float)
HPK_DEFINE_BAND(float, float)
HPK_DEFINE_BAND(double, double)
#undef HPK_DEFINE_BAND

}  // namespace

template <typename Coarse, typename T>
int64_t hidden_positives_pack_cpu(ParallelFor run, const ProductTile<Coarse>& tile, const CoarseRows<T>& features,
                                  const T* threshold, bool symmetric, int64_t anchors, uint32_t* bits) {
  std::atomic<int64_t> open_pairs{0};
  parallel_for(run, words_per_row(tile.rows), 1, [&](int64_t begin, int64_t end) {
    int64_t open = 0;
    for (int64_t band = begin; band < end; ++band) {
      open += pack_band(tile, features, threshold, symmetric, tile.row + 32 * band, anchors, bits);
    }
    open_pairs += open;
  });
  return open_pairs;
}

#define HPK_INSTANTIATE(Coarse, T)                                                                                    \
  template int64_t hidden_positives_pack_cpu<Coarse, T>(ParallelFor, const ProductTile<Coarse>&, const CoarseRows<T>&, \
                                                        const T*, bool, int64_t, uint32_t*);
HPK_INSTANTIATE(int32_t, float)
HPK_INSTANTIATE(float, float)
HPK_INSTANTIATE(double, double)
#undef HPK_INSTANTIATE

void transpose_bits_cpu(ParallelFor run, const uint32_t* bits, int64_t rows, int64_t columns, uint32_t* transposed) {
  const int64_t words_in = words_per_row(columns), words_out = words_per_row(rows);
  parallel_for(run, words_in, 1, [=](int64_t begin, int64_t end) {
    for (int64_t band = begin; band < end; ++band) {
      for (int64_t word = 0; word < words_out; ++word) {
        uint32_t block[32];
        for (int64_t i = 0; i < 32; ++i) {
          block[i] = 32 * word + i < rows ? bits[(32 * word + i) * words_in + band] : 0u;
        }
        transpose_block(block);
        for (int64_t i = 0; i < 32 && 32 * band + i < columns; ++i) {
          transposed[(32 * band + i) * words_out + word] = block[i];
        }
      }
    }
  });
}

}  // namespace hpk
