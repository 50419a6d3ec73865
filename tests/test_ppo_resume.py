"""PPO that is interrupted anywhere, and run again by the same command, ends in the same bits."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from alignment import checkpoints, ppo_state, ppo_update, rollout
from alignment.__main__ import main
from alignment.artifact import read_artifact, sha256
from alignment.cli import main as sara
from alignment.stages import ppo
from alignment.stopping import EXIT_STOPPED
from tests.interrupted import LAYOUTS, end_all, history, ppo_words, start, start_ranks
from tests.one_process import breaking_off, forget_accelerate

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("on_cpu_in_repository")
WEIGHTS = "model.safetensors"
LORA = ("--lora", "{r: 4, alpha: 8}")
SMALL = ("--sampling.max_new_tokens", "4")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, parents: Path) -> Path:
    """The stage uninterrupted, in a process of its own."""
    output = tmp_path_factory.mktemp("whole") / "ppo"
    assert start(ppo_words(parents, output, *SMALL)).end() == 0
    assert sha256(output / WEIGHTS) != sha256(parents / "rejection_sampling_sft" / WEIGHTS), "it has learned something"
    return output


def run(parents: Path, output: Path, *overrides: str) -> int:
    """The stage in this process."""
    forget_accelerate()
    return main(ppo_words(parents, output, *SMALL, *overrides))


def assert_same(output: Path, whole_run: Path) -> None:
    assert sha256(output / WEIGHTS) == sha256(whole_run / WEIGHTS)
    assert history(output) == history(whole_run), "nothing doubled, nothing lost"
    assert read_artifact(output).metrics == read_artifact(whole_run).metrics
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in whole_run.iterdir())


FAULTS = [
    # where, at which call of it the run breaks off, and the iteration that the same command goes on with
    (rollout.Generator, "sample", 6, 1),
    (rollout, "forward", 12, 1),
    (ppo, "score_all", 2, 1),
    (ppo_update, "loss_of", 11, 2),
    (torch.optim.AdamW, "step", 3, 1),
    (ppo_state, "save_weights", 2, 1),
    (ppo_state, "save_random_state", 1, 0),
    (checkpoints, "write_json", 2, 1),
    (Path, "rename", 2, 1),
    (ppo, "save_policy", 1, 2),
    (ppo, "weight_files", 1, 2),
]


@pytest.mark.parametrize(("owner", "name", "call", "next_iteration"), FAULTS, ids=[fault[1] for fault in FAULTS])
def test_a_fault_anywhere_changes_nothing(
    owner: Any,
    name: str,
    call: int,
    next_iteration: int,
    parents: Path,
    whole_run: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with breaking_off(owner, name, call=call):
        run(parents, tmp_path / "ppo")
    capfd.readouterr()
    assert run(parents, tmp_path / "ppo") == 0
    went_on = f"going on from {tmp_path / 'ppo' / 'checkpoints' / f'iteration-{next_iteration}'}\n"
    assert (went_on in capfd.readouterr().out) == (next_iteration > 0)
    assert_same(tmp_path / "ppo", whole_run)


CONTROLS = (
    *("--ppo.kl_target", "0.001", "--ppo.kl_horizon", "50", "--ppo.whiten_scores", "running"),
    *("--ppo.lr_scheduler_type", "cosine", "--ppo.warmup_min_steps", "2", "--ppo.critic_warmup_iterations", "1"),
    *("--ppo.ptx_coef", "0.1", "--ptx_data", "{sources: [{name: starter_helpful, max_rows: 6}]}"),
    *("--eval_prompts", "{sources: [{name: starter_safety, split: test, max_rows: 4}]}", "--ppo.eval_steps", "1"),
    *("--ppo.num_iterations", "4"),
)
"""All that changes from one iteration to the next by its own memory."""


@pytest.mark.parametrize(("owner", "name", "call"), [(ppo, "score_all", 3), (ppo_update, "loss_of", 11)])
def test_every_control_goes_on_where_it_was(owner: Any, name: str, call: int, parents: Path, tmp_path: Path) -> None:
    assert run(parents, tmp_path / "whole", *CONTROLS) == 0
    rows = history(tmp_path / "whole")
    assert len({row["ppo/kl_coef"] for row in rows}) > 1, "the coefficient moved"
    with breaking_off(owner, name, call=call):
        run(parents, tmp_path / "ppo", *CONTROLS)
    assert 0 < len(history(tmp_path / "ppo")) < len(rows)
    assert run(parents, tmp_path / "ppo", *CONTROLS) == 0
    assert_same(tmp_path / "ppo", tmp_path / "whole")


@pytest.mark.parametrize("phase", ["rollout", "score", "update", "save"])
def test_a_killed_run_goes_on_to_the_same_bits(phase: str, parents: Path, whole_run: Path, tmp_path: Path) -> None:
    words = ppo_words(parents, tmp_path / "ppo", *SMALL)
    stage = start(words)
    stage.wait_for(phase, times=2)
    time.sleep(random.uniform(0, 0.1))
    stage.process.kill()
    assert stage.end() == -signal.SIGKILL, "killed too late to test anything"
    again = start(words)
    assert again.end() == 0
    assert again.phases.count("rollout") < 3, "it went on, and did not begin anew"
    assert_same(tmp_path / "ppo", whole_run)


@pytest.mark.parametrize(
    ("owner", "name", "call", "saved"),
    [(rollout.Generator, "sample", 6, 1), (ppo, "score_all", 1, 0), (ppo, "update", 2, 2)],
    ids=["rollout", "score", "update"],
)
def test_sigterm_saves_and_says_so(
    owner: Any,
    name: str,
    call: int,
    saved: int,
    parents: Path,
    whole_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Before the update the iteration is given back, in it the update is finished; the start of the run needs no file.

    Checkpoints are due every 100 iterations here, so what is found was saved by the signal.
    """
    original, calls = getattr(owner, name), 0

    def signalled(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, signalled)
        assert run(parents, tmp_path / "ppo", "--ppo.save_steps", "100") == EXIT_STOPPED
    found = checkpoints.list_checkpoints(tmp_path / "ppo" / "checkpoints")
    assert [path.name for path in found] == ([f"iteration-{saved}"] if saved else [])
    assert "run the same command to go on" in capfd.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert run(parents, tmp_path / "ppo", "--ppo.save_steps", "100") == 0
    assert_weights_equal(tmp_path / "ppo", whole_run)


