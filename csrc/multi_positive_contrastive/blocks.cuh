// Kernels of the loss over tiles of all pairs, or of the pairs of each image, for either engine: see blocks_cuda.cu and
// blocks_sm90.cu. The formulas are in multi_positive_contrastive.h.
#pragma once

#include "engines/team.cuh"
#include "multi_positive_contrastive/anchors.cuh"
#include "multi_positive_contrastive/relations.cuh"

namespace hpk {

// Types

// The most that logits under a constant shift may be apart: exp of it is far from the least normal number.
constexpr float kMostApart = 80;
// The greatest shift that is multiplied by log2(e) with the logits, which takes one instruction. Of large logits that would
// leave too few digits, so that the greatest is not 1 under its own log-sum: they are rounded before they are subtracted.
constexpr float kGreatestShift = 32;

// What the kernels of blocks need besides the operands of their engine.
struct BlockArguments {
  ContrastiveMasks masks;
  bool within, has_lists;
  const int64_t* state;
  float scale;

  // Of all pairs where there are no lists, or not all fit; within images where they do.
  __device__ bool run() const { return within ? state[0] == 0 : !has_lists || state[0] != 0; }

  template <class Geometry>
  __device__ Scope scope() const {
    return scope_of(static_cast<int>(blockIdx.x), Geometry::kRows, masks.anchors, masks.group, within, masks.first);
  }

  // Which row of what is computed is that of an anchor in a scope, negative for none.
  __device__ __forceinline__ int own_row(const Scope& scope, int anchor) const {
    return scope.holds(anchor) && anchor < masks.last ? anchor - masks.first : -1;
  }
};

// Rows of strips: a part of the anchors starts within 32 of them.
template <class T>
int64_t rows_of_strips(const BlockPairs<T>& pairs) {
  return pairs.masks.last - pairs.masks.first / 32 * 32;
}

template <class T>
BlockArguments arguments_of(const BlockPairs<T>& pairs) {
  return {pairs.masks, pairs.within, pairs.has_lists, pairs.state, pairs.scale};
}

// Calls run(left_row, right_row) with what an engine that gathers takes: rows of a strip, and columns of its tiles.
template <class Geometry, class Run>
__device__ __forceinline__ void with_rows_of(const Scope& scope, const Run& run) {
  const auto held = [&](int anchor) { return scope.holds(anchor) ? anchor : -1; };
  run([&](int r) { return held(scope.row + r); },
      [&](int tile, int c) { return held(scope.column + tile * Geometry::kColumns + c); });
}

// Consumer

// Sums the logits of each row over its pairs.
template <class Engine, bool kAll>
struct SumLogits {
  using Geometry = typename Engine::Geometry;
  static constexpr int kWords = Geometry::kColumnBlocks / 4;  // of a tile's row, that a thread has columns of

  const BlockArguments& arguments;
  Scope scope;
  bool bounded;  // the greatest logit is known, and stays
  RowSums sums[Geometry::kRowBlocks][2];
  MaskWords<kWords> ahead[2];

  // No logit is above `greatest`.
  __device__ SumLogits(const BlockArguments& arguments_, const Scope& scope_, float greatest)
      : arguments(arguments_), scope(scope_), bounded(2 * greatest <= kMostApart), sums{}, ahead{} {
    if (!bounded) return;
#pragma unroll
    for (int m = 0; m < Geometry::kRowBlocks; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) sums[m][h].log_sum.greatest = greatest;
    }
  }

  // Reads the words of the thread's first two rows of a tile, for which there are registers. Those of each other row, and
  // of the tile after, are read two rows ahead.
  __device__ __forceinline__ void read(int tile) {
    read(tile, 0);
    read(tile, 1);
  }

