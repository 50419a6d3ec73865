"""`alignment.scorer_file`: how a word of the command line names a scorer, and what each fault is answered."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from alignment.recipe_file import RecipeError
from alignment.recipe_scorers import (
    JudgeScorer,
    Minimum,
    PythonScorer,
    RefusalScorer,
    RewardModelScorer,
    ScorerSpec,
)
from alignment.scorer_file import read_scorer

if TYPE_CHECKING:
    from pathlib import Path

PPO = "stage: ppo\nrun_dir: runs/x\noutput_dir: out\nmodel: m\nprompts: {sources: [{name: starter_safety}]}\n"


def read(tmp_path: Path, text: str, *, name: str = "scorer.yaml") -> ScorerSpec:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return read_scorer(str(path))


def fault(tmp_path: Path, text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, text)
    lines = str(caught.value).splitlines()
    where = f"{tmp_path / 'scorer.yaml'}: "
    assert all(line.startswith(where) for line in lines)
    return "\n".join(line.removeprefix(where) for line in lines)


@pytest.mark.parametrize("text", ["runs/demo/safety_reward_model", "organisation/model", "/models/a.b", "a.yamlish"])
def test_a_word_is_a_reward_model(text: str) -> None:
    assert read_scorer(text) == RewardModelScorer(path=text)


@pytest.mark.parametrize("name", ["scorer.yaml", "scorer.YML"])
def test_a_file_holds_a_section(tmp_path: Path, name: str) -> None:
    text = "scorer:\n  type: minimum\n  parts: [{type: refusal}, {type: judge, model: m, batch_size: 2}]\n"
    expected = Minimum(parts=[RefusalScorer(), JudgeScorer(model="m", batch_size=2)])
    assert read(tmp_path, text, name=name) == expected


def test_a_section_may_stand_in_braces() -> None:
    assert read_scorer("{type: python, function: 'a.b:c'}") == PythonScorer(function="a.b:c")


def test_the_recipe_of_a_stage_lends_its_scorer(tmp_path: Path) -> None:
    spec = read(tmp_path, PPO + "scorer: {type: reward_model, path: '${run_dir}/safety'}\n")
    assert spec == RewardModelScorer(path="runs/x/safety")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scorer: {type: reward_model, path: a, batch_sise: 3}", "unknown key 'scorer.reward_model.batch_sise'"),
        ("scorer: {type: reward_model, path: a, batch_sise: 3}", "; did you mean 'batch_size'?"),
        ("scorer: {type: reward_model}", "the key 'scorer.reward_model.path' is missing"),
        ("scorer: {type: oracle}", "'oracle'"),
        ("scorer: {type: refusal, type: judge}", "the key 'type' stands twice"),
        ("{type: refusal}", "the key 'scorer' is missing"),
        ("scorer: {type: refusal}\nscorers: 1", "unknown key 'scorers'; did you mean 'scorer'?"),
        ("- scorer", "expected keys and values, got list"),
        (PPO, "the key 'scorer' is missing"),
        (
            "stage: sft\noutput_dir: out\nmodel: m\ndata: {sources: [{name: a}]}",
            "a sft recipe has no key 'scorer'; those of rejection_sampling, ppo, context_distillation, label, "
            "judge_agreement have",
        ),
    ],
)
def test_a_fault_names_the_file_and_the_key(tmp_path: Path, text: str, message: str) -> None:
    assert message in fault(tmp_path, text)


def test_a_fault_on_the_command_line_says_so() -> None:
    for text, message in [
        ("", "the scorer is empty"),
        ("absent.yaml", "absent.yaml: no such file"),
        ("{type: judge", "scorer: while parsing"),
        ("{type: judge}", "command line: the key 'scorer.judge.model' is missing"),
    ]:
        with pytest.raises(RecipeError, match=message):
            read_scorer(text)
