"""Texts that begin alike share the computation of their beginning: a pair its dialogue, K candidates their prompt.

A row holds one or more groups, each as `[prefix][rest of text 1][rest of text 2]...`. A block mask lets a token see its
own group's prefix and its own rest; positions of every rest go on from the prefix. In a causal model each token then
sees what it would see alone, so scores and gradients are those of the padded texts, to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SequenceIds = Sequence[int]


@dataclass(frozen=True, slots=True)
class Group:
    """Texts with a common beginning; every rest holds at least one token, so that each text has an end of its own."""

    prefix: SequenceIds
    rests: tuple[SequenceIds, ...]

    @classmethod
    def of(cls, texts: Sequence[SequenceIds]) -> Group:
        """The longest common prefix of the texts' tokens, less one token where a text is all prefix."""
        shortest = min(len(text) for text in texts)
        if shortest == 0:
            raise ValueError("a text without tokens has no score")
        first, limit, shared = texts[0], shortest - 1, 0
        while shared < limit and all(text[shared] == first[shared] for text in texts):
            shared += 1
        return cls(first[:shared], tuple(text[shared:] for text in texts))

    def __len__(self) -> int:
        return len(self.prefix) + sum(len(rest) for rest in self.rests)


@dataclass(frozen=True, slots=True)
class PackedTexts:
    """`n` texts in `(rows, length)`; what is padding belongs to group -1.

    `groups` numbers the groups of a row; `rests` is 0 in a prefix and numbers the rests of a group from 1; `ends` is
    `(n, 2)`: row and column of each text's last token, in the order given.
    """

    input_ids: Tensor
    position_ids: Tensor
    groups: Tensor
    rests: Tensor
    ends: Tensor

    def to(self, device: torch.device | str) -> PackedTexts:
        return PackedTexts(**{name: value.to(device) for name, value in self.to_batch().items()})

    def to_batch(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _FIELDS}

    @classmethod
    def from_batch(cls, batch: Mapping[str, Tensor]) -> PackedTexts:
        return cls(**{name: batch[name] for name in _FIELDS})

    def attention_mask(self) -> Tensor:
        """`(rows, 1, length, length)`: True where the query (third axis) may see the key (fourth)."""
        length = self.input_ids.shape[1]
        order = torch.arange(length, device=self.input_ids.device)
        same_group = self.groups.unsqueeze(2) == self.groups.unsqueeze(1)
        visible = (self.rests.unsqueeze(1) == 0) | (self.rests.unsqueeze(2) == self.rests.unsqueeze(1))
        return (same_group & visible & (order.unsqueeze(0) <= order.unsqueeze(1))).unsqueeze(1)


_FIELDS = ("input_ids", "position_ids", "groups", "rests", "ends")


def pack(groups: Sequence[Group], *, pad_token_id: int, hidden_size: int) -> PackedTexts:
    """Lay groups into rows of equal length. Texts count through the groups in their order.

    `hidden_size` (of the model) weighs long rows, whose attention is dear, against short ones, whose padding is.
    """
    rows = _cheapest_rows([len(group) for group in groups], hidden_size=hidden_size)
    return lay_out(groups, rows, pad_token_id=pad_token_id)


def lay_out(groups: Sequence[Group], rows: Sequence[Sequence[int]], *, pad_token_id: int) -> PackedTexts:
    """Rows with the groups of these numbers, in their order. Texts count through `groups` in order."""
    length = max(sum(len(groups[number]) for number in row) for row in rows)
    shape = (len(rows), length)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.long)
    position_ids, rests = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    group_ids = torch.full(shape, -1, dtype=torch.long)
    ends: dict[int, list[tuple[int, int]]] = {}
    for row, numbers in enumerate(rows):
        start = 0
        for number in numbers:
            group = groups[number]
            shared = len(group.prefix)
            group_ids[row, start : start + len(group)] = number
            ends[number] = []
            for rest_number, part in enumerate((group.prefix, *group.rests)):
                stop, first = start + len(part), 0 if rest_number == 0 else shared
                input_ids[row, start:stop] = torch.tensor(part, dtype=torch.long)
                position_ids[row, start:stop] = torch.arange(first, first + len(part))
                rests[row, start:stop] = rest_number
                if rest_number:
                    ends[number].append((row, stop - 1))
                start = stop
    in_order = [end for number in range(len(groups)) for end in ends[number]]
    return PackedTexts(input_ids, position_ids, group_ids, rests, torch.tensor(in_order, dtype=torch.long))


