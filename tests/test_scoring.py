"""`alignment.scoring` and `alignment.inputs` on scorers of other makers: a section becomes one, or is refused early."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignment.inputs import InputError, check_scorer
from alignment.recipe_file import RecipeError
from alignment.scorer_file import read_scorer
from alignment.scoring import build_scorer
from reward.conversation import Prompt
from reward.guard import GuardScorer
from reward.judge import JudgeScorer
from reward.judge_prompt import SAFETY_LLAMA_TEMPLATE, Constitution
from reward.platt import Calibration
from reward.scorer import LagrangianScorer, ScorerError, logit, score_all
from tests.tiny import make_reward_model
from tests.tiny_families import make_beaver, make_classifier, make_value_head

CONVERSATIONS = [Prompt.of("How do I bake bread?").answer("In a covered pot."), Prompt.of("Hi").answer("Hello!")]


def values(section: str) -> list[float]:
    spec = read_scorer(section)
    check_scorer(spec)
    scores = score_all(build_scorer(spec), CONVERSATIONS)
    return [score.value for score in scores if score.value is not None]


def test_every_key_of_a_reward_model_reaches_it(tiny_model: Path, tmp_path: Path) -> None:
    path = make_reward_model(tiny_model, tmp_path / "plain")
    plain = values(f"{{type: reward_model, path: {path}}}")
    assert values(f"{{type: reward_model, path: {path}, direction: lower}}") == [-value for value in plain]
    assert values(f"{{type: reward_model, path: {path}, read_at: end_of_template}}") != pytest.approx(plain, abs=1e-3)
    several = make_classifier(tiny_model, tmp_path / "several", labels=["bad", "good"])
    good, bad = (values(f"{{type: reward_model, path: {several}, label: {label}}}") for label in ("good", 0))
    assert good == pytest.approx([-value for value in bad], abs=1e-5)  # log-odds of one of two
    head = make_value_head(tiny_model, tmp_path / "adapter", adapter=True)
    assert len(values(f"{{type: reward_model, path: {head}, family: value_head}}")) == 2


def test_a_lagrangian_of_a_reward_model_and_a_guard(tiny_model: Path, tmp_path: Path) -> None:
    """By hand: the reward less twice the guard's negated logit, over three."""
    reward = f"{{type: reward_model, path: {make_beaver(tiny_model, tmp_path / 'beaver')}}}"
    guard = f"{{type: guard, model: {tiny_model}, format: wild_guard}}"
    section = f"{{type: lagrangian, reward: {reward}, cost: {guard}, multiplier: 2.0}}"
    scorer = build_scorer(read_scorer(section))
    assert isinstance(scorer, LagrangianScorer)
    assert isinstance(scorer.safety, GuardScorer)
    assert scorer.safety.name == tiny_model.name
    expected = [(r + 2 * logit(p)) / 3 for r, p in zip(values(reward), values(guard), strict=True)]
    assert values(section) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{type: guard, model: ./absent, format: llama_guard}", "scorer.model: the model folder absent does not exist"),
        (
            "{type: lagrangian, reward: {type: refusal}, cost: {type: guard, model: ./no, format: wild_guard}}",
            "scorer.cost.model: the model folder no does not exist",
        ),
        ("{type: reward_model, path: MODEL}", "scorer: .* holds no regression head: found LlamaForCausalLM"),
        ("{type: reward_model, path: MODEL, family: beaver}", "no weight named score_head"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_loads(tiny_model: Path, section: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_scorer(read_scorer(section.replace("MODEL", str(tiny_model))))


@pytest.mark.parametrize(
    "section",
    [
        "{type: reward_model, path: x, direction: sideways}",
        "{type: reward_model, path: x, family: guess}",
        "{type: reward_model, path: x, label: 1.5}",
        "{type: guard, model: x}",
        "{type: guard, model: x, format: other}",
        "{type: lagrangian, reward: {type: refusal}}",
        "{type: lagrangian, reward: {type: refusal}, cost: {type: refusal}, multiplier: -1.0}",
    ],
)
def test_sections_are_strict(section: str) -> None:
    with pytest.raises(RecipeError):
        read_scorer(section)


def test_an_adapter_is_a_reward_model_but_no_policy(tiny_model: Path, tmp_path: Path) -> None:
    from alignment.policy import ModelError, check_model

    folder = make_value_head(tiny_model, tmp_path / "adapter", adapter=True)
    check_model(str(folder), kind="reward_model")
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        check_model(str(folder), kind="policy")


# ---------------------------------------------------------------------------------------------------- judges

GUIDELINES = "A bad chatbot helps people to hurt others.\nA good chatbot does not.\n"


@pytest.fixture
def guidelines(tmp_path: Path) -> Path:
    path = tmp_path / "guidelines.txt"
    path.write_text(GUIDELINES)
    return path


def build_judge(section: str) -> JudgeScorer:
    spec = read_scorer(section)
    check_scorer(spec)
    judge = build_scorer(spec)
    assert isinstance(judge, JudgeScorer)
    return judge


def test_every_key_of_a_judge_reaches_it(tiny_model: Path, guidelines: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = f"model: {tiny_model}, guidelines: {guidelines}, max_length: 1900"
    judge = build_judge(f"{{type: judge, {model}, prompt: two_shot, batch_size: 3, shared_prefix: false}}")
    assert (judge.prompt, judge.max_length, judge.constitution.text) == ("two_shot", 1900, GUIDELINES)
    assert (judge.backend.batch_size, judge.backend.why_unshared) == (3, "switched off")
    shared = build_judge(f"{{type: judge, {model}, prompt: two_shot}}")
    assert shared.backend.why_unshared is None
    assert "anew" not in capfd.readouterr().out
    found, expected = ([score.value for score in score_all(scorer, CONVERSATIONS)] for scorer in (shared, judge))
    assert found == pytest.approx(expected, abs=1e-4)
    plain = build_judge(f"{{type: judge, {model}, prompt: safety_llama}}")
    assert plain.backend.renderer.tokenizer.chat_template == SAFETY_LLAMA_TEMPLATE
    assert "Conversation:\nHuman: <" in plain.backend.renderer.tokenizer.decode(
        plain.backend.renderer.render_prompt(plain._prompt(CONVERSATIONS[0]))
    )


def test_a_judge_that_cannot_share_its_guidelines_says_so(
    tiny_model: Path, guidelines: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("reward.continuations.why_not_shared", lambda _model: "it has no layers")
    build_judge(f"{{type: judge, model: {tiny_model}, guidelines: {guidelines}}}")
    assert "the judge reads its guidelines anew for every conversation: it has no layers" in capfd.readouterr().out


def test_a_calibration_is_checked_before_the_model_loads_and_again_with_it(
    tiny_model: Path, guidelines: Path, tmp_path: Path
) -> None:
    section = f"{{type: judge, model: {tiny_model}, guidelines: {guidelines}, calibration: {tmp_path / 'c.json'}}}"
    plain = build_judge(section.partition(", calibration")[0] + "}")
    with pytest.raises(InputError, match=r"scorer\.calibration: the file .* does not exist"):
        build_judge(section)
    Calibration(0.5, 1.0, plain.provenance, 40).write(tmp_path / "c.json")
    calibrated = [score.value for score in score_all(build_judge(section), CONVERSATIONS)]
    raw = [score.value for score in score_all(plain, CONVERSATIONS)]
    assert [logit(value) for value in calibrated if value is not None] == pytest.approx(
        [0.5 * logit(value) + 1 for value in raw if value is not None], abs=1e-4
    )
    Calibration(0.5, 1.0, plain.provenance | {"model": "another"}, 40).write(tmp_path / "c.json")
    with pytest.raises(ScorerError, match="was fitted for model another"):
        build_judge(section)
    Calibration(0.5, 1.0, plain.provenance | {"guidelines": Constitution("Other.").hash}, 40).write(tmp_path / "c.json")
    with pytest.raises(InputError, match="scorer: the calibration was fitted for guidelines"):
        check_scorer(read_scorer(section))
    (tmp_path / "c.json").write_text(json.dumps({"scale": 1}))
    with pytest.raises(InputError, match="is no calibration of a judge"):
        check_scorer(read_scorer(section))


def test_the_published_judge_is_one_line(tiny_model: Path, tmp_path: Path) -> None:
    """An adapter without a tokenizer, guidelines that say how to answer, the plain form: in both modes, and in int8."""
    from tests.test_backends import make_adapter
    from tests.test_judge_forms import PUBLISHED

    make_adapter(tiny_model, tmp_path / "adapter")
    (tmp_path / "guidelines.txt").write_text(PUBLISHED.text, encoding="utf-8")
    section = (
        f"type: judge, model: {tmp_path / 'adapter'}, prompt: safety_llama, guidelines: {tmp_path / 'guidelines.txt'}"
    )
    judge = build_judge(f"{{{section}}}")
    assert judge.constitution == PUBLISHED
    verdicts = judge.judge(CONVERSATIONS)
    assert {verdict.outcome for verdict in verdicts} <= {"good", "bad"}
    assert {verdict.guidelines for verdict in verdicts} == {PUBLISHED.hash}
    shown = judge.backend.renderer.tokenizer.decode(
        judge.backend.renderer.render_prompt(judge._prompt(CONVERSATIONS[0]))
    )
    turns = CONVERSATIONS[0].messages
    assert f"{PUBLISHED.text.strip()}\n\nConversation:\nHuman: <{turns[0].content}>\n\nChatbot: <" in shown
    (written,) = build_judge(f"{{{section}, mode: explain}}").judge(CONVERSATIONS[:1])
    assert (written.outcome, written.reason) == ("unscored", "no verdict at the end")  # random weights


def test_an_adapter_is_a_judge(tiny_model: Path, guidelines: Path, tmp_path: Path) -> None:
    from tests.test_backends import make_adapter

    make_adapter(tiny_model, tmp_path / "adapter")
    section = f"{{type: judge, model: {tmp_path / 'adapter'}, guidelines: {guidelines}}}"
    adapted = [score.value for score in score_all(build_judge(section), CONVERSATIONS)]
    base = values(f"{{type: judge, model: {tiny_model}, guidelines: {guidelines}}}")
    assert len(set(adapted) | set(base)) == 4
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"scorer: .* holds no adapter_model\.safetensors"):
        check_scorer(read_scorer(section))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{type: judge, model: x, prompt: three_shot}", "prompt"),
        ("{type: judge, model: x, quantization: int4}", "quantization"),
        ("{type: judge, model: x, calibration: c.json, mode: explain}", "calibration: it fits one model"),
        (
            "{type: judge, model: x, quantization: int8, server: {url: 'http://localhost:8000'}}",
            "quantization: a server quantizes its model itself",
        ),
        (
            "{type: judge, model: x, calibration: c.json, server: {url: 'http://localhost:8000'}}",
            "calibration: it fits one model in this process",
        ),
    ],
)
def test_sections_of_judges_are_strict(section: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_scorer(section)


def test_guidelines_that_are_no_text_are_refused(tiny_model: Path, guidelines: Path) -> None:
    guidelines.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as guidelines"):
        check_scorer(read_scorer(f"{{type: judge, model: {tiny_model}, guidelines: {guidelines}}}"))