  __device__ __forceinline__ void operator()(const Fragment<Geometry>& products, int tile, const Team<Geometry>& team) {
    constexpr int kRows = 2 * Geometry::kRowBlocks;
    if constexpr (Engine::kGathers) read(tile);
    const int word = first_word(team.thread, tile);
    uint32_t inside[kWords];
#pragma unroll
    for (int w = 0; w < kWords; ++w) inside[w] = inside_bits(scope, word + w);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      PairWords pairs[kWords];
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const MaskWords<kWords>& own = ahead[r % 2];
        pairs[w] = pair_words<kAll>(own.agnostic[w], own.specific[w], own.drawn[w], inside[w],
                                    row_of(team.thread, r), word + w, team.thread % 4 * 2);
      }
      if (r + 2 < kRows) {
        read(tile, r + 2);
      } else if constexpr (!Engine::kGathers) {
        read(tile + Geometry::kTeams, r + 2 - kRows);
      }
      add(sums[r / 2][r % 2], products.values[r / 2], r % 2, pairs);
    }
  }

  __device__ void finish() {
#pragma unroll
    for (int m = 0; m < Geometry::kRowBlocks; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sums[m][h].agnostic *= arguments.scale;
        sums[m][h].specific *= arguments.scale;
      }
    }
  }

 private:
  __device__ __forceinline__ int row_of(int thread, int r) const {
    return scope.row + Geometry::row(thread, r / 2, r % 2);
  }

  __device__ __forceinline__ void read(int tile, int r) {
    const int thread = threadIdx.x % Geometry::kTeamThreads;
    const int row = row_of(thread, r), first = first_word(thread, tile);
    read_positives(arguments.masks, row, first, ahead[r % 2]);
    if constexpr (!kAll) read_negatives(arguments.masks, row, first, ahead[r % 2]);
  }

  __device__ __forceinline__ int first_word(int thread, int tile) const {
    return (scope.column + tile * Geometry::kColumns + Geometry::column(thread, 0, 0)) >> 5;
  }

  // Adds products of a row: value 2 h + c of block 4 w + n is of bit 8 n + c of word w.
  __device__ __forceinline__ void add(RowSums& row, const float (&products)[Geometry::kColumnBlocks][4], int h,
                                      const PairWords (&pairs)[kWords]) const {
    LogSum& sum = row.log_sum;
    if (bounded) {
      const float scale = kLog2OfE * arguments.scale, base = kLog2OfE * sum.greatest;
#pragma unroll
      for (int n = 0; n < Geometry::kColumnBlocks; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float term = exp2_of(scale * products[n][2 * h + c] - base);
          if (pairs[n / 4].denominator & (1u << (n % 4 * 8 + c))) sum.total += term;
        }
      }
    } else {
      float greatest = sum.greatest;
#pragma unroll
      for (int n = 0; n < Geometry::kColumnBlocks; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const bool included = pairs[n / 4].denominator & (1u << (n % 4 * 8 + c));
          greatest = included ? fmaxf(greatest, __fmul_rn(arguments.scale, products[n][2 * h + c])) : greatest;
        }
      }
      if (greatest > sum.greatest) sum = {greatest, sum.total * exp2_of(kLog2OfE * (sum.greatest - greatest))};
      const float base = greatest == kLogOfNothing ? 0 : greatest;
#pragma unroll
      for (int n = 0; n < Geometry::kColumnBlocks; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float term = exp_of_difference(arguments.scale, products[n][2 * h + c], base);
          if (pairs[n / 4].denominator & (1u << (n % 4 * 8 + c))) sum.total += term;
        }
      }
    }
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if ((pairs[w].agnostic | pairs[w].specific) == 0) continue;  // most are
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float product = products[4 * w + n][2 * h + c];
          if (pairs[w].agnostic & (1u << (8 * n + c))) row.agnostic += product;
          if (pairs[w].specific & (1u << (8 * n + c))) row.specific += product;
        }
      }
    }
  }
};

// Turns products into g_ij + g_ji, and writes the gradient.
template <class Engine, bool kAll>
struct BlockGradient {
  using Element = typename Engine::Element;
  using Geometry = typename Engine::Geometry;
  using SumGeometry = typename Engine::SumGeometry;
  static constexpr int kWords = Geometry::kColumnBlocks / 4;  // of a tile's row, that a thread has columns of

  const BlockArguments& arguments;
  const BlockSums& of_anchors;
  Scope scope;
  bool shared;  // all anchors have one shift, a small one, so that one exponential serves both directions
  MaskWords<kWords> rows[2];

