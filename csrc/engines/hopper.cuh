// What the engines for sm_90a share, and all that they use of Hopper. Matrices come by TMA in boxes: some rows, and 64
// elements of each, the 128 bytes of the swizzle that wgmma reads without bank conflicts. One group of threads loads, two
// teams multiply.
#pragma once

#ifdef HPK_WITH_SM90

#include <cuda.h>

#include <cstring>
#include <type_traits>

#include "engines/team.cuh"

#ifdef HPK_EMULATED
#include "emulation/hopper.h"
#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1  // descriptors get addresses in the emulated shared memory
#else
#include <cute/arch/copy_sm90_tma.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#endif
#include <cute/tensor.hpp>
#include <cute/atom/mma_atom.hpp>

namespace hpk {
namespace hopper {

constexpr int kBoxBytes = 128, kBoxDepth = 64;  // of a row in a box: its bytes and elements
constexpr int kTeams = 2, kTeamThreads = 128, kTeamWarps = kTeamThreads / 32;
constexpr int kThreads = (1 + kTeams) * kTeamThreads;
constexpr int kMostSharedBytes = 227 * 1024;

// A block starts with an equal share of the SM's registers, 168 a thread; the group that loads hands most of its own to
// the teams. It is as large as a team because registers are dealt out to four warps at once. The compiler knows the
// share only if a kernel is declared HPK_KERNEL(kThreads, 1).
constexpr int kLoadRegisters = 24, kTeamRegisters = 240;
static_assert(kLoadRegisters + kTeams * kTeamRegisters == (1 + kTeams) * 168, "not the registers that there are");

#ifndef HPK_EMULATED

// Barriers in shared memory that count arrivals, and bytes that TMA brings:
//   init(barrier, arrivals)
//   arrive(barrier), arrive_and_expect_tx(barrier, bytes)
//   wait(barrier, parity)       until the phase of that parity is over
using Barrier = cutlass::arch::ClusterTransactionBarrier;

// Before others, TMA among them, use the barriers that this thread has initialised.
__device__ __forceinline__ void fence_barriers() { cutlass::arch::fence_barrier_init(); }

// Before wgmma reads what this thread has written to shared memory, or TMA writes where it has read: they do so through
// another proxy. That of CUTLASS lets the compiler move loads and stores across it.
__device__ __forceinline__ void fence_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The threads of a team hand registers back, or get more, until each has kCount.
template <int kCount>
__device__ __forceinline__ void give_registers() {
  cutlass::arch::warpgroup_reg_dealloc<kCount>();
}
template <int kCount>
__device__ __forceinline__ void take_registers() {
  cutlass::arch::warpgroup_reg_alloc<kCount>();
}

// Starts the copy of the box from `row` and `element` on; `barrier` counts its bytes.
__device__ __forceinline__ void load_box(const CUtensorMap& map, int64_t row, int element, void* to,
                                         uint64_t* barrier) {
  constexpr auto kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
  cute::SM90_TMA_LOAD_2D::copy(&map, barrier, kHint, to, element, static_cast<int>(row));
}

// Likewise of so many bytes, a multiple of 16.
__device__ __forceinline__ void load_bytes(const void* from, int bytes, void* to, uint64_t* barrier) {
  cute::SM90_BULK_COPY_G2S::copy(from, barrier, to, bytes);
}

// Products by wgmma of a team: begin_products(), then multiply() as often as one likes, then commit_products(). After
// wait_for_products<n>() all but the latest n of these groups are done: their sums are there, and their operands read.
__device__ __forceinline__ void begin_products() { cute::warpgroup_arrive(); }
__device__ __forceinline__ void commit_products() { cute::warpgroup_commit_batch(); }
template <int kLeft>
__device__ __forceinline__ void wait_for_products() {
  cute::warpgroup_wait<kLeft>();
}

// sums += left times right, or = where mma.accumulate_ says so; the operands are descriptors of shared memory.
template <class Mma, class Left, class Right, class Sums>
__device__ __forceinline__ void multiply(const Mma& mma, const Left& left, const Right& right, Sums& sums) {
  cute::gemm(mma, left, right, sums);
}

// Ends a thread that loads: it has nothing to do in the code that follows, nor the registers for it.
__device__ __forceinline__ void exit_thread() {
  asm volatile("exit;");
  __builtin_unreachable();
}

// The driver's cuTensorMapEncodeTiled. Not linked: a machine without a GPU lacks the driver's library.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  void* function = nullptr;
  auto found = cudaDriverEntryPointSymbolNotFound;
  const auto error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) {
    throw std::runtime_error("hpkernels: the CUDA driver is too old for TMA; it must be of CUDA 12.0 or newer");
  }
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

#else

// As above. The emulator gets what the instructions would: descriptors, and their shape and type.
template <class Mma, class Left, class Right, class Sums>
void multiply(const Mma& mma, const Left& left, const Right& right, Sums& sums) {
  using namespace cute;
  using Traits = typename Mma::Atom::Traits;
  emulation::Wgmma wgmma{};
  wgmma.columns = get<1>(typename Traits::Shape_MNK{});
  wgmma.left_transposed = is_same<typename Traits::FrgTypeA, GMMA::smem_desc<GMMA::Major::MN>>::value;
  wgmma.right_transposed = is_same<typename Traits::FrgTypeB, GMMA::smem_desc<GMMA::Major::MN>>::value;
  wgmma.bfloat16 = is_same<typename Traits::ValTypeA, bfloat16_t>::value;
  wgmma.accumulate = mma.accumulate_ == GMMA::ScaleOut::One;
  for (int n = 0; n < size<1>(right); ++n) {
    for (int m = 0; m < size<1>(left); ++m) {
      wgmma.left = left(0, m);
      wgmma.right = right(0, n);
      emulation::multiply_async(wgmma, &sums(0, m, n));
    }
  }
}

#endif

// Which team a warp belongs to, as a number that the compiler knows to be the same for all of its lanes.
__device__ __forceinline__ int team_of_warp() {
  return __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / kTeamThreads, 0);
}

