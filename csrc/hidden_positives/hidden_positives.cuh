// The kernel of hidden_positives, for either engine: see hidden_positives_cuda.cu and hidden_positives_sm90.cu.
#pragma once

#include "common/bits.h"
#include "common/device.h"
#include "common/schedule.h"
#include "common/warp.cuh"
#include "hidden_positives/relation.h"

namespace hpk {

struct PackArguments {
  const float* threshold;
  int64_t anchors;
  uint32_t* bits;
};

// Compares the products of a tile with thresholds, and writes the bits of its pairs and of their mirror images.
template <class Geometry>
struct Pack {
  static constexpr int kWords = Geometry::kColumns / 32, kThreadWords = Geometry::kColumnBlocks / 4;

  struct Shared {
    struct {
      float thresholds[Geometry::kColumns];
      uint32_t words[Geometry::kRows][kWords];
    } of_team[Geometry::kTeams];
  };

  PackArguments arguments;
  int64_t strip;
  Shared* shared;
  float row_thresholds[Geometry::kRowBlocks][2];

  // No product is greater than NaN, the threshold of what is no anchor.
  __device__ float threshold(int64_t anchor) const {
    return anchor < arguments.anchors ? arguments.threshold[anchor] : __uint_as_float(0x7FFFFFFF);
  }

  __device__ Pack(const PackArguments& arguments_, int64_t strip_, char* memory)
      : arguments(arguments_), strip(strip_), shared(reinterpret_cast<Shared*>(memory)) {
    const int thread = threadIdx.x % Geometry::kTeamThreads;
    for (int m = 0; m < Geometry::kRowBlocks; ++m) {
      for (int h = 0; h < 2; ++h) {
        row_thresholds[m][h] = threshold(strip * Geometry::kRows + Geometry::row(thread, m, h));
      }
    }
  }

  __device__ void operator()(const Fragment<Geometry>& products, int64_t tile, const Team<Geometry>& team) {
    auto& own = shared->of_team[team.index];
    for (int c = team.thread; c < Geometry::kColumns; c += Geometry::kTeamThreads) {
      own.thresholds[c] = threshold(tile * Geometry::kColumns + c);
    }
    team.sync();
    find_words(products, tile == strip, own.thresholds, team.thread, own.words);
    team.sync();
    write_words(tile, team.thread, own.words);
  }

 private:
  // words[i][w]: the bits of row i and columns 32 w to 32 w + 31; on the diagonal those right of it.
  __device__ void find_words(const Fragment<Geometry>& products, bool diagonal, const float* thresholds, int thread,
                             uint32_t (*words)[kWords]) const {
#pragma unroll
    for (int m = 0; m < Geometry::kRowBlocks; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = Geometry::row(thread, m, h);
#pragma unroll
        for (int w = 0; w < kThreadWords; ++w) {
          uint32_t found = 0;
#pragma unroll
          for (int n = 4 * w; n < 4 * w + 4; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              const int column = Geometry::column(thread, n, c);
              const bool above = products.values[m][n][2 * h + c] > smaller(row_thresholds[m][h], thresholds[column]);
              found |= uint32_t{above && (!diagonal || row < column)} << (column % 32);
            }
          }
          found |= __shfl_xor_sync(0xFFFFFFFFu, found, 1);
          found |= __shfl_xor_sync(0xFFFFFFFFu, found, 2);
          if (thread % 4 == w) words[row][Geometry::column(thread, 4 * w, 0) / 32] = found;
        }
      }
    }
  }

  // A warp has 32 columns: it transposes their words, one block of 32 rows after another. A tile on the diagonal is its
  // own mirror image, of which each holds the half that the other lacks.
  __device__ void write_words(int64_t tile, int thread, const uint32_t (*words)[kWords]) const {
    const int lane = thread % 32;
    for (int w = thread / 32; w < kWords; w += Geometry::kTeamThreads / 32) {
      for (int block = 0; block < Geometry::kRows / 32; ++block) {
        uint32_t mirrored = transpose_over_lanes(words[32 * block + lane][w]);
        const int column = 32 * w + lane;
        if (tile == strip) mirrored |= words[column][block];
        write(tile * Geometry::kColumns + column, strip * (Geometry::kRows / 32) + block, mirrored);
      }
    }
    if (tile == strip) return;
    for (int i = thread; i < Geometry::kRows * kWords; i += Geometry::kTeamThreads) {
      write(strip * Geometry::kRows + i / kWords, tile * kWords + i % kWords, words[i / kWords][i % kWords]);
    }
  }

  __device__ void write(int64_t row, int64_t word, uint32_t value) const {
    const int64_t pitch = words_per_row(arguments.anchors);
    if (row < arguments.anchors && word < pitch) arguments.bits[row * pitch + word] = value;
  }
};

// bits[i, j // 32] bit j % 32 = i != j and <f_i, f_j> > min(r_i, r_j)
//
// Grid (strips, parts): tiles on and right of the diagonal, the longest strips first. FLOPs: N^2 D. Bytes: N^2 / 8
// written; a strip of features once a block, and every tile right of it, from cache.
template <class Engine>
HPK_KERNEL(Engine::kThreads, 1)
hidden_positives_fwd_kernel(const __grid_constant__ typename Engine::Operands operands, PackArguments arguments) {
  using Geometry = typename Engine::Geometry;
  using Consumer = Pack<Geometry>;
  const int64_t strip = blockIdx.x;
  Consumer consumer(arguments, strip, shared_memory());
  const TileRange tiles{strip, divide_up(arguments.anchors, Geometry::kColumns)};
  Engine::run(operands, strip * Geometry::kRows, part_of(tiles, blockIdx.y, gridDim.y),
              shared_memory() + kAlignedBytes<typename Consumer::Shared>, consumer);
}

template <class Engine>
void launch_hidden_positives(const typename Engine::Operands& operands, const PackArguments& arguments,
                             cudaStream_t stream) {
  using Geometry = typename Engine::Geometry;
  const int64_t strips = divide_up(arguments.anchors, Geometry::kRows);
  const dim3 grid(static_cast<unsigned>(strips), static_cast<unsigned>(parts_for(strips, strips / 2, kWantedBlocks, 2)));
  constexpr size_t own = kAlignedBytes<typename Pack<Geometry>::Shared>;
  static_assert(own <= Engine::kMostOwnBytes, "more shared memory than there is");
  launch(hidden_positives_fwd_kernel<Engine>, grid, Engine::kThreads, own + Engine::shared_bytes(operands, own), stream,
         operands, arguments);
}

}  // namespace hpk
