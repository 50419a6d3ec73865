"""`alignment.actor_critic` on a tiny random Llama.

What is computed about tokens is checked against plain forward passes of transformers: one text at a time, no cache, no
padding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from alignment.actor_critic import (
    VALUE_ADAPTER,
    ActorCritic,
    Batch,
    is_of_value_model,
    load_actor_critic,
    load_reference,
)
from alignment.objectives import estimate_kl
from alignment.policy import load_model
from alignment.recipe import Lora, ModelInit
from alignment.rollout import forward
from tests import tiny_ppo
from tests.tiny import make_tiny_tokenizer
from tests.tiny_ppo import COMPLETION_IDS, PAD, PROMPT_IDS, logprobs_alone, ppo_recipe

if TYPE_CHECKING:
    from pathlib import Path

model = tiny_ppo.model  # a fixture


def test_a_batch_by_hand() -> None:
    batch = Batch.of([[5, 6, 7], [8]], [[9], [10, 11]], pad_token_id=PAD, padding_free=False)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 9, PAD], [PAD, PAD, 8, 10, 11]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 3], [0, 0, 0, 1, 2]]
    assert batch.completion_mask.tolist() == [[True, False], [True, True]]
    assert batch.columns.tolist() == [2, 3]
    assert batch.tokens.tolist() == [[9, PAD], [10, 11]]


def test_a_batch_without_padding_by_hand() -> None:
    batch = Batch.of([[5, 6, 7], [8]], [[9], [10, 11]], pad_token_id=PAD, padding_free=True)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 9, 8, 10, 11]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.inputs["text_lengths"] == (4, 3)
    assert batch.completion_mask.tolist() == [[True, False], [True, True]]
    assert batch.columns.tolist() == [2, 4, 5]
    assert batch.tokens.tolist() == [[9, 10, 11]]
    assert batch.in_rows(torch.tensor([[0.1, 0.2, 0.3]])).tolist() == torch.tensor([[0.1, 0.0], [0.2, 0.3]]).tolist()


def batch_of(prompts: list[list[int]], completions: list[list[int]], *, padding_free: bool = True) -> Batch:
    return Batch.of(prompts, completions, pad_token_id=PAD, padding_free=padding_free)


def evaluated(
    model: ActorCritic,
    prompts: list[list[int]],
    completions: list[list[int]],
    *,
    padding_free: bool = True,
    **options: Any,
) -> Any:
    with torch.no_grad():
        return forward(model, batch_of(prompts, completions, padding_free=padding_free), **options)


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_a_plain_forward_pass(
    tiny_model: Path, model: Any, temperature: float, padding_free: bool
) -> None:
    actor = load_actor_critic(ppo_recipe(tiny_model, temperature=temperature), pad_token_id=PAD).eval()
    output = evaluated(actor, PROMPT_IDS, COMPLETION_IDS, padding_free=padding_free)
    assert output.logprobs.shape == output.entropies.shape == output.values.shape == (3, 4)
    for row, (prompt, completion) in enumerate(zip(PROMPT_IDS, COMPLETION_IDS, strict=True)):
        expected = logprobs_alone(model, prompt, completion, temperature=temperature)
        torch.testing.assert_close(output.logprobs[row, : len(completion)], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("trunk", ["shared", "separate"])
def test_what_stands_beside_a_text_changes_nothing(tiny_model: Path, trunk: str, padding_free: bool) -> None:
    actor = load_actor_critic(ppo_recipe(tiny_model, value_trunk=trunk), pad_token_id=PAD).eval()
    head = actor.value_head if trunk == "shared" else actor.value_model.score
    nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))
    alone = evaluated(actor, PROMPT_IDS[2:], COMPLETION_IDS[2:])
    prompts, completions = [list(range(10, 60)), PROMPT_IDS[2]], [[70], COMPLETION_IDS[2]]
    beside = evaluated(actor, prompts, completions, padding_free=padding_free)
    for name in ("logprobs", "entropies", "values"):
        torch.testing.assert_close(getattr(beside, name)[1:], getattr(alone, name), atol=1e-5, rtol=0)
    assert alone.values.abs().max() > 0.1


@pytest.mark.parametrize("padding_free", [False, True])
def test_values_are_read_in_front_of_each_token(tiny_model: Path, tmp_path: Path, padding_free: bool) -> None:
    """V before token t is what the reward model says of the text up to t - 1."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(3)
    reward_model = load_model(str(tiny_model), init=ModelInit(), head="sequence_classification", pad_token_id=PAD)
    reward_model.save_pretrained(tmp_path)
    actor = load_actor_critic(ppo_recipe(tiny_model, value_model=str(tmp_path)), pad_token_id=PAD).eval()
    found = evaluated(actor, PROMPT_IDS, COMPLETION_IDS, padding_free=padding_free).values
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    for row, (prompt, completion) in enumerate(zip(PROMPT_IDS, COMPLETION_IDS, strict=True)):
        for t in range(len(completion)):
            with torch.no_grad():
                expected = classifier(input_ids=torch.tensor([[*prompt, *completion[:t]]])).logits.item()
            assert found[row, t].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("lora", [None, Lora(r=4, alpha=8)])
