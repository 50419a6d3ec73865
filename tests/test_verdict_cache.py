"""`reward.verdict_cache`: nothing is judged twice, whatever was killed, and the file holds whole verdicts alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest

from reward.backends import Failure, ScriptedBackend
from reward.conversation import Conversation, Prompt
from reward.judge import Judge, JudgeScorer
from reward.judge_prompt import Constitution
from reward.scorer import Scale, Score, ScorerError, score_all
from reward.verdict import Verdict
from reward.verdict_cache import CachedJudge, VerdictCache
from tests.conftest import ROOT
from tests.judge_slots import GUIDELINES, read_slots

LINES = [
    Verdict(
        "good", rationale='Fine: "so"\nand \u2028 \ud800 好 \x00', probability=0.1 + 0.2, guidelines="0123456789abcdef"
    ),
    Verdict("bad", probability=5e-324, truncated=True),
    Verdict("unscored", "no verdict at the end", "I cannot say."),
]


def numbered(count: int) -> list[Conversation]:
    return [Prompt.of("Hi?").answer(str(number)) for number in range(count)]


@dataclass
class Even:
    """Finds even numbers good; `asked` keeps which it was asked about."""

    name: str = "even"
    scale: Scale = "probability"
    asked: list[int] = field(default_factory=list[int])

    def judge(self, conversations: list[Conversation]) -> list[Verdict]:
        numbers = [int(conversation.completion) for conversation in conversations]
        self.asked += numbers
        return [Verdict("bad" if number % 2 else "good", rationale=f"{number}.") for number in numbers]

    def score(self, conversations: list[Conversation]) -> list[Score]:
        return [verdict.score for verdict in self.judge(conversations)]

    def question(self, conversation: Conversation) -> list[Any]:
        return [conversation.completion]


def cached(judge: Judge, path: Path, *, identity: str = "m", **settings: int) -> CachedJudge:
    return CachedJudge(judge, VerdictCache(path), identity, **settings)


# ------------------------------------------------------------------------------------------------- no call twice


@pytest.mark.parametrize("count", [0, 1, 19, 20, 21, 1000])
def test_nothing_is_judged_twice_and_the_order_is_kept(count: int, tmp_path: Path) -> None:
    conversations = numbered(count)
    expected = Even().judge(conversations)
    for _ in range(2):
        first, second = Even(), Even()
        judge = cached(first, tmp_path / "verdicts.jsonl", together=7)
        assert judge.judge(conversations[: count // 2]) == expected[: count // 2]
        assert judge.judge(conversations[::-1]) == expected[::-1]
        assert cached(second, tmp_path / "verdicts.jsonl").judge(conversations) == expected
        assert second.asked == []
        assert sorted(first.asked) in ([], list(range(count)))
    assert first.asked == []  # the second time round


def test_the_same_conversation_is_asked_about_once(tmp_path: Path) -> None:
    inner = Even()
    judge = cached(inner, tmp_path / "new" / "verdicts.jsonl")
    assert isinstance(judge, Judge)
    assert (judge.name, judge.scale) == ("even", "probability")
    assert score_all(judge, [*numbered(2), *numbered(2)]) == [Score(1.0), Score(0.0)] * 2
    assert inner.asked == [0, 1]
    assert judge.judge(numbered(1))[0].rationale == "0."
    assert judge.counts == {"good": 3, "bad": 2, "cache": 1}


def test_what_may_pass_is_asked_again_and_what_will_not_is_not(tmp_path: Path) -> None:
    replies = {"0": "", "1": Failure("rate limit", transient=True), "2": Failure("refusal"), "3": "Chatbot is: bad."}
    reasons = ["empty answer", "rate limit", "refusal", None]
    asked: list[int] = []
    for _ in range(3):
        backend = ScriptedBackend(reply=lambda prompt: replies[read_slots(prompt)[-1]["text"]])
        judge = cached(JudgeScorer(backend, GUIDELINES, mode="explain"), tmp_path / "verdicts.jsonl")
        assert [verdict.reason for verdict in judge.judge(numbered(4))] == reasons
        asked.append(len(backend.prompts))
    assert asked == [4, 1, 1]


def test_a_judge_that_loses_a_verdict_is_refused(tmp_path: Path) -> None:
    inner = Even()
    inner.judge = lambda conversations: []  # type: ignore[method-assign]
    with pytest.raises(ScorerError, match="even gave 0 verdicts on 2 conversations"):
        cached(inner, tmp_path / "verdicts.jsonl").judge(numbered(2))


OTHERS: dict[str, dict[str, Any]] = {
    "guidelines": {"constitution": Constitution("A good chatbot is kind.")},
    "mode": {"mode": "score"},
    "max_length": {"max_length": 2047},
    "max_new_tokens": {"max_new_tokens": 255},
}


@pytest.mark.parametrize("case", [*OTHERS, "model", "text", "turns", "the same"])
def test_another_question_is_another_verdict(case: str, tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl"
    conversation = Prompt.of("Hi?").answer("Hello!")
    settings: dict[str, Any] = {"constitution": GUIDELINES, "mode": "explain", "max_length": 2048}
    backend = ScriptedBackend(reply=lambda _: "Chatbot is: good.")
    cached(JudgeScorer(backend, **settings), path).judge([conversation])
    other = {
        "text": conversation.prompt.answer("Hello"),
        "turns": Prompt.of("Hi").answer("?").prompt.answer("Hello!"),
    }.get(case, conversation)
    again = JudgeScorer(backend, **settings | OTHERS.get(case, {}))
    cached(again, path, identity="n" if case == "model" else "m").judge([other])
    assert len(backend.prompts) == (1 if case == "the same" else 2)


# ------------------------------------------------------------------------------------------------------ the file


def test_a_verdict_comes_back_whole(tmp_path: Path) -> None:
    cache = VerdictCache(tmp_path / "verdicts.jsonl")
    verdicts = {f"k{number}": verdict for number, verdict in enumerate(LINES)}
    cache.keep(verdicts)
    again = VerdictCache(cache.path).look_up(["k2", "k0", "k1", "other"])
    assert again == cache.look_up(list(again)) == verdicts
    assert [verdict.guidelines for verdict in again.values()] == [None, "0123456789abcdef", None]
    assert cache.path.read_bytes().isascii()
    assert len(cache.path.read_text().splitlines()) == 3


def test_every_field_of_a_verdict_is_kept(tmp_path: Path) -> None:
    VerdictCache(tmp_path / "verdicts.jsonl").keep({"k": LINES[0]})
    row = json.loads((tmp_path / "verdicts.jsonl").read_text())
    assert set(row) == {"key", *(item.name for item in fields(Verdict))} - {"transient"}


def test_a_cut_last_line_is_ignored_and_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl"
    VerdictCache(path).keep({"a": LINES[0], "b": LINES[1]})
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        assert VerdictCache(path).look_up(["a", "b"]) == {"a": LINES[0]}
        VerdictCache(path).keep({"b": LINES[1]})
        assert path.read_bytes() == whole


def test_a_file_that_was_emptied_is_begun_anew(tmp_path: Path) -> None:
    cache = VerdictCache(tmp_path / "verdicts.jsonl")
    cache.keep({"a": LINES[0]})
    cache.path.write_bytes(b"")
    assert cache.look_up(["a"]) == {}
    cache.keep({"b": LINES[1]})
    assert VerdictCache(cache.path).look_up(["a", "b"]) == {"b": LINES[1]}


def line(**changes: Any) -> str:
    row = {"key": "a", "outcome": "good", "reason": None, "rationale": "", "probability": 0.5, "truncated": False}
    return json.dumps(row | {"guidelines": None} | changes)


@pytest.mark.parametrize(
    "bad",
    [
        *("{", "[]", "1", "", "{}", "not JSON", line(extra=1), line(key=1), line(probability=1.5)),
        *(line(probability=float("nan")), line(probability="0.5"), line(probability=True), line(outcome="fine")),
        *(line(outcome="unscored"), line(reason="so"), line(truncated=0), line(rationale=None), line(guidelines=3)),
    ],
)
def test_a_whole_line_that_is_no_verdict_is_refused_by_its_number(bad: str, tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl"
    path.write_text(f"{line()}\n{bad}\n{line(key='b')}\n")
    with pytest.raises(ScorerError, match=r"verdicts\.jsonl:2: no verdict .*; remove the line") as caught:
        VerdictCache(path).look_up(["a"])
    assert "\n" not in str(caught.value)
    path.write_text(f"{line()}\n{line(key='b', probability=1)}\n")
    assert set(VerdictCache(path).look_up(["a", "b"])) == {"a", "b"}


def test_a_folder_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(ScorerError, match="cannot be used: Is a directory"):
        VerdictCache(tmp_path).look_up([])


# --------------------------------------------------------------------------------------------- several processes


def test_two_processes_see_what_the_other_has_found(tmp_path: Path) -> None:
    one, two = (VerdictCache(tmp_path / "verdicts.jsonl") for _ in range(2))
    one.keep({"a": LINES[0]})
    assert two.look_up(["a"]) == {"a": LINES[0]}
    two.keep({"a": replace(LINES[0], rationale="late"), "b": LINES[1]})
    one.keep({"c": LINES[2]})
    assert one.look_up(["a", "b", "c"]) == dict(zip("abc", LINES, strict=True))
    assert len(one.path.read_text().splitlines()) == 3


WORKER = """\
import sys, time
from pathlib import Path
from reward.verdict import Verdict
from reward.verdict_cache import CachedJudge, VerdictCache
from tests.test_verdict_cache import Even, numbered

