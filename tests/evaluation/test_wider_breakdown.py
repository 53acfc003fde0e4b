"""AP by event and by size of the face by independent means, and figures with published curves."""

import math
import re
import sys
import tarfile

import numpy as np
import pytest
from matplotlib.image import imread
from scipy.io import savemat
from test_wider_face import evaluate, nearest_scale, random_set, xyxy

from group_sampling.detections import Detections
from group_sampling.evaluation import WiderFaceAP, read_predictions
from group_sampling.evaluation.wider_face.curves import plot_comparison, read_published_curves

EVENTS = 3
SIZES = (16, 32, 64, 128)


def evaluator_of(truth, subsets, ignore, detections, **options):
    evaluator = WiderFaceAP({i: xyxy(f) for i, f in truth.items()}, ignore=ignore, subsets=subsets, **options)
    for image, rows in detections.items():
        evaluator.update(image, Detections(xyxy(rows), [row[4] for row in rows]))
    return evaluator


def event_of(image):
    return f"event {sum(map(ord, image)) % EVENTS}"


def test_events_are_evaluated_on_their_own():
    """An evaluator of one event alone, with the lowest and highest score of the whole set in it, gives the same."""
    num_compared = 0
    for seed in range(60):
        truth, counted, ignore, detections, *_ = random_set(seed)
        scores = [row[4] for rows in detections.values() for row in rows]
        # In each event an ignored face, and detections on it with the extreme scores: they leave the proposals.
        for event in range(EVENTS):
            image = next(f"extra {n}" for n in range(99) if event_of(f"extra {n}") == f"event {event}")
            truth[image], counted[image], ignore[image] = [(0, 0, 50, 50)], [False], [True]
            extremes = [(0, 0, 50, 50, min(scores, default=0)), (0, 0, 50, 50, max(scores, default=1))]
            detections[image] = extremes
        by_event = evaluator_of(truth, {"easy": counted}, ignore, detections).compute_by(event_of)
        for event, result in by_event.items():
            images = [image for image in truth if event_of(image) == event]
            only = [{i: d[i] for i in images if i in d} for d in (truth, counted, ignore, detections)]
            alone = evaluate(only[0], {"easy": only[1]}, only[2], only[3])
            assert result.ap == pytest.approx(alone.ap, abs=1e-12, nan_ok=True), seed
            assert result.counts == alone.counts and result.num_faces == alone.num_faces
            num_compared += 1
    assert num_compared >= 150


def test_one_event_is_the_whole():
    for seed in range(20):
        truth, counted, ignore, detections, *_ = random_set(seed)
        evaluator = evaluator_of(truth, {"easy": counted}, ignore, detections, sizes=SIZES)
        (result,) = evaluator.compute_by(lambda image: "all").values()
        np.testing.assert_equal(result.to_dict(), evaluator.compute().to_dict())


def size_of(box):
    return nearest_scale(box) if box[2] * box[3] > 0 else 16


def plain_iou(a, b):
    """Of (x1, y1, x2, y2), in pixels inclusive of both ends."""
    w = min(a[2], b[2]) - max(a[0], b[0]) + 1
    h = min(a[3], b[3]) - max(a[1], b[1]) + 1
    inter = max(w, 0) * max(h, 0)
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return inter / (sum(areas) - inter)


def test_sizes_equal_all_without_what_does_not_count():
    """AP of a size is that of All where the faces of other sizes are ignored, and strays of other sizes as well."""
    defined = 0
    for seed in range(60):
        truth, _, ignore, detections, *_ = random_set(seed)
        result = evaluate(truth, None, ignore, detections, sizes=SIZES)
        for scale in SIZES:
            faces, ignored, rows = {}, {}, {}
            aside = (5000, 5000, 9, 9)  # an ignored face to which strays are moved: their scores still count
            for image in truth:
                faces[image] = [*truth[image], aside]
                wrong = [size_of(box) != scale for box in truth[image]]
                ignored[image] = [a or b for a, b in zip(ignore[image], wrong)] + [True]
                rows[image] = []
                for row, box in zip(detections.get(image, []), xyxy(detections.get(image, []))):
                    strays = not any(plain_iou(box, face) >= 0.5 for face in xyxy(truth[image]))
                    moved = strays and size_of(row[:4]) != scale
                    rows[image].append((*(aside if moved else row[:4]), row[4]))
            expected = evaluate(faces, None, ignored, rows)
            assert result.ap[f"size {scale}"] == pytest.approx(expected.ap["all"], abs=1e-12, nan_ok=True), seed
            assert result.num_faces[f"size {scale}"] == expected.num_faces["all"]
            defined += not math.isnan(expected.ap["all"])
        assert sum(result.num_faces[f"size {s}"] for s in SIZES) == result.num_faces["all"]
        assert sum(result.num_detections[f"size {s}"] for s in SIZES) == result.num_detections["all"]
    assert defined > 50


