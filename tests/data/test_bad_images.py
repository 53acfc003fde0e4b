"""Image files as people have them: formats, pixel modes, EXIF, and what is no image at all."""

import logging
import os
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from group_sampling.data import images
from group_sampling.data.catalog import Catalog
from group_sampling.data.images import FORMATS, read_image, read_size
from group_sampling.data.loader import build_train_loader
from group_sampling.data.records import ImageRecord, UnreadableImageError, fit_exchanged_sides
from group_sampling.data.transforms import TrainTransform
from group_sampling.faces import as_image


def record(path, size=None, boxes=(), is_raw=False):
    height, width = size or (None, None)
    boxes = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    nothing = np.zeros(len(boxes), dtype=np.int64)
    return ImageRecord(str(path), path.name, height, width, boxes, nothing, nothing.astype(bool), is_raw=is_raw)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 6\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.eps"])
def test_no_interpreter_runs_on_an_image_file(tmp_path, monkeypatch, name):
    """Pillow gives PostScript to a program "gs", whatever the file is called."""
    marker, folder = tmp_path / "ran", tmp_path / "bin"
    folder.mkdir()
    (folder / "gs").write_text(f"#!/bin/sh\ntouch {marker}\n")
    (folder / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # what it found before
    path = tmp_path / name
    path.write_bytes(EPS)
    with pytest.raises(OSError):
        Image.open(path).load()
    assert marker.exists()  # this is what must not happen
    marker.unlink()
    for read in (lambda: read_image(record(path)), lambda: read_size(str(path)), lambda: as_image(path)):
        with pytest.raises(UnreadableImageError, match=r"expected an image \(BMP, GIF, JPEG, .*got another file"):
            read()
    assert not marker.exists()


def test_pillow_opens_images_in_one_place_only(repository):
    """A second Image.open would have no list of formats."""
    package = repository / "projects/GroupSampling"
    sources = [*package.glob("group_sampling/**/*.py"), *package.glob("tools/*.py")]
    found = [path.name for path in sources if "Image.open(" in path.read_text() or "imread(" in path.read_text()]
    assert found == ["images.py"]


def test_a_fifo_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    done = []

    def read():
        for function in (lambda: read_image(record(tmp_path / "a.jpg")), lambda: read_size(str(tmp_path / "a.jpg"))):
            with pytest.raises(UnreadableImageError, match="expected a regular file, got a FIFO"):
                function()
        done.append(True)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(20)
    assert done


RED, GRAY = (200, 30, 40), 100


@pytest.mark.parametrize(
    "name, mode, color, expected, tolerance",
    [
        ("a.png", "RGB", RED, RED, 0),
        ("a.bmp", "RGB", RED, RED, 0),
        ("a.ppm", "RGB", RED, RED, 0),
        ("a.gif", "RGB", RED, RED, 0),
        ("a.tif", "RGB", RED, RED, 0),
        ("a.webp", "RGB", RED, RED, 6),
        ("a.jpg", "RGB", RED, RED, 6),
        ("a.png", "RGBA", (*RED, 10), RED, 0),
        ("a.png", "L", GRAY, (GRAY,) * 3, 0),
        ("a.png", "LA", (GRAY, 10), (GRAY,) * 3, 0),
        ("a.png", "1", 1, (255,) * 3, 0),
        ("a.jpg", "CMYK", (55, 225, 215, 0), RED, 6),  # Pillow writes JPEG as Adobe does, inverted, and marks it so
        ("a.tif", "CMYK", (55, 225, 215, 0), RED, 0),  # TIFF has it as it is
        ("a.png", "I;16", 0, (0,) * 3, 0),
        ("a.png", "I;16", 65535, (255,) * 3, 0),
        ("a.png", "I;16", 257 * GRAY, (GRAY,) * 3, 0),
        ("a.tif", "I;16", 257 * GRAY + 128, (GRAY,) * 3, 0),
        ("a.tif", "I;16", 257 * GRAY + 129, (GRAY + 1,) * 3, 0),
        ("a.pgm", "I", 257 * GRAY, (GRAY,) * 3, 0),  # Pillow's mode for it has 32 bits
        ("a.tif", "F", 0.4, (102,) * 3, 0),
    ],
)
def test_every_mode_has_its_color(tmp_path, name, mode, color, expected, tolerance):
    path = tmp_path / name
    Image.new(mode, (24, 16), color).save(path)
    pixels = read_image(record(path))
    assert pixels.shape == (16, 24, 3) and pixels.dtype == np.uint8 and pixels.flags.writeable
    assert np.abs(pixels.astype(int) - expected).max() <= tolerance
    with Image.open(path) as image:
        assert np.array_equal(as_image(image), pixels)


def test_adobes_inverted_cmyk_is_told_by_its_bytes(tmp_path):
    """The ink of the file is 255 minus the ink meant, and the marker APP14 "Adobe" says who wrote it."""
    path = tmp_path / "a.jpg"
    Image.new("CMYK", (24, 16), (0, 0, 0, 0)).save(path)
    assert b"\xff\xee\x00\x0eAdobe" in path.read_bytes()
    assert read_image(record(path)).min() >= 250  # no ink is white paper


def test_big_endian_16_bits(tmp_path):
    values = np.arange(24 * 16, dtype=">u2").reshape(16, 24) * 170
    info = TiffImagePlugin.ImageFileDirectory_v2(b"MM\x00\x2a\x00\x00\x00\x00")
    Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo=info)
    with Image.open(tmp_path / "a.tif") as image:
        assert image.mode.startswith("I;16")
    expected = np.rint(values.astype(np.float64) / 257)
    assert np.array_equal(read_image(record(tmp_path / "a.tif"))[:, :, 0], expected)


