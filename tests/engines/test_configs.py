"""Every YAML of the project, on both engines: it builds, trains and evaluates; its anchors are those of the paper."""

import importlib
import importlib.util
import json
import math
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from tv_cases import CONFIGS, SMALL_OPTS, d2_setup, run_configs

from group_sampling.config import ConfigError
from group_sampling.engines.tv.config import load_config
from group_sampling.engines.tv.model import build_model

ENGINES = [
    pytest.param("tv", id="torchvision"),
    pytest.param(
        "d2",
        id="detectron2",
        marks=pytest.mark.skipif(importlib.util.find_spec("detectron2") is None, reason="Detectron2 is not installed"),
    ),
]
every_config = pytest.mark.parametrize("path", run_configs(), ids=lambda path: str(path.relative_to(CONFIGS)))

# Of the rows that differ in the number of samples alone, the fast suite takes one.
FAST = ("fpn_finest_stride.yaml", "rpn_c4.yaml", "ohem.yaml", "grouped_fast_rcnn.yaml")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=[] if p.name in FAST else pytest.mark.slow) for p in run_configs()],
    ids=lambda path: str(path.relative_to(CONFIGS)),
)
def test_trains_and_evaluates(path, engine, tmp_path):
    main = importlib.import_module(f"group_sampling.engines.{engine}.train").main
    flags = {"resume": False, "eval_only": False, "num_gpus": 1, "num_machines": 1, "machine_rank": 0}
    # A pyramid, as the rows have it, but of images that are small.
    opts = [*SMALL_OPTS, "TEST.PYRAMID.SCALES", "(0.5, 1.0)", "OUTPUT_DIR", str(tmp_path)]
    main(Namespace(config_file=str(path), dist_url="auto", opts=opts, **flags))
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    losses = {name: value for row in rows for name, value in row.items() if "loss" in name}
    assert {"loss_rpn_cls", "loss_rpn_loc", "total_loss"} <= losses.keys()
    assert all(math.isfinite(value) for value in losses.values())
    assert any("AP" in name for row in rows for name in row), "no evaluation was written"
    assert (tmp_path / "inference/synthetic_faces_val").is_dir()


