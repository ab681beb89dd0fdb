// What the emulator keeps of Hopper for the thread block that runs: for hopper.cpp and wgmma.cpp alone.
#pragma once

#include <deque>
#include <list>
#include <map>

#include "emulation/block.h"
#include "emulation/hopper.h"

namespace hpk {
namespace emulation {

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

// By TMA: of a box, or of bytes that follow one another.
struct BoxCopy {
  TensorMap map;  // with rows = 0 for bytes
  int64_t row;
  int element;
  uint32_t to;
  TransactionBarrier* barrier;
  const void* from = nullptr;
  uint32_t bytes = 0;
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
  unsigned copy_rate = 0;  // of 1024: how soon its copies by cp.async end
};

// What all warps of a warp group must come to, in this order.
struct GroupInstruction {
  Wgmma wgmma;
  int registers;  // of setmaxnreg, or 0

  bool operator==(const GroupInstruction& other) const {
    return wgmma == other.wgmma && registers == other.registers;
  }
};

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

  bool is_faulty(const char* name, int number = 0) const {
    return !fault.empty() && fault == name + (":" + std::to_string(number));
  }
};

// Made when a block first uses anything of Hopper.
Hopper& state();

inline unsigned own_warp() { return current->running->thread.x / kWarp; }
inline bool in_shared(uint32_t address, size_t bytes) {
  return address >= kWindow && address - kWindow + bytes <= current->shared_bytes;
}

// The bits of an address that the 128-byte swizzle changes: those of the 16-byte chunk, by those of the 128-byte line.
inline uint32_t swizzled(uint32_t address) { return address ^ (address / 128 % 8 * 16); }

// The warp that runs comes to an instruction of its group.
void come_to(const GroupInstruction& instruction);

bool has_products(const WarpState& warp);
// Executes the oldest product of a warp that has some.
void finish_product(unsigned warp);

}  // namespace emulation
}  // namespace hpk
