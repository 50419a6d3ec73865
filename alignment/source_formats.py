"""Rows of the public data sets, and of any table, -> records.

A row that makes no usable record raises `RecordError`; `sources.py` counts it by reason. A missing column is a fault of
the file and refused. Text is kept exactly as it stands in the file.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal, cast

from alignment.source_files import Row, SourceError
from reward.conversation import (
    MAX_GRADE,
    Conversation,
    Graded,
    Message,
    Preference,
    Prompt,
    RecordError,
    Role,
    Tags,
    parse_messages,
)

Shape = Literal["preferences", "conversations", "prompts", "labelled", "graded"]


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that gives no record, and why; `fault` is False when nothing is wrong with the row."""

    row: Row
    reason: str
    fault: bool = True


@dataclass(frozen=True, slots=True)
class LabelledConversation:
    """A conversation and the human verdict on its last answer; what judges are measured on."""

    conversation: Conversation
    safe: bool

    def to_json(self) -> dict[str, Any]:
        return {**self.conversation.to_json(), "safe": self.safe}

    @property
    def prompt(self) -> Prompt:
        return self.conversation.prompt


SourceRecord = Prompt | Conversation | Preference | LabelledConversation | Graded
Parser = Callable[[Row], SourceRecord]
Join = Callable[[Iterable[Row]], Iterator[Row | Skipped]]


def prompt_of(record: SourceRecord) -> Prompt:
    return record if isinstance(record, Prompt) else record.prompt


# ------------------------------------------------------------------------------------ Anthropic HH transcripts

_TURN = re.compile(r"\n\n(Human|Assistant):")
_SPEAKERS: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}


def parse_transcript(text: object) -> tuple[Message, ...]:
    """Read "\\n\\nHuman: ...\\n\\nAssistant: ..." (Bai et al., arXiv 2204.05862); `join_transcript` is the inverse."""
    if not isinstance(text, str):
        raise RecordError(f"a transcript must be text, got {type(text).__name__}")
    head, *parts = _TURN.split(text)
    speakers, contents = parts[::2], parts[1::2]
    if head or not parts:
        raise RecordError("a transcript must begin with a blank line and 'Human: '")
    if any(one == next_one for one, next_one in itertools.pairwise(speakers)):
        raise RecordError("two turns of the same role in a row")
    if any(content and not content.startswith(" ") for content in contents):
        raise RecordError("a turn marker without a space behind it")
    return tuple(Message(_SPEAKERS[who], content[1:]) for who, content in zip(speakers, contents, strict=True))


def join_transcript(messages: Iterable[Message]) -> str:
    speakers = {role: speaker for speaker, role in _SPEAKERS.items()}
    return "".join(f"\n\n{speakers[message.role]}: {message.content}" for message in messages)


def hh_preference(row: Row) -> Preference:
    return _pair_of(parse_transcript(row["chosen"]), parse_transcript(row["rejected"]))


def hh_conversation(row: Row) -> Conversation:
    return _conversation(parse_transcript(row["chosen"]))


def hh_prompt(row: Row) -> Prompt:
    return Conversation(parse_transcript(row["chosen"])).prompt


def red_team_attempt(row: Row) -> Graded:
    """A transcript with the rating of the person who attacked: how far the attack succeeded."""
    return Graded(_conversation(parse_transcript(row["transcript"])), read_grade(row["rating"]))


def read_grade(value: Any) -> Any:
    """A grade as `Graded` takes it; a number written as text is one too, since CSV has nothing else."""
    if value is None or value == "":
        raise RecordError("grade is missing")
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError as error:
        raise RecordError(f"grade must be a number from 0 to {MAX_GRADE:g}, got {value!r}") from error


def _pair_of(chosen: Sequence[Message], rejected: Sequence[Message]) -> Preference:
    """The turns before the last answer are the prompt; both sides must share them."""
    better, worse = Conversation(tuple(chosen)), Conversation(tuple(rejected))
    if better.prompt != worse.prompt:
        raise RecordError("the two sides differ in the prompt")
    return Preference(better.prompt, better.completion, worse.completion)


