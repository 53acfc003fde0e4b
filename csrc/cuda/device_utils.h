// What the kernels share on the device.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace group_sampling::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr unsigned int kAllLanes = 0xFFFFFFFFu;

inline unsigned int blocks_for(int64_t items, int threads = kThreads) {
  constexpr int64_t kMaxBlocks = 1 << 16;  // kernels stride over the rest
  const int64_t blocks = (items + threads - 1) / threads;
  return static_cast<unsigned int>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

// First item of this thread and the distance to its next one.
__device__ inline int64_t grid_index() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline int64_t grid_size() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp() { return static_cast<int>(threadIdx.x) / kWarp; }

template <typename T>
__device__ inline Bits<T> to_bits(T value) {
  Bits<T> bits;
  memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
__device__ inline T from_bits(Bits<T> bits) {
  T value;
  memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
__device__ inline Box<T> load_box(const AlignedBox<T>* box) {
  const AlignedBox<T> loaded = *box;
  return {loaded.x1, loaded.y1, loaded.x2, loaded.y2};
}

// Parts of the tables.
template <typename T>
__device__ inline const T* table(const void* tables, int64_t offset) {
  return reinterpret_cast<const T*>(static_cast<const unsigned char*>(tables) + offset);
}

// Exclusive prefix sum over the block, and the block's total. `sums` holds a value for each warp in shared memory.
template <int kWarps>
__device__ inline int32_t block_exclusive_sum(int32_t value, int32_t* sums, int32_t* total) {
  int32_t inclusive = value;
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int32_t other = __shfl_up_sync(kAllLanes, inclusive, distance);
    if (lane() >= distance) inclusive += other;
  }
  if (lane() == kWarp - 1) sums[warp()] = inclusive;
  __syncthreads();
  int32_t before = 0, all = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp()) before += sums[w];
    all += sums[w];
  }
  *total = all;
  __syncthreads();  // sums may be reused at once
  return before + inclusive - value;
}

// Place of this thread among those of the block that keep theirs, and how many do. Consecutive calls take turns with
// two arrays of kWarps `counts` in shared memory; then one barrier is enough.
template <int kWarps>
__device__ inline int place_in_block(bool keep, int32_t* counts, int* total) {
  const unsigned int kept = __ballot_sync(kAllLanes, keep);
  if (lane() == 0) counts[warp()] = __popc(kept);
  __syncthreads();
  int before = 0, all = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp()) before += counts[w];
    all += counts[w];
  }
  *total = all;
  return before + __popc(kept & ((1u << lane()) - 1u));
}

// Position of the set bit number n of a word that has more than n.
__device__ inline int nth_set_bit(uint32_t word, int n) {
  int position = 0;
  for (int width = 16; width > 0; width /= 2) {
    const int below = __popc(word >> position & ((1u << width) - 1u));
    if (n >= below) {
      n -= below;
      position += width;
    }
  }
  return position;
}

// Last of `count` ascending values that is at most `key`; the first must be.
template <typename V>
__device__ inline int64_t last_not_above(const V* values, int64_t count, V key) {
  int64_t low = 0, high = count;  // values[low] <= key < values[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (values[middle] <= key) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ inline unsigned long long anchor_key(int64_t anchor) {
  return UINT64_MAX - static_cast<unsigned long long>(anchor);
}

// Marks an anchor that is not negative at its place in the draw order.
struct RankWriter {
  RankBits bits;
  int64_t image, group;
  int64_t word, summary;  // first of the image and group
  const Permutation* permutation;

  __device__ RankWriter(const RankBits& bits, const MemberTable& members, int64_t image, int64_t group)
      : bits(bits), image(image), group(group), permutation(bits.permutations + image * members.num_groups + group) {
    const int64_t before = members.group_offsets[group];
    word = image * bits.words + first_word(before, group);
    summary = image * bits.summary_words + first_summary(before, group);
  }

  __device__ void mark(uint32_t rank) const {
    const uint32_t w = rank / 32, bit = 1u << (rank % 32), size = permutation->size;
    const uint32_t full = w == (size - 1) / 32 ? kAllLanes >> (31 - (size - 1) % 32) : kAllLanes;
    const uint32_t before = atomicOr(bits.not_negative + word + w, bit);
    if ((before | bit) == full) atomicOr(bits.no_negative + summary + w / 32, 1u << (w % 32));
  }

  __device__ void mark_positive(uint32_t rank) const {
    const uint32_t w = rank / 32;
    const uint32_t before = atomicOr(bits.positive + word + w, 1u << (rank % 32));
    if (before == 0) atomicOr(bits.any_positive + summary + w / 32, 1u << (w % 32));
  }
};

}  // namespace group_sampling::cuda
