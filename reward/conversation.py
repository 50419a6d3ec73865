"""The records that travel between stages: messages, conversations, prompts and preferences.

All records are frozen and check themselves when made, so a bad row is refused where it enters, with a reason, and
never reaches a tokenizer. Each can be written as one JSON object (`to_json`) and read back (`from_json`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

Role = Literal["system", "user", "assistant"]
Rating = Literal["significantly_better", "better", "slightly_better", "negligibly_better"]
SafetyBin = Literal["safe_unsafe", "both_safe", "both_unsafe"]

ROLES: tuple[str, ...] = get_args(Role)
RATINGS: tuple[Rating, ...] = get_args(Rating)
"""The four preference strengths of Llama 2 (section 3.2.1), strongest first."""

RISK_CATEGORIES: tuple[str, ...] = ("illicit_criminal", "hateful_harmful", "unqualified_advice")
"""Llama 2, section 4.2.1: illicit and criminal activities; hateful and harmful activities; unqualified advice."""

ATTACK_VECTORS: tuple[str, ...] = (
    "psychological",
    "logic",
    "syntactic",
    "semantic",
    "perspective",
    "non_english",
    "other",
)
"""Llama 2, section 4.2.1: the ways in which a prompt tries to elicit bad behaviour."""


class RecordError(ValueError):
    """A record that cannot be used; the message names the field and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: who speaks and the text. Only an assistant's turn may be empty or odd, since models do write that."""

    role: Role
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise RecordError(f"role must be one of {', '.join(ROLES)}, got {self.role!r}")
        if not isinstance(self.content, str):
            raise RecordError(f"content of the {self.role} turn must be text, got {type(self.content).__name__}")
        if self.role != "assistant":
            _check_text(self.content, name=f"content of the {self.role} turn")
        _check_unicode(self.content, name=f"content of the {self.role} turn")

    def to_json(self) -> dict[str, str]:
        return {"role": self.role, "content": self.content}


