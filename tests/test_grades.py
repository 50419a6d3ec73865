"""`reward.grades` by hand, and the linear correlation against numpy."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from reward.conversation import Graded, Prompt, RecordError
from reward.grades import grade_report
from reward.ranks import linear_correlation
from reward.scorer import Score


def graded(grade: float, source: str = "a") -> Graded:
    return Graded(Prompt.of("q", source=source).answer("a"), grade)


def test_a_report_by_hand() -> None:
    """Errors 0.5, -1, 1, -2.5 and one unscored; halves round up, and what lies beyond the scale is put at its end."""
    people = [graded(0), graded(1), graded(3, "b"), graded(4, "b"), graded(4, "b")]
    scores = [
        Score(0.5),
        Score(0.0),
        Score(4.0, "only the last 9 of 12 tokens were read"),
        Score(1.5),
        Score(None, "no"),
    ]
    report = grade_report(people, scores)
    assert report["mse"]["value"] == pytest.approx((0.25 + 1 + 1 + 6.25) / 4)
    assert (report["mse"]["n"], report["mse"]["unscored"]) == (4, 1)
    assert report["mae"]["value"] == pytest.approx((0.5 + 1 + 1 + 2.5) / 4)
    assert report["constant_mse"] == pytest.approx(2.5)  # 0, 1, 3, 4 about their mean 2
    assert {name: mean["value"] for name, mean in report["by_grade"].items()} == {
        "0": 0.5,
        "1": 0.0,
        "3": 4.0,
        "4": 1.5,
    }
    assert {name: mean["value"] for name, mean in report["by_prediction"].items()} == {"0": 1, "1": 0, "2": 4, "4": 3}
    assert report["mse_by_source"]["a"]["value"] == pytest.approx(0.625)
    assert report["mse_by_source"]["b"]["value"] == pytest.approx(3.625)
    assert report["mse_by_source"]["b"]["unscored"] == 1
    assert report["cut"] == 1
    assert report["spearman"]["value"] == pytest.approx(0.6)  # ranks 2 1 4 3 against 1 2 3 4
    assert report["pearson"]["value"] == pytest.approx(np.corrcoef([0.5, 0, 4, 1.5], [0, 1, 3, 4])[0, 1])
    beyond = grade_report([graded(0), graded(4)], [Score(-3.0), Score(9.0)])
    assert list(beyond["by_prediction"]) == ["0", "4"]
    assert grade_report([], [])["constant_mse"] is None


def test_a_linear_correlation_is_that_of_numpy_with_fishers_interval() -> None:
    generator = random.Random(3)
    xs = [generator.gauss(0, 1) for _ in range(50)]
    ys = [x + generator.gauss(0, 1) for x in xs]
    found = linear_correlation(xs, ys)
    r = np.corrcoef(xs, ys)[0, 1]
    half = 1.959963984540054 / math.sqrt(47)
    assert found.value == pytest.approx(r, abs=1e-12)
    assert (found.low, found.high) == pytest.approx((math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)))
    assert linear_correlation([1, 2, 3, 4], [2, 2, 2, 2]).value is None
    assert linear_correlation([1, 2, 3, 4], [-2, -4, -6, -8]).value == -1
    with pytest.raises(ValueError, match="as many values on both sides"):
        linear_correlation([1, 2, 3, 4], [1, 2, 3])


@pytest.mark.parametrize("grade", [True, False, None, "3", math.nan, math.inf, -0.1, 4.1, [1]])
def test_what_is_no_grade_is_refused(grade: object) -> None:
    with pytest.raises(RecordError, match=r"^grade must be a number from 0 to 4, got "):
        Graded(Prompt.of("q").answer("a"), grade)  # pyright: ignore[reportArgumentType]


def test_a_graded_conversation_round_trips() -> None:
    item = graded(2.5)
    assert Graded.from_json(item.to_json()) == item
    assert item.prompt == item.conversation.prompt
    with pytest.raises(RecordError, match="the key 'grade' is missing"):
        Graded.from_json(item.conversation.to_json())
