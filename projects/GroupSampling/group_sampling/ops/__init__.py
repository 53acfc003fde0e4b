"""Operators on anchors: matching and group sampling. C++ and CUDA where the extension is built, else plain torch."""

from ._library import ExtensionStatus, extension_status
from .iou import pairwise_iou
from .match import MatchOptions, MatchResult, match_anchor_grid, match_anchors
from .sample import AssignResult, SampleResult, assign_and_sample, sample_groups

__all__ = [
    "AssignResult",
    "ExtensionStatus",
    "MatchOptions",
    "MatchResult",
    "SampleResult",
    "assign_and_sample",
    "extension_status",
    "match_anchor_grid",
    "match_anchors",
    "pairwise_iou",
    "sample_groups",
]
