"""RLOO and GRPO by TRL: they ask our scorer about our prompts, and take no key that they would not follow."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from alignment import group_baselines
from alignment.artifact import read_artifact, sha256
from alignment.group_baselines import arguments, reward_function
from alignment.recipe import Data, Lora, PpoRecipe, Sampling, Source
from alignment.recipe_scorers import PythonScorer
from alignment.source_files import SourceError
from alignment.stages import ppo
from reward.conversation import Conversation, Prompt
from reward.scorer import FunctionScorer, ScorerError
from tests import tiny_ppo
from tests.interrupted import LAYOUTS
from tests.ranks import on_ranks
from tests.tiny_ppo import ppo_recipe

if TYPE_CHECKING:
    from pathlib import Path

    from reward.render import Renderer

pytestmark = pytest.mark.usefixtures("on_cpu_in_repository")
renderer = tiny_ppo.renderer  # a fixture
PROMPTS = [Prompt.of("Hi"), Prompt.of("What is <|im_end|>?", is_safety=True), Prompt.of("Rain")]
GROUP: dict[str, Any] = {
    "batch_size": 8,
    "mini_batch_size": 4,
    "per_device_batch_size": 2,
    "num_generations": 4,
    "num_iterations": 1,
    "learning_rate": 1e-3,
}


def recipe_of(model: Path, folder: Path, trainer: str, **settings: Any) -> PpoRecipe:
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(prompt.to_json()) + "\n" for prompt in PROMPTS), encoding="utf-8")
    return ppo_recipe(
        model,
        trainer=trainer,
        output_dir=str(folder / "ppo"),
        prompts=Data(sources=[Source(name="file", path=str(prompts), split="all")]),
        sampling=Sampling(max_new_tokens=4),
        **GROUP | settings,
    )


@pytest.mark.parametrize(("trainer", "lora"), [("rloo", None), ("grpo", Lora(r=2, alpha=4))])
def test_two_steps_ask_our_scorer_about_our_prompts(
    trainer: str, lora: Lora | None, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Conversation] = []

    def length(conversation: Conversation) -> float:
        asked.append(conversation)
        return float(len(conversation.completion))

    monkeypatch.setattr(group_baselines, "build_scorer", lambda _: FunctionScorer(length, name="length"))
    artifact = ppo.run(recipe_of(tiny_model, tmp_path, trainer, lora=lora))
    assert artifact is not None
    assert artifact.metrics["num_steps"] == 2
    assert len(asked) == 8
    groups = [conversation.prompt for conversation in asked[::4]]
    assert [conversation.prompt for conversation in asked] == [prompt for prompt in groups for _ in range(4)]
    assert len(set(groups)) == 2
    known = {(prompt.text, prompt.tags.is_safety) for prompt in PROMPTS}
    assert {(prompt.text, prompt.tags.is_safety) for prompt in groups} <= known, "tags and all"
    assert len({conversation.completion for conversation in asked}) > 4, "they are sampled"
    logged = [json.loads(line) for line in (tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()]
    mean = sum(len(conversation.completion) for conversation in asked) / 8
    assert any(row.get("ppo/reward") == pytest.approx(mean) for row in logged)
    assert read_artifact(tmp_path / "ppo").kind == "policy"
    assert sha256(tmp_path / "ppo" / "model.safetensors") != sha256(tiny_model / "model.safetensors")


def trained(model: Path, folder: Path, trainer: str) -> tuple[int, int]:
    """On one rank: how many answers it had scored, and to how many prompts."""
    asked: list[Conversation] = []
    score_all = group_baselines.score_all

    def counted(scorer: Any, conversations: list[Conversation], *args: Any, **kwargs: Any) -> Any:
        asked.extend(conversations)
        return score_all(scorer, conversations, *args, **kwargs)

    group_baselines.score_all = counted
    scorer = PythonScorer(function="tests.scorers:shorter_is_better")
    ppo.run(recipe_of(model, folder, trainer, scorer=scorer))
    return len(asked), len({conversation.prompt for conversation in asked})


@pytest.mark.parametrize(("trainer", "layout"), [("grpo", "ddp"), ("rloo", "zero2")])
def test_two_processes_share_the_answers(trainer: str, layout: str, tiny_model: Path, tmp_path: Path) -> None:
    """Eight answers in two groups of four: each process scores one group."""
    assert on_ranks(trained, tiny_model, tmp_path, trainer, environment=LAYOUTS[layout]) == [(4, 1), (4, 1)]
    artifact = read_artifact(tmp_path / "ppo")
    assert artifact.metrics["num_steps"] == 2
    assert sha256(tmp_path / "ppo" / "model.safetensors") != sha256(tiny_model / "model.safetensors")


class Fault(Exception):
    """What breaks the run off."""


def test_a_run_that_was_broken_off_ends_with_the_same_weights(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def train(name: str, *, fault_at: int | None = None) -> Path:
        calls.clear()

        def length(conversation: Conversation) -> float:
            calls.append(1)
            if len(calls) == fault_at:
                raise Fault
            return float(len(conversation.completion))

        monkeypatch.setattr(group_baselines, "build_scorer", lambda _: FunctionScorer(length, name="length"))
        (tmp_path / name).mkdir(exist_ok=True)
        ppo.run(recipe_of(tiny_model, tmp_path / name, "rloo", num_iterations=3, save_steps=1))
        return tmp_path / name / "ppo" / "model.safetensors"

    whole = train("whole")
    assert len(calls) == 24
    with pytest.raises((Fault, ScorerError)):
        train("broken", fault_at=17)  # in the third iteration
    resumed = train("broken")
    assert len(calls) == 8, "what was done is not done again"
    assert sha256(resumed) == sha256(whole)


def test_prompts_have_the_ids_that_ppo_gives_them(renderer: Renderer) -> None:
    """As TRL renders them, control tokens in the text included."""
    for prompt in PROMPTS:
        encoded = renderer.tokenizer.apply_chat_template(
            renderer.prompt_messages(prompt),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            sanitize_control_tokens=True,
        )
        assert encoded["input_ids"] == renderer.render_prompt(prompt)


def test_rewards_are_the_scores_of_the_texts_up_to_their_end(renderer: Renderer) -> None:
    tokenizer = renderer.tokenizer
    scorer = FunctionScorer(lambda conversation: float(len(conversation.completion)), name="length")
    ids = [[*tokenizer.encode("bread", add_special_tokens=False), tokenizer.eos_token_id, tokenizer.pad_token_id]]
    reward = reward_function(scorer, PROMPTS, renderer)
    assert reward(prompts=[], completions=[], completion_ids=ids, position=[2], trainer_state=None) == [5.0]
    assert reward.__name__ == "length", "what TRL calls it in its metrics"
    unscored = reward_function(FunctionScorer(lambda _: None, name="broken"), PROMPTS, renderer)
    with pytest.raises(ScorerError, match="broken left an answer unscored"):
        unscored(completion_ids=ids, position=[0])


def test_batches_are_those_of_the_recipe(tiny_model: Path, tmp_path: Path) -> None:
    """8 answers an iteration, 4 a step of 2 micro-batches, 2 epochs of 2 steps, 3 iterations: 12 steps."""
    recipe = recipe_of(tiny_model, tmp_path, "grpo", num_ppo_epochs=2, kl_coef=0.2, clip_range=0.3).model_copy()
    recipe = recipe.model_copy(update={"ppo": recipe.ppo.model_copy(update={"num_iterations": 3, "save_steps": 5})})
    found = arguments(recipe)
    expected = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "generation_batch_size": 8,
        "num_generations": 4,
        "num_iterations": 2,
        "max_steps": 12,
        "save_steps": 20,
        "beta": 0.2,
        "epsilon": 0.3,
        "max_completion_length": 4,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
    }
    assert {name: found[name] for name in expected} == expected


PUBLISHED: dict[str, dict[str, Any]] = {
    "rloo": {"normalize_advantages": False, "reward_clip_range": None},
    "grpo": {
        "loss_type": "grpo",
        "scale_rewards": "group",
        "importance_sampling_level": "token",
        "use_bias_correction_kl": False,
    },
}


@pytest.mark.parametrize("trainer", ["rloo", "grpo"])
def test_the_arms_are_those_of_their_papers(trainer: str, tiny_model: Path, tmp_path: Path) -> None:
    """Whatever TRL's defaults are: those of its configuration are read after it was made."""
    config = group_baselines.trl_classes(trainer)[0](**arguments(recipe_of(tiny_model, tmp_path, trainer)))
    assert {name: getattr(config, name) for name in PUBLISHED[trainer]} == PUBLISHED[trainer]


