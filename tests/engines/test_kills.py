"""kill -9 at any moment: --resume ends with the bits of a run that nobody disturbed, and nothing is left behind.

GS_KILLS=50 python -m pytest -m slow tests/engines/test_kills.py kills fifty times; docs/reliability.md has the figure.
"""

import importlib
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_output import engine_main
from test_stop import ROOT
from tv_cases import arguments, write_tiny_config

from group_sampling.evaluation.run import TIMES_FILE

KILLS = int(os.environ.get("GS_KILLS", "2"))
MODULES = {"torchvision": "group_sampling.engines.tv.train", "detectron2": "group_sampling.engines.d2.train"}
# By default two of the four, to spare the suite minutes.
CASES = [("torchvision", 2), ("detectron2", 1)]
if "GS_KILLS" in os.environ:
    CASES += [("torchvision", 1), ("detectron2", 2)]
# Two data sets to evaluate: a kill may hit between them.
OPTS = ["SOLVER.MAX_ITER", 4, "SOLVER.STEPS", "(3,)", "SOLVER.CHECKPOINT_PERIOD", 1, "TEST.EVAL_PERIOD", 2]
OPTS += ["DATASETS.TEST", "('synthetic_faces_val', 'synthetic_faces_train')", "DATALOADER.NUM_WORKERS", 1]
# A server that has imported everything and forks: a run begins in milliseconds.
SERVER = multiprocessing.get_context("forkserver")


def _work(engine, folder, resume, rank, world_size, port):
    """A process of a run, as torchrun starts it."""
    log = os.open(folder / f"stdout{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    multiprocessing.set_start_method("fork", force=True)  # as on the command line: it is the workers' one
    torch.set_num_threads(1)
    if world_size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        os.environ.update(LOCAL_WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    importlib.import_module(MODULES[engine]).main(arguments(folder, *OPTS, resume=resume))


def start(engine, folder, processes, *, resume=False):
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = [
        SERVER.Process(target=_work, args=(engine, folder, resume, rank, processes, port)) for rank in range(processes)
    ]
    for process in run:
        process.start()
    return run


def end(run, seconds=600, victim=None):
    """Wait for the processes of a run to end; returns their exit codes.

    Those that wait for a ``victim`` to come, which was killed before, get SIGTERM, as torchrun would send it at once.
    """
    limit = time.monotonic() + seconds
    if victim is not None:
        victim.join()
        for process in run:
            process.join(20)
            process.terminate()
    for process in run:
        process.join(max(limit - time.monotonic(), 0))
        if process.is_alive():
            process.kill()
            pytest.fail("a process is left over")
    return [process.exitcode for process in run]


def contents(folder):
    """What a run leaves, without times: name -> bytes, of checkpoints the tensors."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".pth":
            found[name] = torch.load(path, weights_only=True)["model"]
        elif (
            path.is_file() and path.name != TIMES_FILE and (name.startswith("inference/") or name == "last_checkpoint")
        ):
            found[name] = path.read_bytes()
    return found


def differences(found, expected):
    names = {name for name in expected if name.endswith(".pth")} & found.keys()
    assert names, "no checkpoint"
    differing = [name for name in expected.keys() - names if found.get(name) != expected[name]]
    for name in names:
        if any(not torch.equal(found[name][key], value) for key, value in expected[name].items()):
            differing.append(name)
    return differing + sorted(found.keys() ^ expected.keys())


def children(folder):
    """Processes whose standard output is a file of the run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/fd/1"):
        try:
            if str(folder) in os.readlink(entry):
                found.append(int(entry.parts[2]))
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("engine, processes", CASES)
def test_killed_at_random_moments(tmp_path, engine, processes):
    engine_main(engine)
    SERVER.set_forkserver_preload([*MODULES.values(), "tv_cases", "test_kills"])
    whole = tmp_path / "whole"
    assert set(end(start(engine, whole, processes))) == {0}, (whole / "stdout0.txt").read_text()
    duration = -time.monotonic()
    again = tmp_path / "again"
    assert set(end(start(engine, again, processes))) == {0}
    duration += time.monotonic()
    expected = contents(whole)
    assert not differences(contents(again), expected), "twice the same run"

    index = CASES.index((engine, processes))
    moments = random.Random(index)
    kills = KILLS // len(CASES) + (index < KILLS % len(CASES))
    for kill in range(kills):
        broken = tmp_path / f"broken{kill}"
        run = start(engine, broken, processes)
        time.sleep(moments.uniform(0, duration))
        victim = moments.randrange(processes)
        run[victim].kill()  # SIGKILL, or nothing where it was quicker than the last time
        moment = "hit" if end(run, victim=run[victim])[victim] == -signal.SIGKILL else "came too late"
        resumed = start(engine, broken, processes, resume=True)
        assert set(end(resumed)) == {0}, (broken / "stdout0.txt").read_text()[-3000:]
        assert not differences(contents(broken), expected), f"kill {kill}"
        left = [path for path in broken.rglob("*") if path.suffix == ".tmp" or path.name == "partial"]
        assert not left
        limit = time.monotonic() + 120
        while children(broken):  # the workers of a loader
            assert time.monotonic() < limit, "a process is left over"
            time.sleep(0.1)
        shutil.rmtree(broken)
        print(f"{engine}, {processes} processes, kill {kill + 1} of {kills} {moment}: the same bits", flush=True)


def ranks_of(launcher):
    """rank -> process id of the processes that torchrun has started."""
    found = {}
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found.update({int(entry[5:]): int(pid) for entry in environment if entry.startswith(b"RANK=")})
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("engine, victim", [("torchvision", 0), ("detectron2", 1)])
def test_torchrun_goes_on_by_itself(tmp_path, engine, victim):
    """It starts all processes again when one is lost; nobody has to say --resume."""
    engine_main(engine)
    # Enough is left after the first checkpoint for the kill to come in time.
    opts = ["SOLVER.MAX_ITER", 120, "SOLVER.STEPS", "(90,)", "SOLVER.CHECKPOINT_PERIOD", 10, "DATASETS.TEST", "()"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}

    def run(folder):
        folder.mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
        command += ["--max-restarts", 1, "train_net.py", "--engine", engine]
        command += ["--config-file", write_tiny_config(folder), *opts, "OUTPUT_DIR", folder]
        return subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip

    broken = run(tmp_path / "broken")
    while not (tmp_path / "broken/last_checkpoint").exists():
        assert broken.poll() is None, broken.communicate()
        time.sleep(0.02)
    os.kill(ranks_of(broken.pid)[victim], signal.SIGKILL)
    output, _ = broken.communicate(timeout=900)
    assert broken.returncode == 0, output[-3000:]
    assert "torchrun has started the processes again (1): --resume" in output
    assert "Training from iteration 0 " not in output.partition("--resume")[2]
    whole = run(tmp_path / "whole")
    output, _ = whole.communicate(timeout=900)
    assert whole.returncode == 0 and "--resume" not in output, output[-3000:]
    assert not differences(contents(tmp_path / "broken"), contents(tmp_path / "whole"))
