"""`sara convert-checkpoint` may be killed at any moment: what it leaves is gone on from, and nothing is lost."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from alignment import checkpoints, convert
from alignment.checkpoints import find_damage, newest_checkpoint, write_checkpoint
from alignment.convert import convert_checkpoints

if TYPE_CHECKING:
    from collections.abc import Sequence

ON_DISK: tuple[tuple[Any, str], ...] = (
    (Path, "mkdir"),
    (Path, "rename"),
    (shutil, "copytree"),
    (shutil, "copyfile"),
    (convert, "write_json"),
    (checkpoints, "write_json"),
    (checkpoints, "remove_folder"),
    (os, "fsync"),
)
"""All by which a conversion changes the disk, or waits for it."""


class Killed(BaseException):
    pass


def stage(output: Path, numbers: Sequence[int]) -> Path:
    """What a stage of one process left; the folder of its checkpoints."""
    folder = output / "checkpoints"
    for number in numbers:
        with write_checkpoint(folder, f"iteration-{number}", keep=None) as target:
            (target / "weights.safetensors").write_text(f"weights {number}")
            (target / "random-0.json").write_text("{}")
            (target / "state.json").write_text(json.dumps({"format": "whole", "world_size": 1, "loop": {}}))
    return folder


def kill_after(steps: int, patch: pytest.MonkeyPatch) -> None:
    """From then on nothing changes the disk any more."""
    left = iter(range(steps))

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(left, None) is None:
                raise Killed
            return function(*args, **kwargs)

        return call

    for owner, name in ON_DISK:
        patch.setattr(owner, name, counted(getattr(owner, name)))


def processes(checkpoint: Path) -> int:
    """How many a whole checkpoint is for."""
    assert find_damage(checkpoint) is None
    assert (checkpoint / "weights.safetensors").read_text() == f"weights {checkpoint.name.rpartition('-')[2]}"
    return json.loads((checkpoint / "state.json").read_text())["world_size"]


@pytest.mark.parametrize("numbers", [(3,), (3, 12)])
def test_a_conversion_that_is_killed_loses_nothing(
    numbers: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every single step: the stage finds its newest checkpoint, for one or for two processes; converting works."""
    found: list[int] = []
    for steps in itertools.count():
        output = tmp_path / str(steps)
        folder = stage(output, numbers)
        try:
            with monkeypatch.context() as patch:
                kill_after(steps, patch)
                convert_checkpoints(output, processes=2)
        except Killed:
            newest = newest_checkpoint(folder)
            assert newest == folder / f"iteration-{numbers[-1]}", f"killed after {steps} steps"
            found.append(processes(newest))
            convert_checkpoints(output, processes=2)
            left = {folder / f"iteration-{number}" for number in numbers}
            assert set(folder.iterdir()) == left
            assert {processes(checkpoint) for checkpoint in left} == {2}
            assert {processes(output / "converted" / checkpoint.name) for checkpoint in left} == {1}
        else:
            break
    assert found == sorted(found), "once it is converted it stays so"
    assert set(found) == {1, 2}
