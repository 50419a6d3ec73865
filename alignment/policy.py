"""Models on disk and in memory: names to folders, tokenizers with a safe pad token, loading, LoRA, merging, saving."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, Literal

from alignment.artifact import ArtifactError, Kind, folder_hashes, is_artifact, read_artifact
from alignment.distributed import device, uses_deepspeed, whole_weights
from alignment.embedded import embedded_folder, embedded_source, is_embedded
from alignment.recipe import Lora, ModelInit
from reward.conversation import fingerprint
from reward.dtype import quantization_config, torch_dtype

Head = Literal["causal_lm", "sequence_classification"]
ModelKind = Literal["policy", "reward_model", "harmfulness_model", "judge"]


class ModelError(ValueError):
    """A model that cannot be used here; the message says what to do."""


_CONFIGS: dict[str | None, tuple[str, ...]] = {
    None: ("config.json",),
    "policy": ("config.json",),
    "reward_model": ("config.json", "adapter_config.json"),
    "harmfulness_model": ("config.json",),
    "judge": ("config.json", "adapter_config.json"),
}
"""Files of which a model folder of a kind has one: a reward model may be an adapter with a value head, a judge one."""


def artifact_of(kind: ModelKind) -> Kind:
    """The kind of artifact that serves as a model of this kind."""
    return "policy" if kind == "judge" else kind


def check_model(model: str, *, kind: ModelKind | None = None, local: bool = False) -> None:
    """Refuse what cannot work before any weight loads: absent package or folder, unfinished or wrong artifact.

    `local`: a name that is no folder is missing, whatever it looks like, and no hub id.
    """
    if is_embedded(model):
        embedded_source(model)
        return
    path = Path(model)
    if path.is_dir():
        if is_artifact(path) and kind is not None:
            read_artifact(path, kind=artifact_of(kind))
        elif not any((path / name).is_file() for name in _CONFIGS[kind]):
            raise ModelError(f"{path} holds no config.json and no manifest: not a model, or its stage has not finished")
    elif local or path.is_absolute() or model.startswith((".", "runs/")) or model.count("/") > 1:
        raise ArtifactError(f"the model folder {path} does not exist; run the stage that makes it first")


def resolve_model(model: str) -> str:
    """The folder or hub id to load: converts the embedded model on first use."""
    return str(embedded_folder(model)) if is_embedded(model) else model


def model_fingerprint(model: str) -> str:
    """Changes with a model's files; of a hub id with the commit that was fetched, so ask once it is loaded."""
    path = Path(resolve_model(model))
    if is_artifact(path):
        return read_artifact(path).fingerprint
    if path.is_dir():
        return fingerprint(folder_hashes(path))
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(model, name) for name in ("config.json", "adapter_config.json")]
    commits = sorted({Path(file).parent.name for file in found if isinstance(file, str)})
    return fingerprint([model, commits])


def load_tokenizer(model: str, *, init: ModelInit | None = None) -> Any:
    """A tokenizer whose pad token differs from eos: heads find the last token by it, and labels mask it."""
    from transformers import AutoTokenizer

    init = init or ModelInit()
    tokenizer = AutoTokenizer.from_pretrained(
        resolve_model(model), revision=init.revision, trust_remote_code=init.trust_remote_code
    )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = _spare_token(tokenizer, model)
    return tokenizer


def _spare_token(tokenizer: Any, model: str) -> str:
    """A special token that never ends a turn; no token is added, so embeddings keep their size."""
    vocabulary = tokenizer.get_vocab()
    specials = [token for token in tokenizer.all_special_tokens if token != tokenizer.eos_token]
    named = [token for token in vocabulary if token.startswith("<") and "pad" in token.lower()]
    for token in (*named, "<|endoftext|>", tokenizer.unk_token, *specials):
        if token in vocabulary and token not in {tokenizer.eos_token, tokenizer.bos_token} | _template_tokens(
            tokenizer
        ):
            return token
    raise ModelError(
        f"{model}: pad token equals eos and no other special token is free; set pad_token in its tokenizer"
    )


def _template_tokens(tokenizer: Any) -> set[str]:
    """Special tokens with which the chat template opens and ends turns."""
    if not tokenizer.chat_template:
        return set()
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    return {token for token in tokenizer.all_special_tokens if token in text}


def load_model(
    model: str,
    *,
    init: ModelInit,
    head: Head = "causal_lm",
    pad_token_id: int | None = None,
    as_saved: bool = False,
) -> Any:
    """Weights with the head asked for: next-token head, or a regression head with one output.

    `as_saved`: in the number format of the checkpoint's files, whatever `init` says.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kwargs: dict[str, Any] = {
        "dtype": "auto" if as_saved else torch_dtype(init.dtype, device()),
        "revision": init.revision,
        "trust_remote_code": init.trust_remote_code,
        "use_safetensors": True,
    }
    if init.attn_implementation is not None:
        kwargs["attn_implementation"] = init.attn_implementation
    if init.quantization is not None:
        kwargs["quantization_config"] = quantization_config(init.quantization, init.dtype, device())
    if head == "causal_lm":
        loaded = AutoModelForCausalLM.from_pretrained(resolve_model(model), **kwargs)
    else:
        loaded = AutoModelForSequenceClassification.from_pretrained(resolve_model(model), num_labels=1, **kwargs)
    if pad_token_id is not None:
        loaded.config.pad_token_id = pad_token_id
    return loaded


def lora_config(lora: Lora, model: Any, *, head: Head) -> Any:
    """A peft config; the task type follows the head, else peft neither trains nor saves the regression head."""
    from peft import LoraConfig, TaskType

    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules if lora.last_layers is None else _linear_names(model, lora.last_layers),
        task_type=TaskType.CAUSAL_LM if head == "causal_lm" else TaskType.SEQ_CLS,
        modules_to_save=None if head == "causal_lm" else ["score", "pooler"],  # encoders have a new pooler, too
    )


def _linear_names(model: Any, last_layers: int) -> list[str]:
    """Full names of the linear modules of the last layers."""
    from torch import nn

    first = model.config.num_hidden_layers - last_layers
    found: list[str] = []
    for name, module in model.named_modules():
        layer = re.search(r"\.(\d+)\.", name)
        if isinstance(module, nn.Linear) and layer is not None and int(layer.group(1)) >= first:
            found.append(name)
    return found


def disable_dropout(model: Any) -> None:
    """No dropout in training either: PPO's ratios compare what is trained with what has drawn the answers."""
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):  # of the fused attention
            module.attention_dropout = 0.0


def add_lora(model: Any, lora: Lora, *, head: Head) -> Any:
    """Wrap `model` with adapters in the dtype of the model (mixed dtypes break DeepSpeed's buckets)."""
    from peft import get_peft_model

    return get_peft_model(model, lora_config(lora, model, head=head), autocast_adapter_dtype=not uses_deepspeed())


def merge_adapter(model: str, adapter: Path, target: Path, *, init: ModelInit, head: Head, pad_token_id: int) -> None:
    """Load the base anew, apply the adapter, merge and save whole weights to `target` (one process, any layout).

    In the number format of the base's own files: rounded to that of the training, small updates could be lost.
    """
    from peft import PeftModel

    plain = init.model_copy(update={"quantization": None})
    with whole_weights():
        base = load_model(model, init=plain, head=head, pad_token_id=pad_token_id, as_saved=True)
        merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    merged.save_pretrained(target)


def remove_folder(path: Path) -> None:
    """Remove a stage's own working folder once its result is complete."""
    shutil.rmtree(path, ignore_errors=True)
