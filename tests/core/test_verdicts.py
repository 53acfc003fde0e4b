"""The paper's numbers and claims as data, and the verdicts on made-up results."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from group_sampling.experiments.claims import Comparison, Ordering, paper_orderings, paper_values, read_paper
from group_sampling.experiments.verdicts import (
    AGREES,
    DISAGREES,
    NOT_RUN,
    NOT_SEPARABLE,
    Noise,
    judge,
    markdown,
    sample_shares,
    seed_noise,
)

CONFIGS = Path(__file__).resolve().parents[2] / "projects/GroupSampling/configs"
ORDERINGS = {ordering.id: ordering for ordering in paper_orderings()}
# Claims whose every number the paper prints, and those that some of its numbers miss.
NUMBERED = [o for o in ORDERINGS.values() if o.experiment.startswith("table") and o.comparisons]
MISSED = {"1.8", "2.6b"}


def paper_results():
    """config -> subset -> the paper's AP; where tables differ, the first has it."""
    results = {}
    for table in paper_values().values():
        for config, subsets in table.items():
            for subset, value in subsets.items():
                results.setdefault(config, {}).setdefault(subset, value)
    return results


def seeds_of(results, offsets):
    """Measured results: every value with offsets(config, subset), a list of the difference of each seed."""
    return {
        config: {subset: [value + offset for offset in offsets(config, subset)] for subset, value in subsets.items()}
        for config, subsets in results.items()
    }


def measured_like_paper():
    rng = np.random.default_rng(0)
    return seeds_of(paper_results(), lambda config, subset: rng.uniform(-0.002, 0.002, 3))


def claim(*comparisons):
    return Ordering("x", "table1", "", "strict", "", "", comparisons)


def verdict_on(seeds_of_difference, low=0.0, high=math.inf, noise=None):
    """The verdict on a single comparison whose sum is a single value."""
    ordering = claim(Comparison("a", {("a", "all"): 1.0}, low, high))
    return judge({"a": {"all": seeds_of_difference}}, orderings=[ordering], noise=noise)[0].verdict


# --- the data


def test_tables_repeat_each_other_but_where_the_paper_does_not():
    """A row that several tables share has the same numbers, but for what the head of values.yaml lists."""
    different = set()
    for table, rows in paper_values().items():
        for config, subsets in rows.items():
            assert (CONFIGS / f"{config}.yaml").is_file(), config
            for subset, value in subsets.items():
                assert value == round(value, 1) and 0 < value < 100
                if value != paper_results()[config][subset]:
                    different.add((table, config, subset, value))
    assert different == {
        ("table2", "fpn_finest", "all", 80.3),
        *(("table5", "fpn_finest_sampling", s, v) for s, v in (("easy", 95.1), ("medium", 94.1), ("hard", 88.8))),
        ("table5", "fpn_finest_sampling", "all", 82.7),
    }
    assert [len(rows) for rows in paper_values().values()] == [5, 12, 3, 4, 4]


def test_text_and_tables_differ_as_stated():
    """Numbers of the text against those of the tables, rounded differences included."""
    results, different = paper_results(), {}
    for entry in read_paper("values")["text"]:
        for subset in entry.keys() - {"place", "config", "above"}:
            table = results[entry["config"]][subset]
            if "above" in entry:
                table -= results[entry["above"]][subset]
            if abs(entry[subset] - table) > 0.01:
                different[entry["place"], entry["config"], subset] = round(entry[subset] - table, 1)
    assert different == {
        ("Sec. 6.1", "fpn_finest_stride", "@16"): 0.1,
        ("Sec. 3", "fpn_finest_stride", "hard"): 0.6,
        ("Sec. 3", "rpn_c4", "easy"): -0.1,
        ("Sec. 6.3", "table5/grouped_fast_rcnn", "easy"): 0.1,
        ("Sec. 6.3", "table5/grouped_fast_rcnn", "medium"): 0.1,
        ("Sec. 6.3", "table5/grouped_fast_rcnn", "hard"): 0.1,
        ("Sec. 7, Figure 5", "table5/grouped_fast_rcnn", "medium"): 0.2,
    }


def test_every_claim_has_its_rows():
    ids = list(ORDERINGS)
    assert len(ids) == len(set(ids)) == len(paper_orderings())
    for ordering in ORDERINGS.values():
        assert ordering.kind in ("strict", "soft") and ordering.claim and ordering.place
        for comparison in ordering.comparisons:
            for config, subset in comparison.weights:
                assert (CONFIGS / f"{config}.yaml").is_file(), (ordering.id, config)
                if ordering.experiment.startswith("table"):
                    assert subset in paper_values()[ordering.experiment][config], (ordering.id, config, subset)


