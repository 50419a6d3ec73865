"""`Scorer`: anything that judges conversations, and the ways to combine several into one.

A scorer takes text and gives one `Score` per conversation, in order. Whatever tokenizer or chat template it uses is
its own business, so any scorer can stand in any stage. Higher is always better (safer, more helpful).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

from reward.conversation import Conversation

Scale = Literal["logit", "probability", "unbounded"]
"""`logit`: its sigmoid is the 0-1 score of the paper. `probability`: in [0, 1]. `unbounded`: any number."""

LLAMA2_THRESHOLD = 0.15
"""Llama 2, section 3.2.3: below it the safety score rules (precision 0.89, recall 0.55 on the paper's test set)."""


@dataclass(frozen=True, slots=True)
class Score:
    """The judgement of one conversation. `value` is None when it could not be scored; `reason` then says why.

    Beside a value, `reason` says what else must be known of it, such as that a part of the text was not read. `branch`
    names the part of a combination that decided (for logging). `transient`: unscored for a reason that another time may
    be gone, such as a busy server.
    """

    value: float | None
    reason: str | None = None
    branch: str | None = None
    transient: bool = False

    def __post_init__(self) -> None:
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"a score must be finite, got {self.value}; use None with a reason for 'unscored'")
        if self.value is None and not self.reason:
            raise ValueError("an unscored conversation needs a reason")


class ScorerError(RuntimeError):
    """A scorer that cannot be used or that broke its contract."""


@runtime_checkable
class Scorer(Protocol):
    """The one protocol behind every reward model, judge, rule and combination."""

    @property
    def name(self) -> str: ...

    @property
    def scale(self) -> Scale: ...

    def score(self, conversations: Sequence[Conversation]) -> list[Score]:
        """One score per conversation, in their order; never fewer, never a stand-in number for 'unknown'."""
        ...


def score_all(scorer: Scorer, conversations: Sequence[Conversation]) -> list[Score]:
    """`scorer.score`, with its contract checked: as many scores as conversations, each a `Score`."""
    scores = scorer.score(conversations)
    if len(scores) != len(conversations):
        raise ScorerError(f"{scorer.name} returned {len(scores)} scores for {len(conversations)} conversations")
    for score in scores:
        if not isinstance(score, Score):
            raise ScorerError(f"{scorer.name} returned {type(score).__name__} instead of Score")
    return scores


def check_unscored(reasons: Sequence[str | None], *, num_answers: int, name: str, limit: float) -> None:
    """ScorerError when more than the share `limit` of `num_answers` has no score.

    `reasons`: why, one for each answer that has none; the three most frequent are told. `name`: of the scorer.
    """
    if reasons and len(reasons) / num_answers > limit:  # a product would be rounded up or down at the limit
        told = ", ".join(f"{reason} ({count})" for reason, count in Counter(reasons).most_common(3))
        raise ScorerError(
            f"{name} left {len(reasons)} of {num_answers} answers unscored, over max_unscored={limit:g}: {told}"
        )


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


def logit(probability: float, *, epsilon: float = 1e-6) -> float:
    """`log(p / (1 - p))`, with p kept `epsilon` away from 0 and 1."""
    clipped = min(max(probability, epsilon), 1 - epsilon)
    return math.log(clipped / (1 - clipped))


def as_logit(value: float, scale: Scale) -> float:
    """The raw linear score behind a value (Llama 2 whitens `logit(R)`)."""
    if scale == "unbounded":
        raise ScorerError("a score without bounds has no logit; use a scorer whose scale is 'logit' or 'probability'")
    return value if scale == "logit" else logit(value)


def as_probability(value: float, scale: Scale) -> float:
    """The 0-1 score of the paper."""
    if scale == "unbounded":
        raise ScorerError(
            "a score without bounds is no probability; use a scorer whose scale is 'logit' or 'probability'"
        )
    return value if scale == "probability" else sigmoid(value)


@dataclass(frozen=True)
class FunctionScorer:
    """A Python function `conversation -> float | None` as a scorer."""

    function: Callable[[Conversation], float | None]
    name: str = "function"
    scale: Scale = "unbounded"

    def score(self, conversations: Sequence[Conversation]) -> list[Score]:
        scores: list[Score] = []
        for conversation in conversations:
            value = self.function(conversation)
            if value is None or not math.isfinite(value):
                scores.append(Score(None, f"{self.name} returned {value}"))
            else:
                scores.append(Score(float(value)))
        return scores


