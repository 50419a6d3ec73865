"""The number format of a loaded model, and its quantization."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Dtype = Literal["float32", "bfloat16", "float16", "fast"]
"""`fast`: bfloat16 where the hardware multiplies in it, float32 elsewhere (there it would be emulated, and slower)."""

Quantization = Literal["int8", "nf4"]
"""Weights in 8 or 4 bits (bitsandbytes), computed with in the number format."""


def torch_dtype(dtype: Dtype, device: str | torch.device = "cpu") -> torch.dtype:
    """The format to load weights in for work on `device`."""
    import torch

    if dtype != "fast":
        return getattr(torch, dtype)
    return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32


def multiplies_bfloat16(device: str | torch.device = "cpu") -> bool:
    """Whether `device` multiplies bfloat16 in hardware: GPUs from Ampere on, CPUs with AVX-512 BF16 or AMX."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    amx, avx512 = torch.cpu._is_amx_tile_supported, torch.cpu._is_avx512_bf16_supported  # pyright: ignore[reportPrivateUsage]
    return torch.device(device).type == "cpu" and (amx() or avx512())


def quantization_config(quantization: Quantization, dtype: Dtype, device: str | torch.device = "cpu") -> Any:
    """For `from_pretrained`: weights are quantized while they load."""
    from transformers import BitsAndBytesConfig

    # It warns at every single product that it casts what comes in.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch_dtype(dtype, device)
    )
