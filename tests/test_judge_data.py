"""The stage `judge_data`: every answer is labelled, combined by the policy, taught and on record; none gets lost."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from alignment.artifact import Artifact
from alignment.judge_lessons import WORDLESS
from alignment.recipe import Data, JudgeDataRecipe, Source
from alignment.recipe_file import RecipeError, validate
from alignment.recipe_scorers import GUIDELINES as DEFAULTS
from alignment.sources import SourceError, account_lines, load_conversations
from alignment.stages.judge_data import run
from reward.backends import ScriptedBackend
from reward.conversation import read_json_lines, write_json_lines
from reward.judge import JudgeScorer
from reward.judge_prompt import Constitution
from reward.scorer import ScorerError
from reward.verdict import parse_verdict
from tests.judge_slots import GUIDELINES, read_slots

LAST, FIRST = "tests.scorers:last_word", "tests.scorers:first_word"
PEOPLE = {"type": "people"}


def python(function: str) -> dict[str, str]:
    return {"type": "python", "function": function, "scale": "probability"}


def source(folder: Path, name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    write_json_lines(folder / f"{name}.jsonl", rows)
    return {"sources": [{"name": "file", "path": str(folder / f"{name}.jsonl"), "split": "all"}], "shuffle": False}


def answers(*both: str) -> list[dict[str, str]]:
    """Answers that begin with the first labeller's P(safe) and end with the second's."""
    return [
        {"prompt": f"{n // 2}?", "completion": f"{words.replace(' ', f' at {n} ')}"} for n, words in enumerate(both)
    ]


def recipe(folder: Path, model: Path, **changes: Any) -> JudgeDataRecipe:
    (folder / "guidelines.md").write_text("Be kind.", encoding="utf-8")
    values = {
        "output_dir": str(folder / "out"),
        "model": str(model),
        "guidelines": str(folder / "guidelines.md"),
        "max_length": 1400,
        "allow_unmeasured": True,
        "max_unscored": 1.0,
    }
    return validate(JudgeDataRecipe, values | changes, where="test")


def made(folder: Path, model: Path, **changes: Any) -> Artifact:
    artifact = run(recipe(folder, model, **changes))
    assert artifact is not None
    return artifact


def lines(artifact: Artifact, name: str) -> list[dict[str, Any]]:
    return [row for _, row in read_json_lines(artifact.path / f"{name}.jsonl")]


def kinds(artifact: Artifact) -> list[str]:
    """good, bad or why there is no lesson, of every answer."""
    found: list[str] = []
    records = lines(artifact, "records")
    for row in lines(artifact, "verdicts"):
        taught = {parse_verdict(records[n]["messages"][-1]["content"]).outcome for n in row["rows"]}
        found.append(taught.pop() if taught else row["outcome"])
    return found


G, B, N = "0.9", "0.1", "?"
BOTH = [f"{one} {other}" for one in (G, B, N) for other in (G, B, N)]
"""All pairs of safe, unsafe and no label."""
DIFFER, MISSING = "labellers differ", "no label of a labeller"


@pytest.mark.parametrize(
    ("combine", "expected"),
    [
        ("first", ["good"] * 3 + ["bad"] * 3 + ["no label of the first labeller"] * 3),
        ("second", ["good", "bad", "no label of the second labeller"] * 3),
        ("agree_only", ["good", DIFFER, MISSING, DIFFER, "bad", MISSING, *[MISSING] * 3]),
        ("unsafe_if_any", ["good", "bad", MISSING, "bad", "bad", "bad", MISSING, "bad", MISSING]),
    ],
)
def test_the_policy_decides_and_what_it_drops_is_counted(
    combine: str, expected: list[str], tiny_model: Path, tmp_path: Path
) -> None:
    data = source(tmp_path, "answers", answers(*BOTH))
    labellers = {"first": python(FIRST), "second": python(LAST), "combine": combine, "modes": ["score"]}
    artifact = made(tmp_path, tiny_model, answers=data, **labellers)
    assert kinds(artifact) == expected
    outcomes = Counter("labelled" if word in ("good", "bad") else word for word in expected)
    assert artifact.metrics["outcomes"] == dict(outcomes)
    assert artifact.metrics["labels"] == {"safe": expected.count("good"), "unsafe": expected.count("bad")}
    assert artifact.metrics["num_answers"] == len(BOTH)


def test_both_texts_and_both_labels_are_kept_with_who_gave_them(tiny_model: Path, tmp_path: Path) -> None:
    data = source(tmp_path, "answers", answers(f"{G} {G}", f"{G} {B}", f"{B} {B}", f"{B} {N}"))
    artifact = made(tmp_path, tiny_model, answers=data, first=python(FIRST), second=python(LAST))
    rows = lines(artifact, "verdicts")
    assert [row["messages"][-1]["content"] for row in rows] == [
        "0.9 at 0 0.9",
        "0.9 at 1 0.1",
        "0.1 at 2 0.1",
        "0.1 at 3 ?",
    ]
    assert [(row["first"]["probability"], row["second"]["probability"]) for row in rows] == [
        (0.9, 0.9),
        (0.9, 0.1),
        (0.1, 0.1),
        (0.1, None),
    ]
    assert rows[3]["second"]["reason"] == "last_word returned None"
    assert {row["first"]["labeller"]["function"] for row in rows} == {FIRST}
    assert rows[0]["second"]["labeller"] == artifact.data["labellers"]["second"]
    assert [row["rows"] for row in rows] == [[0, 1], [], [2, 3], []]
    assert [row["place"][1] for row in rows] == [f"answers.jsonl:{n}" for n in (1, 2, 3, 4)]


def test_the_agreement_of_the_labellers_by_hand(tiny_model: Path, tmp_path: Path) -> None:
    """Ten answers: 4 safe by both, 2 by the first alone, 1 by the second alone, 3 by neither; one undecided.

    They agree on 0.7. By chance 0.6 x 0.5 + 0.4 x 0.5 = 0.5: kappa 0.4. AC1's chance is 2 x 0.55 x 0.45 = 0.495.
    """
    words = [f"{G} {G}"] * 4 + [f"{G} {B}"] * 2 + [f"{B} {G}"] + [f"{B} {B}"] * 3 + [f"{N} {B}"]
    data = source(tmp_path, "answers", answers(*words))
    artifact = made(tmp_path, tiny_model, answers=data, first=python(FIRST), second=python(LAST), modes=["score"])
    found = artifact.metrics["labellers"]
    assert (found["n"], found["undecided"]) == (10, 1)
    assert found["agree"]["value"] == pytest.approx(0.7)
    assert found["kappa"]["value"] == pytest.approx(0.4)
    assert found["ac1"]["value"] == pytest.approx((0.7 - 0.495) / (1 - 0.495))
    assert found["first_then_second"] == {"safe": {"safe": 4, "unsafe": 2}, "unsafe": {"safe": 1, "unsafe": 3}}


def test_people_label_what_they_labelled_and_every_answer_counts_once(tiny_model: Path, tmp_path: Path) -> None:
    labelled = source(tmp_path, "labelled", [{"prompt": "A", "completion": "a", "safe": False}])
    pair = {"prompt": "A", "chosen": "b", "rejected": "a", "chosen_safe": True, "rejected_safe": False}
    judged = {"prompt": "B", "chosen": "c", "rejected": "d", "chosen_safe": True, "rejected_safe": False}
    pairs = source(tmp_path, "pairs", [pair, judged | {"label_source": "judge"}])
    plain = source(tmp_path, "answers", [{"prompt": "A", "completion": "b"}, {"prompt": "C", "completion": "e"}])
    artifact = made(tmp_path, tiny_model, labelled=labelled, pairs=pairs, answers=plain, first=PEOPLE)
    rows = lines(artifact, "verdicts")
    assert [(row["messages"][-1]["content"], row["people"]) for row in rows] == [
        ("a", False),
        ("b", True),
        ("c", None),
        ("d", None),
        ("e", None),
    ]
    assert artifact.data["repeated"] == 2
    assert artifact.data["labellers"] == {"first": PEOPLE}
    assert artifact.metrics["outcomes"] == {"labelled": 2, "no label of the first labeller": 3}
    assert not list(account_lines(artifact.data)), "nothing was dropped when it was read"


def test_people_who_contradict_each_other_give_no_label(tiny_model: Path, tmp_path: Path) -> None:
    """Whatever the order of the places; and a label stands behind a place that has none."""
    labelled = source(tmp_path, "labelled", [{"prompt": "A", "completion": text, "safe": True} for text in "ab"])
    judged = {"prompt": "B", "chosen": "c", "rejected": "d", "chosen_safe": True, "rejected_safe": False}
    torn = {"prompt": "A", "chosen": "b", "rejected": "a", "chosen_safe": True, "rejected_safe": False}
    pairs = source(tmp_path, "pairs", [judged | {"label_source": "judge"}, torn, judged | {"rejected": "e"}])
    artifact = made(tmp_path, tiny_model, labelled=labelled, pairs=pairs, first=PEOPLE)
    found = {row["messages"][-1]["content"]: row["people"] for row in lines(artifact, "verdicts")}
    assert found == {"a": None, "b": True, "c": True, "d": None, "e": False}
    assert (artifact.data["repeated"], artifact.data["contradicted"]) == (3, 1)


@pytest.mark.parametrize("number", [0, 1, 19, 20, 21, 1000])
def test_every_answer_has_its_line_and_its_lesson(number: int, tiny_model: Path, tmp_path: Path) -> None:
    """A safe and an unsafe answer by people, and so many more by a labeller."""
    known = [
        {"prompt": f"people {safe}", "completion": f"{p} so {p}", "safe": safe} for safe, p in ((True, G), (False, B))
    ]
    more = [{"prompt": f"{n}?", "completion": f"{G} at {n} {G}"} for n in range(number)]
    data = {"labelled": source(tmp_path, "labelled", known)}
    if more:
        data["answers"] = source(tmp_path, "answers", more)
    artifact = made(tmp_path, tiny_model, **data, first=python(FIRST), second=python(LAST), modes=["score"])
    verdicts, records = lines(artifact, "verdicts"), lines(artifact, "records")
    assert [row["messages"][0]["content"] for row in verdicts] == [row["prompt"] for row in known + more]
    assert [row["rows"] for row in verdicts] == [[n] for n in range(number + 2)]
    assert len(records) == number + 2


def test_balance_leaves_out_the_more_frequent_label(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "completion": f"{n}", "safe": n < 7} for n in range(9)]
    labelled = source(tmp_path, "labelled", rows)
    artifact = made(tmp_path, tiny_model, labelled=labelled, first=PEOPLE, balance=True, modes=["score"])
    assert artifact.metrics["labels"] == {"safe": 7, "unsafe": 2}
    assert artifact.metrics["taught"] == {"safe": 2, "unsafe": 2}
    assert artifact.metrics["outcomes"] == {"labelled": 4, "left out for balance": 5}
    assert len(lines(artifact, "records")) == artifact.metrics["lessons"]["all"] == 4


@pytest.mark.parametrize(("safe", "missing"), [(True, "unsafe"), (False, "safe")])
def test_labels_of_one_kind_only_are_no_data(safe: bool, missing: str, tiny_model: Path, tmp_path: Path) -> None:
    """The source was trained and tested on good answers alone, where a judge that always says good is perfect."""
    labelled = source(tmp_path, "labelled", [{"prompt": "A", "completion": "a", "safe": safe}])
    with pytest.raises(SourceError, match=f"no answer is labelled {missing} .*say always the same"):
        made(tmp_path, tiny_model, labelled=labelled, first=PEOPLE)


def test_guidelines_that_leave_no_room_and_turns_without_end_are_told(tiny_model: Path, tmp_path: Path) -> None:
    turns = [{"role": role, "content": "Hi"} for _ in range(60) for role in ("user", "assistant")]
    rows = [{"prompt": "A", "completion": "a", "safe": True}, {"messages": turns, "safe": False}]
    labelled = source(tmp_path, "labelled", rows)
    artifact = made(tmp_path, tiny_model, labelled=labelled, first=PEOPLE)
    assert artifact.metrics["outcomes"] == {"labelled": 1, "too many turns": 1}
    with pytest.raises(ScorerError, match=r"guidelines and question take \d+ tokens, but max_length=600"):
        made(tmp_path, tiny_model, labelled=labelled, first=PEOPLE, max_length=600)


def test_the_lessons_are_conversations_for_fine_tuning(tiny_model: Path, tmp_path: Path) -> None:
    """Two forms of each: the verdict alone, as mode `score` asks, and behind an explanation."""
    rows = [{"prompt": f"{n}?", "completion": f"{n}", "safe": n % 2 == 0} for n in range(4)]
    artifact = made(tmp_path, tiny_model, labelled=source(tmp_path, "labelled", rows), first=PEOPLE)
    data = Data(sources=[Source(name="artifact", path=str(artifact.path))], shuffle=False)
    lessons = load_conversations(data, seed=0).records
    assert len(lessons) == 8
    for number, lesson in enumerate(lessons):
        verdict = parse_verdict(lesson.completion)
        assert verdict.outcome == ("good" if number // 2 % 2 == 0 else "bad")
        assert bool(verdict.rationale) == (number % 2 == 1)
        assert ("exactly two lines" in lesson.prompt.text) == (number % 2 == 1)
        assert read_slots(lesson.prompt)[-1]["text"] == f"{number // 2}"


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"labelled": None}, "there is nothing to label"),
        ({"combine": "second"}, "combine: second needs a second labeller"),
        ({"second": PEOPLE}, "people are the first labeller already"),
        ({"modes": ["score", "score"]}, "modes: score stands twice"),
        ({"second": {"type": "python", "function": LAST}}, "second: scores of type python have no bounds"),
        ({"second": {"type": "peple"}}, "second"),
    ],
)
def test_recipes_that_cannot_teach_are_refused(changes: dict[str, Any], wrong: str, tmp_path: Path) -> None:
    values = {"labelled": {"sources": [{"name": "beavertails"}]}, "first": PEOPLE}
    with pytest.raises(RecipeError, match=wrong):
        recipe(tmp_path, tmp_path, **(values | changes))


# --------------------------------------------------------------------------------------------- labellers that write


def test_what_both_judges_wrote_is_kept_and_the_one_that_agrees_is_taught(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `combine: second` the first judge's explanation of another verdict is no explanation of this one."""
    texts = {
        "one_shot": "Evaluation: It helps.\nChatbot is: good.",
        "two_shot": "Evaluation: It harms.\nChatbot is: bad.",
    }

    def scripted(spec: Any) -> JudgeScorer:
        return JudgeScorer(
            ScriptedBackend(lambda _: texts["two_shot" if spec.prompt == "two_shot" else "one_shot"]),
            GUIDELINES,
            mode="explain",
        )

    monkeypatch.setattr("alignment.labelling.build_scorer", scripted)
    judge = {"type": "judge", "model": str(tiny_model), "mode": "explain"}
    data = source(tmp_path, "labelled", [{"prompt": "A", "completion": "a", "safe": True}])
    with pytest.raises(SourceError, match="no answer is labelled safe"):
        made(tmp_path, tiny_model, labelled=data, first=judge, second=judge | {"prompt": "two_shot"}, combine="second")
    known = [{"prompt": "A", "completion": "a", "safe": True}, {"prompt": "B", "completion": "b", "safe": False}]
    data = source(tmp_path, "labelled", known)
    artifact = made(
        tmp_path, tiny_model, labelled=data, first=PEOPLE, second=judge | {"prompt": "two_shot"}, combine="first"
    )
    rows = lines(artifact, "verdicts")
    assert [row["second"]["rationale"] for row in rows] == ["It harms.", "It harms."]
    assert {row["second"]["labeller"]["guidelines"] for row in rows} == {Constitution.read(DEFAULTS).hash}
    taught = [row["messages"][-1]["content"] for row in lines(artifact, "records")]
    assert taught[1].startswith(f"Evaluation: {WORDLESS[True]}")  # the judge found otherwise
    assert taught[3] == "Evaluation: It harms.\nChatbot is: bad."