def _conversation(messages: Sequence[Message]) -> Conversation:
    """A conversation to learn from; `from_json` refuses empty answers."""
    return Conversation.from_json({"messages": [message.to_json() for message in messages]})


# --------------------------------------------------------------- PKU-SafeRLHF and BeaverTails: both safety labels


def text_prompt(row: Row) -> Prompt:
    return Prompt(parse_messages(row["prompt"]))


def pku_preference(row: Row) -> Preference:
    """By `safer_response_id`, with both safety labels.

    The re-export with `prompt, chosen, rejected` has no labels, so its records have none either.
    """
    if "chosen" in row.values:
        return Preference(text_prompt(row), row["chosen"], row["rejected"])
    safer = row["safer_response_id"]
    labels = [row["is_response_0_safe"], row["is_response_1_safe"]]
    if not isinstance(safer, int) or isinstance(safer, bool) or safer not in (0, 1):
        raise RecordError(f"safer_response_id must be 0 or 1, got {safer!r}")
    if labels[safer] is False and labels[1 - safer] is True:
        raise RecordError("chosen unsafe, rejected safe")  # Llama 2 leaves such pairs out (section 3.2.2)
    answers = [row["response_0"], row["response_1"]]
    return Preference(
        text_prompt(row),
        answers[safer],
        answers[1 - safer],
        chosen_safe=labels[safer],
        rejected_safe=labels[1 - safer],
    )


def pku_conversation(row: Row) -> Conversation:
    """The safer answer, unless people called it unsafe too."""
    pair = pku_preference(row)
    if pair.chosen_safe is False:
        raise RecordError("the answer is labelled unsafe")
    return pair.prompt.answer(pair.chosen)


def labelled_answer(row: Row) -> LabelledConversation:
    """`is_safe` as on the hub, or `label: harmful | unharmful` as guard benchmarks write it."""
    label = row["label"] if "label" in row.values else row["is_safe"]
    verdicts: dict[object, bool] = {"harmful": False, "unharmful": True}
    safe = label if isinstance(label, bool) else verdicts.get(label) if isinstance(label, str) else None
    if safe is None:
        raise RecordError(f"the safety label must be true, false, harmful or unharmful, got {label!r}")
    messages = [*text_prompt(row).messages, Message("assistant", row["response"])]
    return LabelledConversation(_conversation(messages), safe)


def safe_answer(row: Row) -> Conversation:
    labelled = labelled_answer(row)
    if not labelled.safe:
        raise RecordError("the answer is labelled unsafe")
    return labelled.conversation


def pair_answers(rows: Iterable[Row]) -> Iterator[Row | Skipped]:
    """Rows of one labelled answer each -> rows of a pair: the i-th safe with the i-th unsafe answer to one prompt.

    Each answer stands in one pair at most, so pairs are independent of each other. Answers that people labelled both
    ways are dropped.
    """
    prompts: dict[str, dict[str, list[tuple[Row, bool]]]] = {}
    for row in rows:
        try:
            labelled = labelled_answer(row)
        except RecordError as error:
            yield Skipped(row, str(error))
            continue
        answers = prompts.setdefault(labelled.conversation.prompt.text, {})
        answers.setdefault(labelled.conversation.completion, []).append((row, labelled.safe))
    for prompt, answers in prompts.items():
        sides: dict[bool, list[tuple[Row, str]]] = {True: [], False: []}
        for answer, ((first, safe), *repeats) in answers.items():
            if any(verdict != safe for _, verdict in repeats):
                yield from (Skipped(row, "labelled both safe and unsafe") for row, _ in answers[answer])
                continue
            yield from (Skipped(row, "duplicate") for row, _ in repeats)
            sides[safe].append((first, answer))
        pairs = list(zip(sides[True], sides[False], strict=False))
        for (safe_row, chosen), (unsafe_row, rejected) in pairs:
            yield Skipped(unsafe_row, "second answer of a pair", fault=False)
            values = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            yield Row(values | {"chosen_safe": True, "rejected_safe": False}, safe_row.file, safe_row.line)
        for row, _ in sides[True][len(pairs) :] + sides[False][len(pairs) :]:
            yield Skipped(row, "no answer with the other label", fault=False)


