"""The whole pipeline on a tiny random Llama: every stage runs, leaves an artifact, is skipped, resumed, reported."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignment.__main__ import main
from alignment.artifact import read_artifact, sha256
from alignment.cli import main as sara
from alignment.pipeline import plan
from alignment.recipe_file import load_pipeline
from tests.conftest import ROOT
from tests.one_process import forget_accelerate

RECIPES = Path("tests/tiny_pipeline")
STEPS = (
    "sft",
    "safety_reward_model",
    "helpfulness_reward_model",
    "harmfulness_model",
    "rejection_sampling",
    "rejection_sampling_sft",
    "ppo",
    "context_distillation",
    "label",
    "evaluate",
)


def run_step(step: str, run_dir: Path, *overrides: str) -> int:
    """One stage in this process, as `python -m alignment` runs it."""
    forget_accelerate()
    return main(["--config", str(RECIPES / f"{step}.yaml"), "--run_dir", str(run_dir), *overrides])


@pytest.fixture(scope="module", autouse=True)
def in_repository() -> Iterator[None]:
    """Recipes name other files from the root of the repository."""
    before = Path.cwd()
    os.chdir(ROOT)
    yield
    os.chdir(before)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, in_repository: None) -> Path:
    """A run folder in which every step of the tiny pipeline is complete."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(tiny_model, folder / "model")
    for step in STEPS:
        assert run_step(step, folder) == 0, step
    return folder


@pytest.mark.parametrize(
    ("step", "kind"),
    [
        ("sft", "policy"),
        ("safety_reward_model", "reward_model"),
        ("harmfulness_model", "harmfulness_model"),
        ("rejection_sampling", "conversations"),
        ("rejection_sampling_sft", "policy"),
        ("ppo", "policy"),
        ("context_distillation", "conversations"),
        ("label", "preferences"),
        ("evaluate", "evaluation"),
    ],
)
def test_every_stage_leaves_a_complete_artifact(run_dir: Path, step: str, kind: str) -> None:
    artifact = read_artifact(run_dir / step)
    assert artifact.kind == kind
    assert artifact.provenance["versions"]["trl"]
    for name, digest in artifact.provenance["files"].items():
        assert sha256(run_dir / step / name) == digest
    assert not list((run_dir / step).glob("checkpoints")), "working files are gone"


def test_lineage_names_every_parent(run_dir: Path) -> None:
    parents = read_artifact(run_dir / "ppo").parents
    assert parents["model"] == read_artifact(run_dir / "rejection_sampling_sft").fingerprint
    assert parents["scorer.safety.path"] == read_artifact(run_dir / "safety_reward_model").fingerprint
    assert parents["value_model"] == read_artifact(run_dir / "safety_reward_model").fingerprint


