"""The torchvision engine's detector: the parameters of the Detectron2 engine's, and what it does with odd inputs."""

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from tv_cases import write_tiny_config

import group_sampling.engines.tv.rpn as tv_rpn
from group_sampling.checkpoint import convert_names
from group_sampling.config import ConfigError
from group_sampling.engines.tv.backbone import build_backbone
from group_sampling.engines.tv.config import load_config
from group_sampling.engines.tv.model import build_model
from group_sampling.engines.tv.train import GroupSamplingCheckpointer

C4 = [
    *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES", "['res4']"),
    *("MODEL.RPN.IN_FEATURES", "['res4']"),
]
FOUR_LEVELS = [
    *("MODEL.RPN.IN_FEATURES", "['p2', 'p3', 'p4', 'p5']"),
    *("MODEL.ANCHOR_GENERATOR.SIZES", "[[16], [32], [64], [128]]"),
]
FROM_P3 = ["MODEL.FPN.IN_FEATURES", "['res3', 'res4', 'res5']", "MODEL.RPN.IN_FEATURES", "['p3']"]
P4_OF_ALL = ["MODEL.RPN.IN_FEATURES", "['p4']"]
FULL_WIDTH = ["MODEL.RESNETS.STEM_OUT_CHANNELS", 64, "MODEL.FPN.OUT_CHANNELS", 256]


@pytest.fixture
def make_cfg(tmp_path):
    return lambda *opts: load_config(write_tiny_config(tmp_path), [str(opt) for opt in opts])


@pytest.fixture
def make_model(make_cfg):
    def make(*opts):
        torch.manual_seed(0)
        return build_model(make_cfg(*opts))

    return make


def image(height=96, width=128, seed=0):
    return 255 * torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


def target(*boxes, ignore=()):
    return {
        name: torch.tensor(b, dtype=torch.float32).reshape(-1, 4)
        for name, b in (("boxes", boxes), ("ignore_boxes", ignore))
    }


def detectron2_twin(cfg):
    """The Detectron2 engine's model of the same config."""
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    import detectron2.config
    from detectron2.modeling import build_model as build

    import group_sampling.engines.d2  # noqa: F401 (registers)
    from group_sampling.config import add_group_sampling_config

    theirs = detectron2.config.get_cfg()
    add_group_sampling_config(theirs)
    theirs.merge_from_other_cfg(detectron2.config.CfgNode(cfg))
    return build(theirs)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "GN"])
@pytest.mark.parametrize(
    "depth, res2_channels, width_per_group, num_groups",
    [(18, 64, 64, 1), (34, 96, 64, 1), (50, 256, 64, 1), (50, 256, 32, 1), (50, 256, 4, 32), (101, 256, 64, 1)],
)
def test_parameters_are_detectron2s(make_cfg, depth, res2_channels, width_per_group, num_groups, norm):
    cfg = make_cfg(
        *FULL_WIDTH,
        *("MODEL.DEVICE", "meta", "MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.NORM", norm),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", res2_channels),
        *("MODEL.RESNETS.WIDTH_PER_GROUP", width_per_group, "MODEL.RESNETS.NUM_GROUPS", num_groups),
    )
    with torch.device("meta"):  # shapes alone
        theirs = detectron2_twin(cfg).state_dict()
        ours = convert_names(build_model(cfg).state_dict(), "detectron2")
    assert {n: p.shape for n, p in ours.items()} == {n: p.shape for n, p in theirs.items()}


@pytest.mark.parametrize("fpn_norm", ["", "GN"])
@pytest.mark.parametrize("opts", [FOUR_LEVELS, FROM_P3, P4_OF_ALL], ids=["p2-p5", "p3", "p4"])
def test_levels_in_use_are_detectron2s(make_cfg, opts, fpn_norm):
    cfg = make_cfg("MODEL.DEVICE", "meta", *opts, "MODEL.FPN.NORM", fpn_norm)
    with torch.device("meta"):
        theirs = detectron2_twin(cfg).state_dict()
        ours = convert_names(build_model(cfg).state_dict(), "detectron2")
    assert ours.keys() == theirs.keys()


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "GN"])
@pytest.mark.parametrize("freeze_at", [0, 1, 2, 5])
def test_frozen_stages_are_detectron2s(make_cfg, freeze_at, norm):
    opts = "MODEL.DEVICE", "meta", "MODEL.RESNETS.NORM", norm, "MODEL.BACKBONE.FREEZE_AT", freeze_at
    cfg = make_cfg(*opts)
    with torch.device("meta"):
        theirs, ours = detectron2_twin(cfg), build_model(cfg)
    trainable = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert convert_names(trainable, "detectron2").keys() == {n for n, p in theirs.named_parameters() if p.requires_grad}


