"""`Recipe`: one strict, frozen model per stage. Key names are those of transformers and TRL wherever they have one.

Defaults are the Llama 2 paper's (section 3 and appendix A.3 of arXiv 2307.09288); a comment marks each value on which
the paper is silent. Reading YAML, overrides and error messages is the business of `recipe_file.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from alignment.recipe_agreement import JudgeAgreementRecipe
from alignment.recipe_label import JudgeDataRecipe, LabelRecipe, RespondRecipe
from alignment.recipe_parts import Data, Lora, ModelInit, Sampling, StageRecipe, Training
from alignment.recipe_parts import Optimizer as Optimizer
from alignment.recipe_parts import Source as Source
from alignment.recipe_parts import WandbSettings as WandbSettings
from alignment.recipe_ppo import Ppo as Ppo
from alignment.recipe_ppo import PpoRecipe
from alignment.recipe_ppo import Vllm as Vllm
from alignment.recipe_scorers import (
    Finite,
    Fraction,
    NonNegativeFloat,
    ScorerSpec,
    Section,
    check_bounded,
)
from reward.conversation import RATINGS


class SftRecipe(StageRecipe):
    """Supervised fine-tuning, loss on the assistant's tokens only (Llama 2, section 3.1)."""

    stage: Literal["sft"] = "sft"
    model: str
    model_init: ModelInit = ModelInit()
    lora: Lora | None = None
    data: Data
    packing: bool = True
    training: Training = Training(
        learning_rate=2e-5, num_train_epochs=2.0, per_device_train_batch_size=8, gradient_accumulation_steps=8
    )


class RewardModelRecipe(StageRecipe):
    """A reward model (Llama 2, section 3.2). `margin` names a table of the paper or gives a number per rating.

    `shared_prefix`: the tokens that the two answers of a pair have in common are computed once (same numbers, faster).
    """

    stage: Literal["reward_model"] = "reward_model"
    model: str
    model_init: ModelInit = ModelInit()
    lora: Lora | None = None
    data: Data
    eval_data: Data | None = None
    margin: Literal["none", "small", "large"] | dict[str, Finite] = "none"
    auxiliary_loss_weight: NonNegativeFloat = 0.0  # [GAP] the paper prints no weight
    centering_coefficient: NonNegativeFloat = 0.0
    shared_prefix: bool = True
    training: Training = Training(
        learning_rate=1e-5,
        lr_scheduler_type="cosine_with_min_lr",
        warmup_ratio=0.03,
        warmup_min_steps=5,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=64,
    )

    @model_validator(mode="after")
    def _margin_names_every_rating(self) -> RewardModelRecipe:
        if isinstance(self.margin, dict) and set(self.margin) != set(RATINGS):
            raise ValueError(f"margin needs one number for each of {', '.join(RATINGS)}")
        return self


class HarmfulnessModelRecipe(StageRecipe):
    """A model of people's grades of harm, 0 to 4 (Safety-Tuned LLaMAs, arXiv 2309.07875).

    Texts over `data.max_length` tokens lose the end at `truncation_side`, and are counted.
    """

    stage: Literal["harmfulness_model"] = "harmfulness_model"
    model: str
    model_init: ModelInit = ModelInit()
    lora: Lora | None = None
    data: Data
    eval_data: Data | None = None
    truncation_side: Literal["left", "right"] = "left"
    training: Training = Training(  # [GAP] of the published models nothing is known but the base
        learning_rate=1e-5,
        lr_scheduler_type="linear",
        warmup_ratio=0.06,
        weight_decay=0.01,
        adam_beta2=0.999,
        adam_epsilon=1e-6,
        num_train_epochs=2.0,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=8,
    )


class RejectionSamplingRecipe(StageRecipe):
    """Best of K as new fine-tuning data (Llama 2, section 3.2.3). `keep_unfinished`: answers cut off may win too.

    `max_unscored`: the stage fails where the scorer leaves a larger share of all answers unscored.
    """

    stage: Literal["rejection_sampling"] = "rejection_sampling"
    model: str
    model_init: ModelInit = ModelInit()
    prompts: Data
    scorer: ScorerSpec
    num_samples: Annotated[int, Field(ge=2)] = 20  # [GAP] K; figure 26 uses 20
    keep_unfinished: bool = False
    max_unscored: Fraction = 0.2  # [GAP]
    sampling: Sampling = Sampling(temperature=1.2)

    machine_keys: ClassVar[frozenset[str]] = StageRecipe.machine_keys | {"max_unscored"}


