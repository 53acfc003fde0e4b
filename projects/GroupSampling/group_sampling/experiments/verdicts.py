"""What the paper says of the order of its results, and whether measured results agree, disagree or cannot tell.

The data are facts of the paper, in ``paper/``: every number of its tables (``values.yaml``), how each row was
trained (``rows.yaml``) and every claim on the order of results (``orderings.yaml``).

**The rule.** A claim is a list of *comparisons*, each a weighted sum of average precisions that the claim puts into
an open interval: a difference above 0, a difference within ± 0.8, a sum above 100. The sum is formed seed by seed,
since rows of one seed see the same images in the same order, and its mean over the seeds is compared with the
interval:

- A comparison *agrees* if the 90 % confidence interval of the mean (Student's t) lies within the claimed one. A
  claim agrees if all its comparisons do; that needs no correction for their number.
- A comparison *disagrees* if the confidence interval lies outside the claimed one. One such comparison refutes the
  claim, so with m comparisons the confidence is raised to 1 - 0.1 / m (Bonferroni): a long claim is not refuted by
  bad luck alone.
- Everything else is *not separable with these seeds*. A wide spread never counts as "about equal": that, too, has
  to be shown.

The confidence interval is never narrower than ± :data:`RESOLUTION`, half a unit of what the paper prints.

**How many seeds.** The spread comes from the seeds of the comparison. With two it is hardly known (the quantile of
t is 6.3, with three 2.9, with five 2.1), and with one it is not known at all: then nothing agrees or disagrees,
however large the difference, unless the caller says how much results of the same kind vary between seeds
(:class:`Noise`, from :func:`seed_noise` of rows that have several). With it, both sources are pooled, weighted by
their degrees of freedom, as analysis of variance does, which takes rows to vary alike. For scale, the 26 rows of a
run at scale tiny with three seeds vary by 3.2 points in All from seed to seed, so that a single pair of trainings
there says something from 7.6 points on.
"""

import copy
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
import yaml
from scipy import stats

AGREES = "agrees"
DISAGREES = "disagrees"
NOT_SEPARABLE = "not separable with these seeds"
NOT_RUN = "not run"

# Error allowed at each end of a confidence interval: 90 % two-sided.
TAIL = 0.05
# Half a unit of the last digit that the paper prints, in points of AP.
RESOLUTION = 0.05

# config -> subset -> AP in percent of each seed; position i is seed i, None where it was not run.
Measured = Mapping[str, Mapping[str, Sequence[float | None]]]
# table -> config -> subset -> AP in percent.
Values = Mapping[str, Mapping[str, Mapping[str, float]]]


class Noise(NamedTuple):
    """How much one value varies from seed to seed."""

    std: float  # in points
    dof: int  # degrees of freedom behind it


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


@dataclass(frozen=True)
class Finding:
    """What was measured for a comparison.

    Attributes:
        paper: the sum of the paper's numbers; None: it has none.
        seeds: the sum of each seed that has all its values.
        mean: over the seeds; None without seeds.
        std: over the seeds, n - 1; None with fewer than two.
        verdict: one of the four.
    """

    comparison: Comparison
    paper: float | None
    seeds: tuple[float, ...]
    mean: float | None
    std: float | None
    verdict: str


