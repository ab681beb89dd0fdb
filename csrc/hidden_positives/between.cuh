// The kernel of hidden_positives between anchors and keys, for either engine.
#pragma once

#include "hidden_positives/words.cuh"

namespace hpk {

// Writes the bits of the pairs of a tile. kLimit says which thresholds a product must exceed.
template <class Engine, Limit kLimit>
struct PackBetween : Words<Engine> {
  using Base = Words<Engine>;
  using Geometry = typename Engine::Geometry;
  using Base::kGroupRows, Base::kGroupThreads, Base::kParts, Base::kWords;

  BetweenArguments arguments;

  __device__ PackBetween(const BetweenArguments& arguments_, int strip, char* memory)
      : Base(arguments_.threshold, strip, memory), arguments(arguments_) {}

  // Reads the thresholds of the columns.
  __device__ void prepare(int64_t tile, const Team<Geometry>& team) {
    this->read_thresholds(arguments.key_threshold, tile, team);
  }

  __device__ void operator()(const Fragment<Geometry>& products, int64_t tile, const Team<Geometry>& team) {
    if (!Engine::kPrepares) prepare(tile, team);
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
