// The boxes of tensors as the kernels read them. The tensors must be contiguous and outlive what is returned.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "window_matcher.h"

namespace group_sampling {

template <typename T>
const Box<T>* boxes_of(const at::Tensor& boxes) {
  return reinterpret_cast<const Box<T>*>(boxes.const_data_ptr<T>());
}

template <typename T>
std::vector<ImageBoxes<T>> image_boxes(const std::vector<at::Tensor>& gt_boxes,
                                       const std::vector<at::Tensor>& ignore_boxes) {
  std::vector<ImageBoxes<T>> images;
  images.reserve(gt_boxes.size());
  for (size_t b = 0; b < gt_boxes.size(); ++b) {
    ImageBoxes<T> image{boxes_of<T>(gt_boxes[b]), gt_boxes[b].size(0), nullptr, 0};
    if (!ignore_boxes.empty()) {
      image.ignores = boxes_of<T>(ignore_boxes[b]);
      image.num_ignores = ignore_boxes[b].size(0);
    }
    images.push_back(image);
  }
  return images;
}

}  // namespace group_sampling
