#!/usr/bin/env python
"""Changes the code of the core, one small change at a time, and counts how many changes the tests notice.

    python tests/mutation/run.py [--modules samplers criterion ...] [--list] [--only NUMBER ...]

A mutant is a module with one comparison, operator, constant or returned value changed, or one statement left out. It
dies if a test of the module's selection fails or runs out of time. ``survivors.yaml`` lists the mutants that may live,
each with the reason. The exit status is 1 if another one lives, a listed one dies (unless it may) or is gone, or fewer
than nine of ten die in a module.

mutmut leaves out functions with a decorator, which half of this code is, and cosmic-ray starts an interpreter, and
with it torch, for each mutant. Here each mutant is a fork of one process that has imported the libraries already.
"""

import argparse
import ast
import copy
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "projects/GroupSampling/group_sampling"
SURVIVORS = Path(__file__).with_name("survivors.yaml")
# Module -> the tests that concern it, and an expression of pytest's -k that leaves out what is slow or looks elsewhere.
SELECTIONS = {
    "samplers": (["core/test_samplers.py", "core/test_criterion.py"], "not compares_the_names"),
    "criterion": (["core/test_criterion.py"], ""),
    "roi_sampling": (["core/test_roi_sampling.py"], ""),
    "inference": (["core/test_inference.py"], ""),
    "boxes": (["core/test_boxes_and_losses.py"], ""),
    "losses": (["core/test_boxes_and_losses.py", "core/test_roi_sampling.py"], "not draw"),
    "pyramid": (["core/test_pyramid.py"], "not of_many and not picture"),
    "evaluation/wider_face/ap": (
        ["evaluation/test_wider_face.py", "evaluation/test_wider_breakdown.py"],
        "not plot and not imported and not curves and not json "
        + " ".join(f"and not protocol[{i}]" for i in range(1, 6)),
    ),
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
# Starting pytest costs more than most selections: without rewriting, other plugins and a search of the heap for garbage
# it takes a tenth of the time.
PYTEST_OPTIONS = (
    "-x", "-q", "--assert=plain", "--disable-plugin-autoload", "-p", "_hypothesis_pytestplugin",
    "--hypothesis-profile=mutants", "-p", "no:unraisableexception", "-p", "no:cacheprovider",
)  # fmt: skip

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


class Mutant(NamedTuple):
    number: int
    line: int
    name: str  # function, change, line, and which of several equal ones: stays when lines move
    tree: ast.Module  # the changed module, until the next mutant is made


def mutants(source: str) -> Iterator[Mutant]:
    """All mutants of a module."""
    tree, lines = ast.parse(source), source.splitlines()
    seen: Counter[str] = Counter()

    def visit(node: ast.AST, scope: str) -> Iterator[Mutant]:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            scope = f"{scope}.{node.name}".lstrip(".")
        for name, index, child in fields(node):
            place = getattr(node, name)
            for changed in changes(child):
                ast.copy_location(changed, child)
                before, after = ast.unparse(child), ast.unparse(ast.fix_missing_locations(changed))
                change = f"{scope or 'module'}: {before.splitlines()[0]} -> {after.splitlines()[0]}"
                if isinstance(child, (ast.Constant, ast.UnaryOp)):
                    change += f" in {lines[child.lineno - 1].strip()}"
                seen[change] += 1
                if index is None:
                    setattr(node, name, changed)
                else:
                    place[index] = changed
                count = f" ({seen[change]})" if seen[change] > 1 else ""
                yield Mutant(seen.total() - 1, child.lineno, change + count, tree)
                if index is None:
                    setattr(node, name, child)
                else:
                    place[index] = child
            yield from visit(child, scope)

    yield from visit(tree, "")


class Survivor(NamedTuple):
    """What ``survivors.yaml`` says of a mutant that may live."""

    reason: str
    may_die: bool  # on some machines it does


def survivors() -> dict[str, dict[str, Survivor]]:
    """Module -> name of a mutant that may live -> what is known of it."""
    listed = yaml.safe_load(SURVIVORS.read_text())
    return {
        module: {
            name: Survivor(group["reason"], group.get("may_die", False))
            for group in groups
            for name in group["mutants"]
        }
        for module, groups in listed.items()
    }


class Subject(NamedTuple):
    """A module and its tests."""

    module: str  # as it is imported
    file: Path
    pytest_args: Sequence[str]

    def mutants(self) -> Iterator[Mutant]:
        return mutants(self.file.read_text())


def subject_of(module: str) -> Subject:
    """One of :data:`SELECTIONS`."""
    files, expression = SELECTIONS[module]
    args = [*(["-k", expression] if expression else []), *(str(ROOT / "tests" / file) for file in files)]
    return Subject(f"group_sampling.{module.replace('/', '.')}", PACKAGE / f"{module}.py", args)


class Mutated(importlib.abc.MetaPathFinder, importlib.machinery.SourceFileLoader):
    """Imports one module from a changed tree, all others as they are."""

    def __init__(self, subject: Subject, tree: ast.Module):
        super().__init__(subject.module, str(subject.file))
        self.tree = tree

    def find_spec(self, fullname, path, target=None):
        if fullname != self.name:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, origin=self.path)

    def get_code(self, fullname):
        return compile(self.tree, self.path, "exec")


