"""Stages that make data stop where the scorer leaves too many of all answers unscored; what was sampled stays."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from alignment.__main__ import outcome_lines
from alignment.generate import Completion
from alignment.recipe import ContextDistillationRecipe, Data, ModelInit, RejectionSamplingRecipe, Sampling, Source
from alignment.recipe_label import LabelRecipe
from alignment.recipe_scorers import RefusalScorer
from alignment.stages import context_distillation, rejection_sampling
from reward.conversation import Conversation, Prompt
from reward.scorer import (
    FunctionScorer,
    MinimumScorer,
    NegatedScorer,
    PiecewiseScorer,
    Score,
    Scorer,
    ScorerError,
    check_unscored,
)
from tests.scorers import constant

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from alignment.artifact import Artifact

pytestmark = pytest.mark.usefixtures("on_cpu_in_repository")
PROMPTS = [Prompt.of(f"Question {number}?", is_safety=True) for number in range(5)]
BATCH = 1
"""So that an answer without a score is all of its batch."""


class Echo:
    """Answers with the question, and with its preprompt where it has one."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def answer(self, prompts: Sequence[Prompt], *, seed: int) -> list[Completion]:
        self.asked += [prompt.messages[-1].content for prompt in prompts]
        texts = [" ".join(message.content for message in prompt.messages) for prompt in prompts]
        return [Completion(text, finished=True, num_tokens=1) for text in texts]


class Deaf:
    """1 for every answer, but for those that hold one of the texts, which have no score for the reason beside it."""

    name = "deaf"
    scale = "unbounded"

    def __init__(self, reasons: Mapping[str, str], *, transient: bool = False) -> None:
        self.reasons = reasons
        self.transient = transient

    def score(self, conversations: Sequence[Conversation]) -> list[Score]:
        return [self._score(conversation.completion) for conversation in conversations]

    def _score(self, completion: str) -> Score:
        reason = next((reason for text, reason in self.reasons.items() if text in completion), None)
        if reason is not None:
            return Score(None, reason, transient=self.transient)
        return Score(2.0 if "Be careful." in completion else 1.0)