def test_only_what_no_row_can_tell_has_no_comparison():
    assert {o.id for o in ORDERINGS.values() if not o.comparisons} == {"4.6", "F5.1", "F6.1"}


# --- the paper's own numbers, as if they had been measured


@pytest.mark.parametrize("ordering", NUMBERED, ids=lambda o: o.id)
def test_the_papers_numbers_agree_with_its_claims(ordering):
    (judgment,) = judge(measured_like_paper(), orderings=[ordering])
    missed = ordering.id in MISSED
    assert judgment.verdict == (DISAGREES if missed else AGREES), judgment.weakest
    assert judgment.paper_holds is not missed
    assert (ordering.kind == "strict") <= (not missed)


@pytest.mark.parametrize("ordering", NUMBERED, ids=lambda o: o.id)
def test_every_comparison_can_refute_its_claim(ordering):
    """One value moved until one comparison is a point beyond what is claimed."""
    for comparison in ordering.comparisons:
        results = paper_results()
        beyond = comparison.low - 1 if math.isfinite(comparison.low) else comparison.high + 1
        (config, subset), weight = next(iter(comparison.weights.items()))
        results[config][subset] += (beyond - comparison.value(results)) / weight
        measured = seeds_of(results, lambda *_: (0.0, 0.001, -0.001))
        assert judge(measured, orderings=[ordering])[0].verdict == DISAGREES, comparison


def test_a_permuted_table_disagrees():
    """Each row of Table 1 with the numbers of the next. Of its claims, the two of FPN-finest-stride are now about
    FPN-finest-sampling and FPN, and that within a row is not touched."""
    results = paper_results()
    names = list(paper_values()["table1"])
    permuted = {name: results[other] for name, other in zip(names, names[1:] + names[:1])}
    found = {j.ordering.id: j.verdict for j in judge(seeds_of(permuted, lambda *_: (0.0, 0.01, -0.01)))}
    table1 = {name: verdict for name, verdict in found.items() if name.startswith("1.")}
    assert {name for name, verdict in table1.items() if verdict == AGREES} == {"1.5", "1.7", "1.12"}
    assert {name for name, verdict in table1.items() if verdict == DISAGREES} == table1.keys() - {"1.5", "1.7", "1.12"}
    assert {v for name, v in found.items() if name.startswith(("2", "3", "5"))} <= {NOT_RUN, DISAGREES}


@pytest.mark.parametrize("ordering", NUMBERED, ids=lambda o: o.id)
def test_noise_is_not_separable(ordering):
    """The paper's means, but seeds that scatter by 20 points."""
    rng = np.random.default_rng(1)

    def offsets(config, subset):
        values = rng.normal(0, 20, 3)
        return values - values.mean()

    judgment = judge(seeds_of(paper_results(), offsets), orderings=[ordering])[0]
    assert judgment.verdict == NOT_SEPARABLE
    for finding in judgment.findings:
        assert finding.mean == pytest.approx(finding.comparison.value(paper_results()))


# --- the rule

# Of Student's t, one-sided 5 %: printed tables.
CRITICAL = {2: 6.314, 3: 2.920, 4: 2.353, 5: 2.132}


def spread_over(count, mean, std):
    """``count`` values of this mean and standard deviation (n - 1)."""
    values = np.arange(count) - (count - 1) / 2
    return list(mean + std * values / values.std(ddof=1))


@pytest.mark.parametrize("count", CRITICAL)
def test_quantile(count):
    std = 2.0
    margin = CRITICAL[count] * std / math.sqrt(count)
    assert verdict_on(spread_over(count, 1.01 * margin, std)) == AGREES
    assert verdict_on(spread_over(count, 0.99 * margin, std)) == NOT_SEPARABLE
    assert verdict_on(spread_over(count, -0.99 * margin, std)) == NOT_SEPARABLE
    assert verdict_on(spread_over(count, -1.01 * margin, std)) == DISAGREES


