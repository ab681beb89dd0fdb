// Kernels of masked_topk for either engine: see masked_topk_cuda.cu and masked_topk_sm90.cu.
#pragma once

#include <cmath>

#include "common/combine.cuh"
#include "common/schedule.h"
#include "masked_topk/keys.h"
#include "masked_topk/masked_topk_cuda.h"

namespace hpk {

// Whether a reference may be chosen for a query; both are within the matrices.
__device__ __forceinline__ bool is_allowed(const TopkRestrictions& restrictions, int query, int reference) {
  if (restrictions.mask != nullptr &&
      !restrictions.mask[query * restrictions.mask_stride + reference * restrictions.mask_step]) {
    return false;
  }
  if (restrictions.query_group == nullptr) return true;
  const int64_t group = restrictions.query_group[query];
  return group < 0 || group != restrictions.pool_group[reference];
}

// The greatest product of each row, in registers.
template <class Geometry, bool kRestricted>
struct FindBest {
  const TopkArguments& arguments;
  int first_row;
  Best best[Geometry::kRowBlocks][2];

  __device__ FindBest(const TopkArguments& arguments_, int first_row_) : arguments(arguments_), first_row(first_row_) {
    for (auto& pair : best) pair[0] = pair[1] = {-INFINITY, -1};
  }

  __device__ void operator()(Fragment<Geometry>& products, int tile, const Team<Geometry>& team) {
    const int first_column = tile * Geometry::kColumns;
    if (kRestricted || first_column + Geometry::kColumns > arguments.references) {
      forbid(products, first_column, team.thread);
    }
    raise(products, first_column, team.thread);
  }

 private:
  // Gives -inf to what may not be chosen.
  __device__ __forceinline__ void forbid(Fragment<Geometry>& products, int first_column, int thread) const {
#pragma unroll
    for (int m = 0; m < Geometry::kRowBlocks; ++m) {
#pragma unroll
      for (int n = 0; n < Geometry::kColumnBlocks; ++n) {
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          const int row = first_row + Geometry::row(thread, m, part / 2);
          const int column = first_column + Geometry::column(thread, n, part % 2);
          bool allowed = row < arguments.queries && column < arguments.references;
          if constexpr (kRestricted) allowed = allowed && is_allowed(arguments.restrictions, row, column);
          if (!allowed) products.values[m][n][part] = -INFINITY;
        }
      }
    }
  }

  // A thread meets its columns in ascending order, so an equal value comes too late.
  __device__ __forceinline__ void raise(const Fragment<Geometry>& products, int first_column, int thread) {
#pragma unroll
    for (int m = 0; m < Geometry::kRowBlocks; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float greatest = -INFINITY;
#pragma unroll
        for (int n = 0; n < Geometry::kColumnBlocks; ++n) {
          greatest = max_or_nan(greatest, max_or_nan(products.values[m][n][2 * h], products.values[m][n][2 * h + 1]));
        }
        Best& own = best[m][h];
        if (!(greatest > own.value) && greatest == greatest) continue;
        int index = -1;
#pragma unroll
        for (int n = Geometry::kColumnBlocks - 1; n >= 0; --n) {
#pragma unroll
          for (int c = 1; c >= 0; --c) {
            if (products.values[m][n][2 * h + c] == greatest) index = first_column + Geometry::column(thread, n, c);
          }
        }
        own = {greatest, index};
      }
    }
  }
};

// values[i, s], indices[i, s] = max, argmax over {m in part s of the pool, allowed} of <query_i, pool_m>
//
// Grid (strips of queries, parts of the pool). FLOPs: 2 D a pair. Bytes: a strip of queries once a block, the pool once
// for every strip, from cache; the mask once; 12 bytes written a query and part.
template <class Engine, bool kRestricted>
HPK_KERNEL(Engine::kThreads, 1)
masked_topk_top1_fwd_kernel(const __grid_constant__ typename Engine::Operands operands,
                            const __grid_constant__ TopkArguments arguments, float* __restrict__ values,
                            int64_t* __restrict__ indices) {
  using Geometry = typename Engine::Geometry;
  const int first_row = static_cast<int>(blockIdx.x) * Geometry::kRows;
  FindBest<Geometry, kRestricted> consumer(arguments, first_row);
  const TileRange all{0, divide_up(arguments.references, Geometry::kColumns)};
  Engine::run(operands, first_row, part_of(all, blockIdx.y, gridDim.y), shared_memory(), consumer);
  combine_rows<Geometry>(consumer.best, shared_memory(), [&](int r, const Best& best) {
    if (first_row + r >= arguments.queries) return;
    const int64_t at = int64_t{first_row + r} * gridDim.y + blockIdx.y;
    values[at] = best.value;
    indices[at] = best.index;
  });
}

