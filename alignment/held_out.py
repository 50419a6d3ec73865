"""Held-out prompts: how the policy does on what it is not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alignment.distributed import from_all, process_index, share, world_size
from alignment.generate import Generator
from alignment.rollout import AnswerServer, present_answers
from reward.conversation import Prompt
from reward.metrics import Mean
from reward.scorer import Score, Scorer, ScorerError, score_all


@dataclass(frozen=True)
class HeldOut:
    """Prompts, and who answers (`server`: in place of the generator) and judges them."""

    prompts: Sequence[Prompt]
    generator: Generator
    scorer: Scorer
    server: AnswerServer | None = None

    def mean_score(self, engine: Any, accelerator: Any, *, seed: int) -> float:
        """Of the answers that were scored, one a prompt, over all processes. ScorerError when none was."""
        own = share(len(self.prompts), process=process_index(), processes=world_size())
        prompts = [self.prompts[position] for position in own]
        answers = present_answers(
            engine, self.generator, (prompts, own), seed=seed, accelerator=accelerator, server=self.server
        )
        asked = [prompt.answer(answer.text) for prompt, answer in zip(prompts, answers, strict=True)]
        found: dict[int, Score] = {}
        for part in from_all(dict(zip(own, score_all(self.scorer, asked), strict=True))):
            found |= part
        known = [found[position].value for position in range(len(self.prompts))]
        mean = Mean.of(known).value
        if mean is None:
            raise ScorerError(f"{self.scorer.name} scored none of the held-out answers: {found[0].reason}")
        return mean
