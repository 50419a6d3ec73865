"""What PPO adapts from one iteration to the next: whitening, KL coefficient, Lagrange multiplier, the best policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignment.objectives import Moments, next_kl_coef, next_multiplier
from alignment.ppo_state import LoopState
from alignment.recipe import PpoRecipe


def kl_coef_at(recipe: PpoRecipe, loop: LoopState) -> float:
    return recipe.ppo.kl_coef if loop.kl_coef is None else loop.kl_coef


def whitening_moments(recipe: PpoRecipe, loop: LoopState, batch: Moments) -> Moments:
    """What the scores of an iteration are whitened by: their own moments, or those of all scores so far."""
    if recipe.ppo.whiten_scores != "running" or loop.score_moments is None:
        return batch
    return loop.score_moments.with_more(batch)


def warming_up(recipe: PpoRecipe, *, iteration: int) -> bool:
    """Whether the critic alone is trained."""
    return iteration < recipe.ppo.critic_warmup_iterations


def is_evaluated(recipe: PpoRecipe, *, iteration: int) -> bool:
    """Whether the policy that an iteration leaves is asked the held-out prompts; the last one always is.

    Not while the critic warms up: a policy that does not move would use up the patience.
    """
    left = iteration + 1
    due = left % recipe.ppo.eval_steps == 0 and not warming_up(recipe, iteration=iteration)
    return recipe.eval_prompts is not None and (due or left == recipe.ppo.num_iterations)


def out_of_patience(recipe: PpoRecipe, loop: LoopState) -> bool:
    """Whether the last `early_stopping_patience` evaluations all brought no better score."""
    patience = recipe.ppo.early_stopping_patience
    return patience is not None and loop.evaluations_since_best >= patience


def following(recipe: PpoRecipe, loop: LoopState, metrics: Mapping[str, float], *, scores: Moments) -> LoopState:
    """The state after an iteration with these metrics; `scores`: the moments that it whitened by.

    Coefficient and multiplier wait for the end of a warm-up, in which the policy cannot answer to them.
    """
    ppo = recipe.ppo
    changed: dict[str, Any] = {"iteration": loop.iteration + 1, "metrics": dict(metrics)}
    if ppo.whiten_scores == "running":
        changed["score_moments"] = scores
    if not warming_up(recipe, iteration=loop.iteration):
        if ppo.kl_target is not None:
            changed["kl_coef"] = next_kl_coef(
                kl_coef_at(recipe, loop),
                kl=metrics["kl"],
                target=ppo.kl_target,
                horizon=ppo.kl_horizon,
                num_answers=ppo.batch_size,
            )
        if ppo.multiplier_learning_rate is not None:
            changed["multiplier"] = next_multiplier(
                metrics["multiplier"],
                cost=metrics["cost_mean"],
                limit=ppo.cost_limit,
                learning_rate=ppo.multiplier_learning_rate,
                maximum=ppo.multiplier_max,
            )
    score = metrics.get("held_out_score")
    if score is not None:
        better = loop.best_score is None or score > loop.best_score
        changed["evaluations_since_best"] = 0 if better else loop.evaluations_since_best + 1
        if better:
            changed |= {"best_score": score, "best_iteration": loop.iteration + 1}
    return LoopState(**(dict(loop) | changed))
