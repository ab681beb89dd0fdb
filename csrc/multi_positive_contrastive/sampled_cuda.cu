// Kernels of the sampled negatives across images, for any GPU. Pairs within an image are left to blocks.
#include "engines/gradient_sm80.cuh"
#include "engines/strip_sm80.cuh"
#include "multi_positive_contrastive/sampled.cuh"

namespace hpk {
namespace {

// Consumer

// Adds the logits of a thread's columns in one row, of those that `included` has, to their log sum.
template <int kColumnBlocks>
__device__ __forceinline__ void add_logits(LogSum& log_sum, const float (&logits)[kColumnBlocks][2],
                                           const bool (&included)[kColumnBlocks][2]) {
  float greatest = log_sum.greatest;
#pragma unroll
  for (int n = 0; n < kColumnBlocks; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) greatest = included[n][c] ? fmaxf(greatest, logits[n][c]) : greatest;
  }
  const float base = greatest == kLogOfNothing ? 0 : greatest;
  float total = log_sum.total * exp_of(log_sum.greatest - base);
#pragma unroll
  for (int n = 0; n < kColumnBlocks; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) total += included[n][c] ? exp_of(logits[n][c] - base) : 0;
  }
  log_sum = {greatest, total};
}

template <class Geometry>
struct SumSampled {
  const SampledArguments& arguments;
  const List& list;
  int position, first_image;
  LogSum sums[Geometry::kRowBlocks][2];

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
        const int image = first_image + Geometry::row(team.thread, m, h);
        const bool exists = arguments.anchor(image, position) >= 0;
        float logits[Geometry::kColumnBlocks][2];
        bool included[Geometry::kColumnBlocks][2];
#pragma unroll
        for (int n = 0; n < Geometry::kColumnBlocks; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            logits[n][c] = __fmul_rn(arguments.scale, products.values[m][n][2 * h + c]);
            included[n][c] = exists && is_across(image * arguments.group, columns[n][c], arguments.group);
          }
        }
        add_logits(sums[m][h], logits, included);
      }
    }
  }
};

// g of anchors (rows) and sampled columns; the gradient is added to that of the anchors.
template <class Engine>
struct RowGradient {
  using Geometry = typename Engine::Geometry;
  using SumGeometry = typename Engine::SumGeometry;

  const SampledArguments& arguments;
  const List& list;
  int position, first_image;
  float* sums;
  int dim;
  Push of_rows[2];

  __device__ void make_g(Fragment<Geometry>& products, int tile, const Team<Geometry>& team) const {
#pragma unroll
    for (int n = 0; n < Geometry::kColumnBlocks; ++n) {
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const int column = list[tile * Geometry::kColumns + Geometry::column(team.thread, n, part % 2)];
        const int image = first_image + Geometry::row(team.thread, 0, part / 2);
        float& value = products.values[0][n][part];
        const float g = of_rows[part / 2].of(__fmul_rn(arguments.scale, value));
        value = is_across(image * arguments.group, column, arguments.group) ? g : 0;
      }
    }
  }

  __device__ void store(const Fragment<SumGeometry>& found, const Team<Geometry>& team) const {
    const int first = static_cast<int>(blockIdx.z) * SumGeometry::kColumns;
    const auto row_of = [&](int r) { return arguments.anchor(first_image + r, position); };
    add_to_rows(found, team.thread, first, row_of, sums, dim);
  }
};

// g of sampled columns (rows of the engine) and the anchors at a position; the gradient is staged.
template <class Engine>
struct ColumnGradient {
  using Geometry = typename Engine::Geometry;
  using SumGeometry = typename Engine::SumGeometry;
  using T = typename Engine::Element;

  const SampledArguments& arguments;
  const List& list;
  const float4* numbers;
  const int32_t* slots;
  T* staged;
  int dim, position, first;

