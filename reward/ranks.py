"""Measures by rank, with their intervals: how well a score separates two groups, and what it goes along with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from reward.metrics import Z95

_BISECTIONS = 60  # halves [0, 1] down to the last bit of a double


@dataclass(frozen=True, slots=True)
class Auc:
    """The area under the ROC curve, 0.5 for guessing, with its 95% interval. All None when a group is empty."""

    value: float | None
    low: float | None
    high: float | None
    n_positive: int
    n_negative: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Correlation:
    """A correlation, Spearman's or Pearson's, in [-1, 1], with its 95% interval. All None when it is not defined.

    It is not for fewer than four pairs, nor when one side is constant.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def midranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1, in the order of `values`; equal values share the mean of their ranks."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and values[order[stop]] == values[order[start]]:
            stop += 1
        for position in order[start:stop]:
            ranks[position] = (start + 1 + stop) / 2
        start = stop
    return ranks


def roc_auc(positives: Sequence[float], negatives: Sequence[float]) -> Auc:
    """The share of (positive, negative) couples of which the positive scores higher; a tie counts as one half.

    Its interval is that of `auc_interval`, for groups that were drawn independently.
    """
    m, n = len(positives), len(negatives)
    if m == 0 or n == 0:
        return Auc(None, None, None, m, n)
    ranks = midranks([*positives, *negatives])
    value = (math.fsum(ranks[:m]) - m * (m + 1) / 2) / (m * n)
    low, high = auc_interval(value, m, n)
    return Auc(value, low, high, m, n)


def roc_curve(
    positives: Sequence[float], negatives: Sequence[float], *, max_points: int = 200
) -> list[tuple[float, float, float | None]]:
    """Points (share of negatives, share of positives, cut) of calling positive what scores at least the cut.

    From (0, 0), which has no cut, to (1, 1); equal scores share a point. Of more than `max_points` points evenly spaced
    ones stay. Both groups must have members.
    """
    scored = sorted([(value, True) for value in positives] + [(value, False) for value in negatives], reverse=True)
    points: list[tuple[float, float, float | None]] = [(0.0, 0.0, None)]
    above = [0, 0]
    for number, (value, positive) in enumerate(scored):
        above[positive] += 1
        if number + 1 == len(scored) or scored[number + 1][0] != value:
            points.append((above[0] / len(negatives), above[1] / len(positives), value))
    if len(points) <= max_points:
        return points
    return [points[round(number * (len(points) - 1) / (max_points - 1))] for number in range(max_points)]


def auc_interval(value: float, n_positive: int, n_negative: int, *, z: float = Z95) -> tuple[float, float]:
    """The score interval of an area (Newcombe 2006, method 5): all areas `a` with `(value - a)^2 <= z^2 V(a)`, where
    `V(a) = a(1 - a) [1 + N(1 - a) / (2 - a) + N a / (1 + a)] / (mn)` and `N = (m + n) / 2 - 1`.

    As Wilson's interval for a share it holds near 0 and 1, where others shrink to a point.
    """

    def outside(area: float) -> bool:
        spread = (n_positive + n_negative) / 2 - 1
        inflation = 1 + spread * (1 - area) / (2 - area) + spread * area / (1 + area)
        return (value - area) ** 2 > z * z * area * (1 - area) * inflation / (n_positive * n_negative)

    def end(far: float) -> float:
        inner, outer = value, far
        for _ in range(_BISECTIONS):
            middle = (inner + outer) / 2
            inner, outer = (inner, middle) if outside(middle) else (middle, outer)
        return inner

    return end(0.0), end(1.0)


def rank_correlation(xs: Sequence[float], ys: Sequence[float]) -> Correlation:
    """Spearman's coefficient: Pearson's of the midranks.

    The interval is Fisher's z with the variance `(1 + r^2 / 2) / (n - 3)` of Bonett and Wright (2000).
    """
    return _correlation(midranks(xs), midranks(ys), variance=lambda value: 1 + value * value / 2)


def linear_correlation(xs: Sequence[float], ys: Sequence[float]) -> Correlation:
    """Pearson's coefficient; the interval is Fisher's z with the variance `1 / (n - 3)` of two normal variables."""
    return _correlation(xs, ys, variance=lambda value: 1.0)


def _correlation(xs: Sequence[float], ys: Sequence[float], *, variance: Callable[[float], float]) -> Correlation:
    """Pearson's coefficient, with `variance(value) / (n - 3)` as the variance of its Fisher's z."""
    n = len(xs)
    if len(ys) != n:
        raise ValueError(f"a correlation needs as many values on both sides, got {n} and {len(ys)}")
    if n < 4 or len(set(xs)) == 1 or len(set(ys)) == 1:
        return Correlation(None, None, None, n)
    x_mean, y_mean = math.fsum(xs) / n, math.fsum(ys) / n
    dx, dy = [x - x_mean for x in xs], [y - y_mean for y in ys]
    product = math.fsum(x * y for x, y in zip(dx, dy, strict=True))
    spread = math.sqrt(math.fsum(x * x for x in dx) * math.fsum(y * y for y in dy))
    value = max(-1.0, min(1.0, product / spread))
    if abs(value) == 1:
        return Correlation(value, value, value, n)
    half = Z95 * math.sqrt(variance(value) / (n - 3))
    return Correlation(value, math.tanh(math.atanh(value) - half), math.tanh(math.atanh(value) + half), n)
