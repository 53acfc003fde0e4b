"""Regions of the FDDB protocol as pixels: rectangles, ellipses, and how much they overlap.

The published evaluation draws every region into a mask with OpenCV and counts pixels, so its figures depend on how
OpenCV draws: an ellipse is a polygon with a vertex every 5 degrees (fewer when it is small) in coordinates of 1/65536
pixel; a pixel belongs to it when it lies on the polygon's outline or, in a row, between the two sides. All regions are
convex and connected in each row, so a first and a last column per row describe a mask, and pixels are counted by
subtraction. No mask is made. (Where OpenCV cuts an outline at the border of the image, it can leave a pixel between
outline and inside; here it is filled. That concerns 2 pixels in the 5,171 faces of FDDB.)

Shape shorthand: k regions of an image with H rows.
"""

from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

_Ints: TypeAlias = NDArray[np.int64]

# Fixed-point coordinates: 16 bits after the point.
_BITS = 16
_ONE = 1 << _BITS
_HALF = _ONE >> 1
# Sines of 0 to 450 degrees as OpenCV tabulates them: seven digits, single precision.
_SINES = np.round(np.sin(np.radians(np.arange(451))), 7).astype(np.float32).astype(np.float64)
_MAX_VERTICES = 73
_BEYOND = 1 << 60  # a column further than any
# Elements of the rows of detections that are compared with a face at once: bounds memory.
_ELEMENTS_PER_BLOCK = 1 << 20


class Spans(NamedTuple):
    """Masks of k regions, clipped to the image. In a row without a pixel ``last`` is below ``first``."""

    first: _Ints  # (k, H) first column
    last: _Ints  # (k, H) last column, inclusive

    def areas(self) -> _Ints:
        """(k,) number of pixels."""
        return np.maximum(self.last - self.first + 1, 0).sum(axis=1)


def rectangle_spans(boxes: NDArray[np.float64], height: int, width: int) -> Spans:
    """Masks of (k, 4) XYXY boxes: corners rounded to pixels, which belong to the rectangle."""
    x1, y1, x2, y2 = _to_pixel(boxes).T[:, :, None]
    rows = np.arange(height)
    inside = (rows >= y1) & (rows <= y2)
    return Spans(np.where(inside, np.maximum(x1, 0), width), np.where(inside, np.minimum(x2, width - 1), -1))


def ellipse_spans(ellipses: NDArray[np.float64], height: int, width: int) -> Spans:
    """Masks of (k, 5) ellipses (semi-axes, angle in radians, center): center rounded to pixels, axes cut to integers,
    angle rounded to degrees. A negative axis counts as 0."""
    vertices_x, vertices_y = _polygons(ellipses)
    first = np.full((len(ellipses), height), width, dtype=np.int64)
    last = np.full((len(ellipses), height), -1, dtype=np.int64)
    region = np.repeat(np.arange(len(ellipses)), _MAX_VERTICES - 1)
    edges = (vertices_x[:, :-1], vertices_y[:, :-1], vertices_x[:, 1:], vertices_y[:, 1:])
    x1, y1, x2, y2 = (coordinates.ravel() for coordinates in edges)
    moves = (x1 != x2) | (y1 != y2) | (np.arange(len(x1)) % (_MAX_VERTICES - 1) == 0)  # keeps one edge of a point
    region, x1, y1, x2, y2 = region[moves], x1[moves], y1[moves], x2[moves], y2[moves]
    _add_sides(first, last, region, x1, y1, x2, y2, width)
    _add_outline(first, last, region, x1, y1, x2, y2, width)
    return Spans(first, last)


