"""Pictures of what an evaluation found in a few images."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from fvcore.common.config import CfgNode
from PIL import Image

from ..config import anchor_scales
from ..data.catalog import Source
from ..data.images import read_image, read_picture
from ..data.records import UnreadableImageError
from ..detections import Detections
from ..faces import Faces
from ..files import atomic_file

logger = logging.getLogger(__name__)

_MIN_SCORE = 0.5  # as of FaceDetector
_MAX_SIDE = 800  # pixels of a picture


def write_examples(cfg: CfgNode, source: Source, detections: Mapping[str, Detections]) -> None:
    """Draw the detections of ``LOGGING.EXAMPLES`` images, the same ones in every evaluation.

    The pictures replace those in ``OUTPUT_DIR/inference/<data set>/examples``. An image that cannot be read is left
    out, and said.

    Args:
        detections: by image id; of an image without an entry nothing is drawn.
    """
    folder = _folder(cfg, source.name)
    shutil.rmtree(folder, ignore_errors=True)
    records = [record for record in source.records if (~record.ignore).any()] or source.records
    count = min(cfg.LOGGING.EXAMPLES, len(records))
    for number in range(count):
        record = records[number * len(records) // count]
        try:
            image = read_image(record)
        except UnreadableImageError as error:
            logger.warning(f"{source.name}: no picture of the detections: {error}")
            continue
        empty = np.zeros((0, 4), np.float32), np.zeros(0, np.float32)
        found = detections.get(record.image_id, Detections(*empty))
        found = found.select(found.scores >= _MIN_SCORE)
        faces = Faces(
            np.asarray(found.boxes, dtype=np.float32),
            np.asarray(found.scores, dtype=np.float32),
            np.zeros(len(found.scores), dtype=np.int64) if found.classes is None else found.classes,
            found.anchor_scales,
            image.shape[:2],
            source.class_names,
            anchor_scales(cfg),
        )
        picture = faces.draw(image)
        picture.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.LANCZOS)
        with atomic_file(folder / f"{number + 1}.jpg") as file:
            picture.save(file, "JPEG", quality=90)


def read_examples(cfg: CfgNode) -> dict[str, np.ndarray]:
    """The pictures of all test sets, (H, W, 3) uint8 by name "examples/<data set>/1", ..."""
    pictures = {}
    for name in cfg.DATASETS.TEST:
        for file in sorted(_folder(cfg, name).glob("*.jpg"), key=lambda file: int(file.stem)):
            pictures[f"examples/{name}/{file.stem}"] = read_picture(str(file))
    return pictures


def _folder(cfg: CfgNode, dataset_name: str) -> Path:
    return Path(cfg.OUTPUT_DIR, "inference", dataset_name, "examples")
