// Kernels that finish what the others leave: a warp for each anchor, which puts its parts together. It also gathers the
// rows of its listed positives, which are few.
#include <cstring>
#include <type_traits>

#include "common/bits.h"
#include "common/schedule.h"
#include "common/warp.cuh"
#include "multi_positive_contrastive/anchors.cuh"
#include "multi_positive_contrastive/multi_positive_contrastive_cuda.h"

namespace hpk {
namespace {

// Types

constexpr int kWarps = 4, kThreads = 32 * kWarps;
// Blocks of a multiprocessor. Without a number the compiler goes for more of them, and loads a few rows at a time.
template <int kChunks>
constexpr int kForwardBlocks = kChunks == 4 ? 4 : 5;
template <int kChunks>
constexpr int kBackwardBlocks = kChunks == 4 ? 2 : 3;

// Producer

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
template <class T, int kChunksOfLane>
struct Share {
  static constexpr int kChunks = kChunksOfLane;
  static constexpr int kNumbers = 16 / sizeof(T);  // of a chunk
  static constexpr int kSegment = 32 * kChunks * kNumbers;
  using Numbers = float[kChunks][kNumbers];

  uint4 chunks[kChunks];

  // The place in its row of the first number of a chunk.
  __device__ static int place(int segment, int chunk) {
    return segment * kSegment + (32 * chunk + static_cast<int>(threadIdx.x) % 32) * kNumbers;
  }

