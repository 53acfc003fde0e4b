"""Any classifier of torchvision below the FPN, on both engines; RegNet, Swin and ViT of Detectron2."""

import importlib.util

import pytest
import torch
import torchvision
from torch import nn
from tv_cases import CONFIGS, SMALL_OPTS

from group_sampling.checkpoint import convert_names, resolve_weights
from group_sampling.config import ConfigError
from group_sampling.engines.tv.config import load_config
from group_sampling.engines.tv.extractor import TorchvisionBody, find_layout
from group_sampling.engines.tv.model import build_model
from group_sampling.engines.tv.train import GroupSamplingCheckpointer

NEEDS_DETECTRON2 = pytest.mark.skipif(
    importlib.util.find_spec("detectron2") is None, reason="Detectron2 is not installed"
)
# Of blocks that halve the resolution, the ones before: read off the papers' tables and torchvision's module lists.
FEATURES = {
    "mobilenet_v3_small": {"features.1": 16, "features.3": 24, "features.8": 48, "features.12": 576},
    "efficientnet_b0": {"features.2": 24, "features.3": 40, "features.5": 112, "features.8": 1280},
}
CHANNELS = {
    "mobilenet_v3_large": (24, 40, 112, 960),
    "resnet50": (256, 512, 1024, 2048),
    "regnet_x_400mf": (32, 64, 160, 400),
    "convnext_tiny": (96, 192, 384, 768),
    "densenet121": (256, 512, 1024, 1024),
    "swin_t": (96, 192, 384, 768),
    "vgg11": (256, 512, 512, 512),
}


def torchvision_opts(name, *opts):
    names = "MODEL.BACKBONE.NAME", "build_torchvision_fpn_backbone", "MODEL.BACKBONE.TORCHVISION_NAME", name
    return [*SMALL_OPTS, "MODEL.RESNETS.NORM", "BN", *names, *opts]


def make_cfg(name, *opts, config="fpn_finest_sampling"):
    return load_config(str(CONFIGS / f"{config}.yaml"), torchvision_opts(name, *opts))


def make_d2(*opts, config="fpn_finest_sampling"):
    from detectron2.modeling import build_model as build_d2

    from group_sampling.engines.d2.train import load_config as load_d2

    return build_d2(load_d2(str(CONFIGS / f"{config}.yaml"), opts))


@pytest.mark.parametrize("name", FEATURES)
def test_features_are_outputs_of_the_classifiers_stages(name):
    body = TorchvisionBody(name, [2, 3, 4, 5], norm="BN", freeze_at=0).eval()
    classifier = torchvision.models.get_model(name).eval()
    loaded = classifier.load_state_dict(body.extractor.state_dict(), strict=False)
    assert loaded.unexpected_keys == [] and all(key.startswith("classifier.") for key in loaded.missing_keys)
    expected = {}
    for path in FEATURES[name]:
        classifier.get_submodule(path).register_forward_hook(
            lambda module, inputs, output, path=path: expected.update({path: output.clone()})
        )
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        classifier(image)
        found = body(image)
    assert list(found) == ["res2", "res3", "res4", "res5"]
    assert list(body.channels.values()) == list(FEATURES[name].values())
    for feature, reference, stage in zip(found.values(), expected.values(), body.channels):
        assert torch.equal(feature, reference)
        assert feature.shape == (1, body.channels[stage], 64 >> stage, 96 >> stage)


@pytest.mark.parametrize("name", CHANNELS)
def test_channels_of_other_classifiers(name):
    features = find_layout(name).features
    assert tuple(features[stage].channels for stage in (2, 3, 4, 5)) == CHANNELS[name]
    assert features[2].is_channels_last == (name == "swin_t")


