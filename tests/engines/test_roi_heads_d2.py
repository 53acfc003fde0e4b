"""Grouped ROI heads on Detectron2: in its stock Faster R-CNN, in this project's detectors, against torchvision's."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import detectron2
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from test_engines_agree import COMMON
from test_roi_heads import CONFIGS, FACES, ROI_LOSSES, SECOND_STAGE, SMALL, TWO_STAGE
from tv_cases import d2_setup

import group_sampling.engines.d2 as d2
from group_sampling.checkpoint import convert_names
from group_sampling.engines.build import build_training_loader, load_records
from group_sampling.engines.d2.train import main as d2_main
from group_sampling.engines.tv.config import load_config
from group_sampling.engines.tv.model import build_model as build_tv
from group_sampling.engines.tv.roi_heads import SingleLevelRoIAlign
from group_sampling.engines.tv.train import main as tv_main
from group_sampling.engines.tv.train import to_example
from group_sampling.roi_sampling import ProposalSampler

STOCK = Path(detectron2.__file__).parent / "model_zoo/configs/COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
DATA = [
    *("DATASETS.TRAIN", "('synthetic_faces_train',)", "DATASETS.TEST", "('synthetic_faces_val',)"),
    *("DATASETS.SYNTHETIC.NUM_TRAIN", "8", "DATASETS.SYNTHETIC.NUM_VAL", "3"),
    *("DATASETS.SYNTHETIC.HEIGHT", "128", "DATASETS.SYNTHETIC.WIDTH", "128"),
    *("INPUT.CROP.SIZE", "[96, 96]", "DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2"),
    *("SOLVER.MAX_ITER", "4", "SOLVER.STEPS", "(3,)", "TEST.EVAL_PERIOD", "0"),
]


@pytest.fixture
def make_cfg(tmp_path):
    def make(name="table5/grouped_fast_rcnn", *opts):
        return d2_setup(
            SimpleNamespace(
                config_file=str(CONFIGS / f"{name}.yaml"),
                opts=[*SMALL, *DATA, "OUTPUT_DIR", str(tmp_path), *opts],
                resume=False,
                eval_only=False,
            )
        )

    return make


def make_example(boxes, classes=None, ignore=(), size=128):
    ignore = Boxes(torch.tensor(ignore, dtype=torch.float32).reshape(-1, 4))
    instances = d2.IgnoringInstances((size, size), ignore) if len(ignore) else Instances((size, size))
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor([0] * len(boxes) if classes is None else classes, dtype=torch.int64)
    image = torch.randint(0, 256, (3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return {"image": image, "instances": instances}


def step(model, batch, iteration=0):
    with EventStorage(iteration) as storage:
        losses = model.train()(batch)
        sum(losses.values()).backward()
        return losses, {name: value for name, (value, _) in storage.latest().items()}


@pytest.mark.parametrize("name", TWO_STAGE)
def test_every_config_trains_and_detects(make_cfg, name):
    """One image with faces, one without: finite losses, and a gradient for every parameter."""
    torch.manual_seed(0)
    model = build_model(make_cfg(name))
    losses, counts = step(model, [make_example(FACES), make_example([])])
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_loc"} | ROI_LOSSES
    assert all(loss.isfinite() for loss in losses.values()) and losses["loss_box_reg"] > 0
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert sum(value for key, value in counts.items() if key.startswith("roi/num_pos@")) > 0
    with torch.no_grad():
        instances = model.eval()([{"image": torch.rand(3, 100, 90) * 255, "height": 200, "width": 180}])[0]["instances"]
    assert set(instances.get_fields()) == {"pred_boxes", "scores", "pred_classes", "anchor_scales"}
    assert set(instances.anchor_scales.tolist()) <= set(model.roi_heads.sampler.scales)


@pytest.mark.parametrize("name", ["table5/grouped_fast_rcnn", "table5/fast_rcnn"])
@pytest.mark.parametrize("face", [[], [[5.0, 5.0, 6000.0, 6001.0]]], ids=["no face", "no proposal fits"])
def test_batch_without_a_positive(make_cfg, name, face):
    model = build_model(make_cfg(name, "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", "False"))
    losses, counts = step(model, [make_example(face)] * 2)
    assert losses["loss_box_reg"] == 0 and losses["loss_cls"].isfinite()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert all(counts[f"roi/num_pos@{scale}"] == 0 for scale in (16, 32, 64, 128))


@pytest.mark.parametrize(
    "box", [[5.0, 5.0, 5.0, 20.0], [30.0, 30.0, 10.0, 10.0], [math.nan, 0.0, 9.0, 9.0], [0.0, 0.0, math.inf, 9.0]]
)
def test_bad_ground_truth_is_no_proposal(make_cfg, box):
    model = build_model(make_cfg())
    losses, _ = step(model, [make_example([box, *FACES])])
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("loss", ["iou_l2", "smooth_l1"])
def test_no_proposal_at_all(make_cfg, loss):
    heads = build_model(make_cfg("table5/grouped_fast_rcnn", "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", loss)).roi_heads
    features = {"p2": torch.rand(1, 32, 24, 24, requires_grad=True)}
    proposals = Instances((96, 96), proposal_boxes=Boxes(torch.zeros(0, 4)), objectness_logits=torch.zeros(0))
    with EventStorage(0):
        _, losses = heads(None, features, [proposals], [make_example([])["instances"]])
        sum(losses.values()).backward()
    assert [loss.item() for loss in losses.values()] == [0, 0]
    assert [n for n, p in heads.named_parameters() if p.grad is None] == []
    (found,), _ = heads.eval()(None, features, [proposals])
    assert len(found) == 0


def test_ignore_regions_reach_the_heads(make_cfg):
    model = build_model(make_cfg())
    for ignore, expected in (([], True), ([[-200.0, -200.0, 400.0, 400.0]], False)):
        _, counts = step(model, [make_example(FACES, ignore=ignore)])
        assert (sum(counts[f"roi/num_neg@{scale}"] for scale in (16, 32, 64, 128)) > 0) == expected


def test_draw_depends_on_the_iteration(make_cfg):
    heads = build_model(make_cfg()).roi_heads
    boxes = torch.rand(300, 4, generator=torch.Generator().manual_seed(0)) * 50
    boxes[:, 2:] += boxes[:, :2] + 10
    proposals = Instances((128, 128), proposal_boxes=Boxes(boxes), objectness_logits=torch.zeros(300))
    draws = []
    for iteration in (0, 0, 1):
        with EventStorage(iteration):
            (drawn,) = heads.label_and_sample_proposals([proposals], [make_example(FACES)["instances"]])
        draws.append(drawn.proposal_boxes.tensor)
        positive = drawn.gt_classes == 0
        assert set(drawn.gt_classes.tolist()) == {0, 1}
        assert set(map(tuple, drawn.gt_boxes.tensor[positive].tolist())) <= set(map(tuple, FACES))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


# Detectron2's own models


def stock_cfg(*opts):
    """Detectron2's Faster R-CNN for COCO; only the ROI heads are exchanged (and the machine is a small one)."""
    cfg = get_cfg()
    d2.add_group_sampling_config(cfg)
    cfg.merge_from_file(str(STOCK))
    cfg.merge_from_list(
        [
            *("MODEL.ROI_HEADS.NAME", "GroupedROIHeads", "MODEL.GROUP_SAMPLING.ROI_SAMPLER", "group"),
            *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.ROI_BOX_HEAD.FC_DIM", "64"),
            # From scratch: frozen statistics are for trained weights.
            *("MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", "0", *opts),
        ]
    )
    return cfg


