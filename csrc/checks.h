// Checks of boxes that several operators share. They read metadata only, so they never wait for a device.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace group_sampling {

// (N, 4), float32 or float64.
void check_boxes(const char* op, const char* name, const at::Tensor& boxes);
// `boxes` has the dtype and the device of `first`.
void check_same_kind(const char* op, const char* name, const at::Tensor& first, const at::Tensor& boxes);
// At least one image; all boxes valid tensors of one kind; ignore boxes for every image or for none.
void check_box_lists(const char* op, at::TensorList gt_boxes, at::TensorList ignore_boxes);

std::vector<at::Tensor> contiguous(at::TensorList tensors);

}  // namespace group_sampling
