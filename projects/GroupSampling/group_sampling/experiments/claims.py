"""The paper's results and what it says of their order, as data.

``paper/`` holds facts of the paper: every number of its tables (``values.yaml``), how each row was trained
(``rows.yaml``) and every claim on the order of results (``orderings.yaml``).
"""

import copy
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import yaml


@dataclass(frozen=True)
class Comparison:
    """A weighted sum of results, and the open interval that a claim puts it into.

    Attributes:
        label: what is summed, for people.
        weights: of each (config, subset).
        low, high: the interval.
    """

    label: str
    weights: Mapping[tuple[str, str], float]
    low: float = 0.0
    high: float = math.inf

    def value(self, results: Mapping[str, Mapping[str, float]]) -> float | None:
        """The sum of ``results``, config -> subset -> value; None where one is missing."""
        if any(subset not in results.get(config, {}) for config, subset in self.weights):
            return None
        return sum(weight * results[config][subset] for (config, subset), weight in self.weights.items())


@dataclass(frozen=True)
class Ordering:
    """A claim of the paper, see ``paper/orderings.yaml``.

    Attributes:
        id: as in "1.10".
        experiment: "table1", ..., "figure6".
        place: where the paper has it.
        kind: "strict": every number of the paper bears it out; "soft": not every one does.
        claim: in words.
        note: numbers, or how the words were read.
        comparisons: all have to hold; none: no row of this project can tell.
    """

    id: str
    experiment: str
    place: str
    kind: str
    claim: str
    note: str
    comparisons: tuple[Comparison, ...]


def read_paper(name: str) -> Any:
    """The facts in ``paper/<name>.yaml``: "values", "rows" or "orderings". The caller's own copy."""
    return copy.deepcopy(_parsed(name))


@functools.cache
def _parsed(name: str) -> Any:
    return yaml.safe_load((resources.files(__package__) / "paper" / f"{name}.yaml").read_text(encoding="utf-8"))


def paper_values() -> dict[str, dict[str, dict[str, float]]]:
    """Every number of Tables 1 to 5: table -> config -> subset -> AP in percent."""
    return read_paper("values")["tables"]


def paper_orderings() -> tuple[Ordering, ...]:
    """Every claim of the paper on the order of its results."""
    return tuple(_parse(entry) for entry in read_paper("orderings"))


def _parse(entry: Mapping[str, Any]) -> Ordering:
    comparisons = tuple(comparison for term in entry["terms"] for comparison in _expand(entry["id"], term))
    texts = {key: entry[key] for key in ("id", "experiment", "place", "kind", "claim")}
    return Ordering(**texts, note=entry.get("note", ""), comparisons=comparisons)


def _expand(ordering: str, term: Mapping[str, Any]) -> Iterator[Comparison]:
    """The comparisons of a term of ``orderings.yaml``."""
    keys = frozenset(term)
    if keys == {"chain", "in"}:
        for subset in term["in"]:
            for a, b in zip(term["chain"], term["chain"][1:]):
                yield _difference(a, b, subset)
    elif keys == {"best", "of", "in"}:
        for subset in term["in"]:
            for other in term["of"]:
                yield _difference(term["best"], other, subset)
    elif keys == {"close", "within", "in"}:
        for subset in term["in"]:
            a, b = term["close"]
            yield _difference(a, b, subset, low=-term["within"], high=term["within"])
    elif keys == {"gain", "falls_over"}:
        a, b = term["gain"]
        for s, t in zip(term["falls_over"], term["falls_over"][1:]):
            weights = {(a, s): 1.0, (b, s): -1.0, (a, t): -1.0, (b, t): 1.0}
            yield Comparison(f"{a} − {b}: {s} − {t}", weights)
    elif keys == {"row", "of"}:
        for config in term["of"]:
            for s, t in zip(term["row"], term["row"][1:]):
                yield Comparison(f"{config}: {s} − {t}", {(config, s): 1.0, (config, t): -1.0})
    elif keys == {"weighted", "of", "above"}:
        for config in term["of"]:
            weights = {(config, subset): float(weight) for subset, weight in term["weighted"].items()}
            yield Comparison(f"{config}: {_sum(term['weighted'])}", weights, low=term["above"])
    elif keys == {"combined", "in", "above"}:
        for subset in term["in"]:
            weights = {(config, subset): float(weight) for config, weight in term["combined"].items()}
            yield Comparison(f"{_sum(term['combined'])}, {subset}", weights, low=term["above"])
    elif keys - {"less"} in ({"rises", "in"}, {"falls", "in"}):
        direction = "rises" if "rises" in keys else "falls"
        for subset in term["in"]:
            weights = _slope(term[direction], subset, 1.0 if direction == "rises" else -1.0)
            label = f"{direction[:-1]} of {term[direction][0]} to {term[direction][-1]} a step"
            if "less" in keys:
                weights.update(_slope(term["less"], subset, -1.0 if direction == "rises" else 1.0))
                label += f", less that of {term['less'][0]} to {term['less'][-1]}"
            yield Comparison(f"{label}, {subset}", weights)
    else:
        raise ValueError(f"ordering {ordering}: expected a term as at the head of orderings.yaml, got {dict(term)}")


def _difference(a: str, b: str, subset: str, low: float = 0.0, high: float = math.inf) -> Comparison:
    return Comparison(f"{a} − {b}, {subset}", {(a, subset): 1.0, (b, subset): -1.0}, low, high)


def _slope(configs: Sequence[str], subset: str, sign: float) -> dict[tuple[str, str], float]:
    """Weights whose sum is the slope of the least-squares line through the points at 0, 1, 2, ..."""
    steps = np.arange(len(configs)) - (len(configs) - 1) / 2
    slopes = sign * steps / (steps**2).sum()
    return {(config, subset): float(weight) for config, weight in zip(configs, slopes)}


def _sum(weights: Mapping[str, float]) -> str:
    """'a + b − 3 c' of {a: 1, b: 1, c: −3}."""
    parts = []
    for name, weight in weights.items():
        factor = "" if abs(weight) == 1 else f"{abs(weight):g} "
        parts.append(f"{'−' if weight < 0 else '+'} {factor}{name}")
    return " ".join(parts).removeprefix("+ ")
