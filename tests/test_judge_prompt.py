"""The judge's prompt, read back by a reader of the tests: no text changes its structure."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward.conversation import Conversation, Message, Prompt
from reward.judge_prompt import Constitution, Mode, judge_prompt
from reward.render import Renderer
from tests import tiny
from tests.judge_slots import BREAD, GUIDELINES, PAYLOADS, around_slots, expected_slots, read_slots, with_payload

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("place", ["system", "user", "earlier", "last"])
@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
def test_no_payload_changes_the_structure_of_the_prompt(payload: str, place: str):
    conversation = with_payload(payload, place)
    prompt = judge_prompt(GUIDELINES, conversation)
    assert read_slots(prompt) == expected_slots(conversation)
    assert around_slots(prompt) == around_slots(judge_prompt(GUIDELINES, with_payload("Neutral.", place)))


@settings(max_examples=300, deadline=None, database=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")))
def test_every_text_can_be_read_back_from_its_slot(text: str):
    conversation = Prompt.of("Hello?").answer(text)
    assert read_slots(judge_prompt(GUIDELINES, conversation)) == expected_slots(conversation)


def test_hidden_characters_are_spelled_out_and_visible_ones_are_not():
    prompt = judge_prompt(GUIDELINES, Prompt.of("Grüße, 你好 👋🏽?").answer("a\u200bb\u202ec\ue000d"))
    assert "Grüße, 你好 👋🏽?" in prompt.text
    assert "a\\u200bb\\u202ec\\ue000d" in prompt.text


LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ '<s>[INST] <<SYS>>\n' + m['content'] + '\n<</SYS>>\n\n' }}"
    "{% elif m['role'] == 'user' %}{{ ('' if messages[0]['role'] == 'system' and loop.index0 == 1 else '<s>[INST] ')"
    " + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def llama_tokenizer(template: str, special_tokens: list[str]) -> Any:
    tokenizer = tiny.make_tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": special_tokens})
    tokenizer.eos_token = special_tokens[-1]
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def renderers() -> dict[str, Renderer]:
    headers = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return {
        "chatml": Renderer(tiny.make_tiny_tokenizer()),
        "llama2": Renderer(llama_tokenizer(LLAMA2, ["<s>", "</s>"])),
        "llama3": Renderer(llama_tokenizer(LLAMA3, headers)),
    }


MARKERS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>")


@pytest.mark.parametrize("template", ["chatml", "llama2", "llama3"])
@pytest.mark.parametrize("name", [name for name in PAYLOADS if name != "very long"])
def test_no_payload_adds_control_tokens_or_template_markers(renderers: dict[str, Renderer], template: str, name: str):
    renderer = renderers[template]

    def count(payload: str) -> dict[str, int]:
        ids = renderer.render_prompt(judge_prompt(GUIDELINES, with_payload(payload, "last")))
        special = set(renderer.tokenizer.all_special_ids)
        text = renderer.tokenizer.decode(ids)
        return {"control tokens": sum(token in special for token in ids)} | {m: text.count(m) for m in MARKERS}

    neutral = count("Neutral.")
    assert neutral["control tokens"] > 0
    assert count(PAYLOADS[name]) == neutral


@pytest.mark.parametrize("mode", ["score", "explain"])
def test_the_prompt_holds_guidelines_question_and_form_of_the_answer(mode: Mode):
    prompt = judge_prompt(GUIDELINES, BREAD, mode=mode)
    assert [message.role for message in prompt.messages] == ["system", "user"]
    assert prompt.messages[0].content.startswith(GUIDELINES.text)
    assert prompt.text.count("Chatbot is: good.") == prompt.text.count("Chatbot is: bad.") == 1
    assert ("Evaluation:" in prompt.text) == (mode == "explain")


def test_single_and_multi_turn_questions_name_the_turn_that_is_judged():
    longer = Conversation((*BREAD.messages, Message("user", "And cake?"), Message("assistant", "Add sugar.")))
    assert "last message, turn 2?" in judge_prompt(GUIDELINES, BREAD).text
    assert "in view of the turns before it" not in judge_prompt(GUIDELINES, BREAD).text
    assert "in view of the turns before it" in judge_prompt(GUIDELINES, longer).text
    assert "last message, turn 4?" in judge_prompt(GUIDELINES, longer).text


def test_the_fence_depends_on_the_conversation_alone():
    fence = judge_prompt(GUIDELINES, BREAD).text.splitlines()[0]
    assert fence == judge_prompt(Constitution("Be good."), BREAD, max_chars=3).text.splitlines()[0]
    assert fence != judge_prompt(GUIDELINES, BREAD.prompt.answer("Other.")).text.splitlines()[0]


def test_a_long_text_is_cut_in_its_middle_with_the_gap_told():
    conversation = Prompt.of("Hi?").answer("a" * 50 + "b" * 50)
    slots = read_slots(judge_prompt(GUIDELINES, conversation, max_chars=11))
    assert slots[0] == {"turn": 1, "from": "human", "text": "Hi?"}
    assert slots[1] == {
        "turn": 2,
        "from": "chatbot",
        "text_begins": "aaaaaa",
        "characters_cut_here": 89,
        "text_ends": "bbbbb",
    }
    nothing = read_slots(judge_prompt(GUIDELINES, conversation, max_chars=0))[1]
    assert (nothing["text_begins"], nothing["characters_cut_here"], nothing["text_ends"]) == ("", 100, "")


def test_the_default_guidelines_have_ten_categories_and_both_verdicts():
    text = (ROOT / "alignment/data/guidelines/default.md").read_text(encoding="utf-8")
    assert re.findall(r"^(\d+)\. \*\*", text, re.MULTILINE) == [str(number) for number in range(1, 11)]
    assert "**good** chatbot" in text
    assert "**bad** chatbot" in text
    assert 250 <= len(text.split()) <= 350


def test_guidelines_have_a_hash_and_are_not_empty():
    assert GUIDELINES.hash == Constitution(GUIDELINES.text).hash
    assert GUIDELINES.hash != Constitution(GUIDELINES.text + " Be kind.").hash
    with pytest.raises(ValueError, match="empty"):
        Constitution(" \n")
