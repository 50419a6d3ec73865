"""PPO on a task with a known optimum: a scorer that counts a token, so that answers made of it alone are the best."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from alignment.policy import load_model, load_tokenizer
from alignment.recipe import Data, ModelInit, PpoRecipe, Sampling, Source
from alignment.recipe_scorers import PythonScorer
from alignment.stages import ppo
from reward.conversation import Prompt
from reward.render import Renderer
from tests.tiny_ppo import PAD, logprobs_alone, ppo_recipe

if TYPE_CHECKING:
    from pathlib import Path

LENGTH = 4
"""Tokens of an answer, and so the highest score; an answer that ends early loses what it could have had."""
PROMPTS = [Prompt.of(text) for text in ("Hi", "Rain", "Bread", "Shade")]
FAST: dict[str, Any] = {
    "batch_size": 64,
    "mini_batch_size": 32,
    "per_device_batch_size": 32,
    "num_ppo_epochs": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
    "adam_beta2": 0.99,
    "weight_decay": 0.0,
    "value_trunk": "shared",
    "value_coef": 1.0,
    "missing_eos_penalty": 0.0,
    "save_steps": 1000,
}


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.state import AcceleratorState, PartialState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(True)
    PartialState._reset_state()


def history(model: Path, folder: Path, **settings: Any) -> list[dict[str, float]]:
    """The metrics of every iteration of a run."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(prompt.to_json()) + "\n" for prompt in PROMPTS))
    recipe: PpoRecipe = ppo_recipe(
        model,
        output_dir=str(folder / "ppo"),
        prompts=Data(sources=[Source(name="file", path=str(prompts))]),
        scorer=PythonScorer(function="tests.scorers:count_sixes"),
        sampling=Sampling(max_new_tokens=LENGTH, batch_size=64),
        **FAST | settings,
    )
    ppo.run(recipe)
    rows = (folder / "ppo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{name.removeprefix("ppo/"): value for name, value in json.loads(row).items()} for row in rows]


@pytest.fixture(scope="module")
def distance(tiny_model: Path) -> float:
    """Nats from the start to the best answer, mean over the prompts: -log pi_0(best answer)."""
    tokenizer = load_tokenizer(str(tiny_model))
    model = load_model(str(tiny_model), init=ModelInit(), pad_token_id=PAD).eval()
    best = LENGTH * tokenizer.encode("6", add_special_tokens=False)
    assert len(best) == LENGTH
    renderer = Renderer(tokenizer)
    logprobs = [logprobs_alone(model, renderer.render_prompt(prompt), best, temperature=1.0) for prompt in PROMPTS]
    return -torch.stack(logprobs).sum(dim=1).mean().item()


def mean(rows: list[dict[str, float]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


@pytest.mark.parametrize("seed", range(3))
def test_it_learns_the_optimum_at_no_more_divergence_than_it_takes(
    seed: int, distance: float, tiny_model: Path, tmp_path: Path
) -> None:
    """KL(pi || pi_0) <= -log pi_0(best answer) holds for the optimum of score - beta * KL, whatever beta: the policy
    that gives the best answer alone has at least its score at that divergence.
    """
    rows = history(tiny_model, tmp_path, seed=seed, num_iterations=22)
    assert rows[0]["kl"] == 0, "policy and reference are equal, to the bit"
    assert rows[0]["score_mean"] < 0.1 * LENGTH
    assert mean(rows[-3:], "score_mean") >= 0.95 * LENGTH
    assert 0.5 * distance < mean(rows[-3:], "kl") < distance + 0.5
    assert max(row["explained_variance"] for row in rows[1:]) > 0.5
    assert min(row["explained_variance"] for row in rows[1:4]) < 0.2, "it was not so from the start"
