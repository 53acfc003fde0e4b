"""Group Sampling for Scale Invariant Face Detection (Ming et al., CVPR 2019).

The core imports torch, torchvision.ops, numpy and fvcore; Detectron2 and torchvision's models are imported by
:mod:`group_sampling.engines` alone.
"""

import importlib
import importlib.abc
import sys
from typing import Any

from .version import __version__

__all__ = ["FaceDetector", "Faces", "__version__"]

_MODULES = {"FaceDetector": "detector", "Faces": "faces"}


def __getattr__(name: str) -> Any:
    """Loads torch only when the name is used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


class _TorchBeforeExtension(importlib.abc.MetaPathFinder):
    """Imports torch before ``group_sampling._C``, which links against the libraries that torch loads."""

    def find_spec(self, name, path, target=None):
        if name == f"{__name__}._C":
            importlib.import_module("torch")


sys.meta_path.insert(0, _TorchBeforeExtension())
