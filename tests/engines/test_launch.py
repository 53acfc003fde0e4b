"""Processes of a run: results come back, a failure or a signal ends all of them."""

import ast
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from fvcore.common.config import CfgNode
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from group_sampling import distributed
from group_sampling.engines.launch import _agree_on_prefix, _explain, launch
from group_sampling.errors import UserError


def make_cfg(folder):
    return CfgNode({"MODEL": {"DEVICE": "cpu"}, "OUTPUT_DIR": str(folder)})


def make_args(**values):
    defaults = {"num_gpus": 2, "num_machines": 1, "machine_rank": 0, "dist_url": "auto", "folder": "", "resume": False}
    return Namespace(**{**defaults, **values})


def exchange(cfg, args, device):
    total = torch.ones(1)
    if distributed.world_size() > 1:
        torch.distributed.all_reduce(total)
    return {
        "rank": distributed.rank(),
        "sum": int(total),
        "all": distributed.all_gather(distributed.rank()),
        "main": distributed.gather(10 * distributed.rank()),
        "from main": distributed.broadcast(f"rank {distributed.rank()}"),
        "device": str(device),
    }


def fail_on_rank_1(cfg, args, device):
    Path(args.folder, f"pid{distributed.rank()}").write_text(str(os.getpid()))
    if distributed.rank() == 1:
        raise RuntimeError("no luck on rank 1")
    time.sleep(120)


def sleep(cfg, args, device):
    Path(args.folder, f"pid{distributed.rank()}").write_text(str(os.getpid()))
    time.sleep(120)


def finish_once(cfg):
    with open(Path(cfg.OUTPUT_DIR, "finished"), "a") as file:
        file.write("once ")


