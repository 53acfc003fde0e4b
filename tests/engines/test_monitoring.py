"""What a training does to be watched, on both engines: validation loss, best model, pictures, Weights & Biases."""

import importlib
import importlib.util
import json
import math
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from tv_cases import arguments

from group_sampling import distributed
from group_sampling.config import ConfigError
from group_sampling.data.catalog import Catalog
from group_sampling.engines.monitoring import BestModel, ValidationLoss
from group_sampling.engines.tv.config import get_cfg, load_config
from group_sampling.engines.tv.train import GroupSamplingCheckpointer

ENGINES = ["tv", pytest.param("d2", marks=pytest.mark.skipif(not importlib.util.find_spec("detectron2"), reason="d2"))]
SHORT = ["MODEL.RESNETS.NORM", "BN", "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", "()", "DATALOADER.NUM_WORKERS", 0]
BEST = ["TEST.EVAL_PERIOD", 2, "TEST.BEST_CHECKPOINTER.ENABLED", True]
WATCHED = [*BEST, "TEST.VALIDATION_LOSS", True, "TEST.VALIDATION_IMAGES", 2, "LOGGING.EXAMPLES", 2]
WATCHED += ["TEST.BEST_CHECKPOINTER.METRIC", "validation/total_loss", "TEST.BEST_CHECKPOINTER.MODE", "min"]
WATCHED += ["LOGGING.WANDB", "faces"]


def run(engine, folder, *opts, **flags):
    folder.mkdir(exist_ok=True)
    return importlib.import_module(f"group_sampling.engines.{engine}.train").main(arguments(folder, *opts, **flags))


def load(path):
    return torch.load(path, weights_only=True)


def read_scalars(folder):
    rows = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return {(name, row["iteration"]): value for row in rows for name, value in row.items()}


@pytest.fixture
def wandb(monkeypatch):
    """A stub of the package that notes what it is told."""
    module = ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)
    module.inits, module.logs, module.finished = [], [], 0

    class Run:
        def log(self, values, step):
            module.logs.append((step, values))

        def finish(self):
            module.finished += 1

    def init(**options):
        module.inits.append(options)
        return Run()

    module.init, module.Image = init, np.array
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.mark.parametrize("engine", ["tv", pytest.param("d2", marks=[*ENGINES[1].marks, pytest.mark.slow])])
def test_watching_a_training_does_not_change_it(engine, tmp_path, wandb):
    """The same weights bit for bit; then everything that was logged, and a resumed run that continues it."""
    run(engine, tmp_path / "alone", *SHORT, "DATASETS.TEST", "()")
    out = tmp_path / "watched"
    run(engine, out, *SHORT, *WATCHED)
    alone, watched = (load(tmp_path / name / "model_final.pth")["model"] for name in ("alone", "watched"))
    assert [name for name in alone if not torch.equal(alone[name], watched[name])] == []

    scalars = read_scalars(out)
    ends = sorted(iteration for name, iteration in scalars if name == "validation/total_loss")
    assert ends == [1, 3 if engine == "tv" else 4]  # Detectron2 logs the last evaluation after the last iteration
    losses = [scalars["validation/total_loss", end] for end in ends]
    for end, loss in zip(ends, losses):
        parts = [scalars[f"validation/{name}", end] for name in ("loss_rpn_cls", "loss_rpn_loc")]
        assert sum(parts) == pytest.approx(loss) and min(parts) > 0
    best = load(out / "model_best.pth")
    assert best["best"] == {"metric": "validation/total_loss", "value": min(losses)}
    assert (
        best["iteration"] == [1, 3][int(np.argmin(losses))] and "MODEL" in best["config"] and "optimizer" in str(best)
    )
    assert (out / "last_checkpoint").read_text() == "model_final.pth"

    events = EventAccumulator(str(out)).Reload()
    assert "validation/total_loss" in events.Tags()["scalars"]
    pictures = [f"examples/synthetic_faces_val/{number}" for number in (1, 2)]
    assert sorted(events.Tags()["images"]) == pictures
    assert len(events.Images(pictures[0])) == 2 and events.Images(pictures[0])[0].width == 128

    (options,) = wandb.inits
    assert options["project"] == "faces" and options["config"]["SOLVER"]["MAX_ITER"] == 4
    logged = {name: step for step, values in wandb.logs for name in values}
    assert logged["validation/total_loss"] == logged["wider_face/AP_all"] == ends[1] and logged["total_loss"] == 3
    (picture,) = {values[pictures[0]].shape for _, values in wandb.logs if pictures[0] in values}
    assert picture[1:] == (128, 3) and wandb.finished == 1

    saved = (out / "model_best.pth").read_bytes()
    run(engine, out, *SHORT, *WATCHED, resume=True)  # evaluates once more: no better than itself
    assert (out / "model_best.pth").read_bytes() == saved
    assert wandb.inits[1]["id"] == options["id"] and wandb.inits[1]["resume"] == "allow"


