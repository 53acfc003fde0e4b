"""An FPN whose top-down path is bilinear and which computes only the levels in use, and what can be below it."""

from collections.abc import Sequence

import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_resnet_backbone
from detectron2.modeling.backbone.fpn import FPN
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet
from torch import Tensor

from ...config import ConfigError
from ..build import SINGLE_STAGE_HEADS
from ..tv.extractor import TorchvisionBody, check_torchvision_backbone, stages_in_use


class BilinearFPN(FPN):
    """FPN with bilinear up-sampling (paper, Fig. 3), without the convolutions of levels that nobody reads.

    A level that is computed and not used wastes a third of a P2-only detector's time, and its parameters, which never
    get a gradient, stop distributed training.
    """

    def __init__(
        self, bottom_up: Backbone, in_features: Sequence[str], out_features: Sequence[str], out_channels: int, **kwargs
    ):
        """
        Args:
            in_features: bottom-up features, finest first, as for ``FPN``.
            out_features: the levels to return, such as ``["p2"]``.
            out_channels, kwargs: as for ``FPN``.
        """
        levels = [f"p{bottom_up.output_shape()[f].stride.bit_length() - 1}" for f in in_features]
        missing = sorted(set(out_features) - set(levels))
        if missing:
            raise ConfigError(
                f"MODEL.FPN.IN_FEATURES {list(in_features)}: expected levels among {levels}, got {missing}"
            )
        finest = min(levels.index(f) for f in out_features)
        super().__init__(bottom_up, in_features[finest:], out_channels, **kwargs)
        for level in self._out_features:
            if level not in out_features:
                delattr(self, f"fpn_output{level[1:]}")
        self._levels = self._out_features
        self._out_features = [level for level in self._levels if level in out_features]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Returns the ``out_features``, finest first, each (B, out_channels, H, W)."""
        bottom_up = self.bottom_up(x)
        results, inner = {}, None
        for level, feature in zip(reversed(self._levels), reversed(self.in_features)):
            lateral = getattr(self, f"fpn_lateral{level[1:]}")(bottom_up[feature])
            if inner is None:
                inner = lateral
            else:
                inner = lateral + F.interpolate(inner, size=lateral.shape[-2:], mode="bilinear", align_corners=False)
                if self._fuse_type == "avg":
                    inner = inner / 2
            if level in self._out_features:
                results[level] = getattr(self, f"fpn_output{level[1:]}")(inner)
        return {level: results[level] for level in self._out_features}


_NUM_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


@BACKBONE_REGISTRY.register()
def build_group_sampling_resnet_backbone(cfg, input_shape: ShapeSpec) -> ResNet:
    """Detectron2's ResNet; R18 and R34 of any width, which ``build_resnet_backbone`` only makes 64 channels wide."""
    resnets = cfg.MODEL.RESNETS
    if resnets.DEPTH not in (18, 34) or resnets.RES2_OUT_CHANNELS == 64:
        return build_resnet_backbone(cfg, input_shape)
    stem = BasicStem(in_channels=input_shape.channels, out_channels=resnets.STEM_OUT_CHANNELS, norm=resnets.NORM)
    stages, in_channels, out_channels = [], resnets.STEM_OUT_CHANNELS, resnets.RES2_OUT_CHANNELS
    for stage, num_blocks in enumerate(_NUM_BLOCKS[resnets.DEPTH]):
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                num_blocks,
                stride_per_block=[1 if stage == 0 else 2] + [1] * (num_blocks - 1),
                in_channels=in_channels,
                out_channels=out_channels,
                norm=resnets.NORM,
            )
        )
        in_channels, out_channels = out_channels, 2 * out_channels
    return ResNet(stem, stages, out_features=resnets.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)


class TorchvisionBackbone(TorchvisionBody, Backbone):
    """:class:`~group_sampling.engines.tv.extractor.TorchvisionBody` as a backbone of Detectron2."""

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {f"res{stage}": ShapeSpec(channels=c, stride=2**stage) for stage, c in self.channels.items()}


def levels_in_use(cfg) -> list[str]:
    """The levels "p2", ... that the RPN and the ROI heads read."""
    levels = set(cfg.MODEL.RPN.IN_FEATURES)
    if cfg.MODEL.ROI_HEADS.NAME != SINGLE_STAGE_HEADS:
        levels |= set(cfg.MODEL.ROI_HEADS.IN_FEATURES)
    return sorted(levels)


def _build_fpn(cfg, bottom_up: Backbone) -> BilinearFPN:
    """:class:`BilinearFPN` with the levels in use; in ``MODEL.FPN.IN_FEATURES``, "res3" is any feature of stride 8."""
    shapes = bottom_up.output_shape()
    by_stride = {f"res{shape.stride.bit_length() - 1}": name for name, shape in shapes.items()}
    finest = min(levels_in_use(cfg), default="p2")
    wanted = [name for name in cfg.MODEL.FPN.IN_FEATURES if name >= f"res{finest[1:]}" or not name.startswith("res")]
    in_features = [name if name in shapes else by_stride.get(name, name) for name in wanted]
    strides = [shapes[name].stride for name in in_features if name in shapes]
    if len(strides) < len(in_features) or strides != [strides[0] << i for i in range(len(strides))] or not strides:
        found = {name: shape.stride for name, shape in shapes.items()}
        raise ConfigError(
            "MODEL.FPN.IN_FEATURES: expected features of the backbone whose strides double, finest first, got "
            f"{cfg.MODEL.FPN.IN_FEATURES}; it has (with their strides) {found}"
        )
    return BilinearFPN(
        bottom_up,
        in_features=in_features,
        out_features=levels_in_use(cfg),
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


@BACKBONE_REGISTRY.register()
def build_group_sampling_fpn_backbone(cfg, input_shape: ShapeSpec) -> BilinearFPN:
    """:class:`BilinearFPN` over ``MODEL.BACKBONE.BOTTOM_UP``, a ResNet by default."""
    name = cfg.MODEL.BACKBONE.BOTTOM_UP
    builders = dict(BACKBONE_REGISTRY)
    if name not in builders or name == cfg.MODEL.BACKBONE.NAME:
        others = sorted(builders.keys() - {cfg.MODEL.BACKBONE.NAME})
        raise ConfigError(f"MODEL.BACKBONE.BOTTOM_UP: expected one of {others}, got {name!r}")
    return _build_fpn(cfg, builders[name](cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_torchvision_fpn_backbone(cfg, input_shape: ShapeSpec) -> BilinearFPN:
    """:class:`BilinearFPN` over torchvision's classifier ``MODEL.BACKBONE.TORCHVISION_NAME``."""
    check_torchvision_backbone(cfg)
    body = TorchvisionBackbone(
        cfg.MODEL.BACKBONE.TORCHVISION_NAME,
        stages_in_use(cfg, levels_in_use(cfg)),
        norm=cfg.MODEL.RESNETS.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
    return _build_fpn(cfg, body)
