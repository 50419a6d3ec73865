"""Recipes of Llama 2 have the paper's numbers (arXiv 2307.09288), at every size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from alignment.recipe import PpoRecipe, RewardModelRecipe, SftRecipe, Source, StageRecipe
from alignment.recipe_file import load_pipeline, load_recipe
from tests.conftest import ROOT
from tests.test_recipes import recipes_of


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def per_step(recipe: StageRecipe, num_processes: int) -> int:
    assert isinstance(recipe, SftRecipe | RewardModelRecipe)
    training = recipe.training
    return training.per_device_train_batch_size * training.gradient_accumulation_steps * num_processes


def num_processes(launch: str) -> int:
    return yaml.safe_load(Path(launch).read_text(encoding="utf-8"))["num_processes"]


def llama2_steps() -> dict[str, tuple[StageRecipe, int]]:
    """Recipe and number of processes by step name."""
    pipeline = load_pipeline(Path("recipes/llama2-7b/pipeline.yaml"))
    return {step.name: (load_recipe(Path(step.recipe)), num_processes(step.launch)) for step in pipeline.steps}


def test_effective_batches_of_llama2_are_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = llama2_steps()
    assert steps.pop("judge_agreement")[1] == 1
    assert {processes for _, processes in steps.values()} == {8}
    assert per_step(*steps["sft"]) == 64  # section 3.1
    for name in ("safety_reward_model", "helpfulness_reward_model", "gold_reward_model"):
        assert per_step(*steps[name]) == 512  # section 3.2.2, pairs
    ppo, processes = steps["ppo"]
    assert isinstance(ppo, PpoRecipe)
    assert (ppo.ppo.batch_size, ppo.ppo.mini_batch_size) == (512, 64)  # section 3.2.3

    from alignment.stages.ppo import accumulation_steps

    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert ppo.ppo.per_device_batch_size * accumulation_steps(ppo) * processes == 64


@pytest.mark.parametrize(
    ("path", "processes", "kl_coef"),
    [
        ("recipes/llama2-7b/ppo.yaml", 8, 0.01),
        ("recipes/llama2-7b/ppo_lora.yaml", 8, 0.01),
        ("recipes/llama2-13b/ppo.yaml", 8, 0.01),
        ("recipes/llama2-13b/ppo_lora.yaml", 8, 0.01),
        ("recipes/llama2-70b/ppo.yaml", 32, 0.005),
        ("recipes/llama2-70b/ppo_lora.yaml", 8, 0.005),
    ],
)
def test_ppo_of_every_size_has_the_papers_numbers(
    path: str, processes: int, kl_coef: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Section 3.2.3; with adapters only the learning rate differs."""
    from alignment.stages.ppo import accumulation_steps

    recipe = load_recipe(Path(path))
    assert isinstance(recipe, PpoRecipe)
    ppo = recipe.ppo
    assert (ppo.batch_size, ppo.mini_batch_size, ppo.num_ppo_epochs, ppo.clip_range) == (512, 64, 1, 0.2)
    assert (ppo.kl_coef, ppo.weight_decay, ppo.max_grad_norm, ppo.whiten_scores) == (kl_coef, 0.1, 1.0, "batch")
    assert ppo.learning_rate == (1e-6 if recipe.lora is None else 1e-5)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert ppo.per_device_batch_size * accumulation_steps(recipe) * processes == 64


@pytest.mark.parametrize(
    ("path", "processes"), [("recipes/llama2-13b/sft.yaml", 8), ("recipes/llama2-70b/sft.yaml", 32)]
)
def test_fine_tuning_of_every_size_takes_64_windows_a_step(path: str, processes: int) -> None:
    assert per_step(load_recipe(Path(path)), processes) == 64  # section 3.1


@pytest.mark.parametrize("size", ["13b", "70b"])
@pytest.mark.parametrize("name", ["safety_reward_model", "helpfulness_reward_model"])
def test_reward_models_of_every_size_learn_alike(name: str, size: str) -> None:
    """The paper's numbers differ in the learning rate of 70B alone (3.2.2)."""
    small, large = recipes_of("llama2-7b")[name], recipes_of(f"llama2-{size}")[name]
    assert isinstance(small, RewardModelRecipe)
    assert isinstance(large, RewardModelRecipe)
    assert per_step(large, 32 if size == "70b" else 8) == 512
    assert large.training.learning_rate == (5e-6 if size == "70b" else 1e-5)
    geometry = {"per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate"}
    assert large.training.model_dump(exclude=geometry) == small.training.model_dump(exclude=geometry)
    assert (large.margin, large.auxiliary_loss_weight) == (small.margin, small.auxiliary_loss_weight)


def test_hyperparameters_of_llama2_are_the_papers() -> None:
    recipes = {name: recipe.model_dump() for name, (recipe, _) in llama2_steps().items()}

    def value(name: str, dotted: str) -> Any:
        found: Any = recipes[name]
        for key in dotted.split("."):
            found = found[key]
        return found

    adamw = {"adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-5, "weight_decay": 0.1, "max_grad_norm": 1.0}
    tuned = {"sft": "training", "safety_reward_model": "training", "helpfulness_reward_model": "training", "ppo": "ppo"}
    for name, section in tuned.items():
        assert {key: value(name, section)[key] for key in adamw} == adamw, name
    papers = {
        ("sft", "training.learning_rate"): 2e-5,
        ("sft", "training.lr_scheduler_type"): "cosine",
        ("sft", "training.num_train_epochs"): 2,
        ("sft", "data.max_length"): 4096,
        ("sft", "packing"): True,
        ("rejection_sampling", "num_samples"): 20,
        ("rejection_sampling", "sampling.temperature"): 1.2,
        ("ppo", "ppo.learning_rate"): 1e-6,
        ("ppo", "ppo.lr_scheduler_type"): "constant",
        ("ppo", "ppo.clip_range"): 0.2,
        ("ppo", "ppo.kl_coef"): 0.01,
        ("ppo", "ppo.num_iterations"): 400,
        ("ppo", "ppo.num_ppo_epochs"): 1,
        ("ppo", "scorer.threshold"): 0.15,
        ("evaluate", "sampling.temperature"): 0.1,
        ("evaluate", "sampling.top_p"): 0.9,
    }
    for name in ("safety_reward_model", "helpfulness_reward_model"):
        papers |= {
            (name, "training.learning_rate"): 1e-5,
            (name, "training.lr_scheduler_type"): "cosine_with_min_lr",
            (name, "training.min_lr_ratio"): 0.1,
            (name, "training.warmup_ratio"): 0.03,
            (name, "training.warmup_min_steps"): 5,
            (name, "training.num_train_epochs"): 1,
        }
    assert {place: value(*place) for place in papers} == papers


def test_llama2_reward_models_mix_their_pairs_as_the_paper_does() -> None:
    recipes = recipes_of("llama2-7b")

    def share(recipe: StageRecipe, name: str) -> float:
        assert isinstance(recipe, RewardModelRecipe)
        weights: dict[Source, float] = {source: source.weight or 0.0 for source in recipe.data.sources}
        return sum(weight for source, weight in weights.items() if source.name == name) / sum(weights.values())

    assert share(recipes["safety_reward_model"], "hh_helpful") == pytest.approx(0.1)  # 90 to 10
    assert share(recipes["helpfulness_reward_model"], "hh_helpful") == pytest.approx(0.5)  # as many from the rest
