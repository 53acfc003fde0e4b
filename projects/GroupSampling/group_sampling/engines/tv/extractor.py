"""The features of any of torchvision's classifiers, at strides 4 to 32, for the backbones of both engines.

Which layers they are is found by running the network on tensors without values, not looked up in a table: the feature
of a stride is the output of the last block before the next stride. A block is the outermost module that is not a plain
container; layers inside a block that expands and then sub-samples are none.
"""

import difflib
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth

from ...config import ConfigError, check_values

TORCHVISION_BACKBONE = "build_torchvision_fpn_backbone"

STAGES = (2, 3, 4, 5)  # the feature "res<stage>" has stride 2 ** stage

_SIZE = (224, 352)  # height and width of the image that shows the strides: multiples of 32, not square
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # themselves: blocks are often subclasses


class Feature(NamedTuple):
    """Where a feature comes from."""

    path: str  # of the block whose output it is
    channels: int
    is_channels_last: bool  # (B, H, W, C) rather than (B, C, H, W)


class Layout(NamedTuple):
    """The blocks of a classifier."""

    features: dict[int, Feature]  # by stage, 1 being the stem
    blocks: tuple[str, ...]  # paths in the order of calls

    def blocks_until(self, stage: int) -> tuple[str, ...]:
        """The blocks that a stage and those before it have."""
        stages = [s for s in self.features if s <= stage]
        return self.blocks[: self.blocks.index(self.features[max(stages)].path) + 1] if stages else ()


