// Exact quantiles of numbers that many threads hold between them: order statistics by bisection, which asks no more of
// the numbers than how many of them are at most some bound. Free of CUDA, so that tests run it on a CPU.
#pragma once

#include <cstring>

#include "common/portable.h"

namespace hpk {

// A quantile of sorted numbers: `part` of the way from numbers[rank] to numbers[next].
struct QuantileRank {
  int rank, next;
  float part;
};

HPK_HOST_DEVICE QuantileRank quantile_rank(double quantile, int count) {
  const double position = quantile * (count - 1);
  const int rank = static_cast<int>(position);
  return {rank, rank + 1 < count ? rank + 1 : rank, static_cast<float>(position - rank)};
}

// The bits of floats as integers in the order of the floats, and back.
HPK_HOST_DEVICE int32_t ordered_bits(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

HPK_HOST_DEVICE float from_ordered_bits(int32_t ordered) {
  const int32_t bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// As torch.lerp does it: the ends are met, and equal ends give what they are.
HPK_HOST_DEVICE float interpolated(float from, float to, float part) {
  return part < 0.5f ? from + part * (to - from) : to - (to - from) * (1 - part);
}

// Where the number of a rank is known to be: above `low` and at most `high`, both as ordered bits.
struct Bracket {
  int32_t low, high;
  int at_most;  // numbers that are at most `high`

  // Whether the number is the greatest that is at most `high`: those left are equal, or it is the last of them.
  HPK_HOST_DEVICE bool found(int rank) const {
    return at_most == rank + 1 || static_cast<uint32_t>(high) - static_cast<uint32_t>(low) <= 1;
  }

  // A place from above `low` to below `high`, or `high` when all is done. The first steps halve the values, which soon
  // leaves few numbers of any smooth distribution, the others the bits: 32 of those suffice for any numbers.
  HPK_HOST_DEVICE int32_t middle(int step, bool done) const {
    constexpr int kStepsByValue = 16;
    if (done) return high;
    const int32_t by_value = ordered_bits(0.5f * from_ordered_bits(low) + 0.5f * from_ordered_bits(high));
    if (step < kStepsByValue && low < by_value && by_value < high) return by_value;
    const uint32_t apart = static_cast<uint32_t>(high) - static_cast<uint32_t>(low);
    return static_cast<int32_t>(static_cast<uint32_t>(low) + apart / 2);
  }

  HPK_HOST_DEVICE void narrow(int rank, int32_t bound, int count) {
    if (count > rank) {
      high = bound;
      at_most = count;
    } else {
      low = bound;
    }
  }
};

// Two quantiles of `row`, which has `count` numbers and, for all threads of a row alike,
//   row.ends(least, greatest)                 of the numbers that are not NaN
//   row.count_at_most(bounds, counts)         for two bounds; NaN is never counted
//   row.neighbours(bounds, at_most, above)    the greatest number that is at most each bound, the least one above it
// If any number is NaN, the quantiles are some numbers; the steps are bounded whatever the numbers are.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class Row>
HPK_HOST_DEVICE void find_quantiles(Row& row, int count, const QuantileRank (&ranks)[2], float (&quantiles)[2]) {
  float least, greatest;
  row.ends(least, greatest);
  const Bracket all{ordered_bits(least) - 1, ordered_bits(greatest), count};
  Bracket brackets[2] = {all, all};
  for (int step = 0;; ++step) {
    const bool done[2] = {brackets[0].found(ranks[0].rank), brackets[1].found(ranks[1].rank)};
    if (done[0] && done[1]) break;
    const int32_t middles[2] = {brackets[0].middle(step, done[0]), brackets[1].middle(step, done[1])};
    const float bounds[2] = {from_ordered_bits(middles[0]), from_ordered_bits(middles[1])};
    int counts[2];
    row.count_at_most(bounds, counts);
    for (int i = 0; i < 2; ++i) brackets[i].narrow(ranks[i].rank, middles[i], counts[i]);
  }
  const float bounds[2] = {from_ordered_bits(brackets[0].high), from_ordered_bits(brackets[1].high)};
  float at_most[2], above[2];
  row.neighbours(bounds, at_most, above);
  for (int i = 0; i < 2; ++i) {
    const float next = brackets[i].at_most > ranks[i].next ? at_most[i] : above[i];
    quantiles[i] = interpolated(at_most[i], next, ranks[i].part);
  }
}

}  // namespace hpk
