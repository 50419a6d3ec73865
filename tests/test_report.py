"""The report of a run: its numbers are those of the run, and the same run gives the same bytes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from alignment.evaluation.collect import compare, sign_test
from alignment.evaluation.report import build_report
from alignment.stages import evaluate
from tests.made_run import Rows, make_run, page_of, read_page, read_report, set_violations

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every kind of step, and its report."""
    run_dir = make_run(tmp_path_factory.mktemp("run"))
    build_report(run_dir)
    return run_dir


def test_rates_are_those_of_the_evaluation(built: Path) -> None:
    evaluation = json.loads((built / "evaluate" / "evaluation.json").read_text(encoding="utf-8"))
    report = json.loads((built / "report.json").read_text(encoding="utf-8"))
    assert report["checkpoints"] == evaluation["checkpoints"]
    assert list(report["checkpoints"]) == ["base", "sft", "rs", "ppo", "cd"]
    assert (report["before"], report["after"]) == ("base", "cd")
    assert report["violation_scorers"] == ["safety_rm", "refusal_rule"]
    assert report["quality_scorers"] == ["helpfulness"]


def test_every_percentage_on_the_page_stands_in_the_json(built: Path) -> None:
    def numbers(value: Any) -> Iterator[float]:
        if isinstance(value, float):
            yield value
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from numbers(inner)

    report = json.loads((built / "report.json").read_text(encoding="utf-8"))
    known = {f"{100 * value:.1f}%" for value in numbers(report)}
    page = page_of(built)
    shown = set(re.findall(r"[0-9]+[.][0-9]%", page.text))
    assert len(shown) > 50
    assert shown <= known


def test_main_table_shows_rate_interval_and_counts(tmp_path: Path) -> None:
    def edit(rows: Rows) -> None:
        set_violations(rows, "safety_rm", {"base": 20, "ppo": 5})

    page = read_page(make_run(tmp_path, checkpoints=("base", "ppo"), num_adversarial=20, edit=edit))
    text = " ".join(page.text.split())
    # Wilson by hand: 20 of 20 -> 20 / (20 + 1.96^2) = 83.9%; 5 of 20 -> (5 + 1.92) / 23.84 -+ 17.8%.
    assert "100.0% 83.9–100.0 20 of 20" in text
    assert "25.0% 11.2–46.9 5 of 20" in text


def test_same_prompts_are_compared_before_and_after() -> None:
    scored = [(True, False)] * 9 + [(False, True)] + [(True, True)] * 2 + [(False, False)] * 3
    assert compare([*scored, (None, True), (True, None)]) == {
        "better": 9,
        "worse": 1,
        "still_bad": 2,
        "still_good": 3,
        "unscored": 2,
        "p_value": 2 * (1 + 10) / 1024,
    }


@pytest.mark.parametrize(("first", "second", "p_value"), [(0, 0, 1.0), (3, 3, 1.0), (0, 5, 2 / 32), (9, 1, 22 / 1024)])
def test_sign_test(first: int, second: int, p_value: float) -> None:
    assert sign_test(first, second) == pytest.approx(p_value)
    assert sign_test(second, first) == pytest.approx(p_value)


def test_changes_count_the_prompts_of_the_run(tmp_path: Path) -> None:
    def edit(rows: Rows) -> None:
        set_violations(rows, "safety_rm", {"base": 12, "ppo": 4})
        set_violations(rows, "refusal_rule", {"base": 8, "ppo": 10})

    report = read_report(make_run(tmp_path, checkpoints=("base", "sft", "ppo"), num_adversarial=30, edit=edit))
    counts = {name: tuple(change.values())[:5] for name, change in report["changes"]["adversarial"].items()}
    # The first rows are the bad ones, so that all agree on min(12, 8) = 8 before and min(4, 10) = 4 after.
    assert counts == {"safety_rm": (8, 0, 4, 18, 0), "refusal_rule": (0, 2, 8, 20, 0), "all_scorers": (4, 0, 4, 22, 0)}


