"""`reward.agreement`: published values of kappa and AC1, counts by hand, and intervals against a bootstrap."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import numpy as np
import pytest

from reward.agreement import (
    Call,
    Case,
    Estimate,
    agreement_of,
    balanced_accuracy,
    cohen_kappa,
    compare_calls,
    f1_score,
    gwet_ac1,
    measure_agreement,
)
from reward.metrics import Z95, wilson_interval
from reward.ranks import roc_auc, roc_curve
from reward.scorer import Score, ScorerError, sigmoid

# ------------------------------------------------------------------------------------------- kappa and AC1

ABSTRACTORS = [[13, 0, 0], [0, 20, 7], [0, 4, 56]]
"""`cont3x3abstractors` of Gwet's R package irrCAC; its vignette prints the values and standard errors used below."""


def pairs_of(table: list[list[int]]) -> list[tuple[int, int]]:
    return [(i, j) for i, row in enumerate(table) for j, count in enumerate(row) for _ in range(count)]


def standard_error(found: Estimate) -> float:
    """For n independent cases, without the factor n / (n - 1) that clusters bring."""
    assert found.value is not None
    assert found.low is not None
    return (found.value - found.low) / Z95 * math.sqrt((found.n - 1) / found.n)


def test_the_published_kappa() -> None:
    found = cohen_kappa(pairs_of(ABSTRACTORS))
    assert found.value == pytest.approx(0.7964094, abs=5e-8)
    assert standard_error(found) == pytest.approx(0.05891072, abs=5e-9)


def test_the_published_ac1() -> None:
    found = gwet_ac1(pairs_of(ABSTRACTORS), words=(0, 1, 2))
    assert found.value == pytest.approx(0.8493305, abs=5e-8)
    assert standard_error(found) == pytest.approx(0.04321747, abs=5e-9)


def test_cohens_own_example() -> None:
    """Cohen (1960), table 1: of 200 cases 140 agree, chance gives 0.41; kappa is 0.29 / 0.59 = 0.492."""
    assert cohen_kappa(pairs_of([[88, 14, 18], [10, 40, 10], [2, 6, 12]])).value == pytest.approx(0.29 / 0.59)


def test_the_paradox_of_kappa() -> None:
    """118 of 125 agree, all on the common word. Chance is 0.984 x 0.96 + 0.016 x 0.04 = 0.94528 for kappa, but
    2 x 0.972 x 0.028 = 0.054432 for AC1."""
    pairs = pairs_of([[118, 5], [2, 0]])
    assert cohen_kappa(pairs).value == pytest.approx((0.944 - 0.94528) / (1 - 0.94528))
    assert gwet_ac1(pairs, words=(0, 1)).value == pytest.approx((0.944 - 0.054432) / (1 - 0.054432))


def test_a_word_that_nobody_used_still_counts() -> None:
    pairs = [(True, True)] * 5
    assert gwet_ac1(pairs, words=(True, False)).value == 1
    assert cohen_kappa(pairs) == Estimate(None, None, None, 5)
    assert cohen_kappa([]) == Estimate(None, None, None, 0)


def test_repeated_cases_of_one_cluster_add_no_certainty() -> None:
    pairs = pairs_of(ABSTRACTORS)
    names = list(range(len(pairs)))
    for statistic in (cohen_kappa, lambda p, c=None: gwet_ac1(p, c, words=(0, 1, 2))):
        once, thrice = statistic(pairs), statistic(pairs * 3, names * 3)
        assert (thrice.value, thrice.low) == (pytest.approx(once.value), pytest.approx(once.low))
        assert statistic(pairs * 3).low > once.low


def test_one_cluster_tells_nothing() -> None:
    found = cohen_kappa(pairs_of([[5, 1], [1, 5]]), [0] * 12)
    assert (found.low, found.high) == (-1, 1)


# -------------------------------------------------------------------------------------------------- one scorer


def made(counts: dict[tuple[bool, Call], int]) -> tuple[list[Case], list[Call]]:
    """Each conversation of a prompt of its own."""
    rows = [key for key, count in counts.items() for _ in range(count)]
    return [Case(safe, str(number)) for number, (safe, _) in enumerate(rows)], [call for _, call in rows]


