"""Continuations behind texts that begin alike: with a shared prefix the numbers are those of the whole texts.

Expected log-probabilities come from transformers' own loss on one unpadded sequence at a time.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from reward.continuations import PrefixCache, Tails, pad_left, read_whole, why_not_shared

SHORT = Tails.of([[17], [230]])
"""One token each: no more than the text must be read."""
LONG = Tails.of([[17, 31, 8], [17, 31, 9, 40], [230], [231, 17], [17]])


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def make_texts(num: int, *, prefix: int = 60, seed: int = 0) -> tuple[list[int], list[list[int]]]:
    """Random ids of a prefix, and texts of unlike lengths behind it."""
    draw = random.Random(seed)
    ids = [draw.randrange(5, 500) for _ in range(prefix)]
    return ids, [[*ids, *(draw.randrange(5, 500) for _ in range(draw.choice([1, 2, 5, 30, 90])))] for _ in range(num)]


def one_by_one(model: Any, texts: list[list[int]], tails: Tails) -> list[list[float]]:
    def logprob(text: list[int], tail: Any) -> float:
        labels = torch.tensor([[-100] * len(text) + list(tail)])
        with torch.no_grad():
            return -float(model(input_ids=torch.tensor([text + list(tail)]), labels=labels).loss) * len(tail)

    return [[logprob(text, tail) for tail in tails.tails] for text in texts]


def assert_close(found: list[list[float]], expected: list[list[float]]) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-4, rtol=0)


@pytest.fixture
def seen(model: Any) -> Any:
    """Shapes of the ids of every forward."""
    shapes: list[tuple[int, ...]] = []

    def note(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shapes.append(tuple((args[0] if args else kwargs["input_ids"]).shape))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    yield shapes
    hook.remove()


# ----------------------------------------------------------------------------------------------- what is read


def test_tails_are_read_along_as_few_stems_as_needed() -> None:
    tails = Tails.of([[1, 2, 3], [1, 2, 4], [1, 5], [6], [7, 8]])
    assert tails.stems == ((1, 2), (7,))
    assert tails.stem_of == (0, 0, 0, 0, 1)
    assert (tails.along(0), tails.along(1)) == ([0, 1, 2, 3], [4])
    assert Tails.of([[1], [2]]).stems == ((),)


def test_padding_on_the_left_counts_positions_from_the_first_token() -> None:
    padded = pad_left([[7, 8, 9], [5]], pad_token_id=3)
    assert padded["input_ids"].tolist() == [[7, 8, 9], [3, 3, 5]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert padded["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]


@pytest.mark.parametrize("tails", [SHORT, LONG], ids=["one token", "several"])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_whole_texts(model: Any, tails: Tails, batch_size: int) -> None:
    _, texts = make_texts(7)
    found = read_whole(model, texts, tails, pad_token_id=0, batch_size=batch_size)
    assert_close(found, one_by_one(model, texts, tails))


def test_verdicts_of_one_token_cost_one_row_a_text(model: Any, seen: list[tuple[int, ...]]) -> None:
    _, texts = make_texts(6)
    read_whole(model, texts, SHORT, pad_token_id=0, batch_size=2)
    assert [rows for rows, _ in seen] == [2, 2, 2]


# --------------------------------------------------------------------------------------------- shared prefix


@pytest.mark.parametrize("tails", [SHORT, LONG], ids=["one token", "several"])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_a_shared_prefix_changes_no_number(model: Any, tails: Tails, batch_size: int) -> None:
    prefix, texts = make_texts(9)
    expected = one_by_one(model, texts, tails)
    cache = PrefixCache(model)
    assert_close(cache.read(texts, tails, prefix=prefix, batch_size=batch_size), expected)
    backwards = cache.read(texts[::-1], tails, prefix=prefix, batch_size=batch_size)
    assert_close(backwards[::-1], expected)
    for text, row in zip(texts, expected, strict=True):
        assert_close(cache.read([text], tails, prefix=prefix, batch_size=batch_size), [row])


def test_the_prefix_is_computed_once_and_each_text_once(model: Any, seen: list[tuple[int, ...]]) -> None:
    prefix, texts = make_texts(9)
    cache = PrefixCache(model)
    for part in (texts[:1], texts[1:4], texts[4:]):
        cache.read(part, SHORT, prefix=prefix, batch_size=2)
    assert seen[0] == (1, len(prefix))
    rows = seen[1:]
    assert {number for number, _ in rows} == {1}  # nothing is copied to a batch
    assert sum(length for _, length in rows) == sum(len(text) - len(prefix) for text in texts)


def test_what_is_kept_is_not_changed_by_reading(model: Any) -> None:
    prefix, texts = make_texts(4)
    cache = PrefixCache(model)
    cache.read(texts, SHORT, prefix=prefix, batch_size=4)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.kept.layers]
    cache.read([text[:40] for text in texts] + texts, LONG, prefix=prefix, batch_size=2)
    assert all(layer.keys.shape[2] == len(prefix) for layer in cache.kept.layers)
    for layer, (keys, values) in zip(cache.kept.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


def test_a_prefix_that_texts_do_not_have_costs_time_alone(model: Any) -> None:
    prefix, texts = make_texts(5)
    expected = one_by_one(model, texts, SHORT)
    cache = PrefixCache(model)
    for claimed in ([*prefix, 499, 498], prefix[:10], [3, 3, 3], []):
        assert_close(cache.read(texts, SHORT, prefix=claimed, batch_size=4), expected)


def test_a_text_that_is_all_prefix(model: Any) -> None:
    prefix, texts = make_texts(3)
    texts = [*texts, list(prefix), prefix[:1]]
    assert_close(PrefixCache(model).read(texts, LONG, prefix=prefix, batch_size=8), one_by_one(model, texts, LONG))


def test_no_texts(model: Any) -> None:
    assert PrefixCache(model).read([], SHORT, prefix=[1, 2], batch_size=2) == []
    assert read_whole(model, [], SHORT, pad_token_id=0, batch_size=2) == []


# ------------------------------------------------------------------------------------------------ other models


def made(name: str, **settings: Any) -> Any:
    """A tiny random model of a family by the names of its config and causal model."""
    import transformers

    shape = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(transformers, f"{name}Config")(**(shape | settings))
    torch.manual_seed(0)
    found = getattr(transformers, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(config).eval()
    for parameter in found.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return found


@pytest.mark.parametrize("name", ["GPT2", "Qwen2", "Mistral"])
def test_other_transformers_share_a_prefix_too(name: str) -> None:
    """GPT-2 has absolute positions, Qwen2 biases, Mistral a window only where its config has one."""
    settings: dict[str, dict[str, Any]] = {
        "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
        "Qwen2": {"intermediate_size": 64, "num_key_value_heads": 2},
        "Mistral": {"intermediate_size": 64, "num_key_value_heads": 2, "sliding_window": None},
    }
    model = made(name, **settings[name])
    assert why_not_shared(model) is None
    prefix, texts = make_texts(5)
    found = PrefixCache(model).read(texts, LONG, prefix=prefix, batch_size=4)
    assert_close(found, one_by_one(model, texts, LONG))


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        (
            "Mistral",
            {"intermediate_size": 64, "num_key_value_heads": 2, "sliding_window": 8},
            "its layers have a sliding window",
        ),
        ("Mamba", {"state_size": 4}, "its layers have linear_attention"),
    ],
)
def test_a_model_that_cannot_share_says_why(name: str, settings: dict[str, Any], reason: str) -> None:
    assert why_not_shared(made(name, **settings)) == reason


def test_a_cache_that_is_not_known_to_leave_its_tensors_alone_says_why(model: Any) -> None:
    from transformers.cache_utils import DynamicLayer

    class InPlaceLayer(DynamicLayer):
        pass

    def disguise(_module: Any, _inputs: Any, output: Any) -> None:
        for layer in getattr(output.past_key_values, "layers", []):
            layer.__class__ = InPlaceLayer

    hook = model.register_forward_hook(disguise)
    try:
        assert why_not_shared(model) == "it keeps InPlaceLayer layers, not plain keys and values"
    finally:
        hook.remove()


def test_another_attention_says_why(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager")
    assert why_not_shared(model) == "attention 'eager' takes no block mask; use sdpa"


def test_wrong_numbers_are_found_out(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a model that takes the mask and does not heed it."""
    import reward.continuations as module

    plain = module.lay_out

    def unmasked(*args: Any, **kwargs: Any) -> Any:
        packed = plain(*args, **kwargs)
        packed.rests.zero_()
        packed.groups.zero_()
        return packed

    monkeypatch.setattr(module, "lay_out", unmasked)
    assert "numbers differ" in str(why_not_shared(model))
