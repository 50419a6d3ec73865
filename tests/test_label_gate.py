"""Nothing labels training data before it is known to agree with people: the gate of `label` and `judge_data`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignment.__main__ import main
from alignment.agreement_file import Agreement, AgreementError, check_labeller
from alignment.artifact import write_artifact
from alignment.cli import main as sara
from alignment.inputs import InputError, check_inputs, measured_labellers, scorer_fingerprint
from alignment.pipeline import plan
from alignment.recipe import JudgeDataRecipe, LabelRecipe, PipelineRecipe
from alignment.recipe_file import validate
from alignment.recipe_scorers import GUIDELINES, JudgeScorer
from reward.conversation import write_json_lines
from reward.judge_prompt import Constitution
from reward.platt import Calibration
from tests.conftest import ROOT
from tests.test_backends import make_adapter

SCORER = {"type": "python", "function": "tests.scorers:last_word", "scale": "probability"}
FOUND = Agreement(
    label="mine",
    fingerprint="0123456789abcdef",
    guidelines=None,
    threshold=0.5,
    n=400,
    no_decision=0,
    balanced_accuracy=0.8,
    balanced_accuracy_low=0.75,
    kappa=0.6,
    kappa_low=0.5,
    data_hash="f" * 64,
)


def write_report(folder: Path, *rows: Agreement) -> str:
    """`agreement.json` as far as it is read, written by hand from docs/evaluation.md."""
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "format": 1,
        "threshold": rows[0].threshold,
        "data": {"hash": rows[0].data_hash},
        "scorers": [
            {
                "label": row.label,
                "fingerprint": row.fingerprint,
                "guidelines": row.guidelines,
                "agreement": {
                    "n": row.n,
                    "no_decision": {"count": row.no_decision},
                    "balanced_accuracy": {"value": row.balanced_accuracy, "low": row.balanced_accuracy_low},
                    "kappa": {"value": row.kappa, "low": row.kappa_low},
                },
            }
            for row in rows
        ],
    }
    (folder / "agreement.json").write_text(json.dumps(report), encoding="utf-8")
    return str(folder)


def check(path: str | None, **changes: Any) -> Agreement:
    asked = {"fingerprint": FOUND.fingerprint, "guidelines": None, "threshold": 0.5, "minimum": 0.7}
    return check_labeller(path, **(asked | changes))


# ------------------------------------------------------------------------------------------------------ the rule


def test_a_labeller_that_agrees_with_people_may_label(tmp_path: Path) -> None:
    path = write_report(tmp_path, replace(FOUND, label="other", fingerprint="0" * 16), FOUND)
    assert check(path) == FOUND
    assert check(f"{path}/agreement.json", minimum=0.75) == FOUND


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"minimum": 0.76}, "the balanced accuracy of mine is 80.0%, at least 75.0% .*asks for 76.0%"),
        ({"fingerprint": "f" * 16}, "measured mine, but not this scorer as it is now"),
        ({"guidelines": "ab12"}, "measured mine with guidelines None, but it would label with ab12"),
        ({"threshold": 0.15}, r"from P\(safe\) = 0.5 on, but the recipe does from 0.15 on; .*--threshold 0.15"),
    ],
)
def test_another_one_may_not(tmp_path: Path, changes: dict[str, Any], wrong: str) -> None:
    """It is the lower end of the interval that counts, of this scorer, with these guidelines and this threshold."""
    with pytest.raises(AgreementError, match=wrong) as caught:
        check(write_report(tmp_path, FOUND), **changes)
    assert "\n" not in str(caught.value)


def test_no_report_and_one_label_say_nothing(tmp_path: Path) -> None:
    with pytest.raises(AgreementError, match="nobody measured this labeller against people"):
        check(None)
    with pytest.raises(AgreementError, match="cannot be read"):
        check(str(tmp_path / "absent"))
    one_sided = write_report(tmp_path, replace(FOUND, balanced_accuracy=None, balanced_accuracy_low=None))
    with pytest.raises(AgreementError, match="answers of one label only"):
        check(one_sided)


# --------------------------------------------------------------------------------------------- whose word counts


def data_recipe(**changes: Any) -> JudgeDataRecipe:
    values = {"output_dir": "o", "model": "m", "labelled": {"sources": [{"name": "beavertails"}]}, "first": SCORER}
    return validate(JudgeDataRecipe, values | changes, where="test")


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({}, {"first"}),
        ({"second": {"type": "refusal"}}, {"first", "second"}),
        ({"second": {"type": "refusal"}, "combine": "first"}, {"first"}),
        ({"second": {"type": "refusal"}, "combine": "second"}, {"second"}),
        ({"second": {"type": "refusal"}, "combine": "unsafe_if_any"}, {"first", "second"}),
        ({"second": {"type": "people"}}, set()),
        ({"second": {"type": "people"}, "combine": "first"}, {"first"}),
        ({"second": {"type": "people"}, "combine": "unsafe_if_any"}, {"first"}),
        ({"first": {"type": "people"}}, set()),
    ],
)
def test_a_label_that_people_confirm_needs_no_report(changes: dict[str, Any], asked: set[str]) -> None:
    recipe = data_recipe(**changes)
    assert set(recipe.labellers) == asked
    measured, unmeasured = measured_labellers(recipe)
    assert not measured
    assert set(unmeasured) == asked


def test_guidelines_are_those_of_the_judge(tmp_path: Path, tiny_model: Path) -> None:
    judge = JudgeScorer(model=str(tiny_model))
    report = replace(FOUND, fingerprint=scorer_fingerprint(judge), guidelines=Constitution.read(GUIDELINES).hash)
    path = write_report(tmp_path, report)
    section = judge.model_dump(mode="json", exclude_none=True)
    assert measured_labellers(data_recipe(first=section, agreement=path))[0] == {"first": report}
    (tmp_path / "mine.md").write_text("Be kind.", encoding="utf-8")
    other = section | {"guidelines": str(tmp_path / "mine.md")}
    assert "not this scorer" in measured_labellers(data_recipe(first=other, agreement=path))[1]["first"]


# ------------------------------------------------------------------------------------------------- the whole way


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`label.yaml` below a run folder, and answers that people labelled, of which the scorer has 38 of 40 right."""
    monkeypatch.chdir(ROOT)
    rows = [
        {"prompt": f"{n}?", "completion": f"{n} {0.9 if (n % 2 == 0) != (n in (0, 1)) else 0.1}", "safe": n % 2 == 0}
        for n in range(40)
    ]
    write_json_lines(tmp_path / "people.jsonl", rows)
    write_json_lines(tmp_path / "answers.jsonl", rows[:6])
    values = {
        "stage": "label",
        "run_dir": str(tmp_path),
        "output_dir": "${run_dir}/label",
        "task": "filter",
        "data": {"sources": [{"name": "file", "path": str(tmp_path / "answers.jsonl"), "split": "all"}]},
        "scorer": SCORER,
        "agreement": "${run_dir}/agreement",
    }
    (tmp_path / "label.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return tmp_path


def label(folder: Path, *words: str) -> int:
    return main(["--config", str(folder / "label.yaml"), *words])


def measure(folder: Path) -> None:
    source = f"{{name: file, path: {folder / 'people.jsonl'}, split: all}}"
    words = ["judge-agreement", str(folder / "label.yaml"), "--data", source]
    assert sara([*words, "--output", str(folder / "agreement")]) == 0


def test_a_label_recipe_runs_once_its_scorer_was_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert label(folder, "--dry-run") == 0
    assert f"# to be made first: {folder / 'agreement'} (agreement)" in capsys.readouterr().out
    assert label(folder) == 2
    assert "agreement cannot be read" in capsys.readouterr().err
    measure(folder)
    capsys.readouterr()
    assert label(folder, "--min_balanced_accuracy", "0.99") == 2
    printed = capsys.readouterr().err
    assert "the balanced accuracy of python-tests.scorers-last_word is 95.0%" in printed
    assert printed.count("\n") == 1
    assert label(folder) == 0
    data = json.loads((folder / "label" / "manifest.json").read_text(encoding="utf-8"))["data"]
    assert data["agreement"]["unmeasured"] == {}
    assert data["agreement"]["measured"]["scorer"]["balanced_accuracy"] == pytest.approx(0.95)
    assert data["agreement"]["measured"]["scorer"]["fingerprint"] == data["labeller"]["fingerprint"]


def test_another_scorer_does_not_pass_for_the_measured_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measure(folder)
    assert label(folder, "--scorer.function", "tests.scorers:always_the_same") == 2
    assert "but not this scorer as it is now" in capsys.readouterr().err
    assert label(folder, "--scorer.function", "tests.scorers:always_the_same", "--allow_unmeasured", "true") == 0
    printed = capsys.readouterr().out
    assert "WARNING: scorer labels training data UNMEASURED" in printed


def test_a_report_that_a_step_before_makes_is_waited_for(folder: Path) -> None:
    """A pipeline is planned before there is a report; the step looks at it when its turn has come."""
    values = yaml.safe_load((folder / "label.yaml").read_text(encoding="utf-8"))
    recipe = validate(LabelRecipe, yaml.safe_load(yaml.safe_dump(values).replace("${run_dir}", str(folder))), where="t")
    check_inputs(recipe, planned={str(folder / "agreement"): "agreement"})
    with pytest.raises(InputError, match="agreement cannot be read"):
        check_inputs(recipe)
    source = {"name": "file", "path": str(folder / "people.jsonl"), "split": "all"}
    report = {"stage": "judge_agreement", "run_dir": str(folder), "output_dir": "${run_dir}/agreement", "name": "mine"}
    report |= {"scorer": SCORER, "data": {"sources": [source]}}
    (folder / "agreement.yaml").write_text(yaml.safe_dump(report), encoding="utf-8")
    steps = [{"name": name, "recipe": str(folder / f"{name}.yaml")} for name in ("agreement", "label")]
    pipeline = validate(PipelineRecipe, {"run_dir": str(folder), "steps": steps}, where="test")
    assert [step.reason for step in plan(pipeline)] == ["new", f"{folder / 'agreement'} will change"]
    assert main(["--config", str(folder / "agreement.yaml")]) == 0
    assert label(folder) == 0
    assert [step.reason for step in plan(pipeline)] == [None, None]


# ------------------------------------------------------------------------------------- the very judge that was measured


@pytest.fixture
def measured_judge(tiny_model: Path, tmp_path: Path) -> tuple[dict[str, Any], str]:
    """The section of a judge with guidelines and a calibration of its own, and a report that it passed."""
    (tmp_path / "guidelines.md").write_text("Be kind.", encoding="utf-8")
    files = {"guidelines": str(tmp_path / "guidelines.md"), "calibration": str(tmp_path / "calibration.json")}
    Calibration(1.0, 0.0, {}, 40).write(files["calibration"])
    section = {"type": "judge", "model": str(tiny_model), **files}
    report = replace(
        FOUND, fingerprint=scorer_fingerprint(JudgeScorer(**section)), guidelines=Constitution("Be kind.").hash
    )
    path = write_report(tmp_path / "report", report)
    assert set(measured_labellers(data_recipe(first=section, agreement=path))[0]) == {"first"}
    return section, path


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "explain", "calibration": None},
        {"calibration": None},
        {"prompt": "two_shot"},
        {"max_length": 1024},
        {"quantization": "int8"},
    ],
    ids=str,
)
def test_the_same_model_asked_otherwise_is_another_labeller(
    measured_judge: tuple[dict[str, Any], str], changes: dict[str, Any]
) -> None:
    section, path = measured_judge
    asked = {key: value for key, value in (section | changes).items() if value is not None}
    assert "not this scorer" in measured_labellers(data_recipe(first=asked, agreement=path))[1]["first"]
    assert not measured_labellers(data_recipe(first=section | {"batch_size": 2}, agreement=path))[1]


