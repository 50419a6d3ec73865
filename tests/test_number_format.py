"""Launches in which PPO could not learn are refused before anything loads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from alignment.inputs import InputError
from alignment.number_format import check_number_format
from alignment.recipe import Lora, ModelInit
from tests.tiny_ppo import ppo_recipe

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("trainer", ["ppo", "rloo", "grpo"])
def test_full_tuning_in_half_precision_needs_deepspeed(
    trainer: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 47,264 weights of the tests' model 119 changed in 20 steps at 1e-6, and a run would end with exit code 0."""
    recipe = ppo_recipe(tiny_model, model_init=ModelInit(dtype="bfloat16")).model_copy(update={"trainer": trainer})
    with pytest.raises(InputError, match=r"in bfloat16, needs float32 master weights.*launch/zero1\.yaml"):
        check_number_format(recipe)
    check_number_format(recipe.model_copy(update={"model_init": ModelInit(dtype="float32")}))
    check_number_format(recipe.model_copy(update={"lora": Lora(r=2, alpha=4)}))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    check_number_format(recipe)


def test_loss_scaling_is_refused(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(InputError, match="take bf16, or no mixed precision"):
        check_number_format(ppo_recipe(tiny_model))
