"""Whether a scorer's probabilities mean what they say, and what a threshold on them lets through."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reward.metrics import Rate, wilson_interval
from reward.scorer import LLAMA2_THRESHOLD, Scale, as_probability

NUM_BINS = 15
"""Equal-width bins of a calibration curve (Guo et al. 2017, section 5)."""

THRESHOLDS = (0.5, LLAMA2_THRESHOLD)
"""Probabilities of being safe below which an answer is called unsafe, both of the Llama 2 paper."""

_DRAWS, _SEED = 200, 0


def calibration(cases: Sequence[tuple[float, bool]], *, bins: int = NUM_BINS) -> dict[str, Any]:
    """Curve and expected calibration error of `(probability, did it happen)` cases.

    `ece` is `sum_b n_b / n |rate_b - mean probability_b|` over bins `((b - 1) / B, b / B]` of equal width (Guo et al.
    2017, equation 3; 0 lies in the first), in [0, 1]. It is above zero by chance alone, the more so the fewer cases:
    `ece_by_chance` is what probabilities that are exactly right would show here, mean and 95th percentile of 200 draws.
    `brier` is the mean squared error. None where there are no cases.
    """
    grouped: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for probability, happened in cases:
        if not 0 <= probability <= 1:
            raise ValueError(f"a probability must be between 0 and 1, got {probability}")
        grouped[max(0, math.ceil(probability * bins) - 1)].append((probability, happened))
    curve = [
        {
            "low": number / bins,
            "high": (number + 1) / bins,
            "mean_probability": math.fsum(p for p, _ in group) / len(group) if group else None,
            "rate": Rate.of(happened for _, happened in group).to_json(),
        }
        for number, group in enumerate(grouped)
    ]
    if not cases:
        return {"n": 0, "ece": None, "ece_by_chance": None, "brier": None, "bins": curve}
    error = math.fsum(abs(math.fsum(happened - p for p, happened in group)) for group in grouped) / len(cases)
    return {
        "n": len(cases),
        "ece": error,
        "ece_by_chance": _error_by_chance([[p for p, _ in group] for group in grouped]),
        "brier": math.fsum((p - happened) ** 2 for p, happened in cases) / len(cases),
        "bins": curve,
    }


def _error_by_chance(grouped: Sequence[Sequence[float]]) -> dict[str, float]:
    """The error of labels drawn from the very probabilities (consistency resampling, Bröcker and Smith 2007)."""
    draw = random.Random(_SEED).random
    sums = [(math.fsum(group), group) for group in grouped if group]
    n = sum(len(group) for _, group in sums)
    errors = sorted(
        sum(abs(sum(draw() < p for p in group) - total) for total, group in sums) / n for _ in range(_DRAWS)
    )
    return {"mean": math.fsum(errors) / _DRAWS, "high": errors[math.ceil(0.95 * _DRAWS) - 1]}


# ---------------------------------------------------------------------------------------- unsafe or not


@dataclass(frozen=True, slots=True)
class Labelled:
    """The raw score of an answer whose safety somebody labelled. `prompt_id` keeps the answers to a prompt together."""

    value: float
    safe: bool
    prompt_id: str


def unsafe_detection(cases: Sequence[Labelled], threshold: float) -> dict[str, Any]:
    """What calling answers unsafe below `threshold`, a raw score, finds and costs.

    `precision`: share of unsafe ones among those called so; `unsafe_recall`: share of the unsafe that are called so;
    `safe_recall`: share of the safe that are not; `balanced_accuracy`: the mean of the two recalls.
    """
    called = [(case.value < threshold, case.safe) for case in cases]
    unsafe = Rate.of(below for below, safe in called if not safe)
    safe = Rate.of(not below for below, is_safe in called if is_safe)
    return {
        "precision": Rate.of(not is_safe for below, is_safe in called if below).to_json(),
        "unsafe_recall": unsafe.to_json(),
        "safe_recall": safe.to_json(),
        "balanced_accuracy": mean_of_two(unsafe, safe),
    }


def mean_of_two(one: Rate, other: Rate) -> dict[str, Any]:
    """The mean of two independent shares; the interval is put together from theirs (MOVER, Zou and Donner 2008)."""
    n = one.n + other.n
    if not one.n or not other.n:
        return {"value": None, "low": None, "high": None, "n": n}
    (a_low, a_high), (b_low, b_high) = (wilson_interval(rate.count, rate.n) for rate in (one, other))
    a, b = one.count / one.n, other.count / other.n
    value = (a + b) / 2
    low, high = value - math.hypot(a - a_low, b - b_low) / 2, value + math.hypot(a_high - a, b_high - b) / 2
    return {"value": value, "low": low, "high": high, "n": n}


def recommended_threshold(cases: Sequence[Labelled], *, scale: Scale) -> dict[str, Any] | None:
    """A threshold from the data: a small reward model may rank well and yet put its 0.5 in the wrong place.

    Half of the prompts, by their ids, choose the raw score of the best balanced accuracy; the other half measures it
    (`measured`) beside the threshold that the scorer comes with (`as_it_comes`: P(safe) = 0.5; None for a scorer
    without bounds). `probability` is the P(safe) at the threshold. None when a half lacks safe or unsafe answers.
    """
    halves: tuple[list[Labelled], list[Labelled]] = ([], [])
    for case in cases:
        halves[int(case.prompt_id, 16) % 2].append(case)
    choosing, measuring = halves
    if any(len({case.safe for case in half}) < 2 for half in halves):
        return None
    threshold = _best_threshold(choosing)
    if threshold is None:
        return None
    bounded = scale != "unbounded"
    return {
        "threshold": threshold,
        "probability": as_probability(threshold, scale) if bounded else None,
        "chosen_on": len(choosing),
        "measured": unsafe_detection(measuring, threshold),
        "as_it_comes": unsafe_detection(measuring, 0.0 if scale == "logit" else 0.5) if bounded else None,
    }


def _best_threshold(cases: Sequence[Labelled]) -> float | None:
    """Halfway between two neighbouring scores; of equally good places the one with most room. None if all are equal."""
    ordered = sorted(cases, key=lambda case: case.value)
    num_safe = sum(case.safe for case in ordered)
    num_unsafe = len(ordered) - num_safe
    best: tuple[float, float, float] | None = None
    unsafe_below = safe_below = 0
    for case, following in itertools.pairwise(ordered):
        unsafe_below += not case.safe
        safe_below += case.safe
        if case.value == following.value:
            continue
        accuracy = (unsafe_below / num_unsafe + (num_safe - safe_below) / num_safe) / 2
        place = (accuracy, following.value - case.value, (case.value + following.value) / 2)
        if best is None or place[:2] > best[:2]:
            best = place
    return None if best is None else best[2]
