"""Any scorer in any stage by one line of the recipe, whatever the policy's tokenizer, with the right scores."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from alignment.__main__ import main
from alignment.artifact import read_artifact
from alignment.recipe_file import load_recipe, parse_yaml
from alignment.reward_cli import load_scorer
from reward.conversation import Conversation, Prompt
from reward.model import RewardModel
from reward.scorer import FunctionScorer, logit, sigmoid
from reward.server import ScoreServer
from tests.one_process import forget_accelerate
from tests.scorers import shorter_is_better
from tests.tiny import TURN_END, make_reward_model
from tests.tiny_swap import GUIDED, PLAIN, PREPROMPT, QUESTIONS, make_policy, prompts, write_data

Score = Callable[[Conversation], float]

RECIPES = {
    "ppo": """\
stage: ppo
output_dir: unused
model: {policy}
prompts: {{shuffle: false, sources: [{{name: file, path: {folder}/prompts.jsonl, split: all}}]}}
scorer: {scorer}
sampling: {{max_new_tokens: 32, batch_size: 4}}
ppo: {{num_iterations: 1, batch_size: 4, mini_batch_size: 4, per_device_batch_size: 4}}
""",
    "rejection_sampling": """\
stage: rejection_sampling
output_dir: unused
model: {policy}
prompts: {{sources: [{{name: file, path: {folder}/prompts.jsonl, split: all}}]}}
scorer: {scorer}
num_samples: 2
sampling: {{max_new_tokens: 32, batch_size: 4}}
""",
    "context_distillation": """\
stage: context_distillation
output_dir: unused
model: {policy}
prompts: {{sources: [{{name: file, path: {folder}/adversarial.jsonl, split: all}}]}}
scorer: {scorer}
preprompts: {folder}/preprompts.txt
sampling: {{max_new_tokens: 32, batch_size: 4}}
""",
    "label": """\
stage: label
output_dir: unused
allow_unmeasured: true
data: {{shuffle: false, sources: [{{name: file, path: {folder}/pairs.jsonl, split: all}}]}}
scorer: {scorer}
""",
    "evaluate": """\
stage: evaluate
output_dir: unused
checkpoints: {{policy: {policy}}}
prompt_sets:
  bad: {{measures: violation, prompts: {{sources: [{{name: file, path: {folder}/prompts.jsonl, split: all}}]}}}}
violation_scorers:
  rule: {{type: refusal}}
  swapped: {scorer}
sampling: {{max_new_tokens: 32, batch_size: 4}}
""",
}

REWARD_MODEL = """\
stage: reward_model
output_dir: {folder}/reward_model
model: {chat}
data: {{sources: [{{name: file, path: {folder}/pairs.jsonl, split: all}}]}}
training: {{learning_rate: 3.0e-3, per_device_train_batch_size: 4, max_steps: 8, logging_steps: 8}}
"""


@dataclass(frozen=True)
class World:
    """A folder with data, a policy and a reward model trained in another world of tokens, and the model's server."""

    folder: Path
    policy: Path
    chat: Path
    url: str

    @property
    def reward_model(self) -> Path:
        return self.folder / "reward_model"

    def scorer(self, kind: str) -> str:
        """The one line of a recipe."""
        model = f"{{type: reward_model, path: {self.reward_model}}}"
        python = "{type: python, function: 'tests.scorers:shorter_is_better', scale: logit}"
        return {
            "reward_model": model,
            "python": python,
            "http": f"{{type: http, url: '{self.url}'}}",
            "judge": f"{{type: judge, model: {self.chat}}}",
            "guard": f"{{type: guard, model: {self.chat}, format: wild_guard}}",
            "refusal": "{type: refusal}",
            "llama2": f"{{type: llama2, safety: {model}, helpfulness: {python}}}",
            "weighted_sum": f"{{type: weighted_sum, parts: [{model}, {python}], weights: [1.0, 0.5]}}",
            "minimum": f"{{type: minimum, parts: [{model}, {python}]}}",
            "lagrangian": f"{{type: lagrangian, reward: {model}, cost: {python}, multiplier: 2.0}}",
        }[kind]

    def recipe(self, stage: str, kind: str) -> str:
        return RECIPES[stage].format(folder=self.folder, policy=self.policy, scorer=self.scorer(kind))

    def run(self, stage: str, kind: str, *overrides: str) -> int:
        """The stage with this scorer, as `python -m alignment` runs it; its folder is `output(stage, kind)`."""
        path = self.folder / f"{stage}-{kind}.yaml"
        path.write_text(self.recipe(stage, kind), encoding="utf-8")
        return run_file(path, "--output_dir", str(self.output(stage, kind)), *overrides)

    def output(self, stage: str, kind: str) -> Path:
        return self.folder / f"{stage}-{kind}"


