"""Prediction files: exact round trip, every malformed line named, archives that are no archives or unsafe."""

import gzip
import io
import lzma
import re
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from group_sampling.evaluation import read_predictions, write_predictions

GOOD = b"big\n2\n1 2 3 4 0.5\n5 6 7 8 0.25 \n"


def make_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def make_tar(path, files, mode="w:xz"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def make_folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


CONTAINERS = {
    "folder": lambda path, files: make_folder(path / "predictions", files),
    "zip": lambda path, files: make_zip(path / "predictions.zip", files),
    "tar": lambda path, files: make_tar(path / "predictions.tar", files, "w"),
    "tar.gz": lambda path, files: make_tar(path / "predictions.tar.gz", files, "w:gz"),
    "tar.xz": lambda path, files: make_tar(path / "predictions.tar.xz", files),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_reads_the_same(tmp_path, container):
    files = {
        "0--Parade/big.txt": GOOD,
        "0--Parade/.hidden.txt": b"x",
        "0--Parade/big.jpg": b"x",
        "1--Fire/none.txt": b"none.jpg\r\n0\r\n",
        "notes.md": b"x",
        "__MACOSX/0--Parade/._big.txt": b"x",
    }
    if container == "folder":
        files = {name: content for name, content in files.items() if not name.startswith("__MACOSX")}
    (first_id, first), (second_id, second) = read_predictions(CONTAINERS[container](tmp_path, files))
    assert (first_id, second_id) == ("0--Parade/big", "1--Fire/none")
    assert first.boxes.tolist() == [[1, 2, 4, 6], [5, 6, 12, 14]] and first.scores.tolist() == [0.5, 0.25]
    assert second.boxes.shape == (0, 4) and second.scores.shape == (0,)


@pytest.mark.parametrize("container", ["zip", "tar"])
def test_folders_above_the_events_in_an_archive(tmp_path, container):
    path = CONTAINERS[container](tmp_path, {"results/val/0--Parade/big.txt": GOOD})
    assert [image_id for image_id, _ in read_predictions(path)] == ["0--Parade/big"]


@pytest.mark.parametrize("name", ["big", "big.jpg", "0--Parade/big.jpg", "C:\\faces\\big.JPEG", "  big  "])
def test_names_on_the_first_line(tmp_path, name):
    make_folder(tmp_path, {"0--Parade/big.txt": GOOD.replace(b"big", name.encode())})
    assert [image_id for image_id, _ in read_predictions(tmp_path)] == ["0--Parade/big"]


ROW = r"expected 'x y w h score', finite numbers with w and h not negative, got "


@pytest.mark.parametrize(
    "content, line, message",
    [
        (b"bi\n0\n", 1, "expected the image name 'big', got 'bi'"),
        (b"big", 2, "expected the number of detections, got the end of the file"),
        (b"big\ntwo\n", 2, "expected the number of detections, got 'two'"),
        (b"big\n-1\n", 2, "expected the number of detections, got '-1'"),
        (b"big\n1.5\n1 2 3 4 5\n", 2, "expected the number of detections, got '1.5'"),
        (b"big\n2\n1 2 3 4 0.5\n", 2, "expected as many lines as it says, 2, got 1"),
        (b"big\n1\n1 2 3 4 0.5\n1 2 3 4 0.5\n", 2, "expected as many lines as it says, 1, got 2"),
        (b"big\n2\n1 2 3 4 0.5\n1 2 3 4\n", 4, ROW + "'1 2 3 4'"),
        (b"big\n1\n1 2 3 4 0.5 6\n", 3, ROW + "'1 2 3 4 0.5 6'"),
        (b"big\n2\n\n1 2 3 4 0.5\n", 3, ROW + "''"),
        (b"big\n1\n1,2,3,4,0.5\n", 3, ROW + "'1,2,3,4,0.5'"),
        (b"big\n1\n1 2 x 4 0.5\n", 3, ROW),
        (b"big\n1\n1 2 3 4 nan\n", 3, ROW + "'1 2 3 4 nan'"),
        (b"big\n2\n1 2 3 4 1\n1 2 inf 4 1\n", 4, ROW + "'1 2 inf 4 1'"),
        (b"big\n1\n1 2 3 4 1e999\n", 3, ROW),
        (b"big\n1\n1 2 -3 4 0.5\n", 3, ROW + "'1 2 -3 4 0.5'"),
        (b"big\n1\n1_0 2 3 4 0.5\n", 3, ROW),
        (b"big\n1\n\xff\xfe 2 3 4 0.5\n", 3, ROW),
    ],
)
def test_malformed_files_are_named_by_line(tmp_path, content, line, message):
    make_folder(tmp_path, {"0--Parade/big.txt": content})
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/0--Parade/big.txt:{line}: {message}")):
        list(read_predictions(tmp_path))


def test_an_underscore_in_the_name_is_fine(tmp_path):
    make_folder(tmp_path, {"0--Parade/0_big.txt": GOOD.replace(b"big", b"0_big")})
    assert len(next(read_predictions(tmp_path))[1].scores) == 2


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_data_set_without_events(tmp_path, container):
    written = write_predictions(tmp_path / "written", "big.png", [[1, 2, 4, 6]], [0.5])
    assert written == tmp_path / "written" / "big.txt"
    ((image_id, found),) = read_predictions(CONTAINERS[container](tmp_path, {"big.txt": written.read_bytes()}))
    assert image_id == "big" and found.boxes.tolist() == [[1, 2, 4, 6]]


def test_an_image_that_comes_twice(tmp_path):
    path = make_zip(tmp_path / "p.zip", {"a/0--Parade/big.txt": GOOD, "b/0--Parade/big.txt": GOOD})
    with pytest.raises(
        ValueError,
        match=r"b/0--Parade/big.txt: expected each image once, got '0--Parade/big' again, first in",
    ):
        list(read_predictions(path))


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match=r"expected files <event>/<image>\.txt, got none"):
        list(read_predictions(tmp_path))
    with pytest.raises(FileNotFoundError, match="no such folder or archive"):
        list(read_predictions(tmp_path / "nobody.zip"))


@pytest.mark.parametrize("content", [b"", b"hello", GOOD * 1000, b"PK\x03\x04rest", b"PK\x05\x06"])
def test_not_an_archive(tmp_path, content):
    path = tmp_path / "predictions.zip"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"predictions.zip: expected a ZIP or tar archive, cannot read it"):
        list(read_predictions(path))


