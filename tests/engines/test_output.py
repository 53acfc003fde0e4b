"""OUTPUT_DIR: one run at a time; what killed runs and other runs left there is cleaned, said or refused."""

import io
import json
import multiprocessing
import os
import signal
import threading
import time
from contextlib import redirect_stderr

import pytest
import torch
from test_launch import make_args, make_cfg
from tv_cases import arguments

from group_sampling.config import ConfigError
from group_sampling.engines import output
from group_sampling.engines.launch import launch
from group_sampling.engines.output import check_shared, own_output
from group_sampling.engines.tv import train as tv_train

ENGINES = ["torchvision", "detectron2"]


def engine_main(engine):
    if engine == "torchvision":
        return tv_train.main
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    import group_sampling.engines.d2.train as d2_train

    return d2_train.main


def _hold(folder, ready):
    with own_output(folder):
        ready.set()
        signal.pause()


def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path), ready))
    process.start()
    try:
        assert ready.wait(30)
        cfg = make_cfg(tmp_path)
        with pytest.raises(ConfigError, match=rf"process {process.pid} on .* runs in it; wait for its end, or give"):
            launch(lambda *_: pytest.fail("it ran"), cfg, make_args(num_gpus=1))
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert launch(lambda *_: "ran", cfg, make_args(num_gpus=1)) == "ran"  # no lock outlives its process
    assert launch(lambda *_: "again", cfg, make_args(num_gpus=1)) == "again"


def test_a_lock_that_outlives_its_process_is_waited_for(tmp_path):
    """Workers of a loader, forks of the process that was killed, hold it until they notice."""
    released = tmp_path / "released"

    def hold():
        limit = time.monotonic() + 60
        while not released.exists() and time.monotonic() < limit:
            time.sleep(0.05)

    pid = os.fork()
    if pid == 0:
        try:
            with own_output(str(tmp_path)):
                if os.fork() == 0:
                    hold()
                os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    timer = threading.Timer(1.0, released.touch)
    timer.start()
    with own_output(str(tmp_path)):
        assert released.exists()


def _look(rank, folders, resume, queue):
    torch.distributed.init_process_group("gloo", f"file://{folders[0]}/rendezvous", world_size=2, rank=rank)
    output._VISIBLE_SECONDS = 0.2
    with redirect_stderr(io.StringIO()) as said:
        try:
            check_shared(str(folders[rank]), resume=resume)
        except ConfigError as error:
            said.write(f"refused: {error}")
    queue.put((rank, said.getvalue()))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("shared, resume", [(True, True), (False, True), (False, False)])
