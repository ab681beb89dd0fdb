// The kernel of hidden_positives, for either engine: see hidden_positives_cuda.cu and hidden_positives_sm90.cu.
#pragma once

#include <cstring>

#include "common/bits.h"
#include "common/device.h"
#include "common/schedule.h"
#include "common/warp.cuh"
#include "hidden_positives/hidden_positives.h"

namespace hpk {

struct PackArguments {
  const float* threshold;  // NaN beyond the last anchor: no product is greater than it
  int64_t anchors;
  uint32_t* bits;
};

// The anchor whose threshold a product is compared with.
enum class Limit { kSmaller, kRow, kColumn };

// Compares the products of a tile with thresholds, and writes the bits of its pairs and of their mirror images. Groups of
// four warps, each with some rows and all columns of them, do so for themselves, 128 columns at a time. If kSymmetric, one
// comparison decides both; else two do, and the words of the second take the place of those of the first.
template <class Engine, bool kSymmetric>
struct Pack {
  using Geometry = typename Engine::Geometry;
  static constexpr int kGroupThreads = 128, kGroups = Geometry::kTeams * Geometry::kTeamThreads / kGroupThreads;
  static constexpr int kGroupRows = Geometry::kRows * kGroupThreads / Geometry::kTeamThreads;
  static constexpr int kBlocks = kGroupRows / 32;  // of 32 x 32 bits, above one another
  static constexpr int kWords = 4, kParts = Geometry::kColumns / (32 * kWords);
  static constexpr int kThreadWords = Geometry::kColumnBlocks / (4 * kParts);  // of a row, that a thread has columns of

  static_assert(kThresholdsTogether % Geometry::kColumns == 0, "thresholds are missing for the last tile");

  struct Shared {
    uint4 words[kGroups][kGroupRows];
  };

  PackArguments arguments;
  int strip;
  Shared* shared;
  float row_thresholds[Geometry::kRowBlocks][2];
  float2 column_thresholds[Geometry::kColumnBlocks];

  __device__ Pack(const PackArguments& arguments_, int strip_, char* memory)
      : arguments(arguments_), strip(strip_), shared(reinterpret_cast<Shared*>(memory)) {
    const int thread = threadIdx.x % Geometry::kTeamThreads;
#pragma unroll
    for (int m = 0; m < Geometry::kRowBlocks; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        row_thresholds[m][h] = arguments.threshold[strip * Geometry::kRows + Geometry::row(thread, m, h)];
      }
    }
  }

  // Reads the thresholds of the columns.
  __device__ void prepare(int64_t tile, const Team<Geometry>& team) {
    const float* const from = arguments.threshold + tile * Geometry::kColumns + Geometry::column(team.thread, 0, 0);
#pragma unroll
    for (int n = 0; n < Geometry::kColumnBlocks; ++n) {
      const int apart = Geometry::column(0, n, 0) - Geometry::column(0, 0, 0);
      column_thresholds[n] = *reinterpret_cast<const float2*>(from + apart);
    }
  }

