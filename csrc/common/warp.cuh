// What the 32 lanes of a warp find out together, all of them active.
#pragma once

#include <cstring>

#include "common/device.h"

namespace hpk {

constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

// The value of the lane whose number differs by the bits of `other`.
template <class Row>
__device__ __forceinline__ Row exchanged(const Row& own, int other) {
  static_assert(sizeof(Row) % 4 == 0, "32 bits are exchanged at a time");
  uint32_t words[sizeof(Row) / 4];
  std::memcpy(words, static_cast<const void*>(&own), sizeof words);
#pragma unroll
  for (uint32_t& word : words) word = __shfl_xor_sync(kAllLanes, word, other);
  Row result;
  std::memcpy(static_cast<void*>(&result), words, sizeof words);
  return result;
}

// The sum of the lanes' values, in a fixed order.
template <class T>
__device__ __forceinline__ T sum_over_lanes(T value) {
#pragma unroll
  for (int width = 16; width > 0; width /= 2) value += __shfl_xor_sync(kAllLanes, value, width);
  return value;
}

// The sums over the lanes of kCount numbers each: a lane gets that of values[lane / (32 / kCount)]. As long as there are
// several, lanes exchange halves of them: kCount - 1 shuffles, and one for each further halving of the warp.
template <int kCount>
__device__ __forceinline__ float sum_each_over_lanes(float (&values)[kCount]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int left = kCount / 2, width = 16; width > 0; left /= 2, width /= 2) {
    if (left == 0) values[0] += __shfl_xor_sync(kAllLanes, values[0], width);
#pragma unroll
    for (int i = 0; i < left; ++i) {
      const float sent = lane & width ? values[i] : values[i + left];
      const float kept = lane & width ? values[i + left] : values[i];
      values[i] = kept + __shfl_xor_sync(kAllLanes, sent, width);
    }
  }
  return values[0];
}

// The sum of the values of the lanes up to and with this one.
template <class T>
__device__ __forceinline__ T running_sum_over_lanes(T value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int width = 1; width < 32; width *= 2) {
    const T before = __shfl_up_sync(kAllLanes, value, width);
    if (lane >= width) value += before;
  }
  return value;
}

// Lane i holds row i of a 32 x 32 block of bits, and gets its column i: halves are exchanged at ever smaller scales.
__device__ __forceinline__ uint32_t transpose_over_lanes(uint32_t row) {
  const int lane = threadIdx.x % 32;
  uint32_t low_half = 0x0000FFFFu;
#pragma unroll
  for (int width = 16; width != 0; width /= 2, low_half ^= low_half << width) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, row, width);
    row = lane & width ? (row & ~low_half) | ((other >> width) & low_half)
                       : (row & low_half) | ((other << width) & ~low_half);
  }
  return row;
}

}  // namespace hpk
