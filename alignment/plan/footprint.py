"""A recipe under a layout -> roles and states on each GPU, and what every phase of the stage adds to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from alignment.inputs import InputError
from alignment.plan.catalog import LoadedScorer, Setup, scorers_of
from alignment.plan.layout import Layout
from alignment.plan.memory import (
    CONTEXT,
    Head,
    Loaded,
    States,
    Texts,
    buckets,
    drawing,
    forward_workspace,
    fused_head,
    gathered_weights,
    keeps_gradients,
    kv_cache,
    learning,
    live_weights,
    ppo_head,
    reading,
    states_of,
    step_bytes,
)
from alignment.recipe import (
    ContextDistillationRecipe,
    EvaluateRecipe,
    HarmfulnessModelRecipe,
    LabelRecipe,
    PpoRecipe,
    RejectionSamplingRecipe,
    RewardModelRecipe,
    Sampling,
    SftRecipe,
)


@dataclass(frozen=True, slots=True)
class Role:
    """A model and what it keeps on each GPU."""

    model: Loaded
    states: States


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the stage: `held` is there all the time, `parts` come and go with the phase."""

    name: str
    held: int
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return CONTEXT + self.held + sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes on each GPU. `buckets`: the engine's own. `host`: in the memory of a node, on top of what loading takes."""

    roles: Sequence[Role]
    phases: Sequence[Phase]
    buckets: int = 0
    host: int = 0
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)


def footprint(setup: Setup) -> Footprint:
    """What the stage needs on each GPU at the longest texts that its recipe lets in."""
    match setup.recipe:
        case SftRecipe():
            return _sft(setup, setup.recipe)
        case RewardModelRecipe() | HarmfulnessModelRecipe():
            return _reward_model(setup, setup.recipe)
        case PpoRecipe():
            return _ppo(PpoModels.of(setup))
        case RejectionSamplingRecipe() | ContextDistillationRecipe():
            return _sampling(setup, setup.recipe)
        case EvaluateRecipe():
            return _evaluate(setup, setup.recipe)
        case LabelRecipe():
            return _label(setup, setup.recipe)
        case _:
            raise InputError(f"a plan knows no stage {setup.recipe.stage!r}")


# --------------------------------------------------------------------------------------------- stages on TRL's trainers


def sft_texts(recipe: SftRecipe) -> Texts:
    """A micro-batch; packed windows stand in one row behind each other."""
    rows, length = recipe.training.per_device_train_batch_size, recipe.data.max_length
    return Texts(1, rows * length) if recipe.packing else Texts(rows, length)


def scored_texts(recipe: RewardModelRecipe | HarmfulnessModelRecipe) -> Texts:
    """A micro-batch of pairs, or of graded texts; with shared prefixes both answers of a pair stand in one row."""
    rows, length = recipe.training.per_device_train_batch_size, recipe.data.max_length
    if isinstance(recipe, HarmfulnessModelRecipe):
        return Texts(rows, length)
    return Texts(rows, 2 * length) if recipe.shared_prefix else Texts(2 * rows, length)


def _sft(setup: Setup, recipe: SftRecipe) -> Footprint:
    model = setup.tuned("model", recipe.model, trainer=True)
    texts = sft_texts(recipe)
    head = fused_head(model, texts.tokens)
    return _trained(setup, [model], texts, head, checkpointing=recipe.training.gradient_checkpointing)


def _reward_model(setup: Setup, recipe: RewardModelRecipe | HarmfulnessModelRecipe) -> Footprint:
    model = setup.tuned("reward model", recipe.model, head="sequence_classification", trainer=True)
    training = recipe.training
    plan = _trained(setup, [model], scored_texts(recipe), Head(0), checkpointing=training.gradient_checkpointing)
    if recipe.eval_data is None:
        return plan
    whole = setup.frozen("held out", recipe.model, init=recipe.model_init, head="sequence_classification")
    texts = Texts(16, recipe.eval_data.max_length)
    parts = {"whole model again": whole.weight_bytes, "activations": forward_workspace(whole, texts)}
    measured = Phase("measuring held-out pairs", plan.phases[0].held, parts)
    return dataclasses.replace(plan, phases=[*plan.phases, measured])


def _trained(setup: Setup, models: Sequence[Loaded], texts: Texts, head: Head, *, checkpointing: bool) -> Footprint:
    roles = _roles(models, setup.layout)
    own = buckets(models, setup.layout)
    held = _held(roles, setup.layout) + own
    phases = _learning_phases(models, setup.layout, texts, head, held=held, checkpointing=checkpointing)
    return Footprint(roles, phases, own, _host(roles, setup.layout))


# ------------------------------------------------------------------------------------------------------------------ PPO


