#include "emulation/hopper.h"

#include <cstdlib>
#include <deque>
#include <limits>
#include <list>
#include <map>

#include "emulation/block.h"

namespace hpk {
namespace emulation {
namespace {

constexpr int kGroup = 4;              // warps of a warp group
constexpr uint32_t kWindow = 1024;     // where the block's shared memory starts; what is before belongs to the system
constexpr uint64_t kToken = 0x6d62617272696572;  // what lies where a barrier is, less its number
constexpr int64_t kMostBytes = (1 << 20) - 1;    // that a barrier counts
constexpr int kRegisters = 64 * 1024;            // of an SM

// A barrier: a phase ends when nobody is left to arrive and no bytes are left to come.
struct TransactionBarrier {
  int number, arrivals, pending;
  int64_t bytes = 0;
  Meeting phases;
  bool fenced = false;

  uint32_t parity() const { return phases.passed % 2; }
};

// What CUtensorMap says of rows.
struct TensorMap {
  const char* base;
  int64_t dim, count, stride_bytes;
  uint32_t rows;
  uint64_t token;
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap), "what is said fits");

struct BoxCopy {
  TensorMap map;
  int64_t row;
  int element;
  uint32_t to;
  TransactionBarrier* barrier;
};

// The accumulators of a warp, while products are under way that add to them.
struct Sums {
  float* of_lane[kWarp];
  int columns, under_way = 0;
  std::vector<float> values;  // 16 rows
};

struct Product {
  Wgmma wgmma;
  Sums* sums;
};

struct WarpState {
  std::list<Sums> sums;
  std::deque<std::vector<Product>> groups{1};  // in order; the last one is not committed
  bool begun = false;
  size_t instructions = 0;  // of the warp group, that this warp has come to
  int registers = 0;
};

// What all warps of a warp group must come to, in this order.
struct GroupInstruction {
  Wgmma wgmma;
  int registers;  // of setmaxnreg, or 0

  bool operator==(const GroupInstruction& other) const {
    return wgmma == other.wgmma && registers == other.registers;
  }
};

}  // namespace

struct Hopper {
  std::map<uint32_t, TransactionBarrier> barriers;
  std::vector<BoxCopy> boxes;
  std::vector<WarpState> warps;
  std::vector<std::vector<GroupInstruction>> groups;
  std::vector<char> seen_by_wgmma;  // shared memory
  int free_registers = 0;
  Meeting registers_given;
  unsigned box_rate = 0, product_rate = 0, pause_rate = 0;  // of 1024
  unsigned order = 0;  // in which boxes come: the oldest first, the newest first, or any
  std::string fault;

