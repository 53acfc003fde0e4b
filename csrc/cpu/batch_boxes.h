// The boxes of a batch as the windowed kernels read them, and the tensors that keep them alive.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "window_matcher.h"

namespace group_sampling {

template <typename T>
class BatchBoxes {
 public:
  BatchBoxes(at::TensorList gt_boxes, at::TensorList ignore_boxes) {
    owners_.reserve(gt_boxes.size() + ignore_boxes.size());
    for (size_t b = 0; b < gt_boxes.size(); ++b) {
      ImageBoxes<T> image{};
      image.gts = keep(gt_boxes[b]);
      image.num_gts = gt_boxes[b].size(0);
      if (!ignore_boxes.empty()) {
        image.ignores = keep(ignore_boxes[b]);
        image.num_ignores = ignore_boxes[b].size(0);
      }
      images.push_back(image);
    }
  }

  std::vector<ImageBoxes<T>> images;

 private:
  const Box<T>* keep(const at::Tensor& boxes) {
    owners_.push_back(boxes.contiguous());
    return reinterpret_cast<const Box<T>*>(owners_.back().template const_data_ptr<T>());
  }

  std::vector<at::Tensor> owners_;
};

}  // namespace group_sampling
