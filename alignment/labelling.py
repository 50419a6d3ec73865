"""Labels of answers: what a labeller says, who it is, and whether it may label at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from alignment.chunks import Row, work_in_chunks
from alignment.distributed import is_main_process
from alignment.inputs import InputError, measured_labellers, scorer_fingerprint
from alignment.recipe_label import LabellingRecipe
from alignment.recipe_scorers import GUIDELINES, JudgeScorer, ScorerSpec
from alignment.scoring import build_scorer
from reward.conversation import Conversation
from reward.judge import Judge
from reward.judge_prompt import Constitution
from reward.scorer import Score, Scorer, ScorerError, as_probability, check_unscored, score_all
from reward.verdict import Verdict

VERDICTS = "verdicts.jsonl"
"""The file of an artifact that says of every answer who called it what, whether or not it was kept."""

_CHUNK = 32


@dataclass(frozen=True, slots=True)
class Label:
    """What a labeller says of one answer. `safe` is None where it could not tell; `reason` says why, or what else there
    is to know.

    `probability`: P(safe) where it was measured; `rationale`: the explanation that a judge wrote; `truncated`: the
    labeller did not see all of the conversation; `transient`: it could not tell for a reason that another time may be
    gone, such as a busy server.
    """

    safe: bool | None
    reason: str | None = None
    probability: float | None = None
    rationale: str = ""
    truncated: bool = False
    transient: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def value(self) -> float | None:
        """P(safe); 1 or 0 of a labeller that has no probabilities."""
        return float(self.safe) if self.safe is not None and self.probability is None else self.probability


def label_all(scorer: Scorer, conversations: Sequence[Conversation], *, threshold: float) -> list[Label]:
    """One label per conversation, in order: safe from a P(safe) of `threshold` on. ScorerError without a 0-1 score."""
    if scorer.scale == "unbounded":
        raise ScorerError(f"{scorer.name} has no 0-1 score, so it cannot label answers safe or unsafe")
    if not isinstance(scorer, Judge):
        return [_label(score, scorer, threshold) for score in score_all(scorer, conversations)]
    verdicts = scorer.judge(conversations)
    if len(verdicts) != len(conversations):
        raise ScorerError(f"{scorer.name} gave {len(verdicts)} verdicts on {len(conversations)} conversations")
    return [_label(verdict.score, scorer, threshold, verdict) for verdict in verdicts]


def _label(score: Score, scorer: Scorer, threshold: float, verdict: Verdict | None = None) -> Label:
    probability = None if score.value is None else as_probability(score.value, scorer.scale)
    safe = None if probability is None else probability >= threshold
    if verdict is None:
        return Label(safe, score.reason, probability, transient=score.transient)
    return Label(
        safe,
        score.reason,
        verdict.probability,
        rationale=verdict.rationale,
        truncated=verdict.truncated,
        transient=verdict.transient,
    )


@dataclass(frozen=True)
class Labelled:
    """The labels of one labeller, in the order of the conversations, and who it is."""

    labels: Sequence[Label]
    labeller: Mapping[str, Any]


def ask_labeller(
    spec: ScorerSpec, conversations: Sequence[Conversation], recipe: LabellingRecipe, *, folder: Path, name: str
) -> Labelled:
    """Label in chunks that are kept in `folder`; a labeller that has nothing left to say is not loaded.

    ScorerError when it leaves more than `recipe.max_unscored` of the answers unscored. A stage that starts again, after
    that or after a kill, asks once more in the chunks where a reason was transient.
    """
    scorer = cache(lambda: build_scorer(spec))

    def work(_: int, chunk: Sequence[Conversation]) -> list[Row]:
        return [label.to_json() for label in label_all(scorer(), chunk, threshold=recipe.threshold)]

    rows = work_in_chunks(
        conversations, work, folder=folder, chunk_size=_CHUNK, name=name, again=lambda row: row.get("transient", False)
    )
    labels = [Label(**row) for row in rows]
    unscored = [label.reason for label in labels if label.safe is None]
    check_unscored(unscored, num_answers=len(labels), name=spec.type, limit=recipe.max_unscored)
    return Labelled(labels, describe(spec))


def describe(spec: ScorerSpec) -> dict[str, Any]:
    """Who labels, for the record: kind, model, way of asking, hash of the guidelines, fingerprint."""
    section = spec.model_dump(mode="json")
    shown = {
        key: section[key] for key in ("type", "model", "path", "function", "url", "mode", "prompt") if key in section
    }
    if isinstance(spec, JudgeScorer):
        shown["guidelines"] = Constitution.read(spec.guidelines or GUIDELINES).hash
    return shown | {"fingerprint": scorer_fingerprint(spec)}


def gate(recipe: LabellingRecipe) -> dict[str, Any]:
    """How far the labellers agree with people, for the manifest. InputError when one of them must not label.

    With `allow_unmeasured` it may, loudly: a warning is printed, and the reason stands under `unmeasured`.
    """
    measured, unmeasured = measured_labellers(recipe)
    for key, problem in unmeasured.items():
        if not recipe.allow_unmeasured:
            raise InputError(f"{key}: {problem}")
        if is_main_process():
            print(f"WARNING: {key} labels training data UNMEASURED (allow_unmeasured): {problem}", flush=True)
    return {"measured": {key: asdict(found) for key, found in measured.items()}, "unmeasured": unmeasured}
