"""The official ground truth files and the command that evaluates result files against them."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from PIL import Image
from scipy.io import savemat

from group_sampling.data.catalog import Catalog
from group_sampling.detections import Detections
from group_sampling.engines.tv.config import load_config
from group_sampling.evaluation import WiderFaceAP, write_predictions
from group_sampling.evaluation.run import evaluate_detections

CONFIG = Path(__file__).parents[2] / "projects/GroupSampling/configs/fpn_finest_sampling.yaml"
TOOL = Path(__file__).parents[2] / "projects/GroupSampling/tools/evaluate_wider.py"

# Two events; the second image has one invalid face, the third has none.
EVENTS = ["0--Parade", "1--Big"]
FILES = [["0_Parade_big", "0_Parade_2"], ["1_Big_g"]]
BOXES = [[[[10, 10, 20, 20], [100, 10, 20, 20]], [[10, 10, 20, 20], [50, 50, 4, 4]]], [np.zeros((0, 4))]]
INVALID = [[[[0], [0]], [[0], [1]]], [np.zeros((0, 1))]]
KEPT = {
    "easy": [[[[1]], np.zeros((0, 1))], [np.zeros((0, 0))]],
    "medium": [[[[1]], [[1]]], [np.zeros((0, 0))]],
    "hard": [[[[1], [2]], [[1]]], [np.zeros((0, 0))]],
}


def cells(values, convert=np.asarray):
    """A MATLAB cell column."""
    column = np.empty((len(values), 1), dtype=object)
    for index, value in enumerate(values):
        column[index, 0] = convert(value)
    return column


def nested(values, dtype):
    return cells(values, lambda event: cells(event, lambda value: np.asarray(value, dtype=dtype)))


def content(name="val"):
    fields = {"event_list": cells(EVENTS), "file_list": cells(FILES, cells)}
    if name == "val":
        fields |= {"face_bbx_list": nested(BOXES, np.int32), "invalid_label_list": nested(INVALID, np.uint8)}
    else:
        fields["gt_list"] = nested(KEPT[name], np.uint8)
    return fields


def mat_name(name):
    return "wider_face_val.mat" if name == "val" else f"wider_{name}_val.mat"


@pytest.fixture
def truth(tmp_path):
    folder = tmp_path / "truth"
    folder.mkdir()
    for name in ("val", *KEPT):
        savemat(folder / mat_name(name), content(name), do_compression=True)
    return folder


@pytest.fixture
def predictions(tmp_path):
    folder = tmp_path / "predictions"
    write_predictions(folder, "0--Parade/0_Parade_big", [[10, 10, 30, 30], [200, 200, 230, 230]], [0.9, 0.5])
    write_predictions(folder, "1--Big/1_Big_g", [[0, 0, 9, 9]], [0.1])
    return folder


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("evaluate_wider", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_official_ground_truth(truth):
    result = WiderFaceAP.from_official(truth).compute()
    assert result.num_faces == {"easy": 1, "medium": 2, "hard": 3, "all": 3}
    assert result.counts["images"] == 3 and result.counts["faces"] == 4 and result.counts["images_without_faces"] == 1


@pytest.fixture
def wider_face(tmp_path, monkeypatch):
    """WIDER_FACE with the validation annotations, below $DETECTRON2_DATASETS."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    lines = []
    for event, files, boxes in zip(EVENTS, FILES, BOXES):
        for file, faces in zip(files, boxes):
            lines += [f"{event}/{file}.jpg", str(len(faces))]
            lines += [" ".join(map(str, [*face, *[0] * 6])) for face in faces] or ["0 0 0 0 0 0 0 0 0 0"]
            image = tmp_path / f"WIDER_FACE/WIDER_val/images/{event}/{file}.jpg"
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (300, 300)).save(image)
    annotations = tmp_path / "WIDER_FACE/wider_face_split/wider_face_val_bbx_gt.txt"
    annotations.parent.mkdir()
    annotations.write_text("\n".join(lines) + "\n")
    return tmp_path / "WIDER_FACE"


