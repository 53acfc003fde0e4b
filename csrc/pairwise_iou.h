// pairwise_iou(boxes1 (n, 4), boxes2 (m, 4)) -> (n, m)
//
// IoU of every pair: the matrix M(i, j) of Sec. 4.1 of the paper. Boxes are XYXY in pixels, width = x2 - x1, float32 or
// float64 of one dtype and device, any strides. 0 where a box is not finite, empty or inverted. Not differentiable.
#pragma once

#include <ATen/core/Tensor.h>

namespace group_sampling {

struct PairwiseIouCall {
  at::Tensor boxes1, boxes2;  // contiguous
  at::Tensor out;
};

PairwiseIouCall prepare_pairwise_iou(const at::Tensor& boxes1, const at::Tensor& boxes2);

}  // namespace group_sampling
