"""The Detectron2 engine through Detectron2's own entry points."""

import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from tv_cases import d2_setup

import group_sampling.engines.d2 as d2
from group_sampling.anchors import AnchorGrid
from group_sampling.checkpoint import convert_names
from group_sampling.config import ConfigError
from group_sampling.data.catalog import Catalog, MissingDatasetError
from group_sampling.engines.d2.data import to_dataset_dict, to_record
from group_sampling.engines.d2.train import main

TINY = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", "0"),
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.NORM", "BN"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "32", "MODEL.RESNETS.RES2_OUT_CHANNELS", "32", "MODEL.FPN.OUT_CHANNELS", "32"),
    *("MODEL.GROUP_SAMPLING.SAMPLES_PER_GROUP", "32", "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "128"),
    *("MODEL.RPN.PRE_NMS_TOPK_TEST", "300"),
    *("INPUT.CROP.SIZE", "[128, 128]", "DATALOADER.NUM_WORKERS", "0", "SEED", "1"),
    *("DATASETS.TRAIN", "('synthetic_faces_train',)", "DATASETS.TEST", "('synthetic_faces_val',)"),
    *("DATASETS.SYNTHETIC.NUM_TRAIN", "12", "DATASETS.SYNTHETIC.NUM_VAL", "3"),
    *("DATASETS.SYNTHETIC.HEIGHT", "160", "DATASETS.SYNTHETIC.WIDTH", "160"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "4", "SOLVER.STEPS", "(3,)", "TEST.EVAL_PERIOD", "0"),
]


@pytest.fixture
def make_args(repository, tmp_path):
    def make(*opts, name="fpn_finest_sampling", **flags):
        config = repository / f"projects/GroupSampling/configs/{name}.yaml"
        defaults = {
            "resume": False,
            "eval_only": False,
            "num_gpus": 1,
            "num_machines": 1,
            "machine_rank": 0,
            "dist_url": "auto",
        }
        return SimpleNamespace(
            config_file=str(config), opts=[*TINY, "OUTPUT_DIR", str(tmp_path / "out"), *opts], **{**defaults, **flags}
        )

    return make


@pytest.fixture
def make_cfg(make_args):
    return lambda *opts, **kwargs: d2_setup(make_args(*opts, **kwargs))


def train_steps(cfg, steps=3, batches=None):
    model = build_model(cfg).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batches = batches or iter(d2.Trainer.build_train_loader(cfg))
    with EventStorage(0) as storage:
        for _ in range(steps):
            losses = model(next(batches))
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            storage.step()
    return model, losses


@pytest.mark.parametrize("name", ["fpn_finest", "fpn_finest_sampling"])
def test_train_and_detect(make_cfg, name):
    cfg = make_cfg(name=name)
    model, losses = train_steps(cfg)
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_loc"}
    assert all(loss.isfinite() for loss in losses.values())
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    model.eval()
    with torch.no_grad():
        (output,) = model([{"image": torch.zeros(3, 100, 90), "height": 200, "width": 180}])
    instances = output["instances"]
    assert instances.image_size == (200, 180)
    assert set(instances.get_fields()) == {"pred_boxes", "scores", "pred_classes", "anchor_scales"}
    assert set(instances.anchor_scales.tolist()) <= {16.0, 32.0, 64.0, 128.0}
    assert (instances.scores.diff() <= 0).all() and (instances.pred_classes == 0).all()


def test_only_p2_is_computed(make_cfg):
    names = dict(build_model(make_cfg()).named_parameters())
    assert [n for n in names if "fpn_output" in n] == ["backbone.fpn_output2.weight", "backbone.fpn_output2.bias"]
    assert sum("fpn_lateral" in n for n in names) == 8


@pytest.mark.parametrize("levels, laterals", [(["p2", "p3", "p4", "p5"], 4), (["p3"], 3), (["p5"], 1)])
def test_fpn_computes_what_is_read(make_cfg, levels, laterals):
    sizes = str([[16]] * len(levels))
    cfg = make_cfg("MODEL.RPN.IN_FEATURES", str(levels), "MODEL.ANCHOR_GENERATOR.SIZES", sizes)
    fpn = build_model(cfg).backbone
    assert list(fpn.output_shape()) == levels
    assert [shape.stride for shape in fpn.output_shape().values()] == [2 ** int(level[1]) for level in levels]
    names = [name.split(".")[0] for name, _ in fpn.named_children()]
    assert sorted(n for n in names if "output" in n) == [f"fpn_output{level[1]}" for level in levels]
    assert sum("lateral" in n for n in names) == laterals


