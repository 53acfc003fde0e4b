#include "match_anchor_grid.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace group_sampling {

std::tuple<at::Tensor, at::Tensor, at::Tensor> match_anchor_grid(at::TensorList gt_boxes, at::TensorList ignore_boxes,
                                                                 at::IntArrayRef lattice_ints,
                                                                 at::ArrayRef<double> lattice_floats, double pos_iou,
                                                                 double neg_iou, std::string_view second_pass,
                                                                 double ignore_ioa) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("group_sampling::match_anchor_grid", "")
                             .typed<std::tuple<at::Tensor, at::Tensor, at::Tensor>(
                                 at::TensorList, at::TensorList, c10::SymIntArrayRef, at::ArrayRef<double>, double,
                                 double, std::string_view, double)>();
  return op.call(gt_boxes, ignore_boxes, c10::fromIntArrayRefSlow(lattice_ints), lattice_floats, pos_iou, neg_iou,
                 second_pass, ignore_ioa);
}

}  // namespace group_sampling

TORCH_LIBRARY_FRAGMENT(group_sampling, m) {
  m.set_python_module("group_sampling.ops.match");  // registers the fake kernel
  m.def(
      "match_anchor_grid(Tensor[] gt_boxes, Tensor[] ignore_boxes, SymInt[] lattice_ints, float[] lattice_floats, "
      "float pos_iou, float neg_iou, str second_pass, float ignore_ioa) "
      "-> (Tensor labels, Tensor matched_gt, Tensor best_iou)");
}
