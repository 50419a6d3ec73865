"""`load_preferences`, `load_conversations`, `load_prompts`, ...: data sets -> records, nothing lost unseen.

Splits come first. A source with splits of its own (on the hub, in files named `train*` and `test*`, in a column) keeps
them. One without a test split lends a tenth of its prompts to `test`; the side depends on the first user turn alone,
without case, spaces and punctuation, so one opening never stands on both sides, whatever the source and the seed.
`split: all` is everything.

Then come `max_rows` (the first n after a seeded shuffle of the source) and the weights: among the weighted sources, the
largest mixture with these shares that repeats no row. Sources without a weight give all their rows.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, cast

from alignment.recipe import Data, Source
from alignment.source_catalog import (
    RECORDS,
    SourceInfo,
    check_source,
    parser_of,
    rows_of,
    source_files,
    source_info,
    split_column,
)
from alignment.source_files import Row, SourceError
from alignment.source_formats import (
    LabelledConversation,
    Parser,
    Shape,
    Skipped,
    SourceRecord,
    prompt_of,
    unread_columns,
)
from reward.conversation import Conversation, Graded, Preference, Prompt, RecordError, Tags

__all__ = [
    "RECORDS",
    "Loaded",
    "SourceError",
    "account_lines",
    "check_source",
    "load_conversations",
    "load_graded",
    "load_labelled",
    "load_preferences",
    "load_prompts",
    "mixture_sizes",
    "source_files",
    "split_side",
]

TEST_SHARE = 0.1
_NUM_EXAMPLES = 3
_MAX_REASON = 200
_NUM_REASONS = 50
"""Kinds of faults and of remarks that a source is told; whatever its rows hold, the account stays short."""

R = TypeVar("R", bound=SourceRecord)


@dataclass(frozen=True)
class Loaded(Generic[R]):
    """Records in the order of training, and the account of how they came about.

    `counts`: source -> rows read, kept, truncated, dropped (faulty), left_out (by choice) and noted (odd, but kept),
    the last three by reason, with the first places of what was dropped or noted; read = kept + dropped + left_out.
    `files`: source -> file -> SHA-256. `places`: of each record its source, and its file and line without the folder.
    """

    records: tuple[R, ...]
    counts: dict[str, dict[str, Any]]
    files: dict[str, dict[str, str]]
    places: tuple[tuple[str, str], ...]

    @cached_property
    def data_hash(self) -> str:
        """SHA-256 of the records as JSON lines, in their order."""
        digest = hashlib.sha256()
        for record in self.records:
            digest.update(json.dumps(record.to_json(), sort_keys=True).encode() + b"\n")
        return digest.hexdigest()

    def without(self, positions: Collection[int], reason: str) -> Loaded[R]:
        """Less the records at these positions, which a stage cannot use: the account has them as dropped, and why."""
        counts = deepcopy(self.counts)
        for position in positions:
            source, place = self.places[position]
            counts[source]["kept"] -= 1
            _enter(counts[source]["dropped"], counts[source]["examples"], reason, place)
        gone = set(positions)
        left = [position for position in range(len(self.records)) if position not in gone]
        return Loaded(
            tuple(self.records[position] for position in left),
            counts,
            self.files,
            tuple(self.places[position] for position in left),
        )

    def noting(self, positions: Iterable[int], note: str, *, truncated: bool = False) -> Loaded[R]:
        """With a remark on the records at these positions, which are kept, though `truncated` perhaps."""
        counts = deepcopy(self.counts)
        for position in positions:
            source, place = self.places[position]
            counts[source]["truncated"] += truncated
            _enter(counts[source]["noted"], counts[source]["examples"], note, place)
        return replace(self, counts=counts)


def load_preferences(data: Data, *, seed: int) -> Loaded[Preference]:
    return _load(data, "preferences", seed)


def load_conversations(data: Data, *, seed: int) -> Loaded[Conversation]:
    return _load(data, "conversations", seed)


def load_prompts(data: Data, *, seed: int) -> Loaded[Prompt]:
    return _load(data, "prompts", seed)


def load_labelled(data: Data, *, seed: int) -> Loaded[LabelledConversation]:
    """Conversations with a human safety verdict, on which judges are measured. Those labelled both ways are dropped."""
    loaded: Loaded[LabelledConversation] = _load(data, "labelled", seed)
    labels = {(record.conversation.messages, record.safe) for record in loaded.records}
    torn = [
        position
        for position, record in enumerate(loaded.records)
        if (record.conversation.messages, not record.safe) in labels
    ]
    return loaded.without(torn, "labelled both safe and unsafe")


def load_graded(data: Data, *, seed: int) -> Loaded[Graded]:
    """Conversations with a human grade of their harm, from which a harmfulness model learns."""
    return _load(data, "graded", seed)


def account_lines(data: Mapping[str, Any]) -> Iterator[str]:
    """What a manifest's `data` (or each of its parts) tells of rows that were dropped or noted, a line a source."""
    accounts = [part["counts"] for part in (data, *data.values()) if isinstance(part, Mapping) and "counts" in part]
    for source, counts in (item for account in accounts for item in account.items()):
        for kind in ("dropped", "noted"):
            if counts[kind]:
                told = ", ".join(_told(counts[kind], counts["examples"]))
                yield f"{source}: {counts['kept']} of {counts['read']} rows kept; {kind}: {told}"


