"""The command line: flags and overrides in any order, and errors that name the key."""

import importlib
import importlib.util
import os
import runpy
import subprocess
import sys

import pytest
from tv_cases import CONFIGS

from group_sampling.config import ConfigError

NEEDS_DETECTRON2 = pytest.mark.skipif(
    importlib.util.find_spec("detectron2") is None, reason="Detectron2 is not installed"
)
ENGINES = [
    pytest.param("tv.config", id="torchvision"),
    pytest.param("d2.train", id="detectron2", marks=NEEDS_DETECTRON2),
]


@pytest.fixture
def parse_args(repository):
    return runpy.run_path(str(repository / "train_net.py"))["parse_args"]


def test_flags_may_follow_the_overrides(parse_args):
    first = parse_args(["--config-file", "a.yaml", "--eval-only", "--num-gpus", "2", "SEED", "-1", "OUTPUT_DIR", "out"])
    for argv in (
        ["SEED", "-1", "OUTPUT_DIR", "out", "--eval-only", "--config-file", "a.yaml", "--num-gpus", "2"],
        ["--config-file", "a.yaml", "SEED", "-1", "--eval-only", "OUTPUT_DIR", "out", "--num-gpus=2"],
    ):
        assert parse_args(argv) == first
    assert first.opts == ["SEED", "-1", "OUTPUT_DIR", "out"] and first.eval_only and first.num_gpus == 2


def test_unknown_flags_are_named(parse_args, capsys):
    with pytest.raises(SystemExit):
        parse_args(["SEED", "1", "--evaluate"])
    assert "unrecognized arguments: --evaluate" in capsys.readouterr().err


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "key, value",
    [
        ("MODEL.GROUP_SAMPLING.SAMPLER", "groups"),
        ("MODEL.GROUP_SAMPLING.ROI_SAMPLER", "groups"),
        ("MODEL.BACKBONE.NAME", "build_resnet_backbones"),
        ("MODEL.META_ARCHITECTURE", "RCNN"),
        ("MODEL.PROPOSAL_GENERATOR.NAME", "GroupSampling"),
        ("MODEL.ANCHOR_GENERATOR.NAME", "Grouped"),
        ("MODEL.RPN.HEAD_NAME", "RPNHead"),
        ("MODEL.ROI_HEADS.NAME", "GroupedHeads"),
        ("MODEL.RPN.BBOX_REG_LOSS_TYPE", "iou"),
    ],
)
def test_unknown_names_are_config_errors(engine, key, value):
    load_config = importlib.import_module(f"group_sampling.engines.{engine}").load_config
    with pytest.raises(ConfigError, match=rf"^{key}: expected .*got '{value}'"):
        load_config(str(CONFIGS / "table5/grouped_fast_rcnn.yaml"), ["MODEL.DEVICE", "cpu", key, value])


@pytest.mark.parametrize("engine", ENGINES)
def test_an_override_without_a_value(engine):
    load_config = importlib.import_module(f"group_sampling.engines.{engine}").load_config
    with pytest.raises(ConfigError) as error:
        load_config(str(CONFIGS / "fpn.yaml"), ["MODEL.DEVICE", "cpu", "SEED"])
    assert str(error.value) == "command line: expected pairs KEY VALUE, got ['MODEL.DEVICE', 'cpu', 'SEED']"


@pytest.mark.parametrize("engine", ["torchvision", pytest.param("detectron2", marks=NEEDS_DETECTRON2)])
def test_errors_of_the_user_have_no_traceback(repository, monkeypatch, capsys, engine):
    monkeypatch.setattr(sys, "argv", ["train_net.py", "--engine", engine, "MODEL.DEVICE", "cpu", "MODEL.TYPO", "1"])
    message = "^train_net.py: error: command line: this engine has no key MODEL.TYPO"
    with pytest.raises(SystemExit, match=message):
        runpy.run_path(str(repository / "train_net.py"), run_name="__main__")
    assert f"engine: {engine}" in capsys.readouterr().out


def test_a_broken_detectron2_is_said(repository, tmp_path):
    """One that was built for another torch: auto goes on without it, in one line, and env tells why."""
    package = tmp_path / "detectron2"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "layers.py").write_text('raise ImportError("_C.so: undefined symbol: _ZN2at\\n4_opsE")')
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    script = """
import runpy, sys
from group_sampling.env import collect_env
rows = dict(collect_env())
print(rows["engine auto"])
for engine in ("auto", "detectron2"):
    sys.argv = ["train_net.py", "MODEL.DEVICE", "cpu", "MODEL.TYPO", "1", "--engine", engine]
    try:
        runpy.run_path("train_net.py", run_name="__main__")
    except SystemExit as stopped:
        print(stopped, file=sys.stderr)
"""
    reason = "Detectron2 is installed and cannot be imported (ImportError: _C.so: undefined symbol: _ZN2at 4_opsE)"
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == [f"torchvision: {reason}", "engine: torchvision (--engine auto)"]
    auto, error, error_of_detectron2 = done.stderr.splitlines()
    assert auto == f"--engine auto takes torchvision: {reason}"
    assert error.startswith("train_net.py: error: command line: this engine has no key MODEL.TYPO")
    assert error_of_detectron2.startswith(f"train_net.py: error: --engine detectron2: {reason}; README.md")
