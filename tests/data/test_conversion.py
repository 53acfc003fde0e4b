"""convert_dataset.py by its command line: files written here, by hand, against what the data sets then hold."""

import io
import json
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from group_sampling.data.catalog import Catalog
from group_sampling.data.records import CLIPPED, OUTSIDE, ZERO_AREA
from group_sampling.engines.tv.config import load_config

TOOL = Path(__file__).resolve().parents[2] / "projects/GroupSampling/tools/convert_dataset.py"
SIZES = {"a.jpg": (97, 131), "day one/b.png": (600, 401), "day one/empty.jpg": (40, 50)}  # (height, width)
# XYXY; whole pixels, halves, borders, and what only float32 can say.
BOXES = {
    "a.jpg": [[0, 0, 131, 97], [10, 20, 40, 60.5], [3.3, 7.7, 99.9, 91.1]],
    "day one/b.png": [[0.1, 0.2, 400.7, 599.9], [400, 599, 401, 600]],
    "day one/empty.jpg": [],
}


@pytest.fixture
def images(tmp_path):
    for name, (height, width) in SIZES.items():
        file = tmp_path / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (width, height)).save(file)
    return tmp_path / "images"


def run(*args, code=0):
    """What the command prints; or, where it must fail, the last line of its error."""
    printed, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(printed), redirect_stderr(errors):
        try:
            runpy.run_path(str(TOOL))["main"]([str(arg) for arg in args])
            status = 0
        except SystemExit as stop:  # what Python makes of a text is its exit code 1, and the text on stderr
            status = 1 if isinstance(stop.code, str) else stop.code
            errors.write(str(stop.code))
    assert status == code, printed.getvalue() + errors.getvalue()
    if not code:
        return printed.getvalue()
    return next(line for line in reversed(errors.getvalue().splitlines()) if "error: " in line)


def convert(source, annotations, images, target, *args):
    """The records of the result by relative path, its class names and what was printed."""
    output = annotations.parent / f"converted.{'json' if target == 'coco' else 'txt'}"
    printed = run(
        "--from", source, "--annotations", annotations, "--images", images, "--to", target, "--output", output, *args
    )
    entry = ["mine", str(output), str(images)]
    dataset = Catalog({"COCO_FORMAT" if target == "coco" else "WIDER_FORMAT": [entry]})["mine"]
    records = {Path(record.file_name).relative_to(images).as_posix(): record for record in dataset.records}
    return records, dataset.class_names, printed


def write_yolo(folder, number=repr, classes=None):
    for name, (height, width) in SIZES.items():
        lines = []
        for index, (x1, y1, x2, y2) in enumerate(BOXES[name]):
            shares = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height
            label = classes[index % len(classes)] if classes else 0
            lines.append(f"{label} {' '.join(map(number, shares))}\n")
        file = (folder / name).with_suffix(".txt")
        file.parent.mkdir(parents=True, exist_ok=True)
        if lines:  # an image without faces may have no file
            file.write_text("".join(lines))


def write_voc(folder, ignore=()):
    folder.mkdir()
    for name, (height, width) in SIZES.items():
        objects = "".join(
            f"<object><name>face</name><difficult>{int((name, k) in ignore)}</difficult><bndbox>"
            f"<xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            for k, (x1, y1, x2, y2) in enumerate(BOXES[name])
        )
        stated = f"<size><width>{width}</width><height>{height}</height></size>"
        text = f"<annotation><filename>{name}</filename>{stated}{objects}</annotation>"
        (folder / f"{name.replace('/', '_')}.xml").write_text(text)


def write_wider(file, ignore=()):
    lines = []
    for name, boxes in BOXES.items():
        lines += [name, str(len(boxes))]
        for k, (x1, y1, x2, y2) in enumerate(boxes):
            lines.append(f"{x1} {y1} {x2 - x1!r} {y2 - y1!r} 2 0 1 {int((name, k) in ignore)} 2 1")
        lines += ["0 0 0 0 0 0 0 0 0 0"] if not boxes else []
    file.write_text("\n".join(lines) + "\n")


def write_coco(file, ignore=()):
    images, annotations = [], []
    for image_id, (name, (height, width)) in enumerate(SIZES.items(), 40):
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for k, (x1, y1, x2, y2) in enumerate(BOXES[name]):
            entry = {"id": len(annotations), "image_id": image_id, "category_id": 9, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            annotations.append({**entry, "iscrowd": int((name, k) in ignore)})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 9, "name": "face"}]}
    file.write_text(json.dumps(content))


