#include "masked_topk/masked_topk.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <numeric>
#include <vector>

#include "common/inner_product.h"

namespace hpk {
namespace {

constexpr int64_t kLeastGroups = 64, kMostGroups = 256;  // of products, by their position; multiples of any vector's length

template <typename T>
constexpr T kExcluded = -std::numeric_limits<T>::infinity();

template <typename T>
struct Candidate {
  T value;  // the coarse product, and then the inner product
  int64_t index;
};

// What one thread works with.
template <typename T>
struct Scratch {
  std::vector<T> values;  // coarse products of a query with the pool
  std::vector<T> some;
  std::vector<int32_t> positions;
  std::vector<double> query;
  std::vector<Candidate<T>> candidates;
};

template <typename Coarse, typename T>
HPK_HOST_DEVICE void scale_of(const Coarse* products, T scale, const T* scales, int64_t count, T* values) {
  HPK_SIMD
  for (int64_t j = 0; j < count; ++j) values[j] = scale * static_cast<T>(products[j]) * scales[j];
}

// The greatest of all values whose position has the same remainder by `groups`, a power of two; NaN is passed over.
template <typename T>
HPK_HOST_DEVICE void group_maxima_of(const T* values, int64_t count, int64_t groups, T* maxima) {
  for (int64_t g = 0; g < groups; ++g) maxima[g] = kExcluded<T>;
  for (int64_t first = 0; first < count; first += groups) {
    const int64_t end = count - first < groups ? count - first : groups;
    HPK_SIMD
    for (int64_t g = 0; g < end; ++g) maxima[g] = values[first + g] > maxima[g] ? values[first + g] : maxima[g];
  }
}

// Which of up to 32 values reach a limit; NaN does.
template <typename T>
HPK_HOST_DEVICE uint32_t reaching_of(const T* values, int64_t count, T limit) {
  uint32_t found = 0;
  HPK_PRAGMA(omp simd reduction(| : found))
  for (int64_t j = 0; j < count; ++j) found |= (values[j] < limit ? 0u : 1u) << j;
  return found;
}

// The positions of all values that reach a limit, ascending; returns how many there are.
template <typename T>
HPK_HOST_DEVICE int64_t list_reaching_of(const T* values, int64_t count, T limit, int32_t* positions) {
  int64_t listed = 0;
  for (int64_t first = 0; first < count; first += 32) {
    uint32_t left = count - first < 32 ? reaching_of(values + first, count - first, limit)
                                       : reaching_of(values + first, 32, limit);
    for (; left != 0; left &= left - 1) positions[listed++] = static_cast<int32_t>(first + __builtin_ctz(left));
  }
  return listed;
}

// Keeps the candidates that may reach `least` as far as their inner products in T tell, which are off by `slack` at the
// most; returns the end of those kept.
template <typename T>
HPK_HOST_DEVICE Candidate<T>* narrow_of(const T* query, const T* references, int64_t dim, T least, T slack,
                                        Candidate<T>* first, Candidate<T>* last) {
  constexpr int64_t kSums = 64;
  Candidate<T>* kept = first;
  for (Candidate<T>* candidate = first; candidate != last; ++candidate) {
    const T* reference = references + candidate->index * dim;
    T sums[kSums] = {};
    int64_t d = 0;
    for (; d + kSums <= dim; d += kSums) {
      HPK_SIMD
      for (int64_t s = 0; s < kSums; ++s) sums[s] += query[d + s] * reference[d + s];
    }
    for (; d < dim; ++d) sums[d % kSums] += query[d] * reference[d];
    for (int64_t half = kSums / 2; half > 0; half /= 2) {
      HPK_SIMD
      for (int64_t s = 0; s < half; ++s) sums[s] += sums[s + half];
    }
    if (!(sums[0] + slack < least)) *kept++ = *candidate;  // NaN is kept
  }
  return kept;
}

// Turns the coarse products of candidates into their inner products.
template <typename T>
HPK_HOST_DEVICE void evaluate_of(const double* query, const T* references, int64_t dim, Candidate<T>* first,
                                 Candidate<T>* last) {
  for (Candidate<T>* candidate = first; candidate != last; ++candidate) {
    candidate->value = inner_product(query, references + candidate->index * dim, dim);
  }
}

#define HPK_DEFINE_SCALE(Coarse, T)                                                                                   \
  HPK_MULTIVERSION void scale_products(const Coarse* products, T scale, const T* scales, int64_t count, T* values) {  \
    scale_of(products, scale, scales, count, values);                                                                 \
  }
HPK_DEFINE_SCALE(int32_t, float)
HPK_DEFINE_SCALE(float, float)
HPK_DEFINE_SCALE(double, double)
#undef HPK_DEFINE_SCALE

#define HPK_DEFINE_FOR(T)                                                                                             \
  HPK_MULTIVERSION void group_maxima(const T* values, int64_t count, int64_t groups, T* maxima) {                     \
    group_maxima_of(values, count, groups, maxima);                                                                   \
  }                                                                                                                   \
  HPK_MULTIVERSION int64_t list_reaching(const T* values, int64_t count, T limit, int32_t* positions) {               \
    return list_reaching_of(values, count, limit, positions);                                                         \
  }                                                                                                                   \
  HPK_MULTIVERSION Candidate<T>* narrow(const T* query, const T* references, int64_t dim, T least, T slack,           \
                                        Candidate<T>* first, Candidate<T>* last) {                                    \
    return narrow_of(query, references, dim, least, slack, first, last);                                              \
  }                                                                                                                   \
  HPK_MULTIVERSION void evaluate(const double* query, const T* references, int64_t dim, Candidate<T>* first,          \
                                 Candidate<T>* last) {                                                                \
    evaluate_of(query, references, dim, first, last);                                                                 \
  }
HPK_DEFINE_FOR(float)
HPK_DEFINE_FOR(double)
#undef HPK_DEFINE_FOR

template <typename T>
void exclude(const Exclusions& exclusions, int64_t row, std::vector<T>& values) {
  const auto pool = static_cast<int64_t>(values.size());
  if (exclusions.mask != nullptr) {
    const bool* allowed = exclusions.mask + row * pool;
    for (int64_t j = 0; j < pool; ++j) values[j] = allowed[j] ? values[j] : kExcluded<T>;
  }
  if (exclusions.query_group != nullptr && exclusions.query_group[row] >= 0) {
    const int64_t group = exclusions.query_group[row];
    for (int64_t j = 0; j < pool; ++j) values[j] = exclusions.pool_group[j] == group ? kExcluded<T> : values[j];
  }
}

template <typename T>
bool is_nan(const Candidate<T>& candidate) {
  return candidate.value != candidate.value;
}

template <typename T>
bool is_better(const Candidate<T>& a, const Candidate<T>& b) {
  return a.value > b.value || (a.value == b.value && a.index < b.index);
}

// The k-th greatest of some values, which are reordered and lose what is NaN; -inf if there are fewer.
template <typename T>
T kth_greatest(int64_t k, std::vector<T>& some) {
  some.erase(std::remove_if(some.begin(), some.end(), [](T value) { return value != value; }), some.end());
  if (static_cast<int64_t>(some.size()) < k) return kExcluded<T>;
  std::nth_element(some.begin(), some.begin() + (k - 1), some.end(), [](T a, T b) { return a > b; });
  return some[k - 1];
}

// A number that at least k of the coarse products reach, if so many are allowed, and few more.
template <typename T>
T lower_limit(int64_t k, Scratch<T>& scratch) {
  const auto count = static_cast<int64_t>(scratch.values.size());
  int64_t groups = kLeastGroups;
  while (groups < 2 * k) groups *= 2;
  if (groups > kMostGroups || groups > count) {
    scratch.some = scratch.values;
  } else {
    // As many groups have a maximum of at least the k-th greatest maximum.
    scratch.some.resize(groups);
    group_maxima(scratch.values.data(), count, groups, scratch.some.data());
  }
  return kth_greatest(k, scratch.some);
}

// Adds the references whose coarse product reaches `limit`, or is NaN, and that `wanted(product, reference)` says yes to,
// to the candidates.
template <typename T, typename Wanted>
void add_candidates(T limit, Scratch<T>& scratch, Wanted wanted) {
  const std::vector<T>& values = scratch.values;
  const int64_t listed =
      list_reaching(values.data(), static_cast<int64_t>(values.size()), limit, scratch.positions.data());
  for (int64_t p = 0; p < listed; ++p) {
    const int32_t reference = scratch.positions[p];
    const T value = values[reference];
    if (wanted(value, reference) && value != kExcluded<T>) scratch.candidates.push_back({value, reference});
  }
}

// Finds references, the k with the greatest inner products among them, and computes these products. A coarse product is
// off by `bound` at the most, whichever the reference, and one in T by `slack`. Returns how many it computed, in T or more.
template <typename T>
int64_t find_candidates(const CoarseRows<T>& query, const CoarseRows<T>& references, int64_t k, T bound, T slack,
                        Scratch<T>& scratch) {
  std::vector<Candidate<T>>& candidates = scratch.candidates;
  candidates.clear();
  scratch.positions.resize(scratch.values.size());
  scratch.query.assign(query.rows, query.rows + query.dim);
  const auto evaluate_from = [&](std::size_t first) {
    Candidate<T>* const begin = candidates.data();
    evaluate(scratch.query.data(), references.rows, query.dim, begin + first, begin + candidates.size());
  };
  // First those that are likely: their inner products then put most of the others out of the question.
  const T likely = lower_limit(k, scratch);
  add_candidates(likely, scratch, [](T, int32_t) { return true; });
  evaluate_from(0);
  scratch.some.clear();
  for (const Candidate<T>& candidate : candidates) scratch.some.push_back(candidate.value);
  const T least = kth_greatest(k, scratch.some);

  const std::size_t evaluated = candidates.size();
  add_candidates(least - bound, scratch, [&](T value, int32_t reference) {
    const T own = coarse_bound(*query.norm, *query.error, references.norm[reference], references.error[reference]);
    return value < likely && value + own >= least;
  });
  const auto computed = static_cast<int64_t>(candidates.size());
  Candidate<T>* const begin = candidates.data();
  Candidate<T>* const end = begin + candidates.size();
  candidates.resize(narrow(query.rows, references.rows, query.dim, least, slack, begin + evaluated, end) - begin);
  evaluate_from(evaluated);
  const auto too_small = [=](const Candidate<T>& candidate) { return candidate.value < least; };
  candidates.erase(std::remove_if(candidates.begin(), candidates.end(), too_small), candidates.end());
  return computed;
}

template <typename T>
void choose(std::vector<Candidate<T>>& candidates, int64_t k, T* values, int64_t* indices) {
  const bool nan = std::any_of(candidates.begin(), candidates.end(), is_nan<T>);
  const int64_t found = nan ? 0 : std::min<int64_t>(k, candidates.size());
  if (!nan) std::sort(candidates.begin(), candidates.end(), is_better<T>);  // few more than k
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
  const auto greater = [](T a, T b) { return a < b || b != b ? b : a; };  // NaN if there is one
  const T norm = std::accumulate(references.norm, references.norm + pool, T{0}, greater);
  const T error = std::accumulate(references.error, references.error + pool, T{0}, greater);
  std::atomic<int64_t> computed{0};
  parallel_for(run, rows, 16, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch;
    scratch.values.resize(pool);
    int64_t candidates = 0;
    for (int64_t i = begin; i < end; ++i) {
      const CoarseRows<T> query = rows_from(queries, i);
      const T bound = coarse_bound(*query.norm, *query.error, norm, error);
      const T slack = coarse_rounding<T>(query.dim) * *query.norm * norm + kCoarseUnderflow<T>;
      scale_products(products + i * pool, *query.scale, references.scale, pool, scratch.values.data());
      if (!(bound < std::numeric_limits<T>::infinity())) {  // coarse products that say nothing, and may be infinite
        std::fill(scratch.values.begin(), scratch.values.end(), std::numeric_limits<T>::quiet_NaN());
      }
      exclude(exclusions, i, scratch.values);
      candidates += find_candidates(query, references, k, bound, slack, scratch);
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