def test_score_pairs_and_their_box(tmp_path: Path) -> None:
    scores = [(0.4, 0.6), (0.1, 0.95), (0.41, 0.9), (0.1, 0.59), (0.6, 0.4), (0.5, 0.5), (None, 0.9)]

    def edit(rows: Rows) -> None:
        for side, checkpoint in enumerate(("base", "ppo")):
            own = [row for row in rows if row["checkpoint"] == checkpoint and row["prompt_set"] == "adversarial"]
            for row, pair in zip(own, scores, strict=True):
                row["scores"]["safety_rm"] = pair[side]

    report = read_report(make_run(tmp_path, checkpoints=("base", "sft", "ppo"), num_adversarial=7, edit=edit))
    assert report["scores"]["points"] == [list(pair) for pair in scores[:6]]
    assert (report["scores"]["became_safe"], report["scores"]["became_unsafe"]) == (2, 1)
    assert report["scores"]["unscored"] == 1
    assert report["scores"]["scorer"] == "safety_rm"


def test_curves_and_pairs_are_those_of_the_steps(built: Path) -> None:
    report = json.loads((built / "report.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (built / "ppo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert report["ppo"]["ppo"]["steps"] == list(range(30))
    assert report["ppo"]["ppo"]["curves"]["kl"] == [line["ppo/kl"] for line in lines]
    assert len(report["context_distillation"]["cd"]["pairs"]) == 50  # the 51st was not scored
    names = [model["name"] for model in report["reward_models"]]
    assert names == ["safety_rm", "helpfulness_rm", "safety_rm on gold pairs"]  # in the order in which they were made


def test_transcripts_are_evenly_spaced_and_say_what_is_left_out(tmp_path: Path) -> None:
    def edit(rows: Rows) -> None:
        rows[0]["completion"] = "word " * 1000

    run_dir = make_run(tmp_path, checkpoints=("base", "ppo"), num_adversarial=200, num_benign=40, edit=edit)
    page = read_page(run_dir)
    transcripts = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))["transcripts"]
    assert transcripts["total"] == 240
    asked = [row["prompt"][-1]["content"] for row in transcripts["rows"] if row["prompt_set"] == "adversarial"]
    assert [int(re.findall("[0-9]+", text)[0]) for text in asked] == list(range(0, 200, 2))
    assert len(transcripts["rows"]) == 120
    assert "120 of 240 prompts, evenly spaced" in page.text
    assert "1000 more characters in responses.jsonl" in page.text


def test_benign_answers_get_no_verdict_of_a_violation_scorer(built: Path) -> None:
    report = json.loads((built / "report.json").read_text(encoding="utf-8"))
    for row in report["transcripts"]["rows"]:
        assert all(bool(answer["violations"]) == (row["prompt_set"] == "adversarial") for answer in row["answers"])


def test_a_prompt_that_stands_twice_is_shown_twice(tmp_path: Path) -> None:
    def edit(rows: Rows) -> None:
        for checkpoint in ("base", "ppo"):
            own = [row for row in rows if row["checkpoint"] == checkpoint]
            own[1] |= {name: own[0][name] for name in ("prompt", "prompt_id")}

    run_dir = make_run(tmp_path, checkpoints=("base", "ppo"), num_adversarial=5, num_benign=3, edit=edit)
    assert read_report(run_dir)["transcripts"]["total"] == 8


