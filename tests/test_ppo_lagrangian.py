"""PPO on Safe RLHF's Lagrangian: the multiplier follows the mean cost of each iteration, over a resume too."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import pytest

from alignment.__main__ import main
from alignment.artifact import sha256
from alignment.stages import ppo
from reward.conversation import Conversation, Prompt
from reward.scorer import FunctionScorer, LagrangianScorer
from tests.interrupted import history, ppo_words
from tests.one_process import breaking_off, forget_accelerate

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("on_cpu_in_repository")
LIMIT, RATE, MAXIMUM = -9.0, 0.3, 2.0
WORDS = (
    "--scorer",
    "{type: lagrangian, reward: {type: python, function: tests.scorers:always_the_same}, "
    "cost: {type: python, function: tests.scorers:shorter_is_better}}",
    *("--ppo.multiplier_max", str(MAXIMUM), "--ppo.num_iterations", "3", "--sampling.max_new_tokens", "4"),
)


def run(parents: Path, output: Path, *overrides: str) -> int:
    forget_accelerate()
    return main(ppo_words(parents, output, *WORDS, *overrides))


def following(rate: float) -> tuple[str, ...]:
    """Overrides: how fast the multiplier follows the cost."""
    return ("--ppo.cost_limit", str(LIMIT), "--ppo.multiplier_learning_rate", str(rate))


def answers(*texts: str) -> list[Conversation]:
    return [Prompt.of("Question?").answer(text) for text in texts]


def test_costs_are_those_of_the_answers_that_were_scored() -> None:
    reward = FunctionScorer(lambda conversation: None if conversation.completion == "?" else 6.0, name="reward")
    safety = FunctionScorer(lambda conversation: -float(len(conversation.completion)), name="safety")
    scores, costs = LagrangianScorer(reward, safety, multiplier=2.0).with_costs(answers("ab", "?", "abcd"))
    assert costs == [2.0, 4.0]
    assert [score.value for score in scores] == pytest.approx([(6 - 2 * 2) / 3, None, (6 - 2 * 4) / 3])
    assert scores[1].reason == "reward: reward returned None"


def test_the_multiplier_follows_the_mean_cost(parents: Path, tmp_path: Path) -> None:
    """The cost is the length of an answer in characters, all of which are over the limit."""
    assert run(parents, tmp_path / "ppo", *following(RATE)) == 0
    rows = history(tmp_path / "ppo")
    assert rows[0]["ppo/multiplier"] == 1.0, "the recipe's"
    for before, after in itertools.pairwise(rows):
        step = RATE * before["ppo/multiplier"] * (before["ppo/cost_mean"] - LIMIT)
        expected = min(before["ppo/multiplier"] * math.exp(step), MAXIMUM)
        assert after["ppo/multiplier"] == pytest.approx(expected, rel=1e-6)
    assert rows[-1]["ppo/multiplier"] == MAXIMUM


def test_a_resumed_run_has_the_multiplier_of_its_iteration(parents: Path, tmp_path: Path) -> None:
    slowly = following(RATE / 100)  # so that it moves each time, and not to its maximum
    assert run(parents, tmp_path / "whole", *slowly) == 0
    with breaking_off(ppo, "judge", call=3):
        run(parents, tmp_path / "ppo", *slowly)
    assert run(parents, tmp_path / "ppo", *slowly) == 0
    rows = history(tmp_path / "ppo")
    assert rows == history(tmp_path / "whole")
    assert len({row["ppo/multiplier"] for row in rows}) == 3
    assert sha256(tmp_path / "ppo" / "model.safetensors") == sha256(tmp_path / "whole" / "model.safetensors")
