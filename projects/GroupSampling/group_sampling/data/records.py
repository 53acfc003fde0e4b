"""What every data set becomes: a list of :class:`ImageRecord`, and a report of what had to be left out.

Shape shorthand: m boxes of one image; m may be 0 (a background image is valid).
Boxes are XYXY in absolute pixels of the upright image, width = x2 - x1, float32.
"""

import os
import posixpath
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import UserError
from ..files import safe_relative_path


class AnnotationError(UserError, ValueError):
    """An annotation file does not follow its format. The message names the file and the line or id."""


class UnreadableImageError(UserError, RuntimeError):
    """An image cannot be used; ``file`` and ``reason`` say which and why."""

    def __init__(self, file: str, reason: str = "") -> None:
        # A DataLoader re-raises a worker's error with the finished message as its only argument.
        super().__init__(f"cannot read image {file}: {reason}" if reason else file)
        self.file = file
        self.reason = reason


@dataclass(frozen=True, eq=False)  # eq: comparing arrays with == has no truth value
class ImageRecord:
    """One image of a data set and its annotations.

    Attributes:
        file_name: path, or the ``synthetic://`` address of a procedural image.
        image_id: unique in the set; WIDER FACE: ``"<event>/<stem>"``, COCO format: the image's id as a string.
        height, width: in pixels of the upright image; None where the annotations do not say.
        boxes: (m, 4) float32 XYXY.
        classes: (m,) int64, index into ``class_names``.
        ignore: (m,) bool, True for regions that are neither face nor background (WIDER "invalid", COCO "iscrowd").
        is_raw: the boxes are of the pixels as they are stored, before the EXIF orientation; the image is read so.
        annotation: the annotation in full, for a protocol that evaluates more than the boxes:
            :class:`~group_sampling.data.coco.CocoObjects`, :class:`~group_sampling.data.fddb.FDDBImage`, or None.
    """

    file_name: str
    image_id: str
    height: int | None
    width: int | None
    boxes: np.ndarray
    classes: np.ndarray
    ignore: np.ndarray
    annotation: Any = None
    is_raw: bool = False


ZERO_AREA = "zero area"
INVERTED = "inverted (negative width or height)"
NON_FINITE = "not finite"
OUTSIDE = "outside the image"
FAR = "nearly all of it outside the image"
CLIPPED = "clipped to the image"
_DROPPED = (ZERO_AREA, INVERTED, NON_FINITE, OUTSIDE, FAR)
# A box with less of its area inside is a slip of the annotations (0 0 1000000000 20), and what clipping leaves of it no
# face. All 199,090 boxes of WIDER FACE are inside by more.
_MIN_INSIDE = 0.05
# In pixels; float32 holds every pixel up to here. Of an image whose size is not known, no box can reach further.
_MAX_COORDINATE = 2**24
_NUM_EXAMPLES = 3
_MIN_BOXES = 5  # of which most can be meant
_TINY = 2.0  # pixels


@dataclass
class DataReport:
    """What a parser dropped or changed, with the first few places of each kind.

    Attributes:
        num_images, num_boxes: read from the annotations; ``num_boxes`` includes the dropped ones.
        num_ignore: boxes kept as ignore regions.
        num_tiny: boxes under two pixels in both directions.
        counts: number of boxes for each of ``ZERO_AREA``, ``INVERTED``, ``NON_FINITE``, ``OUTSIDE``, ``FAR`` (dropped)
            and ``CLIPPED`` (kept); under another kind, how often the file was not as its format has it, and understood.
        examples: the first places of each kind, as "file:line" or "file: annotation id".
    """

    num_images: int = 0
    num_boxes: int = 0
    num_ignore: int = 0
    num_tiny: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def num_dropped(self) -> int:
        return sum(self.counts[kind] for kind in _DROPPED)

    def note(self, kind: str, place: str) -> None:
        """Count one finding of ``kind`` at ``place``."""
        self.counts[kind] += 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < _NUM_EXAMPLES:
            examples.append(place)

    def summary(self) -> str:
        """A sentence for the log, then one line for each kind of finding."""
        lines = [
            f"{self.num_images:,} images, {self.num_boxes:,} boxes ({self.num_ignore:,} to be ignored), "
            f"{self.num_dropped:,} dropped, {self.counts[CLIPPED]:,} clipped"
        ]
        for kind, places in self.examples.items():
            verb = "kept" if kind == CLIPPED else "dropped" if kind in _DROPPED else "understood"
            more = ", ..." if self.counts[kind] > len(places) else ""
            lines.append(f"  {verb}, {kind}: {self.counts[kind]:,} ({', '.join(places)}{more})")
        return "\n".join([*lines, *(f"  {hint}" for hint in self.hints())])

    def hints(self) -> list[str]:
        """What most of the boxes suggest that the file means, if it is not pixels."""
        if self.num_boxes < _MIN_BOXES:
            return []
        found = []
        if self.num_tiny > self.num_boxes / 2:
            found.append(
                f"most boxes ({self.num_tiny:,} of {self.num_boxes:,}) are under two pixels: are they shares of the "
                "image's sides? Expected are pixels"
            )
        beyond = self.counts[OUTSIDE] + self.counts[FAR] + self.counts[CLIPPED]
        if beyond > self.num_boxes / 2:
            found.append(
                f"most boxes ({beyond:,} of {self.num_boxes:,}) reach out of their image: are they x1 y1 x2 y2, or of "
                "another size of the images? Expected are x y width height"
            )
        return found


