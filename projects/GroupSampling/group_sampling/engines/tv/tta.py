"""The image pyramid around a torchvision detector."""

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from ...detections import Detections
from ..build import build_pyramid
from .model import from_detections, to_detections


class GroupSamplingTTA(nn.Module):
    """A detector that looks at its images on the image pyramid of ``TEST.PYRAMID``.

    Takes and returns what ``model`` does in eval mode: a list of (3, H, W) images with integral values in [0, 255], at
    their original size; per image "boxes", "scores", "labels" and "anchor_scales", best first, in pixels of that image,
    and where the model has them "sub_detectors".
    """

    def __init__(self, cfg: CfgNode, model: nn.Module):
        super().__init__()
        self.model = model
        self.pyramid = build_pyramid(cfg)
        self.training = model.training

    @torch.no_grad()
    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [self._detect_image(image) for image in images]

    def _detect_image(self, image: Tensor) -> dict[str, Tensor]:
        def detect(tile: np.ndarray) -> Detections:
            return to_detections(self.model([torch.from_numpy(tile).to(image.device).permute(2, 0, 1).float()])[0])

        return from_detections(self.pyramid(image.to(torch.uint8).permute(1, 2, 0).cpu().numpy(), detect))
