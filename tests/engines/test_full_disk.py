"""A disk that is full, or read-only: one message, which says what is safe, and nothing half written."""

import errno
import logging
import subprocess
import sys

import pytest
import torch
from test_output import ENGINES, engine_main
from tv_cases import arguments

from group_sampling.config import ConfigError
from group_sampling.engines.output import own_output, saying_what_is_safe
from group_sampling.errors import UserError, describe
from group_sampling.files import atomic_file, write_json

FULL = "No space left on device"


@pytest.fixture
def disk(tmp_path):
    """A function that gives a small disk of its own the size, and the options, that it is called with."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        source = ["-o", options, "tmpfs", folder] if not folder.is_mount() else ["-o", f"remount,{options}", folder]
        done = subprocess.run(["mount", "-t", "tmpfs", *map(str, source)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a disk of its own cannot be mounted here: {done.stderr.strip()}")
        return folder

    try:
        yield mount
    finally:
        if folder.is_mount():
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_file_keeps_what_it_had(disk):
    file = disk("size=256k") / "a.json"
    write_json(file, {"kept": True})
    for write in (
        lambda stream: torch.save({"model": torch.rand(10**6)}, stream),  # libtorch has no word of the disk
        lambda stream: stream.write(bytes(10**6)),
        lambda stream: stream.write(bytes(10**6)) and pytest.fail("written"),
    ):
        with pytest.raises(OSError) as caught, atomic_file(file) as stream:
            write(stream)
        assert caught.value.errno == errno.ENOSPC and describe(caught.value) == f"{file}: {FULL}"
        assert file.read_text() == '{\n  "kept": true\n}\n' and [path.name for path in file.parent.iterdir()] == [
            "a.json"
        ]
    disk("ro")
    with pytest.raises(OSError, match="Read-only file system") as caught:
        write_json(file, {})
    assert caught.value.filename == str(file)


def test_an_error_in_the_block_is_not_the_disks(tmp_path):
    with pytest.raises(OSError, match="elsewhere") as caught, atomic_file(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "elsewhere", "/another/file")
    assert caught.value.filename == "/another/file"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_checkpoint_does_not_fit(disk, tmp_path, engine):
    """The message names the one that is whole, and the run goes on from it where there is space."""
    main = engine_main(engine)
    folder = disk("size=30m")
    opts = ["SOLVER.MAX_ITER", 3, "SOLVER.STEPS", "()", "DATASETS.TEST", "()", "SOLVER.CHECKPOINT_PERIOD", 1]
    run = arguments(tmp_path, *opts, "OUTPUT_DIR", folder)
    whole = f"{folder}/model_0000000.pth"
    with pytest.raises(UserError) as caught:
        main(run)
    safe = f"{whole} is whole: make space, and --resume continues from it"
    assert str(caught.value) == f"{folder}/model_0000001.pth: {FULL}. {safe}"
    assert [path.name for path in folder.glob("*.pth")] == ["model_0000000.pth"] and not list(folder.rglob("*.tmp"))
    disk("size=200m")
    run.resume = True
    main(run)
    assert (folder / "model_final.pth").exists()


@pytest.mark.parametrize("engine", ENGINES)
def test_logs_do_not_fit(disk, tmp_path, capfd, engine):
    """Of the log, config, metrics and TensorBoard whichever comes first; no traceback for every line."""
    folder = disk("size=16k")
    with pytest.raises(UserError) as caught:
        engine_main(engine)(arguments(tmp_path, "SOLVER.MAX_ITER", 8, "DATASETS.TEST", "()", "OUTPUT_DIR", folder))
    assert FULL in str(caught.value)
    assert str(caught.value).endswith(f"{folder} has no checkpoint yet: start again where there is space")
    assert "Traceback" not in capfd.readouterr().err


def test_other_errors_pass(tmp_path, capfd):
    handle = logging.Handler.handleError
    with pytest.raises(FileNotFoundError), saying_what_is_safe(str(tmp_path)):
        (tmp_path / "missing").read_text()
    log = logging.Logger("mine")
    log.addHandler(logging.StreamHandler(sys.stderr))
    with saying_what_is_safe(str(tmp_path)):
        log.error("%d", "no number")
    assert "Logging error" in capfd.readouterr().err
    assert logging.Handler.handleError is handle


def test_a_read_only_folder(disk):
    folder = disk("size=1m,ro")
    expected = r"^OUTPUT_DIR: expected a folder that can be written to, got '.*out': Read-only file system"
    with pytest.raises(ConfigError, match=expected), own_output(str(folder / "out")):
        pytest.fail("the block ran")