@pytest.mark.parametrize("trainer", ["rloo", "grpo"])
def test_the_reference_is_loaded_as_the_policy_is(
    trainer: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedModel

    loads: list[dict[str, Any]] = []
    original: Any = PreTrainedModel.from_pretrained.__func__

    def load(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        loads.append({"name": str(name)} | {key: kwargs.get(key) for key in ("revision", "use_safetensors", "dtype")})
        return original(cls, name, *args, **kwargs)

    def broken(_: Conversation) -> float:
        raise Fault

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(load))
    monkeypatch.setattr(group_baselines, "build_scorer", lambda _: FunctionScorer(broken, name="broken"))
    recipe = recipe_of(tiny_model, tmp_path, trainer, kl_coef=0.1)
    init = recipe.model_init.model_copy(update={"revision": "one-revision"})
    with pytest.raises((Fault, ScorerError)):
        ppo.run(recipe.model_copy(update={"model_init": init}))
    policy, reference = loads
    assert policy == reference
    assert (policy["revision"], policy["use_safetensors"]) == ("one-revision", True)


@pytest.mark.parametrize(("settings", "loads"), [({"kl_coef": 0.1}, True), ({"kl_coef": 0.0}, False)])
def test_only_a_penalty_needs_a_reference(
    settings: dict[str, Any], loads: bool, tiny_model: Path, tmp_path: Path
) -> None:
    found = arguments(recipe_of(tiny_model, tmp_path, "rloo", **settings))["model_init_kwargs"]
    assert (found is not None) is loads
    adapters = recipe_of(tiny_model, tmp_path, "rloo", lora=Lora(r=2, alpha=4), **settings)
    assert arguments(adapters)["model_init_kwargs"] is None


@pytest.mark.parametrize("trainer", ["rloo", "grpo"])
def test_a_loss_that_is_not_finite_ends_the_run_before_the_update(
    trainer: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trl

    base: Any = trl.RLOOTrainer if trainer == "rloo" else trl.GRPOTrainer
    original = base.compute_loss
    monkeypatch.setattr(base, "compute_loss", lambda *args, **kwargs: original(*args, **kwargs) * float("nan"))
    monkeypatch.setattr(group_baselines, "build_scorer", lambda _: FunctionScorer(lambda _: 1.0, name="one"))
    with pytest.raises(FloatingPointError, match="stopped before the update"):
        ppo.run(recipe_of(tiny_model, tmp_path, trainer))


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"gamma": 0.9, "value_coef": 0.2}, r"trainer: grpo is TRL's and knows no ppo\.gamma, ppo\.value_coef; leave"),
        ({"value_model": "some-model"}, "knows no value_model; leave"),
        ({"sampling": Sampling(batch_size=4)}, r"knows no sampling\.batch_size; leave"),
        ({"num_generations": 3}, r"batch_size 8 must be a multiple of ppo\.num_generations 3"),
    ],
)
def test_keys_that_would_not_be_followed_are_refused(
    settings: dict[str, Any], wrong: str, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match=wrong):
        ppo_recipe(tiny_model, **{"trainer": "grpo", "sampling": Sampling(), **GROUP, **settings})
    with pytest.raises(ValidationError, match="PPO draws one answer a prompt"):
        ppo_recipe(tiny_model, num_generations=4)


def test_ppo_refuses_dropout_which_the_others_take(tiny_model: Path) -> None:
    with pytest.raises(ValidationError, match=r"lora\.dropout: with dropout PPO's ratios"):
        ppo_recipe(tiny_model, lora=Lora(dropout=0.1))
    ppo_recipe(tiny_model, trainer="grpo", sampling=Sampling(), lora=Lora(dropout=0.1), **GROUP)


def test_too_few_prompts_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_model, tmp_path, "grpo", num_generations=2, batch_size=8)
    with pytest.raises(SourceError, match="3 prompts do not fill an iteration of trainer grpo, which takes 4"):
        ppo.run(recipe)