  __device__ void operator()(const Fragment<Geometry>& products, int64_t tile, const Team<Geometry>& team) {
    if (!Engine::kPrepares) prepare(tile, team);
    // The same for all lanes of a warp, and the compiler is to know it.
    const int group = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kGroupThreads, 0);
    const int thread = threadIdx.x % kGroupThreads;
    const int first_row = strip * Geometry::kRows + Geometry::row(group * kGroupThreads % Geometry::kTeamThreads, 0, 0);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int first_column = static_cast<int>(tile) * Geometry::kColumns + part * 32 * kWords;
      if (first_column + 32 * kWords <= first_row) continue;  // left of the diagonal
      barrier_sync(1 + group, kGroupThreads);                 // what was there has been read
      constexpr Limit kFirst = kSymmetric ? Limit::kSmaller : Limit::kRow;
      find_words<kFirst>(products, part, first_row, first_column, team.thread, shared->words[group]);
      barrier_sync(1 + group, kGroupThreads);
      write_words(shared->words[group], first_row, first_column / 32, thread);
      uint32_t right_half = 0;
      if constexpr (!kSymmetric) {
        right_half = on_diagonal(shared->words[group], first_row / 32, first_column, thread);
        barrier_sync(1 + group, kGroupThreads);
        find_words<Limit::kColumn>(products, part, first_row, first_column, team.thread, shared->words[group]);
        barrier_sync(1 + group, kGroupThreads);
      }
      write_mirrored(shared->words[group], first_row / 32, first_column, thread, right_half);
    }
  }

 private:
  // words[i]: the bits of row i and 128 columns; where a block of 32 x 32 is on the diagonal, those right of it.
  template <Limit kLimit>
  __device__ void find_words(const Fragment<Geometry>& products, int part, int first_row, int first_column, int thread,
                             uint4* words) const {
    const int of_four = thread % 4;  // lanes that share rows
    const int own_word = Geometry::column(thread, 4 * kThreadWords * part, 0) / 32 % kWords + of_four;
#pragma unroll
    for (int m = 0; m < Geometry::kRowBlocks; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t own = 0;
#pragma unroll
        for (int w = 0; w < kThreadWords; ++w) {
          uint32_t found = 0;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int n = 4 * (kThreadWords * part + w) + i;
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              const float column_threshold = c == 0 ? column_thresholds[n].x : column_thresholds[n].y;
              const float limit = kLimit == Limit::kRow      ? row_thresholds[m][h]
                                  : kLimit == Limit::kColumn ? column_threshold
                                                             : min_or_nan(row_thresholds[m][h], column_threshold);
              if (products.values[m][n][2 * h + c] > limit) found |= 1u << (8 * i + c);
            }
          }
          found <<= 2 * of_four;
          found |= __shfl_xor_sync(kAllLanes, found, 1);
          found |= __shfl_xor_sync(kAllLanes, found, 2);
          if (of_four == w) own = found;
        }
        const int row = Geometry::row(thread, m, h) % kGroupRows;
        if ((first_row + row) / 32 == first_column / 32 + own_word) own &= ~1u << (row % 32);
        if constexpr (kLimit == Limit::kRow) {  // which may let products of 0 through, those of no anchor
          const int last = static_cast<int>(arguments.anchors);
          if (first_column / 32 + own_word == last / 32) own &= ~(~0u << (last % 32));
        }
        if (of_four < kThreadWords) reinterpret_cast<uint32_t*>(&words[row])[own_word] = own;
      }
    }
  }

  // The words of rows, right of the diagonal.
  __device__ void write_words(const uint4* words, int first_row, int first_word, int thread) const {
    if (thread >= kGroupRows) return;
    const int row = first_row + thread;
    uint32_t found[kWords];
    std::memcpy(found, &words[thread], sizeof found);
    write(row, first_word, found, [=](int w) { return first_word + w > row / 32; });
  }

  // The word of a row in the block on the diagonal that the warp's 32 columns have, 0 if there is none.
  __device__ uint32_t on_diagonal(const uint4* words, int first_block, int first_column, int thread) const {
    const int lane = thread % 32, warp = thread / 32, block = first_column / 32 + warp - first_block;
    if (block < 0 || block >= kBlocks) return 0;
    return reinterpret_cast<const uint32_t*>(&words[32 * block + lane])[warp];
  }

  // The words of columns: a warp transposes blocks of 32 rows and its 32 columns. A block on the diagonal is its own mirror
  // image, of which it holds the half that the other lacks; if not kSymmetric, that half is given.
  __device__ void write_mirrored(const uint4* words, int first_block, int first_column, int thread,
                                 uint32_t right_half) const {
    const int lane = thread % 32, warp = thread / 32, column = first_column + thread;
    uint32_t mirrored[kBlocks];
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const uint32_t word = reinterpret_cast<const uint32_t*>(&words[32 * block + lane])[warp];
      mirrored[block] = transpose_over_lanes(word);
      if (first_block + block == column / 32) mirrored[block] |= kSymmetric ? word : right_half;
    }
    write(column, first_block, mirrored, [=](int block) { return first_block + block <= column / 32; });
  }

  // Writes those of kCount words of a row that are wanted, at once where all are and lie well.
  template <int kCount, class Wanted>
  __device__ __forceinline__ void write(int row, int first_word, const uint32_t (&words)[kCount],
                                        const Wanted& is_wanted) const {
    struct alignas(4 * kCount) Together {
      uint32_t words[kCount];
    };
    const int pitch = static_cast<int>(words_per_row(arguments.anchors));
    if (row >= arguments.anchors || first_word >= pitch) return;
    uint32_t* const to = arguments.bits + int64_t{row} * pitch + first_word;
    if (is_wanted(0) && is_wanted(kCount - 1) && pitch % kCount == 0) {
      Together all;
      std::memcpy(&all, words, sizeof all);
      *reinterpret_cast<Together*>(to) = all;
      return;
    }
#pragma unroll
    for (int w = 0; w < kCount; ++w) {
      if (is_wanted(w) && first_word + w < pitch) to[w] = words[w];
    }
  }
};

// bits[i, j // 32] bit j % 32 = i != j and <f_i, f_j> > min(r_i, r_j), or > r_i if not kSymmetric
//
// Grid (strips, parts): tiles on and right of the diagonal, the longest strips first. FLOPs: N^2 D. Bytes: N^2 / 8
// written; a strip of features once a block, and every tile right of it, from cache.
template <class Engine, bool kSymmetric>
HPK_KERNEL(Engine::kThreads, 1)
hidden_positives_fwd_kernel(const __grid_constant__ typename Engine::Operands operands, PackArguments arguments) {
  using Geometry = typename Engine::Geometry;
  using Consumer = Pack<Engine, kSymmetric>;
  const int strip = blockIdx.x, first_row = strip * Geometry::kRows;
  Consumer consumer(arguments, strip, shared_memory());
  const TileRange tiles{first_row / Geometry::kColumns, divide_up(arguments.anchors, Geometry::kColumns)};
  Engine::run(operands, first_row, part_of(tiles, blockIdx.y, gridDim.y),
              shared_memory() + kAlignedBytes<typename Consumer::Shared>, consumer);
}

template <class Engine>
void launch_hidden_positives(const typename Engine::Operands& operands, const PackArguments& arguments, bool symmetric,
                             cudaStream_t stream) {
  using Geometry = typename Engine::Geometry;
  const int64_t strips = divide_up(arguments.anchors, Geometry::kRows);
  const dim3 grid(static_cast<unsigned>(strips), static_cast<unsigned>(parts_for(strips, strips / 2, kWantedBlocks, 2)));
  constexpr size_t own = kAlignedBytes<typename Pack<Engine, true>::Shared>;
  static_assert(own <= Engine::kMostOwnBytes, "more shared memory than there is");
  launch(symmetric ? hidden_positives_fwd_kernel<Engine, true> : hidden_positives_fwd_kernel<Engine, false>, grid,
         Engine::kThreads, own + Engine::shared_bytes(operands, own), stream, operands, arguments);
}

}  // namespace hpk