@dataclass(frozen=True)
class Judgment:
    """What was measured for a claim.

    Attributes:
        paper_holds: whether the paper's own numbers bear the claim out; None: it has no numbers.
        verdict: :data:`AGREES`, :data:`DISAGREES`, :data:`NOT_SEPARABLE` or :data:`NOT_RUN`.
        without: subsets that no measured row has, such as Easy of another data set; the claim was judged without them.
    """

    ordering: Ordering
    findings: tuple[Finding, ...]
    paper_holds: bool | None
    verdict: str
    without: tuple[str, ...] = ()

    @property
    def weakest(self) -> Finding | None:
        """The comparison that decided the verdict, of several the one that holds least; None without comparisons."""
        deciding = [finding for finding in self.findings if finding.verdict == self.verdict]
        if not deciding:
            return None
        return min(
            deciding,
            key=lambda f: 0.0 if f.mean is None else min(f.mean - f.comparison.low, f.comparison.high - f.mean),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the claim, the verdict, and every comparison with paper, seeds, mean and spread."""
        ordering = self.ordering
        return {
            "id": ordering.id,
            "experiment": ordering.experiment,
            "place": ordering.place,
            "kind": ordering.kind,
            "claim": ordering.claim,
            "note": ordering.note,
            "paper_holds": self.paper_holds,
            "verdict": self.verdict,
            "without": list(self.without),
            "comparisons": [
                {
                    "label": finding.comparison.label,
                    "low": finding.comparison.low,
                    "high": finding.comparison.high if math.isfinite(finding.comparison.high) else None,
                    "paper": _rounded(finding.paper),
                    "seeds": [_rounded(value) for value in finding.seeds],
                    "mean": _rounded(finding.mean),
                    "std": _rounded(finding.std),
                    "verdict": finding.verdict,
                }
                for finding in self.findings
            ],
        }


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


def seed_noise(measured: Measured) -> dict[str, Noise]:
    """Subset -> how much a value varies from seed to seed, pooled over the rows that have several seeds."""
    squares: dict[str, list[tuple[float, int]]] = {}
    for subsets in measured.values():
        for subset, values in subsets.items():
            known = [value for value in values if value is not None]
            if len(known) > 1:
                squares.setdefault(subset, []).append((float(np.var(known, ddof=1)), len(known) - 1))
    noise = {}
    for subset, terms in squares.items():
        dof = sum(count for _, count in terms)
        noise[subset] = Noise(math.sqrt(sum(variance * count for variance, count in terms) / dof), dof)
    return noise


def sample_shares(
    samples: Mapping[str, Sequence[Mapping[str, tuple[float, float]]]],
) -> dict[str, dict[str, list[float]]]:
    """Numbers of samples (Figure 2) as results that :func:`judge` takes.

    Args:
        samples: config -> for each seed, scale -> (positives, negatives), as ``SampleBalance.per_scale`` has them.

    Returns:
        config -> subset -> percent of each seed. ``positives@s`` is the share of scale s in all positives,
        ``negatives@s`` likewise; ``imbalance of positives`` and ``imbalance of negatives`` are the total variation
        between these shares and equal ones, 0 for equal numbers of every scale.
    """
    results: dict[str, dict[str, list[float]]] = {}
    for config, seeds in samples.items():
        row = results.setdefault(config, {})
        for balance in seeds:
            for kind, counts in zip(("positives", "negatives"), zip(*balance.values())):
                shares = 100 * np.asarray(counts, dtype=float) / sum(counts)
                for scale, share in zip(balance, shares):
                    row.setdefault(f"{kind}@{scale}", []).append(float(share))
                row.setdefault(f"imbalance of {kind}", []).append(float(np.abs(shares - 100 / len(shares)).sum() / 2))
    return results


def judge(
    measured: Measured,
    *,
    orderings: Sequence[Ordering] | None = None,
    values: Values | None = None,
    noise: Mapping[str, Noise] | None = None,
) -> list[Judgment]:
    """Compare measured results with the claims of the paper, by the rule of this module.

    Args:
        measured: config -> subset -> value of each seed, percent: AP in the subsets of :func:`paper_values`, and those
            of :func:`sample_shares`. Values at the same position are of the same seed; None, or a list that ends
            before, is a seed that was not run, and a comparison leaves out seeds that lack one of its values.
            Comparisons in a subset that no row has are left out, and the judgment says so; all other missing rows are
            "not run".
        orderings: the claims; all by default.
        values: the paper's numbers, by default :func:`paper_values`.
        noise: subset -> what is known of the spread between seeds besides the seeds of a comparison.

    Returns:
        A judgment of each claim, in their order.

    Raises:
        ValueError: a measured value is not finite.
    """
    for config, subsets in measured.items():
        for subset, seeds in subsets.items():
            if not all(value is None or math.isfinite(value) for value in seeds):
                raise ValueError(f"judge: expected finite values of {config}, {subset}, got {list(seeds)}")
    values = paper_values() if values is None else values
    return [
        _judge_claim(ordering, measured, values.get(ordering.experiment, {}), noise or {})
        for ordering in (paper_orderings() if orderings is None else orderings)
    ]


def markdown(judgments: Sequence[Judgment]) -> list[str]:
    """Lines of a Markdown table: each claim, the comparison that decided, the paper's number and ours, the verdict."""
    lines = ["| | the paper's claim | place | decided by | paper | ours | verdict |", "|---|---|---|---|---|---|---|"]
    for judgment in judgments:
        ordering, weakest = judgment.ordering, judgment.weakest
        claim = ordering.claim
        if judgment.paper_holds is False:
            claim += " (Not all of the paper's own numbers bear it out.)"
        cells = ["–", "–", "–"]
        if weakest is not None:
            cells[0] = weakest.comparison.label
            cells[1] = "–" if weakest.paper is None else f"{weakest.paper:+.1f}"
            if weakest.mean is not None:
                spread = "" if weakest.std is None else f" ± {weakest.std:.1f}"
                count = len(weakest.seeds)
                cells[2] = f"{weakest.mean:+.1f}{spread} ({count} seed{'s' if count > 1 else ''})"
        verdict = judgment.verdict
        if judgment.without and judgment.findings:
            verdict += f" (without {', '.join(judgment.without)})"
        row = (ordering.id, claim, ordering.place, *cells, verdict)
        lines.append("| " + " | ".join(row) + " |")
    return lines


def _judge_claim(
    ordering: Ordering, measured: Measured, paper: Mapping[str, Mapping[str, float]], noise: Mapping[str, Noise]
) -> Judgment:
    known_subsets = {subset for subsets in measured.values() for subset in subsets}
    missing = [subset for c in ordering.comparisons for _, subset in c.weights if subset not in known_subsets]
    comparisons = [c for c in ordering.comparisons if not any(subset in missing for _, subset in c.weights)]
    findings = tuple(
        _judge_comparison(c, measured, c.value(paper), noise, tail=TAIL / len(comparisons)) for c in comparisons
    )
    verdicts = {finding.verdict for finding in findings}
    order = (DISAGREES, NOT_RUN, NOT_SEPARABLE, AGREES)  # the weakest first
    verdict = next((verdict for verdict in order if verdict in verdicts), NOT_RUN)
    sums = [comparison.value(paper) for comparison in ordering.comparisons]
    known = bool(sums) and None not in sums
    holds = all(c.low < value < c.high for c, value in zip(ordering.comparisons, sums)) if known else None
    return Judgment(ordering, findings, holds, verdict, tuple(dict.fromkeys(missing)))


def _judge_comparison(
    comparison: Comparison, measured: Measured, paper: float | None, noise: Mapping[str, Noise], tail: float
) -> Finding:
    """``tail`` is the error allowed at an end of the interval that may refute."""
    columns = [measured.get(config, {}).get(subset, ()) for config, subset in comparison.weights]
    seeds = [values for values in zip(*columns) if None not in values]
    sums = [sum(w * v for w, v in zip(comparison.weights.values(), values)) for values in seeds]
    if not sums:
        return Finding(comparison, paper, (), None, None, NOT_RUN)
    mean = float(np.mean(sums))
    std = float(np.std(sums, ddof=1)) if len(sums) > 1 else None

    def half_width(tail: float) -> float:
        return max(RESOLUTION, _half_width(comparison, len(sums), std, noise, tail))

    verdict = NOT_SEPARABLE
    if comparison.low < mean - half_width(TAIL) and mean + half_width(TAIL) < comparison.high:
        verdict = AGREES
    elif mean + half_width(tail) < comparison.low or mean - half_width(tail) > comparison.high:
        verdict = DISAGREES
    return Finding(comparison, paper, tuple(sums), mean, std, verdict)


def _half_width(
    comparison: Comparison, count: int, std: float | None, noise: Mapping[str, Noise], tail: float
) -> float:
    """Half of the confidence interval of a mean over ``count`` seeds; infinite where no spread is known."""
    squares, dof = (0.0, 0) if std is None else ((count - 1) * std**2, count - 1)
    known = [noise.get(subset) for _, subset in comparison.weights]
    if None not in known:
        # As if the values of a seed were independent, which overstates the spread of a difference of alike runs.
        variance = sum((w * n.std) ** 2 for w, n in zip(comparison.weights.values(), known))
        known_dof = min(n.dof for n in known)
        squares, dof = squares + known_dof * variance, dof + known_dof
    if dof == 0:
        return math.inf
    return float(stats.t.ppf(1 - tail, dof)) * math.sqrt(squares / dof / count)


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
            yield _difference(*term["close"], subset, low=-term["within"], high=term["within"])
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


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
