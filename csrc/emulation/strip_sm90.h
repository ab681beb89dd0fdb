// In place of the engine for sm_90a, which cannot be emulated: products of the same geometry for the same consumers,
// number by number.
#pragma once

#include "common/device.h"
#include "common/schedule.h"

namespace hpk {

template <class T>
struct StripSm90 {
  using Element = T;
  using Geometry = Geometry90;
  static constexpr int kThreads = Geometry::kTeams * Geometry::kTeamThreads;
  static constexpr bool kGathers = false;

  struct Operands {
    Rows<T> left, right;
  };

  static Operands operands(const Rows<T>& left, const Rows<T>& right) { return {left, right}; }
  static size_t shared_bytes(const Operands&, size_t) { return 128 * 1024; }

  template <class Consumer>
  __device__ static void run(const Operands& operands, int64_t first_row, TileRange tiles, char*, Consumer& consumer) {
    const Rows<T>&left = operands.left, &right = operands.right;
    const Team<Geometry> team{static_cast<int>(threadIdx.x) / Geometry::kTeamThreads,
                              static_cast<int>(threadIdx.x) % Geometry::kTeamThreads};
    for (int64_t tile = tiles.first + team.index; tile < tiles.last; tile += Geometry::kTeams) {
      Fragment<Geometry> products{};
      for (int m = 0; m < Geometry::kRowBlocks; ++m) {
        for (int n = 0; n < Geometry::kColumnBlocks; ++n) {
          for (int part = 0; part < 4; ++part) {
            const int64_t row = first_row + Geometry::row(team.thread, m, part / 2);
            const int64_t column = tile * Geometry::kColumns + Geometry::column(team.thread, n, part % 2);
            if (row >= left.count || column >= right.count) continue;
            float sum = 0;
            for (int k = 0; k < left.dim; ++k) {
              sum += number(left.data[row * left.stride + k]) * number(right.data[column * right.stride + k]);
            }
            products.values[m][n][part] = sum;
          }
        }
      }
      consumer(products, tile, team);
    }
  }
};

}  // namespace hpk
