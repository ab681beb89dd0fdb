// wgmma.mma_async: products of operands in shared memory, which are read at any time until they are waited for.
#include "emulation/hopper_state.h"

namespace hpk {
namespace emulation {
namespace {

// What a matrix descriptor says, as the manual of PTX lays it out: offsets in units of 16 bytes.
struct Descriptor {
  uint32_t start, leading, stride;

  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3FFF) * 16), leading((bits >> 16 & 0x3FFF) * 16), stride((bits >> 32 & 0x3FFF) * 16) {
    if (bits >> 62 != 1) fail("a descriptor without the 128-byte swizzle");
    if ((bits >> 49 & 7) != 0) fail("a descriptor with a base offset");
  }

  // Of element k of a row. K-major: eight rows lie 128 bytes apart, the next eight `stride` bytes on. MN-major: so do
  // eight elements k, and of rows there are 64 in 128 bytes, the next 64 `leading` bytes on.
  uint32_t address(int row, int k, bool transposed) const {
    const auto r = static_cast<uint32_t>(row), e = static_cast<uint32_t>(k);
    const uint32_t offset = transposed ? e % 8 * 128 + e / 8 * stride + r % 64 * 2 + r / 64 * leading
                                       : r % 8 * 128 + r / 8 * stride + e * 2;
    return swizzled(start + offset);
  }
};

float operand(const Descriptor& descriptor, int row, int k, bool transposed, bool bfloat16) {
  const uint32_t address = descriptor.address(row, k, transposed);
  if (!in_shared(address, 2)) fail("wgmma reads beyond shared memory");
  const char* const place = state().seen_by_wgmma.data() + (address - kWindow);
  uint16_t bits;
  std::memcpy(&bits, place, 2);
  if (bfloat16) return __uint_as_float(uint32_t{bits} << 16);
  __half value;
  std::memcpy(static_cast<void*>(&value), &bits, 2);
  return __half2float(value);
}

// Reads the operands of a warp's rows, and adds their products.
void execute(const Product& product, unsigned warp) {
  constexpr int kRows = 16, kDepth = 16, kMostColumns = 256;
  static thread_local float left[kRows][kDepth], right[kDepth][kMostColumns];
  const Wgmma& wgmma = product.wgmma;
  const Descriptor left_at(wgmma.left), right_at(wgmma.right);
  const int first_row = static_cast<int>(warp) % kGroup * kRows;
  for (int row = 0; row < kRows; ++row) {
    for (int k = 0; k < kDepth; ++k) left[row][k] = operand(left_at, first_row + row, k, wgmma.left_transposed, wgmma.bfloat16);
  }
  for (int column = 0; column < wgmma.columns; ++column) {
    for (int k = 0; k < kDepth; ++k) {
      right[k][column] = operand(right_at, column, k, wgmma.right_transposed, wgmma.bfloat16);
    }
  }
  for (int row = 0; row < kRows; ++row) {
    float* const sums = product.sums->values.data() + row * wgmma.columns;
    double totals[kMostColumns];
    for (int column = 0; column < wgmma.columns; ++column) totals[column] = wgmma.accumulate ? sums[column] : 0;
    for (int k = 0; k < kDepth; ++k) {
      const double factor = left[row][k];
      for (int column = 0; column < wgmma.columns; ++column) totals[column] += factor * right[k][column];
    }
    for (int column = 0; column < wgmma.columns; ++column) sums[column] = static_cast<float>(totals[column]);
  }
  --product.sums->under_way;
}

// Calls body(register of a lane, place among the values) for each accumulator: those of lane l are in rows l / 4 and 8
// further, columns 8 n + 2 (l % 4) and the next.
template <class Body>
void for_each_register(Sums& sums, const Body& body) {
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < sums.columns / 2; ++i) {
      const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      body(sums.of_lane[lane][i], sums.values[static_cast<size_t>(row * sums.columns + column)]);
    }
  }
}

const float kUndefined = __uint_as_float(0xFFFFFFFFu);

