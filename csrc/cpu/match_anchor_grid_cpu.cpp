#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "../checks.h"
#include "../match_anchor_grid.h"
#include "batch_boxes.h"
#include "parallel.h"
#include "window_matcher.h"

namespace group_sampling {
namespace {

template <typename T>
void run(const GridLayout& layout, at::TensorList gt_boxes, at::TensorList ignore_boxes, const MatchOptions& options,
         int8_t* labels, int64_t* matched_gt, T* best_iou) {
  const BatchBoxes<T> batch(gt_boxes, ignore_boxes);
  const auto num_images = static_cast<int64_t>(batch.images.size());
  const int64_t n = layout.num_anchors;
  // All anchors start as unmatched negatives.
  at::parallel_for(0, num_images * n, 65536, [&](int64_t begin, int64_t end) {
    std::fill(labels + begin, labels + end, int8_t(0));
    std::fill(matched_gt + begin, matched_gt + end, int64_t(-1));
    std::fill(best_iou + begin, best_iou + end, T(0));
  });
  const WindowMatches<T> matches(layout, batch.images, options);
  const auto num_lattices = static_cast<int64_t>(layout.lattices.size());
  const int64_t num_tasks = num_images * num_lattices;
  for_each_task(threads_for(matches.num_matches(), num_tasks), num_tasks, [&](int64_t, int64_t task) {
    const int64_t image = task / num_lattices;
    const Lattice& lattice = layout.lattices[task % num_lattices];
    for (const auto& band : matches.bands(image, task % num_lattices)) {
      for (const Match<T>* match = band.begin; match != band.end; ++match) {
        const int64_t anchor = image * n + lattice.start + lattice.step * match->cell;
        labels[anchor] = match->label;
        matched_gt[anchor] = match->gt;
        best_iou[anchor] = match->iou;
      }
    }
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> match_anchor_grid_cpu(at::TensorList gt_boxes,
                                                                     at::TensorList ignore_boxes,
                                                                     at::IntArrayRef lattice_ints,
                                                                     at::ArrayRef<double> lattice_floats,
                                                                     double pos_iou, double neg_iou,
                                                                     std::string_view second_pass, double ignore_ioa) {
  constexpr const char* op = "match_anchor_grid";
  check_box_lists(op, gt_boxes, ignore_boxes);
  const MatchOptions options = check_match_options(op, pos_iou, neg_iou, second_pass, ignore_ioa);
  const GridLayout layout = check_lattices(op, lattice_ints, lattice_floats, -1);
  const auto num_images = static_cast<int64_t>(gt_boxes.size());
  const auto box_options = gt_boxes[0].options();
  at::Tensor labels = at::empty({num_images, layout.num_anchors}, box_options.dtype(at::kChar));
  at::Tensor matched_gt = at::empty({num_images, layout.num_anchors}, box_options.dtype(at::kLong));
  at::Tensor best_iou = at::empty({num_images, layout.num_anchors}, box_options);
  auto* label_data = labels.mutable_data_ptr<int8_t>();
  auto* gt_data = matched_gt.mutable_data_ptr<int64_t>();
  if (gt_boxes[0].scalar_type() == at::kFloat) {
    run<float>(layout, gt_boxes, ignore_boxes, options, label_data, gt_data, best_iou.mutable_data_ptr<float>());
  } else {
    run<double>(layout, gt_boxes, ignore_boxes, options, label_data, gt_data, best_iou.mutable_data_ptr<double>());
  }
  return {labels, matched_gt, best_iou};
}

}  // namespace
}  // namespace group_sampling

TORCH_LIBRARY_IMPL(group_sampling, CPU, m) {
  m.impl("match_anchor_grid", TORCH_FN(group_sampling::match_anchor_grid_cpu));
}
