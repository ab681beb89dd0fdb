// Statistics and gradient at once, for tiles that have all keys.
#include <limits>
#include <vector>

#include "contrastive/tile_rows.h"

namespace hpk {
namespace {

// shift, push, pull_shift and pull of a row: numbers_of of hpkernels/ops/contrastive/chunked.py.
template <typename T>
void numbers_of(const T* statistics, T coefficient, bool inside, T* numbers) {
  const T log_denominator = statistics[0], mass = statistics[2];
  const bool counts = mass > 0 && log_denominator != -std::numeric_limits<T>::infinity();
  numbers[0] = counts ? log_denominator : T{0};
  numbers[1] = counts ? coefficient : T{0};
  numbers[2] = counts && inside ? statistics[1] : T{0};
  numbers[3] = counts && !inside ? coefficient / mass : numbers[1];
}

}  // namespace

template <typename T>
void contrastive_whole_rows_cpu(ParallelFor run, const LogitTile<T>& tile, const PairRelations<T>& relations, bool inside,
                                const T* coefficients, T* rows) {
  const int64_t count = tile.columns, words = words_per_row(count);
  parallel_for(run, tile.rows, 4, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> bits(2 * words);
    std::vector<T> weights(relations.listed_weights == nullptr ? 0 : count);
    const RowPairs<T> pairs{bits.data(), bits.data() + words, weights.empty() ? nullptr : weights.data()};
    for (int64_t row = begin; row < end; ++row) {
      T* logits = tile.logits + row * count;
      T numbers[4];
      pairs_of_row(tile, row, relations, pairs);
      scale_row(logits, count, relations.scale, bias_of(relations, tile));
      statistics_of_row(logits, count, pairs, inside, rows + 4 * row);
      numbers_of(rows + 4 * row, coefficients[row], inside, numbers);
      gradient_of_row(logits, count, pairs, inside, numbers, static_cast<const T*>(nullptr));
    }
  });
}

template void contrastive_whole_rows_cpu<float>(ParallelFor, const LogitTile<float>&, const PairRelations<float>&, bool,
                                                const float*, float*);
template void contrastive_whole_rows_cpu<double>(ParallelFor, const LogitTile<double>&, const PairRelations<double>&, bool,
                                                 const double*, double*);

}  // namespace hpk
