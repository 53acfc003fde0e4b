"""What :class:`~group_sampling.detector.FaceDetector` returns, and its picture: boxes colored by anchor scale."""

import colorsys
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from .data.images import read_image, to_rgb
from .data.records import ImageRecord

# A path, an array or tensor as :func:`as_image` describes, or a Pillow image.
ImageLike = str | os.PathLike | np.ndarray | Tensor | Image.Image

_FONT = os.path.join(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
_MAX_LABELED = 40  # faces in a picture; the scores of more would hide them
_MIN_LABELED_SIDE = 2.6  # times the font's size: the score would hide a smaller face


class Face(NamedTuple):
    """One row of :class:`Faces`."""

    box: tuple[float, float, float, float]  # XYXY in pixels of the image
    score: float
    class_name: str
    anchor_scale: float | None  # in pixels of the image as the detector saw it


@dataclass(frozen=True, eq=False)
class Faces:
    """The k detections of an image, best first.

    Attributes:
        boxes: (k, 4) float32 XYXY in pixels of the upright image.
        scores: (k,) float32 in [0, 1].
        classes: (k,) int64, index into ``class_names``.
        anchor_scales: (k,) float32, scale in pixels of the anchor behind each, in the image as the detector saw it
            (which resizes it); None: the model does not say.
        image_size: (height, width) in pixels.
        class_names: by index, ("face",) for a face detector.
        scales: the anchor scales that the detector has, ascending; they fix the colors.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    anchor_scales: np.ndarray | None
    image_size: tuple[int, int]
    class_names: tuple[str, ...] = ("face",)
    scales: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Face]:
        anchor_scales = [None] * len(self) if self.anchor_scales is None else self.anchor_scales.tolist()
        rows = zip(self.boxes.tolist(), self.scores.tolist(), self.classes.tolist(), anchor_scales)
        for box, score, index, anchor_scale in rows:
            yield Face(tuple(box), score, self.class_names[index], anchor_scale)

    def __repr__(self) -> str:
        height, width = self.image_size
        return f"Faces({len(self)} in {width}x{height} pixels, scores {np.round(self.scores[:3], 3).tolist()} ...)"

    def select(self, index: Any) -> "Faces":
        """The rows of ``index``: indices (n,) in their order, a mask (k,), or a slice."""
        return replace(
            self,
            boxes=self.boxes[index],
            scores=self.scores[index],
            classes=self.classes[index],
            anchor_scales=None if self.anchor_scales is None else self.anchor_scales[index],
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers: ``{"height": ..., "width": ..., "faces": [{"box": [x1, y1, x2, y2], "score": ...}, ...]}``.

        Of every face there are "box", "score", "class" and, where the model says it, "anchor_scale".
        """
        faces = []
        for face in self:
            row = {"box": list(face.box), "score": face.score, "class": face.class_name}
            if face.anchor_scale is not None:
                row["anchor_scale"] = face.anchor_scale
            faces.append(row)
        return {"height": self.image_size[0], "width": self.image_size[1], "faces": faces}

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON; float32 numbers come back bit for bit."""
        return json.dumps(self.to_dict())

    def draw(self, image: ImageLike, *, legend: bool = True) -> Image.Image:
        """A picture of the boxes, each in the color of its anchor scale.

        Lines are as thin as their faces need; scores are written beside faces that are few and large enough.

        Args:
            image: in which the faces were found.
            legend: add a strip below the image with the colors and the number of faces of every scale. Its height
                depends on the image's size and on ``scales``, not on what was found.

        Raises:
            ValueError: the image is of another size.
        """
        pixels = as_image(image)
        if pixels.shape[:2] != self.image_size:
            height, width = pixels.shape[:2]
            expected = f"{self.image_size[1]}x{self.image_size[0]}"
            raise ValueError(f"draw: expected the image of these faces, {expected} pixels, got {width}x{height}")
        canvas = torch.tensor(pixels).permute(2, 0, 1)
        sides = (self.boxes[:, 2:] - self.boxes[:, :2]).min(axis=1, initial=np.inf)
        font_size = _font_size(self.image_size[1])
        thickest = max(2, round(min(self.image_size) / 200))
        widths = np.clip(sides / 12, 1, thickest).round().astype(int)
        for width in sorted(set(widths.tolist()), reverse=True):  # small faces above large ones
            rows = np.flatnonzero(widths == width)
            is_labeled = (len(self) <= _MAX_LABELED) & (sides[rows] >= _MIN_LABELED_SIDE * font_size)
            colors = [self._color(row) for row in rows.tolist()]
            canvas = draw_bounding_boxes(
                canvas,
                torch.from_numpy(self.boxes[rows]),
                labels=[f"{self.scores[row]:.2f}" if named else None for row, named in zip(rows, is_labeled)],
                colors=colors,
                label_colors=["black" if _is_light(color) else "white" for color in colors],
                width=width,
                font=_FONT,
                font_size=font_size,
                fill_labels=True,
            )
        picture = Image.fromarray(np.ascontiguousarray(canvas.permute(1, 2, 0).numpy()))
        return self._add_legend(picture) if legend else picture

    def _color(self, row: int) -> tuple[int, int, int]:
        return scale_color(self.scales, None if self.anchor_scales is None else float(self.anchor_scales[row]))

    def _add_legend(self, picture: Image.Image) -> Image.Image:
        size = _font_size(picture.width)
        font = ImageFont.truetype(_FONT, size)
        values = [None] if self.anchor_scales is None else list(self.scales)
        counts = [
            len(self) if value is None else int((self.anchor_scales == np.float32(value)).sum()) for value in values
        ]
        entries = [
            ("faces" if value is None else f"{value:g} px", count, scale_color(self.scales, value))
            for value, count in zip(values, counts)
        ]
        # Columns wide enough for any count, so that the strip is the same for every frame of a video.
        column = size * 2 + round(max(font.getlength(f"{text}: 0000") for text, _, _ in entries)) + size
        columns = max(1, min(len(entries), picture.width // column))
        line, lines = round(size * 1.6), -(-len(entries) // columns)
        result = Image.new("RGB", (picture.width, picture.height + line * lines + size // 2), "white")
        result.paste(picture, (0, 0))
        draw = ImageDraw.Draw(result)
        for index, (text, count, color) in enumerate(entries):
            x = size // 2 + index % columns * column
            y = picture.height + size // 3 + index // columns * line
            draw.rectangle((x, y + size // 6, x + size, y + size // 6 + size), fill=color)
            draw.text((x + round(size * 1.5), y), f"{text}: {count}", fill="black", font=font)
        return result


def _font_size(width: int) -> int:
    """Pixels; legible when a picture of ``width`` pixels is shown 600 pixels wide."""
    return min(max(10, round(width / 55)), 120)


def _is_light(color: tuple[int, int, int]) -> bool:
    red, green, blue = color
    return 0.299 * red + 0.587 * green + 0.114 * blue > 140  # luma, ITU-R BT.601


def scale_color(scales: tuple[float, ...], scale: float | None) -> tuple[int, int, int]:
    """RGB in 0 ... 255: hues from red for the smallest scale to violet for the largest; red without a scale."""
    position = scales.index(scale) / max(len(scales) - 1, 1) if scale in scales else 0.0
    red, green, blue = colorsys.hsv_to_rgb(0.8 * position, 1.0, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def as_image(image: ImageLike) -> np.ndarray:
    """An image as (H, W, 3) uint8 RGB.

    Args:
        image: a path (turned upright by its EXIF orientation); a Pillow image of any mode, turned upright too; an array
            (H, W, 3) or (H, W), or a tensor (3, H, W) or (1, H, W): RGB or gray, uint8 in 0 ... 255 or float in [0, 1].

    Raises:
        UnreadableImageError: the file cannot be read.
        TypeError, ValueError: not an image, or of another type, shape or range.
    """
    if isinstance(image, str | os.PathLike):
        nothing = np.zeros(0, dtype=np.int64)
        path = os.fspath(image)
        record = ImageRecord(path, path, None, None, np.zeros((0, 4), np.float32), nothing, nothing.astype(bool))
        return read_image(record)
    if isinstance(image, Image.Image):
        return to_rgb(ImageOps.exif_transpose(image), image.format)
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] not in (1, 3):
            raise ValueError(f"image: expected a tensor (3, H, W) or (1, H, W), got {tuple(image.shape)}")
        array = image.detach().cpu().permute(1, 2, 0).numpy()
    elif isinstance(image, np.ndarray):
        array = image[:, :, None] if image.ndim == 2 else image
        if array.ndim != 3 or array.shape[2] not in (1, 3):
            raise ValueError(f"image: expected an array (H, W, 3) or (H, W), got {image.shape}")
    else:
        raise TypeError(
            f"image: expected a path, a NumPy array, a tensor or a Pillow image, got {type(image).__name__}"
        )
    if not array.size:
        raise ValueError(f"image: expected at least one pixel, got {array.shape[:2]}")
    if array.dtype != np.uint8:
        if array.dtype.kind != "f":
            raise TypeError(f"image: expected uint8 in 0 ... 255 or float in [0, 1], got {array.dtype}")
        low, high = float(array.min()), float(array.max())
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"image: expected float values in [0, 1], got {low:g} ... {high:g}; convert 0 ... 255 to uint8"
            )
        array = (array * 255).round().astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))
