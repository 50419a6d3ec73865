"""`alignment.ppo_update` on a tiny random Llama and frozen rollouts: batches change nothing, and what is padded costs
nothing but time."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from alignment.actor_critic import ActorCritic, Batch, load_actor_critic, load_reference
from alignment.generate import Generator
from alignment.objectives import clipped_policy_loss, clipped_value_loss
from alignment.ppo_state import make_optimizer
from alignment.ppo_update import Learner, Targets, optimizer_step, set_learning_rates
from alignment.recipe import Lora, ModelInit
from alignment.rollout import Rollout, collect_rollout, forward
from reward.conversation import Prompt
from tests import tiny_ppo
from tests.one_process import forget_accelerate
from tests.tiny_ppo import PAD, PROMPTS, logprobs_alone, ppo_recipe

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from alignment.recipe import PpoRecipe
    from reward.render import Renderer

renderer = tiny_ppo.renderer  # a fixture

LENGTHS = [(30, 2), (4, 12), (17, 1), (4, 3), (60, 9), (8, 7), (25, 12), (3, 1)]
"""Tokens of prompt and completion of each row."""
ROWS = range(len(LENGTHS))


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    forget_accelerate()
    yield
    forget_accelerate()


def learner_of(recipe: PpoRecipe) -> Learner:
    from accelerate import Accelerator

    ppo = recipe.ppo
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ppo.mini_batch_size // ppo.per_device_batch_size)
    torch.manual_seed(0)
    actor = load_actor_critic(recipe, pad_token_id=PAD)
    if actor.value_model is None:
        nn.init.normal_(actor.value_head.weight)
    model, optimizer = accelerator.prepare(actor, make_optimizer(actor, recipe))
    return Learner(recipe, accelerator, model, optimizer, PAD, None)


def frozen_rollout(actor: ActorCritic) -> tuple[Rollout, Targets]:
    """Random texts, and old log-probabilities, values and targets near enough to matter on both sides of the clip."""
    random = torch.Generator().manual_seed(4)

    def noise(scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=random) * scale * mask

    prompts = [torch.randint(4, 500, (n,), generator=random).tolist() for n, _ in LENGTHS]
    completions = [torch.randint(4, 500, (n,), generator=random).tolist() for _, n in LENGTHS]
    shape = (len(LENGTHS), max(n for _, n in LENGTHS))
    mask = torch.arange(shape[1]) < torch.tensor([n for _, n in LENGTHS]).unsqueeze(1)
    logprobs = torch.zeros(shape)
    for row in ROWS:
        alone = logprobs_alone(actor.policy, prompts[row], completions[row], temperature=1.0)
        logprobs[row, : len(alone)] = alone
    conversations = [Prompt.of(f"question {row}").answer("x") for row in ROWS]
    finished = torch.ones(len(LENGTHS), dtype=torch.bool)
    old = logprobs + noise(0.2)
    rollout = Rollout(
        conversations, prompts, completions, finished, mask, old, old, old + noise(0.1), noise(0.0), noise(0.1)
    )
    return rollout, Targets(mask, noise(1.0), noise(1.0), kl_coef=0.0)


def mini_batch_recipe(tiny_model: Path, size: int, **ppo: Any) -> PpoRecipe:
    return ppo_recipe(tiny_model, batch_size=8, mini_batch_size=8, per_device_batch_size=size, **ppo)


@pytest.mark.parametrize("trunk", ["shared", "separate"])
@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_batches_by_length_give_the_loss_and_the_gradient_of_one_padded_batch(
    tiny_model: Path, trunk: str, size: int, padding_free: bool
) -> None:
    """Expected values: the plain formula over all rows in one batch, by autograd."""
    learner = learner_of(mini_batch_recipe(tiny_model, size, value_trunk=trunk, padding_free=padding_free))
    rollout, targets = frozen_rollout(learner.model)
    batches = rollout.micro_batches(ROWS, size=size)
    assert sorted(row for batch in batches for row in batch) == list(ROWS)
    padded = Batch.of(rollout.prompt_ids, rollout.completion_ids, pad_token_id=PAD, padding_free=False)
    output = forward(learner.model, padded)
    assert output.values is not None
    policy, clipped = clipped_policy_loss(output.logprobs, rollout.logprobs, targets.advantages, clip_range=0.2)
    value = clipped_value_loss(output.values, rollout.values, targets.returns, clip_range=0.2)
    policy_loss, value_loss = policy[targets.mask].mean(), value[targets.mask].mean()
    (policy_loss + 0.1 * value_loss).backward()
    norm = torch.stack([p.grad.norm() for p in learner.model.parameters() if p.grad is not None]).norm()
    learner.optimizer.zero_grad()
    found = optimizer_step(learner, rollout, targets, ROWS, iteration=0)
    assert found["policy_loss"] == pytest.approx(policy_loss.item(), abs=1e-5)
    assert found["value_loss"] == pytest.approx(value_loss.item(), abs=1e-5)
    assert found["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert found["clip_fraction"] == pytest.approx(clipped[targets.mask].float().mean().item(), abs=1e-6)
    assert 0.05 < found["clip_fraction"] < 0.5


def test_little_is_padded(tiny_model: Path) -> None:
    rollout, _ = frozen_rollout(load_actor_critic(ppo_recipe(tiny_model), pad_token_id=PAD))

    def computed(batches: list[list[int]], *, padding_free: bool = False) -> int:
        layout: Any = {"pad_token_id": PAD, "padding_free": padding_free, "device": "cpu"}
        return sum(rollout.rows(batch, **layout).inputs["input_ids"].numel() for batch in batches)

    in_order = [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert computed(in_order) == 2 * (42 + 20 + 69 + 37)
    assert computed(rollout.micro_batches(ROWS, size=2)) == 2 * (7 + 20 + 32 + 72)
    assert computed(in_order, padding_free=True) == sum(prompt + completion for prompt, completion in LENGTHS)


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_ratios_are_exactly_one(
    tiny_model: Path, renderer: Renderer, dtype: Any, size: int, padding_free: bool
) -> None:
    ppo: Any = {"value_trunk": "shared", "per_device_batch_size": size, "padding_free": padding_free}
    lora = None if dtype == "float32" else Lora(r=2, alpha=4)
    rate = 1e-6 if dtype == "float32" else 1e-1  # so that the second ratios show in bfloat16
    recipe = ppo_recipe(tiny_model, **ppo, lora=lora, model_init=ModelInit(dtype=dtype), learning_rate=rate)
    learner = learner_of(recipe)
    generator = Generator(learner.model.policy, renderer, recipe.sampling)
    rollout = collect_rollout(
        learner.model,
        load_reference(recipe, pad_token_id=PAD),
        generator,
        ([PROMPTS[row % len(PROMPTS)] for row in range(8)], list(range(8))),
        recipe=recipe,
        iteration=1,
        accelerator=learner.accelerator,
    )
    torch.testing.assert_close(rollout.logprobs, rollout.ref_logprobs, atol=1e-6, rtol=0)
    mask = rollout.completion_mask
    targets = Targets(mask, mask.float(), mask.float(), kl_coef=0.0)
    learner.model.train()
    found = optimizer_step(learner, rollout, targets, range(4), iteration=0)
    assert (found["approx_kl"], found["clip_fraction"], found["ratio_max"]) == (0.0, 0.0, 1.0)
    again = optimizer_step(learner, rollout, targets, range(4), iteration=0)
    assert again["approx_kl"] > 0


def test_what_is_told_of_the_ratios(tiny_model: Path) -> None:
    """By hand: the tokens' log-ratios alternate between log 4 and log 1/5."""
    learner = learner_of(mini_batch_recipe(tiny_model, 4, value_trunk="shared"))
    rollout, targets = frozen_rollout(learner.model)
    shape = rollout.logprobs.shape
    steps = torch.tensor([math.log(4), math.log(1 / 5)])[torch.arange(shape[1]) % 2].expand(shape)
    now = torch.zeros(shape)
    for row in ROWS:
        alone = logprobs_alone(
            learner.model.policy, rollout.prompt_ids[row], rollout.completion_ids[row], temperature=1.0
        )
        now[row, : len(alone)] = alone
    old = dataclasses.replace(rollout, logprobs=(now - steps) * targets.mask)
    found = optimizer_step(learner, old, targets, ROWS, iteration=0)
    share = float((torch.arange(shape[1]) % 2 == 0).expand(shape)[targets.mask].float().mean())
    kl = share * (4 - 1 - math.log(4)) + (1 - share) * (0.2 - 1 + math.log(5))  # k3: r - 1 - log r (Schulman 2020)
    assert found["approx_kl"] == pytest.approx(kl, rel=1e-4)
    assert found["ratio_mean"] == pytest.approx(share * 4 + (1 - share) * 0.2, rel=1e-4)
    assert found["ratio_max"] == pytest.approx(5.0, rel=1e-4), "up or down"


