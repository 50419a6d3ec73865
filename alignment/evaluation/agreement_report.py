"""`sara judge-agreement`: how far scorers agree with people, in `agreement.json`, `agreement.html`, a table and W&B."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.agreement_file import AGREEMENT_JSON, FORMAT
from alignment.artifact import Artifact, environment, write_json
from alignment.evaluation import plots
from alignment.evaluation.agreement_wording import cautions, headline
from alignment.evaluation.page import render_page, write_page
from alignment.evaluation.wording import number, percent, visible
from alignment.inputs import scorer_fingerprint
from alignment.recipe_agreement import JudgeAgreementRecipe
from alignment.recipe_scorers import ScorerSpec
from alignment.score_file import ScoresFile, read_scores, score_file
from alignment.scoring import build_scorer
from alignment.sources import load_labelled
from alignment.tracking import Tracker, open_tracker
from alignment.workspace import Workspace, open_workspace
from reward.agreement import Case, calls_of, compare_calls, measure_agreement
from reward.conversation import write_json_lines
from reward.platt import Calibration
from reward.scorer import Score, Scorer, ScorerError, as_logit

if TYPE_CHECKING:
    from rich.table import Table

    from alignment.evaluation.collect import JsonObject
    from alignment.source_formats import LabelledConversation

AGREEMENT_HTML = "agreement.html"
CONVERSATIONS = "conversations.jsonl"
CALIBRATION_JSON = "calibration.json"
TEMPLATE = "agreement.html.jinja"


def run(recipe: JudgeAgreementRecipe) -> Artifact:
    """Score the labelled conversations with every scorer and leave the report; goes on after an interruption.

    A folder with other contents is moved aside (`dir` -> `dir.1`).
    """
    loaded = load_labelled(recipe.data, seed=recipe.seed)
    records = _drawn(loaded.records, recipe)
    workspace = open_workspace(recipe)
    with open_tracker(recipe, workspace.path, parents=workspace.inputs) as tracker:
        source = workspace.path / CONVERSATIONS
        write_json_lines(source, (record.to_json() for record in records))
        scored = {name: _score(name, recipe, source) for name in recipe.scorers}
        data = {"counts": loaded.counts, "hash": loaded.data_hash, "drawn": len(records)}
        report = make_report(measure(recipe, records, scored, workspace) | {"data": data})
        write_json(workspace.path / AGREEMENT_JSON, report)
        write_page(workspace.path / AGREEMENT_HTML, render(report))
        track(tracker, report)
        made = (AGREEMENT_JSON, AGREEMENT_HTML, CONVERSATIONS, *(str(_scores_file(name)) for name in scored))
        fitted = (CALIBRATION_JSON,) if recipe.fit_calibration else ()
        artifact = workspace.finish("agreement", data=data, metrics=_metrics(report), files=(*made, *fitted))
        tracker.artifact(artifact)
    return artifact


def _drawn(records: Sequence[LabelledConversation], recipe: JudgeAgreementRecipe) -> list[LabelledConversation]:
    if recipe.limit is None or recipe.limit >= len(records):
        return list(records)
    return [records[n] for n in sorted(random.Random(recipe.seed).sample(range(len(records)), recipe.limit))]


def _scores_file(name: str) -> Path:
    return Path("scores") / f"{name}.jsonl"


def _score(name: str, recipe: JudgeAgreementRecipe, source: Path) -> ScoresFile:
    """One scorer at a time is in memory, and none whose scores stand on disk already."""
    spec = recipe.scorers[name]

    def load() -> Scorer:
        scorer = build_scorer(spec)
        if scorer.scale == "unbounded":
            raise ScorerError(
                f"{name}: {scorer.name} has scores without bounds, so no verdict to compare with people's"
            )
        if recipe.fit_calibration and name == recipe.name and "model" not in getattr(scorer, "provenance", {}):
            raise ScorerError(
                f"{name}: a calibration is fitted for one model, and {scorer.name} does not tell which it is"
            )
        return scorer

    output = source.parent / _scores_file(name)
    score_file(load, scorer=scorer_fingerprint(spec), source=source, output=output)
    return read_scores(output)


# --------------------------------------------------------------------------------------------- the numbers


def measure(
    recipe: JudgeAgreementRecipe,
    records: Sequence[LabelledConversation],
    scored: Mapping[str, ScoresFile],
    workspace: Workspace,
) -> JsonObject:
    """All numbers of the report. With `fit_calibration` only conversations of the half that it does not see count."""
    everything = [
        Case(record.safe, record.prompt.id, record.prompt.tags.risk_category, record.prompt.tags.source)
        for record in records
    ]
    fitting = [n for n, case in enumerate(everything) if recipe.fit_calibration and _fits(case)]
    kept = sorted(set(range(len(everything))) - set(fitting))
    if not kept:
        raise ScorerError("no conversation is left to report on beside those that fit the calibration; give more data")
    cases = [everything[n] for n in kept]
    scores = {name: [part.scores[n] for n in kept] for name, part in scored.items()}
    calls = {name: calls_of(scores[name], part.scale, recipe.threshold) for name, part in scored.items()}
    first = scored[recipe.name]
    fit = None
    if recipe.fit_calibration:
        known = [(first.scores[n], everything[n].safe) for n in fitting]
        fit = _fit(first, known, workspace.path / CALIBRATION_JSON)
    return {
        "format": FORMAT,
        "threshold": recipe.threshold,
        "conversations": {
            "n": len(cases),
            "safe": sum(case.safe for case in cases),
            "unsafe": sum(not case.safe for case in cases),
            "prompts": len({case.prompt_id for case in cases}),
        },
        "scorers": [
            _about(name, recipe.scorers[name], part)
            | {"agreement": measure_agreement(cases, scores[name], scale=part.scale, threshold=recipe.threshold)}
            for name, part in scored.items()
        ],
        "baselines": {
            f"always {name}": measure_agreement(cases, [Score(value)] * len(cases), scale="probability")
            for name, value in _CONSTANT.items()
        },
        "comparisons": {
            name: compare_calls(cases, calls[recipe.name], other)
            for name, other in calls.items()
            if name != recipe.name
        },
        "calibration": None if fit is None else _measure_fit(fit, cases, first, scores[recipe.name], recipe.threshold),
        "provenance": {
            "recipe_hash": recipe.hash,
            "seed": recipe.seed,
            "inputs": dict(workspace.inputs),
            **environment(),
        },
    }


_CONSTANT = {"good": 1.0, "bad": 0.0}


def _about(label: str, spec: ScorerSpec, scored: ScoresFile) -> JsonObject:
    return {
        "label": label,
        "fingerprint": scorer_fingerprint(spec),
        "guidelines": scored.made_with.get("guidelines"),
        "name": scored.name,
        "scale": scored.scale,
        "made_with": dict(scored.made_with),
        "section": spec.model_dump(mode="json"),
    }


def _fits(case: Case) -> bool:
    """Half of the prompts by a bit of their ids, other than the one that `recommended_threshold` halves by."""
    return int(case.prompt_id, 16) // 2 % 2 == 0


def _fit(scored: ScoresFile, known: Sequence[tuple[Score, bool]], file: Path) -> Calibration:
    """The calibration of one half of the prompts, in its file."""
    odds = [(as_logit(score.value, scored.scale), safe) for score, safe in known if score.value is not None]
    calibration = Calibration.fit(odds, judge=scored.made_with)
    calibration.write(file)
    return calibration


def _measure_fit(
    fit: Calibration, cases: Sequence[Case], scored: ScoresFile, scores: Sequence[Score], threshold: float
) -> JsonObject:
    """The calibrated judge on the other half."""
    calibrated = [
        score if score.value is None else Score(fit.log_odds(as_logit(score.value, scored.scale))) for score in scores
    ]
    found = measure_agreement(cases, calibrated, scale="logit", threshold=threshold)
    return {"scale": fit.scale, "bias": fit.bias, "cases": fit.cases, "agreement": found}


def make_report(measured: JsonObject) -> JsonObject:
    """The numbers and what they amount to in words: the content of `agreement.json`."""
    return {"headline": headline(measured), "cautions": cautions(measured)} | measured


def rows_of(report: JsonObject) -> dict[str, JsonObject]:
    """Row heading -> agreement: the scorers, the calibrated one, the baselines."""
    fitted = report["calibration"]
    return {
        **{row["label"]: row["agreement"] for row in report["scorers"]},
        **({} if fitted is None else {f"{report['scorers'][0]['label']}, calibrated": fitted["agreement"]}),
        **report["baselines"],
    }


# ------------------------------------------------------------------------------- the page and the terminal


def render(report: JsonObject) -> str:
    """The page of a report, as a function of its numbers alone."""
    rows = rows_of(report)
    curves = {
        "calibration": report["scorers"][0]["agreement"]["calibration"],
        "calibrated": None if report["calibration"] is None else report["calibration"]["agreement"]["calibration"],
    }
    figures: dict[str, str | None] = {
        "confusion": plots.confusion_bars({row["label"]: row["agreement"]["confusion"] for row in report["scorers"]}),
        "roc": plots.roc_curves(
            {name: found["roc"]["points"] for name, found in rows.items() if found["roc"] is not None}
        ),
        **{
            name: None if curve is None else plots.calibration_curve(curve, happened="answers labelled safe")
            for name, curve in curves.items()
        },
    }
    return render_page(TEMPLATE, report=report, rows=rows, figures=figures)


def summary_table(report: JsonObject) -> Table:
    """The main numbers for a terminal of 80 characters, each with its 95% interval and the count behind it."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(visible(report["headline"])), title_justify="left", title_style="bold", box=box.SIMPLE)
    table.add_column("", max_width=38, overflow="fold")
    for heading in ("value", "95% interval", "n"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, found in rows_of(report).items():
        table.add_row(Text(visible(name), style="bold"))
        for cells in _summary_rows(found, brief=name in report["baselines"]):
            table.add_row(*(Text(visible(cell)) for cell in cells))
    for name, pair in report["comparisons"].items():
        table.add_row(
            *(Text(visible(cell)) for cell in _rate_row(f"better than {name} by", pair["balanced_accuracy_difference"]))
        )
    return table


def _summary_rows(found: JsonObject, *, brief: bool) -> Iterator[tuple[str, str, str, str]]:
    yield _rate_row("  balanced accuracy", found["balanced_accuracy"])
    yield _rate_row("  right", found["correct"])
    if brief:
        return
    if found["no_decision"]["count"]:
        yield _rate_row("  no decision", found["no_decision"])
    for name in ("kappa", "ac1"):
        yield _number_row(f"  {name}" if name == "kappa" else "  AC1", found[name])
    for label in ("unsafe", "safe"):
        for measure_name in ("precision", "recall"):
            yield _rate_row(f"  {label}: {measure_name}", found["classes"][label][measure_name])
    if found["roc"] is not None:
        auc, curve = found["roc"]["auc"], found["calibration"]
        yield _number_row("  AUC", auc | {"n": auc["n_positive"] + auc["n_negative"]})
        yield "  ECE", number(curve["ece"], 3), f"chance ≤ {curve['ece_by_chance']['high']:.3f}", str(curve["n"])


def _rate_row(name: str, rate: JsonObject) -> tuple[str, str, str, str]:
    bounds = "" if rate["low"] is None else f"{100 * rate['low']:.1f} to {100 * rate['high']:.1f}".replace("-", "−")
    return name, percent(rate["value"]).replace("-", "−"), bounds, str(rate["n"])


def _number_row(name: str, found: JsonObject) -> tuple[str, str, str, str]:
    bounds = "" if found["low"] is None else f"{number(found['low'], 3)} to {number(found['high'], 3)}"
    return name, number(found["value"], 3), bounds, str(found["n"])


# ------------------------------------------------------------------------------------------------ tracking


def track(tracker: Tracker, report: JsonObject) -> None:
    """The main numbers of every row, and the counts by group as a table."""
    tracker.log(0, {f"judge_agreement/{name}": value for name, value in _metrics(report).items()})
    columns = ["scorer", "grouped_by", "group", "n", "correct", "balanced_accuracy", "no_decision"]
    rows = [
        [
            name,
            key,
            group,
            part["n"],
            part["correct"]["value"],
            part["balanced_accuracy"]["value"],
            part["no_decision"]["count"],
        ]
        for name, found in rows_of(report).items()
        for key in ("by_source", "by_category")
        for group, part in found[key].items()
    ]
    if rows:
        tracker.table("agreement_by_group", columns, rows, step=0)


def _metrics(report: JsonObject) -> dict[str, float]:
    """`judge/balanced_accuracy` and so on, as far as they are defined."""
    metrics: dict[str, Any] = {}
    for name, found in rows_of(report).items():
        values = {key: found[key]["value"] for key in ("balanced_accuracy", "kappa", "ac1", "correct", "no_decision")}
        for label, part in found["classes"].items():
            values |= {f"{label}_{key}": part[key]["value"] for key in ("precision", "recall", "f1")}
        if found["roc"] is not None:
            curve = found["calibration"]
            values |= {"auc": found["roc"]["auc"]["value"], "ece": curve["ece"], "brier": curve["brier"]}
        metrics |= {f"{name}/{key}": value for key, value in values.items() if value is not None}
    return metrics
