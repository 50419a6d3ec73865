"""The W&B copy of the record, read back from its own file, and what must never be in it."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from alignment.recipe import Data, SftRecipe, Source, StageRecipe, WandbSettings
from alignment.tracking import Tracker, TrackingError, open_tracker
from tests.made_stage import HF_TOKEN, PARENTS, make_artifact, make_recipe, read_lines
from tests.wandb_file import WandbFile, read_wandb_file

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """W&B offline with all of its folders under `tmp_path`; torn down so that the next test's settings count."""
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb_home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB__DISABLE_STATS", "true")
    yield
    wandb.teardown()


def read_runs(output_dir: Path) -> list[WandbFile]:
    """The runs in a folder, once W&B's service has ended: it may write the last block after `finish` has returned."""
    pytest.importorskip("wandb").teardown()
    return [read_wandb_file(path) for path in sorted(output_dir.glob("wandb/offline-run-*/*.wandb"))]


def open_wandb(folder: Path, recipe: StageRecipe) -> Tracker:
    return open_tracker(recipe, folder, parents=PARENTS)


@pytest.mark.usefixtures("wandb_offline")
def test_an_offline_run_holds_what_was_logged(tmp_path: Path) -> None:
    settings = WandbSettings(project="study", group="round one", name="my run", tags=["a", "b"])
    recipe = make_recipe(report_to="wandb", wandb=settings)
    logged = [(0, {"sft/loss": 0.1 + 0.2}), (10, {"sft/loss": 1e-9, "sft/num_tokens": 3}), (5, {"sft/eval_loss": 2.5})]
    rows = [["p one", "c one", 0.5], ["p two", "c two", None]]
    artifact = make_artifact(tmp_path / "policy")
    with open_wandb(tmp_path / "out", recipe) as tracker:
        for step, metrics in logged:
            tracker.log(step, metrics)
        tracker.table("samples", ["prompt", "completion", "score"], rows, step=10)
        tracker.artifact(artifact)
        tracker.alarm(10, "runaway_kl", action="stop", title="t" * 70, reason="KL is high")

    (run,) = read_runs(tmp_path / "out")
    assert run.run == {
        "id": (tmp_path / "out" / "wandb_run_id").read_text(encoding="ascii").strip(),
        "project": "study",
        "group": "round one",
        "job_type": "sft",
        "name": "my run",
        "tags": ["a", "b"],
        "host": "",
    }
    config = {key: value for key, value in run.config.items() if key != "_wandb"}
    assert config.pop("parents") == PARENTS
    assert config.pop("recipe_hash") == recipe.hash
    assert SftRecipe.model_validate(config) == recipe

    metrics_rows = [row for row in run.history if "samples.path" not in row]
    assert metrics_rows == [{"global_step": step, **metrics} for step, metrics in logged]
    assert run.step_metrics["*"] == "global_step"

    (table_row,) = [row for row in run.history if "samples.path" in row]
    assert table_row["global_step"] == 10
    (table_file,) = (tmp_path / "out").glob(f"wandb/offline-run-*/files/{table_row['samples.path']}")
    table = json.loads(table_file.read_text(encoding="utf-8"))
    assert (table["columns"], table["data"]) == (["prompt", "completion", "score"], rows)
    assert [entry["name"] for entry in run.artifacts if entry["type"] == "run_table"] == [
        f"run-{run.run['id']}-samples"
    ]

    (policy,) = [entry for entry in run.artifacts if entry["type"] == "policy"]
    assert policy["name"] == "sft-policy"
    assert policy["aliases"] == {"latest", artifact.fingerprint}
    assert policy["metadata"] == {**artifact.to_json(), "fingerprint": artifact.fingerprint}
    assert set(policy["files"]) == {"manifest.json"}
    assert json.loads(policy["files"]["manifest.json"].read_text(encoding="utf-8")) == policy["metadata"]

    assert run.alerts == [("t" * 63, "KL is high")]
    alarm = {"step": 10, "alarm": "runaway_kl", "action": "stop", "reason": "KL is high"}
    assert read_lines(tmp_path / "out" / "alarms.jsonl") == [alarm]
    assert run.exit_code == 0
    assert [row["step"] for row in read_lines(tmp_path / "out" / "metrics.jsonl")] == [0, 10, 5]


@pytest.mark.usefixtures("wandb_offline")
def test_an_exception_marks_the_run_as_failed_and_goes_on(tmp_path: Path) -> None:
    recipe = make_recipe(report_to="wandb")
    with pytest.raises(RuntimeError, match="out of memory"), open_wandb(tmp_path, recipe):
        raise RuntimeError("out of memory")
    (run,) = read_runs(tmp_path)
    assert run.exit_code == 1


