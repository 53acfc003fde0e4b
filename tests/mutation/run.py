#!/usr/bin/env python
"""Changes the code of the core, one small change at a time, and counts how many changes the tests notice.

    python tests/mutation/run.py [--modules samplers criterion ...] [--list] [--only NUMBER ...]

A mutant is a module with one comparison, operator, constant or returned value changed, or one statement left out. It
"dies" if a test of the module's selection fails or runs out of time. Prints the mutants that live and the share that
died; exits with 1 if a module has fewer than nine of ten. docs/mutation.md explains the survivors.

mutmut leaves out functions with a decorator, which half of this code is, and cosmic-ray starts an interpreter, and
with it torch, for each mutant. Here each mutant is a fork of one process that has imported the libraries already.
"""

import argparse
import ast
import copy
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "projects/GroupSampling/group_sampling"
# Module -> the tests that concern it, and an expression of pytest's -k that leaves out what is slow or looks elsewhere.
SELECTIONS = {
    "samplers": (["core/test_samplers.py", "core/test_criterion.py"], "not compares_the_names"),
    "criterion": (["core/test_criterion.py"], ""),
    "roi_sampling": (["core/test_roi_sampling.py"], ""),
    "inference": (["core/test_inference.py"], ""),
    "boxes": (["core/test_boxes_and_losses.py"], ""),
    "losses": (["core/test_boxes_and_losses.py", "core/test_roi_sampling.py"], "not draw"),
    "pyramid": (["core/test_pyramid.py"], "not mirrored and not of_many and not picture"),
    "evaluation/wider_face/ap": (["evaluation/test_wider_face.py"], ""),
}
# What no mutant changes is imported once, where it is installed.
LIBRARIES = (
    "torch",
    "torchvision.models.detection",
    "detectron2.modeling.box_regression",
    "hypothesis.extra.numpy",
    "scipy.io",
    "matplotlib.pyplot",
    "group_sampling.ops",
    "group_sampling.config",
)
LIMIT = 60  # seconds of CPU that the tests of a mutant may take; an endless loop dies of it
GOAL = 0.9

COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd, ast.MatMult: ast.Mult,
}  # fmt: skip


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What ``node`` may become; a statement may become ``pass``."""
    if isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            changed = copy.deepcopy(node)
            changed.ops[i] = COMPARISONS[type(operator)]()
            yield changed
    elif isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in OPERATORS:
        changed = copy.deepcopy(node)
        changed.op = OPERATORS[type(node.op)]()
        yield changed
    elif isinstance(node, ast.BoolOp):
        changed = copy.deepcopy(node)
        changed.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield changed
    elif isinstance(node, ast.UnaryOp):
        yield copy.deepcopy(node.operand)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield ast.Constant(node.value + 1)
        yield ast.Constant(node.value - 1)
    elif isinstance(node, ast.Return) and not (node.value is None or ast.unparse(node.value) == "None"):
        yield ast.Return(ast.Constant(None))
    if isinstance(node, (ast.AugAssign, ast.Raise, ast.Continue, ast.Break)) or (
        isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
    ):
        yield ast.Pass()


def fields(node: ast.AST) -> Iterator[tuple[str, int | None, ast.AST]]:
    """The children of ``node`` that are run: no annotations, no messages, no docstrings."""
    skipped = {"annotation", "returns", "type_comment"}
    for name, value in ast.iter_fields(node):
        if name in skipped or (isinstance(node, ast.Raise) and name == "exc"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST):
                yield name, index, child


def mutants(tree: ast.Module) -> Iterator[tuple[int, str, ast.Module]]:
    """(line, description, changed module) of every mutant."""

    def visit(node: ast.AST) -> Iterator[tuple[int, str]]:
        for name, index, child in fields(node):
            place = getattr(node, name)
            for changed in changes(child):
                ast.copy_location(changed, child)
                before, after = ast.unparse(child), ast.unparse(ast.fix_missing_locations(changed))
                if index is None:
                    setattr(node, name, changed)
                else:
                    place[index] = changed
                yield child.lineno, f"{before.splitlines()[0]}  ->  {after.splitlines()[0]}"
                if index is None:
                    setattr(node, name, child)
                else:
                    place[index] = child
            yield from visit(child)

    for line, description in visit(tree):
        yield line, description, tree


class Mutated(importlib.abc.MetaPathFinder, importlib.machinery.SourceFileLoader):
    """Imports one module from a changed tree, all others as they are."""

    def __init__(self, module: str, tree: ast.Module):
        name = f"group_sampling.{module.replace('/', '.')}"
        super().__init__(name, str(PACKAGE / f"{module}.py"))
        self.tree = tree

    def find_spec(self, fullname, path, target=None):
        if fullname != self.name:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, origin=self.path)

    def get_code(self, fullname):
        return compile(self.tree, self.path, "exec")


def run_tests(module: str, tree: ast.Module | None) -> bool:
    """Whether the selection of ``module`` passes, in a process of its own."""
    files, expression = SELECTIONS[module]
    child = os.fork()
    if child == 0:
        import resource

        import pytest

        try:
            resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
            if tree is not None:
                sys.meta_path.insert(0, Mutated(module, tree))
                silence = os.open(os.devnull, os.O_WRONLY)
                os.dup2(silence, 1)
                os.dup2(silence, 2)
            options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "--hypothesis-profile=mutants"]
            selection = ["-k", expression] if expression else []
            status = pytest.main([*options, *selection, *(str(ROOT / "tests" / file) for file in files)])
        except BaseException:
            status = 1
        os._exit(int(status != 0))
    _, status = os.waitpid(child, 0)
    return status == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="+", choices=list(SELECTIONS), default=list(SELECTIONS))
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    parser.add_argument("--only", nargs="+", type=int, help="numbers of the mutants to run, of the list")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.update(OMP_NUM_THREADS="1", MPLBACKEND="Agg")
    sys.path.insert(0, str(PACKAGE.parent))
    os.chdir(ROOT)
    for name in LIBRARIES:
        if importlib.util.find_spec(name.split(".")[0]):
            importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    is_good = True
    for module in arguments.modules:
        tree = ast.parse((PACKAGE / f"{module}.py").read_text())
        if not arguments.list and not run_tests(module, None):
            sys.exit(f"{module}: expected its tests to pass without a change, got a failure")
        start, total, died = time.perf_counter(), 0, 0
        for number, (line, description, changed) in enumerate(mutants(tree)):
            if arguments.only and number not in arguments.only:
                continue
            if arguments.list:
                print(f"{module}.py:{line}: #{number} {description}")
                continue
            total += 1
            if run_tests(module, changed):
                print(f"lives: {module}.py:{line}: #{number} {description}", flush=True)
            else:
                died += 1
        if total:
            seconds = time.perf_counter() - start
            print(f"{module}: {died} of {total} died ({100 * died / total:.1f} %), {seconds:.0f} s", flush=True)
            is_good &= died >= GOAL * total
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