def run_stage(
    stage: Any, folder: Path, model: Path, scorer: Any, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> tuple[Artifact | None, list[str]]:
    """The stage on the five prompts with `Echo` as its model; the questions that it was asked come back too."""
    prompts, preprompts = folder / "prompts.jsonl", folder / "preprompts.txt"
    prompts.write_text("".join(json.dumps(prompt.to_json()) + "\n" for prompt in PROMPTS), encoding="utf-8")
    preprompts.write_text("Be careful.", encoding="utf-8")
    echo = Echo()
    monkeypatch.setattr(stage, "Generator", lambda *_: echo)
    monkeypatch.setattr(stage, "build_scorer", lambda _: scorer)
    shared: dict[str, Any] = {
        "model": str(model),
        "model_init": ModelInit(dtype="float32"),
        "output_dir": str(folder / "output"),
        "prompts": Data(sources=[Source(name="file", path=str(prompts), split="all")]),
        "scorer": RefusalScorer(),
        "sampling": Sampling(batch_size=BATCH, max_new_tokens=4),
    }
    if stage is rejection_sampling:
        recipe: Any = RejectionSamplingRecipe(**shared | {"num_samples": 2} | settings)
    else:
        recipe = ContextDistillationRecipe(**shared | {"preprompts": str(preprompts)} | settings)
    return stage.run(recipe), echo.asked


STAGES = pytest.mark.parametrize("stage", [rejection_sampling, context_distillation], ids=["rejection", "distillation"])


@STAGES
def test_all_of_one_batch_is_a_fifth_of_five(
    stage: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, asked = run_stage(stage, tmp_path, tiny_model, Deaf({"Question 4": "too long"}), monkeypatch)
    assert artifact is not None
    assert len(asked) == 10
    assert len((artifact.path / "records.jsonl").read_text().splitlines()) == 4
    assert artifact.metrics.get("num_unscored", 2) == 2


@STAGES
def test_above_the_limit_a_stage_stops_and_goes_on_under_a_higher_one(
    stage: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of five prompts, so four of the ten answers that are drawn, and two of the five of either kind."""
    deaf = Deaf({"Question 1": "too long", "Question 4": "empty"})
    told = "4 of 10" if stage is rejection_sampling else "2 of 5"
    with pytest.raises(ScorerError, match=rf"left {told} answers unscored, over max_unscored=0.2: too long \("):
        run_stage(stage, tmp_path, tiny_model, deaf, monkeypatch)
    assert not (tmp_path / "output" / "records.jsonl").exists()
    artifact, asked = run_stage(stage, tmp_path, tiny_model, deaf, monkeypatch, max_unscored=0.4)
    assert artifact is not None
    assert asked == [], "all of it had been sampled"
    assert not (tmp_path / "output.1").exists(), "nothing was moved aside"
    assert not (tmp_path / "output" / "chunks").exists()


@STAGES
def test_what_may_pass_is_asked_again(
    stage: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = Deaf({"Question 4": "time-out"}, transient=True)
    with pytest.raises(ScorerError, match=r"deaf.* left \d of \d+ answers unscored, over max_unscored=0.1: time-out"):
        run_stage(stage, tmp_path, tiny_model, busy, monkeypatch, max_unscored=0.1)
    artifact, asked = run_stage(stage, tmp_path, tiny_model, Deaf({}), monkeypatch, max_unscored=0.1)
    assert artifact is not None
    assert asked == ["Question 4?"] * 2, "the batch with the time-out alone"
    assert len((artifact.path / "records.jsonl").read_text().splitlines()) == 5


def test_distillation_counts_each_kind_of_answer_by_itself(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of the five distilled answers are three of the ten answers, which would pass a limit of 0.4."""
    deaf = Deaf({f"Be careful. Question {number}": "no" for number in range(3)})
    with pytest.raises(ScorerError, match="asked about the distilled answers, left 3 of 5"):
        run_stage(context_distillation, tmp_path, tiny_model, deaf, monkeypatch, max_unscored=0.4)


def test_samples_without_score_are_counted_where_their_prompt_has_others(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def every_other(_: Conversation) -> float | None:
        calls.append(1)
        return None if len(calls) % 2 else 1.0

    half = FunctionScorer(every_other, name="half")
    artifact, _ = run_stage(rejection_sampling, tmp_path, tiny_model, half, monkeypatch, max_unscored=0.5)
    assert artifact is not None
    assert artifact.metrics["num_kept"] == 5
    assert artifact.metrics["num_unscored"] == 5
    assert list(outcome_lines(artifact.metrics)) == ["answers without a score: 5"]
    rows = [json.loads(line) for line in (artifact.path / "samples_scored.jsonl").read_text().splitlines()]
    assert rows[0]["scores"] == [None, 1.0]
    assert rows[0]["reasons"] == ["half returned None", None]


def test_the_limit_is_no_part_of_a_recipe_s_hash() -> None:
    data = Data(sources=[Source(name="starter_safety")])
    shared: dict[str, Any] = {"output_dir": "unused", "scorer": RefusalScorer()}
    sampled = shared | {"model": "unused", "prompts": data}
    for kind, settings in (
        (RejectionSamplingRecipe, sampled),
        (ContextDistillationRecipe, sampled),
        (LabelRecipe, shared | {"data": data}),
    ):
        assert kind(**settings).hash == kind(**settings, max_unscored=0.9).hash
        assert kind(**settings).hash != kind(**settings, seed=1).hash


def test_the_limit_is_a_share_of_what_was_asked() -> None:
    check_unscored(["no"], num_answers=5, name="judge", limit=0.2)
    check_unscored([], num_answers=0, name="judge", limit=0.0)
    check_unscored(["no"] * 29, num_answers=100, name="judge", limit=0.29)
    with pytest.raises(ScorerError, match=r"judge left 1 of 5 answers unscored, over max_unscored=0: no \(1\)$"):
        check_unscored(["no"], num_answers=5, name="judge", limit=0.0)
    reasons = ["a", "b", "c", "b", "d", "c", "b", "a"]
    with pytest.raises(ScorerError, match=r"left 8 of 8 .*: b \(3\), a \(2\), c \(2\)$"):
        check_unscored(reasons, num_answers=8, name="judge", limit=0.5)


@pytest.mark.parametrize("transient", [False, True])
def test_a_combination_knows_what_may_pass(transient: bool) -> None:
    deaf: Any = Deaf({"?": "time-out"}, transient=transient)
    deaf.scale = "logit"
    fine = FunctionScorer(constant, name="fine", scale="logit")
    combined: list[Scorer] = [
        PiecewiseScorer(deaf, fine),
        PiecewiseScorer(fine, deaf),
        MinimumScorer((fine, deaf)),
        NegatedScorer(deaf),
        MinimumScorer((PiecewiseScorer(deaf, fine), fine)),
    ]
    for scorer in combined:
        (score,) = scorer.score([Prompt.of("Hi").answer("?")])
        assert (score.value, score.transient) == (None, transient)
        assert "time-out" in str(score.reason)


def test_what_became_of_the_rows_is_said() -> None:
    told = list(outcome_lines({"outcomes": {"kept": 5, "unscored": 1}, "dropped": {}, "num_prompts": 6}))
    assert told == ["outcomes: kept: 5, unscored: 1"]
    assert list(outcome_lines({"num_unscored": 0})) == []
