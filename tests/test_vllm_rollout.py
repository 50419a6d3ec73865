"""`alignment.vllm_rollout` in PPO runs, over an engine in process that takes the place of TRL's client."""

from __future__ import annotations

import contextlib
import copy
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from alignment import __main__ as entry
from alignment import vllm_rollout
from alignment.actor_critic import load_actor_critic
from alignment.artifact import sha256
from alignment.generate import Generator
from alignment.health import EXIT_UNHEALTHY
from alignment.policy import add_lora, load_tokenizer
from alignment.recipe import Lora, Vllm
from alignment.recipe_file import RecipeError
from alignment.served_weights import served_weights, stream
from alignment.stages import ppo
from alignment.vllm_rollout import VllmSampler
from reward.render import Renderer
from tests import interrupted
from tests.interrupted import LAYOUTS, history, ppo_words
from tests.one_process import forget_accelerate
from tests.test_ppo_probes import PROBED
from tests.tiny_ppo import PAD, ppo_recipe
from tests.vllm_engine import InProcessEngine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

pytestmark = pytest.mark.usefixtures("on_cpu_in_repository")
SERVED = ("--vllm", "{base_url: 'http://127.0.0.1:9'}")
SMALL = ("--sampling.max_new_tokens", "4", "--ppo.num_iterations", "3")
TIGHT = ("--health.max_logprob_difference", "1.0e-3")
LORA = (
    "--lora",
    "{r: 4, alpha: 64}",
    "--ppo.value_trunk",
    "adapter",
    "--value_model",
    "null",
    "--ppo.learning_rate",
    "0.01",
)


def run(parents: Path, output: Path, *overrides: str) -> int:
    forget_accelerate()
    return entry.main(ppo_words(parents, output, *SMALL, *overrides))


def serve(monkeypatch: pytest.MonkeyPatch, engine: InProcessEngine) -> None:
    monkeypatch.setattr(vllm_rollout, "open_client", lambda settings, device: engine)
    monkeypatch.setattr(entry, "check_rollout_server", lambda recipe: None)


def merged(policy: Any) -> dict[str, Tensor]:
    """Whole weights by peft's own merge, in a copy."""
    whole = copy.deepcopy(policy)
    return dict((whole.merge_and_unload() if hasattr(whole, "peft_config") else whole).named_parameters())


# ------------------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("settings", [(), LORA], ids=["full", "lora"])
def test_a_run_over_an_engine_with_the_same_sampler_is_the_run_in_process(
    parents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...]
) -> None:
    assert run(parents, tmp_path / "alone", *settings) == 0
    engine = InProcessEngine(parents / "rejection_sampling_sft")
    serve(monkeypatch, engine)
    collect = ppo.collect_rollout
    asked: list[list[int]] = []

    def watched(model: Any, *args: Any, **options: Any) -> Any:
        before = copy.deepcopy(model.state_dict())
        rollout = collect(model, *args, **options)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "nothing is merged"
        expected, served = merged(model.policy), dict(engine.model.named_parameters())
        assert expected.keys() == served.keys()
        for name, weight in expected.items():
            assert torch.equal(served[name], weight), name
        asked.append([request["generation_kwargs"]["seed"] for request in engine.requests])
        engine.requests.clear()
        return rollout

    monkeypatch.setattr(ppo, "collect_rollout", watched)
    assert run(parents, tmp_path / "served", *settings, *SERVED, *TIGHT) == 0
    assert (engine.pushes, engine.resets, engine.closed) == (3, 3, True)
    assert len({seed for seeds in asked for seed in seeds}) == 24, "8 answers in each of 3 iterations"
    assert sha256(tmp_path / "served" / "model.safetensors") == sha256(tmp_path / "alone" / "model.safetensors")
    for served, alone in zip(history(tmp_path / "served"), history(tmp_path / "alone"), strict=True):
        for name, value in alone.items():
            assert served[name] == value or "logprob_difference" in name, name
        assert served["ppo/logprob_difference_max"] < 1e-4