@pytest.mark.parametrize("damage", ["header", "cut"])
@pytest.mark.parametrize("container", ["tar", "tar.gz", "tar.xz"])
def test_a_tar_that_ends_too_early_is_not_taken_for_a_short_one(tmp_path, container, damage):
    plain = make_tar(tmp_path / "plain.tar", {"0--Parade/big.txt": GOOD, "0--Parade/none.txt": b"none\n0\n"}, "w")
    content = bytearray(plain.read_bytes())
    if damage == "header":
        content[1024 + 5] ^= 1  # in the name of the second member: its checksum fails
    else:
        del content[1024:]
    path = tmp_path / f"damaged.{container}"
    opener = {"tar": open, "tar.gz": gzip.open, "tar.xz": lzma.open}[container]
    with opener(path, "wb") as stream:
        stream.write(content)
    with pytest.raises(ValueError, match="cannot read it: no member and no end mark at byte 1024"):
        list(read_predictions(path))


UNSAFE = ["../0--Parade/big.txt", "/0--Parade/big.txt", "0--Parade/../../big.txt", "0--Parade\\big.txt"]


@pytest.mark.parametrize("name", UNSAFE)
@pytest.mark.parametrize("container", ["zip", "tar"])
def test_unsafe_members_are_refused(tmp_path, container, name):
    path = CONTAINERS[container](tmp_path, {"0--Parade/ok.txt": GOOD.replace(b"big", b"ok"), name: GOOD})
    with pytest.raises(ValueError, match=r"expected files and folders under relative paths, got the unsafe member"):
        list(read_predictions(path))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "p.tar", "w") as archive:
        member = tarfile.TarInfo("0--Parade/big.txt")
        member.type, member.linkname = kind, "/etc/hostname"
        archive.addfile(member)
    with pytest.raises(ValueError, match=r"unsafe member '0--Parade/big\.txt'"):
        list(read_predictions(tmp_path / "p.tar"))


def test_links_in_a_zip_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        member = zipfile.ZipInfo("0--Parade/big.txt")
        member.external_attr = 0o120777 << 16
        archive.writestr(member, "/etc/hostname")
    with pytest.raises(ValueError, match="unsafe member"):
        list(read_predictions(tmp_path / "p.zip"))


@pytest.mark.parametrize("container", ["folder", "zip", "tar.xz"])
def test_a_file_that_would_exhaust_memory_is_refused(tmp_path, container, monkeypatch):
    monkeypatch.setattr("group_sampling.evaluation.wider_face.files._MAX_FILE_BYTES", 1 << 20)
    path = CONTAINERS[container](tmp_path, {"0--Parade/big.txt": GOOD + b" " * (1 << 20)})
    with pytest.raises(ValueError, match=r"big.txt: expected at most 1 MiB for one image, got more"):
        list(read_predictions(path))


coordinates = st.floats(-4096, 4096, width=32)
detections = st.lists(st.tuples(coordinates, coordinates, st.floats(0, 4096, width=32), st.floats(0, 4096, width=32)))


