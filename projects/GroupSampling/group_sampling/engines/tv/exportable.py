"""The torchvision engine's detectors as functions of tensors alone, for ONNX, TorchScript and ``torch.export``.

What :class:`~.model.GroupSamplingRCNN` does at test time, without lists of images, and without shapes or branches that
depend on values: where an image has less than its share, the rest is filled up. The modules, and so the weights, are
those of the detector itself.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms

from ...anchors import AnchorLattice
from ...boxes import decode_boxes
from .model import GroupSamplingRCNN, ProposalDetections

_NOTHING = -torch.inf  # the score of what fills up


class _Candidates(NamedTuple):
    """P boxes of each of B images, best first."""

    boxes: Tensor  # (B, P, 4) XYXY in pixels, clipped to the image; zeros in an entry that fills up
    logits: Tensor  # (B, P) face logit minus background logit; _NOTHING in an entry that fills up
    anchor_scales: Tensor  # (B, P) in pixels


def _mask(scores: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep, scores, _NOTHING)


def _take_rows(values: Tensor, index: Tensor) -> Tensor:
    """``values`` (B, n, 4) at ``index`` (B, k): (B, k, 4)."""
    return values.gather(1, index[..., None].expand(-1, -1, 4))


def highest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` highest of each row of ``scores`` (N, n), or all, and their columns; of equal ones the first."""
    values, index = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :count], index[:, :count]