def check(records, ignore=(), atol=0.0):
    assert sorted(records) == sorted(SIZES)
    for name, boxes in BOXES.items():
        expected = np.array(boxes, dtype=np.float32).reshape(-1, 4)
        np.testing.assert_allclose(records[name].boxes, expected, rtol=0, atol=atol)
        assert records[name].ignore.tolist() == [(name, k) in ignore for k in range(len(boxes))]
        assert not records[name].classes.any()


IGNORED = (("a.jpg", 1), ("day one/b.png", 0))


@pytest.mark.parametrize("target", ["coco", "wider"])
@pytest.mark.parametrize("source", ["yolo", "voc", "wider", "coco"])
def test_round_trips_lose_nothing(source, target, images, tmp_path):
    """To the last bit, but for YOLO: shares in float64 come back to float32's rounding."""
    annotations = tmp_path / "annotations"
    ignore = () if source == "yolo" else IGNORED
    if source == "yolo":
        write_yolo(annotations)
    else:
        {"voc": write_voc, "wider": write_wider, "coco": write_coco}[source](annotations, ignore=ignore)
    records, names, printed = convert(source, annotations, images, target)
    check(records, ignore, atol=1e-4 if source == "yolo" else 0)
    assert names == ("face",)
    assert f"3 images, 5 boxes ({len(ignore)} to be ignored), 0 dropped, 0 clipped" in printed
    if target == "coco":
        assert {name: (record.height, record.width) for name, record in records.items()} == SIZES


@pytest.mark.parametrize("target", ["coco", "wider"])
def test_there_and_back_again(target, images, tmp_path):
    """COCO and WIDER FACE into each other and back: the same bits."""
    source = "wider" if target == "coco" else "coco"
    first = tmp_path / "first"
    (write_wider if source == "wider" else write_coco)(first, ignore=IGNORED)
    convert(source, first, images, target)
    middle = tmp_path / f"converted.{'json' if target == 'coco' else 'txt'}"
    records, _, _ = convert(target, middle, images, source)
    check(records, IGNORED)


def test_yolo_of_six_decimals_is_within_its_precision(images, tmp_path):
    write_yolo(tmp_path / "labels", number="{:.6f}".format)
    records, _, printed = convert("yolo", tmp_path / "labels", images, "coco")
    check(records, atol=600 * 0.75e-6 + 1e-4)
    assert "0 dropped, 0 clipped" in printed  # rounding across the border is no finding


@pytest.mark.parametrize("names", ["names: [face, head]\n", "names: {0: face, 1: head}\n", "face\nhead\n"])
def test_classes(names, images, tmp_path):
    write_yolo(tmp_path / "labels", classes=(0, 1))
    file = tmp_path / ("data.yaml" if "names" in names else "classes.txt")
    file.write_text(names)
    records, found, _ = convert("yolo", tmp_path / "labels", images, "coco", "--names", file)
    assert found == ("face", "head") and records["a.jpg"].classes.tolist() == [0, 1, 0]
    records, found, _ = convert("yolo", tmp_path / "labels", images, "coco", "--names", file, "--classes", "head")
    assert found == ("head",) and records["a.jpg"].classes.tolist() == [0]
    assert records["a.jpg"].boxes == pytest.approx(np.array([BOXES["a.jpg"][1]]), abs=1e-4)
    records, _, _ = convert("yolo", tmp_path / "labels", images, "wider", "--names", file, "--classes", "head", "face")
    check(records, atol=1e-4)
    arguments = ["--from", "yolo", "--annotations", tmp_path / "labels", "--images", images, "--names", file]
    message = run(*arguments, "--to", "wider", "--output", tmp_path / "x.txt", code=1)
    assert "--classes" in message and "face, head" in message
    message = run(*arguments, "--to", "coco", "--output", tmp_path / "x", "--classes", "nose", code=1)
    assert "expected some of face, head, got 'nose'" in message


