"""What a recipe reads: checked before any weight loads, and fingerprinted so that a finished step can be recognised."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Collection, Iterator, Mapping, Set
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from alignment.agreement_file import Agreement, AgreementError, check_labeller
from alignment.artifact import Kind, folder_hashes, is_artifact, read_artifact, sha256
from alignment.independence import NotIndependentError, check_independent
from alignment.policy import ModelKind, artifact_of, check_model
from alignment.recipe import (
    ContextDistillationRecipe,
    EvaluateRecipe,
    HarmfulnessModelRecipe,
    JudgeDataRecipe,
    LabelRecipe,
    PpoRecipe,
    RewardModelRecipe,
    Source,
    StageRecipe,
)
from alignment.recipe_data import InputError as InputError
from alignment.recipe_data import sections_of as sections_of
from alignment.recipe_data import sources_of as sources_of
from alignment.recipe_fit import check_fit
from alignment.recipe_label import LabellingRecipe
from alignment.recipe_scorers import (
    GUIDELINES,
    HOW_IT_IS_RUN,
    SCORER_SECTIONS,
    GuardScorer,
    HarmfulnessScorer,
    HttpScorer,
    JudgeScorer,
    PythonScorer,
    RewardModelScorer,
    ScorerSpec,
    Server,
)
from alignment.source_catalog import check_shape, parser_of, rows_needed, source_files
from reward.checkpoint import adapter_base, check_checkpoint, check_harmfulness_model
from reward.conversation import fingerprint
from reward.judge_prompt import Constitution
from reward.platt import Calibration
from reward.scorer import ScorerError
from reward.wire import MIN_TOKEN, read_token

PRODUCT: dict[str, Kind] = {
    "sft": "policy",
    "ppo": "policy",
    "reward_model": "reward_model",
    "harmfulness_model": "harmfulness_model",
    "rejection_sampling": "conversations",
    "context_distillation": "conversations",
    "respond": "conversations",
    "label": "preferences",
    "judge_data": "conversations",
    "judge_agreement": "agreement",
    "evaluate": "evaluation",
}
"""What each stage leaves (`label` with task filter leaves conversations)."""


def product_of(recipe: StageRecipe) -> Kind:
    """The kind of artifact that this recipe will leave."""
    if isinstance(recipe, LabelRecipe) and recipe.task == "filter":
        return "conversations"
    return PRODUCT[recipe.stage]


def check_inputs(recipe: StageRecipe, *, planned: Mapping[str, Kind] | None = None) -> None:
    """Refuse a recipe whose models, artifacts, data or functions are absent or of the wrong kind.

    `planned`: output folders of earlier steps of a pipeline, which need not exist yet, and what they will hold.
    """
    planned = planned or {}
    for key, model, kind in models_of(recipe):
        try:
            if model not in planned:
                check_model(model, kind=kind, local=recipe.below_run_dir(model) is not None)
            elif kind is not None and planned[model] != artifact_of(kind):
                raise InputError(f"{model} will hold a {planned[model]}, but a {artifact_of(kind)} is needed here")
        except ValueError as error:
            raise InputError(f"{key}: {error}") from error
    for key, source, shape in sources_of(recipe):
        try:
            if source.name == "artifact" and source.path is not None and source.path in planned:
                check_shape(source.path, planned[source.path], rows_needed(source, shape))
            else:
                _check_in_run(recipe, source)
                parser_of(source, shape)
        except ValueError as error:
            raise InputError(f"{key}: {error}") from error
    for key, section in sections_of(recipe):
        _check_section(key, section, planned=planned)
    if isinstance(recipe, ContextDistillationRecipe) and recipe.preprompts is not None:
        read_preprompts(recipe.preprompts)
    if isinstance(recipe, JudgeDataRecipe):
        _check_guidelines("guidelines", recipe.guidelines)
    check_fit(recipe, planned=planned)
    if isinstance(recipe, PpoRecipe):
        try:
            check_independent(recipe)
        except NotIndependentError as error:
            raise InputError(str(error)) from error
    if isinstance(recipe, LabellingRecipe) and recipe.agreement not in planned and not recipe.allow_unmeasured:
        for key, problem in measured_labellers(recipe)[1].items():
            raise InputError(f"{key}: {problem}")


def _check_in_run(recipe: StageRecipe, source: Source) -> None:
    """Nothing below `run_dir` is on a hub, whose ids look like paths of two names."""
    path = source.path
    if path is None or source.name == "hub" or recipe.below_run_dir(path) is None or Path(path).exists():
        return
    raise InputError(f"{path} does not exist; run the stage that makes it first")


def check_scorer(spec: ScorerSpec) -> None:
    """Refuse a scorer whose models, functions or files are absent or of the wrong kind, outside of a recipe."""
    for key, section in sections_of(spec, "scorer"):
        for model_key, model, kind in _models_of_section(key, section):
            try:
                check_model(model, kind=kind)
            except ValueError as error:
                raise InputError(f"{model_key}: {error}") from error
        _check_section(key, section, planned={})


def _check_section(key: str, section: BaseModel, *, planned: Collection[str]) -> None:
    cache = getattr(section, "cache", None)
    if cache is not None and Path(cache).is_dir():
        raise InputError(f"{key}.cache: {cache} is a folder; name a file in it")
    if isinstance(section, PythonScorer):
        _check_function(key, section.function)
    elif isinstance(section, JudgeScorer):
        _check_judge(key, section, planned=planned)
    elif isinstance(section, RewardModelScorer) and _is_folder(section.path, planned):
        try:
            check_checkpoint(section.path, family=section.family, direction=section.direction, label=section.label)
        except ScorerError as error:
            raise InputError(f"{key}: {error}") from error
    elif isinstance(section, HarmfulnessScorer) and _is_folder(section.model, planned):
        try:
            check_harmfulness_model(section.model)
        except ScorerError as error:
            raise InputError(f"{key}: {error}") from error
    elif isinstance(section, HttpScorer | Server) and section.token_env is not None:
        try:
            read_token(section.token_env, shortest=1 if isinstance(section, Server) else MIN_TOKEN)
        except ScorerError as error:
            raise InputError(f"{key}.token_env: {error}") from error


def _is_folder(model: str, planned: Collection[str]) -> bool:
    """Not what `planned` names: its step may have been interrupted, and the folder hold no model yet."""
    return model not in planned and Path(model).is_dir()


def _check_judge(key: str, section: JudgeScorer, *, planned: Collection[str]) -> None:
    """Guidelines and calibration are read; that the calibration fits the model is known once that is loaded."""
    constitution = _check_guidelines(f"{key}.guidelines", section.guidelines)
    try:
        if section.calibration is not None:
            _check_file(f"{key}.calibration", section.calibration)
            made_with = {"prompt": section.prompt, "guidelines": constitution.hash}
            Calibration.read(section.calibration).check(made_with)
        if section.server is None and _is_folder(section.model, planned):
            adapter_base(section.model)
    except ScorerError as error:
        raise InputError(f"{key}: {error}") from error


def _check_guidelines(key: str, path: str | None) -> Constitution:
    if path is not None:
        _check_file(key, path)
    try:
        return Constitution.read(path or GUIDELINES)
    except ScorerError as error:
        raise InputError(f"{key}: {error}") from error


def read_preprompts(path: str | Path) -> list[str]:
    """One preprompt per paragraph."""
    _check_file("preprompts", str(path))
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"preprompts: {path}: {error}") from error
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    preprompts = [paragraph for paragraph in paragraphs if paragraph]
    if not preprompts:
        raise InputError(f"preprompts: {path} holds no preprompt; write one per paragraph")
    return preprompts


def measured_labellers(recipe: LabellingRecipe) -> tuple[dict[str, Agreement], dict[str, str]]:
    """Key of each labeller -> how far it agrees with people; key of one that must not label -> why not."""
    measured: dict[str, Agreement] = {}
    unmeasured: dict[str, str] = {}
    for key, spec in recipe.labellers.items():
        judge = isinstance(spec, JudgeScorer)
        try:
            measured[key] = check_labeller(
                recipe.agreement,
                fingerprint=scorer_fingerprint(spec),
                guidelines=Constitution.read(spec.guidelines or GUIDELINES).hash if judge else None,
                threshold=recipe.threshold,
                minimum=recipe.min_balanced_accuracy,
            )
        except AgreementError as error:
            unmeasured[key] = str(error)
    return measured, unmeasured


def missing_inputs(recipe: StageRecipe) -> dict[str, Kind]:
    """Inputs below the recipe's own `run_dir` that earlier steps have not made yet, with the kind that is needed."""
    missing: dict[str, Kind] = {}
    if recipe.run_dir is None:
        return missing

    def note(path: str | None, kind: Kind) -> None:
        if path is not None and Path(path).is_relative_to(str(recipe.run_dir)) and not Path(path).exists():
            missing[path] = kind

    for _, model, kind in models_of(recipe):
        note(model, artifact_of(kind or "policy"))
    for _, source, shape in sources_of(recipe):
        needed = rows_needed(source, shape)
        if source.name == "artifact" and needed not in ("labelled", "graded"):  # no stage makes human labels
            note(source.path, needed)
    if isinstance(recipe, LabellingRecipe):
        note(recipe.agreement, "agreement")
    return missing


