"""An evaluation from a data set's files to results: read once, the same files for every protocol."""

import json
import sys

import numpy as np
import pytest

from group_sampling.data.catalog import Catalog
from group_sampling.data.loader import BadDataError
from group_sampling.detections import Detections
from group_sampling.engines.tv.config import load_config
from group_sampling.evaluation.examples import read_examples
from group_sampling.evaluation.run import Evaluation
from group_sampling.experiments.runs import Run

_opened = None


def _note(event, arguments):
    if event == "open" and _opened is not None:
        _opened.append(str(arguments[0]))


sys.addaudithook(_note)  # sees every open() of the process, whoever calls it; it cannot be removed


@pytest.fixture
def opened():
    global _opened
    _opened = []
    yield _opened
    _opened = None


BOXES = {"1": [[10, 10, 40, 50], [60, 20, 90, 60]], "2": [[5, 5, 30, 40]]}


def coco_set(folder):
    images = [{"id": int(i), "file_name": f"{i}.jpg", "height": 100, "width": 120} for i in BOXES]
    annotations = [
        {"id": int(i) * 10 + k, "image_id": int(i), "category_id": 3, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for i, boxes in BOXES.items()
        for k, (x1, y1, x2, y2) in enumerate(boxes)
    ]
    content = {"images": images, "categories": [{"id": 3, "name": "face"}], "annotations": annotations}
    (folder / "faces.json").write_text(json.dumps(content))
    (folder / "images").mkdir()
    return "faces", ["DATASETS.COCO_FORMAT", f"(('faces', '{folder}/faces.json', '{folder}/images'),)"], ["faces.json"]


def wider_set(folder):
    lines = []
    for image_id, boxes in BOXES.items():
        rows = [f"{x1} {y1} {x2 - x1} {y2 - y1} 0 0 0 0 0 0" for x1, y1, x2, y2 in boxes]
        lines += [f"{image_id}.jpg", str(len(rows)), *rows]
    (folder / "gt.txt").write_text("\n".join(lines))
    (folder / "images").mkdir()
    return "faces", ["DATASETS.WIDER_FORMAT", f"(('faces', '{folder}/gt.txt', '{folder}/images'),)"], ["gt.txt"]


def fddb_set(folder):
    folds = folder / "fddb/FDDB-folds"
    folds.mkdir(parents=True)
    (folder / "fddb/originalPics").mkdir()
    for fold, (image_id, boxes) in enumerate(BOXES.items(), 1):
        rows = [f"{(y2 - y1) / 2} {(x2 - x1) / 2} 1.5708 {(x1 + x2) / 2} {(y1 + y2) / 2} 1" for x1, y1, x2, y2 in boxes]
        text = "\n".join([image_id, str(len(rows)), *rows])
        (folds / f"FDDB-fold-{fold:02d}-ellipseList.txt").write_text(text)
        (folds / f"FDDB-fold-{fold:02d}.txt").write_text(image_id)
    (folds / "image_sizes.csv").write_text("image,width,height\n1,120,100\n2,120,100\n")
    return "fddb", [], sorted(path.name for path in folds.iterdir())


@pytest.mark.parametrize(
    "make, protocols, files",
    [
        (
            coco_set,
            {"coco", "wider_face"},
            {"coco_results.json", "coco_pr_curves.png", "results.json", "pr_curves.png"},
        ),
        (wider_set, {"wider_face"}, {"results.json", "pr_curves.png"}),
        (fddb_set, {"fddb"}, {"results.json", "roc.png"}),
    ],
)
def test_annotations_are_read_once(tmp_path, monkeypatch, repository, opened, make, protocols, files):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    name, opts, annotations = make(tmp_path)
    opened.clear()  # what made the files opened them as well
    config = str(repository / "projects/GroupSampling/configs/fpn_finest_sampling.yaml")
    cfg = load_config(
        config, [*opts, "DATASETS.TEST", f"('{name}',)", "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path)]
    )
    source = Catalog(cfg.DATASETS)[name]
    evaluation = Evaluation(cfg, source, None, resume=False)
    assert [record.image_id for record in evaluation.share] == list(BOXES)
    assert source.class_names == ("face",)
    for record in evaluation.share:
        boxes = np.float32(BOXES[record.image_id])
        evaluation.add(record.image_id, Detections(boxes, np.float32([0.9] * len(boxes)), np.zeros(len(boxes), int)))
    metrics = evaluation.finish()
    read = [path.rsplit("/", 1)[-1] for path in opened]
    assert [read.count(file) for file in annotations] == [1] * len(annotations)

    assert set(metrics) == protocols
    best = {"coco": "AP", "wider_face": "AP_all", "fddb": "discrete@200"}
    assert [metrics[protocol][best[protocol]] for protocol in protocols] == pytest.approx([100] * len(protocols))
    folder = tmp_path / "inference" / name
    assert files <= {path.name for path in folder.iterdir()}
    for file in files:
        content = (folder / file).read_bytes()
        assert json.loads(content)["protocol"] if file.endswith(".json") else content.startswith(b"\x89PNG")
    # What the report reads: detections, and figures of every protocol.
    run = Run("faces", tmp_path)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert run.datasets == [name] and run.figures(name) and run.best_score(name) == pytest.approx(0.9)
    found = run.predictions(source)
    assert {image_id: one.boxes.tolist() for image_id, one in found.items()} == BOXES
    assert run.times(name)["images"] == 1  # the first of two has no beginning
    assert not list((folder / "examples").glob("*"))  # there are no image files


def test_pictures_and_times(tmp_path, repository, monkeypatch):
    """Pictures of images with faces, spread over the set; the times of a clock that the test sets."""
    config = str(repository / "projects/GroupSampling/configs/fpn_finest.yaml")
    size = ["DATASETS.SYNTHETIC.NUM_VAL", "9", "DATASETS.SYNTHETIC.HEIGHT", "96", "DATASETS.SYNTHETIC.WIDTH", "128"]
    test = ["DATASETS.TEST", "('synthetic_faces_val',)", "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path)]
    cfg = load_config(config, [*size, *test, "LOGGING.EXAMPLES", "3"])
    source = Catalog(cfg.DATASETS)["synthetic_faces_val"]

    def evaluate(score):
        clock = iter(np.cumsum([0, *[1, 0.5] * 3, 7, 0.5, *[1, 0.5] * 4]).tolist())  # an image, then its bookkeeping
        evaluation = Evaluation(cfg, source, None, resume=False)
        with monkeypatch.context() as patch:
            patch.setattr("time.perf_counter", lambda: next(clock))
            for record in evaluation.share:
                evaluation.add(record.image_id, Detections(record.boxes, np.full(len(record.boxes), score)))
        evaluation.finish()
        return read_examples(cfg)

    found, nothing = evaluate(0.9), evaluate(0.1)
    assert list(found) == list(nothing) == [f"examples/synthetic_faces_val/{number}" for number in (1, 2, 3)]
    for name, picture in found.items():
        assert picture.shape[1] == 128 and picture.shape[0] > 96 and (picture != nothing[name]).any()
    times = Run("a", tmp_path).times("synthetic_faces_val")
    ids = [record.image_id for record in source.records]
    assert times["images"] == 8 and times["median"] == 1 and times["slowest"].keys() == {*ids[1:]}
    assert max(times["slowest"].values()) == 7 and next(iter(times["slowest"])) == ids[4]
    assert read_examples(load_config(config, [*test, "DATASETS.TEST", "('fddb',)"])) == {}


def test_unreadable_images_above_the_share_stop_an_evaluation(tmp_path, repository):
    """A tenth of 60 images may be unreadable; of a few images, four."""
    config = str(repository / "projects/GroupSampling/configs/fpn_finest.yaml")
    for number, allowed in ((60, 6), (10, 4)):
        lines = [line for index in range(number) for line in (f"{index}.jpg", "0")]
        (tmp_path / "gt.txt").write_text("\n".join(lines))
        opts = ["DATASETS.WIDER_FORMAT", f"(('faces', '{tmp_path}/gt.txt', '{tmp_path}'),)", "MODEL.DEVICE", "cpu"]
        cfg = load_config(config, [*opts, "OUTPUT_DIR", str(tmp_path)])
        evaluation = Evaluation(cfg, Catalog(cfg.DATASETS)["faces"], None, resume=False)
        for index in range(allowed):
            evaluation.skip(f"{index}.jpg", "it is text")
        with pytest.raises(
            BadDataError, match=rf"faces: {allowed + 1} of {number} images .*at most 0\.1(?s:.*)3\.jpg: it"
        ):
            evaluation.skip("last.jpg", "it is text")