  bool is_faulty(const std::string& name, int number = 0) const {
    return !fault.empty() && fault == name + ":" + std::to_string(number);
  }
};

void DeleteHopper::operator()(Hopper* hopper) const { delete hopper; }

namespace {

// Made when a block first uses anything of Hopper.
Hopper& state() {
  Block& block = *current;
  if (block.hopper != nullptr) return *block.hopper;
  block.hopper.reset(new Hopper);
  Hopper& hopper = *block.hopper;
  const char* const fault = std::getenv("HPKERNELS_EMULATION_FAULT");
  if (fault != nullptr) hopper.fault = fault;
  const int registers = kRegisters / static_cast<int>(block.fibers.size()) / 8 * 8;
  hopper.warps.resize(block.warps.size());
  for (WarpState& warp : hopper.warps) warp.registers = registers < 255 ? registers : 255;
  hopper.groups.resize((block.warps.size() + kGroup - 1) / kGroup);
  hopper.seen_by_wgmma.assign(block.shared_bytes, static_cast<char>(0xFF));
  // Slow or fast, each on its own: what comes too early for one pace is late for another.
  hopper.box_rate = 512u >> block.random() % 10;
  hopper.product_rate = 512u >> block.random() % 10;
  hopper.order = block.random() % 3;
  hopper.pause_rate = block.random() % 2 == 0 ? 0 : 256;
  return hopper;
}

unsigned own_warp() { return current->running->thread.x / kWarp; }
bool in_shared(uint32_t address, size_t bytes) {
  return address >= kWindow && address - kWindow + bytes <= current->shared_bytes;
}

void maybe_pause() {
  if (current->random() % 1024 < state().pause_rate) pause_thread();
}

std::string text(const TransactionBarrier& barrier) {
  return "barrier " + std::to_string(barrier.number) + " (" + std::to_string(barrier.pending) + " of " +
         std::to_string(barrier.arrivals) + " arrivals and " + std::to_string(barrier.bytes) + " bytes to come, phase " +
         std::to_string(barrier.phases.passed) + ")";
}

TransactionBarrier& barrier_at(const uint64_t* place) {
  const auto found = state().barriers.find(shared_address(place));
  if (found == state().barriers.end()) fail("a barrier is used before it is initialised");
  if (*place != kToken + static_cast<uint64_t>(found->second.number)) fail("a barrier has been written over");
  return found->second;
}

void end_phase_if_complete(TransactionBarrier& barrier) {
  if (barrier.bytes > kMostBytes || barrier.bytes < -kMostBytes) fail("more bytes than a barrier counts: " + text(barrier));
  if (barrier.pending > 0 || barrier.bytes > 0) return;
  if (barrier.bytes < 0) fail("more bytes came than were expected: " + text(barrier));
  barrier.pending = barrier.arrivals;
  ++barrier.phases.passed;
}

void arrive_at(TransactionBarrier& barrier) {
  if (state().is_faulty("no_arrival", barrier.number)) return;
  for (int i = state().is_faulty("two_arrivals", barrier.number); i >= 0; --i) {
    if (barrier.pending == 0) fail("more arrivals than a phase has: " + text(barrier));
    --barrier.pending;
    end_phase_if_complete(barrier);
  }
}

// The bits of an address that the 128-byte swizzle changes: those of the 16-byte chunk, by those of the 128-byte line.
uint32_t swizzled(uint32_t address) { return address ^ (address / 128 % 8 * 16); }

void write_shared(uint32_t address, const void* from, size_t bytes) {
  std::memcpy(current->shared + (address - kWindow), from, bytes);
  std::memcpy(state().seen_by_wgmma.data() + (address - kWindow), from, bytes);
}

void finish_box(size_t index) {
  const BoxCopy copy = state().boxes[index];
  state().boxes.erase(state().boxes.begin() + static_cast<ptrdiff_t>(index));
  for (uint32_t i = 0; i < copy.map.rows; ++i) {
    const int64_t row = copy.row + i;
    uint16_t line[64] = {};
    for (int j = 0; j < 64; ++j) {
      const int64_t element = copy.element + j;
      if (row < 0 || row >= copy.map.count || element < 0 || element >= copy.map.dim) continue;
      std::memcpy(&line[j], copy.map.base + row * copy.map.stride_bytes + 2 * element, 2);
    }
    for (uint32_t chunk = 0; chunk < 8; ++chunk) {
      const uint32_t to = copy.to + 128 * i + 16 * chunk;
      write_shared(state().is_faulty("no_swizzle") ? to : swizzled(to), &line[8 * chunk], 16);
    }
  }
  copy.barrier->bytes -= 128 * int64_t{copy.map.rows};
  end_phase_if_complete(*copy.barrier);
}

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
    for (int k = 0; k < kDepth; ++k) left[row][k] = operand(left_at, first_row + row, k, false, wgmma.bfloat16);
  }
  for (int column = 0; column < wgmma.columns; ++column) {
    for (int k = 0; k < kDepth; ++k) {
      right[k][column] = operand(right_at, column, k, wgmma.transposed, wgmma.bfloat16);
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

void come_to(const GroupInstruction& instruction) {
  auto& all = state().groups[own_warp() / kGroup];
  size_t& own = state().warps[own_warp()].instructions;
  if (own == all.size()) all.push_back(instruction);
  if (!(all[own++] == instruction)) fail("warps of a group come to different instructions");
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

size_t next_box(Block& block) {
  const size_t boxes = block.hopper->boxes.size();
  return block.hopper->order == 0 ? 0 : block.hopper->order == 1 ? boxes - 1 : block.random() % boxes;
}

struct Change {
  int count;
  bool more;
};

}  // namespace

uint32_t shared_address(const void* pointer) {
  const ptrdiff_t offset = static_cast<const char*>(pointer) - current->shared;
  if (offset < 0 || offset >= static_cast<ptrdiff_t>(current->shared_bytes)) fail("an address that is not of shared memory");
  return kWindow + static_cast<uint32_t>(offset);
}

void multiply_async(const Wgmma& wgmma, float* sums) {
  Issue operands{wgmma, sums};
  const auto doubled = [](uint64_t descriptor, int from) { return descriptor + (descriptor & (uint64_t{0x3FFF} << from)); };
  if (state().is_faulty("left_stride")) operands.wgmma.left = doubled(wgmma.left, 32);
  if (state().is_faulty("right_stride")) operands.wgmma.right = doubled(wgmma.right, 32);
  if (state().is_faulty("right_leading")) operands.wgmma.right = doubled(wgmma.right, 16);
  if (state().is_faulty("right_start")) operands.wgmma.right += 2;
  warp_instruction<int>(kAll, issue, operands);
}

void wait_for_products(int left) {
  if (state().is_faulty("no_wait_for_products")) return;
  if (left > 0 && state().is_faulty("early_release")) ++left;
  warp_instruction<int>(kAll, wait_for_groups, left);
}

void set_registers(int count, bool more) {
  const auto change = [](const void* const* operands, void* const* results) {
    const auto& wanted = *static_cast<const Change*>(operands[0]);
    WarpState& warp = state().warps[own_warp()];
    if (wanted.count % 8 != 0 || wanted.count < 24 || wanted.count > 256) fail("registers must be 24, 32, ... or 256");
    come_to({{}, wanted.count});
    if (wanted.more ? wanted.count < warp.registers : wanted.count > warp.registers) {
      fail("registers are taken that are there, or given that are not");
    }
    if (!wanted.more) {
      state().free_registers += kWarp * (warp.registers - wanted.count);
      warp.registers = wanted.count;
      ++state().registers_given.passed;
    }
    for (int lane = 0; lane < kWarp; ++lane) *static_cast<int*>(results[lane]) = 0;
  };
  warp_instruction<int>(kAll, change, Change{count, more});
  // The first lane to find them takes them for the warp.
  WarpState& warp = state().warps[own_warp()];
  while (warp.registers != count) {
    if (state().free_registers >= kWarp * (count - warp.registers)) {
      state().free_registers -= kWarp * (count - warp.registers);
      warp.registers = count;
    } else {
      wait_for(state().registers_given, state().registers_given.passed);
    }
  }
}

CUresult encode_tensor_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                           const cuuint64_t* sizes, const cuuint64_t* stride_bytes, const cuuint32_t* box,
                           const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                           CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  constexpr cuuint64_t kMostSize = cuuint64_t{1} << 32, kMostStride = cuuint64_t{1} << 40;
  const bool emulated = rank == 2 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && swizzle == CU_TENSOR_MAP_SWIZZLE_128B &&
                        (type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16) &&
                        fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE && steps[0] == 1 && steps[1] == 1 && box[0] == 64;
  const bool valid = reinterpret_cast<uintptr_t>(map) % 64 == 0 && reinterpret_cast<uintptr_t>(base) % 16 == 0 &&
                     base != nullptr && sizes[0] >= 1 && sizes[0] <= kMostSize && sizes[1] >= 1 && sizes[1] <= kMostSize &&
                     stride_bytes[0] % 16 == 0 && stride_bytes[0] < kMostStride && box[1] >= 1 && box[1] <= 256;
  if (!emulated) return CUDA_ERROR_NOT_SUPPORTED;
  if (!valid) return CUDA_ERROR_INVALID_VALUE;
  const TensorMap said{static_cast<const char*>(base),       static_cast<int64_t>(sizes[0]),
                       static_cast<int64_t>(sizes[1]),       static_cast<int64_t>(stride_bytes[0]),
                       static_cast<uint32_t>(box[1]),        kToken};
  std::memcpy(map, &said, sizeof said);
  return CUDA_SUCCESS;
}

bool finish_something(Block& block) {
  if (block.hopper == nullptr) return false;
  Hopper& hopper = *block.hopper;
  std::vector<unsigned> busy;
  for (unsigned warp = 0; warp < hopper.warps.size(); ++warp) {
    if (has_products(hopper.warps[warp])) busy.push_back(warp);
  }
  const size_t all = hopper.boxes.size() + busy.size();
  if (all == 0) return false;
  const size_t chosen = block.random() % all;
  chosen < busy.size() ? finish_product(busy[chosen]) : finish_box(next_box(block));
  return true;
}

void maybe_finish_something(Block& block) {
  if (block.hopper == nullptr) return;
  Hopper& hopper = *block.hopper;
  if (!hopper.boxes.empty() && block.random() % 1024 < hopper.box_rate) finish_box(next_box(block));
  const auto warp = static_cast<unsigned>(block.random() % hopper.warps.size());
  if (has_products(hopper.warps[warp]) && block.random() % 1024 < hopper.product_rate) finish_product(warp);
}

std::string who_waits(const Block& block) {
  std::string all;
  if (block.hopper == nullptr) return all;
  for (const auto& [place, barrier] : block.hopper->barriers) {
    int threads = 0;
    for (const Fiber& fiber : block.fibers) threads += !fiber.done && fiber.waits_for == &barrier.phases;
    if (threads > 0) all += "; " + std::to_string(threads) + " threads at " + text(barrier);
  }
  return all;
}

std::string what_is_left(const Block& block) {
  if (block.hopper == nullptr) return "";
  const Hopper& hopper = *block.hopper;
  if (!hopper.boxes.empty()) return "a block ends before its copies by TMA do";
  for (size_t warp = 0; warp < hopper.warps.size(); ++warp) {
    const WarpState& own = hopper.warps[warp];
    if (!own.sums.empty()) return "a warp ends before its products by wgmma do";
    if (own.instructions != hopper.groups[warp / kGroup].size()) return "warps of a group come to different instructions";
  }
  return "";
}

}  // namespace emulation

namespace hopper {

using namespace emulation;

void Barrier::init(uint64_t* barrier, uint32_t arrivals) {
  if (reinterpret_cast<uintptr_t>(barrier) % 8 != 0) fail("a barrier is not aligned");
  if (arrivals < 1 || arrivals > kMostBytes) fail("a barrier must expect 1 to 2^20 - 1 arrivals");
  auto& all = state().barriers;
  const int number = static_cast<int>(all.size());
  const auto [place, added] = all.try_emplace(shared_address(barrier));
  if (!added) fail("a barrier is initialised twice");
  place->second.number = number;
  place->second.arrivals = place->second.pending = static_cast<int>(arrivals);
  *barrier = kToken + static_cast<uint64_t>(number);
}

void Barrier::arrive(uint64_t* barrier) {
  maybe_pause();
  arrive_at(barrier_at(barrier));
}

void Barrier::arrive_and_expect_tx(uint64_t* barrier, uint32_t bytes) {
  maybe_pause();
  TransactionBarrier& own = barrier_at(barrier);
  own.bytes += bytes;
  if (state().is_faulty("fewer_bytes", own.number)) own.bytes -= 16;
  if (state().is_faulty("more_bytes", own.number)) own.bytes += 16;
  arrive_at(own);
}

void Barrier::wait(uint64_t* barrier, uint32_t parity) {
  maybe_pause();
  const TransactionBarrier& own = barrier_at(barrier);
  if (state().is_faulty("no_wait", own.number)) return;
  if (state().is_faulty("other_phase", own.number)) parity ^= 1;
  while (own.parity() == parity) wait_for(own.phases, own.phases.passed);
}

void fence_barriers() {
  if (state().is_faulty("no_barrier_fence")) return;
  for (auto& [place, barrier] : state().barriers) barrier.fenced = true;
}

void fence_writes() {
  maybe_pause();
  if (state().is_faulty("no_write_fence")) return;
  if (state().is_faulty("one_write_fence") && current->running->thread.x % 128 != 0) return;
  std::memcpy(state().seen_by_wgmma.data(), current->shared, current->shared_bytes);
}

void load_box(const CUtensorMap& map, int64_t row, int element, void* to, uint64_t* barrier) {
  maybe_pause();
  TensorMap said;
  std::memcpy(static_cast<void*>(&said), &map, sizeof said);
  if (said.token != kToken) fail("TMA without a tensor map");
  if (reinterpret_cast<uintptr_t>(&map) % 64 != 0) fail("a tensor map is not aligned");
  const uint32_t address = shared_address(to), bytes = 128 * said.rows;
  if (address % 128 != 0) fail("the target of TMA is not aligned");
  if (!in_shared(address, bytes)) fail("TMA writes beyond shared memory");
  if (row != static_cast<int32_t>(row)) fail("TMA counts rows in 32 bits");
  TransactionBarrier& own = barrier_at(barrier);
  if (!own.fenced) fail("TMA uses a barrier without a fence after its initialisation");
  const std::vector<char> undefined(bytes, static_cast<char>(0xFF));
  write_shared(address, undefined.data(), bytes);
  state().boxes.push_back({said, row, element, address, &own});
}

void begin_products() { warp_instruction<int>(kAll, begin, 0); }
void commit_products() { warp_instruction<int>(kAll, commit, 0); }

void exit_thread() {
  current->running->done = true;
  leave();
}

}  // namespace hopper
}  // namespace hpk
