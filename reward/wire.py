"""Scorers over HTTP: the format that `reward.server` and `reward.http` speak, and what both need to keep it.

    POST /score
    Content-Type: application/json
    Authorization: Bearer TOKEN                                  (where the server has a token)

    {"id": "4f1c", "conversations": [{"messages": [{"role": "user", "content": "Hi"},
                                                   {"role": "assistant", "content": "Hello!"}], "tags": {}}]}

    200, Content-Type: application/json
    {"id": "4f1c", "name": "my_model", "scale": "logit", "scores": [{"value": 1.25, "reason": null}]}

    GET /health
    {"name": "my_model", "scale": "logit"}

* A conversation is `Conversation.to_json()`; `tags` may be left out. Any server that keeps to this page is a scorer.
* There is one score per conversation, in their order. `value` is a finite number, in [0, 1] where the scale is
  `probability`, or null, and then `reason` says why the conversation is unscored (one line, at most 1000 characters).
  A combination adds `"branch"`, the name of the part that decided. Numbers survive the way bit by bit.
* `id` is a line of the client's and comes back as it was. `name` and `scale` do not change while a server runs.
* Anything but 200 carries `{"error": "one line"}`. 429, 502, 503 and 504 mean "later" (`Retry-After` says when).
* Keys that are not on this page, keys that stand twice, NaN and Infinity are errors, on both sides.
"""

from __future__ import annotations

import io
import ipaddress
import json
import math
import os
import re
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast, get_args
from urllib.parse import urlsplit

from reward.conversation import Conversation, RecordError, Tags, parse_messages
from reward.scorer import Scale, Score, ScorerError

SCALES: tuple[Scale, ...] = get_args(Scale)
CONTENT_TYPE = "application/json"
SCORE_PATH, HEALTH_PATH = "/score", "/health"
MAX_REASON = 1000
"""Characters of a reason."""
_MAX_NAME = 200
"""Characters of a name, a branch or an id."""
MIN_TOKEN = 16
"""Characters; shorter secrets of our own servers can be guessed. Those of others are theirs to choose."""


class WireError(ValueError):
    """A message that breaks the format; says in one line where and how."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a server says of its scorer."""

    name: str
    scale: Scale

    def __post_init__(self) -> None:
        _check_line(self.name, "name", limit=_MAX_NAME)
        if self.scale not in SCALES:
            raise WireError(f"scale must be one of {', '.join(SCALES)}, got {shorten(repr(self.scale))}")

    def __str__(self) -> str:
        return f"{self.name!r} (scale {self.scale})"


# ------------------------------------------------------------------------------------------------ messages


def encode_request(request_id: str, conversations: Sequence[Conversation]) -> bytes:
    return encode({"id": request_id, "conversations": [conversation.to_json() for conversation in conversations]})


def decode_request(body: bytes) -> tuple[str, list[Conversation]]:
    """Id and conversations of a request; an assistant's turn may be empty, since models do write that."""
    row = _members(parse_json(body), "the request", required=("id", "conversations"))
    request_id = _check_line(row["id"], "id", limit=_MAX_NAME)
    conversations: list[Conversation] = []
    for position, item in enumerate(_list(row["conversations"], "conversations")):
        where = f"conversations[{position}]"
        members = _members(item, where, required=("messages",), optional=("tags",))
        try:
            conversations.append(Conversation(parse_messages(members["messages"]), Tags.from_json(members.get("tags"))))
        except RecordError as error:
            raise WireError(f"{where}: {shorten(str(error))}") from error
    return request_id, conversations


def encode_answer(request_id: str, identity: Identity, scores: Sequence[Score]) -> bytes:
    rows: list[dict[str, Any]] = []
    for score in scores:
        value = None if score.value is None else float(score.value)
        rows.append({"value": value, "reason": None if score.reason is None else shorten(score.reason, MAX_REASON)})
        if score.branch is not None:
            rows[-1]["branch"] = shorten(score.branch, _MAX_NAME)
    return encode({"id": request_id, "name": identity.name, "scale": identity.scale, "scores": rows})


def decode_answer(body: bytes, *, request_id: str, count: int) -> tuple[Identity, list[Score]]:
    """The scorer behind an answer and its `count` scores; WireError for anything that is not exactly that."""
    row = _members(parse_json(body), "the answer", required=("id", "name", "scale", "scores"))
    if row["id"] != request_id:
        raise WireError(f"the answer is to another request: id {shorten(repr(row['id']))} instead of {request_id!r}")
    identity = Identity(row["name"], row["scale"])
    items = _list(row["scores"], "scores")
    if len(items) != count:
        raise WireError(f"{len(items)} scores for {count} conversations")
    return identity, [_score(item, f"scores[{position}]", identity.scale) for position, item in enumerate(items)]


def decode_health(body: bytes) -> Identity:
    row = _members(parse_json(body), "the answer", required=("name", "scale"))
    return Identity(row["name"], row["scale"])


def decode_error(body: bytes) -> str:
    """The line of an error, shortened; an empty text when there is none."""
    try:
        row = _members(parse_json(body), "the answer", required=("error",))
    except WireError:
        return ""
    return shorten(str(row["error"]))