def test_close_has_to_be_shown():
    assert verdict_on([0.1, 0.0, -0.1], -0.8, 0.8) == AGREES
    assert verdict_on([3.0, 0.0, -3.0], -0.8, 0.8) == NOT_SEPARABLE  # nothing speaks against it, nothing for it
    assert verdict_on([0.9, 0.8, 0.7], -0.8, 0.8) == NOT_SEPARABLE
    assert verdict_on([2.1, 2.0, 1.9], -0.8, 0.8) == DISAGREES
    assert verdict_on([-2.1, -2.0, -1.9], -0.8, 0.8) == DISAGREES


def test_a_long_claim_needs_more_to_be_refuted():
    """Two comparisons: 2.5 % for each, whose quantile with three seeds is 4.303; one agrees, the other is below 0."""
    comparisons = [Comparison(name, {(name, "all"): 1.0}) for name in "ab"]
    for factor, expected in ((4.4, DISAGREES), (4.2, NOT_SEPARABLE), (2.0, NOT_SEPARABLE)):
        values = spread_over(3, -factor / math.sqrt(3), 1.0)
        measured = {"a": {"all": [9.0, 9.1, 9.2]}, "b": {"all": values}}
        assert judge(measured, orderings=[claim(*comparisons)])[0].verdict == expected


def test_differences_are_of_one_seed():
    """Seeds that move both rows by 20 points leave their difference as it is."""
    ordering = claim(Comparison("a - b", {("a", "all"): 1.0, ("b", "all"): -1.0}))
    measured = {"a": {"all": [31.0, 51.1, 71.2]}, "b": {"all": [30.0, 50.0, 70.0]}}
    (judgment,) = judge(measured, orderings=[ordering])
    assert judgment.verdict == AGREES
    assert judgment.findings[0].seeds == pytest.approx((1.0, 1.1, 1.2))
    assert (judgment.findings[0].mean, judgment.findings[0].std) == pytest.approx((1.1, 0.1))
    measured["b"]["all"] = [70.0, 30.0, 50.0]  # the same values, of other seeds
    assert judge(measured, orderings=[ordering])[0].verdict == NOT_SEPARABLE


def test_seeds_that_were_not_run_are_left_out():
    ordering = claim(Comparison("a - b", {("a", "all"): 1.0, ("b", "all"): -1.0}))
    measured = {"a": {"all": [None, 51.0, 61.1, 99.0]}, "b": {"all": [0.0, 50.0, 60.0]}}
    assert judge(measured, orderings=[ordering])[0].findings[0].seeds == pytest.approx((1.0, 1.1))
    measured["b"]["all"] = [0.0]
    judgment = judge(measured, orderings=[ordering])[0]
    assert judgment.verdict == NOT_RUN and judgment.findings[0].mean is None


def test_one_seed_says_nothing_by_itself():
    assert verdict_on([50.0]) == NOT_SEPARABLE
    assert verdict_on([-50.0]) == NOT_SEPARABLE


def test_one_seed_with_a_known_spread():
    """Spread 1 with 9 degrees of freedom: t is 1.833."""
    noise = {"all": Noise(1.0, 9)}
    assert verdict_on([1.84], noise=noise) == AGREES
    assert verdict_on([1.82], noise=noise) == NOT_SEPARABLE
    assert verdict_on([-1.84], noise=noise) == DISAGREES
    assert verdict_on([50.0], noise={"@16": Noise(1.0, 9)}) == NOT_SEPARABLE
    # Of a difference it is the root of two times as much.
    ordering = claim(Comparison("a - b", {("a", "all"): 1.0, ("b", "all"): -1.0}))
    for difference, expected in ((2.60, AGREES), (2.58, NOT_SEPARABLE)):
        measured = {"a": {"all": [difference]}, "b": {"all": [0.0]}}
        assert judge(measured, orderings=[ordering], noise=noise)[0].verdict == expected


def test_own_and_known_spread_are_pooled():
    """Two seeds of spread 5 and a known 1 with 8 degrees: variance (25 + 8) / 9, t of 9 degrees 1.833."""
    noise = {"all": Noise(1.0, 8)}
    margin = 1.833 * math.sqrt(33 / 9 / 2)
    assert verdict_on(spread_over(2, 1.01 * margin, 5.0), noise=noise) == AGREES
    assert verdict_on(spread_over(2, 0.99 * margin, 5.0), noise=noise) == NOT_SEPARABLE
    assert verdict_on(spread_over(2, 1.01 * margin, 5.0)) == NOT_SEPARABLE


