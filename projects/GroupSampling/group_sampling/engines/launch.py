"""Runs the work of an engine in one process, in several of this machine, or under ``torchrun``."""

import argparse
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fvcore.common.config import CfgNode
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.rendezvous import rendezvous

from .. import stop
from ..config import ConfigError
from ..errors import UserError, describe, is_expected
from .output import check_shared, own_output, saying_what_is_safe

# Called as work(cfg, args, device), where ``device`` is that of the process. A function of a module, since other
# processes import it by name.
Work = Callable[[CfgNode, argparse.Namespace, torch.device], Any]

# Called as finish(cfg) by one process when all work is done, while ``OUTPUT_DIR`` is still the run's.
Finish = Callable[[CfgNode], None]

_USER_ERROR = f"{UserError.__name__}: "  # how the report of a failed process begins


def launch(work: Work, cfg: CfgNode, args: argparse.Namespace, finish: Finish | None = None) -> Any:
    """Call ``work`` in every process of a run.

    Args:
        cfg: ``MODEL.DEVICE`` decides between GPUs (NCCL) and CPUs (gloo).
        args: with the attributes of Detectron2's ``default_argument_parser``. ``num_gpus`` is the number of processes
            on this machine, also with ``MODEL.DEVICE cpu``. Under ``torchrun`` its process group is joined instead;
            when it has started the processes again (``--max-restarts``), ``resume`` becomes True.
        finish: called at the end of a run that has not failed, on the first machine.

    Returns:
        What ``work`` returned in the first process of this machine.

    Raises:
        SystemExit: SIGTERM (code 143) or SIGINT (130); all processes have ended, a training with a checkpoint.
        ConfigError: the number of processes is not usable here, or ``OUTPUT_DIR`` is not.
        UserError: a process failed for a reason that the user can mend; the others were ended.
        RuntimeError: a process failed for another reason.
    """
    is_first = int(os.environ.get("RANK", args.machine_rank)) == 0
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if restarts > 0 and not getattr(args, "resume", False):
        args.resume = True
        if is_first:
            print(f"torchrun has started the processes again ({restarts}): --resume", flush=True)
    with own_output(cfg.OUTPUT_DIR) if is_first else nullcontext():
        result = _launch(work, cfg, args)
        if is_first and finish:
            finish(cfg)
        return result


def _launch(work: Work, cfg: CfgNode, args: argparse.Namespace) -> Any:
    device = torch.device(cfg.MODEL.DEVICE)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        if args.num_gpus > 1:
            raise ConfigError(f"--num-gpus {args.num_gpus}: torchrun has started the processes, omit the flag")
        return _work_in_group(work, cfg, args)
    if args.num_gpus * args.num_machines <= 1:
        with stop.handler.installed(), saying_what_is_safe(cfg.OUTPUT_DIR):
            return work(cfg, args, device)
    if device.type == "cuda" and args.num_gpus > torch.cuda.device_count():
        raise ConfigError(f"--num-gpus {args.num_gpus}: torch sees {torch.cuda.device_count()} CUDA devices")
    if args.num_machines > 1 and not args.dist_url.startswith("tcp://"):
        raise ConfigError(
            f"--dist-url: expected an address that all machines know, tcp://host:port, got {args.dist_url!r}"
        )
    with tempfile.TemporaryDirectory() as folder:  # of the files by which failed processes report their error
        config = LaunchConfig(
            min_nodes=args.num_machines,
            max_nodes=args.num_machines,
            nproc_per_node=args.num_gpus,
            max_restarts=0,  # --resume restarts a run
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            **_rendezvous(args),
        )
        # The agent installs signal handlers, where Python can, and does not restore the previous ones.
        is_main_thread = threading.current_thread() is threading.main_thread()
        names = config.signals_to_handle.split(",") if is_main_thread else ()
        handlers = {signal.Signals[name]: signal.getsignal(signal.Signals[name]) for name in names}
        try:
            with _quiet_agent():
                results = elastic_launch(config, _work_in_group)(work, cfg, args)
        except ChildFailedError as error:
            raise _explain(error, folder) from error
        except SignalException as error:  # the agent has ended the processes
            sys.exit(128 + error.sigval)
        finally:
            for sig, handler in handlers.items():
                signal.signal(sig, handler)
    return results[min(results)]


