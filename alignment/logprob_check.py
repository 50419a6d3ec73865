"""Whether sampler and trainer give the tokens of a rollout the same log-probabilities; if not, why."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignment.distributed import from_all
from alignment.generate import Generator
from alignment.recipe import PpoRecipe
from alignment.rollout import Rollout

EXACT_LIMIT, ROUNDED_LIMIT = 1e-3, 0.1
"""Nats, mean over tokens: where all is computed in float32 by one engine, and where something is rounded (bfloat16,
TF32) or a server draws the answers, with kernels and a number format of its own."""
_ASKED_AGAIN = 4


class Difference(NamedTuple):
    """`|log p of the sampler - log p of the trainer|` over the tokens of a rollout on all processes, in nats."""

    mean: float
    max: float


def compare_logprobs(rollout: Rollout, accelerator: Any) -> Difference:
    """All processes call it together."""
    apart = (rollout.sampled_logprobs - rollout.logprobs).double().abs() * rollout.completion_mask
    parts = from_all((float(apart.sum()), int(rollout.completion_mask.sum()), float(apart.max())))
    return Difference(sum(part[0] for part in parts) / sum(part[1] for part in parts), max(part[2] for part in parts))


def logprob_limit(recipe: PpoRecipe, *, mixed_precision: str) -> float:
    """The recipe's, or one for the precision that it computes in."""
    if recipe.health.max_logprob_difference is not None:
        return recipe.health.max_logprob_difference
    init = recipe.model_init
    alone = recipe.vllm is None and init.quantization is None
    exact = alone and init.dtype == "float32" and mixed_precision == "no"
    return EXACT_LIMIT if exact and recipe.float32_matmul_precision == "highest" else ROUNDED_LIMIT


def likely_cause(engine: Any, generator: Generator, rollout: Rollout, *, temperature: float, limit: float) -> str:
    """Why the two differ. Answers of each process are asked about again, alone and without padding.

    All processes call it together, in the mode in which the rollout was evaluated.
    """
    once, again = _alone(engine, generator, rollout), _alone(engine, generator, rollout)
    rows = len(once)
    mask, trainer = rollout.completion_mask[:rows], rollout.logprobs[:rows]
    sampler, reference = rollout.sampled_logprobs[:rows], rollout.ref_logprobs[:rows]

    def differ(first: Tensor, second: Tensor) -> bool:
        apart = float(((first - second).abs() * mask).sum() / mask.sum())
        return any(from_all(not apart <= limit))

    if differ(once, again):
        return "the same forward pass gives other numbers each time: dropout is on"
    if generator.sampling.temperature != temperature:
        return f"answers are drawn at temperature {generator.sampling.temperature:g} and evaluated at {temperature:g}"
    if differ(once, trainer):
        return "an answer alone has other log-probabilities than beside others: attention mask or position ids"
    if not differ(sampler, reference):
        return "the sampler has the weights of the start: it does not get the updates, or its adapter is off"
    return "the sampler computes otherwise than the training forward pass: other weights, number format or kernels"


def _alone(engine: Any, generator: Generator, rollout: Rollout) -> Tensor:
    """Log-probabilities of the first answers, `(rows, length)`, each in a batch of its own; zero where padded."""
    rows = min(_ASKED_AGAIN, len(rollout.completion_ids))
    found = torch.zeros(rows, rollout.completion_mask.shape[1])
    device = next(generator.model.parameters()).device
    pad = generator.renderer.tokenizer.pad_token_id
    for row in range(rows):
        with torch.no_grad():
            output = engine(rollout.rows([row], pad_token_id=pad, padding_free=False, device=device))
        found[row, : output.logprobs.shape[1]] = output.logprobs[0].float().cpu()
    return found
