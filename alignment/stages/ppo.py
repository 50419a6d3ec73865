"""PPO on the Llama 2 objective (section 3.2.3): whitened scores, KL to the start, GAE, clipped updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignment.actor_critic import ActorCritic, load_actor_critic, load_reference
from alignment.artifact import Artifact
from alignment.distributed import close, device, from_all, is_main_process, make_accelerator
from alignment.fitting import weight_files
from alignment.generate import Generator, fitting_prompts
from alignment.objectives import (
    Moments,
    clipped_policy_loss,
    clipped_value_loss,
    estimate_advantages,
    estimate_kl,
    moment_sums,
    token_rewards,
    whiten,
)
from alignment.policy import load_tokenizer
from alignment.ppo_state import Checkpoints, LoopState, configure_engine, make_optimizer, save_policy
from alignment.recipe import PpoRecipe
from alignment.rollout import Rollout, collect_rollout, forward, iteration_prompts
from alignment.schedule import learning_rate_factor
from alignment.scoring import build_scorer
from alignment.sources import load_prompts
from alignment.stopping import Stopped, StopRequest, stop_on_sigterm
from alignment.tracking import Tracker, open_tracker
from alignment.workspace import open_workspace
from reward.conversation import Prompt
from reward.refusal import is_refusal
from reward.render import Renderer
from reward.scorer import Score, Scorer, score_all

MAX_UNSCORED = 0.05
"""Above this share of unscored answers in an iteration the run stops: the scorer is broken, not the policy."""


@dataclass
class Run:
    """What the loop works with. `model` is the engine around the actor-critic."""

    recipe: PpoRecipe
    accelerator: Any
    model: Any
    optimizer: Any
    reference: ActorCritic | None
    generator: Generator
    scorer: Scorer
    prompts: Sequence[Prompt]
    pad_token_id: int
    checkpoints: Checkpoints
    stop: StopRequest


def run(recipe: PpoRecipe) -> Artifact | None:
    """Tune `recipe.model` by PPO against `recipe.scorer` and leave a policy."""
    loaded = load_prompts(recipe.prompts, seed=recipe.seed)
    tokenizer = load_tokenizer(recipe.model, init=recipe.model_init)
    renderer = Renderer(tokenizer)
    max_length = min(recipe.prompts.max_length, recipe.sampling.max_prompt_tokens)
    prompts, too_long = fitting_prompts(loaded.records, renderer, max_length=max_length)
    accelerator = make_accelerator(gradient_accumulation_steps=accumulation_steps(recipe))
    workspace = open_workspace(recipe)
    actor_critic = load_actor_critic(recipe, pad_token_id=tokenizer.pad_token_id)
    reference = load_reference(recipe, pad_token_id=tokenizer.pad_token_id)
    configure_engine(accelerator, recipe)
    model, optimizer = accelerator.prepare(actor_critic, make_optimizer(actor_critic, recipe))
    if reference is not None:  # in the dtype that the engine trains in, or the KL does not start at zero
        reference.to(device(), next(actor_critic.policy.parameters()).dtype)
    generator = Generator(actor_critic.policy, renderer, recipe.sampling)
    scorer = build_scorer(recipe.scorer)
    steps, keep = recipe.ppo.save_steps, recipe.ppo.save_total_limit
    checkpoints = Checkpoints(model, actor_critic, optimizer, workspace, save_steps=steps, keep=keep)
    pad = tokenizer.pad_token_id
    with (
        open_tracker(recipe, workspace.path, parents=workspace.inputs, is_main_process=is_main_process()) as tracker,
        stop_on_sigterm() as stop,
    ):
        state = Run(
            recipe, accelerator, model, optimizer, reference, generator, scorer, prompts, pad, checkpoints, stop
        )
        last = train(state, tracker)
        save_policy(state.model, actor_critic, accelerator, recipe, workspace, tokenizer)
        artifact = None
        if is_main_process():
            data = {"counts": loaded.counts, "hash": loaded.data_hash, "too_long": dict(too_long)}
            artifact = workspace.finish("policy", data=data, metrics=last, files=weight_files(workspace.path))
            tracker.artifact(artifact)
    close(accelerator, model)
    return artifact


def train(run: Run, tracker: Tracker) -> Mapping[str, float]:
    """The iterations that are left; the metrics of the last one. Stopped, and all is saved, after a SIGTERM."""
    loop = run.checkpoints.load()
    tracker.resume_at(loop.iteration)
    metrics: dict[str, float] = {}
    try:
        while loop.iteration < run.recipe.ppo.num_iterations:
            run.checkpoints.begin(loop)
            metrics, loop = run_iteration(run, loop, tracker)
    except Stopped:  # raised before any weight of the iteration changed, at the same place on all processes
        run.checkpoints.save()
        close(run.accelerator, run.model)
        raise Stopped(f"{run.recipe.output_dir} stopped before iteration {loop.iteration}") from None
    return metrics


def run_iteration(run: Run, loop: LoopState, tracker: Tracker) -> tuple[dict[str, float], LoopState]:
    """One iteration: its metrics, and what it leaves to the next."""
    recipe, ppo, iteration = run.recipe, run.recipe.ppo, loop.iteration
    run.stop.check()
    rollout = collect_rollout(
        run.model,
        run.reference,
        run.generator,
        iteration_prompts(run.prompts, recipe, iteration=iteration),
        recipe=recipe,
        iteration=iteration,
        accelerator=run.accelerator,
        between_batches=run.stop.check,
    )
    scores = score_all(run.scorer, rollout.conversations)
    run.stop.check()
    whitened, valid = whiten_scores(run, scores, rollout)
    mask = rollout.completion_mask & valid.unsqueeze(1)
    kl = estimate_kl(rollout.logprobs, rollout.ref_logprobs, estimator=ppo.kl_estimator) * mask
    rewards = token_rewards(whitened, kl, mask, kl_coef=ppo.kl_coef)
    advantages, returns = estimate_advantages(rewards, rollout.values, mask, gamma=ppo.gamma, lam=ppo.lam)
    if ppo.whiten_advantages:
        advantages = whiten(advantages, mask, over=gathered_moments(run, advantages, mask))
    check_rollout(rollout, {"rewards": rewards, "advantages": advantages, "returns": returns}, iteration=iteration)
    updates = update(run, rollout, mask, advantages, returns, iteration=iteration)
    metrics = rollout_metrics(run, rollout, scores, mask, kl, returns) | updates
    tracker.log(iteration, {f"ppo/{name}": value for name, value in metrics.items()})
    tracker.table("rollouts", *sample_table(rollout, scores), step=iteration)
    return metrics, LoopState(iteration=iteration + 1)


def whiten_scores(run: Run, scores: Sequence[Score], rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Whitened scores `(n,)` over all processes, less the penalty for answers cut off, and which rows were scored.

    Unscored answers take no part in the update and are counted; too many of them stop the run.
    """
    ppo = run.recipe.ppo
    valid = torch.tensor([score.value is not None for score in scores])
    values = torch.tensor([0.0 if score.value is None else score.value for score in scores])
    over = gathered_moments(run, values, valid)
    unscored = 1 - over.count / run.recipe.ppo.batch_size
    if unscored > MAX_UNSCORED:
        reasons = sorted({score.reason for score in scores if score.value is None and score.reason})[:3]
        raise RuntimeError(
            f"{run.scorer.name} left {unscored:.0%} of the answers unscored (limit {MAX_UNSCORED:.0%}): {reasons}"
        )
    whitened = whiten(values, valid, over=over) if ppo.whiten_scores else values * valid
    return whitened - ppo.missing_eos_penalty * (~rollout.finished) * valid, valid


