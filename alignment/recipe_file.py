"""Read a recipe: YAML, dotted overrides from the command line, and errors that name the key and the way out."""

from __future__ import annotations

import argparse
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from alignment.recipe import RECIPES, PipelineRecipe, StageRecipe

R = TypeVar("R", bound=BaseModel)


class RecipeError(ValueError):
    """A recipe that cannot be used; the message is one line per problem: file, key, what is wrong, what to do."""


class Arguments(argparse.ArgumentParser):
    """A parser of command lines whose faults are recipe errors: one line, and never a guess at a shortened option."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"command line: {message}; see --help")


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads `1e-4` as a number (as YAML 1.2 does)."""


_FLOAT = re.compile(r"^[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$")
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


class _StrictDumper(yaml.SafeDumper):
    """SafeDumper that quotes every text that our loader would read as a number."""


_StrictDumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))

# Plain integers must stay integers: move the integer resolver in front of ours.
for _first, _resolvers in _StrictLoader.yaml_implicit_resolvers.items():
    _resolvers.sort(key=lambda item: item[0] == "tag:yaml.org,2002:float")


def _construct_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[object] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)  # pyright: ignore[reportUnknownMemberType]
        if not isinstance(key, str):
            raise RecipeError(f"line {key_node.start_mark.line + 1}: a key must be a name, got {key!r}")
        if key in seen:
            raise RecipeError(f"line {key_node.start_mark.line + 1}: the key {key!r} stands twice")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def parse_yaml(text: str) -> Any:
    """Strict YAML -> plain values."""
    loader = _StrictLoader(text)
    try:
        return loader.get_single_data()  # pyright: ignore[reportUnknownMemberType]
    finally:
        loader.dispose()


def parse_section(text: str, *, key: str) -> dict[str, Any]:
    """A section given on a command line, `{type: refusal}`; `key` names it in errors."""
    try:
        values = parse_yaml(text)
    except (yaml.YAMLError, RecipeError) as error:
        raise RecipeError(f"{key}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{key}: expected keys and values in braces, got {type(values).__name__}")
    return values


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds one mapping."""
    if not path.is_file():
        raise RecipeError(f"{path}: no such file")
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecipeError) as error:
        raise RecipeError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected keys and values, got {type(values).__name__}")
    return values


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> StageRecipe:
    """The recipe of a stage; `overrides` are the words behind it on the command line (`--training.max_steps 5`)."""
    values = read_yaml(path)
    apply_overrides(values, parse_overrides(overrides), where=str(path))
    stage = values.get("stage")
    if not isinstance(stage, str) or stage not in RECIPES:
        raise RecipeError(f"{path}: stage must be one of {', '.join(RECIPES)}, got {stage!r}{_nearest(stage, RECIPES)}")
    return validate(RECIPES[stage], substitute_run_dir(values, where=str(path)), where=str(path))


def load_pipeline(path: Path, overrides: Sequence[str] = ()) -> PipelineRecipe:
    """The recipe of a pipeline."""
    values = read_yaml(path)
    apply_overrides(values, parse_overrides(overrides), where=str(path))
    return validate(PipelineRecipe, values, where=str(path))


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """`--a.b 3` and `--a.b=3` -> {"a.b": 3}; values are read as YAML."""
    values: dict[str, Any] = {}
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if not word.startswith("--") or len(word) < 3:
            raise RecipeError(f"command line: expected --key value, got {word!r}")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not remaining:
                raise RecipeError(f"command line: --{key} has no value")
            text = remaining.pop(0)
        if key in values:
            raise RecipeError(f"command line: --{key} stands twice")
        try:
            values[key] = parse_yaml(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"command line: --{key}: {' '.join(str(error).split())}") from error
    return values


def apply_overrides(values: dict[str, Any], overrides: Mapping[str, Any], *, where: str) -> None:
    """Set dotted keys in place; sections that are absent are made, so that the check of keys sees them."""
    for dotted, value in overrides.items():
        *sections, last = dotted.split(".")
        target: Any = values
        for section in sections:
            target = _step_into(target, section, dotted=dotted, where=where)
        if isinstance(target, list):
            target[_position(target, last, dotted=dotted, where=where)] = value
        else:
            target[last] = value


def dotted_keys(sections: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections -> dotted keys, so that they are set one by one and leave their neighbours alone."""
    flat: dict[str, Any] = {}
    for name, value in sections.items():
        key = f"{prefix}{name}"
        flat |= dotted_keys(value, f"{key}.") if isinstance(value, Mapping) and value else {key: value}
    return flat


