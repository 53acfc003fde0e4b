"""The project's tools as one command: ``group-sampling predict ...``, or ``python -m group_sampling predict ...``."""

import argparse
import ast
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from .project import TOOLS, TRAIN_NET
from .version import __version__

# Name -> script, and arguments that come first.
COMMANDS: dict[str, tuple[Path, tuple[str, ...]]] = {
    "train": (TRAIN_NET, ()),
    "evaluate": (TRAIN_NET, ("--eval-only",)),
    "predict": (TOOLS / "predict.py", ()),
    "export": (TOOLS / "export.py", ()),
    "convert": (TOOLS / "convert_dataset.py", ()),
    "inspect": (TOOLS / "inspect_dataset.py", ()),
    "balance": (TOOLS / "balance_report.py", ()),
    "benchmark": (TOOLS / "benchmark_model.py", ()),
    "report": (TOOLS / "report.py", ()),
    "show": (TOOLS / "show_detections.py", ()),
    "evaluate-wider": (TOOLS / "evaluate_wider.py", ()),
    "evaluate-fddb": (TOOLS / "evaluate_fddb.py", ()),
    "evaluate-coco": (TOOLS / "evaluate_coco.py", ()),
    "demo": (TOOLS / "demo.py", ()),
    "reproduce": (TOOLS / "reproduce.py", ()),
}


def _summary(name: str) -> str:
    script, first = COMMANDS[name]
    line = (ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or "").splitlines()[0]
    return f"  {name:16s}{line}" + (f" ({script.name} {' '.join(first)})" if first else "")


def main(argv: Sequence[str] | None = None) -> None:
    """Run a tool, with the arguments after its name, as if it had been called by its path."""
    parser = argparse.ArgumentParser(
        prog="group-sampling",
        description="commands (group-sampling COMMAND --help describes one):\n" + "\n".join(map(_summary, COMMANDS)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="of the command")
    args = parser.parse_args(argv or sys.argv[1:] or ["--help"])
    script, first = COMMANDS[args.command]
    sys.argv[1:] = [*first, *args.arguments]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
