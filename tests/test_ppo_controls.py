"""`alignment.ppo_controls`: what adapts between iterations, against the published rules and by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignment.objectives import Moments, moments, next_kl_coef, next_multiplier
from alignment.ppo_controls import following, is_evaluated, out_of_patience, warming_up, whitening_moments
from alignment.ppo_state import LoopState
from alignment.recipe import PpoRecipe
from alignment.recipe_scorers import Lagrangian, RefusalScorer
from tests.tiny_ppo import UNUSED, ppo_recipe

BATCH = Moments(mean=1.0, variance=4.0, count=8)


def recipe_of(**settings: Any) -> PpoRecipe:
    return ppo_recipe(Path("unused"), **settings)


# ----------------------------------------------------------------------------------------------------------- KL


def test_the_coefficient_by_hand() -> None:
    """Ziegler et al. 2019: the error is clipped to 0.2 either way; 256 of 10,000 answers."""

    def after(kl: float) -> float:
        return next_kl_coef(0.2, kl=kl, target=6.0, horizon=10_000, num_answers=256)

    assert after(6.0) == 0.2
    assert after(12.0) == pytest.approx(0.201024)  # error 1, clipped: 0.2 (1 + 0.2 * 0.0256)
    assert after(6.6) == pytest.approx(0.200512)  # error 0.1
    assert after(-3.0) == pytest.approx(0.198976)  # error -1.5, clipped


@pytest.mark.parametrize("start", [0.001, 10.0])
def test_the_controller_finds_the_coefficient_that_holds_the_target(start: float) -> None:
    """A policy whose divergence is 2 / coefficient has 5 nats at a coefficient of 0.4, wherever the control begins."""
    coef = start
    for _ in range(2000):
        coef = next_kl_coef(coef, kl=2 / coef, target=5.0, horizon=10_000, num_answers=512)
    assert coef == pytest.approx(0.4, rel=1e-3)


def test_a_fixed_coefficient_stays_the_recipes() -> None:
    assert following(recipe_of(), LoopState(), {"kl": 50.0}, scores=BATCH) == LoopState(
        iteration=1, metrics={"kl": 50.0}
    )


def test_the_coefficient_follows_the_divergence_and_waits_for_the_critic() -> None:
    recipe = recipe_of(kl_coef=0.2, kl_target=6.0, kl_horizon=80, critic_warmup_iterations=2)
    loop = LoopState()
    for iteration in range(2):
        assert warming_up(recipe, iteration=iteration)
        loop = following(recipe, loop, {"kl": 0.0}, scores=BATCH)
        assert loop.kl_coef is None
    loop = following(recipe, loop, {"kl": 60.0}, scores=BATCH)
    assert loop.kl_coef == pytest.approx(0.2 * 1.02)  # 8 of 80 answers
    assert following(recipe, loop, {"kl": 60.0}, scores=BATCH).kl_coef == pytest.approx(0.2 * 1.02**2)


# ---------------------------------------------------------------------------------------------------- multiplier


@pytest.mark.parametrize("cost", [-3.0, -0.5, 0.0, 0.7, 40.0])
def test_the_multiplier_takes_the_gradient_step_that_safe_rlhf_takes(cost: float) -> None:
    """SGD on the logarithm of the multiplier, of the loss -(cost - limit) * multiplier; then its maximum."""
    log_multiplier = torch.tensor(math.log(1.3), dtype=torch.float64, requires_grad=True)
    (-(cost - 0.25) * log_multiplier.exp()).backward()
    torch.optim.SGD([log_multiplier], lr=0.1).step()
    expected = min(math.exp(log_multiplier.item()), 5.0)
    found = next_multiplier(1.3, cost=cost, limit=0.25, learning_rate=0.1, maximum=5.0)
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_huge_cost_gives_the_maximum_and_a_huge_margin_of_safety_almost_none() -> None:
    assert next_multiplier(1.0, cost=1e9, limit=0.0, learning_rate=1.0, maximum=5.0) == 5.0
    assert next_multiplier(1.0, cost=-1e9, limit=0.0, learning_rate=1.0, maximum=5.0) == 0.0


def test_the_multiplier_follows_the_costs_of_the_loop() -> None:
    scorer = Lagrangian(reward=RefusalScorer(), cost=RefusalScorer(), multiplier=2.0)
    settings = {"multiplier_learning_rate": 0.5, "cost_limit": -1.0, "multiplier_max": 4.0}
    recipe = recipe_of(scorer=scorer, **settings)
    loop = following(recipe, LoopState(), {"kl": 0.0, "multiplier": 2.0, "cost_mean": -0.8}, scores=BATCH)
    assert loop.multiplier == pytest.approx(2.0 * math.exp(0.5 * 2.0 * 0.2))
    loop = following(recipe, loop, {"kl": 0.0, "multiplier": loop.multiplier or 0.0, "cost_mean": 9.0}, scores=BATCH)
    assert loop.multiplier == 4.0


@pytest.mark.parametrize("horizon", [1, 8])
def test_a_horizon_within_one_batch_is_refused(horizon: int) -> None:
    """At 0.2 * 8 = 1.6 the factor `1 - 0.2 * 8 / horizon` would be 0, and below it negative."""
    with pytest.raises(ValueError, match=f"kl_horizon {horizon} must be above batch_size 8"):
        recipe_of(kl_target=6.0, kl_horizon=horizon)
    assert recipe_of(kl_target=6.0, kl_horizon=9).ppo.kl_horizon == 9


# ----------------------------------------------------------------------------------------------------- whitening


def test_running_whitening_is_over_all_scores_so_far() -> None:
    """Three iterations of known scores; the state between them goes through JSON, as in a checkpoint."""
    numbers = np.random.default_rng(0)
    recipe, loop, seen = recipe_of(whiten_scores="running"), LoopState(), np.array([])
    for iteration in range(3):
        scores = numbers.normal(iteration, 1 + iteration, size=8)
        seen = np.concatenate([seen, scores])
        over = whitening_moments(recipe, loop, moments(torch.tensor(scores)))
        assert (over.mean, over.variance, over.count) == pytest.approx((seen.mean(), seen.var(), seen.size), rel=1e-9)
        after = following(recipe, loop, {"kl": 0.0}, scores=over)
        loop = LoopState.model_validate_json(json.dumps(after.model_dump(mode="json")))
        assert loop == after
        assert loop.score_moments == over


def test_batch_whitening_remembers_nothing() -> None:
    loop = following(recipe_of(), LoopState(), {"kl": 0.0}, scores=BATCH)
    assert loop.score_moments is None
    remembered = LoopState(score_moments=Moments(100.0, 1.0, 8))
    assert whitening_moments(recipe_of(), remembered, BATCH) == BATCH


# -------------------------------------------------------------------------------------------------- the best policy


def test_the_best_is_kept_and_patience_ends() -> None:
    recipe = recipe_of(eval_prompts=UNUSED, eval_steps=1, early_stopping_patience=2)
    loop, stopped = LoopState(), []
    for score in (0.5, 0.7, 0.7, 0.6):
        loop = following(recipe, loop, {"kl": 0.0, "held_out_score": score}, scores=BATCH)
        stopped.append(out_of_patience(recipe, loop))
    assert (loop.best_score, loop.best_iteration) == (0.7, 2)  # what the second iteration left; an equal score is none
    assert stopped == [False, False, False, True]


def test_without_patience_it_never_stops() -> None:
    assert not out_of_patience(recipe_of(), LoopState(evaluations_since_best=1000))


def test_the_last_iteration_is_always_evaluated() -> None:
    recipe = recipe_of(eval_prompts=UNUSED, eval_steps=3, num_iterations=8)
    assert [i for i in range(8) if is_evaluated(recipe, iteration=i)] == [2, 5, 7]
    assert not any(is_evaluated(recipe_of(eval_steps=3), iteration=i) for i in range(8))


def test_a_critic_that_warms_up_uses_up_no_patience() -> None:
    recipe = recipe_of(eval_prompts=UNUSED, eval_steps=2, num_iterations=8, critic_warmup_iterations=4)
    assert [i for i in range(8) if is_evaluated(recipe, iteration=i)] == [5, 7]
