"""tools/evaluate_coco.py: pycocotools' figures at its own limit, without that limit, and what it refuses."""

import contextlib
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TOOL = Path(__file__).parents[2] / "projects/GroupSampling/tools/evaluate_coco.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("evaluate_coco", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three images of two classes, and detections near the objects and elsewhere."""
    folder, rng = tmp_path_factory.mktemp("coco"), np.random.default_rng(0)
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in (5, 7, 11)]
    annotations, results = [], []
    for image in images:
        for _ in range(12):
            x, y, w, h = rng.integers([0, 0, 10, 10], [500, 400, 80, 80]).tolist()
            category = int(rng.choice([3, 8]))
            annotation = {"id": len(annotations) + 1, "image_id": image["id"], "category_id": category}
            annotations.append({**annotation, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0})
            shift = rng.normal(0, 6, 4)
            box = [x + shift[0], y + shift[1], max(w + shift[2], 1), max(h + shift[3], 1)]
            result = {"image_id": image["id"], "bbox": box, "score": float(rng.random())}
            results.append({**result, "category_id": int(rng.choice([category, 3, 8]))})
    categories = [{"id": 3, "name": "face"}, {"id": 8, "name": "head"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def argv(folder, *options, predictions="results.json"):
    paths = ["--predictions", folder / predictions, "--annotations", folder / "instances.json"]
    return [str(option) for option in (*paths, *options)]


def test_figures_are_pycocotools(tool, files, tmp_path, capsys):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    tool.main(argv(files, "--max-detections", 100, "--json", tmp_path / "out.json", "--plot", tmp_path / "out.png"))
    content = json.loads((tmp_path / "out.json").read_text())
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(files / "instances.json"))
        evaluation = COCOeval(truth, truth.loadRes(str(files / "results.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    found = [-1 if content["metrics"][name] is None else content["metrics"][name] for name in names]
    assert found == pytest.approx(evaluation.stats[:6].tolist(), abs=1e-12) and 0 < found[0] < 1
    assert content["class_ap"].keys() == {"face", "head"} and Image.open(tmp_path / "out.png").width > 500
    printed = capsys.readouterr().out
    assert "3 images, 36 objects, 36 detections" in printed and "best F1" in printed


def test_the_limit_is_the_callers(tool, files, tmp_path):
    recall = {}
    for limit in (1, 2000):
        tool.main(argv(files, "--max-detections", limit, "--json", tmp_path / "out.json", "--scores", 0.25))
        content = json.loads((tmp_path / "out.json").read_text())
        recall[content["max_dets_per_image"]] = content["metrics"]["AR"]
        assert [row["score"] for row in content["by_score"]["scores"]] == [0.25]
    assert recall[1] < recall[2000]


def test_command_line(files):
    done = subprocess.run([sys.executable, TOOL, *argv(files)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("COCO")


ENTRY = {"image_id": 5, "category_id": 3, "bbox": [0, 0, 10, 10], "score": 0.5}


@pytest.mark.parametrize(
    "content, message",
    [
        ("[{", "expected COCO's results as JSON"),
        ({"annotations": []}, "expected a list of results, got dict with the keys ['annotations']"),
        ([ENTRY, 3], "result 1: expected image_id, category_id, bbox and score"),
        ([{**ENTRY, "category_id": 4}], "result 0: expected a category_id of the annotations [3, 8], got 4"),
        ([{**ENTRY, "category_id": [3]}], "result 0: expected a category_id of the annotations"),
        ([{**ENTRY, "bbox": [1, 2, 3]}], "result 0: expected bbox as [x, y, width, height] and a score, got [1, 2, 3]"),
        ([{**ENTRY, "score": None}], "result 0: expected bbox as [x, y, width, height] and a score"),
        ([{**ENTRY, "score": float("nan")}], "result 0: expected bbox"),
        ([{**ENTRY, "image_id": 6}], "expected an image of the ground truth, got '6'"),
        ([{**ENTRY, "bbox": [0, 0, -1, 5]}], "expected finite numbers, x1 <= x2"),
    ],
)
def test_results_that_are_none(tool, files, tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(SystemExit) as stopped:
        tool.main(argv(files, "--json", tmp_path / "out.json", predictions=path))
    assert str(stopped.value).startswith("evaluate_coco.py: error: ") and message in str(stopped.value)
    assert not (tmp_path / "out.json").exists()


def test_files_that_are_not_there(tool, files, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"nowhere\.json"):
        tool.main(argv(files, predictions="nowhere.json"))
    with pytest.raises(SystemExit, match="2"):
        tool.main(argv(files, "--max-detections", 0))
    assert "--max-detections: expected a positive number, got 0" in capsys.readouterr().err
