"""`sara score`: a score for every line, in order, through interruptions; nothing overwritten, nothing guessed."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from alignment.cli import main
from alignment.inputs import InputError
from alignment.score_file import read_conversations, score_file
from reward.scorer import Score
from tests.conftest import ROOT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reward.conversation import Conversation

SCORER = """
import os, time
from pathlib import Path

def number(conversation):
    time.sleep(float(os.environ.get("SLOW", "0")))
    word = conversation.completion.split()[0]
    with Path(__file__).with_name("calls").open("a") as file:
        file.write(word + "\\n")
    return None if int(word) % 7 == 3 else int(word) / 4
"""


@pytest.fixture(autouse=True)
def scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A python scorer of its own for each test, so that none imports another's."""
    name = f"scorer_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(SCORER, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return f"{{type: python, function: '{name}:number'}}"


def write_lines(path: Path, count: int) -> Path:
    rows = ({"prompt": f"Question {number}?", "completion": f"{number} is the answer"} for number in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def expected(count: int) -> list[dict[str, Any]]:
    return [
        {"value": None, "reason": "number returned None"} if number % 7 == 3 else {"value": number / 4, "reason": None}
        for number in range(count)
    ]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def words(scorer: str, source: Path, output: Path, *more: str) -> list[str]:
    return ["score", "--scorer", scorer, "--input", str(source), "--output", str(output), *more]


# ------------------------------------------------------------------------------------------------ the lines


def test_one_line_in_one_line_out_in_order(tmp_path: Path, scorer: str, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", 23), tmp_path / "new" / "scores.jsonl"
    assert main(words(scorer, source, output, "--chunk-size", "4")) == 0
    assert read(output) == expected(23)
    printed = capsys.readouterr()
    assert printed.out == f"{output}: 23 lines, 3 unscored\n"
    assert "number: lines: 23 of 23" in printed.err
    assert sorted(path.name for path in output.parent.iterdir()) == ["scores.jsonl", "scores.jsonl.state.json"]
    state = json.loads((output.parent / "scores.jsonl.state.json").read_text(encoding="utf-8"))
    assert (state["lines"], state["name"], state["scale"]) == (23, "number", "unbounded")


@pytest.mark.parametrize("count", [0, 1, 8, 19, 20, 21, 1000])
def test_any_number_of_lines(tmp_path: Path, scorer: str, count: int) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", count), tmp_path / "scores.jsonl"
    assert main(words(scorer, source, output, "--chunk-size", "4")) == 0
    assert read(output) == expected(count)


def test_both_forms_of_a_line_and_their_tags(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": ""}]
    rows = [
        {"messages": turns, "tags": {"is_safety": True}, "id": 7},
        {"prompt": turns[:1], "completion": "", "score": 0.5},
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")  # the last line need not end
    first, second = read_conversations(path)
    assert first.messages == second.messages
    assert (first.tags.is_safety, second.tags.is_safety) == (True, False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not a JSON object"),
        ("[]", "expected a JSON object, got list"),
        ("", "the line is blank"),
        ('{"messages": [], "messages": []}', "the key 'messages' stands twice"),
        ('{"completion": "x"}', "needs messages, or prompt and completion; the line has ['completion']"),
        ('{"messages": [], "completion": "x"}', "has both messages and completion"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "the last turn must be from the assistant"),
        ('{"prompt": "", "completion": "x"}', "content of the user turn is empty"),
        ('{"prompt": "x", "completion": 3}', "content of the assistant turn must be text, got int"),
        ('{"prompt": "x", "completion": "\\ud800"}', "lone surrogate"),
        ('{"prompt": "x", "completion": "y", "tags": {"safe": true}}', "unknown tags ['safe']"),
    ],
)
def test_a_faulty_line_is_refused_before_anything_loads(
    tmp_path: Path,
    scorer: str,
    line: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("alignment.reward_cli.load_scorer", lambda text: pytest.fail("loaded"))
    source, output = write_lines(tmp_path / "in.jsonl", 3), tmp_path / "scores.jsonl"
    with source.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    assert main(words(scorer, source, output)) == 2
    error = capsys.readouterr().err
    assert f"{source}:4: " in error
    assert message in error
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("scores")] == []


def test_input_is_read_as_it_is_needed(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", 3)
    source.write_text(source.read_text(encoding="utf-8") + "{", encoding="utf-8")
    conversations = read_conversations(source)
    assert [next(conversations).completion.split()[0] for _ in range(3)] == ["0", "1", "2"]
    with pytest.raises(InputError, match=r"in\.jsonl:4"):
        next(conversations)


def test_what_cannot_be_read_twice_is_refused(tmp_path: Path, scorer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(scorer, Path("/dev/stdin"), tmp_path / "scores.jsonl")) == 2
    assert "is no file" in capsys.readouterr().err
    assert main(words(scorer, tmp_path / "in.jsonl", tmp_path / "out", "--chunk-size", "0")) == 2
    assert "--chunk-size must be at least 1" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- interruptions


def test_a_killed_run_goes_on_at_the_first_missing_line(tmp_path: Path, scorer: str) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", 300), tmp_path / "scores.jsonl"
    command = [sys.executable, "-m", "alignment.cli", *words(scorer, source, output, "--chunk-size", "5")]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}", "SLOW": "0.02"}
    partial = tmp_path / "scores.jsonl.partial"
    with subprocess.Popen(command, env=environment, cwd=tmp_path) as process:
        deadline = time.monotonic() + 240
        while not partial.exists() or partial.read_bytes().count(b"\n") < 20:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not output.exists()
    kept = partial.read_text(encoding="utf-8").splitlines()
    assert 20 <= len(kept) < 300
    with partial.open("a", encoding="utf-8") as file:
        file.write('{"value": 99.0, "rea')  # as a kill in the middle of a write leaves it
    assert main(words(scorer, source, output, "--chunk-size", "5")) == 0
    assert read(output) == expected(300)
    assert output.read_text(encoding="utf-8").splitlines()[: len(kept)] == kept
    assert not partial.exists()
    calls = Counter((tmp_path / "calls").read_text(encoding="utf-8").split())
    assert all(calls[str(number)] == 1 for number in range(len(kept)))
    assert sum(calls.values()) <= 300 + 5  # no more than the chunk that was under way is done twice


class Numbers:
    """Remembers the chunks it was given; breaks at a completion, if told so."""

    name, scale = "numbers", "unbounded"

    def __init__(self, *, breaks_at: int | None = None) -> None:
        self.chunks: list[list[int]] = []
        self.breaks_at = breaks_at

    def score(self, conversations: Sequence[Conversation]) -> list[Score]:
        numbers = [int(conversation.completion.split()[0]) for conversation in conversations]
        self.chunks.append(numbers)
        if self.breaks_at in numbers:
            raise RuntimeError("out of memory")
        return [Score(float(number), f"halb \ud83d Grüße {number}") for number in numbers]


def score(scorer: Numbers, source: Path, output: Path, *, fingerprint: str = "f", chunk_size: int = 4) -> int:
    return score_file(lambda: scorer, scorer=fingerprint, source=source, output=output, chunk_size=chunk_size)[0]


def test_chunks_end_where_they_would_have_ended(tmp_path: Path) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", 11), tmp_path / "scores.jsonl"
    with pytest.raises(RuntimeError, match="out of memory"):
        score(Numbers(breaks_at=9), source, output)
    partial = tmp_path / "scores.jsonl.partial"
    lines = partial.read_bytes().splitlines(keepends=True)
    assert len(lines) == 8
    partial.write_bytes(b"".join(lines[:6]) + lines[6][:-1])  # the seventh lacks its end of line
    again = Numbers()
    assert score(again, source, output) == 11
    assert again.chunks == [[6, 7], [8, 9, 10]]
    assert [row["value"] for row in read(output)] == list(range(11))
    assert read(output)[0]["reason"] == "halb \ud83d Grüße 0"


def test_a_complete_output_is_not_made_again(tmp_path: Path) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", 5), tmp_path / "scores.jsonl"
    assert score(Numbers(), source, output) == 5
    before = output.stat()
    again = Numbers()
    assert score(again, source, output) == 5
    assert again.chunks == []
    assert (output.stat().st_ino, output.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_run_that_was_killed_before_its_last_step_needs_no_scorer(tmp_path: Path) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", 5), tmp_path / "scores.jsonl"
    score(Numbers(), source, output)
    output.rename(tmp_path / "scores.jsonl.partial")
    state = (tmp_path / "scores.jsonl.state.json").read_bytes()
    again = Numbers()
    assert score(again, source, output) == 5
    assert again.chunks == []
    assert (tmp_path / "scores.jsonl.state.json").read_bytes() == state


# --------------------------------------------------------------------------------------- nothing overwritten


@pytest.mark.parametrize("name", ["scores.jsonl", "scores.jsonl.partial"])
@pytest.mark.parametrize("changed", ["input", "scorer"])
def test_scores_of_other_inputs_are_refused(tmp_path: Path, name: str, changed: str) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", 5), tmp_path / "scores.jsonl"
    score(Numbers(), source, output)
    output.rename(tmp_path / name)
    before = (tmp_path / name).read_bytes()
    if changed == "input":
        write_lines(source, 6)
    with pytest.raises(InputError, match=f"{name} was made with another {changed}"):
        score(Numbers(), source, output, fingerprint="other" if changed == "scorer" else "f")
    assert (tmp_path / name).read_bytes() == before


@pytest.mark.parametrize("name", ["scores.jsonl", "scores.jsonl.partial"])
@pytest.mark.parametrize("state", [None, "{", "[]"])
def test_a_file_of_unknown_origin_is_refused(tmp_path: Path, name: str, state: str | None) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", 5), tmp_path / "scores.jsonl"
    (tmp_path / name).write_text("mine", encoding="utf-8")
    if state is not None:
        (tmp_path / "scores.jsonl.state.json").write_text(state, encoding="utf-8")
    with pytest.raises(InputError, match=r"does not say what it is|was made with another"):
        score(Numbers(), source, output)
    assert (tmp_path / name).read_text(encoding="utf-8") == "mine"


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", 5), tmp_path / "scores.jsonl"
    with (tmp_path / "scores.jsonl.partial").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="is being written by another process"):
            score(Numbers(), source, output)
    assert score(Numbers(), source, output) == 5


def test_an_input_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", 5), tmp_path / "scores.jsonl"

    class Meddler(Numbers):
        def score(self, conversations: Sequence[Conversation]) -> list[Score]:
            with source.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"prompt": "late", "completion": "5"}) + "\n")
            return super().score(conversations)

    with pytest.raises(InputError, match="has changed while it was scored"):
        score(Meddler(), source, output, chunk_size=9)
    assert not output.exists()


def test_another_version_of_the_function_is_another_scorer(
    tmp_path: Path, scorer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", 2), tmp_path / "scores.jsonl"
    assert main(words(scorer, source, output)) == 0
    module = next(tmp_path.glob("scorer_*.py"))
    module.write_text(SCORER.replace("/ 4", "/ 5"), encoding="utf-8")
    assert main(words(scorer, source, output)) == 2
    assert "was made with another scorer" in capsys.readouterr().err


def test_the_size_of_batches_is_not_part_of_a_scorer(tmp_path: Path) -> None:
    from alignment.inputs import scorer_fingerprint
    from alignment.recipe_scorers import Minimum, RewardModelScorer

    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}", encoding="utf-8")

    def fingerprint(**keys: Any) -> str:
        return scorer_fingerprint(Minimum(parts=[RewardModelScorer(path=str(model), **keys)]))

    first = fingerprint()
    assert fingerprint(batch_size=2) == first
    assert fingerprint(max_length=9) != first
    (model / "config.json").write_text("{ }", encoding="utf-8")
    assert fingerprint() != first