path, log, count, start, together, pause = sys.argv[1:]

class Slow(Even):
    def judge(self, conversations):
        with open(log, "a") as file:
            file.write("".join(f"{conversation.completion}\\n" for conversation in conversations))
        time.sleep(float(pause))
        return super().judge(conversations)

conversations = numbered(int(count))
shifted = conversations[int(start):] + conversations[:int(start)]
verdicts = CachedJudge(Slow(), VerdictCache(Path(path)), "m", together=int(together)).judge(shifted)
assert verdicts == Even().judge(shifted)
"""


def worker(
    path: Path, log: Path, *, count: int, start: int = 0, together: int, pause: float
) -> subprocess.Popen[bytes]:
    words = [str(path), str(log), str(count), str(start), str(together), str(pause)]
    return subprocess.Popen([sys.executable, "-c", WORKER, *words], cwd=ROOT)


def asked(log: Path) -> list[int]:
    return [int(text) for text in log.read_text().splitlines()] if log.exists() else []


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    path, log = tmp_path / "verdicts.jsonl", tmp_path / "asked"
    process = worker(path, log, count=200, together=7, pause=0.01)
    deadline = time.monotonic() + 60
    while len(asked(log)) < 50 and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = asked(log)
    assert 50 <= len(before) < 200
    with path.open("ab") as file:
        file.write(b'{"key": "abc", "outc')  # as if the kill had hit the writing itself
    assert worker(path, log, count=200, together=7, pause=0.0).wait() == 0
    twice = [number for number, times in Counter(asked(log)).items() if times > 1]
    assert set(asked(log)) == set(range(200))
    assert len(twice) <= 7  # those on their way when it was killed
    assert set(twice) <= set(before[-7:])
    assert worker(path, log, count=200, together=7, pause=0.0).wait() == 0
    assert len(asked(log)) == 200 + len(twice)
    assert len(path.read_text().splitlines()) == 200


def test_processes_that_write_at_one_time_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl"
    workers = [
        worker(path, tmp_path / f"asked{number}", count=120, start=number * 40, together=3, pause=0.002)
        for number in range(3)
    ]
    assert [process.wait() for process in workers] == [0, 0, 0]
    keys = [json.loads(raw)["key"] for raw in path.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 120