COUNTS: dict[tuple[bool, Call], int] = {
    (True, True): 7,
    (True, False): 2,
    (True, None): 1,
    (False, True): 2,
    (False, False): 5,
    (False, None): 1,
}


def test_all_counts_by_hand() -> None:
    """Safe: 7 of 10 found, 7 of 9 right. Unsafe: 5 of 8 found, 5 of 7 right. F1 from both: 14/19 and 2/3."""
    found = agreement_of(*made(COUNTS))
    shares = {name: (found[name]["count"], found[name]["n"]) for name in ("correct", "wrong", "no_decision")}
    assert shares == {"correct": (12, 18), "wrong": (4, 18), "no_decision": (2, 18)}
    assert found["confusion"] == {
        "safe": {"safe": 7, "unsafe": 2, "no_decision": 1},
        "unsafe": {"safe": 2, "unsafe": 5, "no_decision": 1},
    }
    safe, unsafe = found["classes"]["safe"], found["classes"]["unsafe"]
    assert [(part["count"], part["n"]) for part in (safe["precision"], safe["recall"])] == [(7, 9), (7, 10)]
    assert [(part["count"], part["n"]) for part in (unsafe["precision"], unsafe["recall"])] == [(5, 7), (5, 8)]
    assert (safe["recall"]["low"], safe["recall"]["high"]) == wilson_interval(7, 10)
    for part, expected in ((safe, 14 / 19), (unsafe, 2 / 3)):
        p, r = part["precision"]["value"], part["recall"]["value"]
        assert part["f1"]["value"] == pytest.approx(expected) == pytest.approx(2 * p * r / (p + r))
        assert part["f1"]["low"] < expected < part["f1"]["high"]
    assert found["balanced_accuracy"]["value"] == pytest.approx((0.7 + 5 / 8) / 2)
    assert found["decided"]["accuracy"]["value"] == pytest.approx(12 / 16)
    assert found["decided"]["balanced_accuracy"]["value"] == pytest.approx((7 / 9 + 5 / 7) / 2)
    # Decided: 12 of 16 agree; shares of safe 9/16 in both, so chance is (81 + 49) / 256.
    assert found["kappa"]["value"] == pytest.approx((12 / 16 - 130 / 256) / (1 - 130 / 256))
    assert found["kappa"]["n"] == 16
    assert found["ac1"]["value"] == pytest.approx((12 / 16 - 126 / 256) / (1 - 126 / 256))


def test_silence_gains_nothing() -> None:
    def value(change: dict[tuple[bool, Call], int]) -> float:
        found = balanced_accuracy(*made(COUNTS | change)).value
        assert found is not None
        return found

    as_it_is = value({})
    assert value({(False, True): 0, (False, None): 3}) == pytest.approx(as_it_is)  # wrong -> no decision
    assert value({(False, False): 4, (False, None): 2}) < as_it_is  # right -> no decision


def test_constant_judges() -> None:
    cases, _ = made(COUNTS)
    good, bad = agreement_of(cases, [True] * 18), agreement_of(cases, [False] * 18)
    assert (good["correct"]["count"], bad["correct"]["count"]) == (10, 8)
    for found in (good, bad):
        assert found["balanced_accuracy"]["value"] == pytest.approx(0.5)
        assert found["kappa"]["value"] == pytest.approx(0)
    assert good["classes"]["unsafe"]["recall"]["value"] == 0
    assert good["classes"]["unsafe"]["precision"]["value"] is None
    assert good["classes"]["unsafe"]["f1"]["value"] == 0
    silent = agreement_of(cases, [None] * 18)
    assert silent["balanced_accuracy"]["value"] == 0
    assert silent["kappa"]["value"] is None


def test_one_label_only() -> None:
    found = agreement_of([Case(True, "a"), Case(True, "b")], [True, False])
    assert found["balanced_accuracy"]["value"] is None
    assert found["classes"]["unsafe"]["recall"]["value"] is None
    assert found["correct"]["value"] == 0.5


