// The weights of local_propagation: logits of some images, see logits.cuh, then row by row their quantiles, their sum and
// the entries of the window.
#include "common/warp.cuh"
#include "engines/strip_sm80.cuh"
#include "local_propagation/logits.cuh"
#include "local_propagation/quantiles.h"

namespace hpk {
namespace {

// Types

constexpr int kRowThreads = 256;

struct RowArguments {
  LogitStrips strips;
  int height, width, window;
  float sigma;  // of one patch
  QuantileRank ranks[2];
  float* weights;
};

// Consumer

// How the threads of a row put numbers together, a warp at once and two by two.
struct Sum {
  static constexpr int kNothing = 0;
  static __device__ int of_warp(int value) { return __reduce_add_sync(kAllLanes, value); }
  static __device__ float of_warp(float value) { return sum_over_lanes(value); }
};

struct Least {
  static constexpr int kNothing = 0x7FFFFFFF;
  static __device__ int of_warp(int value) { return __reduce_min_sync(kAllLanes, value); }
};

struct Greatest {
  static constexpr int kNothing = -0x7FFFFFFF - 1;
  static __device__ int of_warp(int value) { return __reduce_max_sync(kAllLanes, value); }
};

// A row of logits and the kTeam threads that work on it: a warp, or the whole block. They hold it in registers, each
// kPerThread numbers, or, where that is 0, read it again each time.
template <int kTeam, int kPerThread>
class TeamRow {
 public:
  __device__ TeamRow(const float* row, int count) : row_(row), count_(count), thread_(threadIdx.x % kTeam) {
    // What is beyond the end must not be counted: it is at most no bound that is below infinity.
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const int at = thread_ + k * kTeam;
      values_[k] = at < count ? row[at] : __uint_as_float(kInfinity);
    }
  }

  __device__ void ends(float& least, float& greatest) {
    float lowest = __uint_as_float(kInfinity), highest = -lowest;
    for_each([&](float value, int at) {
      lowest = fminf(lowest, value);
      if (at < count_) highest = fmaxf(highest, value);
    });
    least = from_ordered_bits(over_team<Least>(ordered_bits(lowest)));
    greatest = from_ordered_bits(over_team<Greatest>(ordered_bits(highest)));
  }

  __device__ void count_at_most(const float (&bounds)[2], int (&counts)[2]) {
    float first = 0, second = 0;  // floats take an instruction less to compare and count; these are exact to 2^24
    for_each([&](float value, int) {
      first += value <= bounds[0] ? 1.0f : 0.0f;
      second += value <= bounds[1] ? 1.0f : 0.0f;
    });
    counts[0] = over_team<Sum>(static_cast<int>(first));
    counts[1] = over_team<Sum>(static_cast<int>(second));
  }

  __device__ void neighbours(const float (&bounds)[2], float (&at_most)[2], float (&above)[2]) {
    for (int i = 0; i < 2; ++i) {
      const float bound = bounds[i];
      float next = __uint_as_float(kInfinity), last = -next;
      for_each([&](float value, int) {
        if (value <= bound) last = fmaxf(last, value);
        if (value > bound) next = fminf(next, value);
      });
      at_most[i] = from_ordered_bits(over_team<Greatest>(ordered_bits(last)));
      above[i] = from_ordered_bits(over_team<Least>(ordered_bits(next)));
    }
  }

  // The sum of function(number) over the row, in a fixed order.
  template <class Function>
  __device__ float sum(Function function) {
    float total = 0;
    for_each([&](float value, int at) {
      const float term = function(value);
      total += at < count_ ? term : 0;
    });
    return over_team<Sum>(total);
  }

 private:
  static constexpr uint32_t kInfinity = 0x7F800000u;
  static constexpr int kWarps = kTeam / 32;

  template <class Body>
  __device__ __forceinline__ void for_each(Body body) const {
    if constexpr (kPerThread > 0) {
#pragma unroll
      for (int k = 0; k < kPerThread; ++k) body(values_[k], thread_ + k * kTeam);
    } else {
      for (int at = thread_; at < count_; at += kTeam) body(row_[at], at);
    }
  }

  // What is left in shared memory is read before the next but one is written, so that one barrier is enough.
  template <class Combine, class T>
  __device__ __forceinline__ T over_team(T value) {
    value = Combine::of_warp(value);
    if constexpr (kWarps > 1) {
      T* const of_warps = reinterpret_cast<T*>(shared_memory()) + turn_ * kWarps;
      turn_ ^= 1;
      const int lane = threadIdx.x % 32;
      if (lane == 0) of_warps[threadIdx.x / 32] = value;
      __syncthreads();
      value = Combine::of_warp(lane < kWarps ? of_warps[lane] : static_cast<T>(Combine::kNothing));
    }
    return value;
  }

