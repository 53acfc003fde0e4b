"""Every row trains and tests as the paper's: the configs against the facts in experiments/paper/rows.yaml."""

from pathlib import Path

import pytest

from group_sampling.engines.tv.config import load_config
from group_sampling.experiments.claims import paper_values, read_paper

CONFIGS = Path(__file__).resolve().parents[2] / "projects/GroupSampling/configs"
FACTS = read_paper("rows")
TRAINING, ROWS, FIGURE4 = FACTS["training"], FACTS["rows"], FACTS["figure4"]
POINTS = [(detector, n) for detector in FIGURE4["detectors"] for n in FIGURE4["samples"]]
FPN, RESNET = "build_group_sampling_fpn_backbone", "build_group_sampling_resnet_backbone"
LOSSES = {"smooth-L1": "smooth_l1", "-ln IoU": "iou_log", "(1 - IoU)^2": "iou_l2"}
TWO_STAGES = "GroupedROIHeads"


def load(name, *opts):
    return load_config(str(CONFIGS / f"{name}.yaml"), ["MODEL.DEVICE", "cpu", *opts])


def strides_of(cfg):
    """Stride of the anchors of each scale, ascending: a feature Cn or Pn has 2 ** n pixels a cell."""
    features = [2 ** int(name[-1]) for name in cfg.MODEL.RPN.IN_FEATURES]
    sizes = cfg.MODEL.ANCHOR_GENERATOR.SIZES
    if cfg.MODEL.GROUP_SAMPLING.ANCHOR_STRIDES:
        strides = dict(zip(sizes[0], cfg.MODEL.GROUP_SAMPLING.ANCHOR_STRIDES, strict=True))
    else:
        strides = {size: stride for level, stride in zip(sizes, features, strict=True) for size in level}
    return {size: strides[size] for size in sorted(strides)}


def check_row(cfg, facts):
    """Of a row: features, strides, sampler and losses."""
    model = cfg.MODEL
    kinds = {name[0] for name in facts["features"]}
    assert {"P": FPN, "C": RESNET}[kinds.pop()] == model.BACKBONE.NAME and not kinds
    assert model.BACKBONE.BOTTOM_UP == RESNET
    prefix = {FPN: "p", RESNET: "res"}[model.BACKBONE.NAME]
    assert list(model.RPN.IN_FEATURES) == [prefix + name[1:] for name in facts["features"]]
    assert strides_of(cfg) == dict(zip(TRAINING["anchor_scales"], facts["strides"], strict=True))

    assert facts["sampling"] == model.GROUP_SAMPLING.SAMPLER
    if "hardest" in facts:
        assert facts["hardest"] == model.RPN.BATCH_SIZE_PER_IMAGE
    elif facts["sampling"] == "uniform":  # the paper does not say how many; here as many as of the balanced draw
        scales = len(TRAINING["anchor_scales"])
        assert scales * facts.get("samples", model.GROUP_SAMPLING.SAMPLES_PER_GROUP) == model.RPN.BATCH_SIZE_PER_IMAGE
    elif facts["sampling"] == "group":
        assert facts.get("samples", model.GROUP_SAMPLING.SAMPLES_PER_GROUP) == model.GROUP_SAMPLING.SAMPLES_PER_GROUP
    if "alpha" in facts:
        found = (model.RETINANET.FOCAL_LOSS_ALPHA, model.RETINANET.FOCAL_LOSS_GAMMA)
        assert found == (facts["alpha"], facts["gamma"])

    assert LOSSES[facts["loss"]] == model.RPN.BBOX_REG_LOSS_TYPE
    if facts["loss"] == "smooth-L1":
        assert pytest.approx(1 / 9) == model.RPN.SMOOTH_L1_BETA  # Faster R-CNN's; with 0 it would be plain L1

    second = facts.get("second_stage")
    assert (model.ROI_HEADS.NAME == TWO_STAGES) is (second is not None)
    if second is not None:
        assert second["sampling"] == model.GROUP_SAMPLING.ROI_SAMPLER
        assert LOSSES[second["loss"]] == model.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE
        if second["loss"] == "smooth-L1":
            assert (model.ROI_BOX_HEAD.SMOOTH_L1_BETA, model.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT) == (1, 1)
        assert 1 / (1 + TRAINING["negatives_per_positive"]) == model.ROI_HEADS.POSITIVE_FRACTION


