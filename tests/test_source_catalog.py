"""Where sources are read from: local files and folders, the hub, artifacts; and what is refused before reading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignment.artifact import write_artifact
from alignment.recipe import Data, Source
from alignment.sources import (
    Loaded,
    SourceError,
    check_source,
    load_conversations,
    load_labelled,
    load_preferences,
    load_prompts,
    source_files,
)
from reward.conversation import Prompt, write_json_lines

Asked = list[tuple[str, str | None, str | None]]


@pytest.fixture(autouse=True)
def _no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SARA_DATA_DIR", raising=False)


def prompts(*sources: Source) -> Loaded[Prompt]:
    return load_prompts(Data(sources=list(sources), shuffle=False), seed=0)


# --------------------------------------------------------------------------------- names, shapes and places


def test_everything_is_checked_before_anything_is_read(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text("not json")
    with pytest.raises(
        SourceError, match=r"alpaca gives no preferences, but conversations, prompts; preferences: .*hh_"
    ):
        load_preferences(Data(sources=[Source(name="file", path=str(broken)), Source(name="alpaca")]), seed=0)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Source(name="hh_harmles"), r"there is no source 'hh_harmles'; did you mean 'hh_harmless'\?"),
        (Source(name="17"), "there is no source '17'; The sources are starter_safety, "),
        (Source(name="file"), "file needs `path`"),
        (Source(name="hub"), "hub needs `path`"),
        (Source(name="artifact"), "artifact needs `path`"),
        (Source(name="file", path="nowhere.jsonl"), "nowhere.jsonl does not exist; `path` must be a file or a folder"),
        (Source(name="file", path="tests", columns={"promt": "x"}), r"'promt' is no field .*did you mean 'prompt'\?"),
        (Source(name="alpaca", path="./no/where"), "does not exist; .* or a hub id"),
        (Source(name="alpaca", columns={"prompt": "x"}), "alpaca has columns of its own"),
        (Source(name="safety_tuned_llamas"), "is not on the hub; get it from .*safety-tuned-llamas"),
        (Source(name="xstest", split="train"), "xstest has no split 'train': .* read as split: test"),
        (Source(name="artifact", path="nowhere"), "nowhere does not exist; run the stage"),
        (Source(name="starter_safety", revision="v2"), r"starter, which has no revision 'v2'; leave `revision` out"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused(source: Source, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        check_source(source)


def test_a_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("x")
    with pytest.raises(SourceError, match="holds no data file"):
        check_source(Source(name="hh_harmless", path=str(tmp_path)))


def test_the_data_folder_stands_in_for_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = tmp_path / "hh_harmless_base" / "test.jsonl", tmp_path / "elsewhere.jsonl"
    for file in (own, other):
        write_json_lines(file, [{"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}])
    monkeypatch.setenv("SARA_DATA_DIR", str(tmp_path))
    assert source_files(Source(name="hh_harmless", split="test")) == (own,)
    assert source_files(Source(name="hh_harmless", path=str(other))) == (other,)
    assert source_files(Source(name="hh_helpful")) == ()  # not in the folder, so from the hub
    assert len(load_preferences(Data(sources=[Source(name="hh_harmless", split="test")]), seed=0).records) == 1
    with pytest.raises(SourceError, match="no split 'train'; it has all, test"):
        load_preferences(Data(sources=[Source(name="hh_harmless")]), seed=0)


def test_no_hub_no_data() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(
        SourceError, match=r"Anthropic/hh-rlhf .*hub does not give it .*hh_harmless_base below SARA_DATA_DIR"
    ):
        load_preferences(Data(sources=[Source(name="hh_harmless")]), seed=0)
    with pytest.raises(SourceError, match=r"some/set .*hub does not give it .*name: file and its `path`"):
        load_preferences(Data(sources=[Source(name="hub", path="some/set")]), seed=0)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Asked]:
    """A hub that serves the given splits; returns the list of what was asked of it."""
    datasets = pytest.importorskip("datasets")

    def serve(**splits: list[dict[str, Any]]) -> Asked:
        asked: Asked = []

        def load_dataset(path: str, *, data_dir: str | None, revision: str | None) -> Any:
            asked.append((path, data_dir, revision))
            return datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return serve


def test_hh_from_the_hub(hub: Callable[..., Asked]) -> None:
    rows = [{side: f"\n\nHuman: {n}\n\nAssistant: {side}" for side in ("chosen", "rejected")} for n in "abc"]
    asked = hub(train=rows[:2], test=[rows[2], {**rows[2], "rejected": "?"}])
    train = load_preferences(Data(sources=[Source(name="hh_harmless")]), seed=0)
    test = load_preferences(Data(sources=[Source(name="hh_harmless", split="test")]), seed=0)
    assert asked == [("Anthropic/hh-rlhf", "harmless-base", None)] * 2
    assert sorted(pair.prompt.text for pair in train.records) == ["a", "b"]
    assert [pair.prompt.text for pair in test.records] == ["c"]
    assert test.records[0].prompt.tags.is_safety
    (examples,) = test.counts["hh_harmless"]["examples"].values()
    assert examples == ["hh-rlhf[test]:2"]
    assert list(test.files["hh_harmless"]) == ["Anthropic/hh-rlhf[test]"]
    assert test.files != train.files


def test_splits_of_other_names_on_the_hub(hub: Callable[..., Asked]) -> None:
    names = ("330k_train", "330k_test", "30k_train", "30k_test")
    hub(**{name: [{"prompt": name, "response": "a", "is_safe": False, "category": {"x": True}}] for name in names})
    for split, expected in [("train", "330k_train"), ("test", "330k_test"), ("30k_test", "30k_test")]:
        loaded = load_labelled(Data(sources=[Source(name="beavertails", split=split)]), seed=0)
        assert [(record.prompt.text, record.safe) for record in loaded.records] == [(expected, False)]


def test_any_set_of_the_hub(hub: Callable[..., Asked]) -> None:
    asked = hub(train=[{"question": f"q {n}"} for n in range(100)])
    commit = "0123456789abcdef0123456789abcdef01234567"
    columns = {"prompt": "question"}
    train = prompts(Source(name="hub", path="some/set", revision=commit, columns=columns))
    test = prompts(Source(name="hub", path="some/set", split="test", columns=columns))
    assert asked == [("some/set", None, commit), ("some/set", None, None)]
    assert len(train.records) + len(test.records) == 100
    assert all(record.tags.source == "hub:some/set" for record in train.records)
    with pytest.raises(SourceError, match="hub has no split 'dev'; it has all, train"):
        prompts(Source(name="hub", path="some/set", split="dev", columns=columns))


def test_source_files(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_json_lines(path, [{"prompt": "q"}])
    assert source_files(Source(name="file", path=str(path))) == (path,)
    assert source_files(Source(name="file", path=str(tmp_path))) == (path,)
    assert source_files(Source(name="hh_harmless")) == ()
    (starter,) = source_files(Source(name="starter_safety"))
    assert starter.name == "safety.jsonl"


# ------------------------------------------------------------------------------------------- artifacts


def test_artifacts(tmp_path: Path) -> None:
    rows = [Prompt.of(f"q {n}", is_safety=True, source="starter_safety").answer("a") for n in range(30)]
    records = tmp_path / "made" / "records.jsonl"
    write_json_lines(records, [row.to_json() for row in rows])
    source = Source(name="artifact", path=str(records.parent))
    with pytest.raises(SourceError, match=r"has no manifest\.json"):
        check_source(source)
    write_artifact(records.parent, kind="conversations", stage="s", recipe_hash="h", files=["records.jsonl"])
    loaded = load_conversations(Data(sources=[source], shuffle=False), seed=0)
    assert list(loaded.records) == rows
    assert list(loaded.counts) == ["artifact:made"]
    assert prompts(source).records == tuple(row.prompt for row in rows)
    with pytest.raises(SourceError, match="holds conversations, but preferences are needed"):
        load_preferences(Data(sources=[source]), seed=0)
    with pytest.raises(SourceError, match="artifact has no split 'test'"):
        prompts(source.model_copy(update={"split": "test"}))
    records.write_text(records.read_text().replace("q 7", "q 77"))
    with pytest.raises(SourceError, match="has changed since the stage wrote it"):
        prompts(source)
    records.unlink()
    with pytest.raises(SourceError, match=r"has no records\.jsonl"):
        check_source(source)
