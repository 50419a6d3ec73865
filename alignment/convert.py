"""`sara convert-checkpoint`: a checkpoint of PPO for another number of processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from alignment.artifact import write_json
from alignment.checkpoints import CHECKPOINTS, INDEX, CheckpointError, newest_checkpoint, set_aside, write_checkpoint
from alignment.ppo_state import STATE, WHOLE


def convert_checkpoint(output_dir: Path, *, processes: int) -> Path:
    """Rewrite the newest whole checkpoint of a stage that was interrupted; the original moves to `converted`.

    Weights and optimizer are the same for any number of processes that hold all of them. Random numbers of further
    processes begin as those of the first; the loop seeds each iteration anyway. CheckpointError for shards of ZeRO.
    """
    if processes < 1:
        raise CheckpointError(f"--processes must be 1 or more, got {processes}")
    folder = output_dir / CHECKPOINTS
    newest = newest_checkpoint(folder)
    if newest is None:
        raise CheckpointError(f"{folder} holds no checkpoint; name the output_dir of a PPO stage that was interrupted")
    if not (newest / STATE).is_file():
        raise CheckpointError(f"{newest} is no checkpoint of PPO")
    state = json.loads((newest / STATE).read_text(encoding="utf-8"))
    if state["format"] != WHOLE:
        raise CheckpointError(f"{newest} holds shards of {state['format']}, which only its own layout can read")
    with write_checkpoint(folder, newest.name, keep=None) as target:
        for file in newest.iterdir():
            if file.name not in {INDEX, STATE} and not file.name.startswith("random-"):
                shutil.copyfile(file, target / file.name)
        for rank in range(processes):
            own = newest / f"random-{rank}.json"
            shutil.copyfile(own if own.is_file() else newest / "random-0.json", target / f"random-{rank}.json")
        write_json(target / STATE, state | {"world_size": processes})
        set_aside(newest, output_dir / "converted")
    return newest
