"""Which anchor scale a box belongs to."""

import itertools
from collections.abc import Sequence


def scale_borders(scales: Sequence[float]) -> list[float]:
    """The len(scales) - 1 box areas, in square pixels, that separate ascending scales.

    √area is nearer to s than to t > s, in log scale, where area < s · t. So the index of the nearest scale is that of
    ``searchsorted(borders, area)`` (NumPy, left) and ``bucketize(area, borders)`` (torch); on a tie, the smaller scale.
    """
    return [small * large for small, large in itertools.pairwise(scales)]
