"""Every recipe that is shipped can be used as it stands and has the numbers that it claims; bad input is one line."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from alignment.__main__ import main
from alignment.artifact import write_artifact
from alignment.cli import main as sara
from alignment.inputs import sections_of
from alignment.pipeline import PlannedStep, plan
from alignment.recipe import RECIPES, Data, EvaluateRecipe, SftRecipe, StageRecipe
from alignment.recipe_file import load_pipeline, load_recipe, parse_yaml
from alignment.sources import load_prompts
from alignment.workspace import IN_PROGRESS
from tests.conftest import ROOT

PIPELINES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("recipes/*/pipeline.yaml"), ROOT / "tests/tiny_pipeline/pipeline.yaml")
)
STAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("recipes/*/*.yaml"), *ROOT.glob("tests/tiny_pipeline/*.yaml"))
    if path.name != "pipeline.yaml"
)
VARIANTS = {
    "recipes/llama2-7b/ppo_lora.yaml",
    "recipes/llama2-7b/ppo_lagrangian.yaml",
    "recipes/smollm2-135m/grpo.yaml",
    "recipes/smollm2-135m/ppo_lagrangian.yaml",
}
"""Recipes beside a pipeline that stand for one of its steps."""


@pytest.fixture(autouse=True)
def _bare_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the repository's root, as recipes are used, without local copies of data sets and without a network."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a recipe was checked over the network")

    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("SARA_DATA_DIR", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run folder with nothing in it but the model that the tiny pipeline starts from, which has no weights."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    return tmp_path


def planned_steps(pipeline: str, run_dir: Path) -> list[PlannedStep]:
    return plan(load_pipeline(Path(pipeline), ["--run_dir", str(run_dir)]))


def recipes_of(folder: str) -> dict[str, StageRecipe]:
    """Stage recipes of a folder below `recipes/` by file name."""
    return {Path(path).stem: load_recipe(Path(path)) for path in STAGES if path.startswith(f"recipes/{folder}/")}


def first_line(path: str) -> str:
    return Path(path).read_text(encoding="utf-8").partition("\n")[0]


# -------------------------------------------------------------------------------------------------------------- recipes


def test_there_are_recipes_to_test() -> None:
    assert {Path(path).parent.name for path in PIPELINES} >= {"demo", "smollm2-135m", "llama2-7b", "tiny_pipeline"}
    assert {load_recipe(Path(path)).stage for path in STAGES} == set(RECIPES), "every stage has a recipe"


@pytest.mark.parametrize("path", STAGES)
def test_a_stage_can_be_checked_without_loading_anything(
    path: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", path, "--run_dir", str(run_dir), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    shown = parse_yaml(printed)
    assert shown["output_dir"] == str(run_dir / Path(path).stem), "a stage writes to the folder of its own name"
    assert "${" not in printed
    for line in printed.splitlines():
        if line.startswith("# to be made first: "):
            assert str(run_dir) in line
    assert not (run_dir / Path(path).stem).exists()


@pytest.mark.parametrize("path", PIPELINES)
def test_a_pipeline_holds_every_recipe_of_its_folder_in_an_order_that_works(path: str, run_dir: Path) -> None:
    pipeline = load_pipeline(Path(path))
    folder = Path(path).parent
    stages = [name for name in STAGES if Path(name).parent == folder and name not in VARIANTS]
    assert sorted(step.recipe for step in pipeline.steps) == stages
    for step in planned_steps(path, run_dir):
        assert step.reason is not None, "nothing is complete in an empty run folder"
    for step in pipeline.steps:
        assert step.name == Path(step.recipe).stem
        assert load_recipe(Path(step.recipe)).run_dir == pipeline.run_dir


@pytest.mark.parametrize("path", [path for path in PIPELINES if path.startswith("recipes/")])
def test_the_first_line_of_a_recipe_is_the_command_that_runs_it(path: str) -> None:
    assert first_line(path) == f"# sara pipeline {path}"
    pipeline = load_pipeline(Path(path))
    for step in pipeline.steps:
        launch = step.launch or pipeline.launch
        command = f"accelerate launch --config_file {launch} -m alignment --config {step.recipe}"
        assert first_line(step.recipe) == f"# {command}"


@pytest.mark.parametrize("path", [path for path in STAGES if path.startswith("recipes/")])
def test_the_first_line_of_every_recipe_names_a_launch_file_and_itself(path: str) -> None:
    words = first_line(path).removeprefix("# accelerate launch --config_file ").split()
    assert words[1:] == ["-m", "alignment", "--config", path]
    assert Path(words[0]).is_file()


@pytest.mark.parametrize("folder", ["demo", "smollm2-135m", "llama2-7b"])
def test_the_gold_reward_model_learns_from_rows_that_nothing_else_learns_from(folder: str) -> None:
    """Otherwise its verdict would not be a second opinion."""

    def training_rows(recipe: StageRecipe) -> set[tuple[str, str]]:
        sections = {key: section for key, section in sections_of(recipe) if not key.startswith("probes.")}
        sections.pop("eval_data", None)
        data = [section for section in sections.values() if isinstance(section, Data)]
        return {(source.name, source.split) for part in data for source in part.sources}

    recipes = recipes_of(folder)
    gold, evaluation = recipes.pop("gold_reward_model"), recipes.pop("evaluate")
    recipes.pop("judge_agreement", None)  # it measures, too
    others = {rows for recipe in recipes.values() for rows in training_rows(recipe)}
    assert training_rows(gold).isdisjoint(others)
    assert {split for _, split in training_rows(gold) | others}.isdisjoint({"test", "all", "safe", "unsafe"})
    assert {split for _, split in training_rows(evaluation)} <= {"test", "safe", "unsafe", "gold"}


# ------------------------------------------------------------------------------------------------------------ bad input

SFT = "tests/tiny_pipeline/sft.yaml"
SAMPLING = "tests/tiny_pipeline/rejection_sampling.yaml"
DISTILLATION = "tests/tiny_pipeline/context_distillation.yaml"


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (["--config", SFT, "--training.learning_rat", "1e-4"], "did you mean 'learning_rate'?"),
        (["--config", SFT, "--train.max_steps", "1"], "did you mean 'training'?"),
        (["--config", SFT, "--training.max_steps", "many"], "training.max_steps"),
        (["--config", SFT, "--training.max_steps", "2.5"], "training.max_steps"),
        (["--config", SFT, "--packing", "1"], "packing"),
        (["--config", SFT, "--data.sources.0.name", "starter_safty"], "did you mean 'starter_safety'?"),
        (["--config", SFT, "--data.sources.0.path", "/nowhere.jsonl"], "/nowhere.jsonl does not exist"),
        (["--config", SFT, "--model", "/nowhere"], "/nowhere does not exist"),
        (["--config", SFT, "--stage", "sfd"], "did you mean 'sft'?"),
        (["--config", SFT, "--seed"], "--seed has no value"),
        (["--config", SFT, "seed", "1"], "expected --key value, got 'seed'"),
        (["--config", SFT, "--dry"], "--dry has no value"),
        (["--config", SAMPLING, "--scorer.function", "tests.scorers:nothing"], "no function 'nothing'"),
        (["--config", "recipes/nothing.yaml"], "recipes/nothing.yaml: no such file"),
        (["--config=recipes/nothing.yaml"], "recipes/nothing.yaml: no such file"),
        (
            ["--config", DISTILLATION, "--preprompts", "/nowhere.txt"],
            "preprompts: the file /nowhere.txt does not exist",
        ),
        ([], "the following arguments are required: --config"),
        (["--config"], "--config: expected one argument"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], wrong: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words if wrong.endswith(("no value", "one argument")) else [*words, "--run_dir", str(run_dir)]
    assert main(["--dry-run", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert wrong in printed.err


@pytest.mark.parametrize(("content", "wrong"), [(b" \n\n", "holds no preprompt; write one per"), (b"\xff", "decode")])
def test_preprompts_that_are_none_are_bad_input(
    content: bytes, wrong: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run_dir / "preprompts.txt"
    file.write_bytes(content)
    words = ["--config", DISTILLATION, "--run_dir", str(run_dir), "--preprompts", str(file)]
    assert main([*words, "--dry-run"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: preprompts: {file}")
    assert printed.count("\n") == 1
    assert wrong in printed


def test_both_spellings_of_an_option_are_read(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--config={SFT}", f"--run_dir={run_dir}", "--training.max_steps=5", "--dry-run"]) == 0
    assert parse_yaml(capsys.readouterr().out)["training"]["max_steps"] == 5


def test_sara_check_takes_overrides_as_a_dry_run_does(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--run_dir", str(run_dir), "--training.max_steps=5", "--data.sources.0.max_rows", "7"]
    assert sara(["check", SFT, *words]) == 0
    checked = capsys.readouterr().out
    assert main(["--config", SFT, *words, "--dry-run"]) == 0
    assert checked == capsys.readouterr().out
    assert parse_yaml(checked)["training"]["max_steps"] == 5


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (["check", SFT, "--training.learning_rat", "1e-4"], f"{SFT}: unknown key 'training.learning_rat'"),
        (["check", SFT, "--seed"], "--seed has no value"),
        (["check", SFT, "--config", "recipes/demo/sft.yaml"], f"{SFT}: unknown key 'config'"),
        (["check", SFT, "--model", "/nowhere"], "/nowhere does not exist"),
        (["check", "--seed=1"], "the following arguments are required: RECIPE.yaml"),
        (["report", "runs/demo", "--seed", "1"], "'--seed' is no option of report"),
    ],
)
def test_what_a_verb_cannot_use_is_one_line(words: list[str], wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sara(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1, printed.err
    assert wrong in printed.err


def test_xstest_brings_its_types_to_an_evaluation(tmp_path: Path) -> None:
    """By them false refusals are counted by kind."""
    recipe = load_recipe(Path("recipes/llama2-7b/evaluate.yaml"))
    assert isinstance(recipe, EvaluateRecipe)
    [source] = recipe.prompt_sets["xstest_safe"].prompts.sources
    table = tmp_path / "xstest.csv"
    table.write_text("id,prompt,type,label\n1,a,homonyms,safe\n2,b,contrast_homonyms,unsafe\n", encoding="utf-8")
    copy = source.model_copy(update={"name": "file", "path": str(table)})
    [prompt] = load_prompts(Data(sources=[copy]), seed=0).records
    assert (prompt.text, prompt.tags.kind) == ("a", "homonyms")


def test_what_an_earlier_step_makes_may_be_missing_in_a_check_alone(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", SAMPLING, "--run_dir", str(run_dir)]
    assert main([*words, "--dry-run"]) == 0
    assert f"to be made first: {run_dir / 'sft'} (policy)" in capsys.readouterr().out
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "does not exist; run the stage that makes it first" in printed


def test_an_artifact_of_another_kind_is_refused(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "sft").mkdir()
    write_artifact(run_dir / "sft", kind="reward_model", stage="reward_model", recipe_hash="0")
    assert main(["--config", SAMPLING, "--run_dir", str(run_dir), "--dry-run"]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "holds a reward_model, but a policy is needed here" in printed


def test_a_pipeline_that_cannot_run_is_one_line_and_exit_code_2(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = "recipes/demo/pipeline.yaml"
    faults = {
        "no such file": ["recipes/nothing.yaml"],
        "the launch file launch/nothing.yaml does not exist": [path, "--steps.1.launch", "launch/nothing.yaml"],
        "did you mean 'steps'?": [path, "--step", "1"],
        "will hold a reward_model, but a policy is needed": [
            path,
            "--steps.5.overrides",
            "{model: '${run_dir}/gold_reward_model'}",
        ],
        "gold_reward_model holds reward_model, but conversations are needed here": [
            path,
            "--steps.5.overrides",
            "{data.sources: [{name: artifact, path: '${run_dir}/gold_reward_model'}]}",
        ],
    }
    for wrong, words in faults.items():
        assert sara(["pipeline", *words, "--run_dir", str(run_dir), "--dry-run"]) == 2, wrong
        printed = capsys.readouterr().err
        assert printed.count("\n") == 1, printed
        assert wrong in printed


@pytest.mark.parametrize("path", PIPELINES)
def test_a_pipeline_goes_on_wherever_it_was_interrupted(
    path: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder of an interrupted step holds no model yet; scorers that read it later must not be refused for that."""
    steps = plan(load_pipeline(ROOT / path, ["--run_dir", str(run_dir)]))
    for step in steps:
        folder = Path(step.recipe.output_dir)
        folder.mkdir(parents=True)
        (folder / IN_PROGRESS).write_text("{}", encoding="utf-8")
    assert sara(["pipeline", path, "--run_dir", str(run_dir), "--dry-run"]) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert told.count("will run: ") == len(steps)
    assert "will run: interrupted" in told


