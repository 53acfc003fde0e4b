// match_anchors(anchors (n, 4), gt_boxes (m, 4), ignore_boxes (k, 4)?, ...) -> labels (n,) int8, matched_gt (n,) int64,
//                                                                             best_iou (n,)
//
// Two-pass assignment, Sec. 4.1 and Eq. 1 of the paper. Pass 1: an anchor's best ground truth has the largest IoU, ties
// to the lowest index; label 1 if IoU >= pos_iou, 0 if < neg_iou, else -1. Pass 2, for each ground truth that is no
// positive's best: "all" anchors labeled -1 whose best it is become 1, or the "best" one of them (highest IoU, then
// lowest anchor index), or "none". Then negatives of which an ignore box covers at least ignore_ioa become -1.
// matched_gt is -1 and best_iou 0 where the best IoU is below neg_iou. Thresholds are cast to the boxes' dtype once.
// Never stores the n x m matrix. CPU, CUDA and the torch reference return the same bits, for any number of threads.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "match_result.h"
#include "options.h"

namespace group_sampling {

struct MatchAnchorsCall {
  at::Tensor anchors, gt_boxes, ignore_boxes;  // contiguous; (0, 4) without ignore boxes
  MatchOptions options;
  MatchResult out;  // (n,)
};

MatchAnchorsCall prepare_match_anchors(const at::Tensor& anchors, const at::Tensor& gt_boxes,
                                       const std::optional<at::Tensor>& ignore_boxes, double pos_iou, double neg_iou,
                                       std::string_view second_pass, double ignore_ioa);

}  // namespace group_sampling
