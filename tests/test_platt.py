"""Platt scaling: fitted values against scipy's optimiser and against the law that made the data; files; refusals."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch

from reward.platt import Calibration
from reward.scorer import ScorerError, sigmoid

JUDGE = {"model": "0123456789abcdef", "guidelines": "fedcba9876543210", "prompt": "slots"}


def make_cases(num: int, *, scale: float, bias: float, seed: int = 0) -> list[tuple[float, bool]]:
    draw = random.Random(seed)
    odds = [draw.gauss(6, 3) for _ in range(num)]
    return [(x, draw.random() < sigmoid(scale * x + bias)) for x in odds]


def test_scale_and_bias_that_made_the_labels_are_found() -> None:
    fitted = Calibration.fit(make_cases(20_000, scale=0.6, bias=-3.0), judge=JUDGE)
    assert fitted.scale == pytest.approx(0.6, abs=0.03)
    assert fitted.bias == pytest.approx(-3.0, abs=0.2)
    assert fitted.cases == 20_000


@pytest.mark.parametrize("num", [6, 40, 500])
def test_the_fit_is_the_most_likely_one(num: int) -> None:
    """By torch's L-BFGS and its own cross-entropy."""
    cases = make_cases(num, scale=0.4, bias=-2.0, seed=num)
    good = sum(label for _, label in cases)
    high, low = (good + 1) / (good + 2), 1 / (num - good + 2)

    odds = torch.tensor([x for x, _ in cases], dtype=torch.float64)
    targets = torch.tensor([high if label else low for _, label in cases], dtype=torch.float64)
    at = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    exact = {"max_iter": 500, "tolerance_grad": 1e-12, "tolerance_change": 1e-15}
    optimizer = torch.optim.LBFGS([at], line_search_fn="strong_wolfe", **exact)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(at[0] * odds + at[1], targets)
        value.backward()
        return value

    optimizer.step(loss)
    fitted = Calibration.fit(cases, judge=JUDGE)
    assert [fitted.scale, fitted.bias] == pytest.approx(at.tolist(), abs=1e-5)


def test_mean_probability_is_the_share_of_good_ones() -> None:
    """What the bias is for: the derivative of the loss by it is zero."""
    cases = make_cases(400, scale=1.5, bias=-9.0)
    fitted = Calibration.fit(cases, judge=JUDGE)
    good = sum(label for _, label in cases)
    smoothed = good * (good + 1) / (good + 2) + (400 - good) / (400 - good + 2)
    assert math.fsum(sigmoid(fitted.log_odds(x)) for x, _ in cases) == pytest.approx(smoothed, abs=1e-5)


@pytest.mark.parametrize("factor", [1e-4, 1.0, 1e4])
def test_labels_that_are_told_apart_perfectly_have_a_finite_fit(factor: float) -> None:
    cases = [(factor * x, x > 5) for x in range(11)]
    fitted = Calibration.fit(cases, judge=JUDGE)
    probabilities = [sigmoid(fitted.log_odds(x)) for x, _ in cases]
    assert probabilities == sorted(probabilities)
    assert 0.5 < probabilities[-1] < 1
    assert 0 < probabilities[0] < 0.5


def test_a_judge_that_says_the_same_of_all_gets_the_share() -> None:
    fitted = Calibration.fit([(8.0, True)] * 30 + [(8.0, False)] * 10, judge=JUDGE)
    assert sigmoid(fitted.log_odds(8.0)) == pytest.approx((30 * 31 / 32 + 10 / 12) / 40, abs=1e-6)


@pytest.mark.parametrize("label", [True, False])
def test_one_label_alone_fits_nothing(label: bool) -> None:
    with pytest.raises(ScorerError, match="needs good and bad cases"):
        Calibration.fit([(1.0, label), (2.0, label)], judge=JUDGE)


def test_a_judge_that_calls_good_bad_cannot_be_calibrated() -> None:
    with pytest.raises(ScorerError, match=r"a positive scale .* calls good bad"):
        Calibration.fit([(float(x), x < 5) for x in range(10)], judge=JUDGE)


def test_a_file_is_read_back(tmp_path: Path) -> None:
    calibration = Calibration(0.5, -1.25, JUDGE, 120)
    calibration.write(tmp_path / "calibration.json")
    assert Calibration.read(tmp_path / "calibration.json") == calibration
    assert json.loads((tmp_path / "calibration.json").read_text())["judge"] == JUDGE
    assert calibration.log_odds(4.0) == 0.75


@pytest.mark.parametrize(
    "text", ["", "[]", '{"scale": 1}', '{"scale": "x", "bias": 0, "judge": {}, "cases": 1}', "\udcff"]
)
def test_what_is_no_calibration_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_bytes(text.encode("utf-8", errors="surrogateescape"))
    with pytest.raises(ScorerError, match="is no calibration"):
        Calibration.read(tmp_path / "c.json")
    with pytest.raises(ScorerError, match="is no calibration"):
        Calibration.read(tmp_path / "absent.json")


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_must_be_positive_and_finite(scale: float) -> None:
    with pytest.raises(ScorerError, match="positive scale"):
        Calibration(scale, 0.0, JUDGE, 1)


def test_it_serves_its_own_judge_alone() -> None:
    calibration = Calibration(1.0, 0.0, JUDGE, 10)
    calibration.check(JUDGE)
    calibration.check({"guidelines": JUDGE["guidelines"]})
    with pytest.raises(ScorerError, match="was fitted for guidelines fedcba9876543210, not for 0"):
        calibration.check(JUDGE | {"guidelines": "0"})
    with pytest.raises(ScorerError, match="was fitted for quantization None, not for int8"):
        calibration.check(JUDGE | {"quantization": "int8"})
