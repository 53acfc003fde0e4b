"""Procedural faces, drawn on the fly from a seed: something to detect with nothing to download.

This module lays scenes out; :mod:`~group_sampling.data.synthetic_paint` paints them. An image is named by its address,
``synthetic://<split>/<index>?height=...&width=...&seed=...``, and the address alone determines its boxes and pixels.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from urllib.parse import parse_qsl, urlencode, urlsplit

import numpy as np

from . import synthetic_paint
from .records import AnnotationError, DataReport, ImageRecord
from .synthetic_scene import DISTRACTORS, Figure, Scene, Settings, Shape

_SCHEME = "synthetic"
_SPLITS = ("train", "val")
_GEOMETRY, _PIXELS = range(2)  # the two random streams of an image

MIN_SIZE, MAX_SIZE = 8.0, 400.0  # of a face, sqrt(width * height), in pixels
_MIN_VISIBLE = 0.45  # a face that shows less of itself is not drawn at all
_ASPECT = 1.25  # height / width of an upright head
_CANDIDATES = 8  # places tried for one figure


def records(split: str, settings: Settings, *, report: DataReport | None = None) -> list[ImageRecord]:
    """The images of a split, "train" or "val". Draws layouts, no pixels."""
    height, width, seed = settings.height, settings.width, settings.seed
    query = urlencode({"height": height, "width": width, "seed": seed})
    result = []
    for index in range(settings.num_train if split == "train" else settings.num_val):
        boxes = layout(split, index, height, width, seed).boxes()
        classes, ignore = np.zeros(len(boxes), dtype=np.int64), np.zeros(len(boxes), dtype=bool)
        address = f"{_SCHEME}://{split}/{index}?{query}"
        result.append(ImageRecord(address, f"{split}/{index:06d}", height, width, boxes, classes, ignore))
        if report is not None:
            report.num_images += 1
            report.num_boxes += len(boxes)
    return result


def is_address(file_name: str) -> bool:
    """Whether ``file_name`` names a procedural image."""
    return file_name.startswith(f"{_SCHEME}://")


def render(address: str) -> np.ndarray:
    """Paint the image of ``address``: (height, width, 3) uint8 RGB.

    Raises:
        AnnotationError: it is not the address of a procedural image.
    """
    split, index, height, width, seed = _parse_address(address)
    rng = np.random.default_rng([seed, _SPLITS.index(split), index, _PIXELS])
    return synthetic_paint.paint(layout(split, index, height, width, seed), rng)


def layout(split: str, index: int, height: int, width: int, seed: int) -> Scene:
    """Draw where the figures of an image are.

    Sizes are log-uniform in [MIN_SIZE, MAX_SIZE], or up to what the image can hold. Figures are placed from near to
    far, each where nearer ones leave enough of it to be seen; one that finds no such place is left out.
    """
    rng = np.random.default_rng([seed, _SPLITS.index(split), index, _GEOMETRY])
    num_faces = 0 if rng.random() < 0.03 else int(rng.integers(1, 13))
    num_distractors = int(rng.integers(0, 6))
    kinds = ["face"] * num_faces + [DISTRACTORS[i] for i in rng.integers(len(DISTRACTORS), size=num_distractors)]
    max_size = min(MAX_SIZE, 0.85 * min(height, width * _ASPECT))
    sizes = np.exp(rng.uniform(math.log(MIN_SIZE), math.log(max_size), size=len(kinds)))

    nearest_first: list[Figure] = []
    opaque: list[Shape] = []
    for i in np.argsort(-sizes, kind="stable"):
        figure = _place(kinds[i], float(sizes[i]), height, width, opaque, rng)
        if figure is not None:
            nearest_first.append(figure)
            hair = replace(
                figure.head, half_width=1.12 * figure.head.half_width, half_height=1.12 * figure.head.half_height
            )
            opaque += [shape for shape in (hair, figure.body, figure.occluder) if shape is not None]
    return Scene(height, width, tuple(reversed(nearest_first)))


def _place(
    kind: str, size: float, height: int, width: int, opaque: Sequence[Shape], rng: np.random.Generator
) -> Figure | None:
    """Find a place for a figure whose head has a bounding box of area size²; None: no place shows enough of it."""
    angle = float(np.clip(rng.normal(0, 0.18), -0.5, 0.5))
    head = Shape(0, 0, 1, _ASPECT * math.exp(rng.normal(0, 0.06)), angle)
    _, _, reach_x, reach_y = head.bounding_box()
    scale = size / 2 / math.sqrt(reach_x * reach_y)
    head = replace(head, half_width=scale, half_height=scale * head.half_height)

    centers = rng.uniform(0, 1, size=(_CANDIDATES, 2)) * [width, height]
    visible = _visible_share(head, centers, height, width, opaque)
    wanted = 0.97 if rng.random() < 0.7 else rng.uniform(_MIN_VISIBLE, 0.97)
    enough = visible >= wanted
    chosen = int(np.argmax(enough if enough.any() else visible))  # the first that shows enough, else the best
    if visible[chosen] < _MIN_VISIBLE:
        return None
    x, y = map(float, centers[chosen])
    head = replace(head, x=x, y=y)

    body = None
    if kind != "ball" and rng.random() < 0.75:
        shift = -0.5 * math.sin(angle) * head.half_height
        body = Shape(x + shift, y + 3.15 * head.half_height, 2.0 * head.half_width, 2.1 * head.half_height)
    occluder = None
    if kind == "face" and rng.random() < 0.2:
        held = _occluder(head, rng)
        if _visible_share(head, centers[[chosen]], height, width, [*opaque, held])[0] >= _MIN_VISIBLE:
            occluder = held
    return Figure(kind, head, body, occluder)


def _occluder(head: Shape, rng: np.random.Generator) -> Shape:
    """Something before the lower, left or right part of a head: a scarf, a pole or a ball."""
    kind = ("scarf", "pole", "ball")[rng.integers(3)]
    if kind == "scarf":
        u, v, width, height = 0.0, rng.uniform(0.75, 1.0), 1.1, 0.6
    elif kind == "pole":
        u, v = rng.choice([-1, 1]) * rng.uniform(0.5, 1.0), 0.0
        width, height = rng.uniform(0.2, 0.45), rng.uniform(1.3, 3)
    else:
        u, v = rng.uniform(-1, 1), rng.uniform(0.2, 1.1)
        width = height = rng.uniform(0.4, 0.6)
    x, y = head.at(np.array([[u, v]]))[0].tolist()
    return Shape(x, y, width * head.half_width, height * head.half_height, head.angle, is_ellipse=kind == "ball")


def _visible_share(head: Shape, centers: np.ndarray, height: int, width: int, opaque: Sequence[Shape]) -> np.ndarray:
    """Share of ``head`` inside the image and behind none of ``opaque``, were it at each of (c, 2) ``centers``."""
    x, y = replace(head, x=0.0, y=0.0).at(_disc_points()).T
    x, y = centers[:, :1] + x, centers[:, 1:] + y  # (c, points)
    visible = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    if opaque:
        rows = np.array([(s.x, s.y, s.half_width, s.half_height, s.angle, s.is_ellipse) for s in opaque])
        center_x, center_y, half_width, half_height, angle, is_ellipse = rows.T[..., None, None]  # (shapes, 1, 1) each
        cos, sin = np.cos(angle), np.sin(angle)
        u = np.abs((x - center_x) * cos + (y - center_y) * sin) / half_width
        v = np.abs((y - center_y) * cos - (x - center_x) * sin) / half_height
        hidden = np.where(is_ellipse, u * u + v * v, np.maximum(u, v)) < 1
        visible &= ~hidden.any(axis=0)
    return visible.mean(axis=1)


@functools.cache
def _disc_points(count: int = 48) -> np.ndarray:
    """(count, 2) points spread evenly over the unit disc, on a sunflower's spiral."""
    index = np.arange(count)
    radius, turn = np.sqrt((index + 0.5) / count), index * math.pi * (3 - math.sqrt(5))
    return np.stack([radius * np.cos(turn), radius * np.sin(turn)], axis=1)


def _parse_address(address: str) -> tuple[str, int, int, int, int]:
    """Return (split, index, height, width, seed)."""
    parts = urlsplit(address)
    query = dict(parse_qsl(parts.query))
    try:
        index = int(parts.path.lstrip("/"))
        settings = Settings(0, 0, *(int(query[key]) for key in ("height", "width", "seed")))
        if parts.netloc not in _SPLITS or index < 0:
            raise ValueError
    except (ValueError, KeyError):
        expectation = f"{_SCHEME}://<{'|'.join(_SPLITS)}>/<index>?height=<h>&width=<w>&seed=<s>"
        raise AnnotationError(f"expected an address {expectation}, got {address!r}") from None
    return parts.netloc, index, settings.height, settings.width, settings.seed
