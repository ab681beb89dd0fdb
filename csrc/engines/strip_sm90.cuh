// Products of a strip of 128 rows with tiles of columns, by TMA and wgmma: sm_90a, up to 512 16-bit elements a row.
//
// The strip stays in shared memory. Behind it the tiles stream, in order, through a ring of boxes. Each of two groups of
// four warps multiplies while the consumer of the other works, in one of two ways:
//
//   Geometry90       Tiles of 128 columns, by turns. A consumer may take as long as the products of a tile.
//   WideGeometry90   Tiles of 256 columns, of which each group has half of the rows. A multiplication of 64 x 256 reads a
//                    sixth less of shared memory than two of 64 x 128. One group stays behind the other by `lead` boxes,
//                    and what a consumer takes longer than their products is not hidden.
//
// The order in which products are summed is the same.
#pragma once

#ifdef HPK_WITH_SM90

#include "common/schedule.h"
#include "engines/hopper.cuh"

namespace hpk {

template <class T, class OfTile = Geometry90>
struct StripSm90 {
  // Types

  using Element = T;
  using Geometry = OfTile;
  static constexpr int kThreads = hopper::kThreads;
  static constexpr bool kGathers = false;  // the columns of a tile follow one another
  static constexpr bool kTakesTurns = Geometry::kTeams > 1, kPrepares = !kTakesTurns;
  static constexpr size_t kMostOwnBytes = (kTakesTurns ? 64 : 32) * 1024;  // that a kernel may have, whatever the rows

  struct Operands {
    CUtensorMap left, right;
    int blocks;  // boxes that a row takes
  };

  static Operands operands(const Rows<T>& left, const Rows<T>& right) {
    return {hopper::tensor_map(left, Geometry::kRows), hopper::tensor_map(right, Geometry::kColumns),
            hopper::boxes_across(left.dim)};
  }

 private:
  using Number = hopper::Number<T>;
  static constexpr int kMostBlocks = kMostSm90Bytes / hopper::kBoxBytes, kMostStages = 8;
  static constexpr int kLeftBytes = Geometry::kRows * hopper::kBoxBytes;  // of a box
  static constexpr int kRightBytes = Geometry::kColumns * hopper::kBoxBytes;

  using LeftBoxes = hopper::Boxes<T, Geometry::kRows, kMostBlocks>;
  using RightBoxes = hopper::Boxes<T, Geometry::kColumns, kMostStages>;
  using Tile = cute::Shape<cute::Int<Geometry::kRows>, cute::Int<Geometry::kColumns>, cute::Int<hopper::kBoxDepth>>;
  using Groups = cute::Shape<cute::Int<Geometry::kTeamThreads / hopper::kTeamThreads>, cute::_1, cute::_1>;
  using Mma = decltype(cute::make_tiled_mma(cute::GMMA::ss_op_selector<Number, Number, float, Tile>(),
                                            cute::Layout<Groups>{}));
  static_assert(hopper::lies_in_boxes<Geometry::kRows>(LeftBoxes{}, false), "operands lie otherwise");
  static_assert(hopper::lies_in_boxes<Geometry::kColumns>(RightBoxes{}, false), "operands lie otherwise");
  static_assert(hopper::lies_as<Geometry>(Mma{}), "accumulators lie otherwise");

  // Shared memory

  // As many as fit, up to a number that covers the latency of memory.
  HPK_HOST_DEVICE static int stages_after(int own, int blocks) {
    const int left = hopper::kMostSharedBytes - own - static_cast<int>(sizeof(Barriers)) - blocks * kLeftBytes;
    const int fit = left / kRightBytes;
    return fit < kMostStages ? fit : kMostStages;
  }

 public:
  // What run() needs where the kernel has `own` bytes before.
  static size_t shared_bytes(const Operands& operands, size_t own) {
    const int stages = stages_after(static_cast<int>(own), operands.blocks);
    if (operands.blocks > kMostBlocks || stages < 2) {
      throw std::runtime_error("hpkernels: rows of " + std::to_string(operands.blocks * hopper::kBoxDepth) +
                               " elements do not fit into the shared memory of sm_90");
    }
    return operands.blocks * kLeftBytes + stages * kRightBytes + sizeof(Barriers);
  }