// The greatest keys of one query, in descending order: key j is in lane j % 32, at j / 32. All lanes work together.
template <int kPlaces>
struct SortedKeys {
  int64_t keys[kPlaces];

  __device__ __forceinline__ void load(const int64_t* list, int count) {
#pragma unroll
    for (int place = 0; place < kPlaces; ++place) {
      const int j = 32 * place + lane();
      keys[place] = j < count ? list[j] : kNothingFound;
    }
  }

  __device__ __forceinline__ void store(int64_t* list, int count) const {
#pragma unroll
    for (int place = 0; place < kPlaces; ++place) {
      if (32 * place + lane() < count) list[32 * place + lane()] = keys[place];
    }
  }

  // The last of `count` keys, for all lanes.
  __device__ __forceinline__ int64_t last(int count) const {
    int64_t found = kNothingFound;
#pragma unroll
    for (int place = 0; place < kPlaces; ++place) {
      const int64_t key = __shfl_sync(kAllLanes, keys[place], (count - 1) % 32);
      if ((count - 1) / 32 == place) found = key;
    }
    return found;
  }

  // Puts a key, the same in all lanes, before the first that is less; the last one falls out.
  __device__ __forceinline__ void insert(int64_t key) {
    int before = 0;
#pragma unroll
    for (int place = 0; place < kPlaces; ++place) before += __popc(__ballot_sync(kAllLanes, keys[place] > key));
    int64_t carried = 0;
#pragma unroll
    for (int place = 0; place < kPlaces; ++place) {
      const int64_t moved = __shfl_up_sync(kAllLanes, keys[place], 1);
      const int64_t next_carried = __shfl_sync(kAllLanes, keys[place], 31);
      const int j = 32 * place + lane();
      if (j == before) keys[place] = key;
      if (j > before) keys[place] = lane() == 0 ? carried : moved;
      carried = next_carried;
    }
  }

 private:
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
};

// Keeps the k greatest keys of each row in memory, which no one else touches; of what a warp sees most is below the least
// of them. Products go through shared memory, 32 columns at a time, so that a warp has a row.
template <class Geometry, int kPlaces>
struct FindTopk {
  static constexpr int kSlab = 32, kSlabs = Geometry::kColumns / kSlab;
  static constexpr int kWarps = Geometry::kTeamThreads / 32, kRowsOfWarp = Geometry::kRows / kWarps;

  struct Shared {
    struct {
      int64_t least[Geometry::kRows];
      float products[Geometry::kRows][kSlab + 1];
    } of_team[Geometry::kTeams];
  };

  const TopkArguments& arguments;
  int first_row, part, parts;
  Shared* shared;
  int64_t* keys;

  __device__ FindTopk(const TopkArguments& arguments_, int first_row_, int part_, int parts_, char* memory, int64_t* keys_)
      : arguments(arguments_),
        first_row(first_row_),
        part(part_),
        parts(parts_),
        shared(reinterpret_cast<Shared*>(memory)),
        keys(keys_) {
    for (int i = threadIdx.x; i < Geometry::kTeams * Geometry::kRows; i += blockDim.x) {
      shared->of_team[i / Geometry::kRows].least[i % Geometry::kRows] = kNothingFound;
    }
    __syncthreads();
  }

