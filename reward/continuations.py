"""How likely given continuations are behind texts, all as token ids: `log P(tail | text)`.

Two ways with the same numbers, to rounding:
* `read_whole`: every text is read from its first token on, padded on the left;
* `PrefixCache`: keys and values of the tokens that all texts begin with are computed once and kept. What follows them
  stands in packed rows under a block mask (`reward.shared_prefix`), in which each text sees the kept prefix and itself.

Either way the text is read once for all tails that begin alike, and with `PrefixCache` for all tails.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reward.render import common_start
from reward.shared_prefix import Group, lay_out, why_no_block_mask

Ids = Sequence[int]

_ROW_OVERHEAD = {"cpu": 64, "cuda": 512}
"""What one forward costs beside its tokens (reading the weights, starting kernels), in tokens. Orders of magnitude."""


@dataclass(frozen=True, slots=True)
class Tails:
    """Continuations to choose from. `stems` are what must be read to weigh them all: the tails without their last
    token, less those that begin another; tail i goes along stem `stem_of[i]`.
    """

    tails: tuple[Ids, ...]
    stems: tuple[Ids, ...]
    stem_of: tuple[int, ...]

    @classmethod
    def of(cls, tails: Sequence[Ids]) -> Tails:
        needed = [tuple(tail[:-1]) for tail in tails]
        stems: list[tuple[int, ...]] = []
        for stem in sorted(set(needed), key=lambda stem: (-len(stem), stem)):
            if not any(kept[: len(stem)] == stem for kept in stems):
                stems.append(stem)
        stem_of = tuple(next(s for s, kept in enumerate(stems) if kept[: len(own)] == own) for own in needed)
        return cls(tuple(tails), tuple(stems), stem_of)

    def along(self, stem: int) -> list[int]:
        """The numbers of the tails that go along this stem."""
        return [number for number, own in enumerate(self.stem_of) if own == stem]


@dataclass(frozen=True, slots=True)
class _Path:
    """Where a tail of a text is read: row t of the logits foretells token t of the tail."""

    text: int
    tail: int
    rows: Sequence[int]


def _weigh(logits: Tensor, paths: Sequence[_Path], tails: Tails, found: list[list[float]]) -> None:
    """Write the log-probability of each path to `found[text][tail]`; `logits` is `(n, vocabulary)`."""
    steps = logits.float().log_softmax(dim=-1)
    wanted = [pair for path in paths for pair in zip(path.rows, tails.tails[path.tail], strict=False)]
    rows, tokens = torch.tensor(wanted, dtype=torch.long, device=steps.device).reshape(-1, 2).unbind(dim=1)
    values = iter(steps[rows, tokens].tolist())
    for path in paths:
        found[path.text][path.tail] = math.fsum(next(values) for _ in tails.tails[path.tail])


# ------------------------------------------------------------------------------------------------- read whole


@torch.inference_mode()
def read_whole(
    model: Any, texts: Sequence[Ids], tails: Tails, *, pad_token_id: int, batch_size: int
) -> list[list[float]]:
    """Log-probabilities per text and tail; a row of a batch for each text and stem."""
    found = [[0.0] * len(tails.tails) for _ in texts]
    rows = [(text, stem) for text in range(len(texts)) for stem in range(len(tails.stems))]
    # Longest first, so that a lack of memory shows at once.
    rows.sort(key=lambda row: -len(texts[row[0]]) - len(tails.stems[row[1]]))
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        inputs = pad_left([[*texts[text], *tails.stems[stem]] for text, stem in batch], pad_token_id=pad_token_id)
        keep = max(len(tails.stems[stem]) for _, stem in batch) + 1
        # Padded on the left, all stems end in the last column: the logits of the other positions are never made.
        logits = model(**_to(model, inputs), use_cache=False, logits_to_keep=keep).logits
        paths: list[_Path] = []
        for row, (text, stem) in enumerate(batch):
            first = (row + 1) * keep - 1 - len(tails.stems[stem])
            paths += [_Path(text, tail, range(first, (row + 1) * keep)) for tail in tails.along(stem)]
        _weigh(logits.flatten(0, 1), paths, tails, found)
    return found


def pad_left(rows: Sequence[Ids], *, pad_token_id: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `position_ids`, each `(rows, longest)`; the mask hides the padding."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad_token_id] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(dim=-1) - 1).clamp(min=0)}


def _to(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


# ---------------------------------------------------------------------------------------------- shared prefix


class PrefixCache:
    """Keys and values of a prefix, computed once for all texts and batches until another prefix is asked for."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._ids: Ids = ()
        self.kept: Any = None

    @torch.inference_mode()
    def read(self, texts: Sequence[Ids], tails: Tails, *, prefix: Ids, batch_size: int) -> list[list[float]]:
        """Log-probabilities per text and tail. `prefix`: what the texts begin with, so far as the caller knows.

        The texts are split where they leave `prefix`, at the latest before the last token; so the split is one of their
        own tokens, whatever `prefix` says. At most `batch_size` texts are read together.
        """
        found = [[0.0] * len(tails.tails) for _ in texts]
        if not texts:
            return found
        shared = self._keep(prefix, texts)
        beyond = sum(len(stem) for stem in tails.stems)
        sizes = [len(text) - shared + beyond for text in texts]
        for row in _rows(sizes, capacity=self._row_length(), batch_size=batch_size):
            self._read_row(row, [texts[number][shared:] for number in row], tails, shared, found)
        return found

    def _keep(self, prefix: Ids, texts: Sequence[Ids]) -> int:
        """How many of the kept tokens all texts begin with; first computes `prefix` where another one is kept."""
        shortest = min(len(text) for text in texts)
        if prefix and list(prefix) != list(self._ids):
            ids = torch.tensor([list(prefix)], device=self.model.device)
            # The logits of one position: those of all would be large, and none is read.
            self.kept = self.model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
            self._ids = tuple(prefix)
        return len(common_start([prefix, *(text[: shortest - 1] for text in texts)]))

    def _read_row(self, numbers: Sequence[int], rests: Sequence[Ids], tails: Tails, shared: int, found: Any) -> None:
        stems = [stem for stem in tails.stems if stem]
        groups = [Group(rest, tuple(stems)) for rest in rests]
        packed = lay_out(groups, [range(len(groups))], pad_token_id=0)
        length = packed.input_ids.shape[1]
        inputs = {
            "input_ids": packed.input_ids,
            "position_ids": packed.position_ids + shared,
            "attention_mask": torch.cat(
                [torch.ones(1, 1, length, shared, dtype=torch.bool), packed.attention_mask()], dim=-1
            ),
        }
        columns, paths = _columns(numbers, groups, tails)
        logits = self.model(
            **_to(self.model, inputs),
            past_key_values=self._start_of_kept(shared),
            use_cache=shared > 0,
            logits_to_keep=torch.tensor(columns, device=self.model.device),
        ).logits
        _weigh(logits[0], paths, tails, found)

    def _start_of_kept(self, shared: int) -> Any:
        """A cache of the first `shared` tokens, None for none. It has the kept tensors or views of them: a layer that
        grows makes new ones.
        """
        if not shared:
            return None
        start = copy.copy(self.kept)
        start.layers = [copy.copy(layer) for layer in self.kept.layers]
        if shared < len(self._ids):
            start.crop(shared - len(self._ids))
        return start

    def _row_length(self) -> int:
        """Tokens of a row that cost least, each.

        A token costs `1 + L / (6 h)` in a row of length L, by attention (see `shared_prefix`), and its part of the
        row's overhead, `overhead / L`; the sum is smallest at `L = sqrt(6 h overhead)`.
        """
        overhead = _ROW_OVERHEAD.get(self.model.device.type, _ROW_OVERHEAD["cuda"])
        return math.isqrt(6 * self.model.config.get_text_config().hidden_size * overhead)