  // The words of a tile in A and S. Read ahead they come while the tile is multiplied.
  __device__ __forceinline__ void read(int tile) {
    const int thread = threadIdx.x % Geometry::kTeamThreads;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      read_positives(arguments.masks, row_of(thread, h), first_column(thread, tile) >> 5, rows[h]);
    }
  }

  __device__ __forceinline__ void make_g(Fragment<Geometry>& products, int tile, const Team<Geometry>& team) {
    read(tile);  // registers are short
    const auto of_anchor = [&](int anchor) {
      return scope.holds(anchor) ? numbers_of(of_anchors.numbers, anchor) : AnchorNumbers{};
    };
    const AnchorNumbers of_rows[] = {of_anchor(row_of(team.thread, 0)), of_anchor(row_of(team.thread, 1))};
    const int first = scope.column + tile * Geometry::kColumns;
    make_g(products, tile, team.thread, of_rows, [&](int column) { return of_anchor(first + column); });
  }

  // With the numbers of the strip's rows and the tile's columns, of which those of no anchor may be anything.
  __device__ __forceinline__ void make_g(Fragment<Geometry>& products, int tile, const Team<Geometry>& team,
                                         const float4* rows_numbers, const float4* columns_numbers) {
    const auto of_place = [](float4 found) { return AnchorNumbers{found.x, found.y, found.z, found.w}; };
    const AnchorNumbers of_rows[] = {of_place(rows_numbers[Geometry::row(team.thread, 0, 0)]),
                                     of_place(rows_numbers[Geometry::row(team.thread, 0, 1)])};
    make_g(products, tile, team.thread, of_rows, [&](int column) { return of_place(columns_numbers[column]); });
    read(tile + Geometry::kTeams);
  }

  __device__ void store(const Fragment<SumGeometry>& sums, const Team<Geometry>& team) const {
    if (arguments.within) {
      store(sums, team, static_cast<float*>(of_anchors.sums), 1);
    } else {
      store(sums, team, static_cast<Element*>(of_anchors.sums), *of_anchors.factor);
    }
  }

 private:
  __device__ __forceinline__ int row_of(int thread, int h) const { return scope.row + Geometry::row(thread, 0, h); }

  // Of the thread's words.
  __device__ __forceinline__ int first_column(int thread, int tile) const {
    return (scope.column + tile * Geometry::kColumns + Geometry::column(thread, 0, 0)) & ~31;
  }

  template <class Numbers>
  __device__ __forceinline__ void make_g(Fragment<Geometry>& products, int tile, int thread,
                                         const AnchorNumbers (&i)[2], const Numbers& numbers) {
    if constexpr (!kAll) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        read_negatives(arguments.masks, row_of(thread, h), first_column(thread, tile) >> 5, rows[h]);
      }
    }
    shared ? make_g<true>(products, tile, thread, i, numbers) : make_g<false>(products, tile, thread, i, numbers);
  }

  template <bool kShared, class Numbers>
  __device__ __forceinline__ void make_g(Fragment<Geometry>& products, int tile, int thread,
                                         const AnchorNumbers (&i)[2], const Numbers& numbers) {
    const int own[2] = {row_of(thread, 0), row_of(thread, 1)};
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      PairWords of_i[2], of_j[2];
      pairs_of(thread, tile, w, own, of_i, of_j);
#pragma unroll
      for (int n = 4 * w; n < 4 * w + 4; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const AnchorNumbers j = numbers(Geometry::column(thread, n, c));
          const uint32_t bit = 1u << (n % 4 * 8 + c);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float& value = products.values[0][n][2 * h + c];
            const float of_row = kShared ? exp2_of(kLog2OfE * arguments.scale * value - kLog2OfE * i[h].shift)
                                         : exp_of_difference(arguments.scale, value, i[h].shift);
            const float of_column = kShared ? of_row : exp_of_difference(arguments.scale, value, j.shift);
            value = of_i[h].denominator & bit ? i[h].factor * of_row : 0;
            if (of_j[h].denominator & bit) value += j.factor * of_column;
          }
        }
      }
      const uint32_t pulled = of_i[0].agnostic | of_i[0].specific | of_i[1].agnostic | of_i[1].specific |
                              of_j[0].agnostic | of_j[0].specific | of_j[1].agnostic | of_j[1].specific;
      if (pulled == 0) continue;  // most are not
