"""From the rectangle of a detection to the ellipse that FDDB's annotators would have drawn."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...data.fddb import MAX_COORDINATE

# (rows, columns) of S3FD's matrices as HDF5 shows them; MATLAB's order of dimensions is the opposite one.
_S3FD_SHAPES = {"meanX": (4, 1), "stdX": (4, 1), "w": (5, 4), "meanY": (5, 1), "stdY": (5, 1)}
_MAX_FILE_BYTES = 1 << 20  # S3FD's has 3 kB


@dataclass(frozen=True, eq=False)  # eq: comparing arrays with == has no truth value
class EllipseRegressor:
    """Affine map from (x, y, w, h) to (semi-major axis, semi-minor axis, φ, center x, center y), as S3FD has it.

    φ is the angle between the major axis and the vertical. The annotated angle θ, between it and the horizontal, jumps
    from π/2 to -π/2 at upright faces, so that nothing linear could follow it.

    Attributes:
        weights: (4, 5).
        bias: (5,).
    """

    weights: NDArray[np.float64]
    bias: NDArray[np.float64]

    def __call__(self, boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        """(k, 5) ellipses (axes, θ, center) of (k, 4) XYXY boxes; no number exceeds a million."""
        ellipses = np.clip(_xywh(boxes) @ self.weights + self.bias, -MAX_COORDINATE, MAX_COORDINATE)
        ellipses[:, 2] = _turn(ellipses[:, 2])
        return ellipses

    @classmethod
    def fit(cls, boxes: NDArray[np.float64], ellipses: NDArray[np.float64]) -> "EllipseRegressor":
        """Least squares on k detections (k, 4) and the ellipses (k, 5) that they found.

        Raises:
            ValueError: fewer than five pairs.
        """
        if len(boxes) < 5:
            raise ValueError(f"an ellipse regressor needs at least 5 pairs of a detection and a face, got {len(boxes)}")
        target = ellipses.copy()
        target[:, 2] = _turn(target[:, 2])
        inputs = np.column_stack([_xywh(boxes), np.ones(len(boxes))])
        solution = np.linalg.lstsq(inputs, target, rcond=None)[0]
        return cls(solution[:4], solution[4])

    @classmethod
    def from_s3fd(cls, path: str | os.PathLike) -> "EllipseRegressor":
        """Read the ``Fit.mat`` that the authors of S3FD published, a MATLAB file of version 7.3 (HDF5).

        Raises:
            ModuleNotFoundError: the package h5py is not installed.
            FileNotFoundError: nothing is at ``path``.
            ValueError: no HDF5 file, it lacks one of the matrices meanX, stdX, w, meanY, stdY, one of them has another
                shape, or their numbers make no map of finite and reasonable coefficients.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; S3FD's regressor is its Fit.mat")
        try:
            import h5py
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{path}: reading it needs h5py: pip install h5py") from error
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ValueError(f"{path}: expected at most {_MAX_FILE_BYTES >> 20} MiB, got {path.stat().st_size} bytes")
        values = {}
        try:
            with h5py.File(path, "r") as file:
                for name, shape in _S3FD_SHAPES.items():
                    data = file.get(name)
                    # Shape and type before the content, which a damaged file may claim to be huge.
                    if not isinstance(data, h5py.Dataset) or data.shape != shape or data.dtype.kind != "f":
                        found = f"{data.dtype} {data.shape}" if isinstance(data, h5py.Dataset) else "nothing"
                        raise ValueError(f"{name}: expected real numbers of shape {shape}, got {found}")
                    values[name] = np.asarray(data[()], dtype=np.float64)
        except (OSError, RuntimeError, KeyError, TypeError, ValueError, OverflowError, MemoryError) as error:
            raise ValueError(f"{path}: expected S3FD's regressor (HDF5), cannot read it: {error}") from error
        with np.errstate(all="ignore"):
            weights = values["w"].T / values["stdX"] * values["stdY"].ravel()
            bias = values["meanY"].ravel() - values["meanX"].ravel() @ weights
        largest = np.abs([*weights, bias]).max()
        if not largest <= MAX_COORDINATE:  # nan included
            raise ValueError(f"{path}: expected coefficients up to {MAX_COORDINATE:g}, got {largest:g}")
        return cls(weights, bias)


def _xywh(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]])


def _turn(angle: NDArray[np.float64]) -> NDArray[np.float64]:
    """By a right angle, towards 0: θ to φ and back."""
    return np.where(angle >= 0, angle - np.pi / 2, angle + np.pi / 2)
