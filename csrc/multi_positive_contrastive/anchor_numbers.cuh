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

// Of the old order (4, anchors).
struct OldAnchorNumbers {
  float log_denominator = 0, push = 0, pull = 0, specific = 0;
};

__device__ __forceinline__ OldAnchorNumbers numbers_of(const float* numbers, int64_t anchors, int64_t anchor) {
  const float* const at = numbers + anchor;
  return {at[0], at[anchors], at[2 * anchors], at[3 * anchors]};
}

}  // namespace hpk
