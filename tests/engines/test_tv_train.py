"""The torchvision engine's runs: training, resuming, evaluation, several processes, and what goes wrong on the way."""

import json
import logging
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tv_cases import arguments, write_tiny_config

import group_sampling.engines.tv.train as tv_train
from group_sampling import distributed
from group_sampling.checkpoint import convert_names
from group_sampling.config import ConfigError
from group_sampling.engines.launch import launch
from group_sampling.engines.tv.config import load_config
from group_sampling.engines.tv.events import logging_to
from group_sampling.engines.tv.model import build_model
from group_sampling.engines.tv.train import build_lr_schedule, build_optimizer, main

SCALES = (16, 32, 64, 128)
AP_KEYS = {"wider_face/AP_all", *(f"wider_face/AP@{scale}" for scale in SCALES)}


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def load(path):
    return torch.load(path, weights_only=True)


def assert_equal(found, expected):
    """Bit for bit, through dicts and lists."""
    assert type(found) is type(expected)
    if isinstance(found, dict):
        assert found.keys() == expected.keys()
        for key in found:
            assert_equal(found[key], expected[key])
    elif isinstance(found, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected):
            assert_equal(*pair)
    elif isinstance(found, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 40 iterations that learns two images by heart, evaluated on the way and at the end."""
    folder = tmp_path_factory.mktemp("trained")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    opts = ["SOLVER.MAX_ITER", 40, "SOLVER.STEPS", "(35,)", "SOLVER.CHECKPOINT_PERIOD", 20, "TEST.EVAL_PERIOD", 20]
    opts += ["INPUT.SCALE_JITTER", "[1.0]", "INPUT.CROP.ENABLED", False, "INPUT.RANDOM_FLIP", "none"]
    opts += ["DATASETS.SYNTHETIC.NUM_TRAIN", 2, "TEST.DETECTIONS_PER_IMAGE", 100]
    metrics = main(arguments(folder, *opts))
    torch.set_num_threads(threads)
    return folder, opts, metrics


def test_training_lowers_the_loss(trained):
    first, second = (m for m in read_metrics(trained[0]) if "total_loss" in m)
    assert second["total_loss"] < 0.7 * first["total_loss"]


def test_metrics_have_detectron2s_names(trained):
    folder, _, metrics = trained
    lines = read_metrics(folder)
    assert [line["iteration"] for line in lines] == [19, 19, 39, 39]
    losses, counts = lines[0], {f"rpn/{kind}@{scale}" for kind in ("num_pos", "num_neg") for scale in SCALES}
    names = {"iteration", "total_loss", "loss_rpn_cls", "loss_rpn_loc", "lr", "time", "data_time", "time_assign"}
    names |= {"eta_seconds", "grad_norm"}
    per_scale = {f"health/{kind}@{scale}" for kind in ("logit_std", "score_pos", "score_neg") for scale in SCALES}
    assert losses.keys() <= names | counts | per_scale | {"health/units", "health/grad_norm_max"}
    assert losses.keys() >= names | counts | {f"health/logit_std@{scale}" for scale in SCALES}
    assert 0.5 < losses["health/units"] <= 1 and losses["health/grad_norm_max"] >= losses["grad_norm"] > 0
    assert losses["lr"] == pytest.approx(0.01) and losses["eta_seconds"] > 0
    assert all(losses[f"rpn/num_pos@{s}"] + losses[f"rpn/num_neg@{s}"] == pytest.approx(32) for s in SCALES)
    assert lines[1].keys() - {"iteration"} <= AP_KEYS
    # A scale without faces has no AP, and JSON no NaN.
    finite = {name: value for name, value in metrics.items() if not np.isnan(value)}
    assert metrics.keys() == AP_KEYS and lines[3] == {"iteration": 39, **finite}


def test_files_of_a_run(trained):
    folder = trained[0]
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "log.txt", "metrics.json", "last_checkpoint"} <= names
    assert {"model_0000019.pth", "model_0000039.pth", "model_final.pth"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    log = (folder / "log.txt").read_text()
    assert "eta: 0:00:00  iter: 39  total_loss: " in log and "Saving checkpoint" in log
    assert log.count("health: units: ") == 2 and "may look fine" not in log
    inference = folder / "inference/synthetic_faces_val"
    assert len(list(inference.glob("predictions/*/*.txt"))) == 3
    assert (inference / "results.json").exists() and (inference / "pr_curves.png").exists()


def test_logging_leaves_nothing_behind(tmp_path):
    loggers = [logging.getLogger(name) for name in ("group_sampling", "fvcore")]
    before = [(log.level, list(log.handlers)) for log in loggers]
    with logging_to(str(tmp_path), rank=0):
        assert [(log.level, list(log.handlers)) for log in loggers] != before
    assert [(log.level, list(log.handlers)) for log in loggers] == before


def test_eval_only_finds_the_same(trained, tmp_path):
    folder, opts, metrics = trained
    found = main(arguments(tmp_path, *opts, "MODEL.WEIGHTS", folder / "model_final.pth", eval_only=True))
    np.testing.assert_equal(found, metrics)
    assert not (tmp_path / "model_final.pth").exists()


def test_detectron2s_checkpoint_evaluates_the_same(trained, tmp_path):
    folder, opts, metrics = trained
    theirs = convert_names(load(folder / "model_final.pth")["model"], "detectron2")
    assert any(name.startswith("backbone.bottom_up.") for name in theirs)
    torch.save({"model": theirs, "__author__": "Detectron2"}, tmp_path / "theirs.pth")
    found = main(arguments(tmp_path, *opts, "MODEL.WEIGHTS", tmp_path / "theirs.pth", eval_only=True))
    np.testing.assert_equal(found, metrics)


def test_several_test_sets(trained, tmp_path):
    folder, opts, metrics = trained
    sets = ["DATASETS.TEST", "('synthetic_faces_val', 'synthetic_faces_train')"]
    found = main(arguments(tmp_path, *opts, *sets, "MODEL.WEIGHTS", folder / "model_final.pth", eval_only=True))
    assert found.keys() == {f"synthetic_faces_{s}/{key}" for s in ("val", "train") for key in AP_KEYS}
    np.testing.assert_equal({k: found[f"synthetic_faces_val/{k}"] for k in AP_KEYS}, metrics)


def test_detections_are_in_pixels_of_the_original_image(trained, tmp_path):
    folder, opts, _ = trained
    shown_at = {}
    for size in (0, 256):
        out = tmp_path / str(size)
        out.mkdir()
        resize = ["INPUT.MIN_SIZE_TEST", size, "INPUT.MAX_SIZE_TEST", 1000]
        main(arguments(out, *opts, *resize, "MODEL.WEIGHTS", folder / "model_final.pth", eval_only=True))
        files = sorted(out.glob("inference/synthetic_faces_val/predictions/*/*.txt"))
        rows = np.concatenate([np.loadtxt(file, skiprows=2, ndmin=2) for file in files])
        assert (rows[:, :2] >= 0).all() and (rows[:, 2:4] > 0).all()
        assert (rows[:, :2] + rows[:, 2:4] <= 128 * (1 + 1e-6)).all()
        shown_at[size] = (rows[:, :2] + rows[:, 2:4]).max()
    assert shown_at[256] > 100  # not left in the corner, where half the coordinates would be


@pytest.mark.parametrize("seed", [3, pytest.param(-1, marks=pytest.mark.slow)])
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path, monkeypatch, seed):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()

    class Killed(Exception):
        pass

    class Killing(tv_train.MetricWriter):
        def step(self, iteration, *args):
            if iteration == 6:
                raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(tv_train, "MetricWriter", Killing)
        with pytest.raises(Killed):
            main(arguments(broken, "SEED", seed))
    assert (broken / "last_checkpoint").read_text() == "model_0000003.pth"
    torch.manual_seed(99)  # whatever else happened to the global generator
    resumed = main(arguments(broken, "SEED", seed, resume=True))

    drawn = yaml.safe_load((broken / "config.yaml").read_text())["SEED"]
    assert drawn >= 0 and (seed < 0 or drawn == seed)
    main(arguments(broken, "SEED", seed, resume=True, eval_only=True))  # leaves the seed as it is
    assert yaml.safe_load((broken / "config.yaml").read_text())["SEED"] == drawn
    expected = main(arguments(whole, "SEED", drawn))
    np.testing.assert_equal(resumed, expected)
    assert_equal(load(broken / "model_final.pth"), load(whole / "model_final.pth"))


def test_resume_without_a_checkpoint_starts_afresh(tmp_path):
    main(arguments(tmp_path, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "()", "DATASETS.TEST", "()", resume=True))
    assert load(tmp_path / "model_final.pth")["iteration"] == 1


def test_resume_from_the_other_engine_is_refused(trained, tmp_path):
    """Its optimizer's state would be left out and the run would not be the one that was interrupted."""
    folder, opts, _ = trained
    model = load(folder / "model_final.pth")["model"]
    state = {"model": convert_names(model, "detectron2"), "iteration": 19, "engine": "detectron2"}
    torch.save(state, tmp_path / "model_0000019.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000019.pth")
    with pytest.raises(ConfigError, match=r"--resume.*model_0000019\.pth.*MODEL\.WEIGHTS"):
        main(arguments(tmp_path, *opts, resume=True))


def test_resume_after_the_end_only_evaluates(trained, tmp_path):
    folder, opts, metrics = trained
    state = load(folder / "model_final.pth")
    torch.save(state, tmp_path / "model_final.pth")
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    np.testing.assert_equal(main(arguments(tmp_path, *opts, resume=True)), metrics)
    assert_equal(load(tmp_path / "model_final.pth"), state)


def write_wider_set(folder, images):
    """``images``: name -> (file content or None, annotation lines). Returns the config's declaration."""
    lines = []
    for name, (content, boxes) in images.items():
        (folder / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            (folder / "photos" / name).write_bytes(content)
        # The published format writes an image without faces as "0" and a row of zeros.
        lines += [name, str(len(boxes)), *(boxes or ["0 0 0 0 0 0 0 0 0 0"])]
    (folder / "annotations.txt").write_text("\n".join(lines) + "\n")
    return f"(('mine', '{folder}/annotations.txt', '{folder}/photos'),)"


def jpeg(tmp_path, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "one.jpg")
    return (tmp_path / "one.jpg").read_bytes()


def test_odd_annotations_and_an_unreadable_image(tmp_path):
    faces = {
        "a/outside.jpg": ["500 500 20 20 0 0 0 0 0 0", "90 70 40 40 0 0 0 0 0 0"],
        "a/zero_area.jpg": ["10 10 0 20 0 0 0 0 0 0", "10 10 30 30 0 0 0 0 0 0"],
        "a/inverted.jpg": ["40 40 -20 -20 0 0 0 0 0 0"],
        "a/invalid.jpg": ["10 10 30 30 0 0 0 1 0 0"],
        "a/no_face.jpg": [],
        "b/many.jpg": [f"{i % 50} {i // 50} 24 24 0 0 0 0 0 0" for i in range(2000)],
    }
    images = {name: (jpeg(tmp_path, i), boxes) for i, (name, boxes) in enumerate(faces.items())}
    images["b/broken.jpg"] = (images["a/no_face.jpg"][0][:700], ["10 10 30 30 0 0 0 0 0 0"])
    sets = ["DATASETS.WIDER_FORMAT", write_wider_set(tmp_path, images), "DATASETS.TRAIN", "('mine',)"]
    opts = [*sets, "DATASETS.TEST", "()", "DATALOADER.MAX_BAD_SHARE", 1.0]
    main(arguments(tmp_path, *opts))

    log = (tmp_path / "log.txt").read_text()
    for kind in ("zero area: 1", "inverted (negative width or height): 1"):
        assert kind in log
    assert "skipping an unreadable image" in log and "photos/b/broken.jpg" in log
    assert re.search(
        r"draws hit one of 1 unreadable images, which were replaced:\n"
        r"  \S+photos/b/broken.jpg: .*\n1 images had 1 boxes outside of them, or nearly\n",
        log,
    )
    assert load(tmp_path / "model_final.pth")["iteration"] == 7
    assert all(np.isfinite(value) for line in read_metrics(tmp_path) for value in line.values())

    opts = [*sets, "DATASETS.TEST", "('mine',)"]
    arguments_of_test = arguments(tmp_path, *opts, "MODEL.WEIGHTS", tmp_path / "model_final.pth", eval_only=True)
    assert "wider_face/AP_all" in main(arguments_of_test)
    log = (tmp_path / "log.txt").read_text()
    message = "mine: 1 of 7 images cannot be read and count as images without detections:"
    assert re.search(rf"{message}\n  \S+photos/b/broken.jpg: ", log)


def test_only_images_without_faces(tmp_path):
    sets = write_wider_set(tmp_path, {f"a/{i}.jpg": (jpeg(tmp_path, i), []) for i in range(2)})
    main(arguments(tmp_path, "DATASETS.WIDER_FORMAT", sets, "DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "()"))
    (line,) = read_metrics(tmp_path)
    assert line["loss_rpn_loc"] == 0 and 0 < line["loss_rpn_cls"] < 1 and line["rpn/num_pos@16"] == 0


def give_nan(model):
    forward = model.rpn.criterion.forward
    nan = torch.tensor(float("nan"), requires_grad=True)
    model.rpn.criterion.forward = lambda *args, **kwargs: forward(*args, **kwargs)._replace(localization=nan)
    return model


def test_a_loss_that_is_not_finite(tmp_path):
    cfg = load_config(write_tiny_config(tmp_path), ["OUTPUT_DIR", str(tmp_path)])
    model = build_model(cfg)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    give_nan(model)
    image = r"synthetic://train/\d"
    with pytest.raises(FloatingPointError, match=rf"iteration 0: .*loss_rpn_loc': nan.*{image}.*{image}"):
        tv_train.train(cfg, model, torch.device("cpu"), resume=False)
    after = model.state_dict()
    assert before.keys() == after.keys() and after["rpn._extra_state"] == 1
    assert [name for name in before if not torch.equal(after[name], before[name])] == ["rpn._extra_state"]
    assert not (tmp_path / "last_checkpoint").exists()


@pytest.mark.parametrize(
    "solver",
    [
        {"MAX_ITER": 60, "STEPS": (30, 50), "WARMUP_ITERS": 7, "WARMUP_FACTOR": 0.1},
        {"MAX_ITER": 60, "STEPS": (30, 50, 90), "WARMUP_ITERS": 35, "WARMUP_METHOD": "constant"},
        {"MAX_ITER": 60, "STEPS": (), "WARMUP_ITERS": 0},
        {"MAX_ITER": 60, "STEPS": (59,), "WARMUP_ITERS": 100, "GAMMA": 0.3},
    ],
)
def test_learning_rates_are_detectron2s(tmp_path, solver):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.config import get_cfg
    from detectron2.solver import build_lr_scheduler

    theirs = get_cfg()
    cfg = load_config(write_tiny_config(tmp_path))
    for key, value in solver.items():
        cfg.SOLVER[key] = theirs.SOLVER[key] = value
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = build_lr_scheduler(theirs, optimizer)
    schedule = build_lr_schedule(cfg)
    for iteration in range(solver["MAX_ITER"]):
        assert schedule(iteration / solver["MAX_ITER"]) == optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "GN"])
def test_parameter_groups_are_detectron2s(tmp_path, norm):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.solver.build import get_default_optimizer_params

    opts = "MODEL.RESNETS.NORM", norm, "SOLVER.WEIGHT_DECAY_NORM", "0.5", "SOLVER.WEIGHT_DECAY", "0.25"
    cfg = load_config(write_tiny_config(tmp_path), [*opts, "MODEL.BACKBONE.FREEZE_AT", "1"])
    model = build_model(cfg)
    groups = get_default_optimizer_params(model, base_lr=cfg.SOLVER.BASE_LR, weight_decay_norm=0.5)
    expected = {p: group.get("weight_decay", 0.25) for group in groups for p in group["params"]}
    optimizer = build_optimizer(cfg, model)
    assert {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]} == expected
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}


