// Bit-packed relations: bit j % 32 of word j / 32 of a row says whether column j is in the relation with the row.
#pragma once

#include "common/portable.h"

namespace hpk {

HPK_HOST_DEVICE int64_t words_per_row(int64_t columns) { return (columns + 31) / 32; }

HPK_HOST_DEVICE bool test_bit(const uint32_t* row, int64_t column) { return row[column >> 5] >> (column & 31) & 1u; }

// The lowest `count` bits: none for less than 0, all for more than 32.
HPK_HOST_DEVICE uint32_t low_bits(int64_t count) { return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1u; }

// The bits of a word that belong to columns.
HPK_HOST_DEVICE uint32_t valid_bits(int64_t word, int64_t columns) { return low_bits(columns - 32 * word); }

// The bits of a word that do not belong to the columns [first, last).
HPK_HOST_DEVICE uint32_t bits_outside(int64_t word, int64_t first, int64_t last) {
  return low_bits(first - 32 * word) | ~low_bits(last - 32 * word);
}

// Transpose a 32 x 32 block of bits in place: afterwards bit c of rows[r] is what bit r of rows[c] was.
// Halves are exchanged at ever smaller scales (Warren, Hacker's Delight, 7-3).
HPK_HOST_DEVICE void transpose_block(uint32_t rows[32]) {
  uint32_t mask = 0x0000FFFFu;
  for (int width = 16; width != 0; width >>= 1, mask ^= mask << width) {
    for (int low = 0; low < 32; low = (low + width + 1) & ~width) {
      const uint32_t exchanged = ((rows[low] >> width) ^ rows[low + width]) & mask;
      rows[low] ^= exchanged << width;
      rows[low + width] ^= exchanged;
    }
  }
}

// dst, `count` bits long, becomes the bits of src from `first` on.
HPK_HOST_DEVICE void extract_bits(const uint32_t* src, int64_t first, int64_t count, uint32_t* dst) {
  const int64_t shift = first & 31, last = (first + count - 1) >> 5;
  for (int64_t word = 0; word < words_per_row(count); ++word) {
    const int64_t from = (first >> 5) + word;
    uint32_t bits = src[from] >> shift;
    if (shift != 0 && from < last) bits |= src[from + 1] << (32 - shift);
    dst[word] = bits & valid_bits(word, count);
  }
}

// Set the bits [first, first + count) to 0.
HPK_HOST_DEVICE void clear_bits(uint32_t* bits, int64_t first, int64_t count) {
  for (int64_t column = first; column < first + count;) {
    const int64_t within = column & 31, left = first + count - column, taken = left < 32 - within ? left : 32 - within;
    bits[column >> 5] &= ~((taken == 32 ? ~0u : (1u << taken) - 1u) << within);
    column += taken;
  }
}

// dst, `count` bits long, becomes the first `period` bits of src over and over.
HPK_HOST_DEVICE void repeat_bits(const uint32_t* src, int64_t period, int64_t count, uint32_t* dst) {
  int64_t position = 0;  // in src
  for (int64_t word = 0; word < words_per_row(count); ++word) {
    uint32_t bits = 0;
    for (int64_t filled = 0; filled < 32;) {
      int64_t taken = period - position < 32 - filled ? period - position : 32 - filled;
      const int64_t within = position & 31;
      if (taken > 32 - within) taken = 32 - within;
      const uint32_t part = src[position >> 5] >> within;
      bits |= (taken == 32 ? part : part & ((1u << taken) - 1u)) << filled;
      filled += taken;
      position += taken;
      if (position == period) position = 0;
    }
    dst[word] = bits & valid_bits(word, count);
  }
}

}  // namespace hpk
