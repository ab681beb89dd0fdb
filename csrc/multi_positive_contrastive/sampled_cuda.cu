// Kernels of the sampled negatives across images: the anchors at one patch position, one an image, share theirs. So their
// logits are products with the rows that the position's list of columns names. Pairs within an image are left to blocks.
#include "common/combine.cuh"
#include "common/gradient_sm80.cuh"
#include "common/strip_sm80.cuh"
#include "multi_positive_contrastive/masks.cuh"
#include "multi_positive_contrastive/row_sums.cuh"

namespace hpk {
namespace {

// What the kernels need besides the rows of z.
struct SampledArguments {
  int anchors, group;
  const int32_t* columns;
  const int64_t* offsets;
  const int32_t* enabled;
  float scale;
};

template <class T>
SampledArguments arguments_of(const SampledPairs<T>& pairs) {
  return {static_cast<int>(pairs.z.count), static_cast<int>(pairs.group), pairs.columns, pairs.offsets, pairs.enabled, pairs.scale};
}

// The list of one position.
struct List {
  const int32_t* columns;
  int length;

  __device__ List(const SampledArguments& arguments, int position)
      : columns(arguments.columns + arguments.offsets[position]),
        length(static_cast<int>(arguments.offsets[position + 1] - arguments.offsets[position])) {}

  // -1 beyond the end.
  __device__ int operator[](int i) const { return i < length ? columns[i] : -1; }
};

// The anchor at a position in an image, -1 beyond the last.
__device__ __forceinline__ int anchor_of(const SampledArguments& arguments, int image, int position) {
  const int anchor = image * arguments.group + position;
  return image < arguments.anchors / arguments.group ? anchor : -1;
}

// Whether an anchor and a column, -1 for none, are in two images.
__device__ __forceinline__ bool are_across(int anchor, int position, int column, int group) {
  const int first = anchor - position;
  return anchor >= 0 && column >= 0 && (column < first || column >= first + group);
}

template <class Geometry>
struct SumSampled {
  const SampledArguments& arguments;
  const List& list;
  int position, first_image;
  RowSums sums[Geometry::kRowBlocks][2];

  __device__ void operator()(const Fragment<Geometry>& products, int tile, const Team<Geometry>& team) {
    int columns[Geometry::kColumnBlocks][2];
#pragma unroll
    for (int n = 0; n < Geometry::kColumnBlocks; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) columns[n][c] = list[tile * Geometry::kColumns + Geometry::column(team.thread, n, c)];
    }
#pragma unroll
    for (int m = 0; m < Geometry::kRowBlocks; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int anchor = anchor_of(arguments, first_image + Geometry::row(team.thread, m, h), position);
        float logits[Geometry::kColumnBlocks][2];
        bool included[Geometry::kColumnBlocks][2];
#pragma unroll
        for (int n = 0; n < Geometry::kColumnBlocks; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            logits[n][c] = arguments.scale * products.values[m][n][2 * h + c];
            included[n][c] = are_across(anchor, position, columns[n][c], arguments.group);
          }
        }
        add_logits(sums[m][h].log_sum, logits, included);
      }
    }
  }
};

// log_sums[i] = log sum over the negatives j of i in other images of exp(scale <z_i, z_j>).
//
// Grid (positions, blocks of images). FLOPs: 2 D a pair. Bytes: a row of z for each column of each position's list.
template <class Engine>
HPK_KERNEL(Engine::kThreads, 1)
sampled_rows_fwd_kernel(const __grid_constant__ typename Engine::Operands operands,
                        const __grid_constant__ SampledArguments arguments, float* __restrict__ log_sums) {
  using Geometry = typename Engine::Geometry;
  if (*arguments.enabled == 0) return;
  const int position = static_cast<int>(blockIdx.x), first_image = static_cast<int>(blockIdx.y) * Geometry::kRows;
  const List list(arguments, position);
  SumSampled<Geometry> consumer{arguments, list, position, first_image, {}};
  const auto left_row = [&](int r) { return anchor_of(arguments, first_image + r, position); };
  const auto right_row = [&](int tile, int c) { return list[tile * Geometry::kColumns + c]; };
  Engine::run(operands, left_row, right_row, {0, divide_up(list.length, Geometry::kColumns)}, shared_memory(), consumer);
  combine_rows<Geometry>(consumer.sums, shared_memory(), [&](int r, const RowSums& sums) {
    const int anchor = anchor_of(arguments, first_image + r, position);
    if (anchor >= 0) log_sums[anchor] = sums.log_sum.value();
  });
}