def test_landmarks_are_passed_over(images, tmp_path):
    labels = tmp_path / "labels"
    labels.mkdir()
    (labels / "a.txt").write_text("0 0.5 0.5 0.25 0.5" + " 0.4" * 10 + "\n")
    records, _, _ = convert("yolo", labels, images, "coco")
    expected = [[131 * 0.375, 97 * 0.25, 131 * 0.625, 97 * 0.75]]
    np.testing.assert_array_equal(records["a.jpg"].boxes, np.float32(expected))


@pytest.mark.parametrize("version", [1, 2])
def test_retinaface(version, images, tmp_path):
    lines = []
    for name, boxes in BOXES.items():
        height, width = SIZES[name]
        lines.append(f"# {name}" + (f" {width} {height}" if version == 2 else ""))
        for x1, y1, x2, y2 in boxes:
            box = (x1, y1, x2, y2) if version == 2 else (x1, y1, x2 - x1, y2 - y1)
            lines.append(" ".join(map(repr, map(float, box))) + " 1.5" * (15 if version == 2 else 16))
    (tmp_path / "label.txt").write_text("\n".join(lines))
    for target in ("coco", "wider"):
        records, _, _ = convert("retinaface", tmp_path / "label.txt", images, target)
        check(records)


def test_voc_without_sizes_and_file_names(images, tmp_path):
    """What LabelImg's users have after moving files: the XML file's own name finds the image."""
    folder = tmp_path / "xml"
    (folder / "day one").mkdir(parents=True)
    text = (
        "<object><name>face</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>401</xmax><ymax>9</ymax></bndbox></object>"
    )
    (folder / "day one/b.xml").write_text(f"<annotation><filename>moved.jpg</filename>{text}</annotation>")
    records, _, _ = convert("voc", folder, images, "coco")
    assert records["day one/b.png"].boxes.tolist() == [[0, 1, 401, 9]]


def test_turned_pictures_have_their_upright_size(tmp_path):
    (tmp_path / "images").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (60, 20)).save(tmp_path / "images/t.jpg", exif=exif)
    labels = tmp_path / "labels"
    labels.mkdir()
    (labels / "t.txt").write_text("0 0.5 0.5 1 1\n")
    records, _, _ = convert("yolo", labels, tmp_path / "images", "coco")
    assert records["t.jpg"].boxes.tolist() == [[0, 0, 20, 60]]


def test_what_cannot_be_trained_on_is_said(images, tmp_path):
    wider = tmp_path / "w.txt"
    wider.write_text(
        "a.jpg\n4\n" + "".join(f"{b} 0 0 0 0 0 0\n" for b in ("1 1 9 9", "5 5 0 9", "100 1 90 9", "500 1 9 9"))
    )
    records, _, printed = convert("wider", wider, images, "coco")
    assert records["a.jpg"].boxes.tolist() == [[1, 1, 10, 10], [100, 1, 131, 10]]
    assert "1 images, 4 boxes (0 to be ignored), 2 dropped, 1 clipped" in printed
    assert all(kind in printed for kind in (ZERO_AREA, OUTSIDE, CLIPPED)) and "w.txt:4" in printed


def _label(text):
    def write(tmp_path):
        (tmp_path / "labels").mkdir()
        (tmp_path / "labels/a.txt").write_text(text)

    return write


def _xml(text):
    def write(tmp_path):
        (tmp_path / "labels").mkdir()
        (tmp_path / "labels/a.xml").write_text(text)

    return write


def _stray(tmp_path):
    write_yolo(tmp_path / "labels")
    (tmp_path / "labels/other.txt").write_text("0 0.5 0.5 0.1 0.1\n")


VOC = "<annotation><filename>a.jpg</filename>{}</annotation>"


