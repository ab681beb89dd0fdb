// Kernels on packed bits: the drawn negatives, transposes, and lists of the columns of set bits.
#include "common/bits.h"
#include "common/philox.h"
#include "common/schedule.h"
#include "common/warp.cuh"
#include "multi_positive_contrastive/multi_positive_contrastive_cuda.h"

namespace hpk {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kLaneWords = 4, kWarpWords = 32 * kLaneWords;  // of a row, that are read at a time

// bits[i, j] = Philox(counter (j / 4, i, 0, 0), seed)[j % 4] < threshold, and the number of set bits of row i.
//
// Grid (rows). Bytes: 4 written a word. Integer arithmetic: 8 blocks of Philox a word, which is what takes the time.
HPK_KERNEL(kThreads)
contrastive_draw_negatives_kernel(const int64_t* __restrict__ seed, uint64_t threshold, int64_t columns,
                                  uint32_t* __restrict__ bits, int32_t* __restrict__ counts) {
  auto* const of_warps = reinterpret_cast<int32_t*>(shared_memory());
  const uint64_t key = static_cast<uint64_t>(*seed);
  const uint32_t row = blockIdx.x, words = static_cast<uint32_t>(words_per_row(columns));
  int32_t count = 0;
  for (uint32_t word = threadIdx.x; word < words; word += kThreads) {
    const bool all = threshold > 0xFFFFFFFFu;  // whatever the random words are
    const uint32_t drawn = (all ? ~0u : bernoulli_word(key, row, word, threshold)) & valid_bits(word, columns);
    bits[int64_t{row} * words + word] = drawn;
    count += __popc(drawn);
  }
  count = sum_over_lanes(count);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = count;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kWarps; ++warp) count += of_warps[warp];
    counts[row] = count;
  }
}

constexpr int kSide = 8;  // words that a tile of the transpose has across, and blocks of 32 rows

// transposed[j] has bit i set where bits[i] has bit j.
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

// The words of one row of BitRows, four at a time.
template <bool kAligned>
struct BitRow {
  const uint32_t *first, *second;
  int words, group_start, group_end;

  __device__ BitRow(const BitRows& bits, int64_t row) : words(static_cast<int>(bits.words)) {
    first = bits.first + row * bits.pitch;
    second = bits.second == nullptr ? nullptr : bits.second + row * bits.pitch;
    group_start = static_cast<int>(bits.group == 0 ? 0 : row / bits.group * bits.group);
    group_end = group_start + static_cast<int>(bits.group);
  }

  __device__ static void add(const uint32_t* row, int word, int words, uint32_t (&found)[kLaneWords]) {
    if constexpr (kAligned) {
      const uint4 loaded = __ldg(reinterpret_cast<const uint4*>(row + word));
      found[0] |= loaded.x;
      found[1] |= loaded.y;
      found[2] |= loaded.z;
      found[3] |= loaded.w;
    } else {
#pragma unroll
      for (int i = 0; i < kLaneWords; ++i) found[i] |= word + i < words ? __ldg(row + word + i) : 0;
    }
  }

  // The four from `word` on, 0 beyond the last.
  __device__ void load(int word, uint32_t (&found)[kLaneWords]) const {
#pragma unroll
    for (int i = 0; i < kLaneWords; ++i) found[i] = 0;
    if (word >= words) return;
    add(first, word, words, found);
    if (second != nullptr) add(second, word, words, found);
    if (32 * word >= group_end || 32 * (word + kLaneWords) <= group_start) return;
#pragma unroll
    for (int i = 0; i < kLaneWords; ++i) found[i] &= bits_outside(word + i, group_start, group_end);
  }
};

// counts[i] = the number of set bits of row i.
//
// Grid (blocks of rows), a warp a row. Bytes: the masks once.
template <bool kAligned>
HPK_KERNEL(kThreads)
contrastive_count_bits_kernel(BitRows bits, int32_t* __restrict__ counts) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (row >= bits.rows) return;
  const BitRow<kAligned> own(bits, row);
  const int lane = threadIdx.x % 32;
  int32_t count = 0;
  for (int word = kLaneWords * lane; word < own.words; word += kWarpWords) {
    uint32_t found[kLaneWords];
    own.load(word, found);
#pragma unroll
    for (int i = 0; i < kLaneWords; ++i) count += __popc(found[i]);
  }
  count = sum_over_lanes(count);
  if (lane == 0) counts[row] = count;
}

constexpr int kScanThreads = 512, kScanWarps = kScanThreads / 32;
constexpr int kScanItems = 16;  // of each thread, at a time

