// What the kernels share on the device.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace group_sampling::cuda {

constexpr int kThreads = 256;

inline unsigned int blocks_for(int64_t items, int threads = kThreads) {
  constexpr int64_t kMaxBlocks = 1 << 16;  // kernels stride over the rest
  const int64_t blocks = (items + threads - 1) / threads;
  return static_cast<unsigned int>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

// First item of this thread and the distance to its next one.
__device__ inline int64_t grid_index() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline int64_t grid_size() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

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

// Image that owns item `index` of a concatenation.
__device__ inline int64_t owner_of(const int64_t* offsets, int64_t count, int64_t index) {
  int64_t low = 0, high = count;  // offsets[low] <= index < offsets[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (offsets[middle] <= index) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

constexpr int32_t kNoKey = 0;
__device__ inline int32_t gt_key(int64_t gt) { return INT32_MAX - static_cast<int32_t>(gt); }
__device__ inline int32_t gt_of_key(int32_t key) { return INT32_MAX - key; }
__device__ inline unsigned long long anchor_key(int64_t anchor) {
  return UINT64_MAX - static_cast<unsigned long long>(anchor);
}

// What matching decided for one anchor.
template <typename T>
struct AnchorMatch {
  int8_t label;
  int32_t gt;  // -1 without
  T iou;       // 0 without
};

template <typename T>
__device__ inline AnchorMatch<T> match_of(const MatchState<T>& state, int64_t image, int64_t anchor) {
  const int64_t at = image * state.num_anchors + anchor;
  const int32_t key = state.best_gt_key[at];
  if (key == kNoKey) {
    const bool ignored = state.covered != nullptr && state.covered[at] != 0;
    return {static_cast<int8_t>(ignored ? -1 : 0), -1, T(0)};
  }
  const int32_t gt = gt_of_key(key);
  const T iou = from_bits<T>(state.best_iou[at]);
  bool positive = iou >= state.pos_iou;
  const int64_t number = state.gt_offsets[image] + gt;
  if (!positive && state.second_pass != SecondPass::kNone && !state.taken[number]) {
    positive = state.second_pass == SecondPass::kAll || state.rescue_key[number] == anchor_key(anchor);
  }
  return {static_cast<int8_t>(positive ? 1 : -1), gt, iou};
}

// Exclusive prefix sum over the block, and the block's total. `scratch` holds 2 * blockDim.x values in shared memory.
__device__ inline int32_t block_exclusive_sum(int32_t value, int32_t* scratch, int32_t* total) {
  const int thread = static_cast<int>(threadIdx.x), size = static_cast<int>(blockDim.x);
  int32_t *from = scratch, *to = scratch + size;
  from[thread] = value;
  __syncthreads();
  for (int distance = 1; distance < size; distance *= 2) {
    to[thread] = from[thread] + (thread >= distance ? from[thread - distance] : 0);
    __syncthreads();
    int32_t* swapped = from;
    from = to;
    to = swapped;
  }
  *total = from[size - 1];
  const int32_t before = from[thread] - value;
  __syncthreads();  // scratch may be reused at once
  return before;
}

}  // namespace group_sampling::cuda
