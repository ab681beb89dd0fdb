// The log of a sum of exponentials, a term at a time.
#pragma once

#include <cmath>
#include <limits>

#include "common/portable.h"

namespace hpk {

constexpr float kLogOfNothing = -std::numeric_limits<float>::infinity();

// exp(x), whose relative error grows with |x|: 2e-7 at 1, 2e-6 at 30.
HPK_HOST_DEVICE float exp_of(float x) {
#ifdef __CUDA_ARCH__
  return __expf(x);
#else
  return std::exp(x);
#endif
}

// The greatest logit, and the sum of exp(logit - greatest): rows of z may have any length. A logit of NaN stays.
struct LogSum {
  float greatest = kLogOfNothing, total = 0;

  HPK_HOST_DEVICE void add(float logit) { add({logit, 1}); }

  HPK_HOST_DEVICE void add(const LogSum& other) {
    const float raised = fmaxf(greatest, other.greatest);
    const float base = raised == kLogOfNothing ? 0 : raised;
    total = total * expf(greatest - base) + other.total * expf(other.greatest - base);
    greatest = raised;
  }

  HPK_HOST_DEVICE float value() const { return greatest + logf(total); }
};

}  // namespace hpk
