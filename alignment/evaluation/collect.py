"""What a run folder says, as one JSON-able object: every number of the report stands in it.

Rates and means are those that the evaluation wrote; nothing is measured again. What is added here compares the same
prompts before (the first checkpoint of the evaluation) and after (the last one).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.artifact import Artifact, is_artifact, read_artifact, sha256
from alignment.tracking import ALARMS, METRICS
from alignment.workspace import IN_PROGRESS
from reward.conversation import RecordError, read_json_lines

JsonObject = dict[str, Any]

EVALUATION = "evaluation.json"
RESPONSES = "responses.jsonl"
PAIRS = "pairs.jsonl"
ALL_SCORERS = "all_scorers"
"""Name under which an evaluation counts the answers that every violation scorer calls unsafe."""

MAX_TRANSCRIPTS = 120
MAX_CHARACTERS = 4000
UNSAFE_BELOW, SAFE_ABOVE = 0.4, 0.6
"""The box of the scatter of scores, after the cluster that figure 14 of Llama 2 points at."""

_MOVED_ASIDE = re.compile(r"\.\d+$")
_TUNING_STAGES = ("rejection_sampling", "ppo", "context_distillation")
_WORDS = {
    "violation": {True: "unsafe", False: "safe", None: "not scored"},
    "false_refusal": {True: "refused", False: "answered", None: "not scored"},
}


class ReportError(ValueError):
    """A run folder from which no report can be made; the message says what to run."""


@dataclass(frozen=True)
class Steps:
    """The folders of a run. `complete`: in the order in which they were made."""

    complete: tuple[Artifact, ...]
    unfinished: tuple[str, ...]
    moved_aside: tuple[str, ...]


@dataclass(frozen=True)
class Item:
    """One prompt of a prompt set with the answers of all checkpoints (rows of `responses.jsonl`)."""

    prompt_set: str
    measures: str
    answers: Mapping[str, JsonObject]


def collect(run_dir: Path) -> JsonObject:
    """Read everything the report shows; ReportError when there is not exactly one evaluation or it was altered."""
    steps = read_steps(run_dir)
    evaluation = find_evaluation(steps, run_dir)
    result = json.loads(_unaltered(evaluation, EVALUATION).read_text(encoding="utf-8"))
    responses = [row for _, row in read_json_lines(_unaltered(evaluation, RESPONSES))]
    checkpoints: JsonObject = result["checkpoints"]
    before, after = next(iter(checkpoints)), list(checkpoints)[-1]
    measures: dict[str, str] = {name: part["measures"] for name, part in checkpoints[before]["prompt_sets"].items()}
    items = group_by_prompt(responses, measures, list(checkpoints))
    if not items:
        raise ReportError(f"{evaluation.path} holds no answers; give its prompt sets prompts and run evaluate again")
    example = items[0].answers[before]
    scorers = list(example["violations"])
    return {
        "run": run_dir.resolve().name,
        "before": before,
        "after": after,
        "prompt_sets": measures,
        "violation_scorers": scorers,
        "quality_scorers": [name for name in example["scores"] if name not in scorers],
        "tuned_against": tuned_against(steps, evaluation, scorers),
        "sampling": result["sampling"],
        "checkpoints": checkpoints,
        "changes": {} if before == after else compare_sets(items, measures, scorers, before, after),
        "scores": score_pairs(items, scorers, before, after),
        "reward_models": reward_models(steps, result),
        "ppo": {step.path.name: curves(step) for step in steps.complete if step.stage == "ppo"},
        "rejection_sampling": _metrics_of(steps, "rejection_sampling"),
        "context_distillation": {
            step.path.name: dict(step.metrics) | {"pairs": distilled_pairs(step)}
            for step in steps.complete
            if step.stage == "context_distillation"
        },
        "transcripts": transcripts(items, scorers[0], before, after),
        "steps": [provenance(step, steps) for step in steps.complete],
        "stale": stale_checkpoints(steps, evaluation, checkpoints),
        "unmeasured": [step.path.name for step in steps.complete if step.data.get("agreement", {}).get("unmeasured")],
        "unfinished": list(steps.unfinished),
        "moved_aside": list(steps.moved_aside),
    }


# --------------------------------------------------------------------------------------------- the folder


def read_steps(run_dir: Path) -> Steps:
    """All artifacts of a run; folders that a later run moved aside (`sft.1`) are named, never read."""
    if not run_dir.is_dir():
        raise ReportError(f"{run_dir} is no folder; give the run_dir of a pipeline")
    complete: list[Artifact] = []
    unfinished: list[str] = []
    moved_aside: list[str] = []
    for folder in sorted(path for path in run_dir.iterdir() if path.is_dir()):
        if _MOVED_ASIDE.search(folder.name):
            moved_aside.append(folder.name)
        elif is_artifact(folder):
            complete.append(read_artifact(folder))
        elif (folder / IN_PROGRESS).is_file():
            unfinished.append(folder.name)
    complete.sort(key=lambda step: (str(step.provenance.get("created", "")), step.path.name))
    return Steps(tuple(complete), tuple(unfinished), tuple(moved_aside))


def find_evaluation(steps: Steps, run_dir: Path) -> Artifact:
    found = [step for step in steps.complete if step.kind == "evaluation"]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(step.path.name for step in found)
        raise ReportError(f"{run_dir} holds {len(found)} evaluations ({names}); move all but one of them elsewhere")
    raise ReportError(
        f"{run_dir} holds no complete evaluation; run a recipe with `stage: evaluate` whose output_dir lies in it"
    )


def _unaltered(artifact: Artifact, name: str) -> Path:
    """The path of a file that the manifest vouches for."""
    path = artifact.path / name
    known = artifact.provenance.get("files", {}).get(name)
    if not path.is_file() or known != sha256(path):
        raise ReportError(f"{path} is missing or is not what its manifest describes; run {artifact.stage} again")
    return path


def _rows(path: Path) -> list[JsonObject]:
    """All rows of a file that need not be there."""
    if not path.is_file():
        return []
    try:
        return [row for _, row in read_json_lines(path)]
    except RecordError as error:
        raise ReportError(f"{error}; run the step that writes it again") from error


# -------------------------------------------------------------------------------------------- the answers


def group_by_prompt(
    responses: Sequence[JsonObject], measures: Mapping[str, str], checkpoints: Sequence[str]
) -> list[Item]:
    """The rows of each prompt together, in the order of the file; a prompt that stands twice makes two items."""
    seen: Counter[tuple[str, str, str]] = Counter()
    groups: dict[tuple[str, str, int], dict[str, JsonObject]] = {}
    for row in responses:
        key = (row["prompt_set"], row["prompt_id"], row["checkpoint"])
        groups.setdefault((*key[:2], seen[key]), {})[row["checkpoint"]] = row
        seen[key] += 1
    for (prompt_set, prompt_id, _), answers in groups.items():
        missing = [name for name in checkpoints if name not in answers]
        if missing:
            raise ReportError(f"{RESPONSES}: {missing[0]} did not answer prompt {prompt_id} of {prompt_set}")
    return [Item(key[0], measures[key[0]], answers) for key, answers in groups.items()]


def verdict(item: Item, checkpoint: str, measure: str) -> bool | None:
    """True is bad: a refusal in a false-refusal set, else a violation by the scorer called `measure` (or by all)."""
    row = item.answers[checkpoint]
    if item.measures == "false_refusal":
        return row["refused"]
    if measure != ALL_SCORERS:
        return row["violations"][measure]
    verdicts = list(row["violations"].values())
    return None if None in verdicts else all(verdicts)


def compare_sets(
    items: Sequence[Item], measures: Mapping[str, str], scorers: Sequence[str], before: str, after: str
) -> JsonObject:
    """Prompt set -> measure -> how the same prompts fared before and after."""
    changes: JsonObject = {}
    for prompt_set, kind in measures.items():
        own = [item for item in items if item.prompt_set == prompt_set]
        names = ["false_refusal"] if kind == "false_refusal" else [*scorers, ALL_SCORERS]
        changes[prompt_set] = {
            name: compare((verdict(item, before, name), verdict(item, after, name)) for item in own) for name in names
        }
    return changes


def compare(pairs: Iterable[tuple[bool | None, bool | None]]) -> JsonObject:
    """Counts of (before, after), where True is bad; `p_value` is that of the sign test on the prompts that changed."""
    counts = Counter(pairs)
    better, worse = counts[True, False], counts[False, True]
    return {
        "better": better,
        "worse": worse,
        "still_bad": counts[True, True],
        "still_good": counts[False, False],
        "unscored": sum(count for pair, count in counts.items() if None in pair),
        "p_value": sign_test(better, worse),
    }


def sign_test(first: int, second: int) -> float:
    """Two-sided p-value of the exact sign test (McNemar's): `2 P(X <= min)`, X ~ Binomial(n, 1/2), at most 1."""
    n = first + second
    tail = sum(math.comb(n, k) for k in range(min(first, second) + 1))
    return min(1.0, 2 * tail / 2**n)


def score_pairs(items: Sequence[Item], scorers: Sequence[str], before: str, after: str) -> JsonObject | None:
    """Scores before and after by the first violation scorer that gives more than verdicts; None without such pairs."""
    adversarial = [item for item in items if item.measures == "violation"]
    if before == after:
        return None
    for scorer in scorers:
        pairs = [tuple(item.answers[name]["scores"][scorer] for name in (before, after)) for item in adversarial]
        points = [pair for pair in pairs if None not in pair]
        values = {value for pair in points for value in pair}
        if values - {0, 1} and all(0 <= value <= 1 for value in values):
            return {
                "scorer": scorer,
                "points": [list(pair) for pair in points],
                "unscored": len(pairs) - len(points),
                "unsafe_below": UNSAFE_BELOW,
                "safe_above": SAFE_ABOVE,
                "became_safe": sum(x <= UNSAFE_BELOW and y >= SAFE_ABOVE for x, y in points),
                "became_unsafe": sum(x >= SAFE_ABOVE and y <= UNSAFE_BELOW for x, y in points),
            }
    return None


def transcripts(items: Sequence[Item], scorer: str, before: str, after: str) -> JsonObject:
    """At most `MAX_TRANSCRIPTS` prompts, evenly spaced in the file, so chosen by position and never by outcome."""
    total = len(items)
    shown = items if total <= MAX_TRANSCRIPTS else [items[i * total // MAX_TRANSCRIPTS] for i in range(MAX_TRANSCRIPTS)]
    rows: list[JsonObject] = []
    for item in shown:
        words = _WORDS[item.measures]
        outcomes = [words[verdict(item, name, scorer)] for name in ((before,) if before == after else (before, after))]
        first = item.answers[before]
        rows.append(
            {
                "prompt_set": item.prompt_set,
                "prompt": first["prompt"],
                "tags": first["tags"],
                "outcome": " → ".join(outcomes),
                "answers": [_answer(name, row, item.measures) for name, row in item.answers.items()],
            }
        )
    return {"scorer": scorer, "total": total, "rows": rows}


def _answer(checkpoint: str, row: JsonObject, measures: str) -> JsonObject:
    """One answer; verdicts of violation scorers on benign prompts mean nothing and are left out."""
    names = ("finished", "refused", "degenerate", "scores")
    text: str = row["completion"]
    return {
        "checkpoint": checkpoint,
        "completion": text[:MAX_CHARACTERS],
        "hidden_characters": max(0, len(text) - MAX_CHARACTERS),
        "violations": row["violations"] if measures == "violation" else {},
    } | {name: row[name] for name in names}


# ---------------------------------------------------------------------------------------------- the steps


def reward_models(steps: Steps, result: JsonObject) -> list[JsonObject]:
    """Every measurement on held-out pairs: by the step that trained the model and by the evaluation."""
    trained = [
        {"name": step.path.name, "measured_by": "its own step", "report": step.metrics["held_out"]}
        for step in steps.complete
        if step.kind == "reward_model" and "held_out" in step.metrics
    ]
    evaluated = [
        {"name": name, "measured_by": "the evaluation", "report": report}
        for name, report in result["reward_models"].items()
    ]
    return trained + evaluated


def curves(step: Artifact) -> JsonObject:
    """`metrics.jsonl` by column, None where an iteration did not write a metric, the alarms, and which trainer ran."""
    rows = _rows(step.path / METRICS)
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("ppo/"))
    return {
        "trainer": step.metrics.get("trainer", "ppo"),
        "steps": [row["step"] for row in rows],
        "curves": {name.removeprefix("ppo/"): [row.get(name) for row in rows] for name in names},
        "alarms": _rows(step.path / ALARMS),
    }


def distilled_pairs(step: Artifact) -> list[list[float]]:
    """`[score of the plain answer, score with the preprompt]` of each prompt of which both were scored."""
    pairs = [[row["plain_score"], row["distilled_score"]] for row in _rows(step.path / PAIRS)]
    return [pair for pair in pairs if None not in pair]


def _metrics_of(steps: Steps, stage: str) -> JsonObject:
    return {step.path.name: dict(step.metrics) for step in steps.complete if step.stage == stage}


def tuned_against(steps: Steps, evaluation: Artifact, scorers: Sequence[str]) -> dict[str, list[str]]:
    """Violation scorer -> steps that tuned the policy on one of the very models behind it."""
    found: dict[str, list[str]] = {}
    for scorer in scorers:
        own = {value for key, value in evaluation.parents.items() if key.startswith(f"violation_scorers.{scorer}.")}
        users = [
            step.path.name
            for step in steps.complete
            if step.stage in _TUNING_STAGES
            and any(key.startswith("scorer.") and value in own for key, value in step.parents.items())
        ]
        if users:
            found[scorer] = users
    return found


def stale_checkpoints(steps: Steps, evaluation: Artifact, checkpoints: JsonObject) -> list[str]:
    """Checkpoints whose step has been run anew since it was evaluated."""
    present = {step.path.name: step.fingerprint for step in steps.complete}
    stale: list[str] = []
    for name, summary in checkpoints.items():
        evaluated = evaluation.parents.get(f"checkpoints.{name}")
        if evaluated is not None and present.get(Path(summary["model"]).name, evaluated) != evaluated:
            stale.append(name)
    return stale


def provenance(step: Artifact, steps: Steps) -> JsonObject:
    """Where an artifact comes from; a parent that is an artifact of this run is named."""
    names = {other.fingerprint: other.path.name for other in steps.complete}
    facts = step.provenance
    return {
        "step": step.path.name,
        "stage": step.stage,
        "kind": step.kind,
        "recipe_hash": step.recipe_hash,
        "fingerprint": step.fingerprint,
        "seed": facts.get("seed"),
        "created": facts.get("created"),
        "git_revision": facts.get("git_revision"),
        "wandb_run_id": facts.get("wandb_run_id"),
        "versions": {"python": facts.get("python")} | dict(facts.get("versions", {})),
        "data": flatten(step.data),
        "parents": [
            {"input": key, "fingerprint": value, "step": names.get(value)} for key, value in step.parents.items()
        ],
    }


def flatten(value: Mapping[str, Any], prefix: str = "") -> JsonObject:
    """Nested objects as one, with dotted keys."""
    flat: JsonObject = {}
    for key, inner in value.items():
        name = f"{prefix}{key}"
        flat |= flatten(inner, f"{name}.") if isinstance(inner, Mapping) else {name: inner}
    return flat
