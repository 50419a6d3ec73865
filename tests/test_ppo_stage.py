"""`alignment.stages.ppo`: answers without a score, and what is said of a rollout."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from alignment.ppo_state import LoopState
from alignment.rollout import Rollout
from alignment.stages.ppo import judge, rollout_metrics
from reward.conversation import Conversation, Prompt
from reward.scorer import FunctionScorer, LagrangianScorer, Score, Scorer
from tests.tiny_ppo import ppo_recipe

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 20


def run_of(scorer: Scorer | None = None, *, elsewhere: int = 0, processes: int = 1) -> Any:
    """What `judge` and `rollout_metrics` use of a run; `elsewhere`: what the other processes add to a sum."""

    def reduce(values: Tensor, reduction: str = "sum") -> Tensor:
        assert reduction == "sum"
        return values + elsewhere

    recipe = ppo_recipe(Path("unused"), batch_size=ROWS * processes)
    return SimpleNamespace(scorer=scorer, recipe=recipe, accelerator=SimpleNamespace(device="cpu", reduce=reduce))


def rollout_of(*texts: str, **tensors: Tensor) -> Any:
    return SimpleNamespace(conversations=[Prompt.of("Question?").answer(text) for text in texts], **tensors)


def known(conversation: Conversation) -> float | None:
    return None if conversation.completion == "?" else 1.0


PLAIN = FunctionScorer(known, name="plain")
LAGRANGIAN = LagrangianScorer(FunctionScorer(known, name="reward"), FunctionScorer(lambda _: 2.0, name="safety"))


@pytest.mark.parametrize(
    ("scorer", "reason"),
    [(PLAIN, "plain returned None"), (LAGRANGIAN, "reward: reward returned None")],
    ids=["plain", "lagrangian"],
)
@pytest.mark.parametrize(("missing", "share"), [(ROWS, "100%"), (2, "10%")])
def test_too_many_unscored_answers_stop_with_their_reason(
    scorer: Scorer, reason: str, missing: int, share: str
) -> None:
    rollout = rollout_of(*["?"] * missing, *["an answer"] * (ROWS - missing))
    with pytest.raises(RuntimeError, match=rf"left {share} of the answers unscored \(limit 5%\): \['{reason}'\]"):
        judge(run_of(scorer), rollout, LoopState())


@pytest.mark.parametrize("scorer", [PLAIN, LAGRANGIAN], ids=["plain", "lagrangian"])
def test_one_in_twenty_may_be_unscored(scorer: Scorer) -> None:
    scores, costs = judge(run_of(scorer), rollout_of("?", *["an answer"] * (ROWS - 1)), LoopState())
    assert [score.value is None for score in scores] == [True] + [False] * (ROWS - 1)
    assert costs.get("cost_mean", -2.0) == -2.0, "over the answers that were scored"


def test_all_processes_stop_when_the_answers_of_one_are_unscored() -> None:
    """20 of 40 answers are here, all of them scored; of those elsewhere 2 may lack a score, not 4."""
    rollout = rollout_of(*["an answer"] * ROWS)
    judge(run_of(PLAIN, elsewhere=2, processes=2), rollout, LoopState())
    with pytest.raises(RuntimeError, match=r"left 10% of the answers unscored \(limit 5%\): \[\]"):
        judge(run_of(PLAIN, elsewhere=4, processes=2), rollout, LoopState())


@pytest.mark.parametrize("seed", range(3))
def test_what_is_said_of_a_rollout(seed: int) -> None:
    """Over the tokens and rows that count, in numpy; explained variance: 1 - Var[return - value] / Var[return]."""
    numbers = np.random.default_rng(seed)
    lengths = np.array([3, 1, 4, 2])
    mask = np.arange(4) < lengths[:, None]
    logprobs, ref_logprobs, entropies, values, kl, returns = (numbers.normal(size=(6, 4, 4)) * mask).astype(np.float32)
    rollout = Rollout(
        rollout_of("I cannot help with that.", "Bread.", "Rain.", "").conversations,
        prompt_ids=[],
        completion_ids=[],
        finished=torch.tensor([True, True, False, True]),
        completion_mask=torch.tensor(mask),
        sampled_logprobs=torch.tensor(logprobs),
        logprobs=torch.tensor(logprobs),
        ref_logprobs=torch.tensor(ref_logprobs),
        entropies=torch.tensor(entropies),
        values=torch.tensor(values),
    )
    scores = [Score(0.5, branch="safety"), Score(2.0, branch="helpfulness"), Score(None, "no"), Score(-1.0)]
    found = rollout_metrics(run_of(), rollout, scores, *map(torch.tensor, (mask, kl, returns)))
    expected = {
        "score_mean": 0.5,
        "safety_branch_share": 0.25,
        "kl": kl.sum() / 4,
        "kl_k1": (logprobs - ref_logprobs).sum() / 4,
        "entropy": entropies[mask].mean(),
        "completion_tokens": 2.5,
        "finished_share": 0.75,
        "refusal_rate": 0.25,
        "unscored": 1,
        "explained_variance": 1 - np.var((returns - values)[mask]) / np.var(returns[mask]),
    }
    assert found == pytest.approx(expected, rel=1e-5)