@pytest.mark.parametrize("loss", ["giou", "iou_l2"])
def test_stock_faster_rcnn(loss):
    torch.manual_seed(0)
    cfg = stock_cfg("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", loss)
    model = build_model(cfg).train()
    assert type(model.proposal_generator).__name__ == "RPN" and model.roi_heads.num_classes == 80
    assert model.roi_heads.sampler.scales == (32, 64, 128, 256, 512) and model.roi_heads.sampler.num_samples == 128
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.001)
    with EventStorage(0) as storage:
        for _ in range(2):
            losses = model([make_example(FACES, [3, 79]), make_example([])])
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            storage.step()
    assert losses.keys() >= ROI_LOSSES and all(loss.isfinite() for loss in losses.values())
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    model.eval().roi_heads.box_predictor.test_score_thresh = 0.0
    with torch.no_grad():
        (output,) = model([{"image": torch.zeros(3, 96, 96)}])
    assert not output["instances"].has("anchor_scales")  # the stock RPN's proposals have none
    assert len(output["instances"]) > 0


def test_with_masks():
    cfg = stock_cfg("MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.CONV_DIM", "8")
    example = make_example(FACES, [3, 79])
    example["instances"].gt_masks = BitMasks(torch.ones(2, 128, 128, dtype=torch.bool))
    losses, _ = step(build_model(cfg), [example])
    assert losses["loss_mask"].isfinite() and losses["loss_mask"] > 0


def test_test_time_augmentation(make_cfg):
    cfg = make_cfg().clone()
    cfg.defrost()
    cfg.TEST.AUG.MIN_SIZES, cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = (96, 128), 0.0
    model = build_model(cfg).eval()
    with torch.no_grad():
        (output,) = GeneralizedRCNNWithTTA(cfg, model)([{"image": torch.zeros(3, 96, 96), "height": 96, "width": 96}])
    assert len(output["instances"]) > 0


# The predictor


