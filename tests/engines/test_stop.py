"""SIGTERM and SIGINT: a training ends with a checkpoint, and its resumed run with the bits of an uninterrupted one."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tv_cases import arguments, write_tiny_config

from group_sampling import stop
from group_sampling.engines.step import FiniteLossGuard
from group_sampling.engines.tv import train as tv_train
from group_sampling.evaluation.run import Evaluation

ROOT = Path(__file__).resolve().parents[2]
ENGINES = ["torchvision", "detectron2"]


def engine_train(engine):
    if engine == "torchvision":
        return tv_train
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    import group_sampling.engines.d2.train as d2_train

    return d2_train


def weights(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)


def assert_equal_runs(folder, expected_folder):
    found, expected = weights(folder), weights(expected_folder)
    assert found["model"].keys() == expected["model"].keys()
    assert all(torch.equal(found["model"][name], value) for name, value in expected["model"].items())


def send(number, iteration, monkeypatch, module, method="watch"):
    """Have this process receive a signal in the middle of a step."""
    original = getattr(module, method)

    def wrapper(self, step, *args, **kwargs):
        if step == iteration:
            os.kill(os.getpid(), number)
        return original(self, step, *args, **kwargs)

    monkeypatch.setattr(module, method, wrapper)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_a_step(tmp_path, monkeypatch, engine, number, code):
    main = engine_train(engine).main
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    opts = ["SOLVER.MAX_ITER", 4, "SOLVER.STEPS", "(3,)", "DATASETS.TEST", "()", "SOLVER.CHECKPOINT_PERIOD", 100]
    main(arguments(whole, *opts))
    with monkeypatch.context() as patch:
        send(number, 1, patch, FiniteLossGuard)
        with pytest.raises(SystemExit) as stopped:
            main(arguments(broken, *opts))
    assert stopped.value.code == code
    name = signal.Signals(number).name
    assert str(stopped.value) == f"stopped by {name}; --resume continues from model_0000001.pth"
    assert [path.name for path in sorted(broken.glob("*.pth"))] == ["model_0000001.pth"]
    assert (broken / "last_checkpoint").read_text() == "model_0000001.pth"
    assert not list(broken.glob("*.tmp"))
    main(arguments(broken, *opts, resume=True))
    assert_equal_runs(broken, whole)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_signal_in_an_evaluation_of_a_training(tmp_path, monkeypatch, engine):
    """The evaluation ends at once, the training's last step is saved."""
    main = engine_train(engine).main
    add = Evaluation.add
    monkeypatch.setattr(Evaluation, "add", lambda self, *args: os.kill(os.getpid(), signal.SIGTERM) or add(self, *args))
    opts = ["SOLVER.MAX_ITER", 4, "SOLVER.STEPS", "(3,)", "TEST.EVAL_PERIOD", 2, "SOLVER.CHECKPOINT_PERIOD", 100]
    with pytest.raises(SystemExit) as stopped:
        main(arguments(tmp_path, *opts))
    assert stopped.value.code == 143
    assert [path.name for path in tmp_path.glob("*.pth")] == ["model_0000001.pth"]


def test_handlers_are_restored_and_a_pending_signal_ends_what_comes_next():
    before = [signal.getsignal(number) for number in stop.SIGNALS]
    with pytest.raises(stop.Stopped) as stopped, stop.handler.installed(), stop.handler.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # passed on by a launcher: the first one counts
        assert stop.handler.pending == signal.SIGTERM
        with stop.handler.at_once():
            pytest.fail("a block that may be stopped must not start")
    assert stopped.value.code == 143
    assert [signal.getsignal(number) for number in stop.SIGNALS] == before
    with stop.handler.installed():
        assert not stop.handler.pending
        with pytest.raises(stop.Stopped, match="stopped by SIGINT"):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine, processes, to",
    [
        ("torchvision", 1, "group"),
        ("torchvision", 2, "process"),
        ("detectron2", 1, "process"),
        ("detectron2", 2, "group"),
    ],
)
def test_train_net_under_signals(tmp_path, engine, processes, to):
    """SIGTERM to the command alone, or to it and all its processes at once as clusters send it, with loader workers."""
    engine_train(engine)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    opts = ["SOLVER.MAX_ITER", 60, "SOLVER.STEPS", "(50,)", "DATASETS.TEST", "()", "SOLVER.CHECKPOINT_PERIOD", 1000]
    opts += ["DATALOADER.NUM_WORKERS", 1]
    command = [sys.executable, "train_net.py", "--engine", engine, "--num-gpus", processes]
    command += ["--config-file", write_tiny_config(tmp_path)]

    def run(folder, *extra):
        arguments = [*command, *extra, *opts, "OUTPUT_DIR", folder]
        return subprocess.Popen(
            list(map(str, arguments)), cwd=ROOT, env=environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    process = run(broken)
    log = broken / "log.txt"
    while not (log.exists() and re.search(r"iter: \d", log.read_text())):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    (os.kill if to == "process" else os.killpg)(process.pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 143, output + errors
    assert "stopped by SIGTERM; --resume continues from model_" in errors
    assert "Traceback" not in errors and "Traceback" not in output, errors
    saved = [path.name for path in broken.glob("*.pth")]
    assert len(saved) == 1 and saved[0] != "model_final.pth"
    for folder, extra in ((broken, ["--resume"]), (whole, []))[:processes]:  # one process: compared above
        process = run(folder, *extra)
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    if processes > 1:
        assert_equal_runs(broken, whole)
