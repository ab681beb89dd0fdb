// Sums of rows weighted by a function of their products, by mma.sync: any GPU from sm_80 on, any rows.
//
//   gradient (64 rows x some features) = sum over columns j of g(<left_i, right_j>)_ij right_j
//
// Columns come in tiles of 64. Both operands of the products stream through shared memory, 128 bytes of each row at a
// time; meanwhile the features of the tile's columns arrive that the block has sums of. g goes through shared memory to
// become an operand. Neither products nor g go to memory.
#pragma once

#include "common/schedule.h"
#include "engines/tile.cuh"

namespace hpk {

template <class T>
struct GradientSm80 {
  // Types

  using Element = T;
  using Geometry = GradientGeometry80<64>;  // of products and g
  static constexpr int kFeatureBytes = 512;  // of a row, that a block has sums of
  static constexpr int kFeatures = kFeatureBytes / static_cast<int>(sizeof(T));
  using SumGeometry = GradientGeometry80<kFeatures>;
  static constexpr int kThreads = 256;
  static constexpr bool kGathers = true;  // any rows may be the columns of a tile

  struct Operands {
    Rows<T> left, right;
  };

  static unsigned feature_blocks(int dim) { return static_cast<unsigned>(divide_up(dim, kFeatures)); }

 private:
  // Shared memory

  static constexpr int kStages = 3, kApart = kThreads / kTileChunks, kCopies = Geometry::kRows / kApart;
  static constexpr int kOperandBytes = Geometry::kRows * kTileBytes;
  static constexpr int kFeatureTiles = kFeatureBytes / kTileBytes;
  static constexpr int kGTiles = Geometry::kColumns / kTileElements<T>;

  struct Shared {
    char stages[kStages][2][kOperandBytes];
    char features[kFeatureTiles][kOperandBytes];
    char g[kGTiles][kOperandBytes];
  };
  static_assert(sizeof(Shared) <= kSharedBytesAnywhere, "more shared memory than some GPUs have");

 public:
  static constexpr size_t shared_bytes() { return sizeof(Shared); }

 private:
  // Registers

  static constexpr int kUnrolled = 2;  // steps of a product at a time: sums take most of the registers

  __device__ static __forceinline__ void write_g(const Fragment<Geometry>& g, int thread, Shared& shared) {
#pragma unroll
    for (int n = 0; n < Geometry::kColumnBlocks; ++n) {
      const int column = Geometry::column(thread, n, 0);
      char* const tile = shared.g[column / kTileElements<T>];
      const int byte = column % kTileElements<T> * static_cast<int>(sizeof(T));
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        struct alignas(2 * sizeof(T)) Pair {
          T first, second;
        };
        const int at = tile_offset(Geometry::row(thread, 0, h), byte / kChunkBytes) + byte % kChunkBytes;
        *reinterpret_cast<Pair*>(tile + at) = {T(g.values[0][n][2 * h]), T(g.values[0][n][2 * h + 1])};
      }
    }
  }

