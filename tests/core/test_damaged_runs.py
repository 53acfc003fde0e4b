"""Folders of runs whose files were damaged: a message that names the file, never a traceback."""

import json
import runpy

import pytest

from group_sampling.errors import UserError
from group_sampling.experiments.runs import Run, parse_metrics
from group_sampling.files import read_json

DAMAGED = {
    "text": b"hello",
    "cut": b'{"ap": {"all": 0.5',
    "another encoding": b"\xff\xfe\xfd",
    "nothing": b"",
    "a list": b"[1, 2]",
    "a number": b"3",
    "null": b"null",
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_json_files_name_themselves(tmp_path, kind):
    (tmp_path / "a.json").write_bytes(DAMAGED[kind])
    with pytest.raises(UserError, match=r"a\.json: expected (JSON, got: |a JSON object, got )") as error:
        read_json(tmp_path / "a.json")
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("ap", [None, 3, [], {"all": "x"}, {"all": [1]}, {"all": True}])
def test_results_have_numbers_by_name(tmp_path, ap):
    file = tmp_path / "inference/mine/results.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"ap": ap}))
    with pytest.raises(
        UserError, match=r'results\.json: expected the results of an evaluation, numbers by name as "ap"'
    ):
        Run("a", tmp_path).results("mine")
    file.write_text(json.dumps({"ap": {"all": 0.5, "@16": None}}))
    assert Run("a", tmp_path).results("mine")["ap"] == {"all": 0.5, "@16": None}


@pytest.mark.parametrize("content", ["{}", "SEED: 1", "3", "SOLVER: {MAX_ITER: 2}", "a: [", "SOLVER: 3"])
def test_a_config_that_is_of_no_run(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"config\.yaml: expected the config of a run, got"):
        Run("a", tmp_path).config  # noqa: B018


def test_lines_of_metrics_that_are_none_are_left_out(tmp_path):
    lines = [
        b"3",
        b"null",
        b"[]",
        b'{"loss": 1}',
        b'{"iteration": "x", "loss": 1}',
        b'{"iteration": 4, "lo',
        b"\xff\xfe",
    ]
    (tmp_path / "metrics.json").write_bytes(
        b"\n".join([b'{"iteration": 1, "loss": 2.5}', *lines, b'{"iteration": 2, "loss": 1.5, "x": "y", "z": null}'])
    )
    run = Run("a", tmp_path)
    assert run.metrics() == [{"iteration": 1, "loss": 2.5}, {"iteration": 2, "loss": 1.5}]
    assert run.series("loss") == ([1, 2], [2.5, 1.5]) and run.series("x") == ([], [])
    assert parse_metrics("[" * 100_000) == []


def test_a_marker_of_a_reproduction(tmp_path, repository, capsys):
    """The report of a folder in which another program has written."""
    tool = runpy.run_path(str(repository / "projects/GroupSampling/tools/reproduce.py"))
    arguments = [
        "--table",
        "5",
        "--scale",
        "tiny",
        "--report-only",
        "--output",
        str(tmp_path),
        "--engine",
        "torchvision",
    ]
    folder = tmp_path / "tiny/table5/fast_rcnn/seed0"
    folder.mkdir(parents=True)
    (folder / "reproduce.json").write_bytes(DAMAGED["cut"])
    with pytest.raises(SystemExit, match=r"^reproduce\.py: error: \S+reproduce\.json: expected JSON, got: "):
        tool["main"](arguments)
