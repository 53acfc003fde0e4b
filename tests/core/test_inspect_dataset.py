"""inspect_dataset.py: counts against independent matching, findings against files broken on purpose, the command."""

import io
import json
import re
import runpy
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from oracles import oracle_match
from PIL import Image

from group_sampling.data.records import DataReport, ImageRecord
from group_sampling.engines.tv.config import load_config
from group_sampling.experiments.balance import anchor_grid
from group_sampling.experiments.inspection import draw_sheet, inspect

PROJECT = Path(__file__).resolve().parents[2] / "projects/GroupSampling"
MAIN = runpy.run_path(str(PROJECT / "tools/inspect_dataset.py"))["main"]
CONFIG = PROJECT / "configs/quick/demo_fpn_finest_sampling.yaml"
SIZE = 256, 320
STILL = ["INPUT.CROP.ENABLED", "False", "INPUT.RANDOM_FLIP", "none"]


def record(boxes, ignore=(), file="synthetic://train/0?height=256&width=320&seed=0"):
    boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    flags = np.isin(np.arange(len(boxes)), ignore)
    return ImageRecord(file, file, *SIZE, boxes, np.zeros(len(boxes), dtype=np.int64), flags)


def square(size, x=100.0, y=100.0):
    return [x - size / 2, y - size / 2, x + size / 2, y + size / 2]


def look(records, *opts):
    return inspect(load_config(str(CONFIG), [*STILL, *opts]), "mine", records, ("face",), DataReport())


def test_faces_between_below_and_above_the_scales():
    """Anchors of 16 ... 128 pixels: a square of side s over one of side a has an IoU of (s / a)^2, 0.4 at 0.632 a."""
    found = look([record([square(size)]) for size in (9, 11, 64, 190, 215)])
    (entry,) = found.coverage
    assert dict(entry.faces) == {3: 2, 6: 1, 7: 2}
    assert dict(entry.uncovered) == {3: 1, 7: 1}  # 9 and 215: (9 / 16)^2 = 0.32, (128 / 215)^2 = 0.35
    assert found.uncovered_share == pytest.approx(2 / 5)
    assert found.sizes.tolist() == pytest.approx([9, 11, 64, 190, 215])


def test_the_jitter_moves_sizes():
    found = look([record([square(16)])], "INPUT.SCALE_JITTER", "(0.5, 1.0, 2.0)")
    assert [(entry.factor, entry.share) for entry in found.coverage] == [(0.5, 1), (1, 0), (2, 0)]
    assert [dict(entry.faces) for entry in found.coverage] == [{3: 1}, {4: 1}, {5: 1}]
    assert found.uncovered_share == pytest.approx(1 / 3)


@pytest.mark.parametrize("second_pass", ["all", "best", "none"])
def test_counts_agree_with_independent_matching(second_pass):
    rng = np.random.default_rng(3)
    records = []
    for _ in range(5):
        size = np.exp(rng.uniform(np.log(6), np.log(250), 12))
        corner = rng.uniform(0, 1, (12, 2)) * [320, 256]
        boxes = np.concatenate([corner, corner + size[:, None] * rng.uniform(0.6, 1.3, (12, 2))], axis=1)
        records.append(record(boxes.clip(0, [320, 256, 320, 256]), ignore=(0,)))
    cfg = load_config(str(CONFIG), STILL)
    anchors = anchor_grid(cfg, *SIZE).boxes().numpy()
    faces = uncovered = 0
    for entry in records:
        boxes = entry.boxes[1:]
        labels, matched, _ = map(np.array, oracle_match(anchors, boxes, 0.6, 0.4, second_pass))
        faces += len(boxes)
        uncovered += len(boxes) - len(np.unique(matched[labels == 1]))
    assert 0 < uncovered < faces
    (entry,) = look(records, "MODEL.GROUP_SAMPLING.SECOND_PASS", second_pass).coverage
    assert (entry.faces.total(), entry.uncovered.total()) == (faces, uncovered)


def test_ignore_regions_and_empty_images_are_no_faces():
    found = look([record([]), record([square(20), square(50)], ignore=(1,))])
    assert (found.per_image.tolist(), len(found.sizes)) == ([0, 1], 1)
    content = found.to_dict()
    assert (content["faces"], content["images_without_faces"], content["classes"]) == (1, 1, {"face": 1})
    nothing = look([record([])])
    assert nothing.to_dict()["without_positive_anchor"] is None and "0 faces" in nothing.table()


