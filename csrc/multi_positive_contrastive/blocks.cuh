// Kernels of the loss over tiles of all pairs, or of the pairs of each image, for either engine: see blocks_cuda.cu and
// blocks_sm90.cu. The formulas are in multi_positive_contrastive.h.
#pragma once

#include "common/combine.cuh"
#include "multi_positive_contrastive/anchor_numbers.cuh"
#include "multi_positive_contrastive/masks.cuh"
#include "multi_positive_contrastive/row_sums.cuh"

namespace hpk {

// What the kernels of blocks need besides the operands of their engine.
struct BlockArguments {
  ContrastiveMasks masks;
  bool within;
  const int32_t* enabled;
  float scale;
};

template <class T>
BlockArguments arguments_of(const BlockPairs<T>& pairs) {
  return {pairs.masks, pairs.within, pairs.enabled, pairs.scale};
}

// Sums the logits of each row over its pairs.
template <class Geometry, bool kAll>
struct SumLogits {
  static constexpr int kWords = Geometry::kColumnBlocks / 4;  // of a tile's row, that a thread has columns of

  const BlockArguments& arguments;
  Scope scope;
  RowSums sums[Geometry::kRowBlocks][2];

  __device__ void operator()(const Fragment<Geometry>& products, int tile, const Team<Geometry>& team) {
    const int first_word = (scope.column + tile * Geometry::kColumns) / 32;
#pragma unroll
    for (int m = 0; m < Geometry::kRowBlocks; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          const int row = scope.row + Geometry::row(team.thread, m, h);
          const int word = first_word + Geometry::column(team.thread, 4 * w, 0) / 32;
          float logits[4][2];
#pragma unroll
          for (int n = 0; n < 4; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) logits[n][c] = arguments.scale * products.values[m][4 * w + n][2 * h + c];
          }
          add(sums[m][h], logits, pair_words<kAll>(arguments.masks, scope, row, word), team.thread % 4 * 2);
        }
      }
    }
  }

 private:
  // The logits of 8 of the 32 columns of a word: of bits 8 n + first + c.
  __device__ static void add(RowSums& row, const float (&logits)[4][2], const PairWords& words, int first) {
    const uint32_t own = 0x03030303u << first;
    if (((words.denominator | words.agnostic | words.specific) & own) == 0) return;
    bool included[4][2];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int bit = 8 * n + first + c;
        included[n][c] = words.denominator >> bit & 1u;
        row.agnostic_sum += words.agnostic >> bit & 1u ? logits[n][c] : 0;
        row.specific_sum += words.specific >> bit & 1u ? logits[n][c] : 0;
      }
    }
    row.agnostic_count += static_cast<float>(__popc(words.agnostic & own));
    row.specific_count += static_cast<float>(__popc(words.specific & own));
    add_logits(row.log_sum, logits, included);
  }
};

// parts[s, :, i] of each anchor over part s of its pairs, l = scale <z_i, z_j>: log sum over Den of exp l; counts of A
// and S; sums of their l.
//
// Grid (strips, parts). FLOPs: 2 D a pair. Bytes: z once for each strip, from cache; 2 or 3 bits a pair.
template <class Engine, bool kAll>
HPK_KERNEL(Engine::kThreads, 1)
contrastive_blocks_fwd_kernel(const __grid_constant__ typename Engine::Operands operands,
                              const __grid_constant__ BlockArguments arguments, float* __restrict__ parts) {
  using Geometry = typename Engine::Geometry;
  if (*arguments.enabled != arguments.within) return;
  const ContrastiveMasks& masks = arguments.masks;
  SumLogits<Geometry, kAll> consumer{
      arguments, scope_of(static_cast<int>(blockIdx.x), Geometry::kRows, masks.anchors, masks.group, arguments.within), {}};
  const Scope& scope = consumer.scope;
  const TileRange all{0, tiles_of(Geometry::kColumns, masks.anchors, masks.group, arguments.within)};
  const TileRange tiles = part_of(all, blockIdx.y, gridDim.y);
  if constexpr (Engine::kGathers) {
    const auto left_row = [&](int r) { return scope.holds(scope.row + r) ? scope.row + r : -1; };
    const auto right_row = [&](int tile, int c) {
      const int column = scope.column + tile * Geometry::kColumns + c;
      return scope.holds(column) ? column : -1;
    };
    Engine::run(operands, left_row, right_row, tiles, shared_memory(), consumer);
  } else {
    Engine::run(operands, scope.row, tiles, shared_memory(), consumer);
  }
  combine_rows<Geometry>(consumer.sums, shared_memory(), [&](int r, const RowSums& sums) {
    const int row = scope.row + r;
    if (!scope.holds(row)) return;
    const int64_t anchors = masks.anchors;
    float* const part = parts + blockIdx.y * 5 * anchors + row;
    part[0] = sums.log_sum.value();
    part[anchors] = sums.agnostic_count;
    part[2 * anchors] = sums.specific_count;
    part[3 * anchors] = sums.agnostic_sum;
    part[4 * anchors] = sums.specific_sum;
  });
}