def encode(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")


def shorten(text: str, limit: int = 300) -> str:
    """`text` as one printable line of at most `limit` characters."""
    line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def _score(item: object, where: str, scale: Scale) -> Score:
    members = _members(item, where, required=("value", "reason"), optional=("branch",))
    value, reason, branch = members["value"], members["reason"], members.get("branch")
    if reason is not None:
        _check_line(reason, f"{where}.reason", limit=MAX_REASON)
    if branch is not None:
        _check_line(branch, f"{where}.branch", limit=_MAX_NAME)
    if value is None:
        if reason is None:
            raise WireError(f"{where} has neither a value nor a reason")
        return Score(None, reason, branch)
    return Score(_number(value, f"{where}.value", scale), reason, branch)


def _number(value: object, where: str, scale: Scale) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise WireError(f"{where} must be a number or null, got {_kind(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise WireError(f"{where} is beyond the range of a double")
    if scale == "probability" and not 0 <= number <= 1:
        raise WireError(f"{where} is {number}, but a probability lies between 0 and 1")
    return number


def parse_json(body: bytes) -> object:
    """The one JSON value that `body` is; WireError when it is none, or holds a key twice, NaN or Infinity."""
    try:
        text = body.decode("utf-8")
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except WireError:
        raise
    except RecursionError as error:
        raise WireError("not JSON: nested too deeply") from error
    except ValueError as error:  # no UTF-8, no JSON, or an integer of thousands of digits
        raise WireError(f"not JSON: {shorten(str(error), 100)}") from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise WireError("a key stands twice in one object")
    return found


def _no_constant(word: str) -> NoReturn:
    raise WireError(f"{word} is not JSON; what cannot be scored is null with a reason")


def _members(value: object, where: str, *, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise WireError(f"{where} must be an object, got {_kind(value)}")
    members = cast(dict[str, Any], value)
    missing = [key for key in required if key not in members]
    if missing:
        raise WireError(f"{where} lacks the key {missing[0]!r}")
    unknown = [key for key in members if key not in {*required, *optional}]
    if unknown:
        raise WireError(f"{where} has the unknown key {shorten(repr(unknown[0]), 60)}")
    return members


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise WireError(f"{where} must be a list, got {_kind(value)}")
    return cast(list[Any], value)


def _check_line(value: object, where: str, *, limit: int) -> str:
    if not isinstance(value, str):
        raise WireError(f"{where} must be text, got {_kind(value)}")
    if not value.strip() or len(value) > limit or not value.isprintable():
        raise WireError(f"{where} must be one printable line of 1 to {limit} characters")
    return value


def _kind(value: object) -> str:
    """What JSON calls the value."""
    if isinstance(value, bool):
        return "a boolean"
    kinds = ((int | float, "a number"), (str, "text"), (list, "a list"), (dict, "an object"))
    return next((word for kind, word in kinds if isinstance(value, kind)), "null")


# ------------------------------------------------------------------------------------- addresses and tokens


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is; `path` stands before `/score`."""

    secure: bool
    host: str
    port: int
    path: str


def parse_url(url: str, *, with_token: bool) -> Address:
    """The address behind `url`; ValueError when it has parts that a server's address has not, or would leak a token."""
    try:
        parts = urlsplit(url)
        port = parts.port
        host = (parts.hostname or "").encode("idna").decode("ascii")
    except ValueError as error:  # UnicodeError is one
        raise ValueError("is no URL; expected http://host:port") from error
    if parts.scheme not in {"http", "https"} or not host or not re.fullmatch(r"[\x21-\x7e]*", parts.path):
        raise ValueError("is no URL of a server; expected http://host:port or https://host:port")
    if parts.username is not None or parts.password is not None:
        raise ValueError("holds a user name or a password; put a token into an environment variable and name it")
    if parts.query or parts.fragment:
        raise ValueError("has a query or a fragment, which the address of a server has not")
    secure = parts.scheme == "https"
    if with_token and not secure and not is_loopback(host):
        raise ValueError("would send the token in clear over the network; use https, or a tunnel to localhost")
    return Address(secure, host, port or (443 if secure else 80), parts.path.rstrip("/"))


def is_loopback(host: str) -> bool:
    """Whether `host` (a name or a number, IPv6 without brackets) is this machine alone; no name is looked up."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token(variable: str, *, shortest: int = MIN_TOKEN) -> str:
    """The token in an environment variable; ScorerError, which never shows it, when there is none that will do."""
    token = os.environ.get(variable, "")
    if not token:
        raise ScorerError(f"the environment variable {variable} is not set; it must hold the token")
    check_token(token, f"the token in {variable}", shortest=shortest)
    return token


def check_token(token: str, where: str, *, shortest: int = MIN_TOKEN) -> None:
    if len(token) < shortest or not re.fullmatch(r"[\x21-\x7e]+", token):
        raise ScorerError(f"{where} must be {shortest} or more ASCII letters, digits or signs, without spaces")


# ------------------------------------------------------------------------------------------------- reading


class DeadlineReader(io.RawIOBase):
    """A socket's bytes until `deadline` (of `time.monotonic`), then TimeoutError.

    A socket's own timeout starts anew with every byte, so a peer that sends one now and then would hold us for ever.
    """

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self.deadline = deadline
        self._connection = connection
        self._raw = connection.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        remaining = self.deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("the deadline has passed")
        self._connection.settimeout(remaining)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()