def test_further_prompt_sets_stand_in_a_table_of_their_own(tmp_path: Path) -> None:
    def edit(rows: Rows) -> None:
        for row in rows:
            if int(re.findall("[0-9]+", row["prompt"][0]["content"])[0]) >= 6:
                row["prompt_set"] = f"second {row['prompt_set']}"

    run_dir = make_run(tmp_path, checkpoints=("base", "ppo"), num_adversarial=16, num_benign=9, edit=edit)
    page = read_page(run_dir)
    main, further = page.text.split("Further prompt sets")
    assert "adversarial, 6 adversarial prompts" in main
    assert "borderline, 6 benign prompts" in main
    assert "second adversarial, 10 adversarial prompts" in further
    assert "second borderline, 3 benign prompts" in further
    assert list(json.loads((run_dir / "report.json").read_text(encoding="utf-8"))["changes"]) == [
        "adversarial",
        "second adversarial",
        "borderline",
        "second borderline",
    ]


def test_false_refusals_by_kind_by_hand(tmp_path: Path) -> None:
    """Three prompts of each kind: before PPO one figure of speech is refused, after it all homonyms and no more."""

    def edit(rows: Rows) -> None:
        for row in rows:
            kind, text = row["tags"].get("kind"), row["prompt"][0]["content"]
            if kind is not None:
                row["refused"] = kind == "homonym" if row["checkpoint"] == "ppo" else "process 1 " in text

    run_dir = make_run(tmp_path, checkpoints=("base", "ppo"), num_adversarial=5, num_benign=9, edit=edit)
    text = read_page(run_dir).text
    report = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    counts = {
        name: {
            kind: (rates["false_refusal"]["count"], rates["false_refusal"]["n"])
            for kind, rates in part["prompt_sets"]["borderline"]["by_kind"].items()
        }
        for name, part in report["checkpoints"].items()
    }
    none, one, all_three = (0, 3), (1, 3), (3, 3)
    assert counts == {
        "base": {"figurative": one, "homonym": none, "safe_target": none},
        "ppo": {"figurative": none, "homonym": all_three, "safe_target": none},
    }
    assert re.search(r"homonym\s+0\.0% →\s+100\.0%", text)


def test_an_evaluation_from_before_kinds_were_counted_still_makes_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = evaluate.summarize_set
    monkeypatch.setattr(
        evaluate,
        "summarize_set",
        lambda *args: {key: value for key, value in counted(*args).items() if key != "by_kind"},
    )
    run_dir = make_run(tmp_path, checkpoints=("base", "ppo"), num_adversarial=5, num_benign=3)
    assert "by_kind" not in (run_dir / "evaluate" / "evaluation.json").read_text(encoding="utf-8")
    assert "Its prompts are not told apart by tags." in read_page(run_dir).text


def test_parents_are_named_by_their_step(built: Path) -> None:
    report = json.loads((built / "report.json").read_text(encoding="utf-8"))
    steps = {step["step"]: step for step in report["steps"]}
    assert {parent["input"]: parent["step"] for parent in steps["ppo"]["parents"]} == {
        "model": None,
        "scorer.safety.path": "safety_rm",
    }
    assert steps["sft"]["data"] == {"counts.starter.read": 300, "counts.starter.kept": 280, "hash": "feedc0defeedc0de"}
    assert steps["sft"]["seed"] == 42


def test_same_inputs_give_the_same_bytes(built: Path, tmp_path: Path) -> None:
    copy = tmp_path / built.name
    shutil.copytree(built, copy, ignore=shutil.ignore_patterns("report.*"))
    command = (
        "import pathlib, sys; from alignment.evaluation import report; report.build_report(pathlib.Path(sys.argv[1]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", command, str(copy)], check=True, env=environment)
    for name in ("report.json", "report.html"):
        assert (copy / name).read_bytes() == (built / name).read_bytes()
    assert sorted(path.name for path in copy.iterdir() if path.is_file()) == ["report.html", "report.json"]


def test_importing_the_report_is_light() -> None:
    command = (
        "import sys, alignment.evaluation.report\n"
        "print(sorted({'torch', 'transformers', 'matplotlib', 'jinja2', 'rich'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    result = subprocess.run(
        [sys.executable, "-c", command], check=True, env=environment, capture_output=True, text=True
    )
    assert result.stdout.strip() == "[]"
