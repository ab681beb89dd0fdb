// Philox4x32-10 (Salmon et al., SC 2011): four random words as a function of a counter and a key, on host and device.
#pragma once

#include "common/portable.h"

namespace hpk {

struct Words4 {
  uint32_t w[4];
};

HPK_HOST_DEVICE Words4 philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c0, product1 = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t next0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    const uint32_t next2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    c0 = next0;
    c2 = next2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Bits [32 * word, 32 * word + 32) of row `row` of a Bernoulli mask: bit b is set if the random word of column
// 32 * word + b is below `threshold` = floor(rate * 2^32); 2^32 itself does not fit 32 bits, hence 64.
HPK_HOST_DEVICE uint32_t bernoulli_word(uint64_t seed, uint32_t row, uint32_t word, uint64_t threshold) {
  uint32_t bits = 0;
  for (uint32_t block = 0; block < 8; ++block) {
    const Words4 random = philox(8 * word + block, row, 0, 0, seed);
    for (uint32_t column = 0; column < 4; ++column) {
      bits |= static_cast<uint32_t>(random.w[column] < threshold) << (4 * block + column);
    }
  }
  return bits;
}

}  // namespace hpk
