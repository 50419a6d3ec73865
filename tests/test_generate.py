"""`alignment.generate` on a tiny random Llama: what is drawn, against plain forward passes."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from alignment.generate import Completion, Generator, batched, derive_seed, fitting_prompts, pad_left, read_prompts
from alignment.policy import load_model
from alignment.recipe import ModelInit, Sampling
from alignment.rollout import sample_answers
from alignment.source_files import SourceError
from reward.conversation import Prompt
from reward.render import Renderer, TooLong
from tests import tiny_ppo
from tests.tiny_ppo import PAD, PROMPTS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

model, renderer = tiny_ppo.model, tiny_ppo.renderer  # fixtures


def next_logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(ids)])).logits[0, -1].double()


# ------------------------------------------------------------------------------------------ small functions


def test_padding_on_the_left_by_hand() -> None:
    input_ids, attention_mask = pad_left([[5, 6, 7], [8]], pad_token_id=PAD)
    assert input_ids.tolist() == [[5, 6, 7], [PAD, PAD, 8]]
    assert attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("size", [1, 3, 7, 8])
def test_batches_hold_every_item_once_and_in_order(size: int) -> None:
    batches = list(batched(range(7), size))
    assert [item for batch in batches for item in batch] == list(range(7))
    assert all(len(batch) == size for batch in batches[:-1])


def test_seeds_are_the_same_on_every_machine_and_differ_between_uses() -> None:
    digest = hashlib.sha256(b"42/prompts/3").hexdigest()
    assert derive_seed(42, "prompts", 3) == int(digest[:16], 16) // 2
    seeds = [derive_seed(seed, name, number) for seed in range(5) for name in ("a", "b") for number in range(5)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_prompts_that_do_not_fit_are_left_out_and_counted_by_source(renderer: Renderer) -> None:
    short, other, long = (
        Prompt.of(text, source=source) for text, source in (("Hi", "a"), ("Ho", "a"), ("Hi " * 40, "b"))
    )
    length = len(renderer.render_prompt(short))
    assert fitting_prompts([short, long, other], renderer, max_length=length) == ([short, other], {"b": 1})
    longest = len(renderer.render_prompt(short.with_preprompt("Please be kind and careful")))
    texts = ["Be kind", "Please be kind and careful"]
    assert fitting_prompts([short], renderer, max_length=longest, preprompts=texts) == ([short], {})
    with pytest.raises(SourceError, match="none of the 1 prompts fits into"):
        fitting_prompts([short], renderer, max_length=longest - 1, preprompts=texts)


# ------------------------------------------------------------------------------------------------ answers


def greedy(model: Any, renderer: Renderer, prompt: Prompt, *, max_new_tokens: int) -> list[int]:
    ids, new = renderer.render_prompt(prompt), []
    while len(new) < max_new_tokens and not set(new) & renderer.end_ids:
        new.append(int(next_logits(model, [*ids, *new]).argmax()))
    return new


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_greedy_answers_are_the_most_likely_tokens_whatever_the_batch(
    model: Any, renderer: Renderer, batch_size: int
) -> None:
    sampling = Sampling(temperature=0.0, max_new_tokens=8, batch_size=batch_size)
    answers = Generator(model, renderer, sampling).answer(PROMPTS, seed=1)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = greedy(model, renderer, prompt, max_new_tokens=8)
        assert answer == Completion(*renderer.decode(ids), len(ids))
    assert len({answer.text for answer in answers}) > 3  # so that a wrong order would show


def test_greedy_answers_do_not_depend_on_the_seed_or_on_the_other_prompts(model: Any, renderer: Renderer) -> None:
    generator = Generator(model, renderer, Sampling(temperature=0.0, max_new_tokens=8))
    alone = [generator.answer([prompt], seed=position)[0] for position, prompt in enumerate(PROMPTS)]
    assert generator.answer(PROMPTS[::-1], seed=99)[::-1] == alone


def test_equal_seeds_give_equal_answers_and_different_ones_different(model: Any, renderer: Renderer) -> None:
    generator = Generator(model, renderer, Sampling(temperature=1.0, max_new_tokens=8, batch_size=3))
    first = generator.answer(PROMPTS, seed=1)
    torch.manual_seed(0)  # the state that a caller left does not matter
    assert generator.answer(PROMPTS, seed=1) == first
    second = generator.answer(PROMPTS, seed=2)
    assert sum(a.text == b.text for a, b in zip(first, second, strict=True)) == 0
    assert len({answer.text for answer in generator.answer([PROMPTS[1]] * 6, seed=1)}) == 6


def surprise(
    model: Any, renderer: Renderer, sampling: Sampling, *, temperature: float, seeds: Sequence[int] | None = None
) -> tuple[float, float]:
    """Mean of -log p of 2000 drawn first tokens, and how many standard errors it is off the entropy of p."""
    prompt = renderer.render_prompt(PROMPTS[0])
    distribution = torch.log_softmax(next_logits(model, prompt) / temperature, dim=-1)
    torch.manual_seed(7)
    ids, length = Generator(model, renderer, sampling).sample([prompt] * 2000, seeds=seeds)
    drawn = -distribution[ids[:, length]].numpy()
    entropy = float(-(distribution.exp() * distribution).sum())
    return float(drawn.mean()), float((drawn.mean() - entropy) / (drawn.std() / math.sqrt(len(drawn))))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.2])
def test_samples_follow_the_whole_distribution_at_their_temperature(
    model: Any, renderer: Renderer, temperature: float
) -> None:
    sampling = Sampling(temperature=temperature, max_new_tokens=1)
    assert abs(surprise(model, renderer, sampling, temperature=temperature)[1]) < 4
    assert abs(surprise(model, renderer, sampling, temperature=temperature + 0.4)[1]) > 8  # the check can tell


@pytest.mark.parametrize("temperature", [0.5, 1.2])
def test_rows_with_seeds_of_their_own_follow_it_too(model: Any, renderer: Renderer, temperature: float) -> None:
    sampling = Sampling(temperature=temperature, max_new_tokens=1)
    seeds = [derive_seed(3, row) for row in range(2000)]
    assert abs(surprise(model, renderer, sampling, temperature=temperature, seeds=seeds)[1]) < 4
    assert abs(surprise(model, renderer, sampling, temperature=temperature + 0.4, seeds=seeds)[1]) > 8


def test_a_seed_is_all_that_tells_rows_apart(model: Any, renderer: Renderer) -> None:
    generator = Generator(model, renderer, Sampling(temperature=1.0, max_new_tokens=8))
    prompt = renderer.render_prompt(PROMPTS[1])
    ids, _ = generator.sample([prompt] * 3, seeds=[7, 8, 7])
    assert torch.equal(ids[0], ids[2])
    assert not torch.equal(ids[0], ids[1])


def test_top_p_keeps_the_likeliest_tokens_only(model: Any, renderer: Renderer) -> None:
    prompt = renderer.render_prompt(PROMPTS[0])
    probabilities, order = next_logits(model, prompt).softmax(dim=-1).sort(descending=True)
    nucleus = order[: int((probabilities.cumsum(0) < 0.3).sum()) + 1].tolist()
    torch.manual_seed(0)
    generator = Generator(model, renderer, Sampling(temperature=1.0, top_p=0.3, max_new_tokens=1))
    ids, length = generator.sample([prompt] * 500)
    assert set(ids[:, length].tolist()) <= set(nucleus)
    assert len(nucleus) > 1


@pytest.mark.parametrize("setting", [{"min_p": 0.5}, {"typical_p": 0.2}, {"epsilon_cutoff": 0.01}])
def test_the_recipe_alone_decides_how_answers_are_drawn(
    tiny_model: Path, renderer: Renderer, setting: dict[str, Any]
) -> None:
    """PPO's log-probabilities are those of softmax(logits / temperature); a checkpoint must not bend what is drawn."""
    own = load_model(str(tiny_model), init=ModelInit(), pad_token_id=PAD).eval()
    own.generation_config.update(**setting)
    assert abs(surprise(own, renderer, Sampling(temperature=1.0, max_new_tokens=1), temperature=1.0)[1]) < 4


