"""The update of one PPO iteration: clipped objectives over mini-batches, one optimizer step each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignment.distributed import from_all, world_size
from alignment.objectives import clipped_policy_loss, clipped_value_loss, kl_penalty
from alignment.ppo_controls import warming_up
from alignment.ppo_data import PretrainingMix
from alignment.recipe import PpoRecipe
from alignment.recipe_fit import check_batches
from alignment.rollout import Rollout, forward
from alignment.schedule import learning_rate_factor

RATIO_MAX = "ratio_max"
"""Largest factor, up or down, by which the probability of a token changed within an iteration."""
MAX_LOG_RATIO = 80.0
"""Where the logarithm of `RATIO_MAX` is cut off, so that an alarm can speak of it before it is no number."""


@dataclass
class Learner:
    """What the update works with. `model` is the engine around the actor-critic."""

    recipe: PpoRecipe
    accelerator: Any
    model: Any
    optimizer: Any
    pad_token_id: int
    mix: PretrainingMix | None


@dataclass(frozen=True)
class Targets:
    """What the update of a rollout aims at; tensors are `(n, length)`, and zero where `mask` is False."""

    mask: Tensor
    advantages: Tensor
    returns: Tensor
    kl_coef: float
    """Of the penalty in the loss, where the recipe has it there."""


def update(learner: Learner, rollout: Rollout, targets: Targets, *, iteration: int) -> dict[str, float]:
    """One or more epochs of clipped updates; one optimizer step per mini-batch over all processes."""
    ppo, accelerator = learner.recipe.ppo, learner.accelerator
    rows_per_step = ppo.mini_batch_size // accelerator.num_processes
    steps_per_epoch = ppo.batch_size // ppo.mini_batch_size
    steps_per_iteration = ppo.num_ppo_epochs * steps_per_epoch
    totals: dict[str, float] = {}
    learner.model.train()
    for epoch in range(ppo.num_ppo_epochs):
        for first in range(0, len(rollout.conversations), rows_per_step):
            rows = range(first, first + rows_per_step)
            step = iteration * steps_per_iteration + epoch * steps_per_epoch + first // rows_per_step
            num_steps = ppo.num_iterations * steps_per_iteration
            set_learning_rates(learner, step=step, num_steps=num_steps, iteration=iteration)
            sums = optimizer_step(learner, rollout, targets, rows, iteration=iteration)
            add_up(totals, sums, weight=1 / steps_per_iteration)
    ratio_max = max(from_all(totals.pop(RATIO_MAX)))
    names = sorted(totals)
    shared = torch.tensor([totals[name] for name in names], device=accelerator.device)
    summed = accelerator.reduce(shared, reduction="sum").tolist()
    values = dict(zip(names, summed, strict=True))
    return values | {"grad_norm": values["grad_norm"] / accelerator.num_processes, RATIO_MAX: ratio_max}


def optimizer_step(
    learner: Learner, rollout: Rollout, targets: Targets, rows: range, *, iteration: int
) -> dict[str, float]:
    """Accumulate the gradients of these rows in micro-batches and step once; this process's shares of the losses.

    No step where none of the answers, on any process, was scored: momentum and weight decay would move the weights.
    """
    ppo, accelerator = learner.recipe.ppo, learner.accelerator
    counts = token_counts(learner, targets.mask[rows.start : rows.stop], rows, iteration=iteration)
    totals: dict[str, float] = {}
    if counts.completion == 0 and learner.mix is None:
        return totals
    for part in rollout.micro_batches(rows, size=ppo.per_device_batch_size):
        with accelerator.accumulate(learner.model):
            loss, sums = loss_of(learner, rollout, part, targets, counts, iteration=iteration)
            check_finite("loss", loss, iteration=iteration)  # DeepSpeed's step is part of its backward
            accelerator.backward(loss * accelerator.num_processes * accelerator.gradient_accumulation_steps)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(learner.model.parameters(), ppo.max_grad_norm)
                if norm is not None:  # infinite or -1 from DeepSpeed when it has left the step out
                    told = torch.as_tensor(norm)
                    check_finite("gradient norm", told.where(told >= 0, torch.nan), iteration=iteration)
                sums["grad_norm"] = float(norm) if norm is not None else 0.0
            learner.optimizer.step()
            learner.optimizer.zero_grad()
        add_up(totals, sums)
    return totals


def add_up(totals: dict[str, float], sums: Mapping[str, float], *, weight: float = 1.0) -> None:
    """Into `totals`, of the largest ratio the larger."""
    for name, value in sums.items():
        so_far = totals.get(name, 0.0)
        totals[name] = max(so_far, value) if name == RATIO_MAX else so_far + weight * value


@dataclass(frozen=True, slots=True)
class Counts:
    """Tokens of a mini-batch over all processes that its losses are means over."""

    completion: float
    ptx: float


def token_counts(learner: Learner, mask: Tensor, rows: range, *, iteration: int) -> Counts:
    ptx = 0 if learner.mix is None else learner.mix.num_tokens(rows, iteration=iteration)
    counts = torch.tensor([int(mask.sum()), ptx], dtype=torch.float64).float().to(learner.accelerator.device)
    completion, ptx = learner.accelerator.reduce(counts, reduction="sum").tolist()
    return Counts(completion, ptx)


def loss_of(
    learner: Learner, rollout: Rollout, rows: Sequence[int], targets: Targets, counts: Counts, *, iteration: int
) -> tuple[Tensor, dict[str, float]]:
    """This micro-batch's share of the mini-batch loss (a sum over its tokens / all tokens of the mini-batch).

    While the critic warms up, only the value loss counts, and not through a shared trunk: the policy's learning rate is
    0 then, but the optimizer would remember its gradients.
    """
    ppo, device = learner.recipe.ppo, learner.accelerator.device
    layout: dict[str, Any] = {
        "padding_free": learner.accelerator.unwrap_model(learner.model).padding_free,
        "device": device,
    }
    batch = rollout.rows(rows, pad_token_id=learner.pad_token_id, **layout)
    mix = None if learner.mix is None else learner.mix.batch(rows, iteration=iteration, **layout)
    length = batch.completion_mask.shape[1]

    def part(values: Tensor) -> Tensor:
        return values[list(rows), :length].to(device)

    def share(losses: Tensor) -> Tensor:
        return (losses * counted).sum() / max(counts.completion, 1)  # 0: none of its answers was scored

    counted, old_logprobs = part(targets.mask), part(rollout.logprobs)
    value_only = warming_up(learner.recipe, iteration=iteration)
    output = forward(learner.model, batch, mix=mix, head_alone=value_only)
    assert output.values is not None
    policy_losses, clipped = clipped_policy_loss(
        output.logprobs, old_logprobs, part(targets.advantages), clip_range=ppo.clip_range
    )
    value_losses = clipped_value_loss(
        output.values, part(rollout.values), part(targets.returns), clip_range=ppo.value_clip_range
    )
    terms = {"policy_loss": (1.0, share(policy_losses)), "value_loss": (ppo.value_coef, share(value_losses))}
    if ppo.kl_in == "loss":
        penalties = kl_penalty(output.logprobs, old_logprobs, part(rollout.ref_logprobs), estimator=ppo.kl_estimator)
        terms["kl_loss"] = (targets.kl_coef, share(penalties))
    if mix is not None:
        assert output.mix_logprobs is not None
        terms["ptx_loss"] = (ppo.ptx_coef, -(output.mix_logprobs * mix.completion_mask).sum() / counts.ptx)
    loss = torch.zeros((), device=device)
    for name, (coef, term) in terms.items():  # a term of weight 0 keeps its part of the graph, which DDP waits for
        loss = loss + (0.0 if value_only and name != "value_loss" else coef) * term
    with torch.no_grad():
        log_ratio = (output.logprobs - old_logprobs) * counted
        sums = {name: float(term) for name, (_, term) in terms.items()}
        sums["clip_fraction"] = float(share(clipped))
        sums["approx_kl"] = float(share(torch.expm1(log_ratio) - log_ratio))  # k3 of KL(old, new): old drew the tokens
        sums["ratio_mean"] = float(share(log_ratio.exp()))
        sums[RATIO_MAX] = math.exp(min(float(log_ratio.abs().max()), MAX_LOG_RATIO))
        return loss, sums


def set_learning_rates(learner: Learner, *, step: int, num_steps: int, iteration: int) -> None:
    """By the schedule; 0 for the policy while the critic warms up, so that not even weight decay moves it."""
    factor = learning_rate_factor(learner.recipe.ppo, step=step, num_steps=num_steps)
    frozen = warming_up(learner.recipe, iteration=iteration)
    for group in learner.optimizer.param_groups:
        group["lr"] = 0.0 if frozen and group["of_policy"] else group["peak_lr"] * factor


def check_finite(name: str, value: Tensor, *, iteration: int) -> None:
    """FloatingPointError, before the weights change, when a value is not finite; the last checkpoint is intact."""
    if not bool(torch.isfinite(value).all()):
        raise FloatingPointError(
            f"iteration {iteration}: {name} is not finite; stopped before the update. Lower the learning rate or raise "
            "kl_coef, and run the same command to go on from the last checkpoint"
        )


def accumulation_steps(recipe: PpoRecipe) -> int:
    """Forward and backward passes per optimizer step and process; refuses batches that do not divide."""
    check_batches(recipe, processes=world_size())
    return max(1, recipe.ppo.mini_batch_size // world_size() // recipe.ppo.per_device_batch_size)