def _rendezvous(args: argparse.Namespace) -> dict[str, Any]:
    """How the processes meet, as ``torchrun`` has it: at ``--dist-url``, by default at a free port of this machine."""
    endpoint = args.dist_url.removeprefix("tcp://")
    if args.num_machines > 1:
        return {
            "rdzv_backend": "static",
            "rdzv_endpoint": endpoint,
            "rdzv_configs": {"rank": args.machine_rank},
            "run_id": endpoint,
        }
    return {
        "rdzv_backend": "c10d",
        "rdzv_endpoint": "localhost:0" if endpoint == "auto" else endpoint,
        "local_addr": "localhost",
        "run_id": uuid.uuid4().hex,
    }


@contextmanager
def _quiet_agent() -> Iterator[None]:
    """Keep the agent from logging the traceback of a failed process: ChildFailedError has it."""
    log = logging.getLogger("torch.distributed.elastic.multiprocessing.api")

    def has_no_traceback(entry: logging.LogRecord) -> bool:
        return not entry.exc_info

    log.addFilter(has_no_traceback)
    try:
        yield
    finally:
        log.removeFilter(has_no_traceback)


def _explain(error: ChildFailedError, folder: str) -> UserError | RuntimeError:
    """What went wrong, from the files below ``folder`` in which failed processes report it.

    All are looked at: the process that the agent names may only have lost the connection to the one at fault.
    """
    for file in sorted(Path(folder).rglob("error.json")):
        try:
            text = json.loads(file.read_text())["message"]["message"]
        except (ValueError, KeyError, TypeError):  # the process was ended while it wrote
            continue
        if text.startswith(_USER_ERROR):
            return UserError(text.removeprefix(_USER_ERROR))
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:
        hint = "; the system does that when memory runs out" if failure.exitcode == -signal.SIGKILL else ""
        return UserError(f"the process of rank {rank} was ended: {failure.message}{hint}")
    text = failure.message["message"] if isinstance(failure.message, dict) else failure.message
    return RuntimeError(f"rank {rank}: {text}")


def _agree_on_prefix(store: dist.Store, rank: int, world_size: int, seconds: float = 1800) -> str:
    """A prefix for the keys of this group of processes, which no group before it has used.

    torchrun keeps one store for all its restarts. Without a prefix, a process may read where one of the last attempt
    listened, and is refused (https://github.com/pytorch/pytorch/issues/167288). The number of the restart would not do:
    machines count their own.

    Args:
        store: of the rendezvous; may hold what earlier groups wrote.
        rank: of this process.
        world_size: number of processes.
        seconds: after which the others are given up.

    Raises:
        UserError: some process did not come in time.
    """
    limit = time.monotonic() + seconds
    mine = uuid.uuid4().hex  # tells this process from those that had its rank before
    welcome: list[str] = []  # the ids of all processes, as rank 0 knows them; its own is the prefix
    store.set(f"joining/{rank}", mine)
    keys = [f"joining/{other}" for other in range(world_size)]
    while time.monotonic() < limit:
        if rank == 0 and store.check(keys):
            known = [store.get(key).decode() for key in keys]
            if known != welcome:
                welcome = known
                store.set("welcome", json.dumps(welcome))
            if store.check([f"{mine}/joined/{other}" for other in range(1, world_size)]):
                return mine
        elif rank > 0 and store.check(["welcome"]):
            welcome = json.loads(store.get("welcome"))
            if len(welcome) > rank and welcome[rank] == mine:
                store.set(f"{welcome[0]}/joined/{rank}", "")
                return welcome[0]
        time.sleep(0.02)
    raise UserError(f"rank {rank}: expected all {world_size} processes to come, waited {seconds:.0f} s for them")


@record
def _work_in_group(work: Work, cfg: CfgNode, args: argparse.Namespace) -> Any:
    """What each process of several does."""
    device = torch.device(cfg.MODEL.DEVICE)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    store, rank, world_size = next(rendezvous("env://"))
    store = dist.PrefixStore(_agree_on_prefix(store, rank, world_size), store)
    # gloo exchanges the Python objects, also where NCCL exchanges the gradients.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    try:
        with stop.handler.installed(), saying_what_is_safe(cfg.OUTPUT_DIR):
            check_shared(cfg.OUTPUT_DIR, resume=getattr(args, "resume", False))  # a foreign loop may not have it
            result = work(cfg, args, device)
    except stop.Stopped as stopped:
        if dist.get_rank() == 0:
            print(f"train_net.py: {stopped}", file=sys.stderr, flush=True)
        raise
    except Exception as error:
        if is_expected(error):
            raise UserError(describe(error)) from error
        raise
    dist.destroy_process_group()
    return result
