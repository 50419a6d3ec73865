"""SIGTERM outside PPO: the trainers, the launcher and the pipeline; 75 means that the same command goes on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from alignment import pipeline as pipelines
from alignment.__main__ import main
from alignment.artifact import sha256
from alignment.checkpoints import list_checkpoints
from alignment.cli import main as sara
from alignment.fitting import SealCheckpoints
from alignment.launch import exit_code
from alignment.stopping import EXIT_STOPPED, stop_on_sigterm
from tests.conftest import ROOT
from tests.one_process import forget_accelerate


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_sigterm_is_remembered_and_the_old_handler_comes_back() -> None:
    calls: list[str] = []
    with stop_on_sigterm() as stop:
        assert not stop.agreed()
        stop.then = lambda: calls.append("then")
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed()
        assert calls == ["then"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def run_sft(run_dir: Path, output: Path) -> int:
    forget_accelerate()
    words = ["--config", "tests/tiny_pipeline/sft.yaml", "--run_dir", str(run_dir), "--output_dir", str(output)]
    return main([*words, "--training.save_steps", "100"])


def test_a_trainer_saves_the_step_and_goes_on_to_the_same_bits(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    assert run_sft(tmp_path, tmp_path / "whole") == 0
    original = SealCheckpoints.on_step_end

    def signalled(self: SealCheckpoints, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SealCheckpoints, "on_step_end", signalled)
        assert run_sft(tmp_path, tmp_path / "sft") == EXIT_STOPPED
    assert f"{tmp_path / 'sft'} stopped after step 2; all is saved" in capfd.readouterr().out
    assert [path.name for path in list_checkpoints(tmp_path / "sft" / "checkpoints")] == ["checkpoint-2"]
    assert run_sft(tmp_path, tmp_path / "sft") == 0
    assert sha256(tmp_path / "sft" / "model.safetensors") == sha256(tmp_path / "whole" / "model.safetensors")
    assert not (tmp_path / "sft" / "checkpoints").exists()


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (2, 2), (75, 75), (-signal.SIGTERM, 75), (-9, 137)])
def test_exit_codes_of_processes(code: int, expected: int) -> None:
    assert exit_code(code) == expected


def launch(config: str, code: str) -> subprocess.Popen[str]:
    """The launcher around `python -c`, which prints when it is ready."""
    command = [sys.executable, "-m", "alignment.launch", "--config_file", f"launch/{config}.yaml"]
    command += ["--main_process_port", "0", "--no_python", sys.executable, "-c", code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


SAVES_ON_SIGTERM = """
import os, signal, sys, time
def save(*_):
    time.sleep(0.5)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
os.write(1, b"ready\\n")  # at once, beside another rank's
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("config", "processes"), [("cpu", 1), ("cpu_ddp", 2)])
def test_the_launcher_hands_sigterm_on_and_waits(config: str, processes: int) -> None:
    with launch(config, SAVES_ON_SIGTERM) as launcher:
        assert launcher.stdout is not None
        for _ in range(processes):
            assert launcher.stdout.readline() == "ready\n"
        launcher.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        launcher.send_signal(signal.SIGTERM)  # Slurm's, beside the pipeline's
        assert launcher.wait(60) == EXIT_STOPPED


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu", "cpu_ddp"])
def test_the_launcher_ends_with_the_code_of_its_processes(config: str) -> None:
    with launch(config, "raise SystemExit(2)") as launcher:
        assert launcher.wait(60) == 2


def test_a_stopped_step_stops_the_pipeline(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    recipe = tmp_path / "pipeline.yaml"
    recipe.write_text(f"run_dir: {tmp_path}\nsteps: [{{name: first, recipe: tests/tiny_pipeline/sft.yaml}}]\n")
    ends: dict[str, int] = {"raise SystemExit(75)": 75, "raise SystemExit(2)": 2, SAVES_ON_SIGTERM: 75}
    for code, expected in ends.items():
        monkeypatch.setattr(pipelines, "_command", lambda *_, code=code, **__: [sys.executable, "-c", code])
        if code == SAVES_ON_SIGTERM:
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        assert sara(["pipeline", str(recipe)]) == expected
        assert ("first stopped after" in capfd.readouterr().out) == (expected == EXIT_STOPPED)