// The accumulators of a warp that no product is adding to any more are those of the threads again.
void return_sums(WarpState& warp) {
  for (auto sums = warp.sums.begin(); sums != warp.sums.end();) {
    if (sums->under_way > 0) {
      ++sums;
      continue;
    }
    for_each_register(*sums, [](float& own, float& value) {
      if (__float_as_uint(own) != 0xFFFFFFFFu) fail("accumulators are written while wgmma adds to them");
      own = value;
    });
    sums = warp.sums.erase(sums);
  }
}

struct Issue {
  Wgmma wgmma;
  float* sums;
};

void issue(const void* const* operands, void* const*) {
  const auto of_lane = [&](int lane) -> const Issue& { return *static_cast<const Issue*>(operands[lane]); };
  const Wgmma& wgmma = of_lane(0).wgmma;
  for (int lane = 1; lane < kWarp; ++lane) {
    if (!(of_lane(lane).wgmma == wgmma)) fail("lanes of a warp differ in a wgmma");
  }
  if (wgmma.columns % 8 != 0 || wgmma.columns < 8 || wgmma.columns > 256) fail("there is no wgmma of so many columns");
  come_to({wgmma, 0});
  WarpState& warp = state().warps[own_warp()];
  Sums* sums = nullptr;
  for (Sums& held : warp.sums) {
    if (held.of_lane[0] == of_lane(0).sums) sums = &held;
  }
  if (sums == nullptr) {
    if (!warp.begun) fail("wgmma without wgmma.fence between it and other uses of its registers");
    sums = &warp.sums.emplace_back();
    sums->columns = wgmma.columns;
    sums->values.resize(static_cast<size_t>(16 * wgmma.columns));
    for (int lane = 0; lane < kWarp; ++lane) sums->of_lane[lane] = of_lane(lane).sums;
    for_each_register(*sums, [](float& own, float& value) {
      value = own;
      own = kUndefined;
    });
  } else if (sums->columns != wgmma.columns) {
    fail("wgmma of different shapes add to the same registers");
  }
  ++sums->under_way;
  warp.groups.back().push_back({wgmma, sums});
}

void begin(const void* const*, void* const*) {
  if (!state().is_faulty("no_begin")) state().warps[own_warp()].begun = true;
}

void commit(const void* const*, void* const*) {
  if (!state().is_faulty("no_commit")) state().warps[own_warp()].groups.emplace_back();
}

void wait_for_groups(const void* const* operands, void* const*) {
  const int left = *static_cast<const int*>(operands[0]);
  WarpState& warp = state().warps[own_warp()];
  while (static_cast<int>(warp.groups.size()) - 1 > left) {
    for (const Product& product : warp.groups.front()) execute(product, own_warp());
    warp.groups.pop_front();
  }
  return_sums(warp);
  warp.begun = false;
}

}  // namespace

void finish_product(unsigned warp) {
  for (auto& group : state().warps[warp].groups) {
    if (group.empty()) continue;
    execute(group.front(), warp);
    group.erase(group.begin());
    return;
  }
}

bool has_products(const WarpState& warp) {
  for (const auto& group : warp.groups) {
    if (!group.empty()) return true;
  }
  return false;
}

void multiply_async(const Wgmma& wgmma, float* sums) {
  Issue operands{wgmma, sums};
  const auto doubled = [](uint64_t descriptor, int from) { return descriptor + (descriptor & (uint64_t{0x3FFF} << from)); };
  if (state().is_faulty("left_stride")) operands.wgmma.left = doubled(wgmma.left, 32);
  if (state().is_faulty("right_stride")) operands.wgmma.right = doubled(wgmma.right, 32);
  if (state().is_faulty("right_leading")) operands.wgmma.right = doubled(wgmma.right, 16);
  if (state().is_faulty("right_start")) operands.wgmma.right += 2;
  if (state().is_faulty("not_transposed")) operands.wgmma.left_transposed = false;
  warp_instruction<int>(kAll, issue, operands);
}

void wait_for_products(int left) {
  if (state().is_faulty("no_wait_for_products")) return;
  if (left > 0 && state().is_faulty("early_release")) ++left;
  warp_instruction<int>(kAll, wait_for_groups, left);
}

}  // namespace emulation

namespace hopper {

using namespace emulation;

void begin_products() { warp_instruction<int>(kAll, begin, 0); }
void commit_products() { warp_instruction<int>(kAll, commit, 0); }

}  // namespace hopper
}  // namespace hpk
