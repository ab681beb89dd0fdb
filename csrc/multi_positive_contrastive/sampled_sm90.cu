// Kernels of the sampled negatives across images, for sm_90a: one makes the gradients of anchors and of columns. Pairs
// within an image are left to blocks.
#include "engines/gathered_sm90.cuh"
#include "multi_positive_contrastive/anchors.cuh"
#include "multi_positive_contrastive/sampled.cuh"

namespace hpk {
namespace {

// Consumer

// Sums of exponentials less the greatest one, which is known by its product.
template <class Engine>
struct SumColumns {
  using Geometry = typename Engine::Geometry;

  const SampledArguments& arguments;
  int first_image;
  float greatest[2], totals[2];

  __device__ __forceinline__ void add(const Fragment<Geometry>& products, const typename Engine::Columns& columns,
                                      const Team<Geometry>& team) {
    const float scale = arguments.scale;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int first_of_image = (first_image + Geometry::row(team.thread, 0, h)) * arguments.group;
      float included[Geometry::kColumnBlocks][2], raised = greatest[h];
#pragma unroll
      for (int n = 0; n < Geometry::kColumnBlocks; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const bool across = is_across(first_of_image, columns[n][c], arguments.group);
          included[n][c] = across ? products.values[0][n][2 * h + c] : kLogOfNothing;
          raised = fmaxf(raised, included[n][c]);
        }
      }
      const float base = raised == kLogOfNothing ? 0 : __fmul_rn(scale, raised);
      float total = totals[h] * exp_of_difference(scale, greatest[h], base);
#pragma unroll
      for (int n = 0; n < Geometry::kColumnBlocks; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) total += exp_of_difference(scale, included[n][c], base);
      }
      greatest[h] = raised;
      totals[h] = total;
    }
  }
};

template <class Engine>
struct BothGradients {
  using Geometry = typename Engine::Geometry;
  using SumGeometry = typename Engine::SumGeometry;
  using T = typename Engine::Element;

  const SampledArguments& arguments;
  const List& list;
  int position, first_image;
  const int32_t* slots;
  float* sums;
  T* staged;  // this block's row of the first place
  int dim;
  int64_t of_place;  // elements
  Push of_rows[2];

  __device__ __forceinline__ void make_g(Fragment<Geometry>& products, const typename Engine::Columns& columns,
                                         const Team<Geometry>& team) const {
    const int group = arguments.group;
#pragma unroll
    for (int n = 0; n < Geometry::kColumnBlocks; ++n) {
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const int first_of_image = (first_image + Geometry::row(team.thread, 0, part / 2)) * group;
        const Push& push = of_rows[part / 2];
        float& value = products.values[0][n][part];
        const float g = push.f * exp_of_difference(arguments.scale, value, push.r);
        value = is_across(first_of_image, columns[n][part % 2], group) ? g : 0;
      }
    }
  }

  // Of two blocks of 8 columns a lane has two numbers each. It hands one pair to its neighbour for another, and has
  // four that follow one another, so that a row's 32 bytes are written at once.
  __device__ __forceinline__ void store_columns(const Fragment<Geometry>& found, int half, int element,
                                                const Team<Geometry>& team) const {
    const bool odd = team.thread % 2 != 0;
    const int first = element + (odd ? 8 : 0) + Geometry::column(team.thread & ~1, 0, 0);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int place = Engine::kHalfColumns * half + Geometry::row(team.thread, 0, h);
      const bool listed = place < list.length;
      T* const to = staged + (listed ? slots[list.entry + place] : 0) * of_place + first;
#pragma unroll
      for (int n = 0; n < Geometry::kColumnBlocks; n += 2) {
        const uint32_t low = packed(found.values[0][n] + 2 * h), high = packed(found.values[0][n + 1] + 2 * h);
        const uint32_t other = __shfl_xor_sync(kAllLanes, odd ? low : high, 1);
        const uint2 four = odd ? uint2{other, high} : uint2{low, other};
        if (listed && first + 8 * n < dim) __stcs(reinterpret_cast<uint2*>(to + 8 * n), four);
      }
    }
  }

  __device__ void store(const Fragment<SumGeometry>& found, const Team<Geometry>& team) const {
    const int first = team.index * SumGeometry::kColumns;
    const auto row_of = [&](int r) { return arguments.anchor(first_image + r, position); };
    add_to_rows(found, team.thread, first, row_of, sums, dim);
  }

 private:
  __device__ static __forceinline__ uint32_t packed(const float* two) {
    const T both[] = {T(two[0]), T(two[1])};
    uint32_t bits;
    std::memcpy(&bits, static_cast<const void*>(both), sizeof bits);
    return bits;
  }
};

// Kernel

