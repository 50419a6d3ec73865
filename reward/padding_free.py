"""Texts of different lengths behind each other in a single row: nothing is padded, and each text attends to itself.

Padding is computed like text, in every layer. In a row without it each token goes through the linear layers once, and
attention runs text by text with its causal kernel, which needs no mask.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from reward.shared_prefix import why_no_block_mask

ATTENTION = "sdpa_by_text"
"""Name under which transformers knows `sdpa_by_text`; without `text_lengths` it is its `sdpa`."""


def row_of(texts: Sequence[Sequence[int]], *, device: torch.device | str) -> dict[str, Any]:
    """Keyword arguments with which a model that attends by text reads these token ids; tensors are `(1, tokens)`.

    Each text holds at least one token. Any other attention fails on the empty mask, instead of mixing the texts.
    """
    lengths = tuple(len(text) for text in texts)
    if not all(lengths):
        raise ValueError("a text without tokens has no place in a row")
    return {
        "input_ids": torch.tensor([[token for text in texts for token in text]], device=device),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0).to(device),
        "attention_mask": torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device),
        "text_lengths": lengths,
    }


def sdpa_by_text(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    text_lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a layer (see transformers' AttentionInterface) for rows of texts, and for all others as usual."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if text_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    queries, keys, values = (states.split(text_lengths, dim=2) for states in (query, key, value))
    outputs = [
        sdpa_attention_forward(module, q, k, v, None, **kwargs)[0]
        for q, k, v in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(outputs, dim=1), None


def attend_by_text(model: Any) -> None:
    """From now on `model` also takes what `row_of` makes; everything else it does as before."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, sdpa_by_text)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)


@contextlib.contextmanager
def attending_by_text(model: Any) -> Generator[None]:
    """Inside, `model` also takes what `row_of` makes. A backward pass that computes layers again must lie inside."""
    before = model.config._attn_implementation
    attend_by_text(model)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def why_padded(model: Any) -> str | None:
    """Why this model cannot take rows without padding; None when it can, which is tried out on a few tokens.

    Every layer must attend to all that precedes, by `sdpa` behind transformers' interface for attention.
    """
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} has no interface for attention"
    return why_no_block_mask(model) or _try_out(model)


@torch.no_grad()
def _try_out(model: Any) -> str | None:
    """Compare a row of three short texts with each text alone; of shared-out weights (ZeRO-3), the shapes alone."""
    trunk = model.base_model
    if any(hasattr(parameter, "ds_id") for parameter in trunk.parameters()):
        return _try_shapes(trunk)
    device, training = next(trunk.parameters()).device, model.training
    last = min(model.config.get_text_config().vocab_size, 16)
    texts = [list(range(last)), list(range(1, last, 2)), [last - 1]]
    model.eval()
    try:
        with attending_by_text(model):
            together = trunk(**row_of(texts, device=device), use_cache=False).last_hidden_state[0]
        alone = [trunk(input_ids=torch.tensor([ids], device=device)).last_hidden_state[0] for ids in texts]
    except Exception as error:  # of whatever kind: foreign code, and padding is always possible
        return _said_by(error)
    finally:
        model.train(training)
    expected = torch.cat(alone).float()
    tolerance = 1e-3 if model.dtype == torch.float32 and _is_exact(device) else 5e-2
    worst = float((together.float() - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    return None if worst < tolerance else f"texts in one row differ from texts alone by {worst:.1e} of their size"


def _try_shapes(trunk: Any) -> str | None:
    """Whether all layers of a copy without weights hand the lengths of the texts on to their attention."""
    from transformers import AttentionInterface

    config = copy.deepcopy(trunk.config)
    told: list[bool] = []

    def counted(*args: Any, text_lengths: Sequence[int] | None = None, **kwargs: Any) -> tuple[Tensor, None]:
        told.append(text_lengths is not None)
        return sdpa_by_text(*args, text_lengths=text_lengths, **kwargs)

    try:
        with torch.device("meta"):
            hollow = type(trunk)(config).eval()
        with attending_by_text(hollow):
            AttentionInterface.register(ATTENTION, counted)
            hollow(**row_of([[0, 1], [2]], device="meta"), use_cache=False)
    except Exception as error:  # as above
        return _said_by(error)
    finally:
        AttentionInterface.register(ATTENTION, sdpa_by_text)
    layers = config.get_text_config().num_hidden_layers
    return None if told == [True] * layers else f"{sum(told)} of {layers} layers hear where texts end"


def _said_by(error: Exception) -> str:
    return f"rows without padding fail: {' '.join(str(error).split())[:200]}"


def _is_exact(device: torch.device) -> bool:
    """Products of float32 matrices are not rounded to fewer digits."""
    return torch.get_float32_matmul_precision() == "highest" and not torch.is_autocast_enabled(device.type)
