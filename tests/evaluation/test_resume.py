"""Files of half-finished evaluations: what was written is read bit for bit, what is damaged or outdated is left out."""

import logging

import numpy as np
import pytest

from group_sampling.detections import Detections
from group_sampling.evaluation.resume import PartialDetections


def detections(seed, with_scales=True):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(0, 5))
    boxes = rng.uniform(0, 100, (count, 4)).astype(np.float32)
    scales = rng.choice([16, 32], count).astype(np.float32) if with_scales else None
    found = Detections(boxes, rng.random(count, dtype=np.float32), rng.integers(0, 3, count), scales)
    if not with_scales or seed % 2:
        return found
    return found._replace(sub_detectors={16.0: found.select(slice(2, None)), 45.2548: detections(seed + 101, False)})


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for image_id, ours in found.items():
        for mine, theirs in zip(ours, expected[image_id], strict=True):
            assert (mine is None) == (theirs is None)
            if isinstance(mine, dict):
                assert_equal(mine, theirs)
            elif mine is not None:
                assert mine.dtype == theirs.dtype and mine.shape == theirs.shape and np.array_equal(mine, theirs)


@pytest.mark.parametrize("with_scales", [True, False])
def test_read_is_what_was_written(tmp_path, with_scales):
    images = {f"0--Événement/{i}": detections(i, with_scales) for i in range(20)}
    writer = PartialDetections(tmp_path / "partial", "a", max_images=6)
    assert not writer.exist()
    for image_id, found in images.items():
        writer.add(image_id, found)
    assert len(list((tmp_path / "partial").iterdir())) == 3  # 18 images; the other two are not due yet
    assert_equal(PartialDetections(tmp_path / "partial", "a").read(), dict(list(images.items())[:18]))
    writer.write()
    assert_equal(PartialDetections(tmp_path / "partial", "a").read(), images)
    writer.remove()
    assert not (tmp_path / "partial").exists() and writer.read() == {} and not writer.exist()


def test_written_after_some_time(tmp_path):
    writer = PartialDetections(tmp_path, "a", max_images=100, max_seconds=0)
    writer.add("x", detections(1))
    assert list(writer.read()) == ["x"]


def test_two_processes_in_one_folder(tmp_path):
    for rank in range(2):
        writer = PartialDetections(tmp_path, "a", max_images=1)
        for image in range(rank, 6, 2):
            writer.add(f"{image}", detections(image))
    assert_equal(PartialDetections(tmp_path, "a").read(), {f"{i}": detections(i) for i in range(6)})


def test_another_fingerprint(tmp_path, caplog):
    PartialDetections(tmp_path, "a", max_images=1).add("x", detections(1))
    with caplog.at_level(logging.WARNING):
        assert PartialDetections(tmp_path, "b").read() == {}
    assert "1 files of an interrupted evaluation are of other weights" in caplog.text


def test_damage_is_noticed(tmp_path, caplog):
    """Any flipped bit, any cut: the file is left out, the others are read."""
    writer = PartialDetections(tmp_path, "a", max_images=2)
    for image in range(4):
        writer.add(f"{image}", detections(image))
    first = min(tmp_path.iterdir())
    sound, rng = first.read_bytes(), np.random.default_rng(0)
    kept = PartialDetections(tmp_path, "a").read()
    first.unlink()
    expected = PartialDetections(tmp_path, "a").read()
    assert len(kept) == 4 and len(expected) == 2
    for _ in range(300):
        data = bytearray(sound)
        if rng.random() < 0.5:
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        else:
            del data[rng.integers(len(data)) :]
        first.write_bytes(data)
        caplog.clear()
        assert_equal(PartialDetections(tmp_path, "a").read(), expected)
        assert f"{first} is damaged and left out" in caplog.text


def test_what_an_interrupted_write_leaves_is_no_file(tmp_path):
    (tmp_path / ".abc.part.123.tmp").write_bytes(b"half")
    partial = PartialDetections(tmp_path, "a")
    assert partial.read() == {}
    partial.remove()
    assert not tmp_path.exists()
