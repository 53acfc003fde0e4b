"""Rank, world size and exchange of Python objects, in one process or several."""

from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """The number of this process; 0 is the main one."""
    return dist.get_rank() if _is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if _is_initialized() else 1


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