def test_top_down_path_is_bilinear(make_cfg):
    fpn = build_model(make_cfg()).backbone.eval()
    image = torch.rand(1, 3, 96, 64)
    with torch.no_grad():
        bottom_up = fpn.bottom_up(image)
        inner = fpn.fpn_lateral5(bottom_up["res5"])
        for stage in (4, 3, 2):
            up = torch.nn.Upsample(scale_factor=2, mode="bilinear")(inner)
            inner = up + getattr(fpn, f"fpn_lateral{stage}")(bottom_up[f"res{stage}"])
        assert torch.allclose(fpn(image)["p2"], fpn.fpn_output2(inner), atol=1e-6)


def test_grid_is_the_generators_anchors(make_cfg):
    cfg = make_cfg("MODEL.RPN.IN_FEATURES", "['p2', 'p4']", "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[0.5, 1.0, 2.0]]")
    rpn = build_model(cfg).proposal_generator
    features = [torch.zeros(1, 1, 20, 31), torch.zeros(1, 1, 5, 8)]
    grid = rpn.grid(features)
    assert isinstance(grid, AnchorGrid)
    assert torch.equal(grid.boxes(), Boxes.cat(rpn.anchor_generator(features)).tensor)


def test_rpn_in_a_stock_meta_architecture(make_cfg):
    """The proposal generator alone, in Detectron2's own GeneralizedRCNN with its standard ROI heads."""
    cfg = make_cfg(
        *("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
        *("TEST.SUB_DETECTORS", "False"),
        *("MODEL.ROI_HEADS.IN_FEATURES", "['p2']", "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"),
        *(
            "MODEL.ROI_BOX_HEAD.NUM_FC",
            "1",
            "MODEL.ROI_BOX_HEAD.FC_DIM",
            "32",
            "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION",
            "3",
        ),
        *(
            "MODEL.RPN.NMS_THRESH",
            "0.7",
            "MODEL.RPN.POST_NMS_TOPK_TRAIN",
            "50",
            "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE",
            "16",
        ),
    )
    model, losses = train_steps(cfg)
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"}
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def make_example(boxes, ignore=(), size=128):
    ignore_boxes = Boxes(torch.tensor(ignore, dtype=torch.float32).reshape(-1, 4))
    instances = d2.IgnoringInstances((size, size), ignore_boxes)
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.zeros(len(boxes), dtype=torch.int64)
    image = torch.randint(0, 256, (3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return {"image": image, "instances": instances}


@pytest.mark.parametrize(
    "boxes",
    [
        [],
        [[5.0, 5.0, 5.0, 20.0]],
        [[30.0, 30.0, 10.0, 10.0]],
        [[math.nan, 0.0, 9.0, 9.0]],
        [[0.0, 0.0, math.inf, 9.0]],
        [[5000.0, 5000.0, 5064.0, 5064.0]],
        np.random.default_rng(0).uniform(0, 100, (2000, 1)).repeat(4, 1) + [0, 0, 12, 12],
    ],
    ids=["none", "zero-area", "inverted", "nan", "inf", "outside", "2000 faces"],
)
def test_hard_annotations_train(make_cfg, boxes):
    model, losses = train_steps(make_cfg(), steps=1, batches=iter([[make_example(list(map(list, boxes)))]]))
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_ignore_regions_reach_the_sampler(make_cfg):
    model = build_model(make_cfg("MODEL.GROUP_SAMPLING.SAMPLES_PER_GROUP", "4096")).train()
    counts = []
    for ignore in ([], [[-200.0, -200.0, 400.0, 400.0]]):
        with EventStorage(0) as storage:
            model([make_example([[20.0, 20.0, 36.0, 36.0]], ignore)])
            counts.append([storage.latest()[f"rpn/num_neg@{s}"][0] for s in (16, 32, 64, 128)])
    assert min(counts[0]) > 900 and counts[1] == [0, 0, 0, 0]


def test_main_trains_evaluates_and_resumes(make_args, tmp_path):
    """Four iterations at once, and two plus two after a restart: the same weights bit for bit."""
    main(make_args())
    out = tmp_path / "out"
    for file in ("model_final.pth", "last_checkpoint", "metrics.json", "config.yaml"):
        assert (out / file).exists()
    results = json.loads((out / "inference/synthetic_faces_val/results.json").read_text())
    assert set(results["ap"]) == {"all", "@16", "@32", "@64", "@128"}
    assert (out / "inference/synthetic_faces_val/pr_curves.png").stat().st_size > 5000
    assert any(name.startswith("events.out") for name in os.listdir(out))

    halves = str(tmp_path / "halves")
    interrupted = make_args("OUTPUT_DIR", halves)
    cfg = d2_setup(interrupted)
    trainer = d2.Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.max_iter = 2  # as if the run had been killed; the schedule is that of four iterations
    trainer.train()
    with EventStorage(0):
        main(make_args("OUTPUT_DIR", halves, resume=True))
    whole, resumed = (torch.load(f"{folder}/model_final.pth", weights_only=True)["model"] for folder in (out, halves))
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []

    evaluated = main(
        make_args("MODEL.WEIGHTS", str(out / "model_final.pth"), "OUTPUT_DIR", str(tmp_path / "eval"), eval_only=True)
    )
    assert evaluated["wider_face"]["AP_all"] == pytest.approx(100 * results["ap"]["all"])


@pytest.mark.slow
def test_two_cpu_processes(make_args, tmp_path):
    """Started from here; the evaluation finds what a single process finds."""
    main(make_args(num_gpus=2))
    out = tmp_path / "out"
    assert (out / "log.txt.rank1").exists() and (out / "model_final.pth").exists()
    weights = ["MODEL.WEIGHTS", str(out / "model_final.pth")]
    two = main(make_args(*weights, "OUTPUT_DIR", str(tmp_path / "two"), eval_only=True, num_gpus=2))
    one = main(make_args(*weights, "OUTPUT_DIR", str(tmp_path / "one"), eval_only=True))
    assert two["wider_face"]["AP_all"] == one["wider_face"]["AP_all"] >= 0


def test_torchvision_weights_load(make_cfg, tmp_path):
    """A file like torchvision's ImageNet ResNet-18: every parameter and statistic of the backbone comes from it."""
    torch.manual_seed(0)
    source = torchvision.models.resnet18().state_dict()
    source["bn1.running_mean"] += 1
    torch.save(source, tmp_path / "resnet18.pth")
    stock = [
        "MODEL.RESNETS.NORM",
        "FrozenBN",
        "MODEL.RESNETS.STEM_OUT_CHANNELS",
        "64",
        "MODEL.RESNETS.RES2_OUT_CHANNELS",
        "64",
    ]
    cfg = make_cfg(*stock, "MODEL.WEIGHTS", str(tmp_path / "resnet18.pth"))
    model = build_model(cfg)
    d2.GroupSamplingCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    loaded = convert_names(model.backbone.state_dict(prefix="backbone."), "torchvision")
    for name, value in loaded.items():
        if name.startswith("backbone.body."):
            assert torch.equal(value, source[name.removeprefix("backbone.body.")]), name


def test_default_predictor(make_cfg):
    predictor = DefaultPredictor(make_cfg())
    instances = predictor(np.zeros((60, 80, 3), dtype=np.uint8))["instances"]
    assert instances.image_size == (60, 80) and instances.has("anchor_scales")


def test_datasets_are_registered(make_cfg):
    make_cfg()
    assert {"wider_face_train", "wider_face_val", "wider_face_test", "synthetic_faces_train"} <= set(
        DatasetCatalog.list()
    )
    dicts = DatasetCatalog.get("synthetic_faces_val")
    assert len(dicts) == 3 and MetadataCatalog.get("synthetic_faces_val").thing_classes == ["face"]


def test_dataset_dicts_convert_back(make_cfg):
    cfg = make_cfg()
    for record in Catalog(cfg.DATASETS)["synthetic_faces_val"].records:
        again = to_record(to_dataset_dict(record))
        assert again.file_name == record.file_name and again.image_id == record.image_id
        assert np.array_equal(again.boxes, record.boxes) and np.array_equal(again.ignore, record.ignore)


def test_mapper_in_detectron2s_own_loader(make_cfg):
    cfg = make_cfg()
    loader = build_detection_train_loader(
        DatasetCatalog.get("synthetic_faces_train"),
        mapper=d2.GroupSamplingMapper(cfg, True),
        total_batch_size=2,
        num_workers=0,
    )
    batch = next(iter(loader))
    assert len(batch) == 2 and batch[0]["image"].shape[0] == 3 and batch[0]["instances"].has("gt_boxes")


def test_unreadable_image_at_evaluation_names_the_file(make_cfg, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    mapper = d2.GroupSamplingMapper(make_cfg(), is_train=False)
    with pytest.raises(RuntimeError, match=r"broken\.jpg"):
        mapper({"file_name": str(tmp_path / "broken.jpg"), "image_id": "broken"})


def test_unreadable_images_in_training_are_skipped_and_reported(make_args, tmp_path, caplog):
    folder = tmp_path / "images/0--Parade"
    folder.mkdir(parents=True)
    lines = []
    for i in range(40):
        path = folder / f"{i}.jpg"
        if i == 7:
            path.write_bytes(b"\xff\xd8\xff broken")
        else:
            Image.fromarray(np.full((64, 64, 3), i, dtype=np.uint8)).save(path)
        lines += [f"0--Parade/{i}.jpg", "1", "10 10 20 20 0 0 0 0 0 0"]
    (tmp_path / "gt.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "two.txt").write_text("0--Parade/7.jpg\n0--Parade/8.jpg\n")
    paths = f"'{tmp_path}/gt.txt', '{tmp_path}/images'"
    declared = f"[['mine', {paths}], ['two', {paths}, '{tmp_path}/two.txt']]"
    args = make_args(
        *("DATASETS.WIDER_FORMAT", declared, "DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "('two',)"),
        *("SOLVER.IMS_PER_BATCH", "40", "SOLVER.MAX_ITER", "1", "SOLVER.STEPS", "()"),
    )
    with caplog.at_level("WARNING"):
        main(args)
    messages = [record.getMessage() for record in caplog.records]
    assert any(message.startswith("skipping an unreadable image: ") and "7.jpg" in message for message in messages)
    assert any("hit one of 1 unreadable images, which were replaced:\n" in message for message in messages)
    before, message = [message for message in messages if message.startswith("two: 1 of 2 images cannot be read")]
    assert before == message and "/7.jpg: " in message  # before the first step, and of the evaluation
    predictions = tmp_path / "out/inference/two/predictions/0--Parade"
    assert [file.name for file in predictions.iterdir()] == ["8.txt"]
    assert (tmp_path / "out/model_final.pth").exists()


@pytest.mark.parametrize(
    "opts, message",
    [
        (["MODEL.RPN.NMS_TRESH", "0.5"], r"MODEL\.RPN\.NMS_TRESH.*Did you mean MODEL\.RPN\.NMS_THRESH"),
        (["INPUT.MIN_SIZE_TRAIN", "(640,)"], r"INPUT\.MIN_SIZE_TRAIN: expected \(800,\), got \(640,\)"),
        (["INPUT.FORMAT", "BGR"], r"INPUT\.FORMAT: expected 'RGB', got 'BGR'"),
        (["SOLVER.BASE_LR", "fast"], r"SOLVER\.BASE_LR"),
        (["SEED"], "pairs KEY VALUE"),
        (["MODEL.RPN.IOU_THRESHOLDS", "[0.5]"], r"MODEL\.RPN\.IOU_THRESHOLDS and .*expected .*got \[0\.5\]"),
    ],
)
def test_config_errors_name_the_key(make_cfg, opts, message):
    with pytest.raises(ConfigError, match=message):
        make_cfg(*opts)


def test_missing_files_stop_the_run_before_it_starts(make_args, monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(MissingDatasetError, match=r"wider_face_val.*(?s:.*)synthetic_faces_val"):
        main(make_args("DATASETS.TEST", "('wider_face_val',)"))
    with pytest.raises(MissingDatasetError, match="wider_face_train"):
        main(make_args("DATASETS.TRAIN", "('wider_face_train',)"))
    main(make_args("DATASETS.TRAIN", "('wider_face_train',)", eval_only=True, allow_partial_weights=True))
    with pytest.raises(ConfigError, match=r"DATASETS\.TEST: .*did you mean 'synthetic_faces_val'"):
        main(make_args("DATASETS.TEST", "('synthetic_faces_vel',)"))
    args = make_args()
    args.config_file = "nowhere.yaml"
    with pytest.raises(ConfigError, match=r"--config-file nowhere\.yaml: no such file"):
        main(args)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda(make_cfg):
    with pytest.raises(ConfigError, match=r"MODEL\.DEVICE is 'cuda'.*MODEL\.DEVICE cpu"):
        make_cfg("MODEL.DEVICE", "cuda")


def test_yaml_tags_are_refused(tmp_path):
    from group_sampling.config import merge_config

    path = tmp_path / "evil.yaml"
    path.write_text(f"MODEL:\n  WEIGHTS: !!python/object/apply:os.mkdir ['{tmp_path}/executed']\n")
    cfg = get_cfg()
    d2.add_group_sampling_config(cfg)
    with pytest.raises(ConfigError, match=r"evil\.yaml.*python/object"):
        merge_config(cfg, str(path), [])
    assert not (tmp_path / "executed").exists()