  // Places beyond the end of the row get its last chunk: a load without a condition need not be waited for. kOnce: it
  // is read once, and need not stay in the cache.
  template <bool kOnce = false>
  __device__ __forceinline__ void load(const Rows<T>& rows, int64_t row, int segment) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int last = rows.dim - kNumbers, first = place(segment, chunk) < last ? place(segment, chunk) : last;
      const auto* const from = reinterpret_cast<const uint4*>(rows.data + row * rows.stride + first);
      chunks[chunk] = kOnce ? __ldcs(from) : __ldg(from);
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

// A lane's share of a row of floats, as far as the row goes.
template <class OfLane>
__device__ __forceinline__ void load_sums(typename OfLane::Numbers& sums, const float* row, int segment, int dim) {
#pragma unroll
  for (int chunk = 0; chunk < OfLane::kChunks; ++chunk) {
    const int place = OfLane::place(segment, chunk);
#pragma unroll
    for (int i = 0; i < OfLane::kNumbers; i += 4) {
      const float4 four = place < dim ? __ldcs(reinterpret_cast<const float4*>(row + place + i)) : float4{};
      sums[chunk][i] = four.x, sums[chunk][i + 1] = four.y;
      sums[chunk][i + 2] = four.z, sums[chunk][i + 3] = four.w;
    }
  }
}

// Consumer

template <class T>
__device__ __forceinline__ bool is_set(const ListedPairs<T>& pairs, const uint32_t* bits, int64_t row, int64_t column) {
  return bits != nullptr && test_bit(bits + row * words_per_row(pairs.z.count), column);
}

// Adds a lane's share of the listed pairs of an anchor, of Den those in A but not in R.
template <class Gathered, class T>
__device__ __forceinline__ void add_listed(RowSums& sums, const ListedPairs<T>& pairs, int64_t row) {
  const int lane = threadIdx.x % 32, position = static_cast<int>(row) % static_cast<int>(pairs.group);
  const int32_t* const list = pairs.columns + pairs.ranges[2 * row];
  const int length = static_cast<int>(pairs.ranges[2 * row + 1] - pairs.ranges[2 * row]);
  if (length == 0) return;
  Gathered gathered(pairs.z, row);
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
    if (agnostic && !drawn) sums.log_sum.add(logit);
    if (agnostic) sums.agnostic += logit;
    if (specific) sums.specific += logit;
  }
}

// sums += the rows that are staged for a column: they follow one another, and are added in that order.
template <class OfLane, class T>
__device__ __forceinline__ void add_staged(typename OfLane::Numbers& sums, const StagedColumns<T>& staged, int dim,
                                           int64_t column, int segment) {
  constexpr int kBatch = 4;
  const int64_t first = staged.slot_ranges[2 * column] * staged.of_place;
  const int64_t end = staged.slot_ranges[2 * column + 1] * staged.of_place;
  const Rows<T> rows{staged.rows, end, dim, dim};
  for (int64_t row = first; row < end; row += kBatch) {
    OfLane shares[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) shares[k].template load<true>(rows, row + k < end ? row + k : end - 1, segment);
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (row + k < end) shares[k].add_to(sums, 1);
    }
  }
}

// push_i exp(logit - logDen_i).
__device__ __forceinline__ float push_of(const AnchorNumbers& i, float logit) {
  return i.factor * exp_of(logit - i.shift);
}

// sums += a lane's share of the sum over the listed pairs of (g_ij + g_ji) z_j, of Den those in A but not in R.
template <class Gathered, class T>
__device__ __forceinline__ void add_listed(typename Gathered::OfLane::Numbers& sums, const ListedPairs<T>& pairs,
                                           const AnchorNumbers* numbers, int64_t row, int segment) {
  const int32_t* const list = pairs.columns + pairs.ranges[2 * row];
  const int length = static_cast<int>(pairs.ranges[2 * row + 1] - pairs.ranges[2 * row]);
  if (length == 0) return;
  Gathered gathered(pairs.z, row);
  const AnchorNumbers i = numbers[row];
  const int lane = threadIdx.x % 32, group = static_cast<int>(pairs.group), position = static_cast<int>(row) % group;
  for (int start = 0; start < length; start += 32) {
    const bool listed = start + lane < length;
    const int32_t column = listed ? list[start + lane] : static_cast<int32_t>(row);
    const AnchorNumbers j = numbers[column];
    const bool agnostic = listed && is_set(pairs, pairs.positives, row, column);
    const bool specific = listed && is_set(pairs, pairs.specific, row, column);
    const bool in_i = agnostic && !is_set(pairs, pairs.negatives, position, column);
    const bool in_j = agnostic && !is_set(pairs, pairs.negatives, column % group, row);
    const float pull = (agnostic ? i.pull + j.pull : 0) + (specific ? i.specific + j.specific : 0);
    for (int first = 0; first < 32 && start + first < length; first += Gathered::kBatch) {
      const float logit = gathered.logits(pairs.scale, column, first);
      float g = -pull;  // which is right in the lanes of these columns
      if (in_i) g += push_of(i, logit);
      if (in_j) g += push_of(j, logit);
      gathered.add_to(sums, g, column, first, segment);
    }
  }
}

// Epilogue

template <class OfLane>
__device__ __forceinline__ void store_sums(const typename OfLane::Numbers& sums, float* row, int segment, int dim) {
#pragma unroll
  for (int chunk = 0; chunk < OfLane::kChunks; ++chunk) {
    const int place = OfLane::place(segment, chunk);
    if (place >= dim) continue;
#pragma unroll
    for (int i = 0; i < OfLane::kNumbers; i += 4) {
      const float* const four = sums[chunk] + i;
      *reinterpret_cast<float4*>(row + place + i) = {four[0], four[1], four[2], four[3]};
    }
  }
}

// A lane's share of a row of `dim` numbers; 16 bytes at a time if rows are `aligned`.
template <class OfLane, class T>
__device__ __forceinline__ void store_row(const typename OfLane::Numbers& sums, float factor, T* row, int segment,
                                          int dim, bool aligned) {
#pragma unroll
  for (int chunk = 0; chunk < OfLane::kChunks; ++chunk) {
    const int place = OfLane::place(segment, chunk);
    T numbers[OfLane::kNumbers];
#pragma unroll
    for (int i = 0; i < OfLane::kNumbers; ++i) numbers[i] = T(factor * sums[chunk][i]);
    if (aligned && place < dim) {
      uint4 bits;
      std::memcpy(&bits, static_cast<const void*>(numbers), sizeof bits);
      __stcs(reinterpret_cast<uint4*>(row + place), bits);
    } else {
#pragma unroll
      for (int i = 0; i < OfLane::kNumbers; ++i) {
        if (place + i < dim) row[place + i] = numbers[i];
      }
    }
  }
}

// Kernel

// rows[i] = (logDen, push, pull, specific pull), from the parts of the route that is taken and the listed pairs
// losses[block] = sum over its anchors of push logDen - pull (logits over A) - specific pull (logits over S)
//
// Grid (blocks of anchors), a warp an anchor. FLOPs: 2 D a listed pair. Bytes: the parts; a row of z a listed pair,
// mostly from cache.
template <class T, int kChunks, bool kWhole>
HPK_KERNEL(kThreads, kForwardBlocks<kChunks>)
contrastive_rows_fwd_kernel(const __grid_constant__ ListedPairs<T> pairs, const __grid_constant__ RowParts parts) {
  const int64_t anchors = pairs.z.count, row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  float loss = 0;
  if (row < anchors) {
    const bool lists = pairs.ranges != nullptr && pairs.state[0] == 0;
    const float* const from = lists ? parts.within : parts.blocks;
    const int64_t count = lists ? parts.within_count : parts.blocks_count;
    RowSums sums;
    for (int64_t part = lane; part < count; part += 32) {
      const float* const at = from + 3 * part * anchors + row;
      sums.add({{__ldcs(at), 1}, __ldcs(at + anchors), __ldcs(at + 2 * anchors)});
    }
    if (lists) {
      if (lane == 0) sums.log_sum.add(__ldcs(parts.log_sums + row));
      add_listed<Neighbours<T, kChunks, kWhole>>(sums, pairs, row);
    }
#pragma unroll
    for (int width = 16; width > 0; width /= 2) sums.add(exchanged(sums, width));
    const float4 weights = reinterpret_cast<const float4*>(parts.weights)[row];
    const float of_agnostic = parts.loss_scale / static_cast<float>(pairs.state[1] > 1 ? pairs.state[1] : 1);
    const float of_specific = parts.loss_scale / static_cast<float>(pairs.state[2] > 1 ? pairs.state[2] : 1);
    const float pull = weights.z * of_agnostic, specific = weights.w * of_specific;
    const float push = pull * weights.x + specific * weights.y, found = sums.log_sum.value();
    const float log_denominator = found == kLogOfNothing ? 0 : found;
    loss = push * log_denominator - pull * sums.agnostic - specific * sums.specific;
    if (lane == 0) reinterpret_cast<float4*>(parts.rows)[row] = {log_denominator, push, pull, specific};
  }
  auto* const losses = reinterpret_cast<float*>(shared_memory());
  if (lane == 0) losses[threadIdx.x / 32] = loss;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float sum = blockIdx.x == 0 ? 0 * *parts.square : 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += losses[warp];
  parts.losses[blockIdx.x] = sum;
}

// Of the columns of a stage: sums_i += the rows that are staged for i. With a factor also the listed pairs, and out_i =
// factor sums_i.
//
// Grid (blocks of anchors, segments of features), a warp an anchor. FLOPs: 4 D a listed pair. Bytes: what is staged;
// sums, float32; out; and a row of z a listed pair, mostly from cache, or that and a segment again for each of several
// segments.
template <class T, int kChunks, bool kWhole>
HPK_KERNEL(kThreads, kBackwardBlocks<kChunks>)
contrastive_rows_bwd_kernel(const __grid_constant__ ListedPairs<T> pairs,
                            const __grid_constant__ StagedColumns<T> staged, const AnchorNumbers* __restrict__ numbers,
                            float* __restrict__ sums, const float* __restrict__ factor, T* __restrict__ out,
                            int out_dim) {
  using Gathered = Neighbours<T, kChunks, kWhole>;
  using OfLane = typename Gathered::OfLane;
  const int64_t row = staged.first + int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (row >= staged.last || pairs.state[0] != 0) return;
  const int segment = kWhole ? 0 : blockIdx.y, dim = pairs.z.dim;
  typename OfLane::Numbers own;
  load_sums<OfLane>(own, sums + row * dim, segment, dim);
  if (staged.rows != nullptr) add_staged<OfLane>(own, staged, dim, row, segment);
  if (factor == nullptr) return store_sums<OfLane>(own, sums + row * dim, segment, dim);
  add_listed<Gathered>(own, pairs, numbers, row, segment);
  const bool aligned = (reinterpret_cast<uintptr_t>(out) | out_dim * sizeof(T)) % 16 == 0;
  store_row<OfLane>(own, *factor, out + row * out_dim, segment, out_dim, aligned);
}

// Launch

// Calls body(number of chunks of a lane, whether rows are whole, segments of a row) for rows of this length.
template <class T, class Body>
void with_shares_of(const Rows<T>& z, Body body) {
  const int64_t chunks = divide_up(z.dim * sizeof(T), 16);
  if (chunks <= 32) return body(std::integral_constant<int, 1>{}, std::true_type{}, 1);
  if (chunks <= 64) return body(std::integral_constant<int, 2>{}, std::true_type{}, 1);
  if (chunks <= 128) return body(std::integral_constant<int, 4>{}, std::true_type{}, 1);
  body(std::integral_constant<int, 2>{}, std::false_type{}, static_cast<unsigned>(divide_up(chunks, 64)));
}

}  // namespace

