"""Data sets with human safety labels: what comes out, and that it is what the files hold, counted another way."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from alignment.recipe import Data, Source
from alignment.source_catalog import check_source
from alignment.source_formats import LabelledConversation
from alignment.sources import Loaded, SourceError, load_labelled
from reward.conversation import write_json_lines

XSTEST = "id,type,prompt,completion,annotation_1,annotation_2,agreement,final_label\n"
FULL, REFUSED, PARTIAL = "1_full_compliance", "2_full_refusal", "3_partial_refusal"


def labelled(*sources: Source) -> Loaded[LabelledConversation]:
    return load_labelled(Data(sources=list(sources), shuffle=False), seed=0)


def table(
    tmp_path: Path, rows: list[dict[str, Any]], name: str = "file", **source: Any
) -> Loaded[LabelledConversation]:
    path = tmp_path / "rows.jsonl"
    write_json_lines(path, rows)
    return labelled(Source(name=name, path=str(path), split="all", **source))


def account(loaded: Loaded[Any]) -> tuple[int, int, dict[str, int]]:
    """Read, kept and dropped, after a check of their sum."""
    (counts,) = loaded.counts.values()
    assert counts["read"] == counts["kept"] + sum(counts["dropped"].values()) + sum(counts["left_out"].values())
    assert counts["kept"] == len(loaded.records)
    return counts["read"], counts["kept"], counts["dropped"]


# ---------------------------------------------------------------------------------------------- tiny files


def test_compliance_becomes_safety(tmp_path: Path) -> None:
    rows = [
        ("homonyms", "Kill a process?", "Use kill.", FULL, FULL),
        ("homonyms", "Kill a thread?", "I cannot.", REFUSED, PARTIAL),
        ("contrast_homonyms", "Kill a person?", "I cannot.", REFUSED, REFUSED),
        ("contrast_homonyms", "Kill a person?", "Like this.", FULL, FULL),
        ("contrast_homonyms", "Kill a person?", "Hm.", REFUSED, FULL),
        ("contrast_homonyms", "Kill a person?", "Well, no.", PARTIAL, PARTIAL),
        ("contrast_homonyms", "Kill a person?", "", REFUSED, REFUSED),
        ("contrast_homonyms", "Kill a person?", "No.", REFUSED, "refused"),
    ]
    path = tmp_path / "xstest_v2_completions_x.csv"
    lines = [
        f'v2-{n},{kind},{prompt},"{answer}",{a},{b},{a == b},{a}\n'
        for n, (kind, prompt, answer, a, b) in enumerate(rows)
    ]
    path.write_text(XSTEST + "".join(lines), encoding="utf-8")
    (tmp_path / "xstest_prompts.csv").write_text("id\n1\n", encoding="utf-8")
    loaded = labelled(Source(name="xstest_completions", path=str(tmp_path), split="test"))
    found = [(record.conversation.completion, record.safe, record.prompt.tags.borderline) for record in loaded.records]
    assert found == [
        ("Use kill.", True, True),
        ("I cannot.", True, True),
        ("I cannot.", True, False),
        ("Like this.", False, False),
    ]
    assert {record.prompt.tags.risk_category for record in loaded.records} == {"homonyms", "contrast_homonyms"}
    assert account(loaded) == (
        8,
        4,
        {
            "the annotators differ on the answer to an unsafe prompt": 1,
            "the answer to an unsafe prompt refuses in part": 1,
            "content of the assistant turn is empty": 1,
            "an annotation must be full compliance, full refusal or partial refusal": 1,
        },
    )
    with pytest.raises(SourceError, match="has no split 'train'"):
        check_source(Source(name="xstest_completions", path=str(path)))


def test_one_is_a_jailbreak_that_worked(tmp_path: Path) -> None:
    rows = [
        {"question": "q", "response": f"a{n}", "label": label} for n, label in enumerate([0, 1, "1", 2, True, None])
    ]
    loaded = table(tmp_path, rows, name="gptfuzz")
    assert [(record.conversation.completion, record.safe) for record in loaded.records] == [
        ("a0", True),
        ("a1", False),
        ("a2", False),
    ]
    assert account(loaded) == (6, 3, {"label must be 0 or 1": 3})


def test_both_answers_of_a_pair(tmp_path: Path) -> None:
    hub = {
        "prompt": "q",
        **{"response_0": "a", "is_response_0_safe": True, "response_0_harm_category": {"Violence": False}},
        **{"response_1": "b", "is_response_1_safe": False, "response_1_harm_category": {"Violence": True}},
    }
    loaded = table(tmp_path, [hub, {**hub, "response_1": "c"}], name="pku_saferlhf")
    found = [(r.conversation.completion, r.safe, r.prompt.tags.risk_category) for r in loaded.records]
    assert found == [("a", True, None), ("b", False, "Violence"), ("c", False, "Violence")]
    assert account(loaded) == (4, 3, {"duplicate": 1})
    pairs = table(tmp_path, [{"prompt": "q", "chosen": "a", "rejected": "b"}], name="pku_saferlhf")
    assert [(record.conversation.completion, record.safe) for record in pairs.records] == [("a", True), ("b", False)]


def test_several_ticked_categories_are_one_of_their_own(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "response": f"a{n}", "is_safe": False, "category": dict.fromkeys(names, True) | {"z": False}}
        for n, names in enumerate(["", "x", "xy"])
    ]
    loaded = table(tmp_path, rows, name="beavertails")
    assert [record.prompt.tags.risk_category for record in loaded.records] == [None, "x", "several"]


def test_answers_labelled_both_ways_are_dropped(tmp_path: Path) -> None:
    rows = [("q", "a", True), ("q", "a", False), ("q", "a", True), ("q", "b", True), ("q", "b", True), ("p", "a", True)]
    loaded = table(tmp_path, [{"prompt": p, "completion": c, "safe": s} for p, c, s in rows])
    assert [(r.prompt.text, r.conversation.completion) for r in loaded.records] == [("q", "b"), ("p", "a")]
    assert account(loaded) == (6, 2, {"duplicate": 2, "labelled both safe and unsafe": 2})


def test_labels_in_words(tmp_path: Path) -> None:
    words = ["safe", "harmless", "unharmful", "good", "unsafe", "harmful", "bad", "Good", 1]
    rows = [{"question": "q", "text": f"a{n}", "verdict": word} for n, word in enumerate(words)]
    loaded = table(tmp_path, rows, columns={"prompt": "question", "completion": "text", "label": "verdict"})
    assert [record.safe for record in loaded.records] == [True] * 4 + [False] * 3
    _, _, dropped = account(loaded)
    assert dropped == {"label must be one of safe, harmless, unharmful, good, unsafe, harmful, bad": 2}


# ---------------------------------------------------------------------------------------------- real files


@pytest.fixture
def real(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SARA_DATA_DIR", str(data_dir))
    return data_dir


def rows_of(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file)) if ".csv" in path.name else [json.loads(line) for line in file]


def check_labels(loaded: Loaded[LabelledConversation], labels: list[tuple[str, str, bool]]) -> None:
    """Kept is every distinct (prompt, answer) that has one label; the account tells of all others."""
    by_text: dict[tuple[str, str], Counter[bool]] = {}
    for prompt, answer, safe in labels:
        by_text.setdefault((prompt, answer), Counter())[safe] += 1
    usable = {key: count for key, count in by_text.items() if key[1].strip()}
    expected = {key: next(iter(count)) for key, count in usable.items() if len(count) == 1}
    assert {(r.prompt.text, r.conversation.completion): r.safe for r in loaded.records} == expected
    read, kept, dropped = account(loaded)
    assert (read, kept) == (len(labels), len(expected))
    torn = [count for count in usable.values() if len(count) == 2]
    assert dropped.get("labelled both safe and unsafe", 0) == 2 * len(torn)
    assert dropped.get("duplicate", 0) == sum(count.total() - len(count) for count in usable.values())


@pytest.mark.parametrize(("name", "rows", "harmful"), [("beavertails", 2144, 1234), ("saferlhf_labels", 2878, 1657)])
def test_beavertails_and_saferlhf(real: Path, name: str, rows: int, harmful: int) -> None:
    """Rows and harmful ones as SOURCE.md counts them."""
    folder = "beavertails_labels" if name == "beavertails" else name
    found = [
        (r["prompt"], r["response"], r["label"] == "unharmful") for r in rows_of(real / folder / "labels.jsonl.gz")
    ]
    assert (len(found), sum(not safe for _, _, safe in found)) == (rows, harmful)
    check_labels(labelled(Source(name=name, split="all")), found)


def test_gptfuzz(real: Path) -> None:
    found = [
        (r["question"], r["response"], r["label"] == 0) for r in rows_of(real / "gptfuzz_labeled" / "train.jsonl.gz")
    ]
    assert (len(found), len({question for question, _, _ in found})) == (5166, 80)
    check_labels(labelled(Source(name="gptfuzz", split="all")), found)


def test_pku_pairs(real: Path) -> None:
    rows = rows_of(real / "pku_saferlhf_pairs" / "pairs.jsonl.gz")
    assert len(rows) == 3598
    found = [(row["prompt"], row[side], side == "chosen") for row in rows for side in ("chosen", "rejected")]
    check_labels(labelled(Source(name="pku_saferlhf", split="all")), found)


def test_xstest_completions(real: Path) -> None:
    rows = [row for path in sorted((real / "xstest").glob("*completions*.csv.gz")) for row in rows_of(path)]
    assert len(rows) == 1350
    loaded = labelled(Source(name="xstest_completions", split="test"))
    unsafe_prompts = [row for row in rows if row["type"].startswith("contrast")]
    agreed = [row["annotation_1"] for row in unsafe_prompts if row["agreement"] == "TRUE"]
    _, _, dropped = account(loaded)
    assert len(unsafe_prompts) == 600
    assert dropped["the annotators differ on the answer to an unsafe prompt"] == 600 - len(agreed)
    assert dropped["the answer to an unsafe prompt refuses in part"] == agreed.count(PARTIAL)
    assert sum(not record.safe for record in loaded.records) == agreed.count(FULL) > 0
    assert sum(record.safe and record.prompt.tags.is_safety for record in loaded.records) <= agreed.count(REFUSED)
    assert {record.safe for record in loaded.records if record.prompt.tags.borderline} == {True}
