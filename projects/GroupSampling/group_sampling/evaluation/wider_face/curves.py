"""Precision-recall curves of several detectors in one figure, published ones among them."""

import importlib.util
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...files import save_figure
from ..mat5 import MatValue, read_mat5
from ..results import Curve
from .result import WiderFaceResult, area_under_envelope

logger = logging.getLogger(__name__)

_FILE_NAME = re.compile(r"wider_pr_info_.+_(easy|medium|hard)_val\.mat")
_VARIABLES = ("pr_cruve", "pr_curve")  # the evaluation tools write the first
_MAX_POINTS = 1_000_000


class PublishedCurve(NamedTuple):
    """A detector's curve as WIDER FACE's evaluation tools store it."""

    name: str
    subset: str  # "easy", "medium" or "hard"
    curve: Curve

    @property
    def ap(self) -> float:
        """In [0, 1]; equal to what the tools print in their legend."""
        return area_under_envelope(*self.curve)


def read_published_curves(folder: str | os.PathLike) -> list[PublishedCurve]:
    """Read the curves that are published with the evaluation tools, ``<method>/wider_pr_info_*_<subset>_val.mat``.

    Those of MATLAB 7.3 are HDF5 files, which the package h5py reads; without it they are left out with a warning.

    Raises:
        FileNotFoundError: there is no such file below ``folder``.
        ValueError: a file is no MATLAB file or has no curve; names the file.
    """
    found = sorted(Path(folder).rglob("*.mat"))
    subsets = {file: match[1] for file in found if (match := _FILE_NAME.fullmatch(file.name))}
    if not subsets:
        raise FileNotFoundError(f"{folder}: expected <method>/wider_pr_info_*_{{easy,medium,hard}}_val.mat, got none")
    has_hdf5, curves, skipped = importlib.util.find_spec("h5py") is not None, [], set()
    for file, subset in subsets.items():
        with open(file, "rb") as stream:
            is_hdf5 = stream.read(10) == b"MATLAB 7.3"
        if is_hdf5 and not has_hdf5:
            skipped.add(file.parent.name)
            continue
        table = (_read_hdf5 if is_hdf5 else _read_mat5)(file)
        if not isinstance(table, np.ndarray) or table.ndim != 2 or table.shape[1] != 2 or len(table) == 0:
            got = "nothing" if table is None else getattr(table, "shape", table)
            raise ValueError(f"{file}: {_VARIABLES[0]}: expected an array (points, 2), got {got!r:.80}")
        precision, recall = table.astype(np.float64).T
        curves.append(PublishedCurve(file.parent.name, subset, (recall, precision)))
    if skipped:
        logger.warning(
            f"{folder}: {len(skipped)} methods left out: their files are HDF5, which needs h5py (pip install h5py): "
            + ", ".join(sorted(skipped))
        )
    return curves


def plot_comparison(
    path: str | os.PathLike,
    results: Mapping[str, WiderFaceResult],
    published: Sequence[PublishedCurve] = (),
    *,
    title: str = "WIDER FACE validation",
) -> None:
    """Draw a panel for each subset that all results have, atomically; the suffix gives the format (PNG without one).

    Detectors stand in the legend by descending AP; published curves are thin.
    """
    from matplotlib.figure import Figure  # draws off screen and leaves the caller's backend alone

    subsets = [
        name for name in next(iter(results.values())).ap if all(name in result.ap for result in results.values())
    ]
    if published:  # of these three only
        subsets = [name for name in subsets if any(curve.subset == name for curve in published)]
    num_lines = len(results) + max((sum(c.subset == name for c in published) for name in subsets), default=0)
    num_columns = 1 if num_lines <= 20 else 2
    legend_height = 0.17 * -(-num_lines // num_columns) + 0.3
    num_rows = -(-len(subsets) // 4)
    per_row = -(-len(subsets) // num_rows)
    figure = Figure(figsize=(5.5 * per_row, num_rows * (5 + legend_height)), dpi=130, layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(num_rows, per_row, squeeze=False).ravel()
    for axes in panels[len(subsets) :]:
        axes.axis("off")
    for axes, subset in zip(panels, subsets):
        lines = []
        for index, curve in enumerate(c for c in published if c.subset == subset):
            style = {"color": f"C{index % 10}", "linestyle": ("-", "--", ":", "-.")[index // 10 % 4], "linewidth": 0.8}
            lines.append((curve.ap, curve.name, curve.curve, {**style, "alpha": 0.7}))
        for index, (name, result) in enumerate(results.items()):
            style = {"color": "black" if published and index == 0 else f"C{index}", "linewidth": 2.2, "zorder": 3}
            lines.append((result.ap[subset], name, result.curves[subset], style))
        lines.sort(key=lambda line: -math.inf if math.isnan(line[0]) else line[0], reverse=True)
        for ap, name, (recall, precision), style in lines:
            label = f"{name} ({'n/a' if math.isnan(ap) else f'{ap:.3f}'})"
            (line,) = axes.plot(recall, precision, label=label, **style)
            axes.plot(recall[-1:], precision[-1:], "o", color=line.get_color(), markersize=2.5)  # may be one point
        axes.set(xlim=(0, 1.01), ylim=(0, 1.01), xlabel="Recall", ylabel="Precision", title=subset.capitalize())
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=7, ncols=num_columns, frameon=False)
    save_figure(figure, path)


def _read_mat5(file: Path) -> "MatValue | None":
    return next(iter(read_mat5(file, _VARIABLES).values()), None)


def _read_hdf5(file: Path) -> NDArray | None:
    """The curve in a MATLAB 7.3 file, in MATLAB's order of dimensions."""
    import h5py

    try:
        with h5py.File(file, "r") as content:
            data = next((content[name] for name in _VARIABLES if name in content), None)
            if not isinstance(data, h5py.Dataset) or data.dtype.kind != "f" or data.size > _MAX_POINTS:
                return None
            return data[()].T
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:  # what h5py raises for damaged files
        raise ValueError(f"{file}: expected a MATLAB 7.3 file, cannot read it: {error}") from error
