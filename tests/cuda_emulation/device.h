// The state of the emulated device that the scheduler and the kernels' side share.
#pragma once

#include <csetjmp>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda_runtime_api.h"
#include "memory.h"

namespace emulation {

constexpr unsigned int kWarp = 32;
constexpr size_t kStackBytes = 128 * 1024;
constexpr int64_t kMaxSteps =
    4'000'000;  // basic blocks of one thread in one launch; a full-size scene takes fewer than 1,000

struct Warp {
  unsigned int lanes = 0, arrived = 0, turn = 0;
  int line = 0;
  uint64_t values[2][kWarp];
};

struct Shared {
  int line;
  void* array;
  size_t bytes;
};

struct Fiber;

struct Block {
  dim3 index;
  uint32_t number = 0, epoch = 0;
  unsigned int threads = 0, alive = 0, arrived = 0;
  int line = 0;  // of the barrier that threads wait at
  std::vector<Warp> warps;
  std::vector<Shared> shared;
  std::vector<Fiber*> fibers;  // by thread
  int64_t most_accesses = 0, most_steps = 0, accesses = 0, steps = 0;
};

enum class State { kReady, kAtBarrier, kAtWarp, kEnded };

struct Fiber {
  jmp_buf registers;
  unsigned char* stack = nullptr;
  size_t stack_bytes = 0;
  bool started = false;
  Block* block = nullptr;
  unsigned int thread = 0;
  State state = State::kEnded;
  int64_t accesses = 0, steps = 0, slice = 0;
  // The last write, where it is right only if it stores what was there.
  void* repeated = nullptr;
  size_t repeated_bytes = 0;
  unsigned char before[32];
};

struct Counts {
  int64_t launches = 0, blocks = 0, threads = 0, accesses = 0, steps = 0, bytes_read = 0, bytes_written = 0;
  int64_t busiest_accesses = 0, busiest_steps = 0;
  double mean_accesses = 0, mean_steps = 0;  // in the block of the busiest thread
};

// The launch that is running. One host thread uses the device at a time.
struct Running {
  const char* kernel = nullptr;
  uint32_t number = 0;  // of the launch in its call
  dim3 grid, block;
  void (*body)(const void*) = nullptr;
  const unsigned char* arguments = nullptr;
  size_t argument_bytes = 0;
  Counts* counts = nullptr;
};
extern Running running;
extern Fiber* current;  // null while host code runs

Memory& memory();

// Ends the launch with an error: nothing returns to its threads.
[[noreturn]] void fail(const std::string& what);

// The current thread goes on later: at random, or when it is woken.
void pause(State state);

// Threads [first, last) of a block go on.
void wake(const Block& block, unsigned int first, unsigned int last);

// A write that had to store what was there before has done so.
void check_repeated();

}  // namespace emulation
