// Thresholds and packs tiles of coarse products on the CPU; where one is too close to call, the inner product decides.
#include "hidden_positives/hidden_positives.h"

#include <algorithm>
#include <atomic>

#include "common/bits.h"
#include "common/inner_product.h"

namespace hpk {
namespace {

// The thresholds that decide a pair: the smaller, the greater, or each that of its own anchor's bit, (i, j) and (j, i).
enum class Limit { kSmaller, kGreater, kOwn };

// The smaller of two thresholds, or NaN if either is: a pair that cannot be judged is no positive.
template <typename T>
HPK_HOST_DEVICE T smaller(T a, T b) {
  return a < b || a != a ? a : b;
}

// The greater, likewise.
template <typename T>
HPK_HOST_DEVICE T greater(T a, T b) {
  return a > b || a != a ? a : b;
}

// The thresholds of the two bits of a pair, (i, j) and (j, i).
template <typename T>
struct Limits {
  T own, mirrored;
};

template <Limit kLimit, typename T>
HPK_HOST_DEVICE Limits<T> limits_of(T row, T column) {
  if constexpr (kLimit == Limit::kOwn) return {row, column};
  const T both = kLimit == Limit::kSmaller ? smaller(row, column) : greater(row, column);
  return {both, both};
}

// Of up to 32 pairs of a row: which exceed their limits for sure, and for which either is open.
struct Verdicts {
  uint32_t above, mirrored, open;
};

// The pairs of the first of `features` with the first `count` of `others`, whose thresholds are given.
template <Limit kLimit, typename Coarse, typename T>
HPK_HOST_DEVICE Verdicts judge(const Coarse* products, const CoarseRows<T>& features, T threshold,
                               const CoarseRows<T>& others, const T* of_others, int64_t count) {
  const T scale = *features.scale, norm = *features.norm, error = *features.error;
  uint32_t above = 0, mirrored = 0, open = 0;
  HPK_PRAGMA(omp simd reduction(| : above, mirrored, open))
  for (int64_t j = 0; j < count; ++j) {
    const T product = scale * static_cast<T>(products[j]) * others.scale[j];
    const T bound = coarse_bound(norm, error, others.norm[j], others.error[j]);
    const Limits<T> limits = limits_of<kLimit>(threshold, of_others[j]);
    // Written so that NaN anywhere leaves the pair open.
    const bool is_above = product - bound > limits.own, is_below = product + bound < limits.own;
    above |= (is_above ? 1u : 0u) << j;
    if constexpr (kLimit != Limit::kOwn) {
      open |= (is_above || is_below ? 0u : 1u) << j;
    } else {
      const bool mirror_above = product - bound > limits.mirrored, mirror_below = product + bound < limits.mirrored;
      mirrored |= (mirror_above ? 1u : 0u) << j;
      open |= ((is_above || is_below) && (mirror_above || mirror_below) ? 0u : 1u) << j;
    }
  }
  return {above, kLimit != Limit::kOwn ? above : mirrored, open};
}

// The same for those of the pairs that are `counted`, with nothing left open: `open` is how many inner products that took.
template <Limit kLimit, typename Coarse, typename T>
HPK_HOST_DEVICE Verdicts decide(const Coarse* products, const CoarseRows<T>& features, T threshold,
                                const CoarseRows<T>& others, const T* of_others, int64_t count, uint32_t counted) {
  Verdicts verdicts = count == 32 ? judge<kLimit>(products, features, threshold, others, of_others, 32)
                                  : judge<kLimit>(products, features, threshold, others, of_others, count);
  const uint32_t open = verdicts.open & counted;
  verdicts = {verdicts.above & counted, verdicts.mirrored & counted, 0};
  for (uint32_t left = open; left != 0; left &= left - 1) {
    const int64_t j = __builtin_ctz(left);
    const T product = inner_product(features.rows, others.rows + j * others.dim, features.dim);
    const Limits<T> limits = limits_of<kLimit>(threshold, of_others[j]);
    if (product > limits.own) verdicts.above |= left & -left;
    if (product > limits.mirrored) verdicts.mirrored |= left & -left;
    ++verdicts.open;
  }
  return verdicts;
}

// A band of up to 32 rows from `row` on and its words, and their transposes. Returns the number of open pairs.
template <Limit kLimit, typename Coarse, typename T>
HPK_HOST_DEVICE int64_t pack_band_of(const ProductTile<Coarse>& tile, const CoarseRows<T>& features, const T* thresholds,
                                     int64_t row, int64_t anchors, uint32_t* bits) {
  const int64_t words = words_per_row(anchors), column_end = tile.column + tile.columns;
  const int64_t rows = tile.row + tile.rows - row < 32 ? tile.row + tile.rows - row : 32;
  int64_t open_pairs = 0;
  for (int64_t column = tile.column > row ? tile.column : row; column < column_end; column += 32) {
    const int64_t columns = column_end - column < 32 ? column_end - column : 32;
    const CoarseRows<T> others = rows_from(features, column);
    uint32_t block[32], transposed[32];
    for (int64_t i = 0; i < 32; ++i) {
      block[i] = transposed[i] = 0;
      if (i < rows) {
        const Coarse* of_row = tile.products + (row + i - tile.row) * tile.columns + (column - tile.column);
        // On the diagonal only the columns after the row count.
        const uint32_t counted = column != row ? ~0u : i == 31 ? 0u : ~0u << (i + 1);
        const Verdicts verdicts = decide<kLimit>(of_row, rows_from(features, row + i), thresholds[row + i], others,
                                                 thresholds + column, columns, counted);
        block[i] = verdicts.above, transposed[i] = verdicts.mirrored;
        open_pairs += verdicts.open;
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

// Row `row` of a tile of anchors and keys. Returns the number of open pairs.
template <Limit kLimit, typename Coarse, typename T>
HPK_HOST_DEVICE int64_t pack_row_of(const ProductTile<Coarse>& tile, const CoarseRows<T>& features, const T* thresholds,
                                    const Keys<T>& keys, int64_t row, uint32_t* bits) {
  const Coarse* of_row = tile.products + (row - tile.row) * tile.columns;
  uint32_t* const words = bits + row * words_per_row(keys.count);
  const CoarseRows<T> anchor = rows_from(features, row);
  int64_t open_pairs = 0;
  for (int64_t column = tile.column; column < tile.column + tile.columns; column += 32) {
    const int64_t own = keys.first + row - column;
    const Verdicts verdicts = decide<kLimit>(of_row + (column - tile.column), anchor, thresholds[row],
                                             rows_from(keys.features, column), keys.threshold + column,
                                             std::min<int64_t>(tile.column + tile.columns - column, 32),
                                             own >= 0 && own < 32 ? ~(1u << own) : ~0u);
    words[column / 32] = verdicts.above;
    open_pairs += verdicts.open;
  }
  return open_pairs;
}

#define HPK_DEFINE_PACKING(Coarse, T)                                                                                 \
  HPK_MULTIVERSION int64_t pack_band(const ProductTile<Coarse>& tile, const CoarseRows<T>& features,                  \
                                     const T* thresholds, bool symmetric, int64_t row, int64_t anchors,               \
                                     uint32_t* bits) {                                                                \
    return symmetric ? pack_band_of<Limit::kSmaller>(tile, features, thresholds, row, anchors, bits)                  \
                     : pack_band_of<Limit::kOwn>(tile, features, thresholds, row, anchors, bits);                     \
  }                                                                                                                   \
  HPK_MULTIVERSION int64_t pack_row(const ProductTile<Coarse>& tile, const CoarseRows<T>& features,                   \
                                    const T* thresholds, const Keys<T>& keys, int64_t row, uint32_t* bits) {          \
    return keys.either ? pack_row_of<Limit::kSmaller>(tile, features, thresholds, keys, row, bits)                    \
                       : pack_row_of<Limit::kGreater>(tile, features, thresholds, keys, row, bits);                   \
  }
HPK_DEFINE_PACKING(int32_t, float)
HPK_DEFINE_PACKING(float, float)
HPK_DEFINE_PACKING(double, double)
#undef HPK_DEFINE_PACKING

// Calls `pack` for each of `count` bands or rows; returns the number of open pairs.
template <typename Body>
int64_t pack_all(ParallelFor run, int64_t count, Body pack) {
  std::atomic<int64_t> open_pairs{0};
  parallel_for(run, count, 1, [&](int64_t begin, int64_t end) {
    int64_t open = 0;
    for (int64_t i = begin; i < end; ++i) open += pack(i);
    open_pairs += open;
  });
  return open_pairs;
}

}  // namespace

template <typename Coarse, typename T>
int64_t hidden_positives_pack_cpu(ParallelFor run, const ProductTile<Coarse>& tile, const CoarseRows<T>& features,
                                  const T* threshold, bool symmetric, int64_t anchors, uint32_t* bits) {
  return pack_all(run, words_per_row(tile.rows), [&](int64_t band) {
    return pack_band(tile, features, threshold, symmetric, tile.row + 32 * band, anchors, bits);
  });
}

template <typename Coarse, typename T>
int64_t hidden_positives_pack_between_cpu(ParallelFor run, const ProductTile<Coarse>& tile, const CoarseRows<T>& features,
                                          const T* threshold, const Keys<T>& keys, uint32_t* bits) {
  return pack_all(run, tile.rows,
                  [&](int64_t row) { return pack_row(tile, features, threshold, keys, tile.row + row, bits); });
}

#define HPK_INSTANTIATE(Coarse, T)                                                                                    \
  template int64_t hidden_positives_pack_cpu<Coarse, T>(ParallelFor, const ProductTile<Coarse>&, const CoarseRows<T>&, \
                                                        const T*, bool, int64_t, uint32_t*);                          \
  template int64_t hidden_positives_pack_between_cpu<Coarse, T>(ParallelFor, const ProductTile<Coarse>&,               \
                                                                const CoarseRows<T>&, const T*, const Keys<T>&,        \
                                                                uint32_t*);
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