@dataclass(frozen=True)
class PiecewiseScorer:
    """Llama 2's combination R_c of a safety and a helpfulness score (section 3.2.3, equation 4).

    `R_c = R_s` if the prompt is tagged as safety-relevant or `R_s < threshold`, else `R_h`; the value returned is
    `logit(R_c)`, the raw linear score that PPO whitens. `threshold` is a probability.
    """

    safety: Scorer
    helpfulness: Scorer
    threshold: float = LLAMA2_THRESHOLD
    name: str = "llama2"
    scale: Scale = "logit"

    def score(self, conversations: Sequence[Conversation]) -> list[Score]:
        safety_scores = score_all(self.safety, conversations)
        helpfulness_scores = score_all(self.helpfulness, conversations)
        combined: list[Score] = []
        for conversation, safety, helpfulness in zip(conversations, safety_scores, helpfulness_scores, strict=True):
            if safety.value is None:
                combined.append(replace(safety, reason=f"{self.safety.name}: {safety.reason}"))
                continue
            below = as_probability(safety.value, self.safety.scale) < self.threshold
            if conversation.tags.is_safety or below:
                combined.append(Score(as_logit(safety.value, self.safety.scale), branch="safety"))
            elif helpfulness.value is None:
                combined.append(replace(helpfulness, reason=f"{self.helpfulness.name}: {helpfulness.reason}"))
            else:
                combined.append(Score(as_logit(helpfulness.value, self.helpfulness.scale), branch="helpfulness"))
        return combined


@dataclass(frozen=True)
class WeightedSumScorer:
    """`sum_i weight_i * value_i` of raw scores; unscored as soon as one part is."""

    parts: tuple[Scorer, ...]
    weights: tuple[float, ...]
    name: str = "weighted_sum"
    scale: Scale = "unbounded"

    def __post_init__(self) -> None:
        if not self.parts or len(self.parts) != len(self.weights):
            raise ScorerError(f"{len(self.parts)} scorers need as many weights, got {len(self.weights)}")

    def score(self, conversations: Sequence[Conversation]) -> list[Score]:
        def combine(values: Sequence[float]) -> tuple[float, str | None]:
            return math.fsum(w * v for w, v in zip(self.weights, values, strict=True)), None

        return _combine(self.parts, conversations, combine)


@dataclass(frozen=True)
class MinimumScorer:
    """The worst of several scores (on the logit scale), so that no part can be bought off by another."""

    parts: tuple[Scorer, ...]
    name: str = "minimum"
    scale: Scale = "logit"

    def score(self, conversations: Sequence[Conversation]) -> list[Score]:
        def combine(values: Sequence[float]) -> tuple[float, str | None]:
            logits = [as_logit(v, part.scale) for v, part in zip(values, self.parts, strict=True)]
            lowest = min(range(len(logits)), key=logits.__getitem__)
            return logits[lowest], self.parts[lowest].name

        return _combine(self.parts, conversations, combine)


@dataclass(frozen=True)
class LagrangianScorer:
    """Safe RLHF's combination of a reward and a cost (Dai et al. 2023, arXiv 2310.12773).

    `(reward - multiplier * cost) / (1 + multiplier)` of raw scores. `safety` is a scorer like any other, higher is
    safer, and the cost is its negated raw score. A multiplier of 0 leaves the reward alone.
    """

    reward: Scorer
    safety: Scorer
    multiplier: float = 1.0
    name: str = "lagrangian"
    scale: Scale = "unbounded"

    def __post_init__(self) -> None:
        if not 0 <= self.multiplier < math.inf:
            raise ScorerError(f"the multiplier of a cost must be finite and not negative, got {self.multiplier}")

    def score(self, conversations: Sequence[Conversation]) -> list[Score]:
        return self.with_costs(conversations)[0]

    def with_costs(self, conversations: Sequence[Conversation]) -> tuple[list[Score], list[float]]:
        """The scores, and the costs of the conversations that were scored, which a multiplier may follow."""
        costs: list[float] = []

        def combine(values: Sequence[float]) -> tuple[float, str | None]:
            reward, safety = (_raw(v, part.scale) for v, part in zip(values, (self.reward, self.safety), strict=True))
            costs.append(-safety)
            return (reward + self.multiplier * safety) / (1 + self.multiplier), None

        return _combine((self.reward, self.safety), conversations, combine), costs


@dataclass(frozen=True)
class NegatedScorer:
    """A scorer whose lower values are better (cost, harmfulness) turned: `-value`; of probabilities `1 - p`."""

    part: Scorer

    @property
    def name(self) -> str:
        return self.part.name

    @property
    def scale(self) -> Scale:
        return self.part.scale

    def score(self, conversations: Sequence[Conversation]) -> list[Score]:
        one = 1.0 if self.scale == "probability" else 0.0
        scores = score_all(self.part, conversations)
        return [score if score.value is None else replace(score, value=one - score.value) for score in scores]


def _raw(value: float, scale: Scale) -> float:
    """The linear score behind a value; a value without bounds is one already."""
    return logit(value) if scale == "probability" else value


def _combine(
    parts: Sequence[Scorer],
    conversations: Sequence[Conversation],
    combine: Callable[[Sequence[float]], tuple[float, str | None]],
) -> list[Score]:
    columns = [score_all(part, conversations) for part in parts]
    combined: list[Score] = []
    for row in zip(*columns, strict=True):
        missing = next(((part, score) for part, score in zip(parts, row, strict=True) if score.value is None), None)
        if missing is not None:
            combined.append(replace(missing[1], reason=f"{missing[0].name}: {missing[1].reason}"))
            continue
        value, branch = combine([score.value for score in row if score.value is not None])
        combined.append(Score(value, branch=branch))
    return combined