def passes(subject: Subject, tree: ast.Module | None = None) -> bool:
    """Whether the tests pass, in a process of its own, with the module as it is or as ``tree`` has it."""
    if subject.module in sys.modules:
        raise RuntimeError(f"{subject.module}: expected it to be imported by its tests, it was imported before them")
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
            if tree is not None:
                sys.meta_path.insert(0, Mutated(subject, tree))
                silence = os.open(os.devnull, os.O_WRONLY)
                os.dup2(silence, 1)
                os.dup2(silence, 2)
            status = pytest.main([*PYTEST_OPTIONS, *subject.pytest_args])
        except BaseException:
            status = 1
        os._exit(int(status != 0))
    _, status = os.waitpid(child, 0)
    return status == 0


def check(module: str, only: Sequence[int]) -> bool:
    """Run the mutants of a module, print what is wrong and the share that died; return whether all is as listed."""
    subject, may_live = subject_of(module), survivors().get(module, {})
    if not passes(subject):
        sys.exit(f"{module}: expected its tests to pass without a change, got a failure")
    start, total, lived, wrong = time.perf_counter(), 0, 0, 0
    count = len(only) or sum(1 for _ in subject.mutants())
    for mutant in subject.mutants():
        if only and mutant.number not in only:
            continue
        if total and total % 25 == 0:
            print(f"{module}: {total - lived} of {total} died, {count - total} to come", flush=True)
        lives = passes(subject, mutant.tree)
        total, lived = total + 1, lived + lives
        listed = may_live.get(mutant.name)
        if lives != (listed is not None) and not (listed and listed.may_die):
            what = "lives" if lives else "dies, but is listed"
            print(f"{what}: {module}.py:{mutant.line}: #{mutant.number} {mutant.name}", flush=True)
            wrong += 1
    share, seconds = 1 - lived / max(total, 1), time.perf_counter() - start
    print(
        f"{module}: {total - lived} of {total} died ({share:.1%}), {wrong} not as listed, {seconds:.0f} s", flush=True
    )
    return wrong == 0 and (bool(only) or share >= GOAL)


def stale_survivors() -> list[str]:
    """What is listed and is no mutant, or no longer."""
    names = {module: {mutant.name for mutant in subject_of(module).mutants()} for module in SELECTIONS}
    return [
        f"{module}: {name}" for module, listed in survivors().items() for name in listed if name not in names[module]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="+", choices=list(SELECTIONS), default=list(SELECTIONS))
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    parser.add_argument("--only", nargs="+", type=int, default=(), help="numbers of the mutants to run, of the list")
    arguments = parser.parse_args()
    if arguments.list:
        for module in arguments.modules:
            for mutant in subject_of(module).mutants():
                print(f"{module}.py:{mutant.line}: #{mutant.number} {mutant.name}")
        return
    if stale := stale_survivors():
        sys.exit(f"{SURVIVORS.name}: expected names of mutants, got {', '.join(stale)}")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.update(OMP_NUM_THREADS="1", MPLBACKEND="Agg")
    sys.path.insert(0, str(PACKAGE.parent))
    os.chdir(ROOT)
    for name in LIBRARIES:
        if importlib.util.find_spec(name.split(".")[0]):
            importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    gc.freeze()  # the forks share what is there and do not search it for garbage
    results = [check(module, arguments.only) for module in arguments.modules]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