def _rows(sizes: Sequence[int], *, capacity: int, batch_size: int) -> Iterator[list[int]]:
    """Numbers of texts row by row, longest first; a row holds `capacity` tokens or a single text."""
    row: list[int] = []
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        if row and (len(row) == batch_size or sum(sizes[n] for n in row) + sizes[number] > capacity):
            yield row
            row = []
        row.append(number)
    yield row


def _columns(numbers: Sequence[int], groups: Sequence[Group], tails: Tails) -> tuple[list[int], list[_Path]]:
    """Columns of a packed row whose logits are read, and the paths through those logits."""
    columns: list[int] = []
    paths: list[_Path] = []
    start = 0
    for number, group in zip(numbers, groups, strict=True):
        end_of_text = len(columns)
        columns.append(start + len(group.prefix) - 1)
        start += len(group.prefix)
        for stem, ids in enumerate(tails.stems):
            rows = [end_of_text, *range(len(columns), len(columns) + len(ids))]
            columns += range(start, start + len(ids))
            start += len(ids)
            paths += [_Path(number, tail, rows) for tail in tails.along(stem)]
    return columns, paths


# -------------------------------------------------------------------------------------------------- fall-back


def why_not_shared(model: Any) -> str | None:
    """Why this model's keys and values of a prefix cannot be shared; None when they can.

    Each layer must keep them whole, take any mask and positions, and be a function of what it sees (no sliding window,
    no recurrence, no quantized cache). That is then tried out on a few tokens.
    """
    return why_no_block_mask(model) or _try_out(model)


@torch.inference_mode()
def _try_out(model: Any) -> str | None:
    """Compare `PrefixCache` with `read_whole` on two short texts."""
    from transformers.cache_utils import DynamicLayer

    usable = list(range(1, min(model.config.get_text_config().vocab_size, 24)))
    prefix, texts = usable[:6], [usable[:6] + usable[6:9], usable[:6] + usable[9:14]]
    tails = Tails.of([usable[14:17], usable[14:15] + usable[18:20], usable[20:21]])
    cache = PrefixCache(model)
    try:
        expected = torch.tensor(read_whole(model, texts, tails, pad_token_id=0, batch_size=1))
        found = torch.tensor(cache.read(texts, tails, prefix=prefix, batch_size=2))
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        return f"a shared prefix fails: {' '.join(str(error).split())[:200]}"
    kinds = {type(layer).__name__ for layer in cache.kept.layers} - {DynamicLayer.__name__}
    if kinds:
        return f"it keeps {', '.join(sorted(kinds))} layers, not plain keys and values"
    exact = model.dtype == torch.float32 and getattr(model.config, "quantization_config", None) is None
    tolerance = 1e-3 if exact else 5e-2
    worst = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    return None if worst < tolerance else f"with a shared prefix numbers differ by {worst:.1e} of their size"
