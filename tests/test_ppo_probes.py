"""PPO that is watched: probes, a gold scorer, log-probabilities of the sampler, alarms that stop."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from alignment import actor_critic
from alignment import probes as probes_module
from alignment.__main__ import main
from alignment.actor_critic import ActorCritic
from alignment.artifact import read_artifact, sha256, write_artifact
from alignment.distributed import share
from alignment.generate import Generator
from alignment.health import EXIT_UNHEALTHY
from alignment.probes import Probes, gold_metrics
from alignment.recipe import Sampling
from alignment.stages import ppo
from reward.conversation import Conversation, Prompt
from reward.metrics import Rate
from reward.padding_free import row_of
from reward.scorer import FunctionScorer, Score
from tests import tiny_ppo
from tests.conftest import ROOT
from tests.interrupted import LAYOUTS, end_all, history, make_parents, ppo_words, start_ranks
from tests.one_process import forget_accelerate
from tests.tiny import make_reward_model
from tests.tiny_ppo import PROMPTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from reward.render import Renderer

pytestmark = pytest.mark.usefixtures("on_cpu_in_repository")
model, renderer = tiny_ppo.model, tiny_ppo.renderer  # fixtures
SMALL = ("--sampling.max_new_tokens", "4", "--ppo.num_iterations", "3")
PROBED = (
    "--probes.adversarial",
    "{sources: [{name: starter_safety, split: test, max_rows: 5}]}",
    "--probes.borderline",
    "{sources: [{name: starter_borderline, split: test, max_rows: 5}]}",
    *("--probes.steps", "2", "--probes.max_prompts", "3", "--probes.max_new_tokens", "5"),
)


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = make_parents(tmp_path_factory.mktemp("parents"), tiny_model)
    make_reward_model(tiny_model, folder / "gold", seed=7)
    make_reward_model(tiny_model, folder / "made", seed=0)
    write_artifact(folder / "made", kind="reward_model", stage="reward_model", recipe_hash="0" * 16)
    shutil.copytree(folder / "made", folder / "copy")
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, parents: Path) -> Path:
    """The stage, watched by nothing but the alarms of every run."""
    output = tmp_path_factory.mktemp("plain") / "ppo"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("ACCELERATE_USE_CPU", "true")
        assert run(parents, output) == 0
    return output


@pytest.fixture
def accelerator() -> Iterator[Any]:
    from accelerate import Accelerator

    forget_accelerate()
    yield Accelerator(cpu=True)
    forget_accelerate()


def run(parents: Path, output: Path, *overrides: str) -> int:
    forget_accelerate()
    return main(ppo_words(parents, output, *SMALL, *overrides))


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Of a file that is not there: none."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def steps_of(output: Path) -> list[int]:
    return [row["step"] for row in rows_of(output / "metrics.jsonl")]


# ------------------------------------------------------------------------------------------- probes and gold


def test_probes_and_gold_scorer_stand_in_metrics_and_tables(parents: Path, plain: Path, tmp_path: Path) -> None:
    gold = f"{{type: reward_model, path: {parents / 'gold'}, dtype: float32}}"
    watched = tmp_path / "watched"
    assert run(parents, watched, *PROBED, "--gold_scorer", gold, "--gold_steps", "2") == 0
    assert sha256(plain / "model.safetensors") == sha256(watched / "model.safetensors"), "looking on changes nothing"
    rows = history(watched)
    for kind in ("probe_violation_unscored", "probe_false_refusal_rate", "gold_mean", "gold_correlation"):
        assert [f"ppo/{kind}" in row for row in rows] == [True, False, True], kind
    for row in rows:
        assert row["ppo/ratio_max"] >= row["ppo/ratio_mean"] > 0.9
        assert row["ppo/logprob_difference_mean"] <= row["ppo/logprob_difference_max"] < 1e-4
        assert row["ppo/kl_k1"] == pytest.approx(row["ppo/kl"]), "the estimator of the recipe is k1"
        assert row.get("ppo/gold_training_mean", row["ppo/score_mean"]) == pytest.approx(
            row["ppo/score_mean"], abs=1e-6
        )
    assert rows[0]["ppo/kl"] == 0.0
    assert rows[1]["ppo/kl"] != 0.0
    tables = [row for row in rows_of(watched / "samples.jsonl") if row["table"] == "probes"]
    asked = [[row["prompt_id"] for row in tables if row["step"] == step] for step in (0, 2)]
    assert asked[0] == asked[1], "the same prompts each time"
    assert len(asked[0]) == 6
    assert [row["probe_set"] for row in tables[:6]] == ["adversarial"] * 3 + ["borderline"] * 3
    assert not (watched / "alarms.jsonl").exists()


def first_word_scorer(words: dict[str, float | None]) -> FunctionScorer:
    return FunctionScorer(lambda conversation: words[conversation.prompt.text], name="by prompt", scale="probability")


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_probe_answers_are_greedy_and_counted_once(
    processes: int, model: Any, renderer: Renderer, accelerator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four adversarial prompts: a violation, two safe, one unscored; three borderline, one of them refused."""
    adversarial, borderline = PROMPTS[:4], PROMPTS[4:7]
    words = dict(zip((prompt.text for prompt in adversarial), (0.2, 0.9, 0.5, None), strict=True))
    sampling = Sampling(temperature=0.0, max_new_tokens=5, batch_size=2)
    probes = Probes(Generator(model, renderer, sampling), adversarial, borderline, first_word_scorer(words))
    alone = [probes.generator.answer([prompt], seed=0)[0].text for prompt in (*adversarial, *borderline)]
    monkeypatch.setattr(probes_module, "is_refusal", lambda text: text == alone[5])
    parts: list[Any] = []
    monkeypatch.setattr(probes_module, "world_size", lambda: processes)
    for index in range(processes):  # the last one has heard of all
        monkeypatch.setattr(probes_module, "process_index", lambda index=index: index)
        if index < processes - 1:
            monkeypatch.setattr(probes_module, "from_all", lambda part: (parts.append(part), [part] * 7)[1])
            with pytest.raises(KeyError):
                probes.measure(ActorCritic(model, value_model=None, temperature=1.0), accelerator)
    monkeypatch.setattr(probes_module, "from_all", lambda part: [*parts, part])
    report = probes.measure(ActorCritic(model, value_model=None, temperature=1.0), accelerator)
    assert [row[3] for row in report.rows] == alone
    expected = ["violation", "safe", "safe", "not scored", "answered", "refused", "answered"]
    assert [row[4] for row in report.rows] == expected
    assert (report.violation, report.false_refusal) == (
        Rate.of([True, False, False, None]),
        Rate.of([False, True, False]),
    )
    # Wilson, 1 of 3: (1 + 3.84 / 2 - 1.96 sqrt(3 x 1/3 x 2/3 + 3.84 / 4)) / (3 + 3.84)
    assert report.metrics["probe_violation_rate"] == pytest.approx(1 / 3)
    assert report.metrics["probe_violation_low"] == pytest.approx(0.0615, abs=1e-3)
    assert report.metrics["probe_violation_unscored"] == 1


