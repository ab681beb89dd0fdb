// Sums of rows weighted by a function of their products, by TMA and wgmma: sm_90a, 16-bit rows of up to 512 elements.
//
//   gradient_i = sum over j of g(<z_i, z_j>)_ij z_j      for 64 rows i; neither products nor g leave the SM
//
// Columns j come in tiles of 64, and there is room for two: tile u lies in place c = u % 2. Team c makes its g, and
// writes it to shared memory as an operand. Both teams add g of every tile times its columns to their side of the
// gradient, half of the elements each; so side s of the columns of place c is a quarter of its own. Team t goes through
//
//   products of its tile u with quarter (t, t); the other team's g of tile u - 1 times quarter (1 - t, t);
//   products with quarter (t, 1 - t); g of tile u; g of tile u times quarter (t, t)
//
// half a round after the other team does, so that one multiplies while the other makes g, and quarters come one after
// another, (t, t) before (t, 1 - t).
//
//   own_full     the rows are there, and their numbers
//   full[c][s]   the bytes of the quarter are there; with (c, c) come the numbers of its columns
//   ready[c]     g of place c is
//   empty[c][s]  the quarter has been read: by team s, which read it after ready[c], hence after team c
//
// g of place c may be written over once quarter (c, 1 - c) has come again: the other team had read both before.
#pragma once

#ifdef HPK_WITH_SM90

#include "common/schedule.h"
#include "engines/hopper.cuh"

namespace hpk {

// kDim is the length of a row, rounded up to a multiple of 128.
template <class T, int kDim>
struct GradientSm90 {
  // Types

  static_assert(kDim % 128 == 0 && kDim * int{sizeof(T)} <= kMostSm90Bytes, "128, 256, 384 or 512 elements");
  using Element = T;
  using Geometry = GradientGeometry90<64>;           // of products and g
  using SumGeometry = GradientGeometry90<kDim / 2>;  // of a side of the gradient
  static constexpr int kThreads = hopper::kThreads;
  static constexpr bool kGathers = false;  // the columns of a tile follow one another

  struct Operands {
    CUtensorMap rows;
    const float* numbers;
    int64_t count;
  };

  // `numbers` (rows, 4) start at a multiple of 16 bytes.
  static Operands operands(const Rows<T>& rows, const float* numbers) {
    return {hopper::tensor_map(rows, Geometry::kRows), numbers, rows.count};
  }

 private:
  using Number = hopper::Number<T>;
  static constexpr int kBoxes = kDim / hopper::kBoxDepth, kSideBoxes = kBoxes / 2;
  static constexpr int kBoxElements = Geometry::kRows * hopper::kBoxDepth;
  static constexpr int kBoxBytes = kBoxElements * static_cast<int>(sizeof(T));

