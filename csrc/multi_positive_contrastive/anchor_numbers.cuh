// What backward knows of an anchor.
#pragma once

#include "common/device.h"

namespace hpk {

// push exp(l - logDen) is factor exp(l - shift).
struct alignas(16) AnchorNumbers {
  float shift, factor, pull, specific;
};

// Those of an anchor, from `numbers` (anchors, 4).
__device__ __forceinline__ AnchorNumbers numbers_of(const float* numbers, int64_t anchor) {
  return *reinterpret_cast<const AnchorNumbers*>(numbers + 4 * anchor);
}

}  // namespace hpk