class ContextDistillationRecipe(StageRecipe):
    """Safety context distillation (Llama 2, section 4.2.4); adversarial prompts only.

    `preprompts`: a file with one preprompt per paragraph (None: our own); `min_gain`: how much better, in raw score,
    the answer with the preprompt must be to be kept; `keep_unfinished`: also when it was cut off. `max_unscored`: the
    stage fails where the scorer leaves a larger share of all answers of either kind unscored.
    """

    stage: Literal["context_distillation"] = "context_distillation"
    model: str
    model_init: ModelInit = ModelInit()
    prompts: Data
    scorer: ScorerSpec
    preprompts: str | None = None
    min_gain: NonNegativeFloat = 0.0
    keep_unfinished: bool = False
    max_unscored: Fraction = 0.2  # [GAP]
    sampling: Sampling = Sampling(temperature=1.0)

    machine_keys: ClassVar[frozenset[str]] = StageRecipe.machine_keys | {"max_unscored"}


class PromptSet(Section):
    """A prompt set of an evaluation: `violation` counts unsafe answers, `false_refusal` counts needless refusals."""

    measures: Literal["violation", "false_refusal"]
    prompts: Data


class PreferenceSet(Section):
    """Held-out pairs on which a reward model is measured."""

    scorer: ScorerSpec
    data: Data


class EvaluateRecipe(StageRecipe):
    """Violation rate and false-refusal rate side by side for each checkpoint, by at least two independent scorers."""

    stage: Literal["evaluate"] = "evaluate"
    checkpoints: Annotated[dict[str, str], Field(min_length=1)]
    model_init: ModelInit = ModelInit()
    prompt_sets: Annotated[dict[str, PromptSet], Field(min_length=1)]
    violation_scorers: Annotated[dict[str, ScorerSpec], Field(min_length=2)]
    quality_scorers: dict[str, ScorerSpec] = {}
    reward_models: dict[str, PreferenceSet] = {}
    sampling: Sampling = Sampling(temperature=0.0)

    @model_validator(mode="after")
    def _violations_by_0_1_scores(self) -> EvaluateRecipe:
        for name, spec in self.violation_scorers.items():
            check_bounded(spec, key=f"violation_scorers.{name}")
        return self


class EvalRewardRecipe(StageRecipe):
    """What `sara eval-reward` measures; not a stage of a pipeline. `second`: a scorer to see the same answers with."""

    stage: Literal["eval_reward"] = "eval_reward"
    scorer: ScorerSpec
    second: ScorerSpec | None = None
    data: Data


RECIPES: dict[str, type[StageRecipe]] = {
    "sft": SftRecipe,
    "reward_model": RewardModelRecipe,
    "harmfulness_model": HarmfulnessModelRecipe,
    "rejection_sampling": RejectionSamplingRecipe,
    "ppo": PpoRecipe,
    "context_distillation": ContextDistillationRecipe,
    "respond": RespondRecipe,
    "label": LabelRecipe,
    "judge_data": JudgeDataRecipe,
    "judge_agreement": JudgeAgreementRecipe,
    "evaluate": EvaluateRecipe,
}


class Step(Section):
    """One step of a pipeline: a recipe, the launch file it runs under and overrides (dotted keys)."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    recipe: str
    launch: str | None = None
    overrides: dict[str, Any] = {}


class PipelineRecipe(Section):
    """An ordered list of steps that share a run folder. A step's own `launch` and `overrides` go before these."""

    run_dir: str
    launch: str = "launch/cpu.yaml"
    overrides: dict[str, Any] = {}
    steps: Annotated[list[Step], Field(min_length=1)]
    report: bool = True

    @model_validator(mode="after")
    def _names_differ(self) -> PipelineRecipe:
        names = [step.name for step in self.steps]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"the step name {repeated[0]!r} stands twice")
        return self
