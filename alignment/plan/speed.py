"""Seconds of an iteration from operations and bytes, at assumed shares of what a machine can do.

Operations are those of matrix products (2 a weight and token forward, twice that backward) and of attention. Texts are
as long as the recipe lets in, so these are upper ends; work and exchange between GPUs are taken to overlap.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from alignment.inputs import InputError
from alignment.plan.catalog import LoadedScorer, Setup, scorers_of
from alignment.plan.footprint import scored_texts, scorer_texts
from alignment.plan.layout import Layout
from alignment.plan.memory import Loaded, Texts, gathered_weights, states_of
from alignment.plan.ppo_models import PpoModels, longest_prompt
from alignment.recipe import HarmfulnessModelRecipe, PpoRecipe, RejectionSamplingRecipe, RewardModelRecipe, SftRecipe

LAYER_LAUNCH = 0.8e-3
"""Assumed least seconds of a layer for each token drawn: transformers starts its kernels one by one."""

_FLOAT32 = {"highest": 1 / 16, "high": 1 / 2, "medium": 1.0}
"""Share of the bfloat16 rate that products of float32 weights reach, by float32_matmul_precision."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A GPU: bfloat16 TFLOP/s, the share of them that training reaches, GB/s of its memory, GB/s to other GPUs."""

    tflops: float = 312.0
    mfu: float = 0.4
    bandwidth: float = 2000.0
    network: float | None = None

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value is not None and value <= 0:
                raise InputError(f"command line: --{name} must be above 0, got {value}")
        if self.mfu > 1:
            raise InputError(f"command line: --mfu is a share of the TFLOP/s, at most 1, got {self.mfu}")

    def link(self, layout: Layout) -> float:
        """GB/s between GPUs: as given, else one 200 Gb/s adapter a GPU between nodes and NVLink within one."""
        return self.network or (25.0 if layout.nodes > 1 else 250.0)


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds on a machine under a layout."""

    machine: Machine
    layout: Layout
    precision: str = "highest"

    def compute(self, model: Loaded, operations: float) -> float:
        share = _FLOAT32[self.precision] if model.numerics.compute == 4 else 1.0
        return operations / (self.machine.tflops * 1e12 * self.machine.mfu * share)

    def exchange(self, size: float) -> float:
        """Bytes that each GPU takes from the others."""
        return self.send(size) if self.layout.gpus > 1 else 0.0

    def send(self, size: float) -> float:
        """Bytes to another GPU."""
        return size / (self.machine.link(self.layout) * 1e9)

    def read(self, model: Loaded, texts: Texts, *, head_tokens: int = 0) -> float:
        """A forward pass."""
        return self.compute(model, forward_operations(model, texts, head_tokens=head_tokens))

    def draw(self, model: Loaded, prompts: Texts, answer: int) -> float:
        """Reading prompts, then drawing answers, a token of each row at a time."""
        cached = kv_bytes_per_token(model) * prompts.rows * (prompts.length + answer / 2)
        token = max(
            LAYER_LAUNCH * model.shape.num_layers,
            (weights_read(model) + cached) / (self.machine.bandwidth * 1e9),
            self.read(model, Texts(prompts.rows, 1), head_tokens=prompts.rows),
        )
        return self.read(model, prompts, head_tokens=prompts.rows) + answer * token

    def learn(
        self, models: Sequence[Loaded], texts: Texts, *, batches: int, steps: int, head_tokens: int, again: bool
    ) -> float:
        """Forward and backward passes over `batches` micro-batches and `steps` exchanges of gradients.

        `again`: layers are computed a second time (gradient checkpointing). With LoRA the backward pass has no products
        for the gradients of frozen weights.
        """
        work = sum(
            self.read(model, texts, head_tokens=head_tokens) * ((3 if model.tuning == "full" else 2) + again)
            for model in models
        )
        gathered = 2 * gathered_weights(models, self.layout)
        whole = sum(states_of(model, dataclasses.replace(self.layout, zero_stage=0)).gradients for model in models)
        if self.layout.zero_stage == 3:
            return batches * max(work, self.exchange(gathered + whole))
        return max(batches * work, self.exchange(2 * whole * steps))


def forward_operations(model: Loaded, texts: Texts, *, head_tokens: int) -> float:
    """Of a forward pass over causal texts, with logits for `head_tokens` tokens."""
    s = model.shape
    attention = 2 * s.heads * s.head_dim * texts.length  # scores and sums over half of the pairs
    layers = texts.tokens * s.num_layers * (2 * s.layer + attention)
    return layers + 2 * s.hidden * s.vocab * head_tokens


def weights_read(model: Loaded) -> int:
    """Bytes that a token takes from memory; quantized weights are unpacked, written and read again."""
    unpacked = 2 * 2 * model.shape.quantizable if model.quantization else 0
    return model.weight_bytes + unpacked


def kv_bytes_per_token(model: Loaded) -> int:
    s = model.shape
    return 2 * s.num_layers * s.kv_heads * s.head_dim * model.numerics.compute


def seconds(setup: Setup, machine: Machine) -> tuple[str, dict[str, float]] | None:
    """What is counted (an iteration, an optimizer step, ...) and seconds by phase; None for other stages and CPUs."""
    if setup.layout.on_cpu:
        return None
    recipe, clock = setup.recipe, Clock(machine, setup.layout, setup.recipe.float32_matmul_precision)
    match recipe:
        case PpoRecipe():
            counted = "an iteration" if recipe.vllm is None else "an iteration, without the server's sampling"
            return counted, _ppo(PpoModels.of(setup), clock)
        case SftRecipe():
            texts = Texts(recipe.training.per_device_train_batch_size, recipe.data.max_length)
            model = setup.tuned("model", recipe.model, trainer=True)
            return "an optimizer step", {"update": _stepped(recipe, model, texts, clock, head_tokens=texts.tokens)}
        case RewardModelRecipe() | HarmfulnessModelRecipe():
            model = setup.tuned("model", recipe.model, head="sequence_classification", trainer=True)
            return "an optimizer step", {"update": _stepped(recipe, model, scored_texts(recipe), clock, head_tokens=0)}
        case RejectionSamplingRecipe():
            return f"{recipe.sampling.batch_size} prompts on each GPU", _best_of(setup, recipe, clock)
        case _:
            return None


def _stepped(
    recipe: SftRecipe | RewardModelRecipe | HarmfulnessModelRecipe,
    model: Loaded,
    texts: Texts,
    clock: Clock,
    *,
    head_tokens: int,
) -> float:
    batches, again = recipe.training.gradient_accumulation_steps, recipe.training.gradient_checkpointing
    return clock.learn([model], texts, batches=batches, steps=1, head_tokens=head_tokens, again=again)


def _ppo(models: PpoModels, clock: Clock) -> dict[str, float]:
    recipe, engine = models.recipe, models.engine
    rollout = models.rollout
    own = rollout.texts(models.rows)
    micro, answers = models.micro_batch, own.rows * rollout.answer
    batches = own.rows // micro.rows
    read = [*engine, *([models.reference] if models.reference is not None and models.reference.sharded else [])]
    passes = [*engine, *([models.reference] if models.reference is not None else [models.policy])]
    evaluated = max(
        sum(clock.read(model, own, head_tokens=answers) for model in passes),
        clock.exchange(batches * gathered_weights(read, models.layout)),
    )
    again = recipe.ppo.gradient_checkpointing
    learned = recipe.ppo.num_ppo_epochs * clock.learn(
        engine,
        micro,
        batches=batches,
        steps=recipe.ppo.batch_size // recipe.ppo.mini_batch_size,
        head_tokens=micro.rows * rollout.answer,
        again=again,
    )
    if models.mix is not None:
        tokens = models.mix.tokens
        learned += recipe.ppo.num_ppo_epochs * clock.learn(
            [models.policy], models.mix, batches=batches, steps=0, head_tokens=tokens, again=again
        )
    times = {**_drawn(models, clock), "log-probabilities": evaluated}
    if models.all_scorers:
        times["scoring"] = _scored(models.all_scorers, own, clock)
    return times | {"update": learned}


def _drawn(models: PpoModels, clock: Clock) -> dict[str, float]:
    """The rollout; with a server what it takes to send it the weights, which are gathered meanwhile."""
    recipe, asked = models.recipe, models.rollout
    if recipe.vllm is not None:
        return {"sending weights": clock.send(models.policy.shape.parameters * models.policy.numerics.weight)}
    rows = asked.texts(recipe.sampling.batch_size).rows
    drawn = -(-asked.rows // rows) * clock.draw(models.policy, Texts(rows, asked.prompt), asked.answer)
    return {"sampling": drawn + clock.exchange(gathered_weights(models.engine, models.layout))}


def _best_of(setup: Setup, recipe: RejectionSamplingRecipe, clock: Clock) -> dict[str, float]:
    policy = setup.frozen("policy", recipe.model, init=recipe.model_init)
    prompts = Texts(recipe.sampling.batch_size, longest_prompt(recipe.prompts.max_length, recipe.sampling))
    answer, samples = recipe.sampling.max_new_tokens, recipe.num_samples
    answered = Texts(prompts.rows * samples, prompts.length + answer)
    scorers = list(scorers_of(setup, recipe.scorer))
    return {
        "sampling": samples * clock.draw(policy, prompts, answer),
        "scoring": _scored(scorers, answered, clock),
    }


def _scored(scorers: Sequence[LoadedScorer], answered: Texts, clock: Clock) -> float:
    """One after another, each over all answers of a process."""

    def one(scorer: LoadedScorer) -> float:
        batch = scorer_texts(scorer, answered)
        gathered = -(-answered.rows // batch.rows) * scorer.model.weight_bytes if scorer.model.sharded else 0
        work = clock.read(scorer.model, dataclasses.replace(batch, rows=answered.rows))
        return max(work, clock.exchange(gathered))

    return sum(map(one, scorers))
