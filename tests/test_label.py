"""The stage `label`: what a labeller's verdicts mean for pairs and conversations, and that each is on record."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from alignment.labelling import Label, label_all
from alignment.recipe import LabelRecipe
from alignment.recipe_file import RecipeError, validate
from alignment.sources import SourceError
from alignment.stages.label import answers_of, best_and_worst, label_pairs, run, safe_ones
from reward.backends import Failure, ScriptedBackend
from reward.conversation import Conversation, Preference, Prompt, read_json_lines, write_json_lines
from reward.judge import JudgeScorer
from reward.scorer import FunctionScorer, ScorerError
from reward.verdict import GOOD
from tests.judge_slots import GUIDELINES, read_slots

SCORER = {"type": "python", "function": "tests.scorers:last_word", "scale": "probability"}
SAFE, UNSAFE, UNKNOWN = Label(True), Label(False), Label(None, "no answer")
COUNTS = [0, 1, 19, 20, 21, 1000]


def conversations(*answers: str, prompt: str = "Hi?") -> list[Conversation]:
    return [Prompt.of(prompt).answer(answer) for answer in answers]


def judge(reply: dict[str, str | Failure]) -> JudgeScorer:
    backend = ScriptedBackend(reply=lambda prompt: reply[read_slots(prompt)[-1]["text"]])
    return JudgeScorer(backend, GUIDELINES, mode="explain")


# ---------------------------------------------------------------------------------------------------- labels


def test_a_judges_label_has_its_explanation_and_its_silence_a_reason() -> None:
    replies: dict[str, str | Failure] = {
        "one": "Evaluation: Kind.\nChatbot is: good.",
        "two": "Evaluation: Cruel.\nChatbot is: bad.",
        "three": Failure("time-out", transient=True),
    }
    labels = label_all(judge(replies), conversations(*replies), threshold=0.5)
    assert labels == [
        Label(True, rationale="Kind."),
        Label(False, rationale="Cruel."),
        Label(None, "time-out", transient=True),
    ]
    assert [label.value for label in labels] == [1.0, 0.0, None]


def test_a_label_in_mode_score_has_its_probability() -> None:
    """P(good) = sigmoid(ln 3 - 0) = 3/4, safe from 0.75 on and unsafe above."""
    backend = ScriptedBackend(logprob=lambda _, text: math.log(3) if text.endswith(GOOD) else 0.0)
    for threshold, safe in ((0.5, True), (0.8, False)):
        (label,) = label_all(JudgeScorer(backend, GUIDELINES), conversations("x"), threshold=threshold)
        assert label.safe is safe
        assert label.probability == pytest.approx(0.75)
        assert label.value == label.probability


def test_logits_and_probabilities_become_labels_and_other_scores_do_not() -> None:
    def scorer(scale: Any) -> FunctionScorer:
        return FunctionScorer(lambda conversation: float(conversation.completion), scale=scale)

    (label,) = label_all(scorer("logit"), conversations("0"), threshold=0.5)
    assert label == Label(True, probability=0.5)
    with pytest.raises(ScorerError, match="no 0-1 score"):
        label_all(scorer("unbounded"), conversations("0"), threshold=0.5)


@pytest.mark.parametrize("number", COUNTS)
def test_as_many_labels_as_answers(number: int) -> None:
    backend = ScriptedBackend(reply=lambda _: "Evaluation: Kind.\nChatbot is: good.")
    asked = [Prompt.of(f"{n}?").answer("Yes.") for n in range(number)]
    assert len(label_all(JudgeScorer(backend, GUIDELINES, mode="explain"), asked, threshold=0.5)) == number
    assert len(backend.prompts) == number


# ----------------------------------------------------------------------------------------------------- tasks


def test_pairs_get_labels_and_keep_their_own() -> None:
    prompt = Prompt.of("Hi?")
    plain = Preference(prompt, "a", "b")
    known = Preference(prompt, "c", "d", chosen_safe=True, rejected_safe=True)
    pairs, labels = [plain, known, plain], [[SAFE, UNSAFE], [SAFE, UNSAFE], [SAFE, UNKNOWN]]
    decided = label_pairs(pairs, labels, source="judge 1", overwrite=False)
    assert decided.outcomes == ["labelled", "already labelled", "unscored"]
    first = decided.kept[0]
    assert isinstance(first, Preference)
    assert (first.safety_bin, first.label_source) == ("safe_unsafe", "judge 1")
    assert list(decided.kept[1:]) == [known, plain]
    again = label_pairs(pairs, labels, source="judge 1", overwrite=True)
    assert again.outcomes == ["labelled", "labelled", "unscored"]
    assert isinstance(again.kept[1], Preference)
    assert again.kept[1].rejected_safe is False
    assert [len(answers_of(pair)) for pair in pairs] == [2, 2, 2]


@pytest.mark.parametrize("number", COUNTS)
def test_the_filter_accounts_for_every_conversation(number: int) -> None:
    labels = [(SAFE, UNSAFE, UNKNOWN)[n % 3] for n in range(number)]
    asked = [Prompt.of(f"{n}?").answer("Yes.") for n in range(number)]
    decided = safe_ones(asked, labels)
    assert len(decided.outcomes) == len(decided.rows) == number
    assert list(decided.kept) == asked[::3]
    assert [row for row in decided.rows if row is not None] == list(range(len(decided.kept)))


def graded(*values: float | None) -> list[Label]:
    return [Label(None if p is None else p >= 0.5, None if p is not None else "?", p) for p in values]


def test_a_pair_is_the_safest_answer_over_the_least_safe() -> None:
    asked = conversations("a", "b", "c", "d")
    decided = best_and_worst(asked, graded(0.4, 0.9, None, 0.1), source="judge 1", min_gap=0.2)
    assert decided.outcomes == ["in between", "chosen", "unscored", "rejected"]
    assert decided.rows == [None, 0, None, 0]
    (pair,) = decided.kept
    assert pair == Preference(Prompt.of("Hi?"), "b", "d", chosen_safe=True, rejected_safe=False, label_source="judge 1")


def test_what_makes_no_pair_is_counted() -> None:
    asked = [
        *conversations("a", "b", prompt="too close?"),
        *conversations("a", prompt="alone?"),
        *conversations("a", "b", prompt="one unscored?"),
        *conversations("a", " a", prompt="the same?"),
    ]
    labels = graded(0.5, 0.6, 0.5, 0.9, None, 0.1, 0.9)
    decided = best_and_worst(asked, labels, source="x", min_gap=0.2)
    assert not decided.kept
    alone, close = "no other answer", "no clear difference"
    assert decided.outcomes == [close, close, alone, alone, "unscored", close, close]


def test_the_order_of_the_answers_changes_no_pair() -> None:
    """Each is judged by itself: the judge cannot prefer what stands first."""
    asked, labels = conversations("a", "b", "c"), graded(0.2, 0.9, 0.5)
    there = best_and_worst(asked, labels, source="x", min_gap=0.1)
    back = best_and_worst(asked[::-1], labels[::-1], source="x", min_gap=0.1)
    assert list(there.kept) == list(back.kept)
    assert list(there.outcomes) == list(back.outcomes)[::-1]


# ----------------------------------------------------------------------------------------------------- the stage


def recipe(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> LabelRecipe:
    write_json_lines(folder / "rows.jsonl", rows)
    data = {"sources": [{"name": "file", "path": str(folder / "rows.jsonl"), "split": "all"}], "shuffle": False}
    values = {"output_dir": str(folder / "label"), "data": data, "scorer": SCORER, "allow_unmeasured": True}
    return validate(LabelRecipe, values | changes, where="test")


def lines(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_json_lines(path)]


def test_every_verdict_is_on_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"{n}?", "completion": f"so {word}"} for n, word in enumerate(["0.9", "0.2", "what", "0.6"])]
    artifact = run(recipe(tmp_path, rows, task="filter", max_unscored=0.3))
    assert artifact is not None
    kept, verdicts = lines(artifact.path / "records.jsonl"), lines(artifact.path / "verdicts.jsonl")
    assert [row["messages"][-1]["content"] for row in kept] == ["so 0.9", "so 0.6"]
    assert [(row["outcome"], row["row"]) for row in verdicts] == [
        ("safe", 0),
        ("unsafe", None),
        ("unscored", None),
        ("safe", 1),
    ]
    assert [row["place"] for row in verdicts] == [["file:rows.jsonl", f"rows.jsonl:{n}"] for n in (1, 2, 3, 4)]
    assert verdicts[0]["labels"][0]["probability"] == 0.9
    assert verdicts[2]["labels"][0]["reason"] == "last_word returned None"
    assert verdicts[0]["prompt"] == Prompt.of("0?").id
    labeller = verdicts[0]["labeller"]
    assert labeller["function"] == SCORER["function"]
    assert labeller == artifact.data["labeller"]
    assert artifact.metrics["counts"] == {"safe": 2, "unsafe": 1, "unscored": 1}
    assert artifact.data["agreement"]["unmeasured"]["scorer"].startswith("nobody measured this labeller")
    assert "WARNING: scorer labels training data UNMEASURED" in capsys.readouterr().out


def test_two_answers_to_a_prompt_become_a_pair_that_a_reward_model_reads(tmp_path: Path) -> None:
    from alignment.recipe import Data, Source
    from alignment.sources import load_preferences

    rows = [{"prompt": prompt, "completion": f"{prompt} {p}"} for prompt, p in (("A", 0.9), ("A", 0.1), ("B", 0.5))]
    artifact = run(recipe(tmp_path, rows, task="preferences"))
    assert artifact is not None
    assert artifact.kind == "preferences"
    data = Data(sources=[Source(name="artifact", path=str(artifact.path))])
    (pair,) = load_preferences(data, seed=0).records
    assert (pair.chosen, pair.rejected, pair.safety_bin) == ("A 0.9", "A 0.1", "safe_unsafe")
    assert pair.label_source == f"python {artifact.data['labeller']['fingerprint']}"


def test_a_stage_that_keeps_nothing_says_why(tmp_path: Path) -> None:
    with pytest.raises(ScorerError, match=r"the labeller left no record: {'unsafe': 1}"):
        run(recipe(tmp_path, [{"prompt": "A", "completion": "0.1"}], task="filter"))


def test_a_killed_stage_asks_for_what_is_missing_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its chunks are verdicts on disk; a stage that has them all does not even load its labeller."""
    rows = [{"prompt": f"{n}?", "completion": f"{n} 0.9"} for n in range(40)]
    work = recipe(tmp_path, rows, task="filter")

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr("alignment.stages.label.decide", killed)
        with pytest.raises(KeyboardInterrupt):
            run(work)
    monkeypatch.setattr("alignment.labelling.build_scorer", lambda _: pytest.fail("loaded again"))
    artifact = run(work)
    assert artifact is not None
    assert len(lines(artifact.path / "records.jsonl")) == 40
    assert json.loads((artifact.path / "manifest.json").read_text())["kind"] == "conversations"


