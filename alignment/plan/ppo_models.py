"""The models of PPO as its processes hold them, and the sizes of what goes through them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from alignment.inputs import InputError
from alignment.number_format import NO_MASTER_WEIGHTS
from alignment.plan.catalog import LoadedScorer, Setup, scorers_of
from alignment.plan.layout import Layout
from alignment.plan.memory import Loaded, Pass, Texts, mix_head, ppo_head
from alignment.recipe import PpoRecipe, Sampling
from alignment.recipe_fit import check_batches


@dataclass(frozen=True, slots=True)
class Asked:
    """Prompts that the policy answers: how many of them a process has, tokens of the longest prompt and answer."""

    rows: int
    prompt: int
    answer: int

    def texts(self, rows: int) -> Texts:
        """Prompts with answers, at most `rows`."""
        return Texts(min(rows, self.rows), self.prompt + self.answer)


@dataclass(frozen=True)
class PpoModels:
    """`value`: a model of its own, or an adapter of its own on the policy. PPO never sees `gold` and `violation`."""

    recipe: PpoRecipe
    layout: Layout
    policy: Loaded
    value: Loaded | None
    reference: Loaded | None
    scorers: Sequence[LoadedScorer]
    gold: Sequence[LoadedScorer]
    violation: Sequence[LoadedScorer]

    @classmethod
    def of(cls, setup: Setup) -> PpoModels:
        """InputError for trainers of TRL, and where the stage itself would refuse: batches that do not divide among the
        GPUs, full tuning in half precision without DeepSpeed."""
        recipe = setup.recipe
        assert isinstance(recipe, PpoRecipe)
        if recipe.trainer != "ppo":
            raise InputError(f"a plan knows trainer ppo alone, not TRL's {recipe.trainer}")
        policy = setup.tuned("policy", recipe.model)
        if recipe.lora is None and not setup.layout.deepspeed and policy.numerics.weight < 4:
            raise InputError(f"{setup.layout.launch}: {NO_MASTER_WEIGHTS.format(dtype=recipe.model_init.dtype)}")
        value = reference = None
        if recipe.ppo.value_trunk == "separate":
            value = setup.tuned("value model", recipe.value_model or recipe.model, head="sequence_classification")
            value = dataclasses.replace(
                value, shape=dataclasses.replace(value.shape, adapter_head=0)
            )  # in float32, too
        elif recipe.ppo.value_trunk == "adapter":
            value = _value_adapter(policy)
        else:
            policy = _with_value_head(policy)
        if recipe.lora is None:
            reference = setup.frozen(
                "reference",
                recipe.model,
                init=recipe.model_init,
                numerics=policy.numerics,
                sharded=recipe.ppo.reference == "sharded",
            )
        check_batches(recipe, processes=setup.layout.gpus)
        gold = violation = ()
        if recipe.gold_scorer is not None:
            gold = tuple(scorers_of(setup, recipe.gold_scorer, "gold_scorer"))
        if recipe.probes is not None:
            violation = tuple(scorers_of(setup, recipe.probes.violation_scorer, "probes.violation_scorer"))
        scorers = tuple(scorers_of(setup, recipe.scorer))
        return cls(recipe, setup.layout, policy, value, reference, scorers, gold, violation)

    @property
    def engine(self) -> list[Loaded]:
        return [self.policy] if self.value is None else [self.policy, self.value]

    @property
    def rows(self) -> int:
        """Answers of an iteration on one process."""
        return self.recipe.ppo.batch_size // self.layout.gpus

    @property
    def all_scorers(self) -> list[LoadedScorer]:
        return [*self.scorers, *self.gold, *self.violation]

    @property
    def rollout(self) -> Asked:
        """What PPO learns from."""
        sampling = self.recipe.sampling
        return Asked(self.rows, longest_prompt(self.recipe.prompts.max_length, sampling), sampling.max_new_tokens)

    @property
    def held_out(self) -> Asked | None:
        """How many there are shows when they are read: taken for as many as fill every batch."""
        data, sampling = self.recipe.eval_prompts, self.recipe.sampling
        if data is None:
            return None
        rows = max([sampling.batch_size, *(scorer.batch_size for scorer in self.scorers)])
        return Asked(rows, longest_prompt(data.max_length, sampling), sampling.max_new_tokens)

    @property
    def probes(self) -> Asked | None:
        """Both sets are answered together."""
        probes = self.recipe.probes
        if probes is None:
            return None
        longest = max(probes.adversarial.max_length, probes.borderline.max_length)
        rows = -(-2 * probes.max_prompts // self.layout.gpus)
        return Asked(rows, longest_prompt(longest, self.recipe.sampling), probes.max_new_tokens)

    @property
    def asked(self) -> list[Asked]:
        """All that is sampled, one after another."""
        return [asked for asked in (self.rollout, self.held_out, self.probes) if asked is not None]

    @property
    def scored(self) -> list[tuple[Sequence[LoadedScorer], Asked]]:
        """Which models score which answers."""
        pairs = [([*self.scorers, *self.gold], self.rollout), (self.scorers, self.held_out)]
        pairs.append((self.violation, self.probes))
        return [(scorers, asked) for scorers, asked in pairs if scorers and asked is not None]

    @property
    def micro_batch(self) -> Texts:
        rows = self.recipe.ppo.mini_batch_size // self.layout.gpus
        texts = self.rollout.texts(min(self.recipe.ppo.per_device_batch_size, rows))
        return dataclasses.replace(texts, masked=self._masked)

    @property
    def mix(self) -> Texts | None:
        """Conversations of the pretraining mix beside a micro-batch."""
        data = self.recipe.ptx_data
        return None if data is None else Texts(self.micro_batch.rows, data.max_length, masked=self._masked)

    @property
    def _masked(self) -> bool:
        models = [self.policy] if self.value is None else [self.policy, self.value]
        return not (self.recipe.ppo.padding_free and all(model.reads_rows for model in models))

    def passes(self, *, learning: bool) -> list[Pass]:
        """Of a micro-batch through the engine; the pretraining mix is read to learn from it alone."""
        texts = self.micro_batch
        found = [Pass(self.policy, texts, ppo_head(self.policy, texts.rows, self.rollout.answer))]
        if self.value is not None:
            found.append(Pass(self.value, texts))
        if learning and self.mix is not None:
            found.append(Pass(self.policy, self.mix, mix_head(self.policy, self.mix)))
        return found


def longest_prompt(max_length: int, sampling: Sampling) -> int:
    """Tokens of the longest prompt that is sampled from."""
    return min(max_length, sampling.max_prompt_tokens)


def _with_value_head(policy: Loaded) -> Loaded:
    """A head of one output on the policy's trunk."""
    shape, extra = policy.shape, policy.shape.hidden
    if policy.tuning == "lora":
        shape = dataclasses.replace(shape, adapter=shape.adapter + extra)
    else:
        shape = dataclasses.replace(shape, parameters=shape.parameters + extra)
    return dataclasses.replace(policy, name="policy and value head", shape=shape)


def _value_adapter(policy: Loaded) -> Loaded:
    """The policy's trunk with an adapter and a head of its own: nothing else is held twice."""
    head = policy.shape.hidden
    shape = dataclasses.replace(policy.shape, parameters=0, quantizable=0, adapter=policy.shape.adapter + head)
    return dataclasses.replace(policy, name="value adapter", shape=shape, quantization=None)
