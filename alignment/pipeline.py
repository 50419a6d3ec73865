"""An ordered list of steps, each a recipe under its own launch line; complete steps are skipped."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignment.artifact import Artifact, ArtifactError, Kind, is_artifact, read_artifact
from alignment.inputs import check_inputs, input_fingerprints, models_of, product_of, sources_of
from alignment.recipe import PipelineRecipe, PpoRecipe, StageRecipe, Step
from alignment.recipe_file import RecipeError, dotted_keys, load_recipe, override_text, read_yaml
from alignment.recipe_fit import check_batches
from alignment.recipe_label import LabellingRecipe
from alignment.stopping import EXIT_STOPPED, StopRequest, stop_on_sigterm
from alignment.workspace import IN_PROGRESS, complete_artifact


@dataclass(frozen=True)
class PlannedStep:
    """A step, its checked recipe, the command that runs it and why it must run (None: it is complete)."""

    name: str
    recipe: StageRecipe
    command: list[str]
    reason: str | None


def plan(pipeline: PipelineRecipe) -> list[PlannedStep]:
    """Check every recipe and input before anything runs, and say which steps are complete."""
    planned: list[PlannedStep] = []
    products: dict[str, Kind] = {}
    to_run: set[str] = set()
    for step in pipeline.steps:
        overrides = _overrides(pipeline, step)
        recipe = load_recipe(Path(step.recipe), overrides)
        if recipe.output_dir in products:
            raise RecipeError(f"{step.recipe}: an earlier step writes to {recipe.output_dir} already")
        launch = step.launch or pipeline.launch
        if not Path(launch).is_file():
            raise RecipeError(f"step {step.name}: the launch file {launch} does not exist")
        check_inputs(recipe, planned=products)
        _check_batches(recipe, Path(launch))
        reason = _reason(recipe, to_run)
        if reason is not None:
            to_run.add(recipe.output_dir)
        products[recipe.output_dir] = product_of(recipe)
        planned.append(PlannedStep(step.name, recipe, _command(step.recipe, overrides, launch=launch), reason))
    return planned


def run_pipeline(pipeline: PipelineRecipe, *, dry_run: bool = False) -> int:
    """Run what is not complete, in order; the exit code of the first step that failed, else 0.

    SIGTERM is handed on to the running step; then, as after a step that exits with 75 itself, the code is 75.
    """
    steps = plan(pipeline)
    for number, step in enumerate(steps, start=1):
        state = "complete" if step.reason is None else f"will run: {step.reason}"
        print(f"[{number}/{len(steps)}] {step.name:<24} {step.recipe.stage:<20} {state}", flush=True)
        if dry_run:
            print(f"    {shlex.join(step.command)}", flush=True)
    if dry_run:
        return 0
    with stop_on_sigterm() as stop:
        for number, step in enumerate(steps, start=1):
            if complete_artifact(step.recipe) is not None:
                continue
            print(f"\n[{number}/{len(steps)}] {step.name}: {shlex.join(step.command)}", flush=True)
            started = time.monotonic()
            code = _run(step, log=Path(pipeline.run_dir) / "logs" / f"{step.name}.log", stop=stop)
            took = f"{time.monotonic() - started:.0f} s"
            if code == EXIT_STOPPED or stop.received:
                print(f"[{number}/{len(steps)}] {step.name} stopped after {took}; the same command goes on", flush=True)
                return EXIT_STOPPED
            if code != 0:
                print(f"[{number}/{len(steps)}] {step.name} failed after {took} with exit code {code}", flush=True)
                return code
            print(f"[{number}/{len(steps)}] {step.name} done in {took}", flush=True)
    return 0


def artifacts_of(run_dir: Path) -> dict[str, Artifact]:
    """The complete artifacts in a run folder by the names of their folders."""
    folders = sorted(path for path in run_dir.iterdir() if path.is_dir() and is_artifact(path))
    return {folder.name: read_artifact(folder) for folder in folders}


def _check_batches(recipe: StageRecipe, launch: Path) -> None:
    """Refuse batches of PPO that do not divide by as many processes as the launch file starts, where it says so."""
    processes = read_yaml(launch).get("num_processes") if isinstance(recipe, PpoRecipe) else None
    if isinstance(processes, int) and processes > 0:
        check_batches(recipe, processes=processes)


def _overrides(pipeline: PipelineRecipe, step: Step) -> list[str]:
    words = ["--run_dir", pipeline.run_dir]
    for key, value in {**dotted_keys(pipeline.overrides), **dotted_keys(step.overrides)}.items():
        words += [f"--{key}", override_text(value)]
    return words


def _command(recipe: str, overrides: Sequence[str], *, launch: str) -> list[str]:
    launcher = [sys.executable, "-m", "alignment.launch", "--config_file", launch]
    return [*launcher, "-m", "alignment", "--config", recipe, *overrides]


def _reason(recipe: StageRecipe, to_run: set[str]) -> str | None:
    """Why the step has to run; None when its artifact is complete and everything it reads is unchanged."""
    inputs = {model for _, model, _ in models_of(recipe)}
    inputs |= {source.path for _, source, _ in sources_of(recipe) if source.path is not None}
    inputs |= {recipe.agreement} if isinstance(recipe, LabellingRecipe) and recipe.agreement is not None else set()
    changing = sorted(inputs & to_run)
    if changing:
        return f"{changing[0]} will change"
    if complete_artifact(recipe) is not None:
        return None
    folder = Path(recipe.output_dir)
    if (folder / IN_PROGRESS).is_file():
        return "interrupted"
    try:
        artifact = read_artifact(folder)
    except ArtifactError:
        return "new"
    if artifact.recipe_hash != recipe.hash:
        return "the recipe has changed"
    changed = sorted(key for key, value in input_fingerprints(recipe).items() if artifact.parents.get(key) != value)
    return f"the input {changed[0]} has changed" if changed else "an input is gone"


def _run(step: PlannedStep, *, log: Path, stop: StopRequest) -> int:
    """Run the command; its output goes to the terminal as it comes, and to the log; SIGTERM goes to the command."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {"TOKENIZERS_PARALLELISM": "false", **os.environ}
    with (
        log.open("ab") as file,
        subprocess.Popen(step.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        assert process.stdout is not None
        stop.then = process.terminate
        if stop.received:  # before there was a process to hand it to
            process.terminate()
        while chunk := os.read(process.stdout.fileno(), 4096):
            file.write(chunk)
            file.flush()
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
        return process.wait()
