"""Loaders of both engines: endless, seeded and resumable for training; each image once for evaluation."""

import functools
import logging
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from .. import distributed
from ..errors import UserError
from .images import read_image, read_reduced
from .records import ImageRecord, UnreadableImageError, far_outside, fit_exchanged_sides
from .transforms import TestTransform, TrainTransform

logger = logging.getLogger(__name__)

# Called as to_example(image, boxes, classes, ignore_boxes, record, draw): (H, W, 3) uint8 with (m, 4), (m,) and (k, 4),
# the record with its height and width filled in, and the number of the draw. Anything random in it has to be a
# function of `draw`, or the stream is no longer one of its seed. Where workers are not forked, it has to be picklable.
ToExample = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, ImageRecord, int], Any]

_MAX_ATTEMPTS = 20
_MIN_BAD = 5
_NUM_LISTED_FILES = 20

# Distinguish the random streams of one seed.
_EPOCH, _AUGMENTATION, _REPLACEMENT = range(3)


@dataclass(frozen=True)
class SkippedImage:
    """An image that could not be read, and why."""

    file: str
    reason: str


class BadDataError(UserError, RuntimeError):
    """More images cannot be read than ``DATALOADER.MAX_BAD_SHARE`` allows; the message lists them."""


class Batch(list):
    """The examples of one training batch, a list.

    Attributes:
        skipped: one entry for each draw that hit an unreadable image and took another one.
        outside: file -> number of its boxes that are outside the image, or nearly; they are dropped. (WIDER FACE's
            text format has no image sizes, so its parser cannot see them.)
        exchanged: files whose boxes fit the image in its other orientation alone.
    """

    def __init__(
        self,
        examples: Sequence[Any] = (),
        skipped: Sequence[SkippedImage] = (),
        outside: Mapping[str, int] | None = None,
        exchanged: Sequence[str] = (),
    ) -> None:
        super().__init__(examples)
        self.skipped = tuple(skipped)
        self.outside = dict(outside or {})
        self.exchanged = tuple(exchanged)


