// The kernels of hidden_positives, among anchors and between anchors and keys, for either engine: see
// hidden_positives_cuda.cu and hidden_positives_sm90.cu.
#pragma once

#include "hidden_positives/threshold.cuh"

namespace hpk {

// Types

struct PackArguments {
  const float* threshold;  // NaN beyond the last anchor: no product is greater than it
  int64_t anchors;
  uint32_t* bits;
};

// Consumer

// Writes the bits of the pairs of a tile and of their mirror images. If kSymmetric, one comparison decides both; else two
// do, and the words of the second take the place of those of the first.
template <class Engine, bool kSymmetric>
struct Pack : Words<Engine> {
  using Base = Words<Engine>;
  using Geometry = typename Engine::Geometry;
  using Base::kBlocks, Base::kGroupRows, Base::kGroupThreads, Base::kParts, Base::kWords;

  PackArguments arguments;

  __device__ Pack(const PackArguments& arguments_, int strip, char* memory)
      : Base(arguments_.threshold, arguments_.threshold, strip, memory), arguments(arguments_) {}

  __device__ void operator()(const Fragment<Geometry>& products, int64_t tile, const Team<Geometry>& team) {
    if (!Engine::kPrepares) this->prepare(tile, team);
    const int group = this->group_of_warp(), thread = threadIdx.x % kGroupThreads;
    const int first_row = this->first_row_of(group);
    uint4* const words = this->shared->words[group];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int first_column = static_cast<int>(tile) * Geometry::kColumns + part * 32 * kWords;
      if (first_column + 32 * kWords <= first_row) continue;  // left of the diagonal
      barrier_sync(1 + group, kGroupThreads);                 // what was there has been read
      constexpr Limit kFirst = kSymmetric ? Limit::kSmaller : Limit::kRow;
      find_words<kFirst>(products, part, first_row, first_column, team.thread, words);
      barrier_sync(1 + group, kGroupThreads);
      write_words(words, first_row, first_column / 32, thread);
      uint32_t right_half = 0;
      if constexpr (!kSymmetric) {
        right_half = on_diagonal(words, first_row / 32, first_column, thread);
        barrier_sync(1 + group, kGroupThreads);
        find_words<Limit::kColumn>(products, part, first_row, first_column, team.thread, words);
        barrier_sync(1 + group, kGroupThreads);
      }
      write_mirrored(words, first_row / 32, first_column, thread, right_half);
    }
  }

 private:
  // words[i]: the bits of row i and 128 columns; where a block of 32 x 32 is on the diagonal, those right of it.
  template <Limit kLimit>
  __device__ void find_words(const Fragment<Geometry>& products, int part, int first_row, int first_column, int thread,
                             uint4* words) const {
    this->template find<kLimit>(products, part, thread, words, [=](uint32_t& bits, int row, int word) {
      if ((first_row + row) / 32 == first_column / 32 + word) bits &= ~1u << (row % 32);
      if constexpr (kLimit == Limit::kRow) {  // which may let products of 0 through, those of no anchor
        const int last = static_cast<int>(arguments.anchors);
        if (first_column / 32 + word == last / 32) bits &= ~(~0u << (last % 32));
      }
    });
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

  template <int kCount, class Wanted>
  __device__ __forceinline__ void write(int row, int first_word, const uint32_t (&words)[kCount],
                                        const Wanted& is_wanted) const {
    Base::write(arguments.bits, arguments.anchors, arguments.anchors, row, first_word, words, is_wanted);
  }
};

// Writes the bits of the pairs of a tile. kLimit says which thresholds a product must exceed.
template <class Engine, Limit kLimit>
struct PackBetween : Words<Engine> {
  using Base = Words<Engine>;
  using Geometry = typename Engine::Geometry;
  using Base::kGroupRows, Base::kGroupThreads, Base::kParts, Base::kWords;

  BetweenArguments arguments;

  __device__ PackBetween(const BetweenArguments& arguments_, int strip, char* memory)
      : Base(arguments_.threshold, arguments_.key_threshold, strip, memory), arguments(arguments_) {}

