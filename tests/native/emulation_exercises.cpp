// Kernels with and without mistakes, for test_emulation.py to run on the emulator (csrc/emulation).
#include "common/device.h"
#include "emulation/hopper.h"

namespace {

using namespace hpk;

// "" or what the emulator says about the launch.
template <class... Parameters, class... Arguments>
const char* outcome(void (*kernel)(Parameters...), unsigned blocks, int threads, size_t shared_bytes,
                    const Arguments&... arguments) {
  static std::string error;
  error.clear();
  try {
    launch(kernel, dim3(blocks), threads, shared_bytes, nullptr, arguments...);
  } catch (const std::exception& exception) {
    error = exception.what();
  }
  return error.c_str();
}

// Hands values around the block, to the thread before, `rounds` times.
HPK_KERNEL(256) rotate_kernel(float* values, int rounds, bool after_write, bool after_read) {
  auto* const shared = reinterpret_cast<float*>(shared_memory());
  const unsigned thread = threadIdx.x;
  float value = values[thread];
  for (int round = 0; round < rounds; ++round) {
    shared[thread] = value;
    if (after_write) __syncthreads();
    value = shared[(thread + 1) % blockDim.x];
    if (after_read) __syncthreads();
  }
  values[thread] = value;
}

// Each block reports what it finds in shared memory and leaves a number there.
HPK_KERNEL(32) leave_kernel(float* found) {
  auto* const shared = reinterpret_cast<float*>(shared_memory());
  if (threadIdx.x == 0) found[blockIdx.x] = shared[0];
  __syncwarp();
  shared[0] = 1;
}

// Copies `valid` bytes of 16 twice, in a group each, and writes what is there once at most `left` groups are under way.
HPK_KERNEL(32) copy_kernel(const float* from, float* to, int valid, int offset, int left, bool finish) {
  char* const shared = shared_memory();
  if (threadIdx.x == 0) {
    for (int group = 0; group < 2; ++group) {
      cp_async(shared + 16 * group + offset, from + 4 * group, valid);
      cp_async_commit();
    }
    if (left == 0) cp_async_wait<0>();
    if (left == 1) cp_async_wait<1>();
    for (int i = 0; i < 8; ++i) to[i] = reinterpret_cast<const float*>(shared)[i];
    if (finish) cp_async_wait<0>();
  }
}

// 1: half a warp shuffles, the rest ends; 2: the rest votes; 3: the rest waits for the block; 4: half a warp is named;
// 5: it waits at another barrier than the rest.
HPK_KERNEL(64) diverge_kernel(int way, int* result) {
  const bool low = threadIdx.x % 32 < 16;
  if (way == 5) {
    barrier_sync(low ? 1 : 2, 64);
  } else if (way == 4) {
    *result = __shfl_sync(0x0000FFFFu, 1, 0);
  } else if (low || way == 0) {
    *result = __shfl_sync(0xFFFFFFFFu, 1, 0);
  } else if (way == 2) {
    *result = static_cast<int>(__ballot_sync(0xFFFFFFFFu, 1));
  } else if (way == 3) {
    __syncthreads();
  }
}

// A warp waits with as many threads of another as there are, which wait elsewhere, or at the same barrier if ids agree.
HPK_KERNEL(64) named_kernel(int of_first, int of_second) { barrier_sync(threadIdx.x < 32 ? of_first : of_second, 64); }

// The threads of one of two warps end, the others meet.
HPK_KERNEL(64) exit_kernel(unsigned ending, float* sums) {
  auto* const shared = reinterpret_cast<float*>(shared_memory());
  if (threadIdx.x / 32 == ending) return;
  shared[threadIdx.x % 32] = 1;
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < 32; ++i) sum += shared[i];
  sums[threadIdx.x % 32] = sum;
}

HPK_KERNEL(1024) nothing_kernel() {}

// Four 8 x 8 matrices, of which lane i names row places[i] of `rows`.
HPK_KERNEL(32) load_kernel(const uint16_t* rows, const int* places, bool transposed, uint32_t (*parts)[4]) {
  auto* const shared = reinterpret_cast<uint16_t*>(shared_memory());
  const unsigned lane = threadIdx.x;
  for (int i = 0; i < 8; ++i) shared[8 * lane + i] = rows[8 * lane + i];
  __syncwarp();
  const uint16_t* const row = shared + 8 * places[lane];
  transposed ? load_matrices_transposed(parts[lane], row) : load_matrices(parts[lane], row);
}

template <class T>
HPK_KERNEL(32)
mma_kernel(const uint32_t (*a)[4], const uint32_t (*b)[2], float (*sums)[4]) {
  const unsigned lane = threadIdx.x;
  mma<T>(sums[lane], a[lane], b[lane][0], b[lane][1]);
}

// What one thread does with a barrier, the map of some rows, and shared memory in which the barrier comes first.
enum Step { kInit, kFence, kArrive, kExpect, kWait, kOverwrite, kLoad };

