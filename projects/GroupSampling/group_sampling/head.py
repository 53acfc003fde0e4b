"""The prediction head shared by all levels and both engines."""

import torch.nn.functional as F
from torch import Tensor, nn


class SoftmaxRPNHead(nn.Module):
    """A 3x3 convolution, then per anchor a two-way softmax classifier (Sec. 3) and four box deltas.

    A softmax over (background, face) depends only on the difference of the two logits, so the head returns that
    difference: ``sigmoid(difference)`` is the softmax probability and binary cross entropy on it is the softmax loss.
    The output therefore has the shape that Detectron2's and torchvision's RPNs expect of their heads, while the
    parameters are those of the two-way classifier.
    """

    def __init__(self, in_channels: int, num_anchors: int):
        """``num_anchors``: anchors per cell, equal on all levels."""
        super().__init__()
        self.conv = nn.Conv2d(in_channels, in_channels, kernel_size=3, padding=1)
        self.cls_logits = nn.Conv2d(in_channels, 2 * num_anchors, kernel_size=1)
        self.bbox_pred = nn.Conv2d(in_channels, 4 * num_anchors, kernel_size=1)
        for layer in (self.conv, self.cls_logits, self.bbox_pred):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """
        Args:
            features: per level (B, C, H, W).

        Returns:
            logits: per level (B, A, H, W), face logit minus background logit.
            deltas: per level (B, 4 * A, H, W), four consecutive channels per anchor.
        """
        logits, deltas = [], []
        for feature in features:
            hidden = F.relu(self.conv(feature))
            background, face = self.cls_logits(hidden).chunk(2, dim=1)
            logits.append(face - background)
            deltas.append(self.bbox_pred(hidden))
        return logits, deltas
