"""`alignment.stages.ppo`: answers without a score, and what is said of a rollout."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from alignment.__main__ import main
from alignment.distributed import close, make_accelerator
from alignment.objectives import Moments
from alignment.ppo_state import LoopState
from alignment.rollout import Rollout
from alignment.stages.ppo import judge, rollout_metrics, whiten_scores
from reward.conversation import Conversation, Prompt
from reward.scorer import FunctionScorer, LagrangianScorer, Score, Scorer, ScorerError
from tests.interrupted import history, make_parents, ppo_words
from tests.one_process import forget_accelerate
from tests.ranks import on_ranks
from tests.tiny_ppo import ppo_recipe

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 20


def run_of(scorer: Scorer | None = None, *, processes: int = 1) -> Any:
    """What `judge` and `rollout_metrics` use of a run."""

    def reduce(values: Tensor, reduction: str = "sum") -> Tensor:
        assert reduction == "sum"
        return values

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
@pytest.mark.parametrize("missing", [ROWS, 2])
def test_too_many_unscored_answers_stop_with_their_reason(scorer: Scorer, reason: str, missing: int) -> None:
    rollout = rollout_of(*["?"] * missing, *["an answer"] * (ROWS - missing))
    told = rf"left {missing} of 20 answers unscored, over max_unscored=0.05: {reason} \({missing}\)"
    with pytest.raises(ScorerError, match=told):
        judge(run_of(scorer), rollout, LoopState())


def test_where_none_is_scored_no_limit_lets_it_pass() -> None:
    run = run_of(PLAIN)
    run.recipe = run.recipe.model_copy(update={"max_unscored": 1.0})
    with pytest.raises(ScorerError, match="plain scored none of the 20 answers: plain returned None"):
        judge(run, rollout_of(*["?"] * ROWS), LoopState())


@pytest.mark.parametrize("scorer", [PLAIN, LAGRANGIAN], ids=["plain", "lagrangian"])
def test_one_in_twenty_may_be_unscored(scorer: Scorer) -> None:
    scores, costs = judge(run_of(scorer), rollout_of("?", *["an answer"] * (ROWS - 1)), LoopState())
    assert [score.value is None for score in scores] == [True] + [False] * (ROWS - 1)
    assert costs.get("cost_mean", -2.0) == -2.0, "over the answers that were scored"


def judged_where_the_second_rank_misses(missing: int) -> str:
    """What a rank says of its share of 40 answers, of which the second one has `missing` without a score."""
    accelerator = make_accelerator()
    here = missing * accelerator.process_index
    rollout = rollout_of(*["?"] * here, *["an answer"] * (ROWS - here))
    try:
        judge(run_of(PLAIN, processes=2), rollout, LoopState())
    except ScorerError as error:
        return str(error)
    finally:
        close(accelerator)
    return "fine"


@pytest.mark.parametrize("missing", [2, 4])
def test_all_processes_stop_alike_when_the_answers_of_one_are_unscored(missing: int) -> None:
    """Of 40 answers 2 may lack a score, not 4; the rank that scored all of its own tells the others' reasons."""
    told = on_ranks(judged_where_the_second_rank_misses, missing, environment={})
    stopped = "plain left 4 of 40 answers unscored, over max_unscored=0.05: plain returned None (4)"
    assert told == [stopped if missing == 4 else "fine"] * 2


