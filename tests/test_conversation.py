"""`reward.conversation`: what a record refuses, what it derives, and that it survives the way to disk and back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward.conversation import (
    ATTACK_VECTORS,
    RATINGS,
    Conversation,
    Message,
    Preference,
    Prompt,
    RecordError,
    Tags,
    fingerprint,
    parse_messages,
    read_json_lines,
    write_json_lines,
)

if TYPE_CHECKING:
    from pathlib import Path

USER, ANSWER, SYSTEM = Message("user", "q"), Message("assistant", "a"), Message("system", "s")

# ------------------------------------------------------------------------------------------------ messages


@pytest.mark.parametrize(
    ("role", "content", "wrong"),
    [
        ("tool", "x", "role must be one of system, user, assistant, got 'tool'"),
        (None, "x", "role must be one of"),
        (["user"], "x", "role must be one of"),
        ("user", None, "content of the user turn must be text, got NoneType"),
        ("assistant", 3, "content of the assistant turn must be text, got int"),
        ("user", "", "content of the user turn is empty"),
        ("system", " \n\t", "content of the system turn is empty"),
        ("user", "a\x00b", "content of the user turn holds a NUL character"),
        ("user", "a\ud800b", "content of the user turn holds a lone surrogate"),
        ("assistant", "\udfff", "content of the assistant turn holds a lone surrogate"),
    ],
)
def test_a_bad_message_is_refused_with_the_reason(role: Any, content: Any, wrong: str) -> None:
    with pytest.raises(RecordError) as caught:
        Message(role, content)
    assert wrong in str(caught.value)


@pytest.mark.parametrize("content", ["", " ", "a\x00b"])
def test_an_assistant_turn_may_hold_what_models_write(content: str) -> None:
    assert Message("assistant", content).content == content


def test_a_message_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        USER.content = "other"  # type: ignore[misc]


def test_text_is_one_user_turn_and_a_list_is_a_list_of_turns() -> None:
    assert parse_messages("q") == (USER,)
    assert parse_messages([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]) == (USER, ANSWER)


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        (None, "got NoneType"),
        ({"role": "user", "content": "q"}, "got dict"),
        (["q"], "message 1 must have exactly the keys role and content"),
        ([{"role": "user"}], "message 1 must have exactly the keys"),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "name": "x"}], "message 2 must have"),
        ([{"role": "user", "content": 5}], "must be text, got int"),
    ],
)
def test_what_is_no_list_of_messages_is_refused(value: Any, wrong: str) -> None:
    with pytest.raises(RecordError, match=wrong):
        parse_messages(value)


# --------------------------------------------------------------------------------------------- turn order


@pytest.mark.parametrize(
    ("messages", "wrong"),
    [
        ((), "there are no messages"),
        ((SYSTEM,), "the last turn must be from the user"),
        ((ANSWER,), "turn 1 must be from the user, got assistant"),
        ((USER, ANSWER), "the last turn must be from the user"),
        ((USER, USER), "turn 2 must be from the assistant, got user"),
        ((USER, SYSTEM, USER), "turn 2 must be from the assistant, got system"),
        ((SYSTEM, SYSTEM, USER), "turn 1 must be from the user, got system"),
    ],
)
def test_a_prompt_is_system_then_user_and_assistant_in_turn(messages: tuple[Message, ...], wrong: str) -> None:
    with pytest.raises(RecordError, match=wrong):
        Prompt(messages)


@pytest.mark.parametrize("messages", [(), (SYSTEM,), (USER,), (SYSTEM, USER), (ANSWER,), (USER, ANSWER, USER)])
def test_a_conversation_ends_with_the_assistant(messages: tuple[Message, ...]) -> None:
    with pytest.raises(RecordError):
        Conversation(messages)


def test_a_prompt_and_its_answer_make_a_conversation_with_the_same_tags() -> None:
    prompt = Prompt((SYSTEM, USER, ANSWER, Message("user", "and then?")), Tags(is_safety=True, source="x"))
    conversation = prompt.answer("done")
    assert prompt.text == "and then?"
    assert conversation.completion == "done"
    assert conversation.prompt == prompt
    assert conversation.tags.is_safety


def test_a_preprompt_is_the_system_turn_with_an_existing_one_behind_it() -> None:
    assert Prompt((USER,)).with_preprompt("p").messages == (Message("system", "p"), USER)
    assert Prompt((SYSTEM, USER)).with_preprompt("p").messages == (Message("system", "p\n\ns"), USER)
    assert Prompt.of("q", is_safety=True).with_preprompt("p").tags == Tags(is_safety=True)


def test_the_id_depends_on_the_messages_alone() -> None:
    plain, tagged = Prompt.of("q"), Prompt.of("q", is_safety=True, source="elsewhere")
    assert plain.id == tagged.id
    others = [Prompt.of("q "), Prompt((SYSTEM, USER)), Prompt((USER, ANSWER, USER))]
    assert len({plain.id, *(prompt.id for prompt in others)}) == 4


def test_the_id_is_sixteen_digits_of_the_sha256_of_compact_json() -> None:
    expected = hashlib.sha256('[{"content":"grüß dich","role":"user"}]'.encode()).hexdigest()[:16]
    assert Prompt.of("grüß dich").id == expected


def test_a_fingerprint_ignores_the_order_of_keys_and_nothing_else() -> None:
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert len({fingerprint(value) for value in ({"a": 1}, {"a": "1"}, {"a": [1]}, {"b": 1}, [1, 2], [2, 1])}) == 6


# -------------------------------------------------------------------------------------------------- tags


def test_tags_refuse_unknown_names_and_attack_vectors() -> None:
    with pytest.raises(RecordError, match=r"unknown tags \['safe'\]"):
        Tags.from_json({"safe": True})
    with pytest.raises(RecordError, match=r"attack_vector must be one of psychological, .*, got 'magic'"):
        Tags(attack_vector="magic")


@pytest.mark.parametrize(
    "tags", [{"is_safety": "false"}, {"borderline": 1}, {"source": 3}, {"risk_category": ["a"]}, 5]
)
def test_tags_of_the_wrong_type_are_refused(tags: Any) -> None:
    """`is_safety` picks the branch of the reward, so `"false"` must not be read as true."""
    with pytest.raises(RecordError):
        Prompt.from_json({"prompt": "q", "tags": tags})


# -------------------------------------------------------------------------------------------- preferences


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"chosen": ""}, "chosen is empty"),
        ({"rejected": " \n"}, "rejected is empty"),
        ({"chosen": None}, "chosen: content of the assistant turn must be text, got NoneType"),
        ({"rejected": "a\x00"}, "rejected holds a NUL character"),
        ({"chosen": "\ud800"}, "chosen: .*lone surrogate"),
        ({"chosen": "same", "rejected": " same\n"}, "chosen and rejected are identical"),
        ({"rating": "best"}, "rating must be one of significantly_better, .*, got 'best'"),
        ({"chosen_safe": "yes"}, "chosen_safe must be true, false or null, got 'yes'"),
        ({"rejected_safe": 0}, "rejected_safe must be true, false or null, got 0"),
    ],
)
def test_a_bad_pair_is_refused_with_the_reason(fields: dict[str, Any], wrong: str) -> None:
    with pytest.raises(RecordError, match=wrong):
        Preference(Prompt.of("q"), **({"chosen": "a", "rejected": "b"} | fields))


@pytest.mark.parametrize(
    ("chosen_safe", "rejected_safe", "expected"),
    [
        (True, False, "safe_unsafe"),
        (True, True, "both_safe"),
        (False, False, "both_unsafe"),
        (False, True, None),  # the paper excludes these
        (None, True, None),
        (True, None, None),
        (None, None, None),
    ],
)
def test_safety_labels_make_the_three_bins_of_the_paper(
    chosen_safe: bool | None, rejected_safe: bool | None, expected: str | None
) -> None:
    pair = Preference(Prompt.of("q"), "a", "b", chosen_safe=chosen_safe, rejected_safe=rejected_safe)
    assert pair.safety_bin == expected


# ------------------------------------------------------------------------------------- to JSON and back

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1).filter(str.strip)
tags = st.builds(
    Tags,
    risk_category=st.none() | texts,
    attack_vector=st.none() | st.sampled_from(ATTACK_VECTORS),
    is_safety=st.booleans(),
    borderline=st.booleans(),
    kind=st.none() | texts,
    source=st.none() | texts | st.just(""),
)


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    contents = draw(st.lists(texts, min_size=1, max_size=5).filter(lambda items: len(items) % 2 == 1))
    turns = [Message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(contents)]
    system = [Message("system", draw(texts))] if draw(st.booleans()) else []
    return Prompt((*system, *turns), draw(tags))


@settings(max_examples=50, deadline=None)
@given(
    prompts(),
    texts,
    texts,
    st.none() | st.sampled_from(RATINGS),
    st.none() | st.booleans(),
    st.none() | st.booleans(),
    st.none() | texts,
)
def test_records_survive_json(
    prompt: Prompt, chosen: str, rejected: str, rating: Any, chosen_safe: Any, rejected_safe: Any, source: str | None
) -> None:
    def through_json(row: dict[str, Any]) -> dict[str, Any]:
        return json.loads(json.dumps(row, ensure_ascii=False))

    assert Prompt.from_json(through_json(prompt.to_json())) == prompt
    conversation = prompt.answer(chosen)
    assert Conversation.from_json(through_json(conversation.to_json())) == conversation
    if chosen.strip() != rejected.strip():
        pair = Preference(prompt, chosen, rejected, rating, chosen_safe, rejected_safe, source)
        assert Preference.from_json(through_json(pair.to_json())) == pair


@pytest.mark.parametrize(
    ("read", "row", "missing"),
    [
        (Prompt.from_json, {"messages": "q"}, "'prompt' is missing; the row has \\['messages'\\]"),
        (Conversation.from_json, {}, "'messages' is missing"),
        (Preference.from_json, {"prompt": "q", "chosen": "a"}, "'rejected' is missing"),
    ],
)
def test_a_missing_key_is_named(read: Any, row: dict[str, Any], missing: str) -> None:
    with pytest.raises(RecordError, match=missing):
        read(row)


@pytest.mark.parametrize("answer", ["", "  ", "a\x00b"])
def test_training_data_holds_no_answer_that_only_a_model_would_write(answer: str) -> None:
    row = Prompt.of("q").answer(answer).to_json()
    with pytest.raises(RecordError, match="content of the assistant turn"):
        Conversation.from_json(row)


# --------------------------------------------------------------------------------------------- JSON lines


def test_rows_come_back_as_written_whatever_separators_the_text_holds(tmp_path: Path) -> None:
    separators = ("\n", "\r", "\r\n", "\x85", "\u2028", "\u2029", "\x0b", "\x1e")
    rows = [{"text": f"a{separator}b"} for separator in separators]
    path = tmp_path / "new" / "rows.jsonl"
    assert write_json_lines(path, iter(rows)) == 8
    assert list(read_json_lines(path)) == list(enumerate(rows, start=1))
    assert [file.name for file in path.parent.iterdir()] == ["rows.jsonl"]


def test_blank_lines_and_a_byte_order_mark_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": 2}')
    assert list(read_json_lines(path)) == [(1, {"a": 1}), (4, {"a": 2})]


@pytest.mark.parametrize(
    ("second", "wrong"),
    [
        (b'{"a": 1', "not a JSON object: Expecting ',' delimiter: column 8"),
        (b"[1]", "expected a JSON object, got list"),
        (b"null", "expected a JSON object, got NoneType"),
        (b'{"a": "\xff"}', "not a JSON object"),
        (b'{"a": {"b": 1, "b": 2}}', "the key 'b' stands twice"),
        (b"[" * 100_000, "not a JSON object"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "not a JSON object"),
    ],
)
def test_an_unreadable_line_is_named_with_its_file(tmp_path: Path, second: bytes, wrong: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + second + b"\n")
    with pytest.raises(RecordError, match=wrong) as caught:
        list(read_json_lines(path))
    assert str(caught.value).startswith(f"{path}:2:")


def test_a_file_is_not_touched_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_json_lines(path, [{"a": 1}])

    def breaks() -> Any:
        yield {"a": 2}
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        write_json_lines(path, breaks())
    assert path.read_text() == '{"a": 1}\n'
