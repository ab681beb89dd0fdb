// The teams of a block, each of which works on one tile at a time, and how their threads put together what each of them
// knows of a row.
#pragma once

#include "common/warp.cuh"
#include "engines/geometry.h"

namespace hpk {

// A group of threads that works on one tile at a time.
template <class Geometry>
struct Team {
  int index, thread;

  __device__ void sync() const { barrier_sync(1 + index, Geometry::kTeamThreads); }
};

// Every team of the block, but not the threads that only load.
template <class Geometry>
__device__ __forceinline__ void sync_teams() {
  barrier_sync(1 + Geometry::kTeams, Geometry::kTeams * Geometry::kTeamThreads);
}

// Adds up the `rows` of a thread with Row::add, in a fixed order: over the four lanes that share a row, then over the warps
// that do, then over the teams. finish(r, row) is called for each row of the strip. `shared` is memory that nobody uses
// any more, for a Row of each row, warp across and team.
template <class Geometry, class Row, class Finish>
__device__ __forceinline__ void combine_rows(Row (&rows)[Geometry::kRowBlocks][2], char* shared, const Finish& finish) {
  constexpr int kParts = Geometry::kTeams * Geometry::kWarpsAcross, kThreads = Geometry::kTeams * Geometry::kTeamThreads;
  auto* const parts = reinterpret_cast<Row(*)[kParts]>(shared);
  const int thread = threadIdx.x % Geometry::kTeamThreads, team = threadIdx.x / Geometry::kTeamThreads;
  const int part = team * Geometry::kWarpsAcross + thread / 32 % Geometry::kWarpsAcross;
  sync_teams<Geometry>();
#pragma unroll
  for (int m = 0; m < Geometry::kRowBlocks; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int width = 1; width < 4; width *= 2) rows[m][h].add(exchanged(rows[m][h], width));
      if (thread % 4 == 0) parts[Geometry::row(thread, m, h)][part] = rows[m][h];
    }
  }
  sync_teams<Geometry>();
  for (int row = threadIdx.x; row < Geometry::kRows; row += kThreads) {
    Row all = parts[row][0];
    for (int i = 1; i < kParts; ++i) all.add(parts[row][i]);
    finish(row, all);
  }
}

}  // namespace hpk
