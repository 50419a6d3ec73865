"""The recipe of PPO: its settings, and which of them fit together."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from alignment.recipe_health import Health, Probes
from alignment.recipe_parts import Data, Lora, ModelInit, Optimizer, Sampling, StageRecipe
from alignment.recipe_scorers import (
    Finite,
    Fraction,
    Lagrangian,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ScorerSpec,
    Section,
)
from reward.conversation import fingerprint
from reward.wire import parse_url


class Ppo(Optimizer):
    """Hyperparameters of PPO (Llama 2, section 3.2.3). Batch sizes count prompts over all processes.

    `kl_target`: nats per answer at which the coefficient is held (Ziegler et al. 2019; None: it stays fixed), within
    about `kl_horizon` answers. `multiplier_learning_rate`: with a Lagrangian scorer, the step by which its multiplier
    follows the mean cost over `cost_limit` (Safe RLHF; None: it stays fixed). `whiten_scores`: branch, the answers that
    one model of a piecewise score decides on are whitened by themselves, for models whose scores differ in scale (one
    that is alone in its branch counts as average, so batches should be large); running, by all scores so far.
    `reference`: sharded, each process holds a part of the reference model (ZeRO-3), for models that do not fit twice.
    `padding_free`: the texts of a micro-batch lie behind each other in one row, if the model's attention is `sdpa` over
    all that precedes; else they are padded.
    """

    learning_rate: PositiveFloat = 1e-6
    lr_scheduler_type: Literal["cosine", "cosine_with_min_lr", "linear", "constant"] = "constant"
    num_iterations: PositiveInt = 400
    batch_size: PositiveInt = 512
    mini_batch_size: PositiveInt = 64
    per_device_batch_size: PositiveInt = 4
    num_ppo_epochs: PositiveInt = 1
    num_generations: Annotated[int, Field(ge=2)] = 8
    clip_range: PositiveFloat = 0.2
    kl_coef: NonNegativeFloat = 0.01
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"  # [GAP]
    kl_in: Literal["reward", "loss"] = "reward"  # [GAP]
    kl_target: PositiveFloat | None = None
    kl_horizon: PositiveInt = 10_000
    gamma: Fraction = 1.0  # [GAP]
    lam: Fraction = 0.95  # [GAP]
    value_coef: NonNegativeFloat = 0.1  # [GAP]
    value_clip_range: PositiveFloat = 0.2  # [GAP]
    value_trunk: Literal["shared", "separate", "adapter"] = "separate"  # [GAP]
    value_learning_rate: PositiveFloat | None = None
    critic_warmup_iterations: NonNegativeInt = 0  # [GAP] the first ones, in which the policy stays as it is
    whiten_scores: Literal["none", "batch", "branch", "running"] = "batch"  # [GAP] over what
    whiten_advantages: bool = True  # [GAP]
    missing_eos_penalty: NonNegativeFloat = 1.0  # [GAP] subtracted from the whitened score of an answer cut off
    ptx_coef: NonNegativeFloat = 0.0
    multiplier_learning_rate: PositiveFloat | None = None
    multiplier_max: PositiveFloat = 5.0
    cost_limit: Finite = 0.0
    eval_steps: PositiveInt = 10
    eval_temperature: NonNegativeFloat = 0.0
    early_stopping_patience: PositiveInt | None = None
    reference: Literal["whole", "sharded"] = "whole"
    gradient_checkpointing: bool = False
    padding_free: bool = True
    save_steps: PositiveInt = 10
    save_total_limit: PositiveInt = 2

    @model_validator(mode="after")
    def _batches_divide(self) -> Ppo:
        if self.batch_size % self.mini_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of mini_batch_size {self.mini_batch_size}"
            )
        return self

    @model_validator(mode="after")
    def _coefficient_can_follow(self) -> Ppo:
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError("kl_target: a kl_coef of 0 is multiplied and stays 0; start it above 0")
        if self.kl_target is not None and self.kl_horizon <= self.batch_size:
            raise ValueError(
                f"kl_horizon {self.kl_horizon} must be above batch_size {self.batch_size}: both count answers, and the "
                "coefficient moves by up to a fifth of their ratio in an iteration"
            )
        return self


_OF_ALL_TRAINERS = {
    *Optimizer.model_fields,
    *("num_iterations", "batch_size", "mini_batch_size", "per_device_batch_size", "num_ppo_epochs", "num_generations"),
    *("clip_range", "kl_coef", "gradient_checkpointing", "save_steps", "save_total_limit"),
}
"""Settings that TRL's trainers have as well; its KL estimators and their places are its own."""
_OF_ALL_SAMPLING = {"temperature", "top_p", "max_new_tokens", "max_prompt_tokens"}
_OF_PPO_ALONE = (
    *("value_model", "ptx_data", "eval_prompts", "probes", "gold_scorer", "gold_steps", "max_unscored"),
    *("health", "vllm"),
)


class Vllm(Section):
    """A server of `trl vllm-serve` that draws all answers of PPO's policy (of rollouts, probes and held-out prompts),
    with its weights in it.

    `group_port`: of the main process, where the server fetches the weights. `timeout_seconds`: of one request, the
    taking of all weights included. `concurrency`: requests on their way at one time.
    """

    base_url: str
    group_port: Annotated[int, Field(ge=1, le=65535)] = 51216
    timeout_seconds: PositiveFloat = 240.0
    concurrency: PositiveInt = 64

    @model_validator(mode="after")
    def _usable_url(self) -> Vllm:
        try:
            parse_url(self.base_url, with_token=False)
        except ValueError as error:
            raise ValueError(f"base_url: {error}") from error
        return self


