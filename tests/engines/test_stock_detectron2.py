"""This project's components in Detectron2's own meta-architecture, with its own components, data sets and tools."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import detectron2
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.events import EventStorage
from test_configs import write_coco_set
from test_roi_heads_d2 import FACES, make_example, step
from tv_cases import CONFIGS, SMALL_OPTS

import group_sampling.engines.d2 as d2
from group_sampling.config import ConfigError, add_group_sampling_config
from group_sampling.engines.d2.data import find_source, ignore_boxes_of

STOCK = Path(detectron2.__file__).parent / "model_zoo/configs/COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", "0", "MODEL.RESNETS.NORM", "BN"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.RPN.PRE_NMS_TOPK_TRAIN", "100", "MODEL.RPN.PRE_NMS_TOPK_TEST", "100"),
    *("MODEL.GROUP_SAMPLING.SAMPLES_PER_GROUP", "64", "MODEL.GROUP_SAMPLING.ROI_SAMPLER", "group"),
]
OURS = ["MODEL.PROPOSAL_GENERATOR.NAME", "GroupSamplingRPN", "MODEL.ROI_HEADS.NAME", "GroupedROIHeads"]


def stock_cfg(*opts):
    """Detectron2's Faster R-CNN for COCO, GeneralizedRCNN and all."""
    cfg = get_cfg()
    add_group_sampling_config(cfg)
    cfg.merge_from_file(str(STOCK))
    cfg.merge_from_list([*SMALL, *map(str, opts)])
    assert cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
    return cfg


def observe(sampler, monkeypatch):
    drawn, original = [], type(sampler).__call__
    monkeypatch.setattr(
        type(sampler), "__call__", lambda *args, **kwargs: drawn.append(original(*args, **kwargs)) or drawn[-1]
    )
    return drawn


REGION = [0.0, 0.0, 128.0, 64.0]  # the upper half of the image


@pytest.mark.parametrize("has_region", [False, True])
def test_no_negatives_in_ignore_regions(monkeypatch, has_region):
    """Of what RPN and ROI heads draw in the stock architecture, no negative lies in the region by half its area."""
    torch.manual_seed(0)
    model = build_model(stock_cfg(*OURS))
    example = make_example([[20.0, 80.0, 60.0, 120.0]], [3], ignore=[REGION] if has_region else [])
    anchors = observe(model.proposal_generator.criterion.sampler, monkeypatch)
    proposals = observe(model.roi_heads.sampler, monkeypatch)
    given = []
    original = model.roi_heads.label_and_sample_proposals
    model.roi_heads.label_and_sample_proposals = lambda *args: given.append(args) or original(*args)
    step(model, [example])

    def negatives_inside(boxes, indices, labels):
        boxes = boxes[indices[labels == 0]]
        width = boxes[:, 2].clamp(max=REGION[2]) - boxes[:, 0].clamp(min=REGION[0])
        height = boxes[:, 3].clamp(max=REGION[3]) - boxes[:, 1].clamp(min=REGION[1])
        area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
        return int((width.clamp(min=0) * height.clamp(min=0) > 0.51 * area).sum()), len(boxes)

    features = model.backbone(torch.zeros(1, 3, 128, 128))
    rpn = model.proposal_generator
    grid_boxes = Boxes.cat(rpn.anchor_generator([features[f] for f in rpn.in_features])).tensor
    inside, count = negatives_inside(grid_boxes, anchors[0].indices[0].flatten(), anchors[0].labels[0].flatten())
    assert count > 100 and (inside == 0 if has_region else inside > 20)
    boxes = torch.cat([given[0][0][0].proposal_boxes.tensor, example["instances"].gt_boxes.tensor])
    inside, count = negatives_inside(boxes, proposals[0][0].indices, proposals[0][0].labels)
    assert count > 10 and (inside == 0 if has_region else inside > 5)


def test_regions_stay_with_the_instances():
    example = make_example(FACES, ignore=[REGION])["instances"]
    for instances in (example, example.to("cpu"), example[torch.tensor([True, False])], example[0].to("cpu")):
        assert instances.ignore_boxes.tensor.tolist() == [REGION] and instances.image_size == (128, 128)
    assert len(example[0]) == 1 and example[1:].gt_boxes.tensor.tolist() == FACES[1:]
    plain = Instances((128, 128), gt_boxes=Boxes(torch.zeros(2, 4)))
    assert [len(boxes) for boxes in ignore_boxes_of([example, plain])] == [1, 0]


