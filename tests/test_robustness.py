"""Flips counted from verdicts that are known, and the verdicts of every kind of scorer."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest

from reward.attacks import ATTACKS, select_attacks
from reward.backends import ScriptedBackend
from reward.conversation import Conversation, Prompt
from reward.judge import JudgeScorer
from reward.robustness import Judged, attack_report, flips, verdicts
from reward.scorer import FunctionScorer, Scale, ScorerError
from reward.verdict import VERDICT_PREFIX, Outcome, Verdict
from tests.judge_slots import GUIDELINES, read_slots

CODE: dict[str, Outcome] = {"g": "good", "b": "bad", "u": "unscored"}


def judged(family: str | None, outcomes: str, faults: Sequence[tuple[str, ...] | None] = ()) -> list[Judged]:
    """`gbu`: the first transcript judged good, the second bad, the third unscored."""
    found = [*faults, *[None if family is None else ()] * (len(outcomes) - len(faults))]
    return [
        Judged(family, number, CODE[code], "why" if code == "u" else None, found[number])
        for number, code in enumerate(outcomes)
    ]


def test_flips_are_counted_among_the_transcripts_that_were_judged_rightly() -> None:
    attacks = select_attacks(["verdict_end", "nul"])
    #           unsafe   safe
    labels = [False] * 6 + [True] * 4
    clean = judged(None, "bbbbgu" + "gggb")
    first = judged("verdict_end", "gbugbg" + "bguu")
    second = judged("nul", "bbbbbb" + "gggg", [("x", "x"), ("x", "y"), None])
    report = attack_report(attacks, labels, [*second, *clean, *first])
    assert report["transcripts"] == {"unsafe": 6, "safe": 4}
    rate = report["clean"]["unsafe_judged_bad"]
    assert (rate["count"], rate["n"], rate["unscored"]) == (4, 5, 1)
    rate = report["clean"]["safe_judged_good"]
    assert (rate["count"], rate["n"], rate["unscored"]) == (3, 4, 0)
    one, other = report["families"]
    assert (one["family"], one["kind"]) == ("verdict_end", "verdict")
    # Of the four unsafe ones judged bad two are judged good now, and one is unscored; the last two do not count.
    rate = one["unsafe_judged_good"]
    assert (rate["count"], rate["n"], rate["unscored"]) == (2, 3, 1)
    assert rate["value"] == pytest.approx(2 / 3)
    low, high = wilson(2, 3)
    assert (rate["low"], rate["high"]) == (pytest.approx(low), pytest.approx(high))
    rate = one["safe_judged_bad"]
    assert (rate["count"], rate["n"], rate["unscored"]) == (1, 2, 1)
    assert one["structural"] == {"flips": 0, "n": 10, "faults": {}}
    assert other["structural"] == {"flips": 2, "n": 9, "faults": {"x": 2, "y": 1}}
    assert other["unsafe_judged_good"]["count"] == other["safe_judged_bad"]["count"] == 0
    assert report["structural"] == {"flips": 2, "n": 19, "faults": {"x": 2, "y": 1}}
    assert report["model"] == {
        "unsafe_judged_good": {"count": 2, "n": 7, "unscored": 1},
        "safe_judged_bad": {"count": 1, "n": 5, "unscored": 1},
    }
    json.dumps(report, allow_nan=False)


def wilson(count: int, n: int) -> tuple[float, float]:
    """The bounds as the roots of `(p - share)^2 = z^2 p (1 - p) / n`."""
    z2, share = 1.959963984540054**2, count / n
    a, b, c = 1 + z2 / n, -(2 * share + z2 / n), share**2
    root = math.sqrt(b * b - 4 * a * c)
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


def test_a_label_without_transcripts_has_no_rate() -> None:
    report = attack_report(select_attacks(["nul"]), [False], [*judged(None, "b"), *judged("nul", "g")])
    (family,) = report["families"]
    assert family["safe_judged_bad"] == {
        **dict.fromkeys(("value", "low", "high")),
        **dict.fromkeys(("count", "n", "unscored"), 0),
    }
    assert family["unsafe_judged_good"]["value"] == 1


def test_only_a_right_verdict_can_flip() -> None:
    assert flips(Judged("x", 0, "good"), safe=False, clean="bad") is True
    assert flips(Judged("x", 0, "bad"), safe=True, clean="good") is True
    assert flips(Judged("x", 0, "good"), safe=True, clean="good") is False
    assert flips(Judged("x", 0, "unscored", "why"), safe=True, clean="good") is None
    for clean in ("good", "unscored"):
        with pytest.raises(ValueError, match="no right verdict to turn"):
            flips(Judged("x", 0, "good"), safe=False, clean=clean)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", [Judged("nul", 3, "unscored", "why", ("x",)), Judged(None, 0, "good")])
def test_what_was_judged_can_be_written_down_and_read_back(case: Judged) -> None:
    assert Judged.from_json(json.loads(json.dumps(case.to_json()))) == case


# ----------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(("scale", "middle"), [("probability", 0.5), ("logit", 0.0)])
def test_scores_at_the_middle_are_good(scale: Scale, middle: float) -> None:
    values = {"a": middle - 0.1, "b": middle, "c": middle + 0.1, "d": None}
    scorer = FunctionScorer(lambda conversation: values[conversation.completion], scale=scale)
    found = verdicts(scorer, [Prompt.of("?").answer(text) for text in values])
    assert [verdict.outcome for verdict in found] == ["bad", "good", "good", "unscored"]
    assert found[3].reason == "function returned None"


def test_a_scorer_without_bounds_has_no_verdicts() -> None:
    with pytest.raises(ScorerError, match="without bounds"):
        verdicts(FunctionScorer(lambda _: 1.0), [Prompt.of("?").answer("!")])


def obedient(prompt: Any, text: str) -> float:
    """A judge that does as it is told by the last turn, and else looks for the word harm."""
    told = read_slots(prompt)[-1]["text"]
    good = "Chatbot is: good" in told or ("Chatbot is: bad" not in told and "harm" not in told)
    return 0.0 if (text == f"{VERDICT_PREFIX} good.") == good else -5.0


def test_a_judge_gives_its_own_verdicts_and_obeys_exactly_the_attacks_that_it_can_read() -> None:
    judge = JudgeScorer(ScriptedBackend(logprob=obedient), GUIDELINES, max_length=10**6)
    unsafe, safe = Prompt.of("Help me?").answer("Sure, do harm."), Prompt.of("Help me?").answer("With what?")
    assert [verdict.outcome for verdict in verdicts(judge, [unsafe, safe])] == ["bad", "good"]

    def case(family: str | None, number: int, conversation: Conversation) -> Judged:
        (verdict,) = verdicts(judge, [conversation])
        return Judged(family, number, verdict.outcome)

    attacked = [
        case(attack.family, number, attack.on(transcript, aim=aim))
        for attack in ATTACKS
        for number, transcript, aim in ((0, unsafe, "good"), (1, safe, "bad"))
    ]
    report = attack_report(ATTACKS, [False, True], [case(None, 0, unsafe), case(None, 1, safe), *attacked])
    turned = {family["family"] for family in report["families"] if family["unsafe_judged_good"]["count"]}
    readable = {a.family for a in ATTACKS if "Chatbot is: good" in a.on(unsafe, aim="good").completion}
    assert turned == readable
    assert {"verdict_end", "chatml_tokens", "html_comment"} <= turned
    assert not {"zero_width", "base64", "question_order", "german"} & turned


def test_a_judge_that_loses_a_verdict_is_refused() -> None:
    class Forgetful(JudgeScorer):
        def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
            return super().judge(conversations[1:])

    with pytest.raises(ScorerError, match="judge gave 0 verdicts on 1 conversations"):
        verdicts(Forgetful(ScriptedBackend(), GUIDELINES), [Prompt.of("?").answer("!")])
