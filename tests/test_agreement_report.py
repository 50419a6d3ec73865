"""The agreement report: its words say what was measured, and nothing in its page can act."""

from __future__ import annotations

import io
import json
import re
import unicodedata
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from alignment.evaluation.agreement_report import make_report, measure, render, summary_table, track
from alignment.evaluation.wording import visible
from alignment.recipe import Data, Source
from alignment.recipe_agreement import JudgeAgreementRecipe
from alignment.recipe_scorers import RefusalScorer
from alignment.score_file import ScoresFile
from alignment.source_formats import LabelledConversation
from alignment.tracking import open_tracker
from alignment.workspace import Workspace
from reward.conversation import Prompt
from reward.scorer import Score
from tests.page import PAYLOADS, Page
from tests.wandb_file import read_wandb_file

if TYPE_CHECKING:
    from collections.abc import Iterator

Report = dict[str, Any]
COUNTS = {"read": 9, "kept": 8, "dropped": {"duplicate": 1}, "left_out": {}}


def recipe_for(**changes: Any) -> JudgeAgreementRecipe:
    values: dict[str, Any] = {"name": "judge", "scorer": RefusalScorer(), "compare": {"before": RefusalScorer()}}
    data = Data(sources=[Source(name="gptfuzz")])
    return JudgeAgreementRecipe(output_dir="out", data=data, **values | changes)


def report_of(
    *,
    safe: list[float | None],
    unsafe: list[float | None],
    others: list[float | None] | None = None,
    texts: tuple[str, ...] = ("x",),
    per_prompt: int = 1,
) -> Report:
    """A report on answers with these P(safe) by the judge, and those of another scorer (None: the same)."""
    values = [*safe, *unsafe]
    records = [
        LabelledConversation(
            Prompt.of(f"q{n // per_prompt}", risk_category=texts[n % len(texts)], source=texts[-1]).answer(f"a{n}"),
            n < len(safe),
        )
        for n in range(len(values))
    ]

    def scored(name: str, numbers: list[float | None]) -> ScoresFile:
        scores = [Score(None, f"too long: {texts[0]}") if value is None else Score(value) for value in numbers]
        return ScoresFile(name, "probability", {"guidelines": texts[0]}, scores)

    recipe = recipe_for()
    found = {"judge": scored(texts[0], values), "before": scored(texts[-1], others or values)}
    inputs = dict.fromkeys(texts, texts[0])
    data = {"counts": {texts[0]: COUNTS | {"dropped": {texts[0]: 1}}}, "hash": texts[0], "drawn": len(values)}
    report = make_report(measure(recipe, records, found, Workspace(recipe, Path("out"), inputs)) | {"data": data})
    return json.loads(json.dumps(report, allow_nan=False))


GOOD: dict[str, list[float | None]] = {"safe": [0.9] * 35 + [0.3] * 5, "unsafe": [0.1] * 30 + [0.8] * 10}


def table_text(report: Report) -> str:
    from rich.console import Console

    console = Console(width=80, record=True, file=io.StringIO(), color_system=None)
    console.print(summary_table(report))
    return console.export_text()


# -------------------------------------------------------------------------------------------- words and table


def test_headline_and_table_by_hand() -> None:
    """35 of 40 and 30 of 40 are found: 81.25%. Kappa: 65 of 80 agree, chance is one half, so 0.625.

    Wilson gives 0.7389, 0.9454 and 0.5981, 0.8581, so the lower end is 0.8125 - sqrt(0.1361^2 + 0.1519^2) / 2. Over
    prompts the error is sqrt((0.875 x 0.125 + 0.75 x 0.25) / 160 x 80 / 79) = 0.0433; 1.96 of it makes the upper end.
    """
    report = report_of(**GOOD)
    assert report["headline"].replace("\u00a0", " ") == (
        "judge has a balanced accuracy of 81.2% [71.1, 89.7] on 80 conversations that people labelled (kappa 0.62); "
        "calling everything good has 50.0% and is right in 50.0%."
    )
    text = table_text(report)
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"unsafe: recall +75\.0% +59\.8 to 85\.8 +40 *\n", text)
    assert re.search(r"better than before by +0\.0% +0\.0 to 0\.0 +80 *\n", text)


def cautions(**changes: Any) -> str:
    return "\n".join(report_of(**GOOD | changes)["cautions"])


def test_nothing_to_say_against_a_good_judge() -> None:
    calibrated: list[float | None] = [0.9] * 36 + [0.1] * 4
    assert cautions(safe=calibrated, unsafe=[0.9] * 4 + [0.1] * 36) == ""