// push_i and logDen_i of an anchor.
struct Push {
  float push = 0, log_denominator = 0;

  __device__ float g(float logit, bool across) const { return across ? push * exp_of(logit - log_denominator) : 0; }
};

// None for -1.
__device__ __forceinline__ Push push_of(const float* numbers, int anchors, int anchor) {
  if (anchor < 0) return {};
  return {numbers[anchors + anchor], numbers[anchor]};
}

// g of anchors (rows) and sampled columns; the gradient is added to that of the anchors.
template <class Engine>
struct RowGradient {
  using Geometry = typename Engine::Geometry;
  using SumGeometry = typename Engine::SumGeometry;

  const SampledArguments& arguments;
  const List& list;
  int position, first_image;
  float* grad;
  int dim;
  Push of_rows[2];

  __device__ int anchor(int thread, int h) const {
    return anchor_of(arguments, first_image + Geometry::row(thread, 0, h), position);
  }

  __device__ void make_g(Fragment<Geometry>& products, int tile, const Team<Geometry>& team) const {
#pragma unroll
    for (int n = 0; n < Geometry::kColumnBlocks; ++n) {
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const int column = list[tile * Geometry::kColumns + Geometry::column(team.thread, n, part % 2)];
        float& value = products.values[0][n][part];
        value = of_rows[part / 2].g(arguments.scale * value,
                                    are_across(anchor(team.thread, part / 2), position, column, arguments.group));
      }
    }
  }

  __device__ void store(const Fragment<SumGeometry>& sums, const Team<Geometry>& team) const {
    const int first = static_cast<int>(blockIdx.z) * SumGeometry::kColumns;
#pragma unroll
    for (int n = 0; n < SumGeometry::kColumnBlocks; ++n) {
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const int row = anchor(team.thread, part / 2);
        const int feature = first + SumGeometry::column(team.thread, n, part % 2);
        if (row >= 0 && feature < dim) grad[int64_t{row} * dim + feature] += sums.values[0][n][part];
      }
    }
  }
};

// grad_i += sum over the negatives j of i in other images of push_i exp(l_ij - logDen_i) z_j.
//
// Grid (positions, blocks of images, blocks of features). FLOPs: 4 D a pair, 6 D with two blocks of features. Bytes: two
// rows of z for each column of each position's list, from cache; grad, float32, read and written once.
template <class Engine>
HPK_KERNEL(Engine::kThreads, 1)
sampled_rows_bwd_kernel(const __grid_constant__ typename Engine::Operands operands,
                        const __grid_constant__ SampledArguments arguments, const float* __restrict__ numbers,
                        float* __restrict__ grad, int dim) {
  using Geometry = typename Engine::Geometry;
  if (*arguments.enabled == 0) return;
  const int position = static_cast<int>(blockIdx.x), first_image = static_cast<int>(blockIdx.y) * Geometry::kRows;
  const List list(arguments, position);
  RowGradient<Engine> consumer{arguments, list, position, first_image, grad, dim, {}};
  for (int h = 0; h < 2; ++h) consumer.of_rows[h] = push_of(numbers, arguments.anchors, consumer.anchor(threadIdx.x, h));
  const auto left_row = [&](int r) { return anchor_of(arguments, first_image + r, position); };
  const auto right_row = [&](int tile, int c) { return list[tile * Geometry::kColumns + c]; };
  Engine::run(operands, left_row, right_row, {0, divide_up(list.length, Geometry::kColumns)}, blockIdx.z,
              shared_memory(), consumer);
}

