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
    Pass,
    States,
    Texts,
    buckets,
    forward_workspace,
    fused_head,
    gathered_weights,
    keeps_gradients,
    learning,
    live_weights,
    packs_of_weights,
    reading,
    sampled,
    states_of,
    step_bytes,
)
from alignment.plan.ppo_models import Asked, PpoModels, longest_prompt
from alignment.recipe import (
    ContextDistillationRecipe,
    EvaluateRecipe,
    HarmfulnessModelRecipe,
    JudgeAgreementRecipe,
    JudgeDataRecipe,
    LabelRecipe,
    PpoRecipe,
    RejectionSamplingRecipe,
    RespondRecipe,
    RewardModelRecipe,
    Sampling,
    SftRecipe,
)
from alignment.recipe_data import data_of
from alignment.recipe_scorers import ScorerSpec


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
            return _sampling(setup, setup.recipe, setup.recipe.scorer)
        case RespondRecipe():
            return _sampling(setup, setup.recipe, None)
        case EvaluateRecipe():
            return _evaluate(setup, setup.recipe)
        case LabelRecipe() | JudgeDataRecipe() | JudgeAgreementRecipe():
            return _labelling(setup, setup.recipe)
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
    return _trained(setup, model, texts, head, checkpointing=recipe.training.gradient_checkpointing)


def _reward_model(setup: Setup, recipe: RewardModelRecipe | HarmfulnessModelRecipe) -> Footprint:
    model = setup.tuned("reward model", recipe.model, head="sequence_classification", trainer=True)
    training = recipe.training
    plan = _trained(setup, model, scored_texts(recipe), Head(0), checkpointing=training.gradient_checkpointing)
    if recipe.eval_data is None:
        return plan
    whole = setup.frozen("held out", recipe.model, init=recipe.model_init, head="sequence_classification")
    texts = Texts(16, recipe.eval_data.max_length)
    parts = {"whole model again": whole.weight_bytes, "activations": forward_workspace(whole, texts)}
    measured = Phase("measuring held-out pairs", plan.phases[0].held, parts)
    return dataclasses.replace(plan, phases=[*plan.phases, measured])


def _trained(setup: Setup, model: Loaded, texts: Texts, head: Head, *, checkpointing: bool) -> Footprint:
    roles, own = _roles([model], setup.layout), buckets([model], setup.layout)
    held = _held(roles, setup.layout) + own
    passes = [Pass(model, texts, head)]
    phases = _learning_phases(passes, [model], setup.layout, held=held, checkpointing=checkpointing)
    return Footprint(roles, phases, own, _host(roles, setup.layout))


# ------------------------------------------------------------------------------------------------------------------ PPO


def _ppo(models: PpoModels) -> Footprint:
    recipe, layout, engine = models.recipe, models.layout, models.engine
    reference = [] if models.reference is None else [models.reference]
    scorers = models.all_scorers
    roles = [*_roles(engine, layout), *_read_only([*reference, *(scorer.model for scorer in scorers)], layout)]
    own = buckets(engine, layout)
    held = _held(roles, layout) + own
    if recipe.vllm is None:
        switch = recipe.ppo.padding_free
        drawn = (_drawn_parts(models.policy, asked, recipe.sampling, padding_free=switch) for asked in models.asked)
        largest = max(drawn, key=lambda parts: sum(parts.values()))
        sampling = {"gathered weights": gathered_weights(engine, layout), **largest}
    else:
        sampling = {"packs of weights": packs_of_weights(models.policy, layout)}
    activations, logits = reading(models.passes(learning=False))
    gathered = live_weights(engine, layout) + _live_if_sharded(reference, layout)
    evaluation = {"gathered weights": gathered, "activations": activations, "logits": logits}
    phases = [Phase("sampling", held, sampling), Phase("log-probabilities", held, evaluation)]
    if scorers:
        live = max(_live_if_sharded([scorer.model], layout) for scorer in scorers)
        activations = max(_scoring(own, asked.texts(asked.rows)) for own, asked in models.scored)
        phases.append(Phase("scoring", held, {"gathered weights": live, "activations": activations}))
    checkpointing = recipe.ppo.gradient_checkpointing
    phases += _learning_phases(models.passes(learning=True), engine, layout, held=held, checkpointing=checkpointing)
    notes = [] if recipe.vllm is None else ["a server samples: its memory and the time that it takes are not counted"]
    return Footprint(roles, phases, own, _host(roles, layout), notes)


# ----------------------------------------------------------------------- stages that sample and score, and nothing else


