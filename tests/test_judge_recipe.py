"""Recipe sections of remote judges, moderation and the verdict cache: what they become, and what is refused early."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from alignment.inputs import InputError, check_inputs, check_scorer, input_fingerprints, scorer_fingerprint
from alignment.recipe_file import RecipeError, dump_recipe
from alignment.scorer_file import read_scorer
from alignment.scoring import build_scorer
from reward.conversation import Prompt
from reward.scorer import Score, Scorer, ScorerError
from reward.verdict_cache import CachedJudge
from tests.http_peer import Peer, Request, http
from tests.openai_peer import KEY, MODEL, completion, encoded, error, judged, numbered, says
from tests.recipe_text import PPO, load

CONVERSATIONS = numbered(3)


def build(section: str) -> Scorer:
    spec = read_scorer(section)
    check_scorer(spec)
    return build_scorer(spec)


def remote(server: Peer, extra: str = "", *, inner: str = "") -> str:
    return f"{{type: judge, mode: explain, model: {MODEL}, server: {{url: '{server.url}'{inner}}}{extra}}}"


def even(request: Request) -> Iterable[bytes | float]:
    verdict = "bad" if int(judged(request)) % 2 else "good"
    return [http(encoded(completion(f"Evaluation: So.\nChatbot is: {verdict}.")))]


def test_one_line_makes_a_remote_judge_with_a_key_and_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    path = tmp_path / "new" / "verdicts.jsonl"
    with Peer(even) as server:
        section = remote(server, f", cache: '{path}'", inner=", token_env: JUDGE_KEY, concurrency: 2, retries: 1")
        expected = [Score(1.0), Score(0.0), Score(1.0)]
        scorer = build(section)
        assert scorer.score(CONVERSATIONS) == expected
        assert build(section).score(CONVERSATIONS) == expected
        assert [request.headers["authorization"] for request in server.requests] == [f"Bearer {KEY}"] * 3
        other = section.replace(f"model: {MODEL}", "model: other")
        assert [score.value for score in build(other).score(CONVERSATIONS)] == [None] * 3  # the wrong one answers
        assert build(section.replace("explain", "explain, max_length: 3000")).score(CONVERSATIONS) == expected
    assert len(server.requests) == 3 + 3 + 3
    with Peer(says(error(), "500 Oh")) as another:  # on the same machine
        assert build(section.replace(server.url, another.url)).score(CONVERSATIONS) == expected
    assert another.requests == []
    assert KEY not in f"{path.read_text()}{scorer!r}{capfd.readouterr()}"


def test_one_line_makes_a_moderation_service(tmp_path: Path) -> None:
    result = {"flagged": False, "categories": {"hate": False}, "category_scores": {"hate": 0.25}}
    with Peer(says({"id": "m", "model": "mod-1", "results": [result]})) as server:
        section = f"{{type: moderation, model: mod-1, server: {{url: '{server.url}'}}, cache: '{tmp_path / 'v'}'}}"
        assert build(section).score(CONVERSATIONS[:1]) == [Score(0.75)]
        strict = build(section.replace("cache", "threshold: 0.2, cache"))
        assert isinstance(strict, CachedJudge)
        assert [verdict.outcome for verdict in strict.judge(CONVERSATIONS[:1])] == ["bad"]
        assert build(section).score(CONVERSATIONS[:1]) == [Score(0.75)]
    assert len(server.requests) == 2


def test_a_guard_has_verdicts_and_keeps_them(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    section = f"{{type: guard, model: {model}, format: wild_guard, cache: '{tmp_path / 'verdicts.jsonl'}'}}"
    conversations = [Prompt.of("Hi?").answer("Hello!"), Prompt.of("Hi?").answer("Go away. " * 2000)]
    guard = build(section)
    assert isinstance(guard, CachedJudge)
    verdicts = guard.judge(conversations)
    assert [verdict.outcome for verdict in verdicts] in (["good", "unscored"], ["bad", "unscored"])
    assert "do not fit max_length=" in str(verdicts[1].reason)
    plain = build(section.replace("cache", "batch_size: 1, cache")).score(conversations)
    assert plain == [verdict.score for verdict in verdicts] == guard.inner.score(conversations)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was asked")

    monkeypatch.setattr("reward.backends.TransformersBackend.continuation_logprobs", never)
    assert build(section).score(conversations) == plain
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"note": "another model"}))
    with pytest.raises(AssertionError, match="the model was asked"):
        build(section).score(conversations)


SERVER = "server: {url: 'http://localhost:1'}"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{type: judge, model: m, server: {}}", "server.url' is missing"),
        ("{type: judge, model: m, server: {url: here}}", "url: is no URL of a server"),
        ("{type: judge, model: m, server: {url: 'http://judge.example', token_env: KEY}}", "in clear"),
        ("{type: judge, model: m, server: {url: 'http://u:p@localhost'}}", "holds a user name or a password"),
        ("{type: judge, model: m, server: {url: 'http://localhost:1', retries: 5}}", "less than or equal to 4"),
        ("{type: judge, model: m, server: {url: 'http://localhost:1', concurrency: 0}}", "greater than 0"),
        ("{type: judge, model: m, server: {url: 'http://localhost:1', token: sk}}", "unknown key"),
        ("{type: moderation, model: m}", "server' is missing"),
        (f"{{type: moderation, model: m, {SERVER}, threshold: 0.0}}", "greater than 0"),
    ],
)
def test_sections_are_strict(section: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_scorer(section)
    assert message in str(caught.value)
    assert "u:p" not in str(caught.value)


@pytest.mark.parametrize("key", ["sk-proj-Ab12", "sk_Ab12cd"])
def test_a_key_in_place_of_its_variable_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(RecipeError, match=r"token_env") as caught:
        read_scorer(f"{{type: judge, model: m, server: {{url: 'http://localhost:1', token_env: {key}}}}}")
    assert key not in str(caught.value)


def test_inputs_are_checked_before_anything_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    section = "{type: judge, model: ./served, server: {url: 'http://localhost:1', token_env: JUDGE_KEY}}"
    with pytest.raises(InputError, match=r"scorer\.server\.token_env: the environment variable JUDGE_KEY is not set"):
        check_scorer(read_scorer(section))
    monkeypatch.setenv("JUDGE_KEY", "two words")
    with pytest.raises(InputError, match=r"without spaces") as caught:
        check_scorer(read_scorer(section))
    assert "two words" not in str(caught.value)
    monkeypatch.setenv("JUDGE_KEY", "short")  # other people's servers choose their keys
    check_scorer(read_scorer(section))
    with pytest.raises(InputError, match=r"scorer\.cache: .* is a folder"):
        check_scorer(read_scorer(f"{{type: judge, model: m, {SERVER}, cache: '{tmp_path}'}}"))


def test_how_a_judge_is_asked_does_not_change_what_it_is(tmp_path: Path) -> None:
    def found(server: str, extra: str = "") -> str:
        return scorer_fingerprint(read_scorer(f"{{type: judge, model: m, server: {{url: 'http://{server}}}{extra}}}"))

    plain = found("localhost:1'")
    cache = tmp_path / "verdicts.jsonl"
    cache.write_text("")
    assert found("localhost:1', concurrency: 9, timeout: 1.0, deadline: 2.0, retries: 0, token_env: A") == plain
    assert found("localhost:1'", f", cache: '{cache}'") == plain
    assert found("localhost:2'") != plain


def test_a_growing_cache_makes_no_finished_stage_stale(tiny_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "Hi?"}\n')
    cache = tmp_path / "verdicts.jsonl"
    scorer = f"{{type: minimum, parts: [{{type: judge, model: m, {SERVER}, cache: '{cache}'}}, {{type: refusal}}]}}"
    text = PPO.replace("model: m", f"model: {tiny_model}").replace("{type: refusal}", scorer)
    recipe = load(tmp_path, text.replace("{name: a}", f"{{name: file, path: '{data}'}}"))
    check_inputs(recipe)
    before = input_fingerprints(recipe)
    cache.write_text("{}\n")
    assert input_fingerprints(recipe) == before
    data.write_text('{"prompt": "Ho?"}\n')
    assert input_fingerprints(recipe) != before


def test_the_recipe_that_is_written_down_names_the_variable_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    spec = read_scorer("{type: judge, model: m, server: {url: 'http://localhost:1', token_env: JUDGE_KEY}}")
    assert "JUDGE_KEY" in dump_recipe(spec)
    assert KEY not in dump_recipe(spec)


def test_a_server_that_is_not_there_ends_in_one_line() -> None:
    with Peer(says(error())) as server:
        section = remote(server, inner=", retries: 0")
    with pytest.raises(ScorerError, match=r"/v1/chat/completions: no answer \(retries=0, .*refused") as caught:
        build(section).score(CONVERSATIONS)
    assert "\n" not in str(caught.value)
