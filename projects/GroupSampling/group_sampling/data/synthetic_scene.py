"""What a procedural image consists of, and the settings of the procedural data sets."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

DISTRACTORS = ("blank", "scrambled", "upside_down", "ball")


@dataclass(frozen=True)
class Settings:
    """The configuration's ``DATASETS.SYNTHETIC``, in capitals there.

    Attributes:
        num_train, num_val: number of images of the splits.
        height, width: of every image, in pixels.
        seed: images of another seed have nothing in common with these.
    """

    num_train: int
    num_val: int
    height: int
    width: int
    seed: int

    def __post_init__(self) -> None:
        for key, value in asdict(self).items():
            lowest = {"height": 32, "width": 32}.get(key, 0)
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                raise ValueError(f"DATASETS.SYNTHETIC.{key.upper()}: expected an integer >= {lowest}, got {value!r}")

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> "Settings":
        """Read the keys, in capitals; raises ValueError for an unknown or missing one."""
        known = [field.name.upper() for field in fields(cls)]
        for key in sorted(mapping.keys() ^ known):
            got = "no" if key in known else "the unknown"
            raise ValueError(f"DATASETS.SYNTHETIC: expected the keys {', '.join(known)}, got {got} {key}")
        return cls(**{key.lower(): value for key, value in mapping.items()})


@dataclass(frozen=True)
class Shape:
    """An ellipse or a rectangle, in pixels: center, half axes, angle in radians (clockwise on the screen)."""

    x: float
    y: float
    half_width: float
    half_height: float
    angle: float = 0.0
    is_ellipse: bool = True

    def at(self, points: np.ndarray) -> np.ndarray:
        """Positions in the image of (k, 2) points given on the shape's own axes, on which it reaches from -1 to 1."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        u, v = points[:, 0] * self.half_width, points[:, 1] * self.half_height
        return np.stack([self.x + u * cos - v * sin, self.y + u * sin + v * cos], axis=1)

    def bounding_box(self) -> tuple[float, float, float, float]:
        """XYXY of an ellipse."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        dx = math.hypot(self.half_width * cos, self.half_height * sin)
        dy = math.hypot(self.half_width * sin, self.half_height * cos)
        return self.x - dx, self.y - dy, self.x + dx, self.y + dy


@dataclass(frozen=True)
class Figure:
    """Something with a head, or nearly.

    Attributes:
        kind: "face", or one of ``DISTRACTORS``.
        head: ellipse from forehead to chin; hair may stand out of it.
        body: drawn before the head, None: a floating head.
        occluder: drawn after the head, None: nothing is held before it.
    """

    kind: str
    head: Shape
    body: Shape | None
    occluder: Shape | None


@dataclass(frozen=True)
class Scene:
    """Figures in the order in which they are painted: far to near, small to large."""

    height: int
    width: int
    figures: tuple[Figure, ...]

    def boxes(self) -> np.ndarray:
        """(m, 4) float32 XYXY: the bounding boxes of the faces' heads, clipped to the image."""
        boxes = [figure.head.bounding_box() for figure in self.figures if figure.kind == "face"]
        limits = np.array([self.width, self.height] * 2, dtype=np.float32)
        return np.asarray(boxes, dtype=np.float32).reshape(-1, 4).clip(0, limits)
