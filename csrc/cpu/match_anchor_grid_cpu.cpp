#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>

#include "../kernel.h"
#include "../match_anchor_grid.h"
#include "parallel.h"
#include "tensor_boxes.h"
#include "window_matcher.h"

namespace group_sampling {
namespace {

template <typename T>
void match_by_windows(const MatchAnchorGridCall& call) {
  const auto images = image_boxes<T>(call.gt_boxes, call.ignore_boxes);
  const MatchOutput<T> out(call.out);
  const auto num_images = static_cast<int64_t>(images.size());
  const int64_t n = call.layout.num_anchors;
  // All anchors start as unmatched negatives.
  for_each_range(num_images * n, num_images * n, [&](int64_t begin, int64_t end) {
    std::fill(out.labels + begin, out.labels + end, int8_t(0));
    std::fill(out.matched_gt + begin, out.matched_gt + end, int64_t(-1));
    std::fill(out.best_iou + begin, out.best_iou + end, T(0));
  });
  const WindowMatches<T> matches(call.layout, images, call.options);
  const auto num_lattices = static_cast<int64_t>(call.layout.lattices.size());
  const int64_t num_tasks = num_images * num_lattices;
  for_each_task(threads_for(matches.num_matches(), num_tasks), num_tasks, [&](int64_t, int64_t task) {
    const int64_t image = task / num_lattices;
    const Lattice& lattice = call.layout.lattices[task % num_lattices];
    for (const auto& band : matches.bands(image, task % num_lattices)) {
      for (const Match<T>* match = band.begin; match != band.end; ++match) {
        const int64_t anchor = image * n + anchor_of_cell(lattice, match->cell);
        out.labels[anchor] = match->label;
        out.matched_gt[anchor] = match->gt;
        out.best_iou[anchor] = match->iou;
      }
    }
  });
}

void match_anchor_grid_cpu(const MatchAnchorGridCall& call) {
  AT_DISPATCH_FLOATING_TYPES(call.gt_boxes[0].scalar_type(), "match_anchor_grid",
                             [&] { match_by_windows<scalar_t>(call); });
}

using MatchAnchorGridCpu = Kernel<prepare_match_anchor_grid, match_anchor_grid_cpu>;

}  // namespace
}  // namespace group_sampling

TORCH_LIBRARY_IMPL(group_sampling, CPU, m) {
  m.impl("match_anchor_grid", TORCH_FN(group_sampling::MatchAnchorGridCpu::call));
}
