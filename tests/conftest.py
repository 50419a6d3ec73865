"""Fixtures shared by the tests: the real data, a tiny random Llama and the embedded model."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.one_process import forget_accelerate
from tests.tiny import tiny_model  # noqa: F401 - the fixture, for every test

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of public data sets: `SARA_DATA_DIR`, or `shared/data` beside the repository."""
    folder = Path(os.environ.get("SARA_DATA_DIR", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"public data sets are not at {folder}; set SARA_DATA_DIR to their folder")
    return folder


@pytest.fixture
def on_cpu_in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """For stages in the test's own process: recipes and launch files are named from here, and no device is sought."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    forget_accelerate()


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:  # noqa: F811 - the fixture
    """The artifacts that PPO on the tiny model starts from."""
    from tests.interrupted import make_parents

    return make_parents(tmp_path_factory.mktemp("parents"), tiny_model)


@pytest.fixture
def bare_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the repository's root, without a network."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a plan was made over the network")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(socket.socket, "connect", refuse)
