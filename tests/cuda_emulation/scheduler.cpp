// Threads as fibers: a few blocks at a time, in random order, switched at barriers, at warp operations and, in most
// launches, at random accesses to memory.
#include "scheduler.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <deque>
#include <iomanip>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "device.h"

namespace emulation {

Running running;
Fiber* current = nullptr;

namespace {

constexpr unsigned int kMaxThreads = 1024;

std::mt19937_64 random_bits(1);
bool cut_grids = true;
uint64_t seed = 1;
int64_t number_of_call = 0;
std::map<std::string, Counts> all_counts;

jmp_buf scheduler;
std::vector<Fiber*> ready;
std::string failure;

uint64_t below(uint64_t bound) { return random_bits() % bound; }

void run_fiber() {
  for (;;) {
    running.body(running.arguments);
    check_repeated();
    pause(State::kEnded);
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
    const uint64_t number = uint64_t(running.grid.x) * running.grid.y * running.grid.z;
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
        throw std::runtime_error("emulated CUDA: " + std::string(running.kernel) + ": " + failure + " (seed " +
                                 std::to_string(seed) + ", call " + std::to_string(number_of_call) + ", launch " +
                                 std::to_string(running.number) + " of the call)");
      }
    }
  }

 private:
  void start_block() {
    auto block = std::make_unique<Block>();
    block->number = waiting_.back();
    waiting_.pop_back();
    block->index = dim3(block->number % running.grid.x, block->number / running.grid.x);
    block->threads = block->alive = running.block.x;
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
    ++running.counts->blocks;
    running.counts->threads += block.threads;
    running.counts->accesses += block.accesses;
    running.counts->steps += block.steps;
    if (block.most_accesses > running.counts->busiest_accesses) {
      running.counts->busiest_accesses = block.most_accesses;
      running.counts->mean_accesses = static_cast<double>(block.accesses) / block.threads;
    }
    if (block.most_steps > running.counts->busiest_steps) {
      running.counts->busiest_steps = block.most_steps;
      running.counts->mean_steps = static_cast<double>(block.steps) / block.threads;
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

}  // namespace

void pause(State state) {
  current->state = state;
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

// Threads [first, last) of a block go on.
void wake(const Block& block, unsigned int first, unsigned int last) {
  for (unsigned int t = first; t < last; ++t) {
    if (block.fibers[t] == current) continue;
    block.fibers[t]->state = State::kReady;
    ready.push_back(block.fibers[t]);
  }
}

Memory& memory() {
  static Memory only;
  return only;
}

void begin_call() {
  memory().reset();
  ++number_of_call;
  running.number = 0;
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

void launch(const char* name, const dim3& grid, const dim3& block, void (*call)(const void*), const void* captured,
            size_t captured_bytes) {
  running.kernel = name;
  const bool valid = grid.x >= 1 && grid.x < (1u << 31) && grid.y >= 1 && grid.y <= 65535 && grid.z == 1 &&
                     block.x >= 1 && block.x <= kMaxThreads && block.y == 1 && block.z == 1;
  if (!valid) {
    throw std::runtime_error("emulated CUDA: " + std::string(name) + ": launch: a grid of " + std::to_string(grid.x) +
                             " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z) + " blocks of " +
                             std::to_string(block.x) + " x " + std::to_string(block.y) + " x " +
                             std::to_string(block.z) + " threads");
  }
  if (++running.number > kMaxLaunch) throw std::runtime_error("emulated CUDA: too many launches in one call");
  running.grid = grid;
  if (cut_grids && below(4) == 0) {
    running.grid.x = std::min<unsigned int>(grid.x, 1 + below(3));
    running.grid.y = std::min<unsigned int>(grid.y, 1 + below(3));
  }
  running.block = block;
  running.body = call;
  running.arguments = static_cast<const unsigned char*>(captured);
  running.argument_bytes = captured_bytes;
  running.counts = &all_counts[name];
  ++running.counts->launches;
  memory().find_initialized();
  Launch().run();
}

}  // namespace emulation
