"""`alignment.objectives`: every formula against an example by hand, its definition in numpy, or a law."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from alignment.objectives import (
    Moments,
    clipped_policy_loss,
    clipped_value_loss,
    estimate_advantages,
    estimate_kl,
    kl_penalty,
    masked_mean,
    moment_sums,
    moments,
    token_rewards,
    token_statistics,
    whiten,
)

LN2 = math.log(2)


def lengths_mask(numbers: np.random.Generator, *, rows: int, length: int) -> np.ndarray:
    """Completions of random lengths, an empty one among them."""
    lengths = numbers.integers(1, length + 1, size=rows)
    lengths[0], lengths[-1] = length, 0
    return np.arange(length) < lengths[:, None]


# --------------------------------------------------------------------------------- means, moments, whitening


def test_a_masked_mean_counts_tokens_not_rows() -> None:
    values = torch.tensor([[1.0, 2.0, 9.0], [6.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert masked_mean(values, mask).item() == 3.0  # (1 + 2 + 6) / 3


def test_moments_by_hand() -> None:
    """2, 4, 4, 4, 5, 5, 7, 9 have mean 5 and population variance 4."""
    values = torch.tensor([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0, 1000.0])
    assert moments(values, values < 1000) == Moments(mean=5.0, variance=4.0, count=8)
    assert moments(values[:8]) == Moments(mean=5.0, variance=4.0, count=8)


def test_moments_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="no value counts"):
        moments(torch.ones(3), torch.zeros(3, dtype=torch.bool))


@pytest.mark.parametrize("seed", range(3))
def test_summed_over_processes_moments_are_those_of_the_union(seed: int) -> None:
    numbers = np.random.default_rng(seed)
    shares = [numbers.normal(100, 3, size=(4, 7)).astype(np.float32) for _ in range(3)]
    masks = [numbers.random((4, 7)) < 0.6 for _ in range(3)]
    masks[1][:] = False  # one process may have nothing that counts
    total = sum(moment_sums(torch.tensor(v), torch.tensor(m)) for v, m in zip(shares, masks, strict=True))
    gathered = Moments.from_sums(total[0].item(), total[1].item(), int(total[2]))
    union = np.concatenate([v[m] for v, m in zip(shares, masks, strict=True)]).astype(np.float64)
    assert gathered.count == union.size
    assert gathered.mean == pytest.approx(union.mean(), rel=1e-12)
    assert gathered.variance == pytest.approx(union.var(), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_whitened_values_have_mean_0_and_variance_1_where_they_count(seed: int) -> None:
    numbers = np.random.default_rng(seed)
    values, mask = torch.tensor(numbers.normal(-40, 5, size=(6, 9))), torch.tensor(numbers.random((6, 9)) < 0.5)
    whitened = whiten(values, mask)
    counted = whitened[mask].numpy()
    assert counted.mean() == pytest.approx(0, abs=1e-9)
    assert counted.var() == pytest.approx(1, abs=1e-6)
    assert whitened[~mask].abs().max() == 0
    assert np.corrcoef(counted, values[mask].numpy())[0, 1] == pytest.approx(1)


def test_whitening_over_the_whole_batch_is_whitening_of_the_union() -> None:
    first, second = torch.tensor([1.0, 2.0]), torch.tensor([6.0, 11.0])
    union = moments(torch.cat([first, second]))
    assert union.mean == 5.0
    halves = torch.cat([whiten(first, over=union), whiten(second, over=union)])
    expected = (np.array([1, 2, 6, 11]) - 5) / math.sqrt((16 + 9 + 1 + 36) / 4)
    np.testing.assert_allclose(halves.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_moments_of_a_union_from_those_of_its_parts(seed: int) -> None:
    numbers = np.random.default_rng(seed)
    parts = [numbers.normal(1e4, 2, size=int(size)) for size in numbers.integers(1, 50, size=6)]
    found = moments(torch.tensor(parts[0]))
    for part in parts[1:]:
        found = found.with_more(moments(torch.tensor(part)))
    union = np.concatenate(parts)
    assert found.count == union.size
    assert found.mean == pytest.approx(union.mean(), rel=1e-13)
    assert found.variance == pytest.approx(union.var(), rel=1e-6)


def test_equal_values_whiten_to_zero() -> None:
    assert whiten(torch.full((7,), 0.1)).abs().max() < 1e-3


# ----------------------------------------------------------------------------------------------------- KL


def test_kl_estimates_by_hand() -> None:
    """d = ln 2 and -ln 2: k1 = d; k2 = d^2 / 2; k3 = e^-d - 1 + d = ln 2 - 1/2 and 1 - ln 2."""
    logprobs, reference = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.0 - LN2, -2.0 + LN2, -3.0])
    for estimator, expected in {
        "k1": [LN2, -LN2, 0.0],
        "k2": [LN2**2 / 2, LN2**2 / 2, 0.0],
        "k3": [LN2 - 0.5, 1 - LN2, 0.0],
    }.items():
        kl = estimate_kl(logprobs, reference, estimator=estimator)  # type: ignore[arg-type]
        torch.testing.assert_close(kl, torch.tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_the_expectation_of_k1_and_of_k3_is_the_kl_divergence(seed: int) -> None:
    """Summed over the whole support with the policy's probabilities, so there is no sampling error."""
    numbers = np.random.default_rng(seed)
    policy, reference = numbers.dirichlet(np.ones(12), size=2)
    divergence = float(np.sum(policy * np.log(policy / reference)))
    logprobs, ref_logprobs = torch.tensor(np.log(policy)), torch.tensor(np.log(reference))

    def expectation(estimator: str) -> float:
        return float((torch.tensor(policy) * estimate_kl(logprobs, ref_logprobs, estimator=estimator)).sum())  # type: ignore[arg-type]

    assert expectation("k1") == pytest.approx(divergence, rel=1e-10)
    assert expectation("k3") == pytest.approx(divergence, rel=1e-10)
    assert abs(expectation("k2") - divergence) > 1e-3  # biased
    assert estimate_kl(logprobs, ref_logprobs, estimator="k3").min() >= 0