  __device__ void make_g(Fragment<Geometry>& products, int tile, const Team<Geometry>& team) const {
#pragma unroll
    for (int n = 0; n < Geometry::kColumnBlocks; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int image = tile * Geometry::kColumns + Geometry::column(team.thread, n, c);
        const Push push(numbers, arguments.anchor(image, position));
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int column = list[first + Geometry::row(team.thread, 0, h)];
          float& value = products.values[0][n][2 * h + c];
          const float g = push.of(__fmul_rn(arguments.scale, value));
          value = is_across(image * arguments.group, column, arguments.group) ? g : 0;
        }
      }
    }
  }

  __device__ void store(const Fragment<SumGeometry>& found, const Team<Geometry>& team) const {
    const int first_feature = static_cast<int>(blockIdx.z) * SumGeometry::kColumns;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int place = first + SumGeometry::row(team.thread, 0, h);
      if (place >= list.length) continue;
      T* const to = staged + int64_t{slots[list.entry + place]} * dim;
#pragma unroll
      for (int n = 0; n < SumGeometry::kColumnBlocks; ++n) {
        const int feature = first_feature + SumGeometry::column(team.thread, n, 0);
        const float* const two = found.values[0][n] + 2 * h;
        if (feature < dim) store_two(to + feature, two[0], two[1]);
      }
    }
  }
};

// Kernel

// log_sums[i] = log sum over the negatives j of i in other images of exp(scale <z_i, z_j>).
//
// Grid (positions, blocks of images). FLOPs: 2 D a pair. Bytes: a row of z for each column of each position's list.
template <class Engine>
HPK_KERNEL(Engine::kThreads, 1)
sampled_fwd_kernel(const __grid_constant__ typename Engine::Operands operands,
                        const __grid_constant__ SampledArguments arguments, float* __restrict__ log_sums) {
  using Geometry = typename Engine::Geometry;
  if (*arguments.state != 0) return;
  const int position = static_cast<int>(blockIdx.x), first_image = static_cast<int>(blockIdx.y) * Geometry::kRows;
  const List list(arguments, position);
  SumSampled<Geometry> consumer{arguments, list, position, first_image, {}};
  const auto left_row = [&](int r) { return arguments.anchor(first_image + r, position); };
  const auto right_row = [&](int tile, int c) { return list[tile * Geometry::kColumns + c]; };
  const TileRange tiles{0, divide_up(list.length, Geometry::kColumns)};
  Engine::run(operands, left_row, right_row, tiles, shared_memory(), consumer);
  combine_rows<Geometry>(consumer.sums, shared_memory(), [&](int r, const LogSum& sum) {
    const int anchor = arguments.anchor(first_image + r, position);
    if (anchor >= 0) log_sums[anchor] = sum.value();
  });
}

// sums_i += sum over the listed negatives j of i in other images of g_ij z_j, g_ij = f_i exp(l_ij - r_i).
//
// Grid (positions, blocks of images, blocks of features). FLOPs: 4 D a pair, and 2 D more for each block of features
// after the first. Bytes: two rows of z for each column of each position's list, from cache; sums, float32, read and
// written once.
template <class Engine>
HPK_KERNEL(Engine::kThreads, 1)
sampled_rows_bwd_kernel(const __grid_constant__ typename Engine::Operands operands,
                        const __grid_constant__ SampledArguments arguments, int64_t first_column, int64_t last_column,
                        const float4* __restrict__ numbers, float* __restrict__ sums) {
  using Geometry = typename Engine::Geometry;
  if (*arguments.state != 0) return;
  const int position = static_cast<int>(blockIdx.x), first_image = static_cast<int>(blockIdx.y) * Geometry::kRows;
  const List list(arguments, position, first_column, last_column);
  if (list.length == 0) return;
  const auto push = [&](int h) {
    return Push(numbers, arguments.anchor(first_image + Geometry::row(threadIdx.x, 0, h), position));
  };
  RowGradient<Engine> consumer{arguments, list, position, first_image, sums, operands.left.dim, {push(0), push(1)}};
  const auto left_row = [&](int r) { return arguments.anchor(first_image + r, position); };
  const auto right_row = [&](int tile, int c) { return list[tile * Geometry::kColumns + c]; };
  Engine::run(operands, left_row, right_row, {0, divide_up(list.length, Geometry::kColumns)}, blockIdx.z,
              shared_memory(), consumer);
}

