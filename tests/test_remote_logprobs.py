"""Mode `score` behind HTTP: P(good) comes from the token that decides, or the conversation is unscored."""

from __future__ import annotations

import math
from typing import Any

import pytest

from reward.judge import JudgeScorer
from reward.remote import ModelServer, RemoteBackend
from reward.scorer import ScorerError
from reward.verdict import Verdict
from tests.http_peer import Peer
from tests.judge_slots import BREAD, GUIDELINES
from tests.openai_peer import MODEL, completion, says

Step = tuple[str, dict[str, float]]
SURE = {"x": -15.0}
"""Alternatives of a token that decides nothing."""
PREFIX: list[Step] = [("Chat", SURE), ("bot", SURE), (" is", SURE), (":", SURE)]
END: list[Step] = [(".", SURE)]


def answer(steps: list[Step], **changes: Any) -> dict[str, Any]:
    """The answer that writes the tokens of `steps`, each beside its alternatives, itself at -0.01 if not among them."""
    rows: list[dict[str, Any]] = []
    for token, alternatives in steps:
        everything = {token: -0.01} | alternatives
        top = [{"token": other, "logprob": value, "bytes": None} for other, value in everything.items()]
        rows.append({"token": token, "logprob": everything[token], "bytes": None, "top_logprobs": top})
    text = "".join(token for token, _ in steps)
    return completion(text, **{"logprobs": {"content": rows, "refusal": None}, "finish_reason": "length"} | changes)


def judged(value: dict[str, Any]) -> Verdict:
    with Peer(says(value)) as server:
        judge = JudgeScorer(RemoteBackend(ModelServer.at(server.url, model=MODEL)), GUIDELINES)
        (verdict,) = judge.judge([BREAD])
    body = server.requests[0].json
    assert (body["logprobs"], body["top_logprobs"], body["temperature"], body["seed"]) == (True, 20, 0, 0)
    assert len(server.requests) == 1
    return verdict


def p_good(good: list[float], bad: list[float]) -> float:
    """By hand: the share of the probabilities."""
    ours, theirs = sum(map(math.exp, good)), sum(map(math.exp, bad))
    return ours / (ours + theirs)


DECISIVE = {
    # the token that decides is the fifth, with its alternatives; log-probabilities of good and of bad
    "good": ([*PREFIX, (" good", {" good": -0.1, " bad": -2.4, " fine": -4.0}), *END], [-0.1], [-2.4]),
    "bad": ([*PREFIX, (" bad", {" good": -1.2, " bad": -0.4}), *END], [-1.2], [-0.4]),
    "several spellings": (
        [*PREFIX, (" good", {" good": -0.5, "good": -2.0, " g": -3.0, " bad.": -1.5, " b": -4.0, " Good": -2.5}), *END],
        [-0.5, -2.0, -3.0],
        [-1.5, -4.0],
    ),
    "a space of its own": ([*PREFIX, (" ", {" good": -3.0}), ("good", {"good": -0.3, "bad": -1.4})], [-0.3], [-1.4]),
    "tokens without spaces": (
        [("Chatbot", SURE), ("is", SURE), (":", SURE), ("good", {"good": -0.2, "bad": -1.8})],
        [-0.2],
        [-1.8],
    ),
    "one token": ([("Chatbot is: bad.", {"Chatbot is: good.": -1.1, "Chatbot is: bad.": -0.6})], [-1.1], [-0.6]),
    "spaces before": ([("\n", SURE), *PREFIX, (" good", {" good": -0.1, " bad": -2.5})], [-0.1], [-2.5]),
    "letter by letter": (
        [*PREFIX, (" ", SURE), ("b", {"g": -1.0, "b": -0.5}), ("a", SURE), ("d", SURE)],
        [-1.0],
        [-0.5],
    ),
    "not among the alternatives": (
        [*PREFIX, (" good", {" good": -1e-6, " nice": -14.0, " fine": -15.0})],
        [-1e-6],
        [-15.0],
    ),
}


@pytest.mark.parametrize("case", DECISIVE)
def test_the_token_that_decides_gives_the_probability(case: str) -> None:
    steps, good, bad = DECISIVE[case]
    verdict = judged(answer(steps))
    expected = p_good(good, bad)
    assert verdict.probability == pytest.approx(expected, abs=1e-12)
    assert verdict.outcome == ("good" if expected > 0.5 else "bad")
    assert verdict.score.value == verdict.probability


TOO_FEW = [*PREFIX, (" good", {" good": -0.1, " nice": -3.0, " fine": -4.0})]
UNSCORED = {
    "the other verdict may be anything": (answer(TOO_FEW), "no verdict: too few alternatives"),
    "neither": (answer([*PREFIX, (" fine", {" fine": -0.1, " nice": -3.0})]), "no verdict: the answer does not begin"),
    "other words": (answer([("I", {"I": -0.1, "Chat": -2.0}), (" think", SURE)]), "no verdict: the answer does not"),
    "no end": (answer(PREFIX), "no verdict: the answer does not begin with 'Chatbot is:'"),
    "empty": (answer([], finish_reason="stop"), "empty answer"),
    "filtered": (answer(PREFIX, finish_reason="content_filter"), "content filter"),
    "refusal": (answer([], refusal="No."), "refusal"),
    "no number": (completion(logprobs={"content": [{"token": "a", "logprob": None}]}), "malformed answer: a token"),
    "no token": (completion(logprobs={"content": [{"logprob": -1.0}]}), "malformed answer: a token of logprobs"),
    "numbers": (completion(logprobs={"content": [1, 2]}), "malformed answer: logprobs are not a list of tokens"),
}


@pytest.mark.parametrize("case", UNSCORED)
def test_what_decides_nothing_is_unscored(case: str) -> None:
    value, reason = UNSCORED[case]
    verdict = judged(value)
    assert (verdict.outcome, verdict.probability) == ("unscored", None)
    assert str(verdict.reason).startswith(reason)


@pytest.mark.parametrize(
    "value",
    [
        completion("Chatbot is: good."),
        completion("Chatbot is: good.", logprobs=None),
        completion("Chatbot is: good.", logprobs={"content": None}),
        completion(
            "Chatbot is: good.", logprobs={"content": [{"token": " good", "logprob": -0.1, "top_logprobs": []}]}
        ),
    ],
)
def test_a_server_without_log_probabilities_is_refused_at_once(value: dict[str, Any]) -> None:
    with Peer(says(value)) as server:
        judge = JudgeScorer(RemoteBackend(ModelServer.at(server.url, model=MODEL, concurrency=2)), GUIDELINES)
        with pytest.raises(ScorerError, match=r"gives no log-probabilities .* judge with mode: explain"):
            judge.judge([BREAD] * 30)
    assert len(server.requests) <= 2
