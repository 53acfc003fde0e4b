"""The two engines. ``auto`` is Detectron2 where it can be imported, else torchvision."""

import importlib.util

ENGINES = ("detectron2", "torchvision")


def resolve_engine(name: str = "auto") -> str:
    """The engine that ``--engine name`` means here.

    Raises:
        ValueError: unknown name.
        ModuleNotFoundError: ``detectron2`` was asked for and is not installed.
    """
    has_detectron2 = importlib.util.find_spec("detectron2") is not None
    if name == "auto":
        return "detectron2" if has_detectron2 else "torchvision"
    if name not in ENGINES:
        raise ValueError(f"engine must be auto, {' or '.join(ENGINES)}, got {name!r}")
    if name == "detectron2" and not has_detectron2:
        raise ModuleNotFoundError(
            "--engine detectron2: Detectron2 is not installed in this environment; README.md (Install) tells how. "
            "--engine torchvision runs the same configuration without it."
        )
    return name
