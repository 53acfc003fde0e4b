// Threads as fibers: a few blocks at a time, in random order, switched at barriers, warp operations and, in most
// launches, at random accesses to memory. The compiler calls the functions at the end of this file for every access
// (-fsanitize=thread, without its library) and every basic block (-fsanitize-coverage=trace-pc) of the kernels.
#include "scheduler.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <csetjmp>
#include <cstring>
#include <deque>
#include <iomanip>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "cuda_runtime_api.h"

extern "C" const char __ehdr_start __attribute__((visibility("hidden")));  // from the linker: where this library
extern "C" const char _end __attribute__((visibility("hidden")));          // begins and ends

namespace emulation {
namespace {

constexpr unsigned int kWarp = 32, kWholeWarp = 0xFFFFFFFFu, kMaxThreads = 1024;
constexpr size_t kStackBytes = 128 * 1024, kMaxShared = 48 * 1024;
constexpr int64_t kMaxSteps = 4'000'000;  // basic blocks of one thread in one launch; a full-size scene takes 40,000
constexpr int64_t kPatience = kMaxSteps / 32;  // a thread that takes as many is not interrupted any more

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

// One host thread uses the device at a time.
std::mt19937_64 random_bits(1);
bool cut_grids = true;
int64_t number_of_call = 0;
uint64_t seed = 1;
uint32_t number_of_launch = 0;
std::map<std::string, Counts> all_counts;

// The launch that is running.
const char* kernel = nullptr;
void (*body)(const void*) = nullptr;
const unsigned char* arguments = nullptr;
size_t argument_bytes = 0;
dim3 blocks_in_grid, threads_in_block;
Counts* counter = nullptr;
Fiber* current = nullptr;  // null while host code runs
jmp_buf scheduler;
std::vector<Fiber*> ready;
std::string failure;

uint64_t below(uint64_t bound) { return random_bits() % bound; }

void to_scheduler() {
  if (_setjmp(current->registers) == 0) _longjmp(scheduler, 1);
}

// Ends the launch: nothing returns to its fibers.
[[noreturn]] void fail(const std::string& what) {
  const dim3& index = current->block->index;
  failure = "thread " + std::to_string(current->thread) + " of block " + std::to_string(current->block->number);
  if (index.y > 0) failure += " (" + std::to_string(index.x) + ", " + std::to_string(index.y) + ")";
  failure = what + " [" + failure + "]";
  _longjmp(scheduler, 1);
}

void check_repeated() {
  Fiber& me = *current;
  if (me.repeated == nullptr) return;
  const void* address = std::exchange(me.repeated, nullptr);
  if (std::memcmp(address, me.before, me.repeated_bytes) != 0) {
    fail("race: two threads write different values of " + std::to_string(me.repeated_bytes) +
         " bytes to one place, with no barrier between");
  }
}

void access(const void* address, size_t size, Access kind) {
  Fiber& me = *current;
  check_repeated();
  if (--me.slice == 0 && me.steps < kPatience) {
    me.state = State::kReady;
    to_scheduler();
  }
  ++me.accesses;
  const Place place{number_of_launch, me.block->number, me.block->epoch, me.thread};
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
    if (kind != Access::kWrite) counter->bytes_read += size;
    if (kind != Access::kRead) counter->bytes_written += size;
  }
}

bool is_own(const void* address) {
  const auto* byte = static_cast<const unsigned char*>(address);
  return static_cast<size_t>(byte - current->stack) < kStackBytes ||
         static_cast<size_t>(byte - arguments) < argument_bytes;
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

void run_fiber() {
  for (;;) {
    body(arguments);
    check_repeated();
    current->state = State::kEnded;
    to_scheduler();
  }
}

void resume(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(scheduler) == 0) {
    if (fiber.started) _longjmp(fiber.registers, 1);
    fiber.started = true;
    static ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack;
    context.uc_stack.ss_size = fiber.stack_bytes;
    context.uc_link = nullptr;
    makecontext(&context, run_fiber, 0);
    setcontext(&context);
  }
  current = nullptr;
}

// Stacks are kept for later launches.
class Fibers {
 public:
  Fiber* take() {
    if (!free_.empty()) {
      Fiber* fiber = free_.back();
      free_.pop_back();
      return fiber;
    }
    void* stack =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::runtime_error("emulated CUDA: no memory for a thread's stack");
    // Stacks that end at the same address modulo a page would share a few lines of the cache.
    const size_t unused = fibers_.size() % 64 * 1088;
    fibers_.emplace_back();
    fibers_.back().stack = static_cast<unsigned char*>(stack);
    fibers_.back().stack_bytes = kStackBytes - unused;
    return &fibers_.back();
  }
  void give_back(Fiber* fiber) { free_.push_back(fiber); }
  void abandon() {  // what they were doing
    free_.clear();
    for (Fiber& fiber : fibers_) {
      fiber.started = fiber.started && fiber.state == State::kEnded;
      free_.push_back(&fiber);
    }
  }