def _find_blocks(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if type(child) in _CONTAINERS:
            yield from _find_blocks(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _build_without_values(name: str) -> nn.Module:
    import torchvision.models

    try:
        with torch.device("meta"):
            return torchvision.models.get_model(name, weights=None)
    except NotImplementedError:  # RegNet reads values of tensors to find its widths; any other cause recurs below
        return torchvision.models.get_model(name, weights=None).to("meta")


@functools.lru_cache
def find_layout(name: str) -> Layout:
    """
    Args:
        name: as ``torchvision.models.get_model`` knows it.

    Raises:
        ConfigError: unknown, bound to one image size, or without features at strides 4, 8, 16 and 32.
    """
    import torchvision.models  # in functions: a config is read, and refused, also where no model is built

    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        close = difflib.get_close_matches(name, names)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(
            f"MODEL.BACKBONE.TORCHVISION_NAME: expected a classifier of torchvision.models ({', '.join(names)}), got "
            f"{name!r}{hint}"
        )
    model = _build_without_values(name).eval()
    found: dict[int, Feature] = {}
    blocks: list[str] = []

    def note(path: str, module: nn.Module, inputs: tuple, output: object) -> None:
        blocks.append(path)
        if not isinstance(output, Tensor) or output.dim() != 4:
            return
        shape = tuple(output.shape)
        for stage in (1, *STAGES):
            size = tuple(side >> stage for side in _SIZE)
            if shape[2:] == size:
                found[stage] = Feature(path, shape[1], False)
            elif shape[1:3] == size:
                found[stage] = Feature(path, shape[3], True)

    for path, block in _find_blocks(model):
        block.register_forward_hook(functools.partial(note, path))
    try:
        model(torch.empty(1, 3, *_SIZE, device="meta"))
    except (AssertionError, RuntimeError) as error:
        raise ConfigError(
            f"MODEL.BACKBONE.TORCHVISION_NAME: expected a classifier of images of any size, got {name!r}, which does "
            f"not take one of {_SIZE[0]} x {_SIZE[1]} pixels ({error})"
        ) from error
    missing = [2**stage for stage in STAGES if stage not in found]
    if missing:
        raise ConfigError(
            "MODEL.BACKBONE.TORCHVISION_NAME: expected a classifier with features at strides 4, 8, 16 and 32, got "
            f"{name!r}, which has none at {missing}"
        )
    return Layout(found, tuple(blocks))


def stages_in_use(cfg: CfgNode, levels: Sequence[str]) -> list[int]:
    """The stages of ``MODEL.FPN.IN_FEATURES`` ("res2" is 2) from the finest of ``levels`` ("p2", ...) to the coarsest.

    Raises:
        ConfigError: they are not consecutive stages.
    """
    used, names = list(cfg.MODEL.FPN.IN_FEATURES), [f"res{stage}" for stage in STAGES]
    first = names.index(used[0]) if used and used[0] in names else 0
    if not used or used != names[first:][: len(used)]:
        raise ConfigError(f"MODEL.FPN.IN_FEATURES: expected consecutive ones of {names}, finest first, got {used}")
    stages = [int(name[3:]) for name in used]
    read = [stage for stage in stages if f"p{stage}" in levels]
    return stages[stages.index(read[0]) :] if read else stages


def check_torchvision_backbone(cfg: CfgNode) -> None:
    """Refuse a config of :data:`TORCHVISION_BACKBONE` that cannot be built.

    Raises:
        ConfigError: naming the key.
    """
    find_layout(cfg.MODEL.BACKBONE.TORCHVISION_NAME)
    reason = f"the norms of {TORCHVISION_BACKBONE} are torchvision's"
    check_values(cfg, {"MODEL.RESNETS.NORM": ("FrozenBN", "BN")}, reason)
    check_values(cfg, {"MODEL.BACKBONE.FREEZE_AT": (0, 1, *STAGES)}, "these are its stages")
    stages_in_use(cfg, cfg.MODEL.RPN.IN_FEATURES)


class FrozenBatchNorm(FrozenBatchNorm2d):
    """``FrozenBatchNorm2d`` that keeps the 16 bits of its input, which its float32 buffers would widen."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        bias = self.bias - self.running_mean * scale
        return x * scale.to(x.dtype)[:, None, None] + bias.to(x.dtype)[:, None, None]


class TorchvisionBody(nn.Module):
    """A classifier of torchvision up to a given stage.

    Stochastic depth is off: a resumed run could not repeat its draws.

    Args:
        name: of the classifier; its weights are random.
        stages: those to return, some of :data:`STAGES`.
        norm: "BN", or "FrozenBN" for batch norms that are not trained; other norms stay as they are.
        freeze_at: stages up to this one are not trained, 1 being the stem. Their batch norms are frozen as well.

    Attributes:
        channels: of the features, by stage.
    """

    def __init__(self, name: str, stages: Sequence[int], *, norm: str, freeze_at: int):
        import torchvision.models
        from torchvision.models.feature_extraction import create_feature_extractor

        super().__init__()
        layout = find_layout(name)
        self._features = {f"res{stage}": layout.features[stage] for stage in sorted(stages)}
        self.channels = {stage: layout.features[stage].channels for stage in sorted(stages)}
        model = torchvision.models.get_model(name, weights=None)
        for module in model.modules():
            if isinstance(module, StochasticDepth):
                module.p = 0.0
        nodes = {feature.path: res for res, feature in self._features.items()}
        self.extractor = create_feature_extractor(model, nodes, suppress_diff_warning=True)

        frozen = tuple(f"{path}." for path in layout.blocks_until(freeze_at))
        for parameter_name, parameter in self.extractor.named_parameters():
            parameter.requires_grad_(not parameter_name.startswith(frozen))
        for path, module in list(self.extractor.named_modules()):
            if isinstance(module, nn.BatchNorm2d) and (norm == "FrozenBN" or f"{path}.".startswith(frozen)):
                self.extractor.set_submodule(path, _freeze(module))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W), sides multiples of the coarsest stride, to "res2", ...: (B, C, H / 4, W / 4), ..."""
        found = self.extractor(x)
        return {
            name: found[name].permute(0, 3, 1, 2).contiguous() if feature.is_channels_last else found[name]
            for name, feature in self._features.items()
        }


def _freeze(norm: nn.BatchNorm2d) -> FrozenBatchNorm:
    frozen = FrozenBatchNorm(norm.num_features, eps=norm.eps)
    frozen.load_state_dict(norm.state_dict())
    return frozen
