// What backward knows of an anchor.
#pragma once

#include "common/device.h"

namespace hpk {

// 0 for what is no anchor: no push, no pull.
struct AnchorNumbers {
  float log_denominator = 0, push = 0, pull = 0, specific = 0;
};

// Those of an anchor, from `numbers` (4, anchors).
__device__ __forceinline__ AnchorNumbers numbers_of(const float* numbers, int64_t anchors, int64_t anchor) {
  const float* const at = numbers + anchor;
  return {at[0], at[anchors], at[2 * anchors], at[3 * anchors]};
}

}  // namespace hpk