def evaluated(folder, *opts, name="wider_face_val"):
    """AP by subset after an evaluation that found the first face of the first image."""
    cfg = load_config(str(CONFIG), ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(folder / "out"), *opts])
    nothing = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, dtype=np.int64), np.zeros(0))
    found = Detections(np.array([[10.0, 10, 30, 30]]), np.ones(1), np.zeros(1, dtype=np.int64), np.full(1, 16.0))
    source = Catalog(cfg.DATASETS)[name]
    detections = {record.image_id: nothing for record in source.records} | {"0--Parade/0_Parade_big": found}
    return evaluate_detections(cfg, source, detections)["wider_face"]


@pytest.mark.parametrize("place", ["ground_truth", "eval_tools/ground_truth"])
def test_official_files_beside_the_data_set(wider_face, truth, place, caplog):
    with caplog.at_level("INFO"):
        assert "AP_easy" not in evaluated(wider_face)
    assert "no Easy, Medium and Hard" in caplog.text and str(wider_face / "ground_truth") in caplog.text
    (wider_face / place).mkdir(parents=True)
    for number, file in enumerate(sorted(truth.iterdir())):  # an incomplete folder is as good as none
        assert "AP_easy" not in evaluated(wider_face), number
        shutil.copy(file, wider_face / place)
    ap = evaluated(wider_face)
    assert (ap["AP_easy"], ap["AP_medium"]) == (100.0, pytest.approx(50.0, abs=0.1))
    assert ap["AP_hard"] == pytest.approx(100 / 3, abs=0.1)
    assert "AP_easy" not in evaluated(wider_face, "TEST.WIDER_GROUND_TRUTH", "")


def test_official_files_are_of_the_whole_validation_set(wider_face, truth):
    """A set of some of its images gets no Easy, Medium and Hard unless the config says so."""
    shutil.copytree(truth, wider_face / "ground_truth")
    some = wider_face / "some.txt"
    some.write_text("0--Parade/0_Parade_big.jpg\n")
    annotations, images = "wider_face_split/wider_face_val_bbx_gt.txt", "WIDER_val/images"
    declared = [["some", str(wider_face / annotations), str(wider_face / images), str(some)]]
    opts = ["DATASETS.WIDER_FORMAT", str(declared)]
    assert "AP_easy" not in evaluated(wider_face, *opts, name="some")
    opts += ["TEST.WIDER_GROUND_TRUTH", str(truth)]
    assert evaluated(wider_face, *opts, name="some")["AP_easy"] == 100.0


def test_fields_that_the_published_evaluation_does_without(truth):
    fields = content("val")
    del fields["invalid_label_list"]
    savemat(truth / mat_name("val"), fields)
    for name in KEPT:
        savemat(truth / mat_name(name), {"gt_list": content(name)["gt_list"]})
    assert WiderFaceAP.from_official(truth).compute().num_faces == {"easy": 1, "medium": 2, "hard": 3, "all": 4}


def test_missing_file(truth):
    (truth / "wider_hard_val.mat").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"wider_hard_val\.mat: no such file; the official ground truth is wider_face"
    ):
        WiderFaceAP.from_official(truth)


