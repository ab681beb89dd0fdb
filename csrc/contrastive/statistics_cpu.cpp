// The statistics of rows and columns of a tile.
#include "contrastive/contrastive.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/bits.h"
#include "common/exponential.h"
#include "contrastive/tile_rows.h"

namespace hpk {
namespace {

template <typename T>
constexpr T kNothing = -std::numeric_limits<T>::infinity();

constexpr int64_t kStretch = 4096;  // of terms that are summed in T

// Whether to go through a whole word, of a row that has `left` columns from there on, or through its set bits.
HPK_HOST_DEVICE bool is_dense(uint32_t word, int64_t left) { return left >= 32 && __builtin_popcount(word) >= 4; }

// Terms are kept apart by their places within words, which takes no sum across a vector for each word.
template <typename T>
HPK_HOST_DEVICE T greatest_of(const T* logits, const uint32_t* bits, int64_t count) {
  T greatest[32];
  for (int64_t c = 0; c < 32; ++c) greatest[c] = kNothing<T>;
  for (int64_t first = 0; first < count; first += 32) {
    const uint32_t word = bits[first / 32];
    const T* of_word = logits + first;
    if (word == ~0u) {
      HPK_SIMD
      for (int64_t c = 0; c < 32; ++c) greatest[c] = of_word[c] > greatest[c] ? of_word[c] : greatest[c];
    } else if (is_dense(word, count - first)) {
      HPK_SIMD
      for (int64_t c = 0; c < 32; ++c) {
        const T logit = word >> c & 1u ? of_word[c] : kNothing<T>;
        greatest[c] = logit > greatest[c] ? logit : greatest[c];
      }
    } else {
      for (uint32_t left = word; left != 0; left &= left - 1) {
        const int64_t c = __builtin_ctz(left);
        greatest[c] = of_word[c] > greatest[c] ? of_word[c] : greatest[c];
      }
    }
  }
  T of_all = kNothing<T>;
  for (int64_t c = 0; c < 32; ++c) of_all = greatest[c] > of_all ? greatest[c] : of_all;
  return of_all;
}

template <typename T>
HPK_HOST_DEVICE double sum_exp_of(const T* logits, const uint32_t* bits, int64_t count, T greatest) {
  double total = 0;
  for (int64_t stretch = 0; stretch < count; stretch += kStretch) {
    const int64_t last = count - stretch < kStretch ? count : stretch + kStretch;
    T sums[32] = {};
    for (int64_t first = stretch; first < last; first += 32) {
      const uint32_t word = bits[first / 32];
      const T* of_word = logits + first;
      if (word == ~0u) {
        HPK_SIMD
        for (int64_t c = 0; c < 32; ++c) sums[c] += exp_nonpositive(of_word[c] - greatest);
      } else if (is_dense(word, count - first)) {
        HPK_SIMD
        for (int64_t c = 0; c < 32; ++c) {
          const T term = exp_nonpositive(of_word[c] - greatest);
          sums[c] += word >> c & 1u ? term : T{0};
        }
      } else {
        for (uint32_t left = word; left != 0; left &= left - 1) {
          const int64_t c = __builtin_ctz(left);
          sums[c] += exp_nonpositive(of_word[c] - greatest);
        }
      }
    }
    for (int64_t c = 0; c < 32; ++c) total += sums[c];
  }
  return total;
}

#define HPK_DEFINE_SUMS(T)                                                                                            \
  HPK_MULTIVERSION T log_sum_exp(const T* logits, const uint32_t* bits, int64_t count) {                              \
    const T greatest = greatest_of(logits, bits, count);                                                              \
    if (greatest == kNothing<T>) return greatest;                                                                     \
    return greatest + static_cast<T>(std::log(sum_exp_of(logits, bits, count, greatest)));                            \
  }
HPK_DEFINE_SUMS(float)
HPK_DEFINE_SUMS(double)
#undef HPK_DEFINE_SUMS

// The pull, mass and count of a row or column, a positive after the other.
template <typename T>
class Pull {
 public:
  explicit Pull(bool inside) : inside_(inside) {}

