"""`Artifact`: the folder that a stage leaves, and its manifest.

`manifest.json` is written last, to a temporary name that is renamed, so its presence means that the folder is complete.
Stages learn about each other from manifests alone.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from reward.conversation import fingerprint

Kind = Literal[
    "policy",
    "reward_model",
    "harmfulness_model",
    "conversations",
    "preferences",
    "prompts",
    "evaluation",
    "reward_report",
    "agreement",
    "attack_report",
]
MANIFEST = "manifest.json"
_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "datasets")


class ArtifactError(ValueError):
    """A folder that is no complete artifact, or one of another kind than needed."""


@dataclass(frozen=True)
class Artifact:
    """A complete artifact on disk. `parents` maps names of inputs to the fingerprints of their manifests."""

    path: Path
    kind: Kind
    stage: str
    recipe_hash: str
    parents: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Changes when the recipe, the parents, the data or the files of the artifact change."""
        files = self.provenance.get("files", {})
        return fingerprint([self.kind, self.stage, self.recipe_hash, dict(self.parents), dict(self.data), files])

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "stage": self.stage,
            "recipe_hash": self.recipe_hash,
            "parents": dict(self.parents),
            "data": dict(self.data),
            "metrics": dict(self.metrics),
            "provenance": dict(self.provenance),
        }


def is_artifact(path: str | Path) -> bool:
    return (Path(path) / MANIFEST).is_file()


def read_artifact(path: str | Path, *, kind: Kind | None = None) -> Artifact:
    """Read a manifest; ArtifactError when the folder is missing, not complete or not of the kind needed."""
    folder = Path(path)
    if not folder.is_dir():
        raise ArtifactError(f"{folder} does not exist; run the stage that makes it first")
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise ArtifactError(f"{folder} has no {MANIFEST}: the stage that writes it has not finished; run it again")
    try:
        values = json.loads(manifest.read_text(encoding="utf-8"))
        artifact = Artifact(path=folder, **values)
    except (ValueError, TypeError) as error:  # not UTF-8, not JSON, or other keys
        raise ArtifactError(f"{manifest} cannot be read ({error}); run the stage again") from error
    if artifact.kind not in get_args(Kind):
        raise ArtifactError(f"{manifest} has the unknown kind {artifact.kind!r}")
    if kind is not None and artifact.kind != kind:
        raise ArtifactError(f"{folder} holds a {artifact.kind}, but a {kind} is needed here")
    return artifact


def write_artifact(
    path: Path,
    *,
    kind: Kind,
    stage: str,
    recipe_hash: str,
    parents: Mapping[str, str] | None = None,
    data: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    files: Iterable[str] = (),
) -> Artifact:
    """Write the manifest, last of all. `files` (relative paths) are hashed into it."""
    facts = {**environment(), **(provenance or {}), "files": {name: sha256(path / name) for name in sorted(files)}}
    artifact = Artifact(
        path, kind, stage, recipe_hash, dict(parents or {}), dict(data or {}), dict(metrics or {}), facts
    )
    write_json(path / MANIFEST, artifact.to_json())
    return artifact


def write_json(path: Path, value: object) -> None:
    """Write JSON to a temporary name and rename it, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def folder_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in `folder`, by name; folders in it do not count."""
    return {file.name: sha256(file) for file in sorted(folder.iterdir()) if file.is_file()}


def environment() -> dict[str, Any]:
    """Versions and revision that a result depends on; no host names, no paths."""
    versions: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "versions": versions,
        "git_revision": _git_revision(),
    }


def _git_revision() -> str | None:
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
