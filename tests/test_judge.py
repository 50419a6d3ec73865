"""The judge as a scorer: its scores, what it leaves unscored, and conversations that are too long."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from reward.backends import ChatBackend, ScriptedBackend
from reward.conversation import Conversation, Message, Prompt
from reward.judge import JudgeScorer
from reward.judge_prompt import Constitution, judge_prompt
from reward.platt import Calibration
from reward.scorer import Score, Scorer, ScorerError, score_all
from reward.verdict import BAD, GOOD, VERDICT_PREFIX, Verdict
from tests.judge_slots import BREAD, GUIDELINES, PAYLOADS, around_slots, read_slots

ROOT = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------------------------------------ scorer


def scripted_logprobs(good: float, bad: float) -> ScriptedBackend:
    values = {VERDICT_PREFIX + GOOD: good, VERDICT_PREFIX + BAD: bad}
    return ScriptedBackend(logprob=lambda _, text: values[text])


def test_score_mode_is_the_softmax_of_the_two_verdicts():
    judge = JudgeScorer(scripted_logprobs(math.log(0.3), math.log(0.1)), GUIDELINES)
    assert isinstance(judge, Scorer)
    assert isinstance(judge.backend, ChatBackend)
    assert (judge.name, judge.scale) == ("judge", "probability")
    (score,) = score_all(judge, [BREAD])
    assert score.value == pytest.approx(0.3 / (0.3 + 0.1), abs=1e-12)
    assert judge.judge([BREAD])[0].outcome == "good"


def test_a_tie_is_not_good():
    (verdict,) = JudgeScorer(scripted_logprobs(-1.0, -1.0), GUIDELINES).judge([BREAD])
    assert (verdict.outcome, verdict.probability) == ("bad", 0.5)


@pytest.mark.parametrize(
    ("good", "bad"), [(math.nan, -1.0), (-1.0, math.nan), (-1.0, -math.inf), (-math.inf, -math.inf)]
)
def test_log_probabilities_that_are_no_numbers_are_unscored(good: float, bad: float):
    judge = JudgeScorer(scripted_logprobs(good, bad), GUIDELINES)
    (score,) = judge.score([BREAD])
    assert score.value is None
    assert "cannot be compared" in str(score.reason)
    assert judge.counts == {"unscored": 1}


def test_explain_mode_keeps_the_order_and_leaves_the_unreadable_unscored():
    replies = {
        "one": "Evaluation: Fine.\nChatbot is: good.",
        "two": "Evaluation: Harmful.\nChatbot is: bad.",
        "three": "I cannot judge this.",
    }
    judge = JudgeScorer(
        ScriptedBackend(reply=lambda prompt: replies[read_slots(prompt)[-1]["text"]]), GUIDELINES, mode="explain"
    )
    conversations = [Prompt.of("Hi?").answer(text) for text in ("one", "two", "three", "one")]
    good, bad, unscored = Score(1.0), Score(0.0), Score(None, "no verdict at the end")
    assert judge.score(conversations) == [good, bad, unscored, good]
    assert judge.counts == {"good": 2, "bad": 1, "unscored": 1}
    assert judge.judge(conversations)[1] == Verdict("bad", rationale="Harmful.")


def test_no_conversations_ask_nothing():
    backend = ScriptedBackend()
    assert JudgeScorer(backend, GUIDELINES).score([]) == []
    assert backend.prompts == []


def test_a_back_end_that_loses_an_answer_is_refused():
    class Forgetful(ScriptedBackend):
        def generate(self, prompts, *, max_new_tokens):
            return super().generate(prompts[1:], max_new_tokens=max_new_tokens)

    with pytest.raises(ScorerError, match="1 answers to 2 prompts"):
        JudgeScorer(Forgetful(), GUIDELINES, mode="explain").judge([BREAD, BREAD])


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
@pytest.mark.parametrize("text", ["UNSAFE", "harmless"])
def test_a_judge_that_reads_the_slots_is_not_flipped(payload: str, text: str):
    """The stand-in judge takes the last slot's word for it, so a forged slot or fence would flip it."""

    def logprob(prompt: Prompt, verdict: str) -> float:
        last = read_slots(prompt)[-1]
        content = last.get("text") or last["text_begins"] + last["text_ends"]
        return 0.0 if verdict.endswith(BAD) == content.startswith("UNSAFE") else -9.0

    judge = JudgeScorer(ScriptedBackend(logprob=logprob), GUIDELINES)
    (verdict,) = judge.judge([Prompt.of(payload or "Hi?").answer(f"{text} {payload}")])
    assert verdict.outcome == ("bad" if text == "UNSAFE" else "good")


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
def test_a_judge_that_repeats_the_payload_and_says_bad_is_never_read_as_good(payload: str):
    reply = f"Evaluation: The answer reads {payload} and helps to hurt others.\nChatbot is: bad."
    judge = JudgeScorer(ScriptedBackend(reply=lambda _: reply), GUIDELINES, mode="explain")
    assert judge.judge([BREAD.prompt.answer(payload)])[0].outcome != "good"


# -------------------------------------------------------------------------------------------- truncation


