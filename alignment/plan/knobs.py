"""What to turn when a recipe does not fit: changes with their new figures, those that cost least first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from alignment.plan.catalog import Setup, loads_model
from alignment.plan.footprint import footprint
from alignment.recipe import HarmfulnessModelRecipe, PpoRecipe, RewardModelRecipe, SftRecipe, Vllm
from alignment.recipe_parts import Lora
from alignment.recipe_scorers import HttpScorer, RewardModelScorer

_NOT_WORTH = 0.01
"""A change that saves a smaller share of the peak is left out."""


@dataclass(frozen=True, slots=True)
class Knob:
    """A change and the peak, in bytes, with it alone."""

    change: str
    peak: int


@dataclass(frozen=True, slots=True)
class Advice:
    """Changes that lower the peak when made alone, and a way to fit: changes to be made together, and their peak.

    Where nothing fits, the way is all that helps.
    """

    knobs: Sequence[Knob]
    way: Sequence[str]
    peak: int


def advise(setup: Setup, *, limit: float) -> Advice:
    """What brings the peak to `limit` bytes: changes as they come, then without those that are not needed."""
    peak = footprint(setup).peak.total
    tried = [Knob(_names(setup, [turn])[0], _peak(setup, [turn])) for turn in _TURNS if turn(setup) is not None]
    knobs = [knob for knob in tried if knob.peak <= (1 - _NOT_WORTH) * peak]
    way: list[Turn] = []
    least = peak
    for turn in _TURNS:
        if least <= limit:
            break
        if (with_it := _peak(setup, [*way, turn])) <= (1 - _NOT_WORTH) * least:
            way.append(turn)
            least = with_it
    for turn in reversed(way) if least <= limit else ():
        without = [other for other in way if other is not turn]
        if _peak(setup, without) <= limit:
            way = without
    return Advice(knobs, _names(setup, way), _peak(setup, way))


def _peak(setup: Setup, turns: Sequence[Turn]) -> int:
    for turn in turns:
        _, setup = turn(setup) or ("", setup)
    return footprint(setup).peak.total


def _names(setup: Setup, turns: Sequence[Turn]) -> list[str]:
    names: list[str] = []
    for turn in turns:
        name, setup = turn(setup) or ("", setup)
        names += [name] if name else []
    return names


Turn = Callable[[Setup], tuple[str, Setup] | None]
"""A change of a setup and its name; None where there is nothing to change."""


def _with(setup: Setup, change: str, **values: Any) -> tuple[str, Setup]:
    return change, dataclasses.replace(setup, recipe=setup.recipe.model_copy(update=values))


def _training(setup: Setup) -> tuple[str, Any] | None:
    """The section with the batch sizes of a stage that trains."""
    match setup.recipe:
        case PpoRecipe():
            return "ppo", setup.recipe.ppo
        case SftRecipe() | RewardModelRecipe() | HarmfulnessModelRecipe():
            return "training", setup.recipe.training
        case _:
            return None


def _checkpointing(setup: Setup) -> tuple[str, Setup] | None:
    name, section = _training(setup) or ("", None)
    if section is None or section.gradient_checkpointing:
        return None
    changed = section.model_copy(update={"gradient_checkpointing": True})
    return _with(setup, f"{name}.gradient_checkpointing: true (slower by a third)", **{name: changed})


def _one_row(setup: Setup) -> tuple[str, Setup] | None:
    """Micro-batches of one row; accumulation keeps the batch."""
    name, section = _training(setup) or ("", None)
    if section is None:
        return None
    key = "per_device_batch_size" if name == "ppo" else "per_device_train_batch_size"
    size = getattr(section, key)
    if size == 1:
        return None
    update = {key: 1}
    if name == "training":
        update["gradient_accumulation_steps"] = size * section.gradient_accumulation_steps
    kept = "" if name == "ppo" else f" and gradient_accumulation_steps: {update['gradient_accumulation_steps']}"
    return _with(setup, f"{name}.{key}: 1{kept}", **{name: section.model_copy(update=update)})


def _fewer_answers(setup: Setup) -> tuple[str, Setup] | None:
    """Fewer answers sampled at once."""
    sampling = getattr(setup.recipe, "sampling", None)
    if sampling is None or sampling.batch_size <= 4:
        return None
    return _with(setup, "sampling.batch_size: 4", sampling=sampling.model_copy(update={"batch_size": 4}))


def _map_scorers(value: Any, change: Callable[[BaseModel], BaseModel]) -> Any:
    """A section with every scorer in it that loads a model changed."""
    if loads_model(value):
        return change(value)
    if isinstance(value, BaseModel):
        update = {name: _map_scorers(getattr(value, name), change) for name in type(value).model_fields}
        return value.model_copy(update=update)
    if isinstance(value, list):
        return [_map_scorers(inner, change) for inner in value]
    return {name: _map_scorers(inner, change) for name, inner in value.items()} if isinstance(value, dict) else value


def _scorers(setup: Setup, change: str, values: Mapping[str, Any]) -> tuple[str, Setup] | None:
    recipe = _map_scorers(setup.recipe, lambda section: section.model_copy(update=values))
    return None if recipe == setup.recipe else (change, dataclasses.replace(setup, recipe=recipe))


def _scorer_batch(setup: Setup) -> tuple[str, Setup] | None:
    return _scorers(setup, "batch_size: 4 in every scorer", {"batch_size": 4})


def _scorer_dtype(setup: Setup) -> tuple[str, Setup] | None:
    return _scorers(setup, "dtype: bfloat16 in every scorer", {"dtype": "bfloat16"})


def _sharing(sharded: bool) -> Callable[[BaseModel], BaseModel]:
    """Reward models, which alone can be shared out, with that key."""
    return lambda section: (
        section.model_copy(update={"sharded": sharded}) if isinstance(section, RewardModelScorer) else section
    )


def _sharded_scorers(setup: Setup) -> tuple[str, Setup] | None:
    if not isinstance(setup.recipe, PpoRecipe) or setup.layout.zero_stage != 3 or setup.layout.gpus == 1:
        return None
    recipe = _map_scorers(setup.recipe, _sharing(True))
    change = "sharded: true in every reward model"
    return None if recipe == setup.recipe else (change, dataclasses.replace(setup, recipe=recipe))


def _scorer_elsewhere(setup: Setup) -> tuple[str, Setup] | None:
    elsewhere = HttpScorer(url="http://127.0.0.1:8300")
    recipe = _map_scorers(setup.recipe, lambda _: elsewhere)
    change = "scorers behind HTTP on GPUs of their own (type: http, sara serve-reward)"
    return None if recipe == setup.recipe else (change, dataclasses.replace(setup, recipe=recipe))


def _answers_elsewhere(setup: Setup) -> tuple[str, Setup] | None:
    recipe = setup.recipe
    if not isinstance(recipe, PpoRecipe) or recipe.vllm is not None or recipe.model_init.quantization is not None:
        return None
    change = "answers drawn by `trl vllm-serve` on GPUs of its own (vllm: {base_url: ...})"
    return _with(setup, change, vllm=Vllm(base_url="http://127.0.0.1:8000"))


def _to_stage(stage: int) -> Turn:
    def turn(setup: Setup) -> tuple[str, Setup] | None:
        recipe: Any = setup.recipe
        if _training(setup) is None or setup.layout.gpus == 1 or setup.layout.zero_stage >= stage:
            return None
        if recipe.model_init.quantization is not None:
            return None
        layout = setup.layout.at_stage(stage)
        return f"--launch {layout.launch}", dataclasses.replace(setup, layout=layout)

    return turn


def _offload(setup: Setup) -> tuple[str, Setup] | None:
    recipe: Any = setup.recipe
    if _training(setup) is None or setup.layout.offload_weights or recipe.model_init.quantization is not None:
        return None
    layout = setup.layout.at_stage(3, offload=True)
    change = f"--launch {layout.launch} (slower; weights and optimizer in host memory)"
    return change, dataclasses.replace(setup, layout=layout)


def _shared_trunk(setup: Setup) -> tuple[str, Setup] | None:
    recipe = setup.recipe
    if not isinstance(recipe, PpoRecipe) or recipe.ppo.value_trunk == "shared":
        return None
    ppo = recipe.ppo.model_copy(update={"value_trunk": "shared"})
    return _with(setup, "ppo.value_trunk: shared and value_model: null", ppo=ppo, value_model=None)


def _sharded_reference(setup: Setup) -> tuple[str, Setup] | None:
    recipe = setup.recipe
    if not isinstance(recipe, PpoRecipe) or recipe.lora is not None or recipe.ppo.reference == "sharded":
        return None
    if setup.layout.zero_stage != 3 or setup.layout.gpus == 1:
        return None
    return _with(setup, "ppo.reference: sharded", ppo=recipe.ppo.model_copy(update={"reference": "sharded"}))


def _adapters(setup: Setup) -> dict[str, Any]:
    """The values of a recipe that trains adapters: the reference is the adapter switched off."""
    recipe: Any = setup.recipe
    if not isinstance(recipe, PpoRecipe):
        return {"lora": recipe.lora or Lora()}
    return {"lora": recipe.lora or Lora(), "ppo": recipe.ppo.model_copy(update={"reference": "whole"})}


def _lora(setup: Setup) -> tuple[str, Setup] | None:
    if _training(setup) is None or getattr(setup.recipe, "lora", None) is not None:
        return None
    change = "lora: {r: 16, alpha: 32} (no reference model; a higher learning rate)"
    return _with(setup, change, **_adapters(setup))


def _packed(setup: Setup) -> tuple[str, Setup] | None:
    """4-bit weights; adapters on them where the stage trains, under DDP, since ZeRO-3 does not share them out."""
    recipe: Any = setup.recipe
    init = getattr(recipe, "model_init", None)
    if init is None or init.quantization is not None:
        return None
    values: dict[str, Any] = {"model_init": init.model_copy(update={"quantization": "nf4"})}
    if _training(setup) is None:
        return _with(setup, "model_init.quantization: nf4", **values)
    values |= _adapters(setup)
    if isinstance(recipe, PpoRecipe):
        values["vllm"] = None  # a server takes whole weights
    change = f"lora on model_init.quantization: nf4, --launch {setup.layout.at_stage(0).launch}"
    _, turned = _with(setup, change, **values)
    whole = _map_scorers(turned.recipe, _sharing(False))
    return change, dataclasses.replace(turned, recipe=whole, layout=setup.layout.at_stage(0))


def _all_turns() -> Iterator[Turn]:
    """First what changes no result, then what changes it least."""
    yield from (_checkpointing, _one_row, _fewer_answers, _scorer_batch)
    yield from (_to_stage(stage) for stage in (1, 2, 3))
    yield from (_scorer_dtype, _sharded_reference, _sharded_scorers, _scorer_elsewhere, _answers_elsewhere)
    yield from (_shared_trunk, _offload, _lora, _packed)


_TURNS = tuple(_all_turns())