#pragma unroll
      for (int n = 4 * w; n < 4 * w + 4; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const AnchorNumbers j = numbers(Geometry::column(thread, n, c));
          const uint32_t bit = 1u << (n % 4 * 8 + c);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float& value = products.values[0][n][2 * h + c];
            if (of_i[h].agnostic & bit) value -= i[h].pull;
            if (of_j[h].agnostic & bit) value -= j.pull;
            if (of_i[h].specific & bit) value -= i[h].specific;
            if (of_j[h].specific & bit) value -= j.specific;
          }
        }
      }
    }
  }

  // The relations of the thread's rows to 32 columns, and those of the columns to them.
  __device__ __forceinline__ void pairs_of(int thread, int tile, int w, const int (&own)[2], PairWords (&of_i)[2],
                                           PairWords (&of_j)[2]) const {
    const int word = (first_column(thread, tile) >> 5) + w, first = thread % 4 * 2;
    const uint32_t inside = inside_bits(scope, word);
    uint32_t agnostic[2] = {rows[0].agnostic[w], rows[1].agnostic[w]};
    uint32_t specific[2] = {rows[0].specific[w], rows[1].specific[w]}, drawn_by[2] = {};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      of_i[h] = pair_words<kAll>(agnostic[h], specific[h], rows[h].drawn[w], inside, own[h], word, first);
    }
    const ContrastiveMasks& masks = arguments.masks;
    const int column = 32 * word + thread % 32;
    if (!of_anchors.symmetric) {
      const MasksByColumns& by = of_anchors.by_columns;
      transpose_words(word_of(masks, by.positives, by.words, by.end, column, column, own[0]), own, agnostic);
      transpose_words(word_of(masks, by.specific, by.words, by.end, column, column, own[0]), own, specific);
    }
    if constexpr (!kAll) {
      const int words = (masks.anchors + 31) >> 5;
      transpose_words(word_of(masks, masks.negatives, words, words, column, column % masks.group, own[0]), own, drawn_by);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      of_j[h] = pair_words<kAll>(agnostic[h], specific[h], drawn_by[h], inside, own[h], word, first);
    }
  }

  template <class Out>
  __device__ __forceinline__ void store(const Fragment<SumGeometry>& sums, const Team<Geometry>& team, Out* out,
                                        float factor) const {
    const int first = (static_cast<int>(blockIdx.y) * SumGeometry::kTeams + team.index) * SumGeometry::kColumns;
    struct alignas(2 * sizeof(Out)) Pair {
      Out first, second;
    };
    const bool in_pairs = of_anchors.dim % 2 == 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = arguments.own_row(scope, row_of(team.thread, h));
      if (row < 0) continue;
      Out* const of_row = out + int64_t{row} * of_anchors.dim;
#pragma unroll
      for (int n = 0; n < SumGeometry::kColumnBlocks; ++n) {
        const int feature = first + SumGeometry::column(team.thread, n, 0);
        const Pair pair{Out(factor * sums.values[0][n][2 * h]), Out(factor * sums.values[0][n][2 * h + 1])};
        if (in_pairs) {
          if (feature < of_anchors.dim) *reinterpret_cast<Pair*>(of_row + feature) = pair;
        } else {
          if (feature < of_anchors.dim) of_row[feature] = pair.first;
          if (feature + 1 < of_anchors.dim) of_row[feature + 1] = pair.second;
        }
      }
    }
  }
};

// Kernel

// parts[s, :, i] of each anchor over part s of its pairs, l = scale <z_i, z_j>: log sum over Den of exp l; sums of l
// over A and over S.
//
// Grid (strips, parts). FLOPs: 2 D a pair. Bytes: z once for each strip, from cache; 2 or 3 bits a pair.
template <class Engine, bool kAll>
HPK_KERNEL(Engine::kThreads, 1)
contrastive_blocks_fwd_kernel(const __grid_constant__ typename Engine::Operands operands,
                              const __grid_constant__ BlockArguments arguments, const float* __restrict__ square,
                              float* __restrict__ parts) {
  using Geometry = typename Engine::Geometry;
  if (!arguments.run()) return;
  const ContrastiveMasks& masks = arguments.masks;
  const Scope scope = arguments.template scope<Geometry>();
  SumLogits<Engine, kAll> consumer(arguments, scope, arguments.scale * *square);
  const TileRange all{0, tiles_of(Geometry::kColumns, masks.anchors, masks.group, arguments.within)};
  const TileRange tiles = part_of(all, blockIdx.y, gridDim.y);
  if constexpr (Engine::kGathers) {
    with_rows_of<Geometry>(scope, [&](const auto& left_row, const auto& right_row) {
      Engine::run(operands, left_row, right_row, tiles, shared_memory(), consumer);
    });
  } else {
    consumer.read(static_cast<int>(tiles.first) + static_cast<int>(threadIdx.x) / Geometry::kTeamThreads);
    Engine::run(operands, scope.row, tiles, shared_memory(), consumer, scope.column);
  }
  consumer.finish();
  combine_rows<Geometry>(consumer.sums, shared_memory(), [&](int r, const RowSums& sums) {
    const int row = arguments.own_row(scope, scope.row + r);
    if (row < 0) return;
    const int64_t rows = masks.last - masks.first;
    float* const part = parts + blockIdx.y * 3 * rows + row;
    part[0] = sums.log_sum.value();
    part[rows] = sums.agnostic;
    part[2 * rows] = sums.specific;
  });
}

