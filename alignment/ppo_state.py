"""Around the PPO loop: engine settings, optimizer, what its checkpoints hold, and the final policy."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alignment.actor_critic import ActorCritic, is_of_value_model
from alignment.artifact import write_json
from alignment.checkpoints import CHECKPOINTS, CheckpointError, find_damage, newest_checkpoint, write_checkpoint
from alignment.distributed import (
    barrier,
    from_all,
    is_main_process,
    layout,
    load_engine,
    process_index,
    save_engine,
    uses_deepspeed,
    world_size,
)
from alignment.health import HealthState
from alignment.objectives import Moments
from alignment.policy import merge_adapter
from alignment.recipe import PpoRecipe
from alignment.recipe_scorers import Finite, NonNegativeFloat, NonNegativeInt, Section
from alignment.training_state import (
    find_not_finite,
    load_optimizer,
    load_random_state,
    load_weights,
    random_state,
    save_optimizer,
    save_random_state,
    save_weights,
)
from alignment.workspace import Workspace

STATE = "state.json"
WHOLE = "whole"
UNIVERSAL = "universal"
"""Formats of a checkpoint: every process holds all of it; DeepSpeed's for any of its layouts; `zero2`: its shards."""


def prepare_engine(accelerator: Any, model: ActorCritic, recipe: PpoRecipe) -> tuple[Any, Any]:
    """The model and its optimizer as the launch spreads them over the processes."""
    configure_engine(accelerator, recipe)
    engine, optimizer = accelerator.prepare(model, make_optimizer(model, recipe))
    if uses_deepspeed() and engine.zero_optimization_stage() == 0:
        engine.clip_fp32_gradients = functools.partial(_clip_or_leave_out, engine)
    return engine, optimizer


def _clip_or_leave_out(engine: Any) -> None:
    """DeepSpeed's clipping at stage 0 as at the others: the norm is told, and one that is not finite takes no step.

    Its own throws the norm away and scales by whatever it is.
    """
    norm = torch.nn.utils.clip_grad_norm_(engine.module.parameters(), engine.gradient_clipping())
    if not norm.isfinite():
        engine.optimizer.zero_grad(set_to_none=True)
    engine._global_grad_norm = norm


def configure_engine(accelerator: Any, recipe: PpoRecipe) -> None:
    """Tell DeepSpeed our batch geometry and clipping; without it there is nothing to do."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        return
    rows = recipe.ppo.mini_batch_size // accelerator.num_processes
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = min(recipe.ppo.per_device_batch_size, rows)
    plugin.deepspeed_config["gradient_accumulation_steps"] = accelerator.gradient_accumulation_steps
    plugin.deepspeed_config["gradient_clipping"] = recipe.ppo.max_grad_norm


def make_optimizer(model: ActorCritic, recipe: PpoRecipe) -> torch.optim.Optimizer:
    """AdamW with a group for the policy and one for the value parameters; `peak_lr` is what schedules scale.

    `of_policy` tells the groups apart.
    """
    ppo = recipe.ppo
    groups: dict[str, list[torch.nn.Parameter]] = {"policy": [], "value": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["value" if is_of_value_model(name) else "policy"].append(parameter)
    rates = {"policy": ppo.learning_rate, "value": ppo.value_learning_rate or ppo.learning_rate}
    return torch.optim.AdamW(
        [
            {"params": params, "lr": rates[name], "peak_lr": rates[name], "of_policy": name == "policy"}
            for name, params in groups.items()
            if params
        ],
        betas=(ppo.adam_beta1, ppo.adam_beta2),
        eps=ppo.adam_epsilon,
        weight_decay=ppo.weight_decay,
        fused=None if uses_deepspeed() else True,
    )


class LoopState(Section):
    """What an iteration leaves to the next one, beside weights, optimizer and random numbers.

    A part of the loop that remembers (a controller, running moments, the window of an alarm) has a field of its own
    here, with a default for the first iteration: numbers, text, lists, dicts or Sections of these. The loop makes a new
    LoopState at the end of an iteration and changes none before: an iteration that is stopped is run again from its
    start. It is saved in `state.json` of each checkpoint.
    """

    iteration: NonNegativeInt = 0
    """The one to run next."""
    score_moments: Moments | None = None
    """Of all scores so far, for running whitening; None before the first."""
    kl_coef: NonNegativeFloat | None = None
    """Where the controller has brought it; None: at the recipe's."""
    multiplier: NonNegativeFloat | None = None
    """Of the Lagrangian scorer; None: the recipe's."""
    best_score: Finite | None = None
    """The highest mean score on the held-out prompts."""
    best_iteration: NonNegativeInt | None = None
    """That began with the weights which had it."""
    evaluations_since_best: NonNegativeInt = 0
    health: HealthState = HealthState()
    metrics: dict[str, float] = {}
    """Of the last iteration, which the manifest of the finished run shows."""


