"""Whether the parts of a recipe go together: batches and processes, texts and models, the ids of two tokenizers.

What models are is told by their small files; those on a hub, or still to be made, are left to the stage.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from alignment.embedded import converted_folder, is_embedded
from alignment.recipe import (
    ContextDistillationRecipe,
    EvaluateRecipe,
    PpoRecipe,
    RejectionSamplingRecipe,
    RespondRecipe,
    StageRecipe,
)
from alignment.recipe_data import InputError, data_of

SamplingRecipe = PpoRecipe | RejectionSamplingRecipe | ContextDistillationRecipe | RespondRecipe | EvaluateRecipe
"""Recipes whose models answer prompts."""


def check_batches(recipe: StageRecipe, *, processes: int) -> None:
    """InputError when a step of PPO, or of its baselines, cannot be shared out evenly over the processes."""
    if not isinstance(recipe, PpoRecipe):
        return
    ppo = recipe.ppo
    rows, left = divmod(ppo.mini_batch_size, processes)
    if left or rows % min(ppo.per_device_batch_size, rows):
        raise InputError(
            f"ppo.mini_batch_size {ppo.mini_batch_size} must divide into {processes} processes x "
            f"per_device_batch_size {ppo.per_device_batch_size}"
        )


def check_fit(recipe: StageRecipe, *, planned: Collection[str]) -> None:
    """InputError when texts may be longer than a model reads, or a value model has other token ids than the policy.

    `planned`: folders that hold no model yet.
    """
    if not isinstance(recipe, SamplingRecipe):
        return
    folders = {key: (model, folder) for key, model in _readers(recipe) if (folder := _folder(model, planned))}
    for key, (model, folder) in folders.items():
        _check_lengths(recipe, key, model, folder)
    if "value_model" in folders and "model" in folders:
        _check_token_ids(folders["model"], folders["value_model"])


def _readers(recipe: SamplingRecipe) -> Iterator[tuple[str, str]]:
    """Key and name of every model that reads prompts with their answers as token ids."""
    if isinstance(recipe, EvaluateRecipe):
        for name, model in recipe.checkpoints.items():
            yield f"checkpoints.{name}", model
        return
    yield "model", recipe.model
    if isinstance(recipe, PpoRecipe) and recipe.value_model is not None:
        yield "value_model", recipe.value_model


def _folder(model: str, planned: Collection[str]) -> Path | None:
    folder = converted_folder(model) if is_embedded(model) else Path(model)
    return folder if model not in planned and folder.is_dir() else None


def _check_lengths(recipe: SamplingRecipe, reader: str, model: str, folder: Path) -> None:
    config = _read_json(folder / "config.json")
    positions = config.get("max_position_embeddings", (config.get("text_config") or {}).get("max_position_embeddings"))
    if not isinstance(positions, int):
        return
    for (prompt_key, prompt), (answer_key, answer) in _lengths(recipe):
        if prompt + answer > positions:
            raise InputError(
                f"{prompt_key} {prompt} and {answer_key} {answer} let in texts of {prompt + answer} tokens, but "
                f"{reader}, {model}, reads {positions} (its max_position_embeddings); lower one of them"
            )


def _lengths(recipe: SamplingRecipe) -> Iterator[tuple[tuple[str, int], tuple[str, int]]]:
    """Of every set of prompts the longest prompt and the longest answer, each with the key that allows it."""
    sampling = recipe.sampling
    for key, data, shape in data_of(recipe):
        if shape != "prompts":
            continue
        answer = ("sampling.max_new_tokens", sampling.max_new_tokens)
        if key.startswith("probes.") and isinstance(recipe, PpoRecipe) and recipe.probes is not None:
            answer = ("probes.max_new_tokens", recipe.probes.max_new_tokens)
        if data.max_length <= sampling.max_prompt_tokens:
            yield (f"{key}.max_length", data.max_length), answer
        else:
            yield ("sampling.max_prompt_tokens", sampling.max_prompt_tokens), answer


def _check_token_ids(policy: tuple[str, Path], value_model: tuple[str, Path]) -> None:
    """Every token of the policy must have the same id in the value model; without their files, an id at all."""
    ours, theirs = _vocabulary(policy[1]), _vocabulary(value_model[1])
    if ours is not None and theirs is not None:
        same = ours.items() <= theirs.items()
    else:
        own, other = (_read_json(folder / "config.json").get("vocab_size") for _, folder in (policy, value_model))
        same = own is None or other is None or own <= other
    if not same:
        raise InputError(
            f"value_model: {value_model[0]} reads the token ids of `model`, {policy[0]}, but its tokenizer is another "
            "one; name a reward model of the policy's family, or leave value_model out"
        )


def _vocabulary(folder: Path) -> dict[str, int] | None:
    """Token -> id, as tokenizer.json has them; None without one."""
    tokenizer = _read_json(folder / "tokenizer.json")
    tokens: Any = (tokenizer.get("model") or {}).get("vocab")
    if isinstance(tokens, list):  # of a unigram model: pairs of token and score, by id
        tokens = {token: number for number, (token, _) in enumerate(tokens)}
    if not isinstance(tokens, dict):
        return None
    return tokens | {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}


def _read_json(file: Path) -> dict[str, Any]:
    """Empty where there is no such file."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}") from error
    return values if isinstance(values, dict) else {}
