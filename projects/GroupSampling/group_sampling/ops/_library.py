"""Loads the compiled extension once and remembers why it could not."""

import importlib
import warnings
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class ExtensionStatus:
    """What became of ``group_sampling._C``.

    Attributes:
        loaded: the C++ operators are registered.
        cuda: they have CUDA kernels.
        reason: why the extension is missing or lacks CUDA kernels; empty when nothing is missing.
        build_info: compiler, flags and CUDA version of the build; empty when not loaded.
    """

    loaded: bool
    cuda: bool
    reason: str
    build_info: dict[str, str] = field(default_factory=dict)


def _load() -> ExtensionStatus:
    try:
        extension = importlib.import_module("group_sampling._C")
    except ModuleNotFoundError as error:
        if error.name != "group_sampling._C":
            raise
        return ExtensionStatus(
            False, False, "group_sampling._C is not built; `pip install .` with a C++ compiler builds it"
        )
    except ImportError as error:  # built against another torch or Python, or a library is missing
        return ExtensionStatus(False, False, f"group_sampling._C does not load, rebuild it: {error}")
    info = dict(extension.build_info())
    cuda = info["cuda"] != "none"
    return ExtensionStatus(True, cuda, "" if cuda else "group_sampling._C was built without CUDA", info)


_STATUS = _load()
_noticed: set[str] = set()


def extension_status() -> ExtensionStatus:
    """Whether the compiled operators are in use, and why not."""
    return _STATUS


def has_kernels(device: torch.device) -> bool:
    """Whether the extension serves ``device``; says once for each kind of device that the torch reference does."""
    if _STATUS.loaded and (device.type == "cpu" or (device.type == "cuda" and _STATUS.cuda)):
        return True
    if device.type not in _noticed:
        _noticed.add(device.type)
        reason = _STATUS.reason or f"it has no kernels for {device.type}"
        warnings.warn(
            f"group_sampling: operators on {device.type} run on the slow torch reference ({reason})", stacklevel=3
        )
    return False
