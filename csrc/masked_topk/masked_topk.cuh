// Kernels of masked_topk for either engine: see masked_topk_cuda.cu and masked_topk_sm90.cu.
#pragma once

#include <cmath>

#include "common/schedule.h"
#include "engines/team.cuh"
#include "masked_topk/masked_topk.h"
#include "masked_topk/rank_keys.h"

namespace hpk {

// Consumer

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

// The greatest product of each row, in registers. There are no restrictions.
template <class Geometry>
struct FindBest {
  const TopkArguments& arguments;
  Best best[Geometry::kRowBlocks][2];

  __device__ explicit FindBest(const TopkArguments& arguments_) : arguments(arguments_) {
    for (auto& pair : best) pair[0] = pair[1] = {-INFINITY, -1};
  }

  __device__ void prepare(int, const Team<Geometry>&) const {}

  // Of most tiles no product is greater than what a row has: that takes one maximum a product to see.
  __device__ void operator()(const Fragment<Geometry>& products, int tile, const Team<Geometry>& team) {
    const int first_column = tile * Geometry::kColumns;
    const bool whole = first_column + Geometry::kColumns <= arguments.references;
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
        if (greatest <= own.value || own.value != own.value) continue;
        if (whole) {
          own = {greatest, first_with(greatest, products.values[m], h, first_column, team.thread)};
        } else {
          add_references(own, products.values[m], h, first_column, team.thread);
        }
      }
    }
  }

 private:
  using OfRows = float[Geometry::kColumnBlocks][4];

  // The first column that has a value, -1 for NaN.
  __device__ static __forceinline__ int first_with(float value, const OfRows& values, int h, int first_column,
                                                   int thread) {
    int first = -1;
#pragma unroll
    for (int n = Geometry::kColumnBlocks - 1; n >= 0; --n) {
#pragma unroll
      for (int c = 1; c >= 0; --c) {
        if (values[n][2 * h + c] == value) first = first_column + Geometry::column(thread, n, c);
      }
    }
    return first;
  }

  // Adds the products one by one, but not those beyond the last reference. A thread meets its columns in ascending order,
  // so an equal value comes too late.
  __device__ __forceinline__ void add_references(Best& own, const OfRows& values, int h, int first_column,
                                                 int thread) const {
#pragma unroll
    for (int n = 0; n < Geometry::kColumnBlocks; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = first_column + Geometry::column(thread, n, c);
        const float value = values[n][2 * h + c];
        if (value <= own.value || own.value != own.value || column >= arguments.references) continue;
        own = {value, value == value ? column : -1};
      }
    }
  }
};

// The `count` greatest keys so far, in the registers of a thread: in descending order at the end of keys[], behind some
// that give way to none.
struct SortedKeys {
  static constexpr int kMost = kMostTopk;
  int64_t keys[kMost];

  __device__ explicit SortedKeys(int count) {
#pragma unroll
    for (int i = 0; i < kMost; ++i) keys[i] = i < kMost - count ? kGreatestKey : kNothingFound;
  }

  __device__ __forceinline__ int64_t least() const { return keys[kMost - 1]; }

  // At every place at once, so that no place needs to be found.
  __device__ __forceinline__ void insert(int64_t key) {
#pragma unroll
    for (int i = kMost - 1; i > 0; --i) keys[i] = key > keys[i - 1] ? keys[i - 1] : key > keys[i] ? key : keys[i];
    if (key > keys[0]) keys[0] = key;
  }

  // list[t * step] = the t-th greatest
  __device__ __forceinline__ void store(int count, int64_t* list, int64_t step) const {
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (i >= kMost - count) list[(i - (kMost - count)) * step] = keys[i];
    }
  }
};

// The k greatest keys of each row that are less than a limit: a thread of each team has a row. Products go through
// shared memory, 32 columns at a time. Most are no greater than the least that is kept: a comparison tells.
template <class Geometry>
struct FindTopk {
  static constexpr int kSlab = 32, kSlabs = Geometry::kColumns / kSlab;
  static_assert(Geometry::kTeamThreads >= Geometry::kRows, "a thread has one row");

  struct Shared {
    float products[Geometry::kTeams][Geometry::kRows][kSlab + 1];
  };

  const TopkArguments& arguments;
  int query;
  Shared* shared;
  int64_t limit;
  SortedKeys sorted;

  __device__ FindTopk(const TopkArguments& arguments_, int first_row, const int64_t* below, char* memory)
      : arguments(arguments_),
        query(first_row + static_cast<int>(threadIdx.x) % Geometry::kTeamThreads),
        shared(reinterpret_cast<Shared*>(memory)),
        limit(kGreatestKey),
        sorted(arguments_.k) {
    if (has_row() && below != nullptr) limit = below[query];
  }

