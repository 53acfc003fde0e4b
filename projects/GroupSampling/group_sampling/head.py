"""The prediction head shared by all levels and both engines."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .anchors import AnchorGrid, lookup

# Logits (B, K) and deltas (B, K, 4) of the anchors with the given (B, K) indices, or of all n anchors for None.
Predict = Callable[[Tensor | None], tuple[Tensor, Tensor]]


class SoftmaxRPNHead(nn.Module):
    """A 3x3 convolution, then per anchor a two-way softmax classifier (Sec. 5) and four box deltas.

    A softmax over (background, face) depends only on the difference of the two logits, so the head returns that
    difference: ``sigmoid(difference)`` is the softmax probability and binary cross entropy on it is the softmax loss.
    The output therefore has the shape that Detectron2's and torchvision's RPNs expect of their heads, while the
    parameters are those of the two-way classifier.

    Attributes:
        fired: (C,) bool, which hidden units were positive somewhere in the last training pass, of all cells or of those
            at the anchors that were asked for. None before the first.
    """

    def __init__(
        self, in_channels: int, num_anchors: int, *, steps: Sequence[int] = (), face_prior: float | None = None
    ):
        """
        Args:
            num_anchors: anchors per cell, equal on all levels.
            steps: empty, or for FPN-finest-stride: of the single feature, the anchors are split into len(steps) levels
                of equally many, and level i has them in every steps[i]-th row and column of cells only.
            face_prior: probability of a face that a fresh head predicts; None: 1/2. Focal loss starts from a small one.
        """
        super().__init__()
        self.fired: Tensor | None = None
        self.num_anchors = num_anchors
        self.steps = tuple(steps)
        self.conv = nn.Conv2d(in_channels, in_channels, kernel_size=3, padding=1)
        self.cls_logits = nn.Conv2d(in_channels, 2 * num_anchors, kernel_size=1)
        self.bbox_pred = nn.Conv2d(in_channels, 4 * num_anchors, kernel_size=1)
        for layer in (self.conv, self.cls_logits, self.bbox_pred):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.get_parameter("bias"))
        if face_prior is not None:
            face_bias = self.cls_logits.get_parameter("bias")[num_anchors:]
            nn.init.constant_(face_bias, math.log(face_prior / (1 - face_prior)))

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """
        Args:
            features: per level (B, C, H, W); a single one if there are ``steps``.

        Returns:
            logits: per level (B, A, H, W), face logit minus background logit.
            deltas: per level (B, 4 * A, H, W), four consecutive channels per anchor.
        """
        weight, bias = self._output_layer()
        logits, deltas, fired = [], [], []
        for feature in features:
            hidden = F.relu(self.conv(feature))
            if self.training:
                fired.append((hidden.detach() > 0).any((0, 2, 3)))
            for first, last, step in self._levels():
                outputs = F.conv2d(
                    hidden[:, :, ::step, ::step],
                    weight[first:last].flatten(0, 1)[:, :, None, None],
                    bias[first:last].flatten(),
                ).unflatten(1, (-1, 5))
                logits.append(outputs[:, :, 0])
                deltas.append(outputs[:, :, 1:].flatten(1, 2))
        if self.training:
            self.fired = torch.stack(fired).any(0)
        return logits, deltas

    def predictor(self, features: list[Tensor], grid: AnchorGrid) -> Predict:
        """Predictions on demand: a training step that draws a few anchors evaluates the head at their cells alone.

        The values and gradients are those of :meth:`forward` up to rounding, for a fraction of its work.

        Args:
            features: as for :meth:`forward`.
            grid: the anchors of the features.

        Raises:
            ValueError: the grid's anchors are not those that the head predicts.
        """
        sizes = [
            (-(-feature.shape[-2] // step), -(-feature.shape[-1] // step))
            for feature in features
            for first, last, step in self._levels()
            for _ in range(first, last)
        ]
        found = [(lattice.height, lattice.width) for lattice in grid.lattices]
        if found != sizes:
            raise ValueError(f"SoftmaxRPNHead: expected a grid of lattices of sizes {sizes}, got {found}")

        def predict(index: Tensor | None) -> tuple[Tensor, Tensor]:
            num_cells = sum(feature.shape[-2] * feature.shape[-1] for feature in features)
            if index is None or 2 * index.shape[1] > num_cells:
                return predict_from(*flatten_predictions(*self(features)))(index)
            return self._predict_at(features, grid, index)

        return predict

    def _predict_at(self, features: list[Tensor], grid: AnchorGrid, index: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K) and (B, K, 4) predictions of the anchors ``index`` (B, K), in the order of ``AnchorGrid.boxes``."""
        # All features as one table of cells, each with its border of zeros.
        tables = [F.pad(feature, (1, 1, 1, 1)).permute(0, 2, 3, 1).flatten(0, 2) for feature in features]
        starts = [sum(len(table) for table in tables[:i]) for i in range(len(tables))]
        heights, widths = ([feature.shape[dim] + 2 for feature in features] for dim in (-2, -1))
        steps = [step for first, last, step in self._levels() for _ in range(first, last)]

        place = grid.locate(index)
        feature, anchor = place.lattice // self.num_anchors, place.lattice % self.num_anchors
        step, width = lookup(steps, anchor), lookup(widths, feature)
        image = torch.arange(len(index), device=index.device)[:, None]
        row = image * lookup(heights, feature) + step * place.row
        # The rows of the nine cells around an anchor.
        first = lookup(starts, feature) + row * width + step * place.column
        rows = torch.stack([first + dy * width + dx for dy in range(3) for dx in range(3)], dim=-1)
        # The gradient of an embedding is summed in a fixed order on every device, unlike that of index_select.
        patches = F.embedding(rows, torch.cat(tables) if len(tables) > 1 else tables[0]).flatten(2)
        kernel = self.conv.weight.permute(0, 2, 3, 1).flatten(1)
        hidden = F.relu(F.linear(patches, kernel, self.conv.bias))
        self.fired = (hidden.detach() > 0).any((0, 1))
        weight, bias = self._output_layer()
        outputs = F.linear(hidden, weight.flatten(0, 1), bias.flatten()).unflatten(2, (-1, 5))
        outputs = outputs.gather(2, anchor[..., None, None].expand(-1, -1, 1, 5)).squeeze(2)
        return outputs[..., 0], outputs[..., 1:]

    def _levels(self) -> list[tuple[int, int, int]]:
        """(first anchor, one past the last, step) of the levels that one feature has."""
        if not self.steps:
            return [(0, self.num_anchors, 1)]
        count = self.num_anchors // len(self.steps)
        return [(i * count, (i + 1) * count, step) for i, step in enumerate(self.steps)]

    def _output_layer(self) -> tuple[Tensor, Tensor]:
        """The two 1x1 convolutions as one: (A, 5, C) and (A, 5), of each anchor the logit difference and the deltas."""
        cls_weight = self.cls_logits.weight.view(2, self.num_anchors, 1, -1)
        # torch declares the bias of every convolution as optional.
        cls_bias = self.cls_logits.bias.view(2, self.num_anchors, 1)  # type: ignore[union-attr]
        box_weight = self.bbox_pred.weight.view(self.num_anchors, 4, -1)
        box_bias = self.bbox_pred.bias.view(self.num_anchors, 4)  # type: ignore[union-attr]
        return (
            torch.cat([cls_weight[1] - cls_weight[0], box_weight], dim=1),
            torch.cat([cls_bias[1] - cls_bias[0], box_bias], dim=1),
        )


def flatten_predictions(logits: Sequence[Tensor], deltas: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Bring a head's per-level maps into the order of :meth:`AnchorGrid.boxes`.

    Args:
        logits: per level (B, A, H, W).
        deltas: per level (B, 4 * A, H, W).

    Returns:
        (B, n) and (B, n, 4).
    """
    flat_logits = [level.permute(0, 2, 3, 1).flatten(1) for level in logits]
    flat_deltas = [level.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for level in deltas]
    return torch.cat(flat_logits, dim=1), torch.cat(flat_deltas, dim=1)


def predict_from(logits: Tensor, deltas: Tensor) -> Predict:
    """:data:`Predict` of predictions that exist already: ``logits`` (B, n) and ``deltas`` (B, n, 4)."""

    def predict(index: Tensor | None) -> tuple[Tensor, Tensor]:
        if index is None:
            return logits, deltas
        return logits.gather(1, index), deltas.gather(1, index[..., None].expand(-1, -1, 4))

    return predict
