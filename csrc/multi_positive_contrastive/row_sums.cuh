// What forward knows of each row of a strip of anchors, and how the threads that share a row put it together.
#pragma once

#include "common/warp.cuh"
#include "multi_positive_contrastive/log_sum.h"

namespace hpk {

// Over the pairs of a row that have been seen: log sum over Den of exp of the logits; pairs in A and S, and their logits.
struct RowSums {
  static constexpr int kNumbers = 6;

  LogSum log_sum;
  float agnostic_count = 0, specific_count = 0, agnostic_sum = 0, specific_sum = 0;

  HPK_HOST_DEVICE void add(const RowSums& other) {
    log_sum.add(other.log_sum);
    agnostic_count += other.agnostic_count;
    specific_count += other.specific_count;
    agnostic_sum += other.agnostic_sum;
    specific_sum += other.specific_sum;
  }
};

// The sums of the rows of a strip, in a fixed order: over the four lanes that share a row, then over the warps that do,
// then over the teams. finish(r, sums) is called for each row. `shared` is memory that nobody uses any more, for a
// RowSums of each row, warp across and team.
template <class Geometry, class Finish>
__device__ void combine_rows(RowSums (&sums)[Geometry::kRowBlocks][2], char* shared, const Finish& finish) {
  constexpr int kParts = Geometry::kTeams * Geometry::kWarpsAcross, kThreads = Geometry::kTeams * Geometry::kTeamThreads;
  auto* const parts = reinterpret_cast<RowSums(*)[kParts]>(shared);
  const int thread = threadIdx.x % Geometry::kTeamThreads, team = threadIdx.x / Geometry::kTeamThreads;
  const int part = team * Geometry::kWarpsAcross + thread / 32 % Geometry::kWarpsAcross;
  sync_teams<Geometry>();
#pragma unroll
  for (int m = 0; m < Geometry::kRowBlocks; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      RowSums& own = sums[m][h];
#pragma unroll
      for (int width = 1; width < 4; width *= 2) {
        const RowSums other{{__shfl_xor_sync(kAllLanes, own.log_sum.greatest, width),
                             __shfl_xor_sync(kAllLanes, own.log_sum.total, width)},
                            __shfl_xor_sync(kAllLanes, own.agnostic_count, width),
                            __shfl_xor_sync(kAllLanes, own.specific_count, width),
                            __shfl_xor_sync(kAllLanes, own.agnostic_sum, width),
                            __shfl_xor_sync(kAllLanes, own.specific_sum, width)};
        own.add(other);
      }
      if (thread % 4 == 0) parts[Geometry::row(thread, m, h)][part] = own;
    }
  }
  sync_teams<Geometry>();
  for (int row = threadIdx.x; row < Geometry::kRows; row += kThreads) {
    RowSums all = parts[row][0];
    for (int i = 1; i < kParts; ++i) all.add(parts[row][i]);
    finish(row, all);
  }
}

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