@dataclass
class Checkpoints:
    """Checkpoints of the loop. `engine` is what trains `model`; every process has its own Checkpoints, used alike.

    With DDP or alone the state is ours (safetensors, JSON); under DeepSpeed the engine writes its own shards.
    """

    engine: Any
    model: ActorCritic
    optimizer: Any
    workspace: Workspace
    save_steps: int
    keep: int
    _begun: tuple[LoopState, dict[str, Any]] | None = None
    _on_disk: int = 0
    """Iteration of the newest checkpoint; the start of iteration 0 needs none."""

    @property
    def folder(self) -> Path:
        return self.workspace.path / CHECKPOINTS

    @property
    def format(self) -> str:
        return f"zero{layout()['zero_stage']}" if uses_deepspeed() else WHOLE

    @property
    def _only_trained(self) -> bool:
        return any(not parameter.requires_grad for parameter in self.model.parameters())

    def begin(self, loop: LoopState) -> None:
        """At the start of each iteration: what `save` will save from now on; saves it when it is due, or the best."""
        self._begun = (loop, random_state())
        if loop.iteration % self.save_steps == 0 or loop.iteration == loop.best_iteration:
            self.save()

    def save(self) -> None:
        """The state at the start of the iteration that `begin` named. Weights must not have changed since."""
        assert self._begun is not None
        loop, random_numbers = self._begun
        if loop.iteration == self._on_disk:
            return
        broken = next((name for name in from_all(find_not_finite(self.model)) if name is not None), None)
        if broken is not None:
            raise FloatingPointError(
                f"before iteration {loop.iteration}: {broken} is not finite; not saved, the last checkpoint is intact. "
                "Lower the learning rate and run the same command to go on from it"
            )
        name, best = _name(loop.iteration), None if loop.best_iteration is None else _name(loop.best_iteration)
        with write_checkpoint(self.folder, name, keep=self.keep, pinned=best) as folder:
            if uses_deepspeed():
                save_engine(self.engine, folder, only_trained=self._only_trained)
            elif is_main_process():
                save_weights(self.model, folder)
                save_optimizer(self.optimizer, self.model, folder)
            save_random_state(random_numbers, folder, rank=process_index())
            if is_main_process():
                state = {"format": self.format, "world_size": world_size(), "loop": loop.model_dump(mode="json")}
                write_json(folder / STATE, state)
        self._on_disk = loop.iteration

    def load(self) -> LoopState:
        """Go back to the newest whole checkpoint, if there is one; the state of the loop.

        CheckpointError when all are damaged, or when the newest is of another number of processes or ZeRO stage.
        """
        newest = newest_checkpoint(self.folder)
        if newest is None:
            return LoopState()
        state = json.loads((newest / STATE).read_text(encoding="utf-8"))
        self._check_layout(newest, state)
        loop = LoopState.model_validate_json(json.dumps(state["loop"]))
        self._load_weights(newest)
        if not uses_deepspeed():
            load_optimizer(self.optimizer, self.model, newest)
        load_random_state(newest, rank=process_index())
        self._on_disk = loop.iteration
        if is_main_process():
            print(f"going on from {newest}", flush=True)
        return loop

    def load_best(self, loop: LoopState) -> int | None:
        """At the end: load the weights that did best on the held-out prompts; after which iteration they were so.

        None where no prompts were held out, and where the checkpoint of the best is damaged: it is named, and the last
        weights stay.
        """
        if loop.best_iteration is None or loop.best_iteration == loop.iteration:
            return loop.best_iteration
        best = self.folder / _name(loop.best_iteration)
        reason = find_damage(best)
        if reason is None:
            self._load_weights(best)
            return loop.best_iteration
        if is_main_process():
            print(
                f"warning: the best checkpoint {best} is damaged: {reason}; the policy of the last iteration is kept",
                file=sys.stderr,
            )
        return None

    def _load_weights(self, checkpoint: Path) -> None:
        """DeepSpeed loads its optimizer along."""
        if uses_deepspeed():
            universal = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["format"] == UNIVERSAL
            load_engine(self.engine, checkpoint, only_trained=self._only_trained, universal=universal)
        else:
            load_weights(self.model, checkpoint)

    def _check_layout(self, checkpoint: Path, state: Mapping[str, Any]) -> None:
        saved, here = (state["format"], state["world_size"]), (self.format, world_size())
        if saved == here or (saved == (UNIVERSAL, here[1]) and uses_deepspeed()):
            return
        sizes = [f"{size} process{'' if size == 1 else 'es'} ({name})" for name, size in (saved, here)]
        advice = f"start it as it was, or move {self.folder} away to begin anew"
        if (saved[0] == WHOLE) == (here[0] == WHOLE):
            command = f"sara convert-checkpoint {self.workspace.path} --processes {here[1]}"
            advice = f"start it as it was, or convert it: {command}"
        raise CheckpointError(f"{checkpoint} was saved by {sizes[0]}, this run has {sizes[1]}; {advice}")


def _name(iteration: int) -> str:
    return f"iteration-{iteration}"


def save_policy(
    engine: Any, model: ActorCritic, accelerator: Any, recipe: PpoRecipe, workspace: Workspace, tokenizer: Any
) -> None:
    """Whole policy weights into the artifact's folder, gathered from all processes; the value model is not kept."""
    weights = accelerator.get_state_dict(engine)
    if is_main_process():
        policy = {name.removeprefix("policy."): w for name, w in weights.items() if name.startswith("policy.")}
        for name in getattr(model.policy, "all_tied_weights_keys", {}):
            policy.pop(name, None)  # DeepSpeed's copies are no longer tied and would be written twice
        if recipe.lora is None:
            model.policy.save_pretrained(workspace.path, state_dict=policy)
        else:
            adapter = workspace.path / CHECKPOINTS / ".final"
            model.policy.save_pretrained(adapter, state_dict=policy, selected_adapters=[model.policy.active_adapter])
            merge_adapter(
                recipe.model,
                adapter,
                workspace.path,
                init=recipe.model_init,
                head="causal_lm",
                pad_token_id=tokenizer.pad_token_id,
            )
        tokenizer.save_pretrained(workspace.path)
    barrier()
