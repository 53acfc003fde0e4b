"""Evaluation by both engines: several processes, interruption, COCO-format data, Detectron2's evaluators."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import tv_cases
from PIL import Image
from torch import nn
from tv_cases import write_tiny_config

import group_sampling.engines.tv.train as tv_train
import group_sampling.evaluation.run as evaluation_run
from group_sampling.data.catalog import Catalog, Source
from group_sampling.detections import Detections, map_lists
from group_sampling.engines.tv.config import load_config
from group_sampling.engines.tv.model import build_model
from group_sampling.evaluation import CocoAP, WiderFaceAP, read_predictions
from group_sampling.evaluation.run import TIMES_FILE, Evaluation

NAME = "synthetic_faces_val"


def make_cfg(folder, *opts):
    cfg = load_config(write_tiny_config(folder), ["OUTPUT_DIR", str(folder / "out"), *map(str, opts)])
    cfg.freeze()
    return cfg


def found_in(record):
    """Detections as a function of the image: its boxes, moved a little."""
    rng = np.random.default_rng(len(record.boxes) + sum(map(ord, record.image_id)))
    boxes = (record.boxes + rng.uniform(0, 3, record.boxes.shape).cumsum(axis=1)).astype(np.float32)
    scales = rng.choice([16, 32, 64, 128], len(boxes)).astype(np.float32)
    classes = np.zeros(len(boxes), dtype=np.int64)
    found = Detections(boxes, rng.random(len(boxes), dtype=np.float32), classes, scales)
    return found._replace(
        sub_detectors={16.0: found.select(slice(1, None)), 32.0: moved(found, 2), 64.5: moved(found, 9)}
    )


def moved(found, shift):
    return found._replace(boxes=found.boxes + np.float32(shift), scores=found.scores[::-1].copy())


def outputs(folder):
    """Content of every file that an evaluation leaves, but for the times."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != TIMES_FILE)
    return {path.relative_to(folder): path.read_bytes() for path in files}


class Process:
    """What ``group_sampling.distributed`` is in one of several processes that run one after the other.

    The main process is the first to begin, so it broadcasts, and the last to finish, so it gathers.
    """

    def __init__(self, rank, world_size, shared):
        self.rank, self.world_size, self.shared = lambda: rank, lambda: world_size, shared
        self.num_gathered = 0

    def broadcast(self, value):
        return self.shared.setdefault("broadcast", value)

    def gather(self, value):
        gathered = self.shared.setdefault(f"gathered {self.num_gathered}", {})
        gathered[self.rank()] = value
        self.num_gathered += 1
        return [gathered[rank] for rank in range(self.world_size())] if self.rank() == 0 else []


class Simulated:
    """The processes of an evaluation, one after the other; stops each after ``limit`` images."""

    def __init__(self, cfg, records, model, world_size, *, resume, limit=None):
        self.seen, self.ranks = [], []
        source = Given(records)
        shared = {}
        for rank in range(world_size):
            process = Process(rank, world_size, shared)
            with mock.patch.object(evaluation_run, "distributed", process):
                self.ranks.append((process, Evaluation(cfg, source, model, resume=resume)))
        for _, ours in self.ranks:
            ours._partial._max_images = 1
            for record in ours.share[:limit]:
                self.seen.append(record.image_id)
                ours.add(record.image_id, found_in(record))

    def finish(self):
        results = []
        for process, ours in reversed(self.ranks):  # the main process last
            with mock.patch.object(evaluation_run, "distributed", process):
                results.append(ours.finish())
        assert all(result is None for result in results[:-1])
        return results[-1]


class Given(Source):
    """A data set of these records, by the name of a built-in one."""

    def __init__(self, records):
        super().__init__(NAME)
        self._records = records

    def _read(self, report):
        return self._records, {1: "face"}


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_shares_are_merged_without_duplicates(tmp_path, count):
    """The files left do not depend on the number of processes, whatever divides."""
    cfg = make_cfg(tmp_path, "DATASETS.SYNTHETIC.NUM_VAL", max(count, 1))
    records = Catalog(cfg.DATASETS)[NAME].records[:count]
    model, expected = nn.Linear(1, 1), None
    for world_size in (1, 2, 3):
        run = Simulated(cfg, records, model, world_size, resume=False)
        assert sorted(run.seen) == sorted(record.image_id for record in records)
        results = run.finish()
        found = outputs(Path(cfg.OUTPUT_DIR))
        counts = Counter(name.parts[2] for name in found if name.suffix == ".txt")
        folders = [f"predictions{scale}" for scale in ("", "@16", "@32", "@64.5")]
        assert counts == (dict.fromkeys(folders, count) if count else {})
        expected = expected or (results, found)
        np.testing.assert_equal(results, expected[0])
        assert found == expected[1]


