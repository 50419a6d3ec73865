"""Two updates of PPO on a rollout that stands still: every layout has the same losses and the same gradients.

The rollout is made of random ids and numbers, so that ranks have texts of other lengths and parts of the clipped
objectives are clipped.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from alignment.rollout import Rollout
from reward.conversation import Prompt
from tests.conftest import ROOT
from tests.interrupted import LAYOUTS, deepspeed_environment
from tests.ranks import on_ranks
from tests.tiny import make_reward_model
from tests.tiny_ppo import PAD, logprobs_alone, ppo_recipe

if TYPE_CHECKING:
    from pathlib import Path

ROWS = 8
LONGEST = 6
ENVIRONMENTS = LAYOUTS | {"zero0": deepspeed_environment("0")}


@pytest.fixture(scope="module")
def value_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return make_reward_model(tiny_model, tmp_path_factory.mktemp("value") / "model", seed=3)


def frozen_rollout(policy: Path, rows: range) -> tuple[Rollout, dict[str, torch.Tensor]]:
    """These rows of the rollout, with advantages and returns."""
    from alignment.distributed import whole_weights
    from alignment.policy import load_model
    from alignment.recipe import ModelInit

    with whole_weights():
        model = load_model(str(policy), init=ModelInit(), pad_token_id=PAD).eval()
    draw = torch.Generator().manual_seed(5)
    noise = {
        name: 0.3 * torch.randn(ROWS, LONGEST, generator=draw)
        for name in ("logprobs", "values", "advantages", "returns")
    }
    prompts = [torch.randint(4, 500, (3 + 5 * (row % 3),), generator=draw).tolist() for row in range(ROWS)]
    answers = [torch.randint(4, 500, (1 + row % LONGEST,), generator=draw).tolist() for row in range(ROWS)]
    mask = torch.zeros(ROWS, LONGEST, dtype=torch.bool)
    logprobs = torch.zeros(ROWS, LONGEST)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        mask[row, : len(answer)] = True
        logprobs[row, : len(answer)] = logprobs_alone(model, prompt, answer, temperature=1.0)
    numbers = {name: (value * mask)[rows.start : rows.stop] for name, value in noise.items()}
    mask, logprobs = mask[rows.start : rows.stop], logprobs[rows.start : rows.stop]
    old = logprobs + numbers["logprobs"]
    rollout = Rollout(
        conversations=[Prompt.of("a question").answer(f"answer {row}") for row in rows],
        prompt_ids=prompts[rows.start : rows.stop],
        completion_ids=answers[rows.start : rows.stop],
        finished=torch.ones(len(rows), dtype=torch.bool),
        completion_mask=mask,
        sampled_logprobs=old,
        logprobs=old,
        ref_logprobs=old,
        entropies=torch.zeros_like(old),
        values=numbers["values"],
    )
    return rollout, {"mask": mask, "advantages": numbers["advantages"], "returns": numbers["returns"]}


def two_updates(policy: Path, value_model: Path, per_device: int, padding_free: bool = True) -> dict[str, float]:
    """On one rank: the metrics of two optimizer steps, `per_device` rows a pass. The second show what the first did."""
    from alignment.actor_critic import load_actor_critic
    from alignment.distributed import close, make_accelerator, process_index, world_size
    from alignment.ppo_state import prepare_engine
    from alignment.ppo_update import Learner, Targets, accumulation_steps, update

    batch = {"batch_size": ROWS, "mini_batch_size": ROWS, "per_device_batch_size": per_device}
    settings = {"learning_rate": 1e-4, "padding_free": padding_free}
    recipe = ppo_recipe(policy, value_model=str(value_model), **settings, **batch)
    accelerator = make_accelerator(gradient_accumulation_steps=accumulation_steps(recipe))
    actor_critic = load_actor_critic(recipe, pad_token_id=PAD)
    assert actor_critic.padding_free == padding_free
    engine, optimizer = prepare_engine(accelerator, actor_critic, recipe)
    share = ROWS // world_size()
    rollout, targets = frozen_rollout(policy, range(process_index() * share, (process_index() + 1) * share))
    learner = Learner(recipe, accelerator, engine, optimizer, pad_token_id=PAD, mix=None)
    targeted = Targets(**targets, kl_coef=0.0)
    metrics = update(learner, rollout, targeted, iteration=0)
    metrics |= {f"then_{name}": value for name, value in update(learner, rollout, targeted, iteration=1).items()}
    close(accelerator, engine)
    return metrics


@pytest.fixture(scope="module")
def padded(tiny_model: Path, value_model: Path) -> dict[str, float]:
    """One process, all rows in one padded pass."""
    (metrics,) = on_ranks(two_updates, tiny_model, value_model, ROWS, False, environment=ENVIRONMENTS["ddp"], count=1)
    assert metrics["grad_norm"] > 0.1
    assert 0 < metrics["clip_fraction"] < 1
    assert metrics["then_value_loss"] < 0.95 * metrics["value_loss"]
    return metrics


def assert_equal(found: Any, expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        tolerance = {"rel": 1e-4, "abs": 0} if "grad_norm" in name else {"rel": 0, "abs": 1e-5}
        assert value == pytest.approx(expected[name], **tolerance), name


@pytest.mark.parametrize("per_device", [1, 2])
def test_unpadded_and_bucketed_passes_add_up_to_the_padded_one(
    per_device: int, tiny_model: Path, value_model: Path, padded: dict[str, float]
) -> None:
    (metrics,) = on_ranks(two_updates, tiny_model, value_model, per_device, environment=ENVIRONMENTS["ddp"], count=1)
    assert_equal(metrics, padded)


@pytest.mark.parametrize("layout", ["ddp", "zero0", "zero1", "zero2", "zero3"])
def test_two_processes_have_the_gradient_of_one(
    layout: str, tiny_model: Path, value_model: Path, padded: dict[str, float]
) -> None:
    for metrics in on_ranks(two_updates, tiny_model, value_model, 2, environment=ENVIRONMENTS[layout]):
        assert_equal(metrics, padded)


def offload_environment(stage: int, folder: Path) -> dict[str, str]:
    """DeepSpeed's file of launch/zero3_offload.yaml, in float32 as the other layouts; of ZeRO-2 without its weights."""
    config = json.loads((ROOT / "launch" / "zero3_offload.json").read_text(encoding="utf-8"))
    del config["bf16"]
    zero = config["zero_optimization"]
    zero["stage"] = stage
    if stage < 3:
        del zero["offload_param"], zero["stage3_gather_16bit_weights_on_model_save"]
    (folder / "offload.json").write_text(json.dumps(config), encoding="utf-8")
    environment = LAYOUTS[f"zero{stage}"] | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(folder / "offload.json")}
    del environment["ACCELERATE_MIXED_PRECISION"]
    return environment


