"""What a source of a recipe can give, where it is read from, and its splits.

Where a source is read from, in this order: `path` of the recipe (a local file or folder, else a hub id), the data set's
folder below SARA_DATA_DIR when that variable is set and the folder exists, the hub.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, cast

from alignment.artifact import Artifact, ArtifactError, Kind, read_artifact, sha256
from alignment.recipe import Source
from alignment.source_files import Row, SourceError, is_data_file, read_rows
from alignment.source_formats import Parser, Shape, check_columns, column_parser, prompt_of
from alignment.source_sets import SOURCES, TABLE_SHAPES, SourceInfo
from reward.conversation import Conversation, Graded

DATA_DIR = "SARA_DATA_DIR"
RECORDS = "records.jsonl"
"""The file of an artifact that holds conversations, preferences or prompts."""


def check_source(source: Source) -> None:
    """Refuse a source that cannot be read: unknown name or columns, missing path, a split it does not have."""
    info = source_info(source.name)
    is_table = source.name in ("file", "hub")
    if source.columns is not None and not is_table:
        raise SourceError(f"{source.name} has columns of its own; leave out `columns`, or use name: file or hub")
    if source.columns is not None:
        check_columns(source.columns, TABLE_SHAPES)
    if source.path is None and (is_table or source.name == "artifact"):
        raise SourceError(f"{source.name} needs `path`")
    if info.whole and source.split not in info.whole:
        raise SourceError(
            f"{source.name} has no split {source.split!r}: its rows are one set, read as split: {info.whole[0]}"
        )
    _place(source)


def split_column(source: Source) -> str | None:
    """The column that names the split of each row, if there is one."""
    return (source.columns or {}).get("split", source_info(source.name).split_column)


def source_files(source: Source) -> tuple[Path, ...]:
    """The local files that a source reads; none for a source on the hub."""
    return _place(source).files


def parser_of(source: Source, shape: Shape) -> Parser:
    """The parser of a source for a shape; every fault that can be found without reading its rows is found here."""
    check_source(source)
    info = source_info(source.name)
    if source.grade is not None:
        return _graded_parser(source, source.grade, shape)
    if source.name == "artifact":
        return _artifact_parser(source, shape)
    if shape == "graded" and shape not in info.shapes:
        raise SourceError(f"{source.name} brings no grades; give each of its conversations one by `grade`")
    if shape not in info.shapes:
        able = sorted(name for name, other in SOURCES.items() if shape in other.shapes)
        raise SourceError(
            f"{source.name} gives no {shape}, but {', '.join(sorted(info.shapes))}; {shape}: {', '.join(able)}"
        )
    return column_parser(shape, source.columns) if source.columns is not None else info.shapes[shape]


def _graded_parser(source: Source, grade: float, shape: Shape) -> Parser:
    """One grade for every conversation of a source that brings none."""
    has_grades = "graded" in source_info(source.name).shapes and source.name not in ("file", "hub")
    if has_grades:
        raise SourceError(f"{source.name} brings grades of its own; leave out `grade`")
    if shape != "graded":
        raise SourceError(f"{source.name}: `grade` is for graded conversations, but {shape} are needed here")
    parse = parser_of(source.model_copy(update={"grade": None}), "conversations")
    return lambda row: Graded(cast("Conversation", parse(row)), grade)


def rows_needed(source: Source, shape: Shape) -> Shape:
    """What the rows of a source must give for `shape`: conversations, where the recipe grades them."""
    return "conversations" if source.grade is not None and shape == "graded" else shape


def _artifact_parser(source: Source, shape: Shape) -> Parser:
    """The shape must be the artifact's kind, or prompts, which conversations and preferences hold as well."""
    artifact = _artifact(source)
    kind = check_shape(str(artifact.path), artifact.kind, shape)
    parse = column_parser(kind, None)
    return parse if shape == kind else lambda row: prompt_of(parse(row))


def check_shape(path: str, kind: Kind, shape: Shape) -> Shape:
    """The shape of an artifact's own rows; SourceError when they cannot give `shape`."""
    own: dict[str, Shape] = {name: name for name in TABLE_SHAPES[:3]}
    if kind not in own or shape not in (kind, "prompts"):
        raise SourceError(f"the artifact {path} holds {kind}, but {shape} are needed here")
    return own[kind]


# ------------------------------------------------------------------------------------- where sources are read from


@dataclass(frozen=True, slots=True)
class _Place:
    files: tuple[Path, ...] = ()
    hub: str | None = None


_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FILE_SPLIT = re.compile(r"(train|test|validation|valid|dev|eval)(?=[-_.])")


def source_info(name: str) -> SourceInfo:
    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise SourceError(f"there is no source {name!r}; {hint}The sources are {', '.join(SOURCES)}")
    return SOURCES[name]


def _place(source: Source) -> _Place:
    """SourceError when there is none, or when a revision is asked of what is not on the hub."""
    place = _find(source)
    if source.revision is not None and place.hub is None:
        raise SourceError(
            f"{source.name} is read from {place.files[0].parent}, which has no revision {source.revision!r}; "
            f"leave `revision` out, or read it from the hub, without `path` and {DATA_DIR}"
        )
    return place


