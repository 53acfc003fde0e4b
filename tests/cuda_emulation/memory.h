// The memory of the emulated device: every array with exact bounds and gaps around it, and for every part of it who has
// touched it since the last barrier, so that each access can be judged before it happens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

namespace emulation {

enum class Access { kRead, kWrite, kAtomic };

// A thread between two barriers of its block.
struct Place {
  uint32_t launch, block, epoch, thread;
};
constexpr uint32_t kMaxLaunch = (1u << 12) - 1, kMaxBlock = (1u << 24) - 2, kMaxEpoch = (1u << 16) - 1,
                   kMaxThread = (1u << 12) - 2;

constexpr int64_t kNoBlock = -1;

class Memory {
 public:
  static constexpr unsigned char kPoison = 0xCB;  // no label, and neither an index nor a coordinate of a test

  Memory();
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  // A poisoned array. `shift`: its address modulo 16. `block`: the owner of shared memory.
  void* allocate(size_t bytes, size_t shift = 0, int64_t block = kNoBlock);
  void release_shared(void* array);  // the next block may take its place

  // The array was filled from outside.
  void set_initialized(void* array) { array_at(array)->initialized = true; }

  // Arrays that are no longer all poison were filled by torch's operators, which fill theirs whole.
  void find_initialized();

  // Forgets all arrays.
  void reset();

  // What is wrong with an access, "check: description", or empty. *same_value is set where only a second write of the
  // same value would be right; the caller compares.
  std::string check(const void* address, size_t size, Access access, const Place& place, bool* same_value);

  bool is_shared(const void* address) const { return array_at(address)->block != kNoBlock; }

  // Number of the first byte in [address, address + size) that nobody has written, or size.
  size_t first_uninitialized(const void* address, size_t size) const;

 private:
  // Who wrote, read and changed atomically, packed; zero for nobody.
  struct Cell {
    uint64_t write, read, atomic;
  };
  struct Free {
    void operator()(Cell* cells) const { std::free(cells); }
  };
  using Cells = std::unique_ptr<Cell[], Free>;  // from calloc: large arrays are mostly never touched
  struct Array {
    unsigned char *begin, *end;
    size_t pages;
    int64_t block;
    bool initialized;
    int log_granule;  // bytes of a cell: four, or one once a byte was touched by itself
    Cells cells;
  };

  Array* array_at(const void* address) const;
  static Cells zeros(size_t count);
  static void prepare(Array& array, int64_t block);
  static void split(Array& array);

  unsigned char* arena_;
  size_t used_pages_ = 0;
  std::vector<Array*> owner_;  // of each page, gaps included
  std::vector<Array*> arrays_, released_;
  size_t settled_ = 0;  // arrays that find_initialized has seen
};

}  // namespace emulation