@pytest.mark.parametrize("file", ["guidelines", "calibration"])
def test_a_file_that_was_edited_since_shuts_the_gate(measured_judge: tuple[dict[str, Any], str], file: str) -> None:
    """The path is as it was; what counts is what stands there now."""
    section, path = measured_judge
    Path(section[file]).write_text(Path(section[file]).read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert "not this scorer" in measured_labellers(data_recipe(first=section, agreement=path))[1]["first"]


def test_an_adapter_on_another_base_is_another_judge(tiny_model: Path, tmp_path: Path) -> None:
    """The adapter's own files stay as they are; the weights that it stands on are exchanged below it."""
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    make_adapter(base, tmp_path / "adapter")
    judge = JudgeScorer(model=str(tmp_path / "adapter"))
    before = scorer_fingerprint(judge)
    assert scorer_fingerprint(judge) == before
    (base / "config.json").write_text((base / "config.json").read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert scorer_fingerprint(judge) != before


@pytest.mark.parametrize("artifact", [True, False])
def test_a_judge_is_known_by_its_files_wherever_they_lie(tmp_path: Path, artifact: bool) -> None:
    """In a run that is moved, the report is complete and would not be made again."""

    def judge(folder: str, content: str) -> str:
        path = tmp_path / folder
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text("{}" if artifact else content, encoding="utf-8")
        if artifact:
            write_artifact(path, kind="policy", stage="sft", recipe_hash=content)
        return scorer_fingerprint(JudgeScorer(model=str(path)))

    assert judge("one", "{}") == judge("two", "{}") != judge("two", "{ }")
    assert scorer_fingerprint(JudgeScorer(model="org/one")) != scorer_fingerprint(JudgeScorer(model="org/two"))