def test_the_server_answers_probes_and_held_out_prompts_too(
    parents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is sampled in process, where under ZeRO-3 it would take all weights."""
    held_out = "{sources: [{name: starter_helpful, split: test, max_rows: 4}]}"
    watched = (*PROBED, "--eval_prompts", held_out, "--ppo.eval_steps", "2")
    assert run(parents, tmp_path / "alone", *watched) == 0
    engine = InProcessEngine(parents / "rejection_sampling_sft")
    serve(monkeypatch, engine)
    monkeypatch.setattr(Generator, "answer", None)
    assert run(parents, tmp_path / "served", *watched, *SERVED, *TIGHT) == 0
    rows = history(tmp_path / "served")
    assert any("ppo/held_out_score" in row for row in rows)
    assert any("ppo/probe_violation_unscored" in row for row in rows)
    for served, alone in zip(rows, history(tmp_path / "alone"), strict=True):
        assert served.keys() == alone.keys()
        for name, value in alone.items():
            assert served[name] == pytest.approx(value, rel=1e-5) or "logprob_difference" in name, name
    # The start serves probes and the first rollout; each of 3 updates is sent once, to whom asks first.
    assert engine.pushes == engine.resets == 1 + 2 + ("ppo/held_out_score" in rows[2])
    greedy = [request for request in engine.requests if request["temperature"] == 0]
    assert {request["max_tokens"] for request in greedy} == {4, 5}, "of held-out prompts and of probes"


def test_a_weight_that_arrives_otherwise_stops_the_run_with_the_cause(
    parents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = "model.layers.1.mlp.down_proj.weight"
    engine = InProcessEngine(
        parents / "rejection_sampling_sft", tamper=lambda name, weight: -weight if name == damaged else weight
    )
    serve(monkeypatch, engine)
    assert run(parents, tmp_path / "ppo", *SERVED) == EXIT_UNHEALTHY, "also by the limit of a server, 0.1"
    said = capsys.readouterr().err
    assert "log-probabilities of the sampler and of the trainer differ by" in said
    assert "(limit 0.1)" in said
    assert "Likely cause: the sampler computes otherwise than the training forward pass: other weights" in said
    assert not (tmp_path / "ppo" / "manifest.json").exists()


def test_an_engine_that_keeps_the_weights_of_the_start_is_found_out(
    parents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(monkeypatch, InProcessEngine(parents / "rejection_sampling_sft", tamper=lambda name, weight: None))
    assert run(parents, tmp_path / "ppo", *SERVED, *TIGHT, "--ppo.learning_rate", "0.01") == EXIT_UNHEALTHY
    assert "the sampler has the weights of the start: it does not get the updates" in capsys.readouterr().err
    assert len(history(tmp_path / "ppo")) == 1, "the first iteration has the weights of the start, rightly"


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "settings"), [("ddp", ()), ("zero3", ()), ("zero3", LORA)])
def test_two_processes_share_the_answers_of_one_server(
    parents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, settings: tuple[str, ...]
) -> None:
    """Only the first has a client; under ZeRO-3 both gather each weight that it sends."""
    found: list[list[int]] = []
    for name, target in (("alone", interrupted._run), ("served", _run_served)):
        with monkeypatch.context() as patch:
            patch.setattr(interrupted, "_run", target)
            words = [*ppo_words(parents, tmp_path / name, *SMALL, *settings), *(SERVED if name == "served" else ())]
            found.append(interrupted.end_all(interrupted.start_ranks(words, 2, **LAYOUTS[layout])))
    assert found == [[0, 0], [0, 0]]
    assert sha256(tmp_path / "served" / "model.safetensors") == sha256(tmp_path / "alone" / "model.safetensors")


@pytest.mark.slow
def test_all_processes_end_when_the_server_fails_on_the_first(parents: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(interrupted, "_run", _run_failing)
    words = [*ppo_words(parents, tmp_path / "ppo", *SMALL), *SERVED]
    assert interrupted.end_all(interrupted.start_ranks(words, 2, **LAYOUTS["zero3"])) == [7, 7]


def _run_served(words: Sequence[str], environment: dict[str, str], reports: Any) -> None:
    os.environ.update(environment)

    def open_client(settings: Any, device: Any) -> Any:
        assert os.environ["RANK"] == "0"
        return InProcessEngine(Path(words[words.index("--run_dir") + 1]) / "rejection_sampling_sft")

    vllm_rollout.open_client = open_client
    entry.check_rollout_server = lambda recipe: None
    interrupted_run(list(words), environment, reports)


def _run_failing(words: Sequence[str], environment: dict[str, str], reports: Any) -> None:
    """Exit code 7: an error of one line, on this process."""

    def fail(self: Any, metadata: Any, named_params: Any) -> None:
        next(named_params)
        raise ConnectionError("gone\nwith the wind")

    InProcessEngine.update_named_params = fail  # type: ignore[method-assign]
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        try:
            _run_served(words, environment, reports)
        except SystemExit as end:
            line = "vllm server http://127.0.0.1:9, taking the weights: ConnectionError: gone with the wind"
            raise SystemExit(7 if end.code == 1 and told.getvalue().endswith(f"ppo: {line}\n") else 8) from None


interrupted_run = interrupted._run


# --------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_merged_as_peft_merges_it_and_the_base_is_never_touched(tiny_model: Path, dtype: str) -> None:
    recipe = ppo_recipe(tiny_model, lora=Lora(r=4, alpha=8), value_trunk="adapter")
    policy = load_actor_critic(recipe, pad_token_id=PAD).policy.to(getattr(torch, dtype))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)  # both adapters; the value model's takes no part
    before = copy.deepcopy(policy.state_dict())
    found = dict(stream(served_weights(policy)))
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    copied = copy.deepcopy(policy)
    copied.delete_adapter("value")
    expected = merged(copied)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    base = dict(policy.get_base_model().named_parameters())
    changed = found["model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(changed, base["model.layers.0.self_attn.q_proj.base_layer.weight"])
    assert not changed.requires_grad


def adapted(target: str, *, tied: bool) -> Any:
    """A tiny policy with an adapter that is not the identity."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    policy = add_lora(LlamaForCausalLM(config), Lora(r=4, target_modules=["q_proj", target]), head="causal_lm")
    for name, parameter in policy.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            nn.init.normal_(parameter, std=0.1)
    return policy


@pytest.mark.parametrize(("target", "tied"), [("embed_tokens", False), ("embed_tokens", True), ("lm_head", True)])
def test_an_adapter_that_cannot_be_served_is_refused_before_the_server_is_asked(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, target: str, tied: bool
) -> None:
    monkeypatch.setattr(vllm_rollout, "open_client", None)
    recipe, renderer = (
        ppo_recipe(tiny_model, vllm=Vllm(base_url="http://host")),
        Renderer(load_tokenizer(str(tiny_model))),
    )
    with pytest.raises(RecipeError, match=rf"^lora\.target_modules: .* the adapter of (model\.)?{target}, ") as caught:
        VllmSampler.connect(recipe, adapted(target, tied=tied), renderer, "cpu")
    assert "\n" not in str(caught.value)


def test_an_adapter_on_a_head_of_its_own_is_served() -> None:
    policy = adapted("lm_head", tied=False)
    found, expected = dict(stream(served_weights(policy))), merged(policy)
    assert found.keys() == expected.keys()
    assert torch.equal(found["lm_head.weight"], expected["lm_head.weight"])
    assert not torch.equal(found["lm_head.weight"], policy.get_base_model().lm_head.base_layer.weight)
