"""Work on many items in chunks that are written down one by one: shared by processes, and resumable after a kill.

A chunk's result depends on the items and the recipe's seed alone, so any number of processes gives the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from alignment.distributed import barrier, is_main_process, process_index, world_size
from alignment.policy import remove_folder
from reward.conversation import read_json_lines, write_json_lines

T = TypeVar("T")
Row = dict[str, Any]
CHUNKS = "chunks"


def work_in_chunks(
    items: Sequence[T],
    work: Callable[[int, Sequence[T]], list[Row]],
    *,
    folder: Path,
    chunk_size: int,
    name: str,
    again: Callable[[Row], bool] = lambda _: False,
) -> list[Row]:
    """`work(chunk number, items)` for every chunk, each process its share; all rows in order, on every process.

    `name` is what the progress calls the items. `work` returns one row per item. Chunks already on disk are not done
    again, but for those with a row of which `again` says that another try may give a better one.
    """
    files: list[Path] = []
    chunks = [items[start : start + chunk_size] for start in range(0, len(items), chunk_size)]
    for number, chunk in enumerate(chunks):
        file = folder / CHUNKS / name / f"{number:06d}.jsonl"
        files.append(file)
        if number % world_size() != process_index():
            continue
        if file.is_file() and not any(again(row) for _, row in read_json_lines(file)):
            continue
        rows = work(number, chunk)
        if len(rows) != len(chunk):
            raise RuntimeError(f"chunk {number} of {name}: {len(chunk)} items gave {len(rows)} rows")
        write_json_lines(file, rows)
        if is_main_process():
            print(f"{name}: {min((number + 1) * chunk_size, len(items))} of {len(items)}", flush=True)
    barrier()
    return [row for file in files for _, row in read_json_lines(file)]


def clear_chunks(folder: Path) -> None:
    """Remove the chunks once their rows stand in the artifact's own file."""
    barrier()
    if is_main_process():
        remove_folder(folder / CHUNKS)
