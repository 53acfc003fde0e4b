"""Result files as other projects write them, and those that would exhaust time, memory or a disk."""

import io
import os
import runpy
import tarfile
import threading
import zipfile

import numpy as np
import pytest

from group_sampling.data import fddb
from group_sampling.detections import Detections
from group_sampling.evaluation import read_fddb_predictions, read_predictions, write_predictions
from group_sampling.evaluation.results import UnitCheck
from group_sampling.evaluation.wider_face import files
from group_sampling.files import save_figure

ROWS = ["93.3 8.8 48.4 48.1 0.9", "9.3 25.8 36.4 36.1 0.8"]
LANDMARKS = " 1.0 2.0 3.0 4.0 5.0 6.0 7.0 8.0 9.0 10.0"
GOOD = "\n".join(["a_0", "2", *ROWS]) + "\n"
FOREIGN = {
    "as published": GOOD.encode(),
    "rows alone": "\n".join(ROWS).encode(),
    "a row alone, twice": ("\r\n".join(ROWS) + "\r\n\r\n").encode(),
    "a byte order mark": b"\xef\xbb\xbf" + GOOD.encode(),
    "UTF-16": GOOD.encode("utf-16"),
    "UTF-16 of the other order": b"\xfe\xff" + GOOD.encode("utf-16-be"),
    "the end mark of DOS": GOOD.replace("\n", "\r\n").encode() + b"\x1a",
    "a float as count": GOOD.replace("\n2\n", "\n2.0\n").encode(),
    "landmarks": "\n".join(["a_0", "2", *(row + LANDMARKS for row in ROWS)]).encode(),
    "landmarks, rows alone": "\n".join(row + LANDMARKS for row in ROWS).encode(),
    "the name of the file": GOOD.replace("a_0", "0--Street/a_0.jpg").encode(),
}


def write(tmp_path, content, name="a_0.txt"):
    (tmp_path / "0--Street").mkdir(exist_ok=True)
    (tmp_path / "0--Street" / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize("form", FOREIGN)
def test_other_forms_read_the_same(tmp_path, form):
    ((image_id, found),) = read_predictions(write(tmp_path, FOREIGN[form]))
    assert image_id == "0--Street/a_0" and found.scores.tolist() == [0.9, 0.8]
    expected = [[93.3, 8.8, 93.3 + 48.4, 8.8 + 48.1], [9.3, 25.8, 9.3 + 36.4, 25.8 + 36.1]]
    np.testing.assert_array_equal(found.boxes, expected)


@pytest.mark.parametrize("content", [b"", b"\n", b"\r\n\x1a", b"\xef\xbb\xbf", b"\xff\xfe"])
def test_an_empty_file_is_an_image_without_detections(tmp_path, content):
    ((image_id, found),) = read_predictions(write(tmp_path, content))
    assert image_id == "0--Street/a_0" and found.boxes.shape == (0, 4) and found.scores.shape == (0,)


@pytest.mark.parametrize(
    "content, message",
    [
        ("b_0\n1\n1 2 3 4 0.5\n", "a_0.txt:1: expected the image name 'a_0', got 'b_0'"),
        ("1 2 3 4 0.5\n1 2 3 4\n", "a_0.txt:2: expected 'x y w h score'"),
        ("1 2 3 4 0.5\n1 2 3 4 0.5" + LANDMARKS + "\n", "a_0.txt:2: expected 'x y w h score'"),
        ("a_0\n1.5\n1 2 3 4 0.5\n", "a_0.txt:2: expected the number of detections, got '1.5'"),
        ("a_0\n2.0\n1 2 3 4 0.5\n", "a_0.txt:2: expected as many lines as it says, 2, got 1"),
        ("a_0\n1\n1 2 3 4 0.5 6\n", "a_0.txt:3: expected 'x y w h score'"),
    ],
)
def test_what_may_mean_two_things_is_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        list(read_predictions(write(tmp_path, content.encode())))


def test_names_with_the_extension_of_the_image(tmp_path):
    write(tmp_path, GOOD.encode(), "a_0.jpg.txt")
    assert [image_id for image_id, _ in read_predictions(tmp_path)] == ["0--Street/a_0.jpg"]
    assert [image_id for image_id, _ in read_predictions(tmp_path, images={"0--Street/a_0"})] == ["0--Street/a_0"]
    both = {"0--Street/a_0", "0--Street/a_0.jpg"}  # of a_0.jpg and a_0.jpg.jpg
    assert [image_id for image_id, _ in read_predictions(tmp_path, images=both)] == ["0--Street/a_0.jpg"]


def test_double_extensions_have_files_of_their_own(tmp_path):
    """Of a.jpg and a.jpg.jpg the stems are "a" and "a.jpg"."""
    for index, stem in enumerate(("s/a", "s/a.jpg")):
        write_predictions(tmp_path, stem, np.float32([[0, 0, 10 + index, 9]]), np.float32([0.5]), is_stem=True)
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["a.jpg.txt", "a.txt"]
    found = {image_id: boxes.boxes[0, 2] for image_id, boxes in read_predictions(tmp_path)}
    assert found == {"s/a": 10, "s/a.jpg": 11}
    assert write_predictions(tmp_path, "s/b.jpg", [], []).name == "b.txt"  # a name, as its extension says


# -- FDDB -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [lambda text: text, lambda text: text.replace("\n2\n", "\n2.0\n")])
@pytest.mark.parametrize("end", ["", "\x1a", "\r\n\x1a"])
def test_fddb_counts_as_floats_and_the_end_mark_of_dos(tmp_path, change, end):
    text = change("2002/img_1\n2\n1 2 3 4 0.5\n5 6 7 8 0.25\n")
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "fold-01-out.txt").write_bytes((text + end).encode(encoding))
        ((image_id, found),) = read_fddb_predictions(tmp_path)
        assert image_id == "2002/img_1" and found.boxes.tolist() == [[1, 2, 4, 6], [5, 6, 12, 14]]
    (tmp_path / "fold-01-out.txt").write_text(text.replace("\n2", "\n2.5"))
    with pytest.raises(ValueError, match="fold-01-out.txt:2: expected a number of rows, got '2.5"):
        list(read_fddb_predictions(tmp_path))