def test_machines_with_folders_of_their_own(tmp_path, shared, resume):
    """Two processes stand for two machines."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    folders = [tmp_path / "a", tmp_path / ("a" if shared else "b")]
    folders[0].mkdir()
    processes = [context.Process(target=_look, args=(rank, folders, resume, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    main, other = (said for _, said in sorted(queue.get(timeout=60) for _ in processes))
    for process in processes:
        process.join()
    assert [path.name for path in folders[0].iterdir() if path.name != "rendezvous"] == []
    if shared:
        assert main == other == ""
        return
    assert f"OUTPUT_DIR: expected a folder that all machines share, {folders[0]} on " in main
    assert f"got another one: {folders[1]} on " in main
    assert other == (main if resume else "") and main.startswith("refused: ") == resume


def test_what_a_killed_run_left_is_cleaned(tmp_path):
    left = [tmp_path / ".model_0000003.pth.77.tmp", tmp_path / "inference/a/.results.json.8.tmp"]
    kept = [tmp_path / "model_0000001.pth", tmp_path / ".hidden", tmp_path / "notes.tmp"]
    (tmp_path / "inference/a").mkdir(parents=True)
    for path in left + kept:
        path.write_bytes(b"x")
    metrics = tmp_path / "metrics.json"
    metrics.write_text('{"iteration": 19}\n{"iteration": 3')
    with own_output(str(tmp_path)):
        assert [path.exists() for path in left + kept] == [False] * len(left) + [True] * len(kept)
        assert metrics.read_text() == '{"iteration": 19}\n'
    metrics.write_text("")
    with own_output(str(tmp_path)):
        assert metrics.read_text() == ""


@pytest.mark.parametrize("bad", ["file", "file/below", "a\0b", "x" * 300])
def test_a_folder_that_cannot_be_written(tmp_path, bad):
    (tmp_path / "file").write_text("")
    expected = r"^OUTPUT_DIR: expected a folder that can be written to, got '.*': "
    with pytest.raises(ConfigError, match=expected), own_output(str(tmp_path / bad)):
        pytest.fail("the block ran")


def train(main, folder, *opts, **flags):
    main(arguments(folder, "SOLVER.STEPS", "()", "DATASETS.TEST", "()", "SOLVER.CHECKPOINT_PERIOD", 1, *opts, **flags))


@pytest.mark.parametrize("engine", ENGINES)
def test_resume_says_what_changed_and_refuses_what_cannot_be(tmp_path, engine, capsys):
    main = engine_main(engine)
    train(main, tmp_path, "SOLVER.MAX_ITER", 2)
    capsys.readouterr()

    train(main, tmp_path, "SOLVER.MAX_ITER", 3, "SEED", 9, "MODEL.GROUP_SAMPLING.SAMPLER", "uniform", resume=True)
    said = capsys.readouterr().out
    assert "--resume: SEED was 3, and is 9 from here on" in said
    assert "--resume: MODEL.GROUP_SAMPLING.SAMPLER was group, and is uniform from here on" in said
    assert "--resume: SOLVER.MAX_ITER was 2, and is 3 from here on" in said and "MODEL.DEVICE" not in said

    with pytest.raises(ConfigError, match=r"the checkpoint is of iteration 2, expected one below SOLVER.MAX_ITER 1"):
        train(main, tmp_path, "SOLVER.MAX_ITER", 1, resume=True)
    (tmp_path / "last_checkpoint").unlink()
    with pytest.raises(ConfigError, match=r"--resume: .* has checkpoints, the last is model_final\.pth, but no file"):
        train(main, tmp_path, "SOLVER.MAX_ITER", 3, resume=True)


@pytest.mark.parametrize("engine", ENGINES)
def test_killed_before_the_final_checkpoint(tmp_path, engine):
    """All steps are done, and the last periodic checkpoint is written: --resume writes the file that is missing."""
    main = engine_main(engine)
    opts = ["SOLVER.MAX_ITER", 2, "SOLVER.EMA.ENABLED", True]
    train(main, tmp_path, *opts)
    final, last = tmp_path / "model_final.pth", tmp_path / "last_checkpoint"
    expected = torch.load(final, weights_only=True)
    final.unlink()
    last.write_text("model_0000001.pth")
    train(main, tmp_path, *opts, resume=True)
    found = torch.load(final, weights_only=True)
    assert last.read_text() == "model_final.pth" and found["iteration"] == expected["iteration"] == 1
    assert found.keys() == expected.keys()
    assert all(torch.equal(found["model"][name], value) for name, value in expected["model"].items())
    written = final.stat().st_mtime_ns
    train(main, tmp_path, *opts, resume=True)
    assert final.stat().st_mtime_ns == written


@pytest.mark.parametrize("engine", ENGINES)
def test_damaged_and_useless_weights_are_refused(tmp_path, engine):
    main = engine_main(engine)
    train(main, tmp_path, "SOLVER.MAX_ITER", 1)
    file = tmp_path / "model_final.pth"
    content = bytearray(file.read_bytes())
    checkpoint = torch.load(file, weights_only=True)
    bad = tmp_path / "bad.pth"
    opts = ["MODEL.WEIGHTS", bad, "DATASETS.TEST", "('synthetic_faces_val',)"]

    largest = max(checkpoint["model"].values(), key=torch.Tensor.nbytes.__get__).contiguous().numpy().tobytes()
    position = content.find(largest) + len(largest) // 2
    content[position] ^= 4
    bad.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.pth: the file is damaged: the checksum of .* is wrong"):
        main(arguments(tmp_path, *opts, eval_only=True))

    name = next(name for name, value in checkpoint["model"].items() if value.is_floating_point() and value.dim() == 4)
    checkpoint["model"][name][0, 0, 0, 0] = float("nan")
    torch.save(checkpoint, bad)
    with pytest.raises(ValueError, match=rf"bad\.pth: expected finite weights, got NaN or infinity in {name}"):
        main(arguments(tmp_path, *opts, eval_only=True))


def test_metrics_of_a_resumed_run_are_whole_lines(tmp_path):
    train(tv_train.main, tmp_path, "SOLVER.MAX_ITER", 1)
    metrics = tmp_path / "metrics.json"
    metrics.write_text(metrics.read_text() + '{"total_loss": 1.')
    train(tv_train.main, tmp_path, "SOLVER.MAX_ITER", 2, resume=True)
    assert [json.loads(line)["iteration"] for line in metrics.read_text().splitlines()] == [0, 1]
