"""A trained detector of this engine for :class:`~group_sampling.detector.FaceDetector`."""

import numpy as np
import torch
from detectron2.modeling import build_model
from torch import Tensor, nn

from ...detections import Detections
from ..build import Detect
from .rcnn import to_detections
from .train import GroupSamplingCheckpointer, load_config

__all__ = ["load_config", "load_detector", "load_model", "to_inputs"]


def load_model(cfg, weights: str) -> nn.Module:
    """The model of a checked config in eval mode, with the weights of a file of either engine; "": random ones.

    Raises:
        ConfigError, ValueError: the file does not fit the config, or is no checkpoint.
    """
    model = build_model(cfg).eval()
    GroupSamplingCheckpointer(model).load(weights)
    return model


def to_inputs(images: Tensor) -> list[dict[str, Tensor]]:
    """What the model takes, of images (B, 3, H, W) uint8 RGB."""
    return [{"image": image} for image in images]


def load_detector(cfg, weights: str) -> Detect:
    """The detector of :func:`load_model`."""
    model = load_model(cfg, weights)

    def detect(images: list[np.ndarray]) -> list[Detections]:
        inputs = [{"image": torch.from_numpy(image).permute(2, 0, 1)} for image in images]
        return list(map(to_detections, model(inputs)))

    return detect