def test_scaling_is_said_once(tmp_path, caplog):
    images._say_scaled.cache_clear()
    Image.new("I;16", (24, 16), 1000).save(tmp_path / "a.png")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            read_image(record(tmp_path / "a.png"))
    assert [entry.getMessage() for entry in caplog.records] == [
        "images of 16 bits a pixel are scaled to 8 by their range, 0 ... 65,535"
    ]


@pytest.mark.parametrize(
    "mode, color, message",
    [
        ("I", 70000, "expected 8 or 16 bits a pixel, got 32, whose range is not known; convert it"),
        ("F", 200.5, r"expected floats from 0 to 1, got 200\.5 \.\.\. 200\.5; convert it"),
        ("F", float("nan"), "expected floats from 0 to 1, got nan"),
    ],
)
def test_pixels_without_a_known_range_are_unreadable(tmp_path, mode, color, message):
    Image.new(mode, (24, 16), color).save(tmp_path / "a.tif")
    with pytest.raises(UnreadableImageError, match=rf"a\.tif: {message}"):
        read_image(record(tmp_path / "a.tif"))


def test_palettes_with_transparency(tmp_path):
    picture = Image.new("P", (24, 16), 1)
    picture.putpalette([0, 0, 0, *RED])
    picture.save(tmp_path / "a.png", transparency=0)
    assert np.array_equal(read_image(record(tmp_path / "a.png")), np.full((16, 24, 3), RED, dtype=np.uint8))


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_the_first_picture_of_an_animation(tmp_path, name):
    first, second = Image.new("RGB", (24, 16), RED), Image.new("RGB", (24, 16), (0, 0, 255))
    options = {"lossless": True} if name.endswith("webp") else {}
    first.save(tmp_path / name, save_all=True, append_images=[second], **options)
    with Image.open(tmp_path / name) as image:
        assert image.n_frames == 2
    assert np.array_equal(read_image(record(tmp_path / name)), np.full((16, 24, 3), RED, dtype=np.uint8))


def test_a_gigantic_image_says_what_allows_it(tmp_path, monkeypatch):
    """A PNG whose header announces 30,000 x 30,000 pixels."""
    path = tmp_path / "a.png"
    Image.new("1", (8, 8)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 30000, 30000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(bytes(content))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for read in (lambda: read_image(record(path)), lambda: read_size(str(path))):
        with pytest.raises(UnreadableImageError) as error:
            read()
        assert error.value.reason == (
            "900000000 pixels are more than allowed; GS_MAX_IMAGE_PIXELS=900000000 in the environment allows them"
        )


def test_the_variable_allows_it(monkeypatch):
    import importlib

    before = Image.MAX_IMAGE_PIXELS
    try:
        monkeypatch.setenv("GS_MAX_IMAGE_PIXELS", "900000001")
        importlib.reload(images)
        assert 2 * Image.MAX_IMAGE_PIXELS >= 900000001
    finally:
        Image.MAX_IMAGE_PIXELS = before
        monkeypatch.delenv("GS_MAX_IMAGE_PIXELS")
        importlib.reload(images)


def test_formats_are_known_to_pillow():
    Image.init()
    assert set(FORMATS) <= set(Image.OPEN)


# -- EXIF ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def turned(tmp_path):
    """A photograph of 40 x 20 stored pixels, to be shown as 20 x 40, whose top left stored quarter is red."""
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:10, :20] = RED
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    return tmp_path / "a.png"


