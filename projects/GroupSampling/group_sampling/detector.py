"""A trained detector in three lines, on either engine, without a config in sight."""

import importlib
import os
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torchvision.ops import clip_boxes_to_image

from .checkpoint import read_description, saved_config
from .config import ConfigError, anchor_scales
from .detections import Detections
from .engines.build import Detect, build_pyramid, build_test_transform
from .env import resolve_engine
from .faces import Faces, ImageLike, as_image

# By name, so that the engine that is not used need not be installed.
ENGINE_MODULES = {"detectron2": "group_sampling.engines.d2.detect", "torchvision": "group_sampling.engines.tv.detect"}


class FaceDetector:
    """Finds faces in images.

        detector = FaceDetector.from_checkpoint("model_final.pth")
        faces = detector("photo.jpg")
        faces.draw("photo.jpg").save("found.jpg")

    Attributes:
        engine: "detectron2" or "torchvision".
        cfg: its config; ``TEST.PYRAMID.SCALES`` are the scales of the image pyramid, empty for a single one.
        class_names: by class index.
        score_thresh: detections below it are left out.
        batch_size: images that go through the model at once, if they are of one size.
    """

    def __init__(
        self,
        cfg: CfgNode,
        detect: Detect,
        *,
        engine: str,
        class_names: Sequence[str] = ("face",),
        score_thresh: float = 0.5,
        batch_size: int = 1,
    ) -> None:
        if not 0 <= score_thresh <= 1:
            raise ValueError(f"score_thresh: expected a score in [0, 1], got {score_thresh}")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1 image, got {batch_size}")
        self.engine = engine
        self.class_names = tuple(class_names)
        self.score_thresh = score_thresh
        self.batch_size = batch_size
        self._detect = detect
        self._configure(cfg)

    def _configure(self, cfg: CfgNode) -> None:
        self.cfg = cfg
        self._scales = anchor_scales(cfg)
        self._transform = build_test_transform(cfg)
        self._pyramid = build_pyramid(cfg) if cfg.TEST.PYRAMID.SCALES else None

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike,
        *,
        engine: str = "auto",
        device: str | None = None,
        score_thresh: float = 0.5,
        scales: Sequence[float] | None = None,
        flip: bool = False,
        batch_size: int = 1,
        config_file: str = "",
        opts: Sequence[str] = (),
    ) -> "FaceDetector":
        """A detector from a file that a training of either engine has written.

        Args:
            engine: "detectron2", "torchvision", or "auto": Detectron2 where it is installed.
            device: "cpu", "cuda", "cuda:1", ...; None: MODEL.DEVICE of ``opts``, else a GPU if
                torch sees one.
            score_thresh: detections of a lower score are left out.
            scales: factors of the image pyramid's levels; None: those of the config, a single scale normally.
            flip: look at the mirror image of every level as well; needs ``scales``.
            config_file: of the training; needed for files that do not carry it.
            opts: KEY VALUE pairs of the config.

        Raises:
            ConfigError: no such file, it carries no config, or the config does not fit the weights or this machine.
            ValueError: not a checkpoint, or an argument out of range.
            ModuleNotFoundError: the engine is not installed.
        """
        path = os.fspath(path)
        if not os.path.isfile(path):
            raise ConfigError(f"{path}: expected a checkpoint of a training, got no such file")
        engine = resolve_engine(engine)
        if flip and scales is None:
            raise ValueError("flip: expected scales as well, for example scales=(1.0,)")
        saved = saved_config(config_file, path, needed_by="the weights")
        first = ["MODEL.DEVICE", "cuda" if torch.cuda.is_available() else "cpu"]
        # Faces have no lists of sub-detectors.
        last = ["MODEL.WEIGHTS", "", "TEST.SUB_DETECTORS", "False", *(["MODEL.DEVICE", device] if device else [])]
        module = importlib.import_module(ENGINE_MODULES[engine])
        cfg = module.load_config(config_file, [*first, *opts, *last], saved=saved)
        heads = cfg.MODEL.ROI_HEADS
        heads.SCORE_THRESH_TEST = min(heads.SCORE_THRESH_TEST, score_thresh)
        if scales is not None:
            cfg = with_pyramid(cfg, scales, flip)
        return cls(
            cfg,
            module.load_detector(cfg, path),
            engine=engine,
            class_names=read_description(path).class_names or ("face",),
            score_thresh=score_thresh,
            batch_size=batch_size,
        )

    def with_scales(self, scales: Sequence[float], flip: bool = False) -> "FaceDetector":
        """The same detector on another image pyramid; () for the single-scale test. The model is shared."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._configure(with_pyramid(self.cfg, scales, flip))
        return other

    def __call__(self, images: ImageLike | Sequence[ImageLike]) -> Faces | list[Faces]:
        """Find the faces of an image, or of each of several.

        Args:
            images: one image, see :func:`~group_sampling.faces.as_image`, or a list or tuple of them, or a tensor
                (B, 3, H, W). No more than ``batch_size`` are decoded at a time.

        Returns:
            Of an image its :class:`~group_sampling.faces.Faces`, of several a list of them.

        Raises:
            UnreadableImageError: a file cannot be read.
            TypeError, ValueError: an image of another type, shape or range.
        """
        if isinstance(images, torch.Tensor) and images.ndim == 4:
            images = list(images)
        if not isinstance(images, list | tuple):
            return self._detect_batch([as_image(cast(ImageLike, images))])[0]  # as_image refuses what is none
        found = []
        for start in range(0, len(images), self.batch_size):
            found += self._detect_batch([as_image(image) for image in images[start : start + self.batch_size]])
        return found

    @torch.no_grad()
    def _detect_batch(self, images: list[np.ndarray]) -> list[Faces]:
        """Of (H, W, 3) uint8 images; those of one size go through the model together, so that none is padded."""
        if self._pyramid:
            return [
                self._to_faces(
                    self._pyramid(image, lambda tile: self._detect([np.require(tile, requirements=["C", "W"])])[0]),
                    image.shape[:2],
                )
                for image in images
            ]
        # Writable, as torch.from_numpy wants it: Pillow's arrays are not.
        resized = [np.require(self._transform.apply_image(image), requirements=["C", "W"]) for image in images]
        found: dict[int, Faces] = {}
        for shape in dict.fromkeys(image.shape for image in resized):
            indices = [index for index, image in enumerate(resized) if image.shape == shape]
            for index, detections in zip(indices, self._detect([resized[index] for index in indices])):
                height, width = images[index].shape[:2]
                factors = detections.boxes.new_tensor([width / shape[1], height / shape[0]] * 2)
                boxes = clip_boxes_to_image(detections.boxes * factors, (height, width))
                found[index] = self._to_faces(detections._replace(boxes=boxes), (height, width))
        return [found[index] for index in range(len(images))]

    def _to_faces(self, detections: Detections, size: tuple[int, int]) -> Faces:
        has_area = (detections.boxes[:, 2:] > detections.boxes[:, :2]).all(dim=1)
        found = detections.select(has_area & (detections.scores >= self.score_thresh)).numpy()
        columns = found.boxes, found.scores, found.classes, found.anchor_scales
        return Faces(*columns, size, self.class_names, self._scales)


def with_pyramid(cfg: CfgNode, scales: Sequence[float], flip: bool) -> CfgNode:
    """A copy of ``cfg`` with these levels; () is the single-scale test."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.TEST.PYRAMID.SCALES = tuple(scales)
    cfg.TEST.PYRAMID.FLIP = flip
    return cfg
