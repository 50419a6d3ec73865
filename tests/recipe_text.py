"""Short recipes as text, how to load one, and the message of a fault in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from alignment.recipe import StageRecipe
from alignment.recipe_file import RecipeError, load_recipe

if TYPE_CHECKING:
    from pathlib import Path

SFT = "stage: sft\noutput_dir: out\nmodel: m\ndata: {sources: [{name: a}]}\n"
REWARD_MODEL = SFT.replace("sft", "reward_model")
PPO = "stage: ppo\noutput_dir: out\nmodel: m\nprompts: {sources: [{name: a}]}\nscorer: {type: refusal}\n"
EVALUATE = (
    "stage: evaluate\noutput_dir: out\ncheckpoints: {base: m}\n"
    "prompt_sets: {bad: {measures: violation, prompts: {sources: [{name: a}]}}}\n"
    "violation_scorers: {one: {type: refusal}, two: {type: python, function: 'a:b', scale: logit}}\n"
)


def load(tmp_path: Path, text: str, *overrides: str) -> StageRecipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides)


def fault(tmp_path: Path, text: str, *overrides: str) -> str:
    """The message of the RecipeError, without the path in front of each line."""
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value).replace(f"{tmp_path / 'recipe.yaml'}: ", "")
