"""`alignment.rollout` on a tiny random Llama: what a rollout holds, and which prompts an iteration asks."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from alignment import rollout as rollout_module
from alignment.actor_critic import load_actor_critic, load_reference
from alignment.generate import Generator
from alignment.recipe import PpoRecipe, Sampling
from alignment.rollout import collect_rollout, evaluate_tokens, iteration_prompts, micro_batches, sample_answers
from reward.conversation import Prompt
from reward.render import Renderer
from tests import tiny_ppo
from tests.one_process import forget_accelerate
from tests.tiny import make_tiny_model
from tests.tiny_ppo import COMPLETION_IDS, PAD, PROMPT_IDS, PROMPTS, logprobs_alone, ppo_recipe

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

model, renderer = tiny_ppo.model, tiny_ppo.renderer  # fixtures


# ------------------------------------------------------------------------------------------------- rollouts


@pytest.fixture
def accelerator() -> Iterator[Any]:
    from accelerate import Accelerator

    forget_accelerate()
    yield Accelerator(cpu=True)
    forget_accelerate()


def test_a_rollout_holds_what_plain_forward_passes_say(
    tiny_model: Path, tmp_path: Path, model: Any, renderer: Renderer, accelerator: Any
) -> None:
    recipe = ppo_recipe(make_tiny_model(tmp_path, seed=1), temperature=0.8)
    actor = load_actor_critic(recipe, pad_token_id=PAD)
    reference = load_reference(ppo_recipe(tiny_model, temperature=0.8), pad_token_id=PAD)
    generator = Generator(actor.policy, renderer, recipe.sampling)
    asked = (PROMPTS[:5], list(range(5)))
    rollout = collect_rollout(actor, reference, generator, asked, recipe=recipe, iteration=3, accelerator=accelerator)
    assert [conversation.prompt for conversation in rollout.conversations] == PROMPTS[:5]
    lengths = [len(ids) for ids in rollout.completion_ids]
    assert rollout.completion_mask.sum(dim=1).tolist() == lengths
    for row, (prompt, completion) in enumerate(zip(rollout.prompt_ids, rollout.completion_ids, strict=True)):
        assert prompt == renderer.render_prompt(PROMPTS[row])
        text, finished = renderer.decode(completion)
        assert (rollout.conversations[row].completion, bool(rollout.finished[row])) == (text, finished)
        policy = logprobs_alone(actor.policy, prompt, completion, temperature=0.8)
        torch.testing.assert_close(rollout.logprobs[row, : lengths[row]], policy, atol=1e-5, rtol=0)
        base = logprobs_alone(model, prompt, completion, temperature=0.8)
        torch.testing.assert_close(rollout.ref_logprobs[row, : lengths[row]], base, atol=1e-5, rtol=0)
    for name in ("logprobs", "ref_logprobs", "entropies", "values"):
        assert getattr(rollout, name)[~rollout.completion_mask].abs().sum() == 0
    again = collect_rollout(actor, reference, generator, asked, recipe=recipe, iteration=3, accelerator=accelerator)
    assert again.completion_ids == rollout.completion_ids
    later = collect_rollout(actor, reference, generator, asked, recipe=recipe, iteration=4, accelerator=accelerator)
    assert later.completion_ids != rollout.completion_ids


@pytest.mark.parametrize(("iteration", "asked"), [(0, False), (2, False), (3, True)])
def test_the_reference_is_asked_once_the_policy_has_moved(
    tiny_model: Path, model: Any, renderer: Renderer, accelerator: Any, iteration: int, asked: bool
) -> None:
    """Two iterations of critic warm-up: the policy of the third rollout still is the start."""
    recipe = ppo_recipe(tiny_model, critic_warmup_iterations=2)
    actor, reference = (load_actor_critic(recipe, pad_token_id=PAD) for _ in range(2))
    calls: list[int] = []
    reference.register_forward_hook(lambda *_: calls.append(1))
    generator = Generator(actor.policy, renderer, recipe.sampling)
    prompts = (PROMPTS[:3], list(range(3)))
    rollout = collect_rollout(
        actor, reference, generator, prompts, recipe=recipe, iteration=iteration, accelerator=accelerator
    )
    assert bool(calls) == asked
    torch.testing.assert_close(rollout.ref_logprobs, rollout.logprobs, atol=1e-5 if asked else 0, rtol=0)


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("batches", [[[0], [1], [2]], [[2, 0], [1]], [[1, 2], [0]]])
def test_what_is_known_of_tokens_does_not_depend_on_the_batch(
    tiny_model: Path, batches: list[list[int]], padding_free: bool
) -> None:
    actor = load_actor_critic(ppo_recipe(tiny_model, value_trunk="shared"), pad_token_id=PAD).eval()
    nn.init.normal_(actor.value_head.weight)
    options: dict[str, Any] = {
        "is_start": False,
        "pad_token_id": PAD,
        "padding_free": padding_free,
        "device": "cpu",
    }
    together = evaluate_tokens(actor, actor, PROMPT_IDS, COMPLETION_IDS, batches=[[0, 1, 2]], **options)
    apart = evaluate_tokens(actor, actor, PROMPT_IDS, COMPLETION_IDS, batches=batches, **options)
    assert torch.equal(apart[0], together[0])
    assert apart[0].tolist() == [[True, True, False, False], [True] * 4, [True, False, False, False]]
    for ours, theirs in zip(apart[1:], together[1:], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_an_answer_depends_on_its_row_and_not_on_where_sampling_began(model: Any, renderer: Renderer) -> None:
    generator = Generator(model, renderer, Sampling(max_new_tokens=6, batch_size=2))
    _, whole, _ = sample_answers(generator, PROMPTS[:6], list(range(6)), seed=5)
    _, part, _ = sample_answers(generator, PROMPTS[2:6], [2, 3, 4, 5], seed=5)
    assert part == whole[2:]
    assert len({tuple(ids) for ids in whole}) == 6
    for size in (1, 4, 6):
        other = Generator(model, renderer, Sampling(max_new_tokens=6, batch_size=size))
        assert sample_answers(other, PROMPTS[:6], list(range(6)), seed=5)[1] == whole
    assert sample_answers(generator, PROMPTS[:6], list(range(6)), seed=6)[1] != whole


def test_prompts_of_like_lengths_are_answered_together(
    model: Any, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = Generator(model, renderer, Sampling(max_new_tokens=2, batch_size=2))
    asked: list[list[int]] = []
    sample = generator.sample

    def watched(prompts: Sequence[Sequence[int]], **options: Any) -> Any:
        asked.append([len(ids) for ids in prompts])
        return sample(prompts, **options)

    monkeypatch.setattr(generator, "sample", watched)
    prompt_ids, completion_ids, drawn = sample_answers(generator, PROMPTS[:6], list(range(6)), seed=5)
    lengths = [len(ids) for ids in prompt_ids]
    assert lengths != sorted(lengths)
    assert [length for batch in asked for length in batch] == sorted(lengths)
    for row, completion in enumerate(completion_ids):  # everything stands in its own row again
        expected = logprobs_alone(model, prompt_ids[row], completion, temperature=1.0)
        torch.testing.assert_close(drawn[row], expected, atol=1e-5, rtol=0)


def test_micro_batches_hold_texts_of_like_lengths() -> None:
    prompts, completions = [[1] * n for n in (9, 2, 5, 1, 7, 3)], [[1] * n for n in (1, 2, 5, 1, 1, 9)]
    assert micro_batches(prompts, completions, range(6), size=2) == [[3, 1], [4, 0], [2, 5]]
    assert micro_batches(prompts, completions, range(1, 4), size=2) == [[3, 1], [2]]


# ------------------------------------------------------------------------------- prompts of an iteration


def shares(
    monkeypatch: pytest.MonkeyPatch, prompts: Sequence[Prompt], recipe: PpoRecipe, *, iteration: int, processes: int
) -> list[tuple[list[Prompt], list[int]]]:
    monkeypatch.setattr(rollout_module, "world_size", lambda: processes)
    found: list[tuple[list[Prompt], list[int]]] = []
    for index in range(processes):
        monkeypatch.setattr(rollout_module, "process_index", lambda index=index: index)
        found.append(iteration_prompts(prompts, recipe, iteration=iteration))
    return found


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("iteration", [0, 3])
def test_any_number_of_processes_takes_the_same_prompts_in_every_mini_batch(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, processes: int, iteration: int
) -> None:
    recipe = ppo_recipe(tiny_model, batch_size=24, mini_batch_size=8)
    prompts = [Prompt.of(f"question {number}") for number in range(37)]
    [(alone, alone_rows)] = shares(monkeypatch, prompts, recipe, iteration=iteration, processes=1)
    assert alone_rows == list(range(24))
    together = shares(monkeypatch, prompts, recipe, iteration=iteration, processes=processes)
    share = 8 // processes
    for first in (0, 8, 16):
        at = first // processes
        taken = [row for _, rows in together for row in rows[at : at + share]]
        assert sorted(taken) == list(range(first, first + 8))
        texts = [prompt.text for chosen, _ in together for prompt in chosen[at : at + share]]
        assert sorted(texts) == sorted(prompt.text for prompt in alone[first : first + 8])
    for chosen, rows in together:
        assert chosen == [alone[row] for row in rows]


@pytest.mark.parametrize("number", [5, 8, 37])
def test_every_epoch_asks_every_prompt_once_in_another_order(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, number: int
) -> None:
    recipe = ppo_recipe(tiny_model)  # 8 prompts an iteration
    prompts = [Prompt.of(f"question {i}") for i in range(number)]
    asked = [
        prompt.text
        for iteration in range(number)
        for prompt in shares(monkeypatch, prompts, recipe, iteration=iteration, processes=1)[0][0]
    ]
    epochs = [asked[start : start + number] for start in range(0, len(asked), number)]
    assert len(epochs) == 8
    for epoch in epochs:
        assert Counter(epoch) == Counter(prompt.text for prompt in prompts)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_the_order_of_prompts_follows_the_seed(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    prompts = [Prompt.of(f"question {i}") for i in range(50)]
    recipes = [ppo_recipe(tiny_model).model_copy(update={"seed": seed}) for seed in (1, 1, 2)]
    first, same, other = (shares(monkeypatch, prompts, r, iteration=0, processes=1)[0][0] for r in recipes)
    assert first == same
    assert first != other
