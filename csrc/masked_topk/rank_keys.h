// Numbers with an order that ranks inner products: greater ones first, equal ones by their index.
#pragma once

#include <cstring>

#include "common/portable.h"

namespace hpk {

// The key of -inf, less than that of any reference, and a key greater than any.
constexpr int64_t kNothingFound = -(int64_t{0x7F800001} << 32), kGreatestKey = INT64_MAX;

// Greater for a greater value and, where values are equal, for a lower index (0 <= index < 2^31). -0 equals 0; NaN is
// greater than all other values.
HPK_HOST_DEVICE int64_t rank_key(float value, int32_t index) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value == 0) bits = 0;
  if (value != value) bits = 0x7FC00000;
  if (bits < 0) bits ^= 0x7FFFFFFF;  // negative numbers are signed magnitudes
  return static_cast<int64_t>((static_cast<uint64_t>(static_cast<uint32_t>(bits)) << 32) |
                              static_cast<uint32_t>(0x7FFFFFFF - index));
}

// The value in a key; NaN for kGreatestKey.
HPK_HOST_DEVICE float value_of_key(int64_t key) {
  int32_t bits = static_cast<int32_t>(key >> 32);
  if (bits < 0) bits ^= 0x7FFFFFFF;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The greatest product of a query so far; the index is -1 if there is none, or if it is NaN.
struct Best {
  float value;
  int32_t index;

  // Of equal values the lower index stays.
  HPK_HOST_DEVICE void add(const Best& other) {
    const bool greater = other.value > value || (other.value == value && other.index >= 0 && other.index < index);
    if (value == value && (greater || other.value != other.value)) *this = other;
  }
};

}  // namespace hpk