def test_spread_between_seeds():
    """Variances 2 (one degree) and 1 (two): (2 + 2) / 3; a single seed tells nothing."""
    measured = {"a": {"all": [1.0, 3.0]}, "b": {"all": [4.0, None, 5.0, 6.0]}, "c": {"all": [9.0], "@16": [3.0]}}
    assert seed_noise(measured) == {"all": (pytest.approx(math.sqrt(4 / 3)), 3)}


def test_less_than_the_paper_prints_is_a_tie():
    assert verdict_on([0.04, 0.04, 0.04]) == NOT_SEPARABLE
    assert verdict_on([0.06, 0.06, 0.06]) == AGREES


def test_what_was_not_run():
    ordering = ORDERINGS["1.1"]
    measured = measured_like_paper()
    del measured["rpn_c4"]
    assert judge(measured, orderings=[ordering])[0].verdict == NOT_RUN
    assert {judgment.verdict for judgment in judge({})} == {NOT_RUN}
    # What was run may refute a claim all the same.
    measured["fpn"], measured["fpn_finest"] = measured["fpn_finest"], measured["fpn"]
    judgment = judge(measured, orderings=[ordering])[0]
    assert judgment.verdict == DISAGREES
    assert judgment.weakest.comparison.label == "fpn − fpn_finest_stride, all"


def test_subsets_that_the_data_set_does_not_have():
    """Easy, Medium and Hard are WIDER FACE's: elsewhere a claim is judged without them, and says so."""
    measured = {
        config: {subset: seeds for subset, seeds in row.items() if subset not in ("easy", "medium", "hard")}
        for config, row in measured_like_paper().items()
    }
    found = {judgment.ordering.id: judgment for judgment in judge(measured)}
    assert found["1.5"].verdict == AGREES and found["1.5"].without == ("hard",) and found["1.5"].paper_holds
    assert [f.comparison.label for f in found["1.5"].findings] == ["fpn_finest_stride − fpn_finest, all"]
    assert found["1.1"].without == () and found["5.3"].without == ("medium", "hard")
    assert found["1.4"].verdict == NOT_RUN and found["1.4"].findings == ()
    assert markdown([found["5.3"]])[-1].endswith("| agrees (without medium, hard) |")
    assert found["5.3"].to_dict()["without"] == ["medium", "hard"]
    measured["fpn"]["hard"] = [87.6]  # now it is a row that was not run
    assert judge(measured, orderings=[ORDERINGS["1.5"]])[0].verdict == NOT_RUN


@pytest.mark.parametrize("count", [2, 3, 5])
def test_rows_that_are_equal_seldom_get_a_verdict(count):
    """Five equal rows in a chain, and two: at most 5 % of either kind, but for chance (4 standard errors of 1,000)."""
    rng = np.random.default_rng(count)
    names = "abcde"
    chain = [Comparison(a + b, {(a, "all"): 1.0, (b, "all"): -1.0}) for a, b in itertools.pairwise(names)]
    found = []
    for _ in range(1000):
        measured = {name: {"all": list(50 + rng.normal(0, 3, count))} for name in names}
        found.append([j.verdict for j in judge(measured, orderings=[claim(*chain), claim(chain[0])])])
    for column in zip(*found):
        assert max(column.count(AGREES), column.count(DISAGREES)) <= 50 + 4 * math.sqrt(1000 * 0.05 * 0.95)


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match=r"finite values of fpn, all, got \[1.0, nan\]"):
        judge({"fpn": {"all": [1.0, math.nan]}})


# --- figures


def test_shares_by_hand():
    samples = {"fpn": [{"16": (1, 60), "32": (3, 20)}, {"16": (2, 50), "32": (2, 50)}]}
    assert sample_shares(samples) == {
        "fpn": {
            "positives@16": [25.0, 50.0],
            "positives@32": [75.0, 50.0],
            "imbalance of positives": [25.0, 0.0],
            "negatives@16": [75.0, 50.0],
            "negatives@32": [25.0, 50.0],
            "imbalance of negatives": [25.0, 0.0],
        }
    }


# Positives and negatives of scale 16 to 128 in the shape of Figure 2.
RISING = {"16": (1, 20), "32": (3, 20), "64": (5, 20), "128": (8, 20)}
FALLING = {"16": (11, 80), "32": (8, 40), "64": (5, 20), "128": (2, 10)}
EVEN = dict.fromkeys(RISING, (5, 15))
FIGURE2 = {
    "rpn_c4": RISING,
    "fpn": FALLING,
    "fpn_finest_stride": FALLING,
    "fpn_finest": {**RISING, "16": (1, 40)},
    "fpn_finest_sampling": EVEN,
}


