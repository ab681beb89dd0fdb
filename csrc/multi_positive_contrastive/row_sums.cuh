// What forward knows of each row of a strip of anchors, and exponentials of logits.
#pragma once

#include "common/device.h"
#include "multi_positive_contrastive/log_sum.h"

namespace hpk {

constexpr float kLog2OfE = 1.44269504f;  // 2^x takes fewer instructions than e^x

// exp(scale product - shift). Logits are rounded before a shift is subtracted, in forward and in backward alike: so the
// probabilities of a row sum to 1 however large its logits are.
__device__ __forceinline__ float exp_of_difference(float scale, float product, float shift) {
  return exp2_of(kLog2OfE * (__fmul_rn(scale, product) - shift));
}

// Over the pairs of a row that have been seen: log sum over Den of exp of the logits, and sums of those in A and in S.
struct RowSums {
  LogSum log_sum;
  float agnostic_sum = 0, specific_sum = 0;

  HPK_HOST_DEVICE void add(const RowSums& other) {
    log_sum.add(other.log_sum);
    agnostic_sum += other.agnostic_sum;
    specific_sum += other.specific_sum;
  }
};

// Adds the logits of a thread's columns in one row, of those that `included` has, to their log sum.
template <int kColumnBlocks>
__device__ __forceinline__ void add_logits(LogSum& log_sum, const float (&logits)[kColumnBlocks][2],
                                           const bool (&included)[kColumnBlocks][2]) {
  float greatest = log_sum.greatest;
#pragma unroll
  for (int n = 0; n < kColumnBlocks; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) greatest = included[n][c] ? fmaxf(greatest, logits[n][c]) : greatest;
  }
  const float base = greatest == kLogOfNothing ? 0 : greatest;
  float total = log_sum.total * exp_of(log_sum.greatest - base);
#pragma unroll
  for (int n = 0; n < kColumnBlocks; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) total += included[n][c] ? exp_of(logits[n][c] - base) : 0;
  }
  log_sum = {greatest, total};
}

}  // namespace hpk
