"""The torchvision engine's config: Detectron2's names and defaults, and nothing that is quietly ignored."""

import pickle

import pytest
import torch
from fvcore.common.config import CfgNode
from tv_cases import CONFIGS, run_configs, write_tiny_config

from group_sampling.config import ConfigError, get_value
from group_sampling.engines.tv.config import _ALLOWED, get_cfg, load_config

BASE = str(CONFIGS / "Base-GroupSampling.yaml")
CPU = ["MODEL.DEVICE", "cpu"]


def flatten(cfg, prefix=""):
    for name, value in cfg.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def test_names_and_defaults_are_detectron2s():
    detectron2_config = pytest.importorskip("detectron2.config")
    from group_sampling.config import add_group_sampling_config

    theirs = detectron2_config.get_cfg()
    add_group_sampling_config(theirs)
    theirs = dict(flatten(theirs))
    ours = dict(flatten(get_cfg()))
    assert {key: theirs.get(key, "absent") for key in ours} == ours


@pytest.mark.parametrize("path", run_configs(), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_config_of_the_project_loads(path):
    load_config(str(path), CPU)


def test_a_saved_config_is_the_same_config(tmp_path):
    cfg = load_config(write_tiny_config(tmp_path))
    saved = tmp_path / "config.yaml"
    saved.write_text(cfg.dump())
    assert load_config(str(saved)) == cfg
    assert pickle.loads(pickle.dumps(cfg)) == cfg  # it travels to the processes of a run


def test_unknown_key_in_a_file(tmp_path):
    path = tmp_path / "typo.yaml"
    path.write_text(f"_BASE_: {BASE}\nSOLVER:\n  BASE_LEARNING_RATE: 0.1\n  STEPZ: [1]\n")
    with pytest.raises(ConfigError) as error:
        load_config(str(path), CPU)
    assert str(path) in str(error.value) and "SOLVER.BASE_LEARNING_RATE" in str(error.value)
    assert "--engine detectron2" in str(error.value)


def test_unknown_key_on_the_command_line():
    with pytest.raises(ConfigError, match=r"command line.* MODEL\.RPN\.NMS_TRESH.* MODEL\.RPN\.NMS_THRESH.*detectron2"):
        load_config(BASE, [*CPU, "MODEL.RPN.NMS_TRESH", "0.5"])


def test_key_without_value():
    with pytest.raises(ConfigError, match="pairs KEY VALUE"):
        load_config(BASE, [*CPU, "SEED"])


def test_value_of_the_wrong_type(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(f"_BASE_: {BASE}\nSOLVER: {{MAX_ITER: many}}\n")
    with pytest.raises(ConfigError, match=r"wrong\.yaml.*SOLVER\.MAX_ITER"):
        load_config(str(path), CPU)


def test_python_tag_is_refused_and_not_run(tmp_path):
    path, marker = tmp_path / "evil.yaml", tmp_path / "executed"
    path.write_text(
        f"SEED: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{marker}']]\n"
    )
    with pytest.raises(ConfigError, match=r"evil\.yaml"):
        load_config(str(path), CPU)
    assert not marker.exists()


@pytest.mark.parametrize(
    "key, value",
    [
        ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"),
        ("MODEL.MASK_ON", True),
        ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
        ("MODEL.RESNETS.DEPTH", 152),
        ("MODEL.RESNETS.NORM", "SyncBN"),
        ("MODEL.RESNETS.STRIDE_IN_1X1", True),
        ("MODEL.FPN.FUSE_TYPE", "avg"),
        ("MODEL.PROPOSAL_GENERATOR.NAME", "RPN"),
        ("MODEL.ANCHOR_GENERATOR.NAME", "DefaultAnchorGenerator"),
        ("MODEL.RPN.HEAD_NAME", "StandardRPNHead"),
        ("MODEL.RPN.BBOX_REG_WEIGHTS", (10.0, 10.0, 5.0, 5.0)),
        ("MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
        ("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"),
        ("VIS_PERIOD", 100),
    ],
)
def test_unsupported_value(key, value):
    with pytest.raises(ConfigError) as error:
        load_config(BASE, [*CPU, key, value])
    assert f"{key}: expected" in str(error.value) and f"got {value!r}" in str(error.value)
    assert all(repr(allowed) in str(error.value) for allowed in _ALLOWED[key])


def test_allowed_values_are_of_known_keys():
    for key in _ALLOWED:
        get_value(get_cfg(), key)


def test_cuda_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"MODEL\.DEVICE is 'cuda'.*MODEL\.DEVICE cpu"):
        load_config(BASE)


@pytest.mark.parametrize(
    "opts, message",
    [
        (["MODEL.FPN.IN_FEATURES", "['res2', 'res4']"], r"MODEL\.FPN\.IN_FEATURES.*consecutive"),
        (["MODEL.FPN.IN_FEATURES", "['res3', 'res2']"], r"MODEL\.FPN\.IN_FEATURES.*consecutive"),
        (["MODEL.RESNETS.OUT_FEATURES", "['res2']"], r"MODEL\.FPN\.IN_FEATURES.*OUT_FEATURES \['res2'\], got"),
        (["MODEL.RPN.IN_FEATURES", "['p6']"], r"MODEL\.RPN\.IN_FEATURES.*'p2', 'p3', 'p4', 'p5'"),
        (["MODEL.RPN.IN_FEATURES", "[]"], r"MODEL\.RPN\.IN_FEATURES"),
        (
            ["MODEL.BACKBONE.NAME", "build_resnet_backbone"],
            r"IN_FEATURES: expected .*'res2', 'res3'.* got \['p2'\]",
        ),
        (["MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.NUM_GROUPS", "2"], r"MODEL\.RESNETS\.NUM_GROUPS"),
        (["MODEL.RESNETS.RES2_OUT_CHANNELS", "96"], r"MODEL\.RESNETS\.RES2_OUT_CHANNELS"),
    ],
)
def test_features_and_widths_that_do_not_fit(opts, message):
    with pytest.raises(ConfigError, match=message):
        load_config(BASE, [*CPU, *opts])


def test_defaults_are_not_shared():
    get_cfg().MODEL.ANCHOR_GENERATOR.SIZES[0].append(1)
    assert get_cfg().MODEL.ANCHOR_GENERATOR.SIZES == [[32, 64, 128, 256, 512]]
    assert isinstance(get_cfg(), CfgNode)
