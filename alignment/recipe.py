"""`Recipe`: one strict, frozen model per stage. Key names are those of transformers and TRL wherever they have one.

Defaults are the Llama 2 paper's (section 3 and appendix A.3 of arXiv 2307.09288); a comment marks each value on which
the paper is silent. Reading YAML, overrides and error messages is the business of `recipe_file.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from alignment.recipe_parts import Data, Lora, ModelInit
from alignment.recipe_parts import Source as Source
from alignment.recipe_scorers import (
    Finite,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ScorerSpec,
    Section,
    check_bounded,
)
from reward.conversation import RATINGS, fingerprint

# ----------------------------------------------------------------------------------------------- training


class Optimizer(Section):
    """AdamW as Llama 2 pre-trains and tunes (section 2.2)."""

    learning_rate: PositiveFloat
    lr_scheduler_type: Literal["cosine", "cosine_with_min_lr", "linear", "constant"] = "cosine"
    min_lr_ratio: Fraction = 0.1
    warmup_ratio: Fraction = 0.0
    warmup_min_steps: NonNegativeInt = 0
    weight_decay: NonNegativeFloat = 0.1
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.95
    adam_epsilon: PositiveFloat = 1e-5
    max_grad_norm: PositiveFloat = 1.0


class Training(Optimizer):
    """The part of TrainingArguments that a recipe may set."""

    num_train_epochs: PositiveFloat = 1.0
    max_steps: PositiveInt | None = None
    per_device_train_batch_size: PositiveInt = 1
    gradient_accumulation_steps: PositiveInt = 1
    gradient_checkpointing: bool = False
    group_by_length: bool = True
    logging_steps: PositiveInt = 10
    save_steps: PositiveInt = 200
    save_total_limit: PositiveInt = 2


class WandbSettings(Section):
    """Names of the W&B run; keys and mode come from the environment alone (WANDB_API_KEY, WANDB_MODE)."""

    project: str = "sara"
    group: str | None = None
    name: str | None = None
    tags: list[str] = []
    log_transcripts: bool = True


class Sampling(Section):
    """How answers are drawn. Temperature 0 is greedy."""

    temperature: NonNegativeFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: PositiveInt = 512
    max_prompt_tokens: PositiveInt = 2048
    batch_size: PositiveInt = 16


# ------------------------------------------------------------------------------------------------- stages


class StageRecipe(Section):
    """Keys of every stage. `run_dir` is what `${run_dir}` stands for in the other values.

    `float32_matmul_precision`: torch's setting of that name for weights in float32. `high` (TF32) and `medium`
    (bfloat16 products, float32 sums) are about twice as fast where the hardware has them, at a relative error near
    1e-3 and 1e-2.
    """

    stage: str
    output_dir: str
    run_dir: str | None = None
    seed: NonNegativeInt = 42
    float32_matmul_precision: Literal["highest", "high", "medium"] = "highest"
    report_to: Literal["none", "wandb"] = "none"
    wandb: WandbSettings = WandbSettings()

    machine_keys: ClassVar[frozenset[str]] = frozenset({"output_dir", "run_dir", "report_to", "wandb"})

    @property
    def hash(self) -> str:
        """Of everything that changes the result: not of where it is written or how it is tracked."""
        return fingerprint(self.model_dump(mode="json", exclude=set(self.machine_keys)))


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
    """Best of K as new fine-tuning data (Llama 2, section 3.2.3). `keep_unfinished`: answers cut off may win too."""

    stage: Literal["rejection_sampling"] = "rejection_sampling"
    model: str
    model_init: ModelInit = ModelInit()
    prompts: Data
    scorer: ScorerSpec
    num_samples: Annotated[int, Field(ge=2)] = 20  # [GAP] K; figure 26 uses 20
    keep_unfinished: bool = False
    sampling: Sampling = Sampling(temperature=1.2)


class ContextDistillationRecipe(StageRecipe):
    """Safety context distillation (Llama 2, section 4.2.4); adversarial prompts only.

    `preprompts`: a file with one preprompt per paragraph (None: our own); `min_gain`: how much better, in raw score,
    the answer with the preprompt must be to be kept; `keep_unfinished`: also when it was cut off.
    """

    stage: Literal["context_distillation"] = "context_distillation"
    model: str
    model_init: ModelInit = ModelInit()
    prompts: Data
    scorer: ScorerSpec
    preprompts: str | None = None
    min_gain: NonNegativeFloat = 0.0
    keep_unfinished: bool = False
    sampling: Sampling = Sampling(temperature=1.0)


class LabelRecipe(StageRecipe):
    """The judge as auxiliary labeller: adds safety labels to preference pairs or filters conversations."""

    stage: Literal["label"] = "label"
    data: Data
    task: Literal["safety_labels", "filter"] = "safety_labels"
    scorer: ScorerSpec
    threshold: Fraction = 0.5
    max_unscored: Fraction = 0.01
    overwrite_labels: bool = False

    @model_validator(mode="after")
    def _labels_by_a_0_1_score(self) -> LabelRecipe:
        check_bounded(self.scorer, key="scorer")
        return self


class Ppo(Optimizer):
    """Hyperparameters of PPO (Llama 2, section 3.2.3). Batch sizes count prompts over all processes."""

    learning_rate: PositiveFloat = 1e-6
    lr_scheduler_type: Literal["cosine", "cosine_with_min_lr", "linear", "constant"] = "constant"
    num_iterations: PositiveInt = 400
    batch_size: PositiveInt = 512
    mini_batch_size: PositiveInt = 64
    per_device_batch_size: PositiveInt = 4
    num_ppo_epochs: PositiveInt = 1
    clip_range: PositiveFloat = 0.2
    kl_coef: NonNegativeFloat = 0.01
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"  # [GAP]
    gamma: Fraction = 1.0  # [GAP]
    lam: Fraction = 0.95  # [GAP]
    value_coef: NonNegativeFloat = 0.1  # [GAP]
    value_clip_range: PositiveFloat = 0.2  # [GAP]
    value_trunk: Literal["shared", "separate"] = "separate"  # [GAP]
    value_learning_rate: PositiveFloat | None = None
    whiten_scores: bool = True
    whiten_advantages: bool = True  # [GAP]
    missing_eos_penalty: NonNegativeFloat = 1.0  # [GAP] subtracted from the whitened score of an answer cut off
    gradient_checkpointing: bool = False
    save_steps: PositiveInt = 10
    save_total_limit: PositiveInt = 2

    @model_validator(mode="after")
    def _batches_divide(self) -> Ppo:
        if self.batch_size % self.mini_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of mini_batch_size {self.mini_batch_size}"
            )
        return self


class PpoRecipe(StageRecipe):
    """PPO on the Llama 2 objective. `value_model`: a reward model to start the separate value model from."""

    stage: Literal["ppo"] = "ppo"
    model: str
    model_init: ModelInit = ModelInit()
    lora: Lora | None = None
    value_model: str | None = None
    prompts: Data
    scorer: ScorerSpec
    sampling: Sampling = Sampling(temperature=1.0)
    ppo: Ppo = Ppo()

    @model_validator(mode="after")
    def _value_model_needs_its_own_trunk(self) -> PpoRecipe:
        if self.value_model is not None and self.ppo.value_trunk == "shared":
            raise ValueError("value_model is only used with ppo.value_trunk: separate")
        if self.model_init.quantization is not None and self.lora is None:
            raise ValueError("a quantized policy trains only with lora")
        return self

    @model_validator(mode="after")
    def _samples_from_the_policy(self) -> PpoRecipe:
        if self.sampling.top_p != 1 or self.sampling.temperature == 0:
            raise ValueError(
                "PPO needs samples from the policy itself: sampling.top_p 1.0 and a temperature above 0; with a filter "
                "the ratios and the KL are those of another distribution"
            )
        return self


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
    "label": LabelRecipe,
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
