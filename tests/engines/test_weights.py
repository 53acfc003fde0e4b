"""Weights of the other engine, or of another detector: converted or refused, whoever loads them."""

import importlib
import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tv_cases import CONFIGS, SMALL_OPTS

from group_sampling.checkpoint import convert_names
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
    return model


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of the torchvision engine, counts of training passes included."""
    path = tmp_path / "tv.pth"
    torch.save({"model": make_model().state_dict(), "engine": "torchvision"}, path)
    return path


@NEEDS_DETECTRON2
@pytest.mark.parametrize("naming", ["torchvision", "detectron2"])
def test_default_predictor_detects_as_the_other_engine(tmp_path, checkpoint, naming):
    """Detectron2's predictor and checkpointer, which know nothing of this project."""
    from detectron2.engine import DefaultPredictor
    from tv_cases import d2_setup

    state = convert_names(torch.load(checkpoint, weights_only=True)["model"], naming)
    torch.save({"model": state}, tmp_path / f"{naming}.pth")
    opts = ["OUTPUT_DIR", tmp_path / "out", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.001, "INPUT.MIN_SIZE_TEST", 96]
    cfg = d2_setup(make_args(*opts, "MODEL.WEIGHTS", tmp_path / f"{naming}.pth"))
    image = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    found = DefaultPredictor(cfg)(image[:, :, ::-1])["instances"]
    model = make_model("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.001)
    with torch.no_grad():
        (expected,) = model([torch.as_tensor(image).permute(2, 0, 1).float()])
    assert len(found) == len(expected["boxes"]) > 5
    assert torch.allclose(found.pred_boxes.tensor, expected["boxes"], atol=1e-3, rtol=1e-4)
    assert torch.allclose(found.scores, expected["scores"], atol=1e-4)


@NEEDS_DETECTRON2
@pytest.mark.parametrize("naming", ["torchvision", "detectron2"])
@pytest.mark.parametrize("opts", [WIDER, DEEPER, SINGLE_STAGE], ids=["wider", "deeper", "one stage less"])
def test_default_predictor_refuses_another_detector(tmp_path, checkpoint, naming, opts):
    from detectron2.engine import DefaultPredictor
    from tv_cases import d2_setup

    state = convert_names(torch.load(checkpoint, weights_only=True)["model"], naming)
    torch.save({"model": state}, tmp_path / f"{naming}.pth")
    cfg = d2_setup(make_args(*opts, "OUTPUT_DIR", tmp_path, "MODEL.WEIGHTS", tmp_path / f"{naming}.pth"))
    with pytest.raises(ConfigError, match="expected the weights of this model"):
        DefaultPredictor(cfg)


@NEEDS_DETECTRON2
def test_stock_architecture_refuses_the_other_engines_weights(tmp_path, checkpoint):
    from detectron2.engine import DefaultPredictor
    from tv_cases import d2_setup

    cfg = d2_setup(make_args("OUTPUT_DIR", tmp_path, "MODEL.META_ARCHITECTURE", "GeneralizedRCNN")).clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(checkpoint)
    with pytest.raises(ConfigError, match=r"proposal_generator\.rpn_head"):
        DefaultPredictor(cfg)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("opts", [WIDER, DEEPER, SINGLE_STAGE], ids=["wider", "deeper", "one stage less"])
def test_evaluation_refuses_another_detector(tmp_path, checkpoint, engine, opts):
    main = importlib.import_module(f"group_sampling.engines.{engine}.train").main
    opts = [*opts, "OUTPUT_DIR", tmp_path / "out", "MODEL.WEIGHTS", checkpoint]
    with pytest.raises(ConfigError, match=r"tv\.pth: expected the weights of this model.*--allow-partial-weights"):
        main(make_args(*opts))
    assert not list(tmp_path.rglob("results.json"))


@pytest.mark.parametrize("engine", ENGINES)
def test_evaluation_of_partial_weights_on_request(tmp_path, checkpoint, engine):
    main = importlib.import_module(f"group_sampling.engines.{engine}.train").main
    opts = ["OUTPUT_DIR", tmp_path / "out", "MODEL.WEIGHTS", checkpoint]
    main(make_args(*SINGLE_STAGE, *opts, allow_partial_weights=True))
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
