"""Files -> rows: JSON lines, JSON, CSV and parquet, strictly read, with the file and line of every row.

A file that is broken as a file (bad JSON, a key that stands twice, rows of unequal width, not UTF-8) is refused with
`SourceError`, which names file and line. Text is kept exactly as it stands: nothing is stripped.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, BinaryIO, cast


class SourceError(ValueError):
    """A source that cannot be used; the message says which, where and what to do."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it stands in a file or on the hub."""

    values: Mapping[str, Any]
    file: str
    line: int

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def short_where(self) -> str:
        """Without the folder, which differs between machines."""
        return f"{PurePath(self.file).name}:{self.line}"

    def __getitem__(self, column: str) -> Any:
        if column not in self.values:
            raise SourceError(f"{self.where}: the column {column!r} is missing; the row has {sorted(self.values)}")
        return self.values[column]


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a .jsonl, .json, .csv or .parquet file, each of them also as .gz."""
    reader = _READERS.get(PurePath(path.name.removesuffix(".gz")).suffix)
    if reader is None:
        raise SourceError(f"{path} is none of {', '.join(sorted(_READERS))} (or one of these with .gz)")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from reader(cast("BinaryIO", file), str(path))
    except SourceError:
        raise
    except (OSError, EOFError, ValueError, RecursionError, zlib.error, csv.Error) as error:
        raise SourceError(f"{path} cannot be read: {error}") from error


def is_data_file(path: Path) -> bool:
    return path.is_file() and PurePath(path.name.removesuffix(".gz")).suffix in _READERS


def _read_json_lines(file: BinaryIO, name: str) -> Iterator[Row]:
    """One object a line; or, whatever the name says, an array of objects, as Anthropic's red-team attempts are."""
    begins_array = _ARRAY_OF_OBJECTS.match(file.read(_HEAD_BYTES))
    file.seek(0)
    if begins_array:
        yield from _read_json(file, name)
        return
    for line, raw in enumerate(file, start=1):
        if not raw.strip():
            continue
        try:
            text = raw.rstrip(b"\r\n").decode("utf-8-sig" if line == 1 else "utf-8")
            value = _DECODER.decode(text)
        except json.JSONDecodeError as error:  # its own line number counts within this one line
            raise SourceError(f"{name}:{line}: not a JSON object: {error.msg}: column {error.pos + 1}") from error
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{name}:{line}: not a JSON object: {error}") from error
        yield Row(_object(value, name, line), name, line)


def _read_json(file: BinaryIO, name: str) -> Iterator[Row]:
    """An array of objects, or `{"instructions": [text, ...], ...}` as Safety-Tuned-LLaMAs writes prompts."""
    text = file.read().decode("utf-8-sig")
    head = _ARRAY.match(text)
    if head is None:
        raise SourceError(f"{name}:1: expected a JSON array of objects (JSON lines belong in a .jsonl file)")
    texts_only = head[1] is not None
    if texts_only:
        _DECODER.decode(text)  # checks what stands behind the array, which is not read
    position, line, counted = head.end(), 1, 0
    more = not text.startswith("]", position)
    while more:
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{name}:{line}: not a JSON value: {error}") from error
        yield Row({"instruction": value} if texts_only else _object(value, name, line), name, line)
        position = _skip_space(text, position)
        more = text.startswith(",", position)
        if more:
            position = _skip_space(text, position + 1)
    if not texts_only and text[position:].strip() != "]":
        raise SourceError(f"{name}:{line}: the array does not end behind this row: {text[position : position + 20]!r}")


def _read_csv(file: BinaryIO, name: str) -> Iterator[Row]:
    reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), strict=True)
    header = next(reader, None)
    if header is None:
        return
    if len(set(header)) != len(header):
        raise SourceError(f"{name}:1: a column name stands twice in {header}")
    line = reader.line_num + 1
    try:
        for cells in reader:
            if cells and len(cells) != len(header):
                raise SourceError(f"{name}:{line}: {len(cells)} fields, but the header has {len(header)}")
            if cells:
                yield Row(dict(zip(header, cells, strict=True)), name, line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise SourceError(f"{name}:{line}: not a CSV row: {error}") from error


def _read_parquet(file: BinaryIO, name: str) -> Iterator[Row]:
    parquet: Any = importlib.import_module("pyarrow.parquet")  # late: it is heavy; untyped: it has no stubs
    line = 0
    for batch in parquet.ParquetFile(file).iter_batches():
        for values in batch.to_pylist():
            line += 1
            yield Row(values, name, line)


_READERS: dict[str, Callable[[BinaryIO, str], Iterator[Row]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _object(value: object, name: str, line: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SourceError(f"{name}:{line}: expected a JSON object, got {type(value).__name__}")
    return cast("dict[str, Any]", value)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_without_repeats, parse_constant=_no_constant)
_HEAD_BYTES = 1024
_ARRAY_OF_OBJECTS = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\r\n]*\[[ \t\r\n]*\{")
_ARRAY = re.compile(r'[ \t\r\n]*(\{[ \t\r\n]*"instructions"[ \t\r\n]*:[ \t\r\n]*)?\[[ \t\r\n]*')
_SPACE = re.compile(r"[ \t\r\n]*")


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position
