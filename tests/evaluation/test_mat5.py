"""The reader of MATLAB files against SciPy's writer and reader, and against files that it must refuse."""

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from group_sampling.evaluation.mat5 import read_mat5

DTYPES = ["f8", "f4", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"]


def plain(value):
    """SciPy's value as ours: cells as lists, texts as str."""
    if value.dtype == object:
        return [plain(entry) for entry in value.ravel(order="F")]
    return (str(value.item()) if value.size else "") if value.dtype.kind == "U" else value


def cell_array(values, shape):
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array.reshape(shape, order="F")


@pytest.mark.parametrize("compressed", [False, True])
def test_reads_what_scipy_writes(tmp_path, compressed):
    rng = np.random.default_rng(0)
    arrays = {f"v_{dtype}": (rng.random((3, 5)) * 120).astype(dtype) for dtype in DTYPES}
    arrays |= {"empty": np.zeros((0, 4)), "cube": np.arange(24.0).reshape(2, 3, 4), "flag": np.array([[True], [False]])}
    cells = cell_array([np.eye(2), "0_Parade_é", cell_array(["a", np.zeros((0, 0))], (1, 2)), ""], (2, 2))
    savemat(tmp_path / "a.mat", arrays | {"cells": cells, "other": {"a": 1}}, do_compression=compressed)
    values = read_mat5(tmp_path / "a.mat", [*arrays, "cells", "absent"])
    assert sorted(values) == sorted([*arrays, "cells"])
    expected = loadmat(tmp_path / "a.mat")
    for name in arrays:
        assert values[name].dtype == expected[name].dtype and np.array_equal(values[name], expected[name])
    np.testing.assert_equal(values["cells"], plain(expected["cells"]))


def test_big_endian(tmp_path):
    flags = struct.pack(">IIII", 6, 8, 6, 0)
    shape = struct.pack(">IIii", 5, 8, 1, 2)
    name = struct.pack(">HH4s", 1, 1, b"v")
    numbers = struct.pack(">IIhhxxxx", 3, 4, 258, -3)
    matrix = flags + shape + name + numbers
    header = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack(">H", 0x0100) + b"MI"
    (tmp_path / "a.mat").write_bytes(header + struct.pack(">II", 14, len(matrix)) + matrix)
    assert read_mat5(tmp_path / "a.mat", ["v"])["v"].tolist() == [[258.0, -3.0]]


@pytest.mark.parametrize("subset", ["face", "easy", "medium", "hard"])
def test_the_official_files(reference_data, subset):
    path = reference_data.folder / f"wider/ground_truth_mat/wider_{subset}_val.mat"
    names = ["event_list", "file_list", "face_bbx_list", "invalid_label_list", "gt_list"]
    values, expected = read_mat5(path, names), loadmat(path, variable_names=names)
    assert sorted(values) == sorted(name for name in names if name in expected)
    for name, value in values.items():
        np.testing.assert_equal(value, plain(expected[name]))


def nested_cells(depth):
    return cell_array([nested_cells(depth - 1) if depth > 1 else 1.0], (1, 1))


@pytest.mark.parametrize(
    "value, message",
    [
        (np.array([[1 + 2j]]), "an array of complex numbers, which is not supported"),
        ({"a": 1}, "an array of class 2, which is not supported"),
        (np.array(["ab", "cd"]), "a text of type"),
        (nested_cells(5), "more than 4 cell arrays inside each other"),
    ],
)
def test_refused_values(tmp_path, value, message):
    savemat(tmp_path / "a.mat", {"v": value})
    with pytest.raises(ValueError, match=rf"a\.mat: expected a MATLAB file .*{message}"):
        read_mat5(tmp_path / "a.mat", ["v"])
    assert read_mat5(tmp_path / "a.mat", ["w"]) == {}


def test_unpacking_is_bounded(tmp_path, monkeypatch):
    savemat(tmp_path / "a.mat", {"v": np.zeros(1 << 18)}, do_compression=True)
    monkeypatch.setattr("group_sampling.evaluation.mat5._MAX_VARIABLE_BYTES", 1 << 20)
    with pytest.raises(ValueError, match="cut off or larger than 1 MiB"):
        read_mat5(tmp_path / "a.mat", ["v"])


def test_a_file_that_crashes_scipy_is_an_error():
    """Two bytes of a cell array were changed, in the type and the number of dimensions of an element.

    scipy.io.loadmat dies of a segmentation fault on it (SciPy 1.17.1), which no caller can catch: the reason to have
    a reader of our own.
    """
    with pytest.raises(ValueError, match=r"damaged_cell\.mat: "):
        read_mat5(Path(__file__).with_name("damaged_cell.mat"), ["event_list"])


def element(kind, data):
    return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)


def array(array_class, name, shape, content):
    flags, dimensions = struct.pack("<II", array_class, 0), struct.pack(f"<{len(shape)}i", *shape)
    return element(14, element(6, flags) + element(5, dimensions) + element(1, name) + content)


def mat_file(matrix):
    return b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<H", 0x0100) + b"IM" + matrix


def deep_cells(depth):
    matrix = array(6, b"", (1, 1), element(9, struct.pack("<d", 1.0)))
    for level in range(depth):
        matrix = array(1, b"v" if level == depth - 1 else b"", (1, 1), matrix)
    return matrix


# Files that end the process in scipy.io.loadmat, which no caller can catch: the reason to have a reader of our own.
HOSTILE = {
    "numbers of a type that does not exist": array(6, b"v", (1, 1), element(99, bytes(8))),
    "20,000 cells inside each other": deep_cells(20_000),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files(tmp_path, content):
    path = tmp_path / "hostile.mat"
    path.write_bytes(mat_file(content))
    with pytest.raises(
        ValueError, match=r"hostile\.mat: expected a MATLAB file \(version 5 to 7\.2\), cannot read it: "
    ):
        read_mat5(path, ["v"])
    command = [sys.executable, "-c", "import sys, scipy.io; scipy.io.loadmat(sys.argv[1])", str(path)]
    code = subprocess.run(command, capture_output=True, timeout=120).returncode
    if code >= 0:
        pytest.skip("this SciPy survives the file: perhaps scipy.io.loadmat can replace evaluation/mat5.py")


def test_every_cut_is_an_error_or_a_shorter_file(tmp_path):
    """A file that ends early lacks variables or is refused; no content is made up."""
    rng = np.random.default_rng(0)
    savemat(tmp_path / "a.mat", {"v": cell_array([rng.random((2, 3)), "text"], (2, 1)), "w": rng.random(5)})
    content = (tmp_path / "a.mat").read_bytes()
    whole, refused = read_mat5(tmp_path / "a.mat", ["v", "w"]), 0
    for size in range(len(content)):
        (tmp_path / "cut.mat").write_bytes(content[:size])
        try:
            values = read_mat5(tmp_path / "cut.mat", ["v", "w"])
        except ValueError as error:
            assert "cut.mat: expected a MATLAB file" in str(error)
            refused += 1
        else:
            np.testing.assert_equal(values, {name: whole[name] for name in values})
    assert refused > 0.9 * len(content)
