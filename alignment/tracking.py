"""`Tracker`: what a stage writes down while it runs. `metrics.jsonl` and `samples.jsonl` always, W&B when asked for.

The local files are the record: they are cut to the checkpoint on resume and hold every value exactly. W&B is a copy
of them that leaves the machine, so settings, configuration and text pass `redact` on the way, and neither the command
line nor the host name nor code is stored. Where W&B writes is said by its own environment variables (WANDB_MODE:
online, offline or disabled).
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from reward.conversation import read_json_lines, write_json_lines

if TYPE_CHECKING:
    from types import TracebackType

    from transformers import TrainerCallback

    from alignment.artifact import Artifact
    from alignment.recipe import StageRecipe

Cell = str | int | float | None

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
ALARMS = "alarms.jsonl"
RUN_ID = "wandb_run_id"
REDACTED = "[redacted]"

_METRIC_COLUMNS = ("step", "time_seconds", "global_step")
_TABLE_COLUMNS = ("step", "table")
_MAX_ALERT_TITLE = 63  # W&B refuses 64 characters and more
_log = logging.getLogger(__name__)


class TrackingError(RuntimeError):
    """A tracker that cannot do what the recipe asks of it."""


# ---------------------------------------------------------------------------------------------- redaction

_SECRET_VARIABLE = re.compile("KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
_MIN_SECRET_LENGTH = 8  # shorter values ("true", "1") would be found in ordinary words

_SECRET_SHAPES = (
    (re.compile(r"(?<=://)[^\s/?#\"<>]*@"), rf"{REDACTED}@"),  # user-info: all of the authority before its last @
    (re.compile(r"(?<![A-Za-z0-9])(?:hf_|sk-|wandb_v\d+_)[\w-]{16,}"), REDACTED),
    (re.compile(r"(wandb.{0,64}?)\b[0-9a-f]{40}\b", re.IGNORECASE | re.DOTALL), rf"\1{REDACTED}"),
    (re.compile(r"((?:key|token|secret|password)=)[^\s&\"']{8,}", re.IGNORECASE), rf"\1{REDACTED}"),
)
"""40 hexadecimal digits alone stay, since git revisions are that too; behind the word `wandb` they are a key."""


def redact(value: object) -> Any:
    """A copy of a JSON-like value in which secrets inside any text, keys included, read `[redacted]`.

    Secrets are the values (8 characters and more) of environment variables whose name contains KEY, TOKEN, SECRET or
    PASSWORD, the user-info of URLs, `key=...` assignments, and what looks like a key of the Hub, W&B or OpenAI.
    """
    known = {text.strip() for name, text in os.environ.items() if _SECRET_VARIABLE.search(name)}
    longest_first = sorted((text for text in known if len(text) >= _MIN_SECRET_LENGTH), key=len, reverse=True)
    exact = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
    return _redact(value, exact)


def _redact(value: object, exact: re.Pattern[str] | None) -> Any:
    if isinstance(value, str):
        text = exact.sub(REDACTED, value) if exact else value
        for shape, replacement in _SECRET_SHAPES:
            text = shape.sub(replacement, text)
        return text
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value).items()
        return {_redact(key, exact): _redact(item, exact) for key, item in items}
    if isinstance(value, (list, tuple)):
        return [_redact(item, exact) for item in cast("Sequence[object]", value)]
    return value


# ------------------------------------------------------------------------------------------------ tracker


class Tracker:
    """Where a stage logs to; `open_tracker` makes it. Without local files it does nothing (all but one process)."""

    def __init__(self, stage: str, *, local: _LocalFiles | None = None, wandb_run: _WandbRun | None = None) -> None:
        self.stage = stage
        self._local = local
        self._wandb = wandb_run

    @property
    def wandb_run_id(self) -> str | None:
        """For the manifest; None without W&B."""
        return None if self._wandb is None else self._wandb.id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the numbers of one step; ValueError names the first metric that is not a finite number."""
        if self._local is None:
            return
        numbers = _finite_numbers(metrics, step=step)
        self._local.log(step, numbers)
        if self._wandb is not None:
            self._wandb.log(step, numbers)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, step: int) -> None:
        """Write a sample table, for example prompts, completions and scores (None: unscored)."""
        if self._local is None:
            return
        _check_table(name, columns, rows)
        clean_rows: list[list[Cell]] = redact(rows)
        self._local.table(name, columns, clean_rows, step=step)
        if self._wandb is not None:
            self._wandb.table(name, columns, clean_rows, step=step)

    def artifact(self, artifact: Artifact) -> None:
        """Tell W&B of a finished artifact: its manifest and lineage, never its files."""
        if self._wandb is not None:
            self._wandb.artifact(artifact)

    def alert(self, title: str, text: str) -> None:
        """Warn whoever watches: on the log of this process, and through W&B."""
        if self._local is None:
            return
        clean_title, clean_text = redact(title), redact(text)
        _log.warning("%s: %s", clean_title, clean_text)
        if self._wandb is not None:
            self._wandb.alert(clean_title, clean_text)

    def alarm(self, step: int, name: str, *, action: str, title: str, reason: str) -> None:
        """An alert that also stands in `alarms.jsonl`, and in the report of the run."""
        if self._local is not None:
            self._local.alarm(step, redact({"alarm": name, "action": action, "reason": reason}))
        self.alert(title, reason)

    def resume_at(self, step: int) -> None:
        """Forget local lines of `step` and later, which will be logged again; a stage that starts anew gives 0.

        W&B cannot take back what it has; there, repeated steps show as repeated points on the axis `global_step`.
        """
        if self._local is not None:
            self._local.resume_at(step)

    def finish(self, *, exit_code: int = 0) -> None:
        """Close the W&B run; anything but 0 marks it as failed. Calling it again does nothing."""
        if self._wandb is not None:
            self._wandb.finish(exit_code)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish(exit_code=0 if error is None else 1)


