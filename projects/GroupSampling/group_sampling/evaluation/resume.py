"""Detections of the images that an evaluation has finished: in memory, and on disk so that it can be resumed."""

import hashlib
import io
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..detections import Detections
from ..files import atomic_file

logger = logging.getLogger(__name__)

_DIGEST_BYTES = hashlib.sha256().digest_size
_COLUMNS = ("boxes", "scores", "classes", "anchor_scales")


class PartialDetections:
    """Files in one folder with the detections of finished images, a few dozen images each.

    Every file carries a digest of its content and the fingerprint of what it was computed from (weights, config, data
    set): a damaged or outdated file is noticed and left out. Several processes may write to one folder, as long as each
    image is finished by one of them.

    Args:
        fingerprint: detections are reused only under the same one.
        max_images, max_seconds: so much work is lost at most when the process dies.
    """

    def __init__(
        self, folder: str | os.PathLike, fingerprint: str, *, max_images: int = 64, max_seconds: float = 10.0
    ) -> None:
        self._folder = Path(folder)
        self._fingerprint = fingerprint
        self._max_images = max_images
        self._max_seconds = max_seconds
        self._pending: dict[str, Detections] = {}
        self._last_write = time.monotonic()

    def exist(self) -> bool:
        """Whether an interrupted evaluation, of whatever, left files here."""
        return next(self._files(), None) is not None

    def read(self) -> dict[str, Detections]:
        """image_id -> detections, of all sound files of this fingerprint; what is wrong with the others is logged."""
        found, outdated = {}, 0
        for file in self._files():
            content = file.read_bytes()
            digest, payload = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
            if hashlib.sha256(payload).digest() != digest:
                logger.warning(f"{file} is damaged and left out; its images are evaluated again")
                continue
            fingerprint, images = _unpack(payload)
            if fingerprint == self._fingerprint:
                found.update(images)
            else:
                outdated += 1
        if outdated:
            logger.warning(
                f"{self._folder}: {outdated} files of an interrupted evaluation are of other weights, another "
                "configuration or another data set; their images are evaluated again"
            )
        return found

    def add(self, image_id: str, detections: Detections) -> None:
        """Note a finished image; written with the next ones."""
        self._pending[image_id] = detections
        is_due = time.monotonic() - self._last_write >= self._max_seconds
        if is_due or len(self._pending) >= self._max_images:
            self.write()

    def write(self) -> None:
        """Write what is noted, whole and durably."""
        if self._pending:
            payload = _pack(self._fingerprint, self._pending)
            digest = hashlib.sha256(payload).digest()
            # Named by its content: the same images finished again replace their file.
            name = hashlib.sha256("\n".join(self._pending).encode()).hexdigest()[:24]
            with atomic_file(self._folder / f"{name}.part", durable=True) as file:
                file.write(digest + payload)
            self._pending = {}
        self._last_write = time.monotonic()

    def remove(self) -> None:
        """Delete all files, those of interrupted writes as well."""
        if self._folder.exists():
            shutil.rmtree(self._folder)

    def _files(self) -> Iterator[Path]:
        return iter(sorted(self._folder.glob("*.part")))


def _pack(fingerprint: str, images: dict[str, Detections]) -> bytes:
    """All lists in a row: of an image first its detections, with scale 0, then those of its sub-detectors."""
    lists = []
    for image_id, found in images.items():
        lists.append((image_id, 0.0, found))
        lists += [(image_id, scale, alone) for scale, alone in (found.sub_detectors or {}).items()]
    image_ids, scales, found = zip(*lists)
    arrays = {
        "fingerprint": np.array(fingerprint),
        "image_ids": np.array(image_ids),
        "scales": np.array(scales, dtype=np.float64),
        "counts": np.array([len(one.scores) for one in found]),
    }
    for name in _COLUMNS:
        columns = [getattr(one, name) for one in found]
        present = [column for column in columns if column is not None]
        arrays[f"has_{name}"] = np.array([column is not None for column in columns])
        arrays[name] = np.concatenate(present) if present else np.empty(0)
    stream = io.BytesIO()
    np.savez(stream, **arrays)  # type: ignore[arg-type]  # NumPy's stub takes the keys for its option allow_pickle
    return stream.getvalue()


def _unpack(payload: bytes) -> tuple[str, dict[str, Detections]]:
    with np.load(io.BytesIO(payload), allow_pickle=False) as arrays:
        columns = []
        for name in _COLUMNS:
            has = arrays[f"has_{name}"]
            parts = iter(np.split(arrays[name], np.cumsum(arrays["counts"][has])[:-1]))
            # Copied: a view would keep the whole file in memory.
            columns.append([next(parts).copy() if is_present else None for is_present in has])
        images: dict[str, Detections] = {}
        for image_id, scale, found in zip(arrays["image_ids"].tolist(), arrays["scales"].tolist(), zip(*columns)):
            if scale == 0:
                images[image_id] = Detections(*found)
            else:
                joint = images[image_id]
                by_scale = {**(joint.sub_detectors or {}), scale: Detections(*found)}
                images[image_id] = joint._replace(sub_detectors=by_scale)
        return str(arrays["fingerprint"]), images