def test_fresh_frozen_norms_are_the_identity(make_model):
    norm = make_model("MODEL.RESNETS.NORM", "FrozenBN").backbone.body.bn1
    x = torch.randn(1, 32, 4, 4)
    assert torch.allclose(norm(x), x, rtol=1e-6)


@pytest.mark.parametrize("sampler", ["group", "uniform"])
@pytest.mark.parametrize("norm", ["FrozenBN", "GN"])
def test_losses_and_detections_are_detectron2s(make_cfg, norm, sampler):
    cfg = make_cfg(
        "MODEL.RESNETS.NORM", norm, "MODEL.GROUP_SAMPLING.SAMPLER", sampler, "MODEL.PROPOSAL_GENERATOR.MIN_SIZE", 4
    )
    theirs = detectron2_twin(cfg)
    from detectron2.structures import Boxes
    from detectron2.utils.events import EventStorage

    from group_sampling.engines.d2 import IgnoringInstances

    torch.manual_seed(0)
    ours = build_model(cfg)
    theirs.load_state_dict(convert_names(ours.state_dict(), "detectron2"), strict=False)
    images = [image(96, 128), image(70, 101, seed=1)]  # padded to one size, a multiple of 32
    targets = [target([10, 10, 34, 34], [50, 20, 120, 90]), target([3, 4, 19, 20], ignore=[[40, 10, 80, 60]])]

    inputs = []
    for x, t in zip(images, targets):
        fields = {"gt_boxes": Boxes(t["boxes"]), "gt_classes": torch.zeros(len(t["boxes"]), dtype=int)}
        instances = IgnoringInstances(x.shape[-2:], Boxes(t["ignore_boxes"]), **fields)
        inputs.append({"image": x, "instances": instances})
    ours.set_iteration(7)
    with EventStorage(7):
        their_losses = theirs.train()(inputs)
    our_losses = ours.train()(images, targets)
    assert our_losses.keys() == their_losses.keys()
    for name, loss in our_losses.items():
        assert loss.item() == pytest.approx(their_losses[name].item(), abs=1e-5)

    with torch.no_grad():
        their_detections = [output["instances"] for output in theirs.eval()(inputs)]
        our_detections = ours.eval()(images)
    for our, their in zip(our_detections, their_detections):
        assert len(our["boxes"]) == len(their) > 10
        assert torch.allclose(our["boxes"], their.pred_boxes.tensor, atol=1e-4)
        assert torch.allclose(our["scores"], their.scores, atol=1e-4)
        assert torch.equal(our["anchor_scales"], their.anchor_scales)