@pytest.mark.parametrize(
    "name, message",
    [
        ("mobilenet_v3_larg", r"TORCHVISION_NAME: expected a classifier.*did you mean mobilenet_v3_large"),
        ("fasterrcnn_resnet50_fpn", r"TORCHVISION_NAME: expected a classifier of torchvision\.models"),
        ("vit_b_16", r"TORCHVISION_NAME: expected a classifier of images of any size, got 'vit_b_16'"),
        ("alexnet", r"strides 4, 8, 16 and 32, got 'alexnet', which has none at \[4, 8, 16, 32\]"),
    ],
)
def test_classifiers_that_are_no_backbone(name, message):
    with pytest.raises(ConfigError, match=message):
        make_cfg(name)


@pytest.mark.parametrize(
    "opts, message",
    [
        (["MODEL.RESNETS.NORM", "GN"], r"MODEL\.RESNETS\.NORM: expected 'FrozenBN' or 'BN', got 'GN'"),
        (["MODEL.FPN.IN_FEATURES", "['res2', 'res4']"], r"MODEL\.FPN\.IN_FEATURES: expected consecutive"),
        (["MODEL.FPN.IN_FEATURES", "[]"], r"MODEL\.FPN\.IN_FEATURES: expected consecutive"),
        (["MODEL.RPN.IN_FEATURES", "['p6']"], r"MODEL\.RPN\.IN_FEATURES: expected some of the FPN's levels"),
        (["MODEL.BACKBONE.BOTTOM_UP", "build_swin_t_backbone"], r"MODEL\.BACKBONE\.BOTTOM_UP.*--engine detectron2"),
    ],
)
def test_values_that_do_not_fit(opts, message):
    with pytest.raises(ConfigError, match=message):
        make_cfg("mobilenet_v3_small", *opts)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
@pytest.mark.parametrize("freeze_at, frozen", [(0, set()), (1, {"0"}), (2, {"0", "1"}), (3, {"0", "1", "2", "3"})])
def test_frozen_stages(freeze_at, frozen, norm):
    """MobileNetV3-Small: the stem is features.0, stride 4 features.1, stride 8 features.2 and 3."""
    extractor = TorchvisionBody("mobilenet_v3_small", [2, 3, 4, 5], norm=norm, freeze_at=freeze_at).extractor
    untrained = {name.split(".")[1] for name, p in extractor.named_parameters() if not p.requires_grad}
    assert untrained == frozen  # the weights of frozen norms are no parameters at all
    norms = {name.split(".")[1] for name, module in extractor.named_modules() if isinstance(module, nn.BatchNorm2d)}
    every = {str(index) for index in range(13)}
    assert norms == (set() if norm == "FrozenBN" else every - frozen)


def train_step(model, *args):
    model.train()
    losses = model(*args)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("name", ["efficientnet_b0", "shufflenet_v2_x0_5", "resnet18"])
def test_every_parameter_learns(name):
    """Levels below the finest in use are left out: parameters without a gradient stop several processes."""
    model = build_model(make_cfg(name, config="table2/p3_sampling"))
    train_step(model, [torch.rand(3, 60, 70) * 255], [{"boxes": torch.tensor([[10.0, 10.0, 28.0, 30.0]])}])
    model.eval()
    with torch.no_grad():
        assert {"boxes", "scores", "labels", "anchor_scales"} <= model([torch.rand(3, 60, 70) * 255])[0].keys()


