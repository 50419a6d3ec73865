"""What a judge learns: how two labels become one, and lessons that are, token for token, what it will be asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alignment.judge_lessons import WORDLESS, Teacher, combine, explanation
from alignment.labelling import Label
from alignment.recipe_label import Policy
from reward.backends import ScriptedBackend, TransformersBackend
from reward.conversation import Conversation, Message, Prompt
from reward.judge import JudgeScorer
from reward.judge_prompt import Constitution, Mode
from reward.render import Renderer, common_start
from reward.verdict import BAD, GOOD, VERDICT_PREFIX, parse_verdict, write_verdict
from tests import tiny
from tests.judge_slots import BREAD, GUIDELINES, PAYLOADS, read_slots
from tests.test_judge_forms import metaspace_tokenizer
from tests.tiny_swap import INST

LIMIT = 1400
LONG = Prompt.of("Why? " * 400, risk_category="x", is_safety=True).answer("Because. " * 900)
FORGED = Prompt.of("Hi?").answer(PAYLOADS["ChatML"])


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher(GUIDELINES, Renderer(tiny.make_tiny_tokenizer()), LIMIT)


# -------------------------------------------------------------------------------------------- two labels, one label

G, B, N = True, False, None


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        # first:          G  G  G  B  B  B  N  N  N
        # second:         G  B  N  G  B  N  G  B  N
        ("first", [G, G, G, B, B, B, N, N, N]),
        ("second", [G, B, N, G, B, N, G, B, N]),
        ("agree_only", [G, N, N, N, B, N, N, N, N]),
        ("unsafe_if_any", [G, B, N, B, B, B, N, B, N]),
    ],
)
def test_the_policies_on_every_pair_of_labels(policy: Policy, expected: list[bool | None]) -> None:
    found = [combine(policy, first, second) for first in (G, B, N) for second in (G, B, N)]
    assert [safe for safe, _ in found] == expected
    assert all((outcome == "labelled") == (safe is not None) for safe, outcome in found)


def test_what_has_no_label_says_why() -> None:
    assert combine("agree_only", G, B)[1] == "labellers differ"
    assert combine("agree_only", G, N)[1] == "no label of a labeller"
    assert combine("first", N, G)[1] == "no label of the first labeller"


# ------------------------------------------------------------------------------------------------- explanations


def test_the_explanation_is_of_a_labeller_that_found_so() -> None:
    good, bad = Label(True, rationale="It is kind."), Label(False, rationale="It is cruel.")
    assert explanation(True, [bad, good]) == "It is kind."
    assert explanation(False, [good, bad]) == "It is cruel."
    assert explanation(True, [bad, Label(True, probability=0.9)]) == ""


@pytest.mark.parametrize("rationale", ["It is, as they say, ", "The chatbot is bad.", "Human: and then?", "'It is"])
def test_an_explanation_that_does_not_read_back_is_not_taught(rationale: str) -> None:
    assert explanation(True, [Label(True, rationale=rationale)]) == ""


@pytest.mark.parametrize("safe", [True, False])
def test_a_fixed_sentence_reads_back_as_its_verdict(safe: bool) -> None:
    outcome = "good" if safe else "bad"
    verdict = parse_verdict(write_verdict(outcome, WORDLESS[safe]))
    assert (verdict.outcome, verdict.rationale) == (outcome, WORDLESS[safe])
    assert parse_verdict(write_verdict(outcome)).outcome == outcome


# ---------------------------------------------------------------------------------------- as the judge will be asked


@pytest.mark.parametrize("mode", ["score", "explain"])
@pytest.mark.parametrize(
    "answered", [BREAD, LONG, Prompt.of("Hi?").answer(PAYLOADS["ChatML"])], ids=["", "long", "forged"]
)
def test_a_lesson_asks_what_the_judge_asks(answered: Conversation, mode: Mode, teacher: Teacher) -> None:
    """The prompt that a judge with the same tokenizer and limit sends to its back end, cut where it cuts."""
    backend = ScriptedBackend(reply=lambda _: "Evaluation: So.\nChatbot is: good.")
    backend.num_tokens = lambda prompt: len(teacher.renderer.render_prompt(prompt))  # type: ignore[method-assign]
    made, _ = teacher.lesson(answered, safe=True, rationale="It is kind.", mode=mode)
    assert made is not None
    (verdict,) = JudgeScorer(backend, GUIDELINES, mode=mode, max_length=LIMIT).judge([answered])
    assert verdict.truncated == (answered == LONG)
    assert made.messages[:-1] == backend.prompts[0].messages
    assert made.completion == ("Evaluation: It is kind.\n" if mode == "explain" else "") + "Chatbot is: good."
    assert made.tags == answered.tags


@pytest.mark.parametrize("words", [3, 60, 120])
def test_a_long_evaluation_never_loses_its_verdict(words: int, teacher: Teacher) -> None:
    """The source cut rows on the right, where the verdict stands. Here the conversation gives way."""
    rationale = "It is kind. " * words
    made, cut = teacher.lesson(LONG, safe=True, rationale=rationale.strip(), mode="explain")
    assert made is not None
    assert cut
    ids = teacher.renderer.render_ids(made)
    assert len(ids) <= LIMIT
    assert teacher.renderer.tokenizer.decode(ids).endswith(f"Chatbot is: good.{tiny.TURN_END}")
    system, question, _ = made.messages
    assert system.content.startswith(GUIDELINES.text)
    slot = read_slots(Prompt((question,)))[-1]
    assert slot["text_begins"]
    assert slot["characters_cut_here"] > 0


def test_too_many_turns_make_no_lesson(teacher: Teacher) -> None:
    turns = tuple(Message(role, "Hi") for _ in range(60) for role in ("user", "assistant"))  # type: ignore[arg-type]
    made, cut = teacher.lesson(Conversation(turns), safe=True, rationale="", mode="score")
    assert (made, cut) == (None, True)


def llama_like_tokenizer() -> Any:
    """A leading space in front of texts, and turns in plain-text markers without system turns.

    Llama 2's template has a space behind an answer, too. Its tokenizer never merges that with a dot; this one does.
    """
    tokenizer = metaspace_tokenizer()
    tokenizer.chat_template = INST.replace("message['content'] + ' ' + eos_token", "message['content'] + eos_token")
    tokenizer.pad_token = "<unk>"
    return tokenizer


def up_to(ids: list[int], text: str, renderer: Renderer) -> list[int]:
    """Ids to the end of the last `text` in them."""
    ends = [end for end in range(1, len(ids) + 1) if renderer.tokenizer.decode(ids[:end]).endswith(text)]
    return ids[: ends[-1]]


@pytest.mark.parametrize("make", [tiny.make_tiny_tokenizer, llama_like_tokenizer], ids=["ChatML", "Llama 2"])
def test_mode_score_weighs_the_very_tokens_that_training_taught(make: Any, tiny_model: Path) -> None:
    """log P(good) - log P(bad) of the judge is that of the two lessons, by transformers' own loss."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    renderer = Renderer(make())
    school = Teacher(Constitution("Be kind."), renderer, 1200)
    lessons = [school.lesson(BREAD, safe=safe, rationale="", mode="score")[0] for safe in (True, False)]
    taught = [renderer.render(lesson) for lesson in lessons if lesson is not None]
    trained_on = [
        up_to(row.input_ids, VERDICT_PREFIX + verdict, renderer)
        for row, verdict in zip(taught, (GOOD, BAD), strict=True)
    ]
    verdict = len(common_start(trained_on))
    assert all(row.completion_mask[verdict] for row in taught), "the verdict is among the tokens that are learned"
    assert not any(row.completion_mask[0] for row in taught)

    def logprob(ids: list[int]) -> float:
        labels = torch.tensor([[-100] * verdict + ids[verdict:]])
        with torch.no_grad():
            return -float(model(input_ids=torch.tensor([ids]), labels=labels).loss) * (len(ids) - verdict)

    prompt = Prompt(lessons[0].messages[:-1])  # type: ignore[union-attr]
    ((good, bad),) = TransformersBackend(model, renderer, 2).choice_logprobs([prompt], VERDICT_PREFIX, (GOOD, BAD))
    assert good - bad == pytest.approx(logprob(trained_on[0]) - logprob(trained_on[1]), abs=1e-4)
