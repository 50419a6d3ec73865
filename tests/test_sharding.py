"""Models that are only read and shared out over the processes (ZeRO-3) say what they say whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.__main__ import main
from alignment.artifact import read_artifact
from alignment.inputs import InputError
from alignment.recipe_file import load_recipe
from alignment.recipe_scorers import RewardModelScorer
from alignment.sharding import check_sharding
from reward.conversation import Prompt
from tests.interrupted import LAYOUTS, history, ppo_words
from tests.ranks import on_ranks
from tests.tiny import SENTENCES, make_reward_model
from tests.tiny_ppo import COMPLETION_IDS, PAD, PROMPT_IDS, ppo_recipe

SHARDED = (
    *("--ppo.reference", "sharded"),
    *("--scorer.safety.sharded", "true"),
    *("--scorer.helpfulness.sharded", "true"),
    *("--scorer.helpfulness.shared_prefix", "false"),
)
FULL = ("--value_model", "null", "--ppo.value_trunk", "shared", "--sampling.max_new_tokens", "4")


def texts_of(rank: int) -> list[Any]:
    """Rank 0 has answers to two prompts and more of them than rank 1."""
    prompts = [Prompt.of(text) for text in SENTENCES[: 4 - 2 * rank : 2]]
    return [prompt.answer(answer) for prompt in prompts for answer in SENTENCES[1 : 6 - 3 * rank : 2]]


def read_both_ways(policy: Path, reward_model: Path) -> dict[str, Any]:
    """On one rank: scores and log-probabilities by the whole and the shared-out model, and how much of it is held."""
    from alignment.actor_critic import Batch, load_reference
    from alignment.distributed import close, make_accelerator, process_index
    from alignment.rollout import forward
    from alignment.scoring import build_scorer

    accelerator = make_accelerator()
    found: dict[str, Any] = {}
    for name in ("whole", "sharded"):
        recipe = ppo_recipe(policy, reference=name)
        sharded = name == "sharded"
        reference = load_reference(recipe, pad_token_id=PAD)
        scorers: list[Any] = [
            build_scorer(
                RewardModelScorer(path=str(reward_model), batch_size=2, sharded=sharded, shared_prefix=shared_prefix)
            )
            for shared_prefix in (True, False)
        ]
        rank = process_index()
        with torch.no_grad():
            batch = Batch.of(PROMPT_IDS, COMPLETION_IDS, pad_token_id=PAD, padding_free=reference.padding_free)
            output = forward(reference, batch)
        found[name] = {
            "packed": scorers[0].why_padded is None,
            "scores": [[score.value for score in scorer.score(texts_of(rank))] for scorer in scorers],
            "alone": [score.value for score in scorers[0].score(texts_of(0) if rank == 0 else [])],
            "logprobs": output.logprobs.tolist(),
            "held": [elements_held(model) for model in (reference, scorers[0].module)],
        }
    close(accelerator)
    return found


def elements_held(model: Any) -> int:
    """Elements of weights in the memory of this process: its shards, and what is whole at the moment."""
    return sum(p.numel() + (p.ds_tensor.numel() if hasattr(p, "ds_tensor") else 0) for p in model.parameters())


def test_shared_out_models_equal_whole_ones_and_take_half(tmp_path: Path, tiny_model: Path) -> None:
    reward_model = make_reward_model(tiny_model, tmp_path / "reward_model", seed=1)
    ranks = on_ranks(read_both_ways, tiny_model, reward_model, environment=LAYOUTS["zero3"])
    assert [len(texts_of(rank)) for rank in (0, 1)] == [6, 1], "so that the ranks need other numbers of passes"
    for rank, found in enumerate(ranks):
        whole, sharded = found["whole"], found["sharded"]
        assert whole["packed"]
        assert sharded["packed"]
        for before, after in zip(
            [*whole["scores"], whole["alone"]], [*sharded["scores"], sharded["alone"]], strict=True
        ):
            assert after == pytest.approx(before, abs=1e-5)
        assert len(sharded["scores"][0]) == len(texts_of(rank))
        torch.testing.assert_close(torch.tensor(sharded["logprobs"]), torch.tensor(whole["logprobs"]))
        for before, after in zip(whole["held"], sharded["held"], strict=True):
            assert before / 2 <= after < 0.55 * before


def test_ppo_with_shared_out_models_equals_ppo_with_whole_ones(parents: Path, tmp_path: Path) -> None:
    for name, overrides in (("whole", ()), ("sharded", SHARDED)):
        words = ppo_words(parents, tmp_path / name, *FULL, *overrides)
        assert on_ranks(main, words, environment=LAYOUTS["zero3"]) == [0, 0]
        assert read_artifact(tmp_path / name).provenance["zero_stage"] == 3
    expected, found = history(tmp_path / "whole"), history(tmp_path / "sharded")
    assert len(expected) == len(found) == 3
    for before, after in zip(expected, found, strict=True):
        assert {"ppo/kl", "ppo/score_mean", "ppo/policy_loss", "ppo/value_loss", "ppo/grad_norm"} <= before.keys()
        assert after == pytest.approx(before, rel=1e-4, abs=1e-5)
    from safetensors.torch import load_file

    weights, others = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "sharded"))
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        assert (value - others[name]).abs().max().item() < 2e-4, name


def recipe_of(stage: str, parents: Path, *overrides: str) -> Any:
    return load_recipe(Path("tests/tiny_pipeline") / f"{stage}.yaml", ["--run_dir", str(parents), *overrides])


@pytest.fixture
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.conftest import ROOT

    monkeypatch.chdir(ROOT)


@pytest.mark.usefixtures("_in_repository")
@pytest.mark.parametrize("key", ["ppo.reference", "scorer.safety.sharded"])
def test_a_launch_without_zero3_is_refused(key: str, parents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of("ppo", parents, f"--{key}", "sharded" if key == "ppo.reference" else "true")
    for layout in ("ddp", "zero2"):
        with monkeypatch.context() as patch:
            for name, value in LAYOUTS[layout].items():
                patch.setenv(name, value)
            with pytest.raises(InputError, match=rf"{key}: ZeRO-3 alone shares weights out; launch with launch/zero3"):
                check_sharding(recipe)
    for name, value in LAYOUTS["zero3"].items():
        monkeypatch.setenv(name, value)
    check_sharding(recipe)


@pytest.mark.usefixtures("_in_repository")
def test_deepspeeds_own_file_says_which_stage(parents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of("ppo", parents, "--ppo.reference", "sharded")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "launch/zero3_offload.json")
    check_sharding(recipe)


@pytest.mark.usefixtures("_in_repository")
def test_other_stages_and_other_families_are_refused(
    parents: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in LAYOUTS["zero3"].items():
        monkeypatch.setenv(name, value)
    scorer = f"{{type: reward_model, path: {parents / 'safety_reward_model'}, sharded: true}}"
    with pytest.raises(InputError, match="only in the stage ppo do all processes score together"):
        check_sharding(recipe_of("rejection_sampling", parents, "--scorer", scorer))
    from transformers import AutoModelForSequenceClassification

    AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2).save_pretrained(tmp_path / "two")
    two = f"{{type: reward_model, path: {tmp_path / 'two'}, label: 0, sharded: true}}"
    with pytest.raises(InputError, match="only stock classifiers with one output"):
        check_sharding(recipe_of("ppo", parents, "--scorer", two))


def test_a_reference_that_is_no_model_is_not_shared_out(tiny_model: Path) -> None:
    from alignment.recipe import Lora

    with pytest.raises(ValueError, match="with lora the reference is the adapter switched off"):
        ppo_recipe(tiny_model, lora=Lora(), reference="sharded")
