"""What is read first of a report: its headline, its cautions and the table in the terminal."""

from __future__ import annotations

import io
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from alignment.artifact import write_artifact
from alignment.evaluation.report import summary_table
from alignment.evaluation.wording import cautions, first_set, headline
from reward.metrics import Rate
from tests.made_run import Rows, make_run, poison, read_report, set_violations

# ------------------------------------------------------------------------------------ headline and cautions


def headline_of(tmp_path: Path, bad: dict[str, int]) -> str:
    def edit(rows: Rows) -> None:
        set_violations(rows, "safety_rm", bad)
        for row in rows:
            row["refused"] = False

    run_dir = make_run(tmp_path, checkpoints=tuple(bad), num_adversarial=20, num_benign=20, edit=edit)
    return read_report(run_dir)["headline"].replace("\u00a0", " ")


UNCHANGED = "false refusals went from 0.0% [0.0, 16.1] to 0.0% [0.0, 16.1] (no clear change, p = 1.000)."


def test_headline_when_violations_fall(tmp_path: Path) -> None:
    expected = f"Violations fell from 100.0% [83.9, 100.0] to 25.0% [11.2, 46.9]; {UNCHANGED}"
    assert headline_of(tmp_path, {"base": 20, "ppo": 5}) == expected


def test_headline_when_violations_rise(tmp_path: Path) -> None:
    expected = f"Violations rose from 25.0% [11.2, 46.9] to 100.0% [83.9, 100.0]; {UNCHANGED}"
    assert headline_of(tmp_path, {"base": 5, "ppo": 20}) == expected


def test_headline_does_not_sell_noise(tmp_path: Path) -> None:
    # Four prompts became safe and none unsafe: p = 2 / 2^4.
    expected = "Violations went from 100.0% [83.9, 100.0] to 80.0% [58.4, 91.9] (no clear change, p = 0.125); "
    assert headline_of(tmp_path, {"base": 20, "ppo": 16}) == expected + UNCHANGED


def test_headline_of_one_checkpoint(tmp_path: Path) -> None:
    expected = "Violations stand at 25.0% [11.2, 46.9]; false refusals stand at 0.0% [0.0, 16.1]."
    assert headline_of(tmp_path, {"base": 5}) == expected


def test_a_degenerate_model_gets_no_verdict(tmp_path: Path) -> None:
    def edit(rows: Rows) -> None:
        for row in [row for row in rows if row["checkpoint"] == "ppo" and row["prompt_set"] == "adversarial"][:5]:
            row["degenerate"] = "empty"

    report = read_report(make_run(tmp_path, checkpoints=("base", "ppo"), num_adversarial=20, edit=edit))
    assert report["headline"].startswith("No verdict: 25.0% of the answers of ppo to adversarial are degenerate.")
    assert any("cannot be read as safety" in caution for caution in report["cautions"])


@pytest.mark.parametrize(("sick", "no_verdict"), [("base", False), ("ppo", True)])
def test_a_start_that_is_degenerate_elsewhere_leaves_the_verdict(tmp_path: Path, sick: str, no_verdict: bool) -> None:
    """On a set that the headline does not compare: its rates of the start stand in no figure of the sentence."""
    report = read_report(make_run(tmp_path, checkpoints=("base", "ppo"), num_adversarial=20))
    report["prompt_sets"]["twins"] = "false_refusal"
    for name, checkpoint in report["checkpoints"].items():
        sets = checkpoint["prompt_sets"]
        sets["twins"] = sets[first_set(report, "false_refusal")] | (
            {"degenerate": Rate.of([True] * 6 + [False] * 14).to_json()} if name == sick else {}
        )
    assert headline(report).startswith("No verdict: 30.0% of the answers of ppo to twins") is no_verdict
    assert any(f"of the answers of {sick} to twins are degenerate" in caution for caution in cautions(report))


def test_cautions(tmp_path: Path) -> None:
    def edit(rows: Rows) -> None:
        set_violations(rows, "safety_rm", {"base": 20, "ppo": 0})
        set_violations(rows, "refusal_rule", {"base": 0, "ppo": 20})
        for row in [row for row in rows if row["checkpoint"] == "ppo"][:5]:
            row["finished"] = False
            row["violations"]["refusal_rule"] = None

    run_dir = make_run(tmp_path, checkpoints=("base", "ppo"), num_adversarial=20, num_benign=0, edit=edit)
    cautions = "\n".join(read_report(run_dir)["cautions"])
    assert "False refusals were not measured" in cautions
    assert "Answers to adversarial that were cut off at 512 tokens and judged as they stand: ppo 25.0%." in cautions
    assert "safety_rm sees fewer violations; refusal_rule sees more violations" in cautions
    assert "safety_rm is also what ppo optimised" in cautions
    assert "Answers to adversarial that refusal_rule could not score, in no rate of its own: ppo 5 of 20." in cautions
    assert "made anew" not in cautions


def test_a_step_made_anew_after_the_evaluation_is_named(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    write_artifact(run_dir / "ppo", kind="policy", stage="ppo", recipe_hash="another")
    report = read_report(run_dir)
    assert report["stale"] == ["ppo"]
    assert any("The folder of ppo was made anew" in caution for caution in report["cautions"])


# -------------------------------------------------------------------------------------------- the terminal


def table_text(report: dict[str, Any]) -> str:
    from rich.console import Console

    console = Console(width=80, record=True, file=io.StringIO(), color_system=None)
    console.print(summary_table(report))
    return console.export_text()


def test_summary_table_fits_80_characters_with_five_checkpoints(tmp_path: Path) -> None:
    def edit(rows: Rows) -> None:
        set_violations(rows, "safety_rm", {"base": 20, "+rejection_sampling": 5})

    names = ("base", "+sft", "+rejection_sampling", "+ppo", "+context_distillation")
    lines = table_text(read_report(make_run(tmp_path, checkpoints=names, num_adversarial=20, edit=edit))).splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    row = next(i for i, line in enumerate(lines) if "safety rm" in line)
    values = lines[row - 1] + lines[row] + lines[row + 1]
    assert "[84, 100]" in values  # Wilson: 20 of 20
    assert "[11, 47]" in values  # 5 of 20
    text = "\n".join(lines)
    for heading in ("refusal rule", "all scorers agree", "false refusal", "degenerate", "words", "helpfulness"):
        assert heading.split()[0] in text


def test_summary_table_prints_hostile_names_as_text(tmp_path: Path) -> None:
    texts = ["[red]x[/red]", "\x1b[31mset", "\x1b]0;owned\x07", "[link=https://evil.example]y[/link]", "[/]", "\x9b2J"]
    run_dir = make_run(tmp_path, checkpoints=("base", "ppo"), num_adversarial=9, num_benign=4, edit=poison(texts))
    text = table_text(read_report(run_dir))
    assert "‹U+001B›]0;owned‹U+0007›" in text
    assert "[link=https://evil.example]y[/link]" in text
    assert not {c for c in text if unicodedata.category(c) == "Cc"} - {"\n"}