@pytest.mark.usefixtures("wandb_offline")
def test_a_restarted_stage_continues_its_run_and_a_changed_recipe_begins_another(tmp_path: Path) -> None:
    recipe = make_recipe(report_to="wandb")
    folder = tmp_path / "policy"
    ids: list[str | None] = []
    for each in (recipe, recipe, make_recipe(report_to="wandb", seed=7)):
        with open_wandb(folder, each) as tracker:
            ids.append(tracker.wandb_run_id)
    assert ids[0] == ids[1] != ids[2]
    runs = {run.run["id"]: run.run for run in read_runs(folder)}
    assert set(runs) == set(ids)
    first = runs[str(ids[0])]
    assert (first["project"], first["group"], first["name"]) == ("sara", "one", f"sft-policy-{recipe.hash[:8]}")


@pytest.mark.usefixtures("wandb_offline")
def test_without_transcripts_only_ids_and_scores_leave(tmp_path: Path) -> None:
    recipe = make_recipe(report_to="wandb", wandb=WandbSettings(log_transcripts=False))
    with open_wandb(tmp_path, recipe) as tracker:
        columns = ["prompt_id", "prompt", "completion", "score"]
        tracker.table("samples", columns, [["00ff", "my words", "your words", 0.5]], step=1)
    (table_file,) = tmp_path.glob("wandb/offline-run-*/files/media/table/*.json")
    assert json.loads(table_file.read_text(encoding="utf-8"))["data"] == [["00ff", "", "", 0.5]]
    (local,) = read_lines(tmp_path / "samples.jsonl")
    assert (local["prompt"], local["completion"]) == ("my words", "your words")


@pytest.mark.usefixtures("wandb_offline")
def test_six_planted_secrets_are_in_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = {
        "environment": "plant-in-environment-1",
        "argv": "plant-in-argv-2",
        "yaml": "plant-in-yaml-3",
        "url user-info": "plant-in-url-4",
        "exception text": "sk-" + "Plant5" * 5,
        "hub token": HF_TOKEN,
    }
    monkeypatch.setenv("MY_SERVICE_SECRET", planted["environment"])
    monkeypatch.setattr(sys, "argv", ["alignment", "--judge-key", planted["argv"]])
    source = Source(name="file", path=f"https://host.org/rows?token={planted['yaml']}")
    recipe = make_recipe(
        report_to="wandb",
        model=f"https://alice:{planted['url user-info']}@host.org/model",
        data=Data(sources=[source]),
        wandb=WandbSettings(group=planted["environment"], name=f"run {HF_TOKEN}", tags=[HF_TOKEN]),
    )
    everything = (
        f"{planted['environment']} {planted['exception text']} {HF_TOKEN} --api_key={planted['yaml']} "
        f"ssh://bob:{planted['url user-info']}@host.org plain-marker"
    )

    def stage() -> None:
        with open_wandb(tmp_path / "out", recipe) as tracker:
            tracker.log(0, {"sft/loss": 1.0})
            tracker.table("samples", ["prompt", "score"], [[everything, 1.0]], step=0)
            tracker.alert(everything, everything)
            tracker.artifact(make_artifact(tmp_path / HF_TOKEN, data={"sources": [everything]}))
            raise RuntimeError(everything)

    with pytest.raises(RuntimeError, match="Plant5"):
        stage()

    (run,) = read_runs(tmp_path / "out")
    contents = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    contents |= {f"record {number}": payload for number, payload in enumerate(run.payloads)}
    found = [(what, where) for what, text in planted.items() for where in contents if text.encode() in contents[where]]
    assert found == []
    assert not any(HF_TOKEN in str(path) for path in tmp_path.rglob("*"))

    # The search would have seen them: the harmless word beside the secrets arrived in all three kinds of places.
    with_marker = {where.rsplit("/", 1)[-1] for where in contents if b"plain-marker" in contents[where]}
    assert "samples.jsonl" in with_marker
    assert any(name.endswith(".table.json") for name in with_marker)
    assert sum(name.startswith("record") for name in with_marker) == 2  # the alert and the artifact's metadata


@pytest.mark.usefixtures("wandb_offline")
def test_disabled_mode_keeps_the_local_record_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with open_wandb(tmp_path, make_recipe(report_to="wandb")) as tracker:
        tracker.log(3, {"loss": 1.5})
        tracker.table("samples", ["prompt"], [["a"]], step=3)
        tracker.artifact(make_artifact(tmp_path))
        tracker.alert("title", "text")
    assert read_lines(tmp_path / "metrics.jsonl")[0]["loss"] == 1.5
    assert not (tmp_path / "wandb").exists()


@pytest.mark.parametrize("module", [None, types.ModuleType("wandb")], ids=["absent", "a folder of that name"])
def test_without_the_package_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: types.ModuleType | None
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(TrackingError, match=r"pip install wandb.*report_to: none"):
        open_wandb(tmp_path, make_recipe(report_to="wandb"))
    with open_wandb(tmp_path, make_recipe(report_to="none")) as tracker:
        tracker.log(0, {"loss": 1.0})
    assert read_lines(tmp_path / "metrics.jsonl")[0]["loss"] == 1.0
