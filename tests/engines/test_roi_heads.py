"""Grouped ROI heads on torchvision: in its own Faster R-CNN, in this project's detectors, and as a checkpoint."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign
from tv_cases import CONFIGS, TINY, arguments

from group_sampling.checkpoint import convert_names
from group_sampling.config import ConfigError
from group_sampling.data.records import ImageRecord
from group_sampling.engines.tv.config import load_config
from group_sampling.engines.tv.model import build_model
from group_sampling.engines.tv.roi_heads import GroupedRoIHeads, SingleLevelRoIAlign
from group_sampling.engines.tv.train import GroupSamplingCheckpointer, main, to_example
from group_sampling.inference import Proposals
from group_sampling.roi_sampling import GroupProposalSampler

SECOND_STAGE = [
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.RPN.PRE_NMS_TOPK_TRAIN", "200", "MODEL.RPN.PRE_NMS_TOPK_TEST", "200"),
    *("MODEL.GROUP_SAMPLING.ROI_SAMPLES_PER_GROUP", "16", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "64"),
]
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", "0", "SEED", "5"),
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.NORM", "GN"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "32", "MODEL.RESNETS.RES2_OUT_CHANNELS", "32", "MODEL.FPN.OUT_CHANNELS", "32"),
    *("MODEL.GROUP_SAMPLING.SAMPLES_PER_GROUP", "32", *SECOND_STAGE),
]
TWO_STAGE = [
    "table5/fast_rcnn",
    "table5/fast_rcnn_iou",
    "table5/grouped_fast_rcnn",
    "ablations/fast_rcnn_smooth_l1",
    "ablations/fast_rcnn_iou_log",
    "coco_grouped_faster_rcnn",
]
ROI_LOSSES = {"loss_cls", "loss_box_reg"}
PREDICTOR = "roi_heads.box_predictor."


def make_model(name="table5/grouped_fast_rcnn", *opts):
    torch.manual_seed(0)
    return build_model(load_config(str(CONFIGS / f"{name}.yaml"), [*SMALL, *opts]))


def make_heads(num_classes=3, **options):
    torch.manual_seed(0)
    arguments = {
        "fg_iou_thresh": 0.5,
        "bg_iou_thresh": 0.5,
        "batch_size_per_image": 64,
        "positive_fraction": 0.25,
        "bbox_reg_weights": (10.0, 10.0, 5.0, 5.0),
        "score_thresh": 0.05,
        "nms_thresh": 0.5,
        "detections_per_img": 20,
    }
    parts = SingleLevelRoIAlign("0", 4, 3), TwoMLPHead(8 * 9, 16), FastRCNNPredictor(16, num_classes + 1)
    sampler = GroupProposalSampler(16, scales=(16, 32, 64, 128))
    return GroupedRoIHeads(*parts, sampler=sampler, **{**arguments, **options})


def make_target(boxes, labels=None, **more):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.zeros(len(boxes), dtype=torch.int64) if labels is None else torch.tensor(labels)
    return {"boxes": boxes, "labels": labels, **more}


FACES = [[10.0, 10.0, 26.0, 28.0], [40.0, 30.0, 100.0, 90.0]]


@pytest.mark.parametrize("name", TWO_STAGE)
def test_every_config_trains_and_detects(name):
    """One image with faces, one without: finite losses, and a gradient for every parameter."""
    model = make_model(name).train()
    losses = model([torch.rand(3, 128, 128) * 255] * 2, [make_target(FACES), make_target([])])
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_loc"} | ROI_LOSSES
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values()) and losses["loss_box_reg"] > 0
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert sum(count for key, count in model.sample_counts.items() if key.startswith("roi/num_pos")) > 0
    (output,) = model.eval()([torch.rand(3, 100, 90) * 255])
    by_scale = output.pop("sub_detectors", {})
    assert list(by_scale) == ([] if name == "coco_grouped_faster_rcnn" else [16, 32, 64, 128])
    for found in (output, *by_scale.values()):
        assert set(found) == {"boxes", "scores", "labels", "anchor_scales"}
        assert len({len(value) for value in found.values()}) == 1


@pytest.mark.parametrize("name", ["table5/grouped_fast_rcnn", "table5/fast_rcnn"])
@pytest.mark.parametrize("face", [[], [[5.0, 5.0, 6000.0, 6001.0]]], ids=["no face", "no proposal fits"])
def test_batch_without_a_positive(name, face):
    model = make_model(name, "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", "False").train()
    losses = model([torch.rand(3, 96, 96) * 255] * 2, [make_target(face)] * 2)
    sum(losses.values()).backward()
    assert losses["loss_box_reg"] == 0 and losses["loss_cls"].isfinite()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert all(model.sample_counts[f"roi/num_pos@{scale}"] == 0 for scale in (16, 32, 64, 128))


def test_no_proposal_at_all():
    heads = make_heads()
    features = {"0": torch.rand(1, 8, 16, 16, requires_grad=True)}
    _, losses = heads.train()(features, [torch.zeros(0, 4)], [(64, 64)], [make_target([])])
    sum(losses.values()).backward()
    assert [loss.item() for loss in losses.values()] == [0, 0] and set(losses) == ROI_LOSSES
    assert all((p.grad == 0).all() for p in heads.parameters())
    (found,), _ = heads.eval()(features, [torch.zeros(0, 4)], [(64, 64)])
    assert found["boxes"].shape == (0, 4) and set(found) == {"boxes", "scores", "labels"}


@pytest.mark.parametrize("box_loss_type", ["iou_l2", "iou_log", "smooth_l1"])
@pytest.mark.parametrize("first_label", [0, 1])
def test_losses_by_hand(box_loss_type, first_label):
    """Written out proposal by proposal, three classes."""
    heads = make_heads(box_loss_type=box_loss_type, first_label=first_label, box_loss_weight=2.0).train()
    rng = np.random.default_rng(0)
    gts = torch.tensor([[20.0, 20.0, 60.0, 50.0], [30.0, 70.0, 100.0, 120.0]])
    boxes = torch.cat([gts.repeat(20, 1) + torch.as_tensor(rng.normal(0, 6, (40, 4)), dtype=torch.float32)])
    classes = [2, 0]
    target = make_target(gts.tolist(), [c + first_label for c in classes])
    drawn, matched, _, _ = heads.select_training_samples([boxes], [target])
    heads.iteration = 0  # the same draw again
    _, losses = heads(
        {"0": torch.rand(1, 8, 32, 32, generator=torch.Generator().manual_seed(1))}, [boxes], [(128, 128)], [target]
    )
    logits, deltas = heads._predict(
        {"0": torch.rand(1, 8, 32, 32, generator=torch.Generator().manual_seed(1))}, drawn, [(128, 128)]
    )
    classification = localization = 0.0
    num_positive = 0
    for i, (box, match) in enumerate(zip(drawn[0].tolist(), matched[0].tolist())):
        output = 0 if match < 0 else classes[match] + 1
        scores = logits[i].tolist()
        classification -= scores[output] - math.log(sum(map(math.exp, scores)))
        if match < 0:
            continue
        num_positive += 1
        (x1, y1, x2, y2), (gx1, gy1, gx2, gy2) = box, gts[match].tolist()
        dx, dy, dw, dh = deltas[i, 4 * output : 4 * output + 4].tolist()
        width, height, gwidth, gheight = x2 - x1, y2 - y1, gx2 - gx1, gy2 - gy1
        if box_loss_type == "smooth_l1":
            localization += abs(dx - 10 * ((gx1 + gx2) / 2 - (x1 + x2) / 2) / width)
            localization += abs(dy - 10 * ((gy1 + gy2) / 2 - (y1 + y2) / 2) / height)
            localization += abs(dw - 5 * math.log(gwidth / width)) + abs(dh - 5 * math.log(gheight / height))
            continue
        cx, cy = (x1 + x2) / 2 + dx / 10 * width, (y1 + y2) / 2 + dy / 10 * height
        w, h = width * math.exp(dw / 5), height * math.exp(dh / 5)
        inter = max(0, min(cx + w / 2, gx2) - max(cx - w / 2, gx1)) * max(
            0, min(cy + h / 2, gy2) - max(cy - h / 2, gy1)
        )
        iou = inter / (w * h + gwidth * gheight - inter)
        localization += (1 - iou) ** 2 if box_loss_type == "iou_l2" else -math.log(iou)
    assert num_positive > 3 and len(drawn[0]) > num_positive
    assert losses["loss_cls"].item() == pytest.approx(classification / len(drawn[0]), rel=1e-4)
    assert losses["loss_box_reg"].item() == pytest.approx(2 * localization / len(drawn[0]), rel=1e-4)


def test_ignore_regions_are_not_negatives():
    heads = make_heads().train()
    boxes = torch.tensor([[0.0, 0.0, 20.0, 20.0], [50.0, 50.0, 70.0, 70.0]])
    for ignore, expected in ([[0.0, 0.0, 30.0, 30.0]], 1), ([], 2):
        ignore = torch.tensor(ignore, dtype=torch.float32).reshape(-1, 4)
        drawn, *_ = heads.select_training_samples([boxes], [make_target([], ignore_boxes=ignore)])
        assert len(drawn[0]) == expected


def test_draw_depends_on_the_iteration():
    heads = make_heads().train()
    boxes = torch.rand(200, 4) * 50
    boxes[:, 2:] += boxes[:, :2] + 10
    draws = []
    for heads.iteration in (0, 0, 1):
        draws.append(heads.select_training_samples([boxes], [make_target([])])[0][0])
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_detections_are_torchvisions():
    """Same outputs, same boxes, scores and labels as ``RoIHeads.postprocess_detections``."""
    heads = make_heads(score_thresh=0.2)
    generator = torch.Generator().manual_seed(0)
    boxes = [torch.rand(n, 4, generator=generator) * 50 for n in (30, 0, 25)]
    boxes = [torch.cat([b[:, :2], b[:, :2] + 20 + b[:, 2:]], dim=1) for b in boxes]
    logits = 2 * torch.randn(55, 4, generator=generator)
    deltas = torch.randn(55, 16, generator=generator)
    shapes = [(64, 80)] * 3
    ours = heads.postprocess_detections(logits, deltas, boxes, shapes)
    theirs = RoIHeads.postprocess_detections(heads, logits, deltas, boxes, shapes)
    for image in range(3):
        for found, expected in zip((ours[0][image], ours[1][image], ours[2][image]), [t[image] for t in theirs]):
            assert torch.allclose(found, expected)
    assert len(ours[0][0]) == 20 and len(ours[0][1]) == 0


def test_detections_keep_the_scale_of_their_proposal():
    """With all deltas zero a detection is its proposal; proposals that are not finite are left out, not crashed on."""
    heads = make_heads(num_classes=1, score_thresh=0.0).eval()
    for parameter in heads.box_predictor.bbox_pred.parameters():
        nn.init.zeros_(parameter)
    boxes = torch.tensor(
        [
            [0.0, 0.0, 10.0, 10.0],
            [math.nan] * 4,
            [30.0, 30.0, 50.0, 50.0],
            [0.0, 60.0, math.inf, 90.0],
            [60.0, 0.0, 90.0, 40.0],
        ]
    )
    scales = torch.tensor([16.0, 1.0, 32.0, 2.0, 64.0])
    features = {"0": torch.rand(1, 8, 24, 24)}
    (found,), _ = heads(features, [Proposals(boxes, scales, scales)], [(96, 96)])
    rows = {tuple(box.tolist()): scale.item() for box, scale in zip(boxes, scales)}
    assert len(found["boxes"]) == 3
    for box, scale in zip(found["boxes"], found["anchor_scales"]):
        assert rows[tuple(torch.round(box).tolist())] == scale
    # A proposal whose prediction is not finite is left out as well, and the others keep their own scale.
    logits, deltas = torch.zeros(3, 2), torch.zeros(3, 8)
    logits[1] = math.nan
    *_, kept = heads.postprocess_detections(logits, deltas, [boxes[[0, 2, 4]]], [(96, 96)])
    assert sorted(kept[0].tolist()) == [0, 2]


def test_mask_heads_are_refused():
    with pytest.raises(ValueError, match="boxes only"):
        make_heads(mask_roi_pool=nn.Identity(), mask_head=nn.Identity(), mask_predictor=nn.Identity())
    with pytest.raises(ValueError, match="box_loss_type.*got 'giou'"):
        make_heads(box_loss_type="giou")


class TinyBackbone(nn.Sequential):
    out_channels = 8

    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.ReLU())


@pytest.mark.parametrize("pool", [MultiScaleRoIAlign(["0"], 3, 2), SingleLevelRoIAlign("0", 4, 3)])
def test_torchvisions_faster_rcnn(pool):
    """torchvision's own model, RPN and transform; only the ROI heads are exchanged. Labels start at 1 there."""
    torch.manual_seed(0)
    model = FasterRCNN(
        TinyBackbone(),
        num_classes=4,
        rpn_anchor_generator=AnchorGenerator(((16, 32, 64),), ((1.0,),)),
        min_size=96,
        max_size=96,
        rpn_pre_nms_top_n_train=100,
        rpn_pre_nms_top_n_test=100,
    )
    model.roi_heads = make_heads(num_classes=3, score_thresh=0.0)
    model.roi_heads.box_roi_pool = pool
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        losses = model([torch.rand(3, 96, 96)] * 2, [make_target(FACES, [1, 3]), make_target([])])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        assert all(loss.isfinite() for loss in losses.values()) and losses.keys() >= ROI_LOSSES
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    found = model.eval()([torch.rand(3, 96, 96)])[0]
    assert set(found["labels"].tolist()) <= {1, 2, 3} and len(found["boxes"]) == len(found["scores"]) > 0


