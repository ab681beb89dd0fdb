// The pairs in R on the CPU: anchors at one patch position share their columns.
#include <algorithm>
#include <limits>

#include "common/exponential.h"
#include "multi_positive_contrastive/relations.h"
#include "multi_positive_contrastive/simd_loops.h"

namespace hpk {
namespace {

constexpr int64_t kCoefficients = 1 << 22;  // held at a time in backward

// The anchors at one patch position, position + c * G for image c, and the columns that R has for them.
struct Position {
  int64_t position;
  std::vector<int32_t> columns;
};

Position position_of(const Relations& relations, int64_t position) {
  Position found{position, {}};
  const int64_t words = words_per_row(relations.anchors);
  list_columns(relations.negatives + position * words, words, found.columns);
  return found;
}

// Sets the entries of pairs that do not count to `value`: of an anchor with itself, or with its own image.
template <typename T>
void leave_out(const Relations& relations, bool across_images, int64_t anchor, const int32_t* columns, int64_t count,
               T value, T* entries) {
  const int64_t first = across_images ? image_start(relations, anchor) : anchor;
  const int64_t last = across_images ? first + relations.per_image : anchor + 1;
  const int32_t* begin = std::lower_bound(columns, columns + count, first);
  const int32_t* end = std::lower_bound(begin, columns + count, last);
  std::fill(entries + (begin - columns), entries + (end - columns), value);
}

// Images [first, last).
struct Images {
  int64_t first, last;
};

Images images_of(const Relations& relations) {
  return {relations.first / relations.per_image, (relations.first + relations.rows) / relations.per_image};
}

// Calls body(first, some) for the anchors of a position in groups: `some` = 4 or 1 anchors from image `first` on.
template <typename Body>
void for_groups(const Images& images, const Body& body) {
  int64_t image = images.first;
  for (; image + 4 <= images.last; image += 4) body(image, int64_t{4});
  for (; image < images.last; ++image) body(image, int64_t{1});
}

// The logits (some, columns) of a group with `count` columns.
template <typename T>
void logits_of(const T* z, int64_t dim, T scale, const Relations& relations, int64_t position, int64_t image,
               int64_t some, const int32_t* columns, int64_t count, std::vector<T>& logits) {
  const T* anchors = z + (position + image * relations.per_image) * dim;
  logits.resize(some * count);
  if (some == 4) {
    dots4(anchors, relations.per_image, z, columns, count, dim, scale, logits.data());
  } else {
    dots(anchors, z, columns, count, dim, scale, logits.data());
  }
}

// Which of a position's columns have rows of their own, [first, last) of the list.
struct OwnColumns {
  int64_t first, last;

