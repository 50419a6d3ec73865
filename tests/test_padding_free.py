"""`reward.padding_free`: a text in a row with others is computed as if it were alone."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    NemotronConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from reward.padding_free import attend_by_text, attending_by_text, row_of, why_padded
from tests.tiny import RANDOM_SIZES, random_model

if TYPE_CHECKING:
    from pathlib import Path

TEXTS = [[5, 6, 7, 8, 9], [11], [11, 12, 13, 14, 15, 16, 17], [20, 21]]


def causal(config: type[Any] = LlamaConfig, **sizes: Any) -> Any:
    return random_model(AutoModelForCausalLM, config, **sizes)


def alone(model: Any, text: list[int]) -> torch.Tensor:
    """Logits `(tokens, vocabulary)` of one text, in a batch of one."""
    return model(input_ids=torch.tensor([text])).logits[0]


def test_a_row_by_hand() -> None:
    row = row_of([[5, 6, 7], [8], [9, 10]], device="cpu")
    assert row["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert row["text_lengths"] == (3, 1, 2)


def test_a_text_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="without tokens"):
        row_of([[1], []], device="cpu")


FAMILIES = [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Olmo2Config, Phi3Config, GPT2Config]


@pytest.mark.parametrize("config", FAMILIES)
def test_each_text_is_computed_as_if_it_were_alone(config: type[Any]) -> None:
    model = causal(config, **({"sliding_window": None} if config is MistralConfig else {}))
    assert why_padded(model) is None
    expected = torch.cat([alone(model, text) for text in TEXTS])
    with attending_by_text(model):
        found = model(**row_of(TEXTS, device="cpu")).logits[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert expected.abs().max() > 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_texts_alone(checkpointing: bool) -> None:
    def gradients(by_text: bool) -> dict[str, torch.Tensor]:
        model = causal().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        attend_by_text(model)
        if by_text:
            model(**row_of(TEXTS, device="cpu"), use_cache=False).logits.square().sum().backward()
        else:
            for text in TEXTS:
                alone(model, text).square().sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected, found = gradients(False), gradients(True)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name


def test_all_else_is_as_with_sdpa() -> None:
    """Padded batches and generation go on as before, to the bit."""
    plain, model = causal(), causal()
    attend_by_text(model)
    ids, mask = torch.tensor([[3, 3, 5, 6], [7, 8, 9, 10]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with torch.no_grad():
        for inputs in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
            assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    drawn = [m.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6) for m in (plain, model)]
    assert torch.equal(*drawn)


def test_nothing_of_it_is_saved(tmp_path: Path) -> None:
    model = causal()
    attend_by_text(model)
    model.save_pretrained(tmp_path)
    assert "by_text" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_after_the_context_the_attention_is_the_one_before() -> None:
    model = causal()
    with pytest.raises(ZeroDivisionError), attending_by_text(model):
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_any_other_attention_fails_instead_of_mixing_the_texts(attention: str) -> None:
    model = causal(attn_implementation=attention)
    with pytest.raises((RuntimeError, IndexError)):
        model(**row_of(TEXTS, device="cpu"))


# ----------------------------------------------------------------------------------------------- falling back


@pytest.mark.parametrize(
    ("config", "sizes", "reason"),
    [
        (MistralConfig, {"sliding_window": 4}, "sliding"),
        (Gemma2Config, {"head_dim": 8}, "sliding_attention"),
        (LlamaConfig, {"attn_implementation": "eager"}, "'eager' takes no block mask"),
    ],
)
def test_models_that_must_be_padded_say_why(config: type[Any], sizes: dict[str, Any], reason: str) -> None:
    assert reason in str(why_padded(causal(config, **sizes)))


def test_a_model_without_the_interface_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal()
    monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    assert why_padded(model) == "LlamaForCausalLM has no interface for attention"


def test_a_model_that_heeds_no_positions_is_found_out() -> None:
    """GPT-2 learns its positions; rotary ones are relative, so that a text may begin at any."""
    model = causal(GPT2Config)
    plain = model.transformer.forward
    model.transformer.forward = lambda *args, **kwargs: plain(*args, **kwargs | {"position_ids": None})
    assert "differ from texts alone by" in str(why_padded(model))


def test_a_model_that_hands_nothing_on_to_its_attention_is_found_out() -> None:
    model = causal()
    plain = model.model.forward
    model.model.forward = lambda *args, text_lengths=None, **kwargs: plain(*args, **kwargs)
    assert "rows without padding fail" in str(why_padded(model))


def test_a_model_that_fails_in_any_way_is_padded() -> None:
    model = causal()
    plain = model.model.forward
    model.model.forward = lambda *args, **kwargs: plain(*args, **kwargs).to_tuple()
    assert "rows without padding fail: 'tuple' object has no attribute" in str(why_padded(model))


def test_the_trial_allows_for_products_of_fewer_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where float32 is rounded to bfloat16 in products, a difference of one in a hundred is no sign of mixed texts."""
    model = causal()
    plain = model.model.forward

    def rounded(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * (1.01 if "text_lengths" in kwargs else 1)
        return output

    model.model.forward = rounded
    assert "differ from texts alone by" in str(why_padded(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert why_padded(model) is None
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert why_padded(model) is None


def share_out(model: Any) -> Any:
    """As ZeRO-3 marks the weights that it has shared out: nothing can be tried."""
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number
    return model


@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config, Qwen3Config, Phi3Config, GPT2Config, Olmo2Config])
def test_shared_out_models_are_tried_without_their_weights(config: type[Any]) -> None:
    assert why_padded(share_out(causal(config))) is None


def test_a_model_that_only_declares_the_interface_is_padded() -> None:
    """Nemotron's layers do not hand on what they are told; without its mask it fails."""
    model = causal(NemotronConfig)
    before = model.config._attn_implementation
    assert "rows without padding fail" in str(why_padded(model))
    assert "rows without padding fail" in str(why_padded(share_out(model)))
    assert model.config._attn_implementation == before


def test_a_shared_out_model_that_tells_only_some_layers_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LlamaDecoderLayer.forward

    def forgetful(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.self_attn.layer_idx == 1:
            kwargs |= {"text_lengths": None, "attention_mask": None}
        return plain(self, *args, **kwargs)

    model = share_out(causal())
    assert why_padded(model) is None
    monkeypatch.setattr(LlamaDecoderLayer, "forward", forgetful)
    assert why_padded(model) == "1 of 2 layers hear where texts end"


def test_a_model_in_training_stays_in_training_and_keeps_its_attention() -> None:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(
        LlamaConfig(**RANDOM_SIZES, num_labels=1)
    ).train()
    assert why_padded(model) is None
    assert model.training
    assert model.config._attn_implementation == "sdpa"
