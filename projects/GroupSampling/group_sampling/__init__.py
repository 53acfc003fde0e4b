"""Group Sampling for Scale Invariant Face Detection (Ming et al., CVPR 2019).

The core imports torch, torchvision.ops, numpy and fvcore; Detectron2 and torchvision's models are imported by
:mod:`group_sampling.engines` alone.
"""

from .version import __version__

__all__ = ["__version__"]
