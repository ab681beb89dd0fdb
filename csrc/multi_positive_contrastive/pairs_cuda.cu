// Before any logit: the drawn negatives, the numbers of pairs, and lists of their columns, from packed bits.
#include <initializer_list>

#include "common/bits.h"
#include "common/philox.h"
#include "common/schedule.h"
#include "common/warp.cuh"
#include "multi_positive_contrastive/multi_positive_contrastive_cuda.h"

namespace hpk {
namespace {

// Types

constexpr int kThreads = 256;
constexpr int kLaneWords = 4, kWarpWords = 32 * kLaneWords;  // of a row, that are read at a time

constexpr int kSide = 8;  // words that a tile of the transpose has across, and blocks of 32 rows

// Producer

// Four words of a row of packed bits from `word` on, 0 beyond the last; of no row all are 0.
template <bool kAligned>
__device__ __forceinline__ void load_words(const uint32_t* row, int word, int words, uint32_t (&found)[kLaneWords]) {
#pragma unroll
  for (int i = 0; i < kLaneWords; ++i) found[i] = 0;
  if (row == nullptr || word >= words) return;
  if constexpr (kAligned) {
    const uint4 loaded = __ldg(reinterpret_cast<const uint4*>(row + word));
    found[0] = loaded.x, found[1] = loaded.y, found[2] = loaded.z, found[3] = loaded.w;
  } else {
#pragma unroll
    for (int i = 0; i < kLaneWords; ++i) found[i] = word + i < words ? __ldg(row + word + i) : 0;
  }
}

// Consumer

// A block lists the set bits of one row, and each of its warps those of some of the words, of all of them in order. The
// row is read twice: its bits are counted, the block takes a place for them, and they are written there. The second time
// the words come from the cache. Rows take their places in whatever order they come; what is listed does not depend on it.
struct RowLister {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;

  struct Shared {
    int32_t of_warps[kWarps];
    int64_t start;
  };

  int first, last;  // words of this warp

  __device__ explicit RowLister(int words) {
    const int share = static_cast<int>(divide_up(divide_up(words, kWarpWords), kWarps)) * kWarpWords;
    first = static_cast<int>(threadIdx.x) / 32 * share;
    last = first + share < words ? first + share : words;
  }

  // Calls body(word) for the words that a lane has the next four of; every lane of the warp does so.
  template <class Body>
  __device__ void for_words(const Body& body) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    for (int start = first; start < last; start += kWarpWords) body(start + kLaneWords * lane);
  }

  // Where this warp lists its bits, of which each lane has counted some.
  __device__ int64_t take_place(int32_t count, const ListedRows& rows, int64_t row) const {
    auto& shared = *reinterpret_cast<Shared*>(shared_memory());
    const int warp = static_cast<int>(threadIdx.x) / 32;
    count = sum_over_lanes(count);
    if (threadIdx.x % 32 == 0) shared.of_warps[warp] = count;
    __syncthreads();
    if (threadIdx.x == 0) {
      int64_t all = 0;
      for (const int32_t of_warp : shared.of_warps) all += of_warp;
      shared.start = take(rows.taken, all);
      rows.ranges[2 * row] = shared.start;
      rows.ranges[2 * row + 1] = shared.start + all;
      if (shared.start + all > rows.capacity) *rows.does_not_fit = 1;
    }
    __syncthreads();
    int64_t at = shared.start;
    for (int i = 0; i < warp; ++i) at += shared.of_warps[i];
    return at;
  }