@pytest.mark.parametrize(
    "setting", [{"repetition_penalty": 3.0}, {"no_repeat_ngram_size": 1}, {"suppress_tokens": list(range(4, 500))}]
)
def test_the_recipe_alone_decides_what_is_the_most_likely_token(
    tiny_model: Path, renderer: Renderer, setting: dict[str, Any]
) -> None:
    own = load_model(str(tiny_model), init=ModelInit(), pad_token_id=PAD).eval()
    own.generation_config.update(**setting)
    generator = Generator(own, renderer, Sampling(temperature=0.0, max_new_tokens=8))
    texts = [renderer.decode(greedy(own, renderer, prompt, max_new_tokens=8))[0] for prompt in PROMPTS]
    assert [answer.text for answer in generator.answer(PROMPTS, seed=0)] == texts


def test_defaults_of_the_checkpoint_for_sampling_give_way_to_the_recipe(tiny_model: Path, renderer: Renderer) -> None:
    """Llama 2 ships temperature 0.6 and top_p 0.9, Qwen top_k 20."""
    own = load_model(str(tiny_model), init=ModelInit(), pad_token_id=PAD).eval()
    own.generation_config.update(do_sample=True, temperature=0.1, top_p=0.2, top_k=3, max_length=20)
    assert abs(surprise(own, renderer, Sampling(temperature=1.0, max_new_tokens=1), temperature=1.0)[1]) < 4


