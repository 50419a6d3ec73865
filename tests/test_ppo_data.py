"""`alignment.ppo_data`: what PPO reads beside its prompts, and the loss on the pretraining mix."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from alignment.actor_critic import load_actor_critic
from alignment.policy import load_model
from alignment.ppo_data import PretrainingMix, read_data
from alignment.ppo_state import make_optimizer
from alignment.ppo_update import Counts, Learner, Targets, loss_of
from alignment.recipe import Data, ModelInit, PpoRecipe, Source
from alignment.rollout import Rollout
from alignment.source_files import SourceError
from reward.conversation import Conversation, Message, Prompt
from reward.render import Renderer
from tests import tiny_ppo
from tests.tiny import SENTENCES
from tests.tiny_ppo import COMPLETION_IDS, PAD, PROMPT_IDS, UNUSED, ppo_recipe

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

renderer = tiny_ppo.renderer  # a fixture


def dialogue(*texts: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(tuple(Message(roles[turn % 2], text) for turn, text in enumerate(texts)))


CONVERSATIONS = [
    dialogue(*SENTENCES[:2]),
    dialogue(*SENTENCES[2:6]),  # two answers
    dialogue("Hi", "Hello."),
    dialogue(*SENTENCES[6:8]),
]


def recipe_with_mix(model: Path, **settings: Any) -> PpoRecipe:
    return ppo_recipe(model, **{"ptx_data": UNUSED, "ptx_coef": 0.5, "batch_size": 4} | settings)


def mix_of(recipe: PpoRecipe, renderer: Renderer, *, max_length: int = 512) -> PretrainingMix:
    return PretrainingMix(CONVERSATIONS, renderer, recipe, max_length=max_length)


@pytest.mark.parametrize("padding_free", [False, True])
def test_the_mask_has_every_token_of_the_assistant_and_no_other(
    tiny_model: Path, renderer: Renderer, padding_free: bool
) -> None:
    mix = mix_of(recipe_with_mix(tiny_model), renderer)
    batch = mix.batch(range(4), iteration=0, padding_free=padding_free, device="cpu")
    texts = sorted(
        renderer.tokenizer.decode(ids[mask])
        for ids, mask in zip(batch.in_rows(batch.tokens), batch.completion_mask, strict=True)
    )
    end = renderer.tokenizer.eos_token
    expected = ("".join(m.content + end for m in c.messages if m.role == "assistant") for c in CONVERSATIONS)
    assert texts == sorted(expected)
    assert mix.num_tokens(range(4), iteration=0) == int(batch.completion_mask.sum())


def test_every_conversation_takes_its_turn(tiny_model: Path, renderer: Renderer) -> None:
    """Eight rows an iteration and four conversations: each stands in two rows, in an order that changes."""
    mix = mix_of(recipe_with_mix(tiny_model, batch_size=8), renderer)
    orders = [[id(rendered) for rendered in mix.chosen(range(8), iteration=iteration)] for iteration in range(3)]
    for order in orders:
        assert sorted(order) == sorted(2 * [id(rendered) for rendered in mix.rendered])
    assert orders[0] != orders[1]


def test_conversations_that_are_too_long_are_counted(tiny_model: Path, renderer: Renderer) -> None:
    shortest = len(renderer.render(CONVERSATIONS[2]).input_ids)
    mix = mix_of(recipe_with_mix(tiny_model), renderer, max_length=shortest)
    assert (len(mix.rendered), sum(mix.too_long.values())) == (1, 3)
    with pytest.raises(SourceError, match="none of the 4 conversations fits into max_length 5; raise it"):
        mix_of(recipe_with_mix(tiny_model), renderer, max_length=5)


# ------------------------------------------------------------------------------------------------------------ the loss


def learner_with(recipe: PpoRecipe, mix: PretrainingMix | None) -> Learner:
    from accelerate import Accelerator

    torch.manual_seed(0)
    actor = load_actor_critic(recipe, pad_token_id=PAD)
    return Learner(recipe, Accelerator(cpu=True), actor, make_optimizer(actor, recipe), PAD, mix)


def rollout_of(prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> tuple[Rollout, Targets]:
    random = torch.Generator().manual_seed(1)
    shape = (len(prompts), max(len(ids) for ids in completions))
    mask = torch.tensor([[t < len(ids) for t in range(shape[1])] for ids in completions])
    logprobs, ref_logprobs, entropies, values, advantages, returns = (
        torch.randn(shape, generator=random) * mask for _ in range(6)
    )
    conversations = [Prompt.of("x").answer("y")] * shape[0]
    rollout = Rollout(
        conversations=conversations,
        prompt_ids=list(prompts),
        completion_ids=list(completions),
        finished=torch.ones(shape[0], dtype=torch.bool),
        completion_mask=mask,
        sampled_logprobs=logprobs - 6,
        logprobs=logprobs - 6,
        ref_logprobs=ref_logprobs - 6,
        entropies=entropies,
        values=values,
    )
    return rollout, Targets(mask, advantages, returns, kl_coef=0.3)


def gradients(learner: Learner, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    learner.model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in learner.model.named_parameters() if p.grad is not None}


def fine_tuning_loss(model: Any, renderer: Renderer) -> torch.Tensor:
    """transformers' own loss over the conversations, one at a time, as a mean over all labels."""
    total, count = torch.zeros(()), 0
    for conversation in CONVERSATIONS:
        rendered = renderer.render(conversation)
        labels = [
            token if flag else -100 for token, flag in zip(rendered.input_ids, rendered.completion_mask, strict=True)
        ]
        number = sum(rendered.completion_mask)
        loss = model(input_ids=torch.tensor([rendered.input_ids]), labels=torch.tensor([labels])).loss
        total, count = total + loss * number, count + number
    return total / count


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_loss_is_that_of_fine_tuning_and_is_added_with_its_coefficient(
    tiny_model: Path, renderer: Renderer, temperature: float
) -> None:
    rollout, targets = rollout_of([*PROMPT_IDS, [8, 9]], [*COMPLETION_IDS, [33, 34, 2]])
    rows, completion = range(4), float(targets.mask.sum())
    recipe = recipe_with_mix(tiny_model, temperature=temperature, value_trunk="shared")
    mix = mix_of(recipe, renderer)
    learner = learner_with(recipe, mix)
    counts = Counts(completion, mix.num_tokens(rows, iteration=0))
    loss, sums = loss_of(learner, rollout, rows, targets, counts, iteration=0)
    found = gradients(learner, loss)

    plain = learner_with(ppo_recipe(tiny_model, temperature=temperature, value_trunk="shared"), None)
    without, _ = loss_of(plain, rollout, rows, targets, Counts(completion, 0), iteration=0)
    of_ppo = gradients(plain, without)
    model = load_model(str(tiny_model), init=ModelInit(), pad_token_id=PAD)
    expected = fine_tuning_loss(model, renderer)
    expected.backward()
    assert sums["ptx_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert loss.item() == pytest.approx(without.item() + 0.5 * expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        total = of_ppo[f"policy.{name}"] + 0.5 * parameter.grad
        torch.testing.assert_close(found[f"policy.{name}"], total, atol=1e-5, rtol=1e-4, msg=name)


def test_the_penalty_in_the_loss_has_the_coefficient_of_the_iteration(tiny_model: Path) -> None:
    rollout, targets = rollout_of(PROMPT_IDS, COMPLETION_IDS)
    counts, rows = Counts(float(targets.mask.sum()), 0), range(3)
    losses: dict[str, float] = {}
    for where in ("reward", "loss"):
        learner = learner_with(ppo_recipe(tiny_model, kl_in=where, kl_estimator="k3", value_trunk="shared"), None)
        loss, sums = loss_of(learner, rollout, rows, targets, counts, iteration=0)
        losses[where] = loss.item()
        assert ("kl_loss" in sums) == (where == "loss")
        if where == "loss":
            assert losses["loss"] - losses["reward"] == pytest.approx(0.3 * sums["kl_loss"], rel=1e-4)


# ------------------------------------------------------------------------------------------------- held-out prompts


def write_prompts(file: Path, texts: Sequence[str]) -> Data:
    file.write_text("".join(json.dumps(Prompt.of(text).to_json()) + "\n" for text in texts), encoding="utf-8")
    return Data(sources=[Source(name="file", path=str(file), split="all")])


def test_what_is_held_out_is_not_trained_on(tiny_model: Path, renderer: Renderer, tmp_path: Path) -> None:
    recipe = ppo_recipe(
        tiny_model,
        prompts=write_prompts(tmp_path / "train.jsonl", ["a", "b", "c", "d"]),
        eval_prompts=write_prompts(tmp_path / "eval.jsonl", ["d", "e", "b"]),
    )
    data = read_data(recipe, renderer)
    assert sorted(prompt.text for prompt in data.prompts) == ["a", "c"]
    assert sorted(prompt.text for prompt in data.eval_prompts) == ["b", "d", "e"]
    assert data.account["held_out"] == 2
    everything = recipe.model_copy(update={"eval_prompts": recipe.prompts})
    with pytest.raises(SourceError, match="nothing is left to train on"):
        read_data(everything, renderer)


def test_without_further_data_the_account_is_that_of_the_prompts(
    tiny_model: Path, renderer: Renderer, tmp_path: Path
) -> None:
    data = read_data(ppo_recipe(tiny_model, prompts=write_prompts(tmp_path / "train.jsonl", ["a"])), renderer)
    assert (data.eval_prompts, data.mix) == ([], None)
    assert data.account.keys() == {"counts", "hash", "too_long"}
