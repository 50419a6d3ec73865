"""The models that a recipe names, as its processes will hold them, whether or not they exist yet."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.inputs import InputError, sections_of
from alignment.plan.layout import Layout
from alignment.plan.memory import Loaded, Numerics
from alignment.plan.shapes import read_config, shape_of
from alignment.policy import Head
from alignment.recipe import HarmfulnessModelRecipe, PpoRecipe, RewardModelRecipe, SftRecipe, StageRecipe
from alignment.recipe_file import RecipeError, load_recipe
from alignment.recipe_parts import Lora, ModelInit
from alignment.recipe_scorers import GuardScorer, HarmfulnessScorer, JudgeScorer, RewardModelScorer, ScorerSpec


class Catalog:
    """Names of models -> their configs.

    A folder that does not exist yet has the config of the model that its stage starts from, which the recipes beside
    this one tell, and those of the folders next to it.
    """

    def __init__(self, recipe: StageRecipe, path: Path, files: Mapping[str, Path] | None = None) -> None:
        self._run_dir = recipe.run_dir
        self._path = path
        self._files = files or {}

    def config(self, model: str) -> dict[str, Any]:
        """InputError when nothing tells what the model is made of."""
        named, seen = model, set[str]()
        while (config := read_config(model, self._files)) is None:
            seen.add(model)
            start = self._starts.get(model)
            if start is None or start in seen:
                raise InputError(
                    f"what {named} is made of cannot be told: no config.json, and no recipe nearby makes it; "
                    f"give one with --config-json {named}=CONFIG.json"
                )
            model = start
        return config

    @functools.cached_property
    def _starts(self) -> dict[str, str]:
        """Output folder -> the model that the stage which writes it starts from."""
        own_folder = sorted(self._path.parent.glob("*.yaml"))
        overrides = [] if self._run_dir is None else ["--run_dir", self._run_dir]
        starts: dict[str, str] = {}
        for file in sorted(self._path.parent.parent.glob("*/*.yaml")):
            if file not in own_folder:
                starts |= _start(file, [])
        for file in own_folder:
            starts |= _start(file, overrides)
        return starts


def _start(file: Path, overrides: list[str]) -> dict[str, str]:
    try:
        recipe = load_recipe(file, overrides)
    except RecipeError:  # a pipeline, or a file that is no recipe
        return {}
    if isinstance(recipe, SftRecipe | RewardModelRecipe | HarmfulnessModelRecipe | PpoRecipe):
        return {recipe.output_dir: recipe.model}
    return {}


@dataclass(frozen=True)
class Setup:
    """A recipe under a layout."""

    recipe: StageRecipe
    layout: Layout
    catalog: Catalog

    def tuned(self, name: str, model: str, *, head: Head = "causal_lm", trainer: bool = False) -> Loaded:
        """A model that the recipe trains."""
        recipe: Any = self.recipe
        init, lora = recipe.model_init, recipe.lora
        shape = shape_of(self.catalog.config(model), head=head, lora=lora)
        return Loaded(
            name,
            model,
            shape,
            Numerics.of(init, self.layout, trainer=trainer),
            tuning="full" if lora is None else "lora",
            tuned_layers=_tuned_layers(lora, shape.num_layers),
            quantization=init.quantization,
            attention=init.attn_implementation or "sdpa",
        )

    def frozen(
        self,
        name: str,
        model: str,
        *,
        init: ModelInit,
        head: Head = "causal_lm",
        numerics: Numerics | None = None,
        sharded: bool = False,
    ) -> Loaded:
        """A model that is only read; in the dtype of `init` unless `numerics` says otherwise.

        InputError when it is to be sharded and nothing shares it out.
        """
        if sharded and self.layout.zero_stage != 3:
            raise InputError(f"{name} is sharded, which needs ZeRO-3; launch with launch/zero3.yaml or the like")
        alone = dataclasses.replace(self.layout, deepspeed=False, bf16=False)
        return Loaded(
            name,
            model,
            shape_of(self.catalog.config(model), head=head),
            numerics or Numerics.of(init, alone),
            quantization=init.quantization,
            attention=init.attn_implementation or "sdpa",
            sharded=sharded,
        )


@dataclass(frozen=True)
class LoadedScorer:
    """A model that scores, with the largest batch that it reads."""

    model: Loaded
    batch_size: int
    max_length: int
    whole_length: bool
    """Its texts may be as long as `max_length`, whatever the conversation: guidelines stand in front of it."""


def loads_model(section: Any) -> bool:
    """Whether a process loads a model for this section of a scorer; combinations leave that to their parts."""
    if isinstance(section, JudgeScorer):
        return section.server is None
    return isinstance(section, RewardModelScorer | HarmfulnessScorer | GuardScorer)


def scorers_of(setup: Setup, spec: ScorerSpec, key: str = "scorer") -> Iterator[LoadedScorer]:
    """The models that a scorer section loads on each process."""
    for name, section in sections_of(spec, key):
        if not loads_model(section):
            continue
        scorer: Any = section
        init = ModelInit(dtype=scorer.dtype, quantization=getattr(scorer, "quantization", None))
        chat = isinstance(section, JudgeScorer | GuardScorer)
        model = scorer.path if isinstance(section, RewardModelScorer) else scorer.model
        head = "causal_lm" if chat else "sequence_classification"
        sharded = isinstance(section, RewardModelScorer) and section.sharded
        loaded = setup.frozen(name, model, init=init, head=head, sharded=sharded)
        yield LoadedScorer(loaded, scorer.batch_size, scorer.max_length, whole_length=chat)


def _tuned_layers(lora: Lora | None, num_layers: int) -> int:
    """Layers that autograd passes through: those from the first adapter on."""
    return num_layers if lora is None or lora.last_layers is None else min(lora.last_layers, num_layers)
