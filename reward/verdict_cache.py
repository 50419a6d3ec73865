"""Verdicts on disk, so that nothing is judged twice: `VerdictCache`, and `CachedJudge` around any judge.

The file holds one JSON object a line and is only ever appended to, under a lock, so any number of processes may share
it. A line that was cut off by a kill is no line: whoever writes next takes its place.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast, get_args

from reward.conversation import Conversation
from reward.judge import Judge
from reward.scorer import Scale, Score, ScorerError
from reward.verdict import Outcome, Verdict

_KEY = "key"
_KINDS: dict[str, tuple[type, ...]] = {
    "outcome": (str,),
    "reason": (str, type(None)),
    "rationale": (str,),
    "probability": (float, int, type(None)),
    "truncated": (bool,),
    "guidelines": (str, type(None)),
}
"""The fields of a verdict that are kept. One that is `transient` is not."""


class VerdictCache:
    """Key -> verdict, in the file `path`, which is made when the first one is looked up.

    ScorerError, with the line, when a whole line is no verdict: then the file is not ours, or somebody changed it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, Verdict] = {}
        self._end = self._lines = 0
        """Where the lines that are known end, in bytes, and how many they are."""

    def look_up(self, keys: Sequence[str]) -> dict[str, Verdict]:
        """Those of `keys` that are known, from whatever process."""
        with self._locked() as file:
            self._read_on(file)
        return {key: self._known[key] for key in keys if key in self._known}

    def keep(self, verdicts: Mapping[str, Verdict]) -> None:
        """Append what is not known yet; on disk when it returns."""
        with self._locked() as file:
            self._read_on(file)
            fresh = {key: verdict for key, verdict in verdicts.items() if key not in self._known}
            data = "".join(_line(key, verdict) for key, verdict in fresh.items()).encode("ascii")
            file.truncate(self._end)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            self._known |= fresh
            self._end += len(data)
            self._lines += len(fresh)

    @contextmanager
    def _locked(self) -> Generator[BinaryIO]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX)
                yield file
        except OSError as error:
            raise ScorerError(f"the verdict cache {self.path} cannot be used: {error.strerror}") from error

    def _read_on(self, file: BinaryIO) -> None:
        """Take in the whole lines that were added since the last time."""
        if os.fstat(file.fileno()).st_size < self._end:  # somebody emptied it
            self._known.clear()
            self._end = self._lines = 0
        file.seek(self._end)
        whole, newline, _ = file.read().rpartition(b"\n")
        for raw in whole.split(b"\n") if newline else ():
            self._lines += 1
            try:
                key, verdict = _read_line(raw)
            except (ValueError, TypeError) as error:
                raise ScorerError(f"{self.path}:{self._lines}: no verdict ({error}); remove the line") from error
            self._known[key] = verdict
        self._end += len(whole) + len(newline)


def _line(key: str, verdict: Verdict) -> str:
    """ASCII: a model may write half a character, which UTF-8 does not have."""
    row = asdict(verdict)
    return json.dumps({_KEY: key, **{name: row[name] for name in _KINDS}}, allow_nan=False) + "\n"


def _read_line(raw: bytes) -> tuple[str, Verdict]:
    row = json.loads(raw)
    if not isinstance(row, dict) or set(cast(dict[str, Any], row)) != {_KEY, *_KINDS}:
        raise ValueError(f"expected an object of {_KEY}, {', '.join(_KINDS)}")
    values = cast(dict[str, Any], row)
    key = values.pop(_KEY)
    for name, kinds in _KINDS.items():
        if type(values[name]) not in kinds:
            raise ValueError(f"{name} is {type(values[name]).__name__}")
    probability = values["probability"]
    if not isinstance(key, str) or values["outcome"] not in get_args(Outcome):
        raise ValueError("unknown outcome")
    if probability is not None and not (math.isfinite(probability) and 0 <= probability <= 1):
        raise ValueError("probability beyond 0 and 1")
    return key, Verdict(**values)


@dataclass
class CachedJudge:
    """A judge that asks `inner` only what is not in the cache yet.

    `identity`: what stands for the model that judges (a hash of its files, or name and host), with its number format.
    `together`: how many conversations are judged before they are written down. `counts` holds how many verdicts there
    were so far, by outcome, how many were `truncated`, and how many came from the `cache`.
    """

    inner: Judge
    cache: VerdictCache
    identity: str
    together: int = 64
    counts: Counter[str] = field(default_factory=Counter[str], init=False)

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def scale(self) -> Scale:
        return self.inner.scale

    @property
    def provenance(self) -> dict[str, str]:
        """What the judge within is made with; nothing of one that does not tell."""
        return getattr(self.inner, "provenance", {})

    def score(self, conversations: Sequence[Conversation]) -> list[Score]:
        return [verdict.score for verdict in self.judge(conversations)]

    def question(self, conversation: Conversation) -> list[Any]:
        return self.inner.question(conversation)

    def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        """One verdict per conversation, in their order; the same conversation is asked about once."""
        keys = [self._key(conversation) for conversation in conversations]
        waiting = dict(zip(keys, conversations, strict=True))
        found: dict[str, Verdict] = {}
        asked = list(waiting)
        for start in range(0, len(asked), self.together):
            found |= self._judge_some({key: waiting[key] for key in asked[start : start + self.together]})
        verdicts = [found[key] for key in keys]
        self.counts.update(verdict.outcome for verdict in verdicts)
        self.counts.update("truncated" for verdict in verdicts if verdict.truncated)
        return verdicts

    def _judge_some(self, waiting: Mapping[str, Conversation]) -> dict[str, Verdict]:
        known = self.cache.look_up(list(waiting))
        self.counts["cache"] += len(known)
        unknown = [key for key in waiting if key not in known]
        if not unknown:
            return known
        verdicts = self.inner.judge([waiting[key] for key in unknown])
        if len(verdicts) != len(unknown):
            raise ScorerError(f"{self.name} gave {len(verdicts)} verdicts on {len(unknown)} conversations")
        fresh = dict(zip(unknown, verdicts, strict=True))
        self.cache.keep({key: verdict for key, verdict in fresh.items() if not verdict.transient})
        return known | fresh

    def _key(self, conversation: Conversation) -> str:
        """A whole SHA-256: texts of strangers must not be able to share one."""
        parts = [self.identity, type(self.inner).__name__, self.inner.question(conversation)]
        text = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode("ascii")).hexdigest()
