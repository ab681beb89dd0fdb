// Products of a strip of 128 rows with tiles of 128 columns, by TMA and wgmma: sm_90a, up to 512 16-bit elements a row.
//
// The strip stays in shared memory. Behind it the tiles stream, in order, through a ring of boxes, and the teams take
// turns: one multiplies while the other's consumer works on the products of the tile before.
#pragma once

#ifdef HPK_WITH_SM90

#include "common/hopper.cuh"
#include "common/schedule.h"

namespace hpk {

template <class T>
struct StripSm90 {
  using Element = T;
  using Geometry = Geometry90;
  static constexpr int kThreads = hopper::kThreads;
  static constexpr bool kGathers = false;  // the columns of a tile follow one another
  static constexpr size_t kMostOwnBytes = 64 * 1024;  // that a kernel may have besides, whatever the rows

  struct Operands {
    CUtensorMap left, right;
    int blocks;  // boxes that a row takes
  };

  static Operands operands(const Rows<T>& left, const Rows<T>& right) {
    return {hopper::tensor_map(left, Geometry::kRows), hopper::tensor_map(right, Geometry::kColumns),
            hopper::boxes_across(left.dim)};
  }

  // What run() needs where the kernel has `own` bytes before.
  static size_t shared_bytes(const Operands& operands, size_t own) {
    const int stages = stages_after(static_cast<int>(own), operands.blocks);
    if (operands.blocks > kMostBlocks || stages < 2) {
      throw std::runtime_error("hpkernels: rows of " + std::to_string(operands.blocks * hopper::kBoxDepth) +
                               " elements do not fit into the shared memory of sm_90");
    }
    return (operands.blocks + stages) * kOperandBytes + sizeof(Barriers);
  }

  // Calls consumer(products, tile, team) for each tile of a range: the products of the strip, left rows from first_row
  // on, and right rows from 128 tile + first_column on. All threads of the block call it, but only the teams return, each
  // as soon as it is done. `shared` is what shared_bytes() says, and starts at a multiple of 1024 bytes.
  template <class Consumer>
  __device__ static void run(const Operands& operands, int64_t first_row, TileRange tiles, char* shared,
                             Consumer& consumer, int64_t first_column = 0) {
    const int stages = stages_after(static_cast<int>(shared - shared_memory()), operands.blocks);
    auto& barriers = *reinterpret_cast<Barriers*>(shared + (operands.blocks + stages) * kOperandBytes);
    if (threadIdx.x == 0) {
      Barrier::init(&barriers.strip, 1);
      for (int stage = 0; stage < stages; ++stage) {
        Barrier::init(&barriers.full[stage], 1);
        Barrier::init(&barriers.empty[stage], hopper::kTeamWarps);
      }
      for (int team = 0; team < hopper::kTeams; ++team) Barrier::init(&barriers.turn[team], hopper::kTeamWarps);
      hopper::fence_barriers();
    }
    __syncthreads();

    const int team = hopper::team_of_warp(), thread = threadIdx.x % hopper::kTeamThreads;
    if (team == hopper::kTeams) {
      hopper::give_registers<hopper::kLoadRegisters>();
      if (thread == 0) load(operands, first_row, first_column, tiles, stages, shared, barriers);
      hopper::exit_thread();
    }
    hopper::take_registers<hopper::kTeamRegisters>();
    multiply(operands.blocks, tiles, stages, shared, barriers, {team, thread}, consumer);
  }

 private:
  using Barrier = hopper::Barrier;
  using Number = hopper::Number<T>;
  static constexpr int kMostBlocks = kMostSm90Bytes / hopper::kBoxBytes, kMostStages = 8;
  static constexpr int kOperandBytes = Geometry::kRows * hopper::kBoxBytes;  // a box of either matrix

