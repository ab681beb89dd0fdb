// The core that host and device share, and the CPU kernels with threads of their own, as a module for the tests only.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <thread>
#include <vector>

#include "common/bits.h"
#include "common/exponential.h"
#include "common/philox.h"
#include "common/schedule.h"
#include "engines/geometry.h"
#include "hidden_positives/hidden_positives.h"
#include "local_propagation/local_propagation.h"
#include "local_propagation/quantiles.h"
#include "masked_topk/masked_topk.h"
#include "masked_topk/rank_keys.h"
#include "multi_positive_contrastive/multi_positive_contrastive.h"
#include "multi_positive_contrastive/strips.h"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

int threads = 1;

void run(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  const int64_t pieces = std::max<int64_t>(1, std::min<int64_t>(threads, count / std::max<int64_t>(1, grain)));
  std::vector<std::thread> workers;
  for (int64_t piece = 0; piece < pieces; ++piece) {
    workers.emplace_back(body, context, count * piece / pieces, count * (piece + 1) / pieces);
  }
  for (auto& worker : workers) worker.join();
}

py::tuple philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
  const hpk::Words4 words = hpk::philox(c0, c1, c2, c3, key);
  return py::make_tuple(words.w[0], words.w[1], words.w[2], words.w[3]);
}

Array<uint32_t> draw_negatives(uint64_t seed, int64_t rows, int64_t columns, double rate) {
  Array<uint32_t> bits({rows, hpk::words_per_row(columns)});
  hpk::draw_negatives_cpu(run, seed, rows, columns, rate, bits.mutable_data());
  return bits;
}

Array<uint32_t> transpose_bits(Array<uint32_t> bits, int64_t columns) {
  Array<uint32_t> transposed({columns, hpk::words_per_row(bits.shape(0))});
  hpk::transpose_bits_cpu(run, bits.data(), bits.shape(0), columns, transposed.mutable_data());
  return transposed;
}

// The words of a row of `words` words whose bits are set outside of the columns [first, last).
Array<uint32_t> bits_outside(int64_t words, int64_t first, int64_t last) {
  Array<uint32_t> bits(words);
  for (int64_t word = 0; word < words; ++word) bits.mutable_data()[word] = hpk::bits_outside(word, first, last);
  return bits;
}

Array<uint32_t> repeat_bits(Array<uint32_t> bits, int64_t period, int64_t count) {
  Array<uint32_t> repeated(hpk::words_per_row(count));
  hpk::repeat_bits(bits.data(), period, count, repeated.mutable_data());
  return repeated;
}

// log sum exp of values, the first `split` of them and the others apart.
float log_sum(Array<float> values, int64_t split) {
  hpk::LogSum sums[2];
  for (int64_t i = 0; i < values.size(); ++i) sums[i >= split].add(values.data()[i]);
  sums[0].add(sums[1]);
  return sums[0].value();
}

Array<float> exp_nonpositive(Array<float> values) {
  Array<float> result(values.size());
  for (py::ssize_t i = 0; i < values.size(); ++i) result.mutable_data()[i] = hpk::exp_nonpositive(values.data()[i]);
  return result;
}

// The codes (N, D) of rows, and their scale, norm and error (3, N).
py::tuple coarse_int8(Array<float> rows) {
  const int64_t count = rows.shape(0), dim = rows.shape(1);
  Array<int8_t> codes({count, dim});
  Array<float> stats({int64_t{3}, count});
  float* of_stats = stats.mutable_data();
  hpk::coarse_int8_cpu(run, rows.data(), count, dim, codes.mutable_data(), of_stats, of_stats + count,
                       of_stats + 2 * count);
  return py::make_tuple(codes, stats);
}

hpk::CoarseRows<float> coarse_rows(const Array<float>& rows, const Array<float>& stats) {
  const int64_t count = rows.shape(0);
  return {rows.data(), rows.shape(1), stats.data(), stats.data() + count, stats.data() + 2 * count};
}