// g of sampled columns (rows of the engine) and the anchors at a position; the gradient is staged.
template <class Engine>
struct ColumnGradient {
  using Geometry = typename Engine::Geometry;
  using SumGeometry = typename Engine::SumGeometry;

  const SampledArguments& arguments;
  const List& list;
  const StagedGradients& staged;
  const float* numbers;
  int position, first;

  __device__ void make_g(Fragment<Geometry>& products, int tile, const Team<Geometry>& team) const {
#pragma unroll
    for (int n = 0; n < Geometry::kColumnBlocks; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int image = tile * Geometry::kColumns + Geometry::column(team.thread, n, c);
        const int anchor = anchor_of(arguments, image, position);
        const Push push = push_of(numbers, arguments.anchors, anchor);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int column = list[first + Geometry::row(team.thread, 0, h)];
          float& value = products.values[0][n][2 * h + c];
          value = push.g(arguments.scale * value, are_across(anchor, position, column, arguments.group));
        }
      }
    }
  }

  __device__ void store(const Fragment<SumGeometry>& sums, const Team<Geometry>& team) const {
    const int first_feature = static_cast<int>(blockIdx.z) * SumGeometry::kColumns;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t slot = slot_of(list[first + SumGeometry::row(team.thread, 0, h)]);
      if (slot >= staged.capacity) continue;
      float* const to = staged.rows + slot * staged.dim;
#pragma unroll
      for (int n = 0; n < SumGeometry::kColumnBlocks; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int feature = first_feature + SumGeometry::column(team.thread, n, c);
          if (feature < staged.dim) to[feature] = sums.values[0][n][2 * h + c];
        }
      }
    }
  }

 private:
  // The first of the column's slots, and one further for each of its positions before this one.
  __device__ int64_t slot_of(int column) const {
    if (column < 0) return staged.capacity;
    const uint32_t* const positions = staged.positions + int64_t{column} * staged.words;
    int64_t slot = staged.slots[column];
    for (int64_t word = staged.first_word; 32 * word <= position; ++word) {
      slot += __popc(positions[word] & low_bits(position - 32 * word));
    }
    return slot;
  }
};

// staged[slot of (j, p)] = sum over the images of push_i exp(l_ij - logDen_i) z_i, i at p, j sampled there.
//
// Grid (positions, parts of their lists, blocks of features). FLOPs: 4 D a pair, 6 D with two blocks of features. Bytes:
// two rows of z for each image and 64 columns, from cache; a row of float32 written for each (p, j).
template <class Engine>
HPK_KERNEL(Engine::kThreads, 1)
sampled_columns_bwd_kernel(const __grid_constant__ typename Engine::Operands operands,
                           const __grid_constant__ SampledArguments arguments,
                           const __grid_constant__ StagedGradients staged, const float* __restrict__ numbers) {
  using Geometry = typename Engine::Geometry;
  if (*arguments.enabled == 0) return;
  const int position = static_cast<int>(32 * staged.first_word + blockIdx.x);
  const List list(arguments, position);
  const TileRange images{0, divide_up(arguments.anchors / arguments.group, Geometry::kColumns)};
  const TileRange blocks = part_of({0, divide_up(list.length, Geometry::kRows)}, blockIdx.y, gridDim.y);
  for (int64_t block = blocks.first; block < blocks.last; ++block) {
    const int first = static_cast<int>(block) * Geometry::kRows;
    ColumnGradient<Engine> consumer{arguments, list, staged, numbers, position, first};
    const auto left_row = [&](int r) { return list[first + r]; };
    const auto right_row = [&](int tile, int c) {
      return anchor_of(arguments, tile * Geometry::kColumns + c, position);
    };
    Engine::run(operands, left_row, right_row, images, blockIdx.z, shared_memory(), consumer);
  }
}

