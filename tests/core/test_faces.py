"""Images of all kinds become the same pixels, and a picture shows the boxes that it is given."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from group_sampling.data.records import UnreadableImageError
from group_sampling.faces import Faces, as_image, scale_color

SCALES = (16.0, 32.0, 64.0)


def make_faces(boxes, anchor_scales, size=(200, 300), scores=None) -> Faces:
    scores = np.full(len(boxes), 0.75) if scores is None else scores
    return Faces(
        np.asarray(boxes, dtype=np.float32).reshape(-1, 4),
        np.asarray(scores, dtype=np.float32),
        np.zeros(len(boxes), dtype=np.int64),
        np.asarray(anchor_scales, dtype=np.float32),
        size,
        ("face",),
        SCALES,
    )


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def test_every_kind_of_image_gives_its_pixels(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    tensor = torch.tensor(pixels).permute(2, 0, 1)
    kinds = [
        *(tmp_path / "a.png", str(tmp_path / "a.png"), pixels, tensor, Image.fromarray(pixels)),
        *(pixels / np.float32(255), tensor.double() / 255, (tensor / 255).requires_grad_()),
    ]
    for image in kinds:
        found = as_image(image)
        assert found.dtype == np.uint8 and np.array_equal(found, pixels)
    gray = pixels[:, :, 0]
    for image in (gray, gray[:, :, None], torch.tensor(gray)[None], Image.fromarray(gray)):
        assert np.array_equal(as_image(image), np.stack([gray] * 3, axis=2))


def test_pillow_images_and_files_are_turned_upright(tmp_path, pixels):
    exif = Image.Exif()
    exif[274] = 6  # to be turned clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    upright = np.rot90(pixels, -1)
    assert np.array_equal(as_image(tmp_path / "turned.png"), upright)
    with Image.open(tmp_path / "turned.png") as image:
        assert np.array_equal(as_image(image), upright)


@pytest.mark.parametrize(
    "image, expected",
    [
        (np.full((4, 4, 3), 255.0), r"float values in \[0, 1\], got 255 \.\.\. 255; convert 0 \.\.\. 255 to uint8"),
        (np.full((4, 4, 3), -0.5), r"float values in \[0, 1\], got -0\.5"),
        (np.full((4, 4, 3), np.nan), r"float values in \[0, 1\], got nan"),
        (np.zeros((4, 4, 3), dtype=np.int64), "expected uint8 .* or float .*, got int64"),
        (np.zeros((3, 4, 4), dtype=np.uint8), r"expected an array \(H, W, 3\) or \(H, W\), got \(3, 4, 4\)"),
        (np.zeros((4, 4, 4), dtype=np.uint8), r"expected an array \(H, W, 3\)"),
        (torch.zeros(4, 4, 3), r"expected a tensor \(3, H, W\) or \(1, H, W\), got \(4, 4, 3\)"),
        (np.zeros((0, 4, 3), dtype=np.uint8), "expected at least one pixel"),
        (7, "expected a path, .*, got int"),
    ],
)
def test_other_images_are_refused(image, expected):
    with pytest.raises((TypeError, ValueError), match=expected):
        as_image(image)


def test_missing_file(tmp_path):
    with pytest.raises(UnreadableImageError, match="no such file"):
        as_image(tmp_path / "nowhere.jpg")


def test_rows_json_and_selection():
    faces = make_faces([[1, 2, 31, 42], [5, 5, 9, 9]], [32, 16], scores=[0.9, 0.1])
    assert len(faces) == 2
    first, second = faces
    assert first.box == (1, 2, 31, 42) and first.class_name == "face" and first.anchor_scale == 32
    content = json.loads(faces.to_json())
    assert (content["height"], content["width"]) == (200, 300)
    assert content["faces"][1]["box"] == [5, 5, 9, 9] and content["faces"][1]["anchor_scale"] == 16
    assert [np.float32(face["score"]) for face in content["faces"]] == faces.scores.tolist()
    assert [face.score for face in faces.select(faces.scores < 0.5)] == [second.score]
    without = Faces(faces.boxes, faces.scores, faces.classes, None, (200, 300))
    assert "anchor_scale" not in without.to_dict()["faces"][0] and without.select(slice(1)).anchor_scales is None


def test_picture_has_outlines_in_the_color_of_their_scale():
    black = np.zeros((200, 300, 3), dtype=np.uint8)
    faces = make_faces([[10, 20, 20, 30], [100, 50, 200, 150]], [16, 64])
    picture = np.asarray(faces.draw(black, legend=False))
    assert picture.shape == black.shape and not black.any()
    for (x1, y1, x2, y2), scale in zip(faces.boxes.astype(int).tolist(), (16, 64)):
        color = scale_color(SCALES, scale)
        for x, y in ((x1, (y1 + y2) // 2), (x2, (y1 + y2) // 2), ((x1 + x2) // 2, y2)):
            assert tuple(picture[y, x]) == color
        assert not picture[y1 + 6 * (y2 - y1) // 10, (x1 + x2) // 2].any()  # the face itself stays visible
    # The thin outline of the small face, the thick one of the large.
    assert not picture[25, 12].any() and picture[100, 101].any()
    assert len({scale_color(SCALES, scale) for scale in SCALES}) == 3


def test_legend_is_of_one_height_whatever_is_found():
    black = np.zeros((200, 300, 3), dtype=np.uint8)
    boxes = [[10, 20, 20, 30]] * 999
    pictures = [make_faces(boxes[:n], [16] * n).draw(black) for n in (0, 1, 999)]
    assert len({picture.size for picture in pictures}) == 1 and pictures[0].height > 200
    strips = [np.asarray(picture)[200:] for picture in pictures]
    assert all((strip == scale_color(SCALES, scale)).all(axis=2).any() for strip in strips for scale in SCALES)
    assert not np.array_equal(strips[1], strips[2])  # the counts
    without = Faces(*(getattr(make_faces([], []), name) for name in ("boxes", "scores", "classes")), None, (200, 300))
    assert without.draw(black).height > 200


def test_scores_are_written_beside_few_and_large_faces_only():
    black = np.zeros((400, 600, 3), dtype=np.uint8)
    large, small = [100, 100, 300, 300], [100, 100, 116, 116]

    def is_labeled(boxes):
        picture = np.asarray(make_faces(boxes, [64] * len(boxes), (400, 600)).draw(black, legend=False))
        return (picture == 255).all(axis=2).any()  # white on violet

    assert is_labeled([large]) and not is_labeled([small]) and not is_labeled([large] * 41)


def test_draw_refuses_another_image():
    with pytest.raises(ValueError, match="expected the image of these faces, 300x200 pixels, got 30x20"):
        make_faces([], []).draw(np.zeros((20, 30, 3), dtype=np.uint8))