def test_sheet_shows_boxes_where_they_are(tmp_path):
    """A sheet of one blue picture: the only lime pixels enclose the face."""
    Image.new("RGB", (320, 256), (0, 0, 200)).save(tmp_path / "blue.png")
    picture = record([[80, 64, 240, 192]], file=str(tmp_path / "blue.png"))
    assert draw_sheet([picture], ("face",), tmp_path / "s.png") == []
    pixels = np.asarray(Image.open(tmp_path / "s.png").convert("RGB")).astype(int)
    blue = np.argwhere((pixels[..., 2] > 150) & (pixels[..., :2].max(axis=2) < 50))
    lime = np.argwhere((pixels[..., 1] > 200) & (pixels[..., [0, 2]].max(axis=2) < 80))
    corners = blue.min(axis=0), blue.max(axis=0)
    inside = lime[((lime >= corners[0]) & (lime <= corners[1])).all(axis=1)]
    np.testing.assert_allclose((inside.min(axis=0) - corners[0]) / (corners[1] - corners[0]), 0.25, atol=0.02)
    np.testing.assert_allclose((inside.max(axis=0) - corners[0]) / (corners[1] - corners[0]), 0.75, atol=0.02)


class Result(NamedTuple):
    stdout: str
    stderr: str


def run(*args, code=0):
    """The command, in this process: a new one takes seconds to import torch."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr), pytest.raises(SystemExit) as ended:
        MAIN([str(arg) for arg in ("--config-file", CONFIG, *args)])
    status = ended.value.code or 0
    if isinstance(status, str):  # as the interpreter does
        stderr.write(f"{status}\n")
        status = 1
    assert status == code, stdout.getvalue() + stderr.getvalue()
    return Result(stdout.getvalue(), stderr.getvalue())


def test_command_on_a_data_set_of_the_catalog(tmp_path):
    few = ["DATASETS.SYNTHETIC.NUM_VAL", 6]
    result = run("--dataset", "synthetic_faces_val", "--output", tmp_path, "--samples", 3, *few)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.txt", "samples.png", "sizes.png"]
    content = json.loads((tmp_path / "report.json").read_text())
    assert (content["data_set"], content["images"], content["unreadable_images"]) == ("synthetic_faces_val", 6, [])
    assert content["anchor_scales"] == [16, 32, 64, 128]
    assert (tmp_path / "report.txt").read_text() in result.stdout
    for name in ("samples.png", "sizes.png"):
        assert np.asarray(Image.open(tmp_path / name).convert("L")).std() > 10


def test_command_on_files_that_are_broken(tmp_path):
    """A missing, a cut and a turned picture, boxes of no use: each is said, and the rest is still drawn."""
    for name, size in {"good": (64, 48), "cut": (64, 48), "turned": (48, 64)}.items():
        noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{name}.png")
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    names = ("good", "cut", "turned", "missing")
    images = [{"id": k, "file_name": f"{name}.png", "width": 64, "height": 48} for k, name in enumerate(names)]
    boxes = [[10, 10, 20, 20], [5, 5, 0, 9], [60, 40, 20, 20]]
    annotations = [{"id": k, "image_id": 0, "category_id": 1, "bbox": box} for k, box in enumerate(boxes)]
    file = tmp_path / "mine.json"
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "face"}]}
    file.write_text(json.dumps(content))
    output = tmp_path / "out"
    result = run("--annotations", file, "--images", tmp_path, "--output", output, code=1)
    assert "3 images cannot be used" in result.stderr.splitlines()[-1]
    found = json.loads((output / "report.json").read_text())
    assert len(found["unreadable_images"]) == 3
    turned = "turned.png: expected 64x48 pixels as annotated, got 48x64 when upright"
    for expected in ("cut.png", turned, "missing.png"):
        assert any(expected in message for message in found["unreadable_images"]), expected
    assert found["annotations"]["findings"] == {"zero area": 1, "clipped to the image": 1}
    assert (output / "samples.png").exists()


@pytest.mark.parametrize(
    "args, code, expected",
    [
        (["--dataset", "nonsense"], 1, "expected one of .* got 'nonsense'"),
        (["--annotations", "no.json", "--images", "."], 1, "do not exist"),
        (["--annotations", "no.json"], 2, "--annotations and --images go together"),
        (["--dataset", "synthetic_faces_val", "--samples", "0"], 2, "--samples: expected at least 1"),
        (["--dataset", "synthetic_faces_val", "MODEL.NO_SUCH", "1"], 1, "no key MODEL.NO_SUCH"),
    ],
)
def test_errors(args, code, expected, tmp_path):
    assert re.search(expected, run(*args, "--output", tmp_path / "x", code=code).stderr)
    assert not (tmp_path / "x").exists()