def test_equal_policies_have_no_divergence() -> None:
    logprobs = torch.randn(3, 4)
    for estimator in ("k1", "k2", "k3"):
        assert estimate_kl(logprobs, logprobs, estimator=estimator).abs().max() == 0  # type: ignore[arg-type]


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum()


def expected_gradient(
    logits: np.ndarray, weights: np.ndarray, old: np.ndarray, ref: np.ndarray, kl: object
) -> np.ndarray:
    """Of a penalty's mean over the whole support, weighted as samples would be, with respect to the logits."""
    parameters = torch.tensor(logits, requires_grad=True)
    logprobs = torch.log_softmax(parameters, dim=0)
    penalties = kl(logprobs, torch.tensor(np.log(old)), torch.tensor(np.log(ref)))  # type: ignore[operator]
    (torch.tensor(weights) * penalties).sum().backward()
    assert parameters.grad is not None
    return parameters.grad.numpy()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("seed", range(5))
def test_the_gradient_of_the_penalty_is_that_of_the_divergence_also_off_policy(seed: int, estimator: str) -> None:
    """d KL(p || q) / d z_i = p_i (log(p_i / q_i) - KL(p || q)) for p = softmax(z); tokens come from the old policy."""
    numbers = np.random.default_rng(seed)
    logits, (old, ref) = numbers.normal(size=9), numbers.dirichlet(np.full(9, 3.0), size=2)
    p = softmax(logits)
    divergence = np.sum(p * np.log(p / ref))
    expected = p * (np.log(p / ref) - divergence)

    def penalty(*logprobs: torch.Tensor) -> torch.Tensor:
        return kl_penalty(*logprobs, estimator=estimator)  # type: ignore[arg-type]

    np.testing.assert_allclose(expected_gradient(logits, old, old, ref, penalty), expected, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_without_the_ratio_k1_pushes_nowhere_and_k3_along_the_other_divergence(seed: int) -> None:
    """d KL(q || p) / d z = p - q. Why the penalty carries the ratio, though it is 1 where the gradient is taken."""
    numbers = np.random.default_rng(seed)
    logits, ref = numbers.normal(size=9), numbers.dirichlet(np.full(9, 3.0))
    p = softmax(logits)

    def plain(estimator: str) -> np.ndarray:
        return expected_gradient(
            logits,
            p,
            p,
            ref,
            lambda new, _, base: estimate_kl(new, base, estimator=estimator),  # type: ignore[arg-type]
        )

    np.testing.assert_allclose(plain("k1"), 0, atol=1e-12)
    np.testing.assert_allclose(plain("k3"), p - ref, atol=1e-12)


def test_the_penalty_by_hand() -> None:
    """pi 1/2, pi_old 1/4, pi_ref 1/8: rho = 2, d = ln 4; k1 = d, k2 = d^2 / 2, k3 = 1/4 - 1 + d."""
    new, old, ref = (torch.tensor([math.log(p)]) for p in (1 / 2, 1 / 4, 1 / 8))
    for estimator, expected in {"k1": 4 * LN2, "k2": 4 * LN2**2, "k3": 4 * LN2 - 1.5}.items():
        assert kl_penalty(new, old, ref, estimator=estimator).item() == pytest.approx(expected, rel=1e-6)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ rewards


def test_token_rewards_by_hand() -> None:
    scores = torch.tensor([3.0, -1.0])
    kl = torch.tensor([[0.5, 1.0, 2.0], [4.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rewards = token_rewards(scores, kl, mask, kl_coef=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, -0.1, 2.8], [-1.4, 0.0, 0.0]]))


@pytest.mark.parametrize("seed", range(5))
def test_token_rewards_add_up_to_the_papers_reward_and_the_score_stands_last(seed: int) -> None:
    """R(g|p) = score - beta * sum of KL (Llama 2, section 3.2.3)."""
    numbers = np.random.default_rng(seed)
    mask = lengths_mask(numbers, rows=8, length=6)[:-1]
    scores, kl, beta = numbers.normal(size=7), numbers.normal(size=(7, 6)), 0.37
    rewards = token_rewards(torch.tensor(scores), torch.tensor(kl), torch.tensor(mask), kl_coef=beta).numpy()
    np.testing.assert_allclose(rewards.sum(axis=1), scores - beta * (kl * mask).sum(axis=1), rtol=1e-12)
    without = token_rewards(torch.zeros(7), torch.tensor(kl), torch.tensor(mask), kl_coef=beta).numpy()
    share = rewards - without
    for row, length in enumerate(mask.sum(axis=1)):
        assert share[row, length - 1] == pytest.approx(scores[row])
        assert np.count_nonzero(share[row]) == 1


# -------------------------------------------------------------------------------------------- advantages


def test_advantages_by_hand() -> None:
    """gamma 0.9, lambda 0.5: deltas 1.4, -1.9, 3; A = 1.4 + 0.45 * -0.55, -1.9 + 0.45 * 3, 3."""
    rewards, values = torch.tensor([[1.0, 0.0, 2.0, 0.0]]), torch.tensor([[0.5, 1.0, -1.0, 0.0]])
    mask = torch.tensor([[True, True, True, False]])
    advantages, returns = estimate_advantages(rewards, values, mask, gamma=0.9, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[1.1525, -0.55, 3.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[1.6525, 0.45, 2.0, 0.0]]))


