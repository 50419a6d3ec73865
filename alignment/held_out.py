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
from reward.scorer import Score, Scorer, ScorerError, check_unscored, score_all


@dataclass(frozen=True)
class HeldOut:
    """Prompts, and who answers (`server`: in place of the generator) and judges them."""

    prompts: Sequence[Prompt]
    generator: Generator
    scorer: Scorer
    server: AnswerServer | None = None

    def metrics(self, engine: Any, accelerator: Any, *, seed: int, max_unscored: float) -> dict[str, float]:
        """The mean score of the answers, one a prompt, over all processes, and how many the scorer left unscored.

        ScorerError when these are more than the share `max_unscored`: the mean of few would pick the policy by chance.
        """
        own = share(len(self.prompts), process=process_index(), processes=world_size())
        prompts = [self.prompts[position] for position in own]
        answers = present_answers(
            engine, self.generator, (prompts, own), seed=seed, accelerator=accelerator, server=self.server
        )
        asked = [prompt.answer(answer.text) for prompt, answer in zip(prompts, answers, strict=True)]
        found: dict[int, Score] = {}
        for part in from_all(dict(zip(own, score_all(self.scorer, asked), strict=True))):
            found |= part
        scores = [found[position] for position in range(len(self.prompts))]
        reasons = [score.reason for score in scores if score.value is None]
        name = f"{self.scorer.name} (held-out prompts)"
        check_unscored(reasons, num_answers=len(scores), name=name, limit=max_unscored)
        mean = Mean.of([score.value for score in scores]).value
        if mean is None:
            raise ScorerError(f"{self.scorer.name} scored none of the held-out answers: {reasons[0]}")
        return {"held_out_score": mean, "held_out_unscored": len(reasons)}