 private:
  std::deque<Fiber> fibers_;
  std::vector<Fiber*> free_;
};

class Launch {
 public:
  Launch() {
    static Fibers fibers;
    fibers_ = &fibers;
    const uint64_t number = uint64_t(blocks_in_grid.x) * blocks_in_grid.y * blocks_in_grid.z;
    if (number > kMaxBlock) throw std::runtime_error("emulated CUDA: more blocks than the emulation can number");
    waiting_.resize(number);
    std::iota(waiting_.begin(), waiting_.end(), 0u);
    std::shuffle(waiting_.begin(), waiting_.end(), random_bits);
    resident_ = 1 + below(4);
    longest_slice_ = std::array<int64_t, 4>{0, 4, 32, 256}[below(4)];  // 0: threads run until they wait
  }

  void run() {
    ready.clear();
    failure.clear();
    while (!waiting_.empty() || !blocks_.empty()) {
      while (!waiting_.empty() && blocks_.size() < resident_) start_block();
      if (ready.empty()) {
        failure = describe_waiting();
      } else {
        turn();
      }
      if (!failure.empty()) {
        fibers_->abandon();
        blocks_.clear();
        throw std::runtime_error("emulated CUDA: " + std::string(kernel) + ": " + failure + " (seed " +
                                 std::to_string(seed) + ", call " + std::to_string(number_of_call) + ", launch " +
                                 std::to_string(number_of_launch) + " of the call)");
      }
    }
  }

 private:
  void start_block() {
    auto block = std::make_unique<Block>();
    block->number = waiting_.back();
    waiting_.pop_back();
    block->index = dim3(block->number % blocks_in_grid.x, block->number / blocks_in_grid.x);
    block->threads = block->alive = threads_in_block.x;
    block->warps.resize((block->threads + kWarp - 1) / kWarp);
    for (unsigned int t = 0; t < block->threads; ++t) {
      ++block->warps[t / kWarp].lanes;
      Fiber* fiber = fibers_->take();
      fiber->block = block.get();
      fiber->thread = t;
      fiber->state = State::kReady;
      fiber->accesses = fiber->steps = 0;
      fiber->repeated = nullptr;
      block->fibers.push_back(fiber);
      ready.push_back(fiber);
    }
    blocks_.push_back(std::move(block));
  }

  void turn() {
    std::swap(ready[below(ready.size())], ready.back());
    Fiber* fiber = ready.back();
    ready.pop_back();
    fiber->slice = longest_slice_ == 0 ? -1 : 1 + static_cast<int64_t>(below(longest_slice_));
    resume(*fiber);
    if (!failure.empty()) return;
    if (fiber->state == State::kReady) ready.push_back(fiber);
    if (fiber->state == State::kEnded) end_thread(*fiber);
  }

  void end_thread(const Fiber& fiber) {
    Block& block = *fiber.block;
    block.accesses += fiber.accesses;
    block.steps += fiber.steps;
    block.most_accesses = std::max(block.most_accesses, fiber.accesses);
    block.most_steps = std::max(block.most_steps, fiber.steps);
    if (--block.alive > 0) return;
    ++counter->blocks;
    counter->threads += block.threads;
    counter->accesses += block.accesses;
    counter->steps += block.steps;
    if (block.most_accesses > counter->busiest_accesses) {
      counter->busiest_accesses = block.most_accesses;
      counter->mean_accesses = static_cast<double>(block.accesses) / block.threads;
    }
    if (block.most_steps > counter->busiest_steps) {
      counter->busiest_steps = block.most_steps;
      counter->mean_steps = static_cast<double>(block.steps) / block.threads;
    }
    for (const Shared& shared : block.shared) memory().release_shared(shared.array);
    for (Fiber* each : block.fibers) fibers_->give_back(each);
    const auto mine = [&](const std::unique_ptr<Block>& each) { return each.get() == &block; };
    blocks_.erase(std::find_if(blocks_.begin(), blocks_.end(), mine));
  }