int64_t contrastive_rows_parts(int64_t anchors) { return divide_up(anchors, kWarps); }

template <typename T>
void contrastive_rows_forward_cuda(const ListedPairs<T>& pairs, const RowParts& parts, cudaStream_t stream) {
  with_shares_of(pairs.z, [&](auto chunks, auto whole, unsigned) {
    constexpr auto kernel = contrastive_rows_fwd_kernel<T, decltype(chunks)::value, decltype(whole)::value>;
    const auto blocks = static_cast<unsigned>(contrastive_rows_parts(pairs.z.count));
    launch(kernel, blocks, kThreads, kWarps * sizeof(float), stream, pairs, parts);
  });
}

template <typename T>
void contrastive_rows_backward_cuda(const ListedPairs<T>& pairs, const StagedColumns<T>& staged, const float* numbers,
                                    float* sums, const float* factor, T* out, int out_dim, cudaStream_t stream) {
  with_shares_of(pairs.z, [&](auto chunks, auto whole, unsigned segments) {
    constexpr auto kernel = contrastive_rows_bwd_kernel<T, decltype(chunks)::value, decltype(whole)::value>;
    const auto blocks = static_cast<unsigned>(divide_up(staged.last - staged.first, kWarps));
    launch(kernel, dim3(blocks, segments), kThreads, 0, stream, pairs, staged,
           reinterpret_cast<const AnchorNumbers*>(numbers), sums, factor, out, out_dim);
  });
}

#define HPK_INSTANTIATE(T)                                                                                            \
  template void contrastive_rows_forward_cuda<T>(const ListedPairs<T>&, const RowParts&, cudaStream_t);               \
  template void contrastive_rows_backward_cuda<T>(const ListedPairs<T>&, const StagedColumns<T>&, const float*,       \
                                                  float*, const float*, T*, int, cudaStream_t);
HPK_INSTANTIATE(float)
HPK_INSTANTIATE(__half)
HPK_INSTANTIATE(__nv_bfloat16)
#undef HPK_INSTANTIATE

}  // namespace hpk
