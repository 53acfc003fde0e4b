"""The mutation tool on a module of two lines, and its list of survivors against the code."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def run():
    spec = importlib.util.spec_from_file_location("mutation_run", Path(__file__).with_name("run.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_mutant_dies_and_an_equivalent_one_lives(run, tmp_path):
    module, test = tmp_path / "doubled.py", tmp_path / "test_doubled.py"
    module.write_text('def double(x: int) -> int:\n    """Not x + 1."""\n    return 2 * x + 0\n')
    test.write_text("from doubled import double\n\n\ndef test_double():\n    assert double(3) == 6\n")
    subject = run.Subject("doubled", module, [str(test)])
    assert [mutant.name for mutant in subject.mutants()] == [
        "double: return 2 * x + 0 -> return None",
        "double: 2 * x + 0 -> 2 * x - 0",
        "double: 2 * x -> 2 / x",
        "double: 2 -> 3 in return 2 * x + 0",
        "double: 2 -> 1 in return 2 * x + 0",
        "double: 0 -> 1 in return 2 * x + 0",
        "double: 0 -> -1 in return 2 * x + 0",
    ]
    assert run.passes(subject)
    lives = {mutant.number: run.passes(subject, mutant.tree) for mutant in subject.mutants() if mutant.number in (1, 2)}
    assert lives == {1: True, 2: False}


def test_mutants_of_equal_text_have_names_of_their_own(run):
    source = "class A:\n    def f(self, x):\n        return not x or not x\n"
    found = list(run.mutants(source))
    assert [mutant.name for mutant in found] == [
        "A.f: return not x or not x -> return None",
        "A.f: not x or not x -> not x and (not x)",
        "A.f: not x -> x in return not x or not x",
        "A.f: not x -> x in return not x or not x (2)",
    ]
    assert run.ast.unparse(found[-1].tree) == run.ast.unparse(run.ast.parse(source)), "every change was taken back"


def test_listed_survivors_are_mutants_and_have_a_reason(run):
    """The list does not outlive the code that it is about."""
    assert run.stale_survivors() == []
    assert all(survivor.reason for listed in run.survivors().values() for survivor in listed.values())