def advantages_by_definition(
    rewards: np.ndarray, values: np.ndarray, mask: np.ndarray, *, gamma: float, lam: float
) -> np.ndarray:
    """Schulman et al. 2016, equation 16: A_t = sum over l of (gamma * lambda)^l * delta_{t+l}."""
    advantages = np.zeros_like(rewards)
    for row, length in enumerate(mask.sum(axis=1)):
        following = np.append(values[row, 1:length], 0.0)
        delta = rewards[row, :length] + gamma * following - values[row, :length]
        for t in range(length):
            advantages[row, t] = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length))
    return advantages


@pytest.mark.parametrize("seed", range(20))
def test_advantages_are_the_sum_of_the_definition(seed: int) -> None:
    numbers = np.random.default_rng(seed)
    mask = lengths_mask(numbers, rows=5, length=int(numbers.integers(1, 12)))
    rewards, values = (numbers.normal(size=mask.shape) for _ in range(2))  # also where nothing counts
    gamma, lam = numbers.choice([0.0, 0.3, 0.95, 1.0], size=2)
    advantages, returns = estimate_advantages(
        torch.tensor(rewards), torch.tensor(values), torch.tensor(mask), gamma=gamma, lam=lam
    )
    expected = advantages_by_definition(rewards, values, mask, gamma=gamma, lam=lam)
    np.testing.assert_allclose(advantages.numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(returns.numpy(), (expected + values) * mask, atol=1e-12)


def test_with_gamma_and_lambda_1_the_return_is_the_reward_to_go_whatever_the_values() -> None:
    numbers = np.random.default_rng(0)
    rewards, mask = torch.tensor(numbers.normal(size=(3, 5))), torch.ones(3, 5, dtype=torch.bool)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    for scale in (0.0, 7.0):
        values = scale * torch.tensor(numbers.normal(size=(3, 5)))
        _, returns = estimate_advantages(rewards, values, mask, gamma=1.0, lam=1.0)
        torch.testing.assert_close(returns, to_go)


@pytest.mark.parametrize("multiplier", [0.0, 0.5, 3.0])
def test_the_advantage_of_a_combination_is_the_combination_of_the_advantages(multiplier: float) -> None:
    """(A_r - m A_c) / (1 + m), as Safe RLHF combines two critics', with one critic of the combined reward."""
    numbers = np.random.default_rng(0)
    mask = lengths_mask(numbers, rows=5, length=7)
    tensors = [torch.tensor(numbers.normal(size=mask.shape)) for _ in range(4)]

    def advantages(rewards: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return estimate_advantages(rewards, values, torch.tensor(mask), gamma=0.97, lam=0.9)[0]

    def combine(of_reward: torch.Tensor, of_cost: torch.Tensor) -> torch.Tensor:
        return (of_reward - multiplier * of_cost) / (1 + multiplier)

    reward, cost, value, cost_value = tensors
    torch.testing.assert_close(
        advantages(combine(reward, cost), combine(value, cost_value)),
        combine(advantages(reward, value), advantages(cost, cost_value)),
    )


# ------------------------------------------------------------------------------------------------ clipping


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.5, 1.0, -1.2, True),  # better than expected and already more likely: no further
        (0.5, 1.0, -0.5, False),
        (1.5, -1.0, 1.5, False),
        (0.5, -1.0, 0.8, True),  # worse than expected and already less likely: no further
        (1.1, 2.0, -2.2, False),
        (0.9, -2.0, 1.8, False),
        (1.0, 3.0, -3.0, False),
        (1.5, 0.0, 0.0, False),
    ],
)
def test_the_policy_loss_is_clipped_in_two_of_four_quadrants(
    ratio: float, advantage: float, loss: float, clipped: bool
) -> None:
    """-min(rho A, clip(rho, 0.8, 1.2) A); its gradient is -rho A where the clip is idle and 0 where it acts."""
    old = torch.tensor([[-2.0]])
    new = (old + math.log(ratio)).requires_grad_()
    value, active = clipped_policy_loss(new, old, torch.tensor([[advantage]]), clip_range=0.2)
    assert value.item() == pytest.approx(loss, abs=1e-6)
    assert active.item() is clipped
    value.sum().backward()
    assert new.grad is not None
    assert new.grad.item() == pytest.approx(0.0 if clipped else -ratio * advantage, abs=1e-6)