def test_mapper_makes_regions_of_crowds(tmp_path):
    Image.new("RGB", (96, 96)).save(tmp_path / "image.png")
    boxes = [([10, 10, 40, 40], 0), ([50, 50, 90, 90], 1)]
    annotations = [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": crowd} for box, crowd in boxes
    ]
    mapper = d2.GroupSamplingMapper(stock_cfg("INPUT.SCALE_JITTER", "(1.0,)", "INPUT.RANDOM_FLIP", "none"), True)
    image = {"file_name": str(tmp_path / "image.png"), "image_id": 0, "annotations": annotations}
    instances = mapper(image)["instances"]
    assert len(instances) == 1 and instances.ignore_boxes.tensor.tolist() == [[50, 50, 90, 90]]


@pytest.mark.parametrize("sampler", ["group", "uniform", "ohem", "focal"])
def test_rpn_on_stock_anchors(sampler):
    """MODEL.PROPOSAL_GENERATOR.NAME alone is exchanged; detections have the anchor's scale."""
    torch.manual_seed(0)
    opts = ["MODEL.PROPOSAL_GENERATOR.NAME", "GroupSamplingRPN", "MODEL.GROUP_SAMPLING.SAMPLER", sampler]
    model = build_model(stock_cfg(*opts))
    losses, counts = step(model, [make_example(FACES, [3, 79])])
    assert {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"} == losses.keys()
    assert all(loss.isfinite() for loss in losses.values())
    assert {f"rpn/num_pos@{scale}" for scale in (32, 64, 128, 256, 512)} <= counts.keys()
    rpn = model.eval().proposal_generator
    features = model.backbone(torch.zeros(1, 3, 128, 128))
    expected = Boxes.cat(rpn.anchor_generator([features[f] for f in rpn.in_features])).tensor
    assert torch.equal(rpn.grid([features[f] for f in rpn.in_features]).boxes(), expected)
    with torch.no_grad():
        model([{"image": torch.zeros(3, 96, 96)}])


@pytest.mark.parametrize(
    "opts, message",
    [
        (
            ["MODEL.ANCHOR_GENERATOR.NAME", "RotatedAnchorGenerator", "MODEL.ANCHOR_GENERATOR.ANGLES", "[[0]]"],
            r"MODEL\.ANCHOR_GENERATOR\.NAME: expected .*DefaultAnchorGenerator.*got RotatedAnchorGenerator",
        ),
        (["MODEL.GROUP_SAMPLING.ANCHOR_STRIDES", "[4]"], r"ANCHOR_GENERATOR\.NAME: expected 'GroupedAnchorGenerator'"),
        (["MODEL.RPN.BBOX_REG_WEIGHTS", "(2.0, 2.0, 1.0, 1.0)"], r"MODEL\.RPN\.BBOX_REG_WEIGHTS: expected"),
    ],
)
def test_what_the_rpn_cannot_use_is_named(opts, message):
    with pytest.raises(ConfigError, match=message):
        build_model(stock_cfg("MODEL.PROPOSAL_GENERATOR.NAME", "GroupSamplingRPN", *opts))


def test_stock_rpn_with_proposal_detections():
    torch.manual_seed(0)
    opts = ["MODEL.ROI_HEADS.NAME", "ProposalDetections", "MODEL.ROI_HEADS.NUM_CLASSES", 1]
    model = build_model(stock_cfg(*opts))
    losses, _ = step(model, [make_example(FACES)])
    assert losses.keys() == {"loss_rpn_cls", "loss_rpn_loc"}
    with torch.no_grad():
        (output,) = model.eval()([{"image": torch.zeros(3, 96, 96)}])
    found = output["instances"]
    assert len(found) > 0 and not found.has("anchor_scales") and (found.scores.diff() <= 0).all()


# Data sets of Detectron2's catalog


@pytest.fixture
def registered():
    """Names that a test may register; forgotten afterwards."""
    names = ["test_coco", "test_dicts", "test_classes"]
    yield names
    for name in names:
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


def trainer_cfg(folder, name, num_classes):
    """The config of a script of somebody's: this project's two-stage detector, made small, on a set of their own."""
    cfg = get_cfg()
    add_group_sampling_config(cfg)
    cfg.merge_from_file(str(CONFIGS / "table5/grouped_fast_rcnn.yaml"))
    opts = ["DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", f"('{name}',)", "SEED", -1, "OUTPUT_DIR", folder]
    opts += ["MODEL.ROI_HEADS.NUM_CLASSES", num_classes, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.001]
    cfg.merge_from_list([*SMALL_OPTS, *map(str, opts)])
    cfg.freeze()
    return cfg


def train(cfg):
    trainer = d2.Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    lines = (Path(cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines()
    return {name: value for line in lines for name, value in json.loads(line).items()}


def test_coco_instances_train_and_evaluate(tmp_path, registered):
    write_coco_set(tmp_path)
    register_coco_instances("test_coco", {}, str(tmp_path / "annotations.json"), str(tmp_path))
    cfg = trainer_cfg(tmp_path / "out", "test_coco", num_classes=3)
    metrics = train(cfg)
    assert {"coco/AP", "coco/AP-c90", "loss_cls"} <= metrics.keys()
    assert (tmp_path / "out/inference/test_coco/coco_results.json").exists()
    # Detectron2's evaluator reads the file itself, and finds the images by their ids.
    model = d2.Trainer.build_model(cfg)
    d2.GroupSamplingCheckpointer(model).load(str(tmp_path / "out/model_final.pth"))
    theirs = d2.Trainer.test(cfg, model, COCOEvaluator("test_coco", output_dir=str(tmp_path)))
    assert theirs["bbox"]["AP50"] == pytest.approx(metrics["coco/AP50"], abs=1e-6)


def as_dicts(folder, num_classes):
    write_coco_set(folder)
    content = json.loads((folder / "annotations.json").read_text())
    dicts = []
    for image in content["images"]:
        boxes = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        annotations = [
            {"bbox": a["bbox"], "bbox_mode": BoxMode.XYWH_ABS, "category_id": i % num_classes, "iscrowd": 0}
            for i, a in enumerate(boxes)
        ]
        file = str(folder / image["file_name"])
        dicts.append(
            {"file_name": file, "image_id": image["id"], "height": 96, "width": 128, "annotations": annotations}
        )
    return dicts


@pytest.mark.parametrize(
    "name, num_classes, metric", [("test_dicts", 1, "wider_face/AP_all"), ("test_classes", 2, "bbox/AP")]
)
def test_registered_dicts_train_and_evaluate(tmp_path, registered, name, num_classes, metric):
    DatasetCatalog.register(name, lambda: as_dicts(tmp_path, num_classes))
    MetadataCatalog.get(name).thing_classes = ["a", "b"][:num_classes]
    assert metric in train(trainer_cfg(tmp_path / "out", name, num_classes))


def test_unknown_name(tmp_path):
    with pytest.raises(ValueError, match="got 'nowhere'"):
        find_source(trainer_cfg(tmp_path, "nowhere", 1), "nowhere")


@pytest.mark.slow
def test_built_in_sets_are_registered_on_import(tmp_path):
    """In a fresh interpreter, without a file of any of them; class names are known before a set is read."""
    script = """
from detectron2.data import DatasetCatalog, MetadataCatalog
before = set(DatasetCatalog.list())
import group_sampling.engines.d2
for name in sorted(set(DatasetCatalog.list()) - before):
    print(name, *MetadataCatalog.get(name).thing_classes)
print(len(DatasetCatalog.get("synthetic_faces_val")))
"""
    environment = {"PYTHONPATH": ":".join(sys.path), "DETECTRON2_DATASETS": str(tmp_path), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True, timeout=120
    )
    names = ["fddb", "synthetic_faces_train", "synthetic_faces_val"]
    names += [f"wider_face_{part}" for part in ("test", "train", "val")]
    assert done.stdout.splitlines() == [*(f"{name} face" for name in names), "200"]


def test_a_set_of_the_same_name_stays(registered):
    own = list
    DatasetCatalog.register("test_dicts", own)
    DatasetCatalog.remove("fddb")
    DatasetCatalog.register("fddb", own)
    try:
        d2.register_datasets()
        assert DatasetCatalog.get("fddb") == []
    finally:
        DatasetCatalog.remove("fddb")
        d2.register_datasets()


def test_procedural_images_in_detectron2s_mapper():
    from group_sampling.data.synthetic import render

    image = DatasetCatalog.get("synthetic_faces_val")[0]
    mapper = DatasetMapper(is_train=True, augmentations=[T.NoOpTransform()], image_format="RGB")
    example = mapper(image)
    assert np.array_equal(example["image"].permute(1, 2, 0).numpy(), render(image["file_name"]))
    assert len(example["instances"]) == sum(1 - a["iscrowd"] for a in image["annotations"])
    with EventStorage(0):  # and in its own model
        losses = build_model(stock_cfg())([example])
    assert all(loss.isfinite() for loss in losses.values())
