"""The benchmarks run, and their reports hold what the documentation takes from them. No speed is asserted."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

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
def test_bench_training(repository, tmp_path):
    out = run(
        repository,
        "bench_training.py",
        *("--compare", "rpn", "rcnn", "keys", "--keys", "plain", "BACKBONE.RECOMPUTE", "--side", 96, "--faces", 5),
        *("--rounds", 1, "--threads", 1, "--json", tmp_path / "report.json"),
    )
    report = json.loads((tmp_path / "report.json").read_text())
    kinds = [record["comparison"] for record in report["records"]]
    assert kinds.count("keys") == 2 and kinds.count("rpn") == kinds.count("rcnn") >= 2 and report["data_ms"] > 0
    for record in report["records"]:
        assert all(record["stages_ms"][stage] > 0 for stage in ("backbone", "head", "assign and sample", "backward"))
        assert record["images_per_second"] > 0 and record["kept_mb"] > 0
        assert (record["stages_ms"]["second stage"] > 0) == (record["comparison"] == "rcnn")
    plain, recomputed = report["records"][-2:]
    assert recomputed["kept_mb"] < plain["kept_mb"]
    assert report["records"][0]["speed_of_first"] == 1 and report["records"][0]["step_per_limit"] > 0
    assert "| FPN-finest-sampling, torchvision engine | " in out


@pytest.mark.slow
def test_bench_loading(repository, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((240, 160)).save(tmp_path / "a.jpg")
    options = ("--images", 4, "--rounds", 1, "--workers", 0, 1, "--json", tmp_path / "report.json")
    out = run(repository, "bench_loading.py", tmp_path, *options, "--opts", "INPUT.CROP.SIZE", "[100, 100]")
    report = json.loads((tmp_path / "report.json").read_text())
    ways = ["resize, crop", "crop, resize", "REDUCE_JPEG"]
    found = [(entry["workers"], entry["way"]) for entry in report["images_per_second"]]
    assert found == [(workers, way) for workers in (0, 1) for way in ways]
    assert all(entry["median"] > 0 for entry in report["images_per_second"])
    assert report["gray_levels"]["crop, resize"]["largest"] <= 2 < report["gray_levels"]["REDUCE_JPEG"]["largest"]
    assert "images/s" in out


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