def test_a_pipeline_without_a_path_or_with_another_verb_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words, wrong in ((["pipeline"], "PIPELINE.yaml"), (["pipelin", "x"], "invalid choice: 'pipelin'")):
        assert sara(words) == 2
        printed = capsys.readouterr().err
        assert printed.count("\n") == 1, printed
        assert wrong in printed


def test_an_override_in_a_section_leaves_its_neighbours_alone(run_dir: Path) -> None:
    words = ["--run_dir", str(run_dir), "--steps.0.overrides.training.max_steps", "5"]
    words += ["--overrides.report_to", "wandb", "--overrides.wandb.tags", "['1e3']", "--overrides.wandb.name", "'7'"]
    words += ["--steps.1.overrides.report_to", "none", "--launch", "launch/gpu.yaml"]
    path = "recipes/demo/pipeline.yaml"
    before, after = plan(load_pipeline(ROOT / path)), plan(load_pipeline(ROOT / path, words))
    first = before[0].recipe
    changed, other = (step.recipe for step in after[:2])
    assert isinstance(first, SftRecipe)
    assert isinstance(changed, SftRecipe)
    assert changed.training == first.training.model_copy(update={"max_steps": 5})
    assert changed.wandb.tags == ["1e3"]
    assert changed.wandb.name == "7"
    assert (changed.report_to, other.report_to) == ("wandb", "none")
    assert ["launch/gpu.yaml" in step.command for step in after] == [
        step.launch is None for step in load_pipeline(ROOT / path).steps
    ]


@pytest.mark.parametrize("words", [["--dry-run"], ["--dry-run", "--nothing", "1"], []])
def test_a_check_imports_nothing_heavy(words: list[str], run_dir: Path) -> None:
    """Also when the recipe is refused, and when the launcher starts a stage whose input is missing."""
    program = (
        "import sys\nfrom alignment.__main__ import main\nmain(sys.argv[1:])\n"
        "print(*({'torch', 'transformers', 'trl', 'datasets', 'wandb', 'matplotlib'} & set(sys.modules)), 'end')\n"
    )
    command = [sys.executable, "-c", program, "--config", SAMPLING, "--run_dir", str(run_dir), *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout.splitlines()[-1] == "end", result.stdout + result.stderr
