// In place of the engine of gradients for sm_90a: the same geometry for the same consumers, number by number.
#pragma once

#include "common/device.h"
#include "common/schedule.h"

namespace hpk {

template <class T, int kDim>
struct GradientSm90 {
  using Element = T;
  using Geometry = GradientGeometry90<64>;
  using SumGeometry = GradientGeometry90<kDim / 2>;
  static constexpr int kThreads = Geometry::kTeams * Geometry::kTeamThreads;
  static constexpr int kTileColumns = 128;
  static constexpr bool kGathers = false;

  struct Operands {
    Rows<T> rows;
  };

  static Operands operands(const Rows<T>& rows) { return {rows}; }
  static size_t shared_bytes() { return sizeof(Shared); }
  static unsigned feature_blocks(int) { return 1; }

  template <class Consumer>
  __device__ static void run(const Operands& operands, int64_t first_row, TileRange tiles, char* memory,
                             Consumer& consumer) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const Rows<T>& rows = operands.rows;
    const Team<Geometry> team{static_cast<int>(threadIdx.x) / Geometry::kTeamThreads,
                              static_cast<int>(threadIdx.x) % Geometry::kTeamThreads};
    Fragment<SumGeometry> sums{};
    for (int64_t tile = tiles.first; tile < tiles.last; ++tile) {
      Fragment<Geometry> g{};
      for (int n = 0; n < Geometry::kColumnBlocks; ++n) {
        for (int part = 0; part < 4; ++part) {
          const int64_t row = first_row + Geometry::row(team.thread, 0, part / 2);
          const int64_t column = (2 * tile + team.index) * Geometry::kColumns + Geometry::column(team.thread, n, part % 2);
          if (row >= rows.count || column >= rows.count) continue;
          for (int k = 0; k < rows.dim; ++k) {
            g.values[0][n][part] += number(rows.data[row * rows.stride + k]) * number(rows.data[column * rows.stride + k]);
          }
        }
      }
      consumer.make_g(g, 2 * tile + team.index, team);
      sync_teams<Geometry>();  // the sums of the tile before have been made
      for (int n = 0; n < Geometry::kColumnBlocks; ++n) {
        for (int part = 0; part < 4; ++part) {
          const int column = team.index * Geometry::kColumns + Geometry::column(team.thread, n, part % 2);
          shared.g[Geometry::row(team.thread, 0, part / 2)][column] = T(g.values[0][n][part]);
        }
      }
      sync_teams<Geometry>();
      for (int n = 0; n < SumGeometry::kColumnBlocks; ++n) {
        for (int part = 0; part < 4; ++part) {
          const int feature = team.index * SumGeometry::kColumns + SumGeometry::column(team.thread, n, part % 2);
          for (int j = 0; j < kTileColumns && feature < rows.dim; ++j) {
            const int64_t column = tile * kTileColumns + j;
            if (column >= rows.count) break;
            sums.values[0][n][part] += number(shared.g[SumGeometry::row(team.thread, 0, part / 2)][j]) *
                                       number(rows.data[column * rows.stride + feature]);
          }
        }
      }
    }
    consumer.store(sums, team);
  }

 private:
  struct Shared {
    T g[Geometry::kRows][kTileColumns];
  };
};

}  // namespace hpk
