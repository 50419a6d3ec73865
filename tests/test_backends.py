"""The transformers back end in process, and the judge on it.

Log-probabilities are checked against transformers' own loss on one unpadded sequence at a time.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reward.backends import CUT_OFF, Fingerprinted, TransformersBackend
from reward.conversation import Prompt
from reward.judge import JudgeScorer
from reward.judge_prompt import judge_prompt
from reward.scorer import ScorerError
from reward.verdict import BAD, GOOD, VERDICT_PREFIX
from tests.judge_slots import BREAD, GUIDELINES

TEXTS = ("Hi?", "How do I bake bread without an oven?", "What? " * 60, "Tell me a joke about a cat.", "Why? " * 9)
PROMPTS = [Prompt.of(text) for text in TEXTS]


def load(path: Path, batch_size: int) -> TransformersBackend:
    return TransformersBackend.load(path, dtype="float32", batch_size=batch_size, device="cpu")


def logprob_by_loss(backend: TransformersBackend, prompt: Prompt, head: str, text: str) -> float:
    """`log P(text | prompt, head)` from transformers' own loss on one sequence."""
    import torch

    encode = backend.renderer.tokenizer.encode
    shown = backend.renderer.render_prompt(prompt) + encode(head)
    tail = encode(head + text)[len(encode(head)) :]
    labels = [-100] * len(shown) + tail
    with torch.no_grad():
        loss = backend.model(input_ids=torch.tensor([shown + tail]), labels=torch.tensor([labels])).loss
    return -float(loss) * len(tail)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_choice_log_probabilities_are_right_for_every_batch_size(tiny_model: Path, batch_size: int):
    backend = load(tiny_model, batch_size)
    choices = (GOOD, BAD, " good, as far as I can see.")
    values = backend.choice_logprobs(PROMPTS, VERDICT_PREFIX, choices)
    assert len(values) == len(PROMPTS)
    for prompt, row in zip(PROMPTS, values, strict=True):
        expected = [logprob_by_loss(backend, prompt, VERDICT_PREFIX, choice) for choice in choices]
        assert row == pytest.approx(expected, abs=1e-4)


