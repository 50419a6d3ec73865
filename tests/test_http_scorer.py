"""`reward.http`: scores come over HTTP bit by bit, and an answer that is not exactly one is refused, never guessed."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from reward.conversation import Conversation, Message, Prompt, Tags
from reward.endpoint import Endpoint
from reward.http import HttpScorer
from reward.scorer import FunctionScorer, PiecewiseScorer, Score, Scorer, ScorerError
from reward.server import ScoreServer
from tests.http_peer import Peer, Request, drip, http

TOKEN = "a-token-of-the-tests"
HEALTH = {"name": "peer", "scale": "probability"}
Respond = Callable[[Request], Iterable[bytes | float]]


def conversations(count: int) -> list[Conversation]:
    return [Prompt.of(f"Question {number}?").answer(f"Answer {number}.") for number in range(count)]


def answer(request: Request, **changes: Any) -> dict[str, Any]:
    """A right answer: the n-th of the conversations of `conversations` gets n/1000."""
    asked = [item["messages"][-1]["content"] for item in request.json["conversations"]]
    scores = [{"value": int(text.split()[1][:-1]) / 1000, "reason": None} for text in asked]
    return {"id": request.json["id"], **HEALTH, "scores": scores} | changes


def encoded(value: object) -> bytes:
    return json.dumps(value).encode()


def peer(respond: Respond) -> Peer:
    """A server whose health is right and whose scores are those of `respond`."""
    return Peer(lambda request: [http(encoded(HEALTH))] if request.line.startswith("GET") else respond(request))


def connect(server: Peer | ScoreServer, *, batch_size: int = 64, token: str | None = None, **endpoint: Any) -> Scorer:
    return HttpScorer.connect(Endpoint(url=server.url, token=token, **endpoint), batch_size=batch_size)


def refused(respond: Respond, *, count: int = 2, **endpoint: Any) -> tuple[str, int]:
    """The ScorerError that an answer gets, which is one line, and the number of requests."""
    with peer(respond) as server:
        scorer = connect(server, **endpoint)
        with pytest.raises(ScorerError) as caught:
            scorer.score(conversations(count))
        message = str(caught.value)
        assert "\n" not in message
        assert server.url in message
        return message, len(server.requests) - 1


# ---------------------------------------------------------------------------------------------- the way there


def shown(scores: Iterable[Score]) -> list[tuple[bytes | None, str | None, str | None]]:
    return [(None if s.value is None else struct.pack("<d", s.value), s.reason, s.branch) for s in scores]


def awkward(conversation: Conversation) -> float | None:
    """Numbers that a careless encoding would change."""
    numbers = [0.1 + 0.2, -0.0, 5e-324, 1.7976931348623157e308, 1 / 3, -1e-17, 12345678901234567890.0]
    position = len(conversation.completion)
    return None if position >= len(numbers) else numbers[position]


def test_served_scores_are_those_of_the_scorer_bit_by_bit() -> None:
    texts = ["x" * length for length in range(9)]
    asked = [Prompt.of("Was sagst du dazu? 好 \u2028 \x7f").answer(text) for text in texts]  # the first answer is empty
    scorer = FunctionScorer(awkward, name="awkward")
    with ScoreServer(scorer) as server:
        remote = connect(server, batch_size=4)
        assert (remote.name, remote.scale) == ("awkward", "unbounded")
        assert shown(remote.score(asked)) == shown(scorer.score(asked))


def test_a_served_combination_says_which_part_decided() -> None:
    def count(conversation: Conversation) -> float:
        return len(conversation.completion) / 10

    safety = FunctionScorer(count, scale="probability")
    combined = PiecewiseScorer(safety, FunctionScorer(lambda _: 0.25, scale="logit"))
    system = Message("system", "Be kind.")
    asked = [
        Prompt.of("a", is_safety=True, risk_category="r").answer("12345"),
        Conversation((system, Message("user", "b"), Message("assistant", "1"))),
        Conversation((Message("user", "c"), Message("assistant", "123")), Tags(source="s", borderline=True)),
    ]
    with ScoreServer(combined) as server:
        assert shown(connect(server).score(asked)) == shown(combined.score(asked))
        assert [score.branch for score in connect(server).score(asked)] == ["safety", "safety", "helpfulness"]


def test_batches_keep_the_order() -> None:
    with peer(lambda request: [http(encoded(answer(request)))]) as server:
        scores = connect(server, batch_size=64).score(conversations(150))
    assert [score.value for score in scores] == [number / 1000 for number in range(150)]
    sent = [request.json for request in server.requests[1:]]
    assert [len(request["conversations"]) for request in sent] == [64, 64, 22]
    assert len({request["id"] for request in sent}) == 3


def test_no_conversation_needs_no_request() -> None:
    with peer(lambda _: []) as server:
        assert connect(server).score([]) == []
    assert len(server.requests) == 1


def test_unscored_stays_unscored_and_whole_numbers_count() -> None:
    scores = [{"value": None, "reason": "too long"}, {"value": 1, "reason": "sure", "branch": "b"}]
    with peer(lambda request: [http(encoded(answer(request, scores=scores)))]) as server:
        found = connect(server).score(conversations(2))
    assert found == [Score(None, "too long"), Score(1.0, "sure", "b")]
    assert isinstance(found[1].value, float)


# -------------------------------------------------------------------------------------------- malformed answers

GOOD = {"value": 0.5, "reason": None}
DEEP = b"[" * 200_000


def scores(*rows: object) -> Respond:
    return lambda request: [http(encoded(answer(request, scores=list(rows))))]


def body(text: str) -> Respond:
    """An answer whose second value is `text`, not encoded."""
    return lambda request: [
        http(encoded(answer(request, scores=[GOOD, "HERE"])).replace(b'"HERE"', b'{"value": %s}' % text.encode()))
    ]


def value(text: str) -> Respond:
    return body(f'{text}, "reason": null')


def changed(**changes: Any) -> Respond:
    return lambda request: [http(encoded(answer(request, **changes)))]


MALFORMED: dict[str, tuple[Respond, str]] = {
    "short": (scores(GOOD), "1 scores for 2 conversations"),
    "long": (scores(GOOD, GOOD, GOOD), "3 scores for 2 conversations"),
    "none": (scores(), "0 scores for 2 conversations"),
    "no list": (changed(scores={"0": GOOD, "1": GOOD}), "scores must be a list, got an object"),
    "plain numbers": (scores(0.5, 0.5), "scores[0] must be an object, got a number"),
    "NaN": (value("NaN"), "NaN is not JSON"),
    "Infinity": (value("-Infinity"), "-Infinity is not JSON"),
    "overflow": (value("1e999"), "scores[1].value is beyond the range of a double"),
    "huge integer": (value("1" + "0" * 400), "scores[1].value is beyond the range of a double"),
    "endless integer": (value("1" * 5000), "not JSON"),
    "text": (value('"0.5"'), "scores[1].value must be a number or null, got text"),
    "boolean": (value("true"), "scores[1].value must be a number or null, got a boolean"),
    "list": (value("[0.5]"), "scores[1].value must be a number or null, got a list"),
    "no probability": (value("1.5"), "scores[1].value is 1.5, but a probability lies between 0 and 1"),
    "neither": (value("null"), "scores[1] has neither a value nor a reason"),
    "blank reason": (body('null, "reason": " "'), "scores[1].reason must be one printable line"),
    "escape codes": (body('null, "reason": "\\u001b[2J"'), "scores[1].reason must be one printable line"),
    "endless reason": (body('null, "reason": "%s"' % ("x" * 1001)), "scores[1].reason must be one printable line"),
    "reason a number": (body('null, "reason": 3'), "scores[1].reason must be text, got a number"),
    "no reason": (body("0.5"), "scores[1] lacks the key 'reason'"),
    "extra key of a score": (value('0.5, "weight": 1'), "scores[1] has the unknown key 'weight'"),
    "key twice": (value('0.5, "value": 0.1'), "a key stands twice"),
    "extra key": (changed(version=2), "the answer has the unknown key 'version'"),
    "no key": (lambda request: [http(encoded({"id": request.json["id"], **HEALTH}))], "lacks the key 'scores'"),
    "stale id": (changed(id="0" * 32), "the answer is to another request: id '00000"),
    "id a number": (changed(id=1), "the answer is to another request: id 1"),
    "another scorer": (changed(name="other"), "has become 'other' (scale probability); it was 'peer'"),
    "another scale": (changed(scale="logit"), "has become 'peer' (scale logit); it was 'peer'"),
    "unknown scale": (changed(scale="percent"), "scale must be one of logit, probability, unbounded, got 'percent'"),
    "not JSON": (lambda _: [http(b"0.5 0.5")], "not JSON"),
    "cut off": (lambda request: [http(encoded(answer(request))[:-5])], "not JSON"),
    "empty": (lambda _: [http(b"")], "not JSON"),
    "not UTF-8": (lambda _: [http(b'{"id": "\xff"}')], "not JSON"),
    "nested": (lambda _: [http(DEEP, Content_Length="", Connection="close")], "more than"),
    "nested within the limit": (lambda _: [http(DEEP[:60_000])], "not JSON"),
    "a list": (lambda _: [http(b"[]")], "the answer must be an object, got a list"),
    "a page": (
        lambda request: [http(encoded(answer(request)), Content_Type="text/html")],
        "got content type 'text/html'",
    ),
    "no content type": (lambda request: [http(encoded(answer(request)), Content_Type="")], "got content type 'none'"),
    "compressed": (lambda request: [http(encoded(answer(request)), Content_Encoding="gzip")], "expected plain"),
    "announced too large": (lambda _: [http(b"{}", Content_Length="999999999")], "the answer takes more than"),
    "too large": (lambda _: [http(b" " * 200_000, Content_Length="")], "the answer takes more than"),
    "not HTTP": (lambda _: [b"SSH-2.0-OpenSSH_9.0\r\n\r\n"], "the answer is not HTTP"),
    "endless header": (lambda _: [b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000 + b"\r\n\r\n"], "the answer is not HTTP"),
    "redirect": (
        lambda _: [http(b"", "307 Temporary Redirect", Location="http://elsewhere.example/score")],
        "redirects are not followed (to 'elsewhere.example')",
    ),
    "no content": (lambda _: [http(b"", "204 No Content")], "status 204"),
    "bad request": (lambda _: [http(b'{"error": "no\\nway"}', "400 Bad Request")], "status 400, 'no way'"),
    "wrong token": (lambda _: [http(b"<html>", "401 Unauthorized", Content_Type="text/html")], "status 401"),
    "too many": (lambda _: [http(b"{}", "413 Too Large")], "status 413"),
    "broken": (lambda _: [http(b"", "500 Oh")], "status 500"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_answer_is_refused_at_once(case: str) -> None:
    respond, expected = MALFORMED[case]
    message, requests = refused(respond)
    assert expected in message
    assert requests == 1


def test_the_table_would_pass_a_right_answer() -> None:
    for respond in (scores(GOOD, GOOD), value("0.5"), changed()):
        with peer(respond) as server:
            assert len(connect(server).score(conversations(2))) == 2


# ------------------------------------------------------------------------------------------------------ patience


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between tries, which take no time here."""
    found: list[float] = []
    monkeypatch.setattr("reward.endpoint.time.sleep", found.append)
    return found


