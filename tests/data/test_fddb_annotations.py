"""FDDB's fold and ellipse lists, and the data set made of them."""

import math
import re

import numpy as np
import pytest
from PIL import Image

from group_sampling.data.catalog import Catalog, MissingDatasetError
from group_sampling.data.fddb import bounding_boxes, read_annotations, read_records
from group_sampling.data.records import AnnotationError, UnreadableImageError

ONE = "2002/08/11/big/img_1"
TWO = "2002/08/11/big/img_2"
THREE = "2003/01/02/big/img_3"
ELLIPSES = {
    1: f"{ONE}\n1\n30.5 20.25 1.5 50 60.5  1\n{TWO}\n2\n10 5 0 20 20  1\n4 3 -1.5 70 10  1\n",
    2: f"{THREE}\n0\n",
}
LISTS = {1: f"{ONE}\n{TWO}\n", 2: f"{THREE}\n"}
SIZES = f"image,width,height\n{ONE},100,120\n{TWO},72,64\n{THREE},30,40\n"


@pytest.fixture
def folds(tmp_path):
    folder = tmp_path / "FDDB-folds"
    folder.mkdir()
    for fold, text in ELLIPSES.items():
        (folder / f"FDDB-fold-{fold:02d}-ellipseList.txt").write_text(text)
        (folder / f"FDDB-fold-{fold:02d}.txt").write_text(LISTS[fold])
    return folder


def test_folds(folds):
    images = read_annotations(folds)
    assert [(image.image_id, image.fold, image.size) for image in images] == [
        (ONE, 1, None),
        (TWO, 1, None),
        (THREE, 2, None),
    ]
    assert images[0].ellipses.tolist() == [[30.5, 20.25, 1.5, 50, 60.5]]
    assert images[1].ellipses.shape == (2, 5) and images[2].ellipses.shape == (0, 5)


def test_windows_line_ends_and_a_missing_last_one(folds):
    for file in folds.iterdir():
        file.write_bytes(file.read_bytes().rstrip().replace(b"\n", b"\r\n"))
    assert [len(image.ellipses) for image in read_annotations(folds)] == [1, 2, 0]


