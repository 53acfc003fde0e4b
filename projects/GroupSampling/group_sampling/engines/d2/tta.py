"""The image pyramid as Detectron2's test-time augmentation."""

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ...detections import Detections
from ..build import build_pyramid
from .rcnn import to_detections


class GroupSamplingTTA(nn.Module):
    """A detector that looks at its images on the image pyramid of ``TEST.PYRAMID``.

    Its inputs and outputs are those of ``model`` in eval mode, as with ``GeneralizedRCNNWithTTA``, so it goes wherever
    the model goes: ``inference_on_dataset`` with any evaluator, or ``predictor.model = GroupSamplingTTA(cfg,
    predictor.model)`` for a ``DefaultPredictor``. Of the outputs, ``pred_boxes``, ``scores``, ``pred_classes`` and,
    where the model has them, ``anchor_scales`` and "sub_detectors" are kept; masks and keypoints are not.

    The levels are made of the ``image`` of an input, which should have its original pixels:
    :class:`~group_sampling.engines.d2.data.GroupSamplingMapper` leaves images as they are when ``TEST.PYRAMID.SCALES``
    is set.

    Args:
        cfg: ``TEST.PYRAMID``, and the keys of the single-scale test.
        model: any detector with ``GeneralizedRCNN``'s interface.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module):
        super().__init__()
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.pyramid = build_pyramid(cfg)
        self.training = self.model.training

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        return [self._detect_image(x) for x in batched_inputs]

    def _detect_image(self, x: dict) -> dict:
        image = x["image"].to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        size = x.get("height", image.shape[0]), x.get("width", image.shape[1])
        found = self.pyramid(image, self._detect_tile, size)
        output = {"instances": _to_instances(found, size)}
        if found.sub_detectors is not None:
            by_scale = found.sub_detectors.items()
            output["sub_detectors"] = {scale: _to_instances(alone, size) for scale, alone in by_scale}
        return output

    def _detect_tile(self, tile: np.ndarray) -> Detections:
        return to_detections(self.model([{"image": torch.from_numpy(tile).permute(2, 0, 1)}])[0])


def _to_instances(found: Detections, size: tuple[int, int]) -> Instances:
    instances = Instances(size, pred_boxes=Boxes(found.boxes), scores=found.scores, pred_classes=found.classes)
    if found.anchor_scales is not None:
        instances.anchor_scales = found.anchor_scales
    return instances
