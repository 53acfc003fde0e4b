"""Detectron2's RegNet, Swin and ViT as values of ``MODEL.BACKBONE.BOTTOM_UP``.

Detectron2 has them as classes for its Python configs only. Each is registered here as ``build_<name>_backbone`` with
the sizes of its paper, and yields the features at strides 4 to 32 that the FPN asks for. Random depth is off, so that a
resumed run repeats the uninterrupted one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone import RegNet, SimpleFeaturePyramid, SwinTransformer, ViT
from detectron2.modeling.backbone.regnet import ResBottleneckBlock, SimpleStem
from torch import nn

from ...config import ConfigError, check_values
from ..tv.extractor import stages_in_use
from .backbone import levels_in_use


def _stages(cfg) -> list[int]:
    """Those to return: outputs that nobody reads would have parameters without a gradient."""
    stages = stages_in_use(cfg, levels_in_use(cfg))
    if stages[-1] != 5:
        raise ConfigError(
            f"MODEL.FPN.IN_FEATURES: expected the last to be 'res5' with {cfg.MODEL.BACKBONE.BOTTOM_UP}, got "
            f"{cfg.MODEL.FPN.IN_FEATURES}"
        )
    return stages


def _build_regnet(cfg, **sizes: Any) -> RegNet:
    check_values(cfg, {"MODEL.RESNETS.NORM": ("FrozenBN", "BN", "SyncBN")}, "these are RegNet's norms")
    return RegNet(
        stem_class=SimpleStem,
        stem_width=32,
        block_class=ResBottleneckBlock,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        norm=cfg.MODEL.RESNETS.NORM,
        out_features=[f"s{stage - 1}" for stage in _stages(cfg)],
        **sizes,
    )


def _build_swin(cfg, **sizes: Any) -> SwinTransformer:
    return SwinTransformer(
        drop_path_rate=0.0,
        out_indices=[stage - 2 for stage in _stages(cfg)],
        frozen_stages=cfg.MODEL.BACKBONE.FREEZE_AT or -1,
        **sizes,
    )


def _build_vit(cfg, *, global_blocks: tuple[int, ...], depth: int, **sizes: Any) -> SimpleFeaturePyramid:
    """ViTDet's: window attention but for ``global_blocks``, and a pyramid made of the last feature."""
    check_values(cfg, {"MODEL.BACKBONE.FREEZE_AT": (0,)}, "ViT has no stages to freeze")
    try:
        net = ViT(
            depth=depth,
            window_size=14,
            window_block_indexes=[block for block in range(depth) if block not in global_blocks],
            use_rel_pos=True,
            drop_path_rate=0.0,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            **sizes,
        )
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise ConfigError(
            f"MODEL.BACKBONE.BOTTOM_UP is {cfg.MODEL.BACKBONE.BOTTOM_UP!r}, but Detectron2's ViT needs the package "
            f"{package}, which is not installed: pip install {package}"
        ) from error
    scales = [2.0 ** (4 - stage) for stage in _stages(cfg)]
    return SimpleFeaturePyramid(net, "last_feat", cfg.MODEL.FPN.OUT_CHANNELS, scales)


_BUILDERS: dict[str, Callable[..., Backbone]] = {
    "regnetx_400mf": partial(_build_regnet, depth=22, w_a=24.48, w_0=24, w_m=2.54, group_width=16),
    "regnetx_4gf": partial(_build_regnet, depth=23, w_a=38.65, w_0=96, w_m=2.43, group_width=40),
    "regnety_4gf": partial(_build_regnet, depth=22, w_a=31.41, w_0=96, w_m=2.24, group_width=64, se_ratio=0.25),
    "swin_t": partial(_build_swin, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "swin_s": partial(_build_swin, embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "swin_b": partial(_build_swin, embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), window_size=12),
    "vit_t": partial(_build_vit, embed_dim=192, depth=12, num_heads=3, global_blocks=(2, 5, 8, 11)),
    "vit_s": partial(_build_vit, embed_dim=384, depth=12, num_heads=6, global_blocks=(2, 5, 8, 11)),
    "vit_b": partial(_build_vit, embed_dim=768, depth=12, num_heads=12, global_blocks=(2, 5, 8, 11)),
}


def _register(name: str, builder: Callable[..., Backbone]) -> None:
    def build(cfg, input_shape: ShapeSpec) -> Backbone:
        return builder(cfg)

    build.__name__ = f"build_{name}_backbone"
    BACKBONE_REGISTRY.register(build)


for _name, _builder in _BUILDERS.items():
    _register(_name, _builder)
