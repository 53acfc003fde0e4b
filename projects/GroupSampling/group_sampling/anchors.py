"""Anchor grids: where the anchors of each scale group sit, in the form that the operators need.

The anchors of a detector are a few base boxes, each translated over the cells of a feature map. :class:`AnchorGrid`
keeps that description instead of the boxes: :func:`group_sampling.ops.assign_and_sample` visits the small window of
anchors that a face overlaps, and :meth:`AnchorGrid.boxes_at` computes the boxes of the few anchors that a step needs.

Shape shorthand: n anchors, G scale groups, A base boxes of one feature level. Boxes are XYXY in input pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["AnchorGrid", "AnchorLattice", "AnchorPlace", "cell_anchors", "lookup"]

MAX_CELLS = 2**31 - 1  # of one group: the sampler's permutation works on 32-bit positions
MIN_SIDE = 2**-10  # of a base box: smaller ones leave the range in which float32 areas are precise


def cell_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float]) -> Tensor:
    """Base boxes of one feature level, centered at the origin, in Detectron2's convention.

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


class AnchorPlace(NamedTuple):
    """Where anchors sit; int64 tensors of one shape."""

    lattice: Tensor  # index into AnchorGrid.lattices
    row: Tensor  # of the lattice's feature map, in cells
    column: Tensor


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
                        f"AnchorGrid: lattice {index + k}: expected (height, width, step, start) {expected} in a level "
                        f"of {step} lattices, got {found} in one of {len(level)}"
                    )
                cells_of_group[lattice.group] += lattice.num_cells
            level_sizes.append(step * first.num_cells)
            level_start += level_sizes[-1]
            index += step
        if cells_of_group and max(cells_of_group) > MAX_CELLS:
            raise ValueError(f"AnchorGrid: expected at most {MAX_CELLS} anchors in a group, got {max(cells_of_group)}")
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
    ) -> "AnchorGrid":
        """Grid of the anchors that Detectron2's and torchvision's anchor generators make.

        Args:
            cell_anchors: per feature level, its (A, 4) base boxes. A tensor on a GPU is read back, which waits for it.
            strides: per feature level, input pixels from one cell to the next.
            feature_sizes: per feature level, (height, width) in cells.
            offset: position of the first anchor's center in units of the stride, in [0, 1).
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
                "AnchorGrid: expected one entry per feature level in cell_anchors, strides, feature_sizes and scales, "
                f"got {len(cell_anchors)}, {len(strides)}, {len(feature_sizes)} and "
                f"{'None' if scales is None else len(scales)}"
            )
        bases = [_base_boxes(boxes, level) for level, boxes in enumerate(cell_anchors)]
        if scales is None:
            scales = [[round(math.sqrt((b[2] - b[0]) * (b[3] - b[1])), 3) for b in level] for level in bases]
        for level, (base, scale) in enumerate(zip(bases, scales)):
            if len(base) != len(scale):
                raise ValueError(
                    f"AnchorGrid: expected one scale for each of the {len(base)} base boxes of level {level}, "
                    f"got {len(scale)}"
                )
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

    def locate(self, index: Tensor) -> AnchorPlace:
        """Lattice and cell of the anchors at flat indices ``index``: int64 in [0, n), of any shape, on any device.

        No call waits for a GPU: values outside [0, n) are not refused, and give a place that does not exist.
        """
        firsts = [i for i in self._first_lattices() if self.lattices[i].num_cells]
        levels = [self.lattices[i] for i in firsts]
        level = torch.zeros_like(index)
        for first in levels[1:]:
            level = level + (index >= first.start)
        step = lookup([first.step for first in levels], level)
        width = lookup([first.width for first in levels], level)
        offset = index - lookup([first.start for first in levels], level)
        cell = offset // step
        return AnchorPlace(lookup(firsts, level) + offset % step, cell // width, cell % width)

    def boxes_at(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """(..., 4) boxes of the anchors at flat indices ``index`` (...): ``boxes(dtype=dtype)[index]``, bit for bit.

        No call waits for a GPU.

        Raises:
            TypeError: ``dtype`` is neither float32 nor float64.
        """
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"AnchorGrid: expected float32 or float64 boxes, got {dtype}")
        place = self.locate(index)
        stride = lookup([lattice.stride for lattice in self.lattices], place.lattice)
        origin = lookup([lattice.offset * lattice.stride for lattice in self.lattices], place.lattice, torch.float64)
        # The shift is rounded to the dtype before it is added: that is how both frameworks compute it.
        x, y = ((origin + (stride * cell).double()).to(dtype) for cell in (place.column, place.row))
        base = [lookup([lattice.base[k] for lattice in self.lattices], place.lattice, dtype) for k in range(4)]
        return torch.stack([x + base[0], y + base[1], x + base[2], y + base[3]], dim=-1)

    def group_ids_at(self, index: Tensor) -> Tensor:
        """(...) int64 scale group, in [0, G), of the anchors at flat indices ``index`` (...)."""
        return lookup([lattice.group for lattice in self.lattices], self.locate(index).lattice)

    def scales_at(self, index: Tensor) -> Tensor:
        """(...) float32 scale in pixels of the anchors at flat indices ``index`` (...)."""
        return lookup(self.scales, self.group_ids_at(index), torch.float32)

    def boxes(self, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """(n, 4) anchors in flat order: levels one after another, in a level by row, column, base box.

        float32 boxes are bit-equal to those of Detectron2's and torchvision's anchor generators. For tests and
        analysis; a training step takes what it needs from :meth:`boxes_at`.
        """
        return self.boxes_at(torch.arange(self.num_anchors, device=device), dtype)

    def group_ids(self, device: torch.device | str | None = None) -> Tensor:
        """(n,) int64 scale group of each anchor, in [0, G)."""
        return self.group_ids_at(torch.arange(self.num_anchors, device=device))

    def group_members(
        self, group: int, device: torch.device | str | None = None, *, level: int | None = None
    ) -> Tensor:
        """(size of the group,) int64 flat indices of a group's anchors in member order: lattice by lattice, by cell.

        Args:
            level: only the anchors of this feature level; None: of all.
        """
        lattices = self.lattices
        if level is not None:
            first = self._first_lattices()[level]
            lattices = lattices[first : first + lattices[first].step]
        parts = [torch.empty(0, device=device, dtype=torch.int64)]
        for lattice in lattices:
            if lattice.group == group:
                parts.append(lattice.start + lattice.step * torch.arange(lattice.num_cells, device=device))
        return torch.cat(parts)

    def merged(self) -> "AnchorGrid":
        """The same anchors as one group: uniform sampling over all anchors, as RPN and FPN do."""
        if not self.lattices:
            return self
        return AnchorGrid(tuple(replace(x, group=0) for x in self.lattices), (0.0,))

    def _first_lattices(self) -> list[int]:
        """Index of the first lattice of each level."""
        firsts, index = [], 0
        while index < len(self.lattices):
            firsts.append(index)
            index += self.lattices[index].step
        return firsts


def _base_boxes(boxes: Tensor, level: int) -> list[tuple[float, float, float, float]]:
    if boxes.dim() != 2 or boxes.shape[1] != 4 or boxes.shape[0] == 0:
        raise ValueError(f"AnchorGrid: expected cell_anchors[{level}] of shape (A, 4), A > 0, got {tuple(boxes.shape)}")
    return [tuple(row) for row in boxes.tolist()]


def lookup(values: Sequence[float], ids: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    """(...) ``torch.tensor(values)[ids]`` without a copy from the host, which would synchronize the stream of a GPU.

    Args:
        ids: (...) int64 in [0, len(values)).
    """
    if len(set(values)) <= 1:
        return torch.full_like(ids, values[0] if values else 0, dtype=dtype)
    return torch.stack([torch.full((), value, device=ids.device, dtype=dtype) for value in values])[ids]


def _check_lattice(lattice: AnchorLattice, index: int, num_groups: int) -> None:
    x1, y1, x2, y2 = lattice.base
    if not (all(math.isfinite(v) for v in lattice.base) and x2 - x1 >= MIN_SIDE and y2 - y1 >= MIN_SIDE):
        raise ValueError(
            f"AnchorGrid: base box {index}: expected finite numbers and sides of at least {MIN_SIDE} pixels, "
            f"got {lattice.base}"
        )
    if lattice.stride < 1 or not 0.0 <= lattice.offset < 1.0:
        raise ValueError(
            f"AnchorGrid: lattice {index}: expected stride >= 1 and offset in [0, 1), "
            f"got {lattice.stride} and {lattice.offset}"
        )
    if lattice.height < 0 or lattice.width < 0:
        raise ValueError(
            f"AnchorGrid: lattice {index}: expected a feature size >= 0, got {(lattice.height, lattice.width)}"
        )
    if lattice.step < 1 or not 0 <= lattice.group < num_groups:
        raise ValueError(
            f"AnchorGrid: lattice {index}: expected step >= 1 and group in [0, {num_groups}), "
            f"got {lattice.step} and {lattice.group}"
        )
