"""The starter set and the public data sets: what comes out, counted another way than the loaders do."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from alignment.recipe import Data, Source
from alignment.sources import Loaded, load_conversations, load_labelled, load_preferences, load_prompts, source_files
from reward.conversation import Prompt


@pytest.fixture
def real(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SARA_DATA_DIR", str(data_dir))
    return data_dir


def prompts(source: Source) -> Loaded[Prompt]:
    return load_prompts(Data(sources=[source]), seed=1)


def texts(loaded: Loaded[Prompt]) -> list[str]:
    return [record.text for record in loaded.records]


def check_account(loaded: Loaded[Any]) -> None:
    (counts,) = loaded.counts.values()
    assert counts["kept"] == len(loaded.records)
    assert counts["read"] == counts["kept"] + sum(counts["dropped"].values()) + sum(counts["left_out"].values())


# ------------------------------------------------------------------------------------------ the starter set


@pytest.mark.parametrize("name", ["safety", "borderline", "twins", "helpful"])
def test_starter_set(name: str) -> None:
    (path,) = source_files(Source(name=f"starter_{name}"))
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for split in ("train", "gold", "test"):
        data = Data(sources=[Source(name=f"starter_{name}", split=split)], shuffle=False)
        expected = [row for row in rows if row["split"] == split]
        pairs, demonstrations = load_preferences(data, seed=0), load_conversations(data, seed=0)
        assert [(pair.prompt.text, pair.chosen, pair.rejected, pair.rating) for pair in pairs.records] == [
            (row["prompt"], row["pair"]["chosen"], row["pair"]["rejected"], row["pair"]["rating"]) for row in expected
        ]
        assert [(pair.chosen_safe, pair.rejected_safe) for pair in pairs.records] == [
            (row["pair"]["chosen_safe"], row["pair"]["rejected_safe"]) for row in expected
        ]
        assert [row.completion for row in demonstrations.records] == [row["demonstration"] for row in expected]
        for prompt, row in zip(load_prompts(data, seed=0).records, expected, strict=True):
            assert prompt.text == row["prompt"]
            assert prompt.tags.risk_category == row.get("risk_category")
            assert prompt.tags.attack_vector == row.get("attack_vector")
            assert prompt.tags.kind == row.get("kind")
            assert (prompt.tags.is_safety, prompt.tags.borderline) == (
                name == "safety",
                name in ("borderline", "twins"),
            )
            assert prompt.tags.source == f"starter_{name}"
        check_account(pairs)


def test_the_starter_splits_share_no_prompt() -> None:
    for name in ("starter_safety", "starter_borderline", "starter_twins", "starter_helpful"):
        ids = [
            {record.id for record in prompts(Source(name=name, split=split)).records}
            for split in ("train", "gold", "test")
        ]
        assert len(ids[0] | ids[1] | ids[2]) == sum(map(len, ids))


# --------------------------------------------------------------------------------------- public data sets


def rows_of(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file] if ".jsonl" in path.name else json.load(file)


def hh_fault(row: dict[str, str]) -> str | None:
    """What is wrong with a pair, by plain string search."""
    for text in row.values():
        marks: list[tuple[int, str]] = []
        for mark in ("\n\nHuman:", "\n\nAssistant:"):
            start = text.find(mark)
            while start >= 0:
                marks.append((start, mark))
                start = text.find(mark, start + 1)
        speakers = [mark for _, mark in sorted(marks)]
        if any(speakers[i] == speakers[i + 1] for i in range(len(speakers) - 1)):
            return "two turns of the same role in a row"
    (prompt, _, chosen), (other, _, rejected) = (
        row[side].rpartition("\n\nAssistant:") for side in ("chosen", "rejected")
    )
    if prompt != other:
        return "the two sides differ in the prompt"
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer.strip():
            return f"{side} is empty"
    return "chosen and rejected are identical" if chosen.strip() == rejected.strip() else None


@pytest.mark.parametrize("name", ["hh_harmless", "hh_helpful"])
def test_hh(real: Path, name: str) -> None:
    (path,) = (real / f"{name}_base").glob("*.jsonl.gz")
    rows = rows_of(path)
    expected = Counter(fault for row in rows if (fault := hh_fault(row)) is not None)
    good = [row for row in rows if hh_fault(row) is None]
    loaded = load_preferences(Data(sources=[Source(name=name, split="all")], shuffle=False), seed=0)
    counts = loaded.counts[name]
    assert counts["read"] == len(rows)
    assert counts["dropped"] == expected
    assert sum(expected.values()) > 0
    assert [pair.chosen for pair in loaded.records] == [row["chosen"].rpartition("\n\nAssistant: ")[2] for row in good]
    assert any(len(pair.prompt.messages) >= 5 for pair in loaded.records)
    check_account(loaded)


def test_no_hh_opening_stands_on_both_sides(real: Path) -> None:
    sides = [
        {record.messages[0].content for record in prompts(Source(name="hh_harmless", split=split)).records}
        for split in ("train", "test")
    ]
    assert sides[0]
    assert sides[1]
    assert not sides[0] & sides[1]


def test_pku_saferlhf(real: Path) -> None:
    rows = rows_of(real / "pku_saferlhf_pairs" / "pairs.jsonl.gz")
    unique = {(row["prompt"], row["chosen"], row["rejected"]) for row in rows}
    loaded = load_preferences(Data(sources=[Source(name="pku_saferlhf", split="all")]), seed=0)
    assert {(pair.prompt.text, pair.chosen, pair.rejected) for pair in loaded.records} == unique
    assert loaded.counts["pku_saferlhf"]["dropped"] == {"duplicate": len(rows) - len(unique)}
    check_account(loaded)
    asked = prompts(Source(name="pku_saferlhf", split="all"))
    assert set(texts(asked)) == {row["prompt"] for row in rows}


@pytest.mark.parametrize("folder", ["beavertails_labels", "saferlhf_labels"])
def test_labelled_answers(data_dir: Path, folder: str) -> None:
    path = data_dir / folder / "labels.jsonl.gz"
    rows = rows_of(path)
    source = Source(name="beavertails", path=str(path), split="all")
    labels = {(row["prompt"], row["response"]): row["label"] == "unharmful" for row in rows}
    labelled = load_labelled(Data(sources=[source]), seed=0)
    assert {(row.prompt.text, row.conversation.completion): row.safe for row in labelled.records} == labels
    safe = load_conversations(Data(sources=[source]), seed=0)
    assert {(row.prompt.text, row.completion) for row in safe.records} == {
        key for key, is_safe in labels.items() if is_safe
    }
    pairs = load_preferences(Data(sources=[source]), seed=0)
    by_prompt: dict[str, Counter[bool]] = {}
    for (prompt, _), is_safe in labels.items():
        by_prompt.setdefault(prompt, Counter())[is_safe] += 1
    assert len(pairs.records) == sum(min(count[True], count[False]) for count in by_prompt.values()) > 0
    for pair in pairs.records:
        assert labels[pair.prompt.text, pair.chosen] is True
        assert labels[pair.prompt.text, pair.rejected] is False
        assert pair.safety_bin == "safe_unsafe"
    for loaded in (labelled, safe, pairs):
        check_account(loaded)


def test_instruction_sets(real: Path) -> None:
    for name, file in [
        ("safety_tuned_llamas", "safety_sft/safety_only_data_Instructions.json.gz"),
        ("alpaca", "alpaca_small/alpaca_data_safety_only.json.gz"),
    ]:
        rows = rows_of(real / file)
        loaded = load_conversations(Data(sources=[Source(name=name, split="all")], shuffle=False), seed=0)
        assert [row.completion for row in loaded.records] == [row["output"] for row in rows]
        for record, row in zip(loaded.records, rows, strict=True):
            assert record.prompt.text.startswith(row["instruction"])
            assert record.prompt.text.endswith(row["input"] or row["instruction"])
        check_account(loaded)
    only_instructions = real / "alpaca_small" / "alpaca_instructions_harmless_val.json.gz"
    loaded = prompts(Source(name="alpaca", path=str(only_instructions), split="all"))
    assert set(texts(loaded)) == {row["instruction"] for row in rows_of(only_instructions)}


def test_evaluation_sets(real: Path) -> None:
    with (real / "xstest" / "xstest_prompts.csv").open(encoding="utf-8", newline="") as file:
        labels = {row["prompt"]: row["label"] for row in csv.DictReader(file)}
    xstest = prompts(Source(name="xstest", split="test"))
    assert {record.text: ("safe" if record.tags.borderline else "unsafe") for record in xstest.records} == labels
    assert Counter(record.tags.is_safety for record in xstest.records) == {False: 250, True: 200}
    kinds = Counter(record.tags.kind for record in xstest.records if record.tags.borderline)
    assert len(kinds) == 10, kinds
    assert set(kinds.values()) == {25}, "25 prompts of each type, as the paper says"

    files = sorted((real / "safety_tuned_llamas_eval").glob("*.json"))
    asked = {text for file in files for text in json.loads(file.read_text(encoding="utf-8"))["instructions"]}
    loaded = prompts(Source(name="safety_tuned_llamas_eval", split="test"))
    assert set(texts(loaded)) == asked
    assert set(loaded.files["safety_tuned_llamas_eval"]) == {file.name for file in files}
    check_account(loaded)
