"""The image pyramid around both engines' detectors, through the configuration."""

import importlib.util
import runpy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tv_cases import SMALL_OPTS, arguments, d2_setup, write_tiny_config

from group_sampling.checkpoint import convert_names
from group_sampling.config import ConfigError
from group_sampling.engines.build import load_records
from group_sampling.engines.tv import train as tv_train
from group_sampling.engines.tv.config import load_config
from group_sampling.engines.tv.model import build_model
from group_sampling.engines.tv.tta import GroupSamplingTTA

CPU = torch.device("cpu")
PYRAMID = {"SCALES": "(0.5, 1.0, 1.6)", "FLIP": True, "MAX_SIDE": 150, "TILE_OVERLAP": 64, "VOTE_THRESH": 0.6}
NEEDS_DETECTRON2 = pytest.mark.skipif(
    importlib.util.find_spec("detectron2") is None, reason="Detectron2 is not installed"
)


def options(**values) -> list:
    return [item for key, value in values.items() for item in (f"TEST.PYRAMID.{key}", value)]


def make_cfg(folder, *opts):
    return load_config(write_tiny_config(folder), ["OUTPUT_DIR", str(folder), *map(str, opts)])


def make_model(cfg) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    for parameter in model.rpn.head.parameters():  # a fresh head scores all boxes alike
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def detect(cfg, model) -> dict:
    """What an evaluation is given to score: image_id -> boxes, scores, anchor scales."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "group_sampling.evaluation.run.evaluate_detections",
            lambda cfg, source, detections: found.update(detections) or {},
        )
        tv_train.evaluate(cfg, model, CPU)
    return {image_id: arrays_of(image) for image_id, image in found.items()}


def arrays_of(found) -> tuple:
    """Boxes, scores and anchor scales of the detections, and of those of each sub-detector in a row."""
    lists = [found, *found.sub_detectors.values()]
    assert list(found.sub_detectors) == [16, 32, 64, 128]
    for scale, alone in found.sub_detectors.items():
        assert (alone.anchor_scales == scale).all() and len(alone.scores)
    joint, rest = lists[0], lists[1:]
    parts = [np.concatenate([getattr(alone, name) for alone in rest]) for name in ("boxes", "scores", "anchor_scales")]
    return joint.boxes, joint.scores, joint.anchor_scales, *parts


@pytest.mark.parametrize("resize", [(), ("INPUT.MIN_SIZE_TEST", 90, "INPUT.MAX_SIZE_TEST", 120)], ids=["none", "to 90"])
def test_one_scale_is_the_single_scale_test(tmp_path, resize):
    single, pyramid = make_cfg(tmp_path, *resize), make_cfg(tmp_path, *resize, *options(SCALES="(1.0,)"))
    model = make_model(single)
    expected, found = detect(single, model), detect(pyramid, model)
    assert list(found) == list(expected) and len(found) == 3
    for image_id, arrays in expected.items():
        assert len(arrays[0]) > 20
        for ours, theirs in zip(found[image_id], arrays):
            assert np.array_equal(ours, theirs)


def test_levels_and_tiles_are_those_of_the_config(tmp_path):
    cfg = make_cfg(tmp_path, *options(**PYRAMID))
    model = make_model(cfg)
    found = detect(cfg, model)
    again = detect(cfg, model)
    for image_id, (boxes, scores, anchor_scales, *_) in found.items():
        assert set(anchor_scales) <= {16, 32, 64, 128} and (np.diff(scores) <= 0).all()
        assert (boxes >= 0).all() and (boxes <= 128).all()
        assert all(np.array_equal(ours, theirs) for ours, theirs in zip(again[image_id], found[image_id]))
    sides = []
    original = model.forward
    model.forward = lambda images: sides.append(images[0].shape[-2:]) or original(images)
    detect(cfg, model)
    # 64, 128, and 205 pixels in three tiles each way; all of them twice, in three images.
    assert len(sides) == 3 * 2 * (1 + 1 + 9) and max(max(side) for side in sides) <= 150


def test_evaluation_runs_on_the_pyramid(tmp_path):
    tv_train.main(arguments(tmp_path, "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", "()"))
    weights = ("MODEL.WEIGHTS", tmp_path / "model_final.pth")
    metrics = tv_train.main(arguments(tmp_path, *weights, *options(**PYRAMID), eval_only=True))
    assert {"wider_face/AP_all", "wider_face/AP@16", "wider_face/AP@128"} <= set(metrics)


def test_wrapper_keeps_the_interface_of_the_model(tmp_path):
    cfg = make_cfg(tmp_path, *options(SCALES="(1.0, 0.5)"))
    model = make_model(cfg)
    images = [torch.randint(0, 256, (3, 60, 80)), torch.randint(0, 256, (3, 50, 40)).float()]
    wrapped = GroupSamplingTTA(cfg, model)
    assert not wrapped.training and not model.training
    outputs = wrapped(images)
    for image, output in zip(images, outputs):
        assert output.keys() == model([image.float()])[0].keys()
        by_scale = output.pop("sub_detectors")
        assert list(by_scale) == [16, 32, 64, 128]
        for found in (output, *by_scale.values()):
            assert len({len(value) for value in found.values()}) == 1 and not found["boxes"].requires_grad
        assert output["labels"].dtype == torch.int64


@pytest.mark.parametrize(
    "opts, message",
    [
        (options(SCALES="(1.0, -2.0)"), "TEST.PYRAMID.SCALES: expected numbers from 0.01 to 100"),
        (options(SCALES="(1.0,)", MAX_SIDE=200), "TEST.PYRAMID: max_side: .* 288"),
        (options(SCALES="(1.0,)", VOTE_THRESH=2.0), "TEST.PYRAMID: vote_thresh"),
        (options(SCALES="2.0"), "TEST.PYRAMID.SCALES"),
        (["TEST.PYRAMID.SCALE", "(1.0,)"], "Did you mean TEST.PYRAMID.SCALES"),
    ],
)
def test_nonsense_is_refused(tmp_path, opts, message):
    with pytest.raises(ConfigError, match=message):
        make_cfg(tmp_path, *opts)


@pytest.fixture
def detectron2_pair(tmp_path):
    """Detectron2's config and model, and the torchvision ones with the same weights; no pyramid yet."""
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.modeling import build_model as build_d2

    def configs(*opts):
        return d2_setup(arguments(tmp_path, *opts, eval_only=True)), make_cfg(tmp_path, *opts)

    d2_cfg, tv_cfg = configs()
    tv_model, d2_model = make_model(tv_cfg), build_d2(d2_cfg).eval()
    loaded = d2_model.load_state_dict(convert_names(tv_model.state_dict(), "detectron2"), strict=False)
    assert not loaded.unexpected_keys and all("pixel" in name for name in loaded.missing_keys), loaded
    return SimpleNamespace(configs=configs, d2_model=d2_model, tv_model=tv_model)