@pytest.mark.parametrize("first, second", [(1, 1), (3, 1), (1, 2), (2, 3)])
def test_continued_by_any_number_of_processes(tmp_path, first, second):
    cfg = make_cfg(tmp_path, "DATASETS.SYNTHETIC.NUM_VAL", 9)
    records, model = Catalog(cfg.DATASETS)[NAME].records, nn.Linear(1, 1)
    expected = Simulated(cfg, records, model, 1, resume=False).finish()
    files = outputs(Path(cfg.OUTPUT_DIR))

    interrupted = Simulated(cfg, records, model, first, resume=False, limit=2)
    resumed = Simulated(cfg, records, model, second, resume=True)
    assert sorted(interrupted.seen + resumed.seen) == sorted(record.image_id for record in records)
    np.testing.assert_equal(resumed.finish(), expected)
    assert outputs(Path(cfg.OUTPUT_DIR)) == files


def test_interrupted_while_the_results_are_written(tmp_path, monkeypatch):
    cfg = make_cfg(tmp_path)
    records, model = Catalog(cfg.DATASETS)[NAME].records, nn.Linear(1, 1)
    monkeypatch.setattr("group_sampling.evaluation.run.write_predictions", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Simulated(cfg, records, model, 1, resume=False).finish()
    assert Simulated(cfg, records, model, 1, resume=True).seen == []


@pytest.mark.parametrize("change", ["weights", "config", "data set", "image file", "no --resume", "damage"])
def test_what_is_not_reused(tmp_path, caplog, change):
    for i in range(4):
        path = tmp_path / f"images/e/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 40, 3), i, dtype=np.uint8)).save(path)
    lines = [line for i in range(4) for line in (f"e/{i}.png", "1", "5 5 20 20 0 0 0 0 0 0")]
    (tmp_path / "gt.txt").write_text("\n".join(lines))
    sets = ["DATASETS.WIDER_FORMAT", f"(('{NAME}2', '{tmp_path}/gt.txt', '{tmp_path}/images'),)"]
    cfg, model = make_cfg(tmp_path, *sets), nn.Linear(1, 1)
    records = Catalog(cfg.DATASETS)[f"{NAME}2"].records
    Simulated(cfg, records, model, 1, resume=False, limit=3)
    partial = Path(cfg.OUTPUT_DIR) / "inference" / NAME / "partial"
    assert len(list(partial.iterdir())) == 3
    if change == "weights":
        model.bias.data += 1e-7
    elif change == "config":
        cfg = make_cfg(tmp_path, *sets, "MODEL.ROI_HEADS.NMS_THRESH_TEST", 0.31)
    elif change == "data set":
        records = records[1:]
    elif change == "image file":
        os.utime(records[0].file_name, (1, 1))
    elif change == "damage":
        for file in partial.iterdir():
            file.write_bytes(file.read_bytes()[:-1])
    caplog.clear()
    with caplog.at_level("INFO"):
        run = Simulated(cfg, records, model, 1, resume=change != "no --resume")
    assert len(run.seen) == len(records)
    notice = {"no --resume": "--resume would continue", "damage": "is damaged and left out"}
    assert notice.get(change, "are of other weights, another configuration or another data set") in caplog.text
    assert "continuing" not in caplog.text
    run.finish()
    assert not partial.exists()


def evaluation_command(engine, folder, weights, *opts, resume=False):
    repository = Path(__file__).parents[2]
    command = [sys.executable, str(repository / "train_net.py"), "--engine", engine, "--eval-only"]
    command += ["--resume"] if resume else []
    opts = ["OUTPUT_DIR", folder, "MODEL.WEIGHTS", weights, "DATASETS.SYNTHETIC.NUM_VAL", 300, *opts]
    size = ["DATASETS.SYNTHETIC.HEIGHT", 64, "DATASETS.SYNTHETIC.WIDTH", 64, "TEST.DETECTIONS_PER_IMAGE", 20]
    command += ["--config-file", write_tiny_config(Path(folder).parent), *opts, *size]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return {"args": list(map(str, command)), "env": environment, "text": True}


@pytest.mark.timeout(300)
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torchvision", "detectron2"])
def test_killed_and_resumed(tmp_path, engine):
    """SIGKILL in the middle of train_net.py --eval-only; --resume does the rest, and the results are the same bytes."""
    if importlib.util.find_spec(engine) is None:
        pytest.skip("Detectron2 is not installed")
    torch.manual_seed(0)
    torch.save(build_model(make_cfg(tmp_path)).state_dict(), tmp_path / "model.pth")
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    parts = broken / "inference" / NAME / "partial"
    process = subprocess.Popen(**evaluation_command(engine, broken, tmp_path / "model.pth"))
    try:
        while not list(parts.glob("*.part")):
            assert process.poll() is None, "ended before it was killed"
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (parts.parent / "results.json").exists()

    resumed = subprocess.run(
        **evaluation_command(engine, broken, tmp_path / "model.pth", resume=True), capture_output=True
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "continuing an interrupted evaluation, which has finished" in resumed.stdout
    assert not parts.exists()
    subprocess.run(**evaluation_command(engine, whole, tmp_path / "model.pth"), check=True, capture_output=True)
    found, expected = outputs(broken / "inference"), outputs(whole / "inference")
    assert len(expected) == 2 + 4 + 5 * 300 and found == expected  # results and curves, pictures, detections


def write_coco_set(folder, num_images=6):
    """Images with a few objects of one class, a crowd among them, and the config's declaration of the set."""
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir(parents=True)
    images, annotations = [], []
    for image in range(3, 3 + num_images):
        pixels = rng.integers(0, 255, (120, 160, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"photos/{image}.png")
        images.append({"id": image, "file_name": f"{image}.png", "height": 120, "width": 160})
        for index in range(rng.integers(0, 6)):
            box = [*rng.integers(0, 80, 2).tolist(), *rng.integers(15, 70, 2).tolist()]
            box[3] = min(box[3], 120 - box[1])
            annotation = {"id": len(annotations) + 1, "image_id": image, "category_id": 9, "bbox": box}
            annotations.append({**annotation, "area": box[2] * box[3], "iscrowd": int(index == 4)})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 9, "name": "face"}]}
    (folder / "coco.json").write_text(json.dumps(content))
    declared = f"(('mine', '{folder}/coco.json', '{folder}/photos'),)"
    return ["DATASETS.COCO_FORMAT", declared, "DATASETS.TEST", "('mine',)"]