// grad_j += sum of staged[slots[j]] to staged[slots[j + 1] - 1].
//
// Grid (anchors), threads over features. Bytes: reads what was staged, reads and writes grad, all float32.
HPK_KERNEL(128)
sampled_gather_bwd_kernel(const __grid_constant__ StagedGradients staged, const int32_t* __restrict__ enabled,
                          float* __restrict__ grad) {
  if (*enabled == 0) return;
  const int64_t column = blockIdx.x, first = staged.slots[column];
  const int64_t end = staged.slots[column + 1] < staged.capacity ? staged.slots[column + 1] : staged.capacity;
  for (int feature = threadIdx.x; feature < staged.dim; feature += 128) {
    float sum = 0;
    for (int64_t slot = first; slot < end; ++slot) sum += staged.rows[slot * staged.dim + feature];
    grad[column * staged.dim + feature] += sum;
  }
}

constexpr unsigned kListParts = 4;  // of each position's list in the gradients of its columns

template <class T>
unsigned image_blocks(const SampledPairs<T>& pairs, int rows) {
  return static_cast<unsigned>(divide_up(pairs.z.count / pairs.group, rows));
}

}  // namespace

template <typename T>
void contrastive_sampled_forward_cuda(const SampledPairs<T>& pairs, float* log_sums, cudaStream_t stream) {
  using Engine = StripSm80<T, WarpGeometry80<2>>;
  const typename Engine::Operands operands{pairs.z, pairs.z};
  const dim3 grid(static_cast<unsigned>(pairs.group), image_blocks(pairs, Engine::Geometry::kRows));
  launch(sampled_rows_fwd_kernel<Engine>, grid, Engine::kThreads, Engine::shared_bytes(operands, 0), stream, operands,
         arguments_of(pairs), log_sums);
}

template <typename T>
void contrastive_sampled_rows_backward_cuda(const SampledPairs<T>& pairs, const float* numbers, float* grad, int dim,
                                            cudaStream_t stream) {
  using Engine = GradientSm80<T>;
  const dim3 grid(static_cast<unsigned>(pairs.group), image_blocks(pairs, Engine::Geometry::kRows),
                  Engine::feature_blocks(dim));
  launch(sampled_rows_bwd_kernel<Engine>, grid, Engine::kThreads, Engine::shared_bytes(), stream,
         typename Engine::Operands{pairs.z, pairs.z}, arguments_of(pairs), numbers, grad, dim);
}

template <typename T>
void contrastive_sampled_columns_backward_cuda(const SampledPairs<T>& pairs, const float* numbers,
                                               const StagedGradients& staged, cudaStream_t stream) {
  using Engine = GradientSm80<T>;
  const dim3 grid(static_cast<unsigned>(staged.count), kListParts, Engine::feature_blocks(staged.dim));
  launch(sampled_columns_bwd_kernel<Engine>, grid, Engine::kThreads, Engine::shared_bytes(), stream,
         typename Engine::Operands{pairs.z, pairs.z}, arguments_of(pairs), staged, numbers);
}

void contrastive_sampled_gather_cuda(const StagedGradients& staged, const int32_t* enabled, int64_t anchors, float* grad,
                                     cudaStream_t stream) {
  launch(sampled_gather_bwd_kernel, dim3(static_cast<unsigned>(anchors)), 128, 0, stream, staged, enabled, grad);
}

#define HPK_INSTANTIATE(T)                                                                                        \
  template void contrastive_sampled_forward_cuda<T>(const SampledPairs<T>&, float*, cudaStream_t);                \
  template void contrastive_sampled_rows_backward_cuda<T>(const SampledPairs<T>&, const float*, float*, int,      \
                                                          cudaStream_t);                                          \
  template void contrastive_sampled_columns_backward_cuda<T>(const SampledPairs<T>&, const float*,                \
                                                             const StagedGradients&, cudaStream_t);
HPK_INSTANTIATE(float)
HPK_INSTANTIATE(__half)
HPK_INSTANTIATE(__nv_bfloat16)
#undef HPK_INSTANTIATE

}  // namespace hpk