// log_sums[i] = log sum over the negatives j of i in other images of exp(scale <z_i, z_j>).
//
// Grid (positions, blocks of images). FLOPs: 2 D a pair. Bytes: a row of z for each column of each position's list,
// from cache.
template <class Engine>
HPK_KERNEL(Engine::kThreads, 1)
sampled_fwd_kernel(const __grid_constant__ Rows<typename Engine::Element> z,
                   const __grid_constant__ SampledArguments arguments, float* __restrict__ log_sums) {
  using Geometry = typename Engine::Geometry;
  if (*arguments.state != 0) return;
  const int position = static_cast<int>(blockIdx.x), first_image = static_cast<int>(blockIdx.y) * Engine::kRows;
  const List list(arguments, position);
  SumColumns<Engine> consumer{arguments, first_image, {kLogOfNothing, kLogOfNothing}, {}};
  const auto left_row = [&](int r) { return arguments.anchor(first_image + r, position); };
  const auto right_row = [&](int j) { return list[j]; };
  const int columns = list.length > 0 ? list.length : 1;  // one that is none
  Engine::template run<false>(z, left_row, right_row, columns, shared_memory(), consumer);
  LogSum sums[1][2];
  for (int h = 0; h < 2; ++h) sums[0][h] = {__fmul_rn(arguments.scale, consumer.greatest[h]), consumer.totals[h]};
  combine_rows<Geometry>(sums, shared_memory(), [&](int r, const LogSum& sum) {
    const int anchor = left_row(r);
    if (anchor >= 0) log_sums[anchor] = sum.value();
  });
}

// For the listed negatives j of i in other images, g_ij = f_i exp(l_ij - r_i):
//   sums_i += sum over j of g_ij z_j,  staged[slot of (j, p)][block of images] = sum over the i at p of g_ij z_i
//
// Grid (positions, blocks of images). FLOPs: 6 D a pair. Bytes: a row of z for each column of each position's list,
// from cache, and a row written; sums, float32, read and written once.
template <class Engine>
HPK_KERNEL(Engine::kThreads, 1)
sampled_bwd_kernel(const __grid_constant__ Rows<typename Engine::Element> z,
                   const __grid_constant__ SampledArguments arguments,
                   const __grid_constant__ StagedColumns<typename Engine::Element> staged,
                   const float4* __restrict__ numbers, const int32_t* __restrict__ slots, float* __restrict__ sums) {
  using Geometry = typename Engine::Geometry;
  if (*arguments.state != 0) return;
  const int position = static_cast<int>(blockIdx.x), first_image = static_cast<int>(blockIdx.y) * Engine::kRows;
  const List list(arguments, position, staged.first, staged.last);
  if (list.length == 0) return;
  const auto push = [&](int h) {
    const int row = Geometry::row(threadIdx.x % Geometry::kTeamThreads, 0, h);
    return Push(numbers, arguments.anchor(first_image + row, position));
  };
  BothGradients<Engine> consumer{arguments, list, position, first_image, slots, sums,
                                 staged.rows + int64_t{blockIdx.y} * z.dim, z.dim, staged.of_place * z.dim,
                                 {push(0), push(1)}};
  const auto left_row = [&](int r) { return arguments.anchor(first_image + r, position); };
  const auto right_row = [&](int j) { return list[j]; };
  Engine::template run<true>(z, left_row, right_row, list.length, shared_memory(), consumer);
}

// Launch

// Calls body(engine) with the engine for these rows. It takes 128 elements as well; each length takes time to compile.
template <class T, class Body>
void with_engine(const Rows<T>& rows, const Body& body) {
  static_assert(GatheredSm90<T, 256>::kRows == kImagesOfBlock, "a staged row is of one block");
  if (rows.dim <= 256) return body(GatheredSm90<T, 256>{});
  body(GatheredSm90<T, 512>{});
}

template <class T>
dim3 grid_of(const SampledPairs<T>& pairs) {
  return {static_cast<unsigned>(pairs.group),
          static_cast<unsigned>(divide_up(pairs.z.count / pairs.group, kImagesOfBlock))};
}

}  // namespace

template <typename T>
void contrastive_sampled_forward_sm90(const SampledPairs<T>& pairs, float* log_sums, cudaStream_t stream) {
  with_engine(pairs.z, [&](auto engine) {
    using Engine = decltype(engine);
    launch(sampled_fwd_kernel<Engine>, grid_of(pairs), Engine::kThreads, Engine::shared_bytes(), stream, pairs.z,
           arguments_of(pairs), log_sums);
  });
}

template <typename T>
void contrastive_sampled_backward_sm90(const SampledPairs<T>& pairs, const float* numbers, const int32_t* slots,
                                       float* sums, const StagedColumns<T>& staged, cudaStream_t stream) {
  with_engine(pairs.z, [&](auto engine) {
    using Engine = decltype(engine);
    launch(sampled_bwd_kernel<Engine>, grid_of(pairs), Engine::kThreads, Engine::shared_bytes(), stream, pairs.z,
           arguments_of(pairs), staged, reinterpret_cast<const float4*>(numbers), slots, sums);
  });
}

#define HPK_INSTANTIATE(T)                                                                                          \
  template void contrastive_sampled_forward_sm90<T>(const SampledPairs<T>&, float*, cudaStream_t);                  \
  template void contrastive_sampled_backward_sm90<T>(const SampledPairs<T>&, const float*, const int32_t*, float*,  \
                                                     const StagedColumns<T>&, cudaStream_t);
HPK_INSTANTIATE(__half)
HPK_INSTANTIATE(__nv_bfloat16)
#undef HPK_INSTANTIATE

}  // namespace hpk
