"""Checkpoints: what they hold, what makes one damaged, and which of them a run goes on from."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from alignment.actor_critic import ActorCritic, load_actor_critic
from alignment.checkpoints import (
    CheckpointError,
    find_damage,
    list_checkpoints,
    newest_checkpoint,
    write_checkpoint,
)
from alignment.cli import main as sara
from alignment.distributed import load_engine
from alignment.ppo_state import Checkpoints, LoopState, make_optimizer
from alignment.recipe import Lora, PpoRecipe
from alignment.training_state import random_state, set_random_state
from alignment.workspace import Workspace
from tests.tiny_ppo import PAD, ppo_recipe


def write(folder: Path, number: int, *, keep: int | None = None) -> Path:
    """A checkpoint of two files and a folder."""
    with write_checkpoint(folder, f"iteration-{number}", keep=keep) as target:
        (target / "engine").mkdir()
        (target / "engine" / "shard.pt").write_bytes(bytes(range(256)) * 64)
        (target / "state.json").write_text(json.dumps({"number": number}))
    return folder / f"iteration-{number}"


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


DAMAGES: dict[str, tuple[Any, str]] = {
    "missing": (lambda path: (path / "engine" / "shard.pt").unlink(), "shard.pt is missing"),
    "flipped": (lambda path: flip_a_bit(path / "engine" / "shard.pt"), r"shard.pt is not what was written \(SHA-256\)"),
    "truncated": (
        lambda path: (path / "engine" / "shard.pt").write_bytes(b"x" * 100),
        "shard.pt has 100 bytes where 16384 were written",
    ),
    "emptied": (lambda path: (path / "state.json").write_bytes(b""), "state.json has 0 bytes"),
    "no index": (lambda path: (path / "index.json").unlink(), "index.json is missing"),
    "half an index": (lambda path: (path / "index.json").write_text('{"files": {"sta'), "index.json cannot be read"),
    "another index": (lambda path: (path / "index.json").write_text('{"files": [1]}'), "index.json cannot be read"),
    "binary index": (lambda path: (path / "index.json").write_bytes(b"\xff\xfe"), "index.json cannot be read"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named_kept_and_not_used(
    damage: Any, reason: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints"
    older, newer = write(folder, 9), write(folder, 10)
    assert find_damage(newer) is None
    damage(newer)
    files = sorted(path.name for path in newer.rglob("*"))
    assert newest_checkpoint(folder) == older
    aside = tmp_path / "damaged" / "iteration-10"
    assert sorted(path.name for path in aside.rglob("*")) == files, "nothing of it is deleted"
    printed = capfd.readouterr().err
    assert printed.startswith(f"warning: the checkpoint {newer} is damaged: ")
    assert printed.endswith(f"; moved to {aside}, going on from iteration-9\n")
    assert re.search(reason, printed)


def test_when_all_are_damaged_it_says_so_each_time_and_moves_nothing(tmp_path: Path) -> None:
    for number in (1, 2):
        flip_a_bit(write(tmp_path / "checkpoints", number) / "state.json")
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=r"no checkpoint in .* is whole \(iteration-2: state.json .*begin anew"
        ):
            newest_checkpoint(tmp_path / "checkpoints")
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["iteration-1", "iteration-2"]
    assert not (tmp_path / "damaged").exists()


def test_what_an_interrupted_save_left_is_no_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert newest_checkpoint(folder) is None
    with contextlib.suppress(KeyboardInterrupt), write_checkpoint(folder, "iteration-3", keep=1) as target:
        (target / "state.json").write_text("{}")
        raise KeyboardInterrupt
    assert [path.name for path in folder.iterdir()] == [".iteration-3.tmp"]
    (folder / ".iteration-1.old").mkdir()
    assert newest_checkpoint(folder) is None
    assert list(folder.iterdir()) == []


def test_the_newest_are_kept_by_number(tmp_path: Path) -> None:
    for number in (8, 9, 10):
        write(tmp_path, number, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iteration-10", "iteration-9"]


# ------------------------------------------------------------------------------------------- the loop's checkpoints


def make_checkpoints(recipe: PpoRecipe, output: Path) -> Checkpoints:
    """Of a fresh model, by one process; due at every iteration."""
    torch.manual_seed(0)
    model = load_actor_critic(recipe, pad_token_id=PAD)
    return Checkpoints(None, model, make_optimizer(model, recipe), Workspace(recipe, output, {}), 1, 2)


def take_steps(checkpoints: Checkpoints, *, count: int) -> None:
    """Optimizer steps on a loss of the weights alone."""
    for _ in range(count):
        trained = [parameter for parameter in checkpoints.model.parameters() if parameter.requires_grad]
        sum((parameter + 0.1).square().sum() for parameter in trained).backward()
        checkpoints.optimizer.step()
        checkpoints.optimizer.zero_grad()


def weights_of(model: ActorCritic) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("trunk", "lora"),
    [
        ("shared", None),
        ("separate", None),
        ("shared", Lora(r=2, alpha=4)),
        ("separate", Lora(r=2, alpha=4)),
        ("adapter", Lora(r=2, alpha=4)),
    ],
)
def test_steps_after_a_resume_are_those_of_an_uninterrupted_run(
    tiny_model: Path, tmp_path: Path, trunk: str, lora: Lora | None
) -> None:
    recipe = ppo_recipe(tiny_model, lora=lora, learning_rate=1e-2, value_trunk=trunk)
    whole = make_checkpoints(recipe, tmp_path)
    take_steps(whole, count=2)
    whole.begin(LoopState(iteration=1))
    take_steps(whole, count=2)

    resumed = make_checkpoints(recipe, tmp_path)
    assert resumed.load() == LoopState(iteration=1)
    take_steps(resumed, count=2)
    expected, found = weights_of(whole.model), weights_of(resumed.model)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    anew = make_checkpoints(recipe, tmp_path)
    take_steps(anew, count=2)
    assert any(not torch.equal(weights_of(anew.model)[name], value) for name, value in expected.items())


def test_a_checkpoint_holds_no_pickle_and_no_frozen_weight(tiny_model: Path, tmp_path: Path) -> None:
    checkpoints = make_checkpoints(ppo_recipe(tiny_model, lora=Lora(r=2, alpha=4)), tmp_path)
    take_steps(checkpoints, count=1)
    checkpoints.begin(LoopState(iteration=1))
    saved = tmp_path / "checkpoints" / "iteration-1"
    assert sorted(path.name for path in saved.iterdir()) == [
        "index.json",
        "optimizer.safetensors",
        "random-0.json",
        "state.json",
        "weights.safetensors",
    ]
    names = set(load_file(saved / "weights.safetensors"))
    assert names == {name for name, value in checkpoints.model.named_parameters() if value.requires_grad}
    assert all("lora_" in name or name.endswith("score.modules_to_save.default.weight") for name in names)
    state = load_file(saved / "optimizer.safetensors")
    assert set(state) == {f"{kind}/{name}" for kind in ("step", "exp_avg", "exp_avg_sq") for name in names}
    assert {float(state[f"step/{name}"]) for name in names} == {1.0}


def test_save_writes_the_start_of_the_iteration(tiny_model: Path, tmp_path: Path) -> None:
    """Random numbers drawn and iterations given up since `begin` leave no trace; the start of a run needs no file."""
    checkpoints = make_checkpoints(ppo_recipe(tiny_model), tmp_path)
    checkpoints.begin(LoopState())
    checkpoints.save()
    assert list_checkpoints(checkpoints.folder) == []
    checkpoints.save_steps = 100
    checkpoints.begin(LoopState(iteration=1))
    expected = (random.random(), np.random.rand(), torch.rand(3))
    assert list_checkpoints(checkpoints.folder) == [], "not due"
    checkpoints.save()
    resumed = make_checkpoints(ppo_recipe(tiny_model), tmp_path)
    resumed.load()
    assert (random.random(), np.random.rand()) == expected[:2]
    assert torch.equal(torch.rand(3), expected[2])


def test_random_numbers_go_through_json() -> None:
    random.gauss(0, 1)  # of which it keeps a second one
    np.random.standard_normal()
    state = json.loads(json.dumps(random_state()))
    first = (random.gauss(0, 1), np.random.standard_normal(), torch.randn(5).tolist())
    set_random_state(state)
    assert (random.gauss(0, 1), np.random.standard_normal(), torch.randn(5).tolist()) == first


def test_the_state_of_the_loop_is_exact_and_strict() -> None:
    class Extended(LoopState):
        coefficient: float = 0.0
        window: tuple[float, ...] = ()

    state = Extended(iteration=7, coefficient=0.1 + 0.2, window=(1 / 3, 1e-300))
    text = json.dumps(state.model_dump(mode="json"))
    assert Extended.model_validate_json(text) == state
    with pytest.raises(ValidationError, match="coefficient"):
        LoopState.model_validate_json(text)


def save_one(recipe: PpoRecipe, output: Path) -> Path:
    make_checkpoints(recipe, output).begin(LoopState(iteration=1))
    return output / "checkpoints" / "iteration-1"


def test_another_number_of_processes_is_refused_with_the_command_that_converts(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = ppo_recipe(tiny_model)
    saved = save_one(recipe, tmp_path)
    before = load_file(saved / "weights.safetensors")
    two = make_checkpoints(recipe, tmp_path)
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(CheckpointError) as refused:
            two.load()
        message = str(refused.value)
        assert message.startswith(f"{saved} was saved by 1 process (whole), this run has 2 processes (whole); start")
        assert "\n" not in message
        command = message.partition("sara ")[2].split()
        assert command == ["convert-checkpoint", str(tmp_path), "--processes", "2"]
    assert sara(command) == 0
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        assert two.load() == LoopState(iteration=1)
    assert find_damage(saved) is None
    assert (saved / "random-1.json").read_text() == (saved / "random-0.json").read_text()
    after = load_file(saved / "weights.safetensors")
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert find_damage(tmp_path / "converted" / "iteration-1") is None, "the original is kept"


def test_shards_are_refused_by_another_layout(tiny_model: Path, tmp_path: Path) -> None:
    recipe = ppo_recipe(tiny_model)
    saved = save_one(recipe, tmp_path)
    state = json.loads((saved / "state.json").read_text())
    with write_checkpoint(saved.parent, "iteration-2", keep=None) as target:
        (target / "state.json").write_text(json.dumps(state | {"format": "zero3", "world_size": 8}))
    with pytest.raises(CheckpointError, match=r"saved by 8 processes \(zero3\), this run has 1 process \(whole\); st"):
        make_checkpoints(recipe, tmp_path).load()


def test_there_may_be_nothing_to_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sara(["convert-checkpoint", str(tmp_path), "--processes", "2"]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    assert sara(["convert-checkpoint", str(tmp_path), "--processes", "0"]) == 2


def test_weights_of_another_model_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    save_one(ppo_recipe(tiny_model), tmp_path)
    with pytest.raises(ValueError, match=r"weights.safetensors is of another model: .* differs"):
        make_checkpoints(ppo_recipe(tiny_model, value_trunk="shared"), tmp_path).load()


def test_a_shard_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's own call of torch.load says `weights_only=False`."""

    class Hostile:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "it ran"),)

    class Engine:
        _config = SimpleNamespace()
        optimizer = SimpleNamespace(param_groups=[])

        def load_checkpoint(self, folder: str, *, tag: str, load_module_strict: bool) -> tuple[Any, dict[str, Any]]:
            return torch.load(Path(folder) / "shard.pt", weights_only=False), {}

    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    torch.save({"weight": torch.ones(2)}, tmp_path / "shard.pt")
    load_engine(Engine(), tmp_path, only_trained=False)
    torch.save({"weight": Hostile()}, tmp_path / "shard.pt")
    with pytest.raises(pickle.UnpicklingError, match="mkdir"):
        load_engine(Engine(), tmp_path, only_trained=False)
    assert not (tmp_path / "it ran").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
