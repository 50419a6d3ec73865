"""An update with everything that PPO can have in its loss: two processes have the losses and the gradient of one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from alignment.recipe import Lora
from reward.conversation import Conversation, Message
from tests.ranks import on_ranks
from tests.test_layouts import ENVIRONMENTS, ROWS, assert_equal, frozen_rollout
from tests.tiny import SENTENCES
from tests.tiny_ppo import PAD, PROMPTS, UNUSED, ppo_recipe

if TYPE_CHECKING:
    from pathlib import Path


def one_update(policy: Path, per_device: int, *, spoilt: bool = False) -> dict[str, float]:
    """On one rank: the value model is a second adapter, a pretraining mix is along, the KL is in the loss.

    `spoilt`: the loss is finite, its gradient is not.
    """
    from alignment import ppo_update
    from alignment.actor_critic import load_actor_critic
    from alignment.distributed import close, make_accelerator, process_index, world_size
    from alignment.policy import load_tokenizer
    from alignment.ppo_data import PretrainingMix
    from alignment.ppo_state import prepare_engine
    from alignment.ppo_update import Learner, Targets, accumulation_steps, update
    from reward.render import Renderer

    settings: dict[str, Any] = {"value_trunk": "adapter", "kl_in": "loss", "kl_estimator": "k3", "ptx_coef": 0.7}
    batch = {"batch_size": ROWS, "mini_batch_size": ROWS, "per_device_batch_size": per_device}
    recipe = ppo_recipe(policy, lora=Lora(r=4, alpha=8), ptx_data=UNUSED, **settings, **batch)
    accelerator = make_accelerator(gradient_accumulation_steps=accumulation_steps(recipe))
    torch.manual_seed(0)
    actor_critic = load_actor_critic(recipe, pad_token_id=PAD)
    nn.init.normal_(actor_critic.value_head.weight, generator=torch.Generator().manual_seed(1))
    engine, optimizer = prepare_engine(accelerator, actor_critic, recipe)
    share = ROWS // world_size()
    rollout, targets = frozen_rollout(policy, range(process_index() * share, (process_index() + 1) * share))
    turns = zip(SENTENCES[:8:2], SENTENCES[1:8:2], strict=True)
    conversations = [Conversation((Message("user", asked), Message("assistant", told))) for asked, told in turns]
    mix = PretrainingMix(conversations, Renderer(load_tokenizer(str(policy))), recipe, max_length=512)
    learner = Learner(recipe, accelerator, engine, optimizer, pad_token_id=PAD, mix=mix)
    if spoilt:
        loss_of = ppo_update.loss_of

        def rooted(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, dict[str, float]]:
            loss, sums = loss_of(*args, **kwargs)
            return loss + (loss * 0).sqrt(), sums  # the slope of a root at 0

        ppo_update.loss_of = rooted
    metrics = update(learner, rollout, Targets(**targets, kl_coef=0.3), iteration=0)
    close(accelerator, engine)
    return metrics


@pytest.fixture(scope="module")
def alone(tiny_model: Path) -> dict[str, float]:
    (metrics,) = on_ranks(one_update, tiny_model, ROWS, environment=ENVIRONMENTS["ddp"], count=1)
    assert metrics["grad_norm"] > 0.1
    assert {"policy_loss", "value_loss", "kl_loss", "ptx_loss"} <= metrics.keys()
    return metrics


@pytest.mark.parametrize("layout", ["ddp", "zero2", "zero3"])
def test_two_processes_have_the_gradient_of_one(layout: str, tiny_model: Path, alone: dict[str, float]) -> None:
    for metrics in on_ranks(one_update, tiny_model, 2, environment=ENVIRONMENTS[layout]):
        assert_equal(metrics, alone)


def why_it_stops(policy: Path) -> str:
    """On one rank: the error of an update whose gradient is not finite."""
    try:
        one_update(policy, 2, spoilt=True)
    except FloatingPointError as error:
        return str(error)
    return "it went on"


@pytest.mark.parametrize("layout", ["ddp", "zero0", "zero2", "zero3"])
def test_a_gradient_that_is_not_finite_stops_all_processes(layout: str, tiny_model: Path) -> None:
    for reason in on_ranks(why_it_stops, tiny_model, environment=ENVIRONMENTS[layout]):
        assert reason.startswith("iteration 0: gradient norm is not finite; stopped before the update")


def times_gathered(policy: Path) -> tuple[int, int]:
    """On one rank: how often the weights are brought together for a rollout, and the batches that it samples."""
    import deepspeed

    from alignment.actor_critic import load_actor_critic
    from alignment.distributed import close, make_accelerator, process_index
    from alignment.generate import Generator
    from alignment.policy import load_tokenizer
    from alignment.ppo_state import prepare_engine
    from alignment.ppo_update import accumulation_steps
    from alignment.rollout import collect_rollout
    from reward.render import Renderer

    recipe = ppo_recipe(policy, lora=Lora(r=4, alpha=8), value_trunk="shared", per_device_batch_size=2)
    accelerator = make_accelerator(gradient_accumulation_steps=accumulation_steps(recipe))
    actor_critic = load_actor_critic(recipe, pad_token_id=PAD)
    engine, _ = prepare_engine(accelerator, actor_critic, recipe)
    one_by_one = recipe.sampling.model_copy(update={"batch_size": 1})
    generator = Generator(actor_critic.policy, Renderer(load_tokenizer(str(policy))), one_by_one)
    gathered, batches = [], []
    gather, sample = deepspeed.zero.GatheredParameters.__enter__, generator.sample
    deepspeed.zero.GatheredParameters.__enter__ = lambda self: (gathered.append(1), gather(self))[1]
    generator.sample = lambda *args, **kwargs: (batches.append(1), sample(*args, **kwargs))[1]
    rows = [2 * process_index(), 2 * process_index() + 1, 4 + process_index()]
    prompts = ([PROMPTS[row] for row in rows], rows)
    collect_rollout(engine, None, generator, prompts, recipe=recipe, iteration=1, accelerator=accelerator)
    close(accelerator, engine)
    return len(gathered), len(batches)


def test_zero3_gathers_the_weights_once_a_rollout_and_not_once_a_batch(tiny_model: Path) -> None:
    assert on_ranks(times_gathered, tiny_model, environment=ENVIRONMENTS["zero3"]) == [(1, 3), (1, 3)]
