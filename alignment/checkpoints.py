"""Folders of checkpoints that can be trusted: written aside, hashed file by file, renamed; checked before being read.

A checkpoint is `iteration-12` or `checkpoint-12`. Its `index.json` names every file with size and SHA-256, and is
written last. The work of hashing is shared out over the processes, so every function here is called by all of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

from alignment.artifact import ArtifactError, sha256, write_json
from alignment.distributed import barrier, from_all, is_main_process, process_index, world_size
from alignment.policy import remove_folder

CHECKPOINTS = "checkpoints"
"""Folder in that of a stage; it goes once the stage is complete."""
DAMAGED = "damaged"
"""Folder beside it; what lies there is never read nor removed by us."""
INDEX = "index.json"
_WHOLE = ".whole"
"""Ends the hidden name of a checkpoint that is whole and has still to get its own."""


class CheckpointError(ArtifactError):
    """A checkpoint that cannot be gone on from; the message says what to do."""


@contextlib.contextmanager
def write_checkpoint(
    folder: Path, name: str, *, keep: int | None, pinned: str | None = None, aside: Path | None = None
) -> Generator[Path]:
    """The folder to write a new checkpoint to. It gets its name at the end; then all but the newest `keep` go.

    The one called `pinned` stays, however old it is. `aside`: where the one moves to that has the name so far; a kill
    at any moment leaves that one or the new one to `newest_checkpoint`.
    """
    temporary = folder / f".{name}.tmp"
    if is_main_process():
        remove_folder(temporary)
        temporary.mkdir(parents=True)
    barrier()
    yield temporary
    seal(temporary)
    if is_main_process():
        whole = temporary.rename(folder / f".{name}{_WHOLE}")
        if aside is not None:
            set_aside(folder / name, aside)
        whole.rename(folder / name)
        others = [path for path in list_checkpoints(folder) if path.name != pinned]
        for old in [] if keep is None else others[:-keep]:
            gone = old.with_name(f".{old.name}.old")  # a kill amid the removal must not leave half a checkpoint
            old.rename(gone)
            remove_folder(gone)
    barrier()


def seal(checkpoint: Path) -> None:
    """Write the index, now that every process has written its files."""
    barrier()
    entries: dict[str, dict[str, Any]] = {}
    for name in _share(_files(checkpoint)):
        file = checkpoint / name
        with file.open("rb") as handle:
            os.fsync(handle.fileno())  # older checkpoints go when this one stands
        entries[name] = {"size": file.stat().st_size, "sha256": sha256(file)}
    whole = {name: entry for part in from_all(entries) for name, entry in part.items()}
    if is_main_process():
        write_json(checkpoint / INDEX, {"files": dict(sorted(whole.items()))})
    barrier()


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, as one line; None when every file is as it was written."""
    try:
        index = json.loads((checkpoint / INDEX).read_text(encoding="utf-8"))
        files = {str(name): (entry["size"], entry["sha256"]) for name, entry in index["files"].items()}
    except FileNotFoundError:
        mine = f"{INDEX} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        mine = f"{INDEX} cannot be read ({error})"
    else:
        found = (_damage_of(checkpoint / name, *files[name]) for name in _share(sorted(files)))
        mine = next((reason for reason in found if reason is not None), None)
    return next((reason for reason in from_all(mine) if reason is not None), None)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in a stage's `checkpoints` folder; None when it holds none at all.

    Damaged ones that are newer are named and set aside into `damaged`. When all are damaged nothing is moved, and
    CheckpointError says so, every time, until the user decides.
    """
    if is_main_process():
        for whole in folder.glob(f".*{_WHOLE}"):
            place = folder / whole.name.removeprefix(".").removesuffix(_WHOLE)
            if not place.exists():
                whole.rename(place)
        for leftover in folder.glob(".*"):  # of a save or a removal that was interrupted
            remove_folder(leftover)
    barrier()
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(list_checkpoints(folder)):
        reason = find_damage(checkpoint)
        if reason is None:
            if is_main_process():
                for path, why in damaged.items():
                    aside = set_aside(path, folder.parent / DAMAGED)
                    text = f"warning: the checkpoint {path} is damaged: {why}; moved to {aside}"
                    print(f"{text}, going on from {checkpoint.name}", file=sys.stderr, flush=True)
            barrier()
            return checkpoint
        damaged[checkpoint] = reason
    if damaged:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in damaged.items())
        raise CheckpointError(
            f"no checkpoint in {folder} is whole ({reasons}); put back a copy of one, or move {folder} away and run "
            "the same command to begin anew"
        )
    return None


def set_aside(checkpoint: Path, folder: Path) -> Path:
    """Move a checkpoint into a folder where nothing is overwritten and nobody looks; where it lies now."""
    folder.mkdir(exist_ok=True)
    number, aside = 0, folder / checkpoint.name
    while aside.exists():
        number += 1
        aside = folder / f"{checkpoint.name}.{number}"
    checkpoint.rename(aside)
    return aside


def list_checkpoints(folder: Path) -> list[Path]:
    """All that have a checkpoint's name, oldest first."""
    found = {path: re.fullmatch(r"(?:iteration|checkpoint)-(\d+)", path.name) for path in folder.glob("*-*")}
    numbers = {path: int(match[1]) for path, match in found.items() if match is not None}
    return sorted(numbers, key=lambda path: numbers[path])


def _damage_of(file: Path, size: int, digest: str) -> str | None:
    if not file.is_file():
        return f"{file.name} is missing"
    if file.stat().st_size != size:
        return f"{file.name} has {file.stat().st_size} bytes where {size} were written"
    try:
        return None if sha256(file) == digest else f"{file.name} is not what was written (SHA-256)"
    except OSError as error:
        return f"{file.name} cannot be read ({error})"


def _files(checkpoint: Path) -> list[str]:
    paths = (path for path in checkpoint.rglob("*") if path.is_file() and path != checkpoint / INDEX)
    return sorted(path.relative_to(checkpoint).as_posix() for path in paths)


def _share(names: list[str]) -> list[str]:
    return names[process_index() :: world_size()]
