// Words of bits from a tile of products and thresholds, for the kernels of hidden_positives.
#pragma once

#include <cstring>

#include "common/bits.h"
#include "common/schedule.h"
#include "common/warp.cuh"
#include "engines/team.cuh"
#include "hidden_positives/hidden_positives.h"

namespace hpk {

// What a product must exceed: the threshold of its row or column, the smaller of the two, or the greater.
enum class Limit { kSmaller, kGreater, kRow, kColumn };

// Compares the products of a tile with thresholds. Groups of four warps, each with some rows and all columns of them, do
// so for themselves, 128 columns at a time, and put the words into shared memory.
template <class Engine>
struct Words {
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

  int strip;
  Shared* shared;
  const float* of_columns;
  float row_thresholds[Geometry::kRowBlocks][2];
  float2 column_thresholds[Geometry::kColumnBlocks];

  // From the thresholds of rows and columns.
  __device__ Words(const float* of_rows, const float* of_columns_, int strip_, char* memory)
      : strip(strip_), shared(reinterpret_cast<Shared*>(memory)), of_columns(of_columns_) {
    const int thread = threadIdx.x % Geometry::kTeamThreads;
#pragma unroll
    for (int m = 0; m < Geometry::kRowBlocks; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        row_thresholds[m][h] = of_rows[strip * Geometry::kRows + Geometry::row(thread, m, h)];
      }
    }
  }

  // Reads the thresholds of the columns of a tile.
  __device__ void prepare(int64_t tile, const Team<Geometry>& team) {
    const float* const from = of_columns + tile * Geometry::kColumns + Geometry::column(team.thread, 0, 0);
#pragma unroll
    for (int n = 0; n < Geometry::kColumnBlocks; ++n) {
      const int apart = Geometry::column(0, n, 0) - Geometry::column(0, 0, 0);
      column_thresholds[n] = *reinterpret_cast<const float2*>(from + apart);
    }
  }

  // The same for all lanes of a warp, and the compiler is to know it.
  __device__ static int group_of_warp() { return __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kGroupThreads, 0); }

  __device__ int first_row_of(int group) const {
    return strip * Geometry::kRows + Geometry::row(group * kGroupThreads % Geometry::kTeamThreads, 0, 0);
  }

  // words[i]: the bits of row i of a group and 128 columns, without those that trim(bits, row, word) clears in a word.
  template <Limit kLimit, class Trim>
  __device__ __forceinline__ void find(const Fragment<Geometry>& products, int part, int thread, uint4* words,
                                       const Trim& trim) const {
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
              const float of_column = c == 0 ? column_thresholds[n].x : column_thresholds[n].y;
              const float limit = limit_of<kLimit>(row_thresholds[m][h], of_column);
              if (products.values[m][n][2 * h + c] > limit) found |= 1u << (8 * i + c);
            }
          }
          found <<= 2 * of_four;
          found |= __shfl_xor_sync(kAllLanes, found, 1);
          found |= __shfl_xor_sync(kAllLanes, found, 2);
          if (of_four == w) own = found;
        }
        const int row = Geometry::row(thread, m, h) % kGroupRows;
        trim(own, row, own_word);
        if (of_four < kThreadWords) reinterpret_cast<uint32_t*>(&words[row])[own_word] = own;
      }
    }
  }

  template <Limit kLimit>
  __device__ static __forceinline__ float limit_of(float of_row, float of_column) {
    if constexpr (kLimit == Limit::kRow) return of_row;
    if constexpr (kLimit == Limit::kColumn) return of_column;
    if constexpr (kLimit == Limit::kGreater) return max_or_nan(of_row, of_column);
    return min_or_nan(of_row, of_column);
  }

  // Writes those of kCount words of row `row` of a packed matrix (rows, columns) that are wanted, at once where all are
  // and lie well.
  template <int kCount, class Wanted>
  __device__ static __forceinline__ void write(uint32_t* bits, int64_t rows, int64_t columns, int row, int first_word,
                                               const uint32_t (&words)[kCount], const Wanted& is_wanted) {
    struct alignas(4 * kCount) Together {
      uint32_t words[kCount];
    };
    const int pitch = static_cast<int>(words_per_row(columns));
    if (row >= rows || first_word >= pitch) return;
    uint32_t* const to = bits + int64_t{row} * pitch + first_word;
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

}  // namespace hpk