class TrainingStream(IterableDataset):
    """Endless stream of training batches of one rank.

    Draw k of the global stream, its image, geometry and flip, is a function of (seed, k) alone, whatever the number of
    workers and ranks. Epoch e visits every record once, in an order drawn from (seed, e). Batch b of rank r of W holds
    the B = ``images_per_batch`` global draws from (b W + r) B on. The workers make batches in turns, so that a
    DataLoader returns them in order.

    An unreadable image is replaced by another one, a function of (seed, k) as well, and listed in ``Batch.skipped``.

    Args:
        images_per_batch: of this rank.
        start_batch: first batch, for a run that resumes.
        max_bad_share: see :class:`TrainLoader`, which enforces it.
        reduce_jpeg: decode a JPEG that the jitter shrinks at a fraction of its size; pixels differ a little.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        transform: TrainTransform,
        to_example: ToExample,
        *,
        seed: int,
        images_per_batch: int,
        rank: int = 0,
        world_size: int = 1,
        start_batch: int = 0,
        max_bad_share: float,
        reduce_jpeg: bool = False,
    ) -> None:
        if not records:
            raise ValueError("records: expected at least one image to train on, got none")
        if images_per_batch < 1:
            raise ValueError(f"images_per_batch: expected at least 1, got {images_per_batch}")
        if start_batch < 0 or seed < 0:
            raise ValueError(f"expected start_batch >= 0 and seed >= 0, got {start_batch} and {seed}")
        if not 0 <= max_bad_share <= 1:
            raise ValueError(f"max_bad_share: expected a share in [0, 1], got {max_bad_share}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 <= rank < world_size, got rank {rank} of {world_size}")
        self.records = records
        self.transform = transform
        self.to_example = to_example
        self.seed = seed
        self.images_per_batch = images_per_batch
        self.rank = rank
        self.world_size = world_size
        self.start_batch = start_batch
        self.max_bad_share = max_bad_share
        self.reduce_jpeg = reduce_jpeg

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        batch = self.start_batch + first
        while True:
            yield self.batch(batch)
            batch += step

    def batch(self, index: int) -> Batch:
        """Make batch ``index`` of this rank."""
        first_draw = (index * self.world_size + self.rank) * self.images_per_batch
        examples: list[Any] = []
        skipped: list[SkippedImage] = []
        outside: dict[str, int] = {}
        exchanged: list[Any] = []
        for draw in range(first_draw, first_draw + self.images_per_batch):
            record, image, (height, width) = self._read(draw, skipped)
            rng = self._augmentation(draw)
            sample = self.transform(image, record.boxes, record.ignore, record.classes, rng, (height, width))
            num_outside = int(far_outside(record.boxes, height, width).sum())
            if num_outside:
                outside[record.file_name] = num_outside
            if fit_exchanged_sides(record.boxes, height, width):
                exchanged.append(record.file_name)
            record = replace(record, height=height, width=width)
            examples.append(
                self.to_example(sample.image, sample.boxes, sample.classes, sample.ignore_boxes, record, draw)
            )
        return Batch(examples, skipped, outside, exchanged)

    def _augmentation(self, draw: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, _AUGMENTATION, draw])

    def _read(self, draw: int, skipped: list[SkippedImage]) -> tuple[ImageRecord, np.ndarray, tuple[int, int]]:
        """Read the image of ``draw``, or the first readable one of its replacements; with its size, (height, width)."""
        scale = self.transform.draw_scale(self._augmentation(draw)) if self.reduce_jpeg else 1.0
        epoch, position = divmod(draw, len(self.records))
        index = _epoch_order(self.seed, epoch, len(self.records))[position]
        replacements = np.random.default_rng([self.seed, _REPLACEMENT, draw])
        errors: list[SkippedImage] = []
        while len(errors) < _MAX_ATTEMPTS:
            record = self.records[index]
            try:
                image, size = read_reduced(record, scale)
            except UnreadableImageError as error:
                errors.append(SkippedImage(error.file, error.reason))
                index = replacements.integers(len(self.records))
            else:
                skipped.extend(errors)
                return record, image, size
        raise BadDataError(
            f"draw {draw}: {_MAX_ATTEMPTS} images in a row cannot be read. Expected readable images, got:\n"
            + list_files({error.file: error.reason for error in errors})
        )


class TrainLoader(DataLoader):
    """DataLoader over a :class:`TrainingStream`; yields :class:`Batch` objects, and keeps count of unreadable images.

    Each unreadable file is warned about once. A :class:`BadDataError` that lists the files ends the iteration when they
    are more than a share ``max_bad_share`` of the draws, beyond what chance explains.

    Attributes:
        skipped_files: file -> reason, of all images that could not be read so far.
        outside_boxes: file -> number of boxes outside the image, or nearly, of all images drawn so far.
        exchanged_files: images so far whose boxes fit their other orientation alone.
        num_draws, num_skipped: images drawn so far, and how many of the draws hit an unreadable image.
    """

    dataset: TrainingStream

    def __init__(self, stream: TrainingStream, num_workers: int, pin_memory: bool = False) -> None:
        super().__init__(
            stream,
            batch_size=None,
            collate_fn=_identity,
            num_workers=num_workers,
            pin_memory=pin_memory,
            generator=_own_generator(),
            worker_init_fn=_outlive_signals,
        )
        self.skipped_files: dict[str, str] = {}
        self.outside_boxes: dict[str, int] = {}
        self.exchanged_files: set[str] = set()
        self.num_draws = 0
        self.num_skipped = 0

    # torch's stub promises its own class of iterators.
    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch in super().__iter__():
            self.num_draws += len(batch) + len(batch.skipped)
            self.num_skipped += len(batch.skipped)
            for image in batch.skipped:
                if image.file not in self.skipped_files:
                    self.skipped_files[image.file] = image.reason
                    logger.warning("skipping an unreadable image: %s: %s", image.file, image.reason)
            for file, count in batch.outside.items():
                if file not in self.outside_boxes:
                    self.outside_boxes[file] = count
                    logger.warning("dropping %d boxes that are outside the image, or nearly: %s", count, file)
            if batch.exchanged and not self.exchanged_files:
                logger.warning(
                    "the boxes of %s fit it with its sides exchanged: if they were made for the other orientation, "
                    "before or after EXIF turned it, change DATASETS.APPLY_EXIF",
                    batch.exchanged[0],
                )
            self.exchanged_files.update(batch.exchanged)
            self._check_share()
            yield batch

    def summary(self) -> str:
        """What all processes had to leave out so far, with the files; empty when nothing was.

        All processes have to call it together; it is of all of them on the main one, and empty elsewhere.
        """
        parts = distributed.gather(
            (self.num_draws, self.num_skipped, self.skipped_files, self.outside_boxes, self.exchanged_files)
        )
        if not parts:
            return ""
        draws, skipped, files, outside, exchanged = zip(*parts)
        unreadable = {file: reason for share in files for file, reason in share.items()}
        outside_boxes = {file: count for share in outside for file, count in share.items()}
        lines = []
        if unreadable:
            hits = f"{sum(skipped)} of {sum(draws)} draws hit one of {len(unreadable)} unreadable images"
            lines.append(f"{hits}, which were replaced:\n{list_files(unreadable)}")
        if outside_boxes:
            lines.append(
                f"{len(outside_boxes)} images had {sum(outside_boxes.values())} boxes outside of them, or nearly"
            )
        num_exchanged = len(set().union(*exchanged))
        if num_exchanged:
            lines.append(f"{num_exchanged} images have boxes that fit their other orientation alone")
        return "\n".join(lines)

    def _check_share(self) -> None:
        share = self.dataset.max_bad_share
        expected = share * self.num_draws
        # Three standard deviations, or a set just under the share would be stopped by an unlucky order.
        if self.num_skipped >= _MIN_BAD and self.num_skipped > expected + 3 * math.sqrt(expected):
            raise BadDataError(
                f"{self.num_skipped} of {self.num_draws} images drawn cannot be read; expected a share of at most "
                f"{share:g}. Got:\n{list_files(self.skipped_files)}"
            )


def build_train_loader(
    records: Sequence[ImageRecord],
    transform: TrainTransform,
    to_example: ToExample,
    *,
    seed: int,
    images_per_batch: int,
    rank: int = 0,
    world_size: int = 1,
    start_batch: int = 0,
    num_workers: int,
    max_bad_share: float,
    reduce_jpeg: bool = False,
    pin_memory: bool = False,
) -> TrainLoader:
    """Endless loader of training batches; see :class:`TrainingStream` for the arguments and what it promises.

    Args:
        pin_memory: put the tensors of a batch into pinned memory, from which they move to a GPU without a wait.
    """
    stream = TrainingStream(
        records,
        transform,
        to_example,
        seed=seed,
        images_per_batch=images_per_batch,
        rank=rank,
        world_size=world_size,
        start_batch=start_batch,
        max_bad_share=max_bad_share,
        reduce_jpeg=reduce_jpeg,
    )
    return TrainLoader(stream, num_workers, pin_memory)


def build_test_loader(
    records: Sequence[ImageRecord],
    transform: TestTransform,
    to_example: ToExample,
    *,
    num_workers: int,
) -> DataLoader:
    """Loader of an evaluation: yields the example of every record, in their order.

    ``to_example`` gets the boxes in pixels of the resized image, the record with those of the original one, and the
    index of the record as its draw. In the place of an unreadable image comes a :class:`SkippedImage`.
    """
    return DataLoader(
        _TestImages(records, transform, to_example),
        batch_size=None,
        collate_fn=_identity,
        num_workers=num_workers,
        generator=_own_generator(),
    )


def _outlive_signals(worker_id: int) -> None:
    """Signals to the whole process group must not end a worker before the main process has ended its training step.

    The main process ends its workers in its own way; one that it cannot reach ends a minute after SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))


