"""Held-out prompts: how the policy does on what it is not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alignment.distributed import from_all, process_index, share, world_size
from alignment.generate import Generator
from reward.conversation import Prompt
from reward.metrics import Mean
from reward.scorer import Score, Scorer, ScorerError, score_all


@dataclass(frozen=True)
class HeldOut:
    """Prompts, and who answers and judges them."""

    prompts: Sequence[Prompt]
    generator: Generator
    scorer: Scorer

    def mean_score(self, engine: Any, accelerator: Any, *, seed: int) -> float:
        """Of the answers that were scored, one a prompt, over all processes. ScorerError when none was."""
        from trl.models.utils import unwrap_model_for_generation

        own = share(len(self.prompts), process=process_index(), processes=world_size())
        engine.eval()
        # Under ZeRO-3 this gathers the weights once; the processes then step together, so their shares are equal.
        with unwrap_model_for_generation(engine, accelerator), accelerator.autocast():
            answers = self.generator.answer([self.prompts[position] for position in own], seed=seed)
        asked = [self.prompts[position].answer(answer.text) for position, answer in zip(own, answers, strict=True)]
        found: dict[int, Score] = {}
        for part in from_all(dict(zip(own, score_all(self.scorer, asked), strict=True))):
            found |= part
        known = [found[position].value for position in range(len(self.prompts))]
        mean = Mean.of(known).value
        if mean is None:
            raise ScorerError(f"{self.scorer.name} scored none of the held-out answers: {found[0].reason}")
        return mean
