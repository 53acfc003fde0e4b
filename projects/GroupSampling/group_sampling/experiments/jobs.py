"""Trainings in processes of their own: several at a time, with the progress and the remaining time of all."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from tqdm import tqdm

from .runs import parse_metrics

POLL_SECONDS = 1.0
FILE_SECONDS = 60.0  # between two lines of the progress in a file
_TRAINING_SHARE = 0.95  # of a job's time; the rest is its evaluation
_TAIL_BYTES = 8192  # holds the last lines of metrics.json
_ERROR_LINES = 20


@dataclass(frozen=True)
class Job:
    """One call of ``train_net.py``.

    Attributes:
        title: what the progress bar and an error call it.
        command: program and arguments.
        folder: its ``OUTPUT_DIR``. What it prints goes to ``console.txt`` there.
    """

    title: str
    command: Sequence[str]
    folder: Path


@dataclass(frozen=True)
class Outcome:
    """A job that ended after ``seconds``; ``error`` is empty if it went well, else shows the end of the console."""

    job: Job
    seconds: float
    error: str


def run_jobs(
    jobs: Sequence[Job], *, side_by_side: int = 1, working_directory: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Outcome]:
    """Run all jobs, ``side_by_side`` at a time, and yield each as it ends.

    A progress bar counts training iterations of all jobs and estimates the time to the end of the last. A job that
    fails does not stop the others. Leaving the iteration early, for instance by an exception, ends what is running.

    Args:
        environment: variables to set for the jobs in addition to those of this process.
    """
    waiting = list(reversed(jobs))
    running: dict[subprocess.Popen, tuple[Job, float]] = {}
    num_done, next_line = 0, 0.0
    layout = "{desc} {percentage:5.1f} %|{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=len(jobs), bar_format=layout, smoothing=0, dynamic_ncols=True, disable=not jobs) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < side_by_side:
                    job = waiting.pop()
                    running[_start(job, working_directory, environment)] = job, time.monotonic()
                time.sleep(POLL_SECONDS)
                for process, (job, start) in list(running.items()):
                    if process.poll() is not None:
                        del running[process]
                        num_done += 1
                        yield Outcome(job, time.monotonic() - start, _error(job, process.returncode))
                states = [(job, *progress(job.folder)) for job, _ in running.values()]
                bar.set_description(f"[{num_done}/{len(jobs)}]", refresh=False)
                bar.set_postfix_str("; ".join(f"{job.title} {state}" for job, _, state in states), refresh=False)
                bar.n = num_done + _TRAINING_SHARE * sum(share for _, share, _ in states)
                if sys.stderr.isatty() or time.monotonic() >= next_line:
                    bar.refresh()
                    next_line = time.monotonic() + FILE_SECONDS
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()


def progress(folder: Path) -> tuple[float, str]:
    """Share of the iterations that the training in ``folder`` has done, and its state in a word or two."""
    try:
        with (folder / "metrics.json").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            tail = file.read().decode(errors="replace")
        max_iter = yaml.safe_load((folder / "config.yaml").read_text())["SOLVER"]["MAX_ITER"]
    except FileNotFoundError:
        return 0.0, "starting"
    for row in reversed(parse_metrics(tail)):
        if "total_loss" in row:
            share = (row["iteration"] + 1) / max_iter
            return share, "evaluating" if share >= 1 else f"loss {row['total_loss']:.3f}"
    return 0.0, "starting"


def _start(job: Job, working_directory: Path, environment: Mapping[str, str] | None) -> subprocess.Popen:
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / "console.txt").open("w") as console:
        return subprocess.Popen(
            job.command,
            stdout=console,
            stderr=subprocess.STDOUT,
            cwd=working_directory,
            env={**os.environ, **(environment or {})},
        )


def _error(job: Job, return_code: int) -> str:
    if return_code == 0:
        return ""
    console = job.folder / "console.txt"
    tail = "\n".join(console.read_text(errors="replace").splitlines()[-_ERROR_LINES:])
    return f"{job.title} failed with exit code {return_code}; the end of {console}:\n{tail}"