// CuTe's name of T.
template <class T>
using Number = std::conditional_t<std::is_same<T, __half>::value, cute::half_t, cute::bfloat16_t>;

// Boxes one after another in shared memory as an operand of wgmma: (row, element, box).
template <class T, int kRows, int kBoxes>
using Boxes = decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<Number<T>>{},
                                           cute::Shape<cute::Int<kRows>, cute::Int<kBoxDepth>, cute::Int<kBoxes>>{}));

inline int boxes_across(int dim) { return (dim + kBoxDepth - 1) / kBoxDepth; }

// Where TMA puts an element of a box, in bytes: the eight chunks of 16 bytes of a row are permuted, so that those of
// eight rows are in different banks.
HPK_HOST_DEVICE constexpr int box_offset(int row, int element) {
  return (kBoxBytes * row + 2 * element) ^ (16 * (row % 8));
}

// Whether an operand, (row, element, box) or transposed (element, row, group of boxes), is read as TMA writes it: all
// chunks of the last box tell.
template <int kRows, class Layout>
constexpr bool lies_in_boxes(Layout operand, bool transposed) {
  using namespace cute;
  const int last = size<2>(operand) - 1, before = 2 * size(operand) - kRows * kBoxBytes;
  for (int row = 0; row < kRows; ++row) {
    for (int chunk = 0; chunk < 8; ++chunk) {
      const int element = 8 * chunk + row % 8;
      const int place = transposed ? operand.layout_b()(size<0>(operand) - kBoxDepth + element, row, last)
                                   : operand.layout_b()(row, element, last);
      if (operand.layout_a()(2 * place) != before + box_offset(row, element)) return false;
    }
  }
  return true;
}

// Whether the accumulators of Mma lie in a Fragment as Geometry says. A place is that of the thread plus that of the
// product among the thread's, so that one thread's products and one product of every thread tell.
template <class Geometry, class Mma>
constexpr bool lies_as(Mma mma) {
  using namespace cute;
  const auto tile = make_identity_tensor(Shape<Int<Geometry::kRows>, Int<Geometry::kColumns>>{});
  constexpr int kThread = 1, kParts = 4 * Geometry::kColumnBlocks;
  const auto of_thread = mma.get_slice(kThread).partition_C(tile);
  for (int product = 0; product < kParts * Geometry::kRowBlocks; ++product) {
    const int m = product / kParts, n = product % kParts / 4, part = product % 4;
    const auto place = of_thread(product % kParts, m, 0);
    if (get<0>(place) != Geometry::row(kThread, m, part / 2)) return false;
    if (get<1>(place) != Geometry::column(kThread, n, part % 2)) return false;
  }
  for (int thread = 0; thread < Geometry::kTeamThreads; ++thread) {
    const auto place = mma.get_slice(thread).partition_C(tile)(0, 0, 0);
    if (get<0>(place) != Geometry::row(thread, 0, 0) || get<1>(place) != Geometry::column(thread, 0, 0)) return false;
  }
  return true;
}

// A Fragment as the accumulators of Mma.
template <class Geometry, class Mma>
__device__ __forceinline__ auto accumulators(const Mma& mma, Fragment<Geometry>& fragment) {
  using namespace cute;
  return make_tensor(make_rmem_ptr(&fragment.values[0][0][0]),
                     make_layout(partition_shape_C(mma, Shape<Int<Geometry::kRows>, Int<Geometry::kColumns>>{})));
}

// Writes a team's Fragment of 64 rows and columns to a box, as TMA would have: so it is an operand, after a fence. The
// lanes of a warp write to different banks.
template <class Geometry, class T>
__device__ __forceinline__ void write_box(const Fragment<Geometry>& fragment, int thread, T* box) {
  static_assert(Geometry::kRowBlocks == 1 && Geometry::kColumns == kBoxDepth, "a box has other elements");
#pragma unroll
  for (int n = 0; n < Geometry::kColumnBlocks; ++n) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const T pair[] = {T(fragment.values[0][n][2 * h]), T(fragment.values[0][n][2 * h + 1])};
      const int offset = box_offset(Geometry::row(thread, 0, h), Geometry::column(thread, n, 0));
      char* const at = reinterpret_cast<char*>(box) + offset;
      std::memcpy(__builtin_assume_aligned(at, sizeof pair), pair, sizeof pair);
    }
  }
}

// How a matrix is read in boxes of `box_rows` rows. What lies outside of it is read as 0.
template <class T>
CUtensorMap tensor_map(const Rows<T>& rows, int box_rows) {
  CUtensorMap map{};
  if (rows.count == 0) return map;  // nothing will be read
  static const auto encode = tensor_map_encoder();
  constexpr auto kType = std::is_same<T, __half>::value ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                        : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(rows.dim), static_cast<cuuint64_t>(rows.count)};
  const cuuint64_t stride_bytes[] = {static_cast<cuuint64_t>(rows.stride) * sizeof(T)};
  const cuuint32_t box[] = {kBoxDepth, static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  const CUresult result =
      encode(&map, kType, 2, const_cast<T*>(rows.data), sizes, stride_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("hpkernels: TMA cannot read " + std::to_string(rows.count) + " rows of " +
                             std::to_string(rows.dim) + " elements, " + std::to_string(rows.stride) +
                             " apart: driver error " + std::to_string(result));
  }
  return map;
}

}  // namespace hopper
}  // namespace hpk

#endif
