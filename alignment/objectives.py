"""The mathematics of PPO: pure functions of tensors. Shapes are `(batch, length)` over completion tokens.

Masks are True where a token counts. Every mean is over the tokens that count. Padding holds zeros.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

KlEstimator = Literal["k1", "k2", "k3"]


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask`; a scalar. At least one token must count."""
    return (values * mask).sum() / mask.sum()


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and population variance of the values that count, and how many they are."""

    mean: float
    variance: float
    count: int

    @classmethod
    def from_sums(cls, total: float, total_of_squares: float, count: int) -> Moments:
        """From sums that may have been added up over processes."""
        if count == 0:
            raise ValueError("no value counts, so there is no mean")
        mean = total / count
        return cls(mean, max(0.0, total_of_squares / count - mean * mean), count)

    def with_more(self, other: Moments) -> Moments:
        """Of the union of two sets, from the moments of each (Chan, Golub and LeVeque 1979)."""
        count, step = self.count + other.count, other.mean - self.mean
        spread = self.variance * self.count + other.variance * other.count
        variance = (spread + step * step * self.count * other.count / count) / count
        return Moments(self.mean + step * other.count / count, variance, count)


def moment_sums(values: Tensor, mask: Tensor) -> Tensor:
    """`(sum, sum of squares, count)` of what counts, in float64; these add over processes."""
    counted = values.double() * mask
    return torch.stack([counted.sum(), counted.square().sum(), mask.double().sum()])


def moments(values: Tensor, mask: Tensor | None = None) -> Moments:
    """Mean and population variance over what counts (None: everything)."""
    total, squares, count = moment_sums(values, torch.ones_like(values) if mask is None else mask).tolist()
    return Moments.from_sums(total, squares, int(count))


def whiten(values: Tensor, mask: Tensor | None = None, *, over: Moments | None = None, epsilon: float = 1e-8) -> Tensor:
    """Shift and scale to mean 0 and variance 1 (population) over what counts; zeros elsewhere.

    Llama 2 whitens the logits of the combined score (section 3.2.3) and does not say over what: here over `values`, or
    over the batch of all processes when its moments are given.
    """
    over = over or moments(values, mask)
    whitened = (values - over.mean) / (over.variance + epsilon) ** 0.5
    return whitened if mask is None else whitened * mask


def estimate_kl(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: KlEstimator = "k1") -> Tensor:
    """Per-token estimate of KL(policy || reference) from tokens sampled by the policy (Schulman 2020).

    With `d = log pi - log pi_ref`: k1 = d (unbiased, may be negative), k2 = d^2 / 2 (biased, low variance),
    k3 = exp(-d) - 1 + d (unbiased, never negative).
    """
    difference = logprobs - ref_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    return torch.expm1(-difference) + difference


def kl_penalty(
    logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, *, estimator: KlEstimator = "k3"
) -> Tensor:
    """Per-token penalty for the loss, on tokens that the old policy sampled; its gradient is that of the divergence.

    With `rho = pi / pi_old`: `rho * k1` and `rho * k3` have the expectation KL(policy || reference) and its gradient,
    `rho * k2` with rho held constant has the gradient alone. Without rho, k1 would push nowhere on average, and k3 (as
    in GRPO, Shao et al. 2024) along the gradient of KL(reference || policy); see Tang and Munos 2025.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    if estimator == "k2":
        ratio = ratio.detach()
    return ratio * estimate_kl(logprobs, ref_logprobs, estimator=estimator)


def next_kl_coef(kl_coef: float, *, kl: float, target: float, horizon: int, num_answers: int) -> float:
    """The coefficient after an iteration in which an answer diverged by `kl` nats on average.

    Proportional control in log space, at most 20% of the error counts: `coef * (1 + clip(kl / target - 1, -0.2, 0.2) *
    num_answers / horizon)` (Ziegler et al. 2019, section 2.2, and its code).
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_answers / horizon)


def next_multiplier(multiplier: float, *, cost: float, limit: float, learning_rate: float, maximum: float) -> float:
    """The Lagrange multiplier after an iteration with this mean cost, at most `maximum` (Safe RLHF, Dai et al. 2023).

    `ln m' = ln m + learning_rate * m * (cost - limit)`: a gradient step on ln m.
    """
    step = min(learning_rate * multiplier * (cost - limit), 100.0)  # beyond any maximum, and no overflow
    return min(multiplier * math.exp(step), maximum)


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """`-kl_coef * kl` at every token and the score `(batch,)` on top at the last one (Llama 2, section 3.2.3).

    The sum over a row is `score - kl_coef * sum(kl)`, the paper's R(g|p).
    """
    rewards = -kl_coef * kl * mask
    last = mask.long().cumsum(dim=1).argmax(dim=1)
    rewards[torch.arange(rewards.shape[0]), last] += scores
    return rewards


def estimate_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, equation 16) and the returns `advantages + values`.

    `delta_t = r_t + gamma * V_{t+1} - V_t`, `A_t = delta_t + gamma * lam * A_{t+1}`; beyond the last token both are 0.
    """
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        counts = mask[:, t].to(rewards.dtype)
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = (delta + gamma * lam * running) * counts
        advantages[:, t] = running
        next_value = values[:, t] * counts
    return advantages, (advantages + values) * mask


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_range: float
) -> tuple[Tensor, Tensor]:
    """Per-token `-min(rho * A, clip(rho, 1 - e, 1 + e) * A)` and whether the clip was active (Schulman et al. 2017)."""
    ratio = torch.exp(logprobs - old_logprobs)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(plain, clipped), clipped > plain


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip_range: float) -> Tensor:
    """Per-token `max((V - R)^2, (clip(V, V_old - e, V_old + e) - R)^2) / 2` (Stiennon et al. 2020)."""
    clipped = torch.clamp(values, old_values - clip_range, old_values + clip_range)
    return torch.maximum((values - returns).square(), (clipped - returns).square()) / 2


@dataclass(frozen=True, slots=True)
class TokenStatistics:
    """What the policy thinks of tokens: log-probabilities and entropies, `(batch, length)`."""

    logprobs: Tensor
    entropies: Tensor


def token_statistics(logits: Tensor, tokens: Tensor) -> TokenStatistics:
    """Log-probability of each token and entropy of the distribution it was drawn from, in nats; in float32.

    Entropies are watched, not trained: no gradient flows through them, and none is kept for it.
    """
    log_distribution = torch.log_softmax(logits.float(), dim=-1)
    logprobs = log_distribution.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        entropies = -(log_distribution.exp() * log_distribution).sum(dim=-1)
    return TokenStatistics(logprobs, entropies)
