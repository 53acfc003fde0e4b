import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from group_sampling.data.records import INVERTED, NON_FINITE, ZERO_AREA, AnnotationError, DataReport
from group_sampling.data.wider_face import read_annotations, read_file_list, read_paths

SAMPLE = Path(__file__).with_name("wider_face_sample_bbx_gt.txt")


def write(tmp_path, text):
    path = tmp_path / "gt.txt"
    path.write_text(text)
    return path


def test_sample_file():
    report = DataReport()
    records = read_annotations(SAMPLE, "/images", report=report)
    assert [record.image_id for record in records] == [
        "0--Parade/0_Parade_sample_1",
        "1--Handshaking/1_Handshaking_big.g",  # rstrip('.jpg') would take the "g" as well
        "1--Handshaking/1_Handshaking_2",
        "2--Dance/2_Dance_3",
    ]
    assert records[0].file_name == "/images/0--Parade/0_Parade_sample_1.jpg"
    assert [record.boxes.tolist() for record in records] == [
        [[10, 20, 40, 60], [100, 20, 108, 29]],
        [],
        [],
        [[0, 0, 1, 1], [900, -3, 920.5, 22]],
    ]
    assert [record.ignore.tolist() for record in records] == [[False, True], [], [], [False, False]]
    for record in records:
        assert record.height is None and record.width is None
        assert record.boxes.dtype == np.float32 and record.boxes.shape[1:] == (4,)
        assert record.classes.dtype == np.int64 and record.classes.tolist() == [0] * len(record.boxes)
    assert (report.num_images, report.num_boxes, report.num_ignore, report.num_dropped) == (4, 6, 1, 2)
    assert report.examples == {ZERO_AREA: [f"{SAMPLE}:5"], INVERTED: [f"{SAMPLE}:11"]}


def test_gzip_crlf_bom_and_no_row_of_zeros_read_the_same(tmp_path):
    expected = [record.boxes.tolist() for record in read_annotations(SAMPLE, "/images")]
    text = SAMPLE.read_text()
    variants = {
        "a.gz": gzip.compress(text.encode(), mtime=0),
        "b": text.replace("\n", "\r\n").encode(),
        "c": b"\xef\xbb\xbf" + text.encode(),
        "d": text.replace("0 0 0 0 0 0 0 0 0 0 \n", "").encode(),
        "e": text.rstrip().encode(),
    }
    for name, content in variants.items():
        (tmp_path / name).write_bytes(content)
        assert [record.boxes.tolist() for record in read_annotations(tmp_path / name, "/images")] == expected


def test_keep_selects_images_and_counts_only_them(tmp_path):
    (tmp_path / "list").write_text("2--Dance/2_Dance_3.jpg\n\n")
    report = DataReport()
    records = read_annotations(SAMPLE, "/images", keep=read_paths(tmp_path / "list"), report=report)
    assert [record.image_id for record in records] == ["2--Dance/2_Dance_3"]
    assert (report.num_images, report.num_boxes, report.num_dropped) == (1, 2, 0)

    (tmp_path / "list").write_text("2--Dance/2_Dance_3.jpg\nnowhere.jpg\n")
    with pytest.raises(AnnotationError, match=r"list:2: expected an image of .*bbx_gt\.txt, got 'nowhere\.jpg'"):
        read_annotations(SAMPLE, "/images", keep=read_paths(tmp_path / "list"))


def test_file_list(tmp_path):
    (tmp_path / "list").write_text("a/1.jpg\nb/2.jpg\n")
    report = DataReport()
    records = read_file_list(tmp_path / "list", "/images", report=report)
    assert [(r.file_name, r.image_id, len(r.boxes)) for r in records] == [
        ("/images/a/1.jpg", "a/1", 0),
        ("/images/b/2.jpg", "b/2", 0),
    ]
    assert report.num_images == 2
    (tmp_path / "list").write_text("a/1.jpg\na/1.jpg\n")
    with pytest.raises(AnnotationError, match=r"list:2: expected each image once.*first at .*list:1"):
        read_file_list(tmp_path / "list", "/images")


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e39"])
def test_numbers_that_are_not_finite_are_dropped_and_counted(tmp_path, number):
    report = DataReport()
    path = write(tmp_path, f"a/1.jpg\n2\n{number} 1 5 5 0 0 0 0 0 0\n1 1 5 5 0 0 0 0 0 0\n")
    (record,) = read_annotations(path, "/images", report=report)
    assert record.boxes.tolist() == [[1, 1, 6, 6]]
    assert report.counts[NON_FINITE] == 1 and report.examples[NON_FINITE] == [f"{path}:3"]


BOX = "1 2 3 4 0 0 0 0 0 0\n"


