"""How many positives and negatives of every scale a detector would train on (paper, Fig. 2), before it trains.

Beside the numbers that are drawn, the effective ones: what each anchor counts in the mean of the classification losses
under the config's reading of group sampling (docs/deviations.md).

From annotations, image sizes and the augmentation's geometry alone: no pixels, no network.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from fvcore.common.config import CfgNode

from ..anchors import AnchorGrid, cell_anchors
from ..config import ConfigError
from ..data.images import image_size
from ..data.records import ImageRecord
from ..engines.build import AnchorLayout, build_train_transform
from ..monitor import count_anchors
from ..samplers import build_anchor_sampler

_BATCH = 64  # images per call of the operator


@dataclass(frozen=True)
class SampleBalance:
    """Mean numbers of anchors that the loss sees in an image.

    Attributes:
        scales: (G,) anchor scales in pixels, ascending.
        positives, negatives: (G,) drawn.
        effective_positives, effective_negatives: (G,) what they count in the mean of the losses; together as many.
        num_images: images that the means are over.
    """

    scales: tuple[float, ...]
    positives: tuple[float, ...]
    negatives: tuple[float, ...]
    effective_positives: tuple[float, ...]
    effective_negatives: tuple[float, ...]
    num_images: int

    def per_scale(self) -> dict[str, tuple[float, float]]:
        """Scale in pixels -> (positives, negatives), drawn."""
        return {f"{s:g}": counts for s, counts in zip(self.scales, zip(self.positives, self.negatives))}

    def shares(self, *, effective: bool = False) -> dict[str, tuple[float, float]]:
        """Scale in pixels -> (positives, negatives) in percent of all samples, as Figure 2 has them."""
        counts = np.array([self.positives, self.negatives])
        if effective:
            counts = np.array([self.effective_positives, self.effective_negatives])
        shares = 100 * counts / counts.sum().clip(min=np.finfo(float).tiny)
        return {f"{scale:g}": (pos, neg) for scale, pos, neg in zip(self.scales, *shares.tolist())}


def total_variation(a: SampleBalance, b: SampleBalance, *, effective: bool = False) -> float:
    """Between the distributions of two detectors' samples over scales and labels: 0 for equal ones, at most 1."""
    p, q = a.shares(effective=effective), b.shares(effective=effective)
    none = (0.0, 0.0)
    return sum(abs(x - y) for scale in {*p, *q} for x, y in zip(p.get(scale, none), q.get(scale, none))) / 200


def sample_balance(
    cfg: CfgNode,
    records: Sequence[ImageRecord],
    *,
    seed: int = 0,
    on_progress: Callable[[int], None] = lambda num_images: None,
) -> SampleBalance:
    """Augment every image's annotations once, as training would, and count what the config's sampler then draws.

    Every image has its own anchors, as in the paper's training with one image on each GPU. Images in larger batches are
    padded to the largest of the batch, which adds a few negatives.

    Args:
        cfg: a complete config of either engine.
        records: images to draw for; a size that the annotations do not give is read from the image's header.
        seed: of augmentation and draws.
        on_progress: called with the number of images done since the last call.

    Raises:
        ConfigError: the sampler needs the network's logits.
        UnreadableImageError: the size of an image has to be read and cannot be.
        ValueError: no records.
    """
    if not records:
        raise ValueError("sample_balance: expected at least one image, got none")
    sampler = build_anchor_sampler(cfg)
    if sampler.needs_logits:
        raise ConfigError(
            "MODEL.GROUP_SAMPLING.SAMPLER: expected a sampler that chooses anchors without a network, got "
            f"{cfg.MODEL.GROUP_SAMPLING.SAMPLER!r}, which needs the network's logits: its balance is not known before "
            "training; metrics.json of a training run has it (rpn/num_pos@..., rpn/num_neg@...)"
        )
    transform = build_train_transform(cfg)
    grid_of = functools.lru_cache(maxsize=None)(functools.partial(anchor_grid, cfg))
    scales = grid_of(32, 32).scales
    drawn, effective = np.zeros((2, len(scales))), np.zeros((2, len(scales)))
    num_batches = 0
    waiting: dict[AnchorGrid, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)

    def draw(grid: AnchorGrid) -> None:
        nonlocal num_batches, drawn, effective
        faces, ignored = zip(*waiting.pop(grid))
        chosen = sampler(grid, faces, ignored, iteration=num_batches)
        drawn += count_anchors(grid, chosen, chosen.labels >= 0).numpy()
        effective += count_anchors(grid, chosen, sampler.effective_weights(chosen)).numpy()
        num_batches += 1
        on_progress(len(faces))

    for index, record in enumerate(records):
        height, width = image_size(record)
        geometry = transform.sample(height, width, np.random.default_rng([seed, index]))
        faces, _, ignored = transform.apply_annotations(
            record.boxes, record.ignore, record.classes, geometry, height, width
        )
        x0, y0, x1, y1 = geometry.crop
        grid = grid_of(y1 - y0, x1 - x0)
        waiting[grid].append((torch.from_numpy(faces), torch.from_numpy(ignored)))
        if len(waiting[grid]) == _BATCH:
            draw(grid)
    for grid in list(waiting):
        draw(grid)
    (pos, neg), (effective_pos, effective_neg) = (
        [tuple(row.tolist()) for row in counts / len(records)] for counts in (drawn, effective)
    )
    return SampleBalance(scales, pos, neg, effective_pos, effective_neg, len(records))


def anchor_grid(cfg: CfgNode, height: int, width: int) -> AnchorGrid:
    """The anchors that either engine tiles over an image of (height, width) pixels, without building the network.

    Raises:
        ConfigError: ``MODEL.RPN.IN_FEATURES`` names something else than "p2" ... or "res2" ..., or the anchors do not
            fit the features.
    """
    rpn = cfg.MODEL.RPN
    stages = [_stage(feature) for feature in rpn.IN_FEATURES]
    if rpn.IN_FEATURES[0].startswith("p"):  # an FPN pads to its coarsest stride, a plain ResNet not at all
        divisor = 2 ** _stage(cfg.MODEL.FPN.IN_FEATURES[-1])
        height, width = (divisor * _ceil_div(side, divisor) for side in (height, width))
    # Every stage halves and rounds up, which is one division by its stride, rounded up.
    strides = [2**stage for stage in stages]
    layout = AnchorLayout.from_config(cfg, strides)
    return layout.grid(
        [(_ceil_div(height, stride), _ceil_div(width, stride)) for stride in strides],
        [cell_anchors(sizes, ratios) for sizes, ratios in zip(layout.sizes, layout.aspect_ratios)],
    )


def _stage(feature: str) -> int:
    name = feature.removeprefix("res").removeprefix("p")
    if not name.isdigit():
        raise ConfigError(f'MODEL.RPN.IN_FEATURES: expected "p2", "res4" or the like, got {feature!r}')
    return int(name)


def _ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)
