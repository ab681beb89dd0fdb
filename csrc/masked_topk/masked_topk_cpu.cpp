#include "masked_topk/masked_topk.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "common/portable.h"

namespace hpk {
namespace {

constexpr int64_t kBlock = 64;
constexpr int64_t kInserted = 128;

template <typename T>
HPK_HOST_DEVICE T greatest_of(const T* row, int64_t count) {
  T greatest = -std::numeric_limits<T>::infinity();
  HPK_PRAGMA(omp simd reduction(max : greatest))
  for (int64_t j = 0; j < count; ++j) greatest = row[j] > greatest ? row[j] : greatest;
  return greatest;
}

// Whether any entry is NaN: x - x is 0 for finite x, and infinities are let through.
template <typename T>
HPK_HOST_DEVICE bool has_nan_of(const T* row, int64_t count) {
  int32_t found = 0;
  HPK_PRAGMA(omp simd reduction(| : found))
  for (int64_t j = 0; j < count; ++j) found |= row[j] != row[j];
  return found != 0;
}

HPK_MULTIVERSION float greatest(const float* row, int64_t count) { return greatest_of(row, count); }
HPK_MULTIVERSION double greatest(const double* row, int64_t count) { return greatest_of(row, count); }
HPK_MULTIVERSION bool has_nan(const float* row, int64_t count) { return has_nan_of(row, count); }
HPK_MULTIVERSION bool has_nan(const double* row, int64_t count) { return has_nan_of(row, count); }

template <typename T>
void exclude(T* row, const bool* mask, int64_t query_group, const int64_t* pool_group, int64_t pool) {
  const T excluded = -std::numeric_limits<T>::infinity();
  for (int64_t j = 0; mask != nullptr && j < pool; ++j) row[j] = mask[j] ? row[j] : excluded;
  if (pool_group == nullptr || query_group < 0) return;
  for (int64_t j = 0; j < pool; ++j) row[j] = pool_group[j] == query_group ? excluded : row[j];
}

// Keeps the k best so far, sorted; blocks none of whose entries beats the last of them are passed over at once.
template <typename T>
void select(const T* row, int64_t pool, int64_t k, T* values, int64_t* indices) {
  std::fill(values, values + k, -std::numeric_limits<T>::infinity());
  std::fill(indices, indices + k, int64_t{-1});
  for (int64_t begin = 0; begin < pool; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, pool);
    if (!(greatest(row + begin, end - begin) > values[k - 1])) continue;
    for (int64_t j = begin; j < end; ++j) {
      if (!(row[j] > values[k - 1])) continue;
      int64_t place = k - 1;
      for (; place > 0 && row[j] > values[place - 1]; --place) {
        values[place] = values[place - 1];
        indices[place] = indices[place - 1];
      }
      values[place] = row[j];
      indices[place] = j;
    }
  }
}

// The same for many, where keeping them sorted by insertion would be slow.
template <typename T>
void select_many(const T* row, int64_t pool, int64_t k, std::vector<int64_t>& order, T* values, int64_t* indices) {
  order.resize(pool);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::partial_sort(order.begin(), order.begin() + k, order.end(),
                    [row](int64_t a, int64_t b) { return row[a] > row[b] || (row[a] == row[b] && a < b); });
  for (int64_t t = 0; t < k; ++t) {
    values[t] = row[order[t]];
    indices[t] = values[t] == -std::numeric_limits<T>::infinity() ? -1 : order[t];
  }
}

}  // namespace

template <typename T>
void masked_topk_select_cpu(ParallelFor run, T* products, const bool* mask, const int64_t* query_group,
                            const int64_t* pool_group, int64_t rows, int64_t pool, int64_t k, T* values,
                            int64_t* indices) {
  parallel_for(run, rows, 16, [=](int64_t begin, int64_t end) {
    std::vector<int64_t> order;
    for (int64_t i = begin; i < end; ++i) {
      T* row = products + i * pool;
      exclude(row, mask == nullptr ? nullptr : mask + i * pool, query_group == nullptr ? -1 : query_group[i],
              pool_group, pool);
      if (has_nan(row, pool)) {
        std::fill(values + i * k, values + (i + 1) * k, std::numeric_limits<T>::quiet_NaN());
        std::fill(indices + i * k, indices + (i + 1) * k, int64_t{-1});
      } else if (k <= kInserted) {
        select(row, pool, k, values + i * k, indices + i * k);
      } else {
        select_many(row, pool, k, order, values + i * k, indices + i * k);
      }
    }
  });
}

template void masked_topk_select_cpu<float>(ParallelFor, float*, const bool*, const int64_t*, const int64_t*, int64_t,
                                            int64_t, int64_t, float*, int64_t*);
template void masked_topk_select_cpu<double>(ParallelFor, double*, const bool*, const int64_t*, const int64_t*,
                                             int64_t, int64_t, int64_t, double*, int64_t*);

}  // namespace hpk
