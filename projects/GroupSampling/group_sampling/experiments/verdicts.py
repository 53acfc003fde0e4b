"""Whether measured results agree or disagree with what the paper says of their order, or cannot tell.

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

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from .claims import Comparison, Ordering, paper_orderings, paper_values

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
    values = [comparison.value(paper) for comparison in ordering.comparisons]
    sums = [value for value in values if value is not None]
    is_known = 0 < len(sums) == len(values)
    holds = all(c.low < value < c.high for c, value in zip(ordering.comparisons, sums)) if is_known else None
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
    subsets = [subset for _, subset in comparison.weights]
    if all(subset in noise for subset in subsets):
        known = [noise[subset] for subset in subsets]
        # As if the values of a seed were independent, which overstates the spread of a difference of alike runs.
        variance = sum((w * n.std) ** 2 for w, n in zip(comparison.weights.values(), known))
        known_dof = min(n.dof for n in known)
        squares, dof = squares + known_dof * variance, dof + known_dof
    if dof == 0:
        return math.inf
    return float(stats.t.ppf(1 - tail, dof)) * math.sqrt(squares / dof / count)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
