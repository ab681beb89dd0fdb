// Kernels of the listed positives, which are few: a warp for each anchor, which gathers the rows of its list.
#include <cstring>
#include <type_traits>

#include "common/bits.h"
#include "common/schedule.h"
#include "common/warp.cuh"
#include "multi_positive_contrastive/anchor_numbers.cuh"
#include "multi_positive_contrastive/log_sum.h"
#include "multi_positive_contrastive/multi_positive_contrastive_cuda.h"

namespace hpk {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
// Blocks of a multiprocessor. Without a number the compiler goes for more of them, and loads a few rows at a time.
template <int kChunks>
constexpr int kForwardBlocks = kChunks == 4 ? 4 : 5;
template <int kChunks>
constexpr int kBackwardBlocks = kChunks == 4 ? 2 : 3;

// The numbers in 32 bits of a row.
template <class T>
__device__ void unpack(uint32_t word, float* numbers);

template <>
__device__ __forceinline__ void unpack<float>(uint32_t word, float* numbers) {
  numbers[0] = __uint_as_float(word);
}

template <>
__device__ __forceinline__ void unpack<__nv_bfloat16>(uint32_t word, float* numbers) {
  numbers[0] = __uint_as_float(word << 16);
  numbers[1] = __uint_as_float(word & 0xFFFF0000u);
}

template <>
__device__ __forceinline__ void unpack<__half>(uint32_t word, float* numbers) {
  __half2 pair;
  std::memcpy(static_cast<void*>(&pair), &word, sizeof pair);
  const float2 both = __half22float2(pair);
  numbers[0] = both.x;
  numbers[1] = both.y;
}

// What a lane has of a row: of a segment of 32 kChunks chunks of 16 bytes, those at lane, lane + 32 and so on.
template <class T, int kChunks>
struct Share {
  static constexpr int kNumbers = 16 / sizeof(T);  // of a chunk
  static constexpr int kSegment = 32 * kChunks * kNumbers;
  using Numbers = float[kChunks][kNumbers];

  uint4 chunks[kChunks];

  // The place in its row of the first number of a chunk.
  __device__ static int place(int segment, int chunk) {
    return segment * kSegment + (32 * chunk + static_cast<int>(threadIdx.x) % 32) * kNumbers;
  }

  // Places beyond the end of the row get its last chunk: a load without a condition need not be waited for.
  __device__ __forceinline__ void load(const Rows<T>& rows, int64_t row, int segment) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int last = rows.dim - kNumbers, first = place(segment, chunk) < last ? place(segment, chunk) : last;
      chunks[chunk] = __ldg(reinterpret_cast<const uint4*>(rows.data + row * rows.stride + first));
    }
  }

  __device__ __forceinline__ void numbers(int chunk, float (&of_chunk)[kNumbers]) const {
    unpack<T>(chunks[chunk].x, of_chunk);
    unpack<T>(chunks[chunk].y, of_chunk + kNumbers / 4);
    unpack<T>(chunks[chunk].z, of_chunk + kNumbers / 2);
    unpack<T>(chunks[chunk].w, of_chunk + kNumbers / 4 * 3);
  }

  // The sum of the products with the numbers of another row.
  __device__ __forceinline__ float times(const Numbers& others) const {
    float sum = 0;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      float own[kNumbers];
      numbers(chunk, own);
#pragma unroll
      for (int i = 0; i < kNumbers; ++i) sum += own[i] * others[chunk][i];
    }
    return sum;
  }

  // sums += factor times the numbers.
  __device__ __forceinline__ void add_to(Numbers& sums, float factor) const {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      float own[kNumbers];
      numbers(chunk, own);
#pragma unroll
      for (int i = 0; i < kNumbers; ++i) sums[chunk][i] += factor * own[i];
    }
  }
};

// An anchor's row and those of its list, of which so many are on their way at a time as make 4 KiB. Rows are kWhole if
// they have one segment: then they stay in registers.
template <class T, int kChunks, bool kWhole>
struct Neighbours {
  using OfLane = Share<T, kChunks>;
  static constexpr int kBatch = 8 / kChunks;

  const Rows<T>& z;
  int64_t row;
  typename OfLane::Numbers own;
  OfLane others[kBatch];

  __device__ Neighbours(const Rows<T>& z_, int64_t row_) : z(z_), row(row_) {
    if constexpr (kWhole) load_own(0);
  }

  // Lane i has column i of 32. The logits of those from `first` on, a multiple of kBatch, for their lanes.
  __device__ __forceinline__ float logits(float scale, int column, int first) {
    float products[kBatch] = {};
    for (int segment = 0; segment == 0 || (!kWhole && segment * OfLane::kSegment < z.dim); ++segment) {
      load_others(column, first, segment);
      if constexpr (!kWhole) load_own(segment);
#pragma unroll
      for (int k = 0; k < kBatch; ++k) products[k] += others[k].times(own);
    }
    // Scaled before it is handed on, so that it is rounded before it comes into an exponent.
    const int holder = static_cast<int>(threadIdx.x) % kBatch * (32 / kBatch);
    return __shfl_sync(kAllLanes, scale * sum_each_over_lanes(products), holder);
  }

