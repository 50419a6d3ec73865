"""Held-out prompts: how the policy does on what it is not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alignment.distributed import process_index, world_size
from alignment.generate import Generator
from reward.conversation import Prompt
from reward.scorer import Scorer, ScorerError, score_all


@dataclass(frozen=True)
class HeldOut:
    """Prompts, and who answers and judges them."""

    prompts: Sequence[Prompt]
    generator: Generator
    scorer: Scorer

    def mean_score(self, engine: Any, accelerator: Any, *, seed: int) -> float:
        """Of the answers that were scored, one a prompt, over all processes. ScorerError when none was."""
        from trl.models.utils import unwrap_model_for_generation

        own = self.prompts[process_index() :: world_size()]
        engine.eval()
        with unwrap_model_for_generation(engine, accelerator), accelerator.autocast():
            answers = self.generator.answer(own, seed=seed)
        asked = zip(own, answers, strict=True)
        scores = score_all(self.scorer, [prompt.answer(answer.text) for prompt, answer in asked])
        known = [score.value for score in scores if score.value is not None]
        sums = torch.tensor([sum(known), len(known)], dtype=torch.float64).to(accelerator.device)
        total, scored = accelerator.reduce(sums, reduction="sum").tolist()
        if not scored:
            reason = next((score.reason for score in scores), "no answers on this process")
            raise ScorerError(f"{self.scorer.name} scored none of the held-out answers: {reason}")
        return total / scored
