#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace emulation {
namespace {

constexpr size_t kPage = 4096, kArenaPages = size_t(1) << 19;  // 2 GB of addresses; memory is taken where it is touched
constexpr uint64_t kManyBlocks = kMaxBlock + 1, kManyThreads = kMaxThread + 1;

uint64_t pack(uint64_t launch, uint64_t block, uint64_t epoch, uint64_t thread) {
  return launch << 52 | block << 28 | epoch << 12 | thread;
}
uint64_t launch_of(uint64_t packed) { return packed >> 52; }
uint64_t block_of(uint64_t packed) { return packed >> 28 & 0xFFFFFF; }
uint64_t epoch_of(uint64_t packed) { return packed >> 12 & 0xFFFF; }
uint64_t thread_of(uint64_t packed) { return packed & 0xFFF; }

// Whether what was noted happened before: in an earlier launch, by the same thread, or before a barrier of the block.
bool is_before(uint64_t noted, const Place& place) {
  if (launch_of(noted) != place.launch) return true;
  return block_of(noted) == place.block && (thread_of(noted) == place.thread || epoch_of(noted) < place.epoch);
}

// Adds a thread to those noted. What a barrier separates from now on need not be remembered.
uint64_t add(uint64_t noted, const Place& place) {
  const uint64_t mine = pack(place.launch, place.block, place.epoch, place.thread);
  if (launch_of(noted) != place.launch) return mine;
  if (block_of(noted) != place.block) return pack(place.launch, kManyBlocks, 0, kManyThreads);
  if (epoch_of(noted) < place.epoch || thread_of(noted) == place.thread) return mine;
  return pack(place.launch, place.block, place.epoch, kManyThreads);
}

std::string who(uint64_t noted) {
  if (block_of(noted) == kManyBlocks) return "threads of several blocks have";
  const std::string block = " of block " + std::to_string(block_of(noted));
  if (thread_of(noted) == kManyThreads) return "several threads" + block + " have";
  return "thread " + std::to_string(thread_of(noted)) + block + " has";
}

const char* verb(Access access) {
  return access == Access::kRead ? "reads" : access == Access::kWrite ? "writes" : "atomically changes";
}

}  // namespace

Memory::Memory() : owner_(kArenaPages) {
  void* arena =
      mmap(nullptr, kArenaPages * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (arena == MAP_FAILED) throw std::runtime_error("emulated CUDA: no address space for device memory");
  arena_ = static_cast<unsigned char*>(arena);
}

Memory::~Memory() {
  reset();
  munmap(arena_, kArenaPages * kPage);
}

Memory::Cells Memory::zeros(size_t count) {
  return Cells(static_cast<Cell*>(std::calloc(count > 0 ? count : 1, sizeof(Cell))));
}

void Memory::prepare(Array& array, int64_t block) {
  const size_t bytes = array.end - array.begin;
  array.block = block;
  array.initialized = false;
  array.log_granule = 2;
  array.cells = zeros((bytes + 3) / 4);
  std::memset(array.begin, kPoison, bytes);
}

void* Memory::allocate(size_t bytes, size_t shift, int64_t block) {
  if (block != kNoBlock) {
    const auto fits = [bytes](const Array* array) { return size_t(array->end - array->begin) == bytes; };
    const auto found = std::find_if(released_.begin(), released_.end(), fits);
    if (found != released_.end()) {
      Array* array = *found;
      released_.erase(found);
      prepare(*array, block);
      return array->begin;
    }
  }
  const size_t pages = (shift + bytes + kPage - 1) / kPage + 1;  // the last one is a gap
  if (used_pages_ + pages >= kArenaPages) throw std::runtime_error("emulated CUDA: out of device memory");
  if (used_pages_ == 0) used_pages_ = 1;  // a gap before the first array, too
  auto* array = new Array{};
  array->begin = arena_ + used_pages_ * kPage + shift;
  array->end = array->begin + bytes;
  array->pages = pages;
  prepare(*array, block);
  std::fill_n(owner_.begin() + used_pages_, pages, array);
  used_pages_ += pages;
  arrays_.push_back(array);
  return array->begin;
}

void Memory::release_shared(void* array) { released_.push_back(array_at(array)); }

void Memory::find_initialized() {
  for (; settled_ < arrays_.size(); ++settled_) {
    Array& array = *arrays_[settled_];
    const auto touched = [](unsigned char byte) { return byte != kPoison; };
    array.initialized = array.initialized || std::any_of(array.begin, array.end, touched);
  }
}

void Memory::reset() {
  std::fill_n(owner_.begin(), used_pages_, nullptr);
  for (Array* array : arrays_) delete array;
  arrays_.clear();
  released_.clear();
  used_pages_ = settled_ = 0;
}

Memory::Array* Memory::array_at(const void* address) const {
  const size_t page = (static_cast<const unsigned char*>(address) - arena_) / kPage;
  return page < used_pages_ ? owner_[page] : nullptr;
}

void Memory::split(Array& array) {
  const size_t size = array.end - array.begin;
  Cells bytes = zeros(size);
  for (size_t i = 0; i < size; ++i) bytes[i] = array.cells[i / 4];
  array.cells = std::move(bytes);
  array.log_granule = 0;
}

std::string Memory::check(const void* address, size_t size, Access access, const Place& place, bool* same_value) {
  const auto* first = static_cast<const unsigned char*>(address);
  Array* array = array_at(address);
  const auto what = [&] { return std::string(verb(access)) + " " + std::to_string(size) + " bytes "; };
  if (array == nullptr) return "bounds: " + what() + "outside of the device's memory";
  const auto where = [&] {
    const char* kind = array->block == kNoBlock ? "an array" : "a shared array";
    return what() + "at " + std::to_string(first - array->begin) + " of " + kind + " of " +
           std::to_string(array->end - array->begin) + " bytes";
  };
  if (first < array->begin || first + size > array->end) return "bounds: " + where();
  if (array->block != kNoBlock && array->block != int64_t(place.block))
    return "bounds: " + where() + " of another block";
  const size_t offset = first - array->begin;
  if (array->log_granule == 2 && (offset | size) % 4 != 0) split(*array);

  const size_t last = (offset + size - 1) >> array->log_granule;
  for (size_t i = offset >> array->log_granule; i <= last; ++i) {
    Cell& cell = array->cells[i];
    if (access != Access::kWrite && cell.write == 0 && !array->initialized) {
      return "uninitialized: " + where() + " that nobody has written";
    }
    const auto race = [&](uint64_t noted, const char* done) {
      return "race: " + where() + " that " + who(noted) + " " + done + ", with no barrier between";
    };
    if (access != Access::kAtomic && !is_before(cell.atomic, place)) return race(cell.atomic, "changed atomically");
    if (access != Access::kRead && !is_before(cell.read, place)) return race(cell.read, "read");
    if (!is_before(cell.write, place)) {
      if (access != Access::kWrite) return race(cell.write, "written");
      *same_value = true;
    }
    uint64_t& mine = access == Access::kRead ? cell.read : access == Access::kWrite ? cell.write : cell.atomic;
    mine = add(mine, place);
  }
  return {};
}

size_t Memory::first_uninitialized(const void* address, size_t size) const {
  const Array* array = array_at(address);
  if (array == nullptr || array->initialized) return size;
  const size_t offset = static_cast<const unsigned char*>(address) - array->begin;
  for (size_t i = 0; i < size; ++i) {
    if (array->cells[(offset + i) >> array->log_granule].write == 0) return i;
  }
  return size;
}

}  // namespace emulation