def _check_unicode(text: str, *, name: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError(f"{name} holds a lone surrogate ({error.reason})") from error


def _check_text(text: str, *, name: str) -> None:
    if not text.strip():
        raise RecordError(f"{name} is empty")
    if "\x00" in text:
        raise RecordError(f"{name} holds a NUL character")


def _check_turns(messages: tuple[Message, ...], *, last: Role) -> None:
    """Turns must go [system,] user, assistant, user, ... and end with `last`."""
    if not messages:
        raise RecordError("there are no messages")
    turns = messages[1:] if messages[0].role == "system" else messages
    for position, message in enumerate(turns):
        expected = "user" if position % 2 == 0 else "assistant"
        if message.role != expected:
            raise RecordError(f"turn {position + 1} must be from the {expected}, got {message.role}")
    if not turns or turns[-1].role != last:
        raise RecordError(f"the last turn must be from the {last}")


def parse_messages(value: object) -> tuple[Message, ...]:
    """Read a list of `{"role", "content"}` objects, or plain text as one user turn."""
    if isinstance(value, str):
        return (Message("user", value),)
    if not isinstance(value, list):
        raise RecordError(f"messages must be a list of {{role, content}} objects or text, got {type(value).__name__}")
    messages: list[Message] = []
    for position, item in enumerate(value):
        if not isinstance(item, Mapping) or set(item) != {"role", "content"}:
            raise RecordError(f"message {position + 1} must have exactly the keys role and content")
        messages.append(Message(item["role"], item["content"]))
    return tuple(messages)


@dataclass(frozen=True, slots=True)
class Tags:
    """What is known about a prompt beside its text.

    `is_safety` is the paper's tag on prompts that may elicit unsafe answers (Llama 2, section 3.2.3); `borderline`
    marks benign prompts that look unsafe (section 4.2.3, false refusal), `kind` says why they do.
    """

    risk_category: str | None = None
    attack_vector: str | None = None
    is_safety: bool = False
    borderline: bool = False
    kind: str | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        for name in ("risk_category", "attack_vector", "kind", "source"):
            if not isinstance(getattr(self, name), str | None):
                raise RecordError(f"the tag {name} must be text or null, got {getattr(self, name)!r}")
            _check_unicode(getattr(self, name) or "", name=f"the tag {name}")
        for name in ("is_safety", "borderline"):
            if not isinstance(getattr(self, name), bool):
                raise RecordError(f"the tag {name} must be true or false, got {getattr(self, name)!r}")
        if self.attack_vector is not None and self.attack_vector not in ATTACK_VECTORS:
            raise RecordError(f"attack_vector must be one of {', '.join(ATTACK_VECTORS)}, got {self.attack_vector!r}")

    def to_json(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__slots__}
        return {name: value for name, value in values.items() if value is not None and value is not False}

    @classmethod
    def from_json(cls, value: Mapping[str, Any] | None) -> Tags:
        if value is None:
            return cls()
        if not isinstance(value, Mapping):
            raise RecordError(f"tags must be an object, got {type(value).__name__}")
        unknown = set(value) - set(cls.__slots__)
        if unknown:
            raise RecordError(f"unknown tags {sorted(unknown)}; known are {sorted(cls.__slots__)}")
        return cls(**value)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the assistant answers: `[system,] user, (assistant, user)*`."""

    messages: tuple[Message, ...]
    tags: Tags = field(default_factory=Tags)

    def __post_init__(self) -> None:
        _check_turns(self.messages, last="user")

    @classmethod
    def of(cls, text: str, **tags: Any) -> Prompt:
        """A single-turn prompt from its text."""
        return cls((Message("user", text),), Tags(**tags))

    @property
    def text(self) -> str:
        """The last user turn."""
        return self.messages[-1].content

    @property
    def id(self) -> str:
        """16 hexadecimal digits that depend on the messages alone; splits are kept apart by it."""
        return fingerprint([message.to_json() for message in self.messages])

    def answer(self, completion: str) -> Conversation:
        return Conversation((*self.messages, Message("assistant", completion)), self.tags)

    def with_preprompt(self, preprompt: str) -> Prompt:
        """The prompt with `preprompt` as its system turn (an existing system turn is kept behind it)."""
        first = self.messages[0]
        if first.role == "system":
            return Prompt((Message("system", f"{preprompt}\n\n{first.content}"), *self.messages[1:]), self.tags)
        return Prompt((Message("system", preprompt), *self.messages), self.tags)

    def to_json(self) -> dict[str, Any]:
        return {"prompt": [message.to_json() for message in self.messages], "tags": self.tags.to_json()}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Prompt:
        return cls(parse_messages(_require(row, "prompt")), Tags.from_json(row.get("tags")))


@dataclass(frozen=True, slots=True)
class Conversation:
    """A prompt and the assistant's last answer; what scorers score and what SFT learns from."""

    messages: tuple[Message, ...]
    tags: Tags = field(default_factory=Tags)

    def __post_init__(self) -> None:
        _check_turns(self.messages, last="assistant")

    @property
    def completion(self) -> str:
        return self.messages[-1].content

    @property
    def prompt(self) -> Prompt:
        return Prompt(self.messages[:-1], self.tags)

    def to_json(self) -> dict[str, Any]:
        return {"messages": [message.to_json() for message in self.messages], "tags": self.tags.to_json()}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Conversation:
        """Read a row of training data."""
        conversation = cls(parse_messages(_require(row, "messages")), Tags.from_json(row.get("tags")))
        conversation.check_written()
        return conversation

    def check_written(self) -> None:
        """Refuse what only a model would write: a turn that is empty or holds a NUL character."""
        for message in self.messages:
            _check_text(message.content, name=f"content of the {message.role} turn")


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one prompt, the better one first (Llama 2, section 3.2.1).

    `rating` says how much better; `chosen_safe` and `rejected_safe` are the safety labels that make the three bins
    (None where nobody labelled them). `label_source` names who gave the labels (None: the data set's own humans).
    """

    prompt: Prompt
    chosen: str
    rejected: str
    rating: Rating | None = None
    chosen_safe: bool | None = None
    rejected_safe: bool | None = None
    label_source: str | None = None

    def __post_init__(self) -> None:
        for name in ("chosen", "rejected"):
            try:
                message = Message("assistant", getattr(self, name))
            except RecordError as error:
                raise RecordError(f"{name}: {error}") from error
            _check_text(message.content, name=name)
        if self.chosen.strip() == self.rejected.strip():
            raise RecordError("chosen and rejected are identical")
        if self.rating is not None and self.rating not in RATINGS:
            raise RecordError(f"rating must be one of {', '.join(RATINGS)}, got {self.rating!r}")
        if not isinstance(self.label_source, str | None):
            raise RecordError(f"label_source must be text or null, got {self.label_source!r}")
        _check_unicode(self.label_source or "", name="label_source")
        for name in ("chosen_safe", "rejected_safe"):
            label = getattr(self, name)
            if label is not None and not isinstance(label, bool):
                raise RecordError(f"{name} must be true, false or null, got {label!r}")

    @property
    def safety_bin(self) -> SafetyBin | None:
        """The paper's three bins; None when a label is missing or the unsafe answer was chosen (excluded there)."""
        bins: dict[tuple[bool | None, bool | None], SafetyBin] = {
            (True, False): "safe_unsafe",
            (True, True): "both_safe",
            (False, False): "both_unsafe",
        }
        return bins.get((self.chosen_safe, self.rejected_safe))

    def to_json(self) -> dict[str, Any]:
        row = self.prompt.to_json() | {"chosen": self.chosen, "rejected": self.rejected}
        for name in ("rating", "chosen_safe", "rejected_safe", "label_source"):
            if getattr(self, name) is not None:
                row[name] = getattr(self, name)
        return row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Preference:
        return cls(
            Prompt.from_json(row),
            _require(row, "chosen"),
            _require(row, "rejected"),
            row.get("rating"),
            row.get("chosen_safe"),
            row.get("rejected_safe"),
            row.get("label_source"),
        )


MAX_GRADE = 4.0
"""The top of the scale on which people grade harm, which begins at 0."""


@dataclass(frozen=True, slots=True)
class Graded:
    """A conversation and how far a person found that the assistant did harm in it: 0 not at all, 4 fully.

    The scale is that of Anthropic's red-team attempts (Ganguli et al. 2022, arXiv 2209.07858).
    """

    conversation: Conversation
    grade: float

    def __post_init__(self) -> None:
        number = isinstance(self.grade, int | float) and not isinstance(self.grade, bool)
        if not number or not 0 <= self.grade <= MAX_GRADE:
            raise RecordError(f"grade must be a number from 0 to {MAX_GRADE:g}, got {self.grade!r}")

    @property
    def prompt(self) -> Prompt:
        return self.conversation.prompt

    def to_json(self) -> dict[str, Any]:
        return {**self.conversation.to_json(), "grade": self.grade}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Graded:
        return cls(Conversation.from_json(row), _require(row, "grade"))


Record = Prompt | Conversation | Preference


def _require(row: Mapping[str, Any], key: str) -> Any:
    if key not in row:
        raise RecordError(f"the key {key!r} is missing; the row has {sorted(row)}")
    return row[key]


def fingerprint(value: object) -> str:
    """16 hexadecimal digits of the SHA-256 of a JSON-able value, independent of key order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()[:16]


def read_json_lines(path: Path, *, blank_lines: bool = True) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield `(line number, object)`; RecordError names file and line of anything that is not one JSON object.

    Blank lines are passed over, or refused where line numbers must not shift (`blank_lines=False`).
    """
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                if not blank_lines:
                    raise RecordError(f"{path}:{number}: the line is blank")
                continue
            try:
                text = raw.rstrip(b"\r\n").decode("utf-8-sig" if number == 1 else "utf-8")
                row = json.loads(text, object_pairs_hook=_no_duplicates)
            except json.JSONDecodeError as error:  # its own line number counts within this one line
                raise RecordError(f"{path}:{number}: not a JSON object: {error.msg}: column {error.pos + 1}") from error
            except (ValueError, RecursionError) as error:
                raise RecordError(f"{path}:{number}: not a JSON object: {error}") from error
            if not isinstance(row, dict):
                raise RecordError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
            yield number, row


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        raise RecordError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return row


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write one JSON object a line, to a temporary name that is renamed when complete; returns the number of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    count = 0
    with temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return count