def d2_detect(cfg, model) -> dict:
    """What Detectron2's own evaluation loop hands to an evaluator."""
    from detectron2.evaluation import DatasetEvaluator

    from group_sampling.engines.d2 import Trainer
    from group_sampling.engines.d2.rcnn import to_detections

    class Collect(DatasetEvaluator):
        def __init__(self):
            self.found = {}

        def process(self, inputs, outputs):
            for image, output in zip(inputs, outputs):
                for instances in (output["instances"], *output["sub_detectors"].values()):
                    assert instances.image_size == (image["height"], image["width"]) and instances.has("pred_classes")
                self.found[image["image_id"]] = arrays_of(to_detections(output).numpy())

    collect = Collect()
    Trainer.test(cfg, model, [collect])
    assert not model.training
    return collect.found


@NEEDS_DETECTRON2
@pytest.mark.parametrize("resize", [(), ("INPUT.MIN_SIZE_TEST", 90, "INPUT.MAX_SIZE_TEST", 120)], ids=["none", "to 90"])
def test_engines_merge_identically(detectron2_pair, resize):
    d2_cfg, tv_cfg = detectron2_pair.configs(*resize, *options(**PYRAMID))
    ours, theirs = d2_detect(d2_cfg, detectron2_pair.d2_model), detect(tv_cfg, detectron2_pair.tv_model)
    assert list(ours) == list(theirs) and len(ours) == 3
    for image_id in ours:
        for start in (0, 3):  # the joint list, those of the sub-detectors
            (boxes, scores, scales), tv = ours[image_id][start : start + 3], theirs[image_id][start : start + 3]
            assert len(boxes) == len(tv[0]) > 50
            assert np.allclose(boxes, tv[0], atol=1e-4, rtol=1e-4) and np.allclose(scores, tv[1], atol=1e-4)
            assert np.array_equal(scales, tv[2])


@NEEDS_DETECTRON2
@pytest.mark.parametrize("resize", [(), ("INPUT.MIN_SIZE_TEST", 90, "INPUT.MAX_SIZE_TEST", 120)], ids=["none", "to 90"])
def test_detectron2_one_scale_is_the_single_scale_test(detectron2_pair, resize):
    single, _ = detectron2_pair.configs(*resize)
    pyramid, _ = detectron2_pair.configs(*resize, *options(SCALES="(1.0,)"))
    expected, found = d2_detect(single, detectron2_pair.d2_model), d2_detect(pyramid, detectron2_pair.d2_model)
    for image_id, arrays in expected.items():
        assert len(arrays[0]) > 20
        for ours, theirs in zip(found[image_id], arrays):
            assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("engine", ["torchvision", pytest.param("detectron2", marks=NEEDS_DETECTRON2)])