class Oracle(nn.Module):
    """Answers both engines' calls with what :func:`found_in` says; knows an image by its first pixels."""

    def __init__(self, records):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.records = {np.asarray(Image.open(r.file_name))[:2, :4].tobytes(): r for r in records}

    def find(self, image):
        return found_in(self.records[image[:, :2, :4].permute(1, 2, 0).byte().numpy().tobytes()])

    def forward(self, images):
        if isinstance(images[0], torch.Tensor):
            names = ("boxes", "scores", "labels", "anchor_scales")
            return [
                {
                    **dict(zip(names, map(torch.from_numpy, found[:-1]))),
                    "sub_detectors": {
                        scale: dict(zip(names, map(torch.from_numpy, alone[:-1])))
                        for scale, alone in found.sub_detectors.items()
                    },
                }
                for found in map(self.find, images)
            ]
        from detectron2.structures import Boxes, Instances

        def instances(detections):
            boxes, scores, classes, scales = map(torch.from_numpy, detections[:-1])
            found = Instances((image["height"], image["width"]), pred_boxes=Boxes(boxes))
            found.pred_boxes.clip(found.image_size)
            found.scores, found.pred_classes, found.anchor_scales = scores, classes, scales
            return found

        answers = []
        for image in images:
            found = self.find(image["image"])
            by_scale = {scale: instances(alone) for scale, alone in found.sub_detectors.items()}
            answers.append({"instances": instances(found), "sub_detectors": by_scale})
        return answers