def write_coco_set(folder, num_images=4):
    """Three of COCO's categories; class ids are not consecutive."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(num_images):
        pixels = rng.integers(0, 256, (96, 128, 3), dtype=np.uint8)
        for category, (x, y, w, h) in ((1, (5, 5, 40, 30)), (7, (60, 10, 30, 60)), (90, (20, 50, 36, 36))):
            pixels[y : y + h, x : x + w] = 2 * category
            annotation = {"id": 10 * i + category, "image_id": i, "category_id": category, "bbox": [x, y, w, h]}
            annotations.append({**annotation, "area": w * h, "iscrowd": 0})
        Image.fromarray(pixels).save(folder / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": 96, "width": 128})
    categories = [{"id": i, "name": f"c{i}"} for i in (1, 7, 90)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))


def run_coco(folder, engine, *opts):
    write_coco_set(folder)
    dataset = f"[['tiny_coco', '{folder / 'annotations.json'}', '{folder}']]"
    opts = [
        *SMALL_OPTS,
        *("DATASETS.COCO_FORMAT", dataset, "DATASETS.TRAIN", "('tiny_coco',)", "DATASETS.TEST", "('tiny_coco',)"),
        *("INPUT.MIN_SIZE_TEST", "0", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.001", "OUTPUT_DIR", str(folder / "out")),
        *opts,
    ]
    flags = {"resume": False, "eval_only": False, "num_gpus": 1, "num_machines": 1, "machine_rank": 0}
    config = str(CONFIGS / "coco_grouped_faster_rcnn.yaml")
    main = importlib.import_module(f"group_sampling.engines.{engine}.train").main
    main(Namespace(config_file=config, dist_url="auto", opts=opts, **flags))


@pytest.mark.parametrize("engine", ENGINES)
def test_coco_config_on_a_small_set(tmp_path, engine):
    run_coco(tmp_path, engine, "MODEL.ROI_HEADS.NUM_CLASSES", "3")
    written = {}
    for line in (tmp_path / "out/metrics.json").read_text().splitlines():
        written.update(json.loads(line))
    assert {"loss_cls", "roi/num_pos@32", "rpn/num_neg@512", "coco/AP50", "coco/AP-c90"} <= written.keys()
    assert "wider_face/AP_all" not in written, "several classes are not faces"


@pytest.mark.parametrize("engine", ENGINES)
def test_more_classes_than_the_heads_have(tmp_path, engine):
    message = r"NUM_CLASSES: expected the number of classes of DATASETS\.TEST 'tiny_coco', 3 \(c1, c7, c90\), got 2"
    with pytest.raises(ConfigError, match=message):
        run_coco(tmp_path, engine, "MODEL.ROI_HEADS.NUM_CLASSES", "2")


def test_every_row_of_the_paper_is_collected():
    """The five detectors, what each table and Figure 4 add to them, and the ablations."""
    folders = [str(path.parent.relative_to(CONFIGS)) for path in run_configs()]
    rows = {"table2": 8, "table3": 2, "table4": 2, "table5": 3, "figure4": 15, "ablations": 14}
    assert {folder: folders.count(folder) for folder in rows} == rows
    assert {path.stem for path in run_configs() if path.parent == CONFIGS} == {
        *("rpn_c4", "fpn", "fpn_finest_stride", "fpn_finest", "fpn_finest_sampling"),
        "coco_grouped_faster_rcnn",
    }


def test_keys_of_the_configs_fit_on_the_screen():
    for path in CONFIGS.rglob("*.yaml"):
        assert [line for line in path.read_text().splitlines() if len(line) > 120 and line[0] != "#"] == [], path


# Of an image of 256 x 320 pixels, by hand: cells of each level, strides, anchors.
P2, P3, P4, P5 = 64 * 80, 32 * 40, 16 * 20, 8 * 10
LAYOUTS = {
    "rpn_c4": ([4 * P4], [16], 1_280),
    "fpn": ([P2, P3, P4, P5], [4, 8, 16, 32], 6_800),
    "fpn_finest_stride": ([P2, P3, P4, P5], [4, 8, 16, 32], 6_800),
    "fpn_finest": ([4 * P2], [4], 20_480),
    "fpn_finest_sampling": ([4 * P2], [4], 20_480),
    "table2/fpn_sampling": ([P2, P3, P4, P5], [4, 8, 16, 32], 6_800),
    "table2/p3": ([4 * P3], [8], 5_120),
    "table2/p3_sampling": ([4 * P3], [8], 5_120),
    "table2/p4": ([4 * P4], [16], 1_280),
    "table2/p4_sampling": ([4 * P4], [16], 1_280),
    "table2/c3": ([4 * P3], [8], 5_120),
    "table2/c3_sampling": ([4 * P3], [8], 5_120),
    "table2/c4_sampling": ([4 * P4], [16], 1_280),
    "table5/grouped_fast_rcnn": ([4 * P2], [4], 20_480),
}


def torchvision_grid(name, height=256, width=320):
    model = build_model(load_config(str(CONFIGS / f"{name}.yaml"), SMALL_OPTS)).eval()
    with torch.no_grad():
        features = model.backbone(model.transform([torch.zeros(3, height, width)])[0].tensors)
        levels = [features[f] for f in load_config(str(CONFIGS / f"{name}.yaml"), SMALL_OPTS).MODEL.RPN.IN_FEATURES]
    logits, deltas = model.rpn.head(levels)
    grid = model.rpn.anchor_generator.grid(levels)
    assert sum(level[0].numel() for level in logits) == grid.num_anchors
    assert sum(level[0].numel() for level in deltas) == 4 * grid.num_anchors
    return grid


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_by_hand(name):
    level_sizes, strides, num_anchors = LAYOUTS[name]
    grid = torchvision_grid(name)
    assert list(grid.level_sizes) == level_sizes and grid.num_anchors == num_anchors
    assert sorted({lattice.stride for lattice in grid.lattices}) == strides
    assert grid.scales == (16.0, 32.0, 64.0, 128.0)
    centers = (grid.boxes()[:, :2] + grid.boxes()[:, 2:]) / 2
    start = 0
    for size, stride in zip(level_sizes, strides):
        level = centers[start : start + size]
        assert (level % stride == 0).all() and level.min() == 0
        assert level.amax(0).tolist() == [320 - stride, 256 - stride]
        start += size


def test_anchors_of_fpn_finest_stride_are_fpns():
    for height, width in ((256, 320), (300, 411)):
        fpn, stride = torchvision_grid("fpn", height, width), torchvision_grid("fpn_finest_stride", height, width)
        assert fpn == stride and torch.equal(fpn.boxes(), stride.boxes())


@pytest.mark.parametrize("name", LAYOUTS)
def test_both_engines_have_the_same_anchors(name, tmp_path):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.modeling import build_model as build_detectron2
    from detectron2.structures import Boxes

    opts = [*SMALL_OPTS, "OUTPUT_DIR", str(tmp_path)]
    cfg = d2_setup(Namespace(config_file=str(CONFIGS / f"{name}.yaml"), opts=opts, resume=False, eval_only=False))
    model = build_detectron2(cfg).eval()
    for height, width in ((256, 320), (203, 150)):
        with torch.no_grad():
            images = model.preprocess_image([{"image": torch.zeros(3, height, width)}])
            features = model.backbone(images.tensor)
        levels = [features[f] for f in cfg.MODEL.RPN.IN_FEATURES]
        generator = model.proposal_generator.anchor_generator
        expected = torchvision_grid(name, height, width)
        assert model.proposal_generator.grid(levels) == expected
        assert torch.equal(Boxes.cat(generator(levels)).tensor, expected.boxes())


@pytest.mark.parametrize(
    "opts, message",
    [
        (["MODEL.GROUP_SAMPLING.ANCHOR_STRIDES", "[4, 8]"], r"ANCHOR_STRIDES: .*one stride per size"),
        (["MODEL.GROUP_SAMPLING.ANCHOR_STRIDES", "[4, 8, 16, 30]"], r"STRIDES: expected multiples of the stride 4"),
        (
            ["MODEL.GROUP_SAMPLING.ANCHOR_STRIDES", "[4, 8, 16, 32]", "MODEL.RPN.IN_FEATURES", "['p2', 'p3']"],
            r"ANCHOR_STRIDES: expected one feature",
        ),
    ],
)
def test_strides_that_do_not_fit(opts, message):
    with pytest.raises(ConfigError, match=message):
        build_model(load_config(str(CONFIGS / "fpn_finest.yaml"), [*SMALL_OPTS, *opts]))