  // No thread can go on.
  std::string describe_waiting() const {
    const Block& block = *blocks_.front();
    int at_barrier = 0, at_warp = 0;
    for (const Fiber* fiber : block.fibers) {
      at_barrier += fiber->state == State::kAtBarrier;
      at_warp += fiber->state == State::kAtWarp;
    }
    return "divergence: of " + std::to_string(block.threads) + " threads of block " + std::to_string(block.number) +
           ", " + std::to_string(at_barrier) + " wait at the barrier in line " + std::to_string(block.line) + ", " +
           std::to_string(at_warp) + " for other lanes, and the rest have ended";
  }

  Fibers* fibers_;
  std::vector<uint32_t> waiting_;
  std::vector<std::unique_ptr<Block>> blocks_;
  size_t resident_;
  int64_t longest_slice_;
};

// Threads [first, last) of a block go on.
void wake(const Block& block, unsigned int first, unsigned int last) {
  for (unsigned int t = first; t < last; ++t) {
    if (block.fibers[t] == current) continue;
    block.fibers[t]->state = State::kReady;
    ready.push_back(block.fibers[t]);
  }
}

void wait(State state) {
  current->state = state;
  to_scheduler();
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
    wait(State::kAtWarp);
  } else {
    warp.arrived = 0;
    warp.turn = 1 - warp.turn;  // nobody comes to the operation after the next before all have read this one
    wake(block, first, first + kWarp);
  }
  return values;
}

}  // namespace

Memory& memory() {
  static Memory only;
  return only;
}

void begin_call() {
  memory().reset();
  ++number_of_call;
  number_of_launch = 0;
}

void end_call() { memory().reset(); }

void set_seed(uint64_t value) {
  seed = value;
  number_of_call = 0;
  random_bits.seed(value);
}

void set_cut_grids(bool cut) { cut_grids = cut; }
void reset_counts() { all_counts.clear(); }

std::string counts() {
  std::ostringstream out;
  out << std::setprecision(17) << "{";
  const char* comma = "";
  for (const auto& [name, count] : all_counts) {
    out << std::exchange(comma, ", ") << '"' << name << "\": {\"launches\": " << count.launches
        << ", \"blocks\": " << count.blocks << ", \"threads\": " << count.threads
        << ", \"accesses\": " << count.accesses << ", \"steps\": " << count.steps
        << ", \"bytes_read\": " << count.bytes_read << ", \"bytes_written\": " << count.bytes_written
        << ", \"busiest_accesses\": " << count.busiest_accesses << ", \"mean_accesses\": " << count.mean_accesses
        << ", \"busiest_steps\": " << count.busiest_steps << ", \"mean_steps\": " << count.mean_steps << "}";
  }
  out << "}";
  return out.str();
}

dim3 thread_index() { return dim3(current->thread, 0, 0); }
dim3 block_index() { return current->block->index; }
dim3 block_size() { return threads_in_block; }
dim3 grid_size() { return blocks_in_grid; }

void barrier(int line) {
  check_repeated();
  Block& block = *current->block;
  if (block.arrived > 0 && block.line != line) {
    fail("divergence: a barrier in line " + std::to_string(line) + ", and other threads of the block wait at line " +
         std::to_string(block.line));
  }
  block.line = line;
  if (++block.arrived < block.threads) return wait(State::kAtBarrier);
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

void launch(const char* name, const dim3& grid, const dim3& block, void (*call)(const void*), const void* captured,
            size_t captured_bytes) {
  kernel = name;
  const bool valid = grid.x >= 1 && grid.x < (1u << 31) && grid.y >= 1 && grid.y <= 65535 && grid.z == 1 &&
                     block.x >= 1 && block.x <= kMaxThreads && block.y == 1 && block.z == 1;
  if (!valid) {
    throw std::runtime_error("emulated CUDA: " + std::string(name) + ": launch: a grid of " + std::to_string(grid.x) +
                             " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z) + " blocks of " +
                             std::to_string(block.x) + " x " + std::to_string(block.y) + " x " +
                             std::to_string(block.z) + " threads");
  }
  if (++number_of_launch > kMaxLaunch) throw std::runtime_error("emulated CUDA: too many launches in one call");
  blocks_in_grid = grid;
  if (cut_grids && below(4) == 0) {
    blocks_in_grid.x = std::min<unsigned int>(grid.x, 1 + below(3));
    blocks_in_grid.y = std::min<unsigned int>(grid.y, 1 + below(3));
  }
  threads_in_block = block;
  body = call;
  arguments = static_cast<const unsigned char*>(captured);
  argument_bytes = captured_bytes;
  counter = &all_counts[name];
  ++counter->launches;
  memory().find_initialized();
  Launch().run();
}

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
