// The weights of local_propagation from logits, and the stencil, on the CPU.
#include "local_propagation/local_propagation.h"

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "common/exponential.h"

namespace hpk {
namespace {

// Sum of exp(clamp(x) - high); high is the greatest clamped value.
template <typename T>
HPK_HOST_DEVICE T clamped_exp_sum_of(const T* row, int64_t count, T low, T high) {
  T sum = 0;
  HPK_SIMD_SUM(sum)
  for (int64_t j = 0; j < count; ++j) {
    const T clamped = row[j] < low ? low : (row[j] > high ? high : row[j]);
    sum += exp_nonpositive(clamped - high);
  }
  return sum;
}

HPK_MULTIVERSION float clamped_exp_sum(const float* row, int64_t count, float low, float high) {
  return clamped_exp_sum_of(row, count, low, high);
}

HPK_MULTIVERSION double clamped_exp_sum(const double* row, int64_t count, double low, double high) {
  return clamped_exp_sum_of(row, count, low, high);
}

constexpr int64_t kBuckets = 256;

// Sorts `count` values into buckets of equal width between the least and the greatest: buckets[j] is that of row[j].
// Monotone, so that the buckets of sorted values are sorted. False, and nothing done, unless both ends are finite.
template <typename T>
HPK_HOST_DEVICE bool into_buckets_of(const T* row, int64_t count, int32_t* buckets) {
  T least = row[0], greatest = row[0];
  int32_t nan = 0;
  HPK_PRAGMA(omp simd reduction(min : least) reduction(max : greatest) reduction(| : nan))
  for (int64_t j = 0; j < count; ++j) {
    least = row[j] < least ? row[j] : least;
    greatest = row[j] > greatest ? row[j] : greatest;
    nan |= row[j] != row[j];
  }
  const T scale = static_cast<T>(kBuckets - 1) / (greatest - least);
  if (nan != 0 || !(scale > 0) || !(scale < std::numeric_limits<T>::infinity())) return false;
  HPK_SIMD
  for (int64_t j = 0; j < count; ++j) buckets[j] = static_cast<int32_t>((row[j] - least) * scale);
  return true;
}

HPK_MULTIVERSION bool into_buckets(const float* row, int64_t count, int32_t* buckets) {
  return into_buckets_of(row, count, buckets);
}

HPK_MULTIVERSION bool into_buckets(const double* row, int64_t count, int32_t* buckets) {
  return into_buckets_of(row, count, buckets);
}

// What one thread works with.
template <typename T>
struct Scratch {
  std::vector<T> some;
  std::vector<int32_t> buckets;
};

// The order statistics `rank` and rank + 1 of values, of which `smaller` are not among `some`; some is reordered.
template <typename T>
std::pair<T, T> neighbours_in(std::vector<T>& some, int64_t rank, int64_t smaller) {
  const auto at = some.begin() + (rank - smaller);
  std::nth_element(some.begin(), at, some.end());
  return {*at, at + 1 == some.end() ? *at : *std::min_element(at + 1, some.end())};
}

// Quantiles of a row by linear interpolation between the two order statistics around each.
template <typename T>
std::pair<T, T> quantiles(const T* row, int64_t count, double low, double high, Scratch<T>& scratch) {
  scratch.buckets.resize(count);
  const bool bucketed = into_buckets(row, count, scratch.buckets.data());
  int32_t sizes[kBuckets] = {};
  for (int64_t j = 0; bucketed && j < count; ++j) ++sizes[scratch.buckets[j]];
  const auto quantile = [&](double which) {
    const double position = which * static_cast<double>(count - 1);
    const auto rank = static_cast<int64_t>(position);
    int64_t smaller = 0;
    if (bucketed) {
      // Only the values from the bucket of the one order statistic to that of the other need to be looked at.
      int32_t first = 0;
      while (smaller + sizes[first] <= rank) smaller += sizes[first++];
      int32_t last = first;
      const int64_t wanted = std::min(rank + 1, count - 1);
      for (int64_t seen = smaller + sizes[first]; seen <= wanted; seen += sizes[last]) ++last;
      scratch.some.clear();
      for (int64_t j = 0; j < count; ++j) {
        if (scratch.buckets[j] >= first && scratch.buckets[j] <= last) scratch.some.push_back(row[j]);
      }
    } else {
      scratch.some.assign(row, row + count);
    }
    const auto [below, above] = neighbours_in(scratch.some, rank, smaller);
    return below + static_cast<T>(position - static_cast<double>(rank)) * (above - below);
  };
  const T at_low = quantile(low);
  return {at_low, quantile(high)};
}

template <typename T>
void weights_of_row(const T* row, int64_t i, int64_t height, int64_t width, double sigma, double low, double high,
                    int64_t window, Scratch<T>& scratch, T* weights) {
  const int64_t patches = height * width, radius = window / 2, y = i / width, x = i % width;
  const auto [least, greatest] = quantiles(row, patches, low, high, scratch);
  const T to_mean_units = static_cast<T>(patches) / clamped_exp_sum(row, patches, least, greatest);
  const int64_t y0 = std::max<int64_t>(y - radius, 0), y1 = std::min(y + radius, height - 1);
  const int64_t x0 = std::max<int64_t>(x - radius, 0), x1 = std::min(x + radius, width - 1);
  const T scale = static_cast<T>(sigma / static_cast<double>(patches)) / static_cast<T>((y1 - y0 + 1) * (x1 - x0 + 1));
  const T threshold = 1 - 8 * std::numeric_limits<T>::epsilon();
  for (int64_t cell = 0; cell < window * window; ++cell) weights[cell * patches + i] = 0;
  for (int64_t v = y0; v <= y1; ++v) {
    for (int64_t u = x0; u <= x1; ++u) {
      const T clamped = std::clamp(row[v * width + u], least, greatest);
      const T attention = to_mean_units * exp_nonpositive(clamped - greatest);
      const int64_t cell = (v - y + radius) * window + (u - x + radius);
      // Written so that NaN attention is kept and shows in the weights.
      weights[cell * patches + i] = attention < threshold ? T{0} : attention * scale;
    }
  }
}

// The weights with 0 for cells outside the image, whatever the caller has there.
template <typename T>
std::vector<T> inside_only(const T* weights, int64_t images, int64_t height, int64_t width, int64_t window) {
  const int64_t patches = height * width, radius = window / 2, cells = window * window;
  std::vector<T> inside(weights, weights + images * cells * patches);
  for (int64_t row = 0; row < images * cells; ++row) {
    const int64_t dy = row % cells / window - radius, dx = row % window - radius;
    for (int64_t p = 0; p < patches; ++p) {
      const int64_t y = p / width + dy, x = p % width + dx;
      if (y < 0 || y >= height || x < 0 || x >= width) inside[row * patches + p] = 0;
    }
  }
  return inside;
}

// One plane: mixed[p] = sum over cells of weights[cell][p] * code[p + offset of the cell]. A cell outside the image has
// weight 0, so the plane may be run through as one line: what is read across the ends of its rows is multiplied by 0.
template <typename T>
HPK_HOST_DEVICE void gather_plane_of(const T* code, const T* weights, int64_t height, int64_t width, int64_t window,
                                     T* mixed) {
  const int64_t patches = height * width, radius = window / 2;
  HPK_SIMD
  for (int64_t p = 0; p < patches; ++p) mixed[p] = 0;
  for (int64_t cell = 0; cell < window * window; ++cell) {
    const int64_t offset = (cell / window - radius) * width + cell % window - radius;
    const int64_t begin = offset < 0 ? -offset : 0, end = offset > 0 ? patches - offset : patches;
    const T* weight = weights + cell * patches;
    const T* source = code + offset;
    HPK_SIMD
    for (int64_t p = begin; p < end; ++p) mixed[p] += weight[p] * source[p];
  }
}

template <typename T>
HPK_HOST_DEVICE void scatter_plane_of(const T* grad, const T* weights, int64_t height, int64_t width, int64_t window,
                                      T* grad_code) {
  const int64_t patches = height * width, radius = window / 2;
  HPK_SIMD
  for (int64_t p = 0; p < patches; ++p) grad_code[p] = 0;
  for (int64_t cell = 0; cell < window * window; ++cell) {
    const int64_t offset = (cell / window - radius) * width + cell % window - radius;
    const int64_t begin = offset < 0 ? -offset : 0, end = offset > 0 ? patches - offset : patches;
    const T* weight = weights + cell * patches;
    T* target = grad_code + offset;
    HPK_SIMD
    for (int64_t p = begin; p < end; ++p) target[p] += weight[p] * grad[p];
  }
}

HPK_MULTIVERSION void gather_plane(const float* code, const float* weights, int64_t height, int64_t width,
                                   int64_t window, float* mixed) {
  gather_plane_of(code, weights, height, width, window, mixed);
}

HPK_MULTIVERSION void gather_plane(const double* code, const double* weights, int64_t height, int64_t width,
                                   int64_t window, double* mixed) {
  gather_plane_of(code, weights, height, width, window, mixed);
}

HPK_MULTIVERSION void scatter_plane(const float* grad, const float* weights, int64_t height, int64_t width,
                                    int64_t window, float* grad_code) {
  scatter_plane_of(grad, weights, height, width, window, grad_code);
}

HPK_MULTIVERSION void scatter_plane(const double* grad, const double* weights, int64_t height, int64_t width,
                                    int64_t window, double* grad_code) {
  scatter_plane_of(grad, weights, height, width, window, grad_code);
}

}  // namespace

template <typename T>
void local_propagation_weights_cpu(ParallelFor run, const T* logits, int64_t images, int64_t height, int64_t width,
                                   double sigma, double low, double high, int64_t window, T* weights) {
  const int64_t patches = height * width;
  parallel_for(run, images * patches, 16, [=](int64_t begin, int64_t end) {
    Scratch<T> scratch;
    for (int64_t row = begin; row < end; ++row) {
      weights_of_row(logits + row * patches, row % patches, height, width, sigma, low, high, window, scratch,
                     weights + row / patches * window * window * patches);
    }
  });
}

template <typename T>
void local_propagation_apply_cpu(ParallelFor run, const T* code, const T* weights, int64_t batch, int64_t dim,
                                 int64_t height, int64_t width, int64_t window, T* mixed) {
  const int64_t patches = height * width;
  const std::vector<T> inside = inside_only(weights, batch, height, width, window);
  parallel_for(run, batch * dim, 16, [=, inside = inside.data()](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      gather_plane(code + plane * patches, inside + plane / dim * window * window * patches, height, width, window,
                   mixed + plane * patches);
    }
  });
}