@pytest.mark.parametrize("opts", [[], FOUR_LEVELS, FROM_P3, P4_OF_ALL, C4], ids=["p2", "p2-p5", "p3", "p4", "c4"])
@pytest.mark.parametrize("targets", [[target([10, 10, 34, 34])], [target()]], ids=["face", "no face"])
def test_every_parameter_gets_a_gradient(make_model, opts, targets):
    model = make_model(*opts).train()
    sum(model([image(98, 130)], targets).values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_bilinear_top_down_path(make_model):
    backbone = make_model().backbone.eval()
    x = torch.rand(1, 3, 96, 64)
    with torch.no_grad():
        features = backbone.body(x)
        inner = backbone.fpn.inner_blocks["3"](features["res5"])
        for index, name in ((2, "res4"), (1, "res3"), (0, "res2")):
            upsampled = torch.nn.Upsample(scale_factor=2, mode="bilinear")(inner)
            inner = backbone.fpn.inner_blocks[str(index)](features[name]) + upsampled
        assert torch.allclose(backbone(x)["p2"], backbone.fpn.layer_blocks["0"](inner), atol=1e-6)


@pytest.mark.parametrize("depth", [18, 50])
def test_body_is_torchvisions_resnet(make_cfg, depth):
    res2 = 256 if depth == 50 else 64
    opts = "MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.NORM", "BN", "MODEL.RESNETS.RES2_OUT_CHANNELS", res2
    body = build_backbone(make_cfg(*FULL_WIDTH, *opts)).body.eval()
    reference = torchvision.models.resnet18() if depth == 18 else torchvision.models.resnet50()
    state = reference.eval().state_dict()
    assert body.load_state_dict(state, strict=False).missing_keys == []
    with torch.no_grad():
        x = torch.rand(1, 3, 64, 64)
        pooled = body(x)["res5"].mean(dim=(2, 3))
        assert torch.allclose(F.linear(pooled, state["fc.weight"], state["fc.bias"]), reference(x), atol=1e-4)


def test_image_is_normalized_then_padded_with_zeros(make_model):
    model = make_model("MODEL.PIXEL_MEAN", "[10.0, 20.0, 30.0]", "MODEL.PIXEL_STD", "[2.0, 4.0, 5.0]")
    batch, _ = model.transform([torch.full((3, 33, 64), 50.0)])
    assert batch.tensors.shape == (1, 3, 64, 64) and batch.image_sizes == [(33, 64)]
    assert (
        batch.tensors[0, :, :33].amax(dim=(1, 2)).tolist()
        == batch.tensors[0, :, :33].amin(dim=(1, 2)).tolist()
        == [20, 7.5, 4]
    )
    assert (batch.tensors[0, :, 33:] == 0).all()
    assert make_model(*C4).transform([torch.zeros(3, 33, 65)])[0].tensors.shape == (1, 3, 33, 65)


def test_detections(make_model):
    model = make_model("TEST.DETECTIONS_PER_IMAGE", 50).eval()
    with torch.no_grad():
        first, second = model([image(96, 128), image(61, 47)])
    for output, (height, width) in ((first, (96, 128)), (second, (61, 47))):
        boxes = output["boxes"]
        assert output.keys() == {"boxes", "scores", "labels", "anchor_scales", "sub_detectors"} and 0 < len(boxes) <= 50
        assert (boxes >= 0).all() and (boxes <= torch.tensor([width, height] * 2)).all()
        assert (output["scores"].diff() <= 0).all() and (output["labels"] == 0).all()
        assert set(output["anchor_scales"].tolist()) <= {16.0, 32.0, 64.0, 128.0}
        assert torchvision.ops.box_iou(boxes, boxes).fill_diagonal_(0).max() <= 0.3 + 1e-6


def test_no_proposals_are_computed_while_training(make_model, monkeypatch):
    monkeypatch.setattr(tv_rpn, "select_proposals", None)
    make_model().train()([image()], [target([10, 10, 34, 34])])


def test_loss_weights(make_model):
    faces = [target([10, 10, 34, 34])]
    plain = make_model().train()([image()], faces)
    weighted = make_model("MODEL.RPN.LOSS_WEIGHT", 2.0, "MODEL.RPN.BBOX_REG_LOSS_WEIGHT", 3.0).train()([image()], faces)
    assert weighted["loss_rpn_cls"].item() == pytest.approx(2 * plain["loss_rpn_cls"].item())
    assert weighted["loss_rpn_loc"].item() == pytest.approx(6 * plain["loss_rpn_loc"].item())


@pytest.mark.parametrize("sampler", ["group", "uniform"])
def test_sample_counts_are_per_scale(make_model, sampler):
    model = make_model("MODEL.GROUP_SAMPLING.SAMPLER", sampler, "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 128).train()
    model([image()], [target([8, 8, 24, 24])])  # exactly an anchor of scale 16
    counts = {name: count.item() for name, count in model.rpn.sample_counts.items()}
    assert set(counts) == {f"rpn/{kind}@{scale}" for kind in ("num_pos", "num_neg") for scale in (16, 32, 64, 128)}
    assert sum(counts.values()) == 128
    assert counts["rpn/num_pos@16"] >= 1
    if sampler == "group":
        assert all(counts[f"rpn/num_pos@{s}"] + counts[f"rpn/num_neg@{s}"] == 32 for s in (16, 32, 64, 128))


def test_the_draw_depends_on_the_iteration(make_model):
    model = make_model().train()
    losses = []
    for iteration in (0, 0, 1):
        model.rpn.iteration = iteration
        losses.append(model([image()], [target([10, 10, 34, 34])])["loss_rpn_cls"].item())
    assert losses[0] == losses[1] != losses[2]


def test_two_thousand_faces(make_model):
    generator = torch.Generator().manual_seed(0)
    corners = 100 * torch.rand(2000, 2, generator=generator)
    faces = torch.cat([corners, corners + 1 + 25 * torch.rand(2000, 2, generator=generator)], dim=1)
    losses = make_model().train()([image()], [{"boxes": faces}])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize(
    "bad", [[math.nan, 0, 10, 10], [0, 0, math.inf, 10], [-900, -900, -800, -800], [1e30, 0, 2e30, 9]]
)
def test_a_bad_face_changes_nothing(make_model, bad):
    good = [10, 10, 34, 34]
    expected = make_model().train()([image()], [target(good)])
    found = make_model().train()([image()], [target(good, bad)])
    assert {n: loss.item() for n, loss in found.items()} == {n: loss.item() for n, loss in expected.items()}


@pytest.mark.parametrize("bad", [[10, 10, 10, 30], [30, 10, 10, 30]], ids=["zero area", "inverted"])
def test_a_degenerate_face_is_named(make_model, bad):
    """torchvision's own check; the project's data pipeline drops and reports such boxes before."""
    with pytest.raises(AssertionError, match=r"positive height and width.*target at index 0"):
        make_model().train()([image()], [target(bad)])


def test_training_needs_targets(make_model):
    with pytest.raises(AssertionError, match="targets should not be none"):
        make_model().train()([image()])


def test_anchors_by_hand(make_model):
    """Level by level, row by row, ratio by ratio: the centers are multiples of the stride, the areas are size²."""
    opts = "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[0.5, 1.0]]"
    generator = make_model(*FOUR_LEVELS, *opts).rpn.anchor_generator
    features = [torch.zeros(1, 1, 24 // 2**i, 32 // 2**i) for i in range(4)]
    expected = []
    for level, size in enumerate((16, 32, 64, 128)):
        stride = 4 * 2**level
        for row in range(24 // 2**level):
            for column in range(32 // 2**level):
                for ratio in (0.5, 1.0):
                    width, height = size / ratio**0.5, size * ratio**0.5
                    x, y = stride * column, stride * row
                    expected.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    grid = generator.grid(features)
    assert grid.num_groups == 4 and generator.num_anchors_per_location() == [2] * 4
    assert torch.allclose(grid.boxes(), torch.tensor(expected), atol=1e-4)


@pytest.mark.parametrize(
    "opts, message",
    [
        ([*FOUR_LEVELS, "MODEL.ANCHOR_GENERATOR.SIZES", "[[16], [32]]"], r"MODEL\.ANCHOR_GENERATOR\.SIZES.*4 levels"),
        (
            [*FOUR_LEVELS, "MODEL.ANCHOR_GENERATOR.SIZES", "[[16], [32], [64], [96, 128]]"],
            r"anchors per cell.*\[1, 2\]",
        ),
        (
            [*C4, "MODEL.RESNETS.OUT_FEATURES", "['res3', 'res4']", "MODEL.RPN.IN_FEATURES", "['res3', 'res4']"],
            "channels",
        ),
    ],
)
def test_levels_that_cannot_share_a_head(make_model, opts, message):
    with pytest.raises(ConfigError, match=message):
        make_model(*opts)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_imagenet_weights_load(make_cfg, tmp_path, norm):
    """A file of torchvision's resnet18, in shape and names."""
    torch.manual_seed(1)
    state = torchvision.models.resnet18().state_dict()
    for name, value in state.items():
        if name.endswith("running_mean"):
            value.normal_()
    torch.save(state, tmp_path / "resnet18.pth")
    model = build_model(make_cfg(*FULL_WIDTH, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.NORM", norm))
    GroupSamplingCheckpointer(model).load(str(tmp_path / "resnet18.pth"))
    body = model.backbone.body.state_dict()
    assert len(body) > 60
    assert [name for name, value in body.items() if not torch.equal(value, state[name])] == []