def usable_boxes(
    xywh: ArrayLike, size: tuple[int, int] | None, places: Sequence[str], report: DataReport
) -> tuple[np.ndarray, np.ndarray]:
    """Turn the annotated (x, y, width, height) of one image into the XYXY boxes that a face can be learned from.

    Args:
        xywh: (m, 4).
        size: (height, width) of the image. With it, boxes are clipped to the image, and dropped when next to nothing
            is left (:func:`far_outside`); else, when they reach further than any image.
        places: where each box was found, for the report.

    Returns:
        (boxes, kept): (k, 4) float32, and (k,) int64 indices into ``xywh``.
    """
    corners = np.asarray(xywh, dtype=np.float64).reshape(-1, 4).copy()
    with np.errstate(over="ignore", invalid="ignore"):
        inverted = (corners[:, 2:] < 0).any(axis=1)
        corners[:, 2:] += corners[:, :2]
        # Judged in float32, since that is what the record holds: 1e39 becomes inf there, and 1e9 + 1 becomes 1e9.
        boxes = corners.astype(np.float32)
    if size is None:
        clipped, far = boxes, (np.abs(boxes) > _MAX_COORDINATE).any(axis=1)
    else:
        clipped = boxes.clip(0, np.array([size[1], size[0]] * 2, dtype=np.float32))
        far = far_outside(boxes, *size)
    findings = (  # the first that holds is the one reported
        (NON_FINITE, ~np.isfinite(boxes).all(axis=1)),
        (INVERTED, inverted),
        (ZERO_AREA, (boxes[:, 2:] <= boxes[:, :2]).any(axis=1)),
        (OUTSIDE, (clipped[:, 2:] <= clipped[:, :2]).any(axis=1)),
        (FAR, far),
        (CLIPPED, (clipped != boxes).any(axis=1)),
    )
    report.num_boxes += len(boxes)
    with np.errstate(invalid="ignore"):
        sides = boxes[:, 2:] - boxes[:, :2]
    report.num_tiny += int(((sides > 0) & (sides < _TINY)).all(axis=1).sum())
    dropped = np.zeros(len(boxes), dtype=bool)
    for kind, found in findings:
        for index in np.flatnonzero(found & ~dropped).tolist():
            report.note(kind, places[index])
        if kind in _DROPPED:
            dropped |= found
    kept = np.flatnonzero(~dropped)
    return clipped[kept], kept


def far_outside(boxes: np.ndarray, height: float, width: float) -> np.ndarray:
    """(m,) bool: of which of (m, 4) XYXY boxes less than a twentieth of the area is inside the image, or nothing.

    Empty, inverted and not finite boxes are among them.
    """
    corners = np.where(np.isfinite(boxes), boxes, 0).astype(np.float64)
    inside = corners.clip(0, [width, height] * 2)
    area, area_inside = ((x[:, 2:] - x[:, :2]).clip(0).prod(axis=1) for x in (corners, inside))
    return (area_inside == 0) | (area_inside < _MIN_INSIDE * area) | ~np.isfinite(boxes).all(axis=1)


def fit_exchanged_sides(boxes: np.ndarray, height: int, width: int) -> bool:
    """Whether (m, 4) XYXY boxes reach out of an image and fit into it once its sides are exchanged.

    They are then likely of the picture in its other orientation, before or after EXIF turned it.
    """
    if not len(boxes) or height == width:
        return False
    right, bottom = boxes[:, 2].max() - 1, boxes[:, 3].max() - 1  # a pixel of tolerance
    return bool((right > width or bottom > height) and right <= height and bottom <= width)


def clean_path(path: str) -> str:
    """A path as this system writes it: "/" for "\\", and no ".." that comes back."""
    return posixpath.normpath(path.replace("\\", "/")) if path else path


class ImageRoot:
    """Joins the relative paths of an annotation file to a folder, and lets none of them leave it."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = os.fspath(root)
        self._real_root = os.path.realpath(self._root)
        self._checked_folders: set[str] = set()

    def relative(self, path: str, place: str) -> PurePosixPath:
        """``path`` as it is below the root; it may have "\\" for "/", and ".." that come back into the root.

        Raises:
            AnnotationError: ``path`` is empty, absolute or leaves the root, or has a NUL.
        """
        windows = PureWindowsPath(path)
        if not path or "\0" in path:
            problem = "it is empty" if not path else "it has a NUL character"
        elif os.path.isabs(path) or windows.drive or windows.root:
            problem = "it is absolute; expected it relative to the image folder"
        else:
            root = os.path.abspath(self._root)
            inside = safe_relative_path(os.path.relpath(os.path.join(root, clean_path(path)), root))
            if inside is not None and inside.parts:
                return inside
            problem = f"it leaves {self._root}"
        raise AnnotationError(f"{place}: expected an image path below the image folder, got {path!r}: {problem}")

    def join(self, path: str, place: str) -> str:
        """Return the path of the file that ``path`` is below the root.

        Raises:
            AnnotationError: as :meth:`relative`, or a link on it leaves the root.
        """
        relative = self.relative(path, place)
        full = os.path.join(self._root, *relative.parts)
        # A folder is resolved once, a file only if it is a link: a system call per path instead of one per part.
        folder = os.path.dirname(full)
        if folder not in self._checked_folders:
            self._refuse_outside(folder, path, place)
            self._checked_folders.add(folder)
        if os.path.islink(full):
            self._refuse_outside(full, path, place)
        return full

    def _refuse_outside(self, full: str, path: str, place: str) -> None:
        real = os.path.realpath(full)
        if os.path.commonpath([real, self._real_root]) != self._real_root:
            raise AnnotationError(f"{place}: expected an image below {self._root}, got {path!r}, a link to {real}")