def test_padding_does_not_shift_absolute_positions(tiny_model: Path):
    """A Llama sees distances alone, GPT-2 the positions themselves."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4, n_positions=1024, initializer_range=0.5)
    backend = TransformersBackend(GPT2LMHeadModel(config).eval(), load(tiny_model, 1).renderer, batch_size=8)
    values = backend.choice_logprobs(PROMPTS, VERDICT_PREFIX, (GOOD, BAD))
    for prompt, row in zip(PROMPTS, values, strict=True):
        expected = [logprob_by_loss(backend, prompt, VERDICT_PREFIX, choice) for choice in (GOOD, BAD)]
        assert row == pytest.approx(expected, abs=1e-4)
    for prompt, text in zip(PROMPTS, backend.generate(PROMPTS, max_new_tokens=4), strict=True):
        assert text.removesuffix(CUT_OFF) == backend.renderer.decode(greedy(backend, prompt, 4))[0]


def test_a_tokenizer_that_adds_a_start_token_adds_none_to_the_verdict(tiny_model: Path):
    from tokenizers.processors import TemplateProcessing

    backend = load(tiny_model, 4)
    plain = backend.choice_logprobs(PROMPTS, VERDICT_PREFIX, (GOOD, BAD))
    tokenizer = backend.renderer.tokenizer
    start = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{start[0]} $A", special_tokens=[start])
    assert tokenizer.encode("a")[0] == start[1]
    assert backend.choice_logprobs(PROMPTS, VERDICT_PREFIX, (GOOD, BAD)) == plain


def test_choices_that_merge_with_the_prefix_are_compared_as_whole_texts(tiny_model: Path):
    backend = load(tiny_model, 4)
    tokenizer = backend.renderer.tokenizer
    whole, head = tokenizer.encode("Chatbot"), tokenizer.encode("Chatb")
    assert whole[: len(head)] != head, "the tokenizer no longer merges here; pick another seam"
    (row,) = backend.choice_logprobs(PROMPTS[:1], "Chatb", ("ot", "ad"))
    first, second = (logprob_by_loss(backend, PROMPTS[0], "", text) for text in ("Chatbot", "Chatbad"))
    assert row[0] - row[1] == pytest.approx(first - second, abs=1e-4)


def test_choices_must_be_texts(tiny_model: Path):
    backend = load(tiny_model, 4)
    for choices in ((), ("",), (" good.", "")):
        with pytest.raises(ValueError, match="not empty"):
            backend.choice_logprobs(PROMPTS, VERDICT_PREFIX, choices)


def greedy(backend: TransformersBackend, prompt: Prompt, length: int) -> list[int]:
    """The most likely token after the most likely token, without a cache, a batch or `generate`."""
    import torch

    ids = backend.renderer.render_prompt(prompt)
    start = len(ids)
    with torch.no_grad():
        for _ in range(length):
            ids.append(int(backend.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[start:]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_generation_is_greedy_for_every_batch_size(tiny_model: Path, batch_size: int):
    backend = load(tiny_model, batch_size)
    texts = backend.generate(PROMPTS, max_new_tokens=8)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        expected, ended = backend.renderer.decode(greedy(backend, prompt, 8))
        assert text == (expected if ended else expected + CUT_OFF)
    assert backend.generate([], max_new_tokens=8) == []


def test_only_a_text_without_its_end_is_marked_as_cut_off(tiny_model: Path):
    backend = load(tiny_model, 2)
    ids = greedy(backend, PROMPTS[1], 6)
    end = next(position for position in range(1, 6) if ids[position] not in ids[:position])
    assert backend.generate([PROMPTS[1]], max_new_tokens=6)[0].endswith(CUT_OFF)
    backend.renderer.end_ids = frozenset({ids[end]})
    text = backend.renderer.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
    assert backend.generate([PROMPTS[1]], max_new_tokens=6) == [text]


def test_generation_defaults_of_a_checkpoint_do_not_seep_in(tiny_model: Path, tmp_path: Path):
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings_of_checkpoint = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "min_new_tokens": 8}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings_of_checkpoint))
    changed, plain = (load(path, 5).generate(PROMPTS, max_new_tokens=8) for path in (tmp_path, tiny_model))
    assert changed == plain


def test_a_judge_on_a_real_model_scores_each_conversation_by_itself(tiny_model: Path):
    conversations = [prompt.answer(text) for prompt, text in zip(PROMPTS, reversed(TEXTS), strict=True)]
    backend = load(tiny_model, 3)
    scores = JudgeScorer(backend, GUIDELINES).score(conversations)
    for conversation, score in zip(conversations, scores, strict=True):
        prompt = judge_prompt(GUIDELINES, conversation)
        good, bad = (math.exp(logprob_by_loss(backend, prompt, VERDICT_PREFIX, choice)) for choice in (GOOD, BAD))
        assert score.value == pytest.approx(good / (good + bad), abs=1e-4)
    assert len({score.value for score in scores}) == len(scores)


def test_a_real_model_that_writes_no_verdict_is_unscored(tiny_model: Path):
    judge = JudgeScorer(load(tiny_model, 2), GUIDELINES, mode="explain", max_new_tokens=8)
    assert [score.value for score in judge.score([BREAD, BREAD])] == [None, None]


def test_a_batch_size_of_zero_is_refused(tiny_model: Path):
    with pytest.raises(ValueError, match="at least 1"):
        load(tiny_model, 0)


# ------------------------------------------------------------------------------------------- shared prefix, models


@pytest.mark.parametrize("batch_size", [1, 4])
def test_sharing_the_guidelines_changes_no_probability(tiny_model: Path, batch_size: int):
    conversations = [prompt.answer(text) for prompt, text in zip(PROMPTS, reversed(TEXTS), strict=True)]
    backend = load(tiny_model, batch_size)
    assert backend.why_unshared is None
    whole = replace(backend, shared_prefix=False)
    assert whole.why_unshared == "switched off"
    shared, expected = (
        [score.value for score in JudgeScorer(b, GUIDELINES).score(conversations)] for b in (backend, whole)
    )
    assert shared == pytest.approx(expected, abs=1e-4)


def test_prompts_with_unlike_beginnings_are_still_right(tiny_model: Path):
    backend = load(tiny_model, 4)
    prompts = [PROMPTS[0], PROMPTS[1].with_preprompt("Be brief."), PROMPTS[2].with_preprompt("Be kind.")]
    values = backend.choice_logprobs(prompts, VERDICT_PREFIX, (GOOD, BAD))
    for prompt, row in zip(prompts, values, strict=True):
        expected = [logprob_by_loss(backend, prompt, VERDICT_PREFIX, choice) for choice in (GOOD, BAD)]
        assert row == pytest.approx(expected, abs=1e-4)
    assert backend.choice_logprobs([], VERDICT_PREFIX, (GOOD, BAD)) == []


def test_a_fingerprint_follows_the_weights_and_not_how_they_are_loaded(tiny_model: Path, tmp_path: Path):
    from tests.tiny import make_tiny_model

    plain = load(tiny_model, 4).fingerprint
    assert isinstance(load(tiny_model, 4), Fingerprinted)
    assert TransformersBackend.load(tiny_model, dtype="bfloat16", device="cpu").fingerprint == plain
    assert load(make_tiny_model(tmp_path, seed=1), 4).fingerprint != plain


def make_adapter(base: Path, folder: Path) -> Any:
    """A LoRA adapter of some size, without a tokenizer; returns the model with it, as peft has it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model.eval()


