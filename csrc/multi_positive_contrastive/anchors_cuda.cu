// Kernels over the anchors alone: what their pairs count in the loss, how long their rows are, and how backward takes
// their statistics.
#include <cstring>

#include "common/schedule.h"
#include "common/warp.cuh"
#include "multi_positive_contrastive/multi_positive_contrastive_cuda.h"

namespace hpk {
namespace {

// Types

constexpr int kThreads = 256, kWarps = kThreads / 32;

// Of the kept anchors of an image: their number, and the sum of their masses.
struct Kept {
  float count = 0, mass = 0;

  __device__ void add(const Kept& other) {
    count += other.count;
    mass += other.mass;
  }
};

// Consumer

// The sum over the threads of a block, for all of them, in a fixed order.
__device__ Kept sum_over_block(Kept kept, Kept* of_warps) {
  kept = {sum_over_lanes(kept.count), sum_over_lanes(kept.mass)};
  __syncthreads();  // nobody reads the sums before
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = kept;
  __syncthreads();
  Kept all;
  for (int warp = 0; warp < kWarps; ++warp) all.add(of_warps[warp]);
  return all;
}

// Kernel

// weights[i] = (n of A_i, n of S_i, what a pair in A counts in the loss of the image, and one in S); images[0] and [1]: the
// images that have a kept anchor. The formulas are those of anchor_coefficients in reference.py.
//
// Grid (images). Bytes: 28 an anchor.
HPK_KERNEL(kThreads)
contrastive_weigh_kernel(const int32_t* __restrict__ counts, int group, const float* __restrict__ specific_weight,
                         const __grid_constant__ Weighting weighting, float* __restrict__ weights,
                         int64_t* __restrict__ images) {
  auto* const of_warps = reinterpret_cast<Kept*>(shared_memory());
  const int64_t first = int64_t{blockIdx.x} * group;
  const float lambda = *specific_weight;
  // n of an anchor, and whether it is kept: of A and S together, or of one of them.
  const auto mass_of = [&](int64_t anchor, int term, float& mass) {
    const auto agnostic = static_cast<float>(counts[3 * anchor]), specific = static_cast<float>(counts[3 * anchor + 1]);
    bool kept = (term == 0 ? agnostic : specific) > 0;
    mass = term == 0 ? agnostic : specific;
    if (weighting.joint) {
      mass = agnostic + lambda * specific;
      kept = kept || (weighting.keep_specific_only && mass > 0);
    }
    return kept && counts[3 * anchor + 2] > 0;
  };
  Kept all[2];
#pragma unroll
  for (int term = 0; term < 2; ++term) {
    if (term == 1 && weighting.joint) break;
    Kept own;
    for (int i = threadIdx.x; i < group; i += kThreads) {
      float mass;
      if (mass_of(first + i, term, mass)) own.add({1, mass});
    }
    all[term] = sum_over_block(own, of_warps);
  }
  if (weighting.joint) all[1] = all[0];
  if (threadIdx.x < 2 && all[threadIdx.x].count > 0) take(images + threadIdx.x, 1);
  for (int i = threadIdx.x; i < group; i += kThreads) {
    float factors[2];
#pragma unroll
    for (int term = 0; term < 2; ++term) {
      float mass;
      const bool kept = mass_of(first + i, weighting.joint ? 0 : term, mass);
      const float divisor = weighting.reweight ? all[term].mass : mass * all[term].count;
      factors[term] = kept ? 1 / divisor : 0;
    }
    auto* const to = reinterpret_cast<float4*>(weights) + first + i;
    const auto agnostic = static_cast<float>(counts[3 * (first + i)]);
    *to = float4{agnostic, static_cast<float>(counts[3 * (first + i) + 1]), factors[0], lambda * factors[1]};
  }
}

// *greatest = the greatest |z_i|^2: see greatest_square_cuda.
//
// Grid (blocks of rows), a warp a row. Bytes: z once.
template <class T>
HPK_KERNEL(kThreads)
contrastive_greatest_square_kernel(const __grid_constant__ Rows<T> z, float* __restrict__ greatest) {
  constexpr int kNumbers = 16 / sizeof(T), kMostFinite = 0x7F7FFFFF;
  auto* const of_warps = reinterpret_cast<float*>(shared_memory());
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  float square = 0;
  bool finite = true;
  if (row < z.count) {
    for (int place = static_cast<int>(threadIdx.x) % 32 * kNumbers; place < z.dim; place += 32 * kNumbers) {
      const uint4 loaded = __ldg(reinterpret_cast<const uint4*>(z.data + row * z.stride + place));
      T numbers[kNumbers];
      std::memcpy(static_cast<void*>(numbers), &loaded, sizeof loaded);
#pragma unroll
      for (const T& number : numbers) {
        const float value = static_cast<float>(number);
        finite = finite && (__float_as_uint(value) & 0x7FFFFFFF) <= kMostFinite;
        square += value * value;
      }
    }
  }
  square = fminf(sum_over_lanes(square), __uint_as_float(kMostFinite));
  if (__any_sync(kAllLanes, !finite)) square = __uint_as_float(0x7FFFFFFF);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = square;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kWarps; ++warp) square = max_or_nan(square, of_warps[warp]);
  raise_to(greatest, square);
}

// numbers[b, i] = (r_i, f_i, pull_i, specific pull_i) of rows[b, i] = (logDen_i, push_i, pull_i, specific pull_i), the
// last three divided by one number: see Kernels.scale_rows of routes.py.
//
// Grid (blocks of anchors, branches). Bytes: 32 an anchor.
HPK_KERNEL(kThreads)
contrastive_scale_rows_kernel(const __grid_constant__ ScaledRows arguments) {
  const int64_t branch = blockIdx.y, anchor = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  constexpr float kTiny = 1.17549435e-38f;
  const float least = kTiny * arguments.greatest_g, greatest = *arguments.greatest;
  const float divisor = (greatest < least ? least : greatest) / (arguments.greatest_g / 4);  // NaN stays
  const float lowest = arguments.lowest[branch], highest = arguments.highest[branch];
  const bool together = highest - lowest <= arguments.most_apart;
  if (anchor == 0) {
    arguments.shifts[branch] = together ? highest : __uint_as_float(0x7FFFFFFF);
    arguments.factors[branch] = divisor * arguments.grad_losses[branch] / arguments.temperature;
  }
  if (anchor >= arguments.anchors) return;
  const int64_t at = branch * arguments.anchors + anchor;
  float4 row = reinterpret_cast<const float4*>(arguments.rows)[at];
  row.y /= divisor;
  row.z /= divisor;
  row.w /= divisor;
  if (together) {
    row.y *= expf(highest - row.x);
    row.x = highest;
  }
  reinterpret_cast<float4*>(arguments.numbers)[at] = row;
}

}  // namespace

