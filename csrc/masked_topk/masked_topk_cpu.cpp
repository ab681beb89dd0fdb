// Selects the k greatest of coarse products on the CPU; where these leave it open, inner products decide.
#include "masked_topk/masked_topk.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include "common/inner_product.h"

#if HPK_HAS_AVX512_VERSIONS
#include <immintrin.h>
#endif

namespace hpk {
namespace {

constexpr int64_t kListSlack = 16;  // positions after the last that a list may write to
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

// How many values reach a limit; NaN does not.
template <typename T>
HPK_HOST_DEVICE int64_t count_reaching_of(const T* values, int64_t count, T limit) {
  int32_t reaching = 0;
  HPK_PRAGMA(omp simd reduction(+ : reaching))
  for (int64_t j = 0; j < count; ++j) reaching += values[j] >= limit ? 1 : 0;
  return reaching;
}

// A number that at least k of the values reach, and no more than that unless some are equal; -inf if there are fewer
// than k, not counting NaN and -inf.
template <typename T>
HPK_HOST_DEVICE T reached_by_of(int64_t k, const T* values, int64_t count) {
  T low = std::numeric_limits<T>::infinity(), high = kExcluded<T>;
  int32_t valid = 0;
  for (int64_t j = 0; j < count; ++j) {
    const bool counts = values[j] > kExcluded<T>;
    low = counts && values[j] < low ? values[j] : low;
    high = values[j] > high ? values[j] : high;
    valid += counts ? 1 : 0;
  }
  if (valid < k) return kExcluded<T>;
  for (int64_t reaching = valid; reaching > k;) {  // at least k, from first to last, reach `low`
    const T middle = low / 2 + high / 2;
    if (!(low < middle && middle < high)) return count_reaching_of(values, count, high) >= k ? high : low;
    const int64_t above = count_reaching_of(values, count, middle);
    if (above >= k) {
      low = middle;
      reaching = above;
    } else {
      high = middle;
    }
  }
  return low;
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
  HPK_MULTIVERSION T reached_by(int64_t k, const T* values, int64_t count) {                                          \
    return reached_by_of(k, values, count);                                                                           \
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

#if HPK_HAS_AVX512_VERSIONS
// Compilers do not find the instruction that moves the chosen lanes of a vector together.
__attribute__((target("avx512f"))) int64_t list_reaching_avx512(const float* values, int64_t count, float limit,
                                                                int32_t* positions) {
  const __m512 limits = _mm512_set1_ps(limit);
  const __m512i step = _mm512_set1_epi32(16);
  __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int64_t listed = 0;
  for (int64_t first = 0; first < count; first += 16) {
    const auto valid = static_cast<__mmask16>(count - first < 16 ? (1u << (count - first)) - 1 : 0xffffu);
    const __m512 loaded = _mm512_maskz_loadu_ps(valid, values + first);
    const __mmask16 found = _mm512_mask_cmp_ps_mask(valid, loaded, limits, _CMP_NLT_UQ);
    _mm512_storeu_si512(positions + listed, _mm512_maskz_compress_epi32(found, lanes));
    listed += __builtin_popcount(found);
    lanes = _mm512_add_epi32(lanes, step);
  }
  return listed;
}
#endif

// `positions` has room for kListSlack more than `count`.
template <typename T>
int64_t list(const T* values, int64_t count, T limit, int32_t* positions) {
#if HPK_HAS_AVX512_VERSIONS
  if constexpr (std::is_same_v<T, float>) {
    if (__builtin_cpu_supports("avx512f")) return list_reaching_avx512(values, count, limit, positions);
  }
#endif
  return list_reaching(values, count, limit, positions);
}

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

// A number that at least k of the coarse products reach, if so many are allowed, and few more.
template <typename T>
T lower_limit(int64_t k, Scratch<T>& scratch) {
  const auto count = static_cast<int64_t>(scratch.values.size());
  int64_t groups = kLeastGroups;
  while (groups < 2 * k) groups *= 2;
  if (groups > kMostGroups || groups > count) return reached_by(k, scratch.values.data(), count);
  // As many groups have a maximum of at least the k-th greatest maximum.
  scratch.some.resize(groups);
  group_maxima(scratch.values.data(), count, groups, scratch.some.data());
  return reached_by(k, scratch.some.data(), groups);
}

// Finds references, the k with the greatest inner products among them, and computes these products. A coarse product is
// off by `bound` at the most, whichever the reference, and one in T by `slack`. Leaves `found` candidates and returns how
// many inner products it computed, in T or more.
template <typename T>
int64_t find_candidates(const CoarseRows<T>& query, const CoarseRows<T>& references, int64_t k, T bound, T slack,
                        Scratch<T>& scratch, int64_t& found) {
  const std::vector<T>& values = scratch.values;
  const auto pool = static_cast<int64_t>(values.size());
  int32_t* const positions = scratch.positions.data();
  Candidate<T>* const candidates = scratch.candidates.data();
  scratch.query.assign(query.rows, query.rows + query.dim);
  // First those that are likely: their inner products then put most of the others out of the question.
  const T likely = lower_limit(k, scratch);
  const int64_t reaching = list(values.data(), pool, likely, positions);
  Candidate<T>* end = candidates;
  for (int64_t p = 0; p < reaching; ++p) {  // without branches, which no processor would foresee
    *end = {values[positions[p]], positions[p]};
    end += end->value != kExcluded<T>;
  }
  evaluate(scratch.query.data(), references.rows, query.dim, candidates, end);
  scratch.some.resize(end - candidates);
  for (std::size_t c = 0; c < scratch.some.size(); ++c) scratch.some[c] = candidates[c].value;
  const T least = reached_by(k, scratch.some.data(), end - candidates);

  Candidate<T>* const others = end;
  const int64_t within = list(values.data(), pool, least - bound, positions);
  for (int64_t p = 0; p < within; ++p) {
    const int32_t reference = positions[p];
    const T value = values[reference];
    const T own = coarse_bound(*query.norm, *query.error, references.norm[reference], references.error[reference]);
    *end = {value, reference};
    end += (value < likely) & (value + own >= least) & (value != kExcluded<T>);
  }
  const int64_t computed = end - candidates;
  end = narrow(query.rows, references.rows, query.dim, least, slack, others, end);
  evaluate(scratch.query.data(), references.rows, query.dim, others, end);
  const auto too_small = [=](const Candidate<T>& candidate) { return candidate.value < least; };
  found = std::remove_if(candidates, end, too_small) - candidates;
  return computed;
}

template <typename T>
void choose(Candidate<T>* first, Candidate<T>* last, int64_t k, T* values, int64_t* indices) {
  const bool nan = std::any_of(first, last, is_nan<T>);
  const int64_t found = nan ? 0 : std::min<int64_t>(k, last - first);
  if (!nan) std::sort(first, last, is_better<T>);  // few more than k
  for (int64_t t = 0; t < k; ++t) {
    values[t] = t < found ? first[t].value : nan ? std::numeric_limits<T>::quiet_NaN() : kExcluded<T>;
    indices[t] = values[t] > kExcluded<T> ? first[t].index : -1;
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
    scratch.positions.resize(pool + kListSlack);
    scratch.candidates.resize(pool + 1);  // one more is written before it is known to be none
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
      int64_t found = 0;
      candidates += find_candidates(query, references, k, bound, slack, scratch, found);
      choose(scratch.candidates.data(), scratch.candidates.data() + found, k, values + i * k, indices + i * k);
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