# ------------------------------------------------------------------------------ instructions, XSTest, starter set


def instruction_prompt(row: Row) -> Prompt:
    """Alpaca: `instruction`, and `input`, where there is one, behind a blank line."""
    instruction, context = row["instruction"], row.values.get("input") or ""
    if not isinstance(instruction, str) or not isinstance(context, str):
        raise RecordError("instruction and input must be text")
    return Prompt.of(f"{instruction}\n\n{context}" if context.strip() else instruction)


def instruction_conversation(row: Row) -> Conversation:
    return _conversation([*instruction_prompt(row).messages, Message("assistant", row["output"])])


def xstest_tags(row: Row) -> Tags:
    """The safe half only looks unsafe, in ten ways (Röttger et al., arXiv 2308.01263)."""
    if row["label"] not in ("safe", "unsafe"):
        raise RecordError(f"label must be safe or unsafe, got {row['label']!r}")
    return Tags(borderline=row["label"] == "safe", is_safety=row["label"] == "unsafe", kind=row["type"])


def safety_tuned_llamas_tags(row: Row) -> Tags:
    """Two of the evaluation files are benign: ordinary instructions, and safe questions about physical safety."""
    name = PurePath(row.file).name
    borderline = name.startswith("I-PhysicalSafetySafe")
    return Tags(borderline=borderline, is_safety=not borderline and not name.startswith("I-Alpaca"))


def starter_safety_tags(row: Row) -> Tags:
    return Tags(row["risk_category"], row["attack_vector"], is_safety=True)


def starter_preference(row: Row) -> Preference:
    pair = row["pair"]
    if not isinstance(pair, Mapping):
        raise RecordError(f"pair must be an object, got {type(pair).__name__}")
    return Preference.from_json({**pair, "prompt": row["prompt"]})


def starter_conversation(row: Row) -> Conversation:
    return _conversation([*text_prompt(row).messages, Message("assistant", row["demonstration"])])


# ----------------------------------------------------------------------------------- any table, by column names

_TAGS: dict[str, type] = {
    "risk_category": str,
    "attack_vector": str,
    "is_safety": bool,
    "borderline": bool,
    "kind": str,
}
_FIELDS: dict[Shape, tuple[str, ...]] = {
    "preferences": ("prompt", "chosen", "rejected", "rating", "chosen_safe", "rejected_safe", "label_source"),
    "conversations": ("messages", "prompt", "completion"),
    "prompts": ("prompt",),
    "labelled": ("messages", "prompt", "completion", "safe", "label"),
    "graded": ("messages", "prompt", "completion", "grade"),
}


def unread_columns(row: Row, shape: Shape) -> list[str]:
    """Columns of a row that `column_parser` without `columns` leaves alone: foreign to us, or misspelt."""
    known = {*_FIELDS[shape], *_TAGS, "tags"}
    return [column for column in row.values if column not in known]


def column_parser(shape: Shape, columns: Mapping[str, str] | None) -> Parser:
    """A parser for any table. `columns` maps our field to a column; without it the columns have our names.

    With `columns`, columns that it does not name are not read (`split` among them is the catalog's business). Fields
    that are text may also be lists of messages, as in TRL's conversational formats; without `prompt`, chosen and
    rejected then hold the whole conversation.
    """
    fields = (*_FIELDS[shape], *_TAGS, "tags")
    check_columns(columns or {}, (shape,))

    def values_of(row: Row) -> dict[str, Any]:
        if columns is None:
            return {field: row.values[field] for field in fields if field in row.values}
        return {field: row[column] for field, column in columns.items()}

    def parse(row: Row) -> SourceRecord:
        named = Row(values_of(row), row.file, row.line)
        return _TABLE_PARSERS[shape](named, _table_tags(named))

    return parse


