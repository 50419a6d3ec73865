"""`alignment.vllm_rollout` through TRL's client over HTTP, to a server that speaks as vLLM does, and to bad ones."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from trl.generation import vllm_client

from alignment.generate import Generator
from alignment.recipe import Vllm
from alignment.rollout import sample_answers
from alignment.vllm_rollout import RolloutServerError, VllmSampler
from reward.conversation import Prompt
from tests import tiny_ppo, vllm_server
from tests.http_peer import RESET, Peer, Request, http
from tests.tiny import make_tiny_model
from tests.tiny_ppo import PROMPTS, ppo_recipe
from tests.vllm_engine import InProcessEngine
from tests.vllm_server import END, Server, Wire, sampler_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from reward.render import Renderer

renderer = tiny_ppo.renderer  # fixture
wire = vllm_server.wire  # fixture


# -------------------------------------------------------------------------------------------- a good server


def test_trls_client_brings_weights_and_the_answers_that_are_drawn_in_process(
    tiny_model: Path, tmp_path: Path, renderer: Renderer, wire: Wire
) -> None:
    server = Server(InProcessEngine(make_tiny_model(tmp_path, seed=3)), wire)
    with Peer(server) as peer:
        sampler, policy = sampler_for(peer, tiny_model, renderer)
        asked = (PROMPTS[:6], [4, 5, 6, 7, 0, 1])
        prompt_ids, completion_ids, drawn = sampler.sample_answers(*asked, seed=5)
        sampler.close()
    assert server.paths[:6] == [
        *("/health", "/v1/models"),
        *("/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache"),
    ]
    assert server.paths[6:] == ["/v1/completions"] * 6
    assert {request.headers["connection"] for request in peer.requests[2:]} == {"close"}, "no idle one is used again"
    expected = sample_answers(Generator(policy, renderer, sampler.sampling), *asked, seed=5)
    assert (prompt_ids, completion_ids) == expected[:2], "with the weights of the policy, not those it started with"
    for ours, theirs in zip(drawn, expected[2], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_weights_are_sent_again_only_after_they_changed(
    tiny_model: Path, tmp_path: Path, renderer: Renderer, wire: Wire
) -> None:
    engine = InProcessEngine(make_tiny_model(tmp_path, seed=3))
    with Peer(Server(engine, wire)) as peer:
        sampler, policy = sampler_for(peer, tiny_model, renderer)
        for expected in (1, 1, 2, 2):
            if expected > engine.pushes > 0:
                with torch.no_grad():
                    policy.lm_head.weight.mul_(-1)
                sampler.weights_changed()
            _, found, _ = sampler.sample_answers(PROMPTS[:2], [0, 1], seed=5)
            assert engine.pushes == expected
            here = sample_answers(Generator(policy, renderer, sampler.sampling), PROMPTS[:2], [0, 1], seed=5)
            assert found == here[1]


def test_a_push_that_failed_is_not_taken_for_done(tiny_model: Path, renderer: Renderer, wire: Wire) -> None:
    engine = InProcessEngine(tiny_model)
    server = Server(engine, wire)
    failing = [True]

    def answer(request: Request) -> Iterable[bytes | float]:
        if request.line.split()[1] == "/start_weight_update" and failing.pop():
            return [http(b"", status="500 Internal Server Error")]
        return server(request)

    with Peer(answer) as peer:
        sampler, _ = sampler_for(peer, tiny_model, renderer)
        with pytest.raises(RolloutServerError, match="taking the weights: Exception: Request failed: 500"):
            sampler.sample_answers(PROMPTS[:2], [0, 1], seed=5)
        assert engine.pushes == 0
        failing.append(False)
        sampler.sample_answers(PROMPTS[:2], [0, 1], seed=5)
    assert engine.pushes == 1


def test_what_is_relied_upon_of_the_installed_client() -> None:
    """Names and defaults of TRL's client: another TRL must break here and not in a run."""
    client = vllm_client.VLLMClient

    def parameters(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert {"base_url", "group_port", "connection_timeout"} <= set(parameters(client))
    assert parameters(client.check_server) == ["self", "total_timeout", "retry_interval"]
    sent = {"n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "logprobs"}
    assert sent | {"generation_kwargs"} <= set(parameters(client.generate))
    assert parameters(client.generate)[:2] == ["self", "prompts"]
    assert parameters(client.update_named_params) == ["self", "metadata", "named_params"]
    assert parameters(client.init_communicator) == ["self", "device"]
    assert parameters(client.reset_prefix_cache) == parameters(client.close_communicator) == ["self"]
    from trl.scripts.vllm_serve import ScriptArguments, build_command

    command = build_command(ScriptArguments(model="m"))
    assert command[command.index("--logprobs-mode") + 1] == "processed_logprobs", "those at the temperature asked for"
    assert "--weight-transfer-config" in command


# ------------------------------------------------------------------------------------------- what is refused


def change(**fields: Any) -> Callable[[dict[str, Any]], None]:
    """Other fields of a choice; those of `logprobs` are named by themselves."""

    def spoil(choice: dict[str, Any]) -> None:
        for name, value in fields.items():
            (choice["logprobs"] if name in choice["logprobs"] else choice)[name] = value

    return spoil


def answer(ids: list[Any], values: list[Any] | None = None) -> Callable[[dict[str, Any]], None]:
    values = [-1.0] * len(ids) if values is None else values
    return change(
        token_ids=ids,
        tokens=[f"token_id:{token}" for token in ids],
        token_logprobs=values,
        top_logprobs=[None] * len(ids),
    )


def sends(*choices: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda choice: [http(json.dumps({"choices": [choice | more for more in choices]}).encode())]


BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no answer": (sends(), "sent what TRL's client cannot read (IndexError"),
    "two answers": (sends({}, {}), "answers to one prompt: expected 1, got 2"),
    "no tokens": (answer([]), "an answer of 0 tokens; 1 to 6 were asked for"),
    "too long": (answer([7] * 7), "an answer of 7 tokens; 1 to 6 were asked for"),
    "an id beyond the vocabulary": (answer([7, 512, END]), "512 is no token id below 512"),
    "an id below 0": (answer([-1, END]), "-1 is no token id below 512"),
    "an id that is no number": (change(token_ids=[7, "8", END]), "'8' is no token id"),
    "more after the end": (answer([7, END, 8]), "an answer goes on after its end token 2"),
    "broken off": (answer([7, 8]), "an answer broke off after 2 of 6 tokens without an end token"),
    "another prompt": (change(prompt_token_ids=[1]), "answered another prompt"),
    "above 0": (answer([7, END], [-1.0, 0.25]), "0.25 is no log-probability"),
    "not a number": (answer([7, END], [math.nan, -1.0]), "None is no log-probability"),
    "infinite": (answer([7, END], [-math.inf, -1.0]), "-inf is no log-probability"),
    "of other tokens": (change(token_ids=[7, 9, END]), "are not those of the answer's 3 tokens"),
    "too few": (change(token_ids=[7, 8, 9, END]), "the 3 log-probabilities are not those of the answer's 4 tokens"),
    "no log-probabilities": (change(logprobs=None), "sent no log-probabilities"),
    "no JSON": (lambda choice: [http(b"<html>")], "sent what TRL's client cannot read"),
    "other JSON": (
        lambda choice: [http(b'{"text": "hi"}')],
        "sent what TRL's client cannot read (KeyError: 'choices')",
    ),
    "an error": (
        lambda choice: [http(b'{"error":\n "too long"}', status="400 Bad Request")],
        'Exception: Request failed: 400, {"error": "too long"}',
    ),
    "a broken connection": (lambda choice: [RESET], "ConnectionError"),
    "silence": (lambda choice: [5.0], "no answer within vllm.timeout_seconds 0.5"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_no_answer_can_be_is_refused_in_one_line_with_the_address(
    tiny_model: Path, renderer: Renderer, wire: Wire, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(None, wire)
    monkeypatch.setattr(VllmSampler, "push_weights", lambda self: None)
    with Peer(server) as peer:
        sampler, _ = sampler_for(peer, tiny_model, renderer, seconds=0.5 if case == "silence" else 20.0)
        good = sampler.sample_answers(PROMPTS[:2], [0, 1], seed=5)
        assert good[1] == [[7, 8, END]] * 2
        assert good[2][0].tolist() == [-0.5, -1.25, 0.0]
        server.spoil, expected = BAD[case]
        with pytest.raises(RolloutServerError) as caught:
            sampler.sample_answers(PROMPTS[:2], [0, 1], seed=5)
    said = str(caught.value)
    assert said.startswith(f"vllm server {peer.url}/, answering: ")
    assert expected in said
    assert "\n" not in said
    assert server.paths.count("/v1/completions") <= 4, "nothing is asked twice"


# ---------------------------------------------------------------------------------------------------- recipe


def test_a_server_may_move_but_not_come_or_go_within_a_run() -> None:
    here, there = (Vllm(base_url=f"http://{host}:8000", group_port=port) for host, port in (("a", 1), ("b", 2)))
    plain, first, second = (ppo_recipe(Path("m"), vllm=settings) for settings in (None, here, there))
    assert plain.hash == ppo_recipe(Path("m")).hash
    assert first.hash == second.hash != plain.hash


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"vllm": {"base_url": "127.0.0.1:8000"}}, "base_url: is no URL of a server"),
        ({"vllm": {"base_url": "http://me:secret@host"}}, "base_url: holds a user name"),
        ({"vllm": {"base_url": "http://host", "group_port": 70_000}}, "less than or equal to 65535"),
        ({"vllm": {"base_url": "http://host", "timeout": 5}}, "Extra inputs are not permitted"),
        ({"vllm": {"base_url": "http://host"}, "trainer": "grpo", "num_generations": 2}, "vllm"),
        (
            {"vllm": {"base_url": "http://host"}, "model_init": {"quantization": "nf4"}, "lora": {}},
            "the server takes whole weights",
        ),
    ],
)
def test_the_section_is_strict(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        ppo_recipe(Path("m"), **settings)


def test_prompts_over_the_limit_are_refused_as_in_process(tiny_model: Path, renderer: Renderer, wire: Wire) -> None:
    from reward.render import TooLong

    with Peer(Server(InProcessEngine(tiny_model), wire)) as peer:
        sampler, _ = sampler_for(peer, tiny_model, renderer)
        with pytest.raises(TooLong):
            sampler.sample_answers([Prompt.of("word " * 3000)], [0], seed=1)
