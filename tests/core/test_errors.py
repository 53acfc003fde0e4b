"""What a command prints when it fails, and with which exit code."""

import argparse
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from group_sampling.data.records import UnreadableImageError
from group_sampling.errors import UserError, add_debug_flag, describe, exit_on_error, is_expected
from group_sampling.evaluation.wider_face.files import read_predictions


def run(error, *arguments, **options):
    """(exit code, what the process prints to stderr because of it) of a command that fails with ``error``."""
    parser = argparse.ArgumentParser()
    add_debug_flag(parser)
    with pytest.raises(SystemExit) as caught, exit_on_error("tool.py", parser.parse_args(arguments), **options):
        raise error
    code = caught.value.code
    return (1, code) if isinstance(code, str) else (code, "")  # as Python ends on a text


@pytest.mark.parametrize(
    "error, message",
    [
        (UserError("a.yaml: expected this, got that"), "a.yaml: expected this, got that"),
        (FileNotFoundError(2, "No such file or directory", "a/b.txt"), "a/b.txt: No such file or directory"),
        (PermissionError("no"), "no"),
        (ModuleNotFoundError("No module named 'x'"), "No module named 'x'"),
        (ImportError("cannot import name 'x'"), "ImportError: cannot import name 'x'"),
        (MemoryError(), "MemoryError"),
        (FloatingPointError("iteration 3: not finite"), "iteration 3: not finite"),
    ],
)
def test_what_a_user_can_cause_is_one_line(error, message):
    assert is_expected(error)
    assert run(error) == (1, f"tool.py: error: {message}")


def test_another_exit_code_and_signals(capsys):
    assert run(UserError("no"), code=2) == (2, "")
    for number in (signal.SIGINT, signal.SIGTERM):
        args = argparse.Namespace(debug=False)
        with pytest.raises(SystemExit) as caught, exit_on_error("tool.py", args, after_stop="again"):
            os.kill(os.getpid(), number)
        assert caught.value.code == 128 + number
    said = ["tool.py: error: no", "tool.py: stopped by SIGINT; again", "tool.py: stopped by SIGTERM; again"]
    assert capsys.readouterr().err.splitlines() == said


def test_debug_lets_the_error_pass():
    for error in (UserError("no"), KeyError("x")):
        with pytest.raises(type(error)), exit_on_error("tool.py", argparse.Namespace(debug=True)):
            raise error


def test_a_fault_of_the_program_leaves_its_traceback_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, message = run(KeyError("SEED"))
    (file,) = tmp_path.glob("tool.py-*.log")
    assert code == 1 and message == (
        f"tool.py: error: KeyError: 'SEED' (not expected: {file} has the traceback; --debug shows it)"
    )
    assert "in run" in file.read_text() and file.read_text().endswith("KeyError: 'SEED'\n")


def test_a_value_error_is_the_users_where_this_project_raised_it(tmp_path):
    with pytest.raises(ValueError) as ours:
        next(read_predictions(tmp_path))
    assert is_expected(ours.value)
    with pytest.raises(ValueError) as theirs:
        json.loads("{")
    assert not is_expected(theirs.value)


def test_the_error_of_a_data_loaders_worker():
    """As ``torch._utils.ExceptionWrapper`` raises it again: the message is a traceback."""
    text = (
        "Caught UnreadableImageError in DataLoader worker process 0.\n"
        "Original Traceback (most recent call last):\n"
        '  File "x.py", line 3, in f\n    g()\n'
        "group_sampling.data.records.UnreadableImageError: cannot read image a.jpg: it is text\n"
    )
    again = pickle.loads(pickle.dumps(UnreadableImageError(text)))
    assert describe(again) == "cannot read image a.jpg: it is text"


def test_every_command_has_the_flag_and_the_one_place(repository):
    """Of the commands of the repository, none catches errors by itself."""
    tools = sorted((repository / "projects/GroupSampling/tools").glob("*.py"))
    for path in (repository / "train_net.py", *tools):
        source = path.read_text()
        assert "add_debug_flag(parser)" in source and f'with exit_on_error("{path.name}", args' in source, path
        assert "sys.exit(f" not in source, path


def test_a_real_process_ends_with_the_message(repository, tmp_path):
    tool = repository / "projects/GroupSampling/tools/evaluate_fddb.py"
    command = [sys.executable, str(tool), "--predictions", str(tmp_path / "none"), "--annotations", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("evaluate_fddb.py: error: ")
    done = subprocess.run([*command, "--debug"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" in done.stderr and Path(tool).name in done.stderr