def test_fddb_annotations_with_the_end_mark_of_dos(tmp_path):
    (tmp_path / "FDDB-fold-01.txt").write_bytes(b"2002/img_1\r\n\x1a")
    (tmp_path / "FDDB-fold-01-ellipseList.txt").write_bytes(b"2002/img_1\r\n1.0\r\n12 8 1.2 26 16  1\r\n\x1a")
    (image,) = fddb.read_annotations(tmp_path)
    assert image.ellipses.tolist() == [[12, 8, 1.2, 26, 16]]


# -- units ------------------------------------------------------------------------------------------------------------


def test_boxes_that_are_shares_are_suspected():
    boxes = np.float64([[10, 20, 60, 90], [0, 0, 1.5, 1.5], [5, 5, 45, 30]])
    pixels, shares = UnitCheck(), UnitCheck()
    pixels.add(Detections(boxes, None))
    shares.add(Detections(boxes / 100, None))
    assert pixels.hint() == UnitCheck().hint() == ""
    assert shares.hint().startswith("3 of 3 boxes are under two pixels: are they shares of the image's sides?")


# -- what would hang, or exhaust memory -------------------------------------------------------------------------------


def test_fifos_are_refused_at_once(tmp_path):
    (tmp_path / "0--Street").mkdir()
    for name in ("0--Street/a_0.txt", "fold-01-out.txt", "archive.zip"):
        os.mkfifo(tmp_path / name)
    done = []

    def run():
        for read in (
            lambda: list(read_predictions(tmp_path)),
            lambda: list(read_predictions(tmp_path / "archive.zip")),
            lambda: list(read_fddb_predictions(tmp_path / "fold-01-out.txt")),
        ):
            with pytest.raises(OSError, match="expected a regular file, got a FIFO"):
                read()
        done.append(True)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert done


class Zeros(io.RawIOBase):
    """A file of ``size`` zeros, which is nowhere."""

    def __init__(self, size):
        self.left = size

    def readable(self):
        return True

    def readinto(self, buffer):
        count = min(len(buffer), self.left)
        buffer[:count] = bytes(count)
        self.left -= count
        return count