def check_columns(columns: Mapping[str, str], shapes: Sequence[Shape]) -> None:
    """Refuse a name that is no field of any of the shapes."""
    fields = sorted({*itertools.chain.from_iterable(_FIELDS[shape] for shape in shapes), *_TAGS, "tags", "split"})
    for field in columns:
        if field not in fields:
            near = difflib.get_close_matches(field, fields, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise SourceError(
                f"columns: {field!r} is no field of {' or '.join(shapes)}; {hint}The fields are {', '.join(fields)}"
            )


def _table_tags(row: Row) -> Tags:
    given: object = row.values.get("tags")
    if given is not None and not isinstance(given, Mapping):
        raise RecordError(f"tags must be an object, got {type(given).__name__}")
    tags = dict(cast("Mapping[str, Any]", given or {}))
    for name, kind in _TAGS.items():
        value = row.values.get(name)
        if value is not None and not isinstance(value, kind):
            raise RecordError(f"{name} must be {kind.__name__}, got {value!r}")
        if value is not None:
            tags[name] = value
    return Tags.from_json(tags)


def _table_preference(row: Row, tags: Tags) -> Preference:
    values = dict(row.values)
    if "prompt" not in values and isinstance(row["chosen"], list) and isinstance(row["rejected"], list):
        pair = _pair_of(parse_messages(row["chosen"]), parse_messages(row["rejected"]))
        values |= {"prompt": pair.prompt.to_json()["prompt"], "chosen": pair.chosen, "rejected": pair.rejected}
    else:
        values |= {"prompt": row["prompt"], "chosen": _answer(row["chosen"]), "rejected": _answer(row["rejected"])}
    return Preference.from_json(values | {"tags": tags.to_json()})


def _table_conversation(row: Row, tags: Tags) -> Conversation:
    if "messages" in row.values:
        messages = parse_messages(row["messages"])
    else:
        messages = (*parse_messages(row["prompt"]), Message("assistant", _answer(row["completion"])))
    return Conversation(_conversation(messages).messages, tags)


def _table_prompt(row: Row, tags: Tags) -> Prompt:
    return Prompt(parse_messages(row["prompt"]), tags)


_VERDICTS = {
    **dict.fromkeys(("safe", "harmless", "unharmful", "good"), True),
    **dict.fromkeys(("unsafe", "harmful", "bad"), False),
}


def _table_labelled(row: Row, tags: Tags) -> LabelledConversation:
    """`safe: true | false`, or `label` in one of the usual words. Numbers mean one thing here and the other there."""
    if "label" in row.values:
        safe = _VERDICTS.get(row["label"]) if isinstance(row["label"], str) else None
        if safe is None:
            raise RecordError(f"label must be one of {', '.join(_VERDICTS)}, got {row['label']!r}")
    elif isinstance(row["safe"], bool):
        safe = row["safe"]
    else:
        raise RecordError(f"safe must be true or false, got {row['safe']!r}")
    return LabelledConversation(_table_conversation(row, tags), safe)


def _table_graded(row: Row, tags: Tags) -> Graded:
    return Graded(_table_conversation(row, tags), read_grade(row["grade"]))


_TABLE_PARSERS: dict[Shape, Callable[[Row, Tags], SourceRecord]] = {
    "preferences": _table_preference,
    "conversations": _table_conversation,
    "prompts": _table_prompt,
    "labelled": _table_labelled,
    "graded": _table_graded,
}


def _answer(value: object) -> Any:
    """Text, or the one assistant message of TRL's conversational formats."""
    if not isinstance(value, list):
        return value
    messages = parse_messages(cast("object", value))
    if len(messages) != 1 or messages[0].role != "assistant":
        raise RecordError("an answer given as messages must be exactly one assistant message")
    return messages[0].content
