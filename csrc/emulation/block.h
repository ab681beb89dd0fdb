// What the emulator knows of the thread block that runs: its fibers, and how they wait. For csrc/emulation/*.cpp alone.
#pragma once

#include <setjmp.h>

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "common/device.h"

namespace hpk {
namespace emulation {

constexpr int kBarriers = 16;

struct Copy {
  void* to;
  const void* from;
  int valid;
};

// What some threads wait for together: it is over when `passed` changes.
struct Meeting {
  int arrived = 0;
  unsigned passed = 0;
};

struct Warp {
  Meeting meeting;
  Execute execute = nullptr;
  const void* operands[kWarp];
  void* results[kWarp];
  unsigned pace = 1;  // it runs in one of so many rounds
};

struct Fiber {
  Index thread;
  jmp_buf place;
  const Meeting* waits_for = nullptr;
  unsigned passed = 0;
  bool done = false;
  std::vector<std::vector<Copy>> copies;  // by group; the last one is not committed

  bool can_run() const { return !done && (waits_for == nullptr || waits_for->passed != passed); }
};

// What goes on beside the threads and ends at a time that nobody knows: see hopper.cpp.
struct Hopper;
struct DeleteHopper {
  void operator()(Hopper* hopper) const;
};

struct Block {
  Index block, grid, size;
  std::vector<char> memory;
  char* shared = nullptr;
  size_t shared_bytes = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Meeting barriers[kBarriers];
  std::unique_ptr<Hopper, DeleteHopper> hopper;
  std::minstd_rand random;
  const std::function<void()>* body = nullptr;
  Fiber* running = nullptr;
  jmp_buf scheduler;
  std::string error;
};

extern thread_local Block* current;

// Leaves the fiber that runs, for good if it is done.
[[noreturn]] void leave();
// Ends the launch with an error.
[[noreturn]] void fail(const std::string& reason);
// Leaves the fiber until the meeting has passed that many times, or until its turn comes again.
void wait_for(const Meeting& meeting, unsigned passed);
void pause_thread();

// Where a kernel uses Hopper's barriers, copies of some warps take longer than those of others.
void wait_as_long_as_copies_take();

// For the scheduler: what goes on beside the threads.
bool finish_something(Block& block);   // whether there was anything under way
void maybe_finish_something(Block& block);
std::string who_waits(const Block& block);     // at barriers of Hopper, for the message of a deadlock
std::string what_is_left(const Block& block);  // when all threads have ended; "" is right

}  // namespace emulation
}  // namespace hpk
