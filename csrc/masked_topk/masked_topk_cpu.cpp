#include "masked_topk/masked_topk.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "common/inner_product.h"

namespace hpk {
namespace {

constexpr int64_t kBlock = 64;
constexpr int64_t kInserted = 128;  // more of the greatest are not kept sorted by insertion

template <typename T>
constexpr T kExcluded = -std::numeric_limits<T>::infinity();

template <typename T>
struct Candidate {
  T value;
  int64_t index;
};

// What one thread works with.
template <typename T>
struct Scratch {
  std::vector<T> least, most;  // between which the inner products of a query with the pool are
  std::vector<T> greatest;
  std::vector<Candidate<T>> candidates;
};

template <typename Coarse, typename T>
HPK_HOST_DEVICE void bounds_of(const Coarse* products, T scale, T norm, T error, const CoarseRows<T>& references,
                               int64_t pool, T* least, T* most) {
  HPK_SIMD
  for (int64_t j = 0; j < pool; ++j) {
    const T product = scale * static_cast<T>(products[j]) * references.scale[j];
    const T bound = coarse_bound(norm, error, references.norm[j], references.error[j]);
    least[j] = product - bound;
    most[j] = product + bound;
  }
}

template <typename T>
HPK_HOST_DEVICE T greatest_of(const T* values, int64_t count) {
  T greatest = -std::numeric_limits<T>::infinity();
  HPK_PRAGMA(omp simd reduction(max : greatest))
  for (int64_t j = 0; j < count; ++j) greatest = values[j] > greatest ? values[j] : greatest;
  return greatest;
}

// Whether a reference of a block may be among the greatest; true for NaN.
template <typename T>
HPK_HOST_DEVICE bool any_reaches_of(const T* most, int64_t count, T limit) {
  int32_t found = 0;
  HPK_PRAGMA(omp simd reduction(| : found))
  for (int64_t j = 0; j < count; ++j) found |= !(most[j] < limit);
  return found != 0;
}

#define HPK_DEFINE_BOUNDS(Coarse, T)                                                                                  \
  HPK_MULTIVERSION void bounds(const Coarse* products, T scale, T norm, T error, const CoarseRows<T>& references,     \
                               int64_t pool, T* least, T* most) {                                                     \
    bounds_of(products, scale, norm, error, references, pool, least, most);                                           \
  }
HPK_DEFINE_BOUNDS(int32_t, float)
HPK_DEFINE_BOUNDS(float, float)
HPK_DEFINE_BOUNDS(double, double)
#undef HPK_DEFINE_BOUNDS

#define HPK_DEFINE_FOR(T)                                                                                             \
  HPK_MULTIVERSION T greatest(const T* values, int64_t count) { return greatest_of(values, count); }                  \
  HPK_MULTIVERSION bool any_reaches(const T* most, int64_t count, T limit) { return any_reaches_of(most, count, limit); } \
  HPK_MULTIVERSION T product_of(const T* x, const T* y, int64_t dim) { return inner_product(x, y, dim); }
HPK_DEFINE_FOR(float)
HPK_DEFINE_FOR(double)
#undef HPK_DEFINE_FOR

// The k-th greatest of `values`, NaN counting as least; -inf if there are fewer.
template <typename T>
T kth_greatest(const std::vector<T>& values, int64_t k, std::vector<T>& kept) {
  const auto count = static_cast<int64_t>(values.size());
  if (k == 1) return greatest(values.data(), count);
  if (k > kInserted) {
    kept = values;
    for (T& value : kept) value = value != value ? kExcluded<T> : value;
    std::nth_element(kept.begin(), kept.begin() + (k - 1), kept.end(), [](T a, T b) { return a > b; });
    return kept[k - 1];
  }
  // Sorted by insertion; blocks none of whose values beats the last of those kept are passed over at once.
  kept.assign(k, kExcluded<T>);
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, count);
    if (!(greatest(values.data() + begin, end - begin) > kept[k - 1])) continue;
    for (int64_t j = begin; j < end; ++j) {
      if (!(values[j] > kept[k - 1])) continue;
      int64_t place = k - 1;
      for (; place > 0 && values[j] > kept[place - 1]; --place) kept[place] = kept[place - 1];
      kept[place] = values[j];
    }
  }
  return kept[k - 1];
}

