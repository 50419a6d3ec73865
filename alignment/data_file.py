"""Data named on a command line: a YAML file with a `data:` section, or `source:split`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alignment.recipe import Data, Source
from alignment.recipe_file import RecipeError, load_recipe, parse_section, read_yaml, validate
from alignment.recipe_scorers import Section


class DataFile(Section):
    """A YAML file that holds a `data:` section and nothing else."""

    data: Data


def read_held_out(text: str) -> Data:
    """The held-out data that the word `text` of a command line means; no row is read.

    * `pairs.yaml` (any name in .yaml or .yml): the file's `data:` section; of the recipe of a reward model the
      `eval_data:`, since its `data:` are what the model is trained on
    * `starter_safety:test,starter_helpful:test`: sources with their splits

    RecipeError, one line a problem, when it cannot be used.
    """
    path = Path(text)
    if path.suffix.lower() not in {".yaml", ".yml"}:
        return Data(sources=[_source(word) for word in text.split(",")])
    values = read_yaml(path)
    if "stage" not in values:
        return validate(DataFile, values, where=text).data
    data: Data | None = getattr(load_recipe(path), "eval_data", None)
    if data is None:
        raise RecipeError(
            f"{path}: a recipe lends its eval_data, and this one has none; write a file with a data section"
        )
    return data


def read_labelled(words: Sequence[str], *, split: str) -> Data:
    """The conversations with human labels that `words` of a command line mean together; no row is read.

    * `beavertails`, `gptfuzz:answers.jsonl`: a source, and where it lies if not at its usual place; `split` of it
    * `{name: file, path: answers.csv, columns: {...}}`: a source in braces, with `split` unless it names its own
    * `labelled.yaml`, alone: the file's `data:` section, which names its own splits

    RecipeError, one line a problem, when they cannot be used.
    """
    if len(words) == 1 and Path(words[0]).suffix.lower() in {".yaml", ".yml"}:
        return read_held_out(words[0])
    return Data(sources=[_labelled_source(word.strip(), split) for word in words])


def _labelled_source(word: str, split: str) -> Source:
    if word.startswith("{"):
        values = parse_section(word, key="data")
        return validate(Source, {"split": split, **values}, where="command line")
    name, colon, path = word.partition(":")
    if not name or (colon and not path):
        raise RecipeError(f"data: {word!r} is no source; write a name, or a name and its place, as in file:rows.jsonl")
    if path in _SPLITS and not Path(path).exists():
        raise RecipeError(f"data: {word!r}: there is no file {path!r}; a split is named by --split {path}")
    return Source(name=name, path=path or None, split=split)


_SPLITS = frozenset({"train", "test", "validation", "all"})


def _source(word: str) -> Source:
    name, colon, split = word.strip().partition(":")
    if not name or not colon or not split:
        raise RecipeError(
            f"data: {word!r} is neither a YAML file nor a source with its split, as in starter_safety:test"
        )
    return Source(name=name, split=split)