// Launch

void weigh_cuda(const int32_t* counts, int64_t anchors, int64_t group, const float* specific_weight,
                const Weighting& weighting, float* weights, int64_t* images, cudaStream_t stream) {
  launch(contrastive_weigh_kernel, static_cast<unsigned>(anchors / group), kThreads, kWarps * sizeof(Kept), stream, counts,
         static_cast<int>(group), specific_weight, weighting, weights, images);
}

template <typename T>
void greatest_square_cuda(const Rows<T>& z, float* greatest, cudaStream_t stream) {
  launch(contrastive_greatest_square_kernel<T>, static_cast<unsigned>(divide_up(z.count, kWarps)), kThreads,
         kWarps * sizeof(float), stream, z, greatest);
}

template void greatest_square_cuda<float>(const Rows<float>&, float*, cudaStream_t);
template void greatest_square_cuda<__half>(const Rows<__half>&, float*, cudaStream_t);
template void greatest_square_cuda<__nv_bfloat16>(const Rows<__nv_bfloat16>&, float*, cudaStream_t);

void scale_rows_cuda(const ScaledRows& rows, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(divide_up(rows.anchors, kThreads)), static_cast<unsigned>(rows.branches));
  launch(contrastive_scale_rows_kernel, grid, kThreads, 0, stream, rows);
}

}  // namespace hpk