template <typename T>
void local_propagation_apply_backward_cpu(ParallelFor run, const T* grad_mixed, const T* weights, int64_t batch,
                                          int64_t dim, int64_t height, int64_t width, int64_t window, T* grad_code) {
  const int64_t patches = height * width;
  const std::vector<T> inside = inside_only(weights, batch, height, width, window);
  parallel_for(run, batch * dim, 16, [=, inside = inside.data()](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      scatter_plane(grad_mixed + plane * patches, inside + plane / dim * window * window * patches, height, width,
                    window, grad_code + plane * patches);
    }
  });
}

#define HPK_INSTANTIATE(T)                                                                                            \
  template void local_propagation_weights_cpu<T>(ParallelFor, const T*, int64_t, int64_t, int64_t, double, double,    \
                                                 double, int64_t, T*);                                                \
  template void local_propagation_apply_cpu<T>(ParallelFor, const T*, const T*, int64_t, int64_t, int64_t, int64_t,   \
                                               int64_t, T*);                                                          \
  template void local_propagation_apply_backward_cpu<T>(ParallelFor, const T*, const T*, int64_t, int64_t, int64_t,   \
                                                        int64_t, int64_t, T*);
HPK_INSTANTIATE(float)
HPK_INSTANTIATE(double)
#undef HPK_INSTANTIATE

}  // namespace hpk
