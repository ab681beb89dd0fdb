// Going through the rows and the bits of a tile.
#pragma once

#include "common/bits.h"
#include "contrastive/contrastive.h"

namespace hpk {

// Calls body(row) for the rows of a tile.
template <typename T, typename Body>
void for_each_row(ParallelFor run, const LogitTile<T>& tile, Body body) {
  parallel_for(run, tile.rows, 4, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

// Calls body(column) for the columns of a word that are set, ascending.
template <typename Body>
HPK_HOST_DEVICE void for_each_bit(uint32_t bits, int64_t word, Body body) {
  for (; bits != 0; bits &= bits - 1) body(32 * word + __builtin_ctz(bits));
}

}  // namespace hpk
