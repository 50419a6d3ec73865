"""A run can be moved: where its folder lies is no part of a result. What lies below it is local, and on no hub."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from alignment.__main__ import main
from alignment.artifact import write_artifact
from alignment.inputs import InputError, check_inputs, input_fingerprints
from alignment.recipe import StageRecipe
from alignment.recipe_file import load_recipe
from alignment.workspace import complete_artifact, open_workspace
from reward.conversation import fingerprint
from tests.conftest import ROOT
from tests.recipe_text import PPO, SFT, load

MOVABLE = SFT.replace("model: m", "model: ${run_dir}/base").replace("output_dir: out", "output_dir: ${run_dir}/sft")
FOLLOWING = (
    "stage: rejection_sampling\noutput_dir: ${run_dir}/rs\nmodel: ${run_dir}/sft\n"
    "prompts: {sources: [{name: file, path: '${run_dir}/prompts.jsonl'}]}\n"
    "scorer: {type: minimum, parts: [{type: reward_model, path: '${run_dir}/rm'}, {type: refusal}]}\n"
)


# --------------------------------------------------------------------------------------------------------------- hashes


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("recipes/demo/safety_reward_model.yaml", "model"),
        ("recipes/demo/ppo.yaml", "scorer.safety.path"),
        ("recipes/demo/rejection_sampling_sft.yaml", "data.sources.0.path"),
        ("recipes/demo/evaluate.yaml", "checkpoints.sft"),
        ("recipes/llama2-7b/ppo.yaml", "model"),
        ("recipes/judge/label.yaml", "agreement"),
    ],
)
def test_the_hash_is_the_same_wherever_the_run_is(path: str, key: str) -> None:
    recipe = load_recipe(ROOT / path)
    for folder in ("runs/other", "other", "/scratch/other/", "./other"):
        assert load_recipe(ROOT / path, ["--run_dir", folder]).hash == recipe.hash
        assert load_recipe(ROOT / path, ["--run_dir", folder, f"--{key}", "${run_dir}/another"]).hash != recipe.hash
        assert load_recipe(ROOT / path, ["--run_dir", folder, f"--{key}", "another"]).hash != recipe.hash


def test_a_server_for_the_answers_still_counts_in_a_moved_run(tmp_path: Path) -> None:
    text = PPO.replace("model: m", "model: ${run_dir}/sft")
    served = text + "vllm: {base_url: 'http://host'}\n"
    hashes = [load(tmp_path, served, "--run_dir", folder).hash for folder in ("runs/one", "other")]
    assert hashes[0] == hashes[1] != load(tmp_path, text, "--run_dir", "other").hash


def test_recipes_that_name_nothing_below_a_run_folder_keep_their_hash(tmp_path: Path) -> None:
    for text in (SFT, SFT + "run_dir: runs/x\n", SFT + "run_dir: sft\n", SFT.replace("model: m", "model: runs/xy/m")):
        recipe = load(tmp_path, text)
        assert recipe.hash == fingerprint(recipe.model_dump(mode="json", exclude=set(recipe.machine_keys)))


# ------------------------------------------------------------------------------------------------------ finished stages


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with what two stages read: a model that no stage made, a data file and a reward model."""
    folder = tmp_path / "run"
    (folder / "base").mkdir(parents=True)
    (folder / "base" / "config.json").write_text("{}", encoding="utf-8")
    (folder / "prompts.jsonl").write_text('{"prompt": "Hi"}\n', encoding="utf-8")
    (folder / "rm").mkdir()
    write_artifact(folder / "rm", kind="reward_model", stage="reward_model", recipe_hash="0")
    return folder


def stages(tmp_path: Path, run: Path) -> list[StageRecipe]:
    sources = f"sources: [{{name: file, path: {run / 'prompts.jsonl'}}}]"
    sft = MOVABLE.replace("sources: [{name: a}]", sources)
    return [load(tmp_path, text, "--run_dir", str(run)) for text in (sft, FOLLOWING)]


def finish(tmp_path: Path, run: Path) -> None:
    for recipe in stages(tmp_path, run):
        open_workspace(recipe).finish("policy" if recipe.stage == "sft" else "conversations")


def test_a_run_that_is_moved_stays_complete(tmp_path: Path, run: Path) -> None:
    finish(tmp_path, run)
    moved = run.rename(tmp_path / "moved")
    assert [complete_artifact(recipe) is not None for recipe in stages(tmp_path, moved)] == [True, True]


@pytest.mark.parametrize(
    ("file", "stale"), [("base/config.json", [True, False]), ("prompts.jsonl", [True, True]), ("rm", [False, True])]
)
def test_what_lies_in_a_moved_run_counts_by_its_content(
    tmp_path: Path, run: Path, file: str, stale: list[bool]
) -> None:
    finish(tmp_path, run)
    moved = Path(shutil.copytree(run, tmp_path / "moved"))
    if file == "rm":
        write_artifact(moved / "rm", kind="reward_model", stage="reward_model", recipe_hash="1")
    else:
        (moved / file).write_text('{"prompt": "Ho"}\n', encoding="utf-8")
    assert [complete_artifact(recipe) is None for recipe in stages(tmp_path, moved)] == stale
    assert [complete_artifact(recipe) is None for recipe in stages(tmp_path, run)] == [False, False]


def test_a_model_folder_elsewhere_still_counts_by_its_path(tmp_path: Path, run: Path) -> None:
    """As long as nothing moves it: its weights need not be read for every look at the stage."""
    inside, _ = stages(tmp_path, run)
    outside = inside.model_copy(update={"run_dir": str(tmp_path / "other")})
    assert "model" in input_fingerprints(inside)
    assert "model" not in input_fingerprints(outside)
    assert outside.hash != inside.hash


# ----------------------------------------------------------------------------------------------------- missing inputs


@pytest.mark.parametrize(
    ("recipe", "changes", "missing"),
    [
        ("tests/tiny_pipeline/rejection_sampling.yaml", [], "model: the model folder myrun/sft does not exist"),
        (
            "tests/tiny_pipeline/ppo.yaml",
            ["--model", "org/policy"],
            "value_model: the model folder myrun/safety_reward_model does not exist",
        ),
        (
            "tests/tiny_pipeline/sft.yaml",
            ["--model", "org/model", "--data.sources.0", "{name: hh_harmless, path: '${run_dir}/hh'}"],
            "data.sources.0: myrun/hh does not exist",
        ),
    ],
)
def test_what_is_missing_below_a_run_folder_of_one_word_is_no_hub_id(
    recipe: str, changes: list[str], missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("SARA_DATA_DIR", raising=False)
    assert main(["--config", recipe, "--run_dir", "myrun", *changes]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {missing}")
    assert printed.count("\n") == 1


def test_a_hub_id_beside_the_run_folder_stays_one(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("{}\n", encoding="utf-8")
    text = SFT.replace("{name: a}", f"{{name: file, path: {data}}}").replace("model: m", "model: org/model")
    for run_dir in ("myrun", "or", "org/model/runs"):
        check_inputs(load(tmp_path, text, "--run_dir", run_dir))
    with pytest.raises(InputError, match="org/model does not exist"):
        check_inputs(load(tmp_path, text, "--run_dir", "org"))
