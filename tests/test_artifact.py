"""`alignment.artifact`, `alignment.workspace` and `alignment.chunks`: whole, resumed or moved aside folders."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from alignment import chunks as chunks_module
from alignment import workspace as workspace_module
from alignment.artifact import (
    MANIFEST,
    Artifact,
    ArtifactError,
    environment,
    is_artifact,
    read_artifact,
    sha256,
    write_artifact,
    write_json,
)
from alignment.chunks import clear_chunks, work_in_chunks
from alignment.recipe import Data, SftRecipe, Source
from alignment.recipe_file import load_recipe
from alignment.workspace import IN_PROGRESS, complete_artifact, open_workspace
from reward.conversation import RecordError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

ROW = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'

# ------------------------------------------------------------------------------------------------ artifacts


def write(folder: Path, **fields: Any) -> Artifact:
    folder.mkdir(exist_ok=True)
    return write_artifact(folder, **({"kind": "policy", "stage": "sft", "recipe_hash": "abc"} | fields))


def test_a_manifest_is_read_back_as_written(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"abc")
    written = write(
        tmp_path,
        parents={"model": "f00"},
        data={"counts": {"kept": 3}},
        metrics={"loss": 0.5, "name": "grüße"},
        provenance={"seed": 1},
        files=["weights.bin"],
    )
    assert read_artifact(tmp_path) == read_artifact(str(tmp_path), kind="policy") == written
    assert is_artifact(tmp_path)
    assert [file.name for file in tmp_path.iterdir() if file.name != "weights.bin"] == [MANIFEST]


def test_files_are_hashed_into_the_manifest(tmp_path: Path) -> None:
    """The SHA-256 of "abc" is in FIPS 180-4's examples."""
    (tmp_path / "weights.bin").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert write(tmp_path, files=["weights.bin"]).provenance["files"] == {"weights.bin": known}
    large = tmp_path / "large.bin"
    large.write_bytes(bytes(range(256)) * 9000)  # more than one block
    assert sha256(large) == hashlib.sha256(large.read_bytes()).hexdigest()