template <class Engine, class T>
void launch_blocks_forward(const typename Engine::Operands& operands, const BlockPairs<T>& pairs, float* parts,
                           cudaStream_t stream) {
  const int64_t anchors = pairs.masks.anchors, group = pairs.masks.group;
  const dim3 grid(static_cast<unsigned>(strips_of(Engine::Geometry::kRows, anchors, group, pairs.within)),
                  static_cast<unsigned>(contrastive_blocks_parts(anchors, group, pairs.within)));
  const auto kernel = pairs.masks.negatives == nullptr ? contrastive_blocks_fwd_kernel<Engine, true>
                                                       : contrastive_blocks_fwd_kernel<Engine, false>;
  launch(kernel, grid, Engine::kThreads, Engine::shared_bytes(operands, 0), stream, operands, arguments_of(pairs), parts);
}

// Turns products into g_ij + g_ji, and writes the gradient.
template <class Engine, bool kAll>
struct BlockGradient {
  using Geometry = typename Engine::Geometry;
  using SumGeometry = typename Engine::SumGeometry;

  const BlockArguments& arguments;
  Scope scope;
  bool symmetric;
  const float* numbers;
  float* grad;
  int dim;

  __device__ void make_g(Fragment<Geometry>& products, int tile, const Team<Geometry>& team) const {
    const ContrastiveMasks& masks = arguments.masks;
    const int first_column = scope.column + tile * Geometry::kColumns;
    const int first_position = kAll ? 0 : first_column % masks.group;
    const int rows[] = {scope.row + Geometry::row(team.thread, 0, 0), scope.row + Geometry::row(team.thread, 0, 1)};
    // Read for each tile, from cache: registers are short.
    const AnchorNumbers of_rows[] = {numbers_of_anchor(rows[0]), numbers_of_anchor(rows[1])};
#pragma unroll
    for (int w = 0; w < Geometry::kColumnBlocks / 4; ++w) {
      const int word = (first_column + Geometry::column(team.thread, 4 * w, 0)) / 32;
      const PairWords of_i[] = {pair_words<kAll>(masks, scope, rows[0], word),
                                pair_words<kAll>(masks, scope, rows[1], word)};
#pragma unroll
      for (int n = 4 * w; n < 4 * w + 4; ++n) {
        float(&values)[4] = products.values[0][n];
        // Nothing to do beyond the end. The branch also keeps the compiler from reading all columns' numbers at once.
        if (((of_i[0].others | of_i[1].others) >> (Geometry::column(team.thread, n, 0) % 32) & 3u) == 0) {
          values[0] = values[1] = values[2] = values[3] = 0;
          continue;
        }
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int place = Geometry::column(team.thread, n, c);
          const AnchorNumbers j = numbers_of_anchor(first_column + place);
          // Rows of a warp are in the same word.
          const MirroredWords of_j = mirrored_words<kAll>(masks, scope, symmetric, first_column + place,
                                                          first_position + place, rows[0] / 32);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float& value = values[2 * h + c];
            value = g_of_pair(arguments.scale * value, of_rows[h], of_i[h], place % 32, j, of_j, rows[h] % 32);
          }
        }
      }
    }
  }

  __device__ void store(const Fragment<SumGeometry>& sums, const Team<Geometry>& team) const {
    const int first = (static_cast<int>(blockIdx.y) * SumGeometry::kTeams + team.index) * SumGeometry::kColumns;
#pragma unroll
    for (int n = 0; n < SumGeometry::kColumnBlocks; ++n) {
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const int row = scope.row + SumGeometry::row(team.thread, 0, part / 2);
        const int feature = first + SumGeometry::column(team.thread, n, part % 2);
        if (scope.holds(row) && feature < dim) grad[int64_t{row} * dim + feature] = sums.values[0][n][part];
      }
    }
  }

 private:
  __device__ __forceinline__ AnchorNumbers numbers_of_anchor(int anchor) const {
    if (!scope.holds(anchor)) return {};
    return numbers_of(numbers, arguments.masks.anchors, anchor);
  }

  // Bit `column` of the words of i, and bit `row` of those of j.
  __device__ __forceinline__ float g_of_pair(float logit, const AnchorNumbers& i, const PairWords& of_i, int column,
                                             const AnchorNumbers& j, const MirroredWords& of_j, int row) const {
    const auto is_set = [](uint32_t word, int bit) { return (word >> bit & 1u) != 0; };
    const bool other = is_set(of_i.others, column);
    const bool agnostic = is_set(of_i.agnostic, column), specific = is_set(of_i.specific, column);
    const bool mirrored_agnostic = symmetric ? agnostic : other && is_set(of_j.agnostic, row);
    const bool mirrored_specific = symmetric ? specific : other && is_set(of_j.specific, row);
    const bool in_j = other && (kAll || mirrored_agnostic || is_set(of_j.drawn, row));
    float g = is_set(of_i.denominator, column) ? i.push * exp_of(logit - i.log_denominator) : 0;
    g += in_j ? j.push * exp_of(logit - j.log_denominator) : 0;
    g -= (agnostic ? i.pull : 0) + (mirrored_agnostic ? j.pull : 0);
    return g - ((specific ? i.specific : 0) + (mirrored_specific ? j.specific : 0));
  }
};