def figure2(**changed):
    samples = {config: [balance] * 3 for config, balance in {**FIGURE2, **changed}.items()}
    return {j.ordering.id: j.verdict for j in judge(sample_shares(samples)) if j.ordering.experiment == "figure2"}


def test_figure_2():
    assert figure2() == dict.fromkeys(("F2.1", "F2.2", "F2.3", "F2.4", "F2.5"), AGREES)
    assert figure2(rpn_c4=FALLING)["F2.1"] == DISAGREES
    assert figure2(fpn=EVEN)["F2.2"] == DISAGREES
    assert figure2(fpn_finest=EVEN)["F2.3"] == NOT_SEPARABLE
    assert figure2(fpn_finest_stride={**FALLING, "32": (8, 90)})["F2.4"] == DISAGREES
    assert figure2(fpn_finest_sampling=FIGURE2["fpn_finest"])["F2.5"] == NOT_SEPARABLE
    assert figure2(fpn_finest_sampling=FALLING)["F2.5"] == DISAGREES


def figure4(**curves):
    """Curves over N = 256, 512, 1,024, 2,048, 4,096."""
    measured = {}
    for detector, curve in curves.items():
        names = [f"figure4/{detector}_n{n}" for n in (256, 512, 1024)] + [detector, f"figure4/{detector}_n4096"]
        for name, ap in zip(names, curve):
            measured[name] = {"all": [ap - 0.01, ap, ap + 0.02]}
    return {j.ordering.id: j for j in judge(measured) if j.ordering.experiment == "figure4"}


def test_figure_4():
    rising, falling, level = (20, 30, 38, 44, 45), (50, 51, 49, 45, 36), (30, 30, 30, 30, 30)
    found = figure4(fpn_finest_sampling=rising, fpn=falling, fpn_finest=falling)
    assert {name: judgment.verdict for name, judgment in found.items()} == dict.fromkeys(
        ("F4.1", "F4.2", "F4.3", "F4.4"), AGREES
    )
    slope = np.polyfit(range(5), falling, 1)[0]
    assert found["F4.2"].findings[0].mean == pytest.approx(-slope, abs=0.02)
    gap = np.polyfit(range(5), np.subtract(rising, falling), 1)[0]
    assert found["F4.4"].findings[0].mean == pytest.approx(gap, abs=0.02)
    assert found["F4.2"].findings[0].paper is None and found["F4.2"].paper_holds is None

    steady = (20, 30, 40, 50, 60)  # never levels off
    found = figure4(fpn_finest_sampling=steady, fpn=level, fpn_finest=rising)
    assert found["F4.1"].verdict == NOT_SEPARABLE
    assert found["F4.2"].verdict == NOT_SEPARABLE
    assert found["F4.3"].verdict == DISAGREES
    assert figure4(fpn_finest_sampling=(20, 22, 25, 30, 60))["F4.1"].verdict == DISAGREES
    assert figure4(fpn=falling[:4])["F4.2"].verdict == NOT_RUN


# --- the report


def test_report():
    measured = {"fpn_finest_stride": {"all": [81.0, 82.0]}, "fpn_finest": {"hard": [50.0], "all": [70.0, 71.5]}}
    (judgment,) = judge(measured, orderings=[ORDERINGS["1.5"]])
    content = json.loads(json.dumps(judgment.to_dict(), allow_nan=False))
    assert content["verdict"] == NOT_RUN and content["paper_holds"] is True
    hard, everything = content["comparisons"]
    assert hard["seeds"] == [] and hard["mean"] is None and hard["paper"] == 0.5 and hard["verdict"] == NOT_RUN
    assert everything["seeds"] == [11.0, 10.5] and everything["mean"] == 10.75 and everything["std"] == 0.35
    assert everything["paper"] == 1.4 and everything["verdict"] == AGREES
    assert (everything["low"], everything["high"]) == (0.0, None)

    lines = markdown([judgment, *judge(measured_like_paper(), orderings=[ORDERINGS["1.8"], ORDERINGS["F6.1"]])])
    assert len(lines) == 5 and {line.count("|") for line in lines} == {8}
    assert "| fpn_finest_stride − fpn_finest, hard | +0.5 | – | not run |" in lines[2]
    assert "own numbers" in lines[3] and "| rpn_c4 − fpn_finest_stride, @128 | -0.3 | -0.3 ± 0.0 (3 seeds)" in lines[3]
    assert lines[4].endswith("| – | – | – | not run |")