def open_tracker(
    recipe: StageRecipe, output_dir: Path, *, parents: Mapping[str, str], is_main_process: bool = True
) -> Tracker:
    """The tracker of a stage. `parents`: names of the inputs -> fingerprints of their manifests.

    TrackingError when the recipe asks for W&B and the package is not there.
    """
    if not is_main_process:
        return Tracker(recipe.stage)
    output_dir.mkdir(parents=True, exist_ok=True)
    wandb_run = _WandbRun(recipe, output_dir, parents) if recipe.report_to == "wandb" else None
    return Tracker(recipe.stage, local=_LocalFiles(output_dir), wandb_run=wandb_run)


def trainer_callback(tracker: Tracker) -> TrainerCallback:
    """A callback that logs what a transformers or TRL Trainer logs, as `<stage>/<name>`.

    It also cuts the local history to the checkpoint from which the Trainer goes on. A Trainer logs a step before it
    saves it, so the step of the checkpoint itself stays. Set `logging_nan_inf_filter=False` in its arguments: by
    default it puts the average of earlier losses in the place of one that is not finite, and nobody can refuse it.
    """
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

    class TrackerCallback(TrainerCallback):
        def on_train_begin(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
        ) -> None:
            tracker.resume_at(state.global_step + 1)

        def on_log(
            self,
            args: TrainingArguments,
            state: TrainerState,
            control: TrainerControl,
            logs: Mapping[str, object] | None = None,
            **kwargs: Any,
        ) -> None:
            numbers = {
                f"{tracker.stage}/{name}": cast("float", value)
                for name, value in (logs or {}).items()
                if isinstance(value, Real)
            }
            if numbers:
                tracker.log(state.global_step, numbers)

    return TrackerCallback()


# ------------------------------------------------------------------------------------------------- checks


def _finite_numbers(metrics: Mapping[str, object], *, step: int) -> dict[str, float]:
    """Plain int and float from whatever number type; what is none is refused by name."""
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        if name in _METRIC_COLUMNS:
            raise ValueError(f"a metric cannot be called {name!r}: the tracker writes a column of that name itself")
        if not isinstance(value, Real):
            raise ValueError(f"metric {name!r} at step {step} must be a number, got {type(value).__name__}")
        if not math.isfinite(value):
            raise ValueError(f"metric {name!r} at step {step} is {value}; leave out what is unknown, stop what is sick")
        numbers[name] = int(value) if isinstance(value, Integral) else float(value)
    return numbers


def _check_table(name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    clash = sorted(set(columns) & set(_TABLE_COLUMNS))
    if clash or len(set(columns)) != len(columns):
        raise ValueError(f"table {name!r}: columns must differ and not be called step or table, got {list(columns)}")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(columns):
            raise ValueError(f"table {name!r}, row {number}: {len(row)} cells for {len(columns)} columns")
        for column, cell in zip(columns, row, strict=True):
            if isinstance(cell, float) and not math.isfinite(cell):
                raise ValueError(f"table {name!r}, row {number}, column {column!r} is {cell}; use None for 'unscored'")


# -------------------------------------------------------------------------------------------- local files


class _LocalFiles:
    """`metrics.jsonl`, `samples.jsonl` and, once there is an alarm, `alarms.jsonl`.

    One JSON object a line, each line on disk when its call returns.
    """

    def __init__(self, folder: Path) -> None:
        self._metrics = folder / METRICS
        self._samples = folder / SAMPLES
        self._alarms = folder / ALARMS
        self._start = time.monotonic()
        for path in (self._metrics, self._samples, self._alarms):
            _drop_torn_line(path)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        elapsed = round(time.monotonic() - self._start, 3)
        _append(self._metrics, [{"step": step, "time_seconds": elapsed, **metrics}])

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, step: int) -> None:
        head = {"step": step, "table": name}
        _append(self._samples, [head | dict(zip(columns, row, strict=True)) for row in rows])

    def alarm(self, step: int, row: Mapping[str, object]) -> None:
        _append(self._alarms, [{"step": step, **row}])

    def resume_at(self, step: int) -> None:
        for path in (self._metrics, self._samples, self._alarms):
            if path.is_file():
                rows = [row for _, row in read_json_lines(path)]
                write_json_lines(path, [row for row in rows if row["step"] < step])


