// TMA, barriers that count bytes, wgmma and setmaxnreg of sm_90a on the CPU, for the engines of common/*_sm90.cuh.
//
//   - Copies by TMA and products by wgmma end at random times, in random order, and cp.async of a warp takes its time;
//     HPKERNELS_EMULATION_SEED chooses others. Until then what they write is NaN.
//   - Products are made from the descriptors that the instructions would get.
//   - wgmma reads shared memory as it was at the last fence_writes(), but for what TMA has brought since.
//   - What the hardware forbids is an error, and so is a deadlock.
//
// HPKERNELS_EMULATION_FAULT=NAME:NUMBER makes one primitive wrong, so that tests see whether that shows. NUMBER is that of a
// barrier, in the order in which a block initialises them, or 0 where the fault is not one of a barrier:
//   no_wait, other_phase        waits return at once, or wait for the other parity
//   no_arrival, two_arrivals    arrivals do not count, or count twice
//   fewer_bytes, more_bytes     16 bytes fewer, or more, are expected
//   no_barrier_fence, no_write_fence, one_write_fence   fences do nothing, or only the first thread of a group has one
//   no_swizzle                  TMA writes rows as they are
//   left_stride, right_stride, right_leading, right_start   of descriptors: an offset is doubled, the start 32 bytes on
//   not_transposed              the left operand is read as if it were not
//   no_begin, no_commit, no_wait_for_products               these do nothing
//   early_release               waits that leave products under way leave one group more
#pragma once

#include <cuda.h>

#include "common/device.h"

namespace hpk {
namespace emulation {

// The address in the window of shared memory.
uint32_t shared_address(const void* pointer);

// One wgmma.mma_async of 64 rows, `columns` columns and 16 elements: the descriptors of its operands and what else the
// instruction says. Rows are K-major unless they are transposed.
struct Wgmma {
  uint64_t left, right;
  int columns;
  bool left_transposed, right_transposed, bfloat16, accumulate;

  bool operator==(const Wgmma& other) const {
    return left == other.left && right == other.right && columns == other.columns &&
           left_transposed == other.left_transposed && right_transposed == other.right_transposed &&
           bfloat16 == other.bfloat16 && accumulate == other.accumulate;
  }
};

// Called by all threads of a warp group; `sums` are the columns / 2 accumulators of the thread.
void multiply_async(const Wgmma& wgmma, float* sums);
void wait_for_products(int left);
void set_registers(int count, bool more);

// Has the signature of the driver's cuTensorMapEncodeTiled.
CUresult encode_tensor_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                           const cuuint64_t* sizes, const cuuint64_t* stride_bytes, const cuuint32_t* box,
                           const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                           CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill);

}  // namespace emulation

// For what they stand see engines/hopper.cuh.
namespace hopper {

struct Barrier {
  static void init(uint64_t* barrier, uint32_t arrivals);
  static void arrive(uint64_t* barrier);
  static void arrive_and_expect_tx(uint64_t* barrier, uint32_t bytes);
  static void wait(uint64_t* barrier, uint32_t parity);
};

void fence_barriers();
void fence_writes();
void load_box(const CUtensorMap& map, int64_t row, int element, void* to, uint64_t* barrier);
void load_bytes(const void* from, int bytes, void* to, uint64_t* barrier);
void begin_products();
void commit_products();
[[noreturn]] void exit_thread();

template <int kLeft>
void wait_for_products() {
  emulation::wait_for_products(kLeft);
}
template <int kCount>
void give_registers() {
  emulation::set_registers(kCount, false);
}
template <int kCount>
void take_registers() {
  emulation::set_registers(kCount, true);
}

inline auto tensor_map_encoder() { return &emulation::encode_tensor_map; }

}  // namespace hopper
}  // namespace hpk

inline size_t __cvta_generic_to_shared(const void* pointer) { return hpk::emulation::shared_address(pointer); }
