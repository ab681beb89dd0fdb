// Runs a kernel's blocks on the CPU: a fiber a thread, with barriers, shuffles and cp.async.
#include "common/device.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>

#include "emulation/block.h"

namespace hpk {
namespace emulation {

thread_local Block* current = nullptr;

void leave() { _longjmp(current->scheduler, 1); }

void fail(const std::string& reason) {
  if (current->running == nullptr) throw std::runtime_error("hpkernels, emulated CUDA: " + reason);
  current->error = reason;
  leave();
}

void pause_thread() {
  Fiber& own = *current->running;
  if (_setjmp(own.place) == 0) leave();
}

void wait_for(const Meeting& meeting, unsigned passed) {
  Fiber& own = *current->running;
  own.waits_for = &meeting;
  own.passed = passed;
  pause_thread();
  own.waits_for = nullptr;
}

namespace {

constexpr size_t kStackBytes = 256 * 1024;

// Stacks of fibers, kept for the next block.
class Stacks {
 public:
  char* at(size_t index) {
    while (stacks_.size() <= index) {
      void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (stack == MAP_FAILED) throw std::bad_alloc();
      stacks_.push_back(static_cast<char*>(stack));
    }
    return stacks_[index];
  }
  ~Stacks() {
    for (char* stack : stacks_) munmap(stack, kStackBytes);
  }

 private:
  std::vector<char*> stacks_;
};

thread_local Stacks stacks;

// Whether this is the last of `expected` threads to come, who then ends the meeting.
bool arrive(Meeting& meeting, int expected) {
  if (++meeting.arrived < expected) return false;
  meeting.arrived = 0;
  ++meeting.passed;
  return true;
}

void body_of_fiber() {
  (*current->body)();
  current->running->done = true;
  leave();
}

__attribute__((noinline)) void start(Block& block, size_t index) {
  ucontext_t context, back;
  getcontext(&context);
  context.uc_stack.ss_sp = stacks.at(index);
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, body_of_fiber, 0);
  // From here on fibers are left and entered by longjmp, which unlike swapcontext makes no system call.
  block.running = &block.fibers[index];
  if (_setjmp(block.scheduler) == 0) swapcontext(&back, &context);
}

// Runs the fiber until it waits or ends.
__attribute__((noinline)) void resume(Block& block, Fiber& fiber) {
  block.running = &fiber;
  if (_setjmp(block.scheduler) == 0) _longjmp(fiber.place, 1);
}

void run_block(Block& block) {
  const size_t threads = block.fibers.size();
  bool started = false;
  unsigned round = 0;
  for (size_t left = threads; left > 0; ++round) {
    // Another first thread and direction in each round.
    const size_t shift = block.random() % threads;
    const bool backwards = block.random() % 2 == 0;
    bool progress = false;
    for (size_t i = 0; i < threads; ++i) {
      const size_t index = ((backwards ? threads - 1 - i : i) + shift) % threads;
      Fiber& fiber = block.fibers[index];
      if (started && !fiber.can_run()) continue;
      progress = true;
      if (round % block.warps[index / kWarp].pace != 0) continue;
      started ? resume(block, fiber) : start(block, index);
      block.running = nullptr;
      if (!block.error.empty()) fail(block.error);
      maybe_finish_something(block);
      if (fiber.done) {
        --left;
        // The others at __syncthreads() do not wait for it any longer.
        Meeting& all = block.barriers[0];
        if (all.arrived > 0 && all.arrived == static_cast<int>(left)) all.arrived = 0, ++all.passed;
      }
    }
    started = true;
    if (!progress && !finish_something(block)) {
      fail("deadlock: the threads wait for one another" + who_waits(block));
    }
  }
  for (const Fiber& fiber : block.fibers) {
    for (const auto& group : fiber.copies) {
      if (!group.empty()) fail("a thread ends before its copies do");
    }
  }
  if (const std::string left = what_is_left(block); !left.empty()) fail(left);
}

}  // namespace

const Index& thread_index() { return current->running->thread; }
const Index& block_index() { return current->block; }
const Index& grid_size() { return current->grid; }
const Index& block_size() { return current->size; }
char* shared() { return current->shared; }

void run(dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& body) {
  if (threads < 1 || threads > 1024 || threads % kWarp != 0) {
    throw std::runtime_error("hpkernels, emulated CUDA: a block must have whole warps and at most 1024 threads");
  }
  if (shared_bytes > most_shared_bytes()) {
    throw std::runtime_error("hpkernels, emulated CUDA: too much shared memory: " + std::to_string(shared_bytes) +
                             " bytes of " + std::to_string(most_shared_bytes()));
  }
  if (grid.y > 65535 || grid.z > 65535 || grid.x > 0x7FFFFFFFu) {
    throw std::runtime_error("hpkernels, emulated CUDA: the grid is too large");
  }
  Block block;
  const char* const seed = std::getenv("HPKERNELS_EMULATION_SEED");
  block.random.seed(static_cast<unsigned>(threads) + grid.x + (seed == nullptr ? 0 : 1000u * std::atoi(seed)));
  block.grid = {grid.x, grid.y, grid.z};
  block.size = {static_cast<unsigned>(threads), 1, 1};
  block.body = &body;
  block.shared_bytes = shared_bytes;
  block.memory.resize(shared_bytes + 1024);
  block.shared = block.memory.data() + (1024 - reinterpret_cast<uintptr_t>(block.memory.data()) % 1024) % 1024;
  Block* const outer = current;
  current = &block;
  struct Restore {
    Block* outer;
    ~Restore() { current = outer; }
  } restore{outer};
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        block.block = {x, y, z};
        std::fill(block.memory.begin(), block.memory.end(), static_cast<char>(0xFF));
        block.fibers.assign(threads, Fiber{});
        block.warps.assign(threads / kWarp, Warp{});
        const unsigned slowest = block.random() % 2 == 0 ? 1 : 4;
        for (Warp& warp : block.warps) warp.pace = 1 + block.random() % slowest;
        std::fill(std::begin(block.barriers), std::end(block.barriers), Meeting{});
        for (int thread = 0; thread < threads; ++thread) {
          block.fibers[thread].thread = {static_cast<unsigned>(thread), 0, 0};
          block.fibers[thread].copies.resize(1);
        }
        block.hopper.reset();
        run_block(block);
      }
    }
  }
}