def test_draws_no_random_depth():
    """What a resumed run could not repeat."""
    body = TorchvisionBody("efficientnet_b0", [2, 3], norm="FrozenBN", freeze_at=0).train()
    state = torch.get_rng_state()
    body(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(state, torch.get_rng_state())


def write_classifier(folder, name):
    torch.manual_seed(1)
    state = torchvision.models.get_model(name).state_dict()
    if name == "densenet121":  # torchvision's files have "norm.1" where its modules have "norm1"
        parts = [(f"{layer}{i}.", f"{layer}.{i}.") for layer in ("norm", "conv") for i in (1, 2)]
        for key in list(state):
            old = key
            for new_part, old_part in parts:
                old = old.replace(new_part, old_part) if "denselayer" in key else old
            state[old] = state.pop(key)
        assert "features.denseblock1.denselayer1.norm.1.weight" in state
    path = folder / f"{name}.pth"
    torch.save(state, path)
    return str(path)


@pytest.mark.parametrize(
    "name", ["mobilenet_v3_small", "resnet18", pytest.param("densenet121", marks=pytest.mark.slow)]
)
def test_weights_of_a_classifier(tmp_path, name):
    path = write_classifier(tmp_path, name)
    model = build_model(make_cfg(name)).train()
    GroupSamplingCheckpointer(model).load(path)
    torch.manual_seed(1)
    expected = torchvision.models.get_model(name).state_dict()
    found = model.backbone.body.extractor.state_dict()
    assert len(found) > 50 and all(torch.equal(value, expected[key]) for key, value in found.items())
    with pytest.raises(ConfigError, match=r"missing \(backbone\.fpn"):  # no detector
        GroupSamplingCheckpointer(model.eval()).load(path)
    other = build_model(make_cfg("shufflenet_v2_x0_5")).train()
    if name != "resnet18":  # both have a conv1
        with pytest.raises(ValueError, match="none of its .* parameters"):
            GroupSamplingCheckpointer(other).load(path)


@NEEDS_DETECTRON2
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "resnet18"])
def test_weights_convert_both_ways(tmp_path, name):
    from group_sampling.engines.d2.train import GroupSamplingCheckpointer as D2Checkpointer

    ours, theirs = build_model(make_cfg(name)), make_d2(*torchvision_opts(name))
    torch.save({"model": ours.state_dict()}, tmp_path / "tv.pth")
    D2Checkpointer(theirs.eval()).load(str(tmp_path / "tv.pth"))  # all of them, or it raises
    back = convert_names(theirs.state_dict(), "torchvision")
    expected = ours.state_dict()
    assert all(torch.equal(back[key], value) for key, value in expected.items() if "_extra_state" not in key)
    assert theirs.backbone.bottom_up.extractor.state_dict().keys() == ours.backbone.body.extractor.state_dict().keys()


def test_addresses_of_torchvisions_weights(tmp_path, monkeypatch):
    def no_network(url, file, **kwargs):
        raise OSError(f"no route to {url}, hash {kwargs['hash_prefix']}")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(ConfigError, match=r"no route to https://\S+/mobilenet_v3_small-047dcff4\.pth, hash 047dcff4"):
        resolve_weights("torchvision://mobilenet_v3_small")
    for name in ("vit_h_14", "mobilenet", ""):  # without weights of this recipe; unknown
        with pytest.raises(ConfigError, match=r"MODEL\.WEIGHTS.*IMAGENET1K_V1"):
            resolve_weights(f"torchvision://{name}")


BOTTOM_UP = {
    "regnetx_400mf": {4: 32, 8: 64, 16: 160, 32: 384},
    "swin_t": {4: 96, 8: 192, 16: 384, 32: 768},
    "vit_t": {4: 32, 8: 32, 16: 32, 32: 32},
}


@NEEDS_DETECTRON2
@pytest.mark.parametrize(
    "name, level", [("regnetx_400mf", "p2"), ("regnetx_400mf", "p3"), ("swin_t", "p3"), ("vit_t", "p2")]
)
def test_backbones_of_detectron2(name, level):
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage

    if name == "vit_t":
        pytest.importorskip("timm", reason="timm, which Detectron2's ViT needs, is not installed")
    opts = ["MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.BOTTOM_UP", f"build_{name}_backbone"]
    model = make_d2(*SMALL_OPTS, *opts, "MODEL.RPN.IN_FEATURES", f"['{level}']")
    shapes = model.backbone.bottom_up.output_shape().values()
    strides = {shape.stride: shape.channels for shape in shapes}
    assert strides == {s: c for s, c in BOTTOM_UP[name].items() if s >= 2 ** int(level[1])}
    target = Instances((60, 70), gt_boxes=Boxes(torch.tensor([[10.0, 10.0, 28.0, 30.0]])), gt_classes=torch.zeros(1))
    with EventStorage():
        train_step(model, [{"image": torch.rand(3, 60, 70) * 255, "instances": target}])
    model.eval()
    with torch.no_grad():
        (found,) = model([{"image": torch.rand(3, 60, 70) * 255}])
    assert found["instances"].has("anchor_scales") and found["instances"].image_size == (60, 70)