// staged[slot of (j, p)] = sum over the anchors i at p in other images than j of g_ij z_i, for the j listed at p.
//
// Grid (positions, parts of their lists, blocks of features). FLOPs: as above. Bytes: two rows of z for each image and
// 64 columns, from cache; a row written for each (p, j).
template <class Engine>
HPK_KERNEL(Engine::kThreads, 1)
sampled_columns_bwd_kernel(const __grid_constant__ typename Engine::Operands operands,
                           const __grid_constant__ SampledArguments arguments, int64_t first_column,
                           int64_t last_column, const float4* __restrict__ numbers, const int32_t* __restrict__ slots,
                           typename Engine::Element* __restrict__ staged) {
  using Geometry = typename Engine::Geometry;
  if (*arguments.state != 0) return;
  const int position = static_cast<int>(blockIdx.x);
  const List list(arguments, position, first_column, last_column);
  const TileRange images{0, divide_up(arguments.anchors / arguments.group, Geometry::kColumns)};
  const TileRange blocks = part_of({0, divide_up(list.length, Geometry::kRows)}, blockIdx.y, gridDim.y);
  for (int64_t block = blocks.first; block < blocks.last; ++block) {
    const int first = static_cast<int>(block) * Geometry::kRows;
    ColumnGradient<Engine> consumer{arguments, list, numbers, slots, staged, operands.left.dim, position, first};
    const auto left_row = [&](int r) { return list[first + r]; };
    const auto right_row = [&](int tile, int c) { return arguments.anchor(tile * Geometry::kColumns + c, position); };
    Engine::run(operands, left_row, right_row, images, blockIdx.z, shared_memory(), consumer);
  }
}

// Launch

constexpr unsigned kListParts = 4;  // of each position's list in the gradients of its columns

template <class T>
unsigned image_blocks(const SampledPairs<T>& pairs, int rows) {
  return static_cast<unsigned>(divide_up(pairs.z.count / pairs.group, rows));
}

}  // namespace

template <typename T>
void contrastive_sampled_forward_cuda(const SampledPairs<T>& pairs, float* log_sums, cudaStream_t stream) {
#ifdef HPK_WITH_SM90
  if constexpr (sizeof(T) == 2) {
    if (runs_on_sm90(pairs.z)) return contrastive_sampled_forward_sm90(pairs, log_sums, stream);
  }
#endif
  using Engine = StripSm80<T, WarpGeometry80<2>>;
  const typename Engine::Operands operands{pairs.z, pairs.z};
  const dim3 grid(static_cast<unsigned>(pairs.group), image_blocks(pairs, Engine::Geometry::kRows));
  launch(sampled_fwd_kernel<Engine>, grid, Engine::kThreads, Engine::shared_bytes(operands, 0), stream, operands,
         arguments_of(pairs), log_sums);
}

template <typename T>
int64_t contrastive_staged_rows_cuda(const Rows<T>& z, int64_t group) {
#ifdef HPK_WITH_SM90
  if (sizeof(T) == 2 && runs_on_sm90(z)) return divide_up(z.count / group, kImagesOfBlock);
#endif
  return 1;
}

template <typename T>
void contrastive_sampled_backward_cuda(const SampledPairs<T>& pairs, const float* numbers, const int32_t* slots,
                                       float* sums, const StagedColumns<T>& staged, cudaStream_t stream) {
#ifdef HPK_WITH_SM90
  if constexpr (sizeof(T) == 2) {
    if (runs_on_sm90(pairs.z)) {
      return contrastive_sampled_backward_sm90(pairs, numbers, slots, sums, staged, stream);
    }
  }
#endif
  using Engine = GradientSm80<T>;
  const typename Engine::Operands operands{pairs.z, pairs.z};
  const auto* const of_anchors = reinterpret_cast<const float4*>(numbers);
  const auto positions = static_cast<unsigned>(pairs.group);
  const unsigned blocks = Engine::feature_blocks(pairs.z.dim);
  launch(sampled_rows_bwd_kernel<Engine>, dim3(positions, image_blocks(pairs, Engine::Geometry::kRows), blocks),
         Engine::kThreads, Engine::shared_bytes(), stream, operands, arguments_of(pairs), staged.first, staged.last,
         of_anchors, sums);
  launch(sampled_columns_bwd_kernel<Engine>, dim3(positions, kListParts, blocks), Engine::kThreads,
         Engine::shared_bytes(), stream, operands, arguments_of(pairs), staged.first, staged.last, of_anchors, slots,
         staged.rows);
}

#define HPK_INSTANTIATE(T)                                                                                            \
  template void contrastive_sampled_forward_cuda<T>(const SampledPairs<T>&, float*, cudaStream_t);                    \
  template int64_t contrastive_staged_rows_cuda<T>(const Rows<T>&, int64_t);                                          \
  template void contrastive_sampled_backward_cuda<T>(const SampledPairs<T>&, const float*, const int32_t*, float*,    \
                                                     const StagedColumns<T>&, cudaStream_t);
HPK_INSTANTIATE(float)
HPK_INSTANTIATE(__half)
HPK_INSTANTIATE(__nv_bfloat16)
#undef HPK_INSTANTIATE

}  // namespace hpk
