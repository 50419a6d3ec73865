"""Whether the scorers that watch a training are others than those it optimises."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from alignment.artifact import is_artifact, read_artifact
from alignment.recipe import PpoRecipe
from alignment.recipe_data import sections_of
from alignment.recipe_scorers import (
    GuardScorer,
    HarmfulnessScorer,
    HttpScorer,
    JudgeScorer,
    ModerationScorer,
    PythonScorer,
    RefusalScorer,
    RewardModelScorer,
)


class NotIndependentError(ValueError):
    """A scorer that should measure and is trained on; the message names both keys."""


def check_independent(recipe: PpoRecipe) -> None:
    """Refuse a gold scorer or a violation scorer of the probes that the training scorer holds too."""
    trained = {identity: key for key, identity in _identities(recipe.scorer, "scorer")}
    watching: dict[str, BaseModel | None] = {
        "gold_scorer": recipe.gold_scorer,
        "probes.violation_scorer": None if recipe.probes is None else recipe.probes.violation_scorer,
    }
    for name, spec in watching.items():
        for key, identity in _identities(spec, name):
            if identity in trained:
                raise NotIndependentError(
                    f"{key} is {identity[1]}, which {trained[identity]} trains on already; what is optimised cannot "
                    "tell whether it is gamed, so name another scorer"
                )


def _identities(spec: BaseModel | None, key: str) -> list[tuple[str, tuple[str, str]]]:
    """Key of each scorer that judges by itself -> what it judges by, however it is run."""
    found: list[tuple[str, tuple[str, str]]] = []
    for name, section in sections_of(spec, key):
        match section:
            case RewardModelScorer():
                found.append((name, _model(section.path)))
            case JudgeScorer(server=server) | ModerationScorer(server=server) if server is not None:
                found.append((name, ("server", f"{section.model} at {server.url}")))
            case HarmfulnessScorer() | GuardScorer() | JudgeScorer():
                found.append((name, _model(section.model)))
            case HttpScorer():
                found.append((name, ("server", section.url)))
            case PythonScorer():
                found.append((name, ("function", section.function)))
            case RefusalScorer():
                found.append((name, ("rule", "the refusal-and-content rule")))
            case _:
                pass
    return found


def _model(model: str) -> tuple[str, str]:
    """An artifact is itself wherever a copy of it lies; other folders are told apart by their place."""
    path = Path(model)
    if is_artifact(path):
        return "artifact", f"the artifact {read_artifact(path).fingerprint}"
    return "model", str(path.resolve()) if path.is_dir() else model
