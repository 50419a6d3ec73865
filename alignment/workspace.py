"""The folder of a running stage: new, to be resumed, or complete.

A stage that was interrupted left `in_progress.json` with the recipe and inputs it ran with; if these are unchanged it
goes on, else the old folder is moved aside (`sft` -> `sft.1`), so that nothing on disk is lost or overwritten.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.artifact import MANIFEST, Artifact, ArtifactError, Kind, read_artifact, write_artifact, write_json
from alignment.checkpoints import CHECKPOINTS
from alignment.distributed import barrier, is_main_process, layout
from alignment.inputs import input_fingerprints, scorers_of
from alignment.policy import remove_folder
from alignment.recipe import StageRecipe
from alignment.recipe_file import dump_recipe

IN_PROGRESS = "in_progress.json"


@dataclass(frozen=True)
class Workspace:
    """Where a stage writes. `inputs`: fingerprints of everything the recipe reads, as they were at the start."""

    recipe: StageRecipe
    path: Path
    inputs: Mapping[str, str]

    def finish(
        self,
        kind: Kind,
        *,
        data: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        files: tuple[str, ...] = (),
    ) -> Artifact:
        """Write the manifest (main process only): the folder is complete, and what it was made with goes."""
        artifact = write_artifact(
            self.path,
            kind=kind,
            stage=self.recipe.stage,
            recipe_hash=self.recipe.hash,
            parents=self.inputs,
            data=data,
            metrics=metrics,
            provenance={
                "seed": self.recipe.seed,
                "scorers": scorers_of(self.recipe),
                **layout(),
                "wandb_run_id": _read_text(self.path / "wandb_run_id"),
            },
            files=files,
        )
        remove_folder(self.path / CHECKPOINTS)
        (self.path / IN_PROGRESS).unlink(missing_ok=True)
        return artifact


def complete_artifact(recipe: StageRecipe) -> Artifact | None:
    """The artifact in the recipe's folder if this very recipe made it from the inputs as they are now, else None."""
    try:
        artifact = read_artifact(recipe.output_dir)
    except ArtifactError:
        return None
    same = artifact.recipe_hash == recipe.hash and dict(artifact.parents) == input_fingerprints(recipe)
    return artifact if same else None


def open_workspace(recipe: StageRecipe) -> Workspace:
    """Make or reopen the folder; every process calls it once the process group stands."""
    path = Path(recipe.output_dir)
    inputs = input_fingerprints(recipe)
    if is_main_process():
        state = {"recipe_hash": recipe.hash, "inputs": inputs}
        if path.exists() and _state(path) != state:
            _move_aside(path)
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / IN_PROGRESS, state)
        (path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    barrier()
    return Workspace(recipe, path, inputs)


def _state(path: Path) -> dict[str, Any] | None:
    """What the unfinished stage in `path` ran with; None when the folder is complete, foreign or unreadable."""
    if (path / MANIFEST).exists():
        return None
    try:
        return json.loads((path / IN_PROGRESS).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None


def _move_aside(path: Path) -> None:
    if path.is_dir() and not any(path.iterdir()):
        return
    number = 1
    while path.with_name(f"{path.name}.{number}").exists():
        number += 1
    aside = path.with_name(f"{path.name}.{number}")
    path.rename(aside)
    print(f"{path} holds the result of another recipe or of other inputs; moved to {aside}", flush=True)


def _read_text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None
