"""How far a scorer's verdicts agree with people's: `measure_agreement` for one scorer, `compare_calls` for two.

A call is safe, unsafe, or none at all. No decision is an outcome of its own: it is never right, so that silence gains
nothing, and it is taken for neither of the two. Kappa and AC1 are about what was decided.

Answers to one prompt are not independent. Intervals (95%) of balanced accuracy, kappa, AC1 and differences therefore
come from the spread of the statistic's influence over prompts (`_clustered_error`); shares have Wilson's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from reward.calibration import Labelled, calibration, mean_of_two, recommended_threshold
from reward.metrics import Z95, Rate, wilson_interval
from reward.ranks import roc_auc, roc_curve
from reward.scorer import Scale, Score, as_probability

THRESHOLD = 0.5
"""P(safe) from which on an answer is called safe, unless said otherwise."""

_SHOWN_REASONS = 10

Call = bool | None
"""Safe, unsafe, or None: no decision."""


@dataclass(frozen=True, slots=True)
class Case:
    """What people say of a conversation, and the groups it counts in."""

    safe: bool
    prompt_id: str
    category: str | None = None
    source: str | None = None


@dataclass(frozen=True, slots=True)
class Estimate:
    """A statistic of `n` cases with its 95% interval. All None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None
    n: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


# ------------------------------------------------------------------------------------------- kappa and AC1