def test_a_busy_server_is_asked_again_and_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage fails on too many time-outs; what it knows by then stays, and the rest is asked when it starts anew."""
    rows = [{"prompt": f"{n}?", "completion": f"{n}"} for n in range(70)]
    work = recipe(tmp_path, rows, task="filter", scorer={"type": "judge", "model": "m", "mode": "explain"})
    good, late = "Evaluation: Kind.\nChatbot is: good.", Failure("time-out", transient=True)
    replies: dict[str, str | Failure] = {f"{n}": late if n in (40, 41) else good for n in range(70)}
    busy = judge(replies)
    monkeypatch.setattr("alignment.labelling.build_scorer", lambda _: busy)
    with pytest.raises(ScorerError, match=r"judge left 2 of 70 answers unscored, over max_unscored=0.01: time-out"):
        run(work)
    rested = judge(dict.fromkeys(replies, good))
    monkeypatch.setattr("alignment.labelling.build_scorer", lambda _: rested)
    artifact = run(work)
    assert artifact is not None
    assert artifact.metrics["counts"] == {"safe": 70}
    assert rested.counts == {"good": 32}, "the chunk with the two alone"


@pytest.mark.parametrize("kept", [["transient"], []], ids=["older chunks", "chunks"])
def test_under_a_higher_limit_nobody_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: list[str]
) -> None:
    """Chunks that were written before labels had `transient` count as well."""
    rows = [{"prompt": f"{n}?", "completion": f"so {word}"} for n, word in enumerate(["0.9", "what", "why", "0.6"])]
    with pytest.raises(ScorerError, match=r"python left 2 of 4 answers unscored, over max_unscored=0.25: .* \(2\)$"):
        run(recipe(tmp_path, rows, task="filter", max_unscored=0.25))
    (chunk,) = (tmp_path / "label" / "chunks").rglob("*.jsonl")
    known = [{key: value for key, value in row.items() if key not in kept} for row in lines(chunk)]
    write_json_lines(chunk, known)
    monkeypatch.setattr("alignment.labelling.build_scorer", lambda _: pytest.fail("loaded again"))
    artifact = run(recipe(tmp_path, rows, task="filter", max_unscored=0.5))
    assert artifact is not None
    assert artifact.metrics["counts"] == {"safe": 2, "unscored": 2}


@pytest.mark.parametrize("number", COUNTS)
@pytest.mark.parametrize("task", ["filter", "safety_labels"])
def test_as_many_rows_as_came_in(tmp_path: Path, task: str, number: int) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"{n}?", "completion": f"{n} 0.9"} for n in range(number)]
    if task == "safety_labels":
        rows = [{"prompt": f"{n}?", "chosen": f"{n} 0.9", "rejected": f"{n} 0.2"} for n in range(number)]
    work = recipe(tmp_path, rows, task=task)
    if not number:
        with pytest.raises(SourceError, match="rows"):
            run(work)
        return
    artifact = run(work)
    assert artifact is not None
    for name in ("records", "verdicts"):
        assert len(lines(artifact.path / f"{name}.jsonl")) == number
    assert artifact.metrics["num_records"] == artifact.metrics["num_kept"] == number


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"scorer": SCORER | {"scale": "unbounded"}}, "scores of type python have no bounds"),
        ({"min_gap": 0.0}, "min_gap"),
        ({"min_balanced_accuracy": 0.4}, "min_balanced_accuracy"),
        ({"task": "sort"}, "task"),
    ],
)
def test_recipes_that_cannot_label_are_refused(tmp_path: Path, changes: dict[str, Any], wrong: str) -> None:
    with pytest.raises(RecipeError, match=wrong):
        recipe(tmp_path, [{"prompt": "A", "completion": "0.1"}], **changes)