def test_raw_records_are_not_turned(turned):
    upright, raw = read_image(record(turned)), read_image(record(turned, is_raw=True))
    assert upright.shape == (40, 20, 3) and raw.shape == (20, 40, 3)
    assert raw[0, 0].tolist() == list(RED) and upright[0, -1].tolist() == list(RED)
    assert read_size(str(turned)) == (40, 20) and read_size(str(turned), is_raw=True) == (20, 40)


def test_a_size_in_the_other_orientation_names_the_key(turned):
    with pytest.raises(UnreadableImageError, match=r"got 20x40 when upright; DATASETS\.APPLY_EXIF False takes"):
        read_image(record(turned, (20, 40)))
    with pytest.raises(UnreadableImageError, match=r"got 40x20 as stored; DATASETS\.APPLY_EXIF True takes"):
        read_image(record(turned, (40, 20), is_raw=True))


def test_the_key_reaches_the_records(turned):
    (turned.parent / "gt.txt").write_text("a.png\n1\n0 0 20 10 0 0 0 0 0 0\n")
    entry = ["mine", str(turned.parent / "gt.txt"), str(turned.parent)]
    for apply_exif in (True, False):
        (found,) = Catalog({"WIDER_FORMAT": [entry], "APPLY_EXIF": apply_exif})["mine"].records
        assert found.is_raw is not apply_exif


def identity(image, boxes, classes, ignore_boxes, record, draw):
    return record.file_name


@pytest.mark.parametrize("is_raw", [False, True])
def test_boxes_that_only_fit_the_other_orientation_are_noticed(turned, caplog, is_raw):
    """The box is of the stored pixels."""
    records = [record(turned, boxes=[[5, 2, 38, 15]], is_raw=is_raw)]
    transform = TrainTransform((1.0,), (64, 64), 0.0, 0.5)
    loader = build_train_loader(
        records, transform, identity, seed=0, images_per_batch=2, num_workers=0, max_bad_share=0.1
    )
    batches = iter(loader)
    with caplog.at_level(logging.WARNING):
        next(batches)
        next(batches)
    messages = [entry.getMessage() for entry in caplog.records if "sides exchanged" in entry.getMessage()]
    assert len(messages) == (0 if is_raw else 1)
    assert ("1 images have boxes that fit their other orientation alone" in loader.summary()) is not is_raw


def test_boxes_that_fit_neither_orientation_or_both_are_no_sign():
    assert fit_exchanged_sides(np.float32([[0, 0, 40, 20]]), 40, 20)
    for boxes in ([[0, 0, 20, 20]], [[0, 0, 50, 20]], [[0, 0, 40, 20], [0, 0, 20, 40]], []):
        assert not fit_exchanged_sides(np.float32(boxes).reshape(-1, 4), 40, 20)
    assert not fit_exchanged_sides(np.float32([[0, 0, 50, 20]]), 40, 40)


# -- lists of what was left out ---------------------------------------------------------------------------------------


@pytest.fixture
def some_broken(tmp_path):
    """Ten images, the last of them cut short."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    records = []
    for index in range(10):
        path = tmp_path / f"{index}.png"
        Image.fromarray(noise).save(path)
        records.append(record(path, boxes=[[2, 2, 20, 20]]))
    path.write_bytes(path.read_bytes()[:300])
    return records


def test_a_training_ends_with_the_list(some_broken):
    transform = TrainTransform((1.0,), (32, 32), 0.0, 0.5)
    loader = build_train_loader(
        some_broken, transform, identity, seed=0, images_per_batch=5, num_workers=0, max_bad_share=0.5
    )
    batches = iter(loader)
    for _ in range(4):
        next(batches)
    hits, file = loader.summary().splitlines()
    draws = f"{loader.num_skipped} of {20 + loader.num_skipped} draws"
    assert hits == f"{draws} hit one of 1 unreadable images, which were replaced:"
    assert file.startswith(f"  {some_broken[-1].file_name}: ")