@pytest.mark.parametrize("trunk", ["shared", "separate"])
def test_without_a_value_model_values_start_at_zero(tiny_model: Path, trunk: str, lora: Lora | None) -> None:
    actor = load_actor_critic(ppo_recipe(tiny_model, value_trunk=trunk, lora=lora), pad_token_id=PAD).eval()
    assert (actor.value_model is None) == (trunk == "shared")
    assert evaluated(actor, PROMPT_IDS, COMPLETION_IDS).values.abs().max() == 0


@pytest.mark.parametrize("lora", [None, Lora(r=4, alpha=8)])
def test_the_divergence_from_the_reference_starts_at_zero(tiny_model: Path, lora: Lora | None) -> None:
    recipe = ppo_recipe(tiny_model, lora=lora)
    actor = load_actor_critic(recipe, pad_token_id=PAD).eval()
    reference = load_reference(recipe, pad_token_id=PAD)
    assert (reference is None) == (lora is not None)
    policy = evaluated(actor, PROMPT_IDS, COMPLETION_IDS)
    base = evaluated(reference or actor, PROMPT_IDS, COMPLETION_IDS, reference=reference is None)
    for estimator in ("k1", "k2", "k3"):
        assert estimate_kl(policy.logprobs, base.logprobs, estimator=estimator).abs().max() == 0


@pytest.mark.parametrize("trunk", ["shared", "adapter", "separate"])
def test_beside_a_bfloat16_model_adapters_and_heads_learn_in_float32(tiny_model: Path, trunk: str) -> None:
    """At a learning rate of 1e-5 most updates of bfloat16 weights are lost in rounding."""
    settings: dict[str, Any] = {"value_trunk": trunk, "lora": Lora(r=2, alpha=4)}
    recipe = ppo_recipe(tiny_model, model_init=ModelInit(dtype="bfloat16"), **settings)
    actor_critic = load_actor_critic(recipe, pad_token_id=PAD)
    trained = {name: p.dtype for name, p in actor_critic.named_parameters() if p.requires_grad}
    assert any("score" in name or "value_head" in name for name in trained)
    assert set(trained.values()) == {torch.float32}, trained
    assert {p.dtype for p in actor_critic.parameters() if not p.requires_grad} >= {torch.bfloat16}
    output = forward(actor_critic, Batch.of(PROMPT_IDS, COMPLETION_IDS, pad_token_id=PAD, padding_free=True))
    assert output.values is not None
    assert output.values.dtype == torch.float32
    output.values.sum().backward()


def test_a_reference_in_bfloat16_keeps_its_rotary_frequencies(tiny_model: Path) -> None:
    """As the policy does, on disk and in an engine; in bfloat16 they would turn it into another model."""
    recipe = ppo_recipe(tiny_model, model_init=ModelInit(dtype="bfloat16"))
    actor = load_actor_critic(recipe, pad_token_id=PAD).eval()
    reference = load_reference(recipe, pad_token_id=PAD, dtype=torch.bfloat16)
    assert next(reference.policy.parameters()).dtype == torch.bfloat16
    prompts, completions = [list(range(10, 200))], [list(range(200, 220))]
    policy, base = (evaluated(model, prompts, completions) for model in (actor, reference))
    assert torch.equal(policy.logprobs, base.logprobs)


def test_with_its_adapter_off_the_policy_is_the_base_model(tiny_model: Path, model: Any) -> None:
    actor = load_actor_critic(ppo_recipe(tiny_model, lora=Lora(r=4, alpha=8)), pad_token_id=PAD).eval()
    plain = ActorCritic(model, value_model=None, temperature=1.0)
    base = evaluated(plain, PROMPT_IDS, COMPLETION_IDS, padding_free=False)
    with torch.no_grad():
        for name, parameter in actor.policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    reference = evaluated(actor, PROMPT_IDS, COMPLETION_IDS, reference=True, padding_free=False)
    assert reference.values is None
    assert torch.equal(reference.logprobs, base.logprobs)
    policy = evaluated(actor, PROMPT_IDS, COMPLETION_IDS, padding_free=False)
    assert (policy.logprobs - base.logprobs).abs().max() > 0.01  # the adapter is on again, and matters