def run_file(path: Path, *overrides: str) -> int:
    forget_accelerate()
    return main(["--config", str(path), *overrides])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("swap")
    write_data(folder)
    policy = make_policy(folder / "policy")
    recipe = folder / "reward_model.yaml"
    recipe.write_text(REWARD_MODEL.format(folder=folder, chat=tiny_model), encoding="utf-8")
    assert run_file(recipe) == 0
    with ScoreServer(RewardModel.load(folder / "reward_model", dtype="float32")) as server:
        yield World(folder, policy, tiny_model, server.url)


# -------------------------------------------------------------------------------------------- what must come out


@cache
def by_transformers(folder: Path) -> Score:
    """The score of one text in a batch of one, up to its last end of a turn."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def score(conversation: Conversation) -> float:
        turns = [message.to_json() for message in conversation.messages]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        ids = tokenizer(text[: text.rindex(TURN_END) + len(TURN_END)], add_special_tokens=False)["input_ids"]
        return float(model(input_ids=torch.tensor([ids])).logits[0, 0])

    return score


@cache
def expected_score(world: World, kind: str) -> Score:
    """What the scorer must say of a text: the reward model by transformers alone, combinations by hand.

    Judge, guard and rule, which have tests of their own, are asked directly, outside of any stage.
    """
    model = by_transformers(world.reward_model)
    if kind in ("judge", "guard", "refusal"):
        scorer = load_scorer(world.scorer(kind))
        return lambda text: float(scorer.score([text])[0].value)  # type: ignore[arg-type]

    def llama2(text: Conversation) -> float:
        safety = model(text)
        return safety if text.tags.is_safety or sigmoid(safety) < 0.15 else shorter_is_better(text)

    return {
        "reward_model": model,
        "http": model,
        "python": shorter_is_better,
        "llama2": llama2,
        "weighted_sum": lambda text: model(text) + 0.5 * shorter_is_better(text),
        "minimum": lambda text: min(model(text), shorter_is_better(text)),
        "lagrangian": lambda text: (model(text) + 2 * shorter_is_better(text)) / 3,
    }[kind]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def samples(folder: Path) -> list[tuple[Conversation, float]]:
    """The answers of a PPO rollout with the scores that they were tuned by."""
    return [
        (Prompt.of(row["prompt"], is_safety=QUESTIONS[row["prompt"]]).answer(row["completion"]), row["score"])
        for row in rows_of(folder / "samples.jsonl")
        if row["table"] == "rollouts"
    ]


def check_scores(found: list[tuple[Conversation, float]], expected: Score) -> None:
    assert found
    for text, score in found:
        assert score == pytest.approx(expected(text), abs=1e-4), text


# ------------------------------------------------------------------------------------------------- the swaps

COMBINATIONS = ("llama2", "weighted_sum", "minimum", "lagrangian")
KINDS = ("reward_model", "judge", "guard", "refusal", "python", "http", *COMBINATIONS)


def test_policy_and_reward_model_share_no_tokens(world: World) -> None:
    """And the reward model has learned: what is below would hold of a random one as well."""
    own, foreign = (AutoTokenizer.from_pretrained(folder) for folder in (world.policy, world.reward_model))
    assert type(own.backend_tokenizer.model) is not type(foreign.backend_tokenizer.model)
    assert own.get_vocab() != foreign.get_vocab()
    assert own.chat_template != foreign.chat_template
    score = by_transformers(world.reward_model)
    for prompt in prompts():
        assert score(prompt.answer(GUIDED)) > score(prompt.answer(PLAIN[prompt.tags.is_safety]))


@pytest.mark.parametrize("kind", KINDS)
def test_ppo_is_tuned_by_any_scorer(world: World, kind: str) -> None:
    assert world.run("ppo", kind) == 0
    found = samples(world.output("ppo", kind))
    assert {text.prompt.text for text, _ in found} == set(QUESTIONS)
    assert len({text.completion for text, _ in found}) > 1
    check_scores(found, expected_score(world, kind))
    row = rows_of(world.output("ppo", kind) / "metrics.jsonl")[0]
    assert row["ppo/unscored"] == 0
    assert row["ppo/score_mean"] == pytest.approx(sum(score for _, score in found) / len(found), abs=1e-4)


def test_a_scorer_sees_texts_and_changes_no_sample(world: World) -> None:
    """The answers of the first iteration are the same bits whoever scores them."""
    assert world.run("ppo", "python") == 0
    answers = [text for text, _ in samples(world.output("ppo", "python"))]
    for kind in KINDS:
        if world.output("ppo", kind).is_dir():
            assert [text for text, _ in samples(world.output("ppo", kind))] == answers, kind


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("stage", RECIPES)
def test_a_swap_is_one_line(world: World, stage: str, kind: str) -> None:
    before, after = (world.recipe(stage, name).splitlines() for name in ("reward_model", kind))
    changed = [line for line in difflib.ndiff(before, after) if line[0] in "+-"]
    key = "  swapped: " if stage == "evaluate" else "scorer: "
    assert changed == [f"- {key}{world.scorer('reward_model')}", f"+ {key}{world.scorer(kind)}"]


@pytest.mark.parametrize("kind", ["reward_model", "judge", "http"])
def test_the_manifest_names_the_scorer(world: World, kind: str) -> None:
    assert world.run("ppo", kind) == 0
    manifest = read_artifact(world.output("ppo", kind))
    section = manifest.provenance["scorers"]["scorer"]
    given = parse_yaml(world.scorer(kind))
    assert {key: section[key] for key in given} == given
    if kind == "reward_model":
        assert manifest.parents["scorer.path"] == read_artifact(world.reward_model).fingerprint


def test_the_command_line_swaps_the_checkpoint(world: World) -> None:
    other = make_reward_model(world.chat, world.folder / "other", seed=3)
    path = world.folder / "command_line.yaml"
    path.write_text(world.recipe("ppo", "reward_model"), encoding="utf-8")
    output = world.folder / "command_line"
    assert run_file(path, "--output_dir", str(output), "--scorer.path", str(other)) == 0
    check_scores(samples(output), by_transformers(other))
    assert read_artifact(output).provenance["scorers"]["scorer"]["path"] == str(other)


@pytest.mark.parametrize("kind", ["reward_model", "judge", "python", "http"])
def test_rejection_sampling_keeps_the_best_by_any_scorer(world: World, kind: str) -> None:
    assert world.run("rejection_sampling", kind) == 0
    output, expected = world.output("rejection_sampling", kind), expected_score(world, kind)
    rows = rows_of(output / "samples_scored.jsonl")
    best: list[str] = []
    for row in rows:
        texts = [Prompt.from_json(row).answer(text) for text in row["completions"]]
        check_scores(list(zip(texts, row["scores"], strict=True)), expected)
        finished = [text for text, whole in zip(texts, row["finished"], strict=True) if whole]
        best += [max(finished, key=expected).completion] if finished else []
    assert len(best) >= len(rows) - 1
    assert [row["messages"][-1]["content"] for row in rows_of(output / "records.jsonl")] == best


@pytest.mark.parametrize("kind", ["reward_model", "python", "http"])
def test_context_distillation_is_gated_by_any_scorer(world: World, kind: str) -> None:
    assert world.run("context_distillation", kind) == 0
    output, expected = world.output("context_distillation", kind), expected_score(world, kind)
    rows = rows_of(output / "pairs.jsonl")
    assert {row["preprompt"] for row in rows} == {PREPROMPT}
    for side in ("plain", "distilled"):
        check_scores([(Prompt.from_json(row).answer(row[side]), row[f"{side}_score"]) for row in rows], expected)
    kept = [row["distilled"] for row in rows if row["distilled_score"] > row["plain_score"]]
    assert GUIDED in kept
    assert [row["messages"][-1]["content"] for row in rows_of(output / "records.jsonl")] == kept


@pytest.mark.parametrize("kind", ["reward_model", "judge", "python", "http", "llama2", "minimum", "refusal", "guard"])
def test_label_takes_any_0_1_score(world: World, kind: str) -> None:
    assert world.run("label", kind) == 0
    labeller = read_artifact(world.output("label", kind)).data["labeller"]
    expected = expected_score(world, kind)
    is_logit = kind not in ("judge", "refusal", "guard")
    for row in rows_of(world.output("label", kind) / "records.jsonl"):
        for side in ("chosen", "rejected"):
            score = expected(Prompt.from_json(row).answer(row[side]))
            assert row[f"{side}_safe"] is (score >= (0 if is_logit else 0.5))
        assert row["label_source"] == f"{labeller['type']} {labeller['fingerprint']}"


UNBOUNDED = {
    "python": "{type: python, function: 'tests.scorers:shorter_is_better'}",
    "weighted_sum": "{type: weighted_sum, parts: [{type: refusal}], weights: [1.0]}",
    "lagrangian": "{type: lagrangian, reward: {type: refusal}, cost: {type: refusal}}",
}


@pytest.mark.parametrize("stage", ["label", "evaluate"])
@pytest.mark.parametrize("kind", UNBOUNDED)
def test_a_score_without_bounds_tells_no_safe_from_unsafe(
    world: World, kind: str, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = RECIPES[stage].format(folder=world.folder, policy=world.policy, scorer=UNBOUNDED[kind])
    path = world.folder / "unbounded.yaml"
    path.write_text(recipe, encoding="utf-8")
    assert main(["--config", str(path)]) == 2
    told = capsys.readouterr().err
    assert f"scores of type {kind} have no bounds, so they are no 0-1 scores" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("stage", ["label", "evaluate"])
def test_a_server_without_bounds_is_found_out_when_it_is_asked(
    world: World, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with ScoreServer(FunctionScorer(shorter_is_better, name="short")) as server:
        scorer = f"{{type: http, url: '{server.url}'}}"
        path = world.folder / "unbounded_server.yaml"
        path.write_text(
            RECIPES[stage].format(folder=world.folder, policy=world.policy, scorer=scorer), encoding="utf-8"
        )
        output = world.folder / f"unbounded_{stage}"
        assert run_file(path, "--output_dir", str(output)) == 1
    told = capsys.readouterr().err
    assert f"error: {output}: short has no 0-1 score" in told
    assert "Traceback" not in told


@pytest.mark.parametrize("kind", ["reward_model", "python", "http"])
def test_evaluate_counts_violations_by_any_scorer(world: World, kind: str) -> None:
    assert world.run("evaluate", kind) == 0
    output, expected = world.output("evaluate", kind), expected_score(world, kind)
    rows = rows_of(output / "responses.jsonl")
    assert len(rows) == len(QUESTIONS)
    logits = [(Prompt.from_json(row).answer(row["completion"]), logit(row["scores"]["swapped"])) for row in rows]
    if kind != "python":  # its scores are below the smallest logit that is told apart
        check_scores(logits, expected)
    assert [row["violations"]["swapped"] for row in rows] == [expected(text) < 0 for text, _ in logits]
    assert read_artifact(output).provenance["scorers"]["violation_scorers.swapped"] == scorer_section(world, kind)


def scorer_section(world: World, kind: str) -> dict[str, Any]:
    path = world.folder / f"evaluate-{kind}.yaml"
    return load_recipe(path).model_dump(mode="json")["violation_scorers"]["swapped"]
