"""Reading tables: what is accepted, with the right line numbers, and what is refused, with file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from alignment.source_files import SourceError, read_rows


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


ACCEPTED = {
    "plain.jsonl": (b'{"a": "x"}\n{"a": "y"}\n', [(1, "x"), (2, "y")]),
    "no_newline_at_end.jsonl": (b'{"a": "x"}\n{"a": "y"}', [(1, "x"), (2, "y")]),
    "byte_order_mark.jsonl": (b'\xef\xbb\xbf{"a": "x"}\n', [(1, "x")]),
    "crlf_and_blank_lines.jsonl": (b'{"a": "x"}\r\n\r\n{"a": "y"}\r\n', [(1, "x"), (3, "y")]),
    "line_separator_in_text.jsonl": ('{"a": "x\u2028y"}\n{"a": "z"}\n'.encode(), [(1, "x\u2028y"), (2, "z")]),
    "escaped_nul_and_surrogate.jsonl": (b'{"a": "\\u0000"}\n{"a": "\\ud800"}\n', [(1, "\x00"), (2, "\ud800")]),
    "spaces_are_kept.jsonl": (b'{"a": "  x\\n\\n"}\n', [(1, "  x\n\n")]),
    "one_line.json": (b'[{"a": "x"}, {"a": "y"}]', [(1, "x"), (1, "y")]),
    "pretty.json": (b'\xef\xbb\xbf[\n  {\n    "a": "x"\n  },\r\n  {"a": "y"}\n]\n', [(2, "x"), (5, "y")]),
    "no_rows.json": (b"[ ]", []),
    "quoted_line_break.csv": (b'a,b\r\n"x\nx",1\r\n\r\ny,2\r\n', [(2, "x\nx"), (5, "y")]),
    "empty.csv": (b"", []),
    "empty.jsonl": (b"", []),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_rows_and_their_lines(tmp_path: Path, name: str) -> None:
    content, expected = ACCEPTED[name]
    assert [(row.line, row["a"]) for row in read_rows(write(tmp_path / name, content))] == expected


def test_gzip_reads_as_the_plain_file(tmp_path: Path) -> None:
    content, expected = ACCEPTED["plain.jsonl"]
    rows = list(read_rows(write(tmp_path / "rows.jsonl.gz", gzip.compress(content))))
    assert [(row.line, row["a"]) for row in rows] == expected
    assert rows[1].where == f"{tmp_path}/rows.jsonl.gz:2"
    assert rows[1].short_where == "rows.jsonl.gz:2"


def test_instructions_file_of_safety_tuned_llamas(tmp_path: Path) -> None:
    path = write(tmp_path / "set.json", '{\n "instructions": [\n  "first",\n  "second"\n ],\n "tags": ["x"]\n}\n')
    assert [(row.line, row["instruction"]) for row in read_rows(path)] == [(3, "first"), (4, "second")]


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"a": "x", "n": {"b": [1, 2]}}, {"a": None, "n": None}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    read = list(read_rows(tmp_path / "rows.parquet"))
    assert [dict(row.values) for row in read] == rows
    assert [row.line for row in read] == [1, 2]


def test_a_very_long_line(tmp_path: Path) -> None:
    text = "x" * 10_000_000
    (row,) = read_rows(write(tmp_path / "long.jsonl", json.dumps({"a": text})))
    assert row["a"] == text


REFUSED = {
    "bad_json.jsonl": (b'{"a": 1}\n{"a": \n', ":2: not a JSON object: Expecting value: column 7"),
    "two_objects_on_a_line.jsonl": (b'{"a": 1} {"a": 2}\n', ":1: not a JSON object"),
    "repeated_key.jsonl": (b'{"a": 1}\n{"b": 1, "b": 2}\n', ":2: not a JSON object: the key 'b' stands twice"),
    "nan.jsonl": (b'{"a": NaN}\n', ":1: not a JSON object: NaN is not JSON"),
    "raw_nul.jsonl": (b'{"a": "x\x00y"}\n', ":1: not a JSON object"),
    "list.jsonl": (b'{"a": 1}\n\n[1]\n', ":3: expected a JSON object, got list"),
    "not_utf8.jsonl": (b'{"a": "x"}\n{"a": "\xff"}\n', ":2: not a JSON object"),
    "utf8_surrogate.jsonl": (b'{"a": "\xed\xa0\x80"}\n', ":1: not a JSON object"),
    "mark_in_the_middle.jsonl": (b'{"a": 1}\n\xef\xbb\xbf{"a": 1}\n', ":2: not a JSON object"),
    "too_deep.jsonl": (b"[" * 100_000 + b"\n", ":1: not a JSON object"),
    "lines.json": (b'{"a": 1}\n{"a": 2}\n', ":1: expected a JSON array"),
    "object.json": (b'{"data": [{"a": 1}]}', ":1: expected a JSON array"),
    "empty.json": (b"", ":1: expected a JSON array"),
    "numbers.json": (b'[\n{"a": 1},\n7]', ":3: expected a JSON object, got int"),
    "repeated_key.json": (b'[\n{"a": 1},\n{"b": 1, "b": 2}]', ":3: not a JSON value: the key 'b' stands twice"),
    "no_comma.json": (b'[\n{"a": 1}\n{"a": 2}]', ":2: the array does not end behind this row"),
    "comma_at_end.json": (b'[\n{"a": 1},\n]', ":3: not a JSON value"),
    "cut_off.json": (b'[\n{"a": 1},\n{"a"', ":3: not a JSON value"),
    "unclosed.json": (b'[\n{"a": 1}', ":2: the array does not end behind this row"),
    "instructions_cut_off.json": (b'{"instructions": ["x"', " cannot be read: "),
    "text_behind.json": (b'[{"a": 1}]\n[]', ":1: the array does not end behind this row"),
    "wide.csv": (b'a,b\n"x\ny",1\n1,2,3\n', ":4: 3 fields, but the header has 2"),
    "narrow.csv": (b"a,b\n1\n", ":2: 1 fields, but the header has 2"),
    "repeated_column.csv": (b"a,a\n1,2\n", ":1: a column name stands twice"),
    "open_quote.csv": (b'a\n"x\n', ":2: not a CSV row: unexpected end of data"),
    "garbage.parquet": (b"PAR1 but not really", " cannot be read: "),
    "garbage.jsonl.gz": (b"not gzip", " cannot be read: "),
    "cut_off.jsonl.gz": (gzip.compress(b'{"a": 1}\n' * 100)[:-12], " cannot be read: "),
    "rows.txt": (b"x", " is none of .csv, .json, .jsonl, .parquet"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_broken_file_is_refused_with_its_place(tmp_path: Path, name: str) -> None:
    content, message = REFUSED[name]
    path = write(tmp_path / name, content)
    with pytest.raises(SourceError) as caught:
        list(read_rows(path))
    assert str(caught.value).startswith(f"{path}{message}")


def test_a_missing_column_is_refused_with_its_place(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '{"a": 1}\n{"b": 1}\n')
    with pytest.raises(SourceError, match=r"rows\.jsonl:2: the column 'a' is missing; the row has \['b'\]"):
        [row["a"] for row in read_rows(path)]