def override_text(value: Any) -> str:
    """A value as a word that `parse_overrides` reads back as the same value."""
    if isinstance(value, str):
        try:
            if parse_yaml(value) == value:
                return value
        except yaml.YAMLError:
            pass
    return json.dumps(value)


def _step_into(target: Any, section: str, *, dotted: str, where: str) -> Any:
    if isinstance(target, list):
        inner = target[_position(target, section, dotted=dotted, where=where)]
    else:
        if target.get(section) is None:
            target[section] = {}
        inner = target[section]
    if not isinstance(inner, dict | list):
        raise RecipeError(f"{where}: --{dotted}: {section!r} holds a value, not a section")
    return inner


def _position(items: list[Any], word: str, *, dotted: str, where: str) -> int:
    if not (word.isascii() and word.isdecimal()) or int(word) >= len(items):
        raise RecipeError(f"{where}: --{dotted}: {word!r} is no position in a list of {len(items)}")
    return int(word)


def substitute_run_dir(values: Any, *, where: str) -> Any:
    """Replace `${run_dir}` in every text by the recipe's own `run_dir`."""
    run_dir = values.get("run_dir")

    def replace(value: Any) -> Any:
        if isinstance(value, str) and "${run_dir}" in value:
            if run_dir is None:
                raise RecipeError(f"{where}: {value!r} needs the key run_dir")
            return value.replace("${run_dir}", str(run_dir))
        if isinstance(value, dict):
            return {key: replace(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [replace(inner) for inner in value]
        return value

    return replace(values)


def validate(model: type[R], values: Any, *, where: str) -> R:
    """`values` as a checked section; RecipeError, one line a problem that begins with `where`, when they do not fit."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_explain(model, item, where=where) for item in error.errors()]
        raise RecipeError("\n".join(lines)) from error


def _explain(model: type[BaseModel], item: Any, *, where: str) -> str:
    location = [str(part) for part in item["loc"]]
    key = ".".join(location) or "recipe"
    if item["type"] == "extra_forbidden":
        return f"{where}: unknown key {key!r}{_nearest_key(model, location)}"
    if item["type"] == "missing":
        return f"{where}: the key {key!r} is missing"
    value = item.get("input")
    secret = location[-1:] == ["token_env"]  # somebody wrote the key itself there
    shown = "" if secret or isinstance(value, dict | list) else f", got {value!r}"
    return f"{where}: {key}: {item['msg'].removeprefix('Value error, ')}{shown}"


def _nearest_key(model: type[BaseModel], location: Sequence[str]) -> str:
    """The nearest key of the same section, else the place where a key of this name can stand."""
    keys = list(_dotted_keys(model))
    names = {name for key in keys for name in key.split(".")}
    section = ".".join(part for part in location[:-1] if part in names)  # without positions and kinds of scorers
    siblings = [key.removeprefix(f"{section}.") for key in keys if not section or key.startswith(f"{section}.")]
    near = _nearest(location[-1], [key for key in siblings if "." not in key])
    if near:
        return near
    elsewhere = [key for key in keys if key.rpartition(".")[2] == location[-1]]
    return f"; did you mean {elsewhere[0]!r}?" if elsewhere else _nearest(location[-1], siblings)


def _dotted_keys(annotation: Any, prefix: str = "", depth: int = 0) -> Iterator[str]:
    """Every key that can stand in a recipe, with its sections; list positions and names of a table are left out."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield f"{prefix}{name}"
            if depth < 4:
                yield from _dotted_keys(field.annotation, f"{prefix}{name}.", depth + 1)
        return
    for argument in getattr(annotation, "__args__", ()):
        yield from _dotted_keys(argument, prefix, depth)


def _nearest(word: object, known: Sequence[str] | Mapping[str, Any] | set[str]) -> str:
    matches = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def dump_recipe(recipe: BaseModel) -> str:
    """The recipe with every default spelled out, as YAML."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_StrictDumper, sort_keys=False, allow_unicode=True)
