"""Multi-scale test of any detector on an image pyramid; both engines wrap it as their test-time augmentation."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image

from .data.transforms import TestTransform
from .detections import Detections, map_lists

# A tile starts at a multiple of this, the coarsest stride of an FPN, so its cells are cells of the whole image.
_ALIGNMENT = 32
# A box that ends this close to the edge of its tile, in pixels, was cut by it.
_TOUCHING = 1.0
# Rows of the IoU matrix that box voting holds at a time.
_VOTE_ROWS = 256


class ScaledTransform(TestTransform):
    """The resize of one level: ``scale`` times the size that the single-scale test gives the image, in one step.

    Args:
        base: the resize of the single-scale test.
        scale: factor of both sides; with 1 the result is that of ``base``.
    """

    def __init__(self, base: TestTransform, scale: float) -> None:
        super().__init__(base.min_size, base.max_size)
        self.scale = scale

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        height, width = super().output_size(height, width)
        return max(1, round(self.scale * height)), max(1, round(self.scale * width))


class ImagePyramid:
    """Detects on an image at several scales and merges what was found.

    A level with a side over ``max_side`` is cut into overlapping tiles: the detector's memory does not grow with the
    scale, and no level is made smaller than asked for. A detection that ends at an inner edge of its tile is dropped
    where the neighboring tile holds all of it. So a face smaller than the overlap is found whole; of a larger one
    nothing is dropped, but it can come in parts.

    If the detector returns what its sub-detectors find, each of their lists goes the same way by itself.

    Args:
        base: the resize of the single-scale test; ``scales`` are relative to its result.
        scales: factors, distinct.
        flip: detect on the mirror image of every level as well.
        max_side: largest side of what the detector gets to see, in pixels (the paper's limit is 3,000).
        tile_overlap: of neighboring tiles, in pixels.
        nms_thresh: IoU above which the lower-scoring of two boxes of a class is removed; on equal scores that of the
            later scale, of the mirror image.
        vote_thresh: box voting: a box that NMS keeps becomes the mean, weighted by score, of all boxes of its class
            whose IoU with it is at least this, those that NMS removed included. 0: none.
        max_detections: kept of each level before the merge, and of the image after it.

    Raises:
        ValueError: an argument makes no sense.
    """

    def __init__(
        self,
        base: TestTransform,
        scales: Sequence[float],
        *,
        flip: bool,
        max_side: int,
        tile_overlap: int,
        nms_thresh: float,
        vote_thresh: float,
        max_detections: int,
    ) -> None:
        numbers = all(isinstance(scale, (int, float)) and 0 < scale < float("inf") for scale in scales)
        if not numbers or not 0 < len(scales) == len(set(scales)):
            raise ValueError(f"scales: expected distinct positive factors, got {tuple(scales)}")
        if tile_overlap < 0:
            raise ValueError(f"tile_overlap: expected at least 0 pixels, got {tile_overlap}")
        if max_side < tile_overlap + _ALIGNMENT:
            raise ValueError(
                f"max_side: expected at least tile_overlap + {_ALIGNMENT} = {tile_overlap + _ALIGNMENT} pixels, "
                f"got {max_side}"
            )
        if not 0 <= vote_thresh <= 1:
            raise ValueError(f"vote_thresh: expected an IoU in [0, 1], got {vote_thresh}")
        self.levels = tuple(ScaledTransform(base, scale) for scale in scales)
        self.flip = flip
        self.max_side = max_side
        self.tile_overlap = tile_overlap
        self.nms_thresh = nms_thresh
        self.vote_thresh = vote_thresh
        self.max_detections = max_detections

    def __call__(
        self, image: np.ndarray, detect: Callable[[np.ndarray], Detections], size: tuple[int, int] | None = None
    ) -> Detections:
        """Detect on all levels of ``image``.

        Args:
            image: (H, W, 3) uint8, with its original pixels for the best result at scales above 1.
            detect: the detector: takes (h, w, 3) uint8, at most ``max_side`` on a side, and returns detections in the
                pixels of what it was given.
            size: (height, width) in whose pixels the result is; None: those of ``image``.

        Returns:
            The merged detections, best first, clipped to the image; boxes without area are left out.
        """
        size = size or image.shape[:2]
        found = []
        for level in self.levels:
            resized = level.apply_image(image)
            found.append(self._detect_level(resized, detect, size))
            if self.flip:
                mirrored = self._detect_level(resized[:, ::-1], detect, size)
                found.append(map_lists(lambda level: _mirror(level, size[1]), mirrored))
        return map_lists(self._merge, *found)

    def _merge(self, *levels: Detections) -> Detections:
        return merge_detections(
            levels, nms_thresh=self.nms_thresh, vote_thresh=self.vote_thresh, max_detections=self.max_detections
        )

    def _detect_level(
        self, image: np.ndarray, detect: Callable[[np.ndarray], Detections], size: tuple[int, int]
    ) -> Detections:
        """The best detections on one resized image, tile by tile, in pixels of ``size``."""
        height, width = image.shape[:2]
        rows, columns = (tile_spans(side, self.max_side, self.tile_overlap) for side in (height, width))
        spans = list(itertools.product(rows, columns))

        def join(*tiles: Detections) -> Detections:
            found = []
            for tile, ((y0, y1), (x0, x1)) in zip(tiles, spans):
                tile = tile._replace(boxes=tile.boxes + tile.boxes.new_tensor([x0, y0, x0, y0]))
                cut = _is_cut(tile.boxes[:, 0::2], (x0, x1), columns, self.tile_overlap)
                cut |= _is_cut(tile.boxes[:, 1::2], (y0, y1), rows, self.tile_overlap)
                found.append(tile.select(~cut))
            level = _concatenate(found)
            factors = level.boxes.new_tensor([size[1] / width, size[0] / height] * 2)
            level = level._replace(boxes=clip_boxes_to_image(level.boxes * factors, size))
            level = level.select((level.boxes[:, 2:] > level.boxes[:, :2]).all(dim=1))
            return _best_first(level).select(slice(self.max_detections))

        return map_lists(join, *(detect(np.ascontiguousarray(image[y0:y1, x0:x1])) for (y0, y1), (x0, x1) in spans))


def tile_spans(side: int, max_side: int, overlap: int) -> list[tuple[int, int]]:
    """Cut a side of ``side`` pixels into spans [start, end) of at most ``max_side``, as few and as equal as possible.

    Neighbors share ``overlap`` pixels. Every start is a multiple of 32.
    """
    if side <= max_side:
        return [(0, side)]
    longest_step = (max_side - overlap) // _ALIGNMENT * _ALIGNMENT
    count = -(-(side - overlap) // longest_step)
    step = -(-(side - overlap) // (count * _ALIGNMENT)) * _ALIGNMENT
    return [(start, min(start + step + overlap, side)) for start in range(0, count * step, step)]


def merge_detections(
    levels: Sequence[Detections], *, nms_thresh: float, vote_thresh: float = 0.0, max_detections: int
) -> Detections:
    """Merge detections of one image by NMS within each class, and by box voting; see :class:`ImagePyramid`.

    Args:
        levels: at least one, in pixels of the same image. On equal scores the earlier level goes first.

    Returns:
        At most ``max_detections``, best first. Scores, classes and anchor scales are those of the boxes that NMS keeps.
    """
    candidates = _best_first(_concatenate(levels))
    # Candidates are in the order of NMS: ascending indices are descending scores, with ties as documented.
    keep = batched_nms(candidates.boxes, candidates.scores, candidates.classes, nms_thresh).sort().values
    kept = candidates.select(keep[:max_detections])
    if vote_thresh > 0:
        kept = kept._replace(boxes=_vote(kept, candidates, vote_thresh))
    return kept


def _vote(kept: Detections, candidates: Detections, vote_thresh: float) -> Tensor:
    """Box voting (Gidaris and Komodakis, ICCV 2015): boxes of ``kept``, each moved to the mean of its voters."""
    voted = []
    for start in range(0, len(kept.boxes), _VOTE_ROWS):
        rows = kept.select(slice(start, start + _VOTE_ROWS))
        voters = box_iou(rows.boxes, candidates.boxes) >= vote_thresh
        voters &= rows.classes[:, None] == candidates.classes
        weights = voters * candidates.scores.double()
        total = weights.sum(dim=1, keepdim=True)
        mean = (weights @ candidates.boxes.double()) / total
        voted.append(torch.where(total > 0, mean, rows.boxes.double()).to(kept.boxes.dtype))
    return torch.cat(voted) if voted else kept.boxes


def _is_cut(spans: Tensor, tile: tuple[int, int], tiles: Sequence[tuple[int, int]], overlap: int) -> Tensor:
    """Which boxes a tile cut while its neighbor on that side holds all that this tile sees of them, along one axis.

    Args:
        spans: (k, 2) start and end of the boxes along the axis, in pixels of the level.
        tile: start and end of the tile that found them.
        tiles: of all tiles along the axis.
    """
    (start, end), low, high = tile, spans[:, 0], spans[:, 1]
    cut = torch.zeros_like(low, dtype=torch.bool)
    if start > tiles[0][0]:
        # The neighbor must not have cut it too, or both would drop it.
        cut |= (low <= start + _TOUCHING) & (high < start + overlap - _TOUCHING)
    if end < tiles[-1][1]:
        cut |= (high >= end - _TOUCHING) & (low > end - overlap + _TOUCHING)
    return cut


def _mirror(detections: Detections, width: int) -> Detections:
    x1, y1, x2, y2 = detections.boxes.unbind(dim=1)
    return detections._replace(boxes=torch.stack([width - x2, y1, width - x1, y2], dim=1))


def _concatenate(parts: Sequence[Detections]) -> Detections:
    """Without their sub-detectors."""
    columns: dict[str, Any] = {}
    for name in parts[0].columns:
        tensors = [part.columns[name] for part in parts]
        columns[name] = None if any(tensor is None for tensor in tensors) else torch.cat(tensors)
    return Detections(**columns)


def _best_first(detections: Detections) -> Detections:
    return detections.select(detections.scores.argsort(descending=True, stable=True))
