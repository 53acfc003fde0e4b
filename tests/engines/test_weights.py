"""Weights of the other engine are converted, those of another detector refused, also by Detectron2's loaders."""

import importlib
import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tv_cases import CONFIGS, SMALL_OPTS

from group_sampling.checkpoint import convert_names, main
from group_sampling.config import ConfigError
from group_sampling.engines.tv.config import load_config
from group_sampling.engines.tv.model import build_model
from group_sampling.engines.tv.train import GroupSamplingCheckpointer

NEEDS_DETECTRON2 = pytest.mark.skipif(
    importlib.util.find_spec("detectron2") is None, reason="Detectron2 is not installed"
)
ENGINES = [pytest.param("tv", id="torchvision"), pytest.param("d2", id="detectron2", marks=NEEDS_DETECTRON2)]
NAME = "table5/grouped_fast_rcnn"
WIDER = ["MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]
DEEPER = ["MODEL.RESNETS.DEPTH", "34"]
SINGLE_STAGE = ["MODEL.ROI_HEADS.NAME", "ProposalDetections"]


def make_args(*opts, name=NAME, **flags):
    defaults = {"resume": False, "eval_only": True, "num_gpus": 1, "num_machines": 1, "machine_rank": 0}
    opts = [*SMALL_OPTS, *map(str, opts)]
    return SimpleNamespace(config_file=str(CONFIGS / f"{name}.yaml"), opts=opts, dist_url="auto", **defaults, **flags)


def make_model(*opts):
    """A torchvision model whose detections are not all alike."""
    torch.manual_seed(0)
    model = build_model(load_config(make_args().config_file, [*SMALL_OPTS, *map(str, opts)])).eval()
    for name, parameter in model.named_parameters():
        if "rpn.head" in name or "box_predictor" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    if hasattr(model.roi_heads, "box_predictor"):  # the background's box, which no loss reads and Detectron2 lacks
        for parameter in model.roi_heads.box_predictor.bbox_pred.parameters():
            torch.nn.init.zeros_(parameter[:4])
    return model


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of the torchvision engine, counts of training passes included."""
    path = tmp_path / "tv.pth"
    torch.save({"model": make_model().state_dict(), "engine": "torchvision"}, path)
    return path


def compare_predictor(folder, weights, model, opts):
    """Detectron2's predictor and checkpointer, which know nothing of this project, against the torchvision model."""
    from detectron2.engine import DefaultPredictor
    from tv_cases import d2_setup

    cfg = d2_setup(make_args(*opts, "INPUT.MIN_SIZE_TEST", 96, "OUTPUT_DIR", folder / "out", "MODEL.WEIGHTS", weights))
    image = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    found = DefaultPredictor(cfg)(image[:, :, ::-1])["instances"]
    with torch.no_grad():
        (expected,) = model([torch.as_tensor(image).permute(2, 0, 1).float()])
    assert len(found) == len(expected["boxes"]) > 5
    assert torch.allclose(found.pred_boxes.tensor, expected["boxes"], atol=1e-3, rtol=1e-4)
    assert torch.allclose(found.scores, expected["scores"], atol=1e-4)
    assert torch.equal(found.anchor_scales, expected["anchor_scales"])


SENSITIVE = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.001]


@NEEDS_DETECTRON2
def test_default_predictor_converts_a_single_stage(tmp_path):
    opts = [*SINGLE_STAGE, *SENSITIVE]
    model = make_model(*opts)
    torch.save({"model": model.state_dict()}, tmp_path / "tv.pth")
    compare_predictor(tmp_path, tmp_path / "tv.pth", model, opts)


@NEEDS_DETECTRON2
def test_default_predictor_on_a_converted_file(tmp_path, checkpoint):
    """Of two stages the file has to be converted: loaded as it is, the classes would be in another order."""
    main(["--engine", "detectron2", str(checkpoint), str(tmp_path / "d2.pth")])
    compare_predictor(tmp_path, tmp_path / "d2.pth", make_model(*SENSITIVE), SENSITIVE)
    main(["--engine", "torchvision", str(tmp_path / "d2.pth"), str(tmp_path / "back.pth")])
    back, expected = (torch.load(path, weights_only=True)["model"] for path in (tmp_path / "back.pth", checkpoint))
    assert all(torch.equal(value, expected[name]) for name, value in back.items())
    assert [name for name in expected.keys() - back.keys() if "_extra_state" not in name] == []

    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model as build_d2
    from tv_cases import d2_setup

    model = build_d2(d2_setup(make_args("OUTPUT_DIR", tmp_path)))
    for is_training in (True, False):
        with pytest.raises(ConfigError, match=r"python -m group_sampling\.checkpoint"):
            DetectionCheckpointer(model.train(is_training)).load(str(checkpoint))


