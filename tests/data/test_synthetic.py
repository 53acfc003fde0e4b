import hashlib
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from group_sampling.data.images import read_image
from group_sampling.data.records import AnnotationError
from group_sampling.data.synthetic import layout, records, render
from group_sampling.data.synthetic_scene import DISTRACTORS, Settings

SMALL = Settings(num_train=6, num_val=6, height=120, width=160, seed=0)
LARGE = Settings(num_train=500, num_val=0, height=480, width=640, seed=0)


def test_records_are_well_formed():
    found = records("train", replace(LARGE, num_train=40))
    assert len({record.image_id for record in found}) == len({record.file_name for record in found}) == 40
    for record in found:
        assert (record.height, record.width) == (480, 640)
        assert record.boxes.dtype == np.float32 and len(record.boxes) == len(record.classes) == len(record.ignore)
        assert (record.boxes >= 0).all() and (record.boxes <= [640, 480, 640, 480]).all()
        assert (record.boxes[:, 2:] > record.boxes[:, :2]).all()
        assert not record.ignore.any() and not record.classes.any()


def test_the_address_alone_determines_the_image():
    (first, *_), (again, *_) = records("val", SMALL), records("val", replace(SMALL, num_val=1, num_train=99))
    assert first.file_name == again.file_name
    assert np.array_equal(read_image(first), read_image(again))
    image = read_image(first)
    assert image.shape == (120, 160, 3) and image.dtype == np.uint8 and image.flags.writeable


def test_same_bytes_in_another_process():
    addresses = [record.file_name for record in records("train", SMALL)]
    program = (
        "import hashlib, sys; from group_sampling.data.synthetic import render;"
        "print(*(hashlib.sha256(render(a).tobytes()).hexdigest() for a in reversed(sys.argv[1:])))"
    )
    output = subprocess.run([sys.executable, "-c", program, *addresses], capture_output=True, text=True, check=True)
    assert output.stdout.split() == [hashlib.sha256(render(a).tobytes()).hexdigest() for a in reversed(addresses)]


def test_splits_and_seeds_have_nothing_in_common():
    sets = [records("train", SMALL), records("val", SMALL), records("train", replace(SMALL, seed=1))]
    images = {read_image(record).tobytes() for found in sets for record in found}
    layouts = {record.boxes.tobytes() for found in sets for record in found if len(record.boxes)}
    assert len(images) == 18
    assert len(layouts) == sum(len(record.boxes) > 0 for found in sets for record in found)


def test_sizes_are_log_uniform_from_8_to_400_pixels():
    boxes = np.concatenate([record.boxes for record in records("train", LARGE)])
    sizes = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1))
    counts, _ = np.histogram(sizes, 8 * 2.0 ** np.arange(6))  # octaves up to 256; the last one is not whole
    shares = counts / len(sizes)
    assert 4 < len(boxes) / 500 < 8
    # 1 / log2(400 / 8) = 0.18 each, give or take what is left out for lack of room
    assert (shares > 0.14).all() and (shares < 0.22).all()
    assert sizes.max() < 401 and sizes.max() > 330
    aspects = (boxes[:, 3] - boxes[:, 1]) / (boxes[:, 2] - boxes[:, 0])
    assert 1.1 < np.median(aspects) < 1.3


def _inside(shape, x, y):
    cos, sin = np.cos(shape.angle), np.sin(shape.angle)
    u = ((x - shape.x) * cos + (y - shape.y) * sin) / shape.half_width
    v = (-(x - shape.x) * sin + (y - shape.y) * cos) / shape.half_height
    return u**2 + v**2 <= 1 if shape.is_ellipse else (abs(u) <= 1) & (abs(v) <= 1)


def test_every_labeled_face_shows_40_percent_of_itself_or_more():
    """Paints figure numbers, far to near, on a grid of quarter pixels around each head, and counts."""
    hidden = 0
    for index in range(25):
        scene = layout("train", index, 240, 320, 0)
        for position, figure in enumerate(scene.figures):
            if figure.kind != "face":
                continue
            x1, y1, x2, y2 = figure.head.bounding_box()
            step = max(0.25, (x2 - x1) / 60)
            x, y = np.meshgrid(np.arange(x1, x2, step), np.arange(y1, y2, step))
            head = _inside(figure.head, x, y)
            visible = head & (x >= 0) & (x < 320) & (y >= 0) & (y < 240)
            covers = [
                figure.occluder,
                *(s for f in scene.figures[position + 1 :] for s in (f.body, f.head, f.occluder)),
            ]
            for cover in covers:
                if cover is not None:
                    visible &= ~_inside(cover, x, y)
            share = visible.sum() / head.sum()
            assert share > 0.4
            hidden += share < 0.8
    assert hidden > 5  # occlusion does occur


def test_boxes_enclose_the_heads():
    scene = layout("val", 3, 480, 640, 0)
    faces = [figure.head for figure in scene.figures if figure.kind == "face"]
    assert len(faces) == len(scene.boxes()) > 0
    angle = np.linspace(0, 2 * np.pi, 2000)
    for head, box in zip(faces, scene.boxes()):
        x, y = head.at(np.stack([np.cos(angle), np.sin(angle)], axis=1)).T
        expected = [x.min().clip(0), y.min().clip(0), x.max().clip(max=640), y.max().clip(max=480)]
        assert np.allclose(box, expected, atol=0.01)


def test_figures_are_painted_far_to_near_and_all_kinds_occur():
    kinds = set()
    for index in range(60):
        figures = layout("train", index, 480, 640, 0).figures
        areas = [np.prod(np.subtract(f.head.bounding_box()[2:], f.head.bounding_box()[:2])) for f in figures]
        assert areas == sorted(areas)
        kinds |= {figure.kind for figure in figures}
    assert kinds == {"face", *DISTRACTORS}


@pytest.mark.parametrize("height, width", [(32, 32), (33, 201), (200, 47), (700, 500)])
def test_other_image_sizes(height, width):
    for index in range(8):
        image = render(f"synthetic://train/{index}?height={height}&width={width}&seed=0")
        assert image.shape == (height, width, 3)
        assert image.std() > 1


@pytest.mark.parametrize(
    "address",
    [
        "synthetic://train/0",
        "synthetic://test/0?height=64&width=64&seed=0",
        "synthetic://train/x?height=64&width=64&seed=0",
        "synthetic://train/-1?height=64&width=64&seed=0",
        "synthetic://train/0?height=64&width=1e9&seed=0",
        "synthetic://train/0?height=1&width=64&seed=0",
    ],
)
def test_bad_addresses(address):
    with pytest.raises(AnnotationError, match=r"expected an address synthetic://<train\|val>"):
        render(address)