 private:
  // Barriers

  using Barrier = hopper::Barrier;

  // strip     the bytes of the strip are there
  // full[]    the bytes of a stage are
  // empty[]   the warps that multiply them have read them
  // turn[]    the other team has seen all of its boxes come: only then is no full[] two phases behind what a team waits
  //           for, which it could not tell from the phase itself. Without turns turn[1] is for the first tile alone: the
  //           other group has multiplied `lead` boxes.
  struct Barriers {
    uint64_t strip, full[kMostStages], empty[kMostStages], turn[hopper::kTeams];
  };
  static_assert(kMostOwnBytes + kMostBlocks * kLeftBytes + 2 * kRightBytes + sizeof(Barriers) <= hopper::kMostSharedBytes,
                "no room for two stages");

  // Every thread of the block calls it.
  __device__ static __forceinline__ void init_barriers(Barriers& barriers, int stages) {
    if (threadIdx.x == 0) {
      Barrier::init(&barriers.strip, 1);
      for (int stage = 0; stage < stages; ++stage) {
        Barrier::init(&barriers.full[stage], 1);
        Barrier::init(&barriers.empty[stage], kTakesTurns ? hopper::kTeamWarps : hopper::kTeams * hopper::kTeamWarps);
      }
      for (uint64_t& turn : barriers.turn) Barrier::init(&turn, hopper::kTeamWarps);
      hopper::fence_barriers();
    }
    __syncthreads();
  }

  // Scheduler

  // A box's place in the ring, and the phase of full[] there that brings it.
  struct Place {
    int stages, stage = 0;
    uint32_t phase = 0;

    __device__ __forceinline__ void advance() {
      if (++stage == stages) stage = 0, phase ^= 1;
    }
  };

  // Producer

  __device__ static __forceinline__ void load(const Operands& operands, int64_t first_row, int64_t first_column,
                                              TileRange tiles, int stages, char* shared, Barriers& barriers) {
    Barrier::arrive_and_expect_tx(&barriers.strip, operands.blocks * kLeftBytes);
    for (int block = 0; block < operands.blocks; ++block) {
      hopper::load_box(operands.left, first_row, block * hopper::kBoxDepth, shared + block * kLeftBytes,
                       &barriers.strip);
    }
    char* const ring = shared + operands.blocks * kLeftBytes;
    Place place{stages};
    for (int64_t tile = tiles.first; tile < tiles.last; ++tile) {
      for (int block = 0; block < operands.blocks; ++block, place.advance()) {
        uint64_t& full = barriers.full[place.stage];
        Barrier::wait(&barriers.empty[place.stage], place.phase ^ 1);  // of the box before; at once for the first
        Barrier::arrive_and_expect_tx(&full, kRightBytes);
        hopper::load_box(operands.right, tile * Geometry::kColumns + first_column, block * hopper::kBoxDepth,
                         ring + place.stage * kRightBytes, &full);
      }
    }
  }

  // Consumer

