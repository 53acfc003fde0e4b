"""Headers of image files: what they tell before a run, read once as long as a file stays as it is."""

import json
import logging
import os

import numpy as np
import pytest
from PIL import Image

from group_sampling.data import check
from group_sampling.data.check import HeaderCache, check_images
from group_sampling.data.records import ImageRecord


def record(path, size=None, boxes=(), is_raw=False):
    boxes = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    nothing = np.zeros(len(boxes), dtype=np.int64)
    return ImageRecord(str(path), path.name, *(size or (None, None)), boxes, nothing, nothing != 0, is_raw=is_raw)


def save(path, size=(24, 16), mode="RGB", orientation=None):
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.new(mode, size).save(path, exif=exif)
    return path


@pytest.fixture
def reads(monkeypatch):
    """The files whose header was read."""
    files = []
    read = check.read_header
    monkeypatch.setattr(check, "read_header", lambda file: files.append(os.path.basename(file)) or read(file))
    return files


def test_every_kind_of_finding(tmp_path):
    inside = [2, 2, 12, 12]
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "fifo.jpg")
    records = [
        record(save(tmp_path / "good.png"), (16, 24), [inside]),
        record(save(tmp_path / "turned.png", orientation=6), (24, 16), [inside]),
        record(save(tmp_path / "raw.png", orientation=6), (16, 24), [inside], is_raw=True),
        record(save(tmp_path / "far.png"), None, [inside, [10, 10, 1e7, 20], [100, 2, 120, 9], [20, 2, 29, 9]]),
        record(save(tmp_path / "exchanged.png"), None, [[1, 1, 12, 23]]),
        record(save(tmp_path / "other.png"), (9, 9)),
        record(save(tmp_path / "deep.tif", mode="I")),
        record(tmp_path / "missing.jpg"),
        record(tmp_path / "text.jpg"),
        record(tmp_path / "folder.jpg"),
        record(tmp_path / "fifo.jpg"),
        record(tmp_path / "a\0b.jpg"),
        ImageRecord("synthetic://train/0", "0", 9, 9, *(np.zeros((0, 4), np.float32), np.zeros(0), np.zeros(0, bool))),
    ]
    found = check_images("mine", records, HeaderCache(tmp_path / "cache.json"))
    assert found.num_images == len(records)
    reasons = {os.path.basename(file): reason for file, reason in found.unreadable.items()}
    expected = {
        "other.png": "expected 9x9 pixels as annotated, got 24x16",
        "deep.tif": "expected 8 or 16 bits a pixel, got 32",
        "missing.jpg": "no such file",
        "text.jpg": "expected an image (BMP, GIF",
        "folder.jpg": "Is a directory",
        "fifo.jpg": "expected a regular file",
        "a\0b.jpg": "embedded null byte",
    }
    assert reasons.keys() == expected.keys()
    for name, start in expected.items():
        assert reasons[name].startswith(start), reasons[name]
    assert found.outside == {records[3].file_name: 2}
    assert found.exchanged == [records[4].file_name]


def test_a_header_is_read_again_when_its_file_changes(tmp_path, reads):
    paths = [save(tmp_path / f"{i}.png") for i in range(3)]
    records = [record(path, (16, 24)) for path in paths]
    file = tmp_path / "cache.json"

    def run():
        reads.clear()
        cache = HeaderCache(file)
        found = check_images("mine", records, cache)
        cache.save()
        return sorted(reads), list(map(os.path.basename, found.unreadable))

    assert run() == (["0.png", "1.png", "2.png"], [])
    written = file.stat().st_mtime_ns
    assert run() == ([], []) and file.stat().st_mtime_ns == written  # nothing new, nothing written
    save(paths[1], (30, 20))
    os.utime(paths[2], ns=(7, 7))
    assert run() == (["1.png", "2.png"], ["1.png"])
    paths[0].unlink()
    assert run() == (["0.png"], ["0.png", "1.png"])  # what could not be read is not remembered
    assert str(paths[0]) not in json.loads(file.read_text())["files"]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"version": 0, "files": {}}', '{"version": 1, "files": 3}', '{"version": 1, "files": {"%s": %s}}'],
)
@pytest.mark.parametrize("entry", ["[1, 2, 3]", '["a", 1, 1, 1, 1]', "null"])
def test_a_damaged_cache_is_started_anew(tmp_path, reads, content, entry):
    path = save(tmp_path / "a.png")
    (tmp_path / "cache.json").write_text(content % (path, entry) if "%" in content else content)
    cache = HeaderCache(tmp_path / "cache.json")
    assert not check_images("mine", [record(path, (16, 24))], cache).unreadable and reads == ["a.png"]
    cache.save()
    assert HeaderCache(tmp_path / "cache.json").read(str(path)).size(False) == (16, 24) and reads == ["a.png"]


def test_progress_is_told(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(check, "_PROGRESS_SECONDS", 0.0)
    path = save(tmp_path / "a.png")
    with caplog.at_level(logging.INFO):
        check_images("mine", [record(path)] * 130, HeaderCache(tmp_path / "cache.json"))
    assert [entry.getMessage() for entry in caplog.records] == [
        f"data set mine: checked {done} of 130 images" for done in (64, 128, 130)
    ]