@NEEDS_DETECTRON2
def test_vit_without_its_package(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.models.layers", None)
    with pytest.raises(ConfigError, match=r"BOTTOM_UP is 'build_vit_t_backbone'.*pip install timm"):
        make_d2(*SMALL_OPTS, "MODEL.BACKBONE.BOTTOM_UP", "build_vit_t_backbone")


@NEEDS_DETECTRON2
def test_swin_freezes_stages():
    opts = ["MODEL.BACKBONE.BOTTOM_UP", "build_swin_t_backbone", "MODEL.BACKBONE.FREEZE_AT", "2"]
    bottom_up = make_d2(*SMALL_OPTS, *opts).backbone.bottom_up
    frozen = {".".join(name.split(".")[:2]) for name, p in bottom_up.named_parameters() if not p.requires_grad}
    assert frozen == {"patch_embed.proj", "patch_embed.norm", "layers.0"}


@NEEDS_DETECTRON2
@pytest.mark.parametrize(
    "opts, message",
    [
        (
            ["MODEL.BACKBONE.BOTTOM_UP", "build_swin_backbone"],
            r"BACKBONE\.BOTTOM_UP: expected .*got 'build_swin_b",
        ),
        (["MODEL.BACKBONE.BOTTOM_UP", "build_group_sampling_fpn_backbone"], r"MODEL\.BACKBONE\.BOTTOM_UP: expected"),
        (["MODEL.BACKBONE.BOTTOM_UP", "build_vit_t_backbone", "MODEL.BACKBONE.FREEZE_AT", "1"], r"FREEZE_AT.*ViT"),
        (["MODEL.BACKBONE.BOTTOM_UP", "build_regnetx_400mf_backbone"], r"MODEL\.RESNETS\.NORM.*RegNet"),
        (
            ["MODEL.BACKBONE.BOTTOM_UP", "build_swin_t_backbone", "MODEL.FPN.IN_FEATURES", "['res2', 'res3']"],
            r"MODEL\.FPN\.IN_FEATURES: expected the last to be 'res5'",
        ),
        (["MODEL.FPN.IN_FEATURES", "['res2', 'res4']"], r"MODEL\.FPN\.IN_FEATURES: expected .* strides double"),
        (["MODEL.FPN.IN_FEATURES", "['res2', 'c3']"], r"MODEL\.FPN\.IN_FEATURES: .*its? .*strides\) \{'res2': 4"),
    ],
)
def test_detectron2_backbones_that_do_not_fit(opts, message):
    with pytest.raises(ConfigError, match=message):
        make_d2(*SMALL_OPTS, *opts)


@NEEDS_DETECTRON2
def test_stock_detectron2_config_with_a_torchvision_backbone(tmp_path):
    """As a user of Detectron2 would build it, without this project's loader of configs."""
    from detectron2.config import get_cfg
    from detectron2.modeling import build_backbone

    import group_sampling.engines.d2 as d2

    cfg = get_cfg()
    d2.add_group_sampling_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_torchvision_fpn_backbone"
    cfg.MODEL.BACKBONE.TORCHVISION_NAME = "mobilenet_v3_small"
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    backbone = build_backbone(cfg)
    assert {name: shape.stride for name, shape in backbone.output_shape().items()} == {
        "p2": 4,
        "p3": 8,
        "p4": 16,
        "p5": 32,
    }
    assert backbone(torch.zeros(1, 3, 64, 64))["p5"].shape == (1, 256, 2, 2)
