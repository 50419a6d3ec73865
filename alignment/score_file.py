"""`sara score`: a file of conversations -> a file of scores, line by line, in any number, and resumable after a kill.

Beside `scores.jsonl` stands `scores.jsonl.state.json`, which says what it was made from. Until the last line is there
the scores are in `scores.jsonl.partial`, on disk after every chunk; the next call goes on at the first missing line.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from alignment.artifact import sha256, write_json
from alignment.inputs import InputError
from alignment.progress import Progress
from reward.conversation import Conversation, RecordError, Tags, parse_messages, read_json_lines
from reward.scorer import Scale, Score, Scorer, score_all

CHUNK_SIZE = 128
STATE, PARTIAL = ".state.json", ".partial"


@dataclass(frozen=True)
class ScoreRun:
    """What scores are made from: SHA-256 and number of lines of the input, fingerprint of the scorer."""

    input: str
    lines: int
    scorer: str


def score_file(
    load: Callable[[], Scorer], *, scorer: str, source: Path, output: Path, chunk_size: int = CHUNK_SIZE
) -> tuple[int, int]:
    """Score every line of `source` into `output`, `{"value": ..., "reason": ...}` a line; lines, and how many unscored.

    `load` makes the scorer, after every line has been checked; `scorer` is its fingerprint. Nothing is done again: a
    complete `output` of the same input and scorer stays, an interrupted one is gone on with. InputError when a line
    cannot be read, or when `output` holds anything else.
    """
    run = ScoreRun(*check_lines(source), scorer)
    state, partial = Path(f"{output}{STATE}"), Path(f"{output}{PARTIAL}")
    _refuse_other_scores(output, partial, state, run)
    if output.exists():
        return run.lines, _count_unscored(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("a+b") as file:
        _lock(file, partial)
        done = _keep_whole_lines(file)
        if done > run.lines:
            raise InputError(f"{partial} has {done} lines, {source} only {run.lines}; move it away")
        if done:
            print(f"{partial}: goes on behind line {done} of {run.lines}", flush=True)
        else:
            write_json(state, asdict(run))
        if done < run.lines:
            loaded = load()
            who = {"name": loaded.name, "scale": loaded.scale, "made_with": getattr(loaded, "provenance", {})}
            write_json(state, asdict(run) | who)
            _score_from(done, loaded, run, source, file, chunk_size)
        if sha256(source) != run.input:
            raise InputError(f"{source} has changed while it was scored; remove {partial} and score it again")
        partial.replace(output)
    return run.lines, _count_unscored(output)


@dataclass(frozen=True)
class ScoresFile:
    """A complete file of scores, in order, and who gave them. `made_with`: a judge's `provenance`; empty for others."""

    name: str
    scale: Scale
    made_with: Mapping[str, str]
    scores: Sequence[Score]


def read_scores(output: Path) -> ScoresFile:
    """What `score_file` left; InputError when that is not complete."""
    known = _read_state(Path(f"{output}{STATE}")) or {}
    if not output.is_file() or not {"name", "scale", "made_with"} <= known.keys():
        raise InputError(f"{output} is no complete file of scores with its {STATE}; remove both and score again")
    scores = [Score(row["value"], row["reason"]) for _, row in read_json_lines(output)]
    return ScoresFile(known["name"], known["scale"], known["made_with"], scores)


def check_lines(source: Path) -> tuple[str, int]:
    """SHA-256 and number of lines; InputError with file and line of the first that is no conversation."""
    if not source.is_file():
        raise InputError(f"{source} is no file; the conversations must stand in one, since they are read twice")
    lines = sum(1 for _ in read_conversations(source))
    return sha256(source), lines


def read_conversations(source: Path) -> Iterator[Conversation]:
    """One conversation a line, read as they are asked for; an answer may be empty, as models write that too.

    A line has `messages`, or `prompt` (messages or text) and `completion`; `tags` are read, other keys are not.
    """
    try:
        for number, row in read_json_lines(source, blank_lines=False):
            try:
                yield _conversation(row)
            except RecordError as error:
                raise RecordError(f"{source}:{number}: {error}") from error
    except RecordError as error:
        raise InputError(str(error)) from error


def _conversation(row: dict[str, Any]) -> Conversation:
    tags = Tags.from_json(row.get("tags"))
    if "messages" in row:
        if "completion" in row:
            raise RecordError("has both messages and completion; leave out one of them")
        return Conversation(parse_messages(row["messages"]), tags)
    if "prompt" not in row or "completion" not in row:
        raise RecordError(f"needs messages, or prompt and completion; the line has {sorted(row)}")
    completion = {"role": "assistant", "content": row["completion"]}
    return Conversation((*parse_messages(row["prompt"]), *parse_messages([completion])), tags)


# --------------------------------------------------------------------------------------------- what is there


def _refuse_other_scores(output: Path, partial: Path, state: Path, run: ScoreRun) -> None:
    """InputError when there are scores already, whole or not, that this run would not have made."""
    for path in (output, partial):
        if not path.exists() or (path == partial and path.stat().st_size == 0):
            continue
        known = _read_state(state)
        if known is None:
            raise InputError(f"{path} is there, but {state} does not say what it is; name another output")
        for word, expected in (("input", run.input), ("scorer", run.scorer)):
            if known.get(word) != expected:
                raise InputError(f"{path} was made with another {word}; name another output, or move it away")


def _read_state(state: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def _lock(file: BinaryIO, path: Path) -> None:
    """Keep a second process from writing the same scores; the lock ends with the process, however it ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"{path} is being written by another process") from error
    except OSError:
        pass  # a file system without locks


def _keep_whole_lines(file: BinaryIO) -> int:
    """Cut the file behind its last whole score; the number of scores that stay."""
    file.seek(0)
    count = end = 0
    for raw in file:
        if not _is_score(raw):
            break
        count, end = count + 1, end + len(raw)
    file.truncate(end)
    file.seek(end)
    return count


def _is_score(raw: bytes) -> bool:
    if not raw.endswith(b"\n"):
        return False
    try:
        row = json.loads(raw)
    except ValueError:
        return False
    return isinstance(row, dict) and set(row) == {"value", "reason"}


def _count_unscored(output: Path) -> int:
    return sum(row["value"] is None for _, row in read_json_lines(output))


# -------------------------------------------------------------------------------------------------- scoring


def _score_from(done: int, scorer: Scorer, run: ScoreRun, source: Path, file: BinaryIO, chunk_size: int) -> None:
    """Append the scores of the lines behind `done`. Chunks end where they would have ended without the interruption."""
    progress = Progress(f"{scorer.name}: lines", run.lines, start=done)
    remaining = itertools.islice(read_conversations(source), done, None)
    while chunk := list(itertools.islice(remaining, chunk_size - done % chunk_size)):
        file.write(_lines(score_all(scorer, chunk)))
        file.flush()
        os.fsync(file.fileno())
        done += len(chunk)
        progress(done)


def _lines(scores: Sequence[Score]) -> bytes:
    """JSON lines in UTF-8; half a character that a model wrote becomes its escape, as JSON has it."""
    rows = ({"value": score.value, "reason": score.reason} for score in scores)
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode(
        errors="backslashreplace"
    )
