// The core that host and device share, and the CPU kernels with threads of their own, as a module for the tests only.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <limits>
#include <thread>
#include <vector>

#include "common/bits.h"
#include "common/exponential.h"
#include "common/philox.h"
#include "hidden_positives/hidden_positives.h"
#include "local_propagation/local_propagation.h"
#include "masked_topk/masked_topk.h"
#include "multi_positive_contrastive/multi_positive_contrastive.h"

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

Array<uint32_t> repeat_bits(Array<uint32_t> bits, int64_t period, int64_t count) {
  Array<uint32_t> repeated(hpk::words_per_row(count));
  hpk::repeat_bits(bits.data(), period, count, repeated.mutable_data());
  return repeated;
}

Array<float> exp_nonpositive(Array<float> values) {
  Array<float> result(values.size());
  for (py::ssize_t i = 0; i < values.size(); ++i) result.mutable_data()[i] = hpk::exp_nonpositive(values.data()[i]);
  return result;
}

Array<uint32_t> pack(Array<float> products, Array<float> threshold) {
  const int64_t anchors = threshold.size();
  Array<uint32_t> bits({anchors, hpk::words_per_row(anchors)});
  hpk::hidden_positives_pack_cpu<float>(run, products.data(), threshold.data(), 0, anchors, anchors,
                                        bits.mutable_data());
  return bits;
}

py::tuple topk(Array<float> products, int64_t k) {
  const int64_t rows = products.shape(0), pool = products.shape(1);
  Array<float> values({rows, k});
  Array<int64_t> indices({rows, k});
  hpk::masked_topk_select_cpu<float>(run, products.mutable_data(), nullptr, nullptr, nullptr, rows, pool, k,
                                     values.mutable_data(), indices.mutable_data());
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

// Forward and backward by rows, or by one block of everything, with made-up coefficients.
Array<float> contrastive(Array<float> z, Array<float> products, Array<uint32_t> agnostic, Array<uint32_t> negatives,
                         bool rows) {
  const int64_t anchors = z.shape(0), dim = z.shape(1), per_image = negatives.shape(0);
  const Array<uint32_t> agnostic_t = transpose_bits(agnostic, anchors), negatives_t = transpose_bits(negatives, anchors);
  const hpk::Relations relations{anchors,          per_image,           agnostic.data(),  agnostic_t.data(),
                                 agnostic.data(),  agnostic_t.data(),   negatives.data(), negatives_t.data()};
  hpk::count_pairs_cpu(run, relations);
  std::vector<float> sums(3 * anchors, 0.0f), coefficients(anchors, 0.5f);
  std::vector<int64_t> counts(2 * anchors, 0);
  std::fill(sums.begin(), sums.begin() + anchors, -std::numeric_limits<float>::infinity());
  const hpk::AnchorSums<float> found{sums.data(), sums.data() + anchors, sums.data() + 2 * anchors, counts.data(),
                                     counts.data() + anchors};
  const hpk::AnchorCoefficients<float> known{sums.data(), coefficients.data(), coefficients.data(),
                                             coefficients.data()};
  Array<float> result({anchors, rows ? dim : anchors});
  if (rows) {
    std::fill(result.mutable_data(), result.mutable_data() + result.size(), 0.0f);
    hpk::contrastive_rows_forward_cpu<float>(run, z.data(), dim, 2.0f, relations, true, found);
    hpk::contrastive_rows_backward_cpu<float>(run, z.data(), dim, 2.0f, relations, true, known, result.mutable_data());
  } else {
    std::copy(products.data(), products.data() + products.size(), result.mutable_data());
    const hpk::Block<float> block{result.mutable_data(), 0, anchors, 0, anchors};
    hpk::contrastive_block_forward_cpu<float>(run, block, 2.0f, relations, found);
    hpk::contrastive_block_backward_cpu<float>(run, block, 1.0f, relations, known);
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.def("set_threads", [](int count) { threads = count; });
  m.def("philox", &philox);
  m.def("draw_negatives", &draw_negatives);
  m.def("transpose_bits", &transpose_bits);
  m.def("repeat_bits", &repeat_bits);
  m.def("exp_nonpositive", &exp_nonpositive);
  m.def("topk", &topk);
  m.def("local_propagation", &local_propagation);
  m.def("contrastive", &contrastive);
  m.def("pack", &pack, "Threshold and pack the (N, N) products of all anchors.");
}
