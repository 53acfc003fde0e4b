"""Rank, world size and exchange of Python objects, in one process or several."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")

# First image and number of images of this process's batch, of which a forward pass sees a part.
_part: ContextVar[tuple[int, int] | None] = ContextVar("part", default=None)


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """The number of this process; 0 is the main one."""
    return dist.get_rank() if _is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if _is_initialized() else 1


@contextmanager
def part_of_batch(first: int, num_images: int) -> Iterator[None]:
    """Within, a forward pass sees the images from ``first`` on of this process's batch of ``num_images``."""
    token = _part.set((first, num_images))
    try:
        yield
    finally:
        _part.reset(token)


def first_image(num_images: int) -> int:
    """Number, over all ranks, of the first of ``num_images`` images that this process sees in a forward pass.

    No other image of the same step has the number of one of them, also where its batch is seen in parts.
    """
    first, in_batch = _part.get() or (0, num_images)
    return rank() * in_batch + first


def all_gather(value: T) -> list[T]:
    """The values of all processes, by rank, in every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather(value: T) -> list[T]:
    """The values of all processes, by rank, in the main process; elsewhere an empty list."""
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def broadcast(value: T) -> T:
    """The value of the main process, in every process."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]
