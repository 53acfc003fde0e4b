"""A trained detector of this engine for :class:`~group_sampling.detector.FaceDetector`."""

import numpy as np
import torch
from fvcore.common.config import CfgNode

from ...detections import Detections
from ..build import Detect
from .config import load_config
from .model import build_model, to_detections
from .train import GroupSamplingCheckpointer

__all__ = ["load_config", "load_detector"]


def load_detector(cfg: CfgNode, weights: str) -> Detect:
    """The detector of a checked config with the weights of a file, of either engine.

    Raises:
        ConfigError, ValueError: the file does not fit the config, or is no checkpoint.
    """
    model = build_model(cfg).to(cfg.MODEL.DEVICE).eval()
    GroupSamplingCheckpointer(model).load(weights)

    def detect(images: list[np.ndarray]) -> list[Detections]:
        inputs = [torch.from_numpy(image).permute(2, 0, 1).to(cfg.MODEL.DEVICE) for image in images]
        return list(map(to_detections, model(inputs)))

    return detect
