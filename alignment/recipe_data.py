"""What a recipe reads, by key: its sections, its mixtures of data and their sources."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel

from alignment.recipe import (
    ContextDistillationRecipe,
    Data,
    EvalRewardRecipe,
    EvaluateRecipe,
    HarmfulnessModelRecipe,
    JudgeDataRecipe,
    LabelRecipe,
    PpoRecipe,
    RejectionSamplingRecipe,
    RespondRecipe,
    RewardModelRecipe,
    SftRecipe,
    Source,
    StageRecipe,
)
from alignment.recipe_agreement import JudgeAgreementRecipe
from alignment.recipe_attack import JudgeAttackRecipe


class InputError(ValueError):
    """An input of a recipe that is missing, of the wrong kind, or does not go with the rest."""


DataShape = Literal["conversations", "preferences", "prompts", "labelled", "graded"]


def data_of(recipe: StageRecipe) -> Iterator[tuple[str, Data, DataShape]]:
    """Every mixture that the recipe reads: (key, data, what its rows must give)."""
    match recipe:
        case SftRecipe():
            yield "data", recipe.data, "conversations"
        case RewardModelRecipe():
            yield "data", recipe.data, "preferences"
            if recipe.eval_data is not None:
                yield "eval_data", recipe.eval_data, "preferences"
        case HarmfulnessModelRecipe():
            yield "data", recipe.data, "graded"
            if recipe.eval_data is not None:
                yield "eval_data", recipe.eval_data, "graded"
        case RejectionSamplingRecipe() | ContextDistillationRecipe() | RespondRecipe():
            yield "prompts", recipe.prompts, "prompts"
        case PpoRecipe():
            for key, section in sections_of(recipe):
                if isinstance(section, Data):
                    yield key, section, "conversations" if key == "ptx_data" else "prompts"
        case LabelRecipe():
            yield "data", recipe.data, "preferences" if recipe.task == "safety_labels" else "conversations"
        case JudgeDataRecipe():
            if recipe.answers is not None:
                yield "answers", recipe.answers, "conversations"
            if recipe.pairs is not None:
                yield "pairs", recipe.pairs, "preferences"
            if recipe.labelled is not None:
                yield "labelled", recipe.labelled, "labelled"
        case EvaluateRecipe():
            for name, part in recipe.prompt_sets.items():
                yield f"prompt_sets.{name}.prompts", part.prompts, "prompts"
            for name, held_out in recipe.reward_models.items():
                yield f"reward_models.{name}.data", held_out.data, "preferences"
        case EvalRewardRecipe():
            yield "data", recipe.data, "preferences"
        case JudgeAgreementRecipe() | JudgeAttackRecipe():
            yield "data", recipe.data, "labelled"
        case _:
            raise TypeError(f"{type(recipe).__name__} says nothing of its data")


def sources_of(recipe: StageRecipe) -> Iterator[tuple[str, Source, DataShape]]:
    """Every source of the recipe's mixtures: (key, source, what its rows must give)."""
    for key, data, shape in data_of(recipe):
        for position, source in enumerate(data.sources):
            yield f"{key}.sources.{position}", source, shape


def sections_of(value: Any, key: str = "") -> Iterator[tuple[str, BaseModel]]:
    """Every section below a recipe with its dotted key."""
    if isinstance(value, BaseModel):
        if key:
            yield key, value
        for name in type(value).model_fields:
            yield from sections_of(getattr(value, name), f"{key}.{name}" if key else name)
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from sections_of(inner, f"{key}.{name}")
    elif isinstance(value, list):
        for position, inner in enumerate(value):
            yield from sections_of(inner, f"{key}.{position}")