  template <class Consumer>
  __device__ static __forceinline__ void multiply(int blocks, TileRange tiles, int stages, char* shared,
                                                  Barriers& barriers, int group, const Team<Geometry>& team,
                                                  Consumer& consumer) {
    using namespace cute;
    Mma mma;
    char* const ring = shared + blocks * kLeftBytes;
    const auto strip = make_tensor(make_smem_ptr(reinterpret_cast<Number*>(shared)), LeftBoxes{});
    const auto boxes = make_tensor(make_smem_ptr(reinterpret_cast<Number*>(ring)), RightBoxes{});
    // Operands in shared memory are the same for every thread of a group.
    const auto own = mma.get_slice(kTakesTurns ? 0 : group * hopper::kTeamThreads);
    const auto left = own.make_fragment_A(own.partition_A(strip));   // (instruction, 64 rows each, step, box)
    const auto right = own.make_fragment_B(own.partition_B(boxes));  // (instruction, one of all columns, step, stage)
    const auto arrive = [&](uint64_t& barrier) {
      if (team.thread % 32 == 0) Barrier::arrive(&barrier);
    };

    // The group ahead needs another stage for what it multiplies next.
    const int lead = kTakesTurns ? 0 : stages - 1 < blocks / 2 ? stages - 1 : blocks / 2;
    Barrier::wait(&barriers.strip, 0);
    if (lead > 0 && group > 0 && tiles.first < tiles.last) Barrier::wait(&barriers.turn[1], 0);
    Place place{stages};
    uint32_t turn = group ^ 1;  // phase of turn[]: the first turn of team 0 is before any
    for (int64_t tile = tiles.first; tile < tiles.last; ++tile) {
      if (kTakesTurns && (tile - tiles.first) % hopper::kTeams != group) {
        for (int block = 0; block < blocks; ++block) place.advance();
        continue;
      }
      Fragment<Geometry> products;
      auto sums = hopper::accumulators<Geometry>(mma, products);
      mma.accumulate_ = GMMA::ScaleOut::Zero;
      int stage_before = 0;
      if constexpr (kTakesTurns) {
        Barrier::wait(&barriers.turn[group], turn);
        turn ^= 1;
      }
      warpgroup_fence_operand(sums);
      for (int block = 0; block < blocks; ++block, place.advance()) {
        Barrier::wait(&barriers.full[place.stage], place.phase);
        hopper::begin_products();
        CUTE_UNROLL
        for (int step = 0; step < size<2>(left); ++step) {
          hopper::multiply(mma, left(_, _, step, block), right(_, _, step, place.stage), sums);
          mma.accumulate_ = GMMA::ScaleOut::One;
        }
        hopper::commit_products();
        if constexpr (kPrepares) {
          if (block == 0) consumer.prepare(tile, team);
        }
        if (block > 0) {
          hopper::wait_for_products<1>();
          arrive(barriers.empty[stage_before]);
          if (block == lead && group == 0 && tile == tiles.first) arrive(barriers.turn[1]);
        }
        stage_before = place.stage;
      }
      if constexpr (kTakesTurns) arrive(barriers.turn[1 - group]);
      hopper::wait_for_products<0>();
      warpgroup_fence_operand(sums);
      arrive(barriers.empty[stage_before]);
      consumer(products, tile, team);
      __syncwarp();  // wgmma is an instruction of whole warps
    }
  }

 public:
  // Kernel

  // Calls consumer(products, tile, team) for each tile of a range: the products of the strip, left rows from first_row
  // on, and right rows from kColumns tile + first_column on. If kPrepares, consumer.prepare(tile, team) comes while
  // they are multiplied, so that what it reads is there in time. All threads of the block call this, but only the teams
  // return, each warp as soon as it is done. `shared` is what shared_bytes() says, and starts at a multiple of 1024 bytes.
  template <class Consumer>
  __device__ static void run(const Operands& operands, int64_t first_row, TileRange tiles, char* shared,
                             Consumer& consumer, int64_t first_column = 0) {
    const int stages = stages_after(static_cast<int>(shared - shared_memory()), operands.blocks);
    auto& barriers = *reinterpret_cast<Barriers*>(shared + operands.blocks * kLeftBytes + stages * kRightBytes);
    init_barriers(barriers, stages);

    const int group = hopper::team_of_warp();
    if (group == hopper::kTeams) {
      hopper::give_registers<hopper::kLoadRegisters>();
      if (threadIdx.x % hopper::kTeamThreads == 0) {
        load(operands, first_row, first_column, tiles, stages, shared, barriers);
      }
      hopper::exit_thread();
    }
    hopper::take_registers<hopper::kTeamRegisters>();
    const int thread = threadIdx.x % Geometry::kTeamThreads;
    multiply(operands.blocks, tiles, stages, shared, barriers, group, {kTakesTurns ? group : 0, thread}, consumer);
  }
};

// Where consumers are short: discovery and top-1.
template <class T>
using WideSm90 = StripSm90<T, WideGeometry90>;

}  // namespace hpk

#endif
