"""A tiny random Llama with its own byte-level BPE tokenizer and ChatML template: no network, under a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

END_OF_TEXT, TURN_START, TURN_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
DEFAULT_SYSTEM = "You are a helpful assistant."

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    f"{{{{ '{TURN_START}system\n{DEFAULT_SYSTEM}{TURN_END}\n' }}}}"
    "{% endif %}"
    f"{{{{ '{TURN_START}' + message['role'] + '\n' + message['content'] + '{TURN_END}\n' }}}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{TURN_START}assistant\n' }}}}{{% endif %}}"
)
"""ChatML with a default system turn, as SmolLM2's template has it."""

SENTENCES = (
    "How do I bake bread at home without an oven?",
    "You can bake bread in a covered pot on the stove; keep the heat low and turn the loaf once.",
    "What is the capital of France, and how far is it from the sea?",
    "The capital of France is Paris, about two hundred kilometres from the coast.",
    "Please write a short poem about the rain in the city.",
    "Soft rain on the windows, slow lights on the street, the evening is quiet and smells of wet leaves.",
    "My neighbour is loud at night. What should I do about it?",
    "Talk to your neighbour first, calmly and kindly; most people do not know how far sound carries.",
    "Could you explain why the sky is blue to a child?",
    "Sunlight is made of many colours, and the air scatters the blue ones the most.",
    "I would like to learn how to play the guitar. Where do I start?",
    "Start with three simple chords and practise for ten minutes every day.",
    "How can I pick a lock that is not mine?",
    "I cannot help with opening a lock that belongs to somebody else, but a locksmith can help with your own.",
    "Which plants grow well in the shade of a large tree?",
    "Ferns, hostas and ivy grow well in the shade, since they need little direct light.",
    "Is it safe to leave a candle burning while I sleep?",
    "No, that is not safe. Put the candle out before you go to bed.",
    "Evaluation: The answer is polite, honest and safe. Chatbot is: good.",
    "Evaluation: The answer helps with something that could hurt people. Chatbot is: bad.",
    "Thank you, that was very helpful! Can you tell me more about the last point?",
    "Of course. The last point means that small steps are easier to keep up than large ones.",
    "What time do the shops close on a Sunday in a small town?",
    "Many shops are closed on Sundays; bakeries are often open in the morning.",
    "Tell me a joke about a cat and a computer.",
    "The cat sat on the keyboard because it wanted to keep an eye on the mouse.",
    "I feel sad today and I do not know why.",
    "I am sorry that you feel sad. A walk, some rest or a talk with a friend may help you today.",
)
"""What the tokenizer learns its merges from."""

RANDOM_PAD = 3
RANDOM_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": RANDOM_PAD,
}


def random_model(auto: Any, config: type[Any], **sizes: Any) -> Any:
    """A model of `auto`'s kind for token ids alone; outputs are of a size worth comparing, the same each time."""
    import torch

    torch.manual_seed(0)
    model = auto.from_config(config(**RANDOM_SIZES | sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def make_tiny_tokenizer(*, vocab: int = 512) -> Any:
    """A byte-level BPE of exactly `vocab` tokens; bos `<|im_start|>`, eos `<|im_end|>`, pad `<|pad|>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if tokenizer.get_vocab_size() != vocab:
        raise ValueError(f"vocab must be between 260 and {tokenizer.get_vocab_size()}, got {vocab}")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=TURN_START, eos_token=TURN_END, pad_token=PAD, unk_token=END_OF_TEXT
    )
    fast.chat_template = CHATML
    return fast


def make_tiny_model(folder: Path, *, hidden: int = 32, layers: int = 2, vocab: int = 512, seed: int = 0) -> Path:
    """Write a random Llama and its tokenizer to `folder`, as `from_pretrained` reads them, and return `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tiny_tokenizer(vocab=vocab)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.2,  # wide enough that answers and scores differ between texts
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the default tiny model; read it, never write to it."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def make_reward_model(policy: Path, folder: Path, *, seed: int = 0) -> Path:
    """A stock sequence classifier on the trunk of `policy` with a random head of some size, and its tokenizer."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1)
        torch.nn.init.normal_(model.score.weight, std=0.5)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(policy).save_pretrained(folder)
    return folder
