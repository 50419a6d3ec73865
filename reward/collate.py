"""Preference pairs -> token ids -> padded batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from reward.conversation import Preference, Rating
from reward.model import pad_right
from reward.render import Renderer, TooLong
from reward.shared_prefix import Group, pack


def tokenize_preferences(
    preferences: Sequence[Preference], renderer: Renderer, *, max_length: int, margins: Mapping[Rating, float]
) -> tuple[list[dict[str, Any]], list[int]]:
    """Rows for TRL's RewardTrainer with margin and safety labels, and the positions of pairs too long on either side.

    Nothing is cut: such pairs have no row. A pair without rating gets margin 0. Labels: 1 safe, 0 unsafe, NaN unknown.
    A pair whose chosen answer is unsafe and whose rejected one is safe keeps its ranking but gets no safety labels (the
    paper excludes it).
    """
    rows: list[dict[str, Any]] = []
    too_long: list[int] = []
    for position, preference in enumerate(preferences):
        try:
            chosen = renderer.render_ids(preference.prompt.answer(preference.chosen), max_length=max_length)
            rejected = renderer.render_ids(preference.prompt.answer(preference.rejected), max_length=max_length)
        except TooLong:
            too_long.append(position)
            continue
        labelled = preference.safety_bin is not None
        rows.append(
            {
                "chosen_ids": chosen,
                "rejected_ids": rejected,
                "margin": margins[preference.rating] if preference.rating is not None else 0.0,
                "length": max(len(chosen), len(rejected)),
                "chosen_safe": float(bool(preference.chosen_safe)) if labelled else math.nan,
                "rejected_safe": float(bool(preference.rejected_safe)) if labelled else math.nan,
            }
        )
    return rows, too_long


def with_control_tokens(preferences: Sequence[Preference], renderer: Renderer) -> list[int]:
    """Positions of the pairs whose text holds special tokens of the tokenizer, written out."""
    texts = [[*(turn.content for turn in pair.prompt.messages), pair.chosen, pair.rejected] for pair in preferences]
    return [position for position, own in enumerate(texts) if any(map(renderer.holds_control_tokens, own))]


@dataclass(frozen=True)
class PreferenceCollator:
    """Batches of `n` pairs: scores `[0, n)` are those of the chosen sides, `[n, 2n)` of the rejected ones.

    Padded on the right, `(2n, longest)`; or, with the model's `hidden_size`, packed so that the tokens that the two
    sides of a pair share are computed once.
    """

    pad_token_id: int
    hidden_size: int | None = None

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        texts = self._padded(examples) if self.hidden_size is None else self._packed(examples, self.hidden_size)
        labels = [example["chosen_safe"] for example in examples] + [example["rejected_safe"] for example in examples]
        return texts | {
            "margin": torch.tensor([example["margin"] for example in examples], dtype=torch.float32),
            "is_safe": torch.tensor(labels, dtype=torch.float32),
        }

    def _padded(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        sequences = [example["chosen_ids"] for example in examples] + [example["rejected_ids"] for example in examples]
        input_ids, attention_mask = pad_right(sequences, pad_token_id=self.pad_token_id)
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def _packed(self, examples: Sequence[Mapping[str, Any]], hidden_size: int) -> dict[str, torch.Tensor]:
        groups = [Group.of([example["chosen_ids"], example["rejected_ids"]]) for example in examples]
        batch = pack(groups, pad_token_id=self.pad_token_id, hidden_size=hidden_size).to_batch()
        batch["ends"] = torch.cat([batch["ends"][0::2], batch["ends"][1::2]])
        return batch
