"""A checkpoint of either engine is enough to build its detector with either."""

import importlib.util

import pytest
import torch
import yaml
from tv_cases import arguments

from group_sampling.checkpoint import read_description
from group_sampling.config import ConfigError
from group_sampling.engines.tv import train as tv_train
from group_sampling.engines.tv.config import load_config as load_tv_config

NEEDS_DETECTRON2 = pytest.mark.skipif(
    importlib.util.find_spec("detectron2") is None, reason="Detectron2 is not installed"
)
BOTH = ["torchvision", pytest.param("detectron2", marks=NEEDS_DETECTRON2)]


def engine_train(engine: str):
    return importlib.import_module(f"group_sampling.engines.{'d2' if engine == 'detectron2' else 'tv'}.train")


@pytest.mark.parametrize("evaluated_by", BOTH)
@pytest.mark.parametrize("trained_by", BOTH)
def test_evaluation_needs_no_config_file(tmp_path, trained_by, evaluated_by):
    for folder in ("train", "test"):
        (tmp_path / folder).mkdir()
    args = arguments(tmp_path / "train", "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", "()", "DATASETS.TEST", "()")
    engine_train(trained_by).main(args)
    weights = str(tmp_path / "train/model_final.pth")
    assert read_description(weights).class_names == ("face",)
    expected = load_tv_config(args.config_file, args.opts)
    found = load_tv_config("", saved=read_description(weights).config)
    assert found.OUTPUT_DIR != expected.OUTPUT_DIR  # that of whoever evaluates
    for cfg in (expected, found):
        cfg.SEED, cfg.OUTPUT_DIR = 0, ""
    assert found == expected

    evaluate = arguments(tmp_path / "test", "MODEL.WEIGHTS", weights, "DATASETS.TEST", "('synthetic_faces_val',)")
    evaluate.eval_only, with_file = True, evaluate.config_file
    results = []
    for config_file in (with_file, ""):
        evaluate.config_file = config_file
        results.append(engine_train(evaluated_by).main(evaluate))
    assert results[0] == results[1] and results[0]


def test_weights_without_their_config_ask_for_it(tmp_path):
    args = arguments(tmp_path, eval_only=True)
    args.config_file = ""
    with pytest.raises(ConfigError, match=r"expected --config-file FILE, or a checkpoint .* as MODEL\.WEIGHTS"):
        tv_train.main(args)
    torch.save({"model": {"x": torch.zeros(1)}}, tmp_path / "old.pth")
    args.opts += ["MODEL.WEIGHTS", str(tmp_path / "old.pth")]
    with pytest.raises(ConfigError, match=r"old\.pth: the file does not carry the config"):
        tv_train.main(args)


def test_an_unknown_key_of_the_saved_config_is_named():
    saved = yaml.safe_dump({"MODEL": {"RESNETS": {"DEFORM_MODULATED": True}}})
    with pytest.raises(ConfigError, match=r"the config in the checkpoint: .*MODEL\.RESNETS\.DEFORM_MODULATED"):
        load_tv_config("", saved=saved)
