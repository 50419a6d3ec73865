"""`alignment.recipe_file`: what recipes and pipelines may say, and what each fault is answered."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import yaml

from alignment.recipe import PpoRecipe, RewardModelRecipe, SftRecipe
from alignment.recipe_file import RecipeError, dump_recipe, load_pipeline
from tests.recipe_text import EVALUATE, PPO, REWARD_MODEL, SFT, fault, load

if TYPE_CHECKING:
    from pathlib import Path

# -------------------------------------------------------------------------------------------- good recipes


def test_a_short_recipe_has_the_papers_defaults(tmp_path: Path) -> None:
    sft = load(tmp_path, SFT)
    assert isinstance(sft, SftRecipe)
    assert sft.model_dump(exclude={"data", "wandb", "model_init"}) == {
        "stage": "sft",
        "output_dir": "out",
        "run_dir": None,
        "seed": 42,
        "float32_matmul_precision": "highest",
        "report_to": "none",
        "model": "m",
        "lora": None,
        "packing": True,
        "training": {  # Llama 2, section 3.1: 2 epochs, cosine from 2e-5, weight decay 0.1, batches of 64
            "learning_rate": 2e-5,
            "lr_scheduler_type": "cosine",
            "min_lr_ratio": 0.1,
            "warmup_ratio": 0.0,
            "warmup_min_steps": 0,
            "weight_decay": 0.1,
            "adam_beta1": 0.9,
            "adam_beta2": 0.95,
            "adam_epsilon": 1e-5,
            "max_grad_norm": 1.0,
            "num_train_epochs": 2.0,
            "max_steps": None,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 8,
            "gradient_checkpointing": False,
            "group_by_length": True,
            "logging_steps": 10,
            "save_steps": 200,
            "save_total_limit": 2,
        },
    }


def test_defaults_of_reward_models_and_ppo_are_the_papers(tmp_path: Path) -> None:
    """Llama 2, sections 3.2.2 and 3.2.3."""
    model = load(tmp_path, REWARD_MODEL)
    assert isinstance(model, RewardModelRecipe)
    training = model.training
    assert training.num_train_epochs == 1.0
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 512
    assert (training.learning_rate, training.lr_scheduler_type, training.min_lr_ratio) == (
        1e-5,
        "cosine_with_min_lr",
        0.1,
    )
    assert (training.warmup_ratio, training.warmup_min_steps) == (0.03, 5)
    ppo = load(tmp_path, PPO)
    assert isinstance(ppo, PpoRecipe)
    settings = ppo.ppo
    assert (settings.batch_size, settings.mini_batch_size, settings.num_ppo_epochs) == (512, 64, 1)
    assert (settings.clip_range, settings.learning_rate, settings.lr_scheduler_type) == (0.2, 1e-6, "constant")
    assert (settings.weight_decay, settings.max_grad_norm, settings.kl_coef) == (0.1, 1.0, 0.01)


def test_a_recipe_cannot_be_changed(tmp_path: Path) -> None:
    recipe = load(tmp_path, SFT)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1


def test_a_dumped_recipe_is_read_back_the_same(tmp_path: Path) -> None:
    for text in (SFT, REWARD_MODEL, PPO, EVALUATE, SFT + "lora: {r: 4}\nrun_dir: r\nwandb: {tags: [a, '1', 'null']}\n"):
        recipe = load(tmp_path, text)
        dumped = dump_recipe(recipe)
        assert load(tmp_path, dumped) == recipe
        assert yaml.safe_load(dumped)["seed"] == 42  # every default is spelled out


def test_text_that_looks_like_a_number_is_read_back_as_text(tmp_path: Path) -> None:
    recipe = load(tmp_path, SFT + "wandb: {name: '1e-4'}\n")
    assert load(tmp_path, dump_recipe(recipe)) == recipe


def test_the_hash_follows_the_result_and_not_where_it_is_written(tmp_path: Path) -> None:
    recipe = load(tmp_path, SFT)
    same = load(tmp_path, SFT, "--output_dir", "elsewhere", "--report_to", "wandb", "--wandb.name", "x", "--run_dir=y")
    assert same.hash == recipe.hash
    spelled_out = load(tmp_path, SFT, "--seed", "42", "--packing", "true")
    assert spelled_out.hash == recipe.hash
    for override in ("--seed=43", "--training.learning_rate=1e-5", "--data.sources.0.split=test", "--model=n"):
        assert load(tmp_path, SFT, override).hash != recipe.hash


# ------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        # null
        (SFT + "seed: null\n", "seed: Input should be a valid integer, got None"),
        (SFT + "training:\n", "training: Input should be a valid dictionary or instance of Training, got None"),
        # what is not finite
        (SFT + "training: {learning_rate: .nan}\n", "training.learning_rate: Input should be a finite number, got nan"),
        (SFT + "training: {learning_rate: .inf}\n", "training.learning_rate: Input should be a finite number, got inf"),
        (SFT + "training: {learning_rate: 1e-4, warmup_ratio: .nan}\n", "training.warmup_ratio: "),
        # loose types
        (SFT + "training: {learning_rate: true}\n", "training.learning_rate: Input should be a valid number, got True"),
        (SFT + "training: {learning_rate: '1e-4'}\n", "training.learning_rate: Input should be a valid number, got '1"),
        (SFT + "seed: '42'\n", "seed: Input should be a valid integer, got '42'"),
        (SFT + "seed: 1.0\n", "seed: Input should be a valid integer, got 1.0"),
        (SFT + "seed: true\n", "seed: Input should be a valid integer, got True"),
        (SFT + "packing: 1\n", "packing: Input should be a valid boolean, got 1"),
        (SFT + "packing: 'yes'\n", "packing: Input should be a valid boolean, got 'yes'"),
        (SFT.replace("model: m", "model: 7"), "model: Input should be a valid string, got 7"),
        # a list for a scalar, a scalar for a list or section
        (SFT + "seed: [1]\n", "seed: Input should be a valid integer"),
        (SFT + "wandb: {tags: a}\n", "wandb.tags: Input should be a valid list, got 'a'"),
        (SFT + "training: 5\n", "training: Input should be a valid dictionary or instance of Training, got 5"),
        (SFT.replace("[{name: a}]", "[a]"), "data.sources.0: Input should be a valid dictionary"),
        (SFT.replace("[{name: a}]", "[]"), "data.sources: List should have at least 1 item"),
        # ranges and choices
        (SFT + "seed: -1\n", "seed: Input should be greater than or equal to 0, got -1"),
        (SFT + "training: {learning_rate: 0}\n", "training.learning_rate: Input should be greater than 0, got 0"),
        (SFT + "model_init: {dtype: half}\n", "model_init.dtype: Input should be 'float32', 'bfloat16', "),
        (PPO + "sampling: {top_p: 0}\n", "sampling.top_p: Input should be greater than 0, got 0"),
        # missing keys
        (SFT.replace("model: m\n", ""), "the key 'model' is missing"),
        (SFT + "training: {max_steps: 3}\n", "the key 'training.learning_rate' is missing"),
        # unknown keys, each with the nearest one
        (SFT + "modle: m\n", "unknown key 'modle'; did you mean 'model'?"),
        (SFT + "training: {learning_rate: 1, max_step: 3}\n", "unknown key 'training.max_step'; did you mean"),
        (SFT + "data2: {}\n", "unknown key 'data2'; did you mean 'data'?"),
        (SFT + "quite_something_else: 1\n", "unknown key 'quite_something_else'"),
        (PPO + "ppo: {kl: 0.1}\n", "unknown key 'ppo.kl'"),
        # the stage
        (SFT.replace("stage: sft\n", ""), "stage must be one of sft, reward_model, "),
        (SFT.replace("stage: sft", "stage: stf"), "got 'stf'; did you mean 'sft'?"),
        # sections that do not fit together
        (REWARD_MODEL + "margin: {better: 1.0}\n", "margin needs one number for each of significantly_better, "),
        (PPO + "ppo: {batch_size: 10, mini_batch_size: 4}\n", "batch_size 10 must be a multiple of mini_batch_size 4"),
        (PPO + "value_model: v\nppo: {value_trunk: shared}\n", "value_model is only used with ppo.value_trunk: "),
        (PPO + "model_init: {quantization: nf4}\n", "a quantized policy trains only with lora"),
        (PPO.replace("type: refusal", "type: oracle"), "scorer: Input tag 'oracle' found using 'type' does not match"),
        (PPO.replace("{type: refusal}", "{type: python, function: os.getcwd}"), "scorer.python.function: "),
        (EVALUATE.replace("one: {type: refusal}, ", ""), "violation_scorers: Dictionary should"),
    ],
)  # fmt: skip
def test_a_fault_is_answered_with_its_key(tmp_path: Path, text: str, wrong: str) -> None:
    assert wrong in fault(tmp_path, text)


def test_every_fault_of_a_recipe_is_named_at_once(tmp_path: Path) -> None:
    message = fault(tmp_path, SFT + "seed: x\npackin: true\ntraining: {learning_rate: -1}\n")
    assert set(message.splitlines()) == {
        "seed: Input should be a valid integer, got 'x'",
        "training.learning_rate: Input should be greater than 0, got -1",
        "unknown key 'packin'; did you mean 'packing'?",
    }


@pytest.mark.parametrize(
    ("word", "nearest"), [("--learning_rate", "'training.learning_rate'"), ("--training.max", "max_steps'")]
)
def test_the_nearest_key_is_one_that_can_stand_there(tmp_path: Path, word: str, nearest: str) -> None:
    """Not: unknown key 'learning_rate', did you mean 'learning_rate'; nor for `training.max` a key of `data`."""
    message = fault(tmp_path, SFT + "training: {learning_rate: 1e-5}\n", word, "3")
    assert nearest in message.partition("did you mean")[2]


@pytest.mark.parametrize("number", [".nan", ".inf"])
def test_margins_and_weights_are_finite(tmp_path: Path, number: str) -> None:
    rest = "better: 2.0, slightly_better: 1.0, negligibly_better: 0.0"
    assert "margin" in fault(tmp_path, REWARD_MODEL + f"margin: {{significantly_better: {number}, {rest}}}\n")
    parts = f"{{type: weighted_sum, parts: [{{type: refusal}}], weights: [{number}]}}"
    assert "weights" in fault(tmp_path, PPO.replace("{type: refusal}", parts))


def test_a_weighted_sum_has_as_many_weights_as_parts(tmp_path: Path) -> None:
    parts = "{type: weighted_sum, parts: [{type: refusal}], weights: [0.5, 0.5]}"
    assert "weights" in fault(tmp_path, PPO.replace("{type: refusal}", parts))


def test_ppo_does_not_sample_greedily(tmp_path: Path) -> None:
    """Its log-probabilities are those of logits / temperature."""
    assert "temperature" in fault(tmp_path, PPO + "sampling: {temperature: 0}\n")


# ------------------------------------------------------------------------------------------------ pipelines


def test_a_pipeline_is_read_with_its_overrides(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.yaml"
    path.write_text("run_dir: r\nsteps: [{name: sft, recipe: a.yaml, overrides: {training.max_steps: 3}}]\n")
    pipeline = load_pipeline(path, ["--run_dir", "elsewhere", "--steps.0.launch", "b.yaml"])
    assert (pipeline.run_dir, pipeline.steps[0].launch) == ("elsewhere", "b.yaml")
    assert pipeline.steps[0].overrides == {"training.max_steps": 3}


@pytest.mark.parametrize(
    ("steps", "wrong"),
    [
        ("[]", "steps: List should have at least 1 item"),
        ("[{name: a, recipe: x}, {name: a, recipe: y}]", "the step name 'a' stands twice"),
        ("[{name: A/b, recipe: x}]", "steps.0.name: String should match pattern"),
        ("[{name: a, recpie: x}]", "unknown key 'steps.0.recpie'; did you mean 'recipe'?"),
    ],
)
def test_a_fault_in_a_pipeline_is_answered(tmp_path: Path, steps: str, wrong: str) -> None:
    path = tmp_path / "pipeline.yaml"
    path.write_text(f"run_dir: r\nsteps: {steps}\n")
    with pytest.raises(RecipeError) as caught:
        load_pipeline(path)
    assert wrong in str(caught.value)