void barrier(int id, int threads) {
  if (id < 0 || id >= kBarriers) fail("there is no such barrier");
  int expected = threads;
  if (threads == 0) {
    expected = static_cast<int>(
        std::count_if(current->fibers.begin(), current->fibers.end(), [](const Fiber& fiber) { return !fiber.done; }));
  }
  Meeting& meeting = current->barriers[id];
  const unsigned passed = meeting.passed;
  if (!arrive(meeting, expected)) wait_for(meeting, passed);
}

void barrier_of_warps(int id, int threads) {
  struct Named {
    int id, threads;
  };
  const auto compare = [](const void* const* operands, void* const*) {
    const auto& first = *static_cast<const Named*>(operands[0]);
    for (int lane = 1; lane < kWarp; ++lane) {
      const auto& other = *static_cast<const Named*>(operands[lane]);
      if (other.id != first.id || other.threads != first.threads) fail("lanes of a warp come to different barriers");
    }
  };
  warp_instruction<int>(kAll, compare, Named{id, threads});
  barrier(id, threads);
}

void warp_instruction(uint32_t mask, Execute execute, const void* operand, void* result) {
  if (mask != kAll) fail("an instruction of a part of a warp");
  const unsigned thread = current->running->thread.x;
  Warp& warp = current->warps[thread / kWarp];
  if (warp.meeting.arrived > 0 && warp.execute != execute) fail("lanes of a warp come to different instructions");
  warp.execute = execute;
  warp.operands[thread % kWarp] = operand;
  warp.results[thread % kWarp] = result;
  const unsigned passed = warp.meeting.passed;
  if (warp.meeting.arrived + 1 == kWarp) execute(warp.operands, warp.results);
  if (!arrive(warp.meeting, kWarp)) wait_for(warp.meeting, passed);
}

void copy_async(void* to, const void* from, int valid) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) fail("the target of an asynchronous copy is not aligned");
  if (valid > 0 && reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("the source of an asynchronous copy is not aligned");
  std::memset(to, 0xFF, 16);
  current->running->copies.back().push_back({to, from, valid});
}

void commit_copies() { current->running->copies.emplace_back(); }

void wait_for_copies(int left) {
  wait_as_long_as_copies_take();
  auto& groups = current->running->copies;
  while (static_cast<int>(groups.size()) - 1 > left) {
    for (const Copy& copy : groups.front()) {
      std::memset(copy.to, 0, 16);
      if (copy.valid > 0) std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.valid));
    }
    groups.erase(groups.begin());
  }
}

}  // namespace emulation
}  // namespace hpk
