"""A harmfulness model: people's grades of harm by mean squared error (Safety-Tuned LLaMAs, arXiv 2309.07875)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, Trainer, TrainingArguments

from alignment.artifact import Artifact, write_json
from alignment.distributed import close, device, is_main_process, whole_weights
from alignment.fitting import (
    SealCheckpoints,
    StopWhenNotFinite,
    fit,
    training_arguments,
    weight_files,
)
from alignment.policy import add_lora, load_model, load_tokenizer, resolve_model
from alignment.recipe import HarmfulnessModelRecipe
from alignment.sources import load_graded
from alignment.stopping import stop_on_sigterm
from alignment.tracking import open_tracker, trainer_callback
from alignment.workspace import open_workspace
from reward.checkpoint import HARMFULNESS
from reward.conversation import Graded
from reward.families import Loading, text_limit
from reward.grades import grade_report
from reward.harmfulness import AbsoluteHarmfulness, GradeCollator, TranscriptEncoder, tokenize_graded
from reward.losses import grade_loss


class _Trainer(StopWhenNotFinite, Trainer):
    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "grade", "length"]

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        loss = grade_loss(logits.squeeze(-1).float(), inputs["grades"])
        return (loss, {"logits": logits}) if return_outputs else loss


def run(recipe: HarmfulnessModelRecipe) -> Artifact | None:
    """Train on graded conversations; measure on `eval_data` when given; leave a stock sequence classifier."""
    loaded = load_graded(recipe.data, seed=recipe.seed)
    held_out = None if recipe.eval_data is None else load_graded(recipe.eval_data, seed=recipe.seed)
    tokenizer = load_tokenizer(recipe.model, init=recipe.model_init)
    encoder = _encoder(recipe, tokenizer)
    rows, cut = tokenize_graded(loaded.records, encoder)
    note = f"over {encoder.max_length} tokens, cut on the {recipe.truncation_side}"
    loaded = loaded.noting(cut, note, truncated=True)
    data: dict[str, Any] = {"counts": loaded.counts, "hash": loaded.data_hash, "num_rows": len(rows)}
    workspace = open_workspace(recipe)
    model = load_model(
        recipe.model, init=recipe.model_init, head="sequence_classification", pad_token_id=tokenizer.pad_token_id
    )
    with (
        open_tracker(recipe, workspace.path, parents=workspace.inputs, is_main_process=is_main_process()) as tracker,
        stop_on_sigterm() as stop,
    ):
        trainer = _Trainer(
            model=model if recipe.lora is None else add_lora(model, recipe.lora, head="sequence_classification"),
            args=_config(recipe, num_rows=len(rows)),
            data_collator=GradeCollator(tokenizer.pad_token_id),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[SealCheckpoints(stop), trainer_callback(tracker)],
        )
        metrics = fit(trainer, workspace, recipe, head="sequence_classification")
        artifact = None
        if is_main_process():
            _mark(workspace.path, encoder)
            if held_out is not None:
                data["eval_data"] = {"counts": held_out.counts, "hash": held_out.data_hash}
                metrics["held_out"] = measure(workspace.path, held_out.records, recipe=recipe)
            files = weight_files(workspace.path)
            artifact = workspace.finish("harmfulness_model", data=data, metrics=metrics, files=files)
            tracker.artifact(artifact)
    close(trainer.accelerator, trainer.model_wrapped)
    return artifact


def measure(path: Path, graded: Sequence[Graded], *, recipe: HarmfulnessModelRecipe) -> dict[str, Any]:
    """Grade held-out conversations with the checkpoint as anybody would load it."""
    loading = Loading(dtype=recipe.model_init.dtype, device=device())
    with whole_weights():
        scorer = AbsoluteHarmfulness.load(path, loading=loading)
    return grade_report(graded, scorer.grade([item.conversation for item in graded]))


def _encoder(recipe: HarmfulnessModelRecipe, tokenizer: Any) -> TranscriptEncoder:
    init = recipe.model_init
    config = AutoConfig.from_pretrained(
        resolve_model(recipe.model), revision=init.revision, trust_remote_code=init.trust_remote_code
    )
    limit = text_limit(config, tokenizer, recipe.data.max_length)
    return TranscriptEncoder.of(tokenizer, max_length=limit, truncation_side=recipe.truncation_side)


def _mark(path: Path, encoder: TranscriptEncoder) -> None:
    """Say in the config what kind of model this is, so that nothing else reads it and the scorer cuts as it did."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    trained = {"truncation_side": encoder.truncation_side, "max_length": encoder.max_length}
    write_json(path / "config.json", config | {"problem_type": "regression", HARMFULNESS: trained})


def _config(recipe: HarmfulnessModelRecipe, *, num_rows: int) -> TrainingArguments:
    arguments = training_arguments(
        recipe.training,
        output_dir=Path(recipe.output_dir),
        seed=recipe.seed,
        num_rows=num_rows,
        init=recipe.model_init,
    )
    return TrainingArguments(**arguments)
