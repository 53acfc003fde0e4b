"""Detection files of FDDB: ``fold-XX-out.txt`` for each fold.

For each image of the fold a block: its name, the number of detections, and one line ``x y w h score`` for each of them:
top-left corner, width and height in pixels.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from ...data.fddb import MAX_COORDINATE, FDDBImage, check_rows, read_blocks
from ...detections import Detections
from ...files import write_atomically
from ..wider_face.files import result_rows

_FOLD = re.compile(r"(^|[-_])fold-?\d\d?([-_.]|$)", re.IGNORECASE)


def read_fddb_predictions(path: str | os.PathLike) -> Iterator[tuple[str, Detections]]:
    """Read a result set image by image; yields image ids and detections in float64.

    Args:
        path: folder of text files with ``fold-XX`` in their names (other files are ignored: the official evaluation
            writes its curves there), or one file with all images.

    Raises:
        FileNotFoundError: nothing is at ``path``.
        ValueError: no such file is in the folder, there is not a single image, a file does not follow the format, or an
            image comes twice. The message names file and line, what was expected and what was found.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such folder or file of predictions")
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.glob("*.txt") if _FOLD.search(file.name) and file.is_file())
    if not files:
        raise ValueError(f"{path}: expected files fold-01-out.txt and so on, got none")
    places: dict[str, str] = {}
    for file in files:
        for block in read_blocks(file, "x y w h score"):
            first = places.setdefault(block.image_id, block.place)
            if first != block.place:
                raise ValueError(
                    f"{block.place}: expected each image once, got {block.image_id!r} again, first at {first}"
                )
            x1y1, size, scores = block.rows[:, :2], block.rows[:, 2:4], block.rows[:, 4]
            bad = np.any(size < 0, axis=1) | np.any(np.abs(block.rows[:, :4]) > MAX_COORDINATE, axis=1)
            check_rows(block, bad, f"w and h not negative, and coordinates up to {MAX_COORDINATE:g}")
            yield block.image_id, Detections(np.hstack([x1y1, x1y1 + size]), scores.copy())
    if not places:
        raise ValueError(f"{path}: expected the detections of at least one image, got none")


def write_fddb_predictions(
    folder: str | os.PathLike,
    images: Iterable[FDDBImage],
    detections: Mapping[str, Detections],
) -> None:
    """Write the files of all folds, each atomically; the official evaluation reads them, joined in this order.

    Numbers have all their digits: float32 boxes and scores come back bit for bit.

    Args:
        folder: made when missing.
        images: the annotation; every image gets a block, in this order.
        detections: by image id, arrays or CPU tensors; boxes in pixels.

    Raises:
        ValueError: an image is not in the annotation, a shape is wrong, a number is not finite or a box is inverted.
            Nothing is written then.
    """
    folds: dict[int, list[str]] = {}
    remaining = set(detections)
    for image in images:
        rows = np.empty((0, 5))
        if image.image_id in detections:
            found = detections[image.image_id]
            rows = result_rows(image.image_id, found.boxes, found.scores)
        remaining.discard(image.image_id)
        lines = [image.image_id, str(len(rows)), *(" ".join(map(repr, row)) for row in rows.tolist())]
        folds.setdefault(image.fold, []).extend(lines)
    if remaining:
        raise ValueError(f"predictions: expected images of the ground truth, got {min(remaining)!r}")
    for fold, lines in folds.items():
        write_atomically(Path(folder, f"fold-{fold:02d}-out.txt"), ("\n".join(lines) + "\n").encode())