@NEEDS_DETECTRON2
@pytest.mark.parametrize("naming", ["torchvision", "detectron2"])
@pytest.mark.parametrize("opts", [WIDER, DEEPER, SINGLE_STAGE], ids=["wider", "deeper", "one stage less"])
def test_default_predictor_refuses_another_detector(tmp_path, checkpoint, naming, opts):
    from detectron2.engine import DefaultPredictor
    from tv_cases import d2_setup

    state = convert_names(torch.load(checkpoint, weights_only=True)["model"], naming)
    torch.save({"model": state}, tmp_path / f"{naming}.pth")
    cfg = d2_setup(make_args(*opts, "OUTPUT_DIR", tmp_path, "MODEL.WEIGHTS", tmp_path / f"{naming}.pth"))
    with pytest.raises(ConfigError, match=r"expected the weights of this model|python -m group_sampling\.checkpoint"):
        DefaultPredictor(cfg)


@NEEDS_DETECTRON2
@pytest.mark.parametrize(
    "part, opts",
    [
        ("proposal_generator.rpn_head", []),
        ("roi_heads.box_head", ["MODEL.PROPOSAL_GENERATOR.NAME", "RPN", "MODEL.RPN.BBOX_REG_LOSS_TYPE", "smooth_l1"]),
    ],
)
def test_stock_architecture_refuses_the_other_engines_weights(tmp_path, checkpoint, part, opts):
    from detectron2.engine import DefaultPredictor
    from tv_cases import d2_setup

    stock = ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "TEST.SUB_DETECTORS", "False"]
    cfg = d2_setup(make_args("OUTPUT_DIR", tmp_path, *stock, *opts)).clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(checkpoint)
    with pytest.raises(ConfigError, match=rf"missing \({part}"):
        DefaultPredictor(cfg)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("opts", [WIDER, DEEPER, SINGLE_STAGE], ids=["wider", "deeper", "one stage less"])
def test_evaluation_refuses_another_detector(tmp_path, checkpoint, engine, opts):
    run = importlib.import_module(f"group_sampling.engines.{engine}.train").main
    opts = [*opts, "OUTPUT_DIR", tmp_path / "out", "MODEL.WEIGHTS", checkpoint]
    with pytest.raises(ConfigError, match=r"tv\.pth: expected the weights of this model.*--allow-partial-weights"):
        run(make_args(*opts))
    assert not list(tmp_path.rglob("results.json"))


@pytest.mark.parametrize("engine", ENGINES)
def test_evaluation_of_partial_weights_on_request(tmp_path, checkpoint, engine):
    run = importlib.import_module(f"group_sampling.engines.{engine}.train").main
    opts = ["OUTPUT_DIR", tmp_path / "out", "MODEL.WEIGHTS", checkpoint]
    run(make_args(*SINGLE_STAGE, *opts, allow_partial_weights=True))
    assert list(tmp_path.rglob("results.json"))


def test_training_starts_from_a_backbone(tmp_path, checkpoint):
    """What a model in training mode lacks, it learns."""
    state = torch.load(checkpoint, weights_only=True)["model"]
    torch.save({name: value for name, value in state.items() if "backbone" in name}, tmp_path / "backbone.pth")
    model = make_model()
    torch.nn.init.zeros_(model.backbone.body.conv1.weight)
    with pytest.raises(ConfigError, match=r"missing \(roi_heads\."):
        GroupSamplingCheckpointer(model).load(str(tmp_path / "backbone.pth"))
    assert (model.backbone.body.conv1.weight == 0).all()
    GroupSamplingCheckpointer(model.train()).load(str(tmp_path / "backbone.pth"))
    assert torch.equal(model.backbone.body.conv1.weight, state["backbone.body.conv1.weight"])


def test_counts_travel_with_a_checkpoint(tmp_path):
    """To a resumed run of this engine; the other engine counts itself."""
    model = make_model()
    model.set_iteration(7)
    GroupSamplingCheckpointer(model, str(tmp_path)).save("model")
    other = make_model()
    GroupSamplingCheckpointer(other).load(str(tmp_path / "model.pth"))
    assert other.rpn.iteration == other.roi_heads.iteration == 7
    names = convert_names(model.state_dict(), "detectron2")
    assert names and not [name for name in names if "_extra_state" in name]
