"""Platt scaling: from a judge's log-odds to a probability that means what it says, for that judge alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from reward.scorer import ScorerError, sigmoid

_STEPS = 100
"""Newton's method needs about ten."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """`P(good) = sigmoid(scale * log-odds + bias)` (Platt 1999); `scale` is one over a temperature.

    `judge` names what it was fitted for, such as the model and the guidelines: with another judge it says nothing and
    is refused. `cases`: how many labelled conversations it was fitted on.
    """

    scale: float
    bias: float
    judge: Mapping[str, str]
    cases: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and math.isfinite(self.bias) and self.scale > 0):
            raise ScorerError(
                f"a calibration has a positive scale and a finite bias, got {self.scale} and {self.bias}; a judge "
                "whose scale comes out negative calls good bad; it needs other guidelines or another model"
            )

    @classmethod
    def fit(cls, cases: Sequence[tuple[float, bool]], *, judge: Mapping[str, str]) -> Calibration:
        """The most likely scale and bias for `(log-odds of good, is it good)` cases.

        Targets are `(n + 1) / (n + 2)` and `1 / (n + 2)` instead of 1 and 0, as Platt has them, so that labels that the
        log-odds tell apart perfectly still have a finite answer. ScorerError when only one label occurs.
        """
        num_good = sum(good for _, good in cases)
        num_bad = len(cases) - num_good
        if not num_good or not num_bad:
            raise ScorerError(f"a calibration needs good and bad cases, got {num_good} good and {num_bad} bad")
        high, low = (num_good + 1) / (num_good + 2), 1 / (num_bad + 2)
        scale, bias = _most_likely([(x, high if good else low) for x, good in cases])
        return cls(scale, bias, dict(judge), len(cases))

    @classmethod
    def read(cls, path: str | Path) -> Calibration:
        """ScorerError when the file is not one that `write` wrote."""
        try:
            row = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(float(row["scale"]), float(row["bias"]), dict(row["judge"]), int(row["cases"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ScorerError(f"{path} is no calibration of a judge: {type(error).__name__}: {error}") from error

    def write(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(asdict(self), indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def check(self, judge: Mapping[str, str]) -> None:
        """ScorerError when it was fitted for another judge. Only the names that `judge` gives are compared."""
        for name, found in judge.items():
            fitted = self.judge.get(name)
            if found != fitted:
                raise ScorerError(
                    f"the calibration was fitted for {name} {fitted}, not for {found}; fit one for this judge"
                )

    def log_odds(self, raw: float) -> float:
        """The calibrated log-odds of good."""
        return self.scale * raw + self.bias


def _most_likely(cases: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Scale and bias of least cross-entropy for `(x, target in (0, 1))` cases, by damped Newton steps.

    The loss is convex; where all x are equal the scale is free and stays 1, since a little curvature is added.
    """
    mean = math.fsum(x for x, _ in cases) / len(cases)
    spread = math.sqrt(math.fsum((x - mean) ** 2 for x, _ in cases) / len(cases)) or 1.0
    # Standardised, both directions have curvatures of like size.
    rows = [((x - mean) / spread, target) for x, target in cases]
    slope, offset = spread, mean
    loss = _cross_entropy(rows, slope, offset)
    for _ in range(_STEPS):
        odds = [(x, target, sigmoid(slope * x + offset)) for x, target in rows]
        g_slope = math.fsum((p - target) * x for x, target, p in odds)
        g_offset = math.fsum(p - target for _, target, p in odds)
        weights = [(x, p * (1 - p)) for x, _, p in odds]
        a = math.fsum(w * x * x for x, w in weights) + 1e-12
        b = math.fsum(w * x for x, w in weights)
        c = math.fsum(w for _, w in weights) + 1e-12
        determinant = a * c - b * b
        d_slope = (c * g_slope - b * g_offset) / determinant
        d_offset = (a * g_offset - b * g_slope) / determinant
        step = 1.0
        while step > 1e-10 and _cross_entropy(rows, slope - step * d_slope, offset - step * d_offset) > loss:
            step /= 2
        slope, offset = slope - step * d_slope, offset - step * d_offset
        after = _cross_entropy(rows, slope, offset)
        if loss - after <= 1e-12 * max(1.0, loss):
            break
        loss = after
    scale = slope / spread
    return scale, offset - scale * mean


def _cross_entropy(rows: Sequence[tuple[float, float]], slope: float, offset: float) -> float:
    """`-sum t log p + (1 - t) log (1 - p)` with `p = sigmoid(slope x + offset)`, without overflow."""
    total = 0.0
    for x, target in rows:
        z = slope * x + offset
        total += max(z, 0.0) - target * z + math.log1p(math.exp(-abs(z)))
    return total
