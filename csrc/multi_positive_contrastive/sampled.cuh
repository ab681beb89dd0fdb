// What the kernels of the sampled negatives know of them. Anchors at one patch position, one an image, share theirs:
// their logits are products with the rows that the position's list of columns names.
#pragma once

#include <cstring>

#include "common/exponential.h"
#include "engines/team.cuh"
#include "multi_positive_contrastive/multi_positive_contrastive_cuda.h"

namespace hpk {

// What the kernels need besides the rows of z.
struct SampledArguments {
  int anchors, group;
  const int64_t *state, *ranges;
  const int32_t* columns;
  float scale;

  // The anchor at a position in an image, -1 beyond the last.
  __device__ int anchor(int image, int position) const {
    return image < anchors / group ? image * group + position : -1;
  }
};

template <class T>
SampledArguments arguments_of(const SampledPairs<T>& pairs) {
  return {static_cast<int>(pairs.z.count), static_cast<int>(pairs.group), pairs.state, pairs.ranges, pairs.columns,
          pairs.scale};
}

// The list of one position, or its columns from `first` to before `last`.
struct List {
  int64_t entry;  // the first
  int length;
  const int32_t* columns;

  __device__ List(const SampledArguments& arguments, int position) {
    const int64_t end = arguments.ranges[2 * position + 1];
    entry = arguments.ranges[2 * position];
    columns = arguments.columns + entry;
    length = static_cast<int>(end - entry);
  }

  __device__ List(const SampledArguments& arguments, int position, int64_t first, int64_t last)
      : List(arguments, position) {
    if (first == 0 && last == arguments.anchors) return;
    const int before = below(first);
    length = below(last) - before;
    columns += before;
    entry += before;
  }

  // -1 beyond the end.
  __device__ int operator[](int i) const { return i < length ? columns[i] : -1; }

 private:
  // How many columns are below a bound.
  __device__ int below(int64_t bound) const {
    int least = 0;
    for (int most = length; least < most;) {
      const int middle = (least + most) / 2;
      columns[middle] < bound ? least = middle + 1 : most = middle;
    }
    return least;
  }
};

// Whether a column, -1 for none, is in another image than the one that starts with anchor `first_of_image`.
__device__ __forceinline__ bool is_across(int first_of_image, int column, int group) {
  return column >= 0 && static_cast<unsigned>(column - first_of_image) >= static_cast<unsigned>(group);
}

// f_i and r_i of an anchor: push_i exp(logit - logDen_i) = f_i exp(logit - r_i). No push for -1.
struct Push {
  float r = 0, f = 0;

  __device__ Push(const float4* numbers, int anchor) {
    if (anchor < 0) return;
    const float2 both = *reinterpret_cast<const float2*>(numbers + anchor);
    r = both.x, f = both.y;
  }

  __device__ float of(float logit) const { return f * exp_of(logit - r); }
};

// Two neighbouring numbers of a row of T, which others read later.
template <class T>
__device__ __forceinline__ void store_two(T* to, float first, float second) {
  if constexpr (sizeof(T) == 4) {
    __stcs(reinterpret_cast<float2*>(to), float2{first, second});
  } else {
    const T both[] = {T(first), T(second)};
    uint32_t bits;
    std::memcpy(&bits, static_cast<const void*>(both), sizeof bits);
    __stcs(reinterpret_cast<uint32_t*>(to), bits);
  }
}

__device__ __forceinline__ void add_two(float* to, float first, float second) {
  float2& both = *reinterpret_cast<float2*>(to);
  both = {both.x + first, both.y + second};
}

// Adds what a thread has found, of features from `first` on, to the rows of `sums` (., dim) that row_of(r) names, -1 for
// none.
template <class Geometry, class RowOf>
__device__ __forceinline__ void add_to_rows(const Fragment<Geometry>& found, int thread, int first, const RowOf& row_of,
                                            float* sums, int dim) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = row_of(Geometry::row(thread, 0, h));
    if (row < 0) continue;
#pragma unroll
    for (int n = 0; n < Geometry::kColumnBlocks; ++n) {
      const int feature = first + Geometry::column(thread, n, 0);
      const float* const two = found.values[0][n] + 2 * h;
      if (feature < dim) add_two(sums + int64_t{row} * dim + feature, two[0], two[1]);
    }
  }
}

}  // namespace hpk