def test_an_adapter_is_loaded_on_its_base(tiny_model: Path, tmp_path: Path):
    adapted = make_adapter(tiny_model, tmp_path)
    backend = load(tmp_path, 4)
    assert backend.why_unshared is None
    values = backend.choice_logprobs(PROMPTS, VERDICT_PREFIX, (GOOD, BAD))
    by_peft = TransformersBackend(adapted, backend.renderer)
    for prompt, row in zip(PROMPTS, values, strict=True):
        expected = [logprob_by_loss(by_peft, prompt, VERDICT_PREFIX, choice) for choice in (GOOD, BAD)]
        assert row == pytest.approx(expected, abs=1e-4)
    assert values != load(tiny_model, 4).choice_logprobs(PROMPTS, VERDICT_PREFIX, (GOOD, BAD))
    assert backend.fingerprint != load(tiny_model, 4).fingerprint


def test_an_adapter_in_a_pickle_or_without_its_base_is_refused(tiny_model: Path, tmp_path: Path):
    make_adapter(tiny_model, tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace(str(tiny_model), "/nowhere/base"))
    with pytest.raises(ScorerError, match=r"its adapter_config\.json, '/nowhere/base', does not exist"):
        load(tmp_path, 4)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ScorerError, match=r"holds no adapter_model\.safetensors"):
        load(tmp_path, 4)


def dequantized(module: Any) -> Any:
    """The weights that a quantized module stands for, by the formulas of its format."""
    import bitsandbytes

    if type(module).__name__ == "Linear8bitLt":
        return module.weight.data.float() * module.weight.SCB.view(-1, 1) / 127
    return bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("adapted", [False, True], ids=["model", "adapter"])
def test_a_quantized_model_says_what_its_rounded_weights_say(tmp_path: Path, quantization: Any, adapted: bool):
    """To the rounding of activations (int8) and of products (nf4), which is small beside that of the weights."""
    import torch

    from tests.tiny import make_tiny_model

    pytest.importorskip("bitsandbytes", reason="quantization needs bitsandbytes")
    folder = make_tiny_model(tmp_path / "base", hidden=128)
    if adapted:
        make_adapter(folder, tmp_path / "adapter")
        folder = tmp_path / "adapter"
    backend = TransformersBackend.load(folder, dtype="float32", device="cpu", quantization=quantization)
    plain = load(folder, 8)
    modules = dict(plain.model.named_modules())
    rounded = [
        (name, module)
        for name, module in backend.model.named_modules()
        if hasattr(module, "quant_state") or type(module).__name__ == "Linear8bitLt"
    ]
    assert len(rounded) >= 14  # two layers of seven products
    for name, module in rounded:
        target = modules[name]
        with torch.no_grad():
            target.weight.copy_(dequantized(module))
    found, expected = (torch.tensor(b.choice_logprobs(PROMPTS, VERDICT_PREFIX, (GOOD, BAD))) for b in (backend, plain))
    assert backend.why_unshared is None
    torch.testing.assert_close(found, expected, atol=0.5, rtol=0)
    assert backend.generate(PROMPTS[:1], max_new_tokens=2)
