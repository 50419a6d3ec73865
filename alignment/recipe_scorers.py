"""The `scorer:` section of a recipe, and the base of all sections."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from reward.dtype import Dtype
from reward.scorer import LLAMA2_THRESHOLD
from reward.wire import parse_url

Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """Part of a recipe: unknown keys and loose types are errors, values never change."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", protected_namespaces=())


class RewardModelScorer(Section):
    """`shared_prefix`: answers to one prompt share its computation (same numbers, faster).

    `family`: which kind of checkpoint it is; auto tells it from its files. `direction`: lower for models of cost or
    harm, whose scores are negated. `label`: the output that is meant of a classifier with several. `read_at`: where a
    chat model's score is read; None as its family is trained.
    """

    type: Literal["reward_model"] = "reward_model"
    path: str
    family: Literal["auto", "classifier", "pair", "value_head", "beaver"] = "auto"
    direction: Literal["higher", "lower"] = "higher"
    label: int | str | None = None
    read_at: Literal["end_of_turn", "end_of_template"] | None = None
    trust_remote_code: bool = False
    batch_size: PositiveInt = 16
    max_length: PositiveInt = 4096
    shared_prefix: bool = True
    dtype: Dtype = "float32"


class JudgeScorer(Section):
    """The LLM safety judge (after Safety LLaMA); `guidelines`: a Markdown file, None for our own."""

    type: Literal["judge"] = "judge"
    model: str
    guidelines: str | None = None
    mode: Literal["score", "explain"] = "score"
    batch_size: PositiveInt = 8
    max_length: PositiveInt = 2048
    dtype: Dtype = "float32"


class GuardScorer(Section):
    """P(safe) by a guard model of the Llama Guard or WildGuard kind."""

    type: Literal["guard"] = "guard"
    model: str
    format: Literal["llama_guard", "wild_guard"]
    batch_size: PositiveInt = 8
    max_length: PositiveInt = 4096
    dtype: Dtype = "float32"


class RefusalScorer(Section):
    """The refusal-and-content rule."""

    type: Literal["refusal"] = "refusal"


class PythonScorer(Section):
    """`module:function`, which maps a Conversation to a float (None: unscored)."""

    type: Literal["python"] = "python"
    function: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
    scale: Literal["logit", "probability", "unbounded"] = "unbounded"


class HttpScorer(Section):
    """A scorer behind HTTP (`sara serve-reward`, or any server of that format).

    `token_env`: the environment variable that holds the token. `name`, `scale`: what the server must say of itself
    (None: anything). `timeout`: seconds of one try; `deadline`: of all tries of one request and the pauses between.
    """

    type: Literal["http"] = "http"
    url: str
    token_env: Annotated[str, Field(pattern=r"^\w+$")] | None = None
    name: str | None = None
    scale: Literal["logit", "probability", "unbounded"] | None = None
    batch_size: PositiveInt = 64
    timeout: PositiveFloat = 300.0
    deadline: PositiveFloat = 900.0
    retries: NonNegativeInt = 5

    @model_validator(mode="after")
    def _usable_url(self) -> HttpScorer:
        try:
            parse_url(self.url, with_token=self.token_env is not None)
        except ValueError as error:
            raise ValueError(f"url: {error}") from error
        return self


class Llama2Scorer(Section):
    """Llama 2's piecewise combination of two scorers."""

    type: Literal["llama2"] = "llama2"
    safety: ScorerSpec
    helpfulness: ScorerSpec
    threshold: Annotated[float, Field(gt=0, lt=1)] = LLAMA2_THRESHOLD


class WeightedSum(Section):
    type: Literal["weighted_sum"] = "weighted_sum"
    parts: Annotated[list[ScorerSpec], Field(min_length=1)]
    weights: Annotated[list[Finite], Field(min_length=1)]

    @model_validator(mode="after")
    def _one_weight_a_part(self) -> WeightedSum:
        if len(self.weights) != len(self.parts):
            raise ValueError(f"weights: {len(self.parts)} parts need as many weights, got {len(self.weights)}")
        return self


class Minimum(Section):
    type: Literal["minimum"] = "minimum"
    parts: Annotated[list[ScorerSpec], Field(min_length=1)]


class Lagrangian(Section):
    """Safe RLHF's reward less its cost; `cost` is a safety scorer, whose negated raw score is the cost."""

    type: Literal["lagrangian"] = "lagrangian"
    reward: ScorerSpec
    cost: ScorerSpec
    multiplier: NonNegativeFloat = 1.0


ScorerSpec = Annotated[
    RewardModelScorer
    | JudgeScorer
    | GuardScorer
    | RefusalScorer
    | PythonScorer
    | HttpScorer
    | Llama2Scorer
    | WeightedSum
    | Minimum
    | Lagrangian,
    Field(discriminator="type"),
]

for _model in (Llama2Scorer, WeightedSum, Minimum, Lagrangian):
    _model.model_rebuild()