@pytest.mark.parametrize("parts", [("embd_pdrop", "attn_pdrop", "resid_pdrop"), ()])
def test_a_model_with_dropout_has_first_ratios_of_one(
    tmp_path: Path, tiny_model: Path, renderer: Renderer, parts: tuple[str, ...]
) -> None:
    """GPT-2's modules and Llama's attention, each trained with dropout elsewhere."""
    from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    if parts:
        size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": AutoConfig.from_pretrained(folder).vocab_size}
        GPT2LMHeadModel(GPT2Config(**size, **dict.fromkeys(parts, 0.5))).save_pretrained(folder)
    else:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"attention_dropout": 0.5}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    recipe = ppo_recipe(folder, value_trunk="shared", per_device_batch_size=2)
    learner = learner_of(recipe)
    rollout = collect_rollout(
        learner.model,
        None,
        Generator(learner.model.policy, renderer, recipe.sampling),
        (PROMPTS[:4], list(range(4))),
        recipe=recipe,
        iteration=0,
        accelerator=learner.accelerator,
    )
    mask = rollout.completion_mask
    learner.model.train()
    found = optimizer_step(learner, rollout, Targets(mask, mask.float(), mask.float(), 0.0), range(4), iteration=0)
    assert (found["approx_kl"], found["ratio_max"]) == (0.0, 1.0)