// grad_i = sum over the pairs of (g_ij + g_ji) z_j.
//
// Grid (strips, blocks of features). FLOPs: 4 D a pair, 6 D if there are two blocks of features. Bytes: z once or twice
// for each strip, from cache; 3 to 6 bits a pair; grad, float32, once.
template <class Engine, bool kAll>
HPK_KERNEL(Engine::kThreads, 1)
contrastive_blocks_bwd_kernel(const __grid_constant__ typename Engine::Operands operands,
                              const __grid_constant__ BlockArguments arguments, bool symmetric,
                              const float* __restrict__ numbers, float* __restrict__ grad, int dim) {
  using Geometry = typename Engine::Geometry;
  if (*arguments.enabled != arguments.within) return;
  const ContrastiveMasks& masks = arguments.masks;
  const Scope scope = scope_of(static_cast<int>(blockIdx.x), Geometry::kRows, masks.anchors, masks.group, arguments.within);
  const BlockGradient<Engine, kAll> consumer{arguments, scope, symmetric, numbers, grad, dim};
  const TileRange tiles{0, tiles_of(Engine::kTileColumns, masks.anchors, masks.group, arguments.within)};
  if constexpr (Engine::kGathers) {
    const auto left_row = [&](int r) { return scope.holds(scope.row + r) ? scope.row + r : -1; };
    const auto right_row = [&](int tile, int c) {
      const int column = scope.column + tile * Geometry::kColumns + c;
      return scope.holds(column) ? column : -1;
    };
    Engine::run(operands, left_row, right_row, tiles, blockIdx.y, shared_memory(), consumer);
  } else {
    Engine::run(operands, scope.row, tiles, shared_memory(), consumer);
  }
}

template <class Engine, class T>
void launch_blocks_backward(const typename Engine::Operands& operands, const BlockPairs<T>& pairs, bool symmetric,
                            const float* numbers, float* grad, int dim, cudaStream_t stream) {
  const int64_t strips = strips_of(Engine::Geometry::kRows, pairs.masks.anchors, pairs.masks.group, pairs.within);
  const dim3 grid(static_cast<unsigned>(strips), Engine::feature_blocks(dim));
  const auto kernel = pairs.masks.negatives == nullptr ? contrastive_blocks_bwd_kernel<Engine, true>
                                                       : contrastive_blocks_bwd_kernel<Engine, false>;
  launch(kernel, grid, Engine::kThreads, Engine::shared_bytes(), stream, operands, arguments_of(pairs), symmetric, numbers,
         grad, dim);
}

}  // namespace hpk