def test_the_fingerprint_follows_everything_that_makes_the_result(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    base = write(tmp_path, files=["a"]).fingerprint
    assert write(tmp_path, files=["a"], metrics={"loss": 1.0}, provenance={"wandb_run_id": "x"}).fingerprint == base
    changes: list[dict[str, Any]] = [
        {"kind": "reward_model"},
        {"stage": "ppo"},
        {"recipe_hash": "abd"},
        {"parents": {"model": "1"}},
        {"data": {"hash": "1"}},
    ]
    found = [write(tmp_path, **({"files": ["a"]} | change)).fingerprint for change in changes]
    (tmp_path / "a").write_bytes(b"2")
    found.append(write(tmp_path, files=["a"]).fingerprint)
    assert len({base, *found}) == 7


@pytest.mark.parametrize(
    ("manifest", "wrong"),
    [
        (None, "has no manifest.json: the stage that writes it has not finished; run it again"),
        ("", "cannot be read"),
        ('{"kind": "policy"', "cannot be read"),
        ("[]", "cannot be read"),
        ('"policy"', "cannot be read"),
        ('{"kind": "policy", "stage": "sft"}', "cannot be read .*recipe_hash"),
        ('{"kind": "policy", "stage": "sft", "recipe_hash": "a", "extra": 1}', "cannot be read .*extra"),
        ('{"kind": "poem", "stage": "sft", "recipe_hash": "a"}', "has the unknown kind 'poem'"),
        ('{"kind": ["policy"], "stage": "sft", "recipe_hash": "a"}', "has the unknown kind"),
    ],
)
def test_an_unfinished_or_damaged_folder_is_refused(tmp_path: Path, manifest: str | None, wrong: str) -> None:
    if manifest is not None:
        (tmp_path / MANIFEST).write_text(manifest)
    with pytest.raises(ArtifactError, match=wrong) as caught:
        read_artifact(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_manifest_of_garbage_is_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(b"\xff\xfe\x00garbage")
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_artifact(tmp_path)


def test_a_missing_folder_and_the_wrong_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist; run the stage that makes it first"):
        read_artifact(tmp_path / "absent")
    write(tmp_path, kind="conversations")
    with pytest.raises(ArtifactError, match="holds a conversations, but a policy is needed here"):
        read_artifact(tmp_path, kind="policy")


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "values.json"
    write_json(path, {"a": 1})
    for bad in (float("nan"), object()):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, {"a": 2, "b": bad})
        assert json.loads(path.read_text()) == {"a": 1}


def test_the_environment_names_versions_and_no_place() -> None:
    import torch

    facts = environment()
    assert facts["versions"]["torch"] == torch.__version__
    assert set(facts) == {"created", "python", "versions", "git_revision"}
    text = json.dumps(facts)
    assert "/" not in text.replace(str(facts["git_revision"]), "")


# ----------------------------------------------------------------------------------------------- workspaces


@pytest.fixture
def recipe(tmp_path: Path) -> SftRecipe:
    data = tmp_path / "rows.jsonl"
    data.write_text(ROW)
    return SftRecipe(
        output_dir=str(tmp_path / "out"), model="some/model", data=Data(sources=[Source(name="file", path=str(data))])
    )


def test_a_finished_stage_is_complete_for_the_same_recipe_and_inputs_only(recipe: SftRecipe, tmp_path: Path) -> None:
    assert complete_artifact(recipe) is None
    workspace = open_workspace(recipe)
    assert complete_artifact(recipe) is None  # in progress
    (workspace.path / "weights").write_text("w")
    (workspace.path / "wandb_run_id").write_text("r1\n")
    artifact = workspace.finish("policy", metrics={"loss": 1.0}, files=("weights",))
    assert complete_artifact(recipe) == artifact == read_artifact(workspace.path)
    assert artifact.provenance["seed"] == 42
    assert artifact.provenance["wandb_run_id"] == "r1"
    assert not (workspace.path / IN_PROGRESS).exists()
    assert complete_artifact(recipe.model_copy(update={"report_to": "wandb"})) == artifact
    assert complete_artifact(recipe.model_copy(update={"seed": 1})) is None
    (tmp_path / "rows.jsonl").write_text(ROW * 2)
    assert complete_artifact(recipe) is None


def test_a_workspace_holds_its_recipe_with_every_default(recipe: SftRecipe) -> None:
    workspace = open_workspace(recipe)
    assert load_recipe(workspace.path / "recipe.yaml") == recipe


def test_an_interrupted_stage_goes_on_in_its_folder(recipe: SftRecipe) -> None:
    first = open_workspace(recipe)
    (first.path / "checkpoint").write_text("step 5")
    again = open_workspace(recipe.model_copy(update={"report_to": "wandb"}))  # how it is tracked does not matter
    assert again.path == first.path
    assert (again.path / "checkpoint").read_text() == "step 5"
    assert not first.path.with_name("out.1").exists()


@pytest.mark.parametrize("change", ["recipe", "data", "state", "garbage"])
def test_another_recipe_or_other_inputs_move_the_old_folder_aside(
    recipe: SftRecipe, tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = open_workspace(recipe).path
    (out / "checkpoint").write_text("step 5")
    if change == "recipe":
        recipe = recipe.model_copy(update={"seed": 7})
    elif change == "data":
        (tmp_path / "rows.jsonl").write_text(ROW * 2)
    elif change == "state":
        (out / IN_PROGRESS).unlink()
    else:
        (out / IN_PROGRESS).write_text("{")
    assert not (open_workspace(recipe).path / "checkpoint").exists()
    assert (tmp_path / "out.1" / "checkpoint").read_text() == "step 5"
    assert "moved to" in capsys.readouterr().out


def test_a_complete_folder_is_never_written_to(recipe: SftRecipe, tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        workspace = open_workspace(recipe.model_copy(update={"seed": seed}))
        (workspace.path / "result").write_text(str(seed))
        workspace.finish("policy")
    kept = {name: (tmp_path / name / "result").read_text() for name in ("out.1", "out.2", "out")}
    assert kept == {"out.1": "1", "out.2": "2", "out": "3"}
    assert all(is_artifact(tmp_path / name) for name in kept)
    open_workspace(recipe.model_copy(update={"seed": 3}))  # run again on purpose
    assert (tmp_path / "out.3" / "result").read_text() == "3"


def test_an_empty_folder_is_taken_as_it_is(recipe: SftRecipe, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    open_workspace(recipe)
    assert not (tmp_path / "out.1").exists()


def test_only_the_main_process_writes(recipe: SftRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace_module, "is_main_process", lambda: False)
    assert open_workspace(recipe).path == tmp_path / "out"
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------- chunks


class Work:
    """Doubles numbers and remembers what it was asked."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.done: list[int] = []
        self.fail_at = fail_at

    def __call__(self, number: int, items: Sequence[int]) -> list[dict[str, Any]]:
        if number == self.fail_at:
            raise KeyboardInterrupt
        self.done.append(number)
        return [{"item": item, "double": 2 * item} for item in items]


@pytest.mark.parametrize("number", [0, 1, 19, 20, 21])
@pytest.mark.parametrize("size", [1, 7, 20])
def test_every_item_gives_its_row_in_order(tmp_path: Path, number: int, size: int) -> None:
    work = Work()
    rows = work_in_chunks(range(number), work, folder=tmp_path, chunk_size=size, name="items")
    assert rows == [{"item": item, "double": 2 * item} for item in range(number)]
    assert work.done == list(range(-(-number // size)))
    again = Work()
    assert work_in_chunks(range(number), again, folder=tmp_path, chunk_size=size, name="items") == rows
    assert again.done == []


def test_after_a_kill_only_the_missing_chunks_are_done(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        work_in_chunks(range(20), Work(fail_at=2), folder=tmp_path, chunk_size=6, name="items")
    (tmp_path / "chunks" / "items" / ".000002.jsonl.77.tmp").write_text(
        '{"item": '
    )  # half a chunk, under its temporary name
    work = Work()
    rows = work_in_chunks(range(20), work, folder=tmp_path, chunk_size=6, name="items")
    assert work.done == [2, 3]
    assert [row["item"] for row in rows] == list(range(20))


def test_chunks_with_a_row_that_may_get_better_are_done_again(tmp_path: Path) -> None:
    work = Work()
    work_in_chunks(range(20), work, folder=tmp_path, chunk_size=6, name="items")
    once_more = Work()
    rows = work_in_chunks(
        range(20), once_more, folder=tmp_path, chunk_size=6, name="items", again=lambda row: row["item"] in (7, 19)
    )
    assert (work.done, once_more.done) == ([0, 1, 2, 3], [1, 3])
    assert [row["item"] for row in rows] == list(range(20))


@pytest.mark.parametrize("wrong", [lambda rows: rows[:-1], lambda rows: [*rows, rows[0]], lambda rows: []])
def test_a_chunk_of_the_wrong_length_is_refused_and_not_kept(
    tmp_path: Path, wrong: Callable[[list[Any]], list[Any]]
) -> None:
    work = Work()
    with pytest.raises(RuntimeError, match=r"chunk 0 of answers: 3 items gave \d rows"):
        work_in_chunks(
            range(5),
            lambda number, items: wrong(work(number, items)),
            folder=tmp_path,
            chunk_size=3,
            name="answers",
        )
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_chunks_and_all_see_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """One after the other here; a process that reads before the others wrote is what the barrier prevents."""
    monkeypatch.setattr(chunks_module, "world_size", lambda: processes)
    done: list[list[int]] = []
    rows: list[dict[str, Any]] = []
    for index in range(processes):
        monkeypatch.setattr(chunks_module, "process_index", lambda index=index: index)
        work = Work()
        try:
            rows = work_in_chunks(range(20), work, folder=tmp_path, chunk_size=3, name="items")
        except FileNotFoundError:
            assert index < processes - 1
        done.append(work.done)
    assert done == [list(range(index, 7, processes)) for index in range(processes)]
    assert rows == [{"item": item, "double": 2 * item} for item in range(20)]


def test_a_damaged_chunk_is_named(tmp_path: Path) -> None:
    work_in_chunks(range(4), Work(), folder=tmp_path, chunk_size=2, name="items")
    (tmp_path / "chunks" / "items" / "000001.jsonl").write_text("{")
    with pytest.raises(RecordError, match=r"000001.jsonl:1: not a JSON object"):
        work_in_chunks(range(4), Work(), folder=tmp_path, chunk_size=2, name="items")


def test_chunks_are_cleared_once_their_rows_stand_elsewhere(tmp_path: Path) -> None:
    for name in ("answers", "scores"):
        work_in_chunks(range(3), Work(), folder=tmp_path, chunk_size=2, name=name)
    (tmp_path / "rows.jsonl").touch()
    clear_chunks(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]
    clear_chunks(tmp_path)  # nothing left to clear