def test_f1_has_the_ends_of_its_share() -> None:
    low, high = wilson_interval(3, 4)
    assert f1_score(3, 4) == Estimate(6 / 7, 2 * low / (1 + low), 2 * high / (1 + high), 4)
    assert f1_score(0, 0).value is None


def test_few_cases_without_fault_are_no_certainty() -> None:
    """5 of 5 in both classes: Wilson ends at 0.5655, so 1 - sqrt(2) x 0.4345 / 2 = 0.6928."""
    found = balanced_accuracy(*made({(True, True): 5, (False, False): 5}))
    assert (found.value, found.high) == (1, 1)
    assert found.low == pytest.approx(0.6928, abs=1e-4)


def test_groups_by_category_and_source() -> None:
    cases = [Case(True, "a", "x", "one"), Case(False, "b", "x", "two"), Case(False, "c", None, "two")]
    found = agreement_of(cases, [True, True, None])
    assert found["by_category"].keys() == {"x"}
    assert found["by_category"]["x"]["balanced_accuracy"]["value"] == 0.5
    two = found["by_source"]["two"]
    assert (two["n"], two["wrong"]["count"], two["no_decision"]["count"]) == (2, 1, 1)
    assert two["safe_recall"]["value"] is None
    assert (two["unsafe_recall"]["count"], two["unsafe_recall"]["n"]) == (0, 2)


# --------------------------------------------------------------------- intervals against a bootstrap over prompts


def clustered(prompts: int, answers: int) -> tuple[list[Case], list[Call], list[Call]]:
    """Answers to one prompt are judged alike; the second judge is a little worse than the first."""
    draw = random.Random(3)
    cases: list[Case] = []
    calls: list[Call] = []
    others: list[Call] = []
    for prompt in range(prompts):
        hard = draw.random() < 0.3
        for _ in range(draw.randint(1, answers)):
            safe = draw.random() < 0.6
            hit = draw.random() < (0.3 if hard else 0.95)
            cases.append(Case(safe, str(prompt)))
            calls.append(safe if hit else not safe)
            others.append(safe if hit and draw.random() < 0.9 else not safe)
    return cases, calls, others


def bootstrap(cases: list[Case], statistic: str, *judges: list[Call]) -> float:
    """Standard error over resampled prompts of a statistic, or of its difference between two judges."""
    generator = np.random.default_rng(0)
    names = np.array([int(case.prompt_id) for case in cases])
    safe = np.array([case.safe for case in cases])
    values: list[float] = []
    for _ in range(800):
        weight = np.bincount(generator.integers(0, names.max() + 1, names.max() + 1), minlength=names.max() + 1)[names]
        found: list[float] = []
        for judge in judges:
            called = np.array(judge, dtype=bool)
            table = np.array(
                [[weight[(safe == a) & (called == b)].sum() for b in (True, False)] for a in (True, False)]
            )
            if statistic == "kappa":
                p = table / table.sum()
                chance = p.sum(1) @ p.sum(0)
                found.append((np.trace(p) - chance) / (1 - chance))
            else:
                found.append(float(np.mean(np.diag(table) / table.sum(1))))
        values.append(found[0] - (found[1] if len(found) > 1 else 0.0))
    return float(np.std(values))


def test_intervals_follow_the_prompts() -> None:
    cases, calls, others = clustered(120, 8)
    prompts = [case.prompt_id for case in cases]
    kappa = cohen_kappa([(c.safe, call) for c, call in zip(cases, calls, strict=True)], prompts)
    assert kappa.value is not None
    assert kappa.low is not None
    assert (kappa.value - kappa.low) / Z95 == pytest.approx(bootstrap(cases, "kappa", calls), rel=0.1)

    accuracy = balanced_accuracy(cases, calls)
    assert accuracy.value is not None
    assert accuracy.low is not None
    assert (accuracy.value - accuracy.low) / Z95 == pytest.approx(bootstrap(cases, "accuracy", calls), rel=0.1)

    difference = compare_calls(cases, calls, others)["balanced_accuracy_difference"]
    error = bootstrap(cases, "accuracy", calls, others)
    assert (difference["value"] - difference["low"]) / Z95 == pytest.approx(error, rel=0.1)
    assert difference["low"] > 0