  __device__ void operator()(const Fragment<Geometry>& products, int tile, const Team<Geometry>& team) {
    auto& own = shared->of_team[team.index];
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
      for (int n = 0; n < Geometry::kColumnBlocks; ++n) {
        const int column = Geometry::column(team.thread, n, 0) - slab * kSlab;
        if (column < 0 || column >= kSlab) continue;
#pragma unroll
        for (int m = 0; m < Geometry::kRowBlocks; ++m) {
#pragma unroll
          for (int part = 0; part < 4; ++part) {
            own.products[Geometry::row(team.thread, m, part / 2)][column + part % 2] = products.values[m][n][part];
          }
        }
      }
      team.sync();
      for (int i = 0; i < kRowsOfWarp; ++i) {
        scan(own, team.thread / 32 * kRowsOfWarp + i, tile * Geometry::kColumns + slab * kSlab, team.index);
      }
      team.sync();
    }
  }

 private:
  template <class OfTeam>
  __device__ __forceinline__ void scan(OfTeam& own, int row, int first_column, int team) const {
    const int query = first_row + row, lane = threadIdx.x % 32, column = first_column + lane;
    if (query >= arguments.queries) return;
    const int64_t key = rank_key(own.products[row][lane], column), least = own.least[row];
    const bool candidate = column < arguments.references && key > least &&
                           is_allowed(arguments.restrictions, query, column);
    uint32_t left = __ballot_sync(kAllLanes, candidate);
    if (left == 0) return;
    int64_t* const list = keys + ((int64_t{query} * parts + part) * Geometry::kTeams + team) * arguments.k;
    SortedKeys<kPlaces> sorted;
    sorted.load(list, arguments.k);
    for (; left != 0; left &= left - 1) {
      const int64_t next = __shfl_sync(kAllLanes, key, __ffs(left) - 1);
      if (next > sorted.last(arguments.k)) sorted.insert(next);
    }
    sorted.store(list, arguments.k);
    const int64_t last = sorted.last(arguments.k);
    if (lane == 0) own.least[row] = last;
    __syncwarp();
  }
};

// keys[i, s, t] = the k greatest, descending, over {m in part s of the pool, of the tiles of team t, allowed} of
// rank_key(<query_i, pool_m>, m). All of them are kNothingFound before.
//
// Grid (strips of queries, parts of the pool). Bytes: as for k = 1, and of keys 16 k for a row and each 32 columns that
// have a candidate, from cache.
template <class Engine, int kPlaces>
HPK_KERNEL(Engine::kThreads, 1)
masked_topk_fwd_kernel(const __grid_constant__ typename Engine::Operands operands,
                       const __grid_constant__ TopkArguments arguments, int64_t* __restrict__ keys) {
  using Geometry = typename Engine::Geometry;
  using Consumer = FindTopk<Geometry, kPlaces>;
  const int first_row = static_cast<int>(blockIdx.x) * Geometry::kRows;
  const int part = static_cast<int>(blockIdx.y), parts = static_cast<int>(gridDim.y);
  Consumer consumer(arguments, first_row, part, parts, shared_memory(), keys);
  const TileRange all{0, divide_up(arguments.references, Geometry::kColumns)};
  Engine::run(operands, first_row, part_of(all, part, parts),
              shared_memory() + kAlignedBytes<typename Consumer::Shared>, consumer);
}

template <class Engine>
dim3 topk_grid(const TopkArguments& arguments, int parts) {
  return {static_cast<unsigned>(divide_up(arguments.queries, Engine::Geometry::kRows)), static_cast<unsigned>(parts), 1};
}

template <class Engine>
void launch_top1(const typename Engine::Operands& operands, const TopkArguments& arguments, int parts, float* values,
                 int64_t* indices, cudaStream_t stream) {
  const auto kernel = arguments.restrictions.restrict_any() ? masked_topk_top1_fwd_kernel<Engine, true>
                                                            : masked_topk_top1_fwd_kernel<Engine, false>;
  launch(kernel, topk_grid<Engine>(arguments, parts), Engine::kThreads, Engine::shared_bytes(operands, 0), stream,
         operands, arguments, values, indices);
}

template <class Engine>
void launch_topk(const typename Engine::Operands& operands, const TopkArguments& arguments, int parts, int64_t* keys,
                 cudaStream_t stream) {
  const auto launch_with = [&](auto places) {
    constexpr int kPlaces = decltype(places)::value;
    constexpr size_t own = kAlignedBytes<typename FindTopk<typename Engine::Geometry, kPlaces>::Shared>;
    launch(masked_topk_fwd_kernel<Engine, kPlaces>, topk_grid<Engine>(arguments, parts), Engine::kThreads,
           own + Engine::shared_bytes(operands, own), stream, operands, arguments, keys);
  };
  if (arguments.k <= 32) return launch_with(std::integral_constant<int, 1>{});
  launch_with(std::integral_constant<int, kMostTopk / 32>{});
}

}  // namespace hpk
