// Kernels with and without mistakes, for test_emulation.py to run on the emulator (csrc/emulation).
#include "common/device.h"

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

// 1: half a warp shuffles, the rest ends; 2: the rest votes; 3: the rest waits for the block; 4: half a warp is named.
HPK_KERNEL(64) diverge_kernel(int way, int* result) {
  const bool low = threadIdx.x % 32 < 16;
  if (way == 4) {
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

}  // namespace

extern "C" {

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
