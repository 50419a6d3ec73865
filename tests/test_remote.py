"""`reward.remote`: a judge behind HTTP. Every failure is unscored with its reason, after few tries; no key is shown."""

from __future__ import annotations

import random
import threading
import time
import traceback
from collections.abc import Iterable
from typing import Any

import pytest

from reward.backends import ChatBackend
from reward.conversation import Prompt
from reward.judge import JudgeScorer
from reward.remote import ModelServer, RemoteBackend, base_url, in_parallel
from reward.scorer import Score, ScorerError, score_all
from reward.verdict import Verdict
from tests.http_peer import RESET, Peer, Request, http
from tests.judge_slots import BREAD, GUIDELINES
from tests.openai_peer import KEY, MODEL, Respond, completion, encoded, error, judged, numbered, says

GOOD = encoded(completion())


def judge(server: Peer, *, max_new_tokens: int = 64, **settings: Any) -> JudgeScorer:
    backend = RemoteBackend(ModelServer.at(server.url, model=MODEL, **settings))
    return JudgeScorer(backend, GUIDELINES, mode="explain", max_new_tokens=max_new_tokens)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between tries, which take no time here."""
    found: list[float] = []
    monkeypatch.setattr("reward.endpoint.time.sleep", found.append)
    return found


# --------------------------------------------------------------------------------------------- what is asked


def test_a_verdict_is_asked_for_as_the_servers_document_it() -> None:
    with Peer(says(completion("Evaluation: It insults.\nChatbot is: bad."))) as server:
        remote = judge(server, token=KEY)
        assert isinstance(remote.backend, ChatBackend)
        assert remote.judge([BREAD]) == [Verdict("bad", rationale="It insults.")]
        assert score_all(remote, [BREAD]) == [Score(0.0)]
    request = server.requests[0]
    assert request.line == "POST /v1/chat/completions HTTP/1.1"
    assert request.headers["authorization"] == f"Bearer {KEY}"
    body = request.json
    assert [message["role"] for message in body.pop("messages")] == ["system", "user"]
    assert body == {"model": MODEL, "temperature": 0, "seed": 0, "max_tokens": 64}
    assert judged(request) == BREAD.completion


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://localhost:1", "http://localhost:1/v1"),
        ("http://localhost:1/", "http://localhost:1/v1"),
        ("http://localhost:1/v1/", "http://localhost:1/v1"),
        ("https://host.example/openai/v1", "https://host.example/openai/v1"),
    ],
)
def test_the_address_is_the_base_that_such_clients_take(url: str, base: str) -> None:
    assert base_url(url) == base
    assert ModelServer.at(url, model=MODEL).endpoint.url == base


@pytest.mark.parametrize("settings", [{"retries": 5}, {"retries": -1}, {"concurrency": 0}])
def test_settings_have_bounds(settings: dict[str, int]) -> None:
    with pytest.raises(ScorerError, match="must be"):
        ModelServer.at("http://localhost:1", model=MODEL, **settings)


def test_a_key_is_not_sent_in_clear_to_another_machine() -> None:
    with pytest.raises(ScorerError, match="in clear"):
        ModelServer.at("http://judge.example", model=MODEL, token=KEY)


# ---------------------------------------------------------------------------------- failures of one conversation

FAILURES: dict[str, tuple[Respond, str, int, bool]] = {
    # what the server does, the reason, how many tries, whether another time may be better
    "429": (says(error("Slow down."), "429 Too Many Requests"), "rate limit", 5, True),
    "quota": (says(error(code="insufficient_quota"), "429 Too Many Requests"), "quota", 1, True),
    "402": (says(error(), "402 Payment Required"), "quota", 1, True),
    "500": (says(error(), "500 Oh"), "server error 500", 5, True),
    "502": (lambda _: [http(b"<html>", "502 Bad Gateway", Content_Type="text/html")], "server error 502", 5, True),
    "503": (says(error(), "503 Later"), "server error 503", 5, True),
    "504": (says(error(), "504 Late"), "server error 504", 5, True),
    "time-out": (lambda _: [60.0], "time-out", 5, True),
    "reset": (lambda _: [RESET], "connection: ", 5, True),
    "closed": (lambda _: [], "connection: ", 5, True),
    "reset amid the answer": (lambda _: [http(GOOD)[:-9], 0.05, RESET], "connection: ", 5, True),
    "cut stream": (lambda _: [http(GOOD)[:-9]], "cut stream", 5, True),
    "cut chunk": (lambda _: [http(b"50\r\n{", Content_Length="", Transfer_Encoding="chunked")], "cut stream", 5, True),
    "cut without a length": (lambda _: [http(GOOD[:-9], Content_Length="")], "malformed answer: not JSON", 1, True),
    "no JSON": (lambda _: [http(b"Chatbot is: good.")], "malformed answer: not JSON", 1, True),
    "NaN": (lambda _: [http(b'{"model": NaN}')], "malformed answer: NaN is not JSON", 1, True),
    "a page": (lambda _: [http(GOOD, Content_Type="text/html")], "malformed answer: expected plain", 1, True),
    "a list": (says([]), "malformed answer: the answer must be an object", 1, True),
    "no choices": (says(completion(choices=[])), "malformed answer: it has no choices", 1, True),
    "choices of text": (says(completion(choices=["good"])), "malformed answer: it has no choices", 1, True),
    "content a list": (says(completion([{"type": "text"}])), "malformed answer: choices[0].message.content", 1, True),
    "nested": (lambda _: [http(b"[" * 900 + b"]" * 900)], "malformed answer: ", 1, True),
    "nested in an object": (
        lambda _: [http(b'{"model": %s}' % (b"[" * 20_000 + b"]" * 20_000))],
        "malformed answer: not JSON: nested too deeply",
        1,
        True,
    ),
    "too large": (lambda _: [http(b" " * 5_000_000)], "malformed answer: the answer takes more than", 1, True),
    "not HTTP": (lambda _: [b"SSH-2.0-OpenSSH_9.0\r\n\r\n"], "malformed answer: the answer is not HTTP", 1, True),
    "wrong model": (says(completion(model="other")), "wrong model: 'other' answered for 'judge-7b'", 1, True),
    "no model": (says({"choices": []}), "wrong model: None answered", 1, True),
    "empty": (says(completion("")), "empty answer", 1, False),
    "blank": (says(completion(" \n")), "empty answer", 1, False),
    "null": (says(completion(None)), "empty answer", 1, False),
    "refusal": (says(completion(None, refusal="I can't.")), "refusal", 1, False),
    "filtered": (says(completion("", finish_reason="content_filter")), "content filter", 1, False),
    "filtered at once": (says(error(code="content_filter"), "400 Bad Request"), "content filter", 1, False),
    "too long an answer": (
        says(completion("Evaluation: It", finish_reason="length")),
        "cut off at 64 tokens",
        1,
        False,
    ),
    "a tool call": (says(completion(None, finish_reason="tool_calls")), "unfinished answer: finish_reason", 1, False),
    "400": (says(error("Too\nlong."), "400 Bad Request"), "request refused: status 400, 'Too long.'", 1, True),
    "400 of vLLM": (
        says({"object": "error", "message": "Too long."}, "400 Bad"),
        "request refused: status 400",
        1,
        True,
    ),
    "413": (says(error(), "413 Too Large"), "request refused: status 413", 1, True),
    "422": (says("nonsense", "422 Unprocessable"), "request refused: status 422", 1, True),
    "no verdict": (says(completion("I'm sorry, I can't.")), "no verdict at the end", 1, False),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_unscored_with_its_reason_after_few_tries(case: str, pauses: list[float]) -> None:
    respond, reason, tries, transient = FAILURES[case]
    with Peer(respond) as server:
        remote = judge(server, token=KEY, timeout=0.2 if case == "time-out" else 30.0)
        (verdict,) = remote.judge([BREAD])
    assert (verdict.outcome, verdict.probability, verdict.transient) == ("unscored", None, transient)
    assert str(verdict.reason).startswith(reason)
    assert verdict.score.value is None
    assert "\n" not in str(verdict.reason)
    assert len(server.requests) == tries
    assert len(pauses) == tries - 1
    assert remote.counts == {"unscored": 1}


def test_what_passes_is_scored_and_failures_stay_with_their_conversation(pauses: list[float]) -> None:
    def respond(request: Request) -> Iterable[bytes | float]:
        tried = [judged(earlier) for earlier in server.requests].count(judged(request))
        status = {"1": "503 Later", "2": "400 Bad Request"}.get(judged(request), "200 OK")
        if status == "503 Later" and tried > 2:
            status = "200 OK"
        return [http(GOOD if status == "200 OK" else encoded(error()), status)]

    with Peer(respond) as server:
        verdicts = judge(server).judge(numbered(4))
    assert [verdict.outcome for verdict in verdicts] == ["good", "good", "unscored", "good"]
    assert len(server.requests) == 3 + 3
    assert len(pauses) == 2


@pytest.mark.parametrize(("seconds", "tries"), [("7", 5), ("70", 1)])
def test_retry_after_is_honoured_within_the_deadline(seconds: str, tries: int, pauses: list[float]) -> None:
    with Peer(says(error(), "429 Too Many Requests", Retry_After=seconds)) as server:
        (verdict,) = judge(server, deadline=60.0).judge([BREAD])
    assert verdict.reason == "rate limit"
    assert len(server.requests) == tries
    assert pauses == [7.0] * (tries - 1)


# ------------------------------------------------------------------------------------------- failures of all

FATAL: dict[str, tuple[Respond, str]] = {
    "401": (says(error("Incorrect API key."), "401 Unauthorized"), "status 401, 'Incorrect API key.'; check the key"),
    "403": (says(error(), "403 Forbidden"), "status 403, 'No.'; check what the key may do"),
    "404": (says(error(), "404 Not Found"), "status 404, 'No.'; check url and model"),
    "404 without a word": (lambda _: [http(b"", "404 Not Found")], "status 404; check url and model"),
    "no such model": (says(error(code="model_not_found"), "400 Bad Request"), "status 400, 'No.'; check url and model"),
    "405": (says(error(), "405 Method Not Allowed"), "status 405"),
    "redirect": (
        lambda _: [http(b"", "307 Temporary Redirect", Location="https://elsewhere.example/v1")],
        "redirects are not followed (to 'elsewhere.example')",
    ),
}


@pytest.mark.parametrize("case", FATAL)
def test_what_all_would_meet_stops_at_once(case: str, pauses: list[float]) -> None:
    respond, reason = FATAL[case]
    with Peer(respond) as server, pytest.raises(ScorerError) as caught:
        judge(server, token=KEY).judge([BREAD])
    assert reason in str(caught.value)
    assert server.url in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(server.requests) == 1
    assert pauses == []


def test_nobody_there_stops_after_few_tries(pauses: list[float]) -> None:
    with Peer(lambda _: []) as server:
        pass
    with pytest.raises(ScorerError, match=r"no answer in 3 tries .* refused"):
        judge(server, retries=2, concurrency=1).judge(numbered(20))
    assert len(pauses) == 2


def test_a_stop_begins_no_further_conversation() -> None:
    with Peer(says(error(), "401 Unauthorized")) as server, pytest.raises(ScorerError, match="check the key"):
        judge(server, concurrency=3).judge(numbered(50))
    assert len(server.requests) <= 3


def test_a_stop_does_not_wait_for_answers_on_their_way() -> None:
    def respond(request: Request) -> Iterable[bytes | float]:
        return [0.2, http(b"", "401 Unauthorized")] if judged(request) == "0" else [60.0]

    started = time.monotonic()
    with Peer(respond) as server, pytest.raises(ScorerError, match="status 401"):
        judge(server, concurrency=4).judge(numbered(4))
    assert time.monotonic() - started < 20


def test_a_stop_ends_further_tries() -> None:
    def respond(request: Request) -> Iterable[bytes | float]:
        if judged(request) != "0":
            return [http(b"", "503 Later")]
        return [0.5, http(b"", "401 Unauthorized")]

    with Peer(respond) as server:
        with pytest.raises(ScorerError, match="status 401"):
            judge(server, concurrency=2).judge(numbered(2))
        tries = len(server.requests)
        time.sleep(1.5)  # the next try would come within a second
        assert len(server.requests) <= tries


# --------------------------------------------------------------------------------------------------- the key

TELLTALES: dict[str, Respond] = {
    "status": says(error(f"Incorrect API key provided: {KEY}."), "401 Unauthorized"),
    "status of one": says(error(f"{KEY} may not ask that."), "400 Bad Request"),
    "word at the end": says(error("x" * 290 + KEY), "400 Bad Request"),
    "escaped": lambda _: [http(encoded(error("KEY")).replace(b"KEY", KEY.replace("k", "\\u006b").encode()), "400 No")],
    "model": says(completion(model=KEY)),
    "finish": says(completion(finish_reason=f"{KEY}!")),
    "content": says(completion(f"Evaluation: It says {KEY}.\nChatbot is: bad.")),
    "content type": lambda _: [http(GOOD, Content_Type=f"text/{KEY}")],
    "redirect": lambda _: [http(b"", "307 Away", Location=f"https://{KEY.replace('/', '')}.example/{KEY}")],
    "not JSON": lambda _: [http(KEY.encode())],
}


@pytest.mark.parametrize("case", TELLTALES)
def test_the_key_is_shown_to_the_server_and_to_nobody_else(
    case: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with Peer(TELLTALES[case]) as server:
        remote = judge(server, token=KEY)
        try:
            shown = repr(remote.judge([BREAD]))
        except ScorerError as error:
            shown = "".join(traceback.format_exception(error)) + repr(error)
    assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
    shown += f"{remote!r}{remote.backend!r}{capfd.readouterr()}{caplog.text}"
    assert KEY not in shown
    assert KEY[:10] not in shown


# ------------------------------------------------------------------------------------------------ many at once


@pytest.mark.parametrize("count", [0, 1, 19, 20, 21, 1000])
def test_as_many_verdicts_as_conversations_in_their_order(count: int) -> None:
    """The stand-in judge finds even numbers good and leaves multiples of seven unscored."""

    def respond(request: Request) -> Iterable[bytes | float]:
        number = int(judged(request))
        verdict = "" if number % 7 == 0 else f"Chatbot is: {'bad' if number % 2 else 'good'}."
        return [http(encoded(completion(verdict)))]

    with Peer(respond) as server:
        verdicts = judge(server, concurrency=8).judge(numbered(count))
    expected = ["unscored" if n % 7 == 0 else "bad" if n % 2 else "good" for n in range(count)]
    assert [verdict.outcome for verdict in verdicts] == expected
    assert len(server.requests) == count


def test_the_order_is_kept_and_no_more_requests_are_on_their_way_than_said() -> None:
    draw = random.Random(1)
    delays = [draw.uniform(0.0, 0.05) for _ in range(40)]
    lock, now, most = threading.Lock(), 0, 0

    def respond(request: Request) -> Iterable[bytes | float]:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        yield delays[int(judged(request))]
        with lock:
            now -= 1
        yield http(encoded(completion(f"Evaluation: It is {judged(request)}.\nChatbot is: good.")))

    with Peer(respond) as server:
        verdicts = judge(server, concurrency=5).judge(numbered(40))
    assert [verdict.rationale for verdict in verdicts] == [f"It is {number}." for number in range(40)]
    assert 2 <= most <= 5


def test_work_in_parallel_raises_what_was_raised_and_begins_nothing_more() -> None:
    begun: list[int] = []

    def work(number: int, _: threading.Event) -> int:
        begun.append(number)
        if number == 3:
            raise KeyError(number)
        return -number

    assert in_parallel(lambda number, _: -number, [1, 2, 3], threads=9) == [-1, -2, -3]
    with pytest.raises(KeyError):
        in_parallel(work, list(range(100)), threads=1)
    assert begun == [0, 1, 2, 3]


def test_lengths_are_estimated_and_long_conversations_cut() -> None:
    with Peer(says(completion())) as server:
        remote = judge(server)
        (verdict,) = remote.judge([Prompt.of("Hi?").answer("word " * 5000)])
    assert verdict.outcome == "good"
    assert verdict.truncated
    sent = server.requests[0].json["messages"]
    assert sum(len(message["content"]) for message in sent) < 3 * 2048
