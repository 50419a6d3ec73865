"""The pretraining mix: conversations whose likelihood PPO keeps up (InstructGPT, Ouyang et al. 2022, equation 2)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from alignment.actor_critic import Batch
from alignment.recipe import PpoRecipe
from alignment.rollout import iteration_positions
from alignment.source_files import SourceError
from reward.conversation import Conversation
from reward.render import Rendered, Renderer, TooLong


class PretrainingMix:
    """One conversation beside each prompt of an iteration; the loss is on the assistant's tokens, as in fine-tuning.

    `rows` below are those of this process's rollout. Which conversation stands there follows from the seed alone.
    """

    def __init__(self, conversations: Sequence[Conversation], renderer: Renderer, recipe: PpoRecipe) -> None:
        assert recipe.ptx_data is not None
        self.recipe = recipe
        self.pad_token_id = renderer.tokenizer.pad_token_id
        self.too_long: Counter[str] = Counter()
        self.rendered: list[Rendered] = []
        for conversation in conversations:
            try:
                self.rendered.append(renderer.render(conversation, max_length=recipe.ptx_data.max_length))
            except TooLong:
                self.too_long[conversation.tags.source or "unknown"] += 1
        if not self.rendered:
            raise SourceError(f"ptx_data: none of the {len(conversations)} conversations fits into max_length")

    def chosen(self, rows: range, *, iteration: int) -> list[Rendered]:
        positions = iteration_positions(len(self.rendered), self.recipe, iteration=iteration, name="ptx")
        return [self.rendered[positions[row]] for row in rows]

    def num_tokens(self, rows: range, *, iteration: int) -> int:
        """Tokens of the assistant."""
        return sum(sum(rendered.completion_mask) for rendered in self.chosen(rows, iteration=iteration))

    def batch(self, rows: range, *, iteration: int, device: Any) -> Batch:
        """The completions begin with the first token of the assistant; of what follows the mask has only its tokens."""
        prompts: list[list[int]] = []
        completions: list[list[int]] = []
        masks: list[list[bool]] = []
        for rendered in self.chosen(rows, iteration=iteration):
            start = rendered.completion_mask.index(True)
            prompts.append(rendered.input_ids[:start])
            completions.append(rendered.input_ids[start:])
            masks.append(rendered.completion_mask[start:])
        batch = Batch.of(prompts, completions, pad_token_id=self.pad_token_id, device=device)
        mask = torch.zeros_like(batch.completion_mask, device="cpu")
        for row, flags in enumerate(masks):
            mask[row, : len(flags)] = torch.tensor(flags)
        return dataclasses.replace(batch, completion_mask=mask.to(device))