def check_training(cfg):
    """What all rows share: Sec. 5, and the anchors of Sec. 3."""
    model, solver, training = cfg.MODEL, cfg.SOLVER, TRAINING
    assert f"torchvision://{training['weights']}" == model.WEIGHTS and model.RESNETS.DEPTH == 50
    assert sorted(size for level in model.ANCHOR_GENERATOR.SIZES for size in level) == training["anchor_scales"]
    assert {ratio for level in model.ANCHOR_GENERATOR.ASPECT_RATIOS for ratio in level} == set(
        training["aspect_ratios"]
    )
    assert list(model.RPN.IOU_THRESHOLDS) == [training["lambda2"], training["lambda1"]]
    assert 1 / (1 + training["negatives_per_positive"]) == model.RPN.POSITIVE_FRACTION

    iterations_per_epoch = training["images"] / training["gpus"]
    assert training["gpus"] == solver.IMS_PER_BATCH
    assert training["epochs"] * iterations_per_epoch == solver.MAX_ITER
    assert list(solver.STEPS) == [epoch * iterations_per_epoch for epoch in training["learning_rate_epochs"]]
    assert (training["learning_rate"], training["learning_rate_factor"]) == (solver.BASE_LR, solver.GAMMA)
    assert (training["momentum"], training["weight_decay"]) == (solver.MOMENTUM, solver.WEIGHT_DECAY)

    first, last = training["resize_n"]
    assert list(cfg.INPUT.SCALE_JITTER) == [training["resize_step"] * n for n in range(first, last + 1)]
    assert cfg.INPUT.CROP.ENABLED and cfg.INPUT.CROP.TYPE == "absolute"
    assert list(cfg.INPUT.CROP.SIZE) == [training["crop_side"]] * 2
    assert training["flip"] == cfg.INPUT.RANDOM_FLIP
    assert (tuple(cfg.DATASETS.TRAIN), tuple(cfg.DATASETS.TEST)) == (("wider_face_train",), ("wider_face_val",))

    assert len(cfg.TEST.PYRAMID.SCALES) > 1 and FACTS["test"]["pyramid"]
    assert min(cfg.TEST.PYRAMID.SCALES) < 1 < max(cfg.TEST.PYRAMID.SCALES)
    assert FACTS["test"]["max_side"] == cfg.TEST.PYRAMID.MAX_SIDE
    assert FACTS["test"]["sub_detectors"] is cfg.TEST.SUB_DETECTORS


def figure4_facts(detector, n):
    return {**ROWS[detector], "samples": n}


@pytest.mark.parametrize("name", ROWS)
def test_row(name):
    cfg = load(name)
    check_row(cfg, ROWS[name])
    check_training(cfg)


@pytest.mark.parametrize("detector, n", POINTS)
def test_point_of_figure_4(detector, n):
    cfg = load(f"figure4/{detector}_n{n}")
    check_row(cfg, figure4_facts(detector, n))
    check_training(cfg)


def test_facts_are_of_the_rows_that_have_numbers():
    assert set(ROWS) == {config for table in paper_values().values() for config in table}


def test_every_config_of_a_table_is_a_row_of_the_paper():
    """What else there is, is filed under another name than a table's or a figure's."""
    ours = {"coco_grouped_faster_rcnn"}
    folders = (CONFIGS, *sorted(CONFIGS.glob("table*")), *sorted(CONFIGS.glob("figure*")))
    files = [file for folder in folders for file in folder.glob("*.yaml") if not file.name.startswith("Base-")]
    names = {str(file.relative_to(CONFIGS).with_suffix("")) for file in files}
    assert names - ours == {*ROWS, *(f"figure4/{detector}_n{n}" for detector, n in POINTS)}


def test_table_3_is_fpn_finest_sampling_with_another_loss():
    """Table 3's smooth-L1 row has all the numbers of FPN-finest-sampling in the other tables."""
    tables = paper_values()
    row = tables["table3"]["fpn_finest_sampling"]
    assert row == tables["table2"]["fpn_finest_sampling"] == tables["table4"]["fpn_finest_sampling"]
    assert row.items() <= tables["table1"]["fpn_finest_sampling"].items()
    opts = ["MODEL.RPN.BBOX_REG_LOSS_TYPE", "smooth_l1", "OUTPUT_DIR", ""]
    assert load("table3/iou_l2", *opts) == load("table3/iou_log", *opts) == load("fpn_finest_sampling", *opts)


def test_runs_that_are_not_the_papers_say_that_they_test_at_one_scale():
    for name in ("quick/demo_fpn_finest", "quick/demo_fpn_finest_sampling"):
        cfg = load(name)
        assert not cfg.TEST.PYRAMID.SCALES and cfg.MODEL.RPN.BBOX_REG_LOSS_TYPE == "smooth_l1"
    for file in ("Base-Demo", "tiny"):
        (line,) = [text for text in (CONFIGS / f"quick/{file}.yaml").read_text().splitlines() if "SCALES: []" in text]
        assert "unlike the paper" in line