  // sums += a segment of the rows that `logits` had last, times the factors of their lanes.
  __device__ __forceinline__ void add_to(typename OfLane::Numbers& sums, float factor, int column, int first,
                                         int segment) {
    if constexpr (!kWhole) load_others(column, first, segment);
#pragma unroll
    for (int k = 0; k < kBatch; ++k) others[k].add_to(sums, __shfl_sync(kAllLanes, factor, first + k));
  }

 private:
  __device__ __forceinline__ void load_others(int column, int first, int segment) {
#pragma unroll
    for (int k = 0; k < kBatch; ++k) others[k].load(z, __shfl_sync(kAllLanes, column, first + k), segment);
  }

  __device__ __forceinline__ void load_own(int segment) {
    OfLane share;
    share.load(z, row, segment);
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      share.numbers(chunk, own[chunk]);
      if (OfLane::place(segment, chunk) < z.dim) continue;
#pragma unroll
      for (int i = 0; i < OfLane::kNumbers; ++i) own[chunk][i] = 0;
    }
  }
};

template <class T>
__device__ __forceinline__ bool is_set(const ListedPairs<T>& pairs, const uint32_t* bits, int64_t row, int64_t column) {
  return bits != nullptr && test_bit(bits + row * words_per_row(pairs.z.count), column);
}

// log sum over j in A_i but not R[i % G] of exp l_ij; counts of A_i and S_i; sums of their l_ij, over the list of i.
//
// Grid (blocks of anchors), a warp an anchor. FLOPs: 2 D a pair. Bytes: a row of z a pair, mostly from cache.
template <class T, int kChunks, bool kWhole>
HPK_KERNEL(kThreads, kForwardBlocks<kChunks>)
contrastive_pairs_fwd_kernel(const __grid_constant__ ListedPairs<T> pairs, float* __restrict__ part) {
  using Gathered = Neighbours<T, kChunks, kWhole>;
  const int64_t anchors = pairs.z.count, row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (row >= anchors || *pairs.enabled == 0) return;
  const int lane = threadIdx.x % 32;
  Gathered gathered(pairs.z, row);
  const int position = static_cast<int>(row) % static_cast<int>(pairs.group);
  LogSum log_sum;
  int32_t agnostic_count = 0, specific_count = 0;
  float agnostic_sum = 0, specific_sum = 0;
  const int32_t* const list = pairs.columns + pairs.offsets[row];
  const int length = static_cast<int>(pairs.offsets[row + 1] - pairs.offsets[row]);
  for (int start = 0; start < length; start += 32) {
    const bool listed = start + lane < length;
    const int32_t column = listed ? list[start + lane] : static_cast<int32_t>(row);
    const bool agnostic = listed && is_set(pairs, pairs.positives, row, column);
    const bool specific = listed && is_set(pairs, pairs.specific, row, column);
    const bool drawn = agnostic && is_set(pairs, pairs.negatives, position, column);
    float logit = 0;
    for (int first = 0; first < 32 && start + first < length; first += Gathered::kBatch) {
      const float found = gathered.logits(pairs.scale, column, first);
      if (lane / Gathered::kBatch == first / Gathered::kBatch) logit = found;
    }
    if (agnostic) {
      if (!drawn) log_sum.add(logit);
      ++agnostic_count;
      agnostic_sum += logit;
    }
    if (specific) {
      ++specific_count;
      specific_sum += logit;
    }
  }
#pragma unroll
  for (int width = 16; width > 0; width /= 2) {
    const float greatest = __shfl_xor_sync(kAllLanes, log_sum.greatest, width);
    log_sum.add({greatest, __shfl_xor_sync(kAllLanes, log_sum.total, width)});
  }
  const float found[] = {log_sum.value(), static_cast<float>(sum_over_lanes(agnostic_count)),
                         static_cast<float>(sum_over_lanes(specific_count)), sum_over_lanes(agnostic_sum),
                         sum_over_lanes(specific_sum)};
  if (lane != 0) return;
#pragma unroll
  for (int number = 0; number < 5; ++number) part[number * anchors + row] = found[number];
}

// row[place] += added[0] and so on, four of them, as far as the row goes.
__device__ __forceinline__ void add_four(float* row, int place, int dim, bool aligned, const float* added) {
  if (aligned && place < dim) {
    auto* const at = reinterpret_cast<float4*>(row + place);
    const float4 old = *at;
    *at = float4{old.x + added[0], old.y + added[1], old.z + added[2], old.w + added[3]};
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (place + i < dim) row[place + i] += added[i];
    }
  }
}