@pytest.mark.parametrize(
    ("value", "target", "loss", "gradient"),
    [
        (1.5, 2.0, 0.32, 0.0),  # clipped to 1.2: (1.2 - 2)^2 / 2
        (0.5, 2.0, 1.125, -1.5),  # moved away from the return: (0.5 - 2)^2 / 2 is the larger one
        (1.5, 0.0, 1.125, 1.5),
        (0.5, 0.0, 0.32, 0.0),  # clipped to 0.8: (0.8 - 0)^2 / 2
        (1.1, 2.0, 0.405, -0.9),  # within the range: the plain loss
        (0.9, 0.0, 0.405, 0.9),
        (1.0, 1.0, 0.0, 0.0),
    ],
)
def test_the_value_loss_is_clipped_around_the_old_value(
    value: float, target: float, loss: float, gradient: float
) -> None:
    values = torch.tensor([[value]], requires_grad=True)
    result = clipped_value_loss(values, torch.tensor([[1.0]]), torch.tensor([[target]]), clip_range=0.2)
    assert result.item() == pytest.approx(loss, abs=1e-6)
    result.sum().backward()
    assert values.grad is not None
    assert values.grad.item() == pytest.approx(gradient, abs=1e-6)


# ----------------------------------------------------------------------------------------- token statistics


def test_logprobs_and_entropies_against_numpy() -> None:
    numbers = np.random.default_rng(0)
    logits, tokens = numbers.normal(0, 4, size=(3, 5, 11)), numbers.integers(0, 11, size=(3, 5))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    statistics = token_statistics(torch.tensor(logits), torch.tensor(tokens))
    chosen = np.take_along_axis(np.log(probabilities), tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(statistics.logprobs.numpy(), chosen, atol=1e-5)
    entropies = -(probabilities * np.log(probabilities)).sum(axis=-1)
    np.testing.assert_allclose(statistics.entropies.numpy(), entropies, atol=1e-5)


def test_equal_logits_have_the_largest_entropy_and_a_certain_token_none() -> None:
    logits = torch.tensor([[[0.0] * 8, [200.0] + [0.0] * 7]])
    statistics = token_statistics(logits, torch.tensor([[3, 0]]))
    torch.testing.assert_close(statistics.logprobs, torch.tensor([[-math.log(8), 0.0]]))
    torch.testing.assert_close(statistics.entropies, torch.tensor([[math.log(8), 0.0]]))


def test_half_precision_logits_are_summed_up_in_float32() -> None:
    logits = torch.zeros(1, 1, 50_000, dtype=torch.bfloat16)
    statistics = token_statistics(logits, torch.tensor([[7]]))
    assert statistics.logprobs.dtype == statistics.entropies.dtype == torch.float32
    assert statistics.logprobs.item() == pytest.approx(-math.log(50_000), abs=1e-4)
    assert statistics.entropies.item() == pytest.approx(math.log(50_000), abs=1e-3)
