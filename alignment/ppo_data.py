"""What PPO reads: prompts, held-out prompts, and the pretraining mix."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alignment.actor_critic import Batch
from alignment.generate import fitting_prompts
from alignment.recipe import Data, PpoRecipe
from alignment.rollout import iteration_positions
from alignment.source_files import SourceError
from alignment.sources import load_conversations, load_prompts
from reward.conversation import Conversation, Prompt
from reward.render import Rendered, Renderer, TooLong


@dataclass(frozen=True)
class PpoData:
    """`account`: for the manifest, what was read and what was left out."""

    prompts: Sequence[Prompt]
    eval_prompts: Sequence[Prompt]
    mix: PretrainingMix | None
    account: dict[str, Any]


def read_data(recipe: PpoRecipe, renderer: Renderer) -> PpoData:
    """All data of the recipe. Prompts that are held out are not trained on, and counted."""
    prompts, account = _read_prompts(recipe.prompts, recipe, renderer)
    eval_prompts: list[Prompt] = []
    if recipe.eval_prompts is not None:
        eval_prompts, account["eval_prompts"] = _read_prompts(recipe.eval_prompts, recipe, renderer)
        held_out = {prompt.messages for prompt in eval_prompts}
        kept = [prompt for prompt in prompts if prompt.messages not in held_out]
        account["held_out"] = len(prompts) - len(kept)
        if not kept:
            raise SourceError("eval_prompts: they hold every prompt of the training, so nothing is left to train on")
        prompts = kept
    mix = None
    if recipe.ptx_data is not None:
        loaded = load_conversations(recipe.ptx_data, seed=recipe.seed)
        mix = PretrainingMix(loaded.records, renderer, recipe, max_length=recipe.ptx_data.max_length)
        account["ptx_data"] = {"counts": loaded.counts, "hash": loaded.data_hash, "too_long": dict(mix.too_long)}
    return PpoData(prompts, eval_prompts, mix, account)


def _read_prompts(data: Data, recipe: PpoRecipe, renderer: Renderer) -> tuple[list[Prompt], dict[str, Any]]:
    loaded = load_prompts(data, seed=recipe.seed)
    max_length = min(data.max_length, recipe.sampling.max_prompt_tokens)
    prompts, too_long = fitting_prompts(loaded.records, renderer, max_length=max_length)
    return prompts, {"counts": loaded.counts, "hash": loaded.data_hash, "too_long": dict(too_long)}


class PretrainingMix:
    """Conversations whose likelihood is kept up, one beside each prompt (InstructGPT, Ouyang et al. 2022, equation 2).

    The loss is on the assistant's tokens, as in fine-tuning. `rows` below are those of this process's rollout; which
    conversation stands there follows from the seed alone.
    """

    def __init__(
        self, conversations: Sequence[Conversation], renderer: Renderer, recipe: PpoRecipe, *, max_length: int
    ) -> None:
        self.recipe = recipe
        self.pad_token_id = renderer.tokenizer.pad_token_id
        self.too_long: Counter[str] = Counter()
        self.rendered: list[Rendered] = []
        for conversation in conversations:
            try:
                self.rendered.append(renderer.render(conversation, max_length=max_length))
            except TooLong:
                self.too_long[conversation.tags.source or "unknown"] += 1
        if not self.rendered:
            raise SourceError(
                f"ptx_data: none of the {len(conversations)} conversations fits into max_length {max_length}; raise it"
            )

    def chosen(self, rows: Sequence[int], *, iteration: int) -> list[Rendered]:
        positions = iteration_positions(len(self.rendered), self.recipe, iteration=iteration, name="ptx")
        return [self.rendered[positions[row]] for row in rows]

    def num_tokens(self, rows: Sequence[int], *, iteration: int) -> int:
        """Tokens of the assistant."""
        return sum(sum(rendered.completion_mask) for rendered in self.chosen(rows, iteration=iteration))

    def batch(self, rows: Sequence[int], *, iteration: int, padding_free: bool, device: Any) -> Batch:
        """Completions begin with the assistant's first token; the mask leaves out what others say behind it."""
        prompts: list[list[int]] = []
        completions: list[list[int]] = []
        masks: list[list[bool]] = []
        for rendered in self.chosen(rows, iteration=iteration):
            start = rendered.completion_mask.index(True)
            prompts.append(rendered.input_ids[:start])
            completions.append(rendered.input_ids[start:])
            masks.append(rendered.completion_mask[start:])
        batch = Batch.of(prompts, completions, pad_token_id=self.pad_token_id, padding_free=padding_free, device=device)
        mask = torch.zeros_like(batch.completion_mask, device="cpu")
        for row, flags in enumerate(masks):
            mask[row, : len(flags)] = torch.tensor(flags)
        return dataclasses.replace(batch, completion_mask=mask.to(device))