LATER: dict[str, Callable[[Request], Iterable[bytes | float]]] = {
    **{
        str(status): lambda _, status=status: [http(b'{"error": "busy"}', f"{status} Later")]
        for status in (429, 502, 503, 504)
    },
    "closed": lambda _: [],
    "cut off": lambda request: [http(encoded(answer(request)))[:-3]],
    "cut off chunk": lambda _: [http(b"50\r\n{", Content_Length="", Transfer_Encoding="chunked")],
}


@pytest.mark.parametrize("case", LATER)
def test_what_may_pass_is_tried_again(case: str, pauses: list[float]) -> None:
    fail = iter([True, True])
    with peer(lambda r: LATER[case](r) if next(fail, False) else [http(encoded(answer(r)))]) as server:
        assert [score.value for score in connect(server).score(conversations(2))] == [0.0, 0.001]
    assert len(server.requests) == 1 + 3
    assert len({request.body for request in server.requests[1:]}) == 1
    assert len(pauses) == 2


@pytest.mark.parametrize("case", LATER)
def test_what_does_not_pass_is_refused(case: str, pauses: list[float]) -> None:
    message, requests = refused(LATER[case], retries=3)
    assert "no answer in 4 tries (retries=3" in message
    assert requests == 4
    assert len(pauses) == 3