def test_engines_agree_on_the_validation_loss(tmp_path):
    """Of the same weights, which a learning rate of 0 keeps."""
    pytest.importorskip("detectron2")
    same = [
        *SHORT,
        "MODEL.RESNETS.NORM",
        "GN",
        "SOLVER.MAX_ITER",
        1,
        "SOLVER.BASE_LR",
        0.0,
        "TEST.VALIDATION_LOSS",
        True,
        "LOGGING.EXAMPLES",
        0,
    ]
    run("tv", tmp_path / "tv", *same)
    weights = tmp_path / "tv/model_final.pth"
    run("d2", tmp_path / "d2", *same, "MODEL.WEIGHTS", weights)
    theirs, ours = read_scalars(tmp_path / "d2"), read_scalars(tmp_path / "tv")
    for name in ("total_loss", "loss_rpn_cls", "loss_rpn_loc"):
        assert theirs[f"validation/{name}", 1] == pytest.approx(ours[f"validation/{name}", 0], abs=1e-4)
    assert not list(tmp_path.rglob("examples"))


def tiny_config(*opts):
    return load_config(arguments_file(), ["MODEL.DEVICE", "cpu", *map(str, opts)])


def arguments_file():
    return str(Path(__file__).resolve().parents[2] / "projects/GroupSampling/configs/quick/Base-Demo.yaml")


@pytest.mark.parametrize("limit", [0, 4])
def test_every_image_counts_once_in_any_number_of_processes(monkeypatch, limit):
    """The loss of an image is its number; the processes come one after the other, the last one knows all shares."""
    cfg = tiny_config("DATASETS.SYNTHETIC.NUM_VAL", 5, "TEST.VALIDATION_IMAGES", limit)
    records = Catalog(cfg.DATASETS)["synthetic_faces_val"].records
    number = {record.image_id: index for index, record in enumerate(records)}
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1), nn.Dropout())
    model[1].eval()

    def validate(world):
        """Which images every process saw, and what the last one found."""
        seen, shares = [], []

        def losses_of(example, draw):
            assert [module.training for module in model] == [True, False, False] and not torch.is_grad_enabled()
            index = number[example[1].image_id]
            seen.append((draw, index, int(example[0].sum())))
            return {"a": torch.tensor(float(index)), "b": torch.tensor(2.0)}

        monkeypatch.setattr(distributed, "world_size", lambda: world)
        monkeypatch.setattr(distributed, "all_gather", lambda share: shares.append(share) or list(shares))
        for rank in range(world):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            loss = ValidationLoss(cfg, records, lambda image, boxes, classes, ignore, record, draw: (image, record))
            result = loss(model, losses_of)
        return sorted(seen), result

    expected, _ = validate(1)
    assert len({index for _, index, _ in expected}) == len(expected) == (limit or 5)
    mean = np.mean([index for _, index, _ in expected])
    for world in (1, 2, 7):
        assert validate(world) == (expected, {"total_loss": mean + 2, "a": mean, "b": 2})
    assert [module.training for module in model] == [True, False, True]


def test_validation_of_images_without_boxes_is_refused():
    cfg = tiny_config()
    records = Catalog(cfg.DATASETS)["synthetic_faces_val"].records
    blank = [record for record in records if not len(record.boxes)] or [
        record.__class__(
            record.file_name, record.image_id, 9, 9, record.boxes[:0], record.classes[:0], record.ignore[:0]
        )
        for record in records[:1]
    ]
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    with pytest.raises(ConfigError, match=r"TEST\.VALIDATION_LOSS: expected boxes in DATASETS\.TEST"):
        ValidationLoss(cfg, blank, print)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True
    with pytest.raises(ConfigError, match=r"DATASETS\.TEST .*no image to compute a loss of"):
        ValidationLoss(cfg, blank, print)