@pytest.mark.parametrize("seed", range(3))
def test_what_is_said_of_a_rollout(seed: int) -> None:
    """Over the tokens and rows that count, in numpy; explained variance: 1 - Var[return - value] / Var[return]."""
    numbers = np.random.default_rng(seed)
    lengths = np.array([3, 1, 4, 2])
    mask = np.arange(4) < lengths[:, None]
    scored = mask & (np.arange(4) != 2)[:, None]
    logprobs, ref_logprobs, entropies, values, kl, returns = (numbers.normal(size=(6, 4, 4)) * scored).astype(
        np.float32
    )
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
    found = rollout_metrics(run_of(), rollout, scores, *map(torch.tensor, (scored, kl, returns)))
    expected = {
        "score_mean": 0.5,
        "safety_branch_share": 1 / 3,
        "kl": kl.sum() / 3,
        "kl_k1": (logprobs - ref_logprobs).sum() / 3,
        "entropy": entropies[scored].mean(),
        "completion_tokens": 2.0,
        "finished_share": 0.75,
        "refusal_rate": 0.25,
        "unscored": 1,
        "explained_variance": 1 - np.var((returns - values)[scored]) / np.var(returns[scored]),
    }
    assert found == pytest.approx(expected, rel=1e-5)


def test_branches_are_whitened_by_themselves() -> None:
    """In numpy: helpfulness scores lie ten times as far apart as safety scores, and count the same."""
    values = np.array([20.0, 1.0, -30.0, 2.0, 40.0, 4.5])
    names = ["helpfulness", "safety"] * 3
    scores = [Score(value, branch=name) for value, name in zip(values, names, strict=True)]
    scores.append(Score(None, "no", branch="safety"))
    expected = np.zeros(7)
    for part in (slice(0, 6, 2), slice(1, 6, 2)):
        expected[part] = (values[part] - values[part].mean()) / np.sqrt(values[part].var() + 1e-8)
    run = run_of()
    run.recipe = ppo_recipe(Path("unused"), whiten_scores="branch", missing_eos_penalty=0.0)
    found, _, _ = whiten_scores(run, scores, SimpleNamespace(finished=torch.ones(7, dtype=torch.bool)), LoopState())
    assert found.numpy() == pytest.approx(expected, rel=1e-5)
    assert found[:6].square().sum() == pytest.approx(6, rel=1e-5), "each branch has variance 1"


@pytest.mark.parametrize("over", ["none", "batch", "running"])
def test_an_answer_that_was_cut_off_costs_the_penalty_after_whitening(over: str) -> None:
    """In numpy, over the answers that have a score; one without stays 0, finished or not."""
    values, finished = [2.0, -1.0, None, 0.5, None], np.array([True, False, False, False, True])
    scores = [Score(value, None if value is not None else "no") for value in values]
    valid = np.array([value is not None for value in values])
    known_values = np.array([value for value in values if value is not None])
    earlier = np.array([4.0, 8.0])
    seen = {"none": None, "batch": known_values, "running": np.concatenate([earlier, known_values])}[over]
    expected = np.zeros(5)
    expected[valid] = known_values if seen is None else (known_values - seen.mean()) / np.sqrt(seen.var() + 1e-8)
    expected -= 0.7 * (valid & ~finished)

    run = run_of()
    run.recipe = ppo_recipe(Path("unused"), whiten_scores=over, missing_eos_penalty=0.7)
    loop = LoopState(score_moments=Moments(earlier.mean(), earlier.var(), 2))
    rollout = SimpleNamespace(finished=torch.tensor(finished))
    found, scored, _ = whiten_scores(run, scores, rollout, loop)
    assert found.numpy() == pytest.approx(expected, rel=1e-5)
    assert scored.tolist() == valid.tolist()


def test_a_run_without_padding_is_a_run_with_padding(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Three iterations with a value model of its own; where the attention cannot go by text, the stage says so."""
    parents = make_parents(tmp_path / "parents", tiny_model)
    found: dict[str, list[dict[str, float]]] = {}
    for name, words in {
        "free": (),
        "padded": ("--ppo.padding_free", "false"),
        "eager": ("--model_init.attn_implementation", "eager"),
    }.items():
        forget_accelerate()
        assert main(ppo_words(parents, tmp_path / name, *words)) == 0
        found[name] = history(tmp_path / name)
        told = "texts are padded: attention 'eager' takes no block mask; use sdpa"
        assert (told in capfd.readouterr().out) == (name == "eager")
    for name in ("padded", "eager"):
        for ours, theirs in zip(found["free"], found[name], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=2e-5)