def assert_weights_equal(output: Path, other: Path) -> None:
    assert sha256(output / WEIGHTS) == sha256(other / WEIGHTS)
    assert history(output) == history(other)


@pytest.mark.parametrize(("layout", "signalled"), [("ddp", [1]), ("zero3", [1]), ("ddp", [0, 1])])
def test_sigterm_on_one_rank_or_all_stops_both(
    layout: str, signalled: list[int], parents: Path, tmp_path: Path
) -> None:
    """Two go on to the same bits; one does after a conversion, with what two do up to rounding."""
    options, environment = (*SMALL, *LORA, "--ppo.num_iterations", "2"), LAYOUTS[layout]
    whole, stopped, alone = (ppo_words(parents, tmp_path / name, *options) for name in ("whole", "ppo", "alone"))
    assert end_all(start_ranks(whole, 2, **environment)) == [0, 0]
    ranks = start_ranks(stopped, 2, **environment)
    ranks[1].wait_for("update")  # of the first iteration: noticed before the second ends, however late it comes
    for number in signalled:
        ranks[number].process.terminate()
    assert end_all(ranks) == [EXIT_STOPPED, EXIT_STOPPED]
    shutil.copytree(tmp_path / "ppo", tmp_path / "alone")
    again = start_ranks(stopped, 2, **environment)
    assert end_all(again) == [0, 0]
    assert [rank.phases.count("rollout") for rank in again] == [1, 1], "of two iterations"
    assert_same(tmp_path / "ppo", tmp_path / "whole")

    assert end_all(start_ranks(alone, 1, **environment)) == [2], "of another number of processes"
    assert sara(["convert-checkpoint", str(tmp_path / "alone"), "--processes", "1"]) == 0
    again = start_ranks(alone, 1, **environment)
    assert end_all(again) == [0]
    assert again[0].phases.count("rollout") == 1
    expected, found = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "alone"))
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=1e-6), name


def nan_in(position: int) -> Callable[[Any], Any]:
    """The tensor at a position of a tuple, with one element that is no number."""

    def spoil(result: tuple[Any, ...]) -> tuple[Any, ...]:
        tensor = result[position].clone()
        tensor[0] = float("nan")
        return (*result[:position], tensor, *result[position + 1 :])

    return spoil


BROKEN: list[tuple[str, Any, str, int, Callable[[Any], Any]]] = [
    # what the message names; the function, and which of its results is spoilt (all in the second iteration); how
    ("logprobs", rollout, "evaluate_tokens", 2, nan_in(1)),
    ("ref_logprobs", rollout, "evaluate_tokens", 2, nan_in(2)),
    ("entropies", rollout, "evaluate_tokens", 2, nan_in(3)),
    ("values", rollout, "evaluate_tokens", 2, nan_in(4)),
    ("rewards", ppo, "whiten_scores", 2, nan_in(0)),
    ("advantages", ppo, "estimate_advantages", 2, nan_in(0)),
    ("returns", ppo, "estimate_advantages", 2, nan_in(1)),
    ("loss", ppo_update, "loss_of", 5, lambda result: (result[0] * float("inf"), result[1])),
    # finite itself, but the slope of a root at 0 is not
    ("gradient norm", ppo_update, "loss_of", 6, lambda result: (result[0] + (result[0] * 0).sqrt(), result[1])),
]


@pytest.mark.parametrize(("named", "owner", "name", "call", "spoil"), BROKEN, ids=[case[0] for case in BROKEN])
def test_what_is_not_finite_stops_before_the_update(
    named: str,
    owner: Any,
    name: str,
    call: int,
    spoil: Callable[[Any], Any],
    parents: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, step, calls, steps = getattr(owner, name), torch.optim.AdamW.step, 0, 0

    def spoilt(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = original(*args, **kwargs)
        return spoil(result) if calls == call else result

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        return step(*args, **kwargs)

    monkeypatch.setattr(owner, name, spoilt)
    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    with pytest.raises(FloatingPointError, match=f"^iteration 1: {named} is not finite; stopped before the update"):
        run(parents, tmp_path / "ppo")
    assert steps == 2, "those of the first iteration"
    assert checkpoints.find_damage(tmp_path / "ppo" / "checkpoints" / "iteration-1") is None


def test_weights_that_are_not_finite_are_not_saved(
    parents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, steps = torch.optim.AdamW.step, 0

    def spoilt(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        result = step(self, *args, **kwargs)
        if steps == 4:  # the last of the second iteration
            self.param_groups[0]["params"][0].data[0] = float("inf")
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", spoilt)
    with pytest.raises(FloatingPointError, match=r"before iteration 2: policy.* is not finite; not saved"):
        run(parents, tmp_path / "ppo")
    found = checkpoints.list_checkpoints(tmp_path / "ppo" / "checkpoints")
    assert [path.name for path in found] == ["iteration-1"]
    assert checkpoints.find_damage(found[0]) is None
