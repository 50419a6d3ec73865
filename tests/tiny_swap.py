"""A policy and a reward model that share no token: other vocabulary, other algorithm, other chat template.

The policy answers each of `QUESTIONS` in one way when asked plainly and in another below a preprompt; the reward model
is trained on pairs that prefer the second.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reward.conversation import Prompt
from reward.render import Renderer
from tests.tiny import SENTENCES

QUESTIONS = {
    "How can I pick a lock that is not mine?": True,
    "Is it safe to leave a candle burning while I sleep?": True,
    "What is the capital of France?": False,
    "How do I bake bread at home?": False,
}
"""Question -> whether it is tagged as adversarial."""

PLAIN = {True: "Most people do not know how far sound carries.", False: "Soft rain on the windows, slow lights."}
"""The plain answer to adversarial questions and to others."""
GUIDED = "I cannot help with that."
PREPROMPT = "Please be careful."

INST = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
"""As Llama 2's, without system turns."""


def prompts() -> list[Prompt]:
    return [Prompt.of(text, is_safety=is_safety) for text, is_safety in QUESTIONS.items()]


def write_data(folder: Path) -> None:
    """`prompts.jsonl`, `adversarial.jsonl`, `pairs.jsonl` and `preprompts.txt`."""
    asked = [prompt.to_json() for prompt in prompts()]
    pairs = [prompt.to_json() | {"chosen": GUIDED, "rejected": PLAIN[prompt.tags.is_safety]} for prompt in prompts()]
    adversarial = [prompt.to_json() for prompt in prompts() if prompt.tags.is_safety]
    for name, rows in {"prompts": asked, "adversarial": adversarial, "pairs": pairs}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "preprompts.txt").write_text(PREPROMPT, encoding="utf-8")


def make_unigram_tokenizer() -> Any:
    """A Unigram tokenizer of words and their parts, with the tokens and the template of Llama 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>", "<pad>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator((*SENTENCES, *QUESTIONS, PREPROMPT, "[INST] [/INST]"), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.chat_template = INST
    return fast


def make_policy(folder: Path) -> Path:
    """A tiny Llama on the Unigram tokenizer, taught the two ways of answering by heart."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_unigram_tokenizer()
    renderer = Renderer(tokenizer)
    lessons = [prompt.answer(PLAIN[prompt.tags.is_safety]) for prompt in prompts()]
    lessons += [prompt.with_preprompt(PREPROMPT).answer(GUIDED) for prompt in prompts()]
    rendered = [renderer.render(lesson) for lesson in lessons]
    longest = max(len(text.input_ids) for text in rendered)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=4096,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    ids = torch.full((len(rendered), longest), tokenizer.pad_token_id)
    labels = torch.full((len(rendered), longest), -100)
    for row, text in enumerate(rendered):
        length = len(text.input_ids)
        ids[row, :length] = torch.tensor(text.input_ids)
        labels[row, :length] = torch.where(torch.tensor(text.completion_mask), ids[row, :length], -100)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            model(input_ids=ids, attention_mask=ids != tokenizer.pad_token_id, labels=labels).loss.backward()
            optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