def two_offloaded_updates(policy: Path, value_model: Path, per_device: int) -> dict[str, float]:
    """On one rank: `two_updates` by an engine that leaves the step to the host."""
    from alignment import distributed

    close = distributed.close

    def checked(accelerator: Any, engine: Any) -> None:
        assert engine.zero_cpu_offload()
        assert (engine.zero_offload_param() is not None) == (engine.zero_optimization_stage() == 3)
        assert type(engine.basic_optimizer) is torch.optim.AdamW, "no optimizer of DeepSpeed's, which wants a compiler"
        close(accelerator, engine)

    distributed.close = checked
    return two_updates(policy, value_model, per_device)


@pytest.mark.parametrize("stage", [2, 3])
def test_offloaded_states_learn_the_same(
    stage: int, tiny_model: Path, value_model: Path, tmp_path: Path, padded: dict[str, float]
) -> None:
    environment = offload_environment(stage, tmp_path)
    for metrics in on_ranks(two_offloaded_updates, tiny_model, value_model, 2, environment=environment):
        assert_equal(metrics, padded)


@pytest.mark.parametrize("layout", ["zero1", "zero3"])
def test_in_bfloat16_deepspeed_learns_nearly_the_same(
    layout: str, tiny_model: Path, value_model: Path, padded: dict[str, float]
) -> None:
    """As the recipes of 7B and above are launched. Float32 weights take the steps; bfloat16 ones show part of them."""
    environment = ENVIRONMENTS[layout] | {"ACCELERATE_MIXED_PRECISION": "bf16"}
    for metrics in on_ranks(two_updates, tiny_model, value_model, 2, environment=environment):
        for name in ("policy_loss", "value_loss"):
            assert metrics[name] == pytest.approx(padded[name], rel=0.01, abs=2e-3), name
        assert metrics["grad_norm"] == pytest.approx(padded["grad_norm"], rel=0.02)
        assert metrics["then_value_loss"] < metrics["value_loss"]
