"""A reward model: ranking loss with rating margin and safety auxiliary loss (Llama 2, section 3.2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from trl import RewardConfig

from alignment.artifact import Artifact
from alignment.distributed import close, device, is_main_process
from alignment.fitting import (
    SealCheckpoints,
    StopWhenNotFinite,
    fit,
    training_arguments,
    weight_files,
)
from alignment.policy import load_model, load_tokenizer, lora_config
from alignment.recipe import RewardModelRecipe
from alignment.sources import Loaded, SourceError, account_lines, load_preferences
from alignment.stopping import stop_on_sigterm
from alignment.tracking import open_tracker, trainer_callback
from alignment.workspace import open_workspace
from reward.collate import PreferenceCollator, tokenize_preferences, with_control_tokens
from reward.conversation import Preference, Rating
from reward.dtype import Dtype
from reward.losses import MARGINS
from reward.metrics import preference_report
from reward.model import RewardModel
from reward.render import Renderer
from reward.shared_prefix import why_not_packed
from reward.train import SafetyRewardTrainer


class _Trainer(StopWhenNotFinite, SafetyRewardTrainer):
    pass


def run(recipe: RewardModelRecipe) -> Artifact | None:
    """Train on preferences; measure on `eval_data` when given; leave a stock sequence classifier."""
    loaded = load_preferences(recipe.data, seed=recipe.seed)
    held_out = None if recipe.eval_data is None else load_preferences(recipe.eval_data, seed=recipe.seed)
    tokenizer = load_tokenizer(recipe.model, init=recipe.model_init)
    rows, loaded = tokenize(loaded, Renderer(tokenizer), recipe)
    data: dict[str, Any] = {"counts": loaded.counts, "hash": loaded.data_hash, "num_pairs": len(rows)}
    if not rows:
        raise SourceError("no pair is left to train on: " + "; ".join(account_lines(data)))
    config = _config(recipe, num_rows=len(rows))
    workspace = open_workspace(recipe)
    model = load_model(
        recipe.model, init=recipe.model_init, head="sequence_classification", pad_token_id=tokenizer.pad_token_id
    )
    why_padded = why_not_packed(model) if recipe.shared_prefix else "switched off"
    if recipe.shared_prefix and why_padded is not None and is_main_process():
        print(f"pairs are padded, their common tokens computed twice: {why_padded}", flush=True)
    hidden_size = model.config.get_text_config().hidden_size if why_padded is None else None
    peft_config = None
    if recipe.lora is not None:
        peft_config = lora_config(recipe.lora, model, head="sequence_classification")
    with (
        open_tracker(recipe, workspace.path, parents=workspace.inputs, is_main_process=is_main_process()) as tracker,
        stop_on_sigterm() as stop,
    ):
        trainer = _Trainer(
            model=model,
            args=config,
            data_collator=PreferenceCollator(tokenizer.pad_token_id, hidden_size=hidden_size),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=[SealCheckpoints(stop), trainer_callback(tracker)],
            auxiliary_loss_weight=recipe.auxiliary_loss_weight,
            centering_coefficient=recipe.centering_coefficient,
        )
        metrics = fit(trainer, workspace, recipe, head="sequence_classification")
        artifact = None
        if is_main_process():
            metrics["shared_prefix"] = why_padded or "on"
            if held_out is not None:
                data["eval_data"] = {"counts": held_out.counts, "hash": held_out.data_hash}
                metrics["held_out"] = measure(workspace.path, held_out.records, dtype=recipe.model_init.dtype)
            artifact = workspace.finish("reward_model", data=data, metrics=metrics, files=weight_files(workspace.path))
            tracker.artifact(artifact)
    close(trainer.accelerator, trainer.model_wrapped)
    return artifact


def tokenize(
    loaded: Loaded[Preference], renderer: Renderer, recipe: RewardModelRecipe
) -> tuple[list[dict[str, Any]], Loaded[Preference]]:
    """Rows for the trainer, and the pairs behind them with what only a tokenizer can tell of them in their account."""
    margins = MARGINS[recipe.margin] if isinstance(recipe.margin, str) else cast("dict[Rating, float]", recipe.margin)
    max_length = recipe.data.max_length
    rows, too_long = tokenize_preferences(loaded.records, renderer, max_length=max_length, margins=margins)
    loaded = loaded.without(too_long, f"over {max_length} tokens")
    note = "special tokens in the text, read as text"
    return rows, loaded.noting(with_control_tokens(loaded.records, renderer), note)


def measure(path: Path, preferences: Any, *, dtype: Dtype) -> dict[str, Any]:
    """Score held-out pairs with the checkpoint as anybody would load it."""
    from alignment.distributed import whole_weights

    with whole_weights():
        scorer = RewardModel.load(path, dtype=dtype, device=device())
    return preference_report(scorer, preferences)


def _config(recipe: RewardModelRecipe, *, num_rows: int) -> RewardConfig:
    arguments = training_arguments(
        recipe.training,
        output_dir=Path(recipe.output_dir),
        seed=recipe.seed,
        num_rows=num_rows,
        init=recipe.model_init,
    )
    return RewardConfig(**arguments, max_length=None, disable_dropout=True)
