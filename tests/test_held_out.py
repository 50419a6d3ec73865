"""Held-out prompts: their mean score, the best policy that they choose, and the end of patience."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from alignment import ppo_update
from alignment.__main__ import main
from alignment.artifact import read_artifact, sha256
from alignment.checkpoints import list_checkpoints
from alignment.generate import Generator
from alignment.held_out import HeldOut
from alignment.ppo_state import Checkpoints
from alignment.recipe import Sampling
from reward.conversation import Conversation
from reward.scorer import FunctionScorer, ScorerError
from tests import tiny_ppo
from tests.interrupted import history, ppo_words
from tests.one_process import breaking_off
from tests.tiny_ppo import PROMPTS

if TYPE_CHECKING:
    from pathlib import Path

    from alignment.ppo_state import LoopState
    from reward.render import Renderer

pytestmark = pytest.mark.usefixtures("on_cpu_in_repository")
model, renderer = tiny_ppo.model, tiny_ppo.renderer  # fixtures
WEIGHTS = "model.safetensors"


# -------------------------------------------------------------------------------------------------------- the score


def measured(
    model: Any,
    renderer: Renderer,
    scorer: FunctionScorer,
    *,
    temperature: float = 0.0,
    batch_size: int = 2,
    max_unscored: float = 0.2,
) -> dict[str, float]:
    from accelerate import Accelerator

    generator = Generator(model, renderer, Sampling(temperature=temperature, max_new_tokens=6, batch_size=batch_size))
    held_out = HeldOut(PROMPTS, generator, scorer)
    return held_out.metrics(model, Accelerator(cpu=True), seed=3, max_unscored=max_unscored)


def test_the_score_is_the_mean_over_the_answers_that_were_scored(model: Any, renderer: Renderer) -> None:
    greedy = Generator(model, renderer, Sampling(temperature=0.0, max_new_tokens=6, batch_size=1))
    texts = [greedy.answer([prompt], seed=0)[0].text for prompt in PROMPTS]
    expected = sum(map(len, texts[1:])) / (len(texts) - 1)

    def length(conversation: Conversation) -> float | None:
        return None if conversation.prompt == PROMPTS[0] else float(len(conversation.completion))

    found = measured(model, renderer, FunctionScorer(length))
    assert found == {"held_out_score": pytest.approx(expected), "held_out_unscored": 1}
    with pytest.raises(ScorerError, match=r"\(held-out prompts\) left 1 of 7 answers unscored, over max_unscored=0.1"):
        measured(model, renderer, FunctionScorer(length), max_unscored=0.1)


def test_sampled_answers_are_the_same_each_time_and_in_any_batch(model: Any, renderer: Renderer) -> None:
    scorer = FunctionScorer(
        lambda conversation: float(int(hashlib.sha256(conversation.completion.encode()).hexdigest()[:6], 16))
    )
    first, second, alone = (measured(model, renderer, scorer, temperature=1.0, batch_size=n) for n in (2, 2, 1))
    assert first == second == alone != measured(model, renderer, scorer)


def test_a_scorer_that_scores_nothing_is_an_error(model: Any, renderer: Renderer) -> None:
    with pytest.raises(ScorerError, match="broken scored none of the held-out answers"):
        measured(model, renderer, FunctionScorer(lambda _: None, name="broken"), max_unscored=1.0)


# ---------------------------------------------------------------------------------------------------- the best policy


def run(parents: Path, output: Path, *overrides: str) -> int:
    small = ("--sampling.max_new_tokens", "4", "--prompts.sources.0.max_rows", "8")
    return main(ppo_words(parents, output, *small, *overrides))


HELD_OUT = (
    "--eval_prompts",
    "{max_length: 512, sources: [{name: starter_twins, max_rows: 2}]}",
    "--ppo.eval_steps",
    "1",
)


class Scripted:
    """Held-out scores by the weights that are asked: new weights get the next of the script."""

    def __init__(self, script: list[float]) -> None:
        self.script = script
        self.known: dict[str, float] = {}

    def metrics(self, held_out: HeldOut, engine: Any, accelerator: Any, **_: Any) -> dict[str, float]:
        digest = hashlib.sha256()
        for parameter in engine.policy.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        score = self.known.setdefault(digest.hexdigest(), self.script[min(len(self.known), len(self.script) - 1)])
        return {"held_out_score": score, "held_out_unscored": 0}


def script(monkeypatch: pytest.MonkeyPatch, *scores: float) -> Scripted:
    scripted = Scripted(list(scores))
    monkeypatch.setattr(HeldOut, "metrics", lambda *args, **kwargs: scripted.metrics(*args, **kwargs))
    return scripted


def held_out_scores(output: Path) -> list[float | None]:
    return [row.get("ppo/held_out_score") for row in history(output)]


def test_the_stage_leaves_the_best_policy_and_says_which(
    parents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(parents, tmp_path / "two", "--ppo.num_iterations", "2") == 0
    scripted = script(monkeypatch, 0.1, 0.9, 0.2, 0.3)
    assert run(parents, tmp_path / "best", "--ppo.num_iterations", "4", *HELD_OUT) == 0
    assert len(scripted.known) == 4
    assert sha256(tmp_path / "best" / WEIGHTS) == sha256(tmp_path / "two" / WEIGHTS)
    assert held_out_scores(tmp_path / "best") == [0.1, 0.9, 0.2, 0.3]
    metrics = read_artifact(tmp_path / "best").metrics
    assert (metrics["held_out_score"], metrics["best_iteration"]) == (0.9, 2)


def test_a_best_that_is_damaged_is_named_and_the_last_policy_stays(
    parents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(parents, tmp_path / "whole", "--ppo.num_iterations", "3") == 0
    best = tmp_path / "ppo" / "checkpoints" / "iteration-1"
    script(monkeypatch, 0.9, 0.1, 0.2)
    load_best = Checkpoints.load_best

    def damaged(checkpoints: Checkpoints, loop: LoopState) -> int | None:
        (best / "weights.safetensors").write_bytes(b"")
        return load_best(checkpoints, loop)

    monkeypatch.setattr(Checkpoints, "load_best", damaged)
    assert run(parents, tmp_path / "ppo", "--ppo.num_iterations", "3", *HELD_OUT) == 0
    assert f"warning: the best checkpoint {best} is damaged: weights.safetensors has 0 bytes" in capfd.readouterr().err
    assert sha256(tmp_path / "ppo" / WEIGHTS) == sha256(tmp_path / "whole" / WEIGHTS)
    metrics = read_artifact(tmp_path / "ppo").metrics
    assert (metrics["held_out_score"], metrics.get("best_iteration")) == (0.2, None)


def test_it_stops_when_patience_ends(parents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, 0.5, 0.4, 0.4, 0.9)
    words = ("--ppo.num_iterations", "6", "--ppo.early_stopping_patience", "2", *HELD_OUT)
    assert run(parents, tmp_path / "ppo", *words) == 0
    assert held_out_scores(tmp_path / "ppo") == [0.5, 0.4, 0.4]
    assert read_artifact(tmp_path / "ppo").metrics["best_iteration"] == 1


@pytest.mark.parametrize("call", [13, 17])
def test_the_best_outlives_a_fault_and_the_limit_of_checkpoints(
    call: int, parents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One checkpoint is kept, and the best of the first iteration beside it; four micro-batches an iteration."""
    words = ("--ppo.num_iterations", "5", "--ppo.save_total_limit", "1", *HELD_OUT)
    scripted = script(monkeypatch, 0.9, 0.1, 0.2, 0.3, 0.4)
    assert run(parents, tmp_path / "whole", *words) == 0
    with breaking_off(ppo_update, "loss_of", call=call):
        run(parents, tmp_path / "ppo", *words)
    kept = [path.name for path in list_checkpoints(tmp_path / "ppo" / "checkpoints")]
    assert kept == ["iteration-1", f"iteration-{(call - 1) // 4}"]
    state = json.loads((tmp_path / "ppo" / "checkpoints" / kept[-1] / "state.json").read_text())["loop"]
    assert (state["best_iteration"], state["best_score"]) == (1, 0.9)
    assert run(parents, tmp_path / "ppo", *words) == 0
    assert sha256(tmp_path / "ppo" / WEIGHTS) == sha256(tmp_path / "whole" / WEIGHTS)
    assert history(tmp_path / "ppo") == history(tmp_path / "whole")
    assert len(scripted.known) == 5, "the resumed run had the very weights of the uninterrupted one"
