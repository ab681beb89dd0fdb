// What the kernels know of an anchor, its sums in forward and its numbers in backward, and exponentials of its logits.
#pragma once

#include "common/device.h"
#include "common/exponential.h"

namespace hpk {

constexpr float kLog2OfE = 1.44269504f;  // 2^x takes fewer instructions than e^x

// exp(scale product - shift). Logits are rounded before a shift is subtracted, in forward and in backward alike: so the
// probabilities of a row sum to 1 however large its logits are.
__device__ __forceinline__ float exp_of_difference(float scale, float product, float shift) {
  return exp2_of(kLog2OfE * (__fmul_rn(scale, product) - shift));
}

// Forward, over the pairs of an anchor that have been seen: log sum over Den of exp of the logits, and sums of those in
// A and in S.
struct RowSums {
  LogSum log_sum;
  float agnostic = 0, specific = 0;

  HPK_HOST_DEVICE void add(const RowSums& other) {
    log_sum.add(other.log_sum);
    agnostic += other.agnostic;
    specific += other.specific;
  }
};

// Backward: push exp(l - logDen) is factor exp(l - shift).
struct alignas(16) AnchorNumbers {
  float shift, factor, pull, specific;
};

// Those of an anchor, from `numbers` (anchors, 4).
__device__ __forceinline__ AnchorNumbers numbers_of(const float* numbers, int64_t anchor) {
  return *reinterpret_cast<const AnchorNumbers*>(numbers + 4 * anchor);
}

}  // namespace hpk
