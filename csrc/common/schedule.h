// Which tiles a thread block works on.
#pragma once

#include "common/portable.h"

namespace hpk {

// Tiles [first, last).
struct TileRange {
  int64_t first, last;
};

// Blocks that fill the largest GPUs a few times over.
constexpr int64_t kWantedBlocks = 512;

HPK_HOST_DEVICE int64_t divide_up(int64_t count, int64_t by) { return (count + by - 1) / by; }

// One of `parts` parts of a range, as equal as can be, in order.
HPK_HOST_DEVICE TileRange part_of(const TileRange& all, int64_t part, int64_t parts) {
  const int64_t tiles = all.last - all.first;
  return {all.first + tiles * part / parts, all.first + tiles * (part + 1) / parts};
}

// In how many parts to cut strips of `tiles` tiles so that there are `wanted` blocks, each with `least` tiles or more.
HPK_HOST_DEVICE int64_t parts_for(int64_t strips, int64_t tiles, int64_t wanted, int64_t least) {
  const int64_t parts = divide_up(wanted, strips), most = tiles / least;
  return parts < most ? parts : most < 1 ? 1 : most;
}

}  // namespace hpk