@dataclass(frozen=True)
class PpoModels:
    """The models of PPO and the sizes of its batches on one process."""

    recipe: PpoRecipe
    layout: Layout
    policy: Loaded
    value: Loaded | None
    reference: Loaded | None
    scorers: Sequence[LoadedScorer]

    @classmethod
    def of(cls, setup: Setup) -> PpoModels:
        """InputError when the batches do not divide among the GPUs, as in the stage itself."""
        recipe = setup.recipe
        assert isinstance(recipe, PpoRecipe)
        policy = setup.tuned("policy", recipe.model)
        value = reference = None
        if recipe.ppo.value_trunk == "separate":
            value = setup.tuned("value model", recipe.value_model or recipe.model, head="sequence_classification")
        else:
            policy = _with_value_head(policy)
        if recipe.lora is None:
            reference = setup.frozen("reference", recipe.model, init=recipe.model_init, numerics=policy.numerics)
        rows, left = divmod(recipe.ppo.mini_batch_size, setup.layout.gpus)
        if left or rows % min(recipe.ppo.per_device_batch_size, rows or 1):
            raise InputError(
                f"ppo.mini_batch_size {recipe.ppo.mini_batch_size} must divide into {setup.layout.gpus} processes x "
                f"per_device_batch_size {recipe.ppo.per_device_batch_size}"
            )
        return cls(recipe, setup.layout, policy, value, reference, list(scorers_of(setup, recipe.scorer)))

    @property
    def engine(self) -> list[Loaded]:
        return [self.policy] if self.value is None else [self.policy, self.value]

    @property
    def rows(self) -> int:
        """Answers of an iteration on one process."""
        return self.recipe.ppo.batch_size // self.layout.gpus

    @property
    def prompt_tokens(self) -> int:
        return longest_prompt(self.recipe.prompts.max_length, self.recipe.sampling)

    @property
    def answer_tokens(self) -> int:
        return self.recipe.sampling.max_new_tokens

    def texts(self, rows: int) -> Texts:
        """Prompts with answers, as many of them as a process has, at most `rows`."""
        return Texts(min(rows, self.rows), self.prompt_tokens + self.answer_tokens)

    @property
    def micro_batch(self) -> Texts:
        rows = self.recipe.ppo.mini_batch_size // self.layout.gpus
        return self.texts(min(self.recipe.ppo.per_device_batch_size, rows))


def _with_value_head(policy: Loaded) -> Loaded:
    """A head of one output on the policy's trunk."""
    shape, extra = policy.shape, policy.shape.hidden
    if policy.tuning == "lora":
        shape = dataclasses.replace(shape, adapter=shape.adapter + extra, adapter_head=shape.adapter_head + extra)
    else:
        shape = dataclasses.replace(shape, parameters=shape.parameters + extra)
    return dataclasses.replace(policy, name="policy and value head", shape=shape)


def longest_prompt(max_length: int, sampling: Sampling) -> int:
    """Tokens of the longest prompt that is sampled from."""
    return min(max_length, sampling.max_prompt_tokens)


def _ppo(models: PpoModels) -> Footprint:
    recipe, layout, engine = models.recipe, models.layout, models.engine
    frozen = [model for model in (models.reference, *(scorer.model for scorer in models.scorers)) if model is not None]
    roles = [*_roles(engine, layout), *_whole(frozen)]
    own = buckets(engine, layout)
    held = _held(roles, layout) + own
    rollout = models.texts(recipe.sampling.batch_size)
    sampling = {
        "gathered weights": 0,
        "KV cache": kv_cache(models.policy, rollout),
        "activations": drawing(models.policy, Texts(rollout.rows, models.prompt_tokens)),
    }
    answers = models.texts(recipe.ppo.per_device_batch_size)
    activations, logits = reading(engine, answers, ppo_head(models.policy, answers.rows, models.answer_tokens + 1))
    evaluation = {"gathered weights": live_weights(engine, layout), "activations": activations, "logits": logits}
    phases = [Phase("sampling", held, sampling), Phase("log-probabilities", held, evaluation)]
    if models.scorers:
        phases.append(Phase("scoring", held, {"activations": _scoring(models.scorers, models.texts(models.rows))}))
    micro = models.micro_batch
    head = ppo_head(models.policy, micro.rows, models.answer_tokens + 1)
    checkpointing = recipe.ppo.gradient_checkpointing
    phases += _learning_phases(engine, layout, micro, head, held=held, checkpointing=checkpointing)
    return Footprint(roles, phases, own, _host(roles, layout))


# ----------------------------------------------------------------------- stages that sample and score, and nothing else