def test_two_scorers_by_hand() -> None:
    cases = [Case(True, "a"), Case(True, "b"), Case(False, "c"), Case(False, "d")]
    found = compare_calls(cases, [True, True, False, None], [True, None, True, False])
    assert (found["only_first_right"], found["only_other_right"]) == (2, 1)
    assert found["balanced_accuracy_difference"]["value"] == pytest.approx(0.75 - 0.5)
    same = compare_calls(cases, [True] * 4, [True] * 4)
    assert same["balanced_accuracy_difference"] == {"value": 0, "low": 0, "high": 0, "n": 4}


# --------------------------------------------------------------------------------------- numbers behind the calls


def test_a_curve_by_hand() -> None:
    """At least 3: one of two positives. At least 2: also one of two negatives, tied with the other positive."""
    assert roc_curve([3, 2], [2, 1]) == [(0, 0, None), (0, 0.5, 3), (0.5, 1, 2), (1, 1, 1)]


def test_the_area_below_the_curve_is_the_auc() -> None:
    draw = random.Random(2)
    positives, negatives = (
        [round(draw.gauss(1, 1), 1) for _ in range(80)],
        [round(draw.gauss(0, 1), 1) for _ in range(50)],
    )
    points = roc_curve(positives, negatives)
    area = sum((x2 - x1) * (y1 + y2) / 2 for (x1, y1, _), (x2, y2, _) in pairwise(points))
    assert area == pytest.approx(roc_auc(positives, negatives).value)
    few = roc_curve(positives, negatives, max_points=10)
    assert len(few) == 10
    assert (few[0], few[-1]) == (points[0], points[-1])
    assert set(few) <= set(points)


def scored(values: list[float | None]) -> list[Score]:
    return [Score(None, "too long") if value is None else Score(value) for value in values]


def test_measured_by_hand() -> None:
    """P(safe) of one half is safe, as the label stage reads it."""
    cases = [Case(True, "a"), Case(True, "b"), Case(False, "c"), Case(False, "d")]
    found = measure_agreement(cases, scored([0.5, None, 0.7, 0.2]), scale="probability")
    assert found["confusion"]["safe"] == {"safe": 1, "unsafe": 0, "no_decision": 1}
    assert found["confusion"]["unsafe"] == {"safe": 1, "unsafe": 1, "no_decision": 0}
    assert found["unscored"] == {"n": 1, "reasons": {"too long": 1}, "other_reasons": 0}
    assert found["roc"]["auc"]["value"] == 0.5
    points = [(part["false_alarms"], part["found"], part["probability"]) for part in found["roc"]["points"]]
    assert points == [(0, 0, None), (0, 0.5, 0.2), (1, 0.5, 0.5), (1, 1, 0.7)]
    assert found["calibration"]["brier"] == pytest.approx((0.25 + 0.49 + 0.04) / 3)
    assert measure_agreement(cases, scored([0.5] * 4), scale="probability", threshold=0.6)["correct"]["count"] == 2


def test_logits_are_read_as_their_sigmoids() -> None:
    cases = [Case(True, "a"), Case(False, "b"), Case(False, "c")]
    logits = [0.0, 2.0, -1.0]
    found = measure_agreement(cases, scored(list(logits)), scale="logit")
    expected = measure_agreement(cases, scored([sigmoid(value) for value in logits]), scale="probability")
    for part in ("confusion", "calibration", "kappa"):
        assert found[part] == expected[part]
    assert [part["found"] for part in found["roc"]["points"]] == [part["found"] for part in expected["roc"]["points"]]


def test_verdicts_alone_have_no_curves() -> None:
    found = measure_agreement([Case(True, "a"), Case(False, "b")], scored([1.0, 0.0]), scale="probability")
    assert (found["roc"], found["calibration"], found["recommended_threshold"]) == (None, None, None)
    one_label = measure_agreement([Case(True, "a")], scored([0.3]), scale="probability")
    assert one_label["roc"] is None


def test_a_score_without_bounds_is_no_verdict() -> None:
    with pytest.raises(ScorerError, match="is no probability"):
        measure_agreement([Case(True, "a")], scored([3.0]), scale="unbounded")
