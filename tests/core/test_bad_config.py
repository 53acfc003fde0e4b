"""Configurations that cannot be meant: YAML, _BASE_, values, OUTPUT_DIR."""

import os
import re

import numpy as np
import pytest

from group_sampling.config import ConfigError
from group_sampling.engines.build import resolve_seed
from group_sampling.engines.output import own_output
from group_sampling.engines.tv.config import get_cfg, load_config

BASE = os.path.join(os.path.dirname(__file__), "../../projects/GroupSampling/configs/fpn_finest_sampling.yaml")
CPU = ["MODEL.DEVICE", "cpu"]


def write(folder, **files):
    """Write YAML files; returns the path of the first."""
    paths = [folder / f"{name}.yaml" for name in files]
    for path, content in zip(paths, files.values()):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(paths[0])


# -- _BASE_ -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files, message",
    [
        ({"a": "_BASE_: a.yaml"}, r"/a\.yaml -> \S+/a\.yaml: expected a _BASE_ that ends, got a circle"),
        (
            {"a": "_BASE_: b.yaml", "b": "_BASE_: c.yaml", "c": "_BASE_: ./b.yaml"},
            r"a\.yaml -> \S+b\.yaml -> \S+c\.yaml -> \S+b\.yaml: expected a _BASE_ that ends, got a circle",
        ),
        ({"a": "_BASE_: [b.yaml, a.yaml]", "b": "SEED: 1"}, r"a\.yaml -> \S+a\.yaml: .*got a circle"),
        ({"a": "_BASE_: b.yaml", "b": "_BASE_: c.yaml"}, r"a\.yaml -> \S+b\.yaml -> \S+c\.yaml: No such file"),
        ({"a": "_BASE_: ."}, r"a\.yaml -> \S+: Is a directory"),
        ({"a": "_BASE_: [1, 2]"}, r"a\.yaml: _BASE_: expected the path of a config, or a list of them, got \[1, 2\]"),
        ({"a": "_BASE_: {b: c}"}, r"a\.yaml: _BASE_: expected the path of a config"),
        ({"a": "_BASE_: ''"}, r"a\.yaml: _BASE_: expected the path of a config"),
        ({"a": "_BASE_: null"}, r"a\.yaml: _BASE_: expected the path of a config"),
        (
            {"a": "_BASE_: b.yaml", "b": "just text"},
            r"a\.yaml -> \S+b\.yaml: expected keys and values, got 'just text'",
        ),
        ({"a": "_BASE_: b.yaml", "b": "a: ["}, r"a\.yaml -> \S+b\.yaml: not plain YAML: while parsing"),
        ({"a": "_BASE_: b.yaml", "b": b"\xff\xfe\x00"}, r"a\.yaml -> \S+b\.yaml: not plain YAML: "),
        ({"a": "_BASE_: b.yaml", "b": "[" * 5000}, r"a\.yaml -> \S+b\.yaml: not plain YAML: "),
        ({"a": "_BASE_: b.yaml\nSEED: {x: 1}", "b": "SEED: 2"}, r"a\.yaml: .*SEED"),
        ({"a": ""}, r"a\.yaml: expected keys and values, got None"),
        ({"a": "MODEL: {1: 2}"}, r"a\.yaml: expected names as keys, got 1"),
        ({"a": "a: &a {b: *a}"}, r"a\.yaml: expected values that end, got one that contains itself"),
        ({"a": "MODEL: 3"}, r"a\.yaml: .*MODEL"),
        ({"a": "SEED: {b: 3}"}, r"a\.yaml: .*SEED"),
        ({"a": "SEED: !!python/name:os.system"}, r"a\.yaml: not plain YAML: "),
        ({"a": "MODEL: {RPN: null}"}, r"a\.yaml: .*RPN"),
    ],
)
def test_bases_and_files_are_named_in_one_line(tmp_path, files, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(write(tmp_path, **files), CPU)
    assert "\n" not in str(error.value)


def test_lists_of_bases_are_fvcores(tmp_path):
    config = write(tmp_path, a="_BASE_: [b.yaml, c.yaml]", b=f"_BASE_: {BASE}\nSEED: 1", c="SEED: 2")
    assert load_config(config, CPU).SEED == 2


def test_a_base_may_be_reached_twice(tmp_path):
    """That is no circle."""
    config = write(tmp_path, a="_BASE_: [b.yaml, c.yaml]", b="_BASE_: d.yaml", c="_BASE_: d.yaml", d=f"_BASE_: {BASE}")
    assert load_config(config, CPU)


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("SOLVER.MAX_ITER", "0", "a number at least 1, got 0"),
        ("SOLVER.MAX_ITER", "-5", "a number at least 1, got -5"),
        ("SOLVER.CHECKPOINT_PERIOD", "0", "a number at least 1, got 0"),
        ("SOLVER.IMS_PER_BATCH", "0", "a number at least 1, got 0"),
        ("SOLVER.STEPS", "(15, 5)", r"ascending iterations, each once, got \(15, 5\)"),
        ("SOLVER.STEPS", "(5, 5)", r"ascending iterations, each once, got \(5, 5\)"),
        ("SOLVER.STEPS", "(0, 5)", r"numbers at least 1, got \(0, 5\)"),
        ("SOLVER.STEPS", "('a',)", r"numbers, got \('a',\)"),
        ("SOLVER.BASE_LR", "-0.1", "a number from 0 to 1000000, got -0.1"),
        ("SOLVER.BASE_LR", "1e999", "a number from 0 to 1000000, got inf"),
        ("SOLVER.MOMENTUM", "1.5", "a number from 0 to 1, got 1.5"),
        ("SOLVER.WARMUP_ITERS", "-1", "a number at least 0, got -1"),
        ("SEED", "99999999999999999999", "a number from -1 to 2147483647, got 99999999999999999999"),
        ("SEED", "-2", "a number from -1 to 2147483647, got -2"),
        ("TEST.DETECTIONS_PER_IMAGE", "-1", "a number at least 1, got -1"),
        ("TEST.EVAL_PERIOD", "-1", "a number at least 0, got -1"),
        ("INPUT.SCALE_JITTER", "(1e9,)", r"numbers from 0.01 to 100, got \(1000000000.0,\)"),
        ("INPUT.SCALE_JITTER", "(0.0, 1.0)", "numbers from 0.01 to 100"),
        ("INPUT.SCALE_JITTER", "()", "at least one factor"),
        ("INPUT.CROP.SIZE", "[0, 5]", r"height and width in pixels, got \[0, 5\]"),
        ("INPUT.CROP.SIZE", "[5]", r"height and width in pixels, got \[5\]"),
        ("DATALOADER.NUM_WORKERS", "-1", "a number from 0 to 256, got -1"),
        ("DATALOADER.MAX_BAD_SHARE", "2.0", "a number from 0 to 1, got 2.0"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[[0, 16]]", "numbers from 0.001 to 1000000"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[['a']]", "numbers, got"),
        ("MODEL.RPN.NMS_THRESH", "-0.5", "a number from 0 to 1, got -0.5"),
        ("MODEL.DEVICE", "gpu", "cpu, cuda or cuda:<index>, got 'gpu'"),
        ("DATASETS.TRAIN", "(1,)", r"names, got \(1,\)"),
        ("MODEL.FPN.IN_FEATURES", "[{}]", r"numbers and values of type bool and values of type str, got \[{}\]"),
        ("MODEL.FPN.IN_FEATURES", "[3]", r"names, got \[3\]"),
        ("MODEL.GROUP_SAMPLING.ANCHOR_STRIDES", "('a',)", r"numbers at least 1, got \('a',\)"),
    ],
)
def test_values_without_sense_name_the_key(key, value, expected):
    with pytest.raises(ConfigError, match=rf"{re.escape(key)}: expected {expected}"):
        load_config(BASE, [*CPU, key, value])


