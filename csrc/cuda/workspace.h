// The scratch memory of one call: its arrays are reserved first, then live in one zeroed allocation.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/zeros.h>

#include <cstring>
#include <vector>

#include "../grid_layout.h"
#include "../options.h"
#include "kernels.h"

namespace group_sampling {

// Lays out device arrays in one allocation: reserve() them all, then allocate(), then at().
class Workspace {
 public:
  template <typename T>
  int64_t reserve(int64_t count) {
    constexpr int64_t kAlignment = 16;
    size_ = (size_ + kAlignment - 1) / kAlignment * kAlignment;
    const int64_t offset = size_;
    size_ += count * static_cast<int64_t>(sizeof(T));
    return offset;
  }

  void allocate_zeroed(const at::TensorOptions& options) { bytes_ = at::zeros({size_}, options.dtype(at::kByte)); }

  template <typename T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(static_cast<uint8_t*>(bytes_.mutable_data_ptr()) + offset);
  }

 private:
  int64_t size_ = 0;
  at::Tensor bytes_;
};

// Small host arrays that go to the device in one upload.
class HostTables {
 public:
  template <typename T>
  int64_t add(const T* data, size_t count) {
    const size_t offset = (bytes_.size() + 15) / 16 * 16;
    bytes_.resize(offset + count * sizeof(T));
    if (count > 0) std::memcpy(bytes_.data() + offset, data, count * sizeof(T));
    return static_cast<int64_t>(offset);
  }

  int64_t size() const { return static_cast<int64_t>(bytes_.size()); }
  const void* data() const { return bytes_.data(); }

 private:
  std::vector<uint8_t> bytes_;
};

// Boxes of all images in one tensor, and where each image's begin.
struct Concatenated {
  at::Tensor boxes;
  std::vector<int64_t> offsets;

  Concatenated(at::TensorList images, size_t num_images) : offsets(num_images + 1, 0) {
    for (size_t b = 0; b < images.size(); ++b) offsets[b + 1] = offsets[b] + images[b].size(0);
    if (images.size() == 1) boxes = images[0].contiguous();
    if (images.size() > 1) boxes = at::cat(images).contiguous();
  }

  template <typename T>
  cuda::BoxBatch<T> batch(const int64_t* device_offsets) const {
    const auto* data = boxes.defined() ? reinterpret_cast<const Box<T>*>(boxes.const_data_ptr<T>()) : nullptr;
    return {data, device_offsets, offsets.back()};
  }
};

// Reserves and fills in the arrays of a MatchState.
template <typename T>
class StateArrays {
 public:
  StateArrays(Workspace& workspace, int64_t num_images, int64_t num_anchors, int64_t num_gts, int64_t num_ignores,
              const MatchOptions& options)
      : num_images_(num_images), num_anchors_(num_anchors), has_ignores_(num_ignores > 0), options_(options) {
    const int64_t total = num_images * num_anchors;
    const int64_t num_rescues = options.second_pass == SecondPass::kBest ? num_gts : 0;
    best_iou_ = workspace.reserve<cuda::Bits<T>>(total);
    best_gt_key_ = workspace.reserve<int32_t>(total);
    covered_ = workspace.reserve<uint8_t>(has_ignores_ ? total : 0);
    taken_ = workspace.reserve<uint8_t>(num_gts);
    rescue_iou_ = workspace.reserve<cuda::Bits<T>>(num_rescues);
    rescue_key_ = workspace.reserve<unsigned long long>(num_rescues);
  }

  cuda::MatchState<T> state(const Workspace& workspace, const int64_t* gt_offsets) const {
    return {num_images_,
            num_anchors_,
            gt_offsets,
            workspace.at<cuda::Bits<T>>(best_iou_),
            workspace.at<int32_t>(best_gt_key_),
            has_ignores_ ? workspace.at<uint8_t>(covered_) : nullptr,
            workspace.at<uint8_t>(taken_),
            workspace.at<cuda::Bits<T>>(rescue_iou_),
            workspace.at<unsigned long long>(rescue_key_),
            static_cast<T>(options_.pos_iou),
            static_cast<T>(options_.neg_iou),
            static_cast<T>(options_.ignore_ioa),
            options_.second_pass};
  }

 private:
  int64_t num_images_, num_anchors_;
  bool has_ignores_;
  MatchOptions options_;
  int64_t best_iou_, best_gt_key_, covered_, taken_, rescue_iou_, rescue_key_;
};

// Reserves and fills in the arrays of RankBits.
class RankArrays {
 public:
  RankArrays(Workspace& workspace, int64_t num_images, int64_t num_anchors, int64_t num_groups)
      : words_(num_anchors / 32 + num_groups + 1),
        positive_(workspace.reserve<uint32_t>(num_images * words_)),
        not_negative_(workspace.reserve<uint32_t>(num_images * words_)),
        permutations_(workspace.reserve<Permutation>(num_images * num_groups)) {}

  cuda::RankBits bits(const Workspace& workspace) const {
    return {workspace.at<uint32_t>(positive_), workspace.at<uint32_t>(not_negative_), words_,
            workspace.at<Permutation>(permutations_)};
  }

 private:
  int64_t words_, positive_, not_negative_, permutations_;
};

inline std::vector<int64_t> prefix_sums(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> sums(sizes.size() + 1, 0);
  for (size_t i = 0; i < sizes.size(); ++i) sums[i + 1] = sums[i] + sizes[i];
  return sums;
}

}  // namespace group_sampling