  using Boxes = hopper::Boxes<T, Geometry::kRows, kMostBlocks + kMostStages>;
  using Mma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Number, Number, float, cute::Shape<cute::_128, cute::_128, cute::_64>>()));
  static_assert(hopper::lies_in_boxes<Geometry::kRows>(Boxes{}, false), "operands lie otherwise");
  static_assert(hopper::lies_as<Geometry>(Mma{}), "accumulators lie otherwise");

  // strip     the bytes of the strip are there
  // full[]    the bytes of a stage are
  // empty[]   the warps of a team have read them
  // turn[]    the other team has seen all of its boxes come: only then is no full[] two phases behind what a team waits
  //           for, which it could not tell from the phase itself
  struct Barriers {
    uint64_t strip, full[kMostStages], empty[kMostStages], turn[hopper::kTeams];
  };
  static_assert(kMostOwnBytes + (kMostBlocks + 2) * kOperandBytes + sizeof(Barriers) <= hopper::kMostSharedBytes,
                "no room for two stages");

  // A box's place in the ring, and the phase of full[] there that brings it.
  struct Place {
    int stages, stage = 0;
    uint32_t phase = 0;

    __device__ __forceinline__ void advance() {
      if (++stage == stages) stage = 0, phase ^= 1;
    }
  };

  // As many as fit, up to a number that covers the latency of memory.
  HPK_HOST_DEVICE static int stages_after(int own, int blocks) {
    const int fit = (hopper::kMostSharedBytes - own - static_cast<int>(sizeof(Barriers))) / kOperandBytes - blocks;
    return fit < kMostStages ? fit : kMostStages;
  }

  __device__ static __forceinline__ void load(const Operands& operands, int64_t first_row, int64_t first_column,
                                              TileRange tiles, int stages, char* shared, Barriers& barriers) {
    Barrier::arrive_and_expect_tx(&barriers.strip, operands.blocks * kOperandBytes);
    for (int block = 0; block < operands.blocks; ++block) {
      hopper::load_box(operands.left, first_row, block * hopper::kBoxDepth, shared + block * kOperandBytes,
                       &barriers.strip);
    }
    char* const ring = shared + operands.blocks * kOperandBytes;
    Place place{stages};
    for (int64_t tile = tiles.first; tile < tiles.last; ++tile) {
      for (int block = 0; block < operands.blocks; ++block, place.advance()) {
        uint64_t& full = barriers.full[place.stage];
        Barrier::wait(&barriers.empty[place.stage], place.phase ^ 1);  // of the box before; at once for the first
        Barrier::arrive_and_expect_tx(&full, kOperandBytes);
        hopper::load_box(operands.right, tile * Geometry::kColumns + first_column, block * hopper::kBoxDepth,
                         ring + place.stage * kOperandBytes, &full);
      }
    }
  }

  template <class Consumer>
  __device__ static __forceinline__ void multiply(int blocks, TileRange tiles, int stages, char* shared,
                                                  Barriers& barriers, const Team<Geometry>& team, Consumer& consumer) {
    using namespace cute;
    Mma mma;
    const auto boxes = make_tensor(make_smem_ptr(reinterpret_cast<Number*>(shared)), Boxes{});
    const auto any = mma.get_slice(0);  // operands in shared memory are the same for every thread
    const auto left = any.make_fragment_A(any.partition_A(boxes));   // (instruction, two of 64 rows, step, box)
    const auto right = any.make_fragment_B(any.partition_B(boxes));  // (instruction, one of 128 columns, step, box)
    const auto arrive = [&](uint64_t& barrier) {
      if (team.thread % 32 == 0) Barrier::arrive(&barrier);
    };

    Barrier::wait(&barriers.strip, 0);
    Place place{stages};
    uint32_t turn = team.index ^ 1;  // phase of turn[]: the first turn of team 0 is before any
    for (int64_t tile = tiles.first; tile < tiles.last; ++tile) {
      if ((tile - tiles.first) % hopper::kTeams != team.index) {
        for (int block = 0; block < blocks; ++block) place.advance();
        continue;
      }
      Fragment<Geometry> products;
      auto sums = hopper::accumulators<Geometry>(mma, products);
      mma.accumulate_ = GMMA::ScaleOut::Zero;
      int stage_before = 0;
      Barrier::wait(&barriers.turn[team.index], turn);
      turn ^= 1;
      warpgroup_fence_operand(sums);
      for (int block = 0; block < blocks; ++block, place.advance()) {
        Barrier::wait(&barriers.full[place.stage], place.phase);
        hopper::begin_products();
        CUTE_UNROLL
        for (int step = 0; step < size<2>(left); ++step) {
          hopper::multiply(mma, left(_, _, step, block), right(_, _, step, blocks + place.stage), sums);
          mma.accumulate_ = GMMA::ScaleOut::One;
        }
        hopper::commit_products();
        if (block > 0) {
          hopper::wait_for_products<1>();
          arrive(barriers.empty[stage_before]);
        }
        stage_before = place.stage;
      }
      arrive(barriers.turn[1 - team.index]);
      hopper::wait_for_products<0>();
      warpgroup_fence_operand(sums);
      arrive(barriers.empty[stage_before]);
      consumer(products, tile, team);
      __syncwarp();  // wgmma is an instruction of whole warps
    }
  }
};

}  // namespace hpk

#endif