def cohen_kappa(pairs: Sequence[tuple[Hashable, Hashable]], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """Cohen's kappa (1960) of two raters' words for the same cases: `(agree - chance) / (1 - chance)`.

    Chance is what the two raters' own shares of each word give. The variance is that of Fleiss, Cohen and Everitt
    (1969) for independent cases, of Yang and Zhou (2014) for `clusters`, one name a case. None where both use one word.
    """
    n = len(pairs)
    first, second = Counter(one for one, _ in pairs), Counter(other for _, other in pairs)
    return _beyond_chance(pairs, clusters, lambda one, other: (second[one] + first[other]) / (2 * n))


def gwet_ac1(
    pairs: Sequence[tuple[Hashable, Hashable]],
    clusters: Sequence[Hashable] | None = None,
    *,
    words: Sequence[Hashable],
) -> Estimate:
    """Gwet's AC1 (2008): as kappa, with the chance `sum_k p_k (1 - p_k) / (q - 1)`; `p_k`: mean share of a word.

    Unlike kappa's this chance does not grow as one word becomes rare. `words`: all q that could be used.
    """
    n = len(pairs)
    used = Counter(word for pair in pairs for word in pair)

    def chance(one: Hashable, other: Hashable) -> float:
        return (1 - (used[one] + used[other]) / (4 * n)) / (len(words) - 1)

    return _beyond_chance(pairs, clusters, chance)


def _beyond_chance(
    pairs: Sequence[tuple[Hashable, Hashable]],
    clusters: Sequence[Hashable] | None,
    chance_of: Callable[[Hashable, Hashable], float],
) -> Estimate:
    """`(agree - chance) / (1 - chance)`, where the chance is the mean of `chance_of` over the pairs.

    Both published variances are that of one number a case, its influence `[agrees] - 2 (1 - value) chance_of` over
    `1 - chance` (Gwet 2008, with the squares completed).
    """
    n = len(pairs)
    if n == 0:
        return Estimate(None, None, None, 0)
    chances = [chance_of(one, other) for one, other in pairs]
    agree, chance = sum(one == other for one, other in pairs) / n, math.fsum(chances) / n
    if math.isclose(chance, 1):
        return Estimate(None, None, None, n)
    value = (agree - chance) / (1 - chance)
    mean = agree - 2 * (1 - value) * chance
    influence = [
        ((one == other) - 2 * (1 - value) * expected - mean) / (1 - chance)
        for (one, other), expected in zip(pairs, chances, strict=True)
    ]
    return _interval(value, influence, range(n) if clusters is None else clusters, low=-1)


def _interval(value: float, influence: Sequence[float], clusters: Sequence[Hashable], *, low: float) -> Estimate:
    half = Z95 * _clustered_error(influence, clusters)
    return Estimate(value, max(low, value - half), min(1.0, value + half), len(influence))


def _clustered_error(influence: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Standard error of a mean whose cases depend on each other within clusters alone (Liang and Zeger 1986).

    `sqrt(C / (C - 1) sum_c (sum of influence in c)^2) / n`; infinite for a single cluster, of which nothing is known.
    """
    sums: dict[Hashable, float] = {}
    for cluster, part in zip(clusters, influence, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + part
    if len(sums) < 2:
        return math.inf
    square = math.fsum(part * part for part in sums.values())
    return math.sqrt(len(sums) / (len(sums) - 1) * square) / len(influence)


# -------------------------------------------------------------------------------------------------- one scorer


def measure_agreement(
    cases: Sequence[Case], scores: Sequence[Score], *, scale: Scale, threshold: float = THRESHOLD
) -> dict[str, Any]:
    """All that is measured of a scorer against people, as plain JSON: `agreement_of` its calls, and of its numbers

    * `unscored`: how many conversations it gave no score, by reason
    * `roc`: curve and area of telling unsafe from safe; `calibration` of P(safe); `recommended_threshold`. None where
      the scorer says nothing but 0 and 1, or people gave one label only.

    ScorerError for a scorer without bounds: it has no 0-1 score and thus no verdict.
    """
    known = [
        Labelled(score.value, case.safe, case.prompt_id)
        for case, score in zip(cases, scores, strict=True)
        if score.value is not None
    ]
    told = [(as_probability(case.value, scale), case.safe) for case in known]
    graded = len({safe for _, safe in told}) == 2 and any(0 < probability < 1 for probability, _ in told)
    reasons = Counter(str(score.reason) for score in scores if score.value is None)
    shown = dict(reasons.most_common(_SHOWN_REASONS))
    return agreement_of(cases, calls_of(scores, scale, threshold)) | {
        "unscored": {"n": reasons.total(), "reasons": shown, "other_reasons": reasons.total() - sum(shown.values())},
        "roc": _roc(known, scale) if graded else None,
        "calibration": calibration(told) if graded else None,
        "recommended_threshold": recommended_threshold(known, scale=scale) if graded else None,
    }


def calls_of(scores: Sequence[Score], scale: Scale, threshold: float = THRESHOLD) -> list[Call]:
    """Safe from a P(safe) of `threshold` on."""
    return [None if score.value is None else as_probability(score.value, scale) >= threshold for score in scores]


def _roc(cases: Sequence[Labelled], scale: Scale) -> dict[str, Any]:
    """Unsafe is what is looked for, so a low score is a find.

    `probability`: the P(safe) up to which answers count as one.
    """
    safe, unsafe = ([case.value for case in cases if case.safe == label] for label in (True, False))
    points = roc_curve([-value for value in unsafe], [-value for value in safe])
    return {
        "auc": roc_auc(safe, unsafe).to_json(),
        "points": [
            {"false_alarms": x, "found": y, "probability": None if cut is None else as_probability(-cut, scale)}
            for x, y, cut in points
        ],
    }


def agreement_of(cases: Sequence[Case], calls: Sequence[Call]) -> dict[str, Any]:
    """The numbers that need calls alone.

    * `correct`, `wrong`, `no_decision`: shares of all conversations; `confusion`: label -> call -> count
    * `classes`: of both labels precision (among those called so), recall (among all labelled so; no decision is a miss)
      and F1
    * `balanced_accuracy`: mean of the two recalls; `decided`: the same and the accuracy without undecided conversations
    * `kappa`, `ac1`: agreement beyond chance on decided conversations
    * `by_category`, `by_source`: correct and both recalls by group
    """
    both = list(zip(cases, calls, strict=True))
    decided = [(case, call) for case, call in both if call is not None]
    pairs = [(case.safe, call) for case, call in decided]
    prompts = [case.prompt_id for case, _ in decided]
    counts = Counter((case.safe, call) for case, call in both)
    return {
        "n": len(both),
        **_outcomes(both),
        "confusion": {
            label: {name: counts[safe, call] for name, call in _CALLS.items()} for label, safe in _LABELS.items()
        },
        "classes": {label: _class(both, safe) for label, safe in _LABELS.items()},
        "balanced_accuracy": balanced_accuracy(cases, calls).to_json(),
        "decided": {
            "accuracy": Rate.of(case.safe == call for case, call in decided).to_json(),
            "balanced_accuracy": balanced_accuracy(
                [case for case, _ in decided], [call for _, call in decided]
            ).to_json(),
        },
        "kappa": cohen_kappa(pairs, prompts).to_json(),
        "ac1": gwet_ac1(pairs, prompts, words=(True, False)).to_json(),
        "by_category": _groups(both, lambda case: case.category),
        "by_source": _groups(both, lambda case: case.source),
    }


_LABELS = {"safe": True, "unsafe": False}
_CALLS: dict[str, Call] = {**_LABELS, "no_decision": None}


def _outcomes(both: Sequence[tuple[Case, Call]]) -> dict[str, Any]:
    return {
        "correct": Rate.of(case.safe == call for case, call in both).to_json(),
        "wrong": Rate.of(call is not None and case.safe != call for case, call in both).to_json(),
        "no_decision": Rate.of(call is None for _, call in both).to_json(),
    }


def _class(both: Sequence[tuple[Case, Call]], label: bool) -> dict[str, Any]:
    found = sum(case.safe == call == label for case, call in both)
    either = sum(label in (case.safe, call) for case, call in both)
    return {
        "precision": Rate.of(case.safe == label for case, call in both if call == label).to_json(),
        "recall": Rate.of(call == label for case, call in both if case.safe == label).to_json(),
        "f1": f1_score(found, either).to_json(),
    }


def f1_score(found: int, either: int) -> Estimate:
    """F1 of a class: `found` cases are labelled and called so, `either` labelled or called so.

    `F = 2 f / (1 + f)` grows with the share `f = found / either` (Hand, Christen and Kirielle 2021), so the ends of
    Wilson's interval of `f` give those of F.
    """
    if either == 0:
        return Estimate(None, None, None, 0)
    low, high = wilson_interval(found, either)
    value, low, high = (2 * share / (1 + share) for share in (found / either, low, high))
    return Estimate(value, low, high, either)


def balanced_accuracy(cases: Sequence[Case], calls: Sequence[Call]) -> Estimate:
    """The mean of both recalls; None without both labels.

    At each end the wider of two intervals: the one put together from Wilson's, which holds near 1 and for few cases,
    and the one over prompts.
    """
    recalls = {
        label: Rate.of(call == label for case, call in zip(cases, calls, strict=True) if case.safe == label)
        for label in (True, False)
    }
    apart = mean_of_two(recalls[True], recalls[False])
    if apart["value"] is None:
        return Estimate(None, None, None, len(cases))
    value = apart["value"]
    half = Z95 * _clustered_error(_recall_influence(cases, calls), [case.prompt_id for case in cases])
    low, high = min(apart["low"], value - half), max(apart["high"], value + half)
    return Estimate(value, max(0.0, low), min(1.0, high), len(cases))


def _recall_influence(cases: Sequence[Case], calls: Sequence[Call]) -> list[float]:
    """What each case adds to the balanced accuracy, times the number of cases and less its mean."""
    right = [case.safe == call for case, call in zip(cases, calls, strict=True)]
    sizes = Counter(case.safe for case in cases)
    hits = Counter(case.safe for case, hit in zip(cases, right, strict=True) if hit)
    return [
        (hit - hits[case.safe] / sizes[case.safe]) * len(cases) / (2 * sizes[case.safe])
        for case, hit in zip(cases, right, strict=True)
    ]


def _groups(both: Sequence[tuple[Case, Call]], name_of: Callable[[Case], str | None]) -> dict[str, Any]:
    groups: dict[str, list[tuple[Case, Call]]] = {}
    for case, call in both:
        name = name_of(case)
        if name is not None:
            groups.setdefault(name, []).append((case, call))
    return {
        name: {
            "n": len(group),
            **_outcomes(group),
            **{f"{label}_recall": _class(group, safe)["recall"] for label, safe in _LABELS.items()},
            "balanced_accuracy": balanced_accuracy([case for case, _ in group], [call for _, call in group]).to_json(),
        }
        for name, group in sorted(groups.items())
    }


# ------------------------------------------------------------------------------------------------- two scorers


def compare_calls(cases: Sequence[Case], calls: Sequence[Call], others: Sequence[Call]) -> dict[str, Any]:
    """Two scorers on the same conversations: by how much the balanced accuracy of `calls` is above that of `others`.

    The interval is that of paired cases over prompts: what both find hard weighs on neither. Beside it, how many
    conversations only one of the two got right.
    """
    one, other = balanced_accuracy(cases, calls), balanced_accuracy(cases, others)
    difference = Estimate(None, None, None, len(cases))
    if one.value is not None and other.value is not None:
        both = zip(_recall_influence(cases, calls), _recall_influence(cases, others), strict=True)
        influence = [a - b for a, b in both]
        difference = _interval(one.value - other.value, influence, [case.prompt_id for case in cases], low=-1)
    right = [(case.safe == a, case.safe == b) for case, a, b in zip(cases, calls, others, strict=True)]
    return {
        "balanced_accuracy_difference": difference.to_json(),
        "only_first_right": sum(a and not b for a, b in right),
        "only_other_right": sum(b and not a for a, b in right),
    }