def best_model(folder, mode="max", metric="AP", **options):
    cfg = get_cfg()
    cfg.merge_from_list(["TEST.BEST_CHECKPOINTER.ENABLED", "True", "TEST.BEST_CHECKPOINTER.METRIC", metric])
    cfg.TEST.BEST_CHECKPOINTER.MODE = mode
    return BestModel(cfg, GroupSamplingCheckpointer(nn.Linear(1, 1), str(folder), **options))


@pytest.mark.parametrize("mode, kept", [("max", [0, 2, 5]), ("min", [0, 1, 4])])
def test_the_best_model_is_kept(tmp_path, mode, kept):
    """Values rise, fall and tie; half way the training resumes."""
    values, saved = [50.0, 20.0, 70.0, math.nan, 10.0, 80.0, 80.0], []
    best = best_model(tmp_path, mode)
    for iteration, value in enumerate(values):
        if iteration == 3:
            best = best_model(tmp_path, mode)
            best.resume()
        best.update(iteration, {"AP": value, "other": 99.0})
        found = load(tmp_path / "model_best.pth")
        assert found["best"] == {"metric": "AP", "value": values[found["iteration"]]}
        saved += [found["iteration"]] if found["iteration"] not in saved else []
    assert saved == kept and not (tmp_path / "last_checkpoint").exists()


def test_a_run_that_has_only_a_best_model_starts_again(tmp_path):
    """It was killed before its first checkpoint; whoever always passes --resume must not be refused."""
    best_model(tmp_path).update(3, {"AP": 1.0})
    model = nn.Linear(1, 1)
    checkpointer = GroupSamplingCheckpointer(model, str(tmp_path), optimizer=torch.optim.SGD(model.parameters(), lr=1))
    assert checkpointer.resume_or_load("", resume=True) == {}
    (tmp_path / "model_0000003.pth").touch()
    with pytest.raises(ConfigError, match=r"the last is model_0000003\.pth, but no file last_checkpoint"):
        checkpointer.resume_or_load("", resume=True)


def test_a_best_model_that_says_nothing_is_replaced(tmp_path, caplog):
    for content, metric in ((b"damaged", "AP"), (None, "AP50")):
        if content:
            (tmp_path / "model_best.pth").write_bytes(content)
        best = best_model(tmp_path, metric=metric)
        best.resume()
        assert "the next evaluation replaces it" in caplog.text
        best.update(7, {metric: 1.0})
        assert load(tmp_path / "model_best.pth")["best"]["metric"] == metric
        caplog.clear()


@pytest.mark.parametrize("engine", ENGINES)
def test_an_unknown_metric_ends_the_first_evaluation(engine, tmp_path):
    opts = [*SHORT, *BEST, "TEST.BEST_CHECKPOINTER.METRIC", "bbox/AP"]
    with pytest.raises(ConfigError, match=r"METRIC: expected one of .*wider_face/AP_all.*, got 'bbox/AP'"):
        run(engine, tmp_path, *opts)
    assert not (tmp_path / "model_best.pth").exists()
    assert ("wider_face/AP_all", 1) in read_scalars(tmp_path) or engine == "d2"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "opts, message",
    [
        (["LOGGING.WANDB", "faces"], r"LOGGING\.WANDB is 'faces'.* not installed: pip install wandb"),
        (["TEST.BEST_CHECKPOINTER.ENABLED", True], r"TEST\.BEST_CHECKPOINTER.*TEST\.EVAL_PERIOD 0"),
        (["TEST.VALIDATION_LOSS", True, "DATASETS.TEST", "()"], r"TEST\.VALIDATION_LOSS: expected images"),
        ([*BEST, "TEST.BEST_CHECKPOINTER.MODE", "best"], r"MODE: expected 'max' or 'min', got 'best'"),
        (["LOGGING.EXAMPLES", -1], r"LOGGING\.EXAMPLES: expected a number from 0 to 64, got -1"),
    ],
)
def test_what_cannot_be_watched_is_said_before_the_training(engine, opts, message, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=message):
        run(engine, tmp_path, *opts)
    assert not (tmp_path / "metrics.json").exists()
