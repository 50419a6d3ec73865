"""Losses of a reward model: pure functions of raw scores (logits). Shapes: `(batch,)` unless said otherwise."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from reward.conversation import RATINGS, Rating

MARGINS: Mapping[str, Mapping[Rating, float]] = {
    "none": dict.fromkeys(RATINGS, 0.0),
    "small": dict(zip(RATINGS, (1.0, 2 / 3, 1 / 3, 0.0), strict=True)),
    "large": dict(zip(RATINGS, (3.0, 2.0, 1.0, 0.0), strict=True)),
}
"""The preference-rating margins m(r) of Llama 2, Table 27."""


def ranking_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """Mean of `-log sigmoid(chosen - rejected - margin)` (Llama 2, equations 1 and 2).

    `chosen`, `rejected`, `margin`: raw scores `(batch,)`; the three must have one shape, since a stray axis would
    broadcast to `(batch, batch)` without a word. Returns a scalar >= 0; equal scores give ln 2.
    """
    if chosen.shape != rejected.shape or (margin is not None and margin.shape != chosen.shape):
        shapes = [tuple(t.shape) for t in (chosen, rejected, margin) if t is not None]
        raise ValueError(f"chosen, rejected and margin must have one shape, got {shapes}")
    difference = chosen - rejected
    if margin is not None:
        difference = difference - margin
    return -F.logsigmoid(difference).mean()


def safety_auxiliary_loss(scores: Tensor, is_safe: Tensor) -> Tensor:
    """Binary cross-entropy that puts safe answers above zero and unsafe ones below it.

    Llama 2 (appendix A.3.4) names this loss and reports its effect (Table 29: unsafe recall at 0.5 from 73.0 to 90.4)
    but prints no formula; this is the one that fits its rule "unsafe if the sigmoid score is under 0.5".
    `scores`: raw scores; `is_safe`: 1.0 safe, 0.0 unsafe, NaN unlabelled (left out). A scalar; 0 without labels.
    """
    if scores.shape != is_safe.shape:
        raise ValueError(f"scores {tuple(scores.shape)} and is_safe {tuple(is_safe.shape)} must have one shape")
    labelled = ~torch.isnan(is_safe)
    if not bool(labelled.any()):
        return scores.sum() * 0.0
    return F.binary_cross_entropy_with_logits(scores[labelled], is_safe[labelled].to(scores.dtype))


def centering_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Mean of `(chosen + rejected)^2`: keeps a pair around zero (Eisenstein et al. 2023, arXiv 2312.09244)."""
    return (chosen + rejected).pow(2).mean()


def grade_loss(scores: Tensor, grades: Tensor) -> Tensor:
    """Mean of `(score - grade)^2`, with grades of harm by people (Safety-Tuned LLaMAs, arXiv 2309.07875)."""
    if scores.shape != grades.shape:
        raise ValueError(f"scores {tuple(scores.shape)} and grades {tuple(grades.shape)} must have one shape")
    return F.mse_loss(scores, grades)