  void add(T logit, T weight) {
    mass_ += weight;
    ++count_;
    if (!inside_) {
      pull_ += static_cast<double>(weight) * logit;
      return;
    }
    const T term = logit + std::log(weight);
    if (term > greatest_) {
      pull_ = pull_ * std::exp(static_cast<double>(greatest_) - term) + 1;
      greatest_ = term;
    } else {
      pull_ += std::exp(static_cast<double>(term) - greatest_);
    }
  }

  void add_to(T* statistics) const {
    if (count_ == 0) return;
    statistics[1] = inside_ ? log_add_exp(statistics[1], greatest_ + static_cast<T>(std::log(pull_)))
                            : statistics[1] + static_cast<T>(pull_);
    statistics[2] += static_cast<T>(mass_);
    statistics[3] += static_cast<T>(count_);
  }

 private:
  bool inside_;
  T greatest_ = kNothing<T>;
  double pull_ = 0, mass_ = 0;
  int64_t count_ = 0;
};

template <typename T>
T weight_at(const T* weights, int64_t column) {
  return weights == nullptr ? T{1} : weights[column];
}

constexpr int64_t kBand = 8;  // words whose columns are summed together

// greatest[c] = max(greatest[c], logits[c]) where bit c is set, for the columns of one word.
template <typename T>
HPK_HOST_DEVICE void raise_of(const T* logits, uint32_t bits, int64_t count, T* greatest) {
  if (bits == ~0u) {
    HPK_SIMD
    for (int64_t c = 0; c < 32; ++c) greatest[c] = logits[c] > greatest[c] ? logits[c] : greatest[c];
    return;
  }
  HPK_SIMD
  for (int64_t c = 0; c < count; ++c) {
    const T logit = bits >> c & 1u ? logits[c] : kNothing<T>;
    greatest[c] = logit > greatest[c] ? logit : greatest[c];
  }
}

template <typename T>
HPK_HOST_DEVICE void add_exp_of(const T* logits, uint32_t bits, int64_t count, const T* greatest, T* sums) {
  if (bits == ~0u) {
    HPK_SIMD
    for (int64_t c = 0; c < 32; ++c) sums[c] += exp_nonpositive(logits[c] - greatest[c]);
    return;
  }
  HPK_SIMD
  for (int64_t c = 0; c < count; ++c) {
    const T term = exp_nonpositive(logits[c] - greatest[c]);
    sums[c] += bits >> c & 1u ? term : T{0};
  }
}

// The log-denominators of the columns of up to kBand words from `word` on.
template <typename T>
HPK_HOST_DEVICE void log_sum_columns_of(const LogitTile<T>& tile, const uint32_t* denominator, int64_t word, T* greatest,
                                        double* sums) {
  const int64_t words = words_per_row(tile.columns), last = word + kBand < words ? word + kBand : words;
  for (int64_t c = 0; c < 32 * kBand; ++c) greatest[c] = kNothing<T>, sums[c] = 0;
  for (int64_t row = 0; row < tile.rows; ++row) {
    for (int64_t w = word; w < last; ++w) {
      const int64_t count = tile.columns - 32 * w < 32 ? tile.columns - 32 * w : 32;
      raise_of(tile.logits + row * tile.columns + 32 * w, denominator[row * words + w], count, greatest + 32 * (w - word));
    }
  }
  for (int64_t stretch = 0; stretch < tile.rows; stretch += kStretch) {
    T of_stretch[32 * kBand] = {};
    for (int64_t row = stretch; row < tile.rows && row < stretch + kStretch; ++row) {
      for (int64_t w = word; w < last; ++w) {
        const int64_t count = tile.columns - 32 * w < 32 ? tile.columns - 32 * w : 32, at = 32 * (w - word);
        add_exp_of(tile.logits + row * tile.columns + 32 * w, denominator[row * words + w], count, greatest + at,
                   of_stretch + at);
      }
    }
    for (int64_t c = 0; c < 32 * kBand; ++c) sums[c] += of_stretch[c];
  }
}

#define HPK_DEFINE_COLUMNS(T)                                                                                         \
  HPK_MULTIVERSION void log_sum_columns(const LogitTile<T>& tile, const uint32_t* denominator, int64_t word,          \
                                        T* greatest, double* sums) {                                                  \
    log_sum_columns_of(tile, denominator, word, greatest, sums);                                                      \
  }
HPK_DEFINE_COLUMNS(float)
HPK_DEFINE_COLUMNS(double)
#undef HPK_DEFINE_COLUMNS

template <typename T>
void statistics_of_columns(const LogitTile<T>& tile, int64_t word, const TilePairs<T>& pairs, bool inside, T* statistics) {
  const int64_t words = words_per_row(tile.columns), last = std::min(word + kBand, words), first = 32 * word;
  T greatest[32 * kBand];
  double sums[32 * kBand];
  log_sum_columns(tile, pairs.denominator, word, greatest, sums);
  std::vector<Pull<T>> pulls(32 * kBand, Pull<T>(inside));
  for (int64_t row = 0; row < tile.rows; ++row) {
    const T* logits = tile.logits + row * tile.columns;
    const T* weights = pairs.weights == nullptr ? nullptr : pairs.weights + row * tile.columns;
    for (int64_t w = word; w < last; ++w) {
      for_each_bit(pairs.positives[row * words + w], w, [&](int64_t column) {
        pulls[column - first].add(logits[column], weight_at(weights, column));
      });
    }
  }
  for (int64_t column = first; column < std::min(first + 32 * kBand, tile.columns); ++column) {
    const int64_t c = column - first;
    if (greatest[c] != kNothing<T>) {
      T& log_denominator = statistics[4 * column];
      log_denominator = log_add_exp(log_denominator, greatest[c] + static_cast<T>(std::log(sums[c])));
    }
    pulls[c].add_to(statistics + 4 * column);
  }
}

}  // namespace

template <typename T>
void statistics_of_row(const T* logits, int64_t count, const RowPairs<T>& pairs, bool inside, T* statistics) {
  statistics[0] = log_add_exp(statistics[0], log_sum_exp(logits, pairs.denominator, count));
  Pull<T> pull(inside);
  for (int64_t word = 0; word < words_per_row(count); ++word) {
    for_each_bit(pairs.positives[word], word,
                 [&](int64_t column) { pull.add(logits[column], weight_at(pairs.weights, column)); });
  }
  pull.add_to(statistics);
}

template <typename T>
void contrastive_statistics_cpu(ParallelFor run, const LogitTile<T>& tile, const TilePairs<T>& pairs, bool inside,
                                T* rows, T* columns) {
  for_each_row(run, tile, [&](int64_t row) {
    statistics_of_row(tile.logits + row * tile.columns, tile.columns, row_of(pairs, tile, row), inside, rows + 4 * row);
  });
  if (columns == nullptr) return;
  const int64_t bands = (words_per_row(tile.columns) + kBand - 1) / kBand;
  parallel_for(run, bands, 1, [&](int64_t begin, int64_t end) {
    for (int64_t band = begin; band < end; ++band) statistics_of_columns(tile, kBand * band, pairs, inside, columns);
  });
}

#define HPK_INSTANTIATE(T)                                                                                            \
  template void statistics_of_row<T>(const T*, int64_t, const RowPairs<T>&, bool, T*);                                \
  template void contrastive_statistics_cpu<T>(ParallelFor, const LogitTile<T>&, const TilePairs<T>&, bool, T*, T*);
HPK_INSTANTIATE(float)
HPK_INSTANTIATE(double)
#undef HPK_INSTANTIATE

}  // namespace hpk