@given(rows=detections, seed=st.integers(0, 1000))
def test_float32_detections_come_back_bit_for_bit(tmp_path_factory, rows, seed):
    boxes = np.array(rows, dtype=np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    scores = np.random.default_rng(seed).random(len(boxes), dtype=np.float32)
    root = tmp_path_factory.mktemp("round")
    path = write_predictions(root, "0--Parade/big.jpg", torch.from_numpy(boxes), torch.from_numpy(scores))
    assert path == root / "0--Parade" / "big.txt"
    ((image_id, found),) = read_predictions(root)
    order = np.argsort(-scores, kind="stable")
    assert image_id == "0--Parade/big"
    assert np.array_equal(found.boxes.astype(np.float32), boxes[order])
    assert np.array_equal(found.scores.astype(np.float32), scores[order])


def test_the_written_file_is_the_published_format(tmp_path):
    path = write_predictions(tmp_path, "0--Parade/0_big.jpg", [[1, 2, 4, 6.5], [0, 0, 9, 9]], [0.25, 0.5])
    assert path.read_text() == "0_big\n2\n0.0 0.0 9.0 9.0 0.5\n1.0 2.0 3.0 4.5 0.25\n"
    assert write_predictions(tmp_path, "0--Parade/0_none", [], []).read_text() == "0_none\n0\n"
    assert sorted(file.name for file in (tmp_path / "0--Parade").iterdir()) == ["0_big.txt", "0_none.txt"]


@pytest.mark.parametrize(
    "image_id",
    ["", ".", "..", "/big", "a/", "a/b/c", "../big", "a/..", ".a/big", "a/.big", "a\\b/big", "a/b\nc", "a/b\0"],
)
def test_refused_image_ids(tmp_path, image_id):
    with pytest.raises(ValueError, match=r"image_id: expected \[<event>/\]<image name>"):
        write_predictions(tmp_path / "root", image_id, [], [])
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    "boxes, scores, message",
    [
        ([[0, 0, 9]], [1], r"expected boxes \(k, 4\) and scores \(k,\), got \(1, 3\) and \(1,\)"),
        ([[0, 0, 9, 9]], [1, 2], r"got \(1, 4\) and \(2,\)"),
        ([[0, 0, 9, 9], [0, 9, 9, 0]], [1, 2], r"boxes\[1\] = \[0.0, 9.0, 9.0, 0.0\]"),
        ([[0, 0, 9, 9]], [float("nan")], r"scores\[0\] = nan"),
        ([[0, 0, float("inf"), 9]], [1], "expected finite numbers"),
    ],
)
def test_refused_detections_write_nothing(tmp_path, boxes, scores, message):
    with pytest.raises(ValueError, match=message):
        write_predictions(tmp_path / "root", "a/b", boxes, scores)
    assert not (tmp_path / "root").exists()


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_predictions(tmp_path, "a/b", [[0, 0, 9, 9]], [1])
    before = path.read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_predictions(tmp_path, "a/b", [], [])
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


def mutate(rng, content):
    """Damage that transfers, editors and scripts do: bits, bytes, blocks, lines and numbers."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        kind, at = rng.integers(8), int(rng.integers(len(data) + 1))
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.integers(8)
        elif kind == 1:
            data[at:at] = rng.bytes(rng.integers(1, 9))
        elif kind == 2:
            del data[at : at + rng.integers(1, 40)]
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            data[at:at] = data[at : at + rng.integers(1, 200)]
        elif kind == 5:
            lines = data.split(b"\n")
            lines.insert(rng.integers(len(lines)), lines[rng.integers(len(lines))])
            data = bytearray(b"\n".join(lines))
        elif kind == 6:
            words = re.split(rb"(\s)", bytes(data))
            words[rng.integers(len(words))] = rng.choice([b"nan", b"-inf", b"-7", b"1e999", b"", b"1_0", b"0x1", b"\0"])
            data = bytearray(b"".join(words))
        else:
            data[at : at + 16] = bytes(16)
    return bytes(data)


def read_mutated(path, seed, container):
    """Read a damaged result set: True when it was refused as documented. Any other error, or a wrong value, fails."""
    rng = np.random.default_rng(seed)
    files = {f"0--Parade/img{i}.txt": GOOD.replace(b"big", f"img{i}".encode()) for i in range(4)}
    if container == "folder" or seed % 2:
        name = f"0--Parade/img{rng.integers(4)}.txt"
        files[name] = mutate(rng, files[name])
        source = CONTAINERS[container](path, files)
    else:
        source = CONTAINERS[container](path, files)
        source.write_bytes(mutate(rng, source.read_bytes()))
    try:
        for _, found in read_predictions(source):
            assert np.isfinite(found.boxes).all() and np.isfinite(found.scores).all(), seed
            assert (found.boxes[:, 2:] >= found.boxes[:, :2]).all() and len(found.boxes) == len(found.scores), seed
    except ValueError as error:
        assert str(source) in str(error), seed
        return True
    return False


@pytest.mark.parametrize("container", CONTAINERS)
def test_mutated_files(tmp_path, container):
    seeds = range(zlib.crc32(container.encode()) % 1000, 1 << 20)
    refused = 0
    for seed in seeds[:70]:
        (tmp_path / str(seed)).mkdir()
        refused += read_mutated(tmp_path / str(seed), seed, container)
    assert refused > 35


@pytest.mark.slow
@pytest.mark.parametrize("container", CONTAINERS)
def test_many_mutated_files(tmp_path, container):
    for seed in range(1500):
        (tmp_path / str(seed)).mkdir()
        read_mutated(tmp_path / str(seed), seed, container)