def suppress(boxes: Tensor, scores: Tensor, iou_thresh: float) -> Tensor:
    """Non-maximum suppression in each of N lists.

    Args:
        boxes: (N, n, 4) XYXY without negative coordinates.
        scores: (N, n); a box with -inf neither stays nor suppresses another.
        iou_thresh: boxes whose IoU with a better one exceeds it are removed.

    Returns:
        (N, n) bool, which boxes stay.
    """
    flat = scores.flatten()
    live = (flat > _NOTHING).nonzero().squeeze(1)
    # One NMS for all lists, apart from each other in a precision in which the shift rounds nothing away.
    shift = (live // scores.shape[1]).double() * (boxes.max().double() + 1)
    shifted = boxes.flatten(0, 1)[live].double() + shift[:, None]
    kept = live[nms(shifted, flat[live].double(), iou_thresh)]
    return (torch.zeros_like(flat).index_fill(0, kept, 1) > 0).view_as(scores)


@torch.library.custom_op("group_sampling::suppress", mutates_args=())
def suppress_in_one(boxes: Tensor, scores: Tensor, iou_thresh: float) -> Tensor:
    """:func:`suppress` as one operator, in whose place the ONNX exporter puts NonMaxSuppression."""
    return suppress(boxes, scores, iou_thresh)


@suppress_in_one.register_fake
def _(boxes: Tensor, scores: Tensor, iou_thresh: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


class _LevelAnchors(nn.Module):
    """The anchors of a feature level of any size."""

    def __init__(self, lattices: Sequence[AnchorLattice], scales: Sequence[float]):
        super().__init__()
        self.stride = lattices[0].stride
        self.origin = lattices[0].offset * lattices[0].stride
        self.count = len(lattices)  # per cell
        self.register_buffer("base", torch.tensor([lattice.base for lattice in lattices]), persistent=False)
        scales = torch.tensor([scales[lattice.group] for lattice in lattices], dtype=torch.float32)
        self.register_buffer("scales", scales, persistent=False)

    def forward(self, index: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Boxes (..., 4) and scales (...) of the anchors at ``index`` (...) of a level of ``width`` cells."""
        cell, kind = index // self.count, index % self.count
        row = cell // width
        column = cell - row * width  # ONNX has no remainder of a size that is not known
        x, y = ((place * self.stride).float() + self.origin for place in (column, row))
        return torch.stack([x, y, x, y], dim=-1) + self.base[kind], self.scales[kind]


class ExportableDetector(nn.Module):
    """A detector of this engine at test time, as a function from tensors to tensors.

    Args:
        model: of which it takes the modules, and puts them into eval mode.
        with_nms: False: all up to the last NMS.

    Attributes:
        input_names, output_names: of :meth:`forward`.
    """

    input_names = ("images", "image_sizes")
    highest, suppress = staticmethod(highest), staticmethod(suppress)

    def __init__(self, model: GroupSamplingRCNN, *, with_nms: bool = True):
        super().__init__()
        rpn, heads = model.rpn, model.roi_heads
        self.with_nms = with_nms
        self.backbone, self.head = model.backbone, rpn.head
        self.pre_nms_topk, self.post_nms_topk = rpn.pre_nms_top_n(), rpn.post_nms_top_n()
        self.rpn_nms_thresh, self.min_size = rpn.nms_thresh, rpn.min_size
        layout = rpn.anchor_generator.layout
        num_features = 1 if layout.steps else len(layout.strides)
        grid = layout.grid([(1, 1)] * num_features, rpn.anchor_generator.cell_anchors)
        lattices, levels = list(grid.lattices), []
        while lattices:
            level, lattices = lattices[: lattices[0].step], lattices[lattices[0].step :]
            levels.append(_LevelAnchors(level, grid.scales))
        self.anchors = nn.ModuleList(levels)
        self.is_single_stage = isinstance(heads, ProposalDetections)
        if self.is_single_stage:
            self.score_thresh, self.nms_thresh = heads.options["score_thresh"], heads.options["nms_thresh"]
            self.max_detections, self.first_label = heads.options["max_detections"], 0
        else:
            self.box_roi_pool, self.box_head = heads.box_roi_pool, heads.box_head
            self.box_predictor, self.first_label = heads.box_predictor, heads.first_label
            self.score_thresh, self.nms_thresh = heads.score_thresh, heads.nms_thresh
            self.max_detections = heads.detections_per_img
            weights = torch.tensor(heads.box_coder.weights, dtype=torch.float32)
            self.register_buffer("box_weights", weights, persistent=False)
        self.output_names = ("boxes", "scores", "anchor_scales")
        if with_nms:
            self.output_names = ("num_detections", "boxes", "scores", "labels", "anchor_scales")
        self.eval()

    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, ...]:
        """
        Args:
            images: (B, 3, H, W) float32, normalized, filled up with zeros to the right and below; H and W are
                multiples of the stride of the coarsest feature.
            image_sizes: (B, 2) int64 height and width of each image without what fills it up.

        Returns:
            With NMS, for D = ``TEST.DETECTIONS_PER_IMAGE`` (or less, where there cannot be as many), best first:
            num_detections: (B,) int64, the number of entries of each image that mean something; the others are 0.
            boxes: (B, D, 4) XYXY in pixels of ``images``, clipped to the image.
            scores: (B, D) in [0, 1].
            labels: (B, D) int64.
            anchor_scales: (B, D) in pixels, the scale of the anchor that found it.

            Without, for P candidates and K classes:
            boxes: (B, P, 4), or (B, P, K, 4) if K > 1.
            scores: (B, P, K), 0 in entries that mean nothing.
            anchor_scales: (B, P).
        """
        features = self.backbone(images)
        limits = image_sizes.flip(1).float().repeat(1, 2)  # width, height, width, height
        found = self._propose(list(features.values()), limits)
        boxes, scores = self._classify(features, found, limits)
        if not self.with_nms:
            return boxes.squeeze(2), scores, found.anchor_scales
        # Logits of a single stage tell scores apart that are rounded to 1.
        ranks = found.logits[..., None] if self.is_single_stage else scores
        return self.select(boxes, scores, found.anchor_scales, ranks)

    def _propose(self, features: list[Tensor], limits: Tensor) -> _Candidates:
        """What :func:`~group_sampling.inference.select_proposals` does."""
        levels = []
        for anchors, logits, deltas in zip(self.anchors, *self.head(features)):
            width = logits.shape[3]
            flat = logits.permute(0, 2, 3, 1).flatten(1).float()
            flat = F.pad(_mask(flat, flat.isfinite()), (0, self.pre_nms_topk), value=_NOTHING)
            logits, index = flat.topk(self.pre_nms_topk, dim=1)
            index = torch.where(logits > _NOTHING, index, 0)
            deltas = deltas.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)
            base, scales = anchors(index, width)
            boxes = decode_boxes(_take_rows(deltas, index).float(), base)
            is_finite = boxes.isfinite().all(dim=2)
            boxes = _clip(torch.where(is_finite[..., None], boxes, 0), limits[:, None])
            keep = is_finite & ((boxes[..., 2:] - boxes[..., :2]) > self.min_size).all(dim=2)
            found = _Candidates(boxes, _mask(logits, keep), scales)
            if self.rpn_nms_thresh < 1:
                found = found._replace(
                    logits=_mask(found.logits, self.suppress(boxes, found.logits, self.rpn_nms_thresh))
                )
            levels.append(found)
        boxes, logits, scales = (torch.cat(values, dim=1) for values in zip(*levels))
        logits, index = self.highest(logits, self.post_nms_topk)
        return _Candidates(_take_rows(boxes, index), logits, scales.gather(1, index))

    def _classify(self, features: dict[str, Tensor], found: _Candidates, limits: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (B, P, K, 4) and scores (B, P, K), which the second stage gives if there is one; 0 where nothing is."""
        is_real = found.logits > _NOTHING
        if self.is_single_stage:
            return found.boxes[:, :, None], torch.where(is_real, found.logits.sigmoid(), 0)[..., None]
        size = found.logits.shape[1]
        image = torch.ones_like(limits[:, 0]).cumsum(0) - 1  # an arange would stay on the device of the export
        rois = torch.cat([image[:, None, None].expand(-1, size, 1), found.boxes], dim=2).flatten(0, 1)
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, rois, [])))
        scores = logits.float().softmax(dim=1).unflatten(0, (-1, size))
        deltas = deltas.float().unflatten(1, (-1, 4)).unflatten(0, (-1, size))
        boxes = decode_boxes(deltas / self.box_weights, found.boxes[:, :, None].expand_as(deltas))
        is_real = is_real & boxes.isfinite().flatten(2).all(dim=2) & scores.isfinite().all(dim=2)
        boxes = torch.where(is_real[..., None, None], boxes, 0)[:, :, 1:]  # 0 is the background
        return _clip(boxes, limits[:, None, None]), torch.where(is_real[..., None], scores, 0)[..., 1:]

    def select(
        self, boxes: Tensor, scores: Tensor, anchor_scales: Tensor, ranks: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """From the outputs without NMS to those with it: threshold, NMS within a class, the best of all classes.

        Args:
            boxes: (B, P, 4) or (B, P, K, 4).
            scores: (B, P, K).
            anchor_scales: (B, P).
            ranks: (B, P, K) in the order of the scores; None: these.
        """
        num_classes = scores.shape[2]
        boxes = boxes.unflatten(1, (-1, 1)) if boxes.dim() == 3 else boxes
        ranks = _mask(scores if ranks is None else ranks, scores > self.score_thresh)
        keep = self.suppress(boxes.transpose(1, 2).flatten(0, 1), ranks.transpose(1, 2).flatten(0, 1), self.nms_thresh)
        keep = keep.unflatten(0, (-1, num_classes)).transpose(1, 2)
        ranks, index = self.highest(_mask(ranks, keep).flatten(1), self.max_detections)
        is_real = ranks > _NOTHING
        boxes = torch.where(is_real[..., None], _take_rows(boxes.flatten(1, 2), index), 0)
        found = (
            scores.flatten(1).gather(1, index),
            index % num_classes + self.first_label,
            anchor_scales.gather(1, index // num_classes),
        )
        return is_real.sum(dim=1), boxes, *(torch.where(is_real, value, 0) for value in found)


class OnnxDetector(ExportableDetector):
    """The same with the operators of ONNX: its TopK prefers the first of equals, and it suppresses in many lists."""

    suppress = staticmethod(suppress_in_one)

    @staticmethod
    def highest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return scores.topk(min(count, scores.shape[1]), dim=1)


def _clip(boxes: Tensor, limits: Tensor) -> Tensor:
    return torch.minimum(boxes.clamp(min=0), limits)