@pytest.mark.parametrize(
    "text, message",
    [
        ("3\n" + BOX, r"gt\.txt:1: expected an image path .*got '3'"),
        ("a.jpg\n" + BOX, r"gt\.txt:2: expected a number of boxes, got '1 2 3 4 0 0 0 0 0 0'"),
        ("a.jpg\n-1\n", r"gt\.txt:2: expected a number of boxes, got '-1'"),
        ("a.jpg\n" + "9" * 5000, r"gt\.txt:2: expected a number of boxes, got '9+\.\.\.'"),
        ("a.jpg\n999999999\n" + BOX, r"gt\.txt: expected 999999999 boxes for a\.jpg, got the end of the file"),
        ("a.jpg\n", r"gt\.txt: expected the number of boxes of a\.jpg, got the end of the file"),
        ("a.jpg\n2\n" + BOX + "b.jpg\n1\n" + BOX, r"gt\.txt:4: expected 'x y w h .*\(10 or 4 numbers\), got 'b\.jpg'"),
        ("a.jpg\n1\n1 2 3 4 5\n", r"gt\.txt:3: expected 'x y w h .*\(10 or 4 numbers\), got '1 2 3 4 5'"),
        ("a.jpg\n1\n1 2 x 4 0 0 0 0 0 0\n", r"gt\.txt:3: expected 'x y w h"),
        ("a.jpg\n1\n1 2 3 4 0 0 0 7 0 0\n", r"gt\.txt:3: expected 0 or 1 for 'invalid', got 7"),
        ("a.jpg\n1\n" + BOX + BOX, r"gt\.txt:4: expected an image path"),
        ("a.jpg\n0\na.jpg\n0\n", r"gt\.txt:3: expected each image once, got 'a\.jpg' again, first at .*gt\.txt:1"),
        ("../a.jpg\n0\n", r"gt\.txt:1: expected an image path below the image folder, got '\.\./a\.jpg'"),
        ("/etc/a.jpg\n0\n", r"gt\.txt:1: expected an image path below the image folder"),
    ],
)
def test_errors_name_line_expectation_and_finding(tmp_path, text, message):
    with pytest.raises(AnnotationError, match=message):
        read_annotations(write(tmp_path, text), tmp_path)


@pytest.mark.parametrize(
    "content", [b"\x1f\x8b\x08 broken", gzip.compress(b"a.jpg\n0\n", mtime=0)[:-6], b"\xff\xfe\x00"]
)
def test_a_file_that_is_not_text_is_an_annotation_error(tmp_path, content):
    (tmp_path / "gt.txt").write_bytes(content)
    with pytest.raises(AnnotationError, match=r"gt\.txt: expected text, plain or gzipped, got: "):
        read_annotations(tmp_path / "gt.txt", tmp_path)


_TOKENS = [
    "",
    "-1",
    "0",
    "1",
    "nan",
    "inf",
    "1e400",
    "9" * 400,
    "x",
    "../../x.jpg",
    "/x.jpg",
    "\0",
    "\u2028",
    "٣",
    "a b.jpg",
]


def _mutate(text, rng):
    lines = text.split("\n")
    kind = rng.integers(7)
    at, other = rng.integers(len(lines), size=2)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(at, lines[other])
    elif kind == 2:
        lines[at], lines[other] = lines[other], lines[at]
    elif kind == 3:
        words = lines[at].split() or [""]
        words[rng.integers(len(words))] = _TOKENS[rng.integers(len(_TOKENS))]
        lines[at] = " ".join(words)
    elif kind == 4:
        return text[: rng.integers(len(text))]
    elif kind == 5:
        lines[at] = lines[at][: rng.integers(len(lines[at]) + 1)]
    else:
        characters = list(text)
        for place in rng.integers(len(characters), size=3):
            characters[place] = chr(rng.integers(1, 256))
        return "".join(characters)
    return "\n".join(lines)


def test_mutated_files_give_documented_errors_only(tmp_path):
    rng = np.random.default_rng(0)
    path, refused = tmp_path / "gt.txt", 0
    for _ in range(600):
        text = SAMPLE.read_text()
        for _ in range(rng.integers(1, 4)):
            text = _mutate(text, rng) or "\n"
        content = text.encode("utf-8")
        if rng.random() < 0.1:
            content = bytearray(gzip.compress(content, mtime=0))
            content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        try:
            records = read_annotations(path, tmp_path)
        except AnnotationError as error:
            assert str(path) in str(error)
            refused += 1
            continue
        for record in records:
            assert Path(record.file_name).resolve().is_relative_to(tmp_path.resolve())
            assert np.isfinite(record.boxes).all() and (record.boxes[:, 2:] > record.boxes[:, :2]).all()
            assert len(record.boxes) == len(record.ignore) == len(record.classes)
    assert 200 < refused < 600  # both outcomes were exercised


def test_official_file_equals_the_mat_files(reference_data):
    """The text of the validation set against boxes that were taken from the official .mat file."""
    annotations, numbers = reference_data.folder / "wider/annotations", reference_data.numbers
    report = DataReport()
    records = {
        r.image_id: r for r in read_annotations(annotations / "wider_face_val_bbx_gt.txt.gz", "/i", report=report)
    }
    with gzip.open(annotations / "wider_val_merged.jsonl.gz", "rt") as stream:
        rows = [json.loads(line) for line in stream]
    assert len(records) == len(rows) == numbers["images"]["val"]
    invalid = 3  # blur, expression, illumination, invalid, occlusion, pose
    for row in rows:
        kept = [(box, attr) for box, attr in zip(row["boxes_xywh"], row["attr"]) if box[2] > 0 and box[3] > 0]
        record = records[row["file"][: -len(".jpg")]]
        assert record.boxes.tolist() == [[x, y, x + w, y + h] for (x, y, w, h), _ in kept]
        assert record.ignore.tolist() == [attr[invalid] == 1 for _, attr in kept]
    assert {name: getattr(report, name) for name in numbers["val_text"]} == numbers["val_text"]
