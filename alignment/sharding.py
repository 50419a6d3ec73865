"""Models that are only read, shared out over the processes (ZeRO-3): whether a recipe that asks for it can have it."""

from __future__ import annotations

from pathlib import Path

from alignment.distributed import launched_under_zero3
from alignment.inputs import InputError, sections_of
from alignment.recipe import PpoRecipe, StageRecipe
from alignment.recipe_scorers import ONLY_CLASSIFIERS, RewardModelScorer
from reward.checkpoint import check_checkpoint


def check_sharding(recipe: StageRecipe) -> None:
    """InputError, before anything loads, where this stage, this model or this launch cannot share weights out."""
    keys: list[str] = []
    for key, section in sections_of(recipe):
        if isinstance(section, RewardModelScorer) and section.sharded:
            keys.append(f"{key}.sharded")
            _check_family(key, section)
    if isinstance(recipe, PpoRecipe):
        keys += ["ppo.reference"] if recipe.ppo.reference == "sharded" else []
    elif keys:
        raise InputError(f"{keys[0]}: only in the stage ppo do all processes score together; leave the key out")
    if keys and not launched_under_zero3():
        raise InputError(f"{keys[0]}: ZeRO-3 alone shares weights out; launch with launch/zero3.yaml or the like")


def _check_family(key: str, section: RewardModelScorer) -> None:
    if not Path(section.path).is_dir():
        return  # of the hub: known once it is loaded
    checkpoint, family = check_checkpoint(
        section.path, family=section.family, direction=section.direction, label=section.label
    )
    if family != "classifier" or checkpoint.label_index(section.label) is not None:
        raise InputError(f"{key}.sharded: {ONLY_CLASSIFIERS}")