  __device__ void operator()(const Fragment<Geometry>& products, int64_t tile, const Team<Geometry>& team) {
    if (!Engine::kPrepares) this->prepare(tile, team);
    const int group = this->group_of_warp(), thread = threadIdx.x % kGroupThreads;
    const int first_row = this->first_row_of(group);
    uint4* const words = this->shared->words[group];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int first_column = static_cast<int>(tile) * Geometry::kColumns + part * 32 * kWords;
      const int own_column = arguments.first + first_row - first_column;  // of the first row, if that is one of the keys
      barrier_sync(1 + group, kGroupThreads);                             // what was there has been read
      this->template find<kLimit>(products, part, team.thread, words, [=](uint32_t& bits, int row, int word) {
        const int own = own_column + row - 32 * word;
        if (own >= 0 && own < 32) bits &= ~(1u << own);
      });
      barrier_sync(1 + group, kGroupThreads);
      if (thread >= kGroupRows) continue;
      uint32_t found[kWords];
      std::memcpy(found, &words[thread], sizeof found);
      Base::write(arguments.bits, arguments.anchors, arguments.keys, first_row + thread, first_column / 32, found,
                  [](int) { return true; });
    }
  }
};

// Kernel

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

// bits[i, j // 32] bit j % 32 = first + i != j and <f_i, k_j> > max(r_i, s_j), or > min(r_i, s_j) by kLimit
//
// Grid (strips, parts): all tiles of the keys. FLOPs: 2 N K D. Bytes: N K / 8 written; a strip of features once a block,
// and every tile of keys, from cache.
template <class Engine, Limit kLimit>
HPK_KERNEL(Engine::kThreads, 1)
hidden_positives_between_fwd_kernel(const __grid_constant__ typename Engine::Operands operands,
                                    BetweenArguments arguments) {
  using Geometry = typename Engine::Geometry;
  using Consumer = PackBetween<Engine, kLimit>;
  const int strip = blockIdx.x;
  Consumer consumer(arguments, strip, shared_memory());
  const TileRange tiles{0, divide_up(arguments.keys, Geometry::kColumns)};
  Engine::run(operands, strip * Geometry::kRows, part_of(tiles, blockIdx.y, gridDim.y),
              shared_memory() + kAlignedBytes<typename Consumer::Shared>, consumer);
}

// Launch

template <class Engine>
void launch_hidden_positives(const typename Engine::Operands& operands, const PackArguments& arguments, bool symmetric,
                             cudaStream_t stream) {
  using Geometry = typename Engine::Geometry;
  const int64_t strips = divide_up(arguments.anchors, Geometry::kRows);
  const dim3 grid(static_cast<unsigned>(strips), static_cast<unsigned>(parts_for(strips, strips / 2, kWantedBlocks, 2)));
  constexpr size_t own = kAlignedBytes<typename Words<Engine>::Shared>;
  static_assert(own <= Engine::kMostOwnBytes, "more shared memory than there is");
  launch(symmetric ? hidden_positives_fwd_kernel<Engine, true> : hidden_positives_fwd_kernel<Engine, false>, grid,
         Engine::kThreads, own + Engine::shared_bytes(operands, own), stream, operands, arguments);
}

template <class Engine>
void launch_hidden_positives_between(const typename Engine::Operands& operands, const BetweenArguments& arguments,
                                     bool either, cudaStream_t stream) {
  using Geometry = typename Engine::Geometry;
  const int64_t strips = divide_up(arguments.anchors, Geometry::kRows);
  const int64_t tiles = divide_up(arguments.keys, Geometry::kColumns);
  const dim3 grid(static_cast<unsigned>(strips), static_cast<unsigned>(parts_for(strips, tiles, kWantedBlocks, 2)));
  constexpr size_t own = kAlignedBytes<typename Words<Engine>::Shared>;
  static_assert(own <= Engine::kMostOwnBytes, "more shared memory than there is");
  launch(either ? hidden_positives_between_fwd_kernel<Engine, Limit::kSmaller>
                : hidden_positives_between_fwd_kernel<Engine, Limit::kGreater>,
         grid, Engine::kThreads, own + Engine::shared_bytes(operands, own), stream, operands, arguments);
}

}  // namespace hpk
