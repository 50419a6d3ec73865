"""`reward.moderation`: category scores of a moderation service become verdicts, or the answer is unscored."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from reward.conversation import Conversation, Message, Prompt
from reward.judge import Judge
from reward.moderation import ModerationJudge
from reward.remote import ModelServer
from reward.scorer import Score, ScorerError, score_all
from tests.http_peer import Peer, Request, http
from tests.judge_slots import BREAD
from tests.openai_peer import KEY, Respond, encoded, error, says

MODEL = "moderator-1"


def result(scores: dict[str, Any], *flagged: str, **changes: Any) -> dict[str, Any]:
    categories = {name: name in flagged for name in scores}
    return {"flagged": bool(flagged), "categories": categories, "category_scores": scores} | changes


def moderated(*results: Any, **changes: Any) -> dict[str, Any]:
    return {"id": "m-1", "model": MODEL, "results": list(results)} | changes


def moderation(server: Peer, *, threshold: float | None = None, **settings: Any) -> ModerationJudge:
    return ModerationJudge(ModelServer.at(server.url, model=MODEL, **settings), threshold=threshold)


MILD = result({"hate": 0.02, "violence": 0.25, "self-harm": 1e-7})
HARSH = result({"hate": 0.6, "violence": 0.91, "self-harm": 0.3}, "hate", "violence")


def test_the_last_answer_is_asked_about_and_its_highest_score_counts() -> None:
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "the last"))
    with Peer(says(moderated(MILD))) as server:
        judge = moderation(server, token=KEY)
        assert isinstance(judge, Judge)
        (verdict,) = judge.judge([Conversation(turns)])
        assert score_all(judge, [BREAD]) == [Score(0.75)]
    assert (verdict.outcome, verdict.probability, verdict.rationale) == ("good", 0.75, "")
    request = server.requests[0]
    assert request.line == "POST /v1/moderations HTTP/1.1"
    assert request.json == {"model": MODEL, "input": "the last"}
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert judge.counts == {"good": 2}


@pytest.mark.parametrize(
    ("answer", "threshold", "outcome", "probability", "rationale"),
    [
        (HARSH, None, "bad", 1 - 0.91, "violence 0.91, hate 0.6"),
        (HARSH, 0.3, "bad", 1 - 0.91, "violence 0.91, hate 0.6, self-harm 0.3"),
        (HARSH, 0.95, "good", 1 - 0.91, ""),
        (MILD, 0.25, "bad", 0.75, "violence 0.25"),
        (result({"hate": 0.4}, flagged=True), None, "bad", 0.6, ""),  # flagged without a category
        ({"categories": {"hate": True}, "category_scores": {"hate": 0.9}}, None, "bad", 1 - 0.9, "hate 0.9"),
        (result({"hate": 0.1, "illicit": None}), None, "good", 0.9, ""),
        (result({"hate": 1}, "hate"), None, "bad", 0.0, "hate 1"),
    ],
)
def test_bad_is_what_is_flagged_or_over_the_threshold(
    answer: dict[str, Any], threshold: float | None, outcome: str, probability: float, rationale: str
) -> None:
    with Peer(says(moderated(answer))) as server:
        (verdict,) = moderation(server, threshold=threshold).judge([BREAD])
    assert (verdict.outcome, verdict.rationale) == (outcome, rationale)
    assert verdict.probability == pytest.approx(probability, abs=1e-12)


def test_an_empty_answer_is_unscored_and_not_asked_about() -> None:
    def respond(request: Request) -> Iterable[bytes | float]:
        return [http(encoded(moderated(HARSH if request.json["input"] == "two" else MILD)))]

    texts = ["one", " \n", "two", ""]
    with Peer(respond) as server:
        verdicts = moderation(server).judge([Prompt.of("Hi?").answer(text) for text in texts])
    assert [verdict.outcome for verdict in verdicts] == ["good", "unscored", "bad", "unscored"]
    assert verdicts[1].reason == "empty answer"
    assert len(server.requests) == 2


FAILURES: dict[str, tuple[Respond, str]] = {
    "429": (says(error(), "429 Too Many"), "rate limit"),
    "quota": (says(error(code="insufficient_quota"), "429 Too Many"), "quota"),
    "too long": (says(error("Too long."), "400 Bad Request"), "request refused: status 400, 'Too long.'"),
    "wrong model": (says(moderated(MILD, model="moderator-2")), "wrong model: 'moderator-2' answered"),
    "no result": (says(moderated()), "malformed answer: results must be"),
    "two results": (says(moderated(MILD, MILD)), "malformed answer: results must be"),
    "results of text": (says(moderated("safe")), "malformed answer: results must be"),
    "no scores": (says(moderated(result({}))), "malformed answer: results[0].category_scores holds no score"),
    "scores a list": (says(moderated({"category_scores": [0.5]})), "malformed answer: results[0].category_scores must"),
    "no categories": (says(moderated({"category_scores": {"a": 0.1}})), "malformed answer: results[0].categories must"),
    "a score of text": (says(moderated(result({"hate": "0.1"}))), "malformed answer: the score of 'hate' is no number"),
    "a true score": (says(moderated(result({"hate": True}))), "malformed answer: the score of 'hate'"),
    "a score above 1": (says(moderated(result({"hate": 1.5}))), "malformed answer: the score of 'hate'"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_unscored_with_its_reason(case: str) -> None:
    respond, reason = FAILURES[case]
    with Peer(respond) as server:
        (verdict,) = moderation(server, retries=0).judge([BREAD])
    assert (verdict.outcome, verdict.probability, verdict.rationale) == ("unscored", None, "")
    assert str(verdict.reason).startswith(reason)


def test_a_key_that_is_refused_stops_at_once() -> None:
    with Peer(says(error(), "401 Unauthorized")) as server, pytest.raises(ScorerError, match="check the key"):
        moderation(server, concurrency=2).judge([BREAD] * 20)
    assert len(server.requests) <= 2


@pytest.mark.parametrize("threshold", [0.0, 1.1])
def test_a_threshold_lies_between_0_and_1(threshold: float) -> None:
    with pytest.raises(ScorerError, match="threshold must be above 0"):
        ModerationJudge(ModelServer.at("http://localhost:1", model=MODEL), threshold=threshold)
