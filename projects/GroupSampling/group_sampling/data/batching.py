"""Images of one size, seen together."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sized
from typing import Any

_MAX_WAITING = 8  # batches' worth of images


class BatchesBySize:
    """Iterable of batches of the images of a loader that have one size, so that none is padded in its batch.

    With a batch size of 1 the images come in their order. Else an image waits for others of its size; while more than
    eight batches' worth of images wait, those of the size that has waited longest come as a smaller batch.

    Args:
        images: any iterable with a length.
        batch_size: largest number of images in a batch.
        size_of: the size of an image; None for one that comes by itself.
    """

    def __init__(self, images: Sized, batch_size: int, size_of: Callable[[Any], Hashable]):
        self._images = images
        self._batch_size = batch_size
        self._size_of = size_of

    def __len__(self) -> int:
        """The largest number of batches that there can be."""
        return len(self._images)

    def __iter__(self) -> Iterator[list[Any]]:
        waiting: dict[Hashable, list[Any]] = defaultdict(list)  # by size, in the order of their first images
        for image in self._images:  # type: ignore[attr-defined]
            size = self._size_of(image)
            if size is None:
                yield [image]
                continue
            waiting[size].append(image)
            if len(waiting[size]) == self._batch_size:
                yield waiting.pop(size)
            elif sum(map(len, waiting.values())) > _MAX_WAITING * self._batch_size:
                yield waiting.pop(next(iter(waiting)))
        yield from waiting.values()