  __device__ void operator()(const Fragment<Geometry>& products, int tile, const Team<Geometry>& team) {
    auto& own = shared->products[team.index];
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
            own[Geometry::row(team.thread, m, part / 2)][column + part % 2] = products.values[m][n][part];
          }
        }
      }
      team.sync();
      if (has_row()) add(own[team.thread], tile * Geometry::kColumns + slab * kSlab);
      team.sync();
    }
  }

  // Called after the last tile, by every thread of the teams: the first team gets the keys of all.
  __device__ void join_teams() {
    auto* const others = reinterpret_cast<int64_t(*)[kMostTopk][Geometry::kRows]>(shared);  // of team 1 and so on
    static_assert(sizeof(*others) * (Geometry::kTeams - 1) <= sizeof(Shared), "the keys of the other teams fit");
    const int team = threadIdx.x / Geometry::kTeamThreads, row = threadIdx.x % Geometry::kTeamThreads;
    sync_teams<Geometry>();  // no products are read any more
    if (team > 0 && has_row()) sorted.store(arguments.k, &others[team - 1][0][row], Geometry::kRows);
    sync_teams<Geometry>();
    if (team > 0 || !has_row()) return;
    for (int other = 0; other < Geometry::kTeams - 1; ++other) {
      for (int t = 0; t < arguments.k; ++t) {
        const int64_t key = others[other][t][row];
        if (key > sorted.least()) sorted.insert(key);
      }
    }
  }

  // Whether the thread has a query: on one of the engines there are more threads than rows.
  __device__ __forceinline__ bool has_row() const {
    return static_cast<int>(threadIdx.x) % Geometry::kTeamThreads < Geometry::kRows && query < arguments.queries;
  }

 private:
  __device__ __forceinline__ void add(const float (&products)[kSlab + 1], int first_column) {
    const float least = value_of_key(sorted.least()), greatest = value_of_key(limit);
    uint32_t left = 0;
#pragma unroll
    for (int c = 0; c < kSlab; ++c) {
      // NaN passes, and where a bound is NaN all do: then the keys decide alone.
      left |= uint32_t{!(products[c] <= least || products[c] > greatest)} << c;
    }
    for (; left != 0; left &= left - 1) {
      const int place = __ffs(left) - 1, column = first_column + place;
      const int64_t key = rank_key(products[place], column);
      if (key <= sorted.least() || key >= limit || column >= arguments.references) continue;
      if (is_allowed(arguments.restrictions, query, column)) sorted.insert(key);
    }
  }
};

// Kernel

// values[i, s], indices[i, s] = max, argmax over {m in part s of the pool} of <query_i, pool_m>
//
// Grid (strips of queries, parts of the pool). FLOPs: 2 D a pair. Bytes: a strip of queries once a block, the pool once
// for every strip, from cache; 12 bytes written a query and part.
template <class Engine>
HPK_KERNEL(Engine::kThreads, 1)
masked_topk_top1_fwd_kernel(const __grid_constant__ typename Engine::Operands operands,
                            const __grid_constant__ TopkArguments arguments, float* __restrict__ values,
                            int64_t* __restrict__ indices) {
  using Geometry = typename Engine::Geometry;
  const int first_row = static_cast<int>(blockIdx.x) * Geometry::kRows;
  FindBest<Geometry> consumer(arguments);
  const TileRange all{0, divide_up(arguments.references, Geometry::kColumns)};
  Engine::run(operands, first_row, part_of(all, blockIdx.y, gridDim.y), shared_memory(), consumer);
  combine_rows<Geometry>(consumer.best, shared_memory(), [&](int r, const Best& best) {
    if (first_row + r >= arguments.queries) return;
    const int64_t at = int64_t{first_row + r} * gridDim.y + blockIdx.y;
    values[at] = best.value;
    indices[at] = best.index;
  });
}

// keys[i, s, t] = the k greatest, descending, over {m in part s of the pool, allowed, with key < below[i]} of
// key = rank_key(<query_i, pool_m>, m), or kNothingFound.
//
// Grid (strips of queries, parts of the pool). FLOPs and bytes as above, and 8 k bytes written a query and part.
template <class Engine>
HPK_KERNEL(Engine::kThreads, 1)
masked_topk_fwd_kernel(const __grid_constant__ typename Engine::Operands operands,
                       const __grid_constant__ TopkArguments arguments, const int64_t* __restrict__ below,
                       int64_t* __restrict__ keys) {
  using Geometry = typename Engine::Geometry;
  using Consumer = FindTopk<Geometry>;
  const int first_row = static_cast<int>(blockIdx.x) * Geometry::kRows;
  Consumer consumer(arguments, first_row, below, shared_memory());
  const TileRange all{0, divide_up(arguments.references, Geometry::kColumns)};
  Engine::run(operands, first_row, part_of(all, blockIdx.y, gridDim.y),
              shared_memory() + kAlignedBytes<typename Consumer::Shared>, consumer);
  consumer.join_teams();
  if (threadIdx.x >= Geometry::kTeamThreads || !consumer.has_row()) return;
  consumer.sorted.store(arguments.k, keys + (int64_t{consumer.query} * gridDim.y + blockIdx.y) * arguments.k, 1);
}

// Launch

template <class Engine>
dim3 topk_grid(const TopkArguments& arguments, int parts) {
  const int64_t strips = divide_up(arguments.queries, Engine::Geometry::kRows);
  return {static_cast<unsigned>(strips), static_cast<unsigned>(parts), 1};
}

template <class Engine>
void launch_top1(const typename Engine::Operands& operands, const TopkArguments& arguments, int parts, float* values,
                 int64_t* indices, cudaStream_t stream) {
  launch(masked_topk_top1_fwd_kernel<Engine>, topk_grid<Engine>(arguments, parts), Engine::kThreads,
         Engine::shared_bytes(operands, 0), stream, operands, arguments, values, indices);
}

template <class Engine>
void launch_topk(const typename Engine::Operands& operands, const TopkArguments& arguments, int parts,
                 const int64_t* below, int64_t* keys, cudaStream_t stream) {
  constexpr size_t own = kAlignedBytes<typename FindTopk<typename Engine::Geometry>::Shared>;
  static_assert(own <= Engine::kMostOwnBytes, "more shared memory than there is");
  launch(masked_topk_fwd_kernel<Engine>, topk_grid<Engine>(arguments, parts), Engine::kThreads,
         own + Engine::shared_bytes(operands, own), stream, operands, arguments, below, keys);
}

}  // namespace hpk
