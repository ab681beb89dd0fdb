// The core that host and device share, and the CPU kernels with threads of their own, as a module for the tests only.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <thread>
#include <vector>

#include "common/bits.h"
#include "common/exponential.h"
#include "common/philox.h"
#include "hidden_positives/hidden_positives.h"
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

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.def("set_threads", [](int count) { threads = count; });
  m.def("philox", &philox);
  m.def("draw_negatives", &draw_negatives);
  m.def("transpose_bits", &transpose_bits);
  m.def("repeat_bits", &repeat_bits);
  m.def("exp_nonpositive", &exp_nonpositive);
  m.def("pack", &pack, "Threshold and pack the (N, N) products of all anchors.");
}