def test_both_engines_refuse_them():
    pytest.importorskip("detectron2")
    from group_sampling.engines.d2.train import load_config as load_d2_config

    for key, value in (("SOLVER.MAX_ITER", "0"), ("SOLVER.STEPS", "(15, 5)"), ("TEST.DETECTIONS_PER_IMAGE", "-1")):
        with pytest.raises(ConfigError, match=rf"^{key}: expected "):
            load_d2_config(BASE, [*CPU, key, value])


def test_mutated_files_give_config_errors_only(tmp_path):
    """Everything that a config of ours can be turned into is read or refused in one line."""
    rng = np.random.default_rng(0)
    text = load_config(BASE, CPU).dump()
    values = [
        "null",
        "[]",
        "{}",
        "-1",
        "1e999",
        ".nan",
        "''",
        "[a]",
        "true",
        "'('",
        "*x",
        "!!binary x",
        "[[1], 2]",
        "\x00",
    ]
    refused = 0
    for _ in range(150):
        lines = text.splitlines()
        at = int(rng.integers(len(lines)))
        if rng.random() < 0.8:
            name = lines[at].partition(":")[0]
            lines[at] = f"{name}: {values[rng.integers(len(values))]}"
        else:
            lines[at] = lines[at][: rng.integers(len(lines[at]) + 1)] + chr(rng.integers(1, 300))
        (tmp_path / "a.yaml").write_text("\n".join(lines), encoding="utf-8")
        try:
            load_config(str(tmp_path / "a.yaml"), CPU)
        except ConfigError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 75


# -- OUTPUT_DIR -------------------------------------------------------------------------------------------------------


def with_output(folder):
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(folder)
    return cfg


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda folder: "a\0b", "null byte"),
        (lambda folder: folder / ("x" * 300), "File name too long"),
        (lambda folder: folder / "file", "File exists"),
        (lambda folder: folder / "file/below", "Not a directory"),
        (lambda folder: folder / "fifo", "File exists"),
        (lambda folder: folder / "dangling", "File exists"),
        (lambda folder: folder / "loop", "Too many levels|File exists"),
        (lambda folder: "/proc/nowhere", "No such file|Permission|not permitted"),
        (lambda folder: "/dev/null", "File exists"),
    ],
)
def test_an_output_folder_that_cannot_be(tmp_path, make, reason):
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    message = rf"^OUTPUT_DIR: expected a folder that can be written to, got .*({reason})"
    with pytest.raises(ConfigError, match=message), own_output(str(make(tmp_path))):
        pass


@pytest.mark.parametrize(
    "content, found",
    [
        (b"MODEL: {}", "expected the SEED of the run that is there, got None"),
        (b"SEED: x", "expected the SEED of the run that is there, got 'x'"),
        (b"SEED: -1", "expected the SEED of the run that is there, got -1"),
        (b"- 1", r"expected the config of a run, got \[1\]"),
        (b"a: [", "expected the config of a run, got no YAML: "),
        (b"\xff\xfe\xff", "expected the config of a run, got no YAML: "),
    ],
)
def test_a_run_whose_config_is_damaged(tmp_path, content, found):
    (tmp_path / "config.yaml").write_bytes(content)
    cfg = with_output(tmp_path)
    with pytest.raises(ConfigError, match=rf"config\.yaml: {found}"):
        resolve_seed(cfg, keep=True)
    resolve_seed(cfg, keep=False)
    assert cfg.SEED >= 0
