// Which pairs of anchors the strips and tiles of multi_positive_contrastive are about.
#pragma once

#include "common/schedule.h"

namespace hpk {

// The anchors [first, last) that a tile may hold, all or those of one image, and the tile's first row and first column,
// both multiples of 32.
struct Scope {
  int first, last, row, column;

  HPK_HOST_DEVICE bool holds(int anchor) const { return anchor >= first && anchor < last; }
};

// What strip `strip` is about: of all anchors the strips start with the 32 that `start_row` is among. An image starts within 32 anchors,
// so it may take one strip more than it has rows for.
HPK_HOST_DEVICE Scope scope_of(int strip, int rows_of_strip, int anchors, int group, bool within, int start_row = 0) {
  if (!within) return {0, anchors, start_row / 32 * 32 + strip * rows_of_strip, 0};
  const int strips = static_cast<int>(divide_up(group + 31, rows_of_strip));
  const int first = strip / strips * group, start = first / 32 * 32;
  return {first, first + group, start + strip % strips * rows_of_strip, start};
}

HPK_HOST_DEVICE int64_t strips_of(int64_t rows_of_strip, int64_t anchors, int64_t group, bool within) {
  return within ? anchors / group * divide_up(group + 31, rows_of_strip) : divide_up(anchors, rows_of_strip);
}

// The tiles of `columns` columns that a strip meets.
HPK_HOST_DEVICE int64_t tiles_of(int64_t columns, int64_t anchors, int64_t group, bool within) {
  return divide_up(within ? group + 31 : anchors, columns);
}

}  // namespace hpk
