// The scratch memory of one call.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <vector>

#include "kernels.h"

namespace group_sampling {

// Lays out device arrays: reserve() them all, then allocate() once, then at(). Nothing is kept between calls: torch's
// allocator is the cache, and it alone knows about streams, threads and the memory of CUDA graphs.
//
// With GS_WORKSPACE_GUARD every array is an allocation of its own, so that memcheck sees where each of them ends.
class Workspace {
 public:
  using Array = size_t;

  template <typename T>
  Array reserve(int64_t count) {
    arrays_.push_back({count * static_cast<int64_t>(sizeof(T)), 0, false});
    return arrays_.size() - 1;
  }

  // An array that the first kernel has to clear.
  template <typename T>
  Array reserve_cleared(int64_t count) {
    static_assert(sizeof(T) % sizeof(uint32_t) == 0);
    const Array array = reserve<T>(count);
    arrays_[array].cleared = true;
    return array;
  }

  void allocate(const at::TensorOptions& options) {
    const auto bytes = options.dtype(at::kByte);
#ifdef GS_WORKSPACE_GUARD
    for (const Span& span : arrays_) memory_.push_back(at::empty({span.bytes}, bytes));
#else
    constexpr int64_t kAlignment = 16;
    int64_t size = 0;
    for (Span& span : arrays_) {
      span.begin = size;
      size += (span.bytes + kAlignment - 1) / kAlignment * kAlignment;
    }
    memory_.push_back(at::empty({size}, bytes));
#endif
  }

  template <typename T>
  T* at(Array array) const {
#ifdef GS_WORKSPACE_GUARD
    return static_cast<T*>(memory_[array].mutable_data_ptr());
#else
    return reinterpret_cast<T*>(static_cast<uint8_t*>(memory_[0].mutable_data_ptr()) + arrays_[array].begin);
#endif
  }

  cuda::ClearList clears() const {
    cuda::ClearList list{};
    for (Array array = 0; array < arrays_.size(); ++array) {
      if (!arrays_[array].cleared || arrays_[array].bytes == 0) continue;
      TORCH_INTERNAL_ASSERT(list.count < cuda::ClearList::kCapacity);
      list.data[list.count] = at<uint32_t>(array);
      list.words[list.count] = arrays_[array].bytes / static_cast<int64_t>(sizeof(uint32_t));
      ++list.count;
    }
    return list;
  }

 private:
  struct Span {
    int64_t bytes, begin;
    bool cleared;
  };

  std::vector<Span> arrays_;
  std::vector<at::Tensor> memory_;
};

// Boxes where vector instructions can load them: a view may begin anywhere.
inline at::Tensor aligned(const at::Tensor& boxes) {
  return reinterpret_cast<uintptr_t>(boxes.const_data_ptr()) % alignof(cuda::AlignedBox<float>) == 0 ? boxes
                                                                                                     : boxes.clone();
}

template <typename T>
const cuda::AlignedBox<T>* aligned_boxes(const at::Tensor& boxes) {
  return reinterpret_cast<const cuda::AlignedBox<T>*>(boxes.const_data_ptr<T>());
}

}  // namespace group_sampling
