// Products of 64 rows i with any number of columns j, by cp.async and wgmma: sm_90a, 16-bit rows of up to 512 elements;
// i and j may be any rows. And sums of rows weighted by a function of the products, for both factors:
//
//   gradient_i = sum over j of g_ij z_j,  gradient_j = sum over i of g_ij z_i,  g_ij = g(<z_i, z_j>)
//
// The 64 rows stay in shared memory, and columns come in tiles of 128. A tile has four quarters: half c of its
// columns, 64, times side s of their elements, half of a row. A warp of its own gathers each quarter. Team t makes
// the products of half t, from quarters (t, 0) and (t, 1); and, for gradients, g of it, which it writes to shared
// memory as an operand, to be read as it lies for gradient_i, and transposed for gradient_j. Then, for either half c,
// it adds g of half c times quarter (c, t) to its side of gradient_i, and makes side t of gradient_j of half c from
// the rows, 64 elements at a time. So a tile takes three products, and each of its rows is read once.
//
//   own_full     the rows are there
//   full[c][s]   the quarter is there
//   ready[c]     g of half c is
//   empty[c][s]  the quarter has been read: by team c, or with gradients by team s, which read it after ready[c], hence
//                after team c
//   done[c]      g of half c has been read by both teams
#pragma once

#ifdef HPK_WITH_SM90

#include <cstring>

#include "common/schedule.h"
#include "engines/hopper.cuh"

namespace hpk {

// kDim is the length of a row, rounded up.
template <class T, int kDim>
struct GatheredSm90 {
  // Types

  static_assert(kDim == 128 || kDim == 256 || kDim == 512, "lanes share rows evenly");
  static_assert(kDim * int{sizeof(T)} <= kMostSm90Bytes, "longer than the rows that come here");
  using Element = T;
  // Of products, of g and of 64 elements of gradient_j.
  struct Geometry : GradientGeometry90<64> {
    static constexpr int kWarpsAcross = 1;
  };
  using SumGeometry = GradientGeometry90<kDim / 2>;  // of a side of gradient_i
  using Columns = int32_t[Geometry::kColumnBlocks][2];
  static constexpr int kThreads = hopper::kThreads;
  static constexpr int kRows = Geometry::kRows, kHalfColumns = Geometry::kColumns, kTileColumns = 2 * kHalfColumns;

 private:
  using Number = hopper::Number<T>;
  static constexpr int kBoxes = kDim / hopper::kBoxDepth, kSideBoxes = kBoxes / 2;
  static constexpr int kBoxElements = kRows * hopper::kBoxDepth;

