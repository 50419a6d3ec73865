"""The update of one PPO iteration: clipped objectives over mini-batches, one optimizer step each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignment.distributed import world_size
from alignment.objectives import clipped_policy_loss, clipped_value_loss, kl_penalty
from alignment.ptx import PretrainingMix
from alignment.recipe import PpoRecipe
from alignment.rollout import Rollout, forward
from alignment.schedule import learning_rate_factor


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
    """Of the penalty in the loss; 0 where the penalty is in the rewards."""


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
            set_learning_rates(learner, step=step, num_steps=ppo.num_iterations * steps_per_iteration)
            for name, value in optimizer_step(learner, rollout, targets, rows, iteration=iteration).items():
                totals[name] = totals.get(name, 0.0) + value / steps_per_iteration
    names = sorted(totals)
    shared = torch.tensor([totals[name] for name in names], device=accelerator.device)
    summed = accelerator.reduce(shared, reduction="sum").tolist()
    values = dict(zip(names, summed, strict=True))
    return values | {"grad_norm": values["grad_norm"] / accelerator.num_processes}


def optimizer_step(
    learner: Learner, rollout: Rollout, targets: Targets, rows: range, *, iteration: int
) -> dict[str, float]:
    """Accumulate the gradients of these rows in micro-batches and step once; this process's shares of the losses."""
    ppo, accelerator = learner.recipe.ppo, learner.accelerator
    counts = token_counts(learner, targets.mask[rows.start : rows.stop], rows, iteration=iteration)
    totals: dict[str, float] = {}
    for start in range(rows.start, rows.stop, ppo.per_device_batch_size):
        part = range(start, min(start + ppo.per_device_batch_size, rows.stop))
        with accelerator.accumulate(learner.model):
            loss, sums = loss_of(learner, rollout, part, targets, counts, iteration=iteration)
            check_finite("loss", loss, iteration=iteration)  # DeepSpeed's step is part of its backward
            accelerator.backward(loss * accelerator.num_processes * accelerator.gradient_accumulation_steps)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(learner.model.parameters(), ppo.max_grad_norm)
                if norm is not None:  # infinite from DeepSpeed when it has left the step out
                    check_finite("gradient norm", torch.as_tensor(norm), iteration=iteration)
                sums["grad_norm"] = float(norm) if norm is not None else 0.0
            learner.optimizer.step()
            learner.optimizer.zero_grad()
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + value
    return totals


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
    learner: Learner, rollout: Rollout, rows: range, targets: Targets, counts: Counts, *, iteration: int
) -> tuple[Tensor, dict[str, float]]:
    """This micro-batch's share of the mini-batch loss (a sum over its tokens / all tokens of the mini-batch).

    While the critic warms up, only the value loss counts; the policy's learning rate is 0 then.
    """
    ppo, device = learner.recipe.ppo, learner.accelerator.device
    batch = rollout.rows(rows, pad_token_id=learner.pad_token_id, device=device)
    mix = None if learner.mix is None else learner.mix.batch(rows, iteration=iteration, device=device)
    length = batch.completion_mask.shape[1]

    def part(values: Tensor) -> Tensor:
        return values[rows.start : rows.stop, :length].to(device)

    counted, old_logprobs = part(targets.mask), part(rollout.logprobs)
    output = forward(learner.model, batch, mix=mix)
    assert output.values is not None
    clipped_loss, clipped = clipped_policy_loss(
        output.logprobs, old_logprobs, part(targets.advantages), clip_range=ppo.clip_range
    )
    terms = {
        "policy_loss": (clipped_loss * counted).sum() / counts.completion,
        "value_loss": (
            clipped_value_loss(output.values, part(rollout.values), part(targets.returns), clip_range=ppo.value_clip_range)
            * counted
        ).sum()
        / counts.completion,
    }
    weights = {"policy_loss": 1.0, "value_loss": ppo.value_coef}
    if ppo.kl_in == "loss":
        penalty = kl_penalty(output.logprobs, old_logprobs, part(rollout.ref_logprobs), estimator=ppo.kl_estimator)
        terms["kl_loss"], weights["kl_loss"] = (penalty * counted).sum() / counts.completion, targets.kl_coef
    if mix is not None:
        assert output.mix_logprobs is not None
        terms["ptx_loss"] = -(output.mix_logprobs * mix.completion_mask).sum() / counts.ptx
        weights["ptx_loss"] = ppo.ptx_coef
    if warming_up(learner.recipe, iteration=iteration):
        weights = {name: weight if name == "value_loss" else 0.0 for name, weight in weights.items()}
    loss = sum((weights[name] * term for name, term in terms.items()), torch.zeros((), device=device))
    with torch.no_grad():
        log_ratio = (output.logprobs - old_logprobs) * counted
        sums = {
            "clip_fraction": (clipped * counted).sum() / counts.completion,
            "approx_kl": (torch.expm1(-log_ratio) + log_ratio).sum() / counts.completion,
        }
    return loss, {name: float(value) for name, value in (terms | sums).items()}