# Configuration


@pytest.mark.parametrize(
    "opts, message",
    [
        (["MODEL.ROI_BOX_HEAD.NUM_FC", "1"], r"MODEL\.ROI_BOX_HEAD\.NUM_FC: expected 2, got 1.*detectron2 may"),
        (["MODEL.ROI_BOX_HEAD.NUM_CONV", "2"], r"MODEL\.ROI_BOX_HEAD\.NUM_CONV: expected 0, got 2"),
        (["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"], r"CLS_AGNOSTIC_BBOX_REG: expected False, got True"),
        (["MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIPool"], r"POOLER_TYPE: expected 'ROIAlignV2', got 'ROIPool'"),
        (["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "giou"], r"BBOX_REG_LOSS_TYPE: expected 'iou_l2' or .*got 'giou'"),
        (["MODEL.ROI_HEADS.IN_FEATURES", "['p2', 'p3']"], r"ROI_HEADS\.IN_FEATURES: .*got \['p2', 'p3'\].*single"),
        (["MODEL.ROI_HEADS.IN_FEATURES", "['p3']"], r"expected one of MODEL\.RPN\.IN_FEATURES \['p2'\], got \['p3'\]"),
        (
            ["MODEL.ROI_HEADS.NAME", "ProposalDetections", "MODEL.ROI_HEADS.NUM_CLASSES", "8"],
            "NUM_CLASSES: expected 1, got 8",
        ),
    ],
)
def test_unsupported_heads(opts, message):
    with pytest.raises(ConfigError, match=message):
        load_config(str(CONFIGS / "table5/grouped_fast_rcnn.yaml"), [*SMALL, *opts])


def test_wrong_sampler_is_named():
    with pytest.raises(ConfigError, match=r"MODEL\.GROUP_SAMPLING\.ROI_SAMPLER.*got 'ohem'"):
        make_model("table5/fast_rcnn", "MODEL.GROUP_SAMPLING.ROI_SAMPLER", "ohem")


def test_sizes_of_the_heads():
    heads = make_model("coco_grouped_faster_rcnn").roi_heads
    shapes = {name: tuple(p.shape) for name, p in heads.named_parameters()}
    assert shapes["box_head.fc6.weight"] == (32, 32 * 7 * 7) and shapes["box_head.fc7.weight"] == (32, 32)
    assert shapes["box_predictor.cls_score.weight"] == (81, 32)
    assert shapes["box_predictor.bbox_pred.weight"] == (4 * 81, 32)
    assert heads.box_roi_pool.spatial_scale == 1 / 4 and heads.sampler.scales == (32, 64, 128, 256, 512)
    assert (heads.box_predictor.bbox_pred.weight[:4] == 0).all()


# Checkpoints


def test_predictor_rows_convert_both_ways():
    """K = 2. Detectron2: classes 0, 1, background; torchvision: background, classes 1, 2, and a box for each."""
    d2 = {
        f"{PREDICTOR}cls_score.weight": torch.tensor([[10.0], [11.0], [99.0]]),
        f"{PREDICTOR}cls_score.bias": torch.tensor([10.0, 11.0, 99.0]),
        f"{PREDICTOR}bbox_pred.weight": torch.arange(1.0, 9.0)[:, None],
        f"{PREDICTOR}bbox_pred.bias": torch.arange(1.0, 9.0),
        "roi_heads.box_head.fc1.weight": torch.ones(1),
        "roi_heads.box_head.fc2.bias": torch.zeros(1),
    }
    tv = convert_names(d2, "torchvision")
    assert tv[f"{PREDICTOR}cls_score.weight"].flatten().tolist() == [99, 10, 11]
    assert tv[f"{PREDICTOR}cls_score.bias"].tolist() == [99, 10, 11]
    assert tv[f"{PREDICTOR}bbox_pred.weight"].flatten().tolist() == [0] * 4 + list(range(1, 9))
    assert tv[f"{PREDICTOR}bbox_pred.bias"].tolist() == [0] * 4 + list(range(1, 9))
    assert {"roi_heads.box_head.fc6.weight", "roi_heads.box_head.fc7.bias"} <= tv.keys()
    for source, naming, expected in ((tv, "detectron2", d2), (tv, "torchvision", tv), (d2, "detectron2", d2)):
        found = convert_names(source, naming)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_other_predictors_stay_as_they_are():
    for names in (["cls_score", "bbox_pred"], ["0.cls_score", "0.bbox_pred"]):
        agnostic = {f"{PREDICTOR}{names[0]}.bias": torch.arange(4.0), f"{PREDICTOR}{names[1]}.bias": torch.arange(4.0)}
        for naming in ("torchvision", "detectron2"):
            assert all(torch.equal(convert_names(agnostic, naming)[name], agnostic[name]) for name in agnostic)


@pytest.mark.parametrize("name", ["table5/grouped_fast_rcnn", "coco_grouped_faster_rcnn"])
def test_checkpoint_of_the_other_engine_loads(tmp_path, name):
    model, other = make_model(name), make_model(name)
    state = model.state_dict()
    torch.save(convert_names(state, "detectron2"), tmp_path / "d2.pth")
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    GroupSamplingCheckpointer(other).load(str(tmp_path / "d2.pth"))
    loaded = other.state_dict()
    assert [key for key in state if not torch.equal(state[key], loaded[key])] == []


# Whole runs


@pytest.mark.parametrize("sampler", ["group", "uniform"])
def test_main_trains_and_evaluates(tmp_path, sampler):
    opts = [*SECOND_STAGE, "MODEL.GROUP_SAMPLING.ROI_SAMPLER", sampler]
    args = arguments(tmp_path, *opts)
    tiny = {**TINY, "_BASE_": str(CONFIGS / "table5/fast_rcnn_iou.yaml")}
    (tmp_path / "tiny.yaml").write_text(json.dumps(tiny))  # JSON is YAML
    metrics = main(args)
    assert 0 <= metrics["wider_face/AP_all"] <= 100
    last = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    written = {key: value for line in last for key, value in line.items()}
    drawn = sum(written[f"roi/num_pos@{s}"] + written[f"roi/num_neg@{s}"] for s in (16, 32, 64, 128))
    assert {"loss_cls", "loss_box_reg", "rpn/num_pos@16"} <= written.keys() and 1 < drawn <= 64
    again = main(arguments_as(args, "MODEL.WEIGHTS", str(tmp_path / "model_final.pth")))
    assert again["wider_face/AP_all"] == pytest.approx(metrics["wider_face/AP_all"])


def arguments_as(args, *opts):
    args.eval_only, args.opts = True, [*args.opts, *opts]
    return args


def test_examples_have_labels():
    record = ImageRecord("synthetic://", "x", 8, 8, np.zeros((2, 4), np.float32), np.array([3, 1]), np.zeros(2, bool))
    example = to_example(
        np.zeros((8, 8, 3), np.uint8), record.boxes, record.classes, np.zeros((0, 4), np.float32), record, 0
    )
    assert example.target["labels"].tolist() == [3, 1] and example.target["labels"].dtype == torch.int64