  OwnColumns(const Relations& relations, const std::vector<int32_t>& columns) {
    const auto begin = std::lower_bound(columns.begin(), columns.end(), relations.first);
    first = begin - columns.begin();
    last = std::lower_bound(begin, columns.end(), relations.first + relations.rows) - columns.begin();
  }
  int64_t count() const { return last - first; }
};

// The coefficients push_i exp(l_ij - logDen_i) / temperature of a group with the columns [first, last) of its position,
// (some, columns) `terms`; those with its own columns also as (columns, images) `coefficients`.
template <typename T>
void group_terms(const T* z, int64_t dim, T scale, const Relations& relations, bool across_images,
                 const AnchorCoefficients<T>& anchors, const Position& at, const OwnColumns& own, int64_t first,
                 int64_t last, int64_t image, int64_t some, T* coefficients, std::vector<T>& logits,
                 std::vector<T>& terms) {
  const int64_t count = last - first, group = relations.per_image, images = relations.anchors / group;
  logits_of(z, dim, scale, relations, at.position, image, some, at.columns.data() + first, count, logits);
  terms.resize(some * count);
  for (int64_t a = 0; a < some; ++a) {
    const int64_t anchor = at.position + (image + a) * group;
    T* of_anchor = terms.data() + a * count;
    softmax_terms(logits.data() + a * count, count, anchors.log_denominator[anchor], scale * anchors.push[anchor],
                  of_anchor);
    leave_out(relations, across_images, anchor, at.columns.data() + first, count, T{0}, of_anchor);
    for (int64_t c = own.first; c < own.last; ++c) {
      coefficients[(c - own.first) * images + image + a] = of_anchor[c - first];
    }
  }
}

// The coefficients of all images with the position's own columns, and what those of the own images add to gradients.
template <typename T>
void backward_position(const T* z, int64_t dim, T scale, const Relations& relations, bool across_images,
                       const AnchorCoefficients<T>& anchors, const Position& at, T* coefficients, T* grad_z,
                       std::vector<T>& logits, std::vector<T>& terms) {
  const auto count = static_cast<int64_t>(at.columns.size());
  const int64_t group = relations.per_image;
  const Images images = images_of(relations);
  const OwnColumns own(relations, at.columns);
  for_groups(images, [&](int64_t image, int64_t some) {
    group_terms(z, dim, scale, relations, across_images, anchors, at, own, 0, count, image, some, coefficients, logits,
                terms);
    T* sums = grad_z + (at.position + (image - images.first) * group) * dim;
    if (some == 4) {
      add_rows4(terms.data(), z, at.columns.data(), count, dim, sums, group);
    } else {
      add_rows(terms.data(), z, at.columns.data(), count, dim, sums);
    }
  });
  if (own.count() == 0) return;
  for (const Images& others : {Images{0, images.first}, Images{images.last, relations.anchors / group}}) {
    for_groups(others, [&](int64_t image, int64_t some) {
      group_terms(z, dim, scale, relations, across_images, anchors, at, own, own.first, own.last, image, some,
                  coefficients, logits, terms);
    });
  }
}

// Positions whose coefficients are held together, and where in `coefficients` those of each begin.
template <typename T>
struct Chunk {
  std::vector<Position> positions;
  std::vector<int64_t> begins;
  std::vector<T> coefficients;
};

template <typename T>
int64_t fill_chunk(const Relations& relations, int64_t position, Chunk<T>& chunk) {
  const int64_t images = relations.anchors / relations.per_image;
  chunk.positions.clear();
  chunk.begins.clear();
  int64_t total = 0;
  for (; position < relations.per_image && (total == 0 || total < kCoefficients); ++position) {
    chunk.positions.push_back(position_of(relations, position));
    chunk.begins.push_back(total);
    total += OwnColumns(relations, chunk.positions.back().columns).count() * images;
  }
  if (static_cast<int64_t>(chunk.coefficients.size()) < total) chunk.coefficients.resize(total);
  return position;
}

// What the coefficients of a chunk add to the gradients of the columns in [begin, end).
template <typename T>
void add_to_columns(const T* z, int64_t dim, const Relations& relations, const Chunk<T>& chunk, int64_t begin,
                    int64_t end, T* grad_z) {
  const int64_t images = relations.anchors / relations.per_image;
  std::vector<int32_t> image_starts(images);
  for (int64_t image = 0; image < images; ++image) image_starts[image] = static_cast<int32_t>(image * relations.per_image);
  for (std::size_t p = 0; p < chunk.positions.size(); ++p) {
    const Position& at = chunk.positions[p];
    const T* anchors = z + at.position * dim;
    const OwnColumns own(relations, at.columns);
    const auto first = std::lower_bound(at.columns.begin(), at.columns.end(), begin);
    for (auto column = first; column != at.columns.end() && *column < end; ++column) {
      const T* weights =
          chunk.coefficients.data() + chunk.begins[p] + (column - at.columns.begin() - own.first) * images;
      add_rows(weights, anchors, image_starts.data(), images, dim, grad_z + (*column - relations.first) * dim);
    }
  }
}

}  // namespace

template <typename T>
void contrastive_sampled_forward_cpu(ParallelFor run, const T* z, int64_t dim, T inverse_temperature,
                                     const Relations& relations, bool across_images, const AnchorSums<T>& sums) {
  parallel_for(run, relations.per_image, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> logits;
    for (int64_t position = begin; position < end; ++position) {
      const Position at = position_of(relations, position);
      const auto count = static_cast<int64_t>(at.columns.size());
      for_groups(images_of(relations), [&](int64_t image, int64_t some) {
        logits_of(z, dim, inverse_temperature, relations, position, image, some, at.columns.data(), count, logits);
        for (int64_t a = 0; a < some; ++a) {
          const int64_t anchor = position + (image + a) * relations.per_image;
          T* own = logits.data() + a * count;
          leave_out(relations, across_images, anchor, at.columns.data(), count, -std::numeric_limits<T>::infinity(),
                    own);
          T& log_denominator = sums.log_denominator[anchor - relations.first];
          log_denominator = log_add_exp(log_denominator, log_sum_exp(own, count));
        }
      });
    }
  });
}

template <typename T>
void contrastive_sampled_backward_cpu(ParallelFor run, const T* z, int64_t dim, T inverse_temperature,
                                      const Relations& relations, bool across_images,
                                      const AnchorCoefficients<T>& anchors, T* grad_z) {
  Chunk<T> chunk;
  for (int64_t position = 0; position < relations.per_image;) {
    position = fill_chunk(relations, position, chunk);
    parallel_for(run, static_cast<int64_t>(chunk.positions.size()), 1, [&](int64_t begin, int64_t end) {
      std::vector<T> logits, terms;
      for (int64_t p = begin; p < end; ++p) {
        backward_position(z, dim, inverse_temperature, relations, across_images, anchors, chunk.positions[p],
                          chunk.coefficients.data() + chunk.begins[p], grad_z, logits, terms);
      }
    });
    // By column, so that no two threads add to one gradient, and each adds in the order of the positions.
    parallel_for(run, relations.rows, 64, [&](int64_t begin, int64_t end) {
      add_to_columns(z, dim, relations, chunk, relations.first + begin, relations.first + end, grad_z);
    });
  }
}

#define HPK_INSTANTIATE(T)                                                                                            \
  template void contrastive_sampled_forward_cpu<T>(ParallelFor, const T*, int64_t, T, const Relations&, bool,         \
                                                   const AnchorSums<T>&);                                             \
  template void contrastive_sampled_backward_cpu<T>(ParallelFor, const T*, int64_t, T, const Relations&, bool,        \
                                                    const AnchorCoefficients<T>&, T*);
HPK_INSTANTIATE(float)
HPK_INSTANTIATE(double)
#undef HPK_INSTANTIATE

}  // namespace hpk
