"""The `scorer:` section of a recipe, and the base of all sections."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from reward.dtype import Dtype, Quantization
from reward.scorer import LLAMA2_THRESHOLD
from reward.wire import parse_url

Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]

HOW_IT_IS_RUN = frozenset(
    {
        "batch_size",
        "shared_prefix",
        "sharded",
        "timeout",
        "deadline",
        "retries",
        "token_env",
        "concurrency",
        "cache",
        "progress",
    }
)
"""Keys of scorers that change no score."""

ONLY_CLASSIFIERS = (
    "only stock classifiers with one output, as the stage reward_model leaves them, are shared out; leave `sharded` "
    "out, or score over http"
)

GUIDELINES = Path(__file__).parent / "data" / "guidelines" / "default.md"
"""Those of a judge that names none."""


class Section(BaseModel):
    """Part of a recipe: unknown keys and loose types are errors, values never change."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", protected_namespaces=())


class RewardModelScorer(Section):
    """`shared_prefix`: answers to one prompt share its computation (same numbers, faster).

    `family`: which kind of checkpoint it is; auto tells it from its files. `direction`: lower for models of cost or
    harm, whose scores are negated. `label`: the output that is meant of a classifier with several. `read_at`: where a
    chat model's score is read; None as its family is trained. `sharded`: each process holds a part of the weights
    (ZeRO-3), for models that do not fit beside the policy.
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
    sharded: bool = False
    dtype: Dtype = "float32"


class Server(Section):
    """A server of the OpenAI kind (vLLM, llama.cpp, hosted services).

    `url`: the base address, `/v1` is put behind one without a path. `token_env`: the environment variable with the key.
    `concurrency`: requests on their way at one time. `timeout`: seconds of one try; `deadline`: of all tries of one
    request and the pauses between.
    """

    url: str
    token_env: Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$")] | None = None  # no key looks like that
    concurrency: PositiveInt = 4
    timeout: PositiveFloat = 120.0
    deadline: PositiveFloat = 600.0
    retries: Annotated[int, Field(ge=0, le=4)] = 4

    @model_validator(mode="after")
    def _usable_url(self) -> Server:
        try:
            parse_url(self.url, with_token=self.token_env is not None)
        except ValueError as error:
            raise ValueError(f"url: {error}") from error
        return self


class HarmfulnessScorer(Section):
    """The negated grade of harm, 0 to 4, that a harmfulness model predicts.

    `threshold`: above it a grade counts as unsafe; with it the score is on the logit scale, else it has no bounds.
    `truncation_side`, `max_length`: the end that longer texts lose; None as the model was trained. `revision`: of a
    hub model.
    """

    type: Literal["absolute_harmfulness"] = "absolute_harmfulness"
    model: str
    revision: str | None = None
    threshold: Finite | None = None
    truncation_side: Literal["left", "right"] | None = None
    batch_size: PositiveInt = 16
    max_length: PositiveInt | None = None
    progress: bool = False
    dtype: Dtype = "float32"

    @property
    def scale(self) -> Literal["logit", "unbounded"]:
        return "unbounded" if self.threshold is None else "logit"


class JudgeScorer(Section):
    """The LLM safety judge (after Safety LLaMA); `guidelines`: a text file, None for our own.

    `model`: also a LoRA adapter, on the base that it names. `prompt`: how it is asked. `calibration`: a file that
    `sara judge-agreement` fitted for this very judge. `shared_prefix`: the guidelines are computed once (same numbers,
    faster). `server`: where `model` is the name of a model that is served there. `cache`: a file of verdicts that are
    there already.
    """

    type: Literal["judge"] = "judge"
    model: str
    server: Server | None = None
    guidelines: str | None = None
    mode: Literal["score", "explain"] = "score"
    prompt: Literal["slots", "two_shot", "safety_llama"] = "slots"
    calibration: str | None = None
    cache: str | None = None
    batch_size: PositiveInt = 8
    max_length: PositiveInt = 2048
    shared_prefix: bool = True
    dtype: Dtype = "float32"
    quantization: Quantization | None = None

    @model_validator(mode="after")
    def _settings_of_its_kind(self) -> JudgeScorer:
        if self.server is not None and self.quantization is not None:
            raise ValueError("quantization: a server quantizes its model itself; leave the key out")
        if self.calibration is not None and (self.server is not None or self.mode == "explain"):
            raise ValueError("calibration: it fits one model in this process, in mode score")
        return self


class GuardScorer(Section):
    """P(safe) by a guard model of the Llama Guard or WildGuard kind. `cache`: as in `JudgeScorer`."""

    type: Literal["guard"] = "guard"
    model: str
    format: Literal["llama_guard", "wild_guard"]
    cache: str | None = None
    batch_size: PositiveInt = 8
    max_length: PositiveInt = 4096
    dtype: Dtype = "float32"


class ModerationScorer(Section):
    """P(safe) of the last answer by a moderation service of the OpenAI kind.

    `threshold`: the category score from which on an answer is bad; None: where the service flags it. `cache`: as in
    `JudgeScorer`.
    """

    type: Literal["moderation"] = "moderation"
    model: str
    server: Server
    threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    cache: str | None = None


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

    @model_validator(mode="after")
    def _both_have_a_0_1_score(self) -> Llama2Scorer:
        check_bounded(self.safety, key="safety")
        check_bounded(self.helpfulness, key="helpfulness")
        return self


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

    @model_validator(mode="after")
    def _parts_have_a_0_1_score(self) -> Minimum:
        for position, part in enumerate(self.parts):
            check_bounded(part, key=f"parts.{position}")
        return self


class Lagrangian(Section):
    """Safe RLHF's reward less its cost; `cost` is a safety scorer, whose negated raw score is the cost."""

    type: Literal["lagrangian"] = "lagrangian"
    reward: ScorerSpec
    cost: ScorerSpec
    multiplier: NonNegativeFloat = 1.0


ScorerSpec = Annotated[
    RewardModelScorer
    | HarmfulnessScorer
    | JudgeScorer
    | GuardScorer
    | ModerationScorer
    | RefusalScorer
    | PythonScorer
    | HttpScorer
    | Llama2Scorer
    | WeightedSum
    | Minimum
    | Lagrangian,
    Field(discriminator="type"),
]

SCORER_SECTIONS: tuple[type[Section], ...] = get_args(get_args(ScorerSpec)[0])


def check_bounded(spec: ScorerSpec, *, key: str) -> None:
    """ValueError when the section itself says that its scores have no bounds, where a 0-1 score is needed.

    Of other sections only the loaded scorer can tell.
    """
    scale = "unbounded" if isinstance(spec, WeightedSum | Lagrangian) else getattr(spec, "scale", None)
    if scale == "unbounded":
        raise ValueError(
            f"{key}: scores of type {spec.type} have no bounds, so they are no 0-1 scores; a function or server that "
            "has such scores says scale: probability or logit, absolute_harmfulness takes a threshold, and llama2 and "
            "minimum combine them"
        )


for _model in (Llama2Scorer, WeightedSum, Minimum, Lagrangian):
    _model.model_rebuild()