def _told(counts: Mapping[str, int], examples: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """`reason: 5 (rows.jsonl:3, rows.jsonl:4, ...)`."""
    for reason, number in counts.items():
        places = [*examples.get(reason, ())]
        if places and number > len(places):
            places.append("...")
        shown = ", ".join(places)
        yield f"{reason}: {number} ({shown})" if places else f"{reason}: {number}"


def mixture_sizes(available: Sequence[int], weights: Sequence[float | None]) -> list[int]:
    """Rows to take from each source: `floor(w_i * min_j(n_j / w_j))` over the weighted ones, all rows of the others.

    The largest mixture whose shares are the weights and that repeats no row, e.g. 100 and 100 rows at 3 : 1 -> 100, 33.
    """
    exact = [None if weight is None else Fraction(str(weight)) for weight in weights]
    unit = min(
        (number / weight for number, weight in zip(available, exact, strict=True) if weight), default=Fraction(0)
    )
    return [number if weight is None else int(weight * unit) for number, weight in zip(available, exact, strict=True)]


def split_side(prompt: Prompt) -> str:
    """`train` or `test` for a prompt of a source without a test split (one in ten)."""
    text = next(message.content for message in prompt.messages if message.role == "user")
    plain = "".join(character for character in text.casefold() if character.isalnum()) or text
    number = int.from_bytes(hashlib.sha256(plain.encode()).digest()[:8], "big")
    return "test" if number < TEST_SHARE * 2**64 else "train"


# ------------------------------------------------------------------------------------------------- loading


@dataclass
class _Counts:
    read: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict[str, int])
    left_out: Counter[str] = field(default_factory=Counter[str])
    noted: dict[str, int] = field(default_factory=dict[str, int])
    examples: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def skip(self, skipped: Skipped) -> None:
        if skipped.fault:
            _enter(self.dropped, self.examples, skipped.reason, skipped.row.short_where)
        else:
            self.left_out[skipped.reason] += 1

    def to_json(self) -> dict[str, Any]:
        return {
            "read": self.read,
            "kept": self.kept,
            "truncated": 0,  # loading never cuts a text; what does not fit their max_length is the business of stages
            "dropped": self.dropped,
            "left_out": dict(self.left_out),
            "noted": self.noted,
            "examples": self.examples,
        }


def _enter(counts: dict[str, int], examples: dict[str, list[str]], reason: str, place: str) -> None:
    """Count one row under its reason and remember the first places."""
    if reason not in counts and len(counts) >= _NUM_REASONS:
        reason = "other reasons"
    counts[reason] = counts.get(reason, 0) + 1
    places = examples.setdefault(reason, [])
    if len(places) < _NUM_EXAMPLES:
        places.append(place)


class _Found(NamedTuple):
    """A usable record, where it stands, and what is odd about it."""

    record: SourceRecord
    place: str
    notes: tuple[str, ...]


@dataclass
class _Pool:
    """What is usable of one source."""

    label: str
    found: list[_Found] = field(default_factory=list[_Found])
    counts: _Counts = field(default_factory=_Counts)
    files: dict[str, str] = field(default_factory=dict[str, str])


def _load(data: Data, shape: Shape, seed: int) -> Loaded[Any]:
    parsers = [parser_of(source, shape) for source in data.sources]
    weights = [source.weight for source in data.sources]
    if len(weights) > 1 and sum(weight is not None for weight in weights) == 1:
        raise SourceError("a weight is a share among weighted sources, but only one source has one; weight another too")
    labels = _labels(data.sources)
    seen: set[Hashable] = set()
    pools = [
        _read_pool(source, shape, parser, label, seen)
        for source, parser, label in zip(data.sources, parsers, labels, strict=True)
    ]
    drawn = _draw(data.sources, pools, seed)
    if data.shuffle:
        random.Random(seed).shuffle(drawn)
    return Loaded(
        tuple(found.record for _, found in drawn),
        {pool.label: pool.counts.to_json() for pool in pools},
        {pool.label: pool.files for pool in pools},
        tuple((label, found.place) for label, found in drawn),
    )