HPK_KERNEL(32) steps_kernel(const __grid_constant__ CUtensorMap map, const int (*steps)[2], int count, int row,
                            int element, char* found, int bytes) {
  if (threadIdx.x != 0) return;
  auto* const barrier = reinterpret_cast<uint64_t*>(shared_memory());
  char* const box = shared_memory() + 1024;
  for (int i = 0; i < count; ++i) {
    const int value = steps[i][1];
    switch (steps[i][0]) {
      case kInit:
        hopper::Barrier::init(barrier, value);
        break;
      case kFence:
        hopper::fence_barriers();
        break;
      case kArrive:
        hopper::Barrier::arrive(barrier);
        break;
      case kExpect:
        hopper::Barrier::arrive_and_expect_tx(barrier, value);
        break;
      case kWait:
        hopper::Barrier::wait(barrier, value);
        break;
      case kOverwrite:
        *barrier = 0;
        break;
      case kLoad:
        hopper::load_box(map, row, element, box + value, barrier);
    }
  }
  std::memcpy(found, box, bytes);
}

// What one warp group does with shared memory and a product, or leaves out, or does wrong.
enum Way { kRight, kNoFence, kNoBegin, kNoCommit, kNoWait, kOtherWarp, kOtherLane, kOverwritten, kTouched };

HPK_KERNEL(128) wgmma_kernel(const char* operands, int bytes, emulation::Wgmma wgmma, int way, float (*sums)[128]) {
  const unsigned thread = threadIdx.x;
  float own[128];
  for (int i = 0; i < wgmma.columns / 2; ++i) own[i] = sums[thread][i];
  for (int i = thread; i < bytes; i += 128) shared_memory()[i] = operands[i];
  if (way != kNoFence) hopper::fence_writes();
  __syncthreads();
  if (way != kNoBegin) hopper::begin_products();
  if ((way == kOtherWarp && thread / 32 == 2) || (way == kOtherLane && thread == 37)) wgmma.left += 1;
  emulation::multiply_async(wgmma, own);
  if (way != kNoCommit) hopper::commit_products();
  if (way == kOverwritten) {
    __syncthreads();
    for (int i = thread; i < bytes; i += 128) shared_memory()[i] = 0;
    hopper::fence_writes();
  }
  if (way == kTouched && thread == 5) own[1] = 2;
  if (way != kNoWait) hopper::wait_for_products<0>();
  for (int i = 0; i < wgmma.columns / 2; ++i) sums[thread][i] = own[i];
}

// The first of three warp groups gives registers, until its threads have `given`; the others take.
HPK_KERNEL(384) registers_kernel(int given, int taken) {
  const bool gives = threadIdx.x < 128;
  emulation::set_registers(gives ? given : taken, !gives);
}

}  // namespace

extern "C" {

const char* steps(const int (*steps)[2], int count, const uint16_t* data, const int64_t* shape, int row, int element,
                  char* found, int bytes) {
  CUtensorMap map{};
  const cuuint64_t sizes[] = {cuuint64_t(shape[1]), cuuint64_t(shape[0])}, strides[] = {cuuint64_t(shape[2])};
  const cuuint32_t box[] = {64, cuuint32_t(shape[3])}, apart[] = {1, 1};
  const CUresult result = hopper::tensor_map_encoder()(
      &map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<uint16_t*>(data), sizes, strides, box, apart,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) return "no tensor map";
  return outcome(steps_kernel, 1, 32, 64 * 1024, map, steps, count, row, element, found, bytes);
}
const char* wgmma(const char* operands, int bytes, uint64_t left, uint64_t right, int columns, bool left_transposed,
                  bool right_transposed, bool bfloat16, bool accumulate, int way, float (*sums)[128]) {
  const emulation::Wgmma wgmma{left, right, columns, left_transposed, right_transposed, bfloat16, accumulate};
  return outcome(wgmma_kernel, 1, 128, bytes, operands, bytes, wgmma, way, sums);
}
const char* registers(int given, int taken) { return outcome(registers_kernel, 1, 384, 0, given, taken); }

const char* rotate(float* values, int threads, int rounds, bool after_write, bool after_read) {
  return outcome(rotate_kernel, 1, threads, threads * sizeof(float), values, rounds, after_write, after_read);
}
const char* leave(float* found, int blocks) { return outcome(leave_kernel, blocks, 32, 4, found); }
const char* copy(const float* from, float* to, int valid, int offset, int left, bool finish) {
  return outcome(copy_kernel, 1, 32, 64, from, to, valid, offset, left, finish);
}
const char* diverge(int way) {
  int result;
  return outcome(diverge_kernel, 1, 64, 0, way, &result);
}
const char* named(int of_first, int of_second) { return outcome(named_kernel, 1, 64, 0, of_first, of_second); }
const char* some_exit(int ending, float* sums) { return outcome(exit_kernel, 1, 64, 128, ending, sums); }
const char* nothing(int blocks, int threads, int shared_bytes) {
  return outcome(nothing_kernel, blocks, threads, shared_bytes);
}
const char* load(const uint16_t* rows, const int* places, bool transposed, uint32_t (*parts)[4]) {
  return outcome(load_kernel, 1, 32, 512, rows, places, transposed, parts);
}
void multiply_float16(const uint32_t (*a)[4], const uint32_t (*b)[2], float (*sums)[4]) {
  outcome(mma_kernel<__half>, 1, 32, 0, a, b, sums);
}
void multiply_bfloat16(const uint32_t (*a)[4], const uint32_t (*b)[2], float (*sums)[4]) {
  outcome(mma_kernel<__nv_bfloat16>, 1, 32, 0, a, b, sums);
}
void multiply_float32(const uint32_t (*a)[4], const uint32_t (*b)[2], float (*sums)[4]) {
  outcome(mma_kernel<float>, 1, 32, 0, a, b, sums);
}
}
