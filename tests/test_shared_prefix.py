"""`reward.shared_prefix`: packed texts give the scores and gradients of each text alone, whatever stands beside it."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from alignment.policy import lora_config
from alignment.recipe import Lora
from reward.collate import PreferenceCollator
from reward.conversation import Conversation, Message
from reward.model import RewardModel
from reward.scorer import score_all
from reward.shared_prefix import Group, PackedTexts, pack, packed_scores, why_not_packed
from tests.tiny import RANDOM_PAD, make_reward_model, random_model

if TYPE_CHECKING:
    from pathlib import Path

PAIRS = [([5, 6, 7, 8, 9], [5, 6, 7, 10]), ([11, 12], [11, 12, 13, 14, 15, 16]), ([20, 21], [22]), ([30] * 9, [30] * 4)]


def classifier(config: type[Any] = LlamaConfig, **sizes: Any) -> Any:
    return random_model(AutoModelForSequenceClassification, config, num_labels=1, **sizes)


def alone(model: Any, text: list[int]) -> torch.Tensor:
    """The score of one text in a batch of one, without padding or masks."""
    return model(input_ids=torch.tensor([text])).logits[0, 0]


# --------------------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize(
    ("texts", "prefix", "rests"),
    [
        ([[1, 2, 3], [1, 2, 4, 5]], [1, 2], [[3], [4, 5]]),
        ([[1, 2], [1, 2, 3]], [1], [[2], [2, 3]]),  # one is the beginning of the other: it keeps an end of its own
        ([[1, 2], [1, 2]], [1], [[2], [2]]),
        ([[1], [2]], [], [[1], [2]]),
        ([[7, 8, 9]], [7, 8], [[9]]),
    ],
)
def test_a_group_by_hand(texts: list[list[int]], prefix: list[int], rests: list[list[int]]) -> None:
    group = Group.of(texts)
    assert list(group.prefix) == prefix
    assert [list(rest) for rest in group.rests] == rests
    assert len(group) == len(prefix) + sum(map(len, rests))


def test_a_text_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="without tokens"):
        Group.of([[1], []])


def test_a_row_and_its_mask_by_hand() -> None:
    texts = pack([Group.of([[5, 6, 7], [5, 8]])], pad_token_id=RANDOM_PAD, hidden_size=32)
    assert texts.input_ids.tolist() == [[5, 6, 7, 8]]
    assert texts.position_ids.tolist() == [[0, 1, 2, 1]]
    assert texts.ends.tolist() == [[0, 2], [0, 3]]
    assert texts.attention_mask()[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]


def test_groups_of_one_row_do_not_see_each_other_and_padding_sees_itself() -> None:
    groups = [Group.of([[5, 6], [5, 7]]), Group.of([[8, 9, 10, 11, 12, 13, 14]]), Group.of([[15, 16]])]
    texts = pack(groups, pad_token_id=RANDOM_PAD, hidden_size=100_000)  # attention is cheap: few, long rows
    mask = texts.attention_mask()
    for row in range(texts.input_ids.shape[0]):
        for query, own in enumerate(texts.groups[row].tolist()):
            seen = {texts.groups[row, key].item() for key in mask[row, 0, query].nonzero().flatten().tolist()}
            assert seen == {own}


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.sampled_from([16, 576, 4096]))
def test_every_text_is_laid_out_once_whatever_the_lengths(lengths: list[int], hidden_size: int) -> None:
    draw = random.Random(str(lengths))
    pairs = [[[draw.randrange(4, 9) for _ in range(length)] for _ in range(2)] for length in lengths]
    texts = pack([Group.of(pair) for pair in pairs], pad_token_id=RANDOM_PAD, hidden_size=hidden_size)
    flat = [text for pair in pairs for text in pair]
    for (row, column), text in zip(texts.ends.tolist(), flat, strict=True):
        keys = texts.attention_mask()[row, 0, column].nonzero().flatten()
        assert texts.input_ids[row, keys].tolist() == text
        assert texts.position_ids[row, keys].tolist() == list(range(len(text)))


# ------------------------------------------------------------------------------------- scores and gradients


@pytest.mark.parametrize("config", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Olmo2Config, Phi3Config])
def test_packed_scores_are_those_of_each_text_alone(config: type[Any]) -> None:
    model = classifier(config, **({"sliding_window": None} if config in (MistralConfig, Phi3Config) else {}))
    assert why_not_packed(model) is None
    texts = pack([Group.of(pair) for pair in PAIRS], pad_token_id=RANDOM_PAD, hidden_size=32)
    with torch.no_grad():
        found = packed_scores(model, model.score, texts)
        expected = torch.stack([alone(model, text) for pair in PAIRS for text in pair])
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_packed_and_padded_batches_have_the_same_gradients(lora: bool) -> None:
    model = classifier()
    if lora:
        torch.manual_seed(1)
        model = get_peft_model(model, lora_config(Lora(r=4, alpha=8), model, head="sequence_classification"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    own = model.get_base_model() if lora else model
    rows = [
        {"chosen_ids": a, "rejected_ids": b, "margin": 0.0, "chosen_safe": 1.0, "rejected_safe": 0.0} for a, b in PAIRS
    ]
    weights = torch.arange(1.0, 2 * len(rows) + 1)

    def gradients(hidden_size: int | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        batch = PreferenceCollator(RANDOM_PAD, hidden_size=hidden_size)(rows)
        if hidden_size is None:
            scores = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.squeeze(-1)
        else:
            scores = packed_scores(model, own.score, PackedTexts.from_batch(batch))
        (scores * weights).sum().backward()
        return scores.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    padded, expected = gradients(None)
    packed, found = gradients(32)
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5)
    assert expected.keys() == found.keys()
    assert len(found) > 10
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name


# ----------------------------------------------------------------------------------------------- falling back


@pytest.mark.parametrize(
    ("config", "sizes", "reason"),
    [
        (MistralConfig, {"sliding_window": 4}, "sliding"),
        (Gemma2Config, {"head_dim": 8}, "sliding_attention"),
        (LlamaConfig, {"attn_implementation": "eager"}, "takes no block mask"),
        (LlamaConfig, {"attn_implementation": "flex_attention"}, "masks of its own form, which packed rows lack"),
        (OPTConfig, {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}, "not one of the causal"),
    ],
)
def test_models_that_cannot_take_packed_rows_say_why(config: type[Any], sizes: dict[str, Any], reason: str) -> None:
    assert reason in str(why_not_packed(classifier(config, **sizes)))


def test_a_model_that_heeds_no_mask_is_found_out() -> None:
    model = classifier()
    plain = model.model.forward
    model.model.forward = lambda *args, **kwargs: plain(*args, **kwargs | {"attention_mask": None})
    assert "differ by" in str(why_not_packed(model))


def test_a_model_in_training_stays_in_training() -> None:
    model = classifier().train()
    assert why_not_packed(model) is None
    assert model.training


# ------------------------------------------------------------------------------------------- the reward model


@pytest.fixture(scope="module")
def reward_models(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[RewardModel, RewardModel]:
    """One checkpoint with and without shared prefixes."""
    folder = make_reward_model(tiny_model, tmp_path_factory.mktemp("rm") / "rm", seed=0)
    return RewardModel.load(folder, dtype="float32"), RewardModel.load(folder, dtype="float32", shared_prefix=False)


def conversations() -> list[Conversation]:
    prompts = ["Hi there", "Which plants grow here?", "Tell me more about old clocks. " * 3]
    answers = ["Yes.", "Yes, of course they do.", "No.", "I would rather not say."]
    return [
        Conversation((Message("user", prompt), Message("assistant", answer)))
        for answer in answers
        for prompt in prompts
    ]


@settings(max_examples=15, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 13))
def test_any_order_and_batch_size_give_the_same_scores(
    reward_models: tuple[RewardModel, RewardModel], draw: random.Random, batch_size: int
) -> None:
    packed, padded = reward_models
    texts = conversations() + conversations()[:2]
    expected = {text: score.value for text, score in zip(texts, padded.score(texts), strict=True)}
    draw.shuffle(texts)
    packed.batch_size = batch_size
    for text, score in zip(texts, score_all(packed, texts), strict=True):
        assert score.value == pytest.approx(expected[text], rel=1e-5, abs=1e-5)


def test_candidates_of_one_prompt_share_its_tokens(reward_models: tuple[RewardModel, RewardModel]) -> None:
    packed, padded = reward_models
    assert packed.why_padded is None
    assert padded.why_padded == "switched off"
    seen: list[int] = []
    hook = packed.module.model.register_forward_pre_hook(
        lambda _module, args, kwargs: seen.append(kwargs.get("input_ids", args[0] if args else None).numel()),
        with_kwargs=True,
    )
    packed.batch_size = 16
    texts = [text for text in conversations() if "clocks" in text.messages[0].content]
    packed.score(texts)
    hook.remove()
    lengths = [len(packed.renderer.render_ids(text)) for text in texts]
    prompt = len(packed.renderer.render_prompt(texts[0].prompt))
    assert sum(seen) <= sum(lengths) - (len(texts) - 1) * (prompt - 2)


def test_texts_over_the_limit_stay_unscored_in_their_place(reward_models: tuple[RewardModel, RewardModel]) -> None:
    packed, _ = reward_models
    texts = conversations()[:3]
    packed.max_length = len(packed.renderer.render_ids(texts[2])) - 1
    try:
        scores = packed.score(texts)
    finally:
        packed.max_length = 4096
    assert [score.value is None for score in scores] == [False, False, True]
