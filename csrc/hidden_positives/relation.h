// When two anchors are positives of each other.
#pragma once

#include "common/portable.h"

namespace hpk {

// The smaller of two thresholds, or NaN if either is: a pair that cannot be judged is no positive.
template <typename T>
HPK_HOST_DEVICE T smaller(T a, T b) {
  return a < b || a != a ? a : b;
}

}  // namespace hpk
