"""A trained detector of this engine for :class:`~group_sampling.detector.FaceDetector`."""

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from ...detections import Detections
from ..build import Detect
from .config import load_config
from .model import build_model, to_detections
from .train import GroupSamplingCheckpointer

__all__ = ["load_config", "load_detector", "load_model", "to_inputs"]


def load_model(cfg: CfgNode, weights: str) -> nn.Module:
    """The model of a checked config in eval mode, with the weights of a file of either engine; "": random ones.

    Raises:
        ConfigError, ValueError: the file does not fit the config, or is no checkpoint.
    """
    model = build_model(cfg).to(cfg.MODEL.DEVICE).eval()
    GroupSamplingCheckpointer(model).load(weights)
    return model


def to_inputs(images: Tensor) -> list[Tensor]:
    """What the model takes, of images (B, 3, H, W) uint8 RGB on its device."""
    return list(images)


def load_detector(cfg: CfgNode, weights: str) -> Detect:
    """The detector of :func:`load_model`."""
    model = load_model(cfg, weights)

    def detect(images: list[np.ndarray]) -> list[Detections]:
        inputs = [torch.from_numpy(image).permute(2, 0, 1).to(cfg.MODEL.DEVICE) for image in images]
        return list(map(to_detections, model(inputs)))

    return detect