@pytest.mark.parametrize(
    "name, field, value, message",
    [
        ("val", "event_list", None, "event_list: expected a cell array, got nothing"),
        ("val", "event_list", np.eye(2), "event_list: expected a cell array, got array"),
        ("val", "event_list", cells(EVENTS[:1]), "file_list: expected 1 events as in event_list, got 2"),
        ("val", "event_list", cells([1, 2]), "event_list: expected a text, got array"),
        ("val", "file_list", cells([["a", "a"], ["b"]], cells), "file_list: image '0--Parade/a' comes twice"),
        ("val", "file_list", cells(["a", "b"]), "file_list: expected a cell array, got 'a'"),
        (
            "val",
            "face_bbx_list",
            nested([BOXES[0]], np.int32),
            "face_bbx_list: expected the events and images of file_list",
        ),
        (
            "val",
            "face_bbx_list",
            nested([[BOXES[0][0], [[1, 2, 3]]], BOXES[1]], np.int32),
            "face_bbx_list: image '0--Parade/0_Parade_2': expected boxes (m, 4), got shape (1, 3)",
        ),
        ("val", "face_bbx_list", nested([["a", "b"], ["c"]], str), "face_bbx_list: expected numbers, got 'a'"),
        (
            "val",
            "invalid_label_list",
            nested([[INVALID[0][0], [[0]]], INVALID[1]], np.uint8),
            "invalid_label_list: image '0--Parade/0_Parade_2': expected 2 labels, got 1",
        ),
        ("easy", "gt_list", None, "gt_list: expected a cell array, got nothing"),
        (
            "easy",
            "gt_list",
            nested([[[[3]], [[1]]], KEPT["easy"][1]], np.uint8),
            "gt_list: image '0--Parade/0_Parade_big': expected face numbers from 1 to 2, got [3]",
        ),
        (
            "hard",
            "gt_list",
            nested([[[[0]], [[1]]], KEPT["hard"][1]], np.uint8),
            "gt_list: image '0--Parade/0_Parade_big': expected face numbers from 1 to 2, got [0]",
        ),
        ("medium", "file_list", cells([FILES[0][::-1], FILES[1]], cells), "file_list: expected the images of "),
    ],
)
def test_ground_truth_of_another_structure(truth, name, field, value, message):
    fields = content(name)
    if value is None:
        del fields[field]
    else:
        fields[field] = value
    savemat(truth / mat_name(name), fields)
    with pytest.raises(ValueError, match=re.escape(f"{truth / mat_name(name)}: {message}")):
        WiderFaceAP.from_official(truth)


@pytest.mark.parametrize("damage", [b"", b"no MATLAB file", b"MATLAB 7.3 MAT-file" + b" " * 105 + b"\x00\x02IM"])
def test_ground_truth_that_is_no_mat_file(truth, damage):
    (truth / "wider_face_val.mat").write_bytes(damage)
    with pytest.raises(
        ValueError, match=r"wider_face_val\.mat: expected a MATLAB file \(version 5 to 7\.2\), cannot read it"
    ):
        WiderFaceAP.from_official(truth)


def test_command(tool, truth, predictions, tmp_path, capsys):
    outputs = tmp_path / "out"
    tool.main(
        ["--predictions", str(predictions), "--ground-truth", str(truth)]
        + ["--json", str(outputs / "ap.json"), "--plot", str(outputs / "pr.png")]
    )
    # Easy: the face at the highest score. Hard: one of three faces. All has a false positive more, but at lower scores.
    table = capsys.readouterr().out
    assert re.search(r"Easy +100.00 +1 ", table) and re.search(r"Medium +50.00 +2 ", table)
    assert re.search(r"Hard +33.33 +3 ", table) and "3 images, 1 of them without predictions" in table
    assert json.loads((outputs / "ap.json").read_text())["ap"]["hard"] == pytest.approx(1 / 3)
    assert (outputs / "pr.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in outputs.iterdir()) == ["ap.json", "pr.png"]


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda folder: write_predictions(folder, "0--Parade/stranger", [], []),
            "expected an image of the ground truth, got '0--Parade/stranger'",
        ),
        (
            lambda folder: (folder / "0--Parade/0_Parade_big.txt").write_text("x"),
            "0_Parade_big.txt:1: expected the image",
        ),
        (lambda folder: folder.rename(folder.with_name("moved")), "no such folder or archive"),
    ],
)
def test_command_refuses_and_writes_nothing(tool, truth, predictions, tmp_path, change, message):
    change(predictions)
    with pytest.raises(SystemExit) as caught:
        tool.main(
            ["--predictions", str(predictions), "--ground-truth", str(truth), "--json", str(tmp_path / "ap.json")]
        )
    assert message in str(caught.value)
    assert not (tmp_path / "ap.json").exists()


def test_command_with_events_and_sizes(tool, truth, predictions, tmp_path, capsys):
    arguments = ["--predictions", str(predictions), "--ground-truth", str(truth), "--json", str(tmp_path / "ap.json")]
    tool.main([*arguments, "--per-event", "--per-scale"])
    table = capsys.readouterr().out
    assert re.search(r"Size 16 +33\.33 +3 ", table) and re.search(r"Size 32 +n/a +0 ", table)
    assert re.search(r"0--Parade +100\.00 +50\.00 +33\.33 ", table) and re.search(r"1--Big +n/a", table)
    events = json.loads((tmp_path / "ap.json").read_text())["events"]
    assert list(events) == ["0--Parade", "1--Big"] and events["1--Big"]["ap"]["hard"] is None
    assert events["0--Parade"]["ap"]["hard"] == pytest.approx(1 / 3)


