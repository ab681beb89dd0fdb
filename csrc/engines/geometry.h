// Which products of a tile each thread of a team holds. Both engines keep them as the accumulators of tensor cores lie:
// in a block of 16 rows and 8 columns, a lane has rows lane / 4 and lane / 4 + 8, columns 2 (lane % 4) and the next.
#pragma once

#include "common/portable.h"

namespace hpk {

// mma.sync, sm_80 and newer: one team of eight warps, 2 x 4, each with kBlocks x 16 rows and 32 columns.
template <int kBlocks>
struct WarpGeometry80 {
  static constexpr int kRows = 32 * kBlocks, kColumns = 128;
  static constexpr int kTeams = 1, kTeamThreads = 256;
  static constexpr int kRowBlocks = kBlocks, kColumnBlocks = 4;
  static constexpr int kWarpsAcross = 4;  // warps that share a row

  HPK_HOST_DEVICE static constexpr int row(int thread, int m, int h) {
    return thread / 128 * (kRows / 2) + 16 * m + thread % 32 / 4 + 8 * h;
  }
  HPK_HOST_DEVICE static constexpr int column(int thread, int n, int c) {
    return thread / 32 % 4 * 32 + 8 * n + 2 * (thread % 4) + c;
  }
};

using Geometry80 = WarpGeometry80<4>;

// The same for gradients: eight warps, 4 x 2, each with 16 rows and half of kWidth columns.
template <int kWidth>
struct GradientGeometry80 {
  static constexpr int kRows = 64, kColumns = kWidth;
  static constexpr int kTeams = 1, kTeamThreads = 256;
  static constexpr int kRowBlocks = 1, kColumnBlocks = kWidth / 16;

  HPK_HOST_DEVICE static constexpr int row(int thread, int, int h) { return thread / 32 % 4 * 16 + thread % 32 / 4 + 8 * h; }
  HPK_HOST_DEVICE static constexpr int column(int thread, int n, int c) {
    return thread / 128 * (kWidth / 2) + 8 * n + 2 * (thread % 4) + c;
  }
};

// wgmma, sm_90a: two teams of four warps that take turns; each warp has 16 rows of either half, and all columns.
struct Geometry90 {
  static constexpr int kRows = 128, kColumns = 128;
  static constexpr int kTeams = 2, kTeamThreads = 128;
  static constexpr int kRowBlocks = 2, kColumnBlocks = 16;
  static constexpr int kWarpsAcross = 1;

  HPK_HOST_DEVICE static constexpr int row(int thread, int m, int h) {
    return 64 * m + thread / 32 * 16 + thread % 32 / 4 + 8 * h;
  }
  HPK_HOST_DEVICE static constexpr int column(int thread, int n, int c) { return 8 * n + 2 * (thread % 4) + c; }
};

// The same with tiles of 256 columns, which both groups of four warps share: each has 64 rows, and all columns.
struct WideGeometry90 {
  static constexpr int kRows = 128, kColumns = 256;
  static constexpr int kTeams = 1, kTeamThreads = 256;
  static constexpr int kRowBlocks = 1, kColumnBlocks = 32;
  static constexpr int kWarpsAcross = 1;

  HPK_HOST_DEVICE static constexpr int row(int thread, int, int h) { return thread / 32 * 16 + thread % 32 / 4 + 8 * h; }
  HPK_HOST_DEVICE static constexpr int column(int thread, int n, int c) { return Geometry90::column(thread, n, c); }
};

// wgmma, gradients: each of two teams has 64 rows and kWidth columns.
template <int kWidth>
struct GradientGeometry90 {
  static constexpr int kRows = 64, kColumns = kWidth;
  static constexpr int kTeams = Geometry90::kTeams, kTeamThreads = Geometry90::kTeamThreads;
  static constexpr int kRowBlocks = 1, kColumnBlocks = kWidth / 8;

  HPK_HOST_DEVICE static constexpr int row(int thread, int m, int h) { return Geometry90::row(thread, m, h); }
  HPK_HOST_DEVICE static constexpr int column(int thread, int n, int c) { return Geometry90::column(thread, n, c); }
};

// The products of one tile that a thread holds: that of row(m, h) and column(n, c) is values[m][n][2 * h + c].
template <class Geometry>
struct Fragment {
  float values[Geometry::kRowBlocks][Geometry::kColumnBlocks][4];
};

}  // namespace hpk
