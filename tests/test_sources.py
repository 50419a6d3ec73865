"""Loading: splits, mixtures, duplicates and the account of every row."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignment.recipe import Data, Source
from alignment.sources import (
    Loaded,
    SourceError,
    load_preferences,
    load_prompts,
    mixture_sizes,
    split_side,
)
from reward.conversation import Prompt, write_json_lines

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SARA_DATA_DIR", raising=False)


def lines(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    write_json_lines(path, rows)
    return str(path)


def prompts_file(path: Path, number: int, *, word: str = "question") -> str:
    return lines(path, ({"prompt": f"{word} {n}"} for n in range(number)))


def prompts(*sources: Source, seed: int = 1, shuffle: bool = True) -> Loaded[Prompt]:
    return load_prompts(Data(sources=list(sources), shuffle=shuffle), seed=seed)


def texts(loaded: Loaded[Prompt]) -> list[str]:
    return [record.text for record in loaded.records]


def check_account(loaded: Loaded[Any]) -> None:
    """Every row read was kept, dropped or left out, and the account can be written down."""
    for counts in loaded.counts.values():
        assert counts["read"] == counts["kept"] + sum(counts["dropped"].values()) + sum(counts["left_out"].values())
        assert set(counts["examples"]) == set(counts["dropped"]) | set(counts["noted"])
        assert counts["truncated"] == 0
    assert sum(counts["kept"] for counts in loaded.counts.values()) == len(loaded.records)
    json.dumps([loaded.counts, loaded.files], allow_nan=False)


# ------------------------------------------------------------------------------------------- the account


def test_rows_are_kept_or_counted_with_their_place(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "rows.jsonl",
        [
            {"prompt": "a", "chosen": "x", "rejected": "y"},
            {"prompt": "a", "chosen": "x", "rejected": "x"},
            {"prompt": "b", "chosen": "x", "rejected": ""},
            {"prompt": "a", "chosen": "x", "rejected": "y", "rating": "better"},
            {"prompt": "c", "chosen": "x", "rejected": "y", "rating": "good"},
            {"prompt": "c", "chosen": "x", "rejected": "y", "rating": "bad"},
            {"prompt": "a", "chosen": "y", "rejected": "x"},
        ],
    )
    loaded = load_preferences(Data(sources=[Source(name="file", path=path, split="all")], shuffle=False), seed=0)
    assert [(pair.prompt.text, pair.chosen, pair.rejected) for pair in loaded.records] == [
        ("a", "x", "y"),
        ("a", "y", "x"),
    ]
    rating = "rating must be one of significantly_better, better, slightly_better, negligibly_better"
    assert loaded.counts == {
        "file:rows.jsonl": {
            "read": 7,
            "kept": 2,
            "truncated": 0,
            "dropped": {"chosen and rejected are identical": 1, "rejected is empty": 1, "duplicate": 1, rating: 2},
            "left_out": {},
            "noted": {},
            "examples": {
                "chosen and rejected are identical": ["rows.jsonl:2"],
                "rejected is empty": ["rows.jsonl:3"],
                "duplicate": ["rows.jsonl:4"],
                rating: ["rows.jsonl:5", "rows.jsonl:6"],
            },
        }
    }
    assert loaded.files == {"file:rows.jsonl": {"rows.jsonl": hashlib.sha256(Path(path).read_bytes()).hexdigest()}}
    check_account(loaded)


def test_nul_and_lone_surrogate_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "fine"}\r\n{"prompt": "a\\u0000"}\r\n{"prompt": "b\\ud800"}\r\n')
    loaded = prompts(Source(name="file", path=str(path), split="all"))
    assert texts(loaded) == ["fine"]
    (counts,) = loaded.counts.values()
    assert counts["examples"] == {
        "content of the user turn holds a NUL character": ["rows.jsonl:2"],
        "content of the user turn holds a lone surrogate (surrogates not allowed)": ["rows.jsonl:3"],
    }


def test_duplicates_are_found_across_sources(tmp_path: Path) -> None:
    first = lines(tmp_path / "first.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    second = lines(tmp_path / "second.jsonl", [{"prompt": "b", "is_safety": True}, {"prompt": "c"}])
    loaded = prompts(*(Source(name="file", path=path, split="all") for path in (first, second)), shuffle=False)
    assert texts(loaded) == ["a", "b", "c"]
    assert loaded.counts["file:second.jsonl"]["dropped"] == {"duplicate": 1}
    assert [record.tags.source for record in loaded.records] == [
        "file:first.jsonl",
        "file:first.jsonl",
        "file:second.jsonl",
    ]
    check_account(loaded)


def test_sources_of_one_name_are_told_apart(tmp_path: Path) -> None:
    path = prompts_file(tmp_path / "rows.jsonl", 200)
    loaded = prompts(Source(name="file", path=path), Source(name="file", path=path, split="test"))
    assert list(loaded.counts) == ["file:rows.jsonl", "file:rows.jsonl#2"]
    assert len(loaded.records) == 200
    check_account(loaded)


def test_a_source_that_gives_nothing_is_an_error(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", [{"prompt": ""}, {"prompt": " "}])
    with pytest.raises(SourceError, match=r"none of its 2 rows gives prompts .*content of the user turn is empty: 2"):
        prompts(Source(name="file", path=path, split="all"))
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(SourceError, match=r"none of its 0 rows .*it has no rows"):
        prompts(Source(name="file", path=path, split="all"))


def test_hash_is_that_of_the_records_in_order(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", [{"prompt": "é"}, {"prompt": "b"}])
    loaded = prompts(Source(name="file", path=path, split="all"), shuffle=False)
    line = '{"prompt": [{"content": "TEXT", "role": "user"}], "tags": {"source": "file:rows.jsonl"}}\n'
    by_hand = line.replace("TEXT", r"\u00e9") + line.replace("TEXT", "b")
    assert loaded.data_hash == hashlib.sha256(by_hand.encode()).hexdigest()
    turned = replace(loaded, records=loaded.records[::-1])
    assert turned.data_hash != loaded.data_hash


# ------------------------------------------------------------------------------------ splits and mixtures


def test_splits_part_the_prompts_one_in_ten(tmp_path: Path) -> None:
    path = prompts_file(tmp_path / "rows.jsonl", 3000)
    train, test, everything = (
        prompts(Source(name="file", path=path, split=split)) for split in ("train", "test", "all")
    )
    ids = [{record.id for record in loaded.records} for loaded in (train, test, everything)]
    assert ids[0] | ids[1] == ids[2]
    assert not ids[0] & ids[1]
    assert abs(len(ids[1]) - 300) < 5 * (3000 * 0.1 * 0.9) ** 0.5
    check_account(train)
    assert train.counts["file:rows.jsonl"]["left_out"] == {"other split": len(ids[1])}


def test_the_side_depends_on_the_opening_alone() -> None:
    for n in range(50):
        plain = Prompt.of(f"how do I open a jar {n}?")
        assert split_side(plain) == split_side(Prompt.of(f"  HOW do I open\na jar, {n}", is_safety=True))
        assert split_side(plain) == split_side(plain.with_preprompt("Be kind."))
        assert split_side(plain) == split_side(Prompt((*plain.answer("Turn it.").messages, *Prompt.of("So?").messages)))
    assert {split_side(Prompt.of("?" * n)) for n in range(1, 100)} == {"train", "test"}


def test_splits_in_files_and_columns_are_kept(tmp_path: Path) -> None:
    prompts_file(tmp_path / "train-00000-of-00002.jsonl", 3, word="a")
    prompts_file(tmp_path / "train-00001-of-00002.jsonl", 3, word="b")
    prompts_file(tmp_path / "test.jsonl", 2, word="c")
    folder = str(tmp_path)
    assert sorted(texts(prompts(Source(name="file", path=folder)))) == ["a 0", "a 1", "a 2", "b 0", "b 1", "b 2"]
    assert sorted(texts(prompts(Source(name="file", path=folder, split="test")))) == ["c 0", "c 1"]
    assert len(prompts(Source(name="file", path=folder, split="all")).records) == 8
    with pytest.raises(SourceError, match="no split 'dev'; it has all, test, train"):
        prompts(Source(name="file", path=folder, split="dev"))
    prompts_file(tmp_path / "more.jsonl", 2)
    with pytest.raises(SourceError, match=r"mixes files named after splits with others \(more.jsonl\)"):
        prompts(Source(name="file", path=folder))

    rows = [{"q": f"{name} {n}", "part": name} for name in ("train", "gold") for n in range(20)]
    path, columns = lines(tmp_path / "rows.jsonl", rows), {"prompt": "q", "split": "part"}
    gold = prompts(Source(name="file", path=path, split="gold", columns=columns))
    assert sorted(texts(gold)) == sorted(f"gold {n}" for n in range(20))
    with pytest.raises(SourceError, match=r"none of its 40 rows gives prompts of split 'test' \(other split: 40\)"):
        prompts(Source(name="file", path=path, split="test", columns=columns))


@pytest.mark.parametrize(
    ("available", "weights", "expected"),
    [
        ([100, 100], [3.0, 1.0], [100, 33]),
        ([100, 900], [0.1, 0.9], [100, 900]),  # exact: 0.1 and 0.9 are taken as decimals
        ([10, 1000, 1000], [0.2, 0.3, 0.5], [10, 15, 25]),
        ([7, 5], [None, None], [7, 5]),
        ([100, 100, 4], [1.0, 4.0, None], [25, 100, 4]),
        ([9, 9], [1.0, 100.0], [0, 9]),
    ],
)
def test_mixture_sizes(available: list[int], weights: list[float | None], expected: list[int]) -> None:
    assert mixture_sizes(available, weights) == expected


def test_weights_are_shares_after_splits_and_max_rows(tmp_path: Path) -> None:
    a, b, c = (prompts_file(tmp_path / f"{word}.jsonl", 400, word=word) for word in "abc")
    loaded = prompts(
        Source(name="file", path=a, split="all", weight=0.75, max_rows=60),
        Source(name="file", path=b, split="test", weight=0.25),
        Source(name="file", path=c, split="all", max_rows=7),
    )
    assert Counter(text[0] for text in texts(loaded)) == {"a": 60, "b": 20, "c": 7}
    assert loaded.counts["file:a.jsonl"]["left_out"] == {"max_rows": 340}
    assert loaded.counts["file:c.jsonl"]["left_out"] == {"max_rows": 393}
    assert set(loaded.counts["file:b.jsonl"]["left_out"]) == {"other split", "weight"}
    check_account(loaded)


def test_weights_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    a, b = (prompts_file(tmp_path / f"{word}.jsonl", 20, word=word) for word in "ab")
    with pytest.raises(SourceError, match="only one source has one"):
        prompts(Source(name="file", path=a, weight=0.5), Source(name="file", path=b))
    with pytest.raises(SourceError, match=r"file:a\.jsonl: its weight is so small"):
        prompts(
            Source(name="file", path=a, split="all", weight=0.001), Source(name="file", path=b, split="all", weight=1.0)
        )


def test_the_seed_alone_decides(tmp_path: Path) -> None:
    path = prompts_file(tmp_path / "rows.jsonl", 300)

    def load(seed: int, max_rows: int) -> Loaded[Prompt]:
        return prompts(Source(name="file", path=path, split="all", max_rows=max_rows), seed=seed)

    assert load(1, 100).data_hash == load(1, 100).data_hash
    assert set(texts(load(1, 100))) != set(texts(load(2, 100)))
    assert set(texts(load(1, 300))) == set(texts(load(2, 300)))
    assert texts(load(1, 300)) != texts(load(2, 300))
    assert set(texts(load(1, 50))) < set(texts(load(1, 100)))


def test_without_shuffle_the_order_of_the_sources_stays(tmp_path: Path) -> None:
    a, b = (prompts_file(tmp_path / f"{word}.jsonl", 50, word=word) for word in "ab")
    loaded = prompts(
        Source(name="file", path=b, split="all", max_rows=20), Source(name="file", path=a, split="all"), shuffle=False
    )
    numbers = [(text[0], int(text[2:])) for text in texts(loaded)]
    assert [word for word, _ in numbers] == ["b"] * 20 + ["a"] * 50
    assert numbers[:20] == sorted(numbers[:20])
    assert numbers[20:] == [("a", n) for n in range(50)]


def test_import_is_light() -> None:
    code = "import sys, alignment.sources; print([m for m in ('torch', 'datasets', 'pyarrow') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