Array<uint32_t> pack(Array<int32_t> products, Array<float> features, Array<float> stats, Array<float> threshold,
                     bool symmetric) {
  const int64_t anchors = threshold.size();
  Array<uint32_t> bits({anchors, hpk::words_per_row(anchors)});
  const hpk::ProductTile<int32_t> tile{products.data(), 0, anchors, 0, anchors};
  hpk::hidden_positives_pack_cpu<int32_t, float>(run, tile, coarse_rows(features, stats), threshold.data(),
                                                 symmetric, anchors, bits.mutable_data());
  return bits;
}

Array<uint32_t> pack_between(Array<int32_t> products, Array<float> features, Array<float> stats, Array<float> keys,
                             Array<float> key_stats, Array<float> threshold, Array<float> key_threshold, bool either,
                             int64_t first) {
  const int64_t anchors = threshold.size(), count = key_threshold.size();
  Array<uint32_t> bits({anchors, hpk::words_per_row(count)});
  const hpk::ProductTile<int32_t> tile{products.data(), 0, anchors, 0, count};
  const hpk::Keys<float> of_keys{coarse_rows(keys, key_stats), count, key_threshold.data(), either, first};
  hpk::hidden_positives_pack_between_cpu<int32_t, float>(run, tile, coarse_rows(features, stats), threshold.data(),
                                                         of_keys, bits.mutable_data());
  return bits;
}

py::tuple topk(Array<int32_t> products, Array<float> query, Array<float> query_stats, Array<float> pool,
               Array<float> pool_stats, int64_t k) {
  const int64_t rows = query.shape(0), references = pool.shape(0);
  Array<float> values({rows, k});
  Array<int64_t> indices({rows, k});
  hpk::masked_topk_select_cpu<int32_t, float>(run, products.data(), coarse_rows(query, query_stats), rows,
                                              coarse_rows(pool, pool_stats), references, {}, k, values.mutable_data(),
                                              indices.mutable_data());
  return py::make_tuple(values, indices);
}

py::tuple local_propagation(Array<float> logits, Array<float> code, int64_t window) {
  const int64_t images = code.shape(0), dim = code.shape(1), height = code.shape(2), width = code.shape(3);
  Array<float> weights({images, window * window, height, width}), mixed({images, dim, height, width}),
      grad({images, dim, height, width});
  hpk::local_propagation_weights_cpu<float>(run, logits.data(), images, height, width, 28.0, 0.1, 0.9, window,
                                            weights.mutable_data());
  hpk::local_propagation_apply_cpu<float>(run, code.data(), weights.data(), images, dim, height, width, window,
                                          mixed.mutable_data());
  hpk::local_propagation_apply_backward_cpu<float>(run, code.data(), weights.data(), images, dim, height, width,
                                                   window, grad.mutable_data());
  return py::make_tuple(weights, mixed, grad);
}

// A row of numbers that one thread holds.
struct RowOfOne {
  const Array<float>& values;
  int steps = 0;

  template <typename Body>
  void for_each(Body body) const {
    for (py::ssize_t i = 0; i < values.size(); ++i) body(values.data()[i]);
  }

  void ends(float& least, float& greatest) const {
    least = std::numeric_limits<float>::infinity(), greatest = -least;
    for_each([&](float value) { least = std::fmin(least, value), greatest = std::fmax(greatest, value); });
  }

  void count_at_most(const float (&bounds)[2], int (&counts)[2]) {
    ++steps;
    for (int i = 0; i < 2; ++i) {
      counts[i] = 0;
      for_each([&](float value) { counts[i] += value <= bounds[i]; });
    }
  }

  void neighbours(const float (&bounds)[2], float (&at_most)[2], float (&above)[2]) const {
    for (int i = 0; i < 2; ++i) {
      above[i] = std::numeric_limits<float>::infinity(), at_most[i] = -above[i];
      for_each([&](float value) {
        if (value <= bounds[i]) at_most[i] = std::fmax(at_most[i], value);
        if (value > bounds[i]) above[i] = std::fmin(above[i], value);
      });
    }
  }
};