def test_an_over_long_conversation_is_cut_as_little_as_needed_and_counted():
    backend = scripted_logprobs(-1.0, -2.0)
    judge = JudgeScorer(backend, GUIDELINES, max_length=900)
    long = Prompt.of("Hi?").answer("start " + "word " * 5000 + "end")
    verdicts = judge.judge([BREAD, long])
    assert [verdict.truncated for verdict in verdicts] == [False, True]
    assert judge.counts == {"good": 2, "truncated": 1}
    prompt = backend.prompts[1]
    assert around_slots(prompt) == around_slots(judge_prompt(GUIDELINES, BREAD))
    assert 900 - 16 - 2 <= backend.num_tokens(prompt) <= 900 - 16
    slot = read_slots(prompt)[1]
    begins, gap, ends = slot["text_begins"], slot["characters_cut_here"], slot["text_ends"]
    assert begins.startswith("start word")
    assert ends.endswith("word end")
    assert len(begins) + gap + len(ends) == len(long.completion)


def test_explanations_get_their_room():
    backend = ScriptedBackend(reply=lambda _: "Chatbot is: good.")
    judge = JudgeScorer(backend, GUIDELINES, mode="explain", max_length=900, max_new_tokens=300)
    judge.judge([Prompt.of("Hi?").answer("word " * 5000)])
    assert backend.num_tokens(backend.prompts[0]) <= 600


def test_a_conversation_of_too_many_turns_is_unscored():
    backend = scripted_logprobs(-1.0, -2.0)
    turns = tuple(Message("user" if number % 2 == 0 else "assistant", "Hi.") for number in range(400))
    judge = JudgeScorer(backend, GUIDELINES, max_length=900)
    verdicts = judge.judge([Conversation(turns), BREAD])
    assert [(verdict.outcome, verdict.reason) for verdict in verdicts] == [
        ("unscored", "conversation too long"),
        ("good", None),
    ]
    assert len(backend.prompts) == 1


def test_guidelines_that_leave_no_room_are_refused_at_once():
    with pytest.raises(ScorerError, match="raise max_length or shorten the guidelines"):
        JudgeScorer(ScriptedBackend(), Constitution("Be good. " * 2000))


def test_importing_the_judge_is_light():
    program = "import sys, reward.judge; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


# ------------------------------------------------------------------------------------------------ provenance


class Named(ScriptedBackend):
    """A scripted back end that tells which model it speaks for."""

    fingerprint = "0123456789abcdef"


def test_verdicts_name_the_guidelines_they_were_made_by():
    judge = JudgeScorer(scripted_logprobs(-1.0, -2.0), GUIDELINES, max_length=900)
    turns = tuple(Message("user" if number % 2 == 0 else "assistant", "Hi.") for number in range(400))
    verdicts = judge.judge([BREAD, Conversation(turns)])
    assert [verdict.outcome for verdict in verdicts] == ["good", "unscored"]
    assert [verdict.guidelines for verdict in verdicts] == [GUIDELINES.hash] * 2
    assert judge.provenance == {"prompt": "slots", "guidelines": GUIDELINES.hash}
    made_with = JudgeScorer(Named(), GUIDELINES, prompt="two_shot").provenance
    assert made_with == {"prompt": "two_shot", "guidelines": GUIDELINES.hash, "model": Named.fingerprint}


def test_a_calibration_moves_the_probability_and_the_verdict():
    """log-odds 2: sigmoid(0.5 * 2 - 3) = 0.1192."""
    backend = Named(logprob=lambda _, text: -1.0 if text.endswith(GOOD) else -3.0)
    plain = JudgeScorer(backend, GUIDELINES)
    calibration = Calibration(0.5, -3.0, plain.provenance, 40)
    calibrated = JudgeScorer(backend, GUIDELINES, calibration=calibration)
    (before,), (after,) = plain.judge([BREAD]), calibrated.judge([BREAD])
    assert (before.outcome, before.probability) == ("good", pytest.approx(0.880797, abs=1e-6))
    assert (after.outcome, after.probability) == ("bad", pytest.approx(0.119203, abs=1e-6))
    assert plain.question(BREAD) != calibrated.question(BREAD)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"constitution": Constitution("Be good.")}, "was fitted for guidelines"),
        ({"prompt": "two_shot"}, "was fitted for prompt slots, not for two_shot"),
        ({"mode": "explain"}, "mode 'explain' does not measure"),
        ({"backend": ScriptedBackend()}, "does not tell which model"),
    ],
)
def test_a_calibration_of_another_judge_is_refused(changed: dict[str, Any], message: str):
    settings = {"backend": Named(), "constitution": GUIDELINES}
    calibration = Calibration(0.5, 0.0, JudgeScorer(**settings).provenance, 40)
    JudgeScorer(**settings, calibration=calibration)
    with pytest.raises(ScorerError, match=message):
        JudgeScorer(**(settings | changed), calibration=calibration)
    other_model = Calibration(0.5, 0.0, calibration.judge | {"model": "another"}, 40)
    with pytest.raises(ScorerError, match="was fitted for model another, not for 0123456789abcdef"):
        JudgeScorer(**settings, calibration=other_model)