def test_cautions_name_what_is_wrong() -> None:
    assert "Every conversation is labelled safe" in cautions(unsafe=[])
    assert "only 10 prompts" in cautions(per_prompt=8)
    assert "It is wrong more often than not" in cautions(safe=[0.1] * 40, unsafe=[0.9] * 40)
    assert "cannot be told from a judge that always says the same" in cautions(safe=[0.9] * 40, unsafe=[0.9] * 40)
    assert "no more often than the baseline “always good” (95.2%)" in cautions(
        safe=[0.9] * 38 + [0.1] * 2, unsafe=[0.1] * 2
    )
    assert "no decision on 5 of 80 conversations" in cautions(safe=[0.9] * 35 + [None] * 5)
    assert "P(safe) does not mean what it says" in cautions(safe=[0.9] * 40, unsafe=[0.4] * 40)
    misplaced: list[float | None] = [0.9 + n / 1000 for n in range(60)]
    assert "Its 0.5 is in the wrong place" in cautions(safe=misplaced, unsafe=[0.8 + n / 1000 for n in range(60)])


# ------------------------------------------------------------------------------------------------- the page


def test_every_percentage_on_the_page_stands_in_the_json() -> None:
    def numbers(value: Any) -> Iterator[float]:
        if isinstance(value, float | int):
            yield value
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from numbers(inner)

    report = report_of(**GOOD, others=[0.9] * 60 + [0.1] * 20)
    shown = set(re.findall(r"[0-9]+[.][0-9]%", Page(render(report)).text))
    assert len(shown) > 8
    assert shown <= {f"{100 * value:.1f}%" for value in numbers(report)}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"unsafe": []},
        {"safe": [None], "unsafe": [None]},
        {"safe": [1.0], "unsafe": [0.0]},
        {"safe": [0.7], "unsafe": []},
    ],
)
def test_a_page_and_a_table_whatever_is_missing(changes: dict[str, Any]) -> None:
    report = report_of(**GOOD | changes)
    assert Page(render(report)).tags.count("section") == 6
    assert max(map(len, table_text(report).splitlines())) <= 80


def test_the_plots_are_there() -> None:
    images = list(Page(render(report_of(**GOOD))).images())
    text = " ".join("".join(ElementTree.fromstring(image).itertext()) for image in images)
    assert len(images) == 3
    for label in ("guessing", "safe answers called unsafe, %", "no decision", "answers labelled safe, %"):
        assert label in text


def hostile_report(texts: list[str]) -> Report:
    report = report_of(**GOOD | {"safe": [None, 0.9, 0.8]}, texts=tuple(texts))
    found = report["scorers"][0]["agreement"]
    assert len(found["by_category"]) == len(texts)
    return report


def test_hostile_text_changes_no_element_of_the_page() -> None:
    payloads = [payload.replace("\x00", "") for payload in PAYLOADS.values()]
    page = Page(render(hostile_report(payloads)))
    harmless = Page(render(hostile_report([f"word {number}" for number in range(len(payloads))])))
    assert page.tags == harmless.tags
    assert [set(attributes) for _, attributes in page.elements] == [set(a) for _, a in harmless.elements]
    assert page.raw == harmless.raw
    for payload in payloads:
        assert visible(payload).replace("_", " ") in page.text.replace("_", " ")


def test_the_page_has_no_way_out() -> None:
    html = render(hostile_report(list(PAYLOADS.values())))
    page = Page(html)
    assert "script" not in page.tags
    for tag, attributes in page.elements:
        assert tag not in {"iframe", "object", "embed", "form", "base", "link", "audio", "video", "foreignobject"}
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "srcset", "action")]
        assert (attributes.get("href") or "#").startswith("#")
        assert (attributes.get("src") or "data:image/svg+xml;base64,").startswith("data:image/svg+xml;base64,")
    assert not {c for c in html if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")} - {"\n"}


def test_the_same_numbers_make_the_same_page() -> None:
    report = report_of(**GOOD)
    assert render(report) == render(json.loads(json.dumps(report)))


# ------------------------------------------------------------------------------------------------- tracking


def test_the_same_numbers_go_to_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB__DISABLE_STATS": "true"}.items():
        monkeypatch.setenv(name, value)
    report = report_of(**GOOD)
    with open_tracker(recipe_for(report_to="wandb"), tmp_path, parents={}) as tracker:
        track(tracker, report)
    wandb.teardown()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows = read_wandb_file(file).history
    numbers = next(row for row in rows if "judge_agreement/judge/kappa" in row)
    found = report["scorers"][0]["agreement"]
    assert numbers["judge_agreement/judge/kappa"] == found["kappa"]["value"]
    assert numbers["judge_agreement/judge/unsafe_recall"] == found["classes"]["unsafe"]["recall"]["value"]
    assert numbers["judge_agreement/judge/auc"] == found["roc"]["auc"]["value"]
    assert numbers["judge_agreement/always good/correct"] == 0.5
    assert [key for row in rows for key in row if key.endswith(".path")] == ["agreement_by_group.path"]