  // Everything in boxes, and transposed, with elements for rows; and the quarters transposed.
  using Boxes = hopper::Boxes<T, kRows, 3 * kBoxes + 2>;
  using Transposed = decltype(cute::tile_to_shape(cute::GMMA::Layout_MN_SW128_Atom<Number>{},
                                                  cute::Shape<cute::_64, cute::_64, cute::Int<3 * kBoxes + 2>>{}));
  using Quarters = decltype(cute::tile_to_shape(cute::GMMA::Layout_MN_SW128_Atom<Number>{},
                                                cute::Shape<cute::Int<kDim / 2>, cute::_64, cute::_4>{},
                                                cute::Step<cute::_2, cute::_1, cute::_3>{}));
  template <int kColumns, cute::GMMA::Major left, cute::GMMA::Major right>
  using Mma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Number, Number, float, cute::Shape<cute::_64, cute::Int<kColumns>, cute::_64>, left,
                                 right>()));
  using ProductMma = Mma<kHalfColumns, cute::GMMA::Major::K, cute::GMMA::Major::K>;
  using SumMma = Mma<kDim / 2, cute::GMMA::Major::K, cute::GMMA::Major::MN>;
  using ColumnMma = Mma<hopper::kBoxDepth, cute::GMMA::Major::MN, cute::GMMA::Major::MN>;
  static_assert(hopper::lies_in_boxes<kRows>(Boxes{}, false), "rows lie otherwise");
  static_assert(hopper::lies_in_boxes<kRows>(Transposed{}, true), "transposed rows lie otherwise");
  static_assert(hopper::lies_in_boxes<kHalfColumns>(Quarters{}, true), "columns lie otherwise");
  static_assert(hopper::lies_as<Geometry>(ProductMma{}), "products lie otherwise");
  static_assert(hopper::lies_as<SumGeometry>(SumMma{}), "sums lie otherwise");
  static_assert(hopper::lies_as<Geometry>(ColumnMma{}), "gradients of columns lie otherwise");

  // Shared memory

  struct Shared {
    T own[kBoxes][kBoxElements];
    T columns[2][2][kSideBoxes][kBoxElements];
    T g[2][kBoxElements];
    int32_t names[2][2][kHalfColumns];  // right_row of the columns of each quarter
    uint64_t own_full, full[2][2], ready[2], empty[2][2], done[2];
  };
  static constexpr int kColumnsBox = kBoxes, kGBox = 3 * kBoxes;  // where columns and g start
  static_assert(sizeof(Shared) <= hopper::kMostSharedBytes, "more shared memory than there is");

 public:
  static constexpr size_t shared_bytes() { return sizeof(Shared); }

 private:
  // Barriers

  using Barrier = hopper::Barrier;

  // Every thread of the block calls it.
  __device__ static __forceinline__ void init_barriers(Shared& shared) {
    if (threadIdx.x == 0) {
      Barrier::init(&shared.own_full, hopper::kTeamThreads);
      for (int c = 0; c < 2; ++c) {
        Barrier::init(&shared.ready[c], hopper::kTeamThreads);
        Barrier::init(&shared.done[c], hopper::kTeams * hopper::kTeamWarps);
        for (int s = 0; s < 2; ++s) {
          Barrier::init(&shared.full[c][s], 32);
          Barrier::init(&shared.empty[c][s], hopper::kTeamWarps);
        }
      }
      hopper::fence_barriers();
    }
    __syncthreads();
  }

  // Registers

  static constexpr int kGatherRegisters = 40, kMultiplyRegisters = 232;

  // Producer

  // What a warp copies of a side of rows: a lane has one chunk of 16 bytes of every kApart-th row. Row r goes to the
  // boxes from `boxes` on; what is not there becomes 0.
  struct Copier {
    static constexpr int kChunks = kSideBoxes * hopper::kBoxBytes / 16, kApart = 32 / kChunks;
    static_assert(kApart * kChunks == 32, "a row is shared by a part of a warp");

    const char* from;
    uint32_t stride_bytes;
    bool inside;
    int chunk, first;

    __device__ __forceinline__ Copier(const Rows<T>& rows, int side, int lane)
        : stride_bytes(static_cast<uint32_t>(rows.stride * sizeof(T))), chunk(lane % kChunks), first(lane / kChunks) {
      const int element = side * (kDim / 2) + chunk * (16 / static_cast<int>(sizeof(T)));
      inside = element < rows.dim;
      from = reinterpret_cast<const char*>(rows.data + (inside ? element : 0));
    }

    __device__ __forceinline__ void copy(int source, int row, T (*boxes)[kBoxElements]) const {
      char* const box = reinterpret_cast<char*>(boxes[chunk / 8]);
      const auto offset = static_cast<uint64_t>(static_cast<uint32_t>(source < 0 ? 0 : source)) * stride_bytes;
      cp_async(box + hopper::box_offset(row, chunk % 8 * 8), from + offset, inside && source >= 0 ? 16 : 0);
    }
  };

  // Warp w brings quarter (w / 2, w % 2) of each tile, and half of a side of the rows. cp.async writes as threads do:
  // wgmma sees it after a fence.
  template <class LeftRow, class RightRow>
  __device__ static __forceinline__ void gather(const Rows<T>& rows, const LeftRow& left_row, const RightRow& right_row,
                                                int tiles, int thread, Shared& shared) {
    const int warp = thread / 32, lane = thread % 32, c = warp / 2, s = warp % 2;
    const Copier copier(rows, s, lane);
#pragma unroll 2
    for (int r = copier.first; r < kRows / 2; r += Copier::kApart) {
      const int row = c * (kRows / 2) + r;
      copier.copy(left_row(row), row, shared.own + s * kSideBoxes);
    }
    int32_t* const names = shared.names[c][s];
    for (int tile = 0; tile < tiles; ++tile) {
      const int first = tile * kTileColumns + c * kHalfColumns + lane;
      const int32_t found[] = {right_row(first), right_row(first + 32)};
      Barrier::wait(&shared.empty[c][s], tile % 2 ^ 1);  // of the tile before; at once for the first
      names[lane] = found[0];
      names[lane + 32] = found[1];
      __syncwarp();
#pragma unroll 4
      for (int r = copier.first; r < kHalfColumns; r += Copier::kApart) copier.copy(names[r], r, shared.columns[c][s]);
      cp_async_commit();
      cp_async_wait<0>();
      hopper::fence_writes();
      if (tile == 0) Barrier::arrive(&shared.own_full);
      Barrier::arrive(&shared.full[c][s]);
    }
  }

  // Consumer

  template <bool kGradients, class Consumer>
  __device__ static __forceinline__ void multiply(int tiles, Shared& shared, const Team<Geometry>& team,
                                                  Consumer& consumer) {
    using namespace cute;
    const int t = team.index;
    ProductMma product_mma;
    SumMma sum_mma;
    ColumnMma column_mma;
    auto* const start = reinterpret_cast<Number*>(&shared);
    const auto boxes = make_tensor(make_smem_ptr(start), Boxes{});
    const auto transposed = make_tensor(make_smem_ptr(start), Transposed{});
    const auto quarters = make_tensor(make_smem_ptr(reinterpret_cast<Number*>(shared.columns)), Quarters{});
    const auto any = product_mma.get_slice(0);  // operands in shared memory are the same for every thread
    const auto left = any.make_fragment_A(any.partition_A(boxes));  // (instruction, 1, step, box), and so on
    const auto right = any.make_fragment_B(any.partition_B(boxes));
    const auto any_sum = sum_mma.get_slice(0);
    const auto g = any_sum.make_fragment_A(any_sum.partition_A(boxes));
    const auto columns = any_sum.make_fragment_B(any_sum.partition_B(quarters));
    const auto any_column = column_mma.get_slice(0);
    const auto g_transposed = any_column.make_fragment_A(any_column.partition_A(transposed));
    const auto own = any_column.make_fragment_B(any_column.partition_B(transposed));
    const auto arrive = [&](uint64_t& barrier) {
      if (team.thread % 32 == 0) Barrier::arrive(&barrier);
    };

    Fragment<SumGeometry> gradient{};
    auto sums = hopper::accumulators<SumGeometry>(sum_mma, gradient);
    Barrier::wait(&shared.own_full, 0);
    for (int tile = 0; tile < tiles; ++tile) {
      const uint32_t phase = tile % 2;
      Fragment<Geometry> products;
      auto product_sums = hopper::accumulators<Geometry>(product_mma, products);
      product_mma.accumulate_ = GMMA::ScaleOut::Zero;
      warpgroup_fence_operand(product_sums);
      CUTE_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int s = t ^ i;  // the side that this team has given back first comes first
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
      }
      Columns names;
#pragma unroll
      for (int n = 0; n < Geometry::kColumnBlocks; ++n) {
        std::memcpy(names[n], shared.names[t][0] + Geometry::column(team.thread, n, 0), sizeof names[n]);
      }
      hopper::wait_for_products<0>();
      warpgroup_fence_operand(product_sums);
      if constexpr (!kGradients) {
        for (int s = 0; s < 2; ++s) arrive(shared.empty[t][s]);
        consumer.add(products, names, team);
        __syncwarp();
      } else {
        consumer.make_g(products, names, team);
        Barrier::wait(&shared.done[t], phase ^ 1);  // of the tile before; at once for the first
        __syncwarp();  // wgmma is an instruction of whole warps
        hopper::write_box(products, team.thread, shared.g[t]);
        hopper::fence_writes();
        Barrier::arrive(&shared.ready[t]);

        CUTE_NO_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int c = t ^ i;
          Barrier::wait(&shared.ready[c], phase);
          Barrier::wait(&shared.full[c][t], phase);
          warpgroup_fence_operand(sums);
          hopper::begin_products();
          CUTE_UNROLL
          for (int step = 0; step < size<2>(g); ++step) {
            hopper::multiply(sum_mma, g(_, _, step, kGBox + c), columns(_, _, step, 2 * c + t), sums);
          }
          hopper::commit_products();
          CUTE_NO_UNROLL
          for (int box = 0; box < kSideBoxes; ++box) {
            auto of_columns = hopper::accumulators<Geometry>(column_mma, products);
            column_mma.accumulate_ = GMMA::ScaleOut::Zero;
            warpgroup_fence_operand(of_columns);
            hopper::begin_products();
            CUTE_UNROLL
            for (int step = 0; step < size<2>(own); ++step) {
              hopper::multiply(column_mma, g_transposed(_, _, step, kGBox + c), own(_, _, step, t * kSideBoxes + box),
                               of_columns);
              column_mma.accumulate_ = GMMA::ScaleOut::One;
            }
            hopper::commit_products();
            hopper::wait_for_products<0>();
            warpgroup_fence_operand(of_columns);
            if (box == 0) arrive(shared.empty[c][t]);
            if (box == kSideBoxes - 1) arrive(shared.done[c]);
            consumer.store_columns(products, 2 * tile + c, (t * kSideBoxes + box) * hopper::kBoxDepth, team);
            __syncwarp();
          }
          warpgroup_fence_operand(sums);
        }
      }
    }
    if constexpr (kGradients) consumer.store(gradient, team);
  }

 public:
  // Kernel

  // `rows` with left_row(r) for row i and right_row(j) for column j, or -1 for none, and so many columns, at least one.
  // The consumer has a member, or for gradients three; half h has the columns from 64 h on.
  //   add(products, columns, team)               gets the products of a half, and right_row of the thread's columns
  //   make_g(products, columns, team)            turns them into g, which is 0 where there is no row
  //   store_columns(sums, half, element, team)   gets 64 elements of gradient_j: j by row
  //   store(sums, team)                          gets side team.index of gradient_i in the end
  // All threads of the block call it, but only the teams return. `memory` starts at a multiple of 1024 bytes.
  template <bool kGradients, class LeftRow, class RightRow, class Consumer>
  __device__ static void run(const Rows<T>& rows, const LeftRow& left_row, const RightRow& right_row, int columns,
                             char* memory, Consumer& consumer) {
    auto& shared = *reinterpret_cast<Shared*>(memory);
    init_barriers(shared);

    const int team = hopper::team_of_warp(), thread = threadIdx.x % hopper::kTeamThreads;
    const int tiles = (columns + kTileColumns - 1) / kTileColumns;
    if (team == hopper::kTeams) {
      hopper::give_registers<kGatherRegisters>();
      gather(rows, left_row, right_row, tiles, thread, shared);
      hopper::exit_thread();
    }
    hopper::take_registers<kMultiplyRegisters>();
    multiply<kGradients>(tiles, shared, {team, thread}, consumer);
  }
};

}  // namespace hpk

#endif
