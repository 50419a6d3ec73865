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

pytestmark = pytest.mark.usefixtures("on_cpu_in_repository")
LENGTH = 4
"""Tokens of an answer, and so the highest score; an answer that ends early loses what it could have had."""
PROMPTS = [Prompt.of(text) for text in ("Hi", "Rain", "Bread", "Shade")]
SETTINGS: dict[str, Any] = {
    "batch_size": 64,
    "mini_batch_size": 16,
    "per_device_batch_size": 16,
    "num_ppo_epochs": 4,
    "learning_rate": 5e-3,
    "adam_beta2": 0.99,
    "weight_decay": 0.0,
    "value_trunk": "shared",
    "value_coef": 1.0,
    "value_clip_range": 10.0,
    "whiten_scores": "none",  # the optimum is known in its own units
    "missing_eos_penalty": 0.0,
    "save_steps": 1000,
}
SLOW: dict[str, Any] = {"num_iterations": 12, "learning_rate": 2e-3, "num_ppo_epochs": 1, "value_coef": 0.01}


def history(model: Path, folder: Path, *, scorer: str = "count_sixes", **settings: Any) -> list[dict[str, float]]:
    """The metrics of every iteration of a run."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(prompt.to_json()) + "\n" for prompt in PROMPTS))
    recipe: PpoRecipe = ppo_recipe(
        model,
        output_dir=str(folder / "ppo"),
        prompts=Data(sources=[Source(name="file", path=str(prompts), split="all")]),
        scorer=PythonScorer(function=f"tests.scorers:{scorer}"),
        sampling=Sampling(max_new_tokens=LENGTH, batch_size=64),
        **SETTINGS | settings,
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
    rows = history(tiny_model, tmp_path, seed=seed, num_iterations=24)
    assert rows[0]["kl"] == 0, "policy and reference are equal, to the bit"
    assert rows[0]["score_mean"] < 0.05 * LENGTH
    assert mean(rows[-3:], "score_mean") >= 0.95 * LENGTH
    assert 0.9 * distance < mean(rows[-3:], "kl") <= distance + 0.01
    assert max(row["explained_variance"] for row in rows) > 0.5, "while scores differ; in the end they hardly do"


@pytest.mark.parametrize(("where", "estimator"), [("reward", "k1"), ("loss", "k2"), ("loss", "k3")])
def test_with_a_large_coefficient_it_stays_at_the_start(
    where: str, estimator: str, distance: float, tiny_model: Path, tmp_path: Path
) -> None:
    rows = history(tiny_model, tmp_path, **SLOW, kl_in=where, kl_estimator=estimator, kl_coef=20.0)
    assert rows[0]["kl"] == 0
    assert max(row["kl_k1"] for row in rows) < 0.05 * distance
    assert max(row["score_mean"] for row in rows) < 0.05 * LENGTH


def test_without_one_it_leaves_under_the_same_settings(distance: float, tiny_model: Path, tmp_path: Path) -> None:
    rows = history(tiny_model, tmp_path, **SLOW, kl_coef=0.0)
    assert rows[-1]["kl_k1"] > 0.1 * distance
    assert rows[-1]["score_mean"] > 0.05 * LENGTH


def test_while_the_critic_warms_up_it_learns_and_the_policy_stays_as_it_is(tiny_model: Path, tmp_path: Path) -> None:
    """The score depends on the prompt alone, so that a value model can know all of it from the first token on."""
    rows = history(
        tiny_model,
        tmp_path,
        scorer="length_of_the_prompt",
        num_iterations=6,
        critic_warmup_iterations=6,
        value_trunk="separate",
        weight_decay=0.1,
    )
    assert [row["kl"] for row in rows] == [0.0] * 6
    assert rows[0]["explained_variance"] < 0.1
    assert rows[-1]["explained_variance"] > 0.5
    start, end = (load_model(str(path), init=ModelInit()).state_dict() for path in (tiny_model, tmp_path / "ppo"))
    assert all(torch.equal(end[name], value) for name, value in start.items())
