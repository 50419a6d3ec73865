"""`sara convert-checkpoint`: checkpoints of PPO for another number of processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from alignment.artifact import write_json
from alignment.checkpoints import (
    CHECKPOINTS,
    INDEX,
    CheckpointError,
    find_damage,
    list_checkpoints,
    newest_checkpoint,
    write_checkpoint,
)
from alignment.distributed import convert_engine
from alignment.ppo_state import STATE, UNIVERSAL, WHOLE


def convert_checkpoints(output_dir: Path, *, processes: int) -> list[Path]:
    """Rewrite the whole checkpoints of a stage that was interrupted; the originals move to `converted`.

    Where every process holds all weights they are the same for any number. Shards of ZeRO become DeepSpeed's universal
    form, which any number of processes and any of its stages reads. Random numbers of further processes begin as those
    of the first; the loop seeds each iteration anyway.
    """
    if processes < 1:
        raise CheckpointError(f"--processes must be 1 or more, got {processes}")
    folder = output_dir / CHECKPOINTS
    if newest_checkpoint(folder) is None:
        raise CheckpointError(f"{folder} holds no checkpoint; name the output_dir of a PPO stage that was interrupted")
    found = [checkpoint for checkpoint in list_checkpoints(folder) if find_damage(checkpoint) is None]
    for checkpoint in found:
        if not (checkpoint / STATE).is_file():
            raise CheckpointError(f"{checkpoint} is not of PPO; other stages start with any number of processes")
        with write_checkpoint(folder, checkpoint.name, keep=None, aside=output_dir / "converted") as target:
            _convert(checkpoint, target, processes=processes)
    return found


def _convert(checkpoint: Path, target: Path, *, processes: int) -> None:
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    layout = state["format"]
    if layout in {WHOLE, UNIVERSAL}:
        rewritten = shutil.ignore_patterns(INDEX, STATE, "random-*.json")
        shutil.copytree(checkpoint, target, ignore=rewritten, dirs_exist_ok=True)
    else:
        convert_engine(checkpoint, target)
    for rank in range(processes):
        own = checkpoint / f"random-{rank}.json"
        shutil.copyfile(own if own.is_file() else checkpoint / "random-0.json", target / f"random-{rank}.json")
    write_json(target / STATE, state | {"world_size": processes, "format": WHOLE if layout == WHOLE else UNIVERSAL})
