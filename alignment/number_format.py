"""Which number formats PPO can learn in: checked when it is launched, before any weights load."""

from __future__ import annotations

import os

from alignment.distributed import device, uses_deepspeed
from alignment.inputs import InputError
from alignment.recipe import PpoRecipe, StageRecipe

NO_MASTER_WEIGHTS = (
    "model_init.dtype: a policy that is tuned whole, in {dtype}, needs float32 master weights, which DeepSpeed alone "
    "keeps: at PPO's learning rates most updates are lost in rounding. Launch with launch/zero1.yaml or above, tune "
    "adapters (lora: {{r: 16, alpha: 32}}), or take dtype float32"
)


def check_number_format(recipe: StageRecipe) -> None:
    """InputError where this launch would lose a policy's updates in rounding, or scale its loss for float16."""
    if not isinstance(recipe, PpoRecipe):
        return
    if recipe.trainer == "ppo" and os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":
        raise InputError(
            "mixed_precision fp16: its loss scaling finds its scale by gradients that are not finite, and these stop "
            "PPO; take bf16, or no mixed precision"
        )
    if recipe.lora is None and not uses_deepspeed():
        from reward.dtype import torch_dtype

        dtype = torch_dtype(recipe.model_init.dtype, device())
        if dtype.itemsize < 4:
            raise InputError(NO_MASTER_WEIGHTS.format(dtype=str(dtype).removeprefix("torch.")))