  // Calls emit(place, column) for the bits that found(word, words) gives, from `at` on.
  template <class Found, class Emit>
  __device__ void list(int64_t at, int64_t capacity, const Found& found, const Emit& emit) const {
    for_words([&](int word) {
      uint32_t words[kLaneWords];
      found(word, words);
      int32_t count = 0;
#pragma unroll
      for (int i = 0; i < kLaneWords; ++i) count += __popc(words[i]);
      const int32_t of_lanes = running_sum_over_lanes(count);
      int64_t place = at + of_lanes - count;
#pragma unroll
      for (int i = 0; i < kLaneWords; ++i) {
        for (uint32_t left = words[i]; left != 0; left &= left - 1, ++place) {
          if (place < capacity) emit(place, 32 * (word + i) + __ffs(left) - 1);
        }
      }
      at += __shfl_sync(kAllLanes, of_lanes, 31);
    });
  }
};

// Kernel

// bits[i, j] = Philox(counter (j / 4, i, 0, 0), seed)[j % 4] < threshold.
//
// Grid (rows). Bytes: 4 written a word. Integer arithmetic: 8 blocks of Philox a word, which is what takes the time.
HPK_KERNEL(kThreads)
contrastive_draw_negatives_kernel(const int64_t* __restrict__ seed, uint64_t threshold, int64_t columns,
                                  uint32_t* __restrict__ bits) {
  const uint64_t key = static_cast<uint64_t>(*seed);
  const uint32_t row = blockIdx.x, words = static_cast<uint32_t>(words_per_row(columns));
  for (uint32_t word = threadIdx.x; word < words; word += kThreads) {
    const bool all = threshold > 0xFFFFFFFFu;  // whatever the random words are
    const uint32_t drawn = all ? ~0u : bernoulli_word(key, row, word, threshold);
    bits[int64_t{row} * words + word] = drawn & valid_bits(word, columns);
  }
}

// bit i of transposed[j] = bit j of bits[i]
//
// Grid (tiles of columns, tiles of rows), of 256 x 256 bits each; a warp transposes the blocks of 32 rows. Bytes: both
// masks once, by sectors of 32 bytes.
HPK_KERNEL(32 * kSide)
contrastive_transpose_bits_kernel(const uint32_t* __restrict__ bits, int64_t rows, int64_t columns,
                                  uint32_t* __restrict__ transposed) {
  auto* const tile = reinterpret_cast<uint32_t(*)[kSide + 1]>(shared_memory());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first_word = int64_t{blockIdx.x} * kSide, first_block = int64_t{blockIdx.y} * kSide;
  const int64_t pitch = words_per_row(columns), pitch_transposed = words_per_row(rows);
#pragma unroll
  for (int i = threadIdx.x; i < 32 * kSide * kSide; i += 32 * kSide) {
    const int64_t row = 32 * first_block + i / kSide, word = first_word + i % kSide;
    tile[i / kSide][i % kSide] = row < rows && word < pitch ? bits[row * pitch + word] : 0;
  }
  __syncthreads();
  uint32_t found[kSide];
#pragma unroll
  for (int word = 0; word < kSide; ++word) found[word] = transpose_over_lanes(tile[32 * warp + lane][word]);
  __syncthreads();
#pragma unroll
  for (int word = 0; word < kSide; ++word) tile[32 * word + lane][warp] = found[word];
  __syncthreads();
#pragma unroll
  for (int i = threadIdx.x; i < 32 * kSide * kSide; i += 32 * kSide) {
    const int64_t column = 32 * first_word + i / kSide, block = first_block + i % kSide;
    if (column < columns && block < pitch_transposed) {
      transposed[column * pitch_transposed + block] = tile[i / kSide][i % kSide];
    }
  }
}

// counts[i] = the numbers of A_i, S_i and Den_i; and the columns of A_i or S_i in other images are listed.
//
// Grid (rows). Bytes: the masks once; 4 written a listed pair.
template <bool kAligned>
HPK_KERNEL(RowLister::kThreads)
contrastive_count_and_list_kernel(const __grid_constant__ PairBits bits, int32_t* __restrict__ counts,
                                  const __grid_constant__ ListedRows rows) {
  auto* const of_warps = reinterpret_cast<int32_t(*)[3]>(shared_memory() + sizeof(RowLister::Shared));
  const int64_t row = blockIdx.x, anchor = bits.first + row, words = words_per_row(bits.anchors);
  const auto* const negatives = bits.negatives == nullptr ? nullptr : bits.negatives + row % bits.group * words;
  const auto* const positives = bits.positives + row * words;
  const auto* const specific = bits.specific == nullptr ? nullptr : bits.specific + row * words;
  const int64_t image = anchor / bits.group * bits.group;
  const RowLister lister(static_cast<int>(words));

  const auto across = [&](int word, const uint32_t (&agnostic)[kLaneWords], uint32_t (&found)[kLaneWords]) {
    load_words<kAligned>(specific, word, static_cast<int>(words), found);
#pragma unroll
    for (int i = 0; i < kLaneWords; ++i) {
      found[i] = (found[i] | agnostic[i]) & bits_outside(word + i, image, image + bits.group);
    }
  };
  int32_t found[3] = {}, listed = 0;
  lister.for_words([&](int word) {
    uint32_t agnostic[kLaneWords], other[kLaneWords];
    load_words<kAligned>(positives, word, static_cast<int>(words), agnostic);
    load_words<kAligned>(negatives, word, static_cast<int>(words), other);
#pragma unroll
    for (int i = 0; i < kLaneWords; ++i) {
      found[0] += __popc(agnostic[i]);
      found[2] += __popc(agnostic[i] | other[i]);
    }
    if (specific != nullptr) {
      load_words<kAligned>(specific, word, static_cast<int>(words), other);
#pragma unroll
      for (int i = 0; i < kLaneWords; ++i) found[1] += __popc(other[i]);
    }
    if (rows.ranges != nullptr) {
      across(word, agnostic, other);
#pragma unroll
      for (int i = 0; i < kLaneWords; ++i) listed += __popc(other[i]);
    }
  });
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    found[i] = sum_over_lanes(found[i]);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32][i] = found[i];
  }
  __syncthreads();
  if (threadIdx.x < 3) {
    int32_t sum = 0;
    for (int warp = 0; warp < RowLister::kWarps; ++warp) sum += of_warps[warp][threadIdx.x];
    if (threadIdx.x == 2 && negatives == nullptr) sum = static_cast<int32_t>(bits.anchors) - 1;  // all but itself
    if (threadIdx.x == 2 && negatives != nullptr) sum -= test_bit(negatives, anchor);  // nor if it is drawn
    counts[3 * row + threadIdx.x] = sum;
  }
  if (rows.ranges == nullptr) return;
  const int64_t at = lister.take_place(listed, rows, row);
  lister.list(
      at, rows.capacity,
      [&](int word, uint32_t(&listed_words)[kLaneWords]) {
        uint32_t agnostic[kLaneWords];
        load_words<kAligned>(positives, word, static_cast<int>(words), agnostic);
        across(word, agnostic, listed_words);
      },
      [&](int64_t place, int column) { rows.columns[place] = column; });
}