def test_coco_format_on_both_engines(tmp_path):
    """COCO's and WIDER FACE's figures of the same detections, equal to those of the metrics called by hand."""
    opts = write_coco_set(tmp_path / "data")
    cfg = make_cfg(tmp_path, *opts, "INPUT.MIN_SIZE_TEST", 0)
    records = Catalog(cfg.DATASETS)["mine"].records
    model = Oracle(records)
    metrics = tv_train.evaluate(cfg, model, torch.device("cpu"))

    coco = CocoAP.from_file(tmp_path / "data/coco.json", max_dets_per_image=cfg.TEST.DETECTIONS_PER_IMAGE)
    wider = WiderFaceAP.from_records(records)
    for record in records:
        found = map_lists(
            lambda found: found._replace(boxes=found.boxes.clip(0, [160, 120, 160, 120])), found_in(record)
        )
        coco.update(record.image_id, found)
        wider.update(record.image_id, found)
    expected = {f"coco/{name}": value for name, value in coco.compute().metrics().items()}
    assert 0 < expected["coco/AP"] < 100
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, nan_ok=True)
    wider = {f"wider_face/{name}": value for name, value in wider.compute().metrics().items()}
    assert list(wider) == [f"wider_face/AP{name}" for name in ("_all", "@16", "@32", "@64.5")]
    assert len(set(wider.values())) == 4 and {name: metrics[name] for name in wider} == pytest.approx(wider)
    folder = Path(cfg.OUTPUT_DIR) / "inference/mine"
    rows = json.loads((folder / "coco_instances_results.json").read_text())
    assert {row["category_id"] for row in rows} == {9} and {row["image_id"] for row in rows} <= set(range(3, 9))
    assert json.loads((folder / "coco_results.json").read_text())["protocol"] == "COCO"

    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.evaluation import COCOEvaluator, DatasetEvaluators

    from group_sampling.engines.d2 import GroupSamplingEvaluator, Trainer

    args = Namespace(config_file=str(tmp_path / "tiny.yaml"), resume=False, eval_only=True)
    args.opts = [*opts, "INPUT.MIN_SIZE_TEST", "0", "OUTPUT_DIR", str(tmp_path / "d2")]
    d2_cfg = tv_cases.d2_setup(args)
    ours = Trainer.test(d2_cfg, model)
    assert {f"coco/{name}": value for name, value in ours["coco"].items()} == pytest.approx(expected, nan_ok=True)
    assert {f"wider_face/{name}": value for name, value in ours["wider_face"].items()} == pytest.approx(wider)

    # Detectron2's own evaluator, alone and together with ours, in the same hook.
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    theirs = COCOEvaluator("mine", output_dir=str(tmp_path / "theirs"), max_dets_per_image=limit)
    both = DatasetEvaluators([GroupSamplingEvaluator(d2_cfg, "mine"), theirs])
    for results in (Trainer.test(d2_cfg, model, theirs)["bbox"], Trainer.test(d2_cfg, model, [both])["bbox"]):
        for name in ("AP", "AP50", "AP75", "APs", "APm", "APl"):
            assert results[name] == pytest.approx(ours["coco"][name], abs=1e-6, nan_ok=True), name


def test_predictions_are_a_submission(tmp_path):
    """What an evaluation leaves evaluates to the same AP from the folder, and packed as users hand it in.

    @s is All of the folder of the sub-detector s.
    """
    cfg = make_cfg(tmp_path, "DATASETS.SYNTHETIC.NUM_VAL", 12)
    records = Catalog(cfg.DATASETS)[NAME].records
    results = Simulated(cfg, records, nn.Linear(1, 1), 2, resume=False)
    metrics = results.finish()["wider_face"]
    folder = Path(cfg.OUTPUT_DIR) / "inference" / NAME
    expected = {folder / "predictions": metrics["AP_all"]}
    for kind in ("zip", "xztar", "gztar"):
        expected[Path(shutil.make_archive(str(tmp_path / kind), kind, folder, "predictions"))] = metrics["AP_all"]
    expected.update({folder / f"predictions@{scale}": metrics[f"AP@{scale}"] for scale in ("16", "32", "64.5")})
    assert len(set(expected.values())) == 4
    for path, ap in expected.items():
        metric = WiderFaceAP.from_records(records)
        for image_id, found in read_predictions(path):
            metric.update(image_id, found)
        assert 100 * metric.compute().ap["all"] == pytest.approx(ap, abs=1e-9), path