def _read_pool(source: Source, shape: Shape, parse: Parser, label: str, seen: set[Hashable]) -> _Pool:
    info, column, pool = source_info(source.name), split_column(source), _Pool(label)
    rows, by_prompt = rows_of(source, pool.files)
    items = info.join[shape](rows) if shape in info.join else rows
    for item in _records(items, parse, info, label):
        pool.counts.read += 1
        if isinstance(item, Skipped):
            pool.counts.skip(item)
            continue
        row, record = item
        side = row[column] if column else split_side(prompt_of(record)) if by_prompt else source.split
        if source.split not in (side, "all"):
            pool.counts.skip(Skipped(row, "other split", fault=False))
        elif (key := _content(record)) in seen:
            pool.counts.skip(Skipped(row, "duplicate"))
        else:
            seen.add(key)
            pool.found.append(_Found(record, row.short_where, tuple(_notes(record, row, source, shape))))
    if not pool.found:
        reasons = ", ".join(_told({**pool.counts.dropped, **pool.counts.left_out}, pool.counts.examples))
        raise SourceError(
            f"{label}: none of its {pool.counts.read} rows gives {shape} of split {source.split!r} "
            f"({reasons or 'it has no rows'})"
        )
    return pool


def _records(
    items: Iterable[Row | Skipped], parse: Parser, info: SourceInfo, label: str
) -> Iterator[tuple[Row, SourceRecord] | Skipped]:
    for item in items:
        if isinstance(item, Skipped):
            yield item
            continue
        try:
            record = parse(item)
            tags = prompt_of(record).tags if info.tags is None else info.tags(item)
        except RecordError as error:
            # What follows ", got" is the row's own value: left off, so that reasons can be counted.
            yield Skipped(item, str(error).partition(", got ")[0][:_MAX_REASON])
        else:
            yield item, _with_tags(record, tags, label)


def _notes(record: SourceRecord, row: Row, source: Source, shape: Shape) -> Iterator[str]:
    """What is odd about a row that makes a record all the same."""
    if source.name in ("file", "hub") and source.columns is None:
        for column in unread_columns(row, shape):
            yield f"the column {column[:_MAX_REASON]!r} is not read"
    if isinstance(record, Preference) and record.chosen_safe is False and record.rejected_safe is True:
        yield "chosen unsafe, rejected safe: ranked, but no safety labels to learn from"


def _draw(sources: Sequence[Source], pools: Sequence[_Pool], seed: int) -> list[tuple[str, _Found]]:
    """Apply `max_rows` and the weights: (source, what is drawn), in the order of sources and rows."""
    capped = [
        min(len(pool.found), source.max_rows or len(pool.found)) for source, pool in zip(sources, pools, strict=True)
    ]
    drawn: list[tuple[str, _Found]] = []
    for pool, cap, size in zip(
        pools, capped, mixture_sizes(capped, [source.weight for source in sources]), strict=True
    ):
        if size == 0:
            raise SourceError(f"{pool.label}: its weight is so small beside the others that it gives no row; raise it")
        order = list(range(len(pool.found)))
        random.Random(f"{seed}/{pool.label}").shuffle(order)
        for position in sorted(order[:size]):
            found = pool.found[position]
            drawn.append((pool.label, found))
            for note in found.notes:
                _enter(pool.counts.noted, pool.counts.examples, note, found.place)
        pool.counts.kept = size
        pool.counts.left_out += Counter({"max_rows": len(order) - cap, "weight": cap - size})
    return drawn


def _labels(sources: Sequence[Source]) -> list[str]:
    """One name per source for counts and tags: without folders, which differ between machines."""
    labels: list[str] = []
    for source in sources:
        label = source.name
        if source.path is not None and label in ("file", "hub", "artifact"):
            label += f":{source.path if label == 'hub' else Path(source.path).name}"
        number = sum(other == label or other.startswith(f"{label}#") for other in labels)
        labels.append(f"{label}#{number + 1}" if number else label)
    return labels


def _with_tags(record: SourceRecord, tags: Tags, label: str) -> SourceRecord:
    if isinstance(record, Preference):
        return replace(record, prompt=cast("Prompt", _with_tags(record.prompt, tags, label)))
    if isinstance(record, LabelledConversation | Graded):
        return replace(record, conversation=cast("Conversation", _with_tags(record.conversation, tags, label)))
    return replace(record, tags=replace(tags, source=tags.source or label))


def _content(record: SourceRecord) -> Hashable:
    """What makes two records duplicates: prompt and answers, without tags and ratings; of graded ones the grade."""
    if isinstance(record, Preference):
        return record.prompt.messages, record.chosen, record.rejected
    if isinstance(record, LabelledConversation):
        return record.conversation.messages, record.safe
    if isinstance(record, Graded):
        return record.conversation.messages, record.grade
    return record.messages