template <typename T>
void exclude(const Exclusions& exclusions, int64_t row, int64_t pool, Scratch<T>& scratch) {
  const auto leave_out = [&](int64_t j) { scratch.least[j] = scratch.most[j] = kExcluded<T>; };
  if (exclusions.mask != nullptr) {
    const bool* allowed = exclusions.mask + row * pool;
    for (int64_t j = 0; j < pool; ++j) {
      if (!allowed[j]) leave_out(j);
    }
  }
  if (exclusions.query_group != nullptr && exclusions.query_group[row] >= 0) {
    const int64_t group = exclusions.query_group[row];
    for (int64_t j = 0; j < pool; ++j) {
      if (exclusions.pool_group[j] == group) leave_out(j);
    }
  }
}

// Fills the candidates: the inner products of all references that may be among the k greatest of a query.
template <typename Coarse, typename T>
void find_candidates(const Coarse* products, const CoarseRows<T>& query, const CoarseRows<T>& references, int64_t pool,
                     const Exclusions& exclusions, int64_t row, int64_t k, Scratch<T>& scratch) {
  scratch.least.resize(pool);
  scratch.most.resize(pool);
  bounds(products, *query.scale, *query.norm, *query.error, references, pool, scratch.least.data(),
         scratch.most.data());
  exclude(exclusions, row, pool, scratch);
  const T limit = kth_greatest(scratch.least, k, scratch.greatest);
  scratch.candidates.clear();
  for (int64_t begin = 0; begin < pool; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, pool);
    if (!any_reaches(scratch.most.data() + begin, end - begin, limit)) continue;
    for (int64_t j = begin; j < end; ++j) {
      if (scratch.most[j] < limit || scratch.most[j] == kExcluded<T>) continue;
      scratch.candidates.push_back({product_of(query.rows, references.rows + j * references.dim, query.dim), j});
    }
  }
}

template <typename T>
void choose(std::vector<Candidate<T>>& candidates, int64_t k, T* values, int64_t* indices) {
  const auto better = [](const Candidate<T>& a, const Candidate<T>& b) {
    return a.value > b.value || (a.value == b.value && a.index < b.index);
  };
  const auto is_nan = [](const Candidate<T>& candidate) { return candidate.value != candidate.value; };
  const bool nan = std::any_of(candidates.begin(), candidates.end(), is_nan);
  const int64_t found = nan ? 0 : std::min<int64_t>(k, candidates.size());
  std::partial_sort(candidates.begin(), candidates.begin() + found, candidates.end(), better);
  for (int64_t t = 0; t < k; ++t) {
    values[t] = t < found ? candidates[t].value : nan ? std::numeric_limits<T>::quiet_NaN() : kExcluded<T>;
    indices[t] = values[t] > kExcluded<T> ? candidates[t].index : -1;
  }
}

}  // namespace

template <typename Coarse, typename T>
int64_t masked_topk_select_cpu(ParallelFor run, const Coarse* products, const CoarseRows<T>& queries, int64_t rows,
                               const CoarseRows<T>& references, int64_t pool, const Exclusions& exclusions, int64_t k,
                               T* values, int64_t* indices) {
  std::atomic<int64_t> computed{0};
  parallel_for(run, rows, 16, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch;
    int64_t candidates = 0;
    for (int64_t i = begin; i < end; ++i) {
      find_candidates(products + i * pool, rows_from(queries, i), references, pool, exclusions, i, k, scratch);
      candidates += static_cast<int64_t>(scratch.candidates.size());
      choose(scratch.candidates, k, values + i * k, indices + i * k);
    }
    computed += candidates;
  });
  return computed;
}

#define HPK_INSTANTIATE(Coarse, T)                                                                                    \
  template int64_t masked_topk_select_cpu<Coarse, T>(ParallelFor, const Coarse*, const CoarseRows<T>&, int64_t,       \
                                                     const CoarseRows<T>&, int64_t, const Exclusions&, int64_t, T*,   \
                                                     int64_t*);
HPK_INSTANTIATE(int32_t, float)
HPK_INSTANTIATE(float, float)
HPK_INSTANTIATE(double, double)
#undef HPK_INSTANTIATE

}  // namespace hpk