// sums_i = sum over the pairs of (g_ij + g_ji) z_j: within images float32; of all pairs times *factor, in z's type.
//
// Grid (strips, blocks of features). FLOPs: 4 D a pair, 6 D if there are two blocks of features. Bytes: z once or twice
// for each strip, from cache; 3 to 6 bits a pair; sums once.
template <class Engine, bool kAll>
HPK_KERNEL(Engine::kThreads, 1)
contrastive_blocks_bwd_kernel(const __grid_constant__ typename Engine::Operands operands,
                              const __grid_constant__ BlockArguments arguments,
                              const __grid_constant__ BlockSums of_anchors) {
  using Geometry = typename Engine::Geometry;
  if (!arguments.run()) return;
  const ContrastiveMasks& masks = arguments.masks;
  const Scope scope = arguments.template scope<Geometry>();
  const bool shared = fabsf(*of_anchors.shift) <= kGreatestShift;  // not if that is NaN
  BlockGradient<Engine, kAll> consumer{arguments, of_anchors, scope, shared, {}};
  const TileRange tiles{0, tiles_of(Geometry::kColumns, masks.anchors, masks.group, arguments.within)};
  if constexpr (Engine::kGathers) {
    with_rows_of<Geometry>(scope, [&](const auto& left_row, const auto& right_row) {
      Engine::run(operands, left_row, right_row, tiles, blockIdx.y, shared_memory(), consumer);
    });
  } else {
    consumer.read(static_cast<int>(threadIdx.x) / Geometry::kTeamThreads);
    Engine::run(operands, scope.row, scope.column, tiles, shared_memory(), consumer);
  }
}

// Launch

template <class Engine, class T>
void launch_blocks_forward(const typename Engine::Operands& operands, const BlockPairs<T>& pairs, const float* square,
                           float* parts, cudaStream_t stream) {
  const int64_t anchors = pairs.masks.anchors, group = pairs.masks.group;
  const int64_t strips = strips_of(Engine::Geometry::kRows, rows_of_strips(pairs), group, pairs.within);
  const int64_t parts_of_columns = contrastive_blocks_parts(anchors, group, pairs.within, pairs.masks.first,
                                                            pairs.masks.last - pairs.masks.first);
  const dim3 grid(static_cast<unsigned>(strips), static_cast<unsigned>(parts_of_columns));
  const auto kernel = pairs.masks.negatives == nullptr ? contrastive_blocks_fwd_kernel<Engine, true>
                                                       : contrastive_blocks_fwd_kernel<Engine, false>;
  launch(kernel, grid, Engine::kThreads, Engine::shared_bytes(operands, 0), stream, operands, arguments_of(pairs),
         square, parts);
}

template <class Engine, class T>
void launch_blocks_backward(const typename Engine::Operands& operands, const BlockPairs<T>& pairs,
                            const BlockSums& sums, cudaStream_t stream) {
  const int64_t strips = strips_of(Engine::Geometry::kRows, rows_of_strips(pairs), pairs.masks.group, pairs.within);
  const dim3 grid(static_cast<unsigned>(strips), Engine::feature_blocks(sums.dim));
  const auto kernel = pairs.masks.negatives == nullptr ? contrastive_blocks_bwd_kernel<Engine, true>
                                                       : contrastive_blocks_bwd_kernel<Engine, false>;
  launch(kernel, grid, Engine::kThreads, Engine::shared_bytes(), stream, operands, arguments_of(pairs), sums);
}

}  // namespace hpk
