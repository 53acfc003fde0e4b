"""Augmentation geometry and the resize of test images.

Boxes are XYXY in absolute pixels, float32; images are (H, W, 3) uint8.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from .records import far_outside


@dataclass(frozen=True)
class Geometry:
    """One draw of the augmentation.

    Attributes:
        scale: factor of the whole image.
        crop: (x0, y0, x1, y1) in pixels of the scaled image, integers.
        flip: left and right exchanged after the crop.
    """

    scale: float
    crop: tuple[int, int, int, int]
    flip: bool


class Sample(NamedTuple):
    """A transformed image with its annotations, in pixels of the transformed image.

    ``boxes`` (m, 4) float32 with ``classes`` (m,) int64, and ``ignore_boxes`` (k, 4) float32.
    """

    image: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray
    ignore_boxes: np.ndarray


class TrainTransform:
    """Scale jitter, random crop and horizontal flip (paper, Sec. 5).

    Args:
        scales: factors to draw from, each as likely as the others.
        crop_size: largest (height, width) of the result. A smaller image stays as it is: nothing is padded.
        flip_prob: probability of the horizontal flip.
        min_visible: a face is dropped when less than this share of it is inside the crop. An ignore region stays as
            long as any of it is inside.
    """

    def __init__(
        self,
        scales: Sequence[float],
        crop_size: tuple[int, int] = (1200, 1200),
        flip_prob: float = 0.5,
        min_visible: float = 0.5,
    ) -> None:
        if not scales or not all(0 < scale < float("inf") for scale in scales):
            raise ValueError(f"scales: expected positive finite factors, got {scales}")
        if len(crop_size) != 2 or min(crop_size) < 1:
            raise ValueError(f"crop_size: expected (height, width) of at least 1 pixel, got {crop_size}")
        if not 0 <= flip_prob <= 1:
            raise ValueError(f"flip_prob: expected a probability, got {flip_prob}")
        if not 0 <= min_visible <= 1:
            raise ValueError(f"min_visible: expected a share in [0, 1], got {min_visible}")
        self.scales = tuple(float(scale) for scale in scales)
        self.crop_size = (int(crop_size[0]), int(crop_size[1]))
        self.flip_prob = flip_prob
        self.min_visible = min_visible

    def draw_scale(self, rng: np.random.Generator) -> float:
        """The first draw of :meth:`sample`, which needs no image."""
        return self.scales[rng.integers(len(self.scales))]

    def sample(self, height: int, width: int, rng: np.random.Generator) -> Geometry:
        """Draw the geometry for an image of (height, width) pixels."""
        scale = self.draw_scale(rng)
        flip = bool(rng.random() < self.flip_prob)
        scaled_height, scaled_width = _scaled_size(height, width, scale)
        crop_height, crop_width = min(self.crop_size[0], scaled_height), min(self.crop_size[1], scaled_width)
        x0 = int(rng.integers(scaled_width - crop_width + 1))
        y0 = int(rng.integers(scaled_height - crop_height + 1))
        return Geometry(scale, (x0, y0, x0 + crop_width, y0 + crop_height), flip)

    def apply_image(self, image: np.ndarray, geometry: Geometry, size: tuple[int, int] | None = None) -> np.ndarray:
        """Crop, resize and flip ``image``, (H, W, 3) uint8; return (y1 - y0, x1 - x0, 3).

        Args:
            size: (height, width) that ``geometry`` is of, if ``image`` was decoded at a fraction of it.

        Only the pixels inside the crop are computed. They are those of resizing the whole image and cropping then
        (Pillow's antialiased bilinear filter reads across the crop's border). With the paper's scales and crop on the
        12,880 image sizes of WIDER FACE's training set that is 0.86 instead of 1.45 megapixels on average.
        """
        height, width = image.shape[:2]
        full_height, full_width = size or (height, width)
        scaled_height, scaled_width = _scaled_size(full_height, full_width, geometry.scale)
        x0, y0, x1, y1 = geometry.crop
        if (scaled_height, scaled_width) == (height, width):
            result = image[y0:y1, x0:x1]
        else:
            to_x, to_y = width / scaled_width, height / scaled_height
            box = (x0 * to_x, y0 * to_y, min(x1 * to_x, width), min(y1 * to_y, height))
            result = np.array(Image.fromarray(image).resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR, box=box))
        return np.ascontiguousarray(result[:, ::-1] if geometry.flip else result)

    def apply_boxes(
        self, boxes: np.ndarray, geometry: Geometry, height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Move ``boxes`` along with an image of (height, width) pixels; needs no pixels.

        Returns:
            (boxes, keep): (m, 4) float32 clipped to the crop, and (m,) bool. ``keep`` is False where less than
            ``min_visible`` of the box's part inside the image is in the crop, or none of it, or where the box is
            empty, inverted, not finite or :func:`~group_sampling.data.records.far_outside` the image; such a box is
            returned as zeros.
        """
        inside, visible = self._move(boxes, geometry, height, width)
        keep = (visible > 0) & (visible >= self.min_visible)
        return np.where(keep[:, None], inside, np.float32(0)), keep

    def apply_annotations(
        self,
        boxes: np.ndarray,
        ignore: np.ndarray,
        classes: np.ndarray,
        geometry: Geometry,
        height: int,
        width: int,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Move the annotations along with an image of (height, width) pixels; needs no pixels.

        Returns:
            ``boxes``, ``classes`` and ``ignore_boxes`` of :class:`Sample`.
        """
        moved, keep = self.apply_boxes(boxes[~ignore], geometry, height, width)
        moved_ignore, visible = self._move(boxes[ignore], geometry, height, width)
        return moved[keep], classes[~ignore][keep], moved_ignore[visible > 0]

    def __call__(
        self,
        image: np.ndarray,
        boxes: np.ndarray,
        ignore: np.ndarray,
        classes: np.ndarray,
        rng: np.random.Generator,
        size: tuple[int, int] | None = None,
    ) -> Sample:
        """Transform an image and its annotations by one draw from ``rng``.

        Args:
            size: (height, width) that the annotations are of, if ``image`` was decoded at a fraction of it.
        """
        height, width = size or image.shape[:2]
        geometry = self.sample(height, width, rng)
        annotations = self.apply_annotations(boxes, ignore, classes, geometry, height, width)
        return Sample(self.apply_image(image, geometry, (height, width)), *annotations)

    @staticmethod
    def _move(boxes: np.ndarray, geometry: Geometry, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the boxes clipped to the crop, and the share in it of each box's part inside the image."""
        scaled_height, scaled_width = _scaled_size(height, width, geometry.scale)
        x0, y0, x1, y1 = geometry.crop
        factors = np.array([scaled_width / width, scaled_height / height] * 2)
        valid = np.isfinite(boxes).all(axis=1)
        scaled = np.where(valid[:, None], boxes, 0).astype(np.float64) * factors
        in_image = scaled.clip(0, [scaled_width, scaled_height] * 2)
        in_crop = scaled.clip([x0, y0] * 2, [x1, y1] * 2) - [x0, y0] * 2
        if geometry.flip:
            in_crop = np.stack([x1 - x0 - in_crop[:, 2], in_crop[:, 1], x1 - x0 - in_crop[:, 0], in_crop[:, 3]], axis=1)
        area = _area(in_image)
        visible = np.divide(_area(in_crop), area, out=np.zeros(len(boxes)), where=area > 0)
        in_crop = in_crop.astype(np.float32)
        visible[_area(in_crop) == 0] = 0  # a sliver that float32 cannot hold
        visible[far_outside(boxes, height, width)] = 0
        return in_crop, visible


class TestTransform:
    """Resizes so that the shorter side is ``min_size``, unless the longer would exceed ``max_size``, as Detectron2's
    ``ResizeShortestEdge(MIN_SIZE_TEST, MAX_SIZE_TEST)`` does.

    Args:
        min_size: wanted length of the shorter side; 0: images keep their size, whatever ``max_size``.
        max_size: largest length of the longer side.
    """

    __test__ = False  # a name that pytest would collect

    def __init__(self, min_size: int, max_size: int) -> None:
        if min_size < 0 or (min_size > 0 and max_size < 1):
            raise ValueError(f"expected min_size >= 0 and max_size >= 1, got {min_size} and {max_size}")
        self.min_size = min_size
        self.max_size = max_size

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the result for an image of (height, width)."""
        if self.min_size == 0:
            return height, width
        # In Detectron2's order of operations: another one rounds to another pixel now and then.
        scale = self.min_size / min(height, width)
        new_height = float(self.min_size) if height < width else scale * height
        new_width = scale * width if height < width else float(self.min_size)
        if max(new_height, new_width) > self.max_size:
            scale = self.max_size / max(new_height, new_width)
            new_height, new_width = new_height * scale, new_width * scale
        return max(1, int(new_height + 0.5)), max(1, int(new_width + 0.5))

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        """Resize ``image``, (H, W, 3) uint8."""
        height, width = self.output_size(*image.shape[:2])
        if (height, width) == image.shape[:2]:
            return image
        return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))

    def apply_boxes(self, boxes: np.ndarray, height: int, width: int) -> np.ndarray:
        """Scale ``boxes`` along with an image of (height, width) pixels, and clip them to the result."""
        new_height, new_width = self.output_size(height, width)
        scaled = boxes * np.array([new_width / width, new_height / height] * 2)
        return scaled.clip(0, [new_width, new_height] * 2).astype(np.float32)

    def __call__(self, image: np.ndarray, boxes: np.ndarray, ignore: np.ndarray, classes: np.ndarray) -> Sample:
        """Transform an image and all of its annotations."""
        moved = self.apply_boxes(boxes, *image.shape[:2])
        return Sample(self.apply_image(image), moved[~ignore], classes[~ignore], moved[ignore])


def _scaled_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """Size of the scaled image; at least one pixel, so that no crop is ever empty."""
    return max(1, round(height * scale)), max(1, round(width * scale))


def _area(boxes: np.ndarray) -> np.ndarray:
    sides = (boxes[:, 2:] - boxes[:, :2]).clip(0)
    return sides[:, 0] * sides[:, 1]