def test_pauses_double_and_vary(pauses: list[float]) -> None:
    refused(LATER["503"], retries=9)
    longest = [0.25, 0.5, 1, 2, 4, 8, 15, 15, 15]
    assert all(most / 2 <= pause <= most for pause, most in zip(pauses, longest, strict=True))
    assert len(set(pauses)) == 9


@pytest.mark.parametrize(
    ("header", "least"), [("7", 7.0), ("Fri, 01 Jan 2100 00:00:00 GMT", 2e9), ("soon", 0.0), ("-5", 0.0)]
)
def test_the_server_may_say_how_long(header: str, least: float, pauses: list[float]) -> None:
    refused(lambda _: [http(b"", "429 Slow down", Retry_After=header)], retries=1, deadline=1e10)
    assert len(pauses) == 1
    assert least <= pauses[0] <= max(least * 2, 0.25)


def test_a_pause_beyond_the_deadline_is_not_waited_for(pauses: list[float]) -> None:
    message, requests = refused(lambda _: [http(b"", "503 Later", Retry_After="30")], deadline=20)
    assert "status 503, asks for 30 s" in message
    assert (requests, pauses) == (1, [])


def test_nobody_there(pauses: list[float]) -> None:
    with peer(lambda _: []) as server:
        pass
    with pytest.raises(ScorerError, match=r"no answer in 3 tries .* refused"):
        connect(server, retries=2)
    assert len(pauses) == 2


