#include "checks.h"

#include <limits>

namespace group_sampling {
namespace {

constexpr int64_t kMaxBoxes = std::numeric_limits<int32_t>::max();  // of an image: kernels count them in 32 bits

}  // namespace

void check_boxes(const char* op, const char* name, const at::Tensor& boxes) {
  TORCH_CHECK_VALUE(boxes.dim() == 2 && boxes.size(1) == 4, op, ": expected ", name, " of shape (N, 4), got ",
                    boxes.sizes());
  TORCH_CHECK_TYPE(boxes.scalar_type() == at::kFloat || boxes.scalar_type() == at::kDouble, op,
                   ": expected float32 or float64 ", name, ", got ", boxes.scalar_type());
  TORCH_CHECK_VALUE(boxes.size(0) <= kMaxBoxes, op, ": expected at most ", kMaxBoxes, " ", name, ", got ",
                    boxes.size(0));
}

void check_same_kind(const char* op, const char* name, const at::Tensor& first, const at::Tensor& boxes) {
  TORCH_CHECK_TYPE(boxes.scalar_type() == first.scalar_type(), op, ": expected ", name, " of dtype ",
                   first.scalar_type(), " like the other boxes, got ", boxes.scalar_type());
  TORCH_CHECK_VALUE(boxes.device() == first.device(), op, ": expected ", name, " on ", first.device(),
                    " like the other boxes, got ", boxes.device());
}

void check_box_lists(const char* op, at::TensorList gt_boxes, at::TensorList ignore_boxes) {
  TORCH_CHECK_VALUE(!gt_boxes.empty(), op, ": expected gt_boxes of at least one image, got none");
  TORCH_CHECK_VALUE(ignore_boxes.empty() || ignore_boxes.size() == gt_boxes.size(), op,
                    ": expected no ignore_boxes or one entry per image, ", gt_boxes.size(), ", got ",
                    ignore_boxes.size());
  for (const auto& boxes : gt_boxes) {
    check_boxes(op, "gt_boxes", boxes);
    check_same_kind(op, "gt_boxes", gt_boxes[0], boxes);
  }
  for (const auto& boxes : ignore_boxes) {
    check_boxes(op, "ignore_boxes", boxes);
    check_same_kind(op, "ignore_boxes", gt_boxes[0], boxes);
  }
}

std::vector<at::Tensor> contiguous(at::TensorList tensors) {
  std::vector<at::Tensor> result;
  result.reserve(tensors.size());
  for (const auto& tensor : tensors) result.push_back(tensor.contiguous());
  return result;
}

}  // namespace group_sampling
