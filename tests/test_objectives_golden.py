"""`alignment.objectives` against numbers that published implementations give for the same inputs.

Advantages, whitening, both clipped losses and the KL controller: lm-human-preferences (the code of Ziegler et al.
2019), commit cbfd210, `PPOTrainer.loss` and `AdaptiveKLController` with numpy in the place of TensorFlow, gamma 0.97,
lambda 0.9, both clip ranges 0.2. KL estimates: OpenRLHF, commit 3c3be62, `compute_approx_kl`.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from alignment.objectives import (
    KlEstimator,
    clipped_policy_loss,
    clipped_value_loss,
    estimate_advantages,
    estimate_kl,
    next_kl_coef,
    whiten,
)


def tensor(*rows: tuple[float, float, float, float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


REWARDS = tensor((-0.02, 0.01, -0.04, 1.2), (0.03, -0.05, 0.02, -0.7))
OLD_VALUES = tensor((0.5, -0.3, 0.8, 0.1), (-0.6, 0.2, 0.4, -0.9))
VALUES = tensor((0.9, -0.35, 0.3, 0.45), (-0.2, 0.1, 0.75, -0.8))
OLD_LOGPROBS = tensor((-1.2, -0.4, -2.3, -0.7), (-0.9, -1.6, -0.2, -3.1))
LOGPROBS = tensor((-0.8, -0.5, -2.9, -0.65), (-1.3, -1.2, -0.25, -3.0))
REF_LOGPROBS = tensor((-1.0, -0.4, -1.7, -0.9), (-1.4, -1.1, -0.3, -2.2))

ADVANTAGES = tensor((0.3026886317, 1.2757029, 0.2173, 1.1), (0.1225940864, -0.8034432, -1.0784, 0.2))
RETURNS = tensor((0.8026886317, 0.9757029, 1.0173, 1.2), (-0.4774059136, -0.6034432, -0.6784, -0.7))
WHITENED = tensor(
    (0.17854810472381327, 1.4594268842589562, 0.0661422645205018, 1.2281310816742848),
    (-0.05852887235672989, -1.2775670178922856, -1.6395209397234733, 0.04336849479493218),
)
KL: dict[KlEstimator, Tensor] = {
    "k1": tensor((-0.2, 0.0, -0.6, 0.2), (0.5, -0.5, 0.1, -0.9)),
    "k2": tensor((0.02, 0.0, 0.18, 0.02), (0.125, 0.125, 0.005, 0.405)),
    "k3": tensor(
        (0.0214027581601699, 0.0, 0.2221188003905088, 0.018730753077981888),
        (0.10653065971263342, 0.1487212707001282, 0.004837418035959606, 0.5596031111569495),
    ),
}


def assert_equal(found: Tensor, expected: Tensor) -> None:
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("padding", [0, 3])
def test_advantages_and_returns(padding: int) -> None:
    """Columns behind the end, with anything in them, change nothing."""
    behind = torch.full((2, padding), 7.0, dtype=torch.float64)
    mask = torch.tensor([[True] * 4 + [False] * padding] * 2)
    rewards, values = torch.cat([REWARDS, behind], dim=1), torch.cat([OLD_VALUES, behind], dim=1)
    advantages, returns = estimate_advantages(rewards, values, mask, gamma=0.97, lam=0.9)
    assert_equal(advantages[:, :4], ADVANTAGES)
    assert_equal(returns[:, :4], RETURNS)


def test_whitening() -> None:
    assert_equal(whiten(ADVANTAGES), WHITENED)


def test_clipped_policy_loss() -> None:
    losses, clipped = clipped_policy_loss(LOGPROBS, OLD_LOGPROBS, WHITENED, clip_range=0.2)
    assert losses.mean().item() == pytest.approx(0.07526999453069805, rel=1e-9)
    assert clipped.double().mean().item() == 0.25


def test_clipped_value_loss() -> None:
    losses = clipped_value_loss(VALUES, OLD_VALUES, RETURNS, clip_range=0.2)
    assert losses.mean().item() == pytest.approx(0.35716658504220744, rel=1e-9)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimates(estimator: KlEstimator) -> None:
    assert_equal(estimate_kl(OLD_LOGPROBS, REF_LOGPROBS, estimator=estimator), KL[estimator])


def test_adaptive_kl_coefficient() -> None:
    coefficients = [0.2]
    for kl in (2.0, 5.5, 6.3, 9.0, -1.0):
        following = next_kl_coef(coefficients[-1], kl=kl, target=6.0, horizon=10_000, num_answers=512)
        coefficients.append(following)
    expected = [0.197952, 0.1971074048, 0.19761199975628801, 0.1996355466337924, 0.19759127863626236]
    assert coefficients[1:] == pytest.approx(expected, rel=1e-12)
