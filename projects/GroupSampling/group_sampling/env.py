"""``python -m group_sampling.env``: what this environment can do, and why it cannot do the rest."""

import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import sys
from pathlib import Path

import torch

from .data.catalog import Catalog
from .ops import extension_status
from .version import __version__

logger = logging.getLogger(__name__)

ENGINES = ("detectron2", "torchvision")
_NOT_INSTALLED = "is not installed in this environment"


def resolve_engine(name: str = "auto") -> str:
    """The engine that ``--engine name`` selects; ``auto`` is Detectron2 where it can be imported, else torchvision.

    Where it is installed and cannot be imported, ``auto`` says so in the log.

    Raises:
        ValueError: unknown name.
        ModuleNotFoundError: ``detectron2`` is selected and cannot be imported.
    """
    if name not in ("auto", *ENGINES):
        raise ValueError(f"engine: expected auto, {' or '.join(ENGINES)}, got {name!r}")
    if name == "torchvision":
        return name
    problem = detectron2_problem()
    if not problem:
        return "detectron2"
    if name == "auto":
        if problem != _NOT_INSTALLED:
            logger.warning(f"--engine auto takes torchvision: Detectron2 {problem}")
        return "torchvision"
    raise ModuleNotFoundError(
        f"--engine detectron2: Detectron2 {problem}; README.md (Install) tells how to get it. "
        "--engine torchvision runs the same configuration without it."
    )


@functools.cache
def detectron2_problem() -> str:
    """Why Detectron2 cannot be used here, or ""."""
    if importlib.util.find_spec("detectron2") is None:
        return _NOT_INSTALLED
    try:
        importlib.import_module("detectron2.layers")  # has its compiled part, which is of one version of torch
    except Exception as error:  # what a mismatch raises depends on where it shows
        return f"is installed and cannot be imported ({type(error).__name__}: {' '.join(str(error).split())})"
    return ""


def collect_env() -> list[tuple[str, str]]:
    """Names and values: versions, devices, the extension, the engine that ``auto`` selects, the data sets found."""
    rows = [
        ("group_sampling", f"{__version__} ({os.path.dirname(os.path.abspath(__file__))})"),
        ("Python", f"{sys.version.split()[0]} on {platform.platform()}"),
        ("CPU", f"{os.cpu_count()} logical cores, {torch.get_num_threads()} torch threads"),
    ]
    for package in ("torch", "torchvision", "numpy", "fvcore", "detectron2"):
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        rows.append(("GPU", f"{', '.join(names)} (CUDA {torch.version.cuda})"))
    else:
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
        rows.append(("GPU", f"none visible (torch is built for {build})"))

    status = extension_status()
    if status.loaded:
        rows.append(("extension", "CPU and CUDA" if status.cuda else f"CPU only: {status.reason}"))
        rows += [(f"  {key}", str(value)) for key, value in status.build_info.items()]
    else:
        rows.append(("extension", f"missing, the torch reference runs instead: {status.reason}"))
    problem = detectron2_problem()
    rows.append(("engine auto", f"torchvision: Detectron2 {problem}" if problem else "detectron2"))

    rows.append(("data root", os.environ.get("DETECTRON2_DATASETS", "datasets") + " ($DETECTRON2_DATASETS)"))
    catalog = Catalog()
    for name in catalog.names:
        missing = catalog[name].missing_paths
        rows.append((f"  {name}", f"missing {', '.join(missing)}" if missing else "found"))
    return rows


def hardware(device: str) -> dict[str, object]:
    """What a measurement on "cpu" or "cuda" names: "cpu", "cores", "machine", and "gpu" of a GPU."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    result: dict[str, object] = {"cpu": cpu, "cores": os.cpu_count(), "machine": platform.machine()}
    if device == "cuda":
        result["gpu"] = torch.cuda.get_device_name()
    return result


def main() -> None:
    rows = collect_env()
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))


if __name__ == "__main__":
    main()
