// Before any logit, on the CPU: the drawn negatives, and how many pairs there are.
#include "multi_positive_contrastive/multi_positive_contrastive.h"

#include <atomic>

#include "common/philox.h"
#include "multi_positive_contrastive/relations.h"
#include "multi_positive_contrastive/simd_loops.h"

namespace hpk {
namespace {

HPK_MULTIVERSION void draw_row(uint64_t seed, uint32_t row, int64_t columns, uint64_t threshold, uint32_t* bits) {
  const bool all = threshold > 0xFFFFFFFFu, none = threshold == 0;
  const int64_t words = words_per_row(columns);
  for (int64_t word = 0; word < words; ++word) {
    const uint32_t drawn =
        all ? ~0u : none ? 0u : bernoulli_word(seed, row, static_cast<uint32_t>(word), threshold);
    bits[word] = drawn & valid_bits(word, columns);
  }
}

}  // namespace

void draw_negatives_cpu(ParallelFor run, uint64_t seed, int64_t rows, int64_t columns, double rate, uint32_t* bits) {
  const auto threshold = static_cast<uint64_t>(rate * 4294967296.0);
  const int64_t words = words_per_row(columns);
  parallel_for(run, rows, 1, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      draw_row(seed, static_cast<uint32_t>(row), columns, threshold, bits + row * words);
    }
  });
}

PairCounts count_pairs_cpu(ParallelFor run, const Relations& relations) {
  std::atomic<int64_t> all{0}, within{0};  // integers: the order of the additions does not matter
  parallel_for(run, relations.rows, 64, [&](int64_t begin, int64_t end) {
    const int64_t words = words_per_row(relations.anchors);
    PairCounts counts{0, 0};
    for (int64_t anchor = relations.first + begin; anchor < relations.first + end; ++anchor) {
      const AnchorBits own = bits_of(relations, anchor);
      const int64_t first = image_start(relations, anchor), last = first + relations.per_image;
      for (const uint32_t* row : {own.agnostic, own.specific, own.negatives}) {
        if (row == nullptr) continue;
        counts.all += count_bits(row, words);
        counts.within_images += count_bits_between(row, first, last);
      }
    }
    all += counts.all;
    within += counts.within_images;
  });
  return {all, within};
}

}  // namespace hpk
