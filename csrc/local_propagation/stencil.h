// The stencil of local_propagation and its transpose: what one CUDA thread does, and free of CUDA so that tests run it
// on a CPU. Both gather and pass over what lies outside the image, whatever weight is there:
//
// forward:    output[p] = sum over cells of weights[cell][p] * input[p + offset(cell)]
// transposed: output[p] = sum over cells of weights[cell][p - offset(cell)] * input[p - offset(cell)]
#pragma once

#include "common/portable.h"

namespace hpk {

// batch images of dim planes of height x width patches; the window is odd.
struct StencilShape {
  int64_t batch, dim, height, width, window;
};

// Any window. A task is one patch of this many planes in turn, which share the loads of the weights.
constexpr int kStencilPlanes = 8;

HPK_HOST_DEVICE int64_t stencil_plane_groups(const StencilShape& shape) {
  return (shape.dim + kStencilPlanes - 1) / kStencilPlanes;
}

HPK_HOST_DEVICE int64_t stencil_tasks(const StencilShape& shape) {
  return shape.batch * stencil_plane_groups(shape) * shape.height * shape.width;
}

// Tasks next to each other take patches next to each other.
template <bool transposed, typename T>
HPK_HOST_DEVICE void stencil_task(const T* input, const float* weights, const StencilShape& shape, int64_t task,
                                  T* output) {
  const int64_t patches = shape.height * shape.width, radius = shape.window / 2;
  const int64_t patch = task % patches, group = task / patches % stencil_plane_groups(shape);
  const int64_t image = task / patches / stencil_plane_groups(shape);
  const int64_t y = patch / shape.width, x = patch % shape.width;
  const int64_t first_plane = group * kStencilPlanes;
  const int64_t planes = shape.dim - first_plane < kStencilPlanes ? shape.dim - first_plane : kStencilPlanes;
  const int64_t start = (image * shape.dim + first_plane) * patches;
  weights += image * shape.window * shape.window * patches;

  float sums[kStencilPlanes] = {};
  for (int64_t cell = 0, dy = -radius; dy <= radius; ++dy) {
    for (int64_t dx = -radius; dx <= radius; ++dx, ++cell) {
      const int64_t v = transposed ? y - dy : y + dy, u = transposed ? x - dx : x + dx;
      if (v < 0 || v >= shape.height || u < 0 || u >= shape.width) continue;
      const int64_t neighbour = v * shape.width + u;
      const float weight = weights[cell * patches + (transposed ? neighbour : patch)];
      for (int k = 0; k < kStencilPlanes; ++k) {
        if (k < planes) sums[k] += weight * static_cast<float>(input[start + k * patches + neighbour]);
      }
    }
  }
  for (int k = 0; k < kStencilPlanes; ++k) {
    if (k < planes) output[start + k * patches + patch] = static_cast<T>(sums[k]);
  }
}

// A window of 3 x 3, and rows of whole runs: a run is four patches of a row.
constexpr int kRunPatches = 4;

// The start of a run in the rows above, at and below it, in one plane. A row that is outside the image stands somewhere
// else, where there is a zero before the run and zeros for it and after; it stays there, by a step of 0.
template <typename T>
struct RunRows {
  const T* at[3];
  int step[3];  // to the next plane

  HPK_HOST_DEVICE void next_plane() {
    for (int dy = 0; dy < 3; ++dy) at[dy] += step[dy];
  }
};

// A thread keeps the weights of its run, and takes one plane after another. Planes start at multiples of a run's bytes.
template <bool transposed>
struct StencilRun {
  int height, width, y, x;
  float weights[3][3][kRunPatches];  // by row and column of the neighbour; 0 for what is outside

  // `cells` are the weights of the image, 9 times height * width.
  HPK_HOST_DEVICE StencilRun(const float* cells, int height_, int width_, int run)
      : height(height_), width(width_), y(run * kRunPatches / width_), x(run * kRunPatches % width_) {
    for (int dy = 0; dy < 3; ++dy) {
      for (int dx = 0; dx < 3; ++dx) {
        for (int i = 0; i < kRunPatches; ++i) {
          const int v = y + dy - 1, u = x + i + dx - 1, cell = 3 * dy + dx;
          const bool is_inside = v >= 0 && v < height && u >= 0 && u < width;
          // The neighbour has its weight for this patch in the opposite cell.
          const int at = transposed ? ((8 - cell) * height + v) * width + u : (cell * height + y) * width + x + i;
          weights[dy][dx][i] = is_inside ? cells[at] : 0.0f;
        }
      }
    }
  }

  template <typename T>
  HPK_HOST_DEVICE RunRows<T> rows(const T* plane, const T* zeros) const {
    RunRows<T> rows;
    for (int dy = 0; dy < 3; ++dy) {
      const int v = y + dy - 1;
      const bool is_inside = v >= 0 && v < height;
      rows.at[dy] = is_inside ? plane + v * width + x : zeros;
      rows.step[dy] = is_inside ? height * width : 0;
    }
    return rows;
  }

  template <typename T>
  HPK_HOST_DEVICE void sum(const RunRows<T>& rows, float (&sums)[kRunPatches]) const {
    for (int i = 0; i < kRunPatches; ++i) sums[i] = 0;
    for (int dy = 0; dy < 3; ++dy) {
      float values[kRunPatches + 2];
      load(rows.at[dy], values);
      for (int dx = 0; dx < 3; ++dx) {
        for (int i = 0; i < kRunPatches; ++i) sums[i] += weights[dy][dx][i] * values[i + dx];
      }
    }
  }

  template <typename T>
  HPK_HOST_DEVICE void store(const float (&sums)[kRunPatches], T* plane) const {
    Together<T> together;
    for (int i = 0; i < kRunPatches; ++i) together.values[i] = static_cast<T>(sums[i]);
    *reinterpret_cast<Together<T>*>(plane + y * width + x) = together;
  }

 private:
  // Loaded and stored at once.
  template <typename T>
  struct alignas(kRunPatches * sizeof(T)) Together {
    T values[kRunPatches];
  };

  // values[i] = row[i - 1], 0 outside of the row
  template <typename T>
  HPK_HOST_DEVICE void load(const T* row, float (&values)[kRunPatches + 2]) const {
    const auto together = *reinterpret_cast<const Together<T>*>(row);
    values[0] = x > 0 ? static_cast<float>(row[-1]) : 0.0f;
    for (int i = 0; i < kRunPatches; ++i) values[i + 1] = static_cast<float>(together.values[i]);
    values[kRunPatches + 1] = x + kRunPatches < width ? static_cast<float>(row[kRunPatches]) : 0.0f;
  }
};

}  // namespace hpk