def write_curves(folder, method, points, variable="pr_cruve"):
    for subset in ("easy", "medium", "hard"):
        path = folder / method / f"wider_pr_info_{method}_{subset}_val.mat"
        path.parent.mkdir(parents=True, exist_ok=True)
        savemat(path, {variable: np.asarray(points, dtype=float), "legend_name": method})


def test_published_curves(tmp_path, caplog):
    write_curves(tmp_path / "Val", "half", [[1, 0.25], [0.5, 0.5], [0.25, 0.5]])
    write_curves(tmp_path / "Val", "other", [[1, 1]], variable="pr_curve")
    (tmp_path / "Val/half/.DS_Store").write_bytes(b"x")
    curves = read_published_curves(tmp_path)
    assert [(c.name, c.subset) for c in curves[:3]] == [("half", s) for s in ("easy", "hard", "medium")]
    assert curves[0].ap == pytest.approx(0.25 + 0.25 * 0.5) and curves[-1].ap == 1
    assert not caplog.records


def test_curves_of_hdf5_without_h5py(tmp_path, caplog, monkeypatch):
    write_curves(tmp_path, "old", [[1, 1]])
    new = tmp_path / "new/wider_pr_info_new_hard_val.mat"
    new.parent.mkdir()
    new.write_bytes(b"MATLAB 7.3 MAT-file")
    monkeypatch.setitem(sys.modules, "h5py", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert {curve.name for curve in read_published_curves(tmp_path)} == {"old"}
    assert "1 methods left out: their files are HDF5, which needs h5py (pip install h5py): new" in caplog.text


@pytest.mark.parametrize(
    "content, message",
    [
        ({"pr_cruve": np.zeros((4, 3))}, r"pr_cruve: expected an array \(points, 2\), got \(4, 3\)"),
        ({"legend_name": "x"}, "pr_cruve: expected .*, got 'nothing'"),
        (None, "expected a MATLAB file"),
    ],
)
def test_curves_that_are_none(tmp_path, content, message):
    path = tmp_path / "m/wider_pr_info_m_easy_val.mat"
    path.parent.mkdir()
    path.write_bytes(b"no file of MATLAB")
    if content is not None:
        savemat(path, content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: {message}"):
        read_published_curves(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected <method>/wider_pr_info"):
        read_published_curves(tmp_path / "nothing here")


def test_plot_of_many(tmp_path):
    """Our curve is drawn over 45 published ones, in a figure that has a place for each name."""
    truth, counted, ignore, detections, *_ = random_set(1)
    result = evaluate(truth, {"easy": counted, "medium": counted, "hard": counted}, ignore, detections)
    for index in range(45):
        write_curves(tmp_path / "curves", f"method {index}", [[1, 0.1], [0.5, index / 50]])
    plot_comparison(tmp_path / "few.png", {"ours": result})
    plot_comparison(tmp_path / "many.png", {"ours": result}, read_published_curves(tmp_path / "curves"))
    few, many = imread(tmp_path / "few.png"), imread(tmp_path / "many.png")
    assert many.shape[0] > few.shape[0] + 400 and many.shape[1] < few.shape[1]  # three panels, not All


@pytest.mark.slow
def test_real_curves_have_their_published_ap(shared_data, tmp_path):
    folder = shared_data / "wider/pr_curves_val"
    expected = {}
    for line in (folder / "ap_from_curves.txt").read_text().splitlines():
        name, *values = re.fullmatch(r"(.+?)\s+([\d.]+) ([\d.]+) ([\d.]+) ?", line).groups()
        expected.setdefault(name, []).append(dict(zip(("easy", "medium", "hard"), map(float, values))))
    for number, archive in enumerate(sorted(folder.glob("*.tar.xz"))):
        with tarfile.open(archive) as content:
            content.extractall(tmp_path / str(number), filter="data")
    curves = read_published_curves(tmp_path)
    assert len(curves) >= 48
    for curve in curves:
        assert any(abs(curve.ap - ap[curve.subset]) < 1e-4 for ap in expected[curve.name]), curve[:2]


def test_sums_on_a_published_result_set(reference_data):
    """Faces and detections of all events and sizes add up to those of the set."""
    folder, numbers = reference_data.folder / "wider", reference_data.numbers
    evaluator = WiderFaceAP.from_official(folder / "ground_truth_mat", sizes=SIZES)
    for image, found in read_predictions(folder / f"predictions/{numbers['result_sets']['smallest']}.tar.xz"):
        evaluator.update(image, found)
    whole, events = evaluator.compute(), evaluator.compute_by(lambda image: image.split("/")[0])
    assert len(events) == numbers["events"]
    for kind in ("num_faces", "num_detections"):
        for name, number in getattr(whole, kind).items():
            assert sum(getattr(result, kind)[name] for result in events.values()) == number
    for name, number in whole.counts.items():
        assert sum(result.counts[name] for result in events.values()) == number
