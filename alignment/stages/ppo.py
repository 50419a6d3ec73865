"""PPO on the Llama 2 objective (section 3.2.3): whitened scores, KL to the start, GAE, clipped updates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alignment.actor_critic import ActorCritic, load_actor_critic, load_reference
from alignment.artifact import Artifact
from alignment.distributed import close, from_all, is_main_process, make_accelerator
from alignment.fitting import weight_files
from alignment.generate import Generator, derive_seed
from alignment.group_baselines import run_baseline
from alignment.health import Unhealthy, check_health
from alignment.held_out import HeldOut
from alignment.objectives import (
    Moments,
    estimate_advantages,
    estimate_kl,
    moment_sums,
    token_rewards,
    whiten,
)
from alignment.policy import load_tokenizer
from alignment.ppo_controls import following, is_evaluated, kl_coef_at, out_of_patience, whitening_moments
from alignment.ppo_data import read_data
from alignment.ppo_state import Checkpoints, LoopState, prepare_engine, save_policy
from alignment.ppo_update import Learner, Targets, accumulation_steps, check_finite, update
from alignment.ppo_watch import Watch
from alignment.recipe import PpoRecipe
from alignment.rollout import Rollout, collect_rollout, iteration_prompts
from alignment.scoring import build_scorer
from alignment.stopping import Stopped, StopRequest, stop_on_sigterm
from alignment.tracking import Tracker, open_tracker
from alignment.vllm_rollout import VllmSampler
from alignment.workspace import open_workspace
from reward.conversation import Prompt
from reward.refusal import is_refusal
from reward.render import Renderer
from reward.scorer import LagrangianScorer, Score, Scorer, ScorerError, check_unscored, score_all


@dataclass
class Run(Learner):
    """What the loop works with."""

    reference: ActorCritic | None
    generator: Generator
    server: VllmSampler | None
    scorer: Scorer
    prompts: Sequence[Prompt]
    held_out: HeldOut | None
    watch: Watch
    checkpoints: Checkpoints
    stop: StopRequest


def run(recipe: PpoRecipe) -> Artifact | None:
    """Tune `recipe.model` by PPO against `recipe.scorer` and leave a policy."""
    if recipe.trainer != "ppo":
        return run_baseline(recipe)
    tokenizer = load_tokenizer(recipe.model, init=recipe.model_init)
    renderer = Renderer(tokenizer)
    data = read_data(recipe, renderer)
    accelerator = make_accelerator(gradient_accumulation_steps=accumulation_steps(recipe))
    workspace = open_workspace(recipe)
    actor_critic = load_actor_critic(recipe, pad_token_id=tokenizer.pad_token_id)
    if recipe.ppo.padding_free and not actor_critic.padding_free and is_main_process():
        print(f"texts are padded: {actor_critic.why_padded}", flush=True)
    model, optimizer = prepare_engine(accelerator, actor_critic, recipe)
    dtype = next(actor_critic.policy.parameters()).dtype
    reference = load_reference(recipe, pad_token_id=tokenizer.pad_token_id, dtype=dtype)
    switch = recipe.ppo.padding_free
    generator = Generator(actor_critic.policy, renderer, recipe.sampling, padding_free=switch)
    server = VllmSampler.connect(recipe, actor_critic.policy, renderer, accelerator.device)
    scorer = build_scorer(recipe.scorer)
    steps, keep = recipe.ppo.save_steps, recipe.ppo.save_total_limit
    checkpoints = Checkpoints(model, actor_critic, optimizer, workspace, save_steps=steps, keep=keep)
    held_out = None
    if data.eval_prompts:
        sampling = recipe.sampling.model_copy(update={"temperature": recipe.ppo.eval_temperature})
        asked = Generator(actor_critic.policy, renderer, sampling, padding_free=switch)
        held_out = HeldOut(data.eval_prompts, asked, scorer, server)
    with (
        open_tracker(recipe, workspace.path, parents=workspace.inputs, is_main_process=is_main_process()) as tracker,
        stop_on_sigterm() as stop,
    ):
        state = Run(
            recipe,
            accelerator,
            model,
            optimizer,
            pad_token_id=tokenizer.pad_token_id,
            mix=data.mix,
            reference=reference,
            generator=generator,
            server=server,
            scorer=scorer,
            prompts=data.prompts,
            held_out=held_out,
            watch=Watch.of(recipe, accelerator, model, actor_critic, generator, server=server),
            checkpoints=checkpoints,
            stop=stop,
        )
        last = train(state, tracker)
        save_policy(model, actor_critic, accelerator, recipe, workspace, tokenizer)
        artifact = None
        if is_main_process():
            artifact = workspace.finish("policy", data=data.account, metrics=last, files=weight_files(workspace.path))
            tracker.artifact(artifact)
    if server is not None:
        server.close()
    close(accelerator, model)
    return artifact


def train(run: Run, tracker: Tracker) -> Mapping[str, float]:
    """The iterations that are left; the metrics of the last one.

    Stopped after a SIGTERM, Unhealthy by an alarm that stops; all is saved then.

    With held-out prompts the weights at the end are those that did best on them.
    """
    loop = run.checkpoints.load()
    tracker.resume_at(loop.iteration)
    try:
        halt_if_unhealthy(run, loop)
        while loop.iteration < run.recipe.ppo.num_iterations and not out_of_patience(run.recipe, loop):
            run.checkpoints.begin(loop)
            loop = run_iteration(run, loop, tracker)
            halt_if_unhealthy(run, loop)
    except (Stopped, Unhealthy) as reason:
        # Raised at the same place on all processes, with the weights as they were at the last `begin`.
        run.checkpoints.save()
        close(run.accelerator, run.model)
        where = f"{run.recipe.output_dir} stopped before iteration {loop.iteration}"
        raise (reason if isinstance(reason, Unhealthy) else Stopped(where)) from None
    best = run.checkpoints.load_best(loop)
    if best is None or loop.best_score is None:
        return loop.metrics
    return loop.metrics | {"held_out_score": loop.best_score, "best_iteration": best}


def halt_if_unhealthy(run: Run, loop: LoopState) -> None:
    """Unhealthy when an alarm that stops is on, with `loop` as the state to save."""
    try:
        check_health(loop.health, run.recipe.health)
    except Unhealthy:
        run.checkpoints.begin(loop)
        raise


def run_iteration(run: Run, loop: LoopState, tracker: Tracker) -> LoopState:
    """One iteration: what it leaves to the next."""
    recipe, ppo, iteration = run.recipe, run.recipe.ppo, loop.iteration
    run.stop.check()
    probed = run.watch.probe(tracker, iteration=iteration)
    rollout = collect_rollout(
        run.model,
        run.reference,
        run.generator,
        iteration_prompts(run.prompts, recipe, iteration=iteration),
        recipe=recipe,
        iteration=iteration,
        accelerator=run.accelerator,
        between_batches=run.stop.check,
        server=run.server,
    )
    scores, costs = judge(run, rollout, loop)
    run.stop.check()
    whitened, valid, over = whiten_scores(run, scores, rollout, loop)
    mask = rollout.completion_mask & valid.unsqueeze(1)
    kl = estimate_kl(rollout.logprobs, rollout.ref_logprobs, estimator=ppo.kl_estimator) * mask
    kl_coef = kl_coef_at(recipe, loop)
    rewards = token_rewards(whitened, kl, mask, kl_coef=kl_coef if ppo.kl_in == "reward" else 0.0)
    advantages, returns = estimate_advantages(rewards, rollout.values, mask, gamma=ppo.gamma, lam=ppo.lam)
    if ppo.whiten_advantages:
        advantages = whiten(advantages, mask, over=gathered_moments(run, advantages, mask))
    check_rollout(rollout, {"rewards": rewards, "advantages": advantages, "returns": returns}, iteration=iteration)
    compared, found = run.watch.compare(rollout, tracker, iteration=iteration)
    updates = update(run, rollout, Targets(mask, advantages, returns, kl_coef), iteration=iteration)
    if run.server is not None:
        run.server.weights_changed()
    metrics = rollout_metrics(run, rollout, scores, mask, kl, returns) | costs | updates | {"kl_coef": kl_coef}
    metrics |= probed | compared | run.watch.score(rollout, scores, iteration=iteration)
    if run.held_out is not None and is_evaluated(recipe, iteration=iteration):
        seed = derive_seed(recipe.seed, "held_out")  # the same for all, so that chance does not choose the best
        limit = recipe.max_unscored
        metrics |= run.held_out.metrics(run.model, run.accelerator, seed=seed, max_unscored=limit)
    tracker.log(iteration, {f"ppo/{name}": value for name, value in metrics.items()})
    tracker.table("rollouts", *sample_table(rollout, scores), step=iteration)
    health = run.watch.look(loop.health, metrics, found, tracker, iteration=iteration)
    return following(recipe, loop, metrics, scores=over).model_copy(update={"health": health})


def judge(run: Run, rollout: Rollout, loop: LoopState) -> tuple[Sequence[Score], dict[str, float]]:
    """Scores of the answers; of a Lagrangian scorer also its multiplier and the mean cost, over all processes.

    Unscored answers take no part in the update and are counted; too many of them stop the run.
    """
    if not isinstance(run.scorer, LagrangianScorer):
        scores = score_all(run.scorer, rollout.conversations)
        check_scored(run, scores)
        return scores, {}
    multiplier = run.scorer.multiplier if loop.multiplier is None else loop.multiplier
    scores, costs = replace(run.scorer, multiplier=multiplier).with_costs(rollout.conversations)
    check_scored(run, scores)
    mean = gathered_moments(run, torch.tensor(costs), torch.ones(len(costs))).mean
    return scores, {"multiplier": multiplier, "cost_mean": mean}


def check_scored(run: Run, scores: Sequence[Score]) -> None:
    """ScorerError, on every process, when more than the share `max_unscored` of the answers of all have no score, and
    when none has one."""
    own = [score.reason for score in scores if score.value is None]
    reasons = [reason for part in from_all(own) for reason in part]
    n = run.recipe.ppo.batch_size
    check_unscored(reasons, num_answers=n, name=run.scorer.name, limit=run.recipe.max_unscored)
    if len(reasons) == n:
        raise ScorerError(f"{run.scorer.name} scored none of the {n} answers: {reasons[0]}")


def whiten_scores(
    run: Run, scores: Sequence[Score], rollout: Rollout, loop: LoopState
) -> tuple[Tensor, Tensor, Moments]:
    """Whitened scores `(n,)`, less the penalty for answers cut off; which rows were scored; moments of the batch, or of
    all scores so far.

    Moments are those of all processes.
    """
    ppo = run.recipe.ppo
    valid = torch.tensor([score.value is not None for score in scores])
    values = torch.tensor([0.0 if score.value is None else score.value for score in scores])
    batch = gathered_moments(run, values, valid)
    over = whitening_moments(run.recipe, loop, batch)
    if ppo.whiten_scores == "none":
        whitened = values * valid
    elif ppo.whiten_scores == "branch":
        whitened = sum(
            (whiten(values, rows, over=gathered_moments(run, values, rows)) for rows in branches(scores, valid)),
            start=torch.zeros_like(values),
        )
    else:
        whitened = whiten(values, valid, over=over)
    return whitened - ppo.missing_eos_penalty * (~rollout.finished) * valid, valid, over


def branches(scores: Sequence[Score], valid: Tensor) -> Iterator[Tensor]:
    """The scored rows of each branch that some process has, `(n,)`; in the same order on all processes."""
    own = sorted({score.branch or "" for score in scores if score.value is not None})
    for name in sorted({name for names in from_all(own) for name in names}):
        yield torch.tensor([(score.branch or "") == name for score in scores]) & valid


def rollout_metrics(
    run: Run, rollout: Rollout, scores: Sequence[Score], mask: Tensor, kl: Tensor, returns: Tensor
) -> dict[str, float]:
    """What the rollout looked like, over all processes; `mask` leaves out the answers without a score."""
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
            float(((rollout.logprobs - rollout.ref_logprobs) * mask).sum()),
            float((rollout.entropies * mask).sum()),
            float(mask.sum()),
            float(rollout.finished.sum()),
            sum(refused),
            n,
        ],
        dtype=torch.float64,
    )
    total = run.accelerator.reduce(sums.float().to(run.accelerator.device)).tolist()
    score, scored, safety, divergence, signed, entropy, tokens, finished, refusals, rows = total
    return {
        "score_mean": score / scored,
        "safety_branch_share": safety / scored,
        "kl": divergence / scored,
        "kl_k1": signed / scored,
        "entropy": entropy / tokens,
        "completion_tokens": tokens / scored,
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


def check_rollout(rollout: Rollout, derived: Mapping[str, Tensor], *, iteration: int) -> None:
    """The same of a rollout and what was derived from it, on all processes when one of them has such a value."""
    names = ("logprobs", "ref_logprobs", "entropies", "values")
    tensors = {name: getattr(rollout, name) for name in names} | dict(derived)
    broken = next((name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())), None)
    for name in from_all(broken):
        if name is not None:
            check_finite(name, torch.tensor(float("nan")), iteration=iteration)


def sample_table(rollout: Rollout, scores: Sequence[Score]) -> tuple[list[str], list[list[str | int | float | None]]]:
    """Columns and the first rows of a rollout."""
    rows: list[list[str | int | float | None]] = [
        [conversation.prompt.text, conversation.completion, score.value, score.branch or score.reason]
        for conversation, score in list(zip(rollout.conversations, scores, strict=True))[:4]
    ]
    return ["prompt", "completion", "score", "branch"], rows
