"""The benchmarks run, and their reports hold what the documentation takes from them. No speed is asserted."""

import json
import os
import subprocess
import sys

import pytest

from group_sampling.ops import extension_status

BENCHMARKS = "projects/GroupSampling/benchmarks"


def run(repository, script, *arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(repository / BENCHMARKS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not extension_status().loaded, reason="the extension is not built")
def test_bench_matcher(repository, tmp_path):
    out = run(
        repository,
        "bench_matcher.py",
        *("--anchors", 400, 1600, "--faces", 1, 4, "--seconds", 0.01, "--threads", 1),
        *("--peers", "torchvision", "reference", "--json", tmp_path / "report.json"),
    )
    report = json.loads((tmp_path / "report.json").read_text())
    names = {record["name"] for records in report["records"].values() for record in records}
    assert {"assign_and_sample", "match_anchors", "pairwise_iou", "torchvision", "reference"} <= names
    assert (tmp_path / "report.png").stat().st_size > 0
    assert "| 1,600 | 4 | " in out


@pytest.mark.slow
def test_bench_iteration(repository, tmp_path):
    out = run(
        repository,
        "bench_iteration.py",
        *("--engines", "torchvision", "--cases", "demo", "--iterations", 2, "--threads", 1),
        *("--json", tmp_path / "report.json"),
    )
    (record,) = json.loads((tmp_path / "report.json").read_text())["records"]
    assert (record["engine"], record["iterations"], record["images"]) == ("torchvision", 2, 4)
    assert 0 < record["assign_ms"] < record["iteration_ms"]
    assert 0 < record["share"] < 1
    assert 0 < sum(record["stages_ms"].values()) < record["iteration_ms"]
    assert record["peers_ms"]["torchvision"] > 0
    assert "| demo | torchvision | 4 | " in out


@pytest.mark.slow
def test_bench_sub_detectors(repository, tmp_path):
    config = repository / "projects/GroupSampling/configs/quick/demo_fpn_finest_sampling.yaml"
    out = run(
        repository,
        "bench_sub_detectors.py",
        *("--config-file", config, "--repeats", 1, "--threads", 1),
        *("--json", tmp_path / "report.json", "DATASETS.SYNTHETIC.NUM_VAL", 2, "TEST.PYRAMID.SCALES", "(0.5, 1.0)"),
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["images"] == 2 and {"wider_face/AP_all", "wider_face/AP@128"} <= report["metrics"].keys()
    for kind in ("without", "with"):
        assert 0 < report["seconds"][kind]["detector"]["median"] < report["seconds"][kind]["evaluation"]["median"]
    assert "ms an image without" in out
