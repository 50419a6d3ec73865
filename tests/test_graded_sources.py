"""Graded conversations: red-team attempts, OpenAssistant's trees, tables, and one grade for a whole source."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from alignment.recipe import Data, Source
from alignment.source_files import Row, SourceError
from alignment.source_threads import best_threads
from alignment.sources import Loaded, load_conversations, load_graded, load_preferences, load_prompts
from reward.conversation import Graded, Message, write_json_lines


@pytest.fixture(autouse=True)
def _no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SARA_DATA_DIR", raising=False)


def load(*sources: dict[str, Any]) -> Loaded[Graded]:
    found = [Source.model_validate({"split": "all"} | source) for source in sources]
    return load_graded(Data(sources=found, shuffle=False), seed=0)


def attempt(number: int, rating: object) -> dict[str, Any]:
    """A row as it is published, with columns that are not ours."""
    return {
        "transcript": f"\n\nHuman: Question {number}\n\nAssistant: No.\n\nHuman: Please\n\nAssistant: Well, {number}.",
        "min_harmlessness_score_transcript": -1.5,
        "rating": rating,
        "tags": None,
    }


# --------------------------------------------------------------------------------------- red-team attempts


def test_red_team_attempts_are_read_from_the_published_file(tmp_path: Path) -> None:
    """It is named like JSON lines and holds one array."""
    path = tmp_path / "red_team_attempts.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps([attempt(1, 4.0), attempt(2, 0.0), attempt(3, 2)], indent=1).encode()))
    loaded = load({"name": "redteam", "path": str(path)})
    assert [record.grade for record in loaded.records] == [4.0, 0.0, 2]
    assert loaded.records[0].conversation.messages == (
        Message("user", "Question 1"),
        Message("assistant", "No."),
        Message("user", "Please"),
        Message("assistant", "Well, 1."),
    )
    assert loaded.records[0].conversation.tags.is_safety
    assert loaded.records[0].conversation.tags.source == "redteam"


def test_red_team_attempts_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[tuple[str, str | None, str | None]] = []

    def load_dataset(path: str, *, data_dir: str | None, revision: str | None) -> Any:
        asked.append((path, data_dir, revision))
        rows = [attempt(number, float(number % 5)) for number in range(100)]
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    sides = [load({"name": "redteam", "split": split}).records for split in ("train", "test")]
    assert asked == [("Anthropic/hh-rlhf", "red-team-attempts", None)] * 2
    assert sum(map(len, sides)) == 100
    assert not {r.conversation.messages[0] for r in sides[0]} & {r.conversation.messages[0] for r in sides[1]}


def test_bad_attempts_are_dropped_and_counted_by_reason(tmp_path: Path) -> None:
    path = tmp_path / "attempts.jsonl"
    number = "grade must be a number from 0 to 4"
    bad: list[tuple[dict[str, Any], str]] = [
        (attempt(10, None), "grade is missing"),
        (attempt(11, ""), "grade is missing"),
        (attempt(12, "high"), number),
        (attempt(13, True), number),
        (attempt(14, 4.5), number),
        (attempt(15, -1), number),
        (attempt(16, "nan"), number),
        (attempt(17, [3]), number),
        (attempt(1, 3), "duplicate"),
        (
            {"transcript": "Human: no blank line", "rating": 1},
            "a transcript must begin with a blank line and 'Human: '",
        ),
        (
            {"transcript": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c", "rating": 1},
            "two turns of the same role in a row",
        ),
        ({"transcript": "\n\nHuman: a", "rating": 1}, "the last turn must be from the assistant"),
        ({"transcript": None, "rating": 1}, "a transcript must be text"),
    ]
    write_json_lines(path, [attempt(1, 3), *(row for row, _ in bad), attempt(1, 2)])
    loaded = load({"name": "redteam", "path": str(path)})
    expected: dict[str, int] = {}
    for _, reason in bad:
        expected[reason] = expected.get(reason, 0) + 1
    (counts,) = loaded.counts.values()
    assert counts["dropped"] == expected
    assert (counts["read"], counts["kept"]) == (15, 2)
    assert [record.grade for record in loaded.records] == [3, 2], "two people may grade one transcript differently"
    assert counts["examples"]["grade is missing"] == ["attempts.jsonl:2", "attempts.jsonl:3"]


def test_a_file_without_ratings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "attempts.jsonl"
    write_json_lines(path, [{"transcript": "\n\nHuman: a\n\nAssistant: b"}])
    with pytest.raises(SourceError, match=r"attempts\.jsonl:1: the column 'rating' is missing"):
        load({"name": "redteam", "path": str(path)})


# ------------------------------------------------------------------------------------------------- tables


def test_a_table_of_any_columns(tmp_path: Path) -> None:
    path = tmp_path / "graded.csv"
    path.write_text("question,answer,harm\nq,a,0.25\nr,b, 4 \ns,c,5\nt,d,\n", encoding="utf-8")
    columns = {"prompt": "question", "completion": "answer", "grade": "harm"}
    loaded = load({"name": "file", "path": str(path), "columns": columns})
    assert [(r.prompt.text, r.conversation.completion, r.grade) for r in loaded.records] == [
        ("q", "a", 0.25),
        ("r", "b", 4.0),
    ]
    (counts,) = loaded.counts.values()
    assert counts["dropped"] == {"grade must be a number from 0 to 4": 1, "grade is missing": 1}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    write_json_lines(tmp_path / "own.jsonl", [{"messages": messages, "grade": 1, "tags": {"is_safety": True}}])
    (own,) = load({"name": "file", "path": str(tmp_path / "own.jsonl")}).records
    assert (own.grade, own.conversation.tags.is_safety) == (1, True)
    with pytest.raises(SourceError, match="the column 'grade' is missing"):
        load({"name": "file", "path": str(path), "columns": {"prompt": "question", "completion": "answer"}})


def test_severity_by_people(data_dir: Path) -> None:
    """Real human scores of harm, 0 to 1, in the columns of another project."""
    sources: list[dict[str, Any]] = []
    scores: dict[tuple[str, str, str], None] = {}
    for file in sorted(data_dir.glob("pyrit_scorer_evals/harm__*.csv")):
        with file.open(encoding="utf-8", newline="") as handle:
            reader = csv.DictReader(handle)
            grade = next(name for name in reader.fieldnames or () if name.startswith("human_score"))
            for row in reader:
                scores[row["objective"], row["assistant_response"], row[grade]] = None
        columns = {"prompt": "objective", "completion": "assistant_response", "grade": grade}
        sources.append({"name": "file", "path": str(file), "columns": columns})
    loaded = load(*sources)
    assert len(loaded.records) == len(scores) > 100
    assert {record.grade for record in loaded.records} == {float(score) for *_, score in scores}
    assert sum(counts["kept"] for counts in loaded.counts.values()) == len(scores)


# ---------------------------------------------------------------------------------- one grade for a source


def test_harmless_conversations_beside_red_team_attempts(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "attempts.jsonl", [attempt(number, 3) for number in range(5)])
    loaded = load(
        {"name": "redteam", "path": str(tmp_path / "attempts.jsonl")},
        {"name": "starter_helpful", "split": "train", "grade": 0, "max_rows": 4},
        {"name": "alpaca", "path": str(_alpaca(tmp_path)), "grade": 1.5},
    )
    assert [record.grade for record in loaded.records] == [3] * 5 + [0] * 4 + [1.5]
    assert {source: counts["kept"] for source, counts in loaded.counts.items()} == {
        "redteam": 5,
        "starter_helpful": 4,
        "alpaca": 1,
    }


def _alpaca(folder: Path) -> Path:
    write_json_lines(folder / "alpaca.jsonl", [{"instruction": "Say hi.", "input": "", "output": "Hi."}])
    return folder / "alpaca.jsonl"


def test_a_grade_where_it_means_nothing_is_refused(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "attempts.jsonl", [attempt(1, 3)])
    with pytest.raises(SourceError, match="redteam brings grades of its own; leave out `grade`"):
        load({"name": "redteam", "path": str(tmp_path / "attempts.jsonl"), "grade": 0})
    with pytest.raises(SourceError, match="starter_helpful brings no grades; give each of its conversations one by"):
        load({"name": "starter_helpful"})
    with pytest.raises(SourceError, match="xstest gives no conversations"):
        load({"name": "xstest", "grade": 0})
    data = Data(sources=[Source(name="starter_helpful", grade=0)])
    for load_others, shape in ((load_preferences, "preferences"), (load_conversations, "conversations")):
        with pytest.raises(SourceError, match=f"`grade` is for graded conversations, but {shape} are needed here"):
            load_others(data, seed=0)
    for grade in (-1, 4.5, float("nan")):
        with pytest.raises(ValueError, match="grade"):
            Source(name="osst", grade=grade)


# ------------------------------------------------------------------------------------- OpenAssistant's trees


def message(name: str, parent: str | None, text: str, **changes: Any) -> dict[str, Any]:
    role = "prompter" if text.endswith("?") else "assistant"
    tree = {"message_id": name, "parent_id": parent, "message_tree_id": name[0], "role": role, "text": text}
    return tree | {"lang": "en", "deleted": False, "rank": None} | changes


TREES = [
    message("a", None, "Why?"),
    message("a1", "a", "Worse.", rank=1),
    message("a2", "a", "Better.", rank=0),
    message("a3", "a", "Unranked."),
    message("a21", "a2", "And how?", rank=0),
    message("a11", "a1", "And where?", rank=0),
    message("a211", "a21", "So.", rank=0),
    message("a2111", "a211", "Thanks?", rank=0),
    message("b", None, "Nobody answers?"),
    message("c", None, "Warum?", lang="de"),
    message("c1", "c", "Darum.", lang="de", rank=0),
    message("d", None, "Gone?"),
    message("d1", "d", "Deleted.", deleted=True, rank=0),
    message("d2", "d", "Kept.", rank=1),
]


def test_each_tree_gives_its_best_thread_by_hand(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "trees.jsonl", TREES)
    source = {"name": "osst", "path": str(tmp_path / "trees.jsonl"), "split": "all"}
    data = Data(sources=[Source.model_validate(source)], shuffle=False)
    loaded = load_conversations(data, seed=0)
    assert [[turn.content for turn in record.messages] for record in loaded.records] == [
        ["Why?", "Better.", "And how?", "So."],
        ["Gone?", "Kept."],
    ]
    (counts,) = loaded.counts.values()
    assert (counts["read"], counts["kept"], counts["dropped"]) == (14, 2, {})
    assert {reason: number for reason, number in counts["left_out"].items() if number} == {
        "not English": 2,
        "deleted": 1,
        "not on the best thread of its tree": 5,  # a1, a3, a11, a2111, b
        "an earlier turn of its conversation": 4,  # a, a2, a21, d
    }
    assert [place for _, place in loaded.places] == ["trees.jsonl:7", "trees.jsonl:14"]
    assert [prompt.text for prompt in load_prompts(data, seed=0).records] == ["And how?", "Gone?"]
    assert [record.grade for record in load(source | {"grade": 0}).records] == [0, 0]


def test_an_unknown_role_is_a_fault_of_its_row(tmp_path: Path) -> None:
    rows = [*TREES, message("e", None, "Who?", role="moderator"), message("e1", "e", "I.", rank=0)]
    write_json_lines(tmp_path / "trees.jsonl", rows)
    loaded = load({"name": "osst", "path": str(tmp_path / "trees.jsonl"), "grade": 0})
    (counts,) = loaded.counts.values()
    assert counts["dropped"] == {"role must be one of system, user, assistant": 1}


def test_a_tree_does_not_depend_on_the_order_of_its_rows() -> None:
    def threads(rows: list[dict[str, Any]]) -> list[Any]:
        found = best_threads(Row(row, "f", line) for line, row in enumerate(rows))
        return sorted(item.values["messages"][-1]["content"] for item in found if isinstance(item, Row))

    assert threads(TREES) == threads(TREES[::-1]) == ["Kept.", "So."]


def test_the_validation_split_is_the_test_split(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "train-00000.jsonl", TREES[:8])
    write_json_lines(tmp_path / "validation-00000.jsonl", TREES[11:])
    for split, expected in (("train", "So."), ("test", "Kept.")):
        (record,) = load({"name": "osst", "path": str(tmp_path), "split": split, "grade": 0}).records
        assert record.conversation.completion == expected
