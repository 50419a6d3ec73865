"""Rows of each public data set become the right records, or are refused with the right reason."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.source_files import Row, SourceError
from alignment.source_formats import (
    Shape,
    Skipped,
    check_columns,
    column_parser,
    hh_conversation,
    hh_preference,
    hh_prompt,
    instruction_conversation,
    instruction_prompt,
    join_transcript,
    labelled_answer,
    pair_answers,
    parse_transcript,
    pku_conversation,
    pku_preference,
    safe_answer,
    safety_tuned_llamas_tags,
    starter_conversation,
    starter_preference,
    starter_safety_tags,
    xstest_tags,
)
from reward.conversation import Message, Preference, Prompt, RecordError, Tags


def row(file: str = "rows.jsonl", line: int = 1, **values: Any) -> Row:
    return Row(values, file, line)


# ------------------------------------------------------------------------------------------- Anthropic HH

TWO_TURNS = "\n\nHuman: Hi  there \n\nAssistant: Hello.\nHuman: is a word\n\nHuman: Why?\n\nAssistant: "


def test_hh_is_split_at_the_last_assistant_turn_and_keeps_every_space() -> None:
    pair = hh_preference(row(chosen=TWO_TURNS + " Because.\n", rejected=TWO_TURNS + "No"))
    assert pair == Preference(
        Prompt(
            (
                Message("user", "Hi  there "),
                Message("assistant", "Hello.\nHuman: is a word"),
                Message("user", "Why?"),
            )
        ),
        chosen=" Because.\n",
        rejected="No",
    )
    assert hh_prompt(row(chosen=TWO_TURNS + "Yes")) == pair.prompt
    assert hh_conversation(row(chosen=TWO_TURNS + "Yes")) == pair.prompt.answer("Yes")


turn = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x00"), min_size=1).filter(
    lambda text: text.strip() and "\n\nHuman:" not in f"\n{text}" and "\n\nAssistant:" not in f"\n{text}"
)


@given(st.lists(turn, min_size=2, max_size=8).filter(lambda turns: len(turns) % 2 == 0))
def test_transcripts_round_trip(turns: list[str]) -> None:
    text = "".join(f"\n\n{'Human' if i % 2 == 0 else 'Assistant'}: {turn}" for i, turn in enumerate(turns))
    messages = parse_transcript(text)
    assert [message.content for message in messages] == turns
    assert join_transcript(messages) == text


@pytest.mark.parametrize("folder", ["hh_harmless_base", "hh_helpful_base"])
def test_real_transcripts_round_trip(data_dir: Path, folder: str) -> None:
    (path,) = (data_dir / folder).glob("*.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        texts = [text for line in file for text in json.loads(line).values()]
    well_formed = 0
    for text in texts:
        try:
            messages = parse_transcript(text)
        except RecordError:
            continue
        well_formed += 1
        assert join_transcript(messages) == text
    assert well_formed > 0.99 * len(texts)


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("\n\nHuman: a\n\nAssistant: x", "\n\nHuman: b\n\nAssistant: y", "the two sides differ in the prompt"),
        ("\n\nHuman: a\n\nAssistant: x", "\n\nHuman: a\n\nAssistant: ", "rejected is empty"),
        ("\n\nHuman: a\n\nAssistant:", "\n\nHuman: a\n\nAssistant: y", "chosen is empty"),
        ("\n\nHuman: a\n\nAssistant: x", "\n\nHuman: a\n\nAssistant: x\n", "chosen and rejected are identical"),
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant: x", "\n\nHuman: b\n\nAssistant: y", "two turns of the same role"),
        ("\n\nHuman: a\n\nAssistant: x\n\nAssistant: y", "\n\nHuman: a\n\nAssistant: y", "two turns of the same role"),
        ("\n\nHuman: a", "\n\nHuman: a", "the last turn must be from the assistant"),
        ("\n\nAssistant: a", "\n\nAssistant: b", "turn 1 must be from the user"),
        ("\n\nHuman: \n\nAssistant: x", "\n\nHuman: \n\nAssistant: y", "content of the user turn is empty"),
        ("Human: a\n\nAssistant: x", "\n\nHuman: a\n\nAssistant: y", "a transcript must begin with"),
        ("\n\nHuman: a\n\nAssistant:x", "\n\nHuman: a\n\nAssistant: y", "a turn marker without a space"),
        ("", "\n\nHuman: a\n\nAssistant: y", "a transcript must begin with"),
        (None, "\n\nHuman: a\n\nAssistant: y", "a transcript must be text, got NoneType"),
    ],
)
def test_faulty_hh_rows(chosen: object, rejected: object, reason: str) -> None:
    with pytest.raises(RecordError, match=f"^{reason}"):
        hh_preference(row(chosen=chosen, rejected=rejected))


def test_a_conversation_to_learn_from_has_no_empty_turn() -> None:
    text = "\n\nHuman: a\n\nAssistant: \n\nHuman: b\n\nAssistant: x"
    assert hh_preference(row(chosen=text, rejected=text + "y")).prompt.messages[1].content == ""
    with pytest.raises(RecordError, match="content of the assistant turn is empty"):
        hh_conversation(row(chosen=text))


# --------------------------------------------------------------------------- PKU-SafeRLHF and BeaverTails


def pku(*, safe_0: object, safe_1: object, safer: object) -> Row:
    """A row as on the hub; `better_response_id` is there to be left alone."""
    return row(
        prompt="q",
        response_0="zero",
        response_1="one",
        is_response_0_safe=safe_0,
        is_response_1_safe=safe_1,
        better_response_id=1,
        safer_response_id=safer,
        response_0_severity_level=0,
    )


@pytest.mark.parametrize(
    ("safe_0", "safe_1", "safer", "expected"),
    [
        (True, False, 0, ("zero", "one", True, False)),
        (False, True, 1, ("one", "zero", True, False)),
        (True, True, 1, ("one", "zero", True, True)),
        (False, False, 0, ("zero", "one", False, False)),
    ],
)
def test_pku_pairs_by_safety_with_both_labels(
    safe_0: bool, safe_1: bool, safer: int, expected: tuple[str, str, bool, bool]
) -> None:
    pair = pku_preference(pku(safe_0=safe_0, safe_1=safe_1, safer=safer))
    assert (pair.chosen, pair.rejected, pair.chosen_safe, pair.rejected_safe) == expected


@pytest.mark.parametrize(
    ("faulty", "reason"),
    [
        (pku(safe_0=False, safe_1=True, safer=0), "chosen unsafe, rejected safe"),
        (pku(safe_0=True, safe_1=False, safer=1), "chosen unsafe, rejected safe"),
        (pku(safe_0=True, safe_1=False, safer=2), "safer_response_id must be 0 or 1, got 2"),
        (pku(safe_0=True, safe_1=False, safer=True), "safer_response_id must be 0 or 1, got True"),
        (pku(safe_0=True, safe_1=False, safer=None), "safer_response_id must be 0 or 1, got None"),
        (pku(safe_0=1, safe_1=0, safer=0), "chosen_safe must be true, false or null"),
    ],
)
def test_faulty_pku_rows(faulty: Row, reason: str) -> None:
    with pytest.raises(RecordError, match=f"^{reason}"):
        pku_preference(faulty)


def test_pku_conversation_is_the_safer_answer_unless_it_is_unsafe() -> None:
    assert pku_conversation(pku(safe_0=True, safe_1=True, safer=1)) == Prompt.of("q").answer("one")
    with pytest.raises(RecordError, match="the answer is labelled unsafe"):
        pku_conversation(pku(safe_0=False, safe_1=False, safer=1))


def test_pku_re_export_has_no_labels() -> None:
    pair = pku_preference(row(prompt="q", chosen="good", rejected="bad"))
    assert pair == Preference(Prompt.of("q"), "good", "bad")
    assert pair.safety_bin is None


def test_labels_in_both_spellings() -> None:
    assert labelled_answer(row(prompt="q", response="a", is_safe=True)).safe is True
    assert labelled_answer(row(prompt="q", response="a", is_safe=False)).safe is False
    assert labelled_answer(row(prompt="q", response="a", label="unharmful")).safe is True
    assert labelled_answer(row(prompt="q", response="a", label="harmful")).safe is False
    assert safe_answer(row(prompt="q", response="a", is_safe=True)) == Prompt.of("q").answer("a")
    with pytest.raises(RecordError, match="the answer is labelled unsafe"):
        safe_answer(row(prompt="q", response="a", is_safe=False))
    for label in ("safe", 1, None, []):
        with pytest.raises(RecordError, match="the safety label must be"):
            labelled_answer(row(prompt="q", response="a", label=label))


def test_answers_to_one_prompt_are_paired_once_each() -> None:
    answers = [
        ("p", "s1", True),
        ("lonely", "s", True),
        ("p", "u1", False),
        ("p", "s2", True),
        ("p", "s1", True),  # repeats line 1
        ("both", "x", True),
        ("p", "u2", False),
        ("p", "s3", True),
        ("both", "x", False),  # contradicts line 6
        ("p", "", False),
    ]
    rows = [row(line=i, prompt=p, response=r, is_safe=s) for i, (p, r, s) in enumerate(answers, start=1)]
    out = list(pair_answers(rows))
    pairs = {(r.line, r["chosen"], r["rejected"]) for r in out if isinstance(r, Row)}
    skipped = {s.row.line: (s.reason, s.fault) for s in out if isinstance(s, Skipped)}
    assert pairs == {(1, "s1", "u1"), (4, "s2", "u2")}
    assert skipped == {
        2: ("no answer with the other label", False),
        3: ("second answer of a pair", False),
        5: ("duplicate", True),
        6: ("labelled both safe and unsafe", True),
        7: ("second answer of a pair", False),
        8: ("no answer with the other label", False),
        9: ("labelled both safe and unsafe", True),
        10: ("content of the assistant turn is empty", True),
    }
    assert len(out) == len(rows)


# -------------------------------------------------------------------------- instructions, XSTest, starter


def test_instructions() -> None:
    assert instruction_prompt(row(instruction="Sort.")) == Prompt.of("Sort.")
    assert instruction_prompt(row(instruction="Sort.", input=" \n")) == Prompt.of("Sort.")
    assert instruction_prompt(row(instruction="Sort.", input=None)) == Prompt.of("Sort.")
    assert instruction_prompt(row(instruction="Sort:", input="b, a")) == Prompt.of("Sort:\n\nb, a")
    conversation = instruction_conversation(row(instruction="Sort:", input="b, a", output=" a, b"))
    assert conversation == Prompt.of("Sort:\n\nb, a").answer(" a, b")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"instruction": "q", "output": " "}, "content of the assistant turn is empty"),
        ({"instruction": "", "output": "a"}, "content of the user turn is empty"),
        ({"instruction": 7, "output": "a"}, "instruction and input must be text"),
        ({"instruction": "q", "input": 7, "output": "a"}, "instruction and input must be text"),
        ({"instruction": "q\x00", "output": "a"}, "content of the user turn holds a NUL character"),
        ({"instruction": "q", "output": "\ud800"}, "content of the assistant turn holds a lone surrogate"),
    ],
)
def test_faulty_instructions(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecordError, match=reason):
        instruction_conversation(row(**values))


def test_tags_of_evaluation_sets() -> None:
    assert xstest_tags(row(label="safe", type="homonyms")) == Tags(borderline=True, kind="homonyms")
    unsafe = row(label="unsafe", type="contrast_homonyms")
    assert xstest_tags(unsafe) == Tags(is_safety=True, kind="contrast_homonyms")
    with pytest.raises(RecordError, match="label must be safe or unsafe"):
        xstest_tags(row(label="other", type="homonyms"))
    assert safety_tuned_llamas_tags(row("data/I-CoNa.json")) == Tags(is_safety=True)
    assert safety_tuned_llamas_tags(row("data/I-PhysicalSafetyUnsafe.json")) == Tags(is_safety=True)
    assert safety_tuned_llamas_tags(row("data/I-PhysicalSafetySafe.json")) == Tags(borderline=True)
    assert safety_tuned_llamas_tags(row("data/I-Alpaca.json")) == Tags()


def test_starter_rows() -> None:
    pair = {"chosen": "c", "rejected": "r", "rating": "better", "chosen_safe": True, "rejected_safe": False}
    starter = row(
        prompt="p", demonstration="d", pair=pair, risk_category="hateful_harmful", attack_vector="logic", split="train"
    )
    assert starter_preference(starter) == Preference(Prompt.of("p"), "c", "r", "better", True, False)
    assert starter_conversation(starter) == Prompt.of("p").answer("d")
    assert starter_safety_tags(starter) == Tags("hateful_harmful", "logic", is_safety=True)
    with pytest.raises(RecordError, match="pair must be an object, got str"):
        starter_preference(row(prompt="p", pair="c"))
    with pytest.raises(RecordError, match="attack_vector must be one of"):
        starter_safety_tags(row(risk_category="x", attack_vector="telepathy"))


# ------------------------------------------------------------------------------------------------- tables

USER, BOT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
WORSE = {"role": "assistant", "content": "b"}
PAIR = Preference(Prompt.of("q"), "a", "b")


@pytest.mark.parametrize(
    ("shape", "columns", "values", "expected"),
    [
        ("preferences", None, {"prompt": "q", "chosen": "a", "rejected": "b", "else": 1}, PAIR),
        ("preferences", None, {"prompt": [USER], "chosen": [BOT], "rejected": [WORSE]}, PAIR),
        ("preferences", None, {"chosen": [USER, BOT], "rejected": [USER, WORSE]}, PAIR),
        (
            "preferences",
            {"prompt": "question", "chosen": "good", "rejected": "bad"},
            {"question": "q", "good": "a", "bad": "b", "rating": 5},
            PAIR,
        ),
        (
            "preferences",
            {"prompt": "p", "chosen": "c", "rejected": "r", "rating": "how", "chosen_safe": "ok", "is_safety": "red"},
            {"p": "q", "c": "a", "r": "b", "how": "better", "ok": True, "red": True},
            Preference(Prompt.of("q", is_safety=True), "a", "b", "better", True),
        ),
        ("conversations", None, {"messages": [USER, BOT]}, Prompt.of("q").answer("a")),
        ("conversations", None, {"prompt": "q", "completion": "a"}, Prompt.of("q").answer("a")),
        ("conversations", None, {"prompt": [USER], "completion": [BOT]}, Prompt.of("q").answer("a")),
        ("prompts", None, {"prompt": "q", "borderline": None}, Prompt.of("q")),
        ("prompts", {"prompt": "text"}, {"text": [USER]}, Prompt.of("q")),
        (
            "prompts",
            None,
            {"prompt": "q", "tags": {"is_safety": True}, "risk_category": "x"},
            Prompt.of("q", is_safety=True, risk_category="x"),
        ),
    ],
)
def test_tables(shape: Shape, columns: dict[str, str] | None, values: dict[str, Any], expected: object) -> None:
    assert column_parser(shape, columns)(row(**values)) == expected


@pytest.mark.parametrize("record", [PAIR, Prompt.of("q", borderline=True), Prompt.of("q", source="x").answer("a")])
def test_our_own_json_reads_back(record: Any) -> None:
    shape: Shape = {"Preference": "preferences", "Prompt": "prompts"}.get(type(record).__name__, "conversations")  # type: ignore[assignment]
    assert column_parser(shape, None)(row(**record.to_json())) == record


def test_labelled_table() -> None:
    parse = column_parser("labelled", {"prompt": "p", "completion": "c", "safe": "ok"})
    labelled = parse(row(p="q", c="a", ok=False))
    assert labelled.to_json() == {"messages": [USER, BOT], "tags": {}, "safe": False}
    with pytest.raises(RecordError, match="safe must be true or false, got 'no'"):
        parse(row(p="q", c="a", ok="no"))


@pytest.mark.parametrize(
    ("shape", "values", "reason"),
    [
        ("preferences", {"prompt": "q", "chosen": "a", "rejected": "a "}, "chosen and rejected are identical"),
        ("preferences", {"prompt": "q", "chosen": "a", "rejected": None}, "rejected: content of the assistant turn"),
        ("preferences", {"prompt": "q", "chosen": "a", "rejected": "b", "rating": "great"}, "rating must be one of"),
        ("preferences", {"prompt": "q", "chosen": [USER, BOT], "rejected": [WORSE]}, "an answer given as messages"),
        ("preferences", {"chosen": [USER, BOT], "rejected": [BOT, WORSE]}, "turn 1 must be from the user"),
        ("conversations", {"messages": [USER]}, "the last turn must be from the assistant"),
        ("conversations", {"messages": [BOT, USER]}, "turn 1 must be from the user"),
        ("conversations", {"messages": [{**USER, "name": "x"}, BOT]}, "message 1 must have exactly the keys"),
        ("conversations", {"messages": [{"role": "human", "content": "q"}, BOT]}, "role must be one of"),
        ("conversations", {"messages": [USER, {**BOT, "content": ""}]}, "content of the assistant turn is empty"),
        ("prompts", {"prompt": " "}, "content of the user turn is empty"),
        ("prompts", {"prompt": 7}, "messages must be a list"),
        ("prompts", {"prompt": "q", "is_safety": "yes"}, "is_safety must be bool, got 'yes'"),
        ("prompts", {"prompt": "q", "risk_category": 3}, "risk_category must be str, got 3"),
        ("prompts", {"prompt": "q", "attack_vector": "magic"}, "attack_vector must be one of"),
        ("prompts", {"prompt": "q", "tags": "safe"}, "tags must be an object, got str"),
        ("prompts", {"prompt": "q", "tags": {"colour": 1}}, "unknown tags"),
    ],
)
def test_faulty_table_rows(shape: Shape, values: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecordError, match=f"^{reason}"):
        column_parser(shape, None)(row(**values))


def test_missing_and_unknown_columns() -> None:
    with pytest.raises(SourceError, match=r"rows\.jsonl:1: the column 'rejected' is missing"):
        column_parser("preferences", None)(row(prompt="q", chosen="a"))
    with pytest.raises(SourceError, match=r"rows\.jsonl:1: the column 'how' is missing"):
        column_parser("prompts", {"prompt": "prompt", "risk_category": "how"})(row(prompt="q"))
    with pytest.raises(SourceError, match=r"columns: 'promt' is no field of prompts; did you mean 'prompt'\?"):
        column_parser("prompts", {"promt": "x"})
    with pytest.raises(SourceError, match="columns: 'chosen' is no field of prompts"):
        check_columns({"chosen": "x"}, ["prompts"])
    check_columns({"chosen": "x", "split": "y"}, ["prompts", "preferences"])