class PpoRecipe(StageRecipe):
    """PPO on the Llama 2 objective. `value_model`: a reward model to start the separate value model from.
    `trainer`: rloo and grpo are baselines by TRL.

    `ptx_data`: conversations of the pretraining mix, weighted by `ppo.ptx_coef`. `eval_prompts`: held-out prompts, by
    whose mean score the final policy is chosen. `gold_scorer`: one that PPO never sees scores the rollout of every
    `gold_steps`-th iteration too. `max_unscored`: the run stops where the scorer leaves a larger share of an
    iteration's, or of the held-out, answers unscored. `health` changes nothing that is learned, so it is no part of the
    recipe's hash, nor is `max_unscored`; of `vllm` only whether it is there.
    """

    stage: Literal["ppo"] = "ppo"
    trainer: Literal["ppo", "rloo", "grpo"] = "ppo"
    model: str
    model_init: ModelInit = ModelInit()
    lora: Lora | None = None
    value_model: str | None = None
    prompts: Data
    ptx_data: Data | None = None
    eval_prompts: Data | None = None
    probes: Probes | None = None
    scorer: ScorerSpec
    gold_scorer: ScorerSpec | None = None
    gold_steps: PositiveInt = 1
    max_unscored: Fraction = 0.05  # [GAP]
    sampling: Sampling = Sampling(temperature=1.0)
    ppo: Ppo = Ppo()
    health: Health = Health()
    vllm: Vllm | None = None

    machine_keys: ClassVar[frozenset[str]] = StageRecipe.machine_keys | {"health", "vllm", "max_unscored"}

    @property
    def hash(self) -> str:
        return super().hash if self.vllm is None else fingerprint([super().hash, "vllm"])

    @model_validator(mode="after")
    def _value_model_needs_its_own_trunk(self) -> PpoRecipe:
        if self.value_model is not None and self.ppo.value_trunk != "separate":
            raise ValueError("value_model is only used with ppo.value_trunk: separate")
        if self.ppo.value_trunk == "adapter" and self.lora is None:
            raise ValueError("ppo.value_trunk: adapter needs lora: the value model is a second adapter of its kind")
        if self.model_init.quantization is not None and self.lora is None:
            raise ValueError("a quantized policy trains only with lora")
        if self.ppo.reference == "sharded" and self.lora is not None:
            raise ValueError("ppo.reference: with lora the reference is the adapter switched off; leave the key out")
        return self

    @model_validator(mode="after")
    def _a_server_takes_whole_weights(self) -> PpoRecipe:
        if self.vllm is not None and self.model_init.quantization is not None:
            raise ValueError(
                "vllm: the server takes whole weights, and model_init.quantization leaves none; leave one out"
            )
        return self

    @model_validator(mode="after")
    def _samples_from_the_policy(self) -> PpoRecipe:
        if self.sampling.top_p != 1 or self.sampling.temperature == 0:
            raise ValueError(
                "PPO needs samples from the policy itself: sampling.top_p 1.0 and a temperature above 0; with a filter "
                "the ratios and the KL are those of another distribution"
            )
        return self

    @model_validator(mode="after")
    def _parts_have_what_they_need(self) -> PpoRecipe:
        ppo = self.ppo
        if (self.ptx_data is None) != (ppo.ptx_coef == 0):
            raise ValueError("ptx_data and a ppo.ptx_coef above 0 need each other")
        if ppo.early_stopping_patience is not None and self.eval_prompts is None:
            raise ValueError("ppo.early_stopping_patience needs eval_prompts")
        if ppo.multiplier_learning_rate is None:
            return self
        if not (isinstance(self.scorer, Lagrangian) and self.scorer.multiplier > 0):
            raise ValueError(
                "ppo.multiplier_learning_rate needs a scorer of type lagrangian whose multiplier, where it begins, is "
                "above 0"
            )
        if self.eval_prompts is not None:
            raise ValueError("eval_prompts: scores under a multiplier that moves cannot be compared; leave one out")
        return self

    @model_validator(mode="after")
    def _group_trainers_know_fewer_keys(self) -> PpoRecipe:
        ppo = self.ppo
        if self.trainer == "ppo":
            if ppo.num_generations != Ppo.model_fields["num_generations"].default:
                raise ValueError("ppo.num_generations: PPO draws one answer a prompt; rloo and grpo draw groups")
            if self.lora is not None and self.lora.dropout > 0:
                raise ValueError("lora.dropout: with dropout PPO's ratios would compare another model than that drew")
            return self
        foreign = [name for name in _OF_PPO_ALONE if getattr(self, name) != type(self).model_fields[name].default]
        for key, section, known in (("ppo", ppo, _OF_ALL_TRAINERS), ("sampling", self.sampling, _OF_ALL_SAMPLING)):
            fields = type(section).model_fields
            foreign += [f"{key}.{n}" for n in fields if n not in known and getattr(section, n) != fields[n].default]
        if foreign:
            raise ValueError(f"trainer: {self.trainer} is TRL's and knows no {', '.join(foreign)}; leave these out")
        if ppo.batch_size % ppo.num_generations:
            raise ValueError(
                f"ppo.batch_size {ppo.batch_size} must be a multiple of ppo.num_generations {ppo.num_generations}: it "
                "counts answers here"
            )
        return self
