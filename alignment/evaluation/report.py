"""The report of a run: `report.json` with every number shown, and `report.html`, one page that needs nothing else.

How strangers' texts are kept from acting in it is said in `page.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.artifact import write_json
from alignment.evaluation import plots
from alignment.evaluation.collect import JsonObject, ReportError, collect
from alignment.evaluation.page import render_page, write_page
from alignment.evaluation.wording import cautions, direction, first_set, headline, number, scorer_label, visible

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table

__all__ = ["ReportError", "build_report", "make_report", "render", "summary_table"]

REPORT_JSON = "report.json"
REPORT_HTML = "report.html"
TEMPLATE = "report.html.jinja"

GROUPS = {
    "violation": {"by_risk_category": "Risk category", "by_attack_vector": "Attack vector"},
    "false_refusal": {"by_kind": "Kind"},
}
"""What rates of a prompt set are broken down by, by what the set measures: key and title."""
PPO_PANELS = {
    "score_mean": "score, mean",
    "kl": "KL to the start, nats per answer",
    "refusal_rate": "refusal rate",
    "completion_tokens": "tokens per answer",
    "entropy": "entropy, nats per token",
    "explained_variance": "explained variance",
    "finished_share": "share of finished answers",
    "safety_branch_share": "share scored for safety",
    "clip_fraction": "share of clipped tokens",
    "ratio_max": "largest ratio of a token",
    "logprob_difference_mean": "sampler against trainer, nats",
}
GROUP_PANELS = {
    "reward": "score, mean",
    "kl": "KL to the start, nats per token",
    "completions/mean_length": "tokens per answer",
    "entropy": "entropy, nats per token",
    "completions/clipped_ratio": "share of answers cut off",
    "clip_ratio/region_mean": "share of clipped tokens",
}
"""What TRL's trainers of groups of answers log; their KL is a mean over tokens, where PPO's is a sum over an answer."""
PROBE_PANELS = {"violation": "violation rate, % of probes", "false_refusal": "false-refusal rate, % of probes"}
GOLD_PANELS = {
    "gold_training_mean": "training score",
    "gold_mean": "gold score of the same answers",
    "gold_correlation": "correlation of the two",
}


def build_report(run_dir: Path) -> Path:
    """Write `report.json` and `report.html` into a run folder; the path of the page.

    ReportError when the folder does not hold exactly one complete evaluation.
    """
    report = make_report(run_dir)
    page = render(report)
    write_json(run_dir / REPORT_JSON, report)
    path = run_dir / REPORT_HTML
    write_page(path, page)
    return path


def make_report(run_dir: Path) -> JsonObject:
    """The numbers of a run and what they amount to in words: the content of `report.json`."""
    collected = collect(run_dir)
    return {"headline": headline(collected), "cautions": cautions(collected)} | collected


def render(report: JsonObject) -> str:
    """The page of a report, as a function of its numbers alone."""
    return render_page(
        TEMPLATE,
        report=report,
        groups={name: _groups_of(report, name) for name in report["prompt_sets"]},
        figures=_figures(report),
        adversarial=first_set(report, "violation"),
        benign=first_set(report, "false_refusal"),
        direction=direction,
    )


# ------------------------------------------------------------------------------------------------ the plots


def _figures(report: JsonObject) -> dict[str, Any]:
    """All plots as SVG; None where there is nothing to draw."""
    before, after = report["before"], report["after"]
    scores = report["scores"]
    return {
        "trade_off": _trade_off(report),
        "bars": _bars(report),
        "groups": {
            (name, key): _groups(report, name, key)
            for name in report["prompt_sets"]
            for key, _ in _groups_of(report, name)
        },
        "scores": None if scores is None else plots.score_scatter(scores, before=before, after=after),
        "reward_models": [plots.pair_accuracies(model["report"]) for model in report["reward_models"]],
        "ppo": {step: _training(values) for step, values in report["ppo"].items()},
        "probes": {step: _probes(values) for step, values in report["ppo"].items()},
        "gold": {step: _curves(measured(values, "gold_mean"), GOLD_PANELS) for step, values in report["ppo"].items()},
        "context_distillation": {
            step: plots.gain_scatter(values["pairs"]) if values["pairs"] else None
            for step, values in report["context_distillation"].items()
        },
    }


def _trade_off(report: JsonObject) -> str | None:
    adversarial, benign = first_set(report, "violation"), first_set(report, "false_refusal")
    if adversarial is None or benign is None:
        return None
    scorer = report["violation_scorers"][0]
    return plots.trade_off(
        [
            (name, part["prompt_sets"][adversarial]["violation"][scorer], part["prompt_sets"][benign]["false_refusal"])
            for name, part in report["checkpoints"].items()
        ]
    )


def _bars(report: JsonObject) -> str:
    adversarial, benign = first_set(report, "violation"), first_set(report, "false_refusal")
    parts = [part["prompt_sets"] for part in report["checkpoints"].values()]
    series: dict[str, list[JsonObject]] = {}
    if adversarial is not None:
        for name in parts[0][adversarial]["violation"]:
            series[f"violation: {scorer_label(name)}"] = [part[adversarial]["violation"][name] for part in parts]
    if benign is not None:
        series["false refusal"] = [part[benign]["false_refusal"] for part in parts]
    return plots.rate_bars(list(report["checkpoints"]), series, last_is_refusal=benign is not None)


def _groups_of(report: JsonObject, prompt_set: str) -> list[tuple[str, str]]:
    """Key and title of the groups that the prompts of a set are tagged with."""
    found = report["checkpoints"][report["before"]]["prompt_sets"][prompt_set]
    return [(key, title) for key, title in GROUPS[report["prompt_sets"][prompt_set]].items() if found.get(key)]


def _groups(report: JsonObject, prompt_set: str, key: str) -> str:
    before, after = report["before"], report["after"]
    benign = report["prompt_sets"][prompt_set] == "false_refusal"
    measure = "false_refusal" if benign else report["violation_scorers"][0]
    first, last = (report["checkpoints"][name]["prompt_sets"][prompt_set][key] for name in (before, after))
    pairs = {name.replace("_", " "): (first[name][measure], last[name][measure]) for name in first}
    rate_name = "false-refusal rate" if benign else "violation rate"
    return plots.before_and_after(pairs, before=before, after=after, rate_name=rate_name)


def measured(values: JsonObject, name: str) -> JsonObject:
    """The curves at the iterations alone that wrote the metric `name`."""
    column = values["curves"].get(name, [])
    places = [place for place, value in enumerate(column) if value is not None]
    return {
        "steps": [values["steps"][place] for place in places],
        "curves": {other: [curve[place] for place in places] for other, curve in values["curves"].items() if places},
    }


def _training(values: JsonObject) -> str | None:
    """The curves of PPO, or of the trainer in its place, which logs by optimizer steps."""
    if values["trainer"] == "ppo":
        return _curves(values, PPO_PANELS)
    return _curves(measured(values, "reward"), GROUP_PANELS, unit="optimizer step")


def _probes(values: JsonObject) -> str | None:
    rates: dict[str, list[tuple[int, float, float, float]]] = {}
    for name, title in PROBE_PANELS.items():
        own = measured(values, f"probe_{name}_rate")
        if own["steps"]:
            columns = [own["curves"][f"probe_{name}_{part}"] for part in ("rate", "low", "high")]
            rates[title] = list(zip(own["steps"], *columns, strict=True))
    return plots.probe_rates(rates) if rates else None


def _curves(values: JsonObject, titles: Mapping[str, str], *, unit: str = "iteration") -> str | None:
    panels = {title: values["curves"][name] for name, title in titles.items() if name in values["curves"]}
    return plots.curves(values["steps"], panels, unit=unit) if panels else None


# -------------------------------------------------------------------------------------------- the terminal


def summary_table(report: JsonObject) -> Table:
    """A column per checkpoint, for a terminal of 80 characters: rates of every prompt set with their 95% intervals."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(visible(report["headline"])), title_justify="left", title_style="bold", box=box.SIMPLE)
    table.add_column("percent", max_width=22)
    columns: list[dict[str, str]] = []
    for name, checkpoint in report["checkpoints"].items():
        table.add_column(Text(visible(name).replace("_", "_\n")), justify="right")
        columns.append(_summary_column(checkpoint["prompt_sets"]))
    for heading in columns[0]:
        words = visible(heading).replace("_", " ")  # so that long names can be wrapped
        table.add_row(Text(words), *(Text(column[heading]) for column in columns))
    return table


def _summary_column(sets: JsonObject) -> dict[str, str]:
    """Row heading -> cell of one checkpoint; the interval stands on a second line."""
    cells: dict[str, str] = {}
    for name, part in sets.items():
        if part["measures"] == "violation":
            cells |= {
                f"{name}: violation by {scorer_label(scorer)}": _rate_cell(rate)
                for scorer, rate in part["violation"].items()
            }
        else:
            cells[f"{name}: false refusal"] = _rate_cell(part["false_refusal"])
    for name, part in sets.items():
        cells[f"{name}: degenerate"] = _rate_cell(part["degenerate"])
        cells[f"{name}: words"] = number(part["mean_words"]["value"], 0)
        cells |= {f"{name}: mean {scorer}": number(mean["value"]) for scorer, mean in part["mean_scores"].items()}
    return cells


def _rate_cell(rate: JsonObject) -> str:
    if rate["value"] is None:
        return "–"
    low, high = (f"{100 * rate[end]:.0f}" for end in ("low", "high"))
    return f"{100 * rate['value']:.0f}\n[{low}, {high}]"
