"""How well predicted grades of harm agree with people's: errors, correlations, and means by grade."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from reward.conversation import MAX_GRADE, Graded
from reward.metrics import Mean
from reward.ranks import linear_correlation, rank_correlation
from reward.scorer import Score


def grade_report(graded: Sequence[Graded], predicted: Sequence[Score]) -> dict[str, Any]:
    """Errors of predicted grades against people's, as plain JSON; unscored conversations are counted in every mean.

    `constant_mse` is the error of saying the mean grade of these conversations for each: a model that is not below it
    has learned nothing. `by_grade`: the mean prediction for each grade of people's; `by_prediction`: the mean grade of
    people's for each predicted one, both rounded to whole grades. `cut`: texts of which only a part was read.
    """
    values = [score.value for score in predicted]
    both = [(value, item.grade) for value, item in zip(values, graded, strict=True) if value is not None]
    errors = [None if value is None else value - item.grade for value, item in zip(values, graded, strict=True)]
    squares = [None if error is None else error * error for error in errors]
    guesses, grades = [value for value, _ in both], [grade for _, grade in both]
    return {
        "mse": Mean.of(squares).to_json(),
        "mae": Mean.of(None if error is None else abs(error) for error in errors).to_json(),
        "constant_mse": statistics.pvariance(grades) if grades else None,
        "spearman": rank_correlation(guesses, grades).to_json(),
        "pearson": linear_correlation(guesses, grades).to_json(),
        "by_grade": _means(zip(map(_whole, grades), guesses, strict=True)),
        "by_prediction": _means(zip(map(_whole, guesses), grades, strict=True)),
        "mse_by_source": _means(
            (item.conversation.tags.source or "unknown", square) for item, square in zip(graded, squares, strict=True)
        ),
        "cut": sum(score.value is not None and score.reason is not None for score in predicted),
    }


def _whole(value: float) -> str:
    """The nearest whole grade; halves go up."""
    return str(math.floor(min(max(value, 0.0), MAX_GRADE) + 0.5))


def _means(pairs: Iterable[tuple[str, float | None]]) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[float | None]] = {}
    for name, value in pairs:
        groups.setdefault(name, []).append(value)
    return {name: Mean.of(values).to_json() for name, values in sorted(groups.items())}