def overlaps(faces: Spans, detections: Spans) -> NDArray[np.float64]:
    """(m, k) IoU of m faces and k detections; 0 where both are empty."""
    face_areas, areas = faces.areas(), detections.areas()
    iou = np.zeros((len(face_areas), len(areas)))
    height = faces.first.shape[1]
    step = max(1, _ELEMENTS_PER_BLOCK // height)
    for face, area in enumerate(face_areas.tolist()):
        covered = np.flatnonzero(faces.last[face] >= faces.first[face])
        if len(covered) == 0:
            continue
        rows = slice(covered[0], covered[-1] + 1)
        for begin in range(0, len(areas), step):
            block = slice(begin, begin + step)
            first = np.maximum(faces.first[face, rows], detections.first[block, rows])
            last = np.minimum(faces.last[face, rows], detections.last[block, rows])
            intersection = np.maximum(last - first + 1, 0).sum(axis=1)
            iou[face, block] = intersection / (area + areas[block] - intersection)
    return iou


def _to_pixel(coordinates: NDArray[np.float64]) -> _Ints:
    """Round half to even in single precision, as OpenCV's conversion of points does."""
    return np.rint(coordinates.astype(np.float32)).astype(np.int64)


def _polygons(ellipses: NDArray[np.float64]) -> tuple[_Ints, _Ints]:
    """(k, 73) x and y of the vertices, closed, in fixed point; the last vertex is repeated where there are fewer."""
    center = _to_pixel(ellipses[:, 3:5]) << _BITS
    axes = np.maximum(ellipses[:, :2], 0).astype(np.int64)
    largest = axes.max(axis=1)[:, None]
    step = np.select([largest < 3, largest < 10, largest < 15], [90, 30, 18], 5)
    degrees = np.minimum(np.arange(_MAX_VERTICES) * step, 360)
    # In this form since it is so that the published evaluation turns radians into degrees.
    angle = np.rint(180 - (np.pi - ellipses[:, 2]) * 180 / np.pi).astype(np.int64) % 360
    sine, cosine = _SINES[angle][:, None], _SINES[450 - angle][:, None]
    along = (axes[:, :1] << _BITS) * _SINES[450 - degrees]
    across = (axes[:, 1:] << _BITS) * _SINES[degrees]
    x = center[:, :1] + along * cosine - across * sine
    y = center[:, 1:] + along * sine + across * cosine
    return np.rint(x).astype(np.int64), np.rint(y).astype(np.int64)


def _add_sides(
    first: _Ints, last: _Ints, region: _Ints, x1: _Ints, y1: _Ints, x2: _Ints, y2: _Ints, width: int
) -> None:
    """Widen the rows to what lies between the two sides of each polygon.

    An edge serves the rows from its upper end, rounded, to the one above its lower end. In its first row it has the x
    of the upper end, from there on it advances by a rounded slope.
    """
    upward = y2 < y1
    x1, x2 = np.where(upward, x2, x1), np.where(upward, x1, x2)
    top, bottom = ((np.where(upward, a, b) + _HALF) >> _BITS for a, b in ((y2, y1), (y1, y2)))
    num_rows = bottom - top
    steep = num_rows > 0
    region, x1, x2, top, num_rows = region[steep], x1[steep], x2[steep], top[steep], num_rows[steep]
    slope = _divide((x2 - x1) * 2 + num_rows, 2 * num_rows)
    height = first.shape[1]
    begin, end = np.maximum(-top, 0), np.minimum(height - top, num_rows)  # the rows inside the image
    edge, offset = _count_up(np.maximum(end - begin, 0))
    offset += begin[edge]
    x = (x1[edge] + offset * slope[edge] + _HALF) >> _BITS
    at = region[edge] * height + top[edge] + offset
    left, right = np.full(first.size, _BEYOND), np.full(first.size, -_BEYOND)
    np.minimum.at(left, at, x)
    np.maximum.at(right, at, x)
    drawn = (right >= 0) & (left < width)
    first.reshape(-1)[drawn] = np.maximum(left[drawn], 0)
    last.reshape(-1)[drawn] = np.minimum(right[drawn], width - 1)


def _add_outline(
    first: _Ints, last: _Ints, region: _Ints, x1: _Ints, y1: _Ints, x2: _Ints, y2: _Ints, width: int
) -> None:
    """Widen the rows to the pixels of the edges, drawn as lines of one pixel's width."""
    height = first.shape[1]
    y1, x1, y2, x2, kept = _cut(y1, x1, y2, x2, (height << _BITS) - 1)
    x1, y1, x2, y2, also = _cut(x1, y1, x2, y2, (width << _BITS) - 1)
    kept &= also
    region, x1, y1, x2, y2 = region[kept], x1[kept], y1[kept], x2[kept], y2[kept]

    # Along its longer extent, the major axis, a line advances by pixels, and across it by a rounded slope.
    flat = np.abs(x2 - x1) > np.abs(y2 - y1)
    major1, minor1 = np.where(flat, x1, y1), np.where(flat, y1, x1)
    major2, minor2 = np.where(flat, x2, y2), np.where(flat, y2, x2)
    backward = major2 < major1
    major1, major2 = np.where(backward, major2, major1), np.where(backward, major1, major2)
    minor1, minor2 = np.where(backward, minor2, minor1), np.where(backward, minor1, minor2)
    slope = _divide((minor2 - minor1) * _ONE, (major2 - major1) | 1)
    line, offset = _count_up(((major2 - major1) >> _BITS) + 1)
    major = ((major1 + _HALF) >> _BITS)[line] + offset
    minor = (minor1[line] + _HALF + offset * slope[line]) >> _BITS
    # The last pixel is drawn on its own, since the steps may stop before it.
    line = np.concatenate([line, np.arange(len(region))])
    major = np.concatenate([major, (major2 + _HALF) >> _BITS])
    minor = np.concatenate([minor, (minor2 + _HALF) >> _BITS])
    x, y = np.where(flat[line], major, minor), np.where(flat[line], minor, major)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    at = (region[line] * height + y)[inside]
    np.minimum.at(first.reshape(-1), at, x[inside])
    np.maximum.at(last.reshape(-1), at, x[inside])


def _cut(
    along1: _Ints, across1: _Ints, along2: _Ints, across2: _Ints, limit: int
) -> tuple[_Ints, _Ints, _Ints, _Ints, NDArray[np.bool_]]:
    """Cut lines to 0 <= along <= limit. Returns the four coordinates, and which lines have a part in there."""
    low, high = np.minimum(along1, along2), np.maximum(along1, along2)
    kept = (high >= 0) & (low <= limit)
    if ((low >= 0) & (high <= limit)).all():
        return along1, across1, along2, across2, kept
    along1, across1 = _cut_end(along1, across1, along2, across2, limit, kept)
    along2, across2 = _cut_end(along2, across2, along1, across1, limit, kept)
    return along1, across1, along2, across2, kept


def _cut_end(
    along: _Ints, across: _Ints, other_along: _Ints, other_across: _Ints, limit: int, kept: NDArray[np.bool_]
) -> tuple[_Ints, _Ints]:
    """Move the ends that lie outside along their lines to the bound."""
    bound = np.minimum(np.maximum(along, 0), limit)
    outside = kept & (bound != along)
    span = np.where(outside, other_along - along, 1)
    shift = (bound - along).astype(np.float64) * (other_across - across) / span
    return np.where(outside, bound, along), across + np.where(outside, np.trunc(shift), 0).astype(np.int64)


def _divide(numerator: _Ints, denominator: _Ints) -> _Ints:
    """Quotient towards zero; the denominator is positive."""
    return np.sign(numerator) * (np.abs(numerator) // denominator)


def _count_up(counts: _Ints) -> tuple[_Ints, _Ints]:
    """For counts (2, 3): indices (0, 0, 1, 1, 1) and numbers (0, 1, 0, 1, 2)."""
    index = np.repeat(np.arange(len(counts)), counts)
    return index, np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