def make_predictor(loss="iou_l2", num_classes=3, agnostic=False):
    return d2.GroupedFastRCNNOutputLayers(
        ShapeSpec(channels=4),
        box2box_transform=Box2BoxTransform((10.0, 10.0, 5.0, 5.0)),
        num_classes=num_classes,
        box_reg_loss_type=loss,
        cls_agnostic_bbox_reg=agnostic,
    )


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("loss", ["iou_l2", "iou_log"])
def test_regression_loss_by_hand(loss, agnostic):
    """Proposals at IoU 1/3 of their target, in classes 1 and 2, with zero deltas for these; the third is background."""
    predictor = make_predictor(loss, agnostic=agnostic)
    proposals = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 20.0], [0.0, 0.0, 5.0, 5.0]])
    targets = torch.tensor([[5.0, 0.0, 15.0, 10.0], [20.0, 10.0, 30.0, 30.0], [0.0, 0.0, 5.0, 5.0]])
    deltas = torch.zeros(3, 4 if agnostic else 12)
    deltas[2] = math.nan  # nobody reads what the background predicts
    if not agnostic:
        deltas[:, :4] = 100.0
    value = predictor.box_reg_loss(proposals, targets, deltas, torch.tensor([1, 2, 3])).item()
    assert value == pytest.approx(2 / 3 * ((2 / 3) ** 2 if loss == "iou_l2" else math.log(3)), rel=1e-5)


def test_stock_types_are_detectron2s():
    generator = torch.Generator().manual_seed(0)
    proposals = torch.rand(20, 4, generator=generator) * 20
    proposals[:, 2:] += proposals[:, :2] + 10
    targets, classes = proposals + 1, torch.arange(20) % 4
    deltas = torch.randn(20, 12, generator=generator)
    for loss in ("smooth_l1", "giou", "diou", "ciou"):
        predictor = make_predictor(loss)
        stock = super(type(predictor), predictor).box_reg_loss(proposals, targets, deltas, classes)
        assert torch.equal(predictor.box_reg_loss(proposals, targets, deltas, classes), stock)


def test_detections_keep_the_scale_of_their_proposal():
    """Also where a prediction is not finite, after which Detectron2's own indices are off."""
    predictor = make_predictor(num_classes=1)
    predictor.test_score_thresh = 0.0
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 50.0, 50.0], [60.0, 60.0, 90.0, 90.0]])
    proposals = Instances((96, 96), proposal_boxes=Boxes(boxes), anchor_scales=torch.tensor([16.0, 32.0, 64.0]))
    logits = torch.tensor([[math.nan, 0.0], [1.0, 0.0], [2.0, 0.0]])
    (found,), (kept,) = predictor.inference((logits, torch.zeros(3, 4)), [proposals])
    assert kept.tolist() == [2, 1] and found.anchor_scales.tolist() == [64.0, 32.0]
    assert torch.equal(found.pred_boxes.tensor, boxes[[2, 1]])


# Both engines


def test_pooler_is_detectron2s():
    generator = torch.Generator().manual_seed(0)
    feature = torch.rand(2, 5, 40, 30, generator=generator)
    boxes = [torch.rand(n, 4, generator=generator) * 70 for n in (7, 12)]
    boxes = [torch.cat([b[:, :2], b[:, :2] + b[:, 2:]], dim=1) for b in boxes]
    theirs = ROIPooler(7, (0.25,), 0, "ROIAlignV2")([feature], [Boxes(b) for b in boxes])
    ours = SingleLevelRoIAlign("p2", 4, 7)({"p2": feature}, boxes, [(160, 120)] * 2)
    assert torch.equal(ours, theirs)


AGREE = [*COMMON, *SMALL, *DATA[8:], "INPUT.CROP.SIZE", "[160, 160]", "MODEL.RPN.PRE_NMS_TOPK_TEST", "300"]


@pytest.fixture(params=TWO_STAGE)
def engines(request, tmp_path):
    """Both models with the same weights, converted, and the same batch."""
    config = str(CONFIGS / f"{request.param}.yaml")
    opts = [*AGREE, "OUTPUT_DIR", str(tmp_path), "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.001"]
    d2_cfg = d2_setup(SimpleNamespace(config_file=config, opts=opts, resume=False, eval_only=False))
    tv_cfg = load_config(config, opts)
    torch.manual_seed(0)
    d2_model, tv_model = build_model(d2_cfg), build_tv(tv_cfg)
    for name, parameter in d2_model.named_parameters():
        if "rpn_head" in name or "box_predictor" in name:  # fresh heads score all boxes alike
            torch.nn.init.normal_(parameter, std=0.05)
    converted = convert_names(d2_model.state_dict(), "torchvision")
    assert set(tv_model.load_state_dict(converted, strict=False).missing_keys) == set()
    d2_batch = next(iter(d2.Trainer.build_train_loader(d2_cfg)))
    tv_records = load_records(tv_cfg, tv_cfg.DATASETS.TRAIN)
    tv_batch = next(iter(build_training_loader(tv_cfg, tv_records, to_example)))
    return SimpleNamespace(d2_model=d2_model, tv_model=tv_model, d2_batch=d2_batch, tv_batch=tv_batch)


