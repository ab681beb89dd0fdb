// Barriers that count bytes, TMA and setmaxnreg; and when what goes on beside the threads ends.
#include "emulation/hopper_state.h"

#include <cstdlib>

namespace hpk {
namespace emulation {

void DeleteHopper::operator()(Hopper* hopper) const { delete hopper; }

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

void come_to(const GroupInstruction& instruction) {
  auto& all = state().groups[own_warp() / kGroup];
  size_t& own = state().warps[own_warp()].instructions;
  if (own == all.size()) all.push_back(instruction);
  if (!(all[own++] == instruction)) fail("warps of a group come to different instructions");
}

namespace {

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
  if (copy.bytes > 0) write_shared(copy.to, copy.from, copy.bytes);
  copy.barrier->bytes -= 128 * int64_t{copy.map.rows} + copy.bytes;
  end_phase_if_complete(*copy.barrier);
}

size_t next_box(Block& block) {
  const size_t boxes = block.hopper->boxes.size();
  return block.hopper->order == 0 ? 0 : block.hopper->order == 1 ? boxes - 1 : block.random() % boxes;
}

}  // namespace

void wait_as_long_as_copies_take() {
  if (current->hopper == nullptr) return;
  unsigned& rate = state().warps[own_warp()].copy_rate;
  if (rate == 0) rate = 1024u >> current->random() % 8;
  while (current->random() % 1024 >= rate) pause_thread();
}

uint32_t shared_address(const void* pointer) {
  const ptrdiff_t offset = static_cast<const char*>(pointer) - current->shared;
  if (offset < 0 || offset >= static_cast<ptrdiff_t>(current->shared_bytes)) fail("an address that is not of shared memory");
  return kWindow + static_cast<uint32_t>(offset);
}

void set_registers(int count, bool more) {
  struct Change {
    int count;
    bool more;
  };
  const auto change = [](const void* const* operands, void* const*) {
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
  TensorMap said{};
  said.base = static_cast<const char*>(base);
  said.dim = static_cast<int64_t>(sizes[0]);
  said.count = static_cast<int64_t>(sizes[1]);
  said.stride_bytes = static_cast<int64_t>(stride_bytes[0]);
  said.rows = box[1];
  said.token = kToken;
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

namespace {

// What TMA will write is undefined until then.
void start_copy(BoxCopy copy, uint64_t* barrier, uint32_t bytes) {
  copy.barrier = &barrier_at(barrier);
  if (!in_shared(copy.to, bytes)) fail("TMA writes beyond shared memory");
  if (!copy.barrier->fenced) fail("TMA uses a barrier without a fence after its initialisation");
  const std::vector<char> undefined(bytes, static_cast<char>(0xFF));
  write_shared(copy.to, undefined.data(), bytes);
  state().boxes.push_back(copy);
}

}  // namespace

void load_box(const CUtensorMap& map, int64_t row, int element, void* to, uint64_t* barrier) {
  maybe_pause();
  TensorMap said;
  std::memcpy(static_cast<void*>(&said), &map, sizeof said);
  if (said.token != kToken) fail("TMA without a tensor map");
  if (reinterpret_cast<uintptr_t>(&map) % 64 != 0) fail("a tensor map is not aligned");
  const uint32_t address = shared_address(to);
  if (address % 128 != 0) fail("the target of TMA is not aligned");
  if (row != static_cast<int32_t>(row)) fail("TMA counts rows in 32 bits");
  start_copy({said, row, element, address, nullptr}, barrier, 128 * said.rows);
}

void load_bytes(const void* from, int bytes, void* to, uint64_t* barrier) {
  maybe_pause();
  const uint32_t address = shared_address(to);
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0 || address % 16 != 0 || bytes <= 0 || bytes % 16 != 0) {
    fail("bytes that TMA copies are not in sixteens");
  }
  BoxCopy copy{};
  copy.to = address;
  copy.from = from;
  copy.bytes = static_cast<uint32_t>(bytes);
  start_copy(copy, barrier, copy.bytes);
}

void exit_thread() {
  current->running->done = true;
  leave();
}

}  // namespace hopper
}  // namespace hpk