  // Everything in boxes; and the quarters transposed, with elements for columns.
  using Boxes = hopper::Boxes<T, Geometry::kRows, 3 * kBoxes + 2>;
  using Quarters = decltype(cute::tile_to_shape(cute::GMMA::Layout_MN_SW128_Atom<Number>{},
                                                cute::Shape<cute::Int<kDim / 2>, cute::_64, cute::_4>{},
                                                cute::Step<cute::_2, cute::_1, cute::_3>{}));
  using ProductMma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Number, Number, float, cute::Shape<cute::_64, cute::_64, cute::_64>>()));
  using SumMma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Number, Number, float, cute::Shape<cute::_64, cute::Int<kDim / 2>, cute::_64>,
                                 cute::GMMA::Major::K, cute::GMMA::Major::MN>()));
  static_assert(hopper::lies_in_boxes<Geometry::kRows>(Boxes{}, false), "rows lie otherwise");
  static_assert(hopper::lies_in_boxes<Geometry::kColumns>(Quarters{}, true), "columns lie otherwise");
  static_assert(hopper::lies_as<Geometry>(ProductMma{}), "products lie otherwise");
  static_assert(hopper::lies_as<SumGeometry>(SumMma{}), "sums lie otherwise");

  // Shared memory

  struct Shared {
    T own[kBoxes][kBoxElements];
    T columns[2][2][kSideBoxes][kBoxElements];
    T g[2][kBoxElements];
    float4 own_numbers[Geometry::kRows], numbers[2][Geometry::kColumns];
    uint64_t own_full, full[2][2], ready[2], empty[2][2];
  };
  static constexpr int kColumnsBox = kBoxes, kGBox = 3 * kBoxes;  // where columns and g start
  static_assert(sizeof(Shared) <= hopper::kMostSharedBytes, "more shared memory than there is");

 public:
  static constexpr size_t shared_bytes() { return sizeof(Shared); }

  static constexpr unsigned feature_blocks(int) { return 1; }  // of all features

 private:
  // Barriers

  using Barrier = hopper::Barrier;

  // Every thread of the block calls it.
  __device__ static __forceinline__ void init_barriers(Shared& shared) {
    if (threadIdx.x == 0) {
      Barrier::init(&shared.own_full, 1);
      for (int c = 0; c < 2; ++c) {
        Barrier::init(&shared.ready[c], hopper::kTeamThreads);
        for (int s = 0; s < 2; ++s) {
          Barrier::init(&shared.full[c][s], 1);
          Barrier::init(&shared.empty[c][s], hopper::kTeamWarps);
        }
      }
      hopper::fence_barriers();
    }
    __syncthreads();
  }

  // Producer

  // Of the numbers of 64 rows from `first` on, as far as there are rows.
  __device__ static __forceinline__ int number_bytes(const Operands& operands, int64_t first) {
    const int64_t left = operands.count - first, rows = left < Geometry::kRows ? left : Geometry::kRows;
    return rows > 0 ? static_cast<int>(rows * sizeof(float4)) : 0;
  }

  // Loops over boxes stay loops: unrolled they would take more registers than this thread has.
  __device__ static __forceinline__ void load(const Operands& operands, int64_t first_row, int64_t first_column,
                                              TileRange tiles, Shared& shared) {
    const int own_bytes = number_bytes(operands, first_row);
    Barrier::arrive_and_expect_tx(&shared.own_full, kBoxes * kBoxBytes + own_bytes);
    if (own_bytes > 0) {
      hopper::load_bytes(operands.numbers + 4 * first_row, own_bytes, shared.own_numbers, &shared.own_full);
    }
    CUTE_NO_UNROLL
    for (int box = 0; box < kBoxes; ++box) {
      hopper::load_box(operands.rows, first_row, box * hopper::kBoxDepth, shared.own[box], &shared.own_full);
    }
    int c = 0;
    uint32_t phase = 0;
    for (int64_t tile = tiles.first; tile < tiles.last; ++tile) {
      const int64_t column = tile * Geometry::kColumns + first_column;
      CUTE_NO_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int s = c ^ i;
        const int bytes = i == 0 ? number_bytes(operands, column) : 0;
        uint64_t* const full = &shared.full[c][s];
        Barrier::wait(&shared.empty[c][s], phase ^ 1);  // of the tile there before; at once for the first
        Barrier::arrive_and_expect_tx(full, kSideBoxes * kBoxBytes + bytes);
        if (bytes > 0) hopper::load_bytes(operands.numbers + 4 * column, bytes, shared.numbers[c], full);
        CUTE_NO_UNROLL
        for (int box = 0; box < kSideBoxes; ++box) {
          hopper::load_box(operands.rows, column, (s * kSideBoxes + box) * hopper::kBoxDepth, shared.columns[c][s][box],
                           full);
        }
      }
      phase ^= c, c ^= 1;
    }
  }

  // Consumer

  template <class Consumer>
  __device__ static __forceinline__ void multiply(TileRange tiles, Shared& shared, const Team<Geometry>& team,
                                                  Consumer& consumer) {
    using namespace cute;
    const int t = team.index;
    ProductMma product_mma;
    SumMma sum_mma;
    const auto boxes = make_tensor(make_smem_ptr(reinterpret_cast<Number*>(&shared)), Boxes{});
    const auto quarters = make_tensor(make_smem_ptr(reinterpret_cast<Number*>(shared.columns)), Quarters{});
    const auto any = product_mma.get_slice(0);  // operands in shared memory are the same for every thread
    const auto left = any.make_fragment_A(any.partition_A(boxes));  // (instruction, 1, step, box), and so on
    const auto right = any.make_fragment_B(any.partition_B(boxes));
    const auto any_sum = sum_mma.get_slice(0);
    const auto g = any_sum.make_fragment_A(any_sum.partition_A(boxes));
    const auto columns = any_sum.make_fragment_B(any_sum.partition_B(quarters));

    Fragment<Geometry> products;
    auto product_sums = hopper::accumulators<Geometry>(product_mma, products);
    Fragment<SumGeometry> gradient{};
    auto sums = hopper::accumulators<SumGeometry>(sum_mma, gradient);
    const auto add_products = [&](int s, uint32_t phase) {  // with quarter (t, s)
      Barrier::wait(&shared.full[t][s], phase);
      hopper::begin_products();
      CUTE_UNROLL
      for (int box = 0; box < kSideBoxes; ++box) {
        CUTE_UNROLL
        for (int step = 0; step < size<2>(left); ++step) {
          hopper::multiply(product_mma, left(_, _, step, s * kSideBoxes + box),
                           right(_, _, step, kColumnsBox + (2 * t + s) * kSideBoxes + box), product_sums);
          product_mma.accumulate_ = GMMA::ScaleOut::One;
        }
      }
      hopper::commit_products();
    };
    const auto add_sums = [&](int c, uint32_t phase) {  // with quarter (c, t)
      Barrier::wait(&shared.ready[c], phase);
      Barrier::wait(&shared.full[c][t], phase);
      hopper::begin_products();
      CUTE_UNROLL
      for (int step = 0; step < size<2>(g); ++step) {
        hopper::multiply(sum_mma, g(_, _, step, kGBox + c), columns(_, _, step, 2 * c + t), sums);
      }
      hopper::commit_products();
    };
    const auto release = [&](int c) {
      if (team.thread % 32 == 0) Barrier::arrive(&shared.empty[c][t]);
    };

    Barrier::wait(&shared.own_full, 0);
    uint32_t phase = 0;  // of this team's place; that of the other team's tile before is phase ^ t ^ 1
    int64_t tile = tiles.first + t;
    for (; tile < tiles.last; tile += 2, phase ^= 1) {
      product_mma.accumulate_ = GMMA::ScaleOut::Zero;
      warpgroup_fence_operand(product_sums);
      warpgroup_fence_operand(sums);
      add_products(t, phase);
      const bool follows = tile > tiles.first;
      if (follows) add_sums(1 - t, phase ^ t ^ 1);
      add_products(1 - t, phase);
      hopper::wait_for_products<0>();
      warpgroup_fence_operand(product_sums);
      warpgroup_fence_operand(sums);
      if (follows) release(1 - t);

      consumer.make_g(products, static_cast<int>(tile), team, shared.own_numbers, shared.numbers[t]);
      __syncwarp();  // wgmma is an instruction of whole warps
      hopper::write_box(products, team.thread, shared.g[t]);
      hopper::fence_writes();
      Barrier::arrive(&shared.ready[t]);

      warpgroup_fence_operand(sums);
      add_sums(t, phase);
      hopper::wait_for_products<0>();
      warpgroup_fence_operand(sums);
      release(t);
    }
    if (tile == tiles.last && tiles.first < tiles.last) {  // the last tile was the other team's
      warpgroup_fence_operand(sums);
      add_sums(1 - t, phase ^ t ^ 1);
      hopper::wait_for_products<0>();
      warpgroup_fence_operand(sums);
    }
    consumer.store(gradient, team);
  }

 public:
  // Kernel

  // The gradient of rows from `first_row` on, from the columns of a range of tiles, which start at rows 64 tile +
  // first_column. The consumer has two members:
  //   make_g(products, tile, team, of_rows, of_columns)  turns products into g, which is 0 beyond the last row, with
  //                                                      the operands' numbers of rows and columns
  //   store(sums, team)                                  gets side team.index of the gradient in the end
  // Team t has every second tile, from the first + t on. All threads of the block call it, but only the teams return.
  // `memory` starts at a multiple of 1024 bytes.
  template <class Consumer>
  __device__ static void run(const Operands& operands, int64_t first_row, int64_t first_column, TileRange tiles,
                             char* memory, Consumer& consumer) {
    auto& shared = *reinterpret_cast<Shared*>(memory);
    init_barriers(shared);

    const int team = hopper::team_of_warp(), thread = threadIdx.x % hopper::kTeamThreads;
    if (team == hopper::kTeams) {
      hopper::give_registers<hopper::kLoadRegisters>();
      if (thread == 0) load(operands, first_row, first_column, tiles, shared);
      hopper::exit_thread();
    }
    hopper::take_registers<hopper::kTeamRegisters>();
    multiply(tiles, shared, {team, thread}, consumer);
  }
};

}  // namespace hpk

#endif
