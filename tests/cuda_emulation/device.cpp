// What kernels do on the device. The compiler calls the functions at the end for every access to memory
// (-fsanitize=thread, without its library) and every basic block (-fsanitize-coverage=trace-pc) of the kernels.
#include "device.h"

#include <cstring>
#include <utility>

extern "C" const char __ehdr_start __attribute__((visibility("hidden")));  // from the linker: where this library
extern "C" const char _end __attribute__((visibility("hidden")));          // begins and ends

namespace emulation {
namespace {

constexpr unsigned int kWholeWarp = 0xFFFFFFFFu;
constexpr size_t kMaxShared = 48 * 1024;
constexpr int64_t kPatience = kMaxSteps / 32;  // a thread that takes as many steps is not interrupted any more

void access(const void* address, size_t size, Access kind) {
  Fiber& me = *current;
  check_repeated();
  if (--me.slice == 0 && me.steps < kPatience) {
    pause(State::kReady);
  }
  ++me.accesses;
  const Place place{running.number, me.block->number, me.block->epoch, me.thread};
  bool same_value = false;
  const std::string wrong = memory().check(address, size, kind, place, &same_value);
  if (!wrong.empty()) fail(wrong);
  if (same_value) {
    if (size > sizeof(me.before)) fail("race: two threads write one place, with no barrier between");
    me.repeated = const_cast<void*>(address);
    me.repeated_bytes = size;
    std::memcpy(me.before, address, size);
  }
  if (!memory().is_shared(address)) {
    if (kind != Access::kWrite) running.counts->bytes_read += size;
    if (kind != Access::kRead) running.counts->bytes_written += size;
  }
}

bool is_own(const void* address) {
  const auto* byte = static_cast<const unsigned char*>(address);
  return static_cast<size_t>(byte - current->stack) < kStackBytes ||
         static_cast<size_t>(byte - running.arguments) < running.argument_bytes;
}

// Constants that the compiler keeps beside the code.
bool is_constant(const void* address) {
  const auto* byte = static_cast<const char*>(address);
  return byte >= &__ehdr_start && byte < &_end;
}

void instrumented(const void* address, size_t size, Access kind) {
  if (current == nullptr || is_own(address) || (kind == Access::kRead && is_constant(address))) return;
  access(address, size, kind);
}

// What all lanes of the warp pass, by lane. Valid until the lane's next warp operation.
const uint64_t* exchange(unsigned int lanes, uint64_t value, int line) {
  check_repeated();
  Block& block = *current->block;
  const unsigned int first = current->thread / kWarp * kWarp;
  Warp& warp = block.warps[current->thread / kWarp];
  if (lanes != kWholeWarp || warp.lanes != kWarp) fail("divergence: a warp operation that not all lanes take part in");
  if (warp.arrived > 0 && warp.line != line) {
    fail("divergence: a warp operation in line " + std::to_string(line) + ", and other lanes wait at line " +
         std::to_string(warp.line));
  }
  warp.line = line;
  uint64_t* values = warp.values[warp.turn];
  values[current->thread % kWarp] = value;
  if (++warp.arrived < kWarp) {
    pause(State::kAtWarp);
  } else {
    warp.arrived = 0;
    warp.turn = 1 - warp.turn;  // nobody comes to the operation after the next before all have read this one
    wake(block, first, first + kWarp);
  }
  return values;
}

}  // namespace

void check_repeated() {
  Fiber& me = *current;
  if (me.repeated == nullptr) return;
  const void* address = std::exchange(me.repeated, nullptr);
  if (std::memcmp(address, me.before, me.repeated_bytes) != 0) {
    fail("race: two threads write different values of " + std::to_string(me.repeated_bytes) +
         " bytes to one place, with no barrier between");
  }
}

dim3 thread_index() { return dim3(current->thread, 0, 0); }
dim3 block_index() { return current->block->index; }
dim3 block_size() { return running.block; }
dim3 grid_size() { return running.grid; }

void barrier(int line) {
  check_repeated();
  Block& block = *current->block;
  if (block.arrived > 0 && block.line != line) {
    fail("divergence: a barrier in line " + std::to_string(line) + ", and other threads of the block wait at line " +
         std::to_string(block.line));
  }
  block.line = line;
  if (++block.arrived < block.threads) return pause(State::kAtBarrier);
  if (++block.epoch > kMaxEpoch) fail("hang: more barriers than the emulation can number");
  block.arrived = 0;
  wake(block, 0, block.threads);
}

uint64_t shuffle(unsigned int lanes, uint64_t value, int source, int line) {
  return exchange(lanes, value, line)[source];
}

unsigned int ballot(unsigned int lanes, bool vote, int line) {
  const uint64_t* votes = exchange(lanes, vote, line);
  unsigned int all = 0;
  for (unsigned int lane = 0; lane < kWarp; ++lane) all |= static_cast<unsigned int>(votes[lane]) << lane;
  return all;
}

void* shared_memory(int line, size_t bytes) {
  Block& block = *current->block;
  for (const Shared& shared : block.shared) {
    if (shared.line == line) return shared.array;
  }
  block.shared.push_back({line, memory().allocate(bytes, 0, block.number), bytes});
  size_t all = 0;
  for (const Shared& shared : block.shared) all += shared.bytes;
  if (all > kMaxShared) fail("bounds: a block takes " + std::to_string(all) + " bytes of shared memory");
  return block.shared.back().array;
}

uint64_t atomic_read(const void* address, size_t bytes) {
  if (is_own(address)) fail("bounds: an atomic operation on memory of the thread's own");
  access(address, bytes, Access::kAtomic);
  uint64_t value = 0;
  std::memcpy(&value, address, bytes);
  return value;
}

void atomic_write(void* address, size_t bytes, uint64_t value) { std::memcpy(address, &value, bytes); }

}  // namespace emulation

#define GS_HOOK(bytes)                                                                         \
  extern "C" void __tsan_read##bytes(void* address) {                                          \
    emulation::instrumented(address, bytes, emulation::Access::kRead);                         \
  }                                                                                            \
  extern "C" void __tsan_write##bytes(void* address) {                                         \
    emulation::instrumented(address, bytes, emulation::Access::kWrite);                        \
  }                                                                                            \
  extern "C" void __tsan_unaligned_read##bytes(void* address) { __tsan_read##bytes(address); } \
  extern "C" void __tsan_unaligned_write##bytes(void* address) { __tsan_write##bytes(address); }
GS_HOOK(1)
GS_HOOK(2)
GS_HOOK(4)
GS_HOOK(8)
GS_HOOK(16)

extern "C" void __tsan_read_range(void* address, size_t bytes) {
  emulation::instrumented(address, bytes, emulation::Access::kRead);
}
extern "C" void __tsan_write_range(void* address, size_t bytes) {
  emulation::instrumented(address, bytes, emulation::Access::kWrite);
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __sanitizer_cov_trace_pc() {
  if (emulation::current == nullptr || ++emulation::current->steps < emulation::kMaxSteps) return;
  emulation::fail("hang: a thread has gone through " + std::to_string(emulation::kMaxSteps) + " basic blocks");
}