def update(
    run: Run, rollout: Rollout, mask: Tensor, advantages: Tensor, returns: Tensor, *, iteration: int
) -> dict[str, float]:
    """One or more epochs of clipped updates; one optimizer step per mini-batch over all processes."""
    ppo, accelerator = run.recipe.ppo, run.accelerator
    rows_per_step = ppo.mini_batch_size // accelerator.num_processes
    steps_per_iteration = ppo.num_ppo_epochs * (ppo.batch_size // ppo.mini_batch_size)
    totals: dict[str, float] = {}
    run.model.train()
    for epoch in range(ppo.num_ppo_epochs):
        for first in range(0, len(rollout.conversations), rows_per_step):
            rows = range(first, first + rows_per_step)
            step = iteration * steps_per_iteration + epoch * (ppo.batch_size // ppo.mini_batch_size)
            step += first // rows_per_step
            set_learning_rate(run, step=step, num_steps=ppo.num_iterations * steps_per_iteration)
            num_tokens = float(accelerator.reduce(mask[rows.start : rows.stop].sum().to(accelerator.device)).item())
            for start in range(rows.start, rows.stop, ppo.per_device_batch_size):
                part = range(start, min(start + ppo.per_device_batch_size, rows.stop))
                with accelerator.accumulate(run.model):
                    loss, sums = loss_of(run, rollout, part, mask, advantages, returns, num_tokens=num_tokens)
                    check_finite("loss", loss, iteration=iteration)  # DeepSpeed's step is part of its backward
                    scale = accelerator.num_processes * accelerator.gradient_accumulation_steps
                    accelerator.backward(loss * scale)
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(run.model.parameters(), ppo.max_grad_norm)
                        if norm is not None:  # infinite from DeepSpeed when it has left the step out
                            check_finite("gradient norm", torch.as_tensor(norm), iteration=iteration)
                        sums["grad_norm"] = float(norm) if norm is not None else 0.0
                    run.optimizer.step()
                    run.optimizer.zero_grad()
                for name, value in sums.items():
                    totals[name] = totals.get(name, 0.0) + value / steps_per_iteration
    names = sorted(totals)
    shared = torch.tensor([totals[name] for name in names], device=accelerator.device)
    summed = accelerator.reduce(shared, reduction="sum").tolist()
    values = dict(zip(names, summed, strict=True))
    return values | {"grad_norm": values["grad_norm"] / accelerator.num_processes}


def loss_of(
    run: Run,
    rollout: Rollout,
    rows: range,
    mask: Tensor,
    advantages: Tensor,
    returns: Tensor,
    *,
    num_tokens: float,
) -> tuple[Tensor, dict[str, float]]:
    """This micro-batch's share of the mini-batch loss (a sum over its tokens / all tokens of the mini-batch)."""
    ppo = run.recipe.ppo
    batch = rollout.rows(rows, pad_token_id=run.pad_token_id, device=run.accelerator.device)
    length = batch.completion_mask.shape[1]

    def part(values: Tensor) -> Tensor:
        return values[rows.start : rows.stop, :length].to(run.accelerator.device)

    counted = part(mask)
    output = forward(run.model, batch)
    assert output.values is not None
    policy_loss, clipped = clipped_policy_loss(
        output.logprobs, part(rollout.logprobs), part(advantages), clip_range=ppo.clip_range
    )
    value_loss = clipped_value_loss(output.values, part(rollout.values), part(returns), clip_range=ppo.value_clip_range)
    loss = ((policy_loss + ppo.value_coef * value_loss) * counted).sum() / num_tokens
    with torch.no_grad():
        log_ratio = (output.logprobs - part(rollout.logprobs)) * counted
        sums = {
            "policy_loss": policy_loss * counted,
            "value_loss": value_loss * counted,
            "clip_fraction": clipped * counted,
            "approx_kl": torch.expm1(-log_ratio) + log_ratio,
        }
        return loss, {name: float(values.sum() / num_tokens) for name, values in sums.items()}


def rollout_metrics(
    run: Run, rollout: Rollout, scores: Sequence[Score], mask: Tensor, kl: Tensor, returns: Tensor
) -> dict[str, float]:
    """What the rollout looked like, over all processes."""
    n = len(scores)
    known = [score.value for score in scores if score.value is not None]
    refused = [is_refusal(conversation.completion) for conversation in rollout.conversations]
    residual = gathered_moments(run, returns - rollout.values, mask)
    target = gathered_moments(run, returns, mask)
    sums = torch.tensor(
        [
            sum(known),
            len(known),
            sum(score.branch == "safety" for score in scores),
            float(kl.sum()),
            float((rollout.entropies * mask).sum()),
            float(mask.sum()),
            float(rollout.finished.sum()),
            sum(refused),
            n,
        ],
        dtype=torch.float64,
    )
    total = run.accelerator.reduce(sums.float().to(run.accelerator.device)).tolist()
    score, scored, safety, divergence, entropy, tokens, finished, refusals, rows = total
    return {
        "score_mean": score / scored,
        "safety_branch_share": safety / rows,
        "kl": divergence / rows,
        "entropy": entropy / tokens,
        "completion_tokens": tokens / rows,
        "finished_share": finished / rows,
        "refusal_rate": refusals / rows,
        "unscored": rows - scored,
        "explained_variance": 1 - residual.variance / max(target.variance, 1e-8),
    }


def gathered_moments(run: Run, values: Tensor, mask: Tensor) -> Moments:
    """Mean and variance over the batch of all processes."""
    sums = moment_sums(values, mask).to(run.accelerator.device)
    total, squares, count = run.accelerator.reduce(sums, reduction="sum").tolist()
    return Moments.from_sums(total, squares, round(count))


def set_learning_rate(run: Run, *, step: int, num_steps: int) -> None:
    factor = learning_rate_factor(run.recipe.ppo, step=step, num_steps=num_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def check_finite(name: str, value: Tensor, *, iteration: int) -> None:
    """FloatingPointError, before the weights change, when a value is not finite; the last checkpoint is intact."""
    if not bool(torch.isfinite(value).all()):
        raise FloatingPointError(
            f"iteration {iteration}: {name} is not finite; stopped before the update. Lower the learning rate or raise "
            "kl_coef, and run the same command to go on from the last checkpoint"
        )


def check_rollout(rollout: Rollout, derived: Mapping[str, Tensor], *, iteration: int) -> None:
    """The same of a rollout and what was derived from it, on all processes when one of them has such a value."""
    names = ("logprobs", "ref_logprobs", "entropies", "values")
    tensors = {name: getattr(rollout, name) for name in names} | dict(derived)
    broken = next((name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())), None)
    for name in from_all(broken):
        if name is not None:
            check_finite(name, torch.tensor(float("nan")), iteration=iteration)


def accumulation_steps(recipe: PpoRecipe) -> int:
    """Forward and backward passes per optimizer step and process; refuses batches that do not divide."""
    from alignment.distributed import world_size

    ppo = recipe.ppo
    rows, left = divmod(ppo.mini_batch_size, world_size())
    if left or rows % min(ppo.per_device_batch_size, rows or 1):
        raise ValueError(
            f"ppo.mini_batch_size {ppo.mini_batch_size} must divide into {world_size()} processes x "
            f"per_device_batch_size {ppo.per_device_batch_size}"
        )
    return max(1, rows // ppo.per_device_batch_size)


def sample_table(rollout: Rollout, scores: Sequence[Score]) -> tuple[list[str], list[list[str | int | float | None]]]:
    """Columns and the first rows of a rollout."""
    rows: list[list[str | int | float | None]] = [
        [conversation.prompt.text, conversation.completion, score.value, score.branch or score.reason]
        for conversation, score in list(zip(rollout.conversations, scores, strict=True))[:4]
    ]
    return ["prompt", "completion", "score", "branch"], rows