def test_first_ppo_iteration_has_no_kl(run_dir: Path) -> None:
    rows = [json.loads(line) for line in (run_dir / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[0]["ppo/kl"] == 0.0
    assert rows[0]["ppo/safety_branch_share"] >= 0.25, "adversarial prompts take the safety branch"


def test_policies_and_reward_models_load_without_us(run_dir: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    for step in ("sft", "rejection_sampling_sft", "ppo"):
        _, info = AutoModelForCausalLM.from_pretrained(run_dir / step, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
    for step in ("safety_reward_model", "helpfulness_reward_model"):
        model, info = AutoModelForSequenceClassification.from_pretrained(run_dir / step, output_loading_info=True)
        assert not info["missing_keys"]
        assert model.config.num_labels == 1


def test_labels_come_with_their_source(run_dir: Path) -> None:
    rows = [json.loads(line) for line in (run_dir / "label" / "records.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    (source,) = {row["label_source"] for row in rows}
    assert re.fullmatch(r"judge [0-9a-f]{16}", source)


def test_evaluation_shows_both_rates_with_intervals(run_dir: Path) -> None:
    result = json.loads((run_dir / "evaluate" / "evaluation.json").read_text())
    assert list(result["checkpoints"]) == ["base", "sft", "ppo"]
    for checkpoint in result["checkpoints"].values():
        violation = checkpoint["prompt_sets"]["adversarial"]["violation"]
        assert {"safety_reward_model", "refusal_rule", "all_scorers"} == set(violation)
        rate = checkpoint["prompt_sets"]["borderline"]["false_refusal"]
        assert rate["n"] == 5
        assert rate["low"] <= rate["value"] <= rate["high"]


def test_finished_pipeline_is_skipped_and_reported(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert sara(["pipeline", str(RECIPES / "pipeline.yaml"), "--run_dir", str(run_dir)]) == 0
    printed = capfd.readouterr().out
    assert printed.count("complete") == len(STEPS)
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "http-equiv" in page
    numbers = json.loads((run_dir / "report.json").read_text())
    assert numbers


def test_a_changed_recipe_reruns_the_step_and_what_follows(run_dir: Path) -> None:
    pipeline = load_pipeline(RECIPES / "pipeline.yaml", ["--run_dir", str(run_dir)])
    changed = pipeline.model_copy(
        update={
            "steps": [
                step.model_copy(update={"overrides": {"num_samples": 3}}) if step.name == "rejection_sampling" else step
                for step in pipeline.steps
            ]
        }
    )
    reasons = {step.name: step.reason for step in plan(changed)}
    assert reasons["sft"] is None
    assert reasons["safety_reward_model"] is None
    assert reasons["rejection_sampling"] == "the recipe has changed"
    assert reasons["rejection_sampling_sft"] == f"{run_dir / 'rejection_sampling'} will change"
    assert reasons["ppo"] is not None
    assert reasons["label"] is None


def test_a_finished_pipeline_that_is_moved_stays_finished(run_dir: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(run_dir, tmp_path / "moved"))
    pipeline = load_pipeline(RECIPES / "pipeline.yaml", ["--run_dir", str(moved)])
    assert {step.name: step.reason for step in plan(pipeline)} == dict.fromkeys(STEPS)
    (moved / "model" / "config.json").write_text("{}", encoding="utf-8")
    reasons = {step.name: step.reason for step in plan(pipeline)}
    assert reasons["sft"] == "the input model has changed"
    assert reasons["evaluate"] is not None


@pytest.mark.parametrize(
    ("step", "overrides", "problem"),
    [
        (
            "rejection_sampling",
            ["--keep_unfinished", "false", "--sampling.max_new_tokens", "1"],
            "no prompt got an answer that can be kept: {'no finished answer': 6}; raise sampling.max_new_tokens",
        ),
        (
            "context_distillation",
            ["--min_gain", "1000"],
            "no answer with the preprompt is kept: {'not preferred by the scorer': 8}; the model may not follow it yet",
        ),
    ],
)
def test_answers_of_which_none_can_be_kept_are_told_in_one_line(
    run_dir: Path, tmp_path: Path, step: str, overrides: list[str], problem: str, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / step
    assert run_step(step, run_dir, "--output_dir", str(output), *overrides) == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {output}: {problem}")


def test_same_recipe_and_seed_give_the_same_bits(run_dir: Path, tmp_path: Path) -> None:
    for step in ("sft", "ppo"):
        again = tmp_path / step
        assert run_step(step, run_dir, "--output_dir", str(again)) == 0
        assert sha256(again / "model.safetensors") == sha256(run_dir / step / "model.safetensors")
    other = tmp_path / "other_seed"
    assert run_step("ppo", run_dir, "--output_dir", str(other), "--seed", "7") == 0
    assert sha256(other / "model.safetensors") != sha256(run_dir / "ppo" / "model.safetensors")


@pytest.mark.parametrize(
    ("step", "checkpoint"),
    [
        ("sft", "checkpoints/checkpoint-2/index.json"),
        ("safety_reward_model", "checkpoints/checkpoint-2/index.json"),
        ("ppo", "checkpoints/iteration-1/state.json"),
    ],
)
def test_a_killed_stage_goes_on_to_the_same_bits(run_dir: Path, tmp_path: Path, step: str, checkpoint: str) -> None:
    output = tmp_path / step
    command = [sys.executable, "-m", "alignment", "--config", str(RECIPES / f"{step}.yaml")]
    command += ["--run_dir", str(run_dir), "--output_dir", str(output)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (output / checkpoint).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert not (output / "manifest.json").exists(), "killed too late to test anything"
    assert run_step(step, run_dir, "--output_dir", str(output)) == 0
    assert sha256(output / "model.safetensors") == sha256(run_dir / step / "model.safetensors")
    assert history(output) == history(run_dir / step), "nothing doubled, nothing lost"


def history(folder: Path) -> list[dict[str, float]]:
    """The metrics of a run without those that measure time."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    timed = ("seconds", "runtime", "per_second", "flos", "num_tokens", "epoch", "train_loss")
    return [{key: value for key, value in row.items() if not any(word in key for word in timed)} for row in rows]