def test_weights_convert_back(engines):
    back = convert_names(engines.tv_model.state_dict(), "detectron2")
    original = engines.d2_model.state_dict()
    assert {name for name in original if name not in back and "pixel" not in name} == set()
    assert all(torch.equal(original[name], value) for name, value in back.items())


def test_engines_agree(engines, monkeypatch):
    drawn = []
    original = ProposalSampler.__call__
    monkeypatch.setattr(
        ProposalSampler, "__call__", lambda *args, **kwargs: drawn.append(original(*args, **kwargs)) or drawn[-1]
    )
    d2_model, tv_model = engines.d2_model.train(), engines.tv_model.train()
    tv_model.set_iteration(3)
    images = [example.image.float() for example in engines.tv_batch]
    with EventStorage(3):
        d2_losses = d2_model(engines.d2_batch)
    tv_losses = tv_model(images, [example.target for example in engines.tv_batch])
    for ours, theirs in zip(*drawn):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    assert sum((sample.labels == 1).sum() for sample in drawn[0]) > 0
    assert d2_losses.keys() == tv_losses.keys()
    for name in d2_losses:
        assert d2_losses[name].item() == pytest.approx(tv_losses[name].item(), abs=1e-4), name

    sum(d2_losses.values()).backward(), sum(tv_losses.values()).backward()
    theirs = {name: p.grad for name, p in tv_model.named_parameters() if "box_head" in name or "rpn" in name}
    ours = convert_names({name: p.grad for name, p in d2_model.named_parameters() if p.requires_grad}, "torchvision")
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)

    d2_model.eval(), tv_model.eval()
    with torch.no_grad():
        d2_found, tv_found = d2_model(engines.d2_batch), tv_model(images)
    for d2_output, tv_output in zip(d2_found, tv_found):
        d2_scales, tv_scales = (output.get("sub_detectors", {}) for output in (d2_output, tv_output))
        assert list(d2_scales) == list(tv_scales) == ([16, 32, 64, 128] if d2_model.sub_detectors else [])
        lists = [(d2_output["instances"], tv_output), *((d2_scales[s], tv_scales[s]) for s in tv_scales)]
        for ours, theirs in lists:
            assert len(ours) == len(theirs["boxes"]) > 0
            assert torch.allclose(ours.pred_boxes.tensor, theirs["boxes"], atol=1e-4, rtol=1e-4)
            assert torch.allclose(ours.scores, theirs["scores"], atol=1e-4)
            assert torch.equal(ours.pred_classes, theirs["labels"])
            assert torch.equal(ours.anchor_scales, theirs["anchor_scales"])


# Whole runs


def run_args(name, folder, *opts, **more):
    return SimpleNamespace(
        config_file=str(CONFIGS / f"{name}.yaml"),
        opts=[*SMALL, *DATA, *SECOND_STAGE, "OUTPUT_DIR", str(folder), *opts],
        **{"resume": False, "eval_only": False, "num_gpus": 1, "num_machines": 1, "machine_rank": 0, **more},
        dist_url="auto",
    )


def test_main_trains_and_evaluates(tmp_path):
    d2_main(run_args("table5/grouped_fast_rcnn", tmp_path / "d2"))
    written = {}
    for line in (tmp_path / "d2/metrics.json").read_text().splitlines():
        written.update(json.loads(line))
    assert {"loss_cls", "loss_box_reg", "roi/num_pos@16", "roi/num_neg@128", "wider_face/AP_all"} <= written.keys()
    # The other engine evaluates the trained weights.
    weights = ["MODEL.WEIGHTS", str(tmp_path / "d2/model_final.pth")]
    metrics = tv_main(run_args("table5/grouped_fast_rcnn", tmp_path / "tv", *weights, eval_only=True))
    assert metrics["wider_face/AP_all"] == pytest.approx(written["wider_face/AP_all"], abs=0.1)


def test_heads_are_a_drop_in_for_the_standard_ones(make_cfg):
    """Weights of a model with StandardROIHeads load by name."""
    grouped = build_model(make_cfg())
    standard = build_model(
        make_cfg("table5/grouped_fast_rcnn", "MODEL.ROI_HEADS.NAME", "StandardROIHeads", *STOCK_LOSS)
    )
    assert type(standard.roi_heads) is StandardROIHeads
    assert grouped.state_dict().keys() == standard.state_dict().keys()
    losses, _ = step(standard, [make_example(FACES)])  # which take no ignore regions
    assert losses.keys() >= ROI_LOSSES


STOCK_LOSS = ["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "smooth_l1"]
