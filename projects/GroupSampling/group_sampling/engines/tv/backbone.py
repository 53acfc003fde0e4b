"""torchvision's networks and feature pyramid, with the widths, norms and levels that a config asks for."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import FeaturePyramidNetwork

from .config import FPN_BACKBONES
from .extractor import TORCHVISION_BACKBONE, FrozenBatchNorm, TorchvisionBody, stages_in_use

NUM_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def _frozen_batch_norm(channels: int) -> FrozenBatchNorm:
    norm = FrozenBatchNorm(channels)
    norm.running_var -= norm.eps  # the identity until weights are loaded, as in Detectron2
    return norm


_NORMS: dict[str, Callable[[int], nn.Module] | None] = {
    "": None,
    "FrozenBN": _frozen_batch_norm,
    "BN": nn.BatchNorm2d,
    "GN": partial(nn.GroupNorm, 32),
}


class ResNetBody(ResNet):
    """torchvision's ResNet up to a given stage, with the widths and norms that Detectron2's config can ask for.

    Args:
        depth: a key of :data:`NUM_BLOCKS`; below 50 the blocks are ``BasicBlock``, else ``Bottleneck``.
        norm: "FrozenBN", "BN" or "GN" (32 groups).
        stem_channels, res2_channels: outputs of the stem and of stage 2; every further stage doubles them.
        num_groups, width_per_group: of stage 2's 3x3 convolutions in a ``Bottleneck``; the width doubles likewise.
        last_stage: 2 ... 5 (Detectron2's "res2" ... "res5", torchvision's layer1 ... layer4).
        freeze_at: stages up to this one are not trained, 1 being the stem. Their batch norms are frozen as well.
    """

    def __init__(
        self,
        depth: int,
        *,
        norm: str,
        stem_channels: int,
        res2_channels: int,
        num_groups: int,
        width_per_group: int,
        last_stage: int,
        freeze_at: int,
    ):
        nn.Module.__init__(self)  # ResNet's own builds stages of fixed widths
        norms = {s: _NORMS["FrozenBN" if norm == "BN" and s <= freeze_at else norm] for s in range(1, last_stage + 1)}
        block = BasicBlock if depth < 50 else Bottleneck
        # What ResNet._make_layer reads. A Bottleneck of torchvision has an inner width of planes * base_width / 64 per
        # group. Detectron2's is width_per_group in stage 2 and doubles as the planes do, so base_width is constant.
        self.dilation, self.groups, self.inplanes = 1, num_groups, stem_channels
        self.base_width = 64 if depth < 50 else 64 * width_per_group * block.expansion // res2_channels
        self.conv1 = nn.Conv2d(3, stem_channels, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = norms[1](stem_channels)
        self.stages = range(2, last_stage + 1)
        for stage, num_blocks in zip(self.stages, NUM_BLOCKS[depth]):
            self._norm_layer = norms[stage]
            planes = res2_channels * 2 ** (stage - 2) // block.expansion
            layer = self._make_layer(block, planes, num_blocks, stride=1 if stage == 2 else 2)
            self.add_module(f"layer{stage - 1}", layer)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        layers = [getattr(self, f"layer{stage - 1}") for stage in self.stages]
        for module in [nn.ModuleList([self.conv1, self.bn1]), *layers][:freeze_at]:
            module.requires_grad_(False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) to "res2", "res3", ...: (B, C, H / 4, W / 4), (B, 2 C, H / 8, W / 8), ..., rounded up."""
        x = F.relu_(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        features = {}
        for stage in self.stages:
            x = features[f"res{stage}"] = getattr(self, f"layer{stage - 1}")(x)
        return features


class BilinearFPN(FeaturePyramidNetwork):
    """``FeaturePyramidNetwork`` with a bilinear top-down path (paper, Fig. 3) that computes only the levels in use.

    Blocks are numbered by stage, 0 being P2, also where the finest stage is not the second: one name, one level.

    Args:
        in_channels: stage -> channels of the body's feature, finest first; stages follow each other.
        out_stages: stages whose levels are returned. Finer levels are left out altogether, coarser ones have no output
            convolution: parameters without a gradient would stop distributed training.
        out_channels, norm_layer: as for ``FeaturePyramidNetwork``.
    """

    def __init__(
        self,
        in_channels: dict[int, int],
        out_stages: Sequence[int],
        out_channels: int,
        norm_layer: Callable[[int], nn.Module] | None,
    ):
        stages = [stage for stage in in_channels if stage >= min(out_stages)]
        super().__init__([in_channels[stage] for stage in stages], out_channels, norm_layer=norm_layer)
        self.stages = stages
        blocks = list(zip(stages, self.inner_blocks, self.layer_blocks))
        self.inner_blocks = nn.ModuleDict({str(stage - 2): inner for stage, inner, _ in blocks})
        self.layer_blocks = nn.ModuleDict({str(stage - 2): layer for stage, _, layer in blocks if stage in out_stages})

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """ "res2", ... to the levels in use, "p2", ..., each (B, out_channels, H, W) of its stage's size."""
        results, inner = {}, None
        for stage in reversed(self.stages):
            lateral = self.inner_blocks[str(stage - 2)](x[f"res{stage}"])
            if inner is None:
                inner = lateral
            else:
                inner = lateral + F.interpolate(inner, size=lateral.shape[-2:], mode="bilinear", align_corners=False)
            if str(stage - 2) in self.layer_blocks:
                results[f"p{stage}"] = self.layer_blocks[str(stage - 2)](inner)
        return results


class Backbone(nn.Module):
    """A network, with or without FPN, that returns the features of the RPN in its order."""

    def __init__(self, body: ResNetBody | TorchvisionBody, fpn: BilinearFPN | None, out_features: Sequence[str]):
        super().__init__()
        self.body = body
        self.fpn = fpn
        self.out_features = tuple(out_features)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        features = self.body(x)
        if self.fpn is not None:
            features = self.fpn(features)
        return OrderedDict((name, features[name]) for name in self.out_features)


def build_backbone(cfg: CfgNode) -> Backbone:
    """The backbone of a config that :func:`~group_sampling.engines.tv.config.load_config` has checked."""
    resnets, out_features = cfg.MODEL.RESNETS, cfg.MODEL.RPN.IN_FEATURES
    has_fpn = cfg.MODEL.BACKBONE.NAME in FPN_BACKBONES
    stages = [stage_of(feature) for feature in (cfg.MODEL.FPN.IN_FEATURES if has_fpn else out_features)]
    if cfg.MODEL.BACKBONE.NAME == TORCHVISION_BACKBONE:
        body = TorchvisionBody(
            cfg.MODEL.BACKBONE.TORCHVISION_NAME,
            stages_in_use(cfg, out_features),
            norm=resnets.NORM,
            freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        )
        channels = body.channels
    else:
        body = ResNetBody(
            resnets.DEPTH,
            norm=resnets.NORM,
            stem_channels=resnets.STEM_OUT_CHANNELS,
            res2_channels=resnets.RES2_OUT_CHANNELS,
            num_groups=resnets.NUM_GROUPS,
            width_per_group=resnets.WIDTH_PER_GROUP,
            last_stage=max(stages),
            freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        )
        channels = {stage: resnets.RES2_OUT_CHANNELS * 2 ** (stage - 2) for stage in stages}
    fpn = None
    if has_fpn:
        fpn = BilinearFPN(
            channels,
            [stage_of(feature) for feature in out_features],
            cfg.MODEL.FPN.OUT_CHANNELS,
            _NORMS[cfg.MODEL.FPN.NORM],
        )
    return Backbone(body, fpn, out_features)


def stage_of(feature: str) -> int:
    """The stage of a feature: "res2" and "p2" are of stage 2, whose stride is 2 ** 2."""
    return int(feature.removeprefix("res").removeprefix("p"))