@pytest.mark.slow
def test_runs_without_detectron2():
    block = "import sys; sys.modules['detectron2'] = None; import group_sampling.engines.tv.train"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", block], env=environment, check=True)


def test_gpus_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"--num-gpus 2: torch sees 1 CUDA device"):
        main(arguments(tmp_path, "MODEL.DEVICE", "cuda", num_gpus=2))


def test_several_machines_need_an_address(tmp_path):
    args = arguments(tmp_path)
    args.num_machines = 2
    with pytest.raises(ConfigError, match=r"--dist-url: .*tcp://host:port, got 'auto'"):
        main(args)


def test_num_gpus_under_torchrun(tmp_path, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"--num-gpus 2: torchrun"):
        main(arguments(tmp_path, num_gpus=2))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [3, -1])
def test_two_processes(tmp_path, seed):
    """Started from here, resumed under torchrun; all images drawn and detected once."""
    main(arguments(tmp_path, "SEED", seed, "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", "()", num_gpus=2))
    assert {"log.txt", "log.txt.rank1", "model_final.pth"} <= {path.name for path in tmp_path.iterdir()}
    assert len(list(tmp_path.glob("inference/*/predictions/*/*.txt"))) == 3
    assert read_metrics(tmp_path)[-1].keys() <= AP_KEYS | {"iteration"}

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = "from tv_cases import arguments; from group_sampling.engines.tv.train import main; import sys, pathlib\n"
    script += f"main(arguments(pathlib.Path(sys.argv[1]), 'SEED', {seed}, resume=True))"
    (tmp_path / "run.py").write_text(script)
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*torchrun, tmp_path / "run.py", tmp_path], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "Training from iteration 4 to 8 on 2 x cpu" in run.stdout
    assert load(tmp_path / "model_final.pth")["iteration"] == 7

    # The seed that was drawn for the first run is that of the second, in both processes.
    drawn = yaml.safe_load((tmp_path / "config.yaml").read_text())["SEED"]
    single = tmp_path / "single"
    single.mkdir()
    main(arguments(single, "SEED", drawn, "MODEL.WEIGHTS", tmp_path / "model_final.pth", eval_only=True))
    two, one = (folder / "inference/synthetic_faces_val/results.json" for folder in (tmp_path, single))
    assert json.loads(two.read_text()) == json.loads(one.read_text())


def _train_with_nan_on_rank_1(cfg, args, device):
    if distributed.rank() == 1:
        tv_train.build_model = lambda cfg: give_nan(build_model(cfg))
    try:
        tv_train._work(cfg, args, device)
    except FloatingPointError as error:
        return str(error)


@pytest.mark.slow
def test_nan_on_one_rank_stops_all(tmp_path):
    args = arguments(tmp_path, num_gpus=2)
    cfg = load_config(args.config_file, args.opts)
    errors = launch(_all_errors, cfg, args)
    assert "the loss of another process is not finite" in errors[0]
    assert "the loss of this process is not finite" in errors[1]
    assert all("iteration 0" in error and "synthetic://train/" in error for error in errors)


def _all_errors(cfg, args, device):
    return distributed.all_gather(_train_with_nan_on_rank_1(cfg, args, device))