def test_two_stage_detectors(repository, tmp_path, engine):
    """Their classes and anchor scales survive the pyramid; scale 1 alone changes nothing."""
    config = str(repository / "projects/GroupSampling/configs/table5/grouped_fast_rcnn.yaml")
    found = {}
    for scales in ("()", "(1.0,)", "(1.0, 0.5)"):
        opts = [*SMALL_OPTS, "OUTPUT_DIR", str(tmp_path), *options(SCALES=scales)]
        torch.manual_seed(0)
        if engine == "torchvision":
            cfg = load_config(config, opts)
            found[scales] = detect(cfg, build_model(cfg))
        else:
            from detectron2.modeling import build_model as build_d2

            cfg = d2_setup(SimpleNamespace(config_file=config, opts=opts, resume=False, eval_only=True))
            torch.manual_seed(0)
            found[scales] = d2_detect(cfg, build_d2(cfg).eval())
    for image_id, arrays in found["()"].items():
        assert len(arrays[0]) > 0 and set(arrays[2]) <= {16, 32, 64, 128}
        assert all(np.array_equal(ours, theirs) for ours, theirs in zip(found["(1.0,)"][image_id], arrays))
        assert set(found["(1.0, 0.5)"][image_id][2]) <= {16, 32, 64, 128}


@NEEDS_DETECTRON2
def test_default_predictor_on_the_pyramid(detectron2_pair):
    """The predictor resizes first: scale 1 of the pyramid is what the predictor gives without it."""
    from detectron2.engine import DefaultPredictor

    from group_sampling.engines.d2 import GroupSamplingTTA

    cfg, _ = detectron2_pair.configs("INPUT.MIN_SIZE_TEST", 90, "INPUT.MAX_SIZE_TEST", 120, *options(SCALES="(1.0,)"))
    predictor = DefaultPredictor(cfg)
    predictor.model = detectron2_pair.d2_model
    image = np.random.default_rng(0).integers(0, 256, (70, 130, 3), dtype=np.uint8)
    plain = predictor(image)["instances"]
    predictor.model = GroupSamplingTTA(cfg, predictor.model)
    found = predictor(image)["instances"]
    assert found.image_size == plain.image_size == (70, 130) and len(found) == len(plain) > 20
    assert torch.equal(found.pred_boxes.tensor, plain.pred_boxes.tensor)
    assert torch.equal(found.anchor_scales, plain.anchor_scales) and set(found.get_fields()) == set(plain.get_fields())


@NEEDS_DETECTRON2
def test_detectors_without_anchor_scales(detectron2_pair):
    """Detectron2's own detectors get the pyramid, too; there is no anchor scale to report."""
    from detectron2.structures import Boxes, Instances

    from group_sampling.engines.d2 import GroupSamplingTTA

    class Stock(torch.nn.Module):
        def forward(self, inputs):
            height, width = inputs[0]["image"].shape[1:]
            boxes = Boxes(torch.tensor([[0.0, 0.0, width / 2, height / 2]]))
            found = Instances((height, width), pred_boxes=boxes, scores=torch.tensor([0.5]))
            found.pred_classes = torch.tensor([3])
            return [{"instances": found}]

    cfg, _ = detectron2_pair.configs(*options(SCALES="(1.0, 2.0)"))
    image = {"image": torch.zeros(3, 60, 80, dtype=torch.uint8)}
    found = GroupSamplingTTA(cfg, Stock().eval())([image])[0]["instances"]
    assert found.pred_boxes.tensor.tolist() == [[0, 0, 40, 30]] and found.pred_classes.tolist() == [3]
    assert not found.has("anchor_scales")


@NEEDS_DETECTRON2
def test_detectron2s_own_test_time_augmentation_is_refused(detectron2_pair):
    """It would be ignored otherwise."""
    with pytest.raises(ConfigError, match=r"TEST\.AUG\.ENABLED: expected False, got True"):
        detectron2_pair.configs("TEST.AUG.ENABLED", True)


@pytest.mark.parametrize("engine", ["torchvision", pytest.param("detectron2", marks=NEEDS_DETECTRON2)])
def test_show_detections(repository, tmp_path, capsys, engine):
    """On an image of a data set with its faces, and on a file; the weights are the torchvision engine's."""
    main = runpy.run_path(str(repository / "projects/GroupSampling/tools/show_detections.py"))["main"]
    cfg = make_cfg(tmp_path)
    torch.save({"model": make_model(cfg).state_dict()}, tmp_path / "model.pth")
    common = [
        "--config-file",
        write_tiny_config(tmp_path),
        "--weights",
        str(tmp_path / "model.pth"),
        "--engine",
        engine,
    ]
    image_id = load_records(cfg, cfg.DATASETS.TEST)[1].image_id
    output = tmp_path / "out/found.png"
    main([*common, "--image", image_id, "--scales", "0.5", "1", "--flip", "--output", str(output)])
    with Image.open(output) as picture:
        assert picture.size[0] > 900 and len(picture.getcolors(maxcolors=2**24)) > 100
    printed = capsys.readouterr().out
    assert "single scale: " in printed and "scales 0.5, 1, mirrored as well: " in printed and "faces found" in printed

    Image.new("RGB", (90, 60), (200, 100, 50)).save(tmp_path / "photo.png")
    main([*common, "--image", str(tmp_path / "photo.png"), "--output", str(output)])
    with Image.open(output) as picture:
        assert picture.size[0] <= 600  # one panel of five inches at 120 dots an inch
    with pytest.raises(SystemExit, match="--image nowhere: neither a file nor the id"):
        main([*common, "--image", "nowhere", "--output", str(output)])