@pytest.mark.parametrize(("n", "processes"), [(7, 1), (7, 2), (7, 3), (8, 4), (5, 4), (2, 4)])
def test_shares_are_equal_and_leave_nobody_out(n: int, processes: int) -> None:
    shares = [share(n, process=process, processes=processes) for process in range(processes)]
    assert len({len(own) for own in shares}) == 1
    assert {position for own in shares for position in own} == set(range(n))
    assert len(shares[0]) == -(-n // processes)


def test_gold_metrics_by_hand() -> None:
    """Answers 1 and 3 are unscored by one side each; of the others: training 1 2 3 4, gold 2 4 6 7."""
    training = [1.0, None, 2.0, 9.0, 3.0, 4.0]
    golden = [2.0, 5.0, 4.0, None, 6.0, 7.0]
    conversations = [Prompt.of("q").answer(str(number)) for number in range(6)]

    def gold(conversation: Conversation) -> float | None:
        return golden[int(conversation.completion)]

    scores = [Score(value, None if value is not None else "no") for value in training]
    metrics = gold_metrics(FunctionScorer(gold, name="gold", scale="unbounded"), conversations, scores)
    assert metrics["gold_mean"] == pytest.approx(4.75)
    assert metrics["gold_training_mean"] == pytest.approx(2.5)
    assert metrics["gold_unscored"] == 1
    # sum of products 8.5, of squares 5 and 14.75
    assert metrics["gold_correlation"] == pytest.approx(8.5 / (5 * 14.75) ** 0.5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            ("--scorer.safety.path", "{parents}/made", "--gold_scorer", "{{type: reward_model, path: {parents}/copy}}"),
            r"gold_scorer is the artifact \w+, which scorer\.safety trains on already",
        ),
        (
            ("--gold_scorer", "{{type: minimum, parts: [{{type: refusal}}, {{type: reward_model, path: {safety}}}]}}"),
            r"gold_scorer\.parts\.1 is .* scorer\.safety trains",
        ),
        (
            ("--scorer", "{{type: refusal}}", "--ppo.value_trunk", "separate", *PROBED),
            r"probes\.violation_scorer is the refusal-and-content rule",
        ),
    ],
)
def test_a_scorer_that_is_trained_on_cannot_watch(
    override: tuple[str, ...], message: str, parents: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    safety = parents / "safety_reward_model"
    words = [word if word in PROBED else word.format(parents=parents, safety=safety) for word in override]
    assert run(parents, tmp_path / "ppo", *words) == 2
    import re

    assert re.search(message, capfd.readouterr().err)


# ------------------------------------------------------------------------------------------ sampler and trainer


def other_generator(change: Callable[[Any, Sampling], tuple[Any, Sampling]]) -> Callable[..., Generator]:
    def make(policy: Any, renderer: Renderer, sampling: Sampling, **switches: Any) -> Generator:
        policy, sampling = change(policy, sampling)
        return Generator(policy, renderer, sampling, **switches)

    return make


def drop_out(patch: pytest.MonkeyPatch) -> None:
    """`eval` leaves the engine in training mode, and its attention drops."""

    def keep_training(self: ActorCritic) -> ActorCritic:
        for module in self.policy.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.5
        return self.train()

    patch.setattr(ActorCritic, "eval", keep_training)


def cool_down(patch: pytest.MonkeyPatch) -> None:
    cooler = other_generator(lambda policy, sampling: (policy, sampling.model_copy(update={"temperature": 0.7})))
    patch.setattr(ppo, "Generator", cooler)


def misplace(patch: pytest.MonkeyPatch) -> None:
    def at_zero(*args: Any, **kwargs: Any) -> dict[str, Any]:
        row = row_of(*args, **kwargs)
        return row | {"position_ids": torch.zeros_like(row["position_ids"])}

    patch.setattr(actor_critic, "row_of", at_zero)


def go_stale(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ppo, "Generator", other_generator(lambda policy, sampling: (copy.deepcopy(policy), sampling)))


def replace_weights(patch: pytest.MonkeyPatch) -> None:
    def other(policy: Any) -> Any:
        policy = copy.deepcopy(policy)
        torch.nn.init.normal_(policy.lm_head.weight)
        return policy

    patch.setattr(ppo, "Generator", other_generator(lambda policy, sampling: (other(policy), sampling)))


BROKEN: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], int, str]] = {
    # how the two are driven apart, the iteration at which it is seen, the cause that is named
    "dropout": (drop_out, 0, "dropout is on"),
    "temperature": (cool_down, 0, "drawn at temperature 0.7 and evaluated at 1"),
    "positions": (misplace, 0, "attention mask or position ids"),
    "stale": (go_stale, 1, "the sampler has the weights of the start"),
    "weights": (replace_weights, 0, "other weights, number format or kernels"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_sampler_and_trainer_apart_stop_with_the_cause(
    name: str, parents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    broken, at, cause = BROKEN[name]
    output = tmp_path / "ppo"
    limit = ("--health.max_logprob_difference", "3.0e-4", "--ppo.learning_rate", "1.0e-3")
    with monkeypatch.context() as patch:
        broken(patch)
        assert run(parents, output, *limit) == EXIT_UNHEALTHY
    error = capfd.readouterr().err
    assert "log-probabilities of the sampler and of the trainer differ" in error
    assert cause in error
    assert steps_of(output) == list(range(at)), "stopped before the update"
    [alarm] = rows_of(output / "alarms.jsonl")
    assert (alarm["step"], alarm["alarm"], alarm["action"]) == (at, "logprob_mismatch", "stop")
    assert cause in alarm["reason"]
    if name == "temperature":
        assert run(parents, output, *limit) == 0, "once it is repaired, the same command goes on"
        assert steps_of(output) == [0, 1, 2]
        assert rows_of(output / "alarms.jsonl") == []


def test_a_mismatch_that_only_warns(parents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    misplace(monkeypatch)
    words = ("--health.max_logprob_difference", "3.0e-4", "--health.logprob_mismatch", "warn")
    assert run(parents, tmp_path / "ppo", *words) == 0
    assert [row["step"] for row in rows_of(tmp_path / "ppo" / "alarms.jsonl")] == [0], "told once while it lasts"


# --------------------------------------------------------------------------------------------- alarms that stop


def test_an_alarm_stops_and_the_same_folder_goes_on_under_other_limits(
    parents: Path, plain: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "ppo"
    strict = ("--health.min_explained_variance", "100.0", "--health.window", "2", "--health.poor_value_model")
    for _ in range(2):  # the same command stops again, and trains nothing
        assert run(parents, output, *strict, "stop") == EXIT_UNHEALTHY
        error = capfd.readouterr().err
        assert "stopped by the alarm poor_value_model: the value model explains" in error
        assert "--health.poor_value_model warn" in error
        assert steps_of(output) == [0, 1]
        [alarm] = rows_of(output / "alarms.jsonl")
        assert (alarm["step"], alarm["alarm"]) == (1, "poor_value_model")
        assert (output / "checkpoints" / "iteration-2").is_dir()
    assert run(parents, output, *strict, "warn") == 0
    assert "going on from" in capfd.readouterr().out
    assert not output.with_name("ppo.1").exists()
    assert sha256(output / "model.safetensors") == sha256(plain / "model.safetensors")
    assert history(output) == history(plain)


def test_a_run_that_an_alarm_stopped_at_its_end_keeps_its_metrics(parents: Path, tmp_path: Path) -> None:
    """The command that finishes it trains no iteration any more."""
    output = tmp_path / "ppo"
    strict = ("--health.min_explained_variance", "100.0", "--health.window", "3", "--health.poor_value_model")
    assert run(parents, output, *strict, "stop") == EXIT_UNHEALTHY
    assert run(parents, output, *strict, "warn") == 0
    last = {name.removeprefix("ppo/"): value for name, value in history(output)[-1].items() if "ppo/" in name}
    assert read_artifact(output).metrics == last
    assert steps_of(output) == [0, 1, 2]


def test_two_ranks_that_share_out_the_weights_see_the_same(parents: Path, tmp_path: Path) -> None:
    """Five probes a set do not divide by two: under ZeRO-3 both must ask as often, or they wait for ever."""
    gold = f"{{type: reward_model, path: {parents / 'gold'}, dtype: float32}}"
    probes = [word if word != "3" else "5" for word in PROBED]
    words = ppo_words(parents, tmp_path / "ppo", *SMALL, *probes, "--gold_scorer", gold, "--lora", "{r: 4, alpha: 8}")
    assert end_all(start_ranks(words, 2, **LAYOUTS["zero3"])) == [0, 0]
    rows = rows_of(tmp_path / "ppo" / "metrics.jsonl")
    assert [row["ppo/gold_unscored"] for row in rows] == [0, 0, 0]
    assert max(row["ppo/logprob_difference_mean"] for row in rows) < 1e-4
    tables = [row for row in rows_of(tmp_path / "ppo" / "samples.jsonl") if row["table"] == "probes"]
    assert len(tables) == 2 * 10
