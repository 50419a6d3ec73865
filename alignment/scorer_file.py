"""A scorer named on a command line: a reward model, a `scorer:` section in a YAML file, or the section itself."""

from __future__ import annotations

import re
from pathlib import Path

from alignment.recipe import RECIPES
from alignment.recipe_file import RecipeError, load_recipe, parse_section, read_yaml, validate
from alignment.recipe_scorers import RewardModelScorer, ScorerSpec, Section


class ScorerFile(Section):
    """A YAML file that holds a `scorer:` section and nothing else."""

    scorer: ScorerSpec


def read_scorer(text: str) -> ScorerSpec:
    """What the word `text` of a command line means; nothing is loaded and no path is looked up but that of a YAML file.

    * `judge.yaml` (any name in .yaml or .yml): the file's `scorer:` section; the recipe of a stage has one too
    * `{type: judge, model: ...}`: the section itself, in braces
    * all else: a reward model, by folder, artifact or hub id

    RecipeError, one line a problem, when it cannot be used.
    """
    if not text.strip():
        raise RecipeError("the scorer is empty; name a reward model, a YAML file or a section in braces")
    if text.lstrip().startswith("{"):
        return validate(ScorerFile, {"scorer": parse_section(text, key="scorer")}, where="command line").scorer
    path = Path(text)
    if path.suffix.lower() not in {".yaml", ".yml"}:
        return RewardModelScorer(path=text)
    values = read_yaml(path)
    if "stage" not in values:
        return validate(ScorerFile, values, where=text).scorer
    scorer: ScorerSpec | None = getattr(load_recipe(path), "scorer", None)
    if scorer is None:
        stages = [name for name, recipe in RECIPES.items() if "scorer" in recipe.model_fields]
        raise RecipeError(f"{path}: a {values['stage']} recipe has no key 'scorer'; those of {', '.join(stages)} have")
    return scorer


_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]{0,63})=(.+)", re.DOTALL)
_MAX_NAME = 64


def read_named_scorer(text: str) -> tuple[str, ScorerSpec]:
    """`before={type: judge, model: ...}`, or a scorer alone, named after its type and its model; see `read_scorer`."""
    match = _NAMED.fullmatch(text.strip())
    if match is not None:
        return match[1], read_scorer(match[2])
    spec = read_scorer(text)
    return _name_of(spec), spec


def _name_of(spec: ScorerSpec) -> str:
    """Such as `judge-SmolLM2-135M-Instruct`: letters, digits and `_.-`, as a file name has them."""
    named: list[str] = [getattr(spec, key) for key in ("model", "path", "function", "url") if hasattr(spec, key)]
    words = [spec.type, *(name.rstrip("/").rpartition("/")[2] for name in named)]
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(words))[:_MAX_NAME].rstrip("-")
