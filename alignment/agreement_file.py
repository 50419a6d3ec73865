"""`agreement.json`, the report of `sara judge-agreement`, as others read it: does this scorer agree with people?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

AGREEMENT_JSON = "agreement.json"
FORMAT = 1
"""Changes when a field that is read here changes its meaning."""


class AgreementError(ValueError):
    """A report that cannot be read, or that says nothing of the scorer in question."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far one scorer agrees with people, in the numbers that a decision needs.

    `fingerprint` is that of `alignment.inputs.scorer_fingerprint`; `guidelines` the hash of a judge's (None: no judge);
    `threshold` the P(safe) from which on it called an answer safe. `balanced_accuracy` counts no decision as a miss;
    `balanced_accuracy_low` and `kappa_low` are the lower ends of 95% intervals. None where one label is missing.
    """

    label: str
    fingerprint: str
    guidelines: str | None
    threshold: float
    n: int
    no_decision: int
    balanced_accuracy: float | None
    balanced_accuracy_low: float | None
    kappa: float | None
    kappa_low: float | None
    data_hash: str


def read_agreement(path: str | Path, *, fingerprint: str | None = None) -> Agreement:
    """The agreement of the scorer with this fingerprint (None: the first) in a report, given as folder or file.

    AgreementError, in one line, when there is no such report or the scorer is not in it.
    """
    file = Path(path) / AGREEMENT_JSON if Path(path).is_dir() else Path(path)
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        if report["format"] != FORMAT:
            raise AgreementError(
                f"{file} has format {report['format']!r}, not {FORMAT}; run sara judge-agreement again"
            )
        found = [_agreement(row, report) for row in report["scorers"]]
    except OSError as error:
        raise AgreementError(f"{file} cannot be read ({error.strerror}); sara judge-agreement makes it") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, AgreementError):
            raise
        raise AgreementError(f"{file} is no report of sara judge-agreement: {type(error).__name__}: {error}") from error
    chosen = [row for row in found if fingerprint in (None, row.fingerprint)]
    if not chosen:
        known = ", ".join(row.label for row in found)
        raise AgreementError(
            f"{file} measured {known}, but not this scorer as it is now; run sara judge-agreement with it"
        )
    return chosen[0]


def check_labeller(
    path: str | None, *, fingerprint: str, guidelines: str | None, threshold: float, minimum: float
) -> Agreement:
    """How far the scorer with this fingerprint agrees with people, if that is enough to label training data.

    AgreementError, in one line, when the report at `path` is not about this very scorer with these guidelines and this
    threshold, or when the lower end of its balanced accuracy is below `minimum`.
    """
    if path is None:
        raise AgreementError(
            "nobody measured this labeller against people; run sara judge-agreement with it and name its folder as "
            "`agreement`, or set allow_unmeasured: true"
        )
    found = read_agreement(path, fingerprint=fingerprint)
    if found.guidelines != guidelines:
        raise AgreementError(
            f"{path} measured {found.label} with guidelines {found.guidelines}, but it would label with {guidelines}"
        )
    if found.threshold != threshold:
        raise AgreementError(
            f"{path} called answers safe from P(safe) = {found.threshold} on, but the recipe does from {threshold} on; "
            f"run sara judge-agreement with --threshold {threshold}"
        )
    low = found.balanced_accuracy_low
    if low is None:
        raise AgreementError(f"{path} has answers of one label only, so it says nothing of the other; add such answers")
    if low < minimum:
        raise AgreementError(
            f"{path}: the balanced accuracy of {found.label} is {found.balanced_accuracy:.1%}, at least {low:.1%} "
            f"(95% interval), but min_balanced_accuracy asks for {minimum:.1%}"
        )
    return found


def _agreement(row: Mapping[str, Any], report: Mapping[str, Any]) -> Agreement:
    found: Mapping[str, Any] = row["agreement"]
    accuracy, kappa = found["balanced_accuracy"], found["kappa"]
    return Agreement(
        label=_text(row["label"]),
        fingerprint=_text(row["fingerprint"]),
        guidelines=None if row["guidelines"] is None else _text(row["guidelines"]),
        threshold=float(report["threshold"]),
        n=int(found["n"]),
        no_decision=int(found["no_decision"]["count"]),
        balanced_accuracy=_number(accuracy["value"]),
        balanced_accuracy_low=_number(accuracy["low"]),
        kappa=_number(kappa["value"]),
        kappa_low=_number(kappa["low"]),
        data_hash=_text(report["data"]["hash"]),
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {value!r}")
    return value


def _number(value: object) -> float | None:
    return None if value is None else float(cast("float", value))
