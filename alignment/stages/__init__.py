"""The stages. Each module has one verb, `run(recipe) -> Artifact`; no stage imports another."""

from __future__ import annotations

import importlib

from alignment.artifact import Artifact
from alignment.recipe import StageRecipe


def run_stage(recipe: StageRecipe) -> Artifact | None:
    """Run the stage that the recipe names; the artifact on the main process, None on the others.

    New heads and adapters are drawn when models load, so the seed is set before anything else.
    """
    import torch
    from transformers import set_seed

    set_seed(recipe.seed)
    torch.set_float32_matmul_precision(recipe.float32_matmul_precision)
    return importlib.import_module(f"alignment.stages.{recipe.stage}").run(recipe)
