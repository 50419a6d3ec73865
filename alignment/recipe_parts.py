"""What recipes of several stages have: how models are loaded, adapters, where data come from, training, sampling."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from alignment.recipe_scorers import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)
from reward.conversation import MAX_GRADE, fingerprint
from reward.dtype import Dtype


class ModelInit(Section):
    """How weights are loaded."""

    dtype: Dtype = "float32"
    attn_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    quantization: Literal["int8", "nf4"] | None = None


class Lora(Section):
    """Low-rank adapters. `last_layers`: adapt only the last n layers (None: all)."""

    r: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: Fraction = 0.0
    target_modules: str | list[str] = "all-linear"
    last_layers: PositiveInt | None = None


class Source(Section):
    """Where rows come from; see `alignment/sources.py` for the names.

    `path`: hub id or local file or folder in place of the source's own; `revision`: of a set on the hub; `weight`:
    share of the mixture (None: all); `columns`: our field -> column of the file, for `name: file`; `grade`: of the harm
    in each of its conversations, for sources that bring none.
    """

    name: str
    path: str | None = None
    revision: str | None = None
    split: str = "train"
    weight: PositiveFloat | None = None
    max_rows: PositiveInt | None = None
    columns: dict[str, str] | None = None
    grade: Annotated[float, Field(ge=0, le=MAX_GRADE)] | None = None


class Data(Section):
    """A mixture of sources. Rows longer than `max_length` tokens are dropped and counted, never cut."""

    sources: Annotated[list[Source], Field(min_length=1)]
    max_length: PositiveInt = 4096
    shuffle: bool = True


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
        """Of everything that changes the result: not of where it is written or how it is tracked.

        Of a path below `run_dir` the part below counts; what lies there counts by its content, as an input.
        """
        return fingerprint(self._movable(self.model_dump(mode="json", exclude=set(self.machine_keys))))

    def _movable(self, value: Any) -> Any:
        """`value` with `${run_dir}` for the run folder at the beginning of every path."""
        if isinstance(value, str):
            inner = self.below_run_dir(value)
            return value if inner is None else f"${{run_dir}}/{inner}"
        if isinstance(value, dict):
            return {key: self._movable(part) for key, part in value.items()}
        return [self._movable(part) for part in value] if isinstance(value, list) else value

    def below_run_dir(self, path: str) -> str | None:
        """What follows `run_dir` in a path below it; None for every other text."""
        if self.run_dir is None:
            return None
        folder = f"{self.run_dir.rstrip('/')}/"
        return path.removeprefix(folder).lstrip("/") if path.startswith(folder) else None