  const float* const row_;
  const int count_, thread_;
  int turn_ = 0;
  float values_[kPerThread > 0 ? kPerThread : 1];
};

// exp(clamp(x) - greatest); least <= greatest. NaN stays.
__device__ __forceinline__ float clamped_exp(float x, float least, float greatest) {
  const float raised = x < least ? least : x;
  return expf((raised > greatest ? greatest : raised) - greatest);
}

// Kernel

// weights[b, cell, i] = T_ij / c_i for the j at `cell` of the window of i, 0 for cells outside the image
//
// Grid (rows of the workspace), a warp or a block a row. Bytes: logits once, if registers hold the row, else once a
// step of the bisection, both from cache; weights once. Instructions: about 11 steps of 4 for each logit at G = 784.
template <int kTeam, int kPerThread>
HPK_KERNEL(kRowThreads)
local_propagation_rows_fwd_kernel(const __grid_constant__ RowArguments arguments) {
  const LogitStrips& strips = arguments.strips;
  const int64_t own = int64_t{blockIdx.x} * (kRowThreads / kTeam) + threadIdx.x / kTeam;
  const int strip = strips.first + static_cast<int>(own / kLogitStripRows), image = strip / strips.per_image;
  const int patches = strips.patches;
  const int patch = strip % strips.per_image * kLogitStripRows + static_cast<int>(own % kLogitStripRows);
  if (patch >= patches) return;
  const float* const logits = strips.logits + own * strips.pitch;

  TeamRow<kTeam, kPerThread> row(logits, patches);
  float ends[2];
  find_quantiles(row, patches, arguments.ranks, ends);
  const float least = ends[0], greatest = ends[1];
  float sum = row.sum([=](float value) { return clamped_exp(value, least, greatest); });
  sum += least - least;  // 0, but NaN for bounds that are not finite, to which nothing can be clamped

  const int width = arguments.width, window = arguments.window, radius = window / 2;
  const int y = patch / width, x = patch % width;
  const auto inside = [=](int at, int size) {
    return (at + radius < size ? at + radius + 1 : size) - (at > radius ? at - radius : 0);
  };
  const float scale = arguments.sigma / static_cast<float>(inside(y, arguments.height) * inside(x, width));
  const float to_mean_units = static_cast<float>(patches) / sum;
  constexpr float kKept = 1 - 8 * 1.1920929e-7f;  // the mean, up to rounding
  float* const weights = arguments.weights + int64_t{image} * window * window * patches + patch;
  for (int cell = threadIdx.x % kTeam; cell < window * window; cell += kTeam) {
    const int v = y + cell / window - radius, u = x + cell % window - radius;
    float weight = 0;
    if (v >= 0 && v < arguments.height && u >= 0 && u < width) {
      const float attention = to_mean_units * clamped_exp(logits[v * width + u], least, greatest);
      weight = attention < kKept ? 0 : attention * scale;  // NaN is kept
    }
    weights[int64_t{cell} * patches] = weight;
  }
}

// Launch

template <int kTeam, int kPerThread>
void launch_rows(const RowArguments& arguments, cudaStream_t stream) {
  constexpr int kBlockRows = kRowThreads / kTeam, kScratch = 2 * (kTeam / 32) * sizeof(float);
  const auto rows = static_cast<unsigned>(arguments.strips.count * (kLogitStripRows / kBlockRows));
  launch(local_propagation_rows_fwd_kernel<kTeam, kPerThread>, rows, kRowThreads, kScratch, stream, arguments);
}

// A row is a warp's if that has registers for it, else a block's, which reads it again and again, from cache.
void launch_rows(const RowArguments& arguments, cudaStream_t stream) {
  const int patches = arguments.strips.patches;
  if (patches <= 32 * 25) return launch_rows<32, 25>(arguments, stream);  // 28 x 28
  if (patches <= 32 * 32) return launch_rows<32, 32>(arguments, stream);
  return launch_rows<kRowThreads, 0>(arguments, stream);
}

template <typename T>
void launch_logits(const Rows<T>& query, const Rows<T>& key, const LogitArguments& arguments, cudaStream_t stream) {
#ifdef HPK_WITH_SM90
  if constexpr (sizeof(T) == 2) {
    if (runs_on_sm90(query)) return local_propagation_logits_sm90(query, key, arguments, stream);
  }
#endif
  // Half of a strip, so that an image wastes little of its last one, and two blocks share a multiprocessor.
  launch_logits<StripSm80<T, WarpGeometry80<2>>>({query, key}, arguments, 1, stream);
}

}  // namespace

template <typename T>
void local_propagation_weights_cuda(const Rows<T>& query, const Rows<T>& key, const WeightsShape& shape, int64_t first,
                                    int64_t last, double scale, double sigma, double low, double high, float* logits,
                                    float* weights, cudaStream_t stream) {
  const int height = static_cast<int>(shape.height), width = static_cast<int>(shape.width), patches = height * width;
  const int per_image = static_cast<int>(divide_up(patches, kLogitStripRows)), count = static_cast<int>(last - first);
  const LogitStrips strips{patches, per_image, static_cast<int>(first), count, static_cast<int>(shape.pitch), logits};
  launch_logits(query, key, {strips, shape.tokens, shape.prefix, static_cast<float>(scale)}, stream);
  launch_rows({strips, height, width, static_cast<int>(shape.window), static_cast<float>(sigma / patches),
               {quantile_rank(low, patches), quantile_rank(high, patches)}, weights},
              stream);
}

#define HPK_INSTANTIATE(T)                                                                                           \
  template void local_propagation_weights_cuda<T>(const Rows<T>&, const Rows<T>&, const WeightsShape&, int64_t,      \
                                                  int64_t, double, double, double, double, float*, float*,           \
                                                  cudaStream_t);
HPK_INSTANTIATE(float)
HPK_INSTANTIATE(__half)
HPK_INSTANTIATE(__nv_bfloat16)
#undef HPK_INSTANTIATE

}  // namespace hpk
