"""The Detectron2 engine.

Importing it registers its backbones, anchor generator, heads, RPN, meta-architecture and the built-in data sets.
"""

from ...config import add_group_sampling_config
from . import bottom_up  # noqa: F401, registers
from .backbone import BilinearFPN, build_group_sampling_fpn_backbone, build_torchvision_fpn_backbone
from .data import GroupSamplingMapper, IgnoringInstances, register_datasets
from .evaluator import GroupSamplingEvaluator
from .rcnn import GroupSamplingRCNN, ProposalDetections
from .roi_heads import GroupedFastRCNNOutputLayers, GroupedROIHeads
from .rpn import GroupedAnchorGenerator, GroupSamplingRPN, SoftmaxRPNHead
from .train import GroupSamplingCheckpointer, Trainer
from .tta import GroupSamplingTTA

__all__ = [
    "BilinearFPN",
    "GroupSamplingCheckpointer",
    "GroupSamplingEvaluator",
    "GroupSamplingMapper",
    "GroupSamplingRCNN",
    "GroupSamplingRPN",
    "GroupSamplingTTA",
    "GroupedAnchorGenerator",
    "GroupedFastRCNNOutputLayers",
    "GroupedROIHeads",
    "IgnoringInstances",
    "ProposalDetections",
    "SoftmaxRPNHead",
    "Trainer",
    "add_group_sampling_config",
    "build_group_sampling_fpn_backbone",
    "build_torchvision_fpn_backbone",
    "register_datasets",
]
