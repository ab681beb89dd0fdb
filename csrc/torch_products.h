// Matrix products by PyTorch, cut into tiles that one thread each computes. How a product is cut does not depend on the
// number of threads, and so neither do its bits, as they do where a BLAS library cuts it by itself.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "common/parallel_for.h"

namespace hpk {

template <typename T>
struct Matrix {
  T* data;
  int64_t rows, columns, row_stride, column_stride;

  Matrix part(int64_t row, int64_t row_count, int64_t column, int64_t column_count) const {
    return {data + row * row_stride + column * column_stride, row_count, column_count, row_stride, column_stride};
  }
  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }
};

// A PyTorch tensor over the memory of a matrix. One made by the thread that uses it: a tensor of the caller's may come
// with modes, such as inference mode, that other threads are not in.
class TorchMatrix {
 public:
  template <typename T>
  explicit TorchMatrix(const Matrix<T>& matrix) {
    const int64_t sizes[] = {matrix.rows, matrix.columns}, strides[] = {matrix.row_stride, matrix.column_stride};
    const int32_t dtype = sizeof(T) == sizeof(double) ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
    check(aoti_torch_create_tensor_from_blob(matrix.data, 2, sizes, strides, 0, dtype, aoti_torch_device_type_cpu(), 0,
                                             &handle_));
  }
  ~TorchMatrix() { aoti_torch_delete_tensor_object(handle_); }
  TorchMatrix(const TorchMatrix&) = delete;
  TorchMatrix& operator=(const TorchMatrix&) = delete;

  // *this = left right, or += that.
  void set_to_product(const TorchMatrix& left, const TorchMatrix& right, bool accumulate) {
    check(aoti_torch_cpu_addmm_out(handle_, handle_, left.handle_, right.handle_, accumulate ? 1.0 : 0.0, 1.0));
  }

 private:
  static void check(AOTITorchError error) {
    if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error("hpkernels: PyTorch refused a matrix product");
  }
  AtenTensorHandle handle_ = nullptr;
};

constexpr int64_t kTileRows = 128, kTileColumns = 256;  // at the most

// `count` rows or columns cut into parts of equal size, but for the last.
struct Parts {
  int64_t count, parts, size;
  Parts(int64_t of, int64_t parts) : count(of), parts(parts), size((of + parts - 1) / parts) {}
  int64_t begin(int64_t part) const { return std::min(count, part * size); }
  int64_t length(int64_t part) const { return begin(part + 1) - begin(part); }
};

// out = left right, or += that.
template <typename T>
void multiply(ParallelFor run, const Matrix<T>& left, const Matrix<T>& right, const Matrix<T>& out, bool accumulate) {
  const Parts across(out.columns, (out.columns + kTileColumns - 1) / kTileColumns);
  // Two tiles at least: a loop of one is not run as a loop, and PyTorch may then cut the product.
  const Parts down(out.rows, std::max((out.rows + kTileRows - 1) / kTileRows, int64_t{across.parts == 1 ? 2 : 1}));
  parallel_for(run, down.parts * across.parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t row = down.begin(tile / across.parts), rows = down.length(tile / across.parts);
      const int64_t column = across.begin(tile % across.parts), columns = across.length(tile % across.parts);
      if (rows == 0 || columns == 0) continue;
      TorchMatrix(out.part(row, rows, column, columns))
          .set_to_product(TorchMatrix(left.part(row, rows, 0, left.columns)),
                          TorchMatrix(right.part(0, right.rows, column, columns)), accumulate);
    }
  });
}

// out = z z^T: what is below the diagonal is a copy of what is above it, to the last bit.
template <typename T>
void square_products(ParallelFor run, const Matrix<T>& z, const Matrix<T>& out) {
  const Parts bands(z.rows, std::max((z.rows + kTileRows - 1) / kTileRows, int64_t{2}));
  parallel_for(run, bands.parts * (bands.parts + 1) / 2, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      int64_t across = 0;  // tiles are counted along the columns of the upper triangle
      while ((across + 1) * (across + 2) / 2 <= tile) ++across;
      const int64_t down = tile - across * (across + 1) / 2;
      const int64_t row = bands.begin(down), rows = bands.length(down);
      const int64_t column = bands.begin(across), columns = bands.length(across);
      if (columns == 0) continue;
      const Matrix<T> above = out.part(row, rows, column, columns);
      TorchMatrix(above).set_to_product(TorchMatrix(z.part(row, rows, 0, z.columns)),
                                        TorchMatrix(z.part(column, columns, 0, z.columns).transposed()), false);
      T* below = out.data + column * out.row_stride + row;
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t count = row == column ? j : rows;
        for (int64_t i = 0; i < count; ++i) below[j * out.row_stride + i] = above.data[i * out.row_stride + j];
      }
    }
  });
}

}  // namespace hpk
