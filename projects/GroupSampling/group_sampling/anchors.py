"""Anchor grids: where the anchors of each scale group sit, in the form that the operators need.

The anchors of a detector are a few base boxes, each translated over the cells of a feature map. :class:`AnchorGrid`
keeps that description instead of the boxes, so that :func:`group_sampling.ops.assign_and_sample` can visit the small
window of anchors that a face overlaps. The boxes themselves come from :meth:`AnchorGrid.boxes`.

Shape shorthand: n anchors, G scale groups, A base boxes of one feature level. Boxes are XYXY in input pixels.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["AnchorGrid", "AnchorLattice", "cell_anchors"]

MAX_CELLS = 2**31 - 1  # of one group: the sampler's permutation works on 32-bit positions
MIN_SIDE = 2**-10  # of a base box: smaller ones leave the range in which float32 areas are precise


def cell_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float]) -> Tensor:
    """Base boxes of one feature level, centred at the origin, in Detectron2's convention.

    Args:
        sizes: square roots of the anchor areas, in pixels.
        aspect_ratios: height / width. The order of the result is sizes outer, ratios inner.

    Returns:
        (A, 4) float32 boxes, not rounded. (torchvision rounds its own: build the grid from its ``cell_anchors`` to
        match torchvision's model zoo.)
    """
    boxes = []
    for size in sizes:
        for ratio in aspect_ratios:
            width = math.sqrt(size**2.0 / ratio)
            height = ratio * width
            boxes.append([-width / 2.0, -height / 2.0, width / 2.0, height / 2.0])
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


@dataclass(frozen=True)
class AnchorLattice:
    """Anchors that are one base box translated over one feature map.

    The anchor of cell (row, col) is ``base`` moved by ``stride * (col + offset)`` and ``stride * (row + offset)``
    pixels; it sits at flat index ``start + step * (row * width + col)``.
    """

    base: tuple[float, float, float, float]
    stride: int
    offset: float
    height: int
    width: int
    start: int
    step: int
    group: int

    @property
    def num_cells(self) -> int:
        return self.height * self.width


@dataclass(frozen=True)
class AnchorGrid:
    """The anchors of one image size: lattices, level by level, each owned by a scale group.

    Build it with :meth:`from_cell_anchors`. A level of A base boxes has A lattices of the same height and width with
    ``step == A`` and consecutive ``start``; levels follow each other without gaps. A group may own several lattices.

    Attributes:
        lattices: in flat order of their first anchors.
        scales: (G,) scale of each group in pixels, ascending; 0.0 for the one group of :meth:`merged`.
        level_sizes: number of anchors of each feature level.
        num_anchors: n.
        num_groups: G.
    """

    lattices: tuple[AnchorLattice, ...]
    scales: tuple[float, ...]
    level_sizes: tuple[int, ...] = field(init=False)
    num_anchors: int = field(init=False)
    # The lattices as the operators take them: (stride, height, width, start, step, group) and (base box, offset) each.
    lattice_ints: tuple[int, ...] = field(init=False, repr=False, compare=False)
    lattice_floats: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        level_sizes: list[int] = []
        cells_of_group = [0] * len(self.scales)
        index = level_start = 0
        while index < len(self.lattices):
            step = self.lattices[index].step
            level = self.lattices[index : index + step]
            first = level[0]
            for k, lattice in enumerate(level):
                _check_lattice(lattice, index + k, len(self.scales))
                expected = (first.height, first.width, step, level_start + k)
                found = (lattice.height, lattice.width, lattice.step, lattice.start)
                if found != expected or len(level) != step:
                    raise ValueError(
                        f"AnchorGrid: lattice {index + k} breaks the layout of its level: (height, width, step, start) "
                        f"must be {expected} and the level must have {step} lattices, got {found} and {len(level)}"
                    )
                cells_of_group[lattice.group] += lattice.num_cells
            level_sizes.append(step * first.num_cells)
            level_start += level_sizes[-1]
            index += step
        if cells_of_group and max(cells_of_group) > MAX_CELLS:
            raise ValueError(f"AnchorGrid: a group may hold {MAX_CELLS} anchors, got {max(cells_of_group)}")
        ints = [(x.stride, x.height, x.width, x.start, x.step, x.group) for x in self.lattices]
        floats = [(*x.base, x.offset) for x in self.lattices]
        # object.__setattr__ is how a frozen dataclass sets what it derives.
        object.__setattr__(self, "level_sizes", tuple(level_sizes))
        object.__setattr__(self, "num_anchors", level_start)
        object.__setattr__(self, "lattice_ints", tuple(v for row in ints for v in row))
        object.__setattr__(self, "lattice_floats", tuple(float(v) for row in floats for v in row))

    @classmethod
    def from_cell_anchors(
        cls,
        cell_anchors: Sequence[Tensor],
        strides: Sequence[int],
        feature_sizes: Sequence[tuple[int, int]],
        *,
        offset: float = 0.0,
        scales: Sequence[Sequence[float]] | None = None,
    ) -> AnchorGrid:
        """Grid of the anchors that Detectron2's and torchvision's anchor generators make.

        Args:
            cell_anchors: per feature level, its (A, 4) base boxes. A tensor on a GPU is read back, which waits for it.
            strides: per feature level, input pixels from one cell to the next.
            feature_sizes: per feature level, (height, width) in cells.
            offset: position of the first anchor's centre in units of the stride, in [0, 1).
            scales: per feature level, the scale in pixels of each base box; anchors of the same scale form a group.
                None: the square root of each base box's area, rounded to 1e-3.

        Raises:
            ValueError: the sequences differ in length, or a base box, stride, size or offset is not usable.
        """
        counts = {len(cell_anchors), len(strides), len(feature_sizes)}
        if scales is not None:
            counts.add(len(scales))
        if len(counts) != 1:
            raise ValueError(
                "AnchorGrid: cell_anchors, strides, feature_sizes and scales must have one entry per feature level, "
                f"got {len(cell_anchors)}, {len(strides)}, {len(feature_sizes)} and "
                f"{'None' if scales is None else len(scales)}"
            )
        bases = [_base_boxes(boxes, level) for level, boxes in enumerate(cell_anchors)]
        if scales is None:
            scales = [[round(math.sqrt((b[2] - b[0]) * (b[3] - b[1])), 3) for b in level] for level in bases]
        for level, (base, scale) in enumerate(zip(bases, scales)):
            if len(base) != len(scale):
                raise ValueError(f"AnchorGrid: level {level} has {len(base)} base boxes but {len(scale)} scales")
        group_scales = sorted({float(s) for level in scales for s in level})
        group_of = {scale: group for group, scale in enumerate(group_scales)}

        lattices: list[AnchorLattice] = []
        start = 0
        for base, scale, stride, (height, width) in zip(bases, scales, strides, feature_sizes):
            for k, (box, s) in enumerate(zip(base, scale)):
                lattices.append(
                    AnchorLattice(
                        base=box,
                        stride=int(stride),
                        offset=float(offset),
                        height=int(height),
                        width=int(width),
                        start=start + k,
                        step=len(base),
                        group=group_of[float(s)],
                    )
                )
            start += len(base) * int(height) * int(width)
        return cls(tuple(lattices), tuple(group_scales))

    @property
    def num_groups(self) -> int:
        return len(self.scales)

    def boxes(self, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """(n, 4) anchors in flat order: levels one after another, in a level by row, column, base box.

        float32 boxes are bit-equal to those of Detectron2's and torchvision's anchor generators. No call waits for a
        GPU. The boxes of the last few grids are kept and handed out again: do not change them in place.

        Raises:
            TypeError: ``dtype`` is neither float32 nor float64.
        """
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"AnchorGrid.boxes: dtype must be float32 or float64, got {dtype}")
        return _recent_boxes.get((self, dtype), device, lambda place: self._make_boxes(place, dtype))

    def group_ids(self, device: torch.device | str | None = None) -> Tensor:
        """(n,) int64 scale group of each anchor, in [0, G). Kept and handed out again like :meth:`boxes`."""
        return _recent_group_ids.get(self, device, self._make_group_ids)

    def _make_boxes(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        levels = [torch.empty(0, 4, device=device, dtype=dtype)]
        for level in self._levels():
            first = level[0]
            # The shift is rounded to the dtype before it is added: that is how both frameworks compute it.
            cells = torch.arange(max(first.width, first.height), device=device, dtype=torch.float64)
            shift = (first.offset * first.stride + first.stride * cells).to(dtype)
            shifts = torch.empty(first.height, first.width, 1, 4, device=device, dtype=dtype)
            shifts[..., 0] = shifts[..., 2] = shift[: first.width].view(1, -1, 1)
            shifts[..., 1] = shifts[..., 3] = shift[: first.height].view(-1, 1, 1)
            base = _on_device([v for lattice in level for v in lattice.base], device, dtype).view(-1, 4)
            levels.append((shifts + base).reshape(-1, 4))
        return torch.cat(levels)

    def _make_group_ids(self, device: torch.device) -> Tensor:
        levels = [torch.empty(0, device=device, dtype=torch.int64)]
        for level in self._levels():
            groups = _on_device([lattice.group for lattice in level], device, torch.int64)
            levels.append(groups.repeat(level[0].num_cells))
        return torch.cat(levels)

    def group_members(self, group: int, device: torch.device | str | None = None) -> Tensor:
        """(size of the group,) int64 flat indices of a group's anchors in member order: lattice by lattice, by cell."""
        parts = [torch.empty(0, device=device, dtype=torch.int64)]
        for lattice in self.lattices:
            if lattice.group == group:
                parts.append(lattice.start + lattice.step * torch.arange(lattice.num_cells, device=device))
        return torch.cat(parts)

    def merged(self) -> AnchorGrid:
        """The same anchors as one group: uniform sampling over all anchors, as RPN and FPN do."""
        if not self.lattices:
            return self
        return AnchorGrid(tuple(AnchorLattice(**{**vars(x), "group": 0}) for x in self.lattices), (0.0,))

    def _levels(self) -> list[tuple[AnchorLattice, ...]]:
        levels, index = [], 0
        while index < len(self.lattices):
            step = self.lattices[index].step
            levels.append(self.lattices[index : index + step])
            index += step
        return levels


def _base_boxes(boxes: Tensor, level: int) -> list[tuple[float, float, float, float]]:
    if boxes.dim() != 2 or boxes.shape[1] != 4 or boxes.shape[0] == 0:
        raise ValueError(f"AnchorGrid: cell_anchors[{level}] must have shape (A, 4), A > 0, got {tuple(boxes.shape)}")
    return [tuple(row) for row in boxes.tolist()]


def _on_device(values: Sequence[float], device: torch.device, dtype: torch.dtype) -> Tensor:
    """``torch.tensor(values)`` without its copy from the host, for which a GPU's stream would be waited."""
    return torch.stack([torch.full((), value, device=device, dtype=dtype) for value in values])


class _RecentTensors:
    """The last few tensors that were made, by key, device and stream."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._tensors: dict[Hashable, Tensor] = {}  # least recently used first
        self._lock = threading.Lock()

    def get(self, key: Hashable, device: torch.device | str | None, make: Callable[[torch.device], Tensor]) -> Tensor:
        probe = torch.empty(0, device=device)  # "cuda" has become "cuda:0", None the default device
        # What a compiler traces, a tracing mode fakes or a CUDA graph records holds no numbers yet.
        if torch.compiler.is_compiling() or type(probe) is not Tensor:
            return make(probe.device)
        stream = None
        if probe.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                return make(probe.device)
            stream = torch.cuda.current_stream(probe.device)  # another would not wait for the kernels that fill it
        key = (key, probe.device, stream)
        with self._lock:
            tensor = self._tensors.pop(key, None)
            if tensor is None:
                with torch.inference_mode(False):  # an inference tensor would fail in a later training step
                    tensor = make(probe.device)
            self._tensors[key] = tensor
            if len(self._tensors) > self.capacity:
                del self._tensors[next(iter(self._tensors))]
        return tensor


# Image sizes vary while training, so few repeat soon; 2.25 million anchors are 36 MB of boxes.
_recent_boxes, _recent_group_ids = _RecentTensors(4), _RecentTensors(4)


def _check_lattice(lattice: AnchorLattice, index: int, num_groups: int) -> None:
    x1, y1, x2, y2 = lattice.base
    if not (all(math.isfinite(v) for v in lattice.base) and x2 - x1 >= MIN_SIDE and y2 - y1 >= MIN_SIDE):
        raise ValueError(
            f"AnchorGrid: base box {index} must be finite with sides of at least {MIN_SIDE} pixels, got {lattice.base}"
        )
    if lattice.stride < 1 or not 0.0 <= lattice.offset < 1.0:
        raise ValueError(
            f"AnchorGrid: lattice {index} must have stride >= 1 and offset in [0, 1), "
            f"got {lattice.stride} and {lattice.offset}"
        )
    if lattice.height < 0 or lattice.width < 0:
        raise ValueError(f"AnchorGrid: feature size must not be negative, got {(lattice.height, lattice.width)}")
    if lattice.step < 1 or not 0 <= lattice.group < num_groups:
        raise ValueError(
            f"AnchorGrid: lattice {index} must have step >= 1 and group in [0, {num_groups}), "
            f"got {lattice.step} and {lattice.group}"
        )
