"""What the stages on TRL's trainers share: arguments, checkpoints that survive a kill, and the final weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from alignment.checkpoints import CHECKPOINTS, INDEX, list_checkpoints, newest_checkpoint, seal
from alignment.distributed import (
    PATIENCE,
    barrier,
    close,
    ddp_backend,
    device,
    is_main_process,
    on_cpu,
    prepare_deepspeed_ops,
    world_size,
)
from alignment.policy import Head, merge_adapter, remove_folder
from alignment.recipe import HarmfulnessModelRecipe, ModelInit, PpoRecipe, RewardModelRecipe, SftRecipe, Training
from alignment.stopping import Stopped, StopRequest
from alignment.workspace import Workspace
from reward.dtype import torch_dtype

Fitted = SftRecipe | RewardModelRecipe | HarmfulnessModelRecipe | PpoRecipe


def training_arguments(
    training: Training, *, init: ModelInit, output_dir: Path, seed: int, num_rows: int
) -> dict[str, Any]:
    """Our keys -> keyword arguments of TrainingArguments; `num_rows` fixes the number of warm-up steps."""
    prepare_deepspeed_ops()
    steps = num_steps(training, num_rows=num_rows)
    warmup = max(round(training.warmup_ratio * steps), min(training.warmup_min_steps, steps))
    minimum = {"min_lr_rate": training.min_lr_ratio} if training.lr_scheduler_type == "cosine_with_min_lr" else {}
    copied = (
        "learning_rate",
        "lr_scheduler_type",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "max_grad_norm",
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "logging_steps",
        "save_steps",
        "save_total_limit",
    )
    return {name: getattr(training, name) for name in copied} | {
        "output_dir": str(output_dir / CHECKPOINTS),
        "max_steps": training.max_steps or -1,
        "warmup_steps": warmup,
        "lr_scheduler_kwargs": minimum or None,
        "train_sampling_strategy": "group_by_length" if training.group_by_length else "random",
        "bf16": torch_dtype(init.dtype, device()) == torch.bfloat16,
        "use_cpu": on_cpu(),
        "ddp_backend": ddp_backend(),
        "ddp_timeout": int(PATIENCE.total_seconds()),
        "logging_nan_inf_filter": False,  # the default shows 0.0 where the loss is NaN
        "logging_first_step": True,
        "report_to": "none",
        "seed": seed,
        "disable_tqdm": not is_main_process(),
        "dataloader_pin_memory": not on_cpu(),
    }


def num_steps(training: Training, *, num_rows: int) -> int:
    """Optimizer steps of the run over `num_rows` rows."""
    if training.max_steps is not None:
        return training.max_steps
    rows_per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * world_size()
    return max(1, round(training.num_train_epochs * -(-num_rows // rows_per_step)))


class SealCheckpoints(TrainerCallback):
    """Gives each checkpoint its index once all processes have saved theirs; a kill amid a save leaves none.

    Asked to stop, it saves at the end of the step and raises Stopped, unless that step is the last one.
    """

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop
        self.stopping = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < state.max_steps and self.stop.agreed():
            self.stopping = control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        if self.stopping:
            raise Stopped(f"{Path(args.output_dir).parent} stopped after step {state.global_step}")


class StopWhenNotFinite:
    """Mixin for trainers: a loss that is not finite ends the run before the weights are touched."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType, reportUnknownMemberType]
        if not bool(torch.isfinite(loss).all()):  # pyright: ignore[reportUnknownArgumentType]
            raise FloatingPointError(
                f"the training loss is {loss}; stopped before the update, the last checkpoint is intact; "  # pyright: ignore[reportUnknownArgumentType]
                "lower the learning rate or look at the data"
            )
        return loss  # pyright: ignore[reportUnknownVariableType]


def fit(trainer: Any, workspace: Workspace, recipe: Fitted, *, head: Head) -> dict[str, Any]:
    """Train, from the newest checkpoint on, and save the whole weights into the artifact's folder; the metrics."""
    result = train(trainer, workspace)
    lora = recipe.lora is not None
    save_final(trainer, workspace, model=recipe.model, init=recipe.model_init, head=head, lora=lora)
    return {"train_loss": result.training_loss, "num_steps": result.global_step}


def train(trainer: Any, workspace: Workspace) -> Any:
    """`trainer.train()` from the newest whole checkpoint, if there is one; one whose save was interrupted goes."""
    folder = workspace.path / CHECKPOINTS
    if is_main_process():
        for checkpoint in list_checkpoints(folder):
            if not (checkpoint / INDEX).exists():
                remove_folder(checkpoint)
    barrier()
    newest = newest_checkpoint(folder)
    try:
        return trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    except Stopped:
        close(trainer.accelerator, trainer.model_wrapped)
        raise


def save_final(trainer: Any, workspace: Workspace, *, model: str, init: ModelInit, head: Head, lora: bool) -> None:
    """Whole weights and tokenizer into the artifact's folder, whatever the layout the training ran in."""
    tokenizer = trainer.processing_class
    target = workspace.path / CHECKPOINTS / "final"
    trainer.save_model(str(target))
    barrier()
    if is_main_process():
        if lora:
            pad = tokenizer.pad_token_id
            merge_adapter(model, target, workspace.path, init=init, head=head, pad_token_id=pad)
        else:
            for file in target.iterdir():
                if file.suffix in {".safetensors", ".json"} and not file.name.startswith("tokenizer"):
                    file.replace(workspace.path / file.name)
        tokenizer.save_pretrained(workspace.path)
    barrier()


def weight_files(path: Path) -> tuple[str, ...]:
    """Names of the files that make up a saved model."""
    return (*sorted(file.name for file in path.iterdir() if file.suffix == ".safetensors"), "config.json")