def _append(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(lines))


def _drop_torn_line(path: Path) -> None:
    """Cut the half line that a killed process may have left, so that the next one does not continue it."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


# -------------------------------------------------------------------------------------------------- W&B


class _WandbRun:
    """One W&B run per output folder and recipe; a restarted stage continues it."""

    def __init__(self, recipe: StageRecipe, output_dir: Path, parents: Mapping[str, str]) -> None:
        self._wandb = _import_wandb()
        self._log_transcripts = recipe.wandb.log_transcripts
        self.id = _run_id(recipe, output_dir)
        default_group = Path(recipe.run_dir).name if recipe.run_dir else None
        default_name = f"{recipe.stage}-{output_dir.resolve().name}-{recipe.hash[:8]}"
        config = {**recipe.model_dump(mode="json"), "recipe_hash": recipe.hash, "parents": dict(parents)}
        self._run = self._wandb.init(
            dir=str(output_dir),
            id=self.id,
            resume="allow",
            job_type=recipe.stage,
            project=redact(recipe.wandb.project),
            group=redact(recipe.wandb.group or default_group),
            name=redact(recipe.wandb.name or default_name),
            tags=redact(recipe.wandb.tags),
            config=redact(config),
            settings=self._wandb.Settings(
                x_disable_meta=True, save_code=False, disable_git=True, console="off", host=""
            ),
        )
        self._run.define_metric("global_step")
        self._run.define_metric("*", step_metric="global_step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"global_step": step, **metrics})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, step: int) -> None:
        if not self._log_transcripts:
            rows = [[_without_text(column, cell) for column, cell in zip(columns, row, strict=True)] for row in rows]
        table = self._wandb.Table(columns=list(columns), data=[list(row) for row in rows], allow_mixed_types=True)
        self._run.log({"global_step": step, name: table})

    def artifact(self, artifact: Artifact) -> None:
        """Lineage stands in the metadata (`parents`) and as alias (`fingerprint`): W&B refuses `use_artifact` offline.

        The manifest goes up as a redacted copy.
        """
        manifest = redact(artifact.to_json() | {"fingerprint": artifact.fingerprint})
        name = re.sub(r"[^A-Za-z0-9_.-]", "-", redact(f"{artifact.stage}-{artifact.path.resolve().name}"))
        entry = self._wandb.Artifact(name, type=artifact.kind, metadata=manifest)
        with entry.new_file("manifest.json", encoding="utf-8") as file:
            json.dump(manifest, file, indent=2, ensure_ascii=False)
        self._run.log_artifact(entry, aliases=["latest", artifact.fingerprint])

    def alert(self, title: str, text: str) -> None:
        self._run.alert(title=title[:_MAX_ALERT_TITLE], text=text, level="WARN")

    def finish(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


def _without_text(column: str, cell: Cell) -> Cell:
    """Identifiers and numbers stay; any other text may quote a transcript."""
    is_identifier = column == "id" or column.endswith("_id")
    return "" if isinstance(cell, str) and not is_identifier else cell


def _run_id(recipe: StageRecipe, output_dir: Path) -> str:
    """The id in `wandb_run_id`, made once: hash of the recipe and 8 random digits.

    The random part keeps two people with one recipe, and a folder that was deleted and made again, from continuing
    each other's run; the hash gives a changed recipe in the same folder a run of its own.
    """
    file = output_dir / RUN_ID
    if file.is_file():
        run_id = file.read_text(encoding="ascii").strip()
        if run_id.startswith(recipe.hash[:8]):
            return run_id
    run_id = f"{recipe.hash[:8]}-{secrets.token_hex(4)}"
    temporary = file.with_name(f".{RUN_ID}.{os.getpid()}.tmp")
    temporary.write_text(run_id + "\n", encoding="ascii")
    temporary.replace(file)
    return run_id


def _import_wandb() -> Any:
    try:
        import wandb

        _ = wandb.init  # a folder called wandb in the working directory imports too, as an empty package
    except (ImportError, AttributeError) as error:
        raise TrackingError(
            f"the recipe says report_to: wandb, but wandb cannot be imported ({error}); "
            "run `pip install wandb` or set report_to: none"
        ) from error
    return wandb