def test_fddb_through_the_hooks(tmp_path, reference_data, monkeypatch):
    """Published detections give the official evaluation's rates, from either engine's way in."""
    from group_sampling.evaluation.fddb.files import read_fddb_predictions

    (tmp_path / "fddb/originalPics").mkdir(parents=True)
    (tmp_path / "fddb/FDDB-folds").symlink_to(reference_data.folder / "fddb/annotations")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    cfg = make_cfg(tmp_path, "DATASETS.TEST", "('fddb',)")
    evaluation = Evaluation(cfg, Catalog(cfg.DATASETS)["fddb"], nn.Linear(1, 1), resume=False)
    detector, (discrete, continuous, _) = next(iter(reference_data.numbers["fddb_detectors"].items()))
    published = dict(read_fddb_predictions(reference_data.folder / "fddb/detections_with_roc" / detector))
    for record in evaluation.share:
        boxes, scores = (np.float32(values) for values in published[record.image_id][:2])
        evaluation.add(record.image_id, Detections(boxes, scores, np.zeros(len(scores), np.int64), None))
    rates = evaluation.finish()["fddb"]
    assert rates["discrete@500"] == pytest.approx(100 * discrete, abs=0.02)  # the curve ends before
    assert rates["continuous@500"] == pytest.approx(100 * continuous, abs=0.02)
    assert rates["continuous@500_fitted"] > rates["continuous@500"]
    folder = Path(cfg.OUTPUT_DIR) / "inference/fddb"
    assert {path.name for path in folder.iterdir()} == {"predictions", "results.json", "roc.png", TIMES_FILE}
    assert len(list((folder / "predictions").iterdir())) == reference_data.numbers["fddb"]["folds"]


@pytest.mark.parametrize("engine", ["torchvision", "detectron2"])
def test_the_evaluation_after_a_training_is_continued(tmp_path, engine):
    """--resume of a finished training evaluates, without the image that was finished before."""
    if importlib.util.find_spec(engine) is None:
        pytest.skip("Detectron2 is not installed")
    args = tv_cases.arguments(tmp_path, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "()", "INPUT.MIN_SIZE_TEST", 0)
    if engine == "torchvision":
        run, build, checkpointer = tv_train.main, build_model, tv_train.GroupSamplingCheckpointer
        run(args)
        cfg = load_config(args.config_file, args.opts)
    else:
        from group_sampling.engines.d2 import GroupSamplingCheckpointer, Trainer
        from group_sampling.engines.d2.train import main

        run, build, checkpointer = main, Trainer.build_model, GroupSamplingCheckpointer
        run(args)
        cfg = tv_cases.d2_setup(args)
    model = build(cfg)
    checkpointer(model).load(str(tmp_path / "model_final.pth"))
    source = Catalog(cfg.DATASETS)[NAME]
    first, *others = source.records
    interrupted = Evaluation(cfg, source, model, resume=False)
    mark = Detections(np.float32([[1, 2, 3, 4]]), np.float32([0.5]), np.zeros(1, np.int64), np.float32([16]))
    alone = mark._replace(boxes=np.float32([[1, 2, 5, 6]]))
    interrupted.add(first.image_id, mark._replace(sub_detectors=dict.fromkeys((16.0, 32.0, 64.0, 128.0), alone)))
    interrupted._partial.write()

    args.resume = True
    run(args)
    for name, box in (("predictions", [1, 2, 3, 4]), ("predictions@64", [1, 2, 5, 6])):
        found = {i: detections.boxes for i, detections in read_predictions(tmp_path / "inference" / NAME / name)}
        assert found[first.image_id].tolist() == [box]
        assert len(found) == 1 + len(others) and not any(1 in found[record.image_id] for record in others)
