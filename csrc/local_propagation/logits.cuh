// The logits of local_propagation, written to a workspace that stays in the second-level cache. For either engine: see
// weights_cuda.cu and logits_sm90.cu.
#pragma once

#include "common/schedule.h"
#include "engines/team.cuh"
#include "local_propagation/local_propagation.h"

namespace hpk {

// Consumer

// Writes the products of a tile, where both are patches.
template <class Geometry>
struct StoreLogits {
  const LogitStrips& strips;
  float scale;
  int first_patch;
  float* logits;  // of the block's rows

  __device__ void operator()(const Fragment<Geometry>& products, int64_t tile, const Team<Geometry>& team) const {
    const int first_column = static_cast<int>(tile) * Geometry::kColumns;
#pragma unroll
    for (int m = 0; m < Geometry::kRowBlocks; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = Geometry::row(team.thread, m, h);
        if (first_patch + row >= strips.patches) continue;
        float* const to = logits + int64_t{row} * strips.pitch + first_column;
#pragma unroll
        for (int n = 0; n < Geometry::kColumnBlocks; ++n) {
          const int column = Geometry::column(team.thread, n, 0);
          if (first_column + column >= strips.patches) continue;
          const float(&values)[4] = products.values[m][n];  // the row's end may get one more: the pitch is even
          *reinterpret_cast<float2*>(to + column) = {values[2 * h] * scale, values[2 * h + 1] * scale};
        }
      }
    }
  }
};

// Kernel

// logits[i, j] = scale * <q_i, k_j> of the patches i, j of one image, q and k with all heads side by side
//
// Grid (strips or parts of their rows, parts of the tiles). FLOPs: 2 G^2 heads d an image, for each G rounded up to whole
// tiles. Bytes: queries and keys once for every strip of an image, from cache; 4 written a logit.
template <class Engine>
HPK_KERNEL(Engine::kThreads, Engine::kGathers ? 2 : 1)
local_propagation_logits_fwd_kernel(const __grid_constant__ typename Engine::Operands operands,
                                    const __grid_constant__ LogitArguments arguments) {
  using Geometry = typename Engine::Geometry;
  constexpr int kPieces = kLogitStripRows / Geometry::kRows;
  const LogitStrips& strips = arguments.strips;
  const int piece = static_cast<int>(blockIdx.x), strip = strips.first + piece / kPieces, image = strip / strips.per_image;
  const int first_patch = strip % strips.per_image * kLogitStripRows + piece % kPieces * Geometry::kRows;
  if (first_patch >= strips.patches) return;
  const int64_t first_token = image * arguments.tokens + arguments.prefix;
  StoreLogits<Geometry> consumer{strips, arguments.scale, first_patch,
                                 strips.logits + int64_t{piece} * Geometry::kRows * strips.pitch};
  const TileRange all{0, divide_up(strips.patches, Geometry::kColumns)};
  const TileRange tiles = part_of(all, blockIdx.y, gridDim.y);
  if constexpr (Engine::kGathers) {
    const auto token = [&](int patch) { return patch < strips.patches ? first_token + patch : int64_t{-1}; };
    Engine::run(
        operands, [&](int r) { return token(first_patch + r); },
        [&](int64_t tile, int c) { return token(static_cast<int>(tile) * Geometry::kColumns + c); }, tiles,
        shared_memory(), consumer);
  } else {
    // Products with tokens that are no patches of the image are not stored.
    Engine::run(operands, first_token + first_patch, tiles, shared_memory(), consumer, first_token);
  }
}

// Launch

// Each block has `least` tiles or more.
template <class Engine>
void launch_logits(const typename Engine::Operands& operands, const LogitArguments& arguments, int64_t least,
                   cudaStream_t stream) {
  using Geometry = typename Engine::Geometry;
  const int64_t pieces = int64_t{arguments.strips.count} * (kLogitStripRows / Geometry::kRows);
  const int64_t tiles = divide_up(arguments.strips.patches, Geometry::kColumns);
  const dim3 grid(static_cast<unsigned>(pieces), static_cast<unsigned>(parts_for(pieces, tiles, kWantedBlocks, least)));
  launch(local_propagation_logits_fwd_kernel<Engine>, grid, Engine::kThreads, Engine::shared_bytes(operands, 0), stream,
         operands, arguments);
}

}  // namespace hpk
