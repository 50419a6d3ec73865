"""Recipes of the stages that answer prompts and that let judges, or people, say what training data are worth."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from alignment.recipe_parts import Data, ModelInit, Sampling, StageRecipe
from alignment.recipe_scorers import Fraction, PositiveInt, ScorerSpec, Section, check_bounded


class RespondRecipe(StageRecipe):
    """A chat model answers prompts; every answer is kept, whatever it is worth (after Safety LLaMA, step 1)."""

    stage: Literal["respond"] = "respond"
    model: str
    model_init: ModelInit = ModelInit()
    prompts: Data
    num_samples: PositiveInt = 1
    sampling: Sampling = Sampling(temperature=0.5, top_p=0.9)

    @model_validator(mode="after")
    def _samples_differ(self) -> RespondRecipe:
        if self.num_samples > 1 and self.sampling.temperature == 0:
            raise ValueError("num_samples: answers at temperature 0 are all the same; raise it, or draw one")
        return self


class LabellingRecipe(StageRecipe):
    """Keys of stages whose labels become training data, so that the labellers must be known to agree with people.

    `agreement`: a report of `sara judge-agreement` on them; `min_balanced_accuracy`: what the lower end of the 95%
    interval must reach there; `allow_unmeasured`: label all the same, with a warning and a note in the manifest.
    `threshold`: P(safe) from which on an answer is safe. `max_unscored`: the stage fails above this share.
    """

    agreement: str | None = None
    min_balanced_accuracy: Annotated[float, Field(ge=0.5, lt=1)] = 0.7  # [GAP]
    allow_unmeasured: bool = False
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    max_unscored: Fraction = 0.01

    machine_keys: ClassVar[frozenset[str]] = StageRecipe.machine_keys | {"max_unscored"}

    @property
    @abstractmethod
    def labellers(self) -> Mapping[str, ScorerSpec]:
        """Key of the recipe -> scorer, for those whose word alone makes a label."""


class LabelRecipe(LabellingRecipe):
    """The judge as auxiliary labeller: safety labels for pairs, a filter for conversations, pairs from answers.

    `min_gap`: of two answers to one prompt, the difference in P(safe) that makes one the better (`preferences`).
    """

    stage: Literal["label"] = "label"
    data: Data
    task: Literal["safety_labels", "filter", "preferences"] = "safety_labels"
    scorer: ScorerSpec
    min_gap: Annotated[float, Field(gt=0, le=1)] = 0.2  # [GAP]
    overwrite_labels: bool = False

    @model_validator(mode="after")
    def _labels_by_a_0_1_score(self) -> LabelRecipe:
        check_bounded(self.scorer, key="scorer")
        return self

    @property
    def labellers(self) -> Mapping[str, ScorerSpec]:
        return {"scorer": self.scorer}


class People(Section):
    """A labeller: the people whose labels the data bring."""

    type: Literal["people"] = "people"


Labeller = Annotated[People | ScorerSpec, Field(discriminator="type")]
Policy = Literal["first", "second", "agree_only", "unsafe_if_any"]


class JudgeDataRecipe(LabellingRecipe):
    """Answers, labelled by one or two labellers, become the conversations that a judge learns from (steps 2 and 3).

    `answers`: conversations; `pairs`: preferences, of which both answers are taken; `labelled`: answers that people
    labelled. `combine`: whose label counts. `model`: the judge to be trained, of which only the tokenizer is read;
    `guidelines`, `max_length`: as it will be asked. `modes`: the forms of the answer it learns. `balance`: as many
    unsafe answers as safe ones, by leaving some out.
    """

    stage: Literal["judge_data"] = "judge_data"
    model: str
    guidelines: str | None = None
    max_length: PositiveInt = 2048
    modes: Annotated[list[Literal["score", "explain"]], Field(min_length=1, max_length=2)] = ["score", "explain"]
    answers: Data | None = None
    pairs: Data | None = None
    labelled: Data | None = None
    first: Labeller
    second: Labeller | None = None
    combine: Policy = "agree_only"
    balance: bool = False
    max_unscored: Fraction = 0.2  # [GAP]

    @model_validator(mode="after")
    def _labellers_and_something_to_label(self) -> JudgeDataRecipe:
        if self.answers is None and self.pairs is None and self.labelled is None:
            raise ValueError("there is nothing to label: give answers, pairs or labelled")
        if len(set(self.modes)) != len(self.modes):
            raise ValueError(f"modes: {self.modes[0]} stands twice")
        if self.combine == "second" and self.second is None:
            raise ValueError("combine: second needs a second labeller")
        if isinstance(self.first, People) and isinstance(self.second, People):
            raise ValueError("second: people are the first labeller already, and have one label for an answer")
        for key, labeller in self.scorers.items():
            check_bounded(labeller, key=key)
        return self

    @property
    def scorers(self) -> dict[str, ScorerSpec]:
        """Key -> labeller, for those that are no people."""
        both = {"first": self.first, "second": self.second}
        return {key: given for key, given in both.items() if given is not None and not isinstance(given, People)}

    @property
    def labellers(self) -> Mapping[str, ScorerSpec]:
        """None where people must agree with every label."""
        if self.combine in ("first", "second"):
            return {key: scorer for key, scorer in self.scorers.items() if key == self.combine}
        people = isinstance(self.first, People) or isinstance(self.second, People)
        return {} if people and self.combine == "agree_only" else self.scorers