def test_large_members_are_refused_unread(tmp_path, monkeypatch):
    """Whatever they are called: to step over a member of a compressed tar archive is to unpack it."""
    monkeypatch.setattr(files, "_MAX_FILE_BYTES", 1 << 20)
    for name in ("0--Street/a_0.txt", "weights.pth"):
        with tarfile.open(tmp_path / "a.tar.gz", "w:gz", compresslevel=1) as archive:
            member = tarfile.TarInfo(name)
            member.size = 8 << 20
            archive.addfile(member, Zeros(member.size))
        with pytest.raises(ValueError, match=rf"a\.tar\.gz/{name}: expected at most 1 MiB for one image, got more"):
            list(read_predictions(tmp_path / "a.tar.gz"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0--Street/a_0.txt", bytes(8 << 20))
    with pytest.raises(ValueError, match="expected at most 1 MiB for one image, got more"):
        list(read_predictions(tmp_path / "a.zip"))


def test_many_members_are_bounded_together(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_MAX_ARCHIVE_BYTES", 100)
    content = {f"s/{index}.txt": f"{index}\n1\n1 2 3 4 0.5\n".encode() for index in range(20)}
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, text in content.items():
            archive.writestr(name, text)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, text in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    for name in ("a.zip", "a.tar"):
        with pytest.raises(ValueError, match="expected at most 0 GiB of files, got more"):
            list(read_predictions(tmp_path / name))


# -- all outputs or none ----------------------------------------------------------------------------------------------


@pytest.fixture
def fddb_set(tmp_path):
    (tmp_path / "FDDB-fold-01.txt").write_text("2002/img_1\n")
    (tmp_path / "FDDB-fold-01-ellipseList.txt").write_text("2002/img_1\n1\n12 8 1.2 26 16  1\n")
    (tmp_path / "image_sizes.csv").write_text("image,width,height\n2002/img_1,60,40\n")
    (tmp_path / "results").mkdir()
    (tmp_path / "results/fold-01-out.txt").write_text("2002/img_1\n1\n14 4 24 24 0.9\n")
    return tmp_path


def run_fddb(repository, folder, *arguments):
    tool = runpy.run_path(str(repository / "projects/GroupSampling/tools/evaluate_fddb.py"))
    tool["main"](["--predictions", str(folder / "results"), "--annotations", str(folder), *map(str, arguments)])


@pytest.mark.parametrize("plot", ["roc.xyz", "folder", "file/roc.png"])
def test_no_result_is_written_if_the_plot_cannot_be(repository, fddb_set, plot):
    (fddb_set / "folder").mkdir()
    (fddb_set / "file").write_text("x")
    with pytest.raises(SystemExit, match="^evaluate_fddb.py: error: "):
        run_fddb(repository, fddb_set, "--json", fddb_set / "out.json", "--plot", fddb_set / plot)
    assert not list(fddb_set.glob("*out.json*")) and not list(fddb_set.glob(".*"))
    run_fddb(repository, fddb_set, "--json", fddb_set / "out.json", "--plot", fddb_set / "roc.png")
    assert (fddb_set / "out.json").exists() and (fddb_set / "roc.png").exists()


def test_names_with_dollar_signs_are_no_formulas(repository, fddb_set):
    """ "$x^$" is one that Matplotlib cannot parse."""
    (fddb_set / "results").rename(fddb_set / "$x^$")
    (fddb_set / "results").symlink_to(fddb_set / "$x^$")
    tool = runpy.run_path(str(repository / "projects/GroupSampling/tools/evaluate_fddb.py"))
    arguments = ["--predictions", str(fddb_set / "$x^$"), "--annotations", str(fddb_set)]
    tool["main"]([*arguments, "--plot", str(fddb_set / "roc.png")])
    assert (fddb_set / "roc.png").exists()


def test_every_text_of_a_figure_is_plain(tmp_path):
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.add_subplot()
    figure.suptitle("$x^$")
    axes.set_title("$_$")
    axes.set(xlabel="a$b^$", ylabel="$\\frac{$", yscale="log")
    axes.plot([1, 10], [1, 1000], label="$x^$")
    axes.legend()
    axes.text(1, 1, "$x^$")
    axes.set_xticks([1, 10], ["$x^$", "b"])
    save_figure(figure, tmp_path / "a.svg")
    assert not any(text.get_parse_math() for text in (axes.title, axes.xaxis.label, *axes.texts))
    assert not any(text.get_parse_math() for text in axes.get_xticklabels())
    assert all(text.get_parse_math() for text in axes.get_yticklabels())  # 10 to a power