def test_sizes_from_the_file_or_from_the_images(folds, tmp_path):
    sizes = {ONE: (120, 100), TWO: (64, 72), THREE: (40, 30)}
    for image, (height, width) in sizes.items():
        path = tmp_path / "pictures" / f"{image}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (width, height)).save(path)
    assert {image.image_id: image.size for image in read_annotations(folds, tmp_path / "pictures")} == sizes
    (folds / "image_sizes.csv").write_text(SIZES)
    assert {image.image_id: image.size for image in read_annotations(folds)} == sizes


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file"),
        (b"no image", "expected an image"),
    ],
)
def test_images_without_a_size(folds, tmp_path, content, message):
    for image in (ONE, TWO, THREE):
        path = tmp_path / "pictures" / f"{image}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(path)
    damaged = tmp_path / "pictures" / f"{TWO}.jpg"
    damaged.unlink()
    if content is not None:
        damaged.write_bytes(content)
    with pytest.raises(UnreadableImageError, match=rf"img_2\.jpg: {message}"):
        read_annotations(folds, tmp_path / "pictures")


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("FDDB-fold-01-ellipseList.txt", f"{ONE}\nx\n", ":2: expected a number of rows, got 'x'"),
        ("FDDB-fold-01-ellipseList.txt", f"{ONE}\n", ":2: expected a number of rows, got the end of the file"),
        (
            "FDDB-fold-01-ellipseList.txt",
            f"{ONE}\n2\n1 1 0 1 1 1\n",
            ":2: expected as many rows as it says, 2, got the",
        ),
        (
            "FDDB-fold-01-ellipseList.txt",
            f"{ONE}\n1\n1 1 0 1 1\n",
            ":3: expected 'semi-major semi-minor angle center-x",
        ),
        ("FDDB-fold-01-ellipseList.txt", f"{ONE}\n1\n1 1 0 nan 1 1\n", ":3: expected 'semi-major"),
        ("FDDB-fold-01-ellipseList.txt", f"{ONE}\n1\n1 1 0 1_0 1 1\n", ":3: expected 'semi-major"),
        (
            "FDDB-fold-01-ellipseList.txt",
            f"{ONE}\n1\n1 0 0 1 1 1\n",
            ":3: expected axes above 0 and numbers up to 1e+06",
        ),
        ("FDDB-fold-01-ellipseList.txt", f"{ONE}\n1\n1 1 0 2e6 1 1\n", ":3: expected axes above 0 and numbers up to"),
        ("FDDB-fold-01-ellipseList.txt", f"{ONE}\n0\n{ONE}\n0\n", ".txt: expected the images of FDDB-fold-01-ellipse"),
        ("FDDB-fold-01-ellipseList.txt", f"{ONE}\n0\n1 1 0 1 1 1\n", ":3: expected the name of an image, got '1 1 0 1"),
        ("FDDB-fold-01-ellipseList.txt", f"{ONE}\n0\n\n{TWO}\n0\n", ":3: expected the name of an image, got ''"),
        ("FDDB-fold-01.txt", f"{ONE}\n", f"number 2 '{TWO}', got the end of the file"),
        ("FDDB-fold-02.txt", f"{THREE}\nx\n", "number 2 no further image, got 'x'"),
        ("image_sizes.csv", SIZES.replace("height", "h"), ":1: expected the header image,width,height, got"),
        ("image_sizes.csv", SIZES.replace("100", "0"), ":2: expected an image, and sides from 1 to 16384, got"),
        ("image_sizes.csv", SIZES.replace("100", "1,1"), ":2: expected an image, and sides from 1 to 16384, got"),
        ("image_sizes.csv", SIZES.replace(TWO, "x"), f"expected the size of every image, got none for '{TWO}'"),
        ("image_sizes.csv", "", ":1: expected the header"),
    ],
)
def test_malformed_files(folds, name, text, message):
    (folds / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_annotations(folds)
    assert str(folds) in str(caught.value)
    with pytest.raises(AnnotationError, match=re.escape(message)):
        read_records(folds, folds)


def test_an_image_in_two_folds(folds):
    (folds / "FDDB-fold-02-ellipseList.txt").write_text(f"{ONE}\n0\n")
    (folds / "FDDB-fold-02.txt").write_text(ONE)
    with pytest.raises(ValueError, match=r"02-ellipseList\.txt:1: expected each image once.*first at .*01-ellipse.*:1"):
        read_annotations(folds)


def test_missing_files(folds, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected FDDB-fold-01-ellipseList\.txt and so on, got none"):
        read_annotations(tmp_path)
    (folds / "FDDB-fold-02.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"FDDB-fold-02\.txt: no such file; it lists the images of"):
        read_annotations(folds)


def test_bounding_boxes_enclose_the_outline_and_touch_it():
    rng = np.random.default_rng(0)
    ellipses = np.column_stack(
        [rng.uniform(1, 90, (50, 2)), rng.uniform(-math.pi, math.pi, 50), rng.normal(size=(50, 2))]
    )
    for (a, b, theta, x, y), box in zip(ellipses, bounding_boxes(ellipses)):
        t = np.linspace(0, 2 * math.pi, 20_000)
        outline_x = x + a * np.cos(t) * math.cos(theta) - b * np.sin(t) * math.sin(theta)
        outline_y = y + a * np.cos(t) * math.sin(theta) + b * np.sin(t) * math.cos(theta)
        outline = [outline_x.min(), outline_y.min(), outline_x.max(), outline_y.max()]
        np.testing.assert_allclose(box, outline, rtol=0, atol=1e-4)  # of the 20,000 points


def test_data_set(folds, tmp_path):
    root = tmp_path / "root"
    with pytest.raises(MissingDatasetError, match=r"(?s)FDDB-folds.*vis-www.*fddb/originalPics/2002 exists"):
        _ = Catalog(root=root)["fddb"].records
    (root / "fddb" / "originalPics").mkdir(parents=True)
    folds.rename(root / "fddb" / "FDDB-folds")
    source = Catalog(root=root)["fddb"]
    records, report = source.records, source.report
    assert [record.image_id for record in records] == [ONE, TWO, THREE]
    assert records[0].file_name == str(root / "fddb" / "originalPics" / f"{ONE}.jpg")
    assert (report.num_images, report.num_boxes, report.num_dropped) == (3, 3, 0)
    assert records[1].boxes[0].tolist() == [10, 15, 30, 25] and records[1].boxes.dtype == np.float32
    assert records[1].height is None and records[2].boxes.shape == (0, 4)
    assert not records[1].ignore.any() and records[1].classes.tolist() == [0, 0]

    (root / "fddb" / "FDDB-folds" / "image_sizes.csv").write_text(SIZES)
    records = Catalog(root=root)["fddb"].records
    assert (records[1].height, records[1].width) == (64, 72)
    assert records[1].boxes[1, 2] == 72  # clipped: the ellipse reaches to 73


def test_a_path_out_of_the_image_folder(folds, tmp_path):
    for name in ("FDDB-fold-01-ellipseList.txt", "FDDB-fold-01.txt"):
        (folds / name).write_text((folds / name).read_text().replace(ONE, "../../etc/passwd"))
    with pytest.raises(AnnotationError, match="expected an image path below the image folder"):
        read_records(folds, tmp_path)
    with pytest.raises(ValueError, match="expected a path below the image folder"):
        read_annotations(folds, tmp_path)


def test_real_annotations(reference_data):
    folder, numbers = reference_data.folder / "fddb/annotations", reference_data.numbers["fddb"]
    images = read_annotations(folder)
    assert len(images) == numbers["images"] and sum(len(image.ellipses) for image in images) == numbers["faces"]
    assert sorted({image.fold for image in images}) == list(range(1, numbers["folds"] + 1))
    records = read_records(folder, "images")
    assert sum(len(record.boxes) for record in records) == numbers["faces"]
