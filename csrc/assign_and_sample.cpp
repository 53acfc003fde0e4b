#include "assign_and_sample.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace group_sampling {

AssignResult assign_and_sample(at::TensorList gt_boxes, at::TensorList ignore_boxes, at::IntArrayRef lattice_ints,
                               at::ArrayRef<double> lattice_floats, int64_t num_groups, int64_t samples_per_group,
                               double positive_fraction, int64_t seed, int64_t iteration, int64_t first_image,
                               double pos_iou, double neg_iou, std::string_view second_pass, double ignore_ioa) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("group_sampling::assign_and_sample", "")
                             .typed<AssignResult(at::TensorList, at::TensorList, c10::SymIntArrayRef,
                                                 at::ArrayRef<double>, c10::SymInt, c10::SymInt, double, c10::SymInt,
                                                 c10::SymInt, c10::SymInt, double, double, std::string_view, double)>();
  return op.call(gt_boxes, ignore_boxes, c10::fromIntArrayRefSlow(lattice_ints), lattice_floats, num_groups,
                 samples_per_group, positive_fraction, seed, iteration, first_image, pos_iou, neg_iou, second_pass,
                 ignore_ioa);
}

}  // namespace group_sampling

TORCH_LIBRARY_FRAGMENT(group_sampling, m) {
  m.set_python_module("group_sampling.ops.sample");  // registers the fake kernel
  m.def(
      "assign_and_sample(Tensor[] gt_boxes, Tensor[] ignore_boxes, SymInt[] lattice_ints, float[] lattice_floats, "
      "SymInt num_groups, SymInt samples_per_group, float positive_fraction, SymInt seed, SymInt iteration, "
      "SymInt first_image, float pos_iou, float neg_iou, str second_pass, float ignore_ioa) "
      "-> (Tensor indices, Tensor labels, Tensor matched_gt, Tensor num_pos, Tensor num_neg)");
}