def input_fingerprints(recipe: StageRecipe) -> dict[str, str]:
    """Key of the recipe -> fingerprint of the artifact or hash of the file that it names, as they are now.

    A model folder that no stage made has one below `run_dir`, where its path is no part of the recipe's hash.
    """
    caches = {f"{key}.cache" for key, section in sections_of(recipe) if hasattr(section, "cache")}
    found = _named_files(recipe.model_dump(exclude=set(recipe.machine_keys)), except_for=caches)
    for key, source, _ in sources_of(recipe):
        for file in source_files(source):
            found[f"{key.rpartition('.sources.')[0]}:{source.name}:{file.name}"] = sha256(file)
    for key, model, _ in models_of(recipe):
        if recipe.below_run_dir(model) is not None and Path(model).is_dir() and not is_artifact(model):
            found[key] = fingerprint(folder_hashes(Path(model)))
    if isinstance(recipe, JudgeDataRecipe) and recipe.guidelines is None:
        found["guidelines"] = sha256(GUIDELINES)
    return found | _module_hashes(recipe)


def _named_files(values: Any, *, except_for: Set[str] = frozenset()) -> dict[str, str]:
    """Dotted key -> fingerprint of the artifact or hash of the file that the text there names."""
    found: dict[str, str] = {}
    for key, value in _texts(values, ()):
        path = Path(value)
        if key in except_for:
            continue
        if is_artifact(path):
            found[key] = read_artifact(path).fingerprint
        elif path.is_file():
            found[key] = sha256(path)
    return found