  // sums += g times the features of the tile's columns.
  __device__ static __forceinline__ void add_weighted(Fragment<SumGeometry>& sums, const Shared& shared, int thread) {
    constexpr int kSteps = Geometry::kColumns * static_cast<int>(sizeof(T)) / kStepBytes;
    constexpr int kStepsOfTile = kTileBytes / kStepBytes;
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[4];
      load_left(a, shared.g[step / kStepsOfTile], first_row_of_warp<Geometry>(thread), step % kStepsOfTile);
#pragma unroll
      for (int n = 0; n < SumGeometry::kColumnBlocks; n += 2) {
        uint32_t b[4];
        load_features_of(b, shared, first_column_of_warp<SumGeometry>(thread) + 8 * n, step);
        Multiplier<T>::add(sums.values[0][n], a, b[0], b[1]);
        Multiplier<T>::add(sums.values[0][n + 1], a, b[2], b[3]);
      }
    }
  }

  // The operands of mma for two blocks of 8 features from `feature` on, {b0, b1} of either, and the columns of a step.
  __device__ static __forceinline__ void load_features_of(uint32_t (&parts)[4], const Shared& shared, int feature,
                                                          int step) {
    const int lane = thread_lane();
    const char* const tile = shared.features[feature / kTileElements<T>];
    const int chunk = feature % kTileElements<T> * static_cast<int>(sizeof(T)) / kChunkBytes;
    if constexpr (sizeof(T) == 2) {
      load_matrices_transposed(parts, tile + tile_offset(16 * step + lane % 16, chunk + lane / 16));
    } else {  // ldmatrix transposes 16-bit numbers only
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const int column = 8 * step + lane % 4 + part % 2 * 4, place = part / 2 * 8 + lane / 4;
        const char* const at = tile + tile_offset(column, chunk + place / 4) + place % 4 * 4;
        parts[part] = *reinterpret_cast<const uint32_t*>(at);
      }
    }
  }

  __device__ static __forceinline__ int thread_lane() { return static_cast<int>(threadIdx.x) % 32; }

 public:
  // Scheduler

  // The sums of features kFeatures * feature_block and following. left_row(r) and right_row(tile, c) are the rows of the
  // operands, or -1 for none. The consumer has two members:
  //   make_g(products, tile, team)  turns products into g, which is 0 where there is no row
  //   store(sums, team)             gets the gradient, in the end
  // Every thread of the block calls it.
  template <class LeftRow, class RightRow, class Consumer>
  __device__ static void run(const Operands& operands, const LeftRow& left_row, const RightRow& right_row,
                             TileRange tiles, int feature_block, char* memory, Consumer& consumer) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const Rows<T>&left = operands.left, &right = operands.right;
    const int thread = threadIdx.x, chunk = thread % kTileChunks, first_row = thread / kTileChunks;
    const Team<Geometry> team{0, thread};
    const int blocks = (left.dim + kTileElements<T> - 1) / kTileElements<T>;

    int left_rows[kCopies], right_rows[kCopies];
#pragma unroll
    for (int i = 0; i < kCopies; ++i) left_rows[i] = static_cast<int>(left_row(first_row + i * kApart));

    // Producer

    // What is copied next: its tile and the block of each row, and the stage it goes to.
    const int last_tile = static_cast<int>(tiles.last);
    int next_tile = static_cast<int>(tiles.first), next_block = 0, next_stage = 0;
    const auto load = [&] {
      if (next_tile < last_tile) {
        if (next_block == 0) {
#pragma unroll
          for (int i = 0; i < kCopies; ++i) {
            right_rows[i] = static_cast<int>(right_row(next_tile, first_row + i * kApart));
          }
        }
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
          load_chunk(left, left_rows[i], next_block, shared.stages[next_stage][0], first_row + i * kApart, chunk);
          load_chunk(right, right_rows[i], next_block, shared.stages[next_stage][1], first_row + i * kApart, chunk);
        }
        next_stage = next_stage + 1 == kStages ? 0 : next_stage + 1;
        if (++next_block == blocks) next_block = 0, ++next_tile;
      }
      cp_async_commit();  // an empty group as well: groups are counted
    };
    const auto load_features = [&](int tile) {
      for (int i = 0; i < kCopies; ++i) {
        const int row = static_cast<int>(right_row(tile, first_row + i * kApart));
#pragma unroll 1
        for (int part = 0; part < kFeatureTiles; ++part) {
          load_chunk(right, row, feature_block * kFeatureTiles + part, shared.features[part], first_row + i * kApart, chunk);
        }
      }
    };

    // Consumer

    for (int stage = 0; stage < kStages - 1; ++stage) load();
    Fragment<SumGeometry> sums{};
    int stage = 0;
    for (int tile = static_cast<int>(tiles.first); tile < last_tile; ++tile) {
      Fragment<Geometry> products{};
      for (int block = 0; block < blocks; ++block) {
        cp_async_wait<kStages - 2>();
        __syncthreads();  // this stage is there for all, and all are done with what comes next
        if (block == 0) load_features(tile);
        load();
        add_products<T, kUnrolled>(products.values, shared.stages[stage][0], first_row_of_warp<Geometry>(thread),
                                   shared.stages[stage][1], first_column_of_warp<Geometry>(thread));
        stage = stage + 1 == kStages ? 0 : stage + 1;
      }
      consumer.make_g(products, tile, team);
      write_g(products, thread, shared);
      if (blocks < kStages) cp_async_wait<0>();  // else the features were there before the last block
      __syncthreads();
      add_weighted(sums, shared, thread);
    }

    // Epilogue

    cp_async_wait<0>();
    __syncthreads();
    consumer.store(sums, team);
  }
};

}  // namespace hpk
