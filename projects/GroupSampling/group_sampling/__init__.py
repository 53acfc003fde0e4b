"""Group Sampling for Scale Invariant Face Detection (Ming et al., CVPR 2019).

The core imports torch, torchvision.ops, numpy and fvcore; Detectron2 and torchvision's models are imported by
:mod:`group_sampling.engines` alone.
"""

import importlib
import importlib.abc
import sys

from .version import __version__

__all__ = ["__version__"]


class _TorchBeforeExtension(importlib.abc.MetaPathFinder):
    """Imports torch before ``group_sampling._C``, which links against the libraries that torch loads."""

    def find_spec(self, name, path, target=None):
        if name == f"{__name__}._C":
            importlib.import_module("torch")


sys.meta_path.insert(0, _TorchBeforeExtension())
