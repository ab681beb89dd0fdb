// The stencil of local_propagation and its transpose, patch by patch: what one CUDA thread does, and free of CUDA so that
// tests run it on a CPU.
#pragma once

#include "common/portable.h"

namespace hpk {

// A task is one patch of this many planes in turn, which share the loads of the weights.
constexpr int kStencilPlanes = 8;

// batch images of dim planes of height x width patches; the window is odd.
struct StencilShape {
  int64_t batch, dim, height, width, window;
};

HPK_HOST_DEVICE int64_t stencil_plane_groups(const StencilShape& shape) {
  return (shape.dim + kStencilPlanes - 1) / kStencilPlanes;
}

HPK_HOST_DEVICE int64_t stencil_tasks(const StencilShape& shape) {
  return shape.batch * stencil_plane_groups(shape) * shape.height * shape.width;
}

// forward:    output[p] = sum over cells of weights[cell][p] * input[p + offset(cell)]
// transposed: output[p] = sum over cells of weights[cell][p - offset(cell)] * input[p - offset(cell)]
// Both gather, in the order of the cells, and pass over what lies outside the image, whatever weight is there. Tasks next
// to each other take patches next to each other. A is the type of the weights and of the sums.
template <bool transposed, typename T, typename A>
HPK_HOST_DEVICE void stencil_task(const T* input, const A* weights, const StencilShape& shape, int64_t task, T* output) {
  const int64_t patches = shape.height * shape.width, radius = shape.window / 2;
  const int64_t patch = task % patches, group = task / patches % stencil_plane_groups(shape);
  const int64_t image = task / patches / stencil_plane_groups(shape);
  const int64_t y = patch / shape.width, x = patch % shape.width;
  const int64_t first_plane = group * kStencilPlanes;
  const int64_t planes = shape.dim - first_plane < kStencilPlanes ? shape.dim - first_plane : kStencilPlanes;
  const int64_t start = (image * shape.dim + first_plane) * patches;
  weights += image * shape.window * shape.window * patches;

  A sums[kStencilPlanes] = {};
  for (int64_t cell = 0, dy = -radius; dy <= radius; ++dy) {
    for (int64_t dx = -radius; dx <= radius; ++dx, ++cell) {
      const int64_t v = transposed ? y - dy : y + dy, u = transposed ? x - dx : x + dx;
      if (v < 0 || v >= shape.height || u < 0 || u >= shape.width) continue;
      const int64_t neighbour = v * shape.width + u;
      const A weight = weights[cell * patches + (transposed ? neighbour : patch)];
      for (int k = 0; k < kStencilPlanes; ++k) {
        if (k < planes) sums[k] += weight * static_cast<A>(input[start + k * patches + neighbour]);
      }
    }
  }
  for (int k = 0; k < kStencilPlanes; ++k) {
    if (k < planes) output[start + k * patches + patch] = static_cast<T>(sums[k]);
  }
}

}  // namespace hpk