class ScriptedModel(nn.Module):
    """Answers with rows written beforehand, as `generate` would give them."""

    generation_config: Any = None

    def __init__(self, rows: list[list[int]]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.rows = rows

    def generate(self, *, input_ids: torch.Tensor, logits_processor: Any, **_: Any) -> torch.Tensor:
        ids = torch.cat([input_ids, torch.tensor(self.rows)], dim=1)
        for length in range(input_ids.shape[1], ids.shape[1]):
            for processor in logits_processor:
                processor(ids[:, :length], torch.zeros(len(ids), 512))
        return ids


def test_an_answer_ends_at_its_end_token_or_was_cut_off(renderer: Renderer) -> None:
    end, word = renderer.tokenizer.eos_token_id, renderer.tokenizer.encode("bread")
    rows = [
        [*word, end, PAD, PAD],
        (word * 4)[: len(word) + 3],
        [end, PAD, PAD, *[PAD] * len(word)],
    ]
    generator = Generator(ScriptedModel(rows), renderer, Sampling(max_new_tokens=len(word) + 3))
    answers = generator.answer([Prompt.of("q")] * 3, seed=0)
    cut = renderer.tokenizer.decode(rows[1])
    assert answers == [
        Completion("bread", finished=True, num_tokens=len(word) + 1),
        Completion(cut, finished=False, num_tokens=len(word) + 3),
        Completion("", finished=True, num_tokens=1),
    ]
    _, completion_ids, _ = sample_answers(generator, [Prompt.of("q")] * 3, [0, 1, 2], seed=0)
    assert completion_ids == [[*word, end], rows[1], [end]]


def test_a_prompt_over_the_limit_is_refused(model: Any, renderer: Renderer) -> None:
    length = len(renderer.render_prompt(PROMPTS[0]))
    with pytest.raises(TooLong):
        Generator(model, renderer, Sampling(max_prompt_tokens=length - 1, max_new_tokens=1)).answer(PROMPTS[:1], seed=0)
    assert Generator(model, renderer, Sampling(max_prompt_tokens=length, max_new_tokens=1)).answer(PROMPTS[:1], seed=0)


def test_no_prompts_have_no_answers(model: Any, renderer: Renderer) -> None:
    assert Generator(model, renderer, Sampling()).answer([], seed=0) == []


# ------------------------------------------------------------------------------------------- without padding


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_prompts_read_without_padding_give_the_same_answers(model: Any, renderer: Renderer, temperature: float) -> None:
    """A prompt of one token has nothing to be read before `generate` begins."""
    prompts = [[5, 6, 7, 8, 9, 10], [11], list(range(20, 60)), [12, 13]]
    generator = Generator(model, renderer, Sampling(temperature=temperature, max_new_tokens=12, max_prompt_tokens=64))
    assert generator.padding_free
    seeds = None if temperature == 0 else [1, 2, 3, 4]
    found, length = generator.sample(prompts, seeds=seeds)
    generator.padding_free = False
    expected, padded_length = generator.sample(prompts, seeds=seeds)
    assert length == padded_length == 40
    assert torch.equal(found, expected)
    for row, prompt in enumerate(prompts) if temperature == 0 else ():
        first = int(found[row, length])
        assert first == int(next_logits(model, prompt).argmax())


def test_what_is_read_without_padding_is_what_each_prompt_reads_alone(model: Any) -> None:
    prompts = [[5, 6, 7, 8], [11], list(range(20, 30))]
    cache = read_prompts(model, prompts, device=torch.device("cpu"))
    assert cache.get_seq_length() == 9
    for row, prompt in enumerate(prompts):
        length = len(prompt) - 1
        alone = model(input_ids=torch.tensor([prompt]), use_cache=True).past_key_values
        for padded, plain in zip(cache.layers, alone.layers, strict=True):
            for found, expected in ((padded.keys, plain.keys), (padded.values, plain.values)):
                torch.testing.assert_close(found[row, :, 9 - length :], expected[0, :, :length], atol=1e-5, rtol=1e-4)
                assert not found[row, :, : 9 - length].any()