// offsets[i] = counts[0] + ... + counts[i - 1]; enabled = 0 if their sum is above the capacity.
//
// One block, 8192 rows at a time: it takes microseconds for as many rows as there are. Bytes: 12 a row.
HPK_KERNEL(kScanThreads)
contrastive_list_offsets_kernel(const int32_t* __restrict__ counts, int64_t count, int64_t capacity,
                                int64_t* __restrict__ offsets, int32_t* __restrict__ enabled) {
  auto* const of_warps = reinterpret_cast<int64_t*>(shared_memory());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t before = 0;  // the sum of all counts of the turns so far
  for (int64_t start = 0; start < count; start += kScanThreads * kScanItems) {
    const int64_t first = start + threadIdx.x * kScanItems;
    int32_t own[kScanItems];
    int64_t total = 0;
#pragma unroll
    for (int i = 0; i < kScanItems; ++i) {
      own[i] = first + i < count ? counts[first + i] : 0;
      total += own[i];
    }
    const int64_t of_lanes = running_sum_over_lanes(total);
    if (lane == 31) of_warps[warp] = of_lanes;
    __syncthreads();
    const int64_t of_others = running_sum_over_lanes(lane < kScanWarps ? of_warps[lane] : 0);
    const int64_t of_earlier = __shfl_sync(kAllLanes, of_others, warp - 1);
    int64_t sum = before + (warp == 0 ? 0 : of_earlier) + of_lanes - total;
#pragma unroll
    for (int i = 0; i < kScanItems; ++i) {
      if (first + i < count) offsets[first + i] = sum;
      sum += own[i];
    }
    before += __shfl_sync(kAllLanes, of_others, kScanWarps - 1);
    __syncthreads();  // all have read the sums of the warps
  }
  if (threadIdx.x == 0) {
    offsets[count] = before;
    if (enabled != nullptr && before > capacity) *enabled = 0;
  }
}

// columns[offsets[i]:] = the columns of the set bits of row i, ascending.
//
// Grid (blocks of rows), a warp a row. Bytes: the masks once; 4 written a set bit.
template <bool kAligned>
HPK_KERNEL(kThreads)
contrastive_list_bits_kernel(BitRows bits, const int64_t* __restrict__ offsets, const int32_t* __restrict__ enabled,
                             int64_t capacity, int32_t* __restrict__ columns) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (row >= bits.rows || *enabled == 0) return;
  const BitRow<kAligned> own(bits, row);
  const int lane = threadIdx.x % 32;
  int64_t end = offsets[row];
  uint32_t next[kLaneWords];
  own.load(kLaneWords * lane, next);
  for (int start = 0; start < own.words; start += kWarpWords) {
    uint32_t found[kLaneWords];
    int32_t count = 0;
#pragma unroll
    for (int i = 0; i < kLaneWords; ++i) {
      found[i] = next[i];
      count += __popc(found[i]);
    }
    const int word = start + kLaneWords * lane;
    own.load(word + kWarpWords, next);  // on its way while these are listed
    const int32_t of_lanes = running_sum_over_lanes(count);
    int64_t at = end + of_lanes - count;
#pragma unroll
    for (int i = 0; i < kLaneWords; ++i) {
      for (uint32_t left = found[i]; left != 0; left &= left - 1, ++at) {
        if (at < capacity) columns[at] = 32 * (word + i) + __ffs(left) - 1;
      }
    }
    end += __shfl_sync(kAllLanes, of_lanes, 31);
  }
}

// Whether 16 bytes can be read at a time: then rows start at multiples of them, and are as long.
bool is_aligned(const BitRows& bits) {
  const auto starts = reinterpret_cast<uintptr_t>(bits.first) | reinterpret_cast<uintptr_t>(bits.second);
  return starts % 16 == 0 && bits.pitch % kLaneWords == 0 && bits.words % kLaneWords == 0;
}

unsigned blocks_of(const BitRows& bits) { return static_cast<unsigned>(divide_up(bits.rows, kWarps)); }

}  // namespace

void draw_negatives_cuda(const int64_t* seed, uint64_t threshold, int64_t rows, int64_t columns, uint32_t* bits,
                         int32_t* counts, cudaStream_t stream) {
  launch(contrastive_draw_negatives_kernel, static_cast<unsigned>(rows), kThreads, kWarps * sizeof(int32_t), stream,
         seed, threshold, columns, bits, counts);
}

void transpose_bits_cuda(const uint32_t* bits, int64_t rows, int64_t columns, uint32_t* transposed,
                         cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(divide_up(words_per_row(columns), kSide)),
                  static_cast<unsigned>(divide_up(words_per_row(rows), kSide)));
  constexpr size_t shared = 32 * kSide * (kSide + 1) * sizeof(uint32_t);
  launch(contrastive_transpose_bits_kernel, grid, 32 * kSide, shared, stream, bits, rows, columns, transposed);
}

void count_bits_cuda(const BitRows& bits, int32_t* counts, cudaStream_t stream) {
  const auto kernel = is_aligned(bits) ? contrastive_count_bits_kernel<true> : contrastive_count_bits_kernel<false>;
  launch(kernel, blocks_of(bits), kThreads, 0, stream, bits, counts);
}

void list_offsets_cuda(const int32_t* counts, int64_t count, int64_t capacity, int64_t* offsets, int32_t* enabled,
                       cudaStream_t stream) {
  launch(contrastive_list_offsets_kernel, 1, kScanThreads, kScanWarps * sizeof(int64_t), stream, counts, count,
         capacity, offsets, enabled);
}

void list_bits_cuda(const BitRows& bits, const int64_t* offsets, const int32_t* enabled, int64_t capacity,
                    int32_t* columns, cudaStream_t stream) {
  const auto kernel = is_aligned(bits) ? contrastive_list_bits_kernel<true> : contrastive_list_bits_kernel<false>;
  launch(kernel, blocks_of(bits), kThreads, 0, stream, bits, offsets, enabled, capacity, columns);
}

}  // namespace hpk