def _sampling(
    setup: Setup, recipe: RejectionSamplingRecipe | ContextDistillationRecipe | RespondRecipe, scorer: ScorerSpec | None
) -> Footprint:
    policy = setup.frozen("policy", recipe.model, init=recipe.model_init)
    scorers = [] if scorer is None else list(scorers_of(setup, scorer))
    roles = _read_only([policy, *(scorer.model for scorer in scorers)], setup.layout)
    held = _held(roles, setup.layout)
    prompt = recipe.sampling.max_prompt_tokens  # of context distillation: with its preprompt
    if not isinstance(recipe, ContextDistillationRecipe):
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
    answered = prompt + recipe.sampling.max_new_tokens
    asked = [(name, spec, answered) for name, spec in (recipe.violation_scorers | recipe.quality_scorers).items()]
    for name, part in recipe.reward_models.items():
        asked.append((f"reward_models.{name}", part.scorer, part.data.max_length))
    known: list[ScorerSpec] = []
    scorers: list[LoadedScorer] = []
    for name, spec, longest in asked:
        loaded = list(scorers_of(setup, spec, name))
        held = sum(scorer.model.weight_bytes for scorer in loaded)
        if loaded:
            phases.append(Phase(f"scoring by {name}", held, {"activations": _scoring(loaded, Texts(128, longest))}))
        if spec not in known:
            known.append(spec)
            scorers += loaded
    roles = _read_only([policy, *(scorer.model for scorer in scorers)], setup.layout)
    return Footprint(roles, phases, notes=["checkpoints and scorers are loaded one after another, not together"])


def _labelling(setup: Setup, recipe: LabelRecipe | JudgeDataRecipe | JudgeAgreementRecipe) -> Footprint:
    """One labeller is loaded at a time, with all its parts."""
    specs = recipe.labellers if isinstance(recipe, LabelRecipe) else recipe.scorers
    longest = max(data.max_length for _, data, _ in data_of(recipe))
    roles: list[Role] = []
    phases: list[Phase] = []
    for key, spec in specs.items():
        scorers = list(scorers_of(setup, spec, key))
        own = _read_only([scorer.model for scorer in scorers], setup.layout)
        if scorers:
            texts = Texts(max(scorer.batch_size for scorer in scorers), longest)
            parts = {"activations": _scoring(scorers, texts)}
            name = "scoring" if len(specs) == 1 else f"scoring by {key}"
            phases.append(Phase(name, _held(own, setup.layout), parts))
        roles += own
    return Footprint(roles, phases or [Phase("scoring", 0, {})])


# -------------------------------------------------------------------------------------------------------- shared pieces


def _roles(engine: Sequence[Loaded], layout: Layout) -> list[Role]:
    return [Role(model, states_of(model, layout)) for model in engine]


def _read_only(models: Sequence[Loaded], layout: Layout) -> list[Role]:
    return [Role(model, States(model.weight_bytes // (layout.gpus if model.sharded else 1), 0, 0)) for model in models]


def _live_if_sharded(models: Sequence[Loaded], layout: Layout) -> int:
    """Weights of models that are only read, gathered while they work."""
    return sum(live_weights([model], layout) for model in models if model.sharded)


def _held(roles: Sequence[Role], layout: Layout) -> int:
    gradients = sum(role.states.gradients for role in roles) if keeps_gradients(layout) else 0
    return gradients + sum(role.states.weights + role.states.optimizer for role in roles)


def _host(roles: Sequence[Role], layout: Layout) -> int:
    return sum(role.states.host for role in roles) * layout.gpus_per_node


def _learning_phases(
    passes: Sequence[Pass], models: Sequence[Loaded], layout: Layout, *, held: int, checkpointing: bool
) -> list[Phase]:
    activations, logits = learning(passes, checkpointing=checkpointing)
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
    asked = Asked(sampling.batch_size, prompt, sampling.max_new_tokens)
    return Phase("sampling", held, _drawn_parts(policy, asked, sampling))


def _drawn_parts(policy: Loaded, asked: Asked, sampling: Sampling, *, padding_free: bool = True) -> dict[str, int]:
    """A batch of answers."""
    answered = asked.texts(sampling.batch_size)
    prompts = Texts(answered.rows, asked.prompt, masked=not (padding_free and policy.reads_rows))
    cache, activations = sampled(policy, prompts, answered)
    return {"KV cache": cache, "activations": activations}


def _scoring(scorers: Sequence[LoadedScorer], answered: Texts) -> int:
    """The largest forward pass of a scorer over a process's answers."""
    return max(forward_workspace(scorer.model, scorer_texts(scorer, answered)) for scorer in scorers)


def scorer_texts(scorer: LoadedScorer, answered: Texts) -> Texts:
    """The largest batch of a scorer, of the answers that there are."""
    length = scorer.max_length if scorer.whole_length else min(scorer.max_length, answered.length)
    return Texts(min(scorer.batch_size, answered.rows), length)
