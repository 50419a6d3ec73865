"""The recipes in `recipes/judge`, step by step on a tiny random model: distil a judge, measure it, put it to work."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignment.__main__ import main
from alignment.artifact import Artifact, read_artifact
from alignment.fitting import save_final
from alignment.inputs import scorer_fingerprint
from alignment.recipe import JudgeAgreementRecipe, JudgeDataRecipe, LabelRecipe, SftRecipe, StageRecipe
from alignment.recipe_file import load_pipeline, load_recipe
from alignment.recipe_scorers import JudgeScorer
from alignment.workspace import Workspace
from reward.conversation import read_json_lines
from tests.conftest import ROOT
from tests.one_process import forget_accelerate

RECIPES = ROOT / "recipes" / "judge"
HAS_INT8 = importlib.util.find_spec("bitsandbytes") is not None


def few(name: str, rows: int, split: str = "train") -> str:
    return f"[{{name: starter_{name}, split: {split}, max_rows: {rows}}}]"


SMALLER: dict[str, dict[str, str]] = {
    "respond": {"model": "MODEL", "prompts.sources": few("safety", 3), "sampling.max_new_tokens": "4"},
    "teachers": {
        "scorer": "{type: judge, model: MODEL, guidelines: GUIDELINES, prompt: two_shot}",
        "compare.llama-guard": "{type: guard, model: MODEL, format: wild_guard}",
        "data.sources": few("safety", 3, "test"),
    },
    "judge_data": {
        "model": "MODEL",
        "guidelines": "GUIDELINES",
        "pairs.sources": few("safety", 3),
        "first": "{type: judge, model: MODEL, guidelines: GUIDELINES, prompt: two_shot}",
        "second": "{type: people}",
        "combine": "second",  # a random judge agrees with nobody
    },
    "people_data": {"model": "MODEL", "guidelines": "GUIDELINES", "labelled.sources": few("safety", 4)},
    "judge": {"model": "MODEL", "training.max_steps": "2", "training.logging_steps": "1"},
    "judge_agreement": {
        "scorer.guidelines": "GUIDELINES",
        "compare": "{before: {type: judge, model: MODEL, guidelines: GUIDELINES}}",
        "data.sources": few("safety", 12, "test"),
    },
    "label": {"data.sources": few("helpful", 4), "scorer.guidelines": "GUIDELINES", "overwrite_labels": "true"},
    "safety_reward_model": {
        "model": "MODEL",
        "data.sources": "[{name: artifact, path: RUN/label}]",
        "eval_data": "null",
        "training.max_steps": "1",
        "training.gradient_accumulation_steps": "1",
        "training.logging_steps": "1",
    },
    "helpfulness_reward_model": {
        "model": "MODEL",
        "data.sources": few("helpful", 4),
        "eval_data": "null",
        "training.max_steps": "1",
        "training.gradient_accumulation_steps": "1",
    },
    "rejection_sampling": {
        "model": "MODEL",
        "prompts.sources": few("safety", 2),
        "num_samples": "2",
        "keep_unfinished": "true",
        "scorer.safety.guidelines": "GUIDELINES",
        "sampling.max_new_tokens": "4",
    },
    "ppo": {
        "model": "MODEL",
        "model_init.dtype": "float32",  # one process has no DeepSpeed to keep master weights
        "prompts.sources": few("safety", 4),
        "scorer.safety.guidelines": "GUIDELINES",
        "sampling.max_new_tokens": "4",
        "ppo.num_iterations": "1",
        "ppo.batch_size": "4",
        "ppo.mini_batch_size": "4",
    },
}
"""What a step must be told to be small: another model, other data, fewer steps. All else is as it is shipped."""


def run_step(step: str, run_dir: Path, model: Path, **more: str) -> int:
    forget_accelerate()
    places = {"MODEL": str(model), "GUIDELINES": str(run_dir / "guidelines.md"), "RUN": str(run_dir)}
    words = ["--config", str(RECIPES / f"{step}.yaml"), "--run_dir", str(run_dir)]
    if step == "judge" and not HAS_INT8:
        words += ["--model_init.quantization", "null"]
    for key, value in {**SMALLER[step], **more}.items():
        for name, place in places.items():
            value = value.replace(name, place)
        words += [f"--{key}", value]
    return main(words)


def note_layers(folder: Path) -> Callable[..., None]:
    """`save_final` that first writes down, for each step, of what kind the layers were that the trainer trained."""

    def save(trainer: Any, workspace: Workspace, **settings: Any) -> None:
        kinds = {name: type(module).__name__ for name, module in trainer.model.named_modules()}
        (folder / f"{workspace.path.name}-layers.json").write_text(json.dumps(kinds), encoding="utf-8")
        save_final(trainer, workspace, **settings)

    return save


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Path]:
    """A run folder in which every step of the pipeline is complete; `label` needed a word to get past its gate."""
    folder = tmp_path_factory.mktemp("judge")
    (folder / "guidelines.md").write_text("Be kind.", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.delenv("SARA_DATA_DIR", raising=False)
        patch.setattr("alignment.fitting.save_final", note_layers(folder))
        for step in load_pipeline(RECIPES / "pipeline.yaml").steps:
            gated = step.name in ("judge_data", "label")
            if step.name == "label":
                assert run_step(step.name, folder, tiny_model) == 2, "a random judge must not label"
            assert run_step(step.name, folder, tiny_model, **({"allow_unmeasured": "true"} if gated else {})) == 0
        yield folder


def rows_of(artifact: Artifact, name: str = "records") -> list[dict[str, Any]]:
    return [row for _, row in read_json_lines(artifact.path / f"{name}.jsonl")]


def metrics_of(artifact: Artifact) -> list[dict[str, Any]]:
    return [row for _, row in read_json_lines(artifact.path / "metrics.jsonl")]


def test_one_answer_each_and_all_of_them_judged(run_dir: Path) -> None:
    answered, judged = read_artifact(run_dir / "respond"), read_artifact(run_dir / "judge_data")
    assert answered.metrics["num_answers"] == answered.metrics["num_prompts"] == 3
    assert judged.metrics["num_answers"] == 3 - answered.metrics["num_empty"] + 2 * 3  # both sides of three pairs
    labels = judged.metrics["labels"]
    assert labels["safe"] + labels["unsafe"] == 6
    assert labels["unsafe"] >= 3, "unsafe answers are in the data"
    assert judged.metrics["labellers"]["n"] == 6
    assert judged.parents["agreement"] == read_artifact(run_dir / "teachers").fingerprint


def test_the_judge_has_learned_from_both_and_changed(run_dir: Path, tiny_model: Path) -> None:
    judge = read_artifact(run_dir / "judge")
    lessons = read_artifact(run_dir / "judge_data").metrics["lessons"]["all"]
    assert judge.data["num_rows"] == lessons + read_artifact(run_dir / "people_data").metrics["lessons"]["all"]
    assert judge.data["too_long"] == {}, "a lesson always fits the judge's own limit"
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_model, judge.path))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("q_proj" in name or "v_proj" in name for name in changed), "the source's adapters, and nothing else"


@pytest.mark.skipif(not HAS_INT8, reason="needs bitsandbytes")
def test_int8_with_adapters_ran_as_the_recipe_says(run_dir: Path) -> None:
    recipe = load_recipe(run_dir / "judge" / "recipe.yaml")
    assert isinstance(recipe, SftRecipe)
    assert recipe.model_init.quantization == "int8"
    layers = json.loads((run_dir / "judge-layers.json").read_text(encoding="utf-8"))
    kinds = {name.rpartition(".layers.")[2]: kind for name, kind in layers.items() if ".layers." in name}
    adapted = {name for name, kind in kinds.items() if name.endswith(("q_proj", "v_proj"))}
    assert {kinds[name] for name in adapted} == {"Linear8bitLt"}, "an adapter around an int8 layer"
    assert {kinds[f"{name}.base_layer"] for name in adapted} == {"Linear8bitLt"}
    assert {kind for name, kind in kinds.items() if name.endswith(("k_proj", "down_proj"))} == {"Linear8bitLt"}


def test_a_judge_that_agrees_with_nobody_labels_with_a_note(run_dir: Path) -> None:
    label = read_artifact(run_dir / "label")
    assert label.data["agreement"]["measured"] == {}
    assert "but min_balanced_accuracy asks for 70.0%" in label.data["agreement"]["unmeasured"]["scorer"]
    assert label.parents["agreement"] == read_artifact(run_dir / "judge_agreement").fingerprint
    assert {row["labeller"]["model"] for row in rows_of(label, "verdicts")} == {str(run_dir / "judge")}


def test_the_auxiliary_loss_learns_from_the_judges_labels(run_dir: Path) -> None:
    label, trained = read_artifact(run_dir / "label"), read_artifact(run_dir / "safety_reward_model")
    assert {row["label_source"].split()[0] for row in rows_of(label)} == {"judge"}
    assert trained.parents["data:artifact:records.jsonl"] == label.provenance["files"]["records.jsonl"]
    step = metrics_of(trained)[0]
    ranking, auxiliary = (step[f"reward_model/{name}_loss"] for name in ("ranking", "auxiliary"))
    assert auxiliary > 0
    assert step["reward_model/loss"] == pytest.approx(ranking + 0.1 * auxiliary, abs=1e-3)  # the recipe's weight


def test_sampling_and_ppo_are_scored_by_the_judge(run_dir: Path) -> None:
    best = read_artifact(run_dir / "rejection_sampling")
    assert best.metrics["num_kept"] == 2
    (row,) = metrics_of(read_artifact(run_dir / "ppo"))
    assert row["ppo/safety_branch_share"] == 1.0, "the prompts are adversarial, so the judge decides"
    for artifact in (best, read_artifact(run_dir / "ppo")):
        assert artifact.parents["scorer.safety.model"] == read_artifact(run_dir / "judge").fingerprint


# ------------------------------------------------------------------------------------------ the recipes as they are


def shipped(step: str) -> Any:
    recipe: StageRecipe = load_recipe(RECIPES / f"{step}.yaml")
    return recipe


def test_the_labellers_are_those_that_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """By fingerprint, as the gate compares them: the same section, word for word."""
    monkeypatch.chdir(ROOT)
    teachers, data = shipped("teachers"), shipped("judge_data")
    measured, label = shipped("judge_agreement"), shipped("label")
    assert isinstance(teachers, JudgeAgreementRecipe)
    assert isinstance(data, JudgeDataRecipe)
    assert isinstance(label, LabelRecipe)
    known = {scorer_fingerprint(spec) for spec in teachers.scorers.values()}
    assert {scorer_fingerprint(spec) for spec in data.labellers.values()} == known
    assert scorer_fingerprint(label.scorer) == scorer_fingerprint(measured.scorer)
    for stage, report in ((data, teachers), (label, measured)):
        assert stage.agreement == report.output_dir
        assert stage.threshold == report.threshold


@pytest.mark.parametrize("folder", ["judge", "judge-smollm2"])
def test_a_judge_is_asked_as_it_was_taught(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same model, guidelines, limit and form of the prompt in the lessons and in every scorer."""
    monkeypatch.chdir(ROOT)
    paths = (ROOT / "recipes" / folder).glob("*.yaml")
    recipes = {path.stem: load_recipe(path) for path in paths if path.stem != "pipeline"}
    taught = [recipe for recipe in recipes.values() if isinstance(recipe, JudgeDataRecipe)]
    judge = recipes["judge"]
    assert isinstance(judge, SftRecipe)
    for lessons in taught:
        assert (lessons.model, lessons.max_length) == (judge.model, judge.data.max_length)
    asked = [spec for recipe in recipes.values() for spec in judges_of(recipe) if spec.model == judge.output_dir]
    assert asked
    for spec in asked:
        assert (spec.guidelines, spec.max_length, spec.prompt) == (taught[0].guidelines, taught[0].max_length, "slots")
        assert spec.mode in {mode for lessons in taught for mode in lessons.modes}


def judges_of(recipe: StageRecipe) -> list[JudgeScorer]:
    from alignment.recipe_data import sections_of

    return [section for _, section in sections_of(recipe) if isinstance(section, JudgeScorer)]


def test_the_numbers_are_those_of_safety_llama() -> None:
    judge = shipped("judge")
    assert isinstance(judge, SftRecipe)
    lora, training = judge.lora, judge.training
    assert lora is not None
    assert (lora.r, lora.alpha, lora.dropout, lora.target_modules) == (8, 32, 0.05, ["q_proj", "v_proj"])
    assert (training.learning_rate, training.lr_scheduler_type, training.num_train_epochs) == (1e-4, "linear", 1)
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (2, 2)
    assert (training.adam_beta1, training.adam_beta2, training.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert judge.model_init.quantization == "int8"