def scorer_fingerprint(spec: ScorerSpec) -> str:
    """Changes when a scorer may score otherwise: with its section, and with every artifact, file, model folder and
    module that it names, an adapter's base among them, as they are now, wherever they lie. How it is run
    (`HOW_IT_IS_RUN`) does not count."""
    section = _without(spec.model_dump(mode="json"), HOW_IT_IS_RUN)
    files = _named_files(section)
    named: dict[str, Any] = {**files, **_module_hashes(spec, "scorer")}
    read = set(files)
    for key, part in sections_of(spec, "scorer"):
        for model_key, model, kind in _models_of_section(key, part):
            if Path(model).is_dir() and not is_artifact(model):
                read.add(model_key.removeprefix("scorer."))
                named[model_key] = folder_hashes(Path(model))
                base = adapter_base(model) if kind == "judge" else None
                if base is not None and Path(base).is_dir():
                    named[f"{model_key}.base"] = folder_hashes(Path(base))
    return fingerprint([_without_texts(section, read), named])


def _without(value: Any, keys: frozenset[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(inner, keys) for key, inner in value.items() if key not in keys}
    return [_without(inner, keys) for inner in value] if isinstance(value, list) else value


def _without_texts(value: Any, keys: Set[str], key: str = "") -> Any:
    """`value` with nothing in place of the texts at these dotted keys."""
    if key in keys:
        return None
    inner = f"{key}." if key else ""
    if isinstance(value, dict):
        return {name: _without_texts(part, keys, f"{inner}{name}") for name, part in value.items()}
    if isinstance(value, list):
        return [_without_texts(part, keys, f"{inner}{number}") for number, part in enumerate(value)]
    return value


def _module_hashes(value: BaseModel, key: str = "") -> dict[str, str]:
    """Dotted key -> hash of the file that holds the function named there; of our guidelines, where none are named."""
    found: dict[str, str] = {}
    for name, section in sections_of(value, key):
        if isinstance(section, PythonScorer):
            module = _find_module(section.function.partition(":")[0])
            if module is not None and module.origin is not None and Path(module.origin).is_file():
                found[f"{name}.function"] = sha256(Path(module.origin))
        elif isinstance(section, JudgeScorer) and section.guidelines is None:
            found[f"{name}.guidelines"] = sha256(GUIDELINES)
    return found


def models_of(recipe: StageRecipe) -> Iterator[tuple[str, str, ModelKind | None]]:
    """Every model that the recipe names: (key, model, artifact kind needed)."""
    model: str | None = getattr(recipe, "model", None)
    if model is not None:
        yield "model", model, None if isinstance(recipe, RewardModelRecipe | HarmfulnessModelRecipe) else "policy"
    if isinstance(recipe, PpoRecipe) and recipe.value_model is not None:
        yield "value_model", recipe.value_model, "reward_model"
    if isinstance(recipe, EvaluateRecipe):
        for name, model in recipe.checkpoints.items():
            yield f"checkpoints.{name}", model, "policy"
    for key, section in sections_of(recipe):
        yield from _models_of_section(key, section)


def _models_of_section(key: str, section: BaseModel) -> Iterator[tuple[str, str, ModelKind | None]]:
    if isinstance(section, RewardModelScorer):
        yield f"{key}.path", section.path, "reward_model"
    elif isinstance(section, HarmfulnessScorer):
        yield f"{key}.model", section.model, "harmfulness_model"
    elif isinstance(section, GuardScorer):
        yield f"{key}.model", section.model, "policy"
    elif isinstance(section, JudgeScorer) and section.server is None:
        yield f"{key}.model", section.model, "judge"


def scorers_of(recipe: StageRecipe) -> dict[str, dict[str, Any]]:
    """Dotted key -> scorer section with its defaults; the parts of a combination stand inside it."""
    found: dict[str, dict[str, Any]] = {}
    for key, section in sections_of(recipe):
        if isinstance(section, SCORER_SECTIONS) and not any(key.startswith(f"{outer}.") for outer in found):
            found[key] = section.model_dump(mode="json")
    return found


def _texts(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield ".".join(path), value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, (*path, str(name)))
    elif isinstance(value, list):
        for position, inner in enumerate(value):
            yield from _texts(inner, (*path, str(position)))


def _check_file(key: str, path: str) -> None:
    if not Path(path).is_file():
        raise InputError(f"{key}: the file {path} does not exist")


def _check_function(key: str, function: str) -> None:
    module, _, name = function.partition(":")
    if _find_module(module) is None:
        raise InputError(f"{key}.function: the module {module!r} cannot be found; put its folder on PYTHONPATH")
    if not callable(getattr(importlib.import_module(module), name, None)):
        raise InputError(f"{key}.function: {module!r} has no function {name!r}")


def _find_module(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
