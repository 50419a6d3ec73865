"""A moderation service of the OpenAI kind as a judge: P(good) is 1 less the highest score of its categories.

    POST {url}/moderations      {"model": ..., "input": "the text"}

It sees the last answer alone, so an answer that is unsafe only in view of its question is none to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from reward.backends import Failure
from reward.conversation import Conversation
from reward.remote import Json, ModelServer
from reward.scorer import Scale, Score, ScorerError
from reward.verdict import Verdict
from reward.wire import WireError, shorten


@dataclass
class ModerationJudge:
    """Judges the last answer by a moderation service (`reward.judge.Judge`).

    `threshold`: the category score from which on an answer is bad; None: where the service flags it. `counts` holds how
    many verdicts there were so far, by outcome.
    """

    server: ModelServer
    threshold: float | None = None
    name: str = "moderation"
    scale: Scale = "probability"
    counts: Counter[str] = field(default_factory=Counter[str], init=False)

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ScorerError(f"threshold must be above 0 and at most 1, got {self.threshold}")

    def score(self, conversations: Sequence[Conversation]) -> list[Score]:
        return [verdict.score for verdict in self.judge(conversations)]

    def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        """One verdict per conversation, in their order; the rationale names the categories that made it bad."""
        texts = [conversation.completion for conversation in conversations]
        bodies: list[Json] = [{"input": text} for text in texts if text.strip()]
        found = iter(self.server.ask_all("/moderations", bodies, self._read))
        verdicts: list[Verdict] = []
        for text in texts:
            answer = next(found) if text.strip() else Failure("empty answer")
            verdicts.append(Verdict.of_failure(answer) if isinstance(answer, Failure) else answer)
        self.counts.update(verdict.outcome for verdict in verdicts)
        return verdicts

    def question(self, conversation: Conversation) -> list[Any]:
        return [self.threshold, conversation.completion]

    def _read(self, row: Json) -> Verdict:
        result = _result(row)
        scores = _scores(result)
        highest = max(scores.values())
        if self.threshold is None:
            named = [name for name, value in _object(result, "categories").items() if value is True]
            bad = result.get("flagged") is True or bool(named)
        else:
            named = [name for name, score in scores.items() if score >= self.threshold]
            bad = bool(named)
        named.sort(key=lambda name: -scores.get(name, 0))
        rationale = ", ".join(f"{shorten(name, 60)} {scores.get(name, 0):.3g}" for name in named)
        return Verdict("bad" if bad else "good", rationale=rationale, probability=1 - highest)


def _result(row: Json) -> Json:
    results = row.get("results")
    if not isinstance(results, list) or len(cast(list[Any], results)) != 1 or not isinstance(results[0], dict):
        raise WireError("results must be a list of one object")
    return cast(Json, results[0])


def _object(result: Json, key: str) -> Json:
    if not isinstance(result.get(key), dict):
        raise WireError(f"results[0].{key} must be an object")
    return cast(Json, result[key])


def _scores(result: Json) -> dict[str, float]:
    """Category -> score in [0, 1]; null marks a category that the model does not know."""
    scores: dict[str, float] = {}
    for name, value in _object(result, "category_scores").items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise WireError(f"the score of {shorten(name, 60)!r} is no number between 0 and 1")
        scores[name] = float(value)
    if not scores:
        raise WireError("results[0].category_scores holds no score")
    return scores
