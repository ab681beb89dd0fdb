#include <algorithm>
#include <limits>

#include "multi_positive_contrastive/loops.h"
#include "multi_positive_contrastive/relations.h"

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
void leave_out(const Relations& relations, bool across_images, int64_t anchor, const std::vector<int32_t>& columns,
               T value, T* entries) {
  const int64_t first = across_images ? image_start(relations, anchor) : anchor;
  const int64_t last = across_images ? first + relations.per_image : anchor + 1;
  const auto begin = std::lower_bound(columns.begin(), columns.end(), first);
  const auto end = std::lower_bound(begin, columns.end(), last);
  std::fill(entries + (begin - columns.begin()), entries + (end - columns.begin()), value);
}

// Calls body(first, some) for the anchors of a position in groups: `some` = 4 or 1 anchors from image `first` on.
template <typename Body>
void for_groups(const Relations& relations, const Body& body) {
  const int64_t images = relations.anchors / relations.per_image;
  int64_t image = 0;
  for (; image + 4 <= images; image += 4) body(image, int64_t{4});
  for (; image < images; ++image) body(image, int64_t{1});
}

// The logits (some, columns) of a group.
template <typename T>
void logits_of(const T* z, int64_t dim, T scale, const Relations& relations, const Position& at, int64_t image,
               int64_t some, std::vector<T>& logits) {
  const auto count = static_cast<int64_t>(at.columns.size());
  const T* anchors = z + (at.position + image * relations.per_image) * dim;
  logits.resize(some * count);
  if (some == 4) {
    dots4(anchors, relations.per_image, z, at.columns.data(), count, dim, scale, logits.data());
  } else {
    dots(anchors, z, at.columns.data(), count, dim, scale, logits.data());
  }
}

// The coefficients of a position, push_i exp(l_ij - logDen_i) / temperature as (columns, images), and what they add to
// the gradients of its anchors.
template <typename T>
void backward_position(const T* z, int64_t dim, T scale, const Relations& relations, bool across_images,
                       const AnchorCoefficients<T>& anchors, const Position& at, T* coefficients, T* grad_z,
                       std::vector<T>& logits, std::vector<T>& terms) {
  const auto count = static_cast<int64_t>(at.columns.size());
  const int64_t group = relations.per_image, images = relations.anchors / group;
  for_groups(relations, [&](int64_t image, int64_t some) {
    logits_of(z, dim, scale, relations, at, image, some, logits);
    terms.resize(some * count);
    for (int64_t a = 0; a < some; ++a) {
      const int64_t anchor = at.position + (image + a) * group;
      T* own = terms.data() + a * count;
      softmax_terms(logits.data() + a * count, count, anchors.log_denominator[anchor], scale * anchors.push[anchor],
                    own);
      leave_out(relations, across_images, anchor, at.columns, T{0}, own);
      for (int64_t c = 0; c < count; ++c) coefficients[c * images + image + a] = own[c];
    }
    T* sums = grad_z + (at.position + image * group) * dim;
    if (some == 4) {
      add_rows4(terms.data(), z, at.columns.data(), count, dim, sums, group);
    } else {
      add_rows(terms.data(), z, at.columns.data(), count, dim, sums);
    }
  });
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
    total += static_cast<int64_t>(chunk.positions.back().columns.size()) * images;
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
    const auto first = std::lower_bound(at.columns.begin(), at.columns.end(), begin);
    for (auto column = first; column != at.columns.end() && *column < end; ++column) {
      const T* weights = chunk.coefficients.data() + chunk.begins[p] + (column - at.columns.begin()) * images;
      add_rows(weights, anchors, image_starts.data(), images, dim, grad_z + *column * dim);
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
      for_groups(relations, [&](int64_t image, int64_t some) {
        logits_of(z, dim, inverse_temperature, relations, at, image, some, logits);
        for (int64_t a = 0; a < some; ++a) {
          const int64_t anchor = position + (image + a) * relations.per_image;
          T* own = logits.data() + a * count;
          leave_out(relations, across_images, anchor, at.columns, -std::numeric_limits<T>::infinity(), own);
          T& log_denominator = sums.log_denominator[anchor];
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
    parallel_for(run, relations.anchors, 64, [&](int64_t begin, int64_t end) {
      add_to_columns(z, dim, relations, chunk, begin, end, grad_z);
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