// Two quantiles, and in how many steps they were found.
py::tuple quantiles(Array<float> values, double low, double high) {
  RowOfOne row{values};
  const int count = static_cast<int>(values.size());
  float found[2];
  hpk::find_quantiles(row, count, {hpk::quantile_rank(low, count), hpk::quantile_rank(high, count)}, found);
  return py::make_tuple(found[0], found[1], row.steps);
}

// Forward and backward by pairs, or by one block of everything, with made-up coefficients: of the anchors from `first` on
// that have rows of `agnostic` and of `products`. Of a part the transposed relation is made up as well.
Array<float> contrastive(Array<float> z, Array<float> products, Array<uint32_t> agnostic, Array<uint32_t> negatives,
                         bool by_pairs, int64_t first) {
  const int64_t anchors = z.shape(0), dim = z.shape(1), per_image = negatives.shape(0), rows = agnostic.shape(0);
  const Array<uint32_t> agnostic_t = rows == anchors ? transpose_bits(agnostic, anchors) : agnostic;
  const Array<uint32_t> negatives_t = transpose_bits(negatives, anchors);
  const hpk::Relations relations{anchors,           per_image,         first,           rows,
                                 agnostic.data(),   agnostic_t.data(), agnostic.data(), agnostic_t.data(),
                                 negatives.data(),  negatives_t.data()};
  hpk::count_pairs_cpu(run, relations);
  std::vector<float> sums(3 * rows, 0.0f), coefficients(anchors, 0.5f);
  std::vector<int64_t> counts(2 * rows, 0);
  std::fill(sums.begin(), sums.begin() + rows, -std::numeric_limits<float>::infinity());
  const hpk::AnchorSums<float> found{sums.data(), sums.data() + rows, sums.data() + 2 * rows, counts.data(),
                                     counts.data() + rows};
  const hpk::AnchorCoefficients<float> known{coefficients.data(), coefficients.data(), coefficients.data(),
                                             coefficients.data()};
  Array<float> result({rows, by_pairs ? dim : anchors});
  if (by_pairs) {
    std::fill(result.mutable_data(), result.mutable_data() + result.size(), 0.0f);
    for (const bool across_images : {false, true}) {
      float* grad = result.mutable_data();
      hpk::contrastive_sampled_forward_cpu<float>(run, z.data(), dim, 2.0f, relations, across_images, found);
      hpk::contrastive_rows_forward_cpu<float>(run, z.data(), dim, 2.0f, relations, across_images, found);
      hpk::contrastive_sampled_backward_cpu<float>(run, z.data(), dim, 2.0f, relations, across_images, known, grad);
      hpk::contrastive_rows_backward_cpu<float>(run, z.data(), dim, 2.0f, relations, across_images, known, grad);
    }
  } else {
    std::copy(products.data(), products.data() + products.size(), result.mutable_data());
    const hpk::Block<float> block{result.mutable_data(), first, rows, 0, anchors};
    hpk::contrastive_block_forward_cpu<float>(run, block, 2.0f, relations, found);
    hpk::contrastive_block_backward_cpu<float>(run, block, 1.0f, relations, known);
  }
  return result;
}

// The row and the column of values[m][n][part] of each thread of a team: (threads, m, n, part, 2).
template <class Geometry>
Array<int32_t> positions() {
  Array<int32_t> found({Geometry::kTeamThreads, Geometry::kRowBlocks, Geometry::kColumnBlocks, 4, 2});
  int32_t* next = found.mutable_data();
  for (int thread = 0; thread < Geometry::kTeamThreads; ++thread) {
    for (int m = 0; m < Geometry::kRowBlocks; ++m) {
      for (int n = 0; n < Geometry::kColumnBlocks; ++n) {
        for (int part = 0; part < 4; ++part) {
          *next++ = Geometry::row(thread, m, part / 2);
          *next++ = Geometry::column(thread, n, part % 2);
        }
      }
    }
  }
  return found;
}

// By name, the rows and columns of a tile and the positions.
template <class Geometry>
void add_geometry(py::dict& geometries, const char* name) {
  const int rows = Geometry::kRows, columns = Geometry::kColumns;
  geometries[name] = py::make_tuple(rows, columns, positions<Geometry>());
}

