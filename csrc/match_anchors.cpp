#include "match_anchors.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "checks.h"
#include "parse.h"

namespace group_sampling {

MatchAnchorsCall prepare_match_anchors(const at::Tensor& anchors, const at::Tensor& gt_boxes,
                                       const std::optional<at::Tensor>& ignore_boxes, double pos_iou, double neg_iou,
                                       std::string_view second_pass, double ignore_ioa) {
  constexpr const char* op = "match_anchors";
  check_boxes(op, "anchors", anchors);
  check_boxes(op, "gt_boxes", gt_boxes);
  check_same_kind(op, "gt_boxes", anchors, gt_boxes);
  if (ignore_boxes.has_value()) {
    check_boxes(op, "ignore_boxes", *ignore_boxes);
    check_same_kind(op, "ignore_boxes", anchors, *ignore_boxes);
  }
  return {anchors.contiguous(), gt_boxes.contiguous(),
          ignore_boxes.has_value() ? ignore_boxes->contiguous() : at::empty({0, 4}, anchors.options()),
          parse_match_options(op, pos_iou, neg_iou, second_pass, ignore_ioa),
          empty_match_result({anchors.size(0)}, anchors.options())};
}

}  // namespace group_sampling

TORCH_LIBRARY_FRAGMENT(group_sampling, m) {
  m.set_python_module("group_sampling.ops.match");  // registers the fake kernel
  m.def(
      "match_anchors(Tensor anchors, Tensor gt_boxes, Tensor? ignore_boxes, float pos_iou, float neg_iou, "
      "str second_pass, float ignore_ioa) -> (Tensor labels, Tensor matched_gt, Tensor best_iou)");
}