@pytest.mark.parametrize("num_gpus", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_end_is_reached_once(tmp_path, num_gpus):
    """By one process, when no other one works any more, and not after a failure."""
    launch(exchange, make_cfg(tmp_path), make_args(num_gpus=num_gpus), finish_once)
    assert (tmp_path / "finished").read_text() == "once "
    with pytest.raises(ZeroDivisionError if num_gpus == 1 else RuntimeError):
        launch(divide_by_zero, make_cfg(tmp_path), make_args(num_gpus=num_gpus), finish_once)
    assert (tmp_path / "finished").read_text() == "once "


def test_one_rank_of_torchrun_reaches_the_end(tmp_path, monkeypatch):
    for rank in range(2):
        monkeypatch.setattr("group_sampling.engines.launch._launch", lambda *args: "result")
        monkeypatch.setenv("RANK", str(rank))
        assert launch(exchange, make_cfg(tmp_path), make_args(num_gpus=1), finish_once) == "result"
    assert (tmp_path / "finished").read_text() == "once "


def divide_by_zero(cfg, args, device):
    return 1 // 0


def is_alive(pid):
    """A process that has ended and waits for its parent counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_all_end(folder, seconds=20):
    pids = [int(path.read_text()) for path in folder.glob("pid*")]
    limit = time.monotonic() + seconds
    while any(map(is_alive, pids)):
        assert time.monotonic() < limit, "a process is left over"
        time.sleep(0.05)
    return pids


def test_one_process_needs_no_group(tmp_path):
    expected = {"rank": 0, "sum": 1, "all": [0], "main": [0], "from main": "rank 0", "device": "cpu"}
    assert launch(exchange, make_cfg(tmp_path), make_args(num_gpus=1)) == expected


def test_two_processes_return_the_main_ones_result(tmp_path):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    expected = {"rank": 0, "sum": 2, "all": [0, 1], "main": [0, 10], "from main": "rank 0", "device": "cpu"}
    assert launch(exchange, make_cfg(tmp_path), make_args()) == expected
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_failure_ends_all_processes(tmp_path):
    with pytest.raises(RuntimeError, match="^rank 1: RuntimeError: no luck on rank 1") as caught:
        launch(fail_on_rank_1, make_cfg(tmp_path), make_args(folder=str(tmp_path)))
    assert "in fail_on_rank_1" in str(caught.value.__cause__)  # the traceback is there for --debug
    assert len(assert_all_end(tmp_path)) == 2


SCRIPT = """
import sys
import test_launch
if __name__ == "__main__":
    work, machine_rank, num_gpus, num_machines, dist_url, folder = sys.argv[1:]
    args = test_launch.make_args(
        machine_rank=int(machine_rank),
        num_gpus=int(num_gpus),
        num_machines=int(num_machines),
        dist_url=dist_url,
        folder=folder,
    )
    print(test_launch.launch(getattr(test_launch, work), test_launch.make_cfg(folder), args), flush=True)
"""


def start(folder, work, *arguments):
    (folder / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    command = [sys.executable, str(folder / "script.py"), work, *map(str, arguments), str(folder)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_no_process_behind(tmp_path, number):
    process = start(tmp_path, "sleep", 0, 2, 1, "auto")
    limit = time.monotonic() + 60
    while len(list(tmp_path.glob("pid*"))) < 2:
        assert time.monotonic() < limit and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    assert "Traceback" not in errors or number == signal.SIGKILL
    assert len(assert_all_end(tmp_path)) == 2


@pytest.mark.slow
def test_two_machines_meet_at_the_address(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    machines = [start(tmp_path, "exchange", rank, 1, 2, address) for rank in range(2)]
    outputs = [machine.communicate(timeout=120) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    first, second = (ast.literal_eval(out.strip().splitlines()[-1]) for out, _ in outputs)
    assert (first["rank"], second["rank"]) == (0, 1) and first["all"] == second["all"] == [0, 1]
    assert first["main"] == [0, 10] and second["main"] == [] and second["from main"] == "rank 0"


@pytest.mark.parametrize(
    "reports, exit_code, expected",
    [
        (["RuntimeError: connection closed by peer", "UserError: SEED: expected 1"], 1, UserError("SEED: expected 1")),
        (
            ["RuntimeError: connection closed by peer"],
            1,
            RuntimeError("rank 0: RuntimeError: connection closed by peer"),
        ),
        (["UserError: two\nlines", None], 1, UserError("two\nlines")),
        (
            [None],
            -9,
            UserError("the process of rank 0 was ended: Signal 9 (SIGKILL) received by PID 7; the system does"),
        ),
        ([None], -11, UserError("the process of rank 0 was ended: Signal 11 (SIGSEGV) received by PID 7")),
    ],
)
def test_the_process_at_fault_is_heard(tmp_path, reports, exit_code, expected):
    """``reports`` are what the processes left, None: a file cut off; the agent names the first."""
    files = []
    for rank, text in enumerate(reports):
        files.append(tmp_path / f"attempt_0/{rank}/error.json")
        files[-1].parent.mkdir(parents=True)
        content = {"message": {"message": text, "extraInfo": {"py_callstack": "...", "timestamp": "5"}}}
        files[-1].write_text(json.dumps(content) if text else '{"mess')
    named = ProcessFailure(0, 7, exit_code, str(files[0]) if reports[0] else "")
    found = _explain(ChildFailedError("work", {0: named}), str(tmp_path))
    assert type(found) is type(expected) and str(found).startswith(str(expected))


def test_a_group_does_not_find_the_keys_of_the_last_one():
    """torchrun keeps one store: processes that come early must not take what a lost group has written."""
    store, draw = torch.distributed.HashStore(), random.Random(0)

    def join(world_size, come):
        def one(rank):
            time.sleep(draw.uniform(0, 0.05))
            return _agree_on_prefix(store, rank, world_size, seconds=10 if len(come) == world_size else 0.2)

        with ThreadPoolExecutor(world_size) as threads:
            return [threads.submit(one, rank) for rank in come]

    prefixes = []
    for world_size, lost in [(3, None), (3, 0), (3, None), (3, 2), (3, None), (2, None), (4, None), (1, None)]:
        come = [rank for rank in range(world_size) if rank != lost]
        joined = join(world_size, come)
        if lost is None:
            (prefix,) = {future.result() for future in joined}
            prefixes.append(prefix)
        else:
            assert any("expected all 3 processes to come" in str(future.exception()) for future in joined)
    assert len(set(prefixes)) == len(prefixes)
