"""From head outputs to detections, for both engines: top-k, decoding, NMS, and the anchor scale of every detection."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image, nms

from .anchors import AnchorGrid
from .boxes import decode_boxes
from .head import predict_from


class Proposals(NamedTuple):
    """Boxes of one image, best first."""

    boxes: Tensor  # (k, 4) XYXY in input pixels, clipped to the image
    logits: Tensor  # (k,) face logit minus background logit
    anchor_scales: Tensor  # (k,) scale of the anchor that produced the box


@torch.no_grad()
def select_proposals(
    grid: AnchorGrid,
    logits: Tensor,
    deltas: Tensor,
    image_sizes: Sequence[tuple[int, int]],
    *,
    pre_nms_topk: int,
    post_nms_topk: int,
    nms_thresh: float,
    min_size: float = 0.0,
    group: int | None = None,
) -> list[Proposals]:
    """The best boxes of every image: top-k of each level, decoded, clipped, NMS within a level, top-k over all levels.

    Only the top-k anchors are decoded. Boxes or logits that are not finite are left out.

    Args:
        grid: n anchors.
        logits: (B, n).
        deltas: (B, n, 4).
        image_sizes: B pairs (height, width) without padding.
        pre_nms_topk: kept per level before NMS.
        post_nms_topk: kept per image after NMS.
        nms_thresh: IoU above which the lower-scoring box is removed; 1 or more skips NMS.
        min_size: boxes with a side not longer than this many pixels are removed.
        group: of the grid, the only one whose anchors take part, as if there were no others: a sub-detector of the
            paper (Sec. 6.1). None: all anchors.
    """
    indices, levels, start = [], [], 0
    for level, size in enumerate(grid.level_sizes):
        if group is None:
            top = logits[:, start : start + size].topk(min(pre_nms_topk, size), dim=1).indices + start
        else:
            members = grid.group_members(group, logits.device, level=level)
            top = members[logits[:, members].topk(min(pre_nms_topk, len(members)), dim=1).indices]
        indices.append(top)
        levels.append(torch.full_like(top, level))
        start += size
    index, level_ids = torch.cat(indices, dim=1), torch.cat(levels, dim=1)

    logits, deltas = predict_from(logits, deltas)(index)
    decoded = decode_boxes(deltas.float(), grid.boxes_at(index))
    results = []
    for boxes, scores, scales, level, (height, width) in zip(
        decoded, logits.float(), grid.scales_at(index), level_ids, image_sizes
    ):
        finite = boxes.isfinite().all(dim=1) & scores.isfinite()
        boxes = clip_boxes_to_image(boxes, (height, width))
        keep = (finite & ((boxes[:, 2:] - boxes[:, :2]) > min_size).all(dim=1)).nonzero().squeeze(1)
        if nms_thresh < 1:
            keep = keep[batched_nms(boxes[keep], scores[keep], level[keep], nms_thresh)]
        else:
            keep = keep[scores[keep].argsort(descending=True, stable=True)]
        keep = keep[:post_nms_topk]
        results.append(Proposals(boxes[keep], scores[keep], scales[keep]))
    return results


@torch.no_grad()
def proposals_to_detections(
    proposals: Proposals, *, score_thresh: float, nms_thresh: float, max_detections: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn the proposals of a single-stage detector into its detections: softmax score, threshold, NMS, top-k.

    Returns:
        boxes (k, 4), scores (k,) in [0, 1] best first, anchor_scales (k,).
    """
    scores = proposals.logits.sigmoid()
    keep = (scores > score_thresh).nonzero().squeeze(1)
    keep = keep[nms(proposals.boxes[keep], scores[keep], nms_thresh)[:max_detections]]
    return proposals.boxes[keep], scores[keep], proposals.anchor_scales[keep]
