"""What may be missing from a run for a report of it, and what may not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from alignment.artifact import write_artifact
from alignment.evaluation.collect import ReportError
from alignment.evaluation.report import build_report
from tests.made_run import Rows, make_run, read_page, read_report


@pytest.mark.parametrize("steps", [(), ("safety_rm", "ppo"), ("cd",), ("rs", "ppo")])
def test_missing_steps_still_give_a_report(tmp_path: Path, steps: tuple[str, ...]) -> None:
    run_dir = make_run(tmp_path, checkpoints=("base", "ppo"), steps=steps, num_adversarial=9, num_benign=4)
    page = read_page(run_dir)
    assert ("PPO: ppo" in page.text) == ("ppo" in steps)
    assert ("Context distillation: cd" in page.text) == ("cd" in steps)
    assert ("Rejection sampling: rs" in page.text) == ("rs" in steps)
    assert ("helpfulness_rm" in page.text) == ("helpfulness_rm" in steps)


@pytest.mark.parametrize(("num_adversarial", "num_benign"), [(9, 0), (0, 9)])
def test_one_kind_of_prompt_alone(tmp_path: Path, num_adversarial: int, num_benign: int) -> None:
    run_dir = make_run(tmp_path, num_adversarial=num_adversarial, num_benign=num_benign)
    report = read_report(run_dir)
    missing = "False refusals" if num_benign == 0 else "Violations"
    assert any(caution.startswith(f"{missing} were not measured") for caution in report["cautions"])
    assert report["headline"].startswith("Violations " if num_adversarial else "False refusals ")


def test_nothing_scored_is_no_number(tmp_path: Path) -> None:
    def edit(rows: Rows) -> None:
        for row in rows:
            row["scores"] = dict.fromkeys(row["scores"])
            row["violations"] = dict.fromkeys(row["violations"])

    report = read_report(make_run(tmp_path, num_adversarial=9, num_benign=4, edit=edit))
    assert "Violations went from not scored to not scored" in report["headline"]
    assert report["scores"] is None


def test_metrics_and_pairs_may_be_missing(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, num_adversarial=9, num_benign=4)
    (run_dir / "ppo" / "metrics.jsonl").unlink()
    (run_dir / "cd" / "pairs.jsonl").unlink()
    assert "no metrics.jsonl" in read_page(run_dir).text


def test_unfinished_and_moved_aside_folders_are_named_and_not_read(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, num_adversarial=9, num_benign=4)
    shutil.copytree(run_dir / "evaluate", run_dir / "evaluate.1")
    (run_dir / "second").mkdir()
    (run_dir / "second" / "in_progress.json").write_text("{}", encoding="utf-8")
    (run_dir / "notes").mkdir()
    page = read_page(run_dir)
    assert "Not finished, so not in this report: second." in page.text
    assert "Moved aside by a later run, so not in this report: evaluate.1." in page.text


def test_no_evaluation_is_an_error(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, num_adversarial=3, num_benign=3)
    (run_dir / "evaluate" / "manifest.json").unlink()
    with pytest.raises(ReportError, match="no complete evaluation; run a recipe with `stage: evaluate`"):
        build_report(run_dir)
    with pytest.raises(ReportError, match="is no folder; give the run_dir"):
        build_report(tmp_path / "nowhere")
    assert not (run_dir / "report.json").exists()


def test_two_evaluations_are_an_error(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, num_adversarial=3, num_benign=3)
    shutil.copytree(run_dir / "evaluate", run_dir / "evaluate_again")
    with pytest.raises(ReportError, match=r"2 evaluations \(evaluate, evaluate_again\)"):
        build_report(run_dir)


@pytest.mark.parametrize("name", ["evaluation.json", "responses.jsonl"])
def test_an_altered_evaluation_is_an_error(tmp_path: Path, name: str) -> None:
    run_dir = make_run(tmp_path, num_adversarial=3, num_benign=3)
    with (run_dir / "evaluate" / name).open("a", encoding="utf-8") as file:
        file.write("\n")
    with pytest.raises(
        ReportError, match=f"{name} is missing or is not what its manifest describes; run evaluate again"
    ):
        build_report(run_dir)


def test_an_answer_that_is_missing_is_an_error(tmp_path: Path) -> None:
    def edit(rows: Rows) -> None:
        del rows[0]

    run_dir = make_run(tmp_path, num_adversarial=3, num_benign=3, edit=edit)
    with pytest.raises(ReportError, match="base did not answer prompt"):
        build_report(run_dir)


def test_labels_of_a_scorer_that_was_not_measured_are_told(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, checkpoints=("base", "sft"), steps=("sft",), num_adversarial=9, num_benign=4)
    for name, unmeasured in (("label", {"scorer": "nobody measured it"}), ("filter", {})):
        data = {"agreement": {"measured": {}, "unmeasured": unmeasured}}
        write_artifact(run_dir / name, kind="preferences", stage="label", recipe_hash="0", data=data)
    told = [caution for caution in read_report(run_dir)["cautions"] if "labelled training data" in caution]
    assert told == ["label labelled training data by a scorer whose agreement with people is not known, or not enough."]