def test_command_compares(tool, truth, predictions, tmp_path, capsys):
    with tarfile.open(tmp_path / "theirs.tar.xz", "w:xz") as archive:
        archive.add(predictions, "results")
    arguments = ["--ground-truth", str(truth), "--json", str(tmp_path / "ap.json"), "--plot", str(tmp_path / "pr.png")]
    tool.main([*arguments, "--compare", f"ours={predictions}", f"theirs={tmp_path / 'theirs.tar.xz'}"])
    assert capsys.readouterr().out.count("Hard") == 2
    detectors = json.loads((tmp_path / "ap.json").read_text())["detectors"]
    assert list(detectors) == ["ours", "theirs"] and detectors["ours"]["ap"] == detectors["theirs"]["ap"]
    assert imread(tmp_path / "pr.png").shape[1] > 1000


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "expected --predictions or --compare, got neither"),
        (["--compare", "folder"], "expected NAME=PATH"),
        (["--compare", "a=x", "a=y"], "not taken yet, got 'a=y'"),
        (["--predictions", "x", "--curves", "y"], "--curves: expected --plot as well, got none"),
    ],
)
def test_command_line_errors(tool, options, message, capsys):
    with pytest.raises(SystemExit):
        tool.main(["--ground-truth", "nowhere", *options])
    assert message in capsys.readouterr().err


def test_a_wrong_folder_of_curves_is_said_before_the_evaluation(tool, truth, predictions, tmp_path, capsys):
    options = ["--predictions", str(predictions), "--ground-truth", str(truth), "--plot", str(tmp_path / "pr.png")]
    with pytest.raises(SystemExit, match="wider_pr_info"):
        tool.main([*options, "--curves", str(tmp_path / "nothing here")])
    assert capsys.readouterr().out == "" and not (tmp_path / "pr.png").exists()


def test_torch_is_not_imported(truth, predictions, tmp_path):
    script = f"""
import runpy, sys
sys.argv = ["evaluate_wider.py", "--predictions", {str(predictions)!r}, "--ground-truth", {str(truth)!r}, "--per-event",
            "--per-scale", "--plot", {str(tmp_path / "pr.png")!r}]
runpy.run_path({str(TOOL)!r}, run_name="__main__")
print(sorted({{"torch", "torchvision", "scipy", "detectron2"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.endswith("[]\n")


def evaluate_mutated(tool, truth, predictions, outputs, seed, capsys):
    """Damage one .mat file; the command gives a result or a documented error, and no output in that case."""
    rng = np.random.default_rng(seed)
    name = ("val", *KEPT)[rng.integers(4)]
    path = truth / mat_name(name)
    savemat(path, content(name), do_compression=bool(seed % 2))
    sound = path.read_bytes()
    data = bytearray(sound)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(data)))
        kind = rng.integers(5)
        if kind == 0:
            data[at] ^= 1 << rng.integers(8)
        elif kind == 1:
            data[at] = rng.integers(256)
        elif kind == 2:
            del data[at : at + rng.integers(1, 64)]
        elif kind == 3:
            data[at:at] = rng.bytes(rng.integers(1, 64))
        else:
            data[at : at + 8] = rng.bytes(8)
        data = data or bytearray(b"\0")
    path.write_bytes(data)
    arguments = ["--predictions", str(predictions), "--ground-truth", str(truth), "--json", str(outputs / "ap.json")]
    try:
        tool.main(arguments)
        refused = False
        (outputs / "ap.json").unlink()
    except SystemExit as error:
        refused = True
        assert "error: " in str(error), seed
    assert list(outputs.iterdir()) == [], seed
    capsys.readouterr()
    path.write_bytes(sound)
    return refused


@pytest.mark.parametrize("count", [150, pytest.param(1500, marks=pytest.mark.slow)])
def test_mutated_ground_truth(tool, truth, predictions, tmp_path, capsys, count):
    outputs = tmp_path / "out"
    outputs.mkdir()
    refused = sum(evaluate_mutated(tool, truth, predictions, outputs, seed, capsys) for seed in range(count))
    assert refused > count / 2