// grad_i += sum over the list of i of (g_ij + g_ji) z_j, of Den only what is in A but not in R.
//
// Grid (blocks of anchors, segments of features), a warp an anchor. FLOPs: 4 D a pair. Bytes: a row of z a pair, mostly
// from cache, or that and a segment again for each of several segments; grad, float32, read and written once.
template <class T, int kChunks, bool kWhole>
HPK_KERNEL(kThreads, kBackwardBlocks<kChunks>)
contrastive_pairs_bwd_kernel(const __grid_constant__ ListedPairs<T> pairs, const float* __restrict__ numbers,
                             float* __restrict__ grad, int dim, int64_t stride) {
  using Gathered = Neighbours<T, kChunks, kWhole>;
  const int64_t anchors = pairs.z.count, row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (row >= anchors || *pairs.enabled == 0) return;
  const int lane = threadIdx.x % 32, segment = kWhole ? 0 : blockIdx.y;
  Gathered gathered(pairs.z, row);
  typename Gathered::OfLane::Numbers sums = {};
  const OldAnchorNumbers i = numbers_of(numbers, anchors, row);
  const int group = static_cast<int>(pairs.group), position = static_cast<int>(row) % group;
  const int32_t* const list = pairs.columns + pairs.offsets[row];
  const int length = static_cast<int>(pairs.offsets[row + 1] - pairs.offsets[row]);
  for (int start = 0; start < length; start += 32) {
    const bool listed = start + lane < length;
    const int32_t column = listed ? list[start + lane] : static_cast<int32_t>(row);
    const OldAnchorNumbers j = numbers_of(numbers, anchors, column);
    const bool agnostic = listed && is_set(pairs, pairs.positives, row, column);
    const bool specific = listed && is_set(pairs, pairs.specific, row, column);
    const bool in_i = agnostic && !is_set(pairs, pairs.negatives, position, column);
    const bool in_j = agnostic && !is_set(pairs, pairs.negatives, column % group, row);
    const float pull = (agnostic ? i.pull + j.pull : 0) + (specific ? i.specific + j.specific : 0);
    for (int first = 0; first < 32 && start + first < length; first += Gathered::kBatch) {
      const float logit = gathered.logits(pairs.scale, column, first);
      float g = -pull;  // which is right in the lanes of these columns
      if (in_i) g += i.push * expf(logit - i.log_denominator);
      if (in_j) g += j.push * expf(logit - j.log_denominator);
      gathered.add_to(sums, g, column, first, segment);
    }
  }
  float* const own = grad + row * stride;
  const bool aligned = (reinterpret_cast<uintptr_t>(grad) % 16 | dim % 4 | stride % 4) == 0;
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
    for (int first = 0; first < Gathered::OfLane::kNumbers; first += 4) {
      const float* const added = sums[chunk] + first;
      add_four(own, Gathered::OfLane::place(segment, chunk) + first, dim, aligned, added);
    }
  }
}

// Calls body(number of chunks of a lane, whether rows are whole, segments of a row) for rows of this length.
template <class T, class Body>
void with_shares_of(const Rows<T>& z, Body body) {
  const int64_t chunks = divide_up(z.dim * sizeof(T), 16);
  if (chunks <= 32) return body(std::integral_constant<int, 1>{}, std::true_type{}, 1);
  if (chunks <= 64) return body(std::integral_constant<int, 2>{}, std::true_type{}, 1);
  if (chunks <= 128) return body(std::integral_constant<int, 4>{}, std::true_type{}, 1);
  body(std::integral_constant<int, 2>{}, std::false_type{}, static_cast<unsigned>(divide_up(chunks, 64)));
}

template <class T>
unsigned blocks_of(const ListedPairs<T>& pairs) {
  return static_cast<unsigned>(divide_up(pairs.z.count, kWarps));
}

}  // namespace

template <typename T>
void contrastive_pairs_forward_cuda(const ListedPairs<T>& pairs, float* part, cudaStream_t stream) {
  with_shares_of(pairs.z, [&](auto chunks, auto whole, unsigned) {
    constexpr auto kernel = contrastive_pairs_fwd_kernel<T, decltype(chunks)::value, decltype(whole)::value>;
    launch(kernel, blocks_of(pairs), kThreads, 0, stream, pairs, part);
  });
}

template <typename T>
void contrastive_pairs_backward_cuda(const ListedPairs<T>& pairs, const float* numbers, float* grad, int64_t dim,
                                     int64_t stride, cudaStream_t stream) {
  with_shares_of(pairs.z, [&](auto chunks, auto whole, unsigned segments) {
    constexpr auto kernel = contrastive_pairs_bwd_kernel<T, decltype(chunks)::value, decltype(whole)::value>;
    launch(kernel, dim3(blocks_of(pairs), segments), kThreads, 0, stream, pairs, numbers, grad, static_cast<int>(dim),
           stride);
  });
}

#define HPK_INSTANTIATE(T)                                                                              \
  template void contrastive_pairs_forward_cuda<T>(const ListedPairs<T>&, float*, cudaStream_t);         \
  template void contrastive_pairs_backward_cuda<T>(const ListedPairs<T>&, const float*, float*, int64_t, int64_t, \
                                                   cudaStream_t);
HPK_INSTANTIATE(float)
HPK_INSTANTIATE(__half)
HPK_INSTANTIATE(__nv_bfloat16)
#undef HPK_INSTANTIATE

}  // namespace hpk
