"""Stages that make data stop where the scorer leaves too many answers unscored, and keep nothing of that batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from alignment.__main__ import outcome_lines
from alignment.generate import Completion
from alignment.recipe import ContextDistillationRecipe, Data, RejectionSamplingRecipe, Source
from alignment.recipe_scorers import RefusalScorer
from alignment.stages.context_distillation import distill_chunk
from alignment.stages.rejection_sampling import sample_chunk
from reward.conversation import Conversation, Prompt
from reward.scorer import FunctionScorer, ScorerError, score_all

if TYPE_CHECKING:
    from collections.abc import Sequence

PROMPTS = [Prompt.of(f"Question {number}?", is_safety=True) for number in range(5)]
SETTINGS: dict[str, Any] = {
    "model": "unused",
    "output_dir": "unused",
    "prompts": Data(sources=[Source(name="starter_safety")]),
    "scorer": RefusalScorer(),
}


class Echo:
    """Answers with the question, and with its preprompt where it has one."""

    def answer(self, prompts: Sequence[Prompt], *, seed: int) -> list[Completion]:
        texts = [" ".join(message.content for message in prompt.messages) for prompt in prompts]
        return [Completion(text, finished=True, num_tokens=1) for text in texts]


def silent_on(*texts: str) -> FunctionScorer:
    def value(conversation: Conversation) -> float | None:
        return None if any(text in conversation.completion for text in texts) else 1.0

    return FunctionScorer(value, name="half deaf")


def test_the_limit_is_a_share_of_what_was_asked() -> None:
    asked = [prompt.answer(prompt.text) for prompt in PROMPTS]
    one, two = silent_on("Question 1"), silent_on("Question 1", "Question 3")
    assert [score.value for score in score_all(one, asked, max_unscored=0.2)] == [1.0, None, 1.0, 1.0, 1.0]
    with pytest.raises(ScorerError, match=r"half deaf left 2 of 5 answers unscored \(half deaf returned None\), over"):
        score_all(two, asked, max_unscored=0.2)
    with pytest.raises(ScorerError, match="max_unscored=0"):
        score_all(one, asked, max_unscored=0.0)
    assert score_all(two, [], max_unscored=0.0) == []


def test_rejection_sampling_stops_above_its_limit() -> None:
    recipe = RejectionSamplingRecipe(**SETTINGS, num_samples=2)
    generator: Any = Echo()
    rows = sample_chunk(generator, silent_on("Question 1"), PROMPTS, recipe, number=0)
    assert [row["scores"] for row in rows] == [[1.0] * 2, [None] * 2, *[[1.0] * 2] * 3]
    with pytest.raises(ScorerError, match="left 4 of 10 answers unscored"):
        sample_chunk(generator, silent_on("Question 1", "Question 3"), PROMPTS, recipe, number=0)


@pytest.mark.parametrize("preprompt", ["Be careful.", "Be silent."])
def test_context_distillation_stops_above_its_limit_on_either_side(preprompt: str) -> None:
    recipe = ContextDistillationRecipe(**SETTINGS)
    generator: Any = Echo()
    scorer = silent_on("Question 1", "Be silent.")
    if preprompt == "Be careful.":
        rows = distill_chunk(generator, scorer, PROMPTS, [preprompt], recipe, number=0)
        assert [row["plain_score"] for row in rows] == [1.0, None, 1.0, 1.0, 1.0]
        return
    with pytest.raises(ScorerError, match="left 5 of 5 answers unscored"):
        distill_chunk(generator, scorer, PROMPTS, [preprompt], recipe, number=0)


def test_what_became_of_the_rows_is_said() -> None:
    told = list(outcome_lines({"outcomes": {"kept": 5, "unscored": 1}, "dropped": {}, "num_prompts": 6}))
    assert told == ["outcomes: kept: 5, unscored: 1"]