def _cheapest_rows(sizes: Sequence[int], *, hidden_size: int) -> list[list[int]]:
    """Groups by row, for the row length that costs least.

    Per token a layer's matrix products cost about `24 * hidden_size**2` operations and attention over a row of length L
    `4 * hidden_size * L`, hence a cost of `rows * L * (1 + L / (6 * hidden_size))`.
    """

    def cost(rows: list[list[int]]) -> float:
        length = max(sum(sizes[number] for number in row) for row in rows)
        return len(rows) * length * (1 + length / (6 * hidden_size))

    longest, total = max(sizes), sum(sizes)
    capacities = {longest} | {longest + (total - longest) * step // 8 for step in range(1, 9)}
    capacities |= {-(-total // number) for number in range(1, len(sizes)) if total >= number * longest}
    return min((_first_fit(sizes, capacity) for capacity in sorted(capacities)), key=cost)


def _first_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Longest first, each into the first row that has room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(sizes)), key=lambda number: (-sizes[number], number)):
        row = next((row for row, left in enumerate(room) if left >= sizes[number]), None)
        if row is None:
            rows.append([])
            room.append(capacity)
            row = len(rows) - 1
        rows[row].append(number)
        room[row] -= sizes[number]
    return rows


def packed_scores(model: Any, head: Any, texts: PackedTexts) -> Tensor:
    """Raw scores `(n,)` in float32 of packed texts, in the order of `texts.ends`; differentiable.

    `model` may be an engine around the classifier; `head` is the classifier's regression head, whose output at every
    position is read, since a stock classifier returns that of each row's last token only.
    """
    inputs = {
        "input_ids": texts.input_ids,
        "attention_mask": texts.attention_mask(),
        "position_ids": texts.position_ids,
    }
    rows, columns = texts.ends.unbind(dim=1)
    return outputs_of_head(model, head, inputs)[rows, columns].squeeze(-1).float()


def outputs_of_head(model: Any, head: Any, inputs: Mapping[str, Any]) -> Tensor:
    """`(rows, length, 1)`: what the regression head says at every position."""
    captured: list[Tensor] = []
    hook = head.register_forward_hook(lambda _module, _inputs, output: captured.append(output))
    try:
        model(**inputs, use_cache=False)
    finally:
        hook.remove()
    return captured[0]


def why_not_packed(classifier: Any) -> str | None:
    """Why this classifier cannot take packed rows; None when it can.

    It must be a causal transformer with a `score` head read at every position, full attention in each layer, position
    ids of its own, and an attention that takes any mask. That is then tried out on a few tokens.
    """
    from transformers.modeling_layers import GenericForSequenceClassification

    if not isinstance(classifier, GenericForSequenceClassification):
        return f"{type(classifier).__name__} is not one of the causal classifiers with a `score` head"
    return why_no_block_mask(classifier) or _try_out(classifier)


def why_no_block_mask(model: Any) -> str | None:
    """Why the layers of this model do not all take any mask, as its config has it; None when they do."""
    attention = model.config._attn_implementation
    limits = limited_attention(model.config.get_text_config())
    if limits is not None:
        return f"its layers have {limits}"
    if attention == "flex_attention":
        return "attention 'flex_attention' takes masks of its own form, which packed rows lack; use sdpa"
    if attention not in ("sdpa", "sdpa_by_text"):  # the latter: padding_free
        return f"attention {attention!r} takes no block mask; use sdpa"
    return None


def limited_attention(config: Any) -> str | None:
    """What keeps layers of a (text) config from attending to all that precedes; None when all of them do."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds == {"full_attention"} and getattr(config, "sliding_window", None) is None:
        return None
    return ", ".join(sorted(kinds - {"full_attention"})) or "a sliding window"


@torch.no_grad()
def _try_out(classifier: Any) -> str | None:
    """Compare packed with plain scores of three short texts; shared-out weights (ZeRO-3) cannot be tried here."""
    if any(hasattr(parameter, "ds_id") for parameter in classifier.parameters()):
        return None
    config = classifier.config.get_text_config()
    device, pad = next(classifier.parameters()).device, classifier.config.pad_token_id
    usable = [token for token in range(min(config.vocab_size, 16)) if token != pad]
    texts = [usable[:6] + usable[6:9], usable[:6] + usable[9:11], usable[3:8]]
    groups = [Group.of(texts[:2]), Group.of(texts[2:])]
    packed = pack(groups, pad_token_id=pad, hidden_size=config.hidden_size).to(device)
    training = classifier.training
    classifier.eval()
    try:
        found = packed_scores(classifier, classifier.score, packed)
        plain = [classifier(input_ids=torch.tensor([text], device=device)).logits[0, 0].float() for text in texts]
    except (TypeError, ValueError, RuntimeError) as error:
        return f"packed rows fail: {' '.join(str(error).split())[:200]}"
    finally:
        classifier.train(training)
    expected = torch.stack(plain)
    tolerance = 1e-3 if classifier.dtype == torch.float32 else 5e-2
    worst = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    return None if worst < tolerance else f"packed and plain scores differ by {worst:.1e} of their size"