def _find(source: Source) -> _Place:
    info = source_info(source.name)
    if source.name == "artifact":
        return _Place((_artifact(source).path / RECORDS,))
    if source.name == "hub" and source.path is not None:
        return _Place(hub=source.path)
    if source.path is not None:
        path = Path(source.path).expanduser()
        if path.exists():
            return _Place(_data_files(path, source.name, info.pattern))
        if info.hub is not None and _HUB_ID.fullmatch(source.path):
            return _Place(hub=source.path)
        raise SourceError(f"{source.name}: {path} does not exist; `path` must be {_path_means(info)}")
    if info.package_file is not None:
        path = Path(str(resources.files("alignment"))) / info.package_file
        return _Place(_data_files(path, source.name, info.pattern))
    root = os.environ.get(DATA_DIR)
    if root and info.folder is not None and (Path(root) / info.folder).is_dir():
        return _Place(_data_files(Path(root) / info.folder, source.name, info.pattern))
    if info.hub is None:
        raise SourceError(
            f"{source.name} is not on the hub; get it from {info.origin} and give its file or folder as `path`, "
            f"or as {info.folder} below the folder in {DATA_DIR}"
        )
    return _Place(hub=info.hub)


def _path_means(info: SourceInfo) -> str:
    return "a file or a folder" + (", or a hub id (owner/name)" if info.hub is not None else "")


def _data_files(path: Path, name: str, pattern: str) -> tuple[Path, ...]:
    if path.is_dir():
        files = tuple(sorted(file for file in path.glob(pattern) if is_data_file(file)))
        if not files:
            raise SourceError(f"{name}: the folder {path} holds no data file {pattern}; give the file itself as `path`")
        return files
    if not path.is_file():
        raise SourceError(f"{name}: {path} does not exist; the installation lacks a file of this package")
    return (path,)


def _artifact(source: Source) -> Artifact:
    try:
        artifact = read_artifact(source.path or "")
    except ArtifactError as error:
        raise SourceError(str(error)) from error
    if not (artifact.path / RECORDS).is_file():
        raise SourceError(f"the artifact {artifact.path} has no {RECORDS}: its kind is {artifact.kind}")
    return artifact


def _check_unchanged(artifact: Artifact, digest: str) -> None:
    expected = artifact.provenance.get("files", {}).get(RECORDS)
    if expected is not None and digest != expected:
        raise SourceError(f"{artifact.path / RECORDS} has changed since the stage wrote it; run the stage again")


def rows_of(source: Source, hashes: dict[str, str]) -> tuple[Iterator[Row], bool]:
    """Rows of the split that a source asks for, and whether they are still to be split by `split_side`.

    `hashes` receives the SHA-256 of each file, or of the rows of a hub data set once they have been read.
    """
    info, place = source_info(source.name), _place(source)
    splits = _local_splits(place.files) if place.hub is None else _hub_splits(place.hub, source, hashes)
    for file in place.files:
        hashes[file.name] = sha256(file)
    if source.name == "artifact":
        _check_unchanged(_artifact(source), hashes[RECORDS])
    everything = itertools.chain.from_iterable(splits.values())
    wanted = info.hub_splits.get(source.split, source.split)
    if source.split == "all" or info.whole or split_column(source) is not None:
        return everything, False
    if set(splits) <= {"", "train"} and source.split in ("train", "test"):
        return everything, True
    if wanted not in splits and source.split not in splits:
        known = ", ".join(sorted({"all", *splits} - {""}))
        raise SourceError(f"{source.name} has no split {source.split!r}; it has {known}")
    return splits[wanted if wanted in splits else source.split], False


def _local_splits(files: Sequence[Path]) -> dict[str, Iterator[Row]]:
    """Files by the split that their names begin with (`train-00000-of-00002.parquet`); "" for other names."""
    paths: dict[str, list[Path]] = {}
    for file in files:
        match = _FILE_SPLIT.match(file.name)
        paths.setdefault(match[1] if match else "", []).append(file)
    if "" in paths and len(paths) > 1:
        raise SourceError(
            f"{files[0].parent} mixes files named after splits with others ({paths[''][0].name}); "
            "give one file as `path`"
        )
    return {split: itertools.chain.from_iterable(map(read_rows, group)) for split, group in paths.items()}


def _hub_splits(hub: str, source: Source, hashes: dict[str, str]) -> dict[str, Iterator[Row]]:
    info = source_info(source.name)
    datasets: Any = importlib.import_module("datasets")  # late: it is heavy; untyped: its types are incomplete
    try:
        loaded = datasets.load_dataset(
            hub, data_dir=info.data_dir if hub == info.hub else None, revision=source.revision
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise SourceError(
            f"{hub} is no local file or folder, and the hub does not give it ({error}); go online, or give a copy "
            + (f"as `path`, or as {info.folder} below {DATA_DIR}" if info.folder else "with name: file and its `path`")
        ) from error
    return {str(split): _hub_rows(f"{hub}[{split}]", table, hashes) for split, table in loaded.items()}


def _hub_rows(name: str, table: Iterable[dict[str, Any]], hashes: dict[str, str]) -> Iterator[Row]:
    digest = hashlib.sha256()
    for line, values in enumerate(table, start=1):
        digest.update(json.dumps(values, sort_keys=True, default=str).encode())
        yield Row(values, name, line)
    hashes[name] = digest.hexdigest()
