"""Supervised fine-tuning: loss on the assistant's tokens only, packed (Llama 2, section 3.1). On TRL's SFTTrainer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from alignment.artifact import Artifact
from alignment.distributed import close, is_main_process
from alignment.fitting import (
    SealCheckpoints,
    StopWhenNotFinite,
    fit,
    training_arguments,
    weight_files,
)
from alignment.policy import load_model, load_tokenizer, lora_config
from alignment.recipe import SftRecipe
from alignment.sources import SourceError, load_conversations
from alignment.stopping import stop_on_sigterm
from alignment.tracking import open_tracker, trainer_callback
from alignment.workspace import open_workspace
from reward.conversation import Conversation
from reward.render import Renderer, TooLong


class _Trainer(StopWhenNotFinite, SFTTrainer):
    pass


def run(recipe: SftRecipe) -> Artifact | None:
    """Fine-tune `recipe.model` on conversations and leave a policy."""
    loaded = load_conversations(recipe.data, seed=recipe.seed)
    tokenizer = load_tokenizer(recipe.model, init=recipe.model_init)
    rows, too_long = tokenize(loaded.records, Renderer(tokenizer), max_length=recipe.data.max_length)
    data = {"counts": loaded.counts, "hash": loaded.data_hash, "too_long": dict(too_long), "num_rows": len(rows)}
    if not rows:
        raise SourceError(f"no row is left to train on: {data}")
    config = _config(recipe, num_rows=len(rows))
    workspace = open_workspace(recipe)
    model = load_model(recipe.model, init=recipe.model_init, pad_token_id=tokenizer.pad_token_id)
    peft_config = None
    if recipe.lora is not None:
        peft_config = lora_config(recipe.lora, model, head="causal_lm")
    with (
        open_tracker(recipe, workspace.path, parents=workspace.inputs, is_main_process=is_main_process()) as tracker,
        stop_on_sigterm() as stop,
    ):
        trainer = _Trainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=[SealCheckpoints(stop), trainer_callback(tracker)],
        )
        metrics = fit(trainer, workspace, recipe, head="causal_lm")
        artifact = None
        if is_main_process():
            artifact = workspace.finish("policy", data=data, metrics=metrics, files=weight_files(workspace.path))
            tracker.artifact(artifact)
    close(trainer.accelerator, trainer.model_wrapped)
    return artifact


def tokenize(
    conversations: tuple[Conversation, ...], renderer: Renderer, *, max_length: int
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Rows `input_ids`, `completion_mask` for SFTTrainer; longer conversations are counted, not cut."""
    rows: list[dict[str, Any]] = []
    dropped: Counter[str] = Counter()
    for conversation in conversations:
        try:
            rendered = renderer.render(conversation, max_length=max_length)
        except TooLong:
            dropped[conversation.tags.source or "unknown"] += 1
            continue
        rows.append(
            {"input_ids": rendered.input_ids, "completion_mask": [int(flag) for flag in rendered.completion_mask]}
        )
    return rows, dropped


def _config(recipe: SftRecipe, *, num_rows: int) -> SFTConfig:
    arguments = training_arguments(
        recipe.training,
        output_dir=Path(recipe.output_dir),
        seed=recipe.seed,
        num_rows=num_rows,
        init=recipe.model_init,
    )
    if recipe.packing:
        arguments["train_sampling_strategy"] = "random"
    return SFTConfig(
        **arguments,
        max_length=recipe.data.max_length,
        packing=recipe.packing,
        completion_only_loss=True,
        dataset_num_proc=None,
    )