@pytest.mark.parametrize(
    "source, write, expected",
    [
        ("yolo", lambda tmp_path: None, "expected the folder of the YOLO label files"),
        ("yolo", lambda tmp_path: (tmp_path / "labels").mkdir(), "expected label files for the 3 images, got none"),
        ("yolo", _stray, "expected an image below .* for every label file, got none for 1 .*other.txt"),
        (
            "yolo",
            _label("0 .5 .5 .1\n"),
            r"a.txt:1: expected 'class x_.* \(5 or 15 numbers\), got '0 .5 .5 .1'",
        ),
        ("yolo", _label("\n0 50 50 10 10\n"), "a.txt:2: expected shares .* are these pixels"),
        ("yolo", _label("3 .5 .5 .1 .1\n"), r"a.txt:1: expected a class of 0 \(face\), got 3: --names"),
        ("yolo", _label("0.5 .5 .5 .1 .1\n"), "a.txt:1: expected a class number, got 0.5"),
        ("yolo", _label("0 nan .5 .1 .1\n"), "a.txt:1: expected shares"),
        ("voc", lambda tmp_path: (tmp_path / "labels").mkdir(), "expected a folder of XML files, got none"),
        ("voc", _xml("<annotation>"), "a.xml: expected XML, got"),
        ("voc", _xml(VOC.format("<size><width>97</width><height>131</height></size>")), "131x97, got 97x131"),
        ("voc", _xml(VOC.format("<object></object>")), "object 1: expected <name>"),
        (
            "voc",
            _xml(VOC.format("<object><name>face</name></object>")),
            "a number in <bndbox/xmin>, got None",
        ),
        ("voc", _xml("<annotation><filename>../../x.jpg</filename></annotation>"), "below the image folder"),
        ("retinaface", lambda tmp_path: (tmp_path / "labels").write_text("1 2 3 4\n"), 'labels:1: expected "# path'),
        ("retinaface", lambda tmp_path: (tmp_path / "labels").write_text("# a.jpg\n1 2 3\n"), "labels:2: expected"),
        ("retinaface", lambda tmp_path: (tmp_path / "labels").write_text("# a.jpg 5 5\n"), "131x97, got 5x5"),
        ("retinaface", lambda tmp_path: (tmp_path / "labels").write_text("# no.jpg\n"), "cannot read image .*no.jpg"),
        ("coco", lambda tmp_path: None, "No such file"),
    ],
)
def test_errors(source, write, expected, images, tmp_path):
    write(tmp_path)
    output = tmp_path / "kept.json"
    output.write_text("what was there before")
    arguments = ["--from", source, "--annotations", tmp_path / "labels", "--images", images, "--to", "coco"]
    message = run(*arguments, "--output", output, code=1)
    assert message.startswith("convert_dataset.py: error: ") and re.search(expected, message), message
    assert output.read_text() == "what was there before"


def test_a_name_that_wider_cannot_say(tmp_path):
    """Two images of one stem are one image to WIDER FACE's format; the error names the result, and nothing is left."""
    (tmp_path / "images").mkdir()
    for name in ("a.jpg", "a.png"):
        Image.new("RGB", (20, 20)).save(tmp_path / "images" / name)
    images = [{"id": k, "file_name": name, "height": 20, "width": 20} for k, name in enumerate(("a.jpg", "a.png"))]
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "face"}]}
    (tmp_path / "in.json").write_text(json.dumps(content))
    arguments = ["--from", "coco", "--annotations", tmp_path / "in.json", "--images", tmp_path / "images"]
    message = run(*arguments, "--to", "wider", "--output", tmp_path / "out.txt", code=1)
    assert "out.txt: the result cannot be read back" in message and "each image once" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "in.json"]


def test_the_printed_line_is_the_config(images, tmp_path):
    """Pasted into a shell it makes the data set known."""
    write_yolo(tmp_path / "labels")
    _, _, printed = convert("yolo", tmp_path / "labels", images, "coco")
    line = printed.strip().splitlines()[-1]
    echo = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True)
    words = echo.stdout.splitlines()
    cfg = load_config(str(TOOL.parents[1] / "configs/quick/demo_fpn_finest_sampling.yaml"), words)
    name = cfg.DATASETS.TRAIN[0]
    assert len(Catalog(cfg.DATASETS)[name].records) == 3


def test_as_a_command(images, tmp_path):
    command = [sys.executable, TOOL, "--from", "yolo", "--annotations", tmp_path / "no", "--images", images]
    command += ["--to", "coco", "--output", tmp_path / "out.json"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    write_yolo(tmp_path / "no")
    subprocess.run(command, check=True, capture_output=True)
    assert len(json.loads((tmp_path / "out.json").read_bytes())["annotations"]) == 5


def test_output_does_not_overwrite_its_input(images, tmp_path):
    write_coco(tmp_path / "in.json")
    arguments = ["--from", "coco", "--annotations", tmp_path / "in.json", "--images", images, "--to", "coco"]
    assert "expected another file" in run(*arguments, "--output", tmp_path / "in.json", code=2)
