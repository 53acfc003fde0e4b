"""The Detectron2 engine.

Importing it registers its backbone, anchor generator, head, RPN, ROI heads, meta-architecture and data sets.
"""

from ...config import add_group_sampling_config
from .backbone import BilinearFPN, build_group_sampling_fpn_backbone
from .data import GroupSamplingMapper, register_datasets
from .evaluator import WiderFaceEvaluator
from .rcnn import GroupSamplingRCNN, ProposalDetections
from .rpn import GroupedAnchorGenerator, GroupSamplingRPN, SoftmaxRPNHead
from .train import GroupSamplingCheckpointer, Trainer

__all__ = [
    "BilinearFPN",
    "GroupSamplingCheckpointer",
    "GroupSamplingMapper",
    "GroupSamplingRCNN",
    "GroupSamplingRPN",
    "GroupedAnchorGenerator",
    "ProposalDetections",
    "SoftmaxRPNHead",
    "Trainer",
    "WiderFaceEvaluator",
    "add_group_sampling_config",
    "build_group_sampling_fpn_backbone",
    "register_datasets",
]