def test_a_mini_batch_without_a_scored_answer_teaches_nothing(tiny_model: Path) -> None:
    """Nor do the momentum of the step before and weight decay move anything."""
    learner = learner_of(mini_batch_recipe(tiny_model, 4, value_trunk="shared", weight_decay=0.1))
    rollout, targets = frozen_rollout(learner.model)
    nothing = Targets(*(torch.zeros_like(part) for part in (targets.mask, targets.advantages, targets.returns)), 0.0)
    assert optimizer_step(learner, rollout, targets, ROWS, iteration=0)["grad_norm"] > 0
    before = [parameter.detach().clone() for parameter in learner.model.parameters()]
    assert optimizer_step(learner, rollout, nothing, ROWS, iteration=0) == {}
    assert all(torch.equal(a, b) for a, b in zip(before, learner.model.parameters(), strict=True))


def test_a_critic_that_warms_up_on_the_policy_s_trunk_leaves_it_nothing(tiny_model: Path) -> None:
    """Its gradients would stay in the optimizer's moments and move the policy with its first own step."""
    settings: dict[str, Any] = {"value_trunk": "shared", "critic_warmup_iterations": 1, "learning_rate": 1e-3}
    learner = learner_of(mini_batch_recipe(tiny_model, 4, **settings))
    rollout, targets = frozen_rollout(learner.model)
    torch.nn.init.ones_(learner.model.value_head.weight)
    before = {name: parameter.detach().clone() for name, parameter in learner.model.named_parameters()}
    set_learning_rates(learner, step=0, num_steps=2, iteration=0)
    optimizer_step(learner, rollout, targets, ROWS, iteration=0)
    for name, parameter in learner.model.named_parameters():
        moment = learner.optimizer.state[parameter]["exp_avg"]
        assert bool(moment.any()) == (name == "value_head.weight"), name
        assert torch.equal(parameter, before[name]) == (name != "value_head.weight"), name
    optimizer_step(learner, rollout, targets, ROWS, iteration=1)
    assert learner.optimizer.state[learner.model.policy.lm_head.weight]["exp_avg"].any()


def test_a_ratio_beyond_all_numbers_is_still_told(tiny_model: Path) -> None:
    """float32 ends at e^88.7; the alarm must see a factor that went down, whose losses and gradients are finite."""
    learner = learner_of(mini_batch_recipe(tiny_model, 4, value_trunk="shared"))
    rollout, targets = frozen_rollout(learner.model)
    rollout.logprobs[0, 0] += 200.0
    found = optimizer_step(learner, rollout, targets, ROWS, iteration=0)
    assert 1e30 < found["ratio_max"] < math.inf