def test_a_reference_cannot_learn(tiny_model: Path) -> None:
    reference = load_reference(ppo_recipe(tiny_model), pad_token_id=PAD)
    assert reference is not None
    assert not reference.training
    assert not any(parameter.requires_grad for parameter in reference.parameters())


def trained_adapter(actor: ActorCritic, name: str) -> None:
    """Move an adapter away from the identity, as training would."""
    with torch.no_grad():
        for parameter, value in actor.policy.named_parameters():
            if f"lora_B.{name}." in parameter:
                value.normal_(std=0.1)


def test_the_two_adapters_do_not_know_each_other(tiny_model: Path) -> None:
    recipe = ppo_recipe(tiny_model, value_trunk="adapter", lora=Lora(r=4, alpha=8))
    actor = load_actor_critic(recipe, pad_token_id=PAD).eval()
    nn.init.normal_(actor.value_head.weight)
    start = evaluated(actor, PROMPT_IDS, COMPLETION_IDS)
    trained_adapter(actor, VALUE_ADAPTER)
    found = evaluated(actor, PROMPT_IDS, COMPLETION_IDS)
    assert torch.equal(found.logprobs, start.logprobs)
    assert (found.values - start.values).abs().max() > 0.01
    values = found.values
    trained_adapter(actor, "default")
    found = evaluated(actor, PROMPT_IDS, COMPLETION_IDS)
    assert torch.equal(found.values, values)
    assert (found.logprobs - start.logprobs).abs().max() > 0.01
    assert torch.equal(evaluated(actor, PROMPT_IDS, COMPLETION_IDS, reference=True).logprobs, start.logprobs)


def test_each_loss_trains_its_own_adapter_and_nothing_else(tiny_model: Path) -> None:
    recipe = ppo_recipe(tiny_model, value_trunk="adapter", lora=Lora(r=4, alpha=8))
    actor = load_actor_critic(recipe, pad_token_id=PAD).train()
    nn.init.normal_(actor.value_head.weight)
    for name in ("default", VALUE_ADAPTER):
        trained_adapter(actor, name)
    evaluated(actor, PROMPT_IDS, COMPLETION_IDS, reference=True)  # peft freezes adapters that do not work
    output = forward(actor, batch_of(PROMPT_IDS, COMPLETION_IDS))
    losses = {False: output.logprobs.sum(), True: output.values.sum()}
    names = dict(actor.named_parameters())
    trained = {name for name in names if "lora_" in name} | {"value_head.weight"}
    for of_value, loss in losses.items():
        actor.zero_grad()
        loss.backward(retain_graph=True)
        moved = {
            name for name, parameter in names.items() if parameter.grad is not None and parameter.grad.abs().max() > 0
        }
        assert moved == {name for name in trained if is_of_value_model(name) == of_value}


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize(
    ("trunk", "lora"),
    [(trunk, lora) for trunk in ("shared", "separate") for lora in (None, Lora(r=4, alpha=8))]
    + [("adapter", Lora(r=4, alpha=8))],
)
def test_gradient_checkpointing_changes_no_gradient(
    tiny_model: Path, trunk: str, lora: Lora | None, padding_free: bool
) -> None:
    batch = batch_of(PROMPT_IDS, COMPLETION_IDS, padding_free=padding_free)

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        recipe = ppo_recipe(tiny_model, value_trunk=trunk, lora=lora, gradient_checkpointing=checkpointing)
        torch.manual_seed(0)
        actor = load_actor_critic(recipe, pad_token_id=PAD).train()
        head = actor.value_head.weight if actor.value_model is None else None
        for name, parameter in actor.named_parameters():
            if "lora_B" in name or ("score" in name and "original" not in name) or parameter is head:
                nn.init.constant_(parameter, 0.05)
        output = forward(actor, batch)
        ((output.logprobs + output.values.square()) * batch.completion_mask).sum().backward()
        return {name: p.grad for name, p in actor.named_parameters() if p.grad is not None}

    plain, saving = gradients(False), gradients(True)
    assert plain.keys() == saving.keys()
    assert any(not is_of_value_model(name) and grad.abs().max() > 0 for name, grad in plain.items())
    assert any(is_of_value_model(name) and grad.abs().max() > 0 for name, grad in plain.items())
    for name, gradient in plain.items():
        torch.testing.assert_close(saving[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_the_tiny_tokenizer_pads_with_the_id_these_tests_use() -> None:
    assert make_tiny_tokenizer().pad_token_id == PAD
    assert np.unique([PAD, make_tiny_tokenizer().eos_token_id]).size == 2