def _sampling(setup: Setup, recipe: RejectionSamplingRecipe | ContextDistillationRecipe) -> Footprint:
    policy = setup.frozen("policy", recipe.model, init=recipe.model_init)
    scorers = list(scorers_of(setup, recipe.scorer))
    roles = _whole([policy, *(scorer.model for scorer in scorers)])
    held = _held(roles, setup.layout)
    prompt = recipe.sampling.max_prompt_tokens  # of context distillation: with its preprompt
    if isinstance(recipe, RejectionSamplingRecipe):
        prompt = longest_prompt(recipe.prompts.max_length, recipe.sampling)
    answered = Texts(recipe.sampling.batch_size, prompt + recipe.sampling.max_new_tokens)
    phases = [_drawn(policy, prompt, recipe.sampling, held=held)]
    if scorers:
        answered = dataclasses.replace(answered, rows=answered.rows * getattr(recipe, "num_samples", 2))
        phases.append(Phase("scoring", held, {"activations": _scoring(scorers, answered)}))
    return Footprint(roles, phases)


def _evaluate(setup: Setup, recipe: EvaluateRecipe) -> Footprint:
    """One checkpoint is loaded at a time, then one scorer at a time."""
    policies = [
        setup.frozen(f"checkpoint {name}", model, init=recipe.model_init) for name, model in recipe.checkpoints.items()
    ]
    policy = max(policies, key=lambda model: model.weight_bytes)
    prompt = longest_prompt(max(part.prompts.max_length for part in recipe.prompt_sets.values()), recipe.sampling)
    phases = [_drawn(policy, prompt, recipe.sampling, held=policy.weight_bytes)]
    specs = recipe.violation_scorers | recipe.quality_scorers
    known = list(specs.values())
    measured = {f"reward_models.{name}": part.scorer for name, part in recipe.reward_models.items()}
    specs |= {name: spec for name, spec in measured.items() if spec not in known}
    scorers: list[LoadedScorer] = []
    answered = Texts(128, prompt + recipe.sampling.max_new_tokens)
    for name, spec in specs.items():
        loaded = list(scorers_of(setup, spec, name))
        held = sum(scorer.model.weight_bytes for scorer in loaded)
        if loaded:
            phases.append(Phase(f"scoring by {name}", held, {"activations": _scoring(loaded, answered)}))
        scorers += loaded
    roles = _whole([policy, *(scorer.model for scorer in scorers)])
    return Footprint(roles, phases, notes=["checkpoints and scorers are loaded one after another, not together"])


def _label(setup: Setup, recipe: LabelRecipe) -> Footprint:
    scorers = list(scorers_of(setup, recipe.scorer))
    if not scorers:
        return Footprint([], [Phase("scoring", 0, {})])
    roles = _whole([scorer.model for scorer in scorers])
    texts = Texts(max(scorer.batch_size for scorer in scorers), recipe.data.max_length)
    return Footprint(roles, [Phase("scoring", _held(roles, setup.layout), {"activations": _scoring(scorers, texts)})])


# -------------------------------------------------------------------------------------------------------- shared pieces


def _roles(engine: Sequence[Loaded], layout: Layout) -> list[Role]:
    return [Role(model, states_of(model, layout)) for model in engine]


def _whole(models: Sequence[Loaded]) -> list[Role]:
    return [Role(model, States(model.weight_bytes, 0, 0)) for model in models]


def _held(roles: Sequence[Role], layout: Layout) -> int:
    gradients = sum(role.states.gradients for role in roles) if keeps_gradients(layout) else 0
    return gradients + sum(role.states.weights + role.states.optimizer for role in roles)


def _host(roles: Sequence[Role], layout: Layout) -> int:
    return sum(role.states.host for role in roles) * layout.gpus_per_node


def _learning_phases(
    models: Sequence[Loaded], layout: Layout, texts: Texts, head: Head, *, held: int, checkpointing: bool
) -> list[Phase]:
    activations, logits = learning(models, texts, head, checkpointing=checkpointing)
    gradients = 0 if keeps_gradients(layout) else sum(states_of(model, layout).gradients for model in models)
    update = {
        "gradients": gradients,
        "gathered weights": live_weights(models, layout),
        "activations": activations,
        "logits": logits,
    }
    step = {"gradients": gradients, "float32 gradients and moments": step_bytes(models, layout)}
    return [Phase("update", held, update), Phase("optimizer step", held, step)]


def _drawn(policy: Loaded, prompt: int, sampling: Sampling, *, held: int) -> Phase:
    texts = Texts(sampling.batch_size, prompt + sampling.max_new_tokens)
    parts = {
        "KV cache": kv_cache(policy, texts),
        "activations": drawing(policy, Texts(sampling.batch_size, prompt)),
    }
    return Phase("sampling", held, parts)


def _scoring(scorers: Sequence[LoadedScorer], answered: Texts) -> int:
    """The largest forward pass of a scorer over a process's answers."""
    return max(forward_workspace(scorer.model, scorer_texts(scorer, answered)) for scorer in scorers)


def scorer_texts(scorer: LoadedScorer, answered: Texts) -> Texts:
    """The largest batch of a scorer, of the answers that there are."""
    length = scorer.max_length if scorer.whole_length else min(scorer.max_length, answered.length)
    return Texts(min(scorer.batch_size, answered.rows), length)
