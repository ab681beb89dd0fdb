#include "contrastive/contrastive.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/bits.h"
#include "common/exponential.h"

namespace hpk {
namespace {

template <typename T>
constexpr T kNothing = -std::numeric_limits<T>::infinity();

template <typename T>
T log_add_exp(T a, T b) {
  const T greater = a > b ? a : b, smaller = a > b ? b : a;
  if (smaller == kNothing<T>) return greater;
  return greater + std::log1p(std::exp(smaller - greater));
}

// Calls body(column) for the columns of a word that are set, ascending.
template <typename Body>
HPK_HOST_DEVICE void for_each_bit(uint32_t bits, int64_t word, Body body) {
  for (; bits != 0; bits &= bits - 1) body(32 * word + __builtin_ctz(bits));
}

// ---- Which pairs

// bits |= (ids[c] == id), for `count` ids.
HPK_MULTIVERSION void add_equal(const int64_t* ids, int64_t count, int64_t id, uint32_t* bits) {
  int64_t first = 0;
  for (; first + 32 <= count; first += 32) {
    uint32_t word = 0;
    HPK_PRAGMA(omp simd reduction(| : word))
    for (int64_t c = 0; c < 32; ++c) word |= (ids[first + c] == id ? 1u : 0u) << c;
    bits[first / 32] |= word;
  }
  for (int64_t c = first; c < count; ++c) bits[c / 32] |= (ids[c] == id ? 1u : 0u) << (c % 32);
}

// bits |= the pairs of an anchor with the keys of a tile, but for those that are listed.
template <typename T>
void add_unlisted(const PairForms& forms, const LogitTile<T>& tile, int64_t keys, int64_t anchor, uint32_t* bits) {
  for (int64_t label = 0; label < forms.labels; ++label) {
    const int64_t id = forms.anchor_ids[anchor * forms.labels + label];
    if (id >= 0) add_equal(forms.key_ids + label * keys + tile.column, tile.columns, id, bits);
  }
  if (forms.bits == nullptr) return;
  const uint32_t* of_anchor = forms.bits + anchor * words_per_row(keys) + tile.column / 32;
  for (int64_t word = 0; word < words_per_row(tile.columns); ++word) bits[word] |= of_anchor[word];
}

// Calls body(column of the tile, place in the lists) for the listed pairs of an anchor.
template <typename T, typename Body>
void for_each_listed(const PairForms& forms, const LogitTile<T>& tile, int64_t anchor, Body body) {
  if (forms.offsets == nullptr) return;
  for (int64_t place = forms.offsets[anchor]; place < forms.offsets[anchor + 1]; ++place) {
    const int64_t column = forms.indices[place] - tile.column;
    if (column >= 0 && column < tile.columns) body(column, place);
  }
}

// The columns that an anchor may form a pair with as a key: not itself, and in a triangle none before.
HPK_HOST_DEVICE uint32_t possible_pairs(int64_t word, int64_t columns, int64_t own, bool triangle) {
  const uint32_t valid = valid_bits(word, columns);
  if (triangle) return valid & ~low_bits(own + 1 - 32 * word);
  return own >= 32 * word && own < 32 * word + 32 ? valid & ~(1u << (own - 32 * word)) : valid;
}

template <typename T>
void pairs_of_row(const LogitTile<T>& tile, int64_t row, const PairForms& positives, const T* listed_weights,
                  const PairForms& excluded, const PairRules& rules, const TilePairs<T>& pairs) {
  const int64_t anchor = tile.row + row, words = words_per_row(tile.columns);
  uint32_t* of_positives = pairs.positives + row * words;
  uint32_t* denominator = pairs.denominator + row * words;
  std::fill_n(of_positives, words, 0u);
  std::fill_n(denominator, words, 0u);
  add_unlisted(positives, tile, rules.keys, anchor, of_positives);
  add_unlisted(excluded, tile, rules.keys, anchor, denominator);
  for_each_listed(excluded, tile, anchor, [&](int64_t column, int64_t) { denominator[column / 32] |= 1u << column % 32; });
  T* weights = pairs.weights == nullptr ? nullptr : pairs.weights + row * tile.columns;
  if (weights != nullptr) {
    std::fill_n(weights, tile.columns, T{0});
    for (int64_t word = 0; word < words; ++word) {
      for_each_bit(of_positives[word], word, [&](int64_t column) { weights[column] = 1; });
    }
  }
  for_each_listed(positives, tile, anchor, [&](int64_t column, int64_t place) {
    const T weight = listed_weights == nullptr ? T{1} : listed_weights[place];
    if (weights != nullptr) weights[column] = std::max(weights[column], weight);
    if (weight > 0) of_positives[column / 32] |= 1u << column % 32;
  });
  const int64_t own = rules.own < 0 ? -1 : anchor + rules.own - tile.column;
  for (int64_t word = 0; word < words; ++word) {
    uint32_t taking_part = ~denominator[word];
    if (!rules.exclude_positives) taking_part |= of_positives[word];
    taking_part &= possible_pairs(word, tile.columns, own, rules.triangle && rules.own >= 0);
    of_positives[word] &= taking_part;
    denominator[word] = rules.decoupled ? taking_part & ~of_positives[word] : taking_part;
  }
}

// ---- Statistics

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

template <typename T>
void statistics_of_row(const LogitTile<T>& tile, int64_t row, const TilePairs<T>& pairs, bool inside, T* statistics) {
  const int64_t words = words_per_row(tile.columns);
  const T* logits = tile.logits + row * tile.columns;
  const T* weights = pairs.weights == nullptr ? nullptr : pairs.weights + row * tile.columns;
  statistics[0] = log_add_exp(statistics[0], log_sum_exp(logits, pairs.denominator + row * words, tile.columns));
  Pull<T> pull(inside);
  for (int64_t word = 0; word < words; ++word) {
    for_each_bit(pairs.positives[row * words + word], word,
                 [&](int64_t column) { pull.add(logits[column], weight_at(weights, column)); });
  }
  pull.add_to(statistics);
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

// ---- Gradient

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
HPK_HOST_DEVICE void gradient_of_row(T* logits, int64_t count, int64_t stride, const uint32_t* denominator,
                                     const uint32_t* positives, const T* weights, bool inside, const T* numbers,
                                     const T* columns) {
  const T shift = numbers[0], push = numbers[1], pull_shift = numbers[2], pull = numbers[3];
  const T* shifts = columns;
  const T* pushes = columns + stride;
  const T* pull_shifts = columns + 2 * stride;
  const T* pulls = columns + 3 * stride;
  for (int64_t first = 0; first < count; first += 32) {
    const int64_t end = count - first < 32 ? count - first : 32;
    const uint32_t of_positives = positives[first / 32];
    T kept[32];  // logits of positives, which are overwritten
    if (inside && of_positives != 0) {
      for (int64_t c = 0; c < end; ++c) kept[c] = logits[first + c];
    }
    if (end == 32) {
      softmax_of_word<T, kColumns>(logits + first, denominator[first / 32], 32, shift, push, shifts + first, pushes + first);
    } else {
      softmax_of_word<T, kColumns>(logits + first, denominator[first / 32], end, shift, push, shifts + first, pushes + first);
    }
    for (uint32_t left = of_positives; left != 0; left &= left - 1) {
      const int64_t c = __builtin_ctz(left), column = first + c;
      const T weight = weights == nullptr ? T{1} : weights[column];
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

#define HPK_DEFINE_GRADIENT(T)                                                                                        \
  HPK_MULTIVERSION void scale_row(T* values, int64_t count, T scale, const T* bias) {                                 \
    if (bias == nullptr) {                                                                                            \
      HPK_SIMD                                                                                                        \
      for (int64_t c = 0; c < count; ++c) values[c] *= scale;                                                         \
    } else {                                                                                                          \
      HPK_SIMD                                                                                                        \
      for (int64_t c = 0; c < count; ++c) values[c] = values[c] * scale + bias[c];                                    \
    }                                                                                                                 \
  }                                                                                                                   \
  HPK_MULTIVERSION void gradient_row(T* logits, int64_t count, const uint32_t* denominator, const uint32_t* positives, \
                                     const T* weights, bool inside, const T* numbers, const T* columns) {             \
    if (columns == nullptr) {                                                                                         \
      gradient_of_row<T, false>(logits, count, 0, denominator, positives, weights, inside, numbers, logits);          \
    } else {                                                                                                          \
      gradient_of_row<T, true>(logits, count, count, denominator, positives, weights, inside, numbers, columns);      \
    }                                                                                                                 \
  }
HPK_DEFINE_GRADIENT(float)
HPK_DEFINE_GRADIENT(double)
#undef HPK_DEFINE_GRADIENT

// Calls body(row) for the rows of a tile.
template <typename T, typename Body>
void for_each_row(ParallelFor run, const LogitTile<T>& tile, Body body) {
  parallel_for(run, tile.rows, 4, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

}  // namespace

template <typename T>
void contrastive_pairs_cpu(ParallelFor run, const LogitTile<T>& tile, const PairForms& positives,
                           const T* listed_weights, const PairForms& excluded, const PairRules& rules,
                           const TilePairs<T>& pairs) {
  for_each_row(run, tile, [&](int64_t row) {
    pairs_of_row(tile, row, positives, listed_weights, excluded, rules, pairs);
  });
}

template <typename T>
void contrastive_logits_cpu(ParallelFor run, const LogitTile<T>& tile, T scale, const T* bias) {
  for_each_row(run, tile, [&](int64_t row) {
    scale_row(tile.logits + row * tile.columns, tile.columns, scale, bias == nullptr ? nullptr : bias + tile.column);
  });
}

template <typename T>
void contrastive_statistics_cpu(ParallelFor run, const LogitTile<T>& tile, const TilePairs<T>& pairs, bool inside,
                                T* rows, T* columns) {
  for_each_row(run, tile, [&](int64_t row) { statistics_of_row(tile, row, pairs, inside, rows + 4 * row); });
  if (columns == nullptr) return;
  const int64_t bands = (words_per_row(tile.columns) + kBand - 1) / kBand;
  parallel_for(run, bands, 1, [&](int64_t begin, int64_t end) {
    for (int64_t band = begin; band < end; ++band) statistics_of_columns(tile, kBand * band, pairs, inside, columns);
  });
}

template <typename T>
void contrastive_gradient_cpu(ParallelFor run, const LogitTile<T>& tile, const TilePairs<T>& pairs, bool inside,
                              const T* rows, const T* columns) {
  const int64_t words = words_per_row(tile.columns);
  for_each_row(run, tile, [&](int64_t row) {
    const T* weights = pairs.weights == nullptr ? nullptr : pairs.weights + row * tile.columns;
    gradient_row(tile.logits + row * tile.columns, tile.columns, pairs.denominator + row * words,
                 pairs.positives + row * words, weights, inside, rows + 4 * row, columns);
  });
}

#define HPK_INSTANTIATE(T)                                                                                            \
  template void contrastive_pairs_cpu<T>(ParallelFor, const LogitTile<T>&, const PairForms&, const T*,                \
                                         const PairForms&, const PairRules&, const TilePairs<T>&);                    \
  template void contrastive_logits_cpu<T>(ParallelFor, const LogitTile<T>&, T, const T*);                             \
  template void contrastive_statistics_cpu<T>(ParallelFor, const LogitTile<T>&, const TilePairs<T>&, bool, T*, T*);   \
  template void contrastive_gradient_cpu<T>(ParallelFor, const LogitTile<T>&, const TilePairs<T>&, bool, const T*,    \
                                            const T*);
HPK_INSTANTIATE(float)
HPK_INSTANTIATE(double)
#undef HPK_INSTANTIATE

}  // namespace hpk
