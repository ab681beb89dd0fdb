// Products of a strip of 128 rows (or 64) with tiles of 128 columns, by mma.sync: any GPU from sm_80 on, any rows.
//
// Both operands stream through shared memory, 128 bytes of each row at a time, a few copies ahead of the products. A
// tile's products never leave registers: the consumer is called with them. If kComparable, those of two rows have the
// same bits whichever of them is left.
#pragma once

#include "common/schedule.h"
#include "engines/tile.cuh"

namespace hpk {

template <class T, class OfTile = Geometry80, bool kComparable = false>
struct StripSm80 {
  // Types

  using Element = T;
  using Geometry = OfTile;
  static constexpr int kThreads = Geometry::kTeams * Geometry::kTeamThreads;
  static constexpr bool kGathers = true;  // any rows may be the columns of a tile
  static constexpr bool kPrepares = false;  // whether a consumer is told of a tile ahead

  struct Operands {
    Rows<T> left, right;
  };

  // Shared memory

  static constexpr int kStages = 3;
  static constexpr int kLeftBytes = Geometry::kRows * kTileBytes, kRightBytes = Geometry::kColumns * kTileBytes;
  static constexpr size_t kSharedBytes = kStages * (kLeftBytes + kRightBytes);
  static constexpr size_t kMostOwnBytes = kSharedBytesAnywhere - kSharedBytes;  // that a kernel may have besides
  static_assert(kSharedBytes <= kSharedBytesAnywhere, "more shared memory than some GPUs have");

  static size_t shared_bytes(const Operands&, size_t) { return kSharedBytes; }

  // Registers

  static constexpr int kUnrolled = sizeof(T) == 4 ? 1 : 4;  // steps at a time: TF32 takes more registers

  // Scheduler

  // The strip from `first_row` of the left rows on; column c of tile t is right row 128 t + c.
  template <class Consumer>
  __device__ static void run(const Operands& operands, int64_t first_row, TileRange tiles, char* shared,
                             Consumer& consumer) {
    const auto left_row = [&](int r) { return first_row + r < operands.left.count ? first_row + r : -1; };
    const auto right_row = [&](int64_t tile, int c) {
      const int64_t row = tile * Geometry::kColumns + c;
      return row < operands.right.count ? row : -1;
    };
    run(operands, left_row, right_row, tiles, shared, consumer);
  }

  // Calls consumer(products, tile, team) for each tile of a range, with every thread of the block.
  //   left_row(r)            the row of `left` that is row r of the strip, or -1 for none, whose products are 0
  //   right_row(tile, c)     likewise the row of `right` that is column c of a tile
  // `shared` is what shared_bytes says. The consumer may use team.sync(), and shared memory of its own.
  template <class LeftRow, class RightRow, class Consumer>
  __device__ static void run(const Operands& operands, const LeftRow& left_row, const RightRow& right_row,
                             TileRange tiles, char* shared, Consumer& consumer) {
    const Rows<T>&left = operands.left, &right = operands.right;
    const int thread = threadIdx.x, chunk = thread % kTileChunks, first_row = thread / kTileChunks;
    constexpr int kApart = kThreads / kTileChunks;
    constexpr int kLeftCopies = Geometry::kRows / kApart, kRightCopies = Geometry::kColumns / kApart;
    const Team<Geometry> team{0, thread};
    const int blocks = (left.dim + kTileElements<T> - 1) / kTileElements<T>;
    const int last_tile = static_cast<int>(tiles.last);
    const int64_t steps = (tiles.last - tiles.first) * blocks;

    int left_rows[kLeftCopies], right_rows[kRightCopies];
#pragma unroll
    for (int i = 0; i < kLeftCopies; ++i) left_rows[i] = static_cast<int>(left_row(first_row + i * kApart));

    // Producer

    // What is copied next: its tile and the block of each row, and the stage it goes to.
    int next_tile = static_cast<int>(tiles.first), next_block = 0, next_stage = 0;
    const auto load = [&] {
      if (next_tile < last_tile) {
        if (next_block == 0) {
#pragma unroll
          for (int i = 0; i < kRightCopies; ++i) right_rows[i] = static_cast<int>(right_row(next_tile, first_row + i * kApart));
        }
        char* const to = shared + next_stage * (kLeftBytes + kRightBytes);
#pragma unroll
        for (int i = 0; i < kLeftCopies; ++i) {
          load_chunk(left, left_rows[i], next_block, to, first_row + i * kApart, chunk);
        }
#pragma unroll
        for (int i = 0; i < kRightCopies; ++i) {
          load_chunk(right, right_rows[i], next_block, to + kLeftBytes, first_row + i * kApart, chunk);
        }
        next_stage = next_stage + 1 == kStages ? 0 : next_stage + 1;
        if (++next_block == blocks) next_block = 0, ++next_tile;
      }
      cp_async_commit();  // an empty group as well: groups are counted
    };

    // Consumer

    for (int stage = 0; stage < kStages - 1; ++stage) load();
    Fragment<Geometry> products{};
    int tile = static_cast<int>(tiles.first), block = 0, stage = 0;
    for (int64_t step = 0; step < steps; ++step) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // this stage is there for all, and all are done with the one before
      load();
      const char* const from = shared + stage * (kLeftBytes + kRightBytes);
      add_products<T, kUnrolled, kComparable>(products.values, from, first_row_of_warp<Geometry>(thread),
                                              from + kLeftBytes, first_column_of_warp<Geometry>(thread));
      stage = stage + 1 == kStages ? 0 : stage + 1;
      if (++block == blocks) {
        consumer(products, tile, team);
        products = {};
        block = 0;
        ++tile;
      }
    }
    cp_async_wait<0>();
    __syncthreads();
  }
};

}  // namespace hpk