// ranges[j] = the places that column j takes in its stage, one for each position that has drawn it.
//
// Grid (blocks of columns), a thread a column. Bytes: R transposed once. Lanes of a warp are of one stage.
HPK_KERNEL(kThreads)
contrastive_take_slots_kernel(const uint32_t* __restrict__ positions, int64_t words, int64_t columns,
                              int64_t stage_columns, int64_t capacity, int64_t* __restrict__ ranges,
                              int64_t* __restrict__ taken, int64_t* __restrict__ does_not_fit) {
  const int64_t column = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  int32_t count = 0;
  if (column < columns) {
    for (int64_t word = 0; word < words; ++word) count += __popc(positions[column * words + word]);
  }
  const int32_t of_lanes = running_sum_over_lanes(count), all = __shfl_sync(kAllLanes, of_lanes, 31);
  int64_t start = 0;
  if (threadIdx.x % 32 == 0 && column < columns) {
    start = take(taken + column / stage_columns, all);
    if (start + all > capacity) *does_not_fit = 1;
  }
  start = __shfl_sync(kAllLanes, start, 0) + of_lanes;
  if (column >= columns) return;
  ranges[2 * column] = start - count;
  ranges[2 * column + 1] = start;
}

// columns = those of the set bits of each row of R; slots = the first place of the column, and one further for each
// earlier position.
//
// Grid (positions). Bytes: R once; 8 written a set bit; for each half of a row of R transposed, from cache.
template <bool kAligned>
HPK_KERNEL(RowLister::kThreads)
contrastive_list_sampled_kernel(const uint32_t* __restrict__ negatives, int64_t anchors,
                                const uint32_t* __restrict__ positions, int64_t position_words,
                                const int64_t* __restrict__ slot_ranges, int32_t* __restrict__ slots,
                                const __grid_constant__ ListedRows rows) {
  const int64_t row = blockIdx.x, words = words_per_row(anchors);
  const RowLister lister(static_cast<int>(words));
  const auto load = [&](int word, uint32_t(&found)[kLaneWords]) {
    load_words<kAligned>(negatives + row * words, word, static_cast<int>(words), found);
  };
  int32_t count = 0;
  lister.for_words([&](int word) {
    uint32_t found[kLaneWords];
    load(word, found);
#pragma unroll
    for (int i = 0; i < kLaneWords; ++i) count += __popc(found[i]);
  });
  const int64_t at = lister.take_place(count, rows, row);
  lister.list(at, rows.capacity, load, [&](int64_t place, int column) {
    const uint32_t* const of_column = positions + column * position_words;
    int64_t slot = slot_ranges[2 * int64_t{column}];
    for (int64_t word = 0; 32 * word < row; ++word) slot += __popc(of_column[word] & low_bits(row - 32 * word));
    rows.columns[place] = column;
    slots[place] = static_cast<int32_t>(slot);
  });
}

