"""The report's section on tuning: probes, the gold scorer and alarms of PPO."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from alignment.evaluation import plots, report
from alignment.evaluation.report import measured
from tests.made_run import make_run, read_page, read_report

if TYPE_CHECKING:
    from pathlib import Path

ALARM = {
    "step": 20,
    "alarm": "gold_drift",
    "action": "stop",
    "reason": "the gold scorer fell <b>a lot</b>; raise ppo.kl_coef",
}


def test_probe_rates_and_gold_scores_are_drawn_where_they_were_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}
    original = plots.probe_rates, plots.curves
    monkeypatch.setattr(plots, "probe_rates", lambda rates: drawn.update(probes=rates) or original[0](rates))

    def curves(steps: list[int], panels: dict[str, list[float]], **options: Any) -> str:
        drawn["gold" if "training score" in panels else "ppo"] = (steps, panels)
        return original[1](steps, panels, **options)

    monkeypatch.setattr(report.plots, "curves", curves)
    page = read_page(make_run(tmp_path, checkpoints=("base", "ppo"), num_adversarial=6, num_benign=4))
    violation, refusal = drawn["probes"].values()
    assert [(step, rate) for step, rate, _, _ in violation] == [(0, 0.3), (10, 0.2), (20, 0.1)]
    assert [(step, rate) for step, rate, _, _ in refusal] == [(0, 0.1), (10, 0.2), (20, 0.3)]
    assert all(low < rate < high for _, rate, low, high in (*violation, *refusal))
    steps, panels = drawn["gold"]
    assert steps == [0, 10, 20]
    assert panels["training score"] == pytest.approx([0.2, 0.6, 1.0])
    assert panels["gold score of the same answers"] == pytest.approx([0.5, 0.4, 0.3])
    assert len(drawn["ppo"][0]) == 30
    assert "bands are 95% Wilson intervals" in page.text
    assert "No alarm was raised." in page.text


def test_alarms_stand_in_the_page_and_in_the_json(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, checkpoints=("base", "ppo"), num_adversarial=6, num_benign=4)
    (run_dir / "ppo" / "alarms.jsonl").write_text(json.dumps(ALARM) + "\n", encoding="utf-8")
    assert read_report(run_dir)["ppo"]["ppo"]["alarms"] == [ALARM]
    text = " ".join(read_page(run_dir).text.split())
    assert "20 gold drift (stopped) the gold scorer fell <b>a lot</b>; raise ppo.kl_coef" in text, "text, not markup"
    assert "No alarm was raised." not in text


def test_another_trainer_goes_by_its_name_and_is_not_said_to_have_been_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}

    def curves(steps: list[int], panels: dict[str, list[float]], *, unit: str) -> str:
        drawn.update(steps=steps, panels=panels, unit=unit)
        return "<svg/>"

    run_dir = make_run(tmp_path, checkpoints=("base", "ppo"), num_adversarial=6, num_benign=4)
    manifest = json.loads((run_dir / "ppo" / "manifest.json").read_text(encoding="utf-8"))
    manifest["metrics"]["trainer"] = "grpo"
    (run_dir / "ppo" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    rows: list[dict[str, Any]] = [
        {"step": 1, "ppo/reward": 0.5, "ppo/kl": 0.0, "ppo/completions/mean_length": 12.0},
        {"step": 4, "ppo/reward": 0.7, "ppo/kl": 0.01, "ppo/completions/mean_length": 11.0},
        {"step": 4, "ppo/train_loss": 0.1},
    ]
    (run_dir / "ppo" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.setattr(report.plots, "curves", curves)
    text = " ".join(read_page(run_dir).text.split())
    assert "GRPO: ppo" in text
    assert "PPO: ppo" not in text.replace("GRPO: ppo", "")
    assert "No alarm was raised." not in text
    assert drawn == {
        "steps": [1, 4],
        "unit": "optimizer step",
        "panels": {
            "score, mean": [0.5, 0.7],
            "KL to the start, nats per token": [0.0, 0.01],
            "tokens per answer": [12.0, 11.0],
        },
    }


def test_a_run_without_probes_has_no_such_figure() -> None:
    values = {"trainer": "ppo", "steps": [0, 1], "curves": {"kl": [0.0, 1.0]}, "alarms": []}
    assert measured(values, "gold_mean") == {"steps": [], "curves": {}}
    assert measured({"steps": [0, 1], "curves": {"a": [None, 2.0], "b": [3.0, 4.0]}}, "a") == {
        "steps": [1],
        "curves": {"a": [2.0], "b": [4.0]},
    }
