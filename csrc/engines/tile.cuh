// Tiles of rows in shared memory, in 128 bytes of each row, and products of them by tensor cores (sm_80 and newer).
//
// A tile's row r lies at 128 r; its eight chunks of 16 bytes are permuted, chunk c at place c ^ (r % 8), so that the eight
// rows of a chunk are in different banks.
#pragma once

#include "engines/team.cuh"

namespace hpk {

constexpr int kTileBytes = 128;   // of a row
constexpr int kChunkBytes = 16;
constexpr int kTileChunks = kTileBytes / kChunkBytes;
constexpr int kStepBytes = 32;    // of a row, that one mma takes

template <class T>
constexpr int kTileElements = kTileBytes / static_cast<int>(sizeof(T));

HPK_HOST_DEVICE int tile_offset(int row, int chunk) { return row * kTileBytes + ((chunk ^ (row % 8)) * kChunkBytes); }

// Starts the copy of a chunk of row `source`, from byte kTileBytes * block of it on; zeros beyond the row's end and for a
// source of -1.
template <class T>
__device__ __forceinline__ void load_chunk(const Rows<T>& rows, int source, int block, char* tile, int row,
                                           int chunk) {
  const int element = block * kTileElements<T> + chunk * (kChunkBytes / static_cast<int>(sizeof(T)));
  const bool inside = source >= 0 && element < rows.dim;
  const T* const from = rows.data + (inside ? int64_t{source} * rows.stride + element : 0);
  cp_async(tile + tile_offset(row, chunk), from, inside ? kChunkBytes : 0);
}

// sums += a times b, with float split into two numbers of TF32: what is left out is a product of rounding errors. If
// kComparable, the products with the two rests are summed apart, so that b times a has the bits of a times b.
template <class T, bool kComparable = false>
struct Multiplier {
  __device__ static __forceinline__ void add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma<T>(sums, a, b0, b1);
  }
};

template <bool kComparable>
struct Multiplier<float, kComparable> {
  __device__ static __forceinline__ uint32_t rest(uint32_t bits, uint32_t rounded) {
    return to_tf32(__uint_as_float(bits) - __uint_as_float(rounded));
  }

  __device__ static __forceinline__ void add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    uint32_t large[4], small[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      large[i] = to_tf32(__uint_as_float(a[i]));
      small[i] = rest(a[i], large[i]);
    }
    const uint32_t large0 = to_tf32(__uint_as_float(b0)), large1 = to_tf32(__uint_as_float(b1));
    if constexpr (kComparable) {
      float of_a[4] = {}, of_b[4] = {};
      mma<float>(of_a, small, large0, large1);
      mma<float>(of_b, large, rest(b0, large0), rest(b1, large1));
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i] += of_a[i] + of_b[i];
    } else {
      mma<float>(sums, small, large0, large1);
      mma<float>(sums, large, rest(b0, large0), rest(b1, large1));
    }
    mma<float>(sums, large, large0, large1);
  }
};

// The operand of mma that lies in 16 rows, from `row` on, and 32 bytes from chunk 2 * step on.
__device__ __forceinline__ void load_left(uint32_t (&parts)[4], const char* tile, int row, int step) {
  const int lane = threadIdx.x % 32;
  load_matrices(parts, tile + tile_offset(row + lane % 16, 2 * step + lane / 16));
}

// The operands of mma for two blocks of 8 columns, which are rows of `tile` from `row` on: {b0, b1} of either.
__device__ __forceinline__ void load_right(uint32_t (&parts)[4], const char* tile, int row, int step) {
  const int lane = threadIdx.x % 32;
  load_matrices(parts, tile + tile_offset(row + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
}

template <class Geometry>
__device__ __forceinline__ int first_row_of_warp(int thread) {
  return Geometry::row(thread / 32 * 32, 0, 0);
}

template <class Geometry>
__device__ __forceinline__ int first_column_of_warp(int thread) {
  return Geometry::column(thread / 32 * 32, 0, 0);
}

// Adds the products of kRowBlocks x 16 rows of `left` and kColumnBlocks x 8 rows of `right`, in 128 bytes of each, of
// which kUnrolled of four steps are under way at a time.
template <class T, int kUnrolled = 4, bool kComparable = false, int kRowBlocks, int kColumnBlocks>
__device__ __forceinline__ void add_products(float (&sums)[kRowBlocks][kColumnBlocks][4], const char* left, int row,
                                             const char* right, int column) {
#pragma unroll kUnrolled
  for (int step = 0; step < kTileBytes / kStepBytes; ++step) {
    uint32_t b[kColumnBlocks / 2][4];
#pragma unroll
    for (int n = 0; n < kColumnBlocks / 2; ++n) load_right(b[n], right, column + 16 * n, step);
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
      uint32_t a[4];
      load_left(a, left, row + 16 * m, step);
#pragma unroll
      for (int n = 0; n < kColumnBlocks; ++n) {
        Multiplier<T, kComparable>::add(sums[m][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
      }
    }
  }
}

}  // namespace hpk
