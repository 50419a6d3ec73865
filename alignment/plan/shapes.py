"""What models are made of, told from their configs alone: nothing is downloaded, no weight is allocated.

Parameters are counted on a model built on torch's meta device, so a count is exact for every architecture that
transformers knows. Experts of a mixture are counted as if all of them worked on every token.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.inputs import InputError
from alignment.policy import Head, lora_config
from alignment.recipe_parts import Lora

_LLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_SIZES: dict[str, dict[str, Any]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
BUILT_IN: dict[str, dict[str, Any]] = {
    f"meta-llama/Llama-2-{size}-{kind}": _LLAMA | sizes for size, sizes in _SIZES.items() for kind in ("hf", "chat-hf")
} | {
    "embedded:smollm2-135m-instruct": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    }
}
"""Model -> the part of its config.json that gives its size, for models that a recipe can name without a folder."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a model. Tied weights count once."""

    parameters: int
    quantizable: int
    """Weights of linear layers other than the head, which bitsandbytes packs."""
    adapter: int
    """Parameters that LoRA adds and trains; 0 without."""
    adapter_head: int
    """Those of them that are a head, in the number format of the model."""
    layer: int
    """Parameters of one layer."""
    num_layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    gated: bool
    """The feed-forward part has a gate beside its way up, as Llama's."""
    sees_all: bool
    """Every layer attends to all that precedes."""


def read_config(model: str, files: Mapping[str, Path]) -> dict[str, Any] | None:
    """The config of a folder or of a built-in or cached model; None when there is none.

    `files`: config.json files by model; the one named "" stands for every model that has none of its own.
    """
    for path in (files.get(model), Path(model) / "config.json", files.get("")):
        if path is not None and path.is_file():
            return _read_json(path)
    return BUILT_IN.get(model) or _cached_config(model)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read as a config.json: {error}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError(f"{path} is no config.json: it names no model_type")
    return config


def _cached_config(model: str) -> dict[str, Any] | None:
    """The config of a hub model that was downloaded before; no network."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        return None
    return _read_json(Path(path)) if isinstance(path, str) else None


def shape_of(config: Mapping[str, Any], *, head: Head = "causal_lm", lora: Lora | None = None) -> ModelShape:
    """Sizes of the model of a config with the head asked for, and of the adapters that `lora` adds to it.

    InputError for an architecture that transformers does not know.
    """
    return _shape(json.dumps(config, sort_keys=True), head, None if lora is None else lora.model_dump_json())


@functools.cache
def _shape(config_text: str, head: Head, lora_text: str | None) -> ModelShape:
    from torch import nn

    from reward.shared_prefix import limited_attention

    model = _build(json.loads(config_text), head)
    text = model.config.get_text_config()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    output = model.get_output_embeddings() if head == "causal_lm" else getattr(model, "score", None)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not output]
    quantizable = sum(module.weight.numel() for module in linear)
    layers = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
    layer = sum(parameter.numel() for parameter in layers.parameters()) // len(layers)
    lora = None if lora_text is None else Lora.model_validate_json(lora_text)
    adapter, adapter_head = (0, 0) if lora is None else _count_adapter(model, lora, head)
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    intermediate = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    feed_forward = layer - text.hidden_size * head_dim * (2 * heads + 2 * kv_heads)
    return ModelShape(
        parameters=parameters,
        quantizable=quantizable,
        adapter=adapter,
        adapter_head=adapter_head,
        layer=layer,
        num_layers=len(layers),
        hidden=text.hidden_size,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=text.vocab_size,
        gated=feed_forward > 2.5 * text.hidden_size * intermediate,
        sees_all=limited_attention(text) is None,
    )


def _build(config: dict[str, Any], head: Head) -> Any:
    """The model without memory for its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    try:
        read = AutoConfig.for_model(**config)
        with torch.device("meta"):
            if head == "causal_lm":
                return AutoModelForCausalLM.from_config(read)
            read.num_labels = 1
            return AutoModelForSequenceClassification.from_config(read)
    except ValueError as error:
        raise InputError(f"a model of type {config['model_type']!r} cannot be built: {error}") from error


def _count_adapter(model: Any, lora: Lora, head: Head) -> tuple[int, int]:
    """Parameters that peft makes trainable when it wraps the model, and those of them that are no adapter."""
    import torch
    from peft import get_peft_model

    with torch.device("meta"):
        wrapped = get_peft_model(model, lora_config(lora, model, head=head), low_cpu_mem_usage=True)
    trainable = {name: p.numel() for name, p in wrapped.named_parameters() if p.requires_grad}
    return sum(trainable.values()), sum(number for name, number in trainable.items() if "lora_" not in name)