// Launch

// Whether 16 bytes of each row can be read at a time.
bool are_aligned(std::initializer_list<const uint32_t*> masks, int64_t words) {
  uintptr_t starts = 0;
  for (const uint32_t* mask : masks) starts |= reinterpret_cast<uintptr_t>(mask);
  return starts % 16 == 0 && words % kLaneWords == 0;
}

}  // namespace

void draw_negatives_cuda(const int64_t* seed, uint64_t threshold, int64_t rows, int64_t columns, uint32_t* bits,
                         cudaStream_t stream) {
  launch(contrastive_draw_negatives_kernel, static_cast<unsigned>(rows), kThreads, 0, stream, seed, threshold, columns,
         bits);
}

void count_and_list_cuda(const PairBits& bits, int32_t* counts, const ListedRows& rows, cudaStream_t stream) {
  const bool aligned = are_aligned({bits.positives, bits.specific, bits.negatives}, words_per_row(bits.anchors));
  const auto kernel = aligned ? contrastive_count_and_list_kernel<true> : contrastive_count_and_list_kernel<false>;
  constexpr size_t shared = sizeof(RowLister::Shared) + RowLister::kWarps * 3 * sizeof(int32_t);
  launch(kernel, static_cast<unsigned>(bits.rows), RowLister::kThreads, shared, stream, bits, counts, rows);
}

void list_sampled_cuda(const uint32_t* negatives, int64_t positions, int64_t anchors, uint32_t* transposed,
                       const Slots& slots, const ListedRows& rows, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(divide_up(words_per_row(anchors), kSide)),
                  static_cast<unsigned>(divide_up(words_per_row(positions), kSide)));
  constexpr size_t tile = 32 * kSide * (kSide + 1) * sizeof(uint32_t);
  launch(contrastive_transpose_bits_kernel, grid, 32 * kSide, tile, stream, negatives, positions, anchors, transposed);
  const int64_t words = words_per_row(positions);
  launch(contrastive_take_slots_kernel, static_cast<unsigned>(divide_up(anchors, kThreads)), kThreads, 0, stream,
         transposed, words, anchors, slots.stage_columns, slots.capacity, slots.ranges, slots.taken, rows.does_not_fit);
  const bool aligned = are_aligned({negatives}, words_per_row(anchors));
  const auto kernel = aligned ? contrastive_list_sampled_kernel<true> : contrastive_list_sampled_kernel<false>;
  launch(kernel, static_cast<unsigned>(positions), RowLister::kThreads, sizeof(RowLister::Shared), stream, negatives,
         anchors, transposed, words, slots.ranges, slots.slots, rows);
}

}  // namespace hpk