def filter_empty(records: Sequence[ImageRecord]) -> list[ImageRecord]:
    """The records with at least one box that is not an ignore region."""
    return [record for record in records if not record.ignore.all()]


class _TestImages(Dataset):
    def __init__(self, records: Sequence[ImageRecord], transform: TestTransform, to_example: ToExample) -> None:
        self._records = records
        self._transform = transform
        self._to_example = to_example

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Any:
        record = self._records[index]
        try:
            image = read_image(record)
        except UnreadableImageError as error:
            return SkippedImage(error.file, error.reason)
        sample = self._transform(image, record.boxes, record.ignore, record.classes)
        record = replace(record, height=image.shape[0], width=image.shape[1])
        return self._to_example(sample.image, sample.boxes, sample.classes, sample.ignore_boxes, record, index)


@functools.lru_cache(maxsize=2)  # a batch may span two epochs
def _epoch_order(seed: int, epoch: int, num_records: int) -> np.ndarray:
    return np.random.default_rng([seed, _EPOCH, epoch]).permutation(num_records)


def too_many(num_bad: int, num_images: int, max_share: float) -> bool:
    """Whether so many images that cannot be read end a run; a handful never do."""
    return num_bad >= _MIN_BAD and num_bad > max_share * num_images


def list_files(reasons: Mapping[str, str]) -> str:
    """Lines of files and reasons, the first of them."""
    lines = [f"  {file}: {reason}" for file, reason in list(reasons.items())[:_NUM_LISTED_FILES]]
    if len(reasons) > _NUM_LISTED_FILES:
        lines.append(f"  ... and {len(reasons) - _NUM_LISTED_FILES} more")
    return "\n".join(lines)


def _own_generator() -> torch.Generator:
    """A generator for a DataLoader to seed its workers from: by default it would draw from torch's global one, and a
    run that resumes in the middle would see other random numbers than one that was not interrupted."""
    return torch.Generator().manual_seed(0)


def _identity(examples: Any) -> Any:
    return examples