@pytest.mark.parametrize("where", ["head", "body", "nothing"])
def test_a_slow_drip_does_not_outlast_the_deadline(where: str) -> None:
    def respond(request: Request) -> Iterable[bytes | float]:
        data = http(encoded(answer(request)))
        head = data.index(b"\r\n\r\n") + 4
        if where == "nothing":
            return [20.0, data]
        return drip(data, seconds=20) if where == "head" else [data[:head], *drip(data[head:], seconds=20)]

    started = time.monotonic()
    message, requests = refused(respond, timeout=0.3, deadline=1.0)
    assert "no whole answer within" in message
    assert 0.3 <= time.monotonic() - started < 10
    assert requests >= 1


# ------------------------------------------------------------------------------------------------- who and where


def test_the_server_must_be_the_one_of_the_recipe() -> None:
    with peer(lambda _: []) as server:
        endpoint = Endpoint(url=server.url)
        assert HttpScorer.connect(endpoint, name="peer", scale="probability").name == "peer"
        with pytest.raises(ScorerError, match=r"serves 'peer' \(scale probability\), not 'mine'"):
            HttpScorer.connect(endpoint, name="mine")
        with pytest.raises(ScorerError, match=r"not 'peer' \(scale logit\)"):
            HttpScorer.connect(endpoint, scale="logit")


def test_a_token_is_shown_to_the_server_and_to_nobody_else(capfd: pytest.CaptureFixture[str]) -> None:
    with peer(lambda _: [http(b"", "500 Oh")]) as server:
        scorer = connect(server, token=TOKEN)
        with pytest.raises(ScorerError) as caught:
            scorer.score(conversations(1))
    assert [request.headers["authorization"] for request in server.requests] == [f"Bearer {TOKEN}"] * 2
    assert TOKEN not in f"{caught.value!r}{scorer!r}{capfd.readouterr()}"


def test_no_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with peer(lambda request: [http(encoded(answer(request)))]) as server:
        assert len(connect(server, retries=0).score(conversations(1))) == 1


@pytest.mark.parametrize(
    ("url", "token", "reason"),
    [
        ("http://scores.example:80", TOKEN, "would send the token in clear"),
        ("http://10.0.0.7", TOKEN, "would send the token in clear"),
        ("http://user:secret@localhost", None, "holds a user name or a password"),
        ("http://localhost/?key=secret", None, "has a query"),
        ("localhost:80", None, "is no URL"),
        ("ftp://localhost", None, "is no URL"),
        ("http://", None, "is no URL"),
        ("http://localhost:99999", None, "is no URL"),
        ("http://localhost/a b", None, "is no URL"),
        ("http://localhost", "", "must be 1 or more"),
        ("http://localhost", TOKEN + "\r\nX: y", "must be 1 or more"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused(url: str, token: str | None, reason: str) -> None:
    with pytest.raises(ScorerError, match=reason) as caught:
        Endpoint(url=url, token=token)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["https://scores.example", "http://localhost:1", "http://[::1]:2/x/", "http://127.8.9.1"]
)
def test_a_token_may_travel_encrypted_or_at_home(url: str) -> None:
    assert Endpoint(url=url, token=TOKEN).url == url


def test_https_is_not_spoken_in_clear() -> None:
    with ScoreServer(FunctionScorer(awkward)) as server:
        endpoint = Endpoint(url=server.url.replace("http:", "https:"), retries=0, token=TOKEN, timeout=5)
        with pytest.raises(ScorerError, match=r"no answer \(retries=0.*SSL"):
            HttpScorer.connect(endpoint)