# A row, and changes each of which makes it another detector than the paper's.
MUTATIONS = [
    ("fpn", ["MODEL.GROUP_SAMPLING.SAMPLER", "group"]),
    ("fpn", ["MODEL.ANCHOR_GENERATOR.SIZES", "[[32], [16], [64], [128]]"]),
    ("fpn", ["MODEL.RPN.IN_FEATURES", "['p2', 'p3', 'p4']", "MODEL.ANCHOR_GENERATOR.SIZES", "[[16], [32], [64, 128]]"]),
    ("fpn_finest_stride", ["MODEL.GROUP_SAMPLING.ANCHOR_STRIDES", "[4, 8, 16, 16]"]),
    ("fpn_finest_stride", ["MODEL.GROUP_SAMPLING.ANCHOR_STRIDES", "()"]),
    ("fpn_finest_sampling", ["MODEL.RPN.BBOX_REG_LOSS_TYPE", "iou_l2"]),
    ("fpn_finest_sampling", ["MODEL.RPN.SMOOTH_L1_BETA", "0.0"]),
    ("fpn_finest_sampling", ["MODEL.ROI_HEADS.NAME", "GroupedROIHeads"]),
    ("table2/p3", ["MODEL.RPN.IN_FEATURES", "['p2']"]),
    ("table2/c3", ["MODEL.BACKBONE.NAME", FPN, "MODEL.RPN.IN_FEATURES", "['p3']"]),
    ("fpn_finest", ["MODEL.BACKBONE.NAME", "build_torchvision_fpn_backbone"]),
    ("fpn_finest", ["MODEL.BACKBONE.BOTTOM_UP", "build_swin_t_backbone"]),
    ("table3/iou_l2", ["MODEL.RPN.BBOX_REG_LOSS_TYPE", "iou_log"]),
    ("table4/ohem", ["MODEL.RPN.BATCH_SIZE_PER_IMAGE", "512"]),
    ("table4/focal", ["MODEL.RETINANET.FOCAL_LOSS_GAMMA", "1.0"]),
    ("table5/fast_rcnn", ["MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", "0.0"]),
    ("table5/fast_rcnn_iou", ["MODEL.RPN.BBOX_REG_LOSS_TYPE", "smooth_l1"]),
    ("table5/fast_rcnn_iou", ["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "smooth_l1"]),
    ("table5/grouped_fast_rcnn", ["MODEL.GROUP_SAMPLING.ROI_SAMPLER", "uniform"]),
    ("fpn_finest", ["MODEL.ANCHOR_GENERATOR.SIZES", "[[16, 32, 64]]"]),
    ("fpn_finest", ["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[1.0, 1.25]]"]),
    ("fpn_finest", ["MODEL.RPN.IOU_THRESHOLDS", "[0.3, 0.6]"]),
    ("fpn_finest", ["MODEL.RPN.POSITIVE_FRACTION", "0.5"]),
    ("fpn_finest", ["MODEL.RPN.BATCH_SIZE_PER_IMAGE", "256"]),
    ("fpn_finest", ["MODEL.WEIGHTS", ""]),
    ("fpn_finest", ["SOLVER.BASE_LR", "0.02"]),
    ("fpn_finest", ["SOLVER.STEPS", "(96600,)"]),
    ("fpn_finest", ["SOLVER.MAX_ITER", "90000"]),
    ("fpn_finest", ["SOLVER.WEIGHT_DECAY", "0.0001"]),
    ("fpn_finest", ["INPUT.SCALE_JITTER", "(0.5, 1.0, 2.0)"]),
    ("fpn_finest", ["INPUT.CROP.SIZE", "[800, 800]"]),
    ("fpn_finest", ["INPUT.RANDOM_FLIP", "none"]),
    ("fpn_finest", ["TEST.PYRAMID.SCALES", "()"]),
    ("fpn_finest", ["TEST.PYRAMID.MAX_SIDE", "2000"]),
]


@pytest.mark.parametrize("name, opts", MUTATIONS, ids=lambda value: value if isinstance(value, str) else value[0])
def test_another_detector_fails(name, opts):
    cfg = load(name)
    cfg.merge_from_list(opts)
    with pytest.raises((AssertionError, ValueError)):
        check_row(cfg, ROWS[name])
        check_training(cfg)


def test_another_number_of_samples_fails():
    cfg = load("figure4/fpn_n512")
    with pytest.raises(AssertionError):
        check_row(cfg, figure4_facts("fpn", 1024))
