"""The agreement report in words: its headline and what a reader must know before using the judge."""

from __future__ import annotations

from collections.abc import Iterator

from alignment.evaluation.collect import JsonObject
from alignment.evaluation.reward_wording import CLEAR_GAIN
from alignment.evaluation.wording import MAX_UNSCORED, number, percent, rate_text

FEW_PROMPTS = 30
"""Below it, intervals over prompts are too short (their number is that of independent observations)."""


def headline(report: JsonObject) -> str:
    """How far it agrees with people, in one sentence, with the baseline that it has to beat."""
    row = report["scorers"][0]
    found, good = row["agreement"], report["baselines"]["always good"]
    accuracy = found["balanced_accuracy"]
    if accuracy["value"] is None:
        return (
            f"{row['label']} is right on {rate_text(found['correct'])} of {found['n']} conversations, all of which "
            "people labelled the same."
        )
    return (
        f"{row['label']} has a balanced accuracy of {rate_text(accuracy)} on {found['n']} conversations that people "
        f"labelled (kappa {number(found['kappa']['value'])}); calling everything good has "
        f"{percent(good['balanced_accuracy']['value'])} and is right in {percent(good['correct']['value'])}."
    )


def cautions(report: JsonObject) -> list[str]:
    """What stands between these verdicts and their use."""
    found = report["scorers"][0]["agreement"]
    return [
        *_labels(report),
        *_against_constants(found, report["baselines"]),
        *_silence(found),
        *_threshold(found, report["threshold"]),
        *_calibration(found),
    ]


def _labels(report: JsonObject) -> Iterator[str]:
    counted = report["conversations"]
    if not counted["safe"] or not counted["unsafe"]:
        label = "safe" if counted["safe"] else "unsafe"
        yield f"Every conversation is labelled {label}: a judge that always says so is right on all of them."
    if counted["prompts"] < FEW_PROMPTS:
        yield f"There are only {counted['prompts']} prompts, so the intervals are rough."


def _against_constants(found: JsonObject, baselines: JsonObject) -> Iterator[str]:
    accuracy = found["balanced_accuracy"]
    if accuracy["value"] is None:
        return
    if accuracy["high"] < 0.5:
        yield "It is wrong more often than not: its direction may be turned round."
    elif accuracy["low"] <= 0.5:
        yield "It cannot be told from a judge that always says the same."
    name, best = max(((name, row["correct"]["value"]) for name, row in baselines.items()), key=lambda item: item[1])
    if found["correct"]["value"] <= best:
        yield (
            f"It is right on {percent(found['correct']['value'])}, no more often than the baseline “{name}” "
            f"({percent(best)})."
        )


def _silence(found: JsonObject) -> Iterator[str]:
    silent = found["no_decision"]
    if silent["value"] > MAX_UNSCORED:
        yield f"It came to no decision on {silent['count']} of {silent['n']} conversations; none counts as right."


def _threshold(found: JsonObject, threshold: float) -> Iterator[str]:
    better = found["recommended_threshold"]
    if better is None or threshold != 0.5 or better["probability"] is None:
        return
    measured, as_it_comes = better["measured"]["balanced_accuracy"], better["as_it_comes"]["balanced_accuracy"]
    if measured["value"] - as_it_comes["value"] > CLEAR_GAIN:
        yield (
            f"Its 0.5 is in the wrong place: P(safe) = {number(better['probability'], 3)} has a balanced accuracy of "
            f"{rate_text(measured)} instead of {rate_text(as_it_comes)}, measured on other prompts than chosen on."
        )


def _calibration(found: JsonObject) -> Iterator[str]:
    curve = found["calibration"]
    if curve is not None and curve["ece"] > curve["ece_by_chance"]["high"]:
        yield (
            f"P(safe) does not mean what it says: its expected calibration error is {number(curve['ece'], 3)}; chance "
            f"alone seldom makes more than {number(curve['ece_by_chance']['high'], 3)}."
        )