py::dict geometries() {
  py::dict found;
  add_geometry<hpk::Geometry80>(found, "Geometry80");
  add_geometry<hpk::WarpGeometry80<2>>(found, "WarpGeometry80<2>");
  add_geometry<hpk::GradientGeometry80<64>>(found, "GradientGeometry80<64>");
  add_geometry<hpk::GradientGeometry80<256>>(found, "GradientGeometry80<256>");
  add_geometry<hpk::GradientGeometry80<128>>(found, "GradientGeometry80<128>");
  add_geometry<hpk::Geometry90>(found, "Geometry90");
  add_geometry<hpk::WideGeometry90>(found, "WideGeometry90");
  add_geometry<hpk::GradientGeometry90<64>>(found, "GradientGeometry90<64>");
  add_geometry<hpk::GradientGeometry90<256>>(found, "GradientGeometry90<256>");
  return found;
}

py::tuple part_of(int64_t first, int64_t last, int64_t part, int64_t parts) {
  const hpk::TileRange found = hpk::part_of({first, last}, part, parts);
  return py::make_tuple(found.first, found.last);
}

// The greatest of some products, the first `split` of them and the others apart.
py::tuple best(Array<float> values, Array<int32_t> indices, int64_t split) {
  const hpk::Best nothing{-std::numeric_limits<float>::infinity(), -1};
  hpk::Best found[2] = {nothing, nothing};
  for (int64_t i = 0; i < values.size(); ++i) found[i >= split].add({values.data()[i], indices.data()[i]});
  found[0].add(found[1]);
  return py::make_tuple(found[0].value, found[0].index);
}

// How often all strips and tiles of `rows` and `columns` meet each pair of anchors (anchors, anchors).
Array<int32_t> pairs_met(int rows, int columns, int anchors, int group, bool within) {
  Array<int32_t> counts({anchors, anchors});
  std::fill(counts.mutable_data(), counts.mutable_data() + counts.size(), 0);
  for (int64_t strip = 0; strip < hpk::strips_of(rows, anchors, group, within); ++strip) {
    const hpk::Scope scope = hpk::scope_of(static_cast<int>(strip), rows, anchors, group, within);
    if (scope.row % 32 != 0 || scope.column % 32 != 0) throw std::runtime_error("words of bits do not start here");
    const int end = scope.column + static_cast<int>(hpk::tiles_of(columns, anchors, group, within)) * columns;
    for (int row = scope.row; row < scope.row + rows; ++row) {
      for (int column = scope.column; column < end; ++column) {
        if (scope.holds(row) && scope.holds(column)) ++counts.mutable_at(row, column);
      }
    }
  }
  return counts;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.def("set_threads", [](int count) { threads = count; });
  m.def("philox", &philox);
  m.def("draw_negatives", &draw_negatives);
  m.def("transpose_bits", &transpose_bits);
  m.def("bits_outside", &bits_outside);
  m.def("repeat_bits", &repeat_bits);
  m.def("log_sum", &log_sum);
  m.def("exp_nonpositive", &exp_nonpositive);
  m.def("geometries", &geometries);
  m.def("part_of", &part_of);
  m.def("parts_for", [](int64_t strips, int64_t tiles, int64_t wanted, int64_t least) {
    return hpk::parts_for(strips, tiles, wanted, least);
  });
  m.def("rank_key", [](float value, int32_t index) { return hpk::rank_key(value, index); });
  m.def("value_of_key", [](int64_t key) { return hpk::value_of_key(key); });
  m.attr("nothing_found") = hpk::kNothingFound;
  m.attr("greatest_key") = hpk::kGreatestKey;
  m.def("best", &best);
  m.def("pairs_met", &pairs_met);
  m.def("coarse_int8", &coarse_int8);
  m.def("topk", &topk, "The greatest inner products, from the coarse ones and what is known of the rows.");
  m.def("local_propagation", &local_propagation);
  m.def("quantiles", &quantiles);
  m.def("contrastive", &contrastive);
  m.def("pack", &pack, "Threshold and pack the coarse (N, N) products of all anchors.");
  m.def("pack_between", &pack_between, "Threshold and pack the coarse (N, K) products of anchors and keys.");
}
