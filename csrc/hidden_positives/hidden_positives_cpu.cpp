#include "hidden_positives/hidden_positives.h"

#include <algorithm>

#include "common/bits.h"

namespace hpk {
namespace {

// Which of `count` <= 32 products exceed the smaller of the row's and the column's threshold.
template <typename T>
HPK_HOST_DEVICE uint32_t compare_word_of(const T* products, T row_threshold, const T* thresholds, int64_t count) {
  uint32_t word = 0;
  HPK_PRAGMA(omp simd reduction(| : word))
  for (int64_t j = 0; j < count; ++j) {
    // The smaller one, or NaN if either is: a pair that cannot be judged is no positive.
    const bool row_decides = row_threshold < thresholds[j] || row_threshold != row_threshold;
    const T threshold = row_decides ? row_threshold : thresholds[j];
    word |= (products[j] > threshold ? 1u : 0u) << j;
  }
  return word;
}

// A band of up to 32 rows from `row` on: words from the diagonal to the end, and their transposes.
template <typename T>
HPK_HOST_DEVICE void pack_band_of(const T* products, const T* thresholds, int64_t row, int64_t row_end, int64_t first,
                                  int64_t anchors, uint32_t* bits) {
  const int64_t words = words_per_row(anchors), span = anchors - first;
  for (int64_t word = row / 32; word < words; ++word) {
    const int64_t column = 32 * word, columns = anchors - column < 32 ? anchors - column : 32;
    uint32_t block[32], transposed[32];
    for (int64_t i = 0; i < 32; ++i) {
      block[i] = 0;
      if (row + i < row_end) {
        const T* of_row = products + (row + i - first) * span + (column - first);
        block[i] = columns == 32 ? compare_word_of(of_row, thresholds[row + i], thresholds + column, 32)
                                 : compare_word_of(of_row, thresholds[row + i], thresholds + column, columns);
        // On the diagonal only the columns after the row count.
        if (column == row) block[i] &= i == 31 ? 0u : ~0u << (i + 1);
      }
      transposed[i] = block[i];
    }
    transpose_block(transposed);
    for (int64_t i = 0; i < 32; ++i) {
      if (column == row) block[i] |= transposed[i];
      if (row + i < row_end) bits[(row + i) * words + word] = block[i];
      if (column != row && column + i < anchors) bits[(column + i) * words + row / 32] = transposed[i];
    }
  }
}

HPK_MULTIVERSION void pack_band(const float* products, const float* thresholds, int64_t row, int64_t row_end,
                                int64_t first, int64_t anchors, uint32_t* bits) {
  pack_band_of(products, thresholds, row, row_end, first, anchors, bits);
}

HPK_MULTIVERSION void pack_band(const double* products, const double* thresholds, int64_t row, int64_t row_end,
                                int64_t first, int64_t anchors, uint32_t* bits) {
  pack_band_of(products, thresholds, row, row_end, first, anchors, bits);
}

}  // namespace

template <typename T>
void hidden_positives_pack_cpu(ParallelFor run, const T* products, const T* threshold, int64_t first, int64_t rows,
                               int64_t anchors, uint32_t* bits) {
  parallel_for(run, words_per_row(rows), 1, [=](int64_t begin, int64_t end) {
    for (int64_t band = begin; band < end; ++band) {
      const int64_t row = first + 32 * band;
      pack_band(products, threshold, row, std::min(row + 32, first + rows), first, anchors, bits);
    }
  });
}

template void hidden_positives_pack_cpu<float>(ParallelFor, const float*, const float*, int64_t, int64_t, int64_t,
                                               uint32_t*);
template void hidden_positives_pack_cpu<double>(ParallelFor, const double*, const double*, int64_t, int64_t, int64_t,
                                                uint32_t*);

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
