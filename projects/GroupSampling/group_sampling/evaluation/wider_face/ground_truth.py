"""The official WIDER FACE ground truth: wider_face_val.mat and wider_{easy,medium,hard}_val.mat."""

import itertools
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..mat5 import MatValue, read_mat5

_SUBSETS = ("easy", "medium", "hard")
_FILES = ("wider_face_val.mat", *(f"wider_{subset}_val.mat" for subset in _SUBSETS))
# In WIDER_FACE: the folder itself, or the evaluation code unpacked as it is published.
_FOLDERS = ("ground_truth", "eval_tools/ground_truth")


class OfficialGroundTruth(NamedTuple):
    """Annotation of the validation set, by image id ``<event>/<file name without extension>``."""

    boxes: dict[str, NDArray[np.float64]]  # (m, 4) XYXY in pixels
    invalid: dict[str, NDArray[np.bool_]]  # (m,) faces marked invalid
    subsets: dict[str, dict[str, NDArray[np.bool_]]]  # (m,) faces that each of easy, medium and hard keeps


def find_official_ground_truth(dataset: str | os.PathLike) -> Path | None:
    """The folder of the four files of :func:`read_official_ground_truth`, where they lie with the data set.

    Args:
        dataset: the folder WIDER_FACE.

    Returns:
        ``ground_truth`` or ``eval_tools/ground_truth`` in it, the first that has all four; None: neither has.
    """
    folders = (Path(dataset) / folder for folder in _FOLDERS)
    return next((folder for folder in folders if all((folder / name).is_file() for name in _FILES)), None)


def read_official_ground_truth(folder: str | os.PathLike) -> OfficialGroundTruth:
    """Read the four files that WIDER FACE publishes with its evaluation code.

    The fields that the published evaluation does without may be missing: ``invalid_label_list`` (no face is invalid
    then), and ``event_list`` and ``file_list`` of the three subsets.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: a file is no MATLAB file or not of the published structure; names the file and the field.
    """
    base = _MatFile(Path(folder) / "wider_face_val.mat", "face_bbx_list", "invalid_label_list")
    names = base.image_ids()
    sizes = [len(event) for event in names]
    images = [image for event in names for image in event]
    truth = OfficialGroundTruth({}, {}, {subset: {} for subset in _SUBSETS})
    for image, xywh in zip(images, base.arrays("face_bbx_list", sizes)):
        if image in truth.boxes:
            raise base.error("file_list", f"image {image!r} comes twice")
        xywh = xywh.astype(np.float64) if xywh.size else np.empty((0, 4))
        if xywh.ndim != 2 or xywh.shape[1] != 4:
            raise base.error("face_bbx_list", f"image {image!r}: expected boxes (m, 4), got shape {xywh.shape}")
        truth.boxes[image] = np.hstack([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]])
        truth.invalid[image] = np.zeros(len(xywh), dtype=bool)
    if "invalid_label_list" in base:
        for image, labels in zip(images, base.arrays("invalid_label_list", sizes)):
            if labels.size != len(truth.boxes[image]):
                counts = f"expected {len(truth.boxes[image])} labels, got {labels.size}"
                raise base.error("invalid_label_list", f"image {image!r}: {counts}")
            truth.invalid[image] = labels.ravel() != 0

    for subset, kept in truth.subsets.items():
        mat = _MatFile(Path(folder) / f"wider_{subset}_val.mat", "gt_list")
        if "file_list" in mat and mat.image_ids() != names:
            raise mat.error("file_list", f"expected the images of {base.path}, in their order")
        for image, numbers in zip(images, mat.arrays("gt_list", sizes)):
            kept[image] = np.zeros(len(truth.boxes[image]), dtype=bool)
            indices = numbers.ravel().astype(np.int64) - 1
            if not ((indices >= 0) & (indices < len(kept[image]))).all():
                limit = f"face numbers from 1 to {len(kept[image])}"
                raise mat.error("gt_list", f"image {image!r}: expected {limit}, got {numbers.ravel().tolist()}")
            kept[image][indices] = True
    return truth


class _MatFile:
    """One of the files: fields are cell arrays with one entry per event, each a cell array with one entry per image."""

    def __init__(self, path: Path, *fields: str) -> None:
        if not path.is_file():
            expected = ", ".join(_FILES)
            raise FileNotFoundError(f"{path}: no such file; the official ground truth is {expected} in one folder")
        self.path = path
        self._fields = read_mat5(path, ["event_list", "file_list", *fields])

    def __contains__(self, field: str) -> bool:
        return field in self._fields

    def error(self, field: str, message: str) -> ValueError:
        return ValueError(f"{self.path}: {field}: {message}")

    def image_ids(self) -> list[list[str]]:
        """``<event>/<file name>`` of the images of each event."""
        events = [self._text("event_list", event) for event in self._field("event_list")]
        files = [self._cells("file_list", cells) for cells in self._field("file_list")]
        if len(files) != len(events):
            raise self.error("file_list", f"expected {len(events)} events as in event_list, got {len(files)}")
        return [[f"{event}/{self._text('file_list', file)}" for file in cells] for event, cells in zip(events, files)]

    def arrays(self, field: str, sizes: list[int]) -> list[NDArray]:
        """The numeric arrays of all images; ``sizes`` says how many images each event has."""
        per_event = [self._cells(field, cells) for cells in self._field(field)]
        if [len(event) for event in per_event] != sizes:
            raise self.error(field, "expected the events and images of file_list, got other numbers of them")
        arrays = []
        for value in itertools.chain.from_iterable(per_event):
            if not isinstance(value, np.ndarray):
                raise self.error(field, f"expected numbers, got {value!r:.80}")
            arrays.append(value)
        return arrays

    def _field(self, field: str) -> list[MatValue]:
        if field not in self._fields:
            raise self.error(field, "expected a cell array, got nothing")
        return self._cells(field, self._fields[field])

    def _cells(self, field: str, value: MatValue) -> list[MatValue]:
        if not isinstance(value, list):
            raise self.error(field, f"expected a cell array, got {value!r:.80}")
        return value

    def _text(self, field: str, value: MatValue) -> str:
        if not isinstance(value, str):
            raise self.error(field, f"expected a text, got {value!r:.80}")
        return value
